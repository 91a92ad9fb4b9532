"""What `kdpp compare` measures a guided student against by default, and how its cells vary."""

import json
import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

import itertools

import kdpp
from kdpp.cli import main
from kdpp.lab import bench, search, study
from kdpp.lab.compare import compare
from kdpp.lab.models import load_model, save_model
from kdpp.lab.sampling import Recipe, draw, image_seeds
from kdpp.lab.schedules import LEVELS, lengthened, levels_on
from kdpp.lab.spec import BestTeacher, Cell, cells_of, evaluations_of, read_spec

SPEC = """
images = 40
seeds = 2
teacher = "digits:teacher"
[students]
small = {small}
[[grid]]
student = "small"
teacher_scale = 0.5
teacher_cfg_scale = 2.0
{grid}
"""


def spec_of(folder, grid="", small='"digits:student"'):
    (folder / "spec.toml").write_text(SPEC.format(grid=grid, small=small), encoding="utf-8")
    return folder / "spec.toml"


def grid_of(path):
    spec = read_spec(path)
    names = spec.students.items()
    return cells_of(spec, {n: load_model(p if isinstance(p, str) else p[0]) for n, p in names})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fair")
    compare(spec_of(folder), folder / "out")
    return json.loads((folder / "out" / "results.json").read_text()), folder / "out"


def test_a_guided_student_is_measured_against_all_three(found):
    """Itself in the teacher's place, as many evaluations as own steps, and the teacher alone."""
    cells = found[0]["cells"]
    said = [(c["student"], c["guide"], c["steps"], c["costs"]["evaluations"]) for c in cells]
    assert said[:4] == [
        ("small", "none", 4, 4), ("small", "teacher", 4, 6), ("small", "self", 4, 5),
        ("small", "none", 6, 6),
    ]  # fmt: skip
    plain, guided, _, longer, alone = cells
    assert guided["longer"] == longer["cell"] and longer["levels"] == list(kdpp.digits.schedule(6))
    assert alone["student"] == "teacher" and alone["costs"]["evaluations"] <= 6
    for name, one in guided["metrics"].items():
        own = [a - b for a, b in zip(one["values"], longer["metrics"][name]["values"])]
        assert one["over_steps"]["mean"] == pytest.approx(fmean(own), abs=1e-12)
        assert plain["metrics"][name]["over_steps"] is None


def test_the_best_teacher_is_the_best_of_the_search(found, tmp_path):
    """Of all that is said to be tried, by FD, on a seed that is not reported."""
    results, out = found
    (note,) = [note for note in results["notes"] if note.startswith("the teacher alone")]
    tried = bench.Bench(read_spec(spec_of(tmp_path)), "cpu", out / "cells")
    scores = {}
    for cell in tried.candidates[BestTeacher(6, 2.0)]:
        assert sum(evaluations_of(cell, tried.teacher)) <= 6 and cell.cond_scale == 2.0
        result = json.loads(tried.path(cell, 0, search.SEARCH_SEED).read_text())
        scores[cell] = result["scores"]["fd"]
    best = min(scores, key=scores.get)
    alone = results["cells"][-1]
    assert (alone["sampler"], alone["levels"]) == (best.sampler, list(best.levels))
    assert f"{best.sampler}, {best.steps} steps" in note and f"lowest FD of {len(scores)}" in note
    assert {cell.sampler for cell in scores} == set(search.SEARCHED)
    made = draw(
        Recipe(load_model("digits:teacher"), None, best.sampler, best.levels, 2.0),
        image_seeds(search.SEARCH_SEED, 40),
    )
    assert tried.judge.scores(tried.teacher, made, None)["fd"] == scores[best]
    assert max(scores.values()) > 1.2 * min(scores.values())


def test_what_the_search_tries_fits_the_evaluations():
    """With CFG a step takes two; Heun's last step takes one; too few for a step are none."""
    teacher = load_model("digits:teacher")
    for count, scale in ((7, 1.0), (7, 2.0), (2, 2.0)):
        cells = list(search.candidates("t", teacher, BestTeacher(count, scale)))
        most = {
            one.sampler: max(c.steps for c in cells if c.sampler == one.sampler) for one in cells
        }
        assert most["unipc"] == count // (1 if scale == 1.0 else 2)
        assert most["heun"] == {7: 4, 3: 2, 1: 1}[most["unipc"]]
    assert not list(search.candidates("t", teacher, BestTeacher(1, 2.0)))


def test_what_is_not_wanted_is_left_out(tmp_path):
    path = spec_of(tmp_path)
    path.write_text("more_steps = false\nbest_teacher = false\nself_control = false\n"
                    + path.read_text())  # fmt: skip
    grid = grid_of(path)
    assert [cell.guide for cell in grid.cells] == ["none", "teacher"] and not grid.teachers


