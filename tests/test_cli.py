"""The command line: its flags, solvers of one's own, what it says wherever it is shown."""

import io
import json
import os
import sys
from types import SimpleNamespace

import pytest

import kdpp
from kdpp.cli import MODULES, TAKES_NO_FILES, main
from kdpp.lab import asked, bench, evaluate, plugins
from kdpp.lab.looks import Look
from kdpp.lab.models import load_model
from kdpp.lab.spec import cells_of

PAIR = ["digits:student", "digits:teacher"]
SMALL = ["digits:student", "--images", "8", "--seeds", "1"]
MINE = """
from kdpp.plan import euler_row, Step
from kdpp.solver import Option, solver

@solver(order=1, options={"boost": Option(1.0, low=0.0)})
def NAME(sigmas, boost):
    "Euler, by hand."
    for sigma, after in zip(sigmas, sigmas[1:]):
        yield Step.single(sigma, after, euler_row(sigma, after))
"""


def said(capsys, *arguments):
    """What a command writes to stdout."""
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The sentence that a command ends with."""
    try:
        assert main(list(map(str, arguments))) == 1
    except SystemExit as end:
        assert end.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("kdpp")
    return line


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"kdpp {kdpp.__version__}\n"


def test_solvers(capsys):
    """A table with a line for each; and one of them, by any of its names, with its options."""
    lines = said(capsys, "solvers").splitlines()
    found = {line.split()[0]: line for line in lines[1:] if line[:1].isalpha()}
    assert list(found) == list(kdpp.SOLVERS)
    for name, solver in kdpp.SOLVERS.items():
        assert ("multistep" in found[name]) == solver.multistep
        assert all(option in found[name] for option in solver.options)
    for name in ("dpmpp_2m_sde", "sample_dpmpp_2m_sde_tg"):
        text = said(capsys, "solvers", name)
        assert text.startswith(str(kdpp.SOLVERS["dpmpp_2m_sde"]))
        assert "SDE-DPM-Solver++(2M)" in text and "kdpp.sample_dpmpp_2m_sde_tg" in text
    assert "did you mean 'euler'" in refused(capsys, "solvers", "eulr")


@pytest.mark.parametrize("command", sorted({"solvers", *MODULES} - TAKES_NO_FILES))
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and "--import FILE.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", *SMALL, "--out", "x", "--scale", "1"], "--scale is --teacher-scale now"),
        (["evaluate", *SMALL, "--out", "x", "--guided-steps=1"], "is --teacher-steps now"),
        (["evaluate", *SMALL, "--out", "x", "--teacher-cfg", "1"], "is --teacher-cfg-scale now"),
        (["evaluate", *SMALL, "--out", "x", "--cfg", "1"], "--cfg is --cond-scale now"),
        (["evaluate", *SMALL, "--out", "x", "--seed", "1"], "--seed is --seeds"),
        (["evaluate", *SMALL, "--out", "x", "--renoise-et", "1"], "did you mean '--renoise-eta'"),
        (["tune", *PAIR, "--out", "x", "--guidance", "1"], "is --teacher-cfg-scale now"),
        (["compare", "a.toml", "--out", "x", "--devise", "cpu"], "did you mean '--device'"),
        (["compare", "a.toml", "--out", "x"], "a.toml could not be read"),
        (["evaluate", *SMALL, "--out", "x", "--import", "no.py"], "no Python file at"),
        (["evaluate", *SMALL, "--out", "x", "--cond-scale", "1e308"], "without overflow"),
        (["tune", *PAIR, "--out", "x", "--samples", "3"], "--samples is 3"),
        (["tune", *PAIR, "--out", "x", "--teacher-cfg-scale", "1e308"], "without overflow"),
        (["tune", *PAIR, "--out", "x", "--seed", "9" * 30], "below 1,000,000,000,000"),
    ],
)
def test_bad_arguments(arguments, said, capsys, tmp_path, monkeypatch):
    """One sentence, with the flag to take instead; nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


# Solvers of one's own -----------------------------------------------------------------------------


