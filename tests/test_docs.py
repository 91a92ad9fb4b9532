"""The docs say what is so: their scripts run, their links hold, they build without a warning."""

import difflib
import importlib.metadata
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdpp
import needs
from kdpp.cli import main
from kdpp.lab.methods import METHODS, load_methods

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"


def run(name, capsys):
    """Run an example as a script: its variables, and what it printed."""
    variables = runpy.run_path(str(EXAMPLES / name))
    return variables, capsys.readouterr().out


@needs.k_diffusion
def test_two_lines_make_a_stock_script_a_guided_one(capsys):
    """The scripts differ in two lines; both run; the teacher changes the images and no more."""
    texts = [(EXAMPLES / name).read_text().splitlines() for name in ("stock.py", "guided.py")]
    changes = [line for line in difflib.ndiff(*texts) if line[0] in "+-"]
    assert [line[0] for line in changes].count("-") == 2
    assert [line[0] for line in changes].count("+") == 2

    stock, stock_said = run("stock.py", capsys)
    guided, guided_said = run("guided.py", capsys)
    assert stock_said.count("step ") == guided_said.count("step ") == len(stock["sigmas"]) - 1
    difference = (guided["images"] - stock["images"]).norm() / stock["images"].norm()
    assert 1e-4 < difference < 0.5
    # Without the teacher the guided script is the stock script.
    student, teacher = guided["model"].student, guided["model"].teachers[0].denoiser
    without = kdpp.TeacherGuidedDenoiser(student, teacher, teacher_scale=0.0)
    torch.manual_seed(0)
    x = torch.randn(10, 1, 8, 8) * guided["sigmas"][0]
    alone = guided["sample"](without, x, guided["sigmas"], guided["extra_args"])
    torch.testing.assert_close(alone, stock["images"], rtol=0, atol=1e-5)


def test_emphasised_lines_are_the_changed_ones():
    """The page points at the lines that differ."""
    stock, guided = ((EXAMPLES / n).read_text().splitlines() for n in ("stock.py", "guided.py"))
    changed = [i for i, (a, b) in enumerate(zip(stock, guided), 1) if a != b]
    pointed = re.findall(r":emphasize-lines: (.*)", (ROOT / "docs" / "migrating.md").read_text())
    assert pointed == [", ".join(map(str, changed))] * 2


def test_the_docs_build_without_a_warning(tmp_path):
    """Sphinx builds every page, warnings being errors."""
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-d", tmp_path / "trees"]
    built = subprocess.run([*command, ROOT / "docs", tmp_path / "html"], capture_output=True,
                           text=True)  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert "TeacherGuidedDenoiser" in (tmp_path / "html" / "api.html").read_text()


def test_readme_commands_and_links():
    """The first screen holds the two commands; what the README points at is there."""
    readme = (ROOT / "README.md").read_text()
    first_screen = readme.splitlines()[:40]
    commands = [line for line in first_screen if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith("kdpp demo") and commands[1].endswith("pytest")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", readme):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("extra", ["plots", "lab", "memory", "diffusers", "docs", "test"])
def test_extras_are_declared(extra):
    """Every extra that the docs name exists."""
    assert extra in importlib.metadata.metadata("kdpp").get_all("Provides-Extra")


def test_the_page_on_adding_a_solver(tmp_path, solvers):
    """Its solvers, under 20 lines each, pass the property tests, which run over them unasked."""
    page = ROOT / "docs" / "adding_a_solver.md"
    codes = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert all(len([line for line in code.splitlines() if line.strip()]) < 20 for code in codes)
    file = tmp_path / "mine.py"
    file.write_text("\n".join(codes), encoding="utf-8")
    suites = ["properties", "order", "parity", "cost", "input", "random_stream", "flow", "calls"]
    suites += ["guidance", "capture", "solver"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider",
         "-k", "ralston or res_2m", *(f"tests/test_{name}.py" for name in suites)],
        cwd=ROOT, env={**os.environ, "KDPP_IMPORT": str(file)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 120
    exec(compile("\n".join(codes), "page", "exec"), {"__name__": "page"})
    sigmas = [14.6, 7.0, 2.0, 0.5, 0.1]
    theirs = solvers["dpmpp_2m_sde"].plan(sigmas, eta=0.0, solver_type="heun")
    for ours, same in zip(solvers["res_2m"].plan(sigmas), theirs):
        assert ours.stages[0].row.direction == pytest.approx(
            same.stages[0].row.direction, abs=1e-14
        )


def test_the_first_page_runs_as_it_stands():
    """In a few lines from nothing to images: those of the student, changed by the teacher."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "start.md").read_text(), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 13
    variables = {}
    exec(compile(code, "start.md", "exec"), variables)
    assert variables["images"].shape == (10, 1, 8, 8) and variables["images"].isfinite().all()
    for name in re.findall(r"`(sample_\w+_tg)`", (ROOT / "docs" / "start.md").read_text()):
        assert hasattr(kdpp, name)


def test_names_in_backticks_lead_to_the_reference(tmp_path):
    """On the pages and in the docstrings."""
    command = [sys.executable, "-m", "sphinx", "-q", "-d", tmp_path / "trees"]
    subprocess.run([*command, ROOT / "docs", tmp_path / "html"], check=True, capture_output=True)
    for page, name in (("start", "sample_lcm_tg"), ("guidance", "Teacher"), ("api", "kdpp.OwnCFG")):
        html = (tmp_path / "html" / f"{page}.html").read_text()
        assert re.search(
            rf'<a class="reference internal" href="[^"]*#[^"]*{name}"[^>]*><code', html
        )


def test_the_page_on_adding_a_method(tmp_path, monkeypatch):
    """Its code, under 45 lines, trains from a file, and the tests of every method pass over it."""
    page = ROOT / "docs" / "adding_a_method.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) < 45
    file = tmp_path / "denoising_student.py"
    file.write_text(code, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider",
         "tests/test_lab_methods.py", "-k", "denoising-student"],
        cwd=ROOT, env={**os.environ, "KDPP_IMPORT": str(file)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) == 7
    methods = dict(load_methods())
    monkeypatch.chdir(tmp_path)
    train, evaluate = commands("docs/adding_a_method.md")
    assert main([*shlex.split(train)[1:], *SHORT["train"]]) == 0
    assert main([*shlex.split(evaluate)[1:], *SHORT["evaluate"], "--out", "measured"]) == 0
    METHODS.clear()
    METHODS.update(methods)


SHORT = {
    "train": ["--iterations", "3", "--batch", "8"],
    "evaluate": ["--images", "100", "--seeds", "2"],
}


def commands(page):
    """The lines of a page's shell blocks that start with ``kdpp``, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("kdpp ")]


@pytest.mark.parametrize(
    "page, count",
    [("README.md", 6), *((f"docs/{name}.md", n) for name, n in
     {"training": 3, "evaluating": 3, "comparing": 1, "tuning": 1,
     "generate": 2}.items())],
)  # fmt: skip
def test_the_lab_s_commands_run_as_they_stand(page, count, tmp_path, monkeypatch):
    """One after the other in an empty folder; flags at the end cut training and measuring short."""
    monkeypatch.chdir(tmp_path)
    found = commands(page)
    assert len(found) == count
    for line in found:
        words = shlex.split(line)[1:]
        if "--list" not in words:
            words += SHORT.get(words[0], [])
        assert main(words) == 0, line
        if "--out" in words:
            out = Path(words[words.index("--out") + 1])
            assert out.is_file() or list(out.iterdir()), line