def test_the_front_is_what_nothing_beats():
    costs = {"a": 1.0, "b": 2.0, "c": 2.0, "d": 3.0, "e": 4.0}
    losses = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0, "e": 1.0}
    assert search.front(costs, losses) == ["a", "c", "e"]


def test_the_report_has_the_fronts(found):
    """By definition: of no cell on it is another both at most as dear and better."""
    results, out = found
    cells = {cell["cell"]: cell for cell in results["cells"]}
    for name, better in (("fd", 1), ("coverage", -1)):
        for cost in ("evaluations", "compute", "milliseconds"):
            points = {n: (c["costs"][cost], better * c["metrics"][name]["mean"])
                      for n, c in cells.items()}  # fmt: skip
            expected = {
                n for n, (x, y) in points.items()
                if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
            }  # fmt: skip
            assert set(results["fronts"][name][cost]) == expected
    assert "diversity" not in results["fronts"]
    assert '"fronts":{"fd":{"evaluations":[' in (out / "report.html").read_text(encoding="utf-8")


# Training seeds -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """Three students that differ as training seeds make them differ, and what compare finds."""
    folder = tmp_path_factory.mktemp("trainings")
    student = load_model("digits:student")
    generator = torch.Generator().manual_seed(0)
    for k in range(3):
        network = load_model("digits:student").network
        for value in network.parameters():
            value += 0.02 * value.std() * torch.randn(value.shape, generator=generator)
        save_model(folder / f"s{k}.safetensors", network, student.card)
    small = '["s0.safetensors", "s1.safetensors", "s2.safetensors"]'
    path = spec_of(folder, small=small)
    path.write_text("best_teacher = false\n" + path.read_text())
    compare(path, folder / "out")
    return folder, json.loads((folder / "out" / "results.json").read_text())


def test_training_seeds_are_what_intervals_are_over(trainings):
    """Each training's mean over the sampling seeds is one value; changes pair trainings."""
    folder, results = trainings
    plain, guided, *_ = results["cells"]
    fd = plain["metrics"]["fd"]
    assert [len(one) for one in fd["trainings"]] == [2, 2, 2] and fd["count"] == 3
    assert fd["values"] == [fmean(one) for one in fd["trainings"]]
    assert len({value for one in fd["trainings"] for value in one}) == 6
    change = [a - b for a, b in zip(guided["metrics"]["fd"]["values"], fd["values"])]
    assert guided["metrics"]["fd"]["change"]["mean"] == pytest.approx(fmean(change))
    assert len(results["models"]["small"]["weights"]) == 3
    alone = load_model(folder / "s1.safetensors")
    made = draw(Recipe(alone, None, "lcm", alone.levels_for()), image_seeds(1, 40))
    tried = bench.Bench(read_spec(folder / "spec.toml"), "cpu", folder / "out" / "cells")
    assert tried.judge.scores(alone, made, None)["fd"] == fd["trainings"][1][1]
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert "deviation over the trainings" in page


@pytest.mark.parametrize(
    ("small", "said"),
    [
        ("[]", "a list of checkpoints"),
        ('["digits:student", "digits:student"]', "a list of checkpoints"),
        ('["digits:student", "digits:teacher"]', "training seed alone"),
        ('["digits:student", 3]', "a list of checkpoints"),
    ],
)
def test_trainings_that_are_none(tmp_path, small, said):
    with pytest.raises(ValueError, match=said):
        compare(spec_of(tmp_path, small=small), tmp_path / "out")


# Levels -------------------------------------------------------------------------------------------


def test_schedules_are_their_formulas():
    """k-diffusion's Karras and exponential; log σ and arctan σ evenly spaced."""
    low, high = 0.03, 14.0
    near = dict(rel=1e-5)
    karras = kdpp.kdiffusion.sampling.get_sigmas_karras(6, low, high)
    assert levels_on("karras", 6, low, high) == pytest.approx(karras.tolist(), **near)
    exponential = kdpp.kdiffusion.sampling.get_sigmas_exponential(6, low, high)
    assert levels_on("exponential", 6, low, high) == pytest.approx(exponential.tolist(), **near)
    logs = [math.log(s) for s in levels_on("log_uniform", 6, low, high)]
    assert len({round(a - b, 9) for a, b in itertools.pairwise(logs)}) == 1 and len(logs) == 7
    angles = [math.atan(s) for s in levels_on("cosine", 6, low, high)[:-1]]
    assert len({round(a - b, 9) for a, b in itertools.pairwise(angles)}) == 1 and len(angles) == 6
    for kind in LEVELS:
        for steps in (1, 2, 5):
            found = levels_on(kind, steps, low, high)
            assert len(found) == steps + 1 and sorted(found, reverse=True) == list(found)
            assert found[-1] == (low if kind == "log_uniform" else 0.0)