def test_a_solver_of_ones_own_in_every_command(solvers, capsys, tmp_path):
    """From a file, with its options, by its name; a file is run once in a process."""
    mine = tmp_path / "mine.py"
    mine.write_text(MINE.replace("NAME", "by_hand"))
    load = ["--import", mine]
    assert "by_hand" in said(capsys, "solvers", *load)
    assert "Euler, by hand" in said(capsys, "solvers", "by_hand", *load)
    own = ["--sampler", "by_hand"]
    said(capsys, "evaluate", *SMALL, *own, "--option", "boost=2", "--out", tmp_path / "e", *load)
    text = f'images = 8\nseeds = 1\n[students]\na = "{SMALL[0]}"\n[[grid]]\nstudent = "a"\n'
    (tmp_path / "spec.toml").write_text(text + 'sampler = ["by_hand", "euler"]\n')
    said(capsys, "compare", tmp_path / "spec.toml", "--out", tmp_path / "c", *load)
    cells = json.loads((tmp_path / "c" / "results.json").read_text())["cells"]
    assert [cell["sampler"] for cell in cells] == ["by_hand", "euler"]
    assert cells[0]["metrics"]["fd"] == cells[1]["metrics"]["fd"]
    evaluated = json.loads((tmp_path / "e" / "results.json").read_text())["cells"][0]
    assert evaluated["options"] == {"boost": 2.0} and evaluated["sampler"] == "by_hand"
    found = said(capsys, "tune", *PAIR, *own, "--samples", "20", "--out", tmp_path / "t", *load)
    assert "by_hand" in json.loads((tmp_path / "t" / "tuning.json").read_text())["sampler"]
    assert "wrote" in found


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("x = 1 / (sigmas[0] - sigmas[0])", "ZeroDivisionError: float division by zero"),
        ("x = None.steps", "AttributeError: 'NoneType' object has no attribute 'steps'"),
        ("Step.single(2.0, 1.0, Row(1.0, 1.0))", "ValueError: the weights of Row(target=1.0"),
    ],
)
def test_a_mistake_in_a_file_of_ones_own_is_named_by_its_line(
    mistake, words, solvers, capsys, tmp_path
):
    mine = tmp_path / "mine.py"
    plan = f"@solver(order=1)\ndef mistaken(sigmas):\n    {mistake}\n    return []\n"
    mine.write_text(f"from kdpp.plan import Row, Step\nfrom kdpp.solver import solver\n{plan}")
    assert f"kdpp: {mine}, line 5: {words}" in refused(
        capsys, "evaluate", *SMALL, "--sampler", "mistaken", "--out", tmp_path / "e",
        "--import", mine,
    )  # fmt: skip
    assert not (tmp_path / "e").exists()


def test_a_solver_of_an_installed_package(solvers, capsys, tmp_path, monkeypatch):
    """Found by its entry point, in the group kdpp.solvers; one that fails is named."""
    (tmp_path / "theirs.py").write_text(MINE.replace("NAME", "theirs"))
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[kdpp.solvers]\ntheirs = theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins.load_entry_points.cache_clear()
    assert "theirs" in said(capsys, "solvers")
    (about / "entry_points.txt").write_text("[kdpp.solvers]\nbroken = nowhere\n")
    plugins.load_entry_points.cache_clear()
    assert "theirs, installed here, offers kdpp.solvers 'broken'" in refused(capsys, "solvers")
    plugins.load_entry_points.cache_clear()


# What it says, and where --------------------------------------------------------------------------

COMMANDS = {
    "evaluate": (["evaluate", *SMALL], {"results.json", "results.csv", "grid.png", "cells"}),
    "tune": (["tune", *PAIR, "--samples", "20"], {"parts", "tuning.json", "tuning.png"}),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_greek(command, encoding, tmp_path, monkeypatch):
    """What it cannot show is a question mark; the files are there."""
    content = io.BytesIO()
    arguments, files = COMMANDS[command]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding))
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == files
    sys.stdout.flush()
    shown = content.getvalue().decode(encoding)
    assert "wrote" in shown and ("?" in shown or encoding == "cp1252")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_pipe(command, tmp_path, monkeypatch, capsys):
    """Nobody reads what is printed, as under `| head -1`: no failure, and the files are there."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments, files = COMMANDS[command]
    with open(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main([*arguments, "--out", str(tmp_path)]) == 0
        monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize(
    ("arguments", "place", "words"),
    [
        (["evaluate", *SMALL], (bench.Bench, "carry_out"), "give the same command again"),
        (["compare", "--example"], (bench.Bench, "carry_out"), "give the same command again"),
        (["tune", *PAIR], (asked.Work, "run"), "give the same command again"),
    ],
)
def test_ctrl_c(arguments, place, words, tmp_path, monkeypatch, capsys):
    """One line that says how to go on, and the status of an interrupted program."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(*place, interrupted)
    assert main([*arguments, "--out", str(tmp_path)]) == 130
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("kdpp: stopped; ") and words in lines[-1]
    assert not any("Traceback" in line for line in lines)


# What is tuned, measured --------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.978, 2.391, -0.25])
def test_what_tune_advises_is_taken_by_evaluate(scale, tmp_path):
    """The command that it prints is a spec with these settings, λ outside [0, 1] too."""
    look = Look("teacher", 3, 0.277, 0.277282, 0.0, 1.0, scale=scale)
    student, teacher = map(load_model, PAIR)
    recipe = asked.Recipe(student, teacher, "lcm", student.levels_for())
    tuning = SimpleNamespace(by="teacher", guide=True, settings=look.settings)
    request = asked.Request(student=PAIR[0], teacher=PAIR[1])
    wanted = asked.Asked(request, recipe, 2.0, None, asked.LAB, 0)
    words = asked.shlex.split(wanted.command(tuning))
    assert words[:2] == ["kdpp", "evaluate"]
    parser = evaluate.argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    spec = evaluate.spec_of(parser.parse_args(words[2:]))
    cells = cells_of(spec, {"model": student}).cells
    assert [cell.guide for cell in cells] == ["none", "teacher", "self"]
    expected = {"extrapolate": False, **look.settings, "teacher_steps": (3,)}
    assert cells[1].keywords == expected
    kdpp.TeacherGuidedDenoiser(student.denoiser, teacher.denoiser, **look.settings)
