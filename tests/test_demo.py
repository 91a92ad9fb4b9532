"""The demo, small: its table, its pictures, its sentence; the figures' signs at full size."""

import dataclasses
import errno
import os
import sys
import tempfile

import pytest
import torch

import kdpp
from kdpp.cli import main
from kdpp.digits import demo
from kdpp.digits.metrics import Scores


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two seeds of 300 images: the ways, and the folder."""
    out = tmp_path_factory.mktemp("demo")
    return demo.run_demo(0, out, seeds=2, images=300), out


def test_nobody_reads_what_is_printed(tmp_path, monkeypatch):
    """As under `| head -1`, each line written at once: no failure, and the files are there."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        demo.run_demo(0, tmp_path, seeds=2, images=20)
        monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 3


def test_ways_and_evaluations(small):
    """Each way to sample is there, with the evaluations that its networks really made."""
    ways, _ = small
    assert [(way.name.strip(), way.evaluations) for way in ways.values()] == [
        ("student, 4 steps", (4, 0)),
        ("+ teacher, first step, λ = 0.1", (4, 2)),
        ("+ teacher, first step, λ = 0.5", (4, 2)),
        ("+ teacher, last step, λ = 1.17", (4, 1)),
        ("+ itself, first step, λ = 0.1", (5, 0)),
        ("+ itself, first step, λ = 0.5", (5, 0)),
        ("+ itself, last step, λ = 1.17", (5, 0)),
        ("student, 5 steps", (5, 0)),
        ("student, 6 steps", (6, 0)),
        ("teacher, 4 steps", (0, 8)),
        ("teacher, 50 steps", (0, 100)),
    ]


def test_the_teacher_helps_this_student(small):
    """λ = 0.5 lowers FD in every pair, by more than the student in the teacher's place does."""
    ways, _ = small
    base, strong, late, control = (ways[n] for n in ("student", "strong", "late", "self_strong"))
    for first, last, itself in zip(*(demo.changes(way, base) for way in (strong, late, control))):
        assert last < first - 2 and first < itself - 0.5 and itself < -0.5


def test_table_and_pictures_are_written(small):
    """table.txt holds a line for each row and the verdict; both pictures are PNG files."""
    ways, out = small
    text = (out / "table.txt").read_text(encoding="utf-8")
    assert all(way.name in text for way in ways.values()) and "\nreal digits" in text
    assert "The teacher at the first of 4 steps: FD -" in text
    for name in ("grids.png", "guided_step.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_ways_share_their_noise(small):
    """Ways start from the same noise: without a teacher's share the images are the same."""
    ways, _ = small
    base, weak = ways["student"], ways["weak"]
    teacher = weak.model.teachers[0].denoiser
    model = kdpp.TeacherGuidedDenoiser(weak.model.student, teacher, teacher_scale=0.0)
    silent = dataclasses.replace(weak, model=model)
    assert torch.equal(base.run(3, 20)[0], silent.run(3, 20)[0])
    assert not torch.equal(base.run(3, 20)[0], weak.run(3, 20)[0])


def test_an_effect_within_its_spread_is_not_seen():
    """A change whose 95 % interval holds 0 is no effect."""

    def way(*distances):
        scores = [Scores(distance, 1.0, 1.0) for distance in distances]
        return demo.Way("", None, None, (), scores=scores)

    base = way(1.0, 1.0, 1.0)
    assert demo.effect(way(1.5, 0.6, 1.0), base) == "no effect seen"
    assert demo.effect(way(0.5, 0.6, 0.4), base) == "FD -0.50 ± 0.25"  # 0.1 · 4.303 / √3


@pytest.mark.parametrize("arguments", [["demo", "--seed", "-1"], ["demo", "--seed", "x"], []])
def test_bad_arguments(arguments, capsys):
    """argparse says what is wrong and ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: kdpp" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    """--out below a file: one sentence and status 1, before any sampling."""
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "out")]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("kdpp: ") and "file" in said.err
    assert "sampling" not in said.err


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """It is there, and no file can be made in it: said before any sampling."""

    def refuse(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(demo, "tqdm", lambda **_: pytest.fail("it began to sample"))
    assert main(["demo", "--out", str(tmp_path)]) == 1
    said = f"kdpp: the folder {tmp_path} cannot be written to (Permission denied); name another"
    assert capsys.readouterr().err.startswith(said)


def test_it_says_at_once_what_it_will_do(tmp_path, monkeypatch, capsys):
    """Before anything is loaded: how much work it is, the folder by default, every file."""
    monkeypatch.setattr(demo, "load_student", lambda: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        main(["demo"])
    said = capsys.readouterr().out
    assert "5 seeds of 1000 digits" in said and "about a minute" in said
    assert "go to kdpp-demo: table.txt, grids.png, guided_step.png" in said
    assert not list(tmp_path.iterdir())


def test_it_writes_what_it_says(small):
    """These files, and nothing else."""
    assert {path.name for path in small[1].iterdir()} == {
        "table.txt", "grids.png", "guided_step.png",
    }  # fmt: skip


def test_missing_matplotlib(tmp_path, monkeypatch, capsys):
    """Without matplotlib the demo says what to install and writes nothing."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "kdpp.digits.pictures", raising=False)
    monkeypatch.delattr(sys.modules["kdpp.digits"], "pictures", raising=False)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'kdpp[lab]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