def test_levels_are_lengthened_in_between():
    """Given levels get steps more; the ends stay, and no step is as good as skipped."""
    for levels in ((14.6, 1.6, 0.6, 0.277, 0.0), (5.0, 1.0), (14.6, 0.0), (9.0, 3.0, 0.0)):
        for more in (1, 2):
            found = lengthened(levels, more)
            assert len(found) == len(levels) + more
            assert (found[0], found[-1]) == (levels[0], levels[-1])
            assert all(a > b for a, b in itertools.pairwise(found))


def test_schedules_are_an_axis(tmp_path):
    """Each name makes the cell of its levels, from the model's own range."""
    path = spec_of(
        tmp_path, 'steps = [4, 6]\nsampler = "dpmpp_2m"\nschedule = ["karras", "cosine"]'
    )
    grid = grid_of(path)
    plain = [cell for cell in grid.cells if cell.guide == "none" and cell.steps in (4, 6)]
    denoiser = load_model("digits:student").denoiser
    reach = float(denoiser.sigma_min), float(denoiser.sigma_max)
    for kind in ("karras", "cosine"):
        for steps in (4, 6):
            assert levels_on(kind, steps, *reach) in [cell.levels for cell in plain]
    guided = next(cell for cell in grid.cells if cell.guide == "teacher")
    assert grid.longer[guided].levels == lengthened(guided.levels, 2)
    for wrong, said in (
        ('schedule = "karas"', "did you mean 'karras'"),
        ('schedule = "karras"\nlevels = [[3.0, 0.0]]', "say the same"),
    ):
        with pytest.raises(ValueError, match=said):
            grid_of(spec_of(tmp_path, wrong))


def test_evaluations_are_counted_before_the_work():
    """As many as `draw` counts, for plain and guided cells, with CFG and without."""
    student, teacher = load_model("digits:student"), load_model("digits:teacher")
    levels = student.levels_for(4)
    for sampler, scale in (("lcm", 1.0), ("heun", 1.5), ("unipc", 1.0)):
        cell = Cell("s", sampler, levels, scale)
        made = draw(Recipe(student, None, sampler, levels, scale), range(2))
        assert evaluations_of(cell, student) == made.evaluations
        guidance = {"teacher_scale": 0.5, "teacher_steps": 2, "teacher_cfg_scale": 2.0}
        made = draw(Recipe(student, teacher, sampler, levels, scale, guidance), range(2))
        from kdpp.lab.spec import Guidance

        guided = replace(cell, guide="teacher", guidance=Guidance(**guidance))
        assert evaluations_of(guided, student) == made.evaluations


# Which solver? ------------------------------------------------------------------------------------


def test_which_solver(tmp_path, monkeypatch, capsys):
    """One command: every solver on every schedule, with no more calls than asked for; the answer
    names the lowest FD, and the plot is there."""
    pytest.importorskip("matplotlib")
    names = ["euler", "unipc", "heun", "euler_ancestral"]
    monkeypatch.setattr(study, "studied", lambda: names)
    monkeypatch.setattr(study, "EVALUATIONS", (3, 5))
    monkeypatch.setattr(study, "SCHEDULES", (None, "karras"))
    words = ["--solvers", "digits:student", "--cond-scale", "1", "--images", "60", "--seeds", "2"]
    assert main(["compare", *words, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    kinds = {(c["sampler"], c["schedule"], c["steps"]) for c in found["cells"]}
    steps = {"euler": (3, 5), "unipc": (3, 5), "heun": (2, 3), "euler_ancestral": (3, 5)}
    assert kinds == {(n, s, k) for n in names for s in ("", "karras") for k in steps[n]}
    assert all(c["costs"]["evaluations"] in (3, 5) for c in found["cells"])
    said = capsys.readouterr().out
    for count in (3, 5):
        cells = [c for c in found["cells"] if c["costs"]["evaluations"] == count]
        first = min(cells, key=lambda c: c["metrics"]["fd"]["mean"])
        levels = first["schedule"] or "own levels"
        mean = first["metrics"]["fd"]["mean"]
        assert f"{count} evaluations: {first['sampler']} ({levels}) {mean:.2f}" in said
    assert (tmp_path / "out" / "solvers.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "model, unipc, karras" in page


def test_the_study_has_the_solvers_of_given_levels():
    """None that makes its own levels, and none of CFG++, which takes other CFG scales."""
    names = study.studied()
    assert {"euler", "unipc", "dpmpp_2m", "heun", "deis", "er_sde"} <= set(names)
    assert not {"dpm_fast", "euler_cfg_pp"} & set(names)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--solvers", "digits:techer"], "did you mean 'digits:teacher'"),
        (["--solvers", "digits:teacher", "--images", "2"], "images is 2"),
        (["--solvers", "digits:teacher", "--seeds", "0"], "seeds is 0"),
    ],
)
def test_what_cannot_be_studied(words, said, tmp_path, capsys):
    assert main(["compare", *words, "--out", str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
