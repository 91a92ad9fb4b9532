"""`kdpp evaluate`: what it says, what it keeps, what it refuses; killed at any moment.

``python tests/test_lab_evaluate.py N FOLDER`` kills N evaluations; the test, a few.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tqdm import tqdm

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from kdpp.lab import evaluate, files, sampling
from kdpp.lab.data import load_data
from kdpp.lab.metrics import METRICS, Points, load_features, measure
from kdpp.lab.models import load_model, save_model
from kdpp.lab.sampling import Recipe, draw, image_seeds, levels_for

PAIR = ["digits:student", "--teacher", "digits:teacher", "--scale", "0.5"]
SMALL = ["--images", "40", "--seeds", "2"]


def run(*arguments):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.run(parser.parse_args(list(map(str, arguments))))


def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def figures(folder):
    """The results without what they took."""
    found = results(folder)
    return {**found, "ways": [{**way, "timing": None} for way in found["ways"]]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished evaluation of the shipped pair."""
    folder = tmp_path_factory.mktemp("finished")
    run(*PAIR, *SMALL, "--out", folder)
    return folder


@pytest.fixture
def again(finished, tmp_path):
    """A copy of it, to go on in."""
    return shutil.copytree(finished, tmp_path / "again")


@pytest.fixture
def sampled(monkeypatch):
    """How many batches of more than one image were sampled."""
    sizes, sample = [], sampling._sample

    def counted(recipe, seeds, *rest):
        sizes.append(len(seeds))
        return sample(recipe, seeds, *rest)

    monkeypatch.setattr(sampling, "_sample", counted)
    return lambda: sum(size > 1 for size in sizes)


# What it says -------------------------------------------------------------------------------------


def test_figures_are_those_of_the_metrics(finished):
    """Every way's scores of the second seed, measured here from images drawn here."""
    student, teacher = load_model("digits:student"), load_model("digits:teacher")
    images, _ = load_data("digits").images, load_data("digits").labels
    features = load_features("digits", images, 10)
    own = Recipe(teacher, None, "euler", levels_for(teacher, 50), 2.0)
    references = (
        Points(features(images)), Points(features(draw(own, image_seeds(10**9, 40)).x)),
    )  # fmt: skip
    levels = levels_for(student, 4)
    guidance = {"teacher_scale": 0.5, "teacher_cfg_scale": 2.0}
    ways = {
        "alone": (Recipe(student, None, "lcm", levels), (4, 0)),
        "with teacher": (Recipe(student, teacher, "lcm", levels, guidance=guidance), (4, 2)),
        "with itself": (
            Recipe(student, student, "lcm", levels,
                   guidance={**guidance, "teacher_cfg_scale": 1.0}),
            (5, 0),
        ),
    }  # fmt: skip
    found = {way["way"]: way for way in results(finished)["ways"]}
    assert list(found) == list(ways)
    for name, (recipe, evaluations) in ways.items():
        made = draw(recipe, image_seeds(1, 40))
        scores = measure(made.x, made.labels, features, *references)
        assert {m: v["values"][1] for m, v in found[name]["metrics"].items()} == scores
        assert tuple(found[name]["evaluations"].values()) == evaluations


def test_changes_are_paired(finished):
    """Against the student alone; of the teacher's help against the student's own, too."""
    alone, taught, itself = results(finished)["ways"]
    for name in METRICS:
        values = [way["metrics"][name]["values"] for way in (alone, taught, itself)]
        assert alone["metrics"][name]["change"] is None
        for way, base, kind in ((1, 0, "change"), (2, 0, "change"), (1, 2, "own_share")):
            change = (alone, taught, itself)[way]["metrics"][name][kind]
            pairs = [a - b for a, b in zip(values[way], values[base])]
            assert change["mean"] == pytest.approx(sum(pairs) / 2)
            half = 12.706 * abs(pairs[0] - pairs[1]) / 2  # t of one degree; s/√2
            assert change["high"] - change["mean"] == pytest.approx(half, rel=1e-3)
            assert (change["verdict"] == "none seen") == (change["low"] <= 0 <= change["high"])
        assert itself["metrics"][name]["own_share"] is None


def test_the_table_and_the_files(finished, again, capsys):
    """A line for every metric and cost, the verdicts in words; a CSV row for every way; a PNG."""
    run(*PAIR, *SMALL, "--out", again)
    said = capsys.readouterr().out
    found = results(finished)
    lines = {line.split("  ")[0]: line for line in said.splitlines()}
    for metric in METRICS.values():
        assert metric.title in lines
    fd = found["ways"][1]["metrics"]["fd"]
    assert evaluate._shown(fd) in lines["FD"]
    for name, metric in METRICS.items():
        changes = [
            found["ways"][way]["metrics"][name][kind]
            for way, kind in ((1, "change"), (1, "own_share"), (2, "change"))
        ]
        seen = [change for change in changes if change["verdict"] != "none seen"]
        assert lines[metric.title].count("none seen") == 3 - len(seen)
        assert all(evaluate._shown(change, "+") in lines[metric.title] for change in seen)
    assert lines["evaluations, teacher"].split()[2:] == ["0", "2", "0"]
    with open(finished / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == ["alone", "with teacher", "with itself"]
    assert float(rows[1]["fd.mean"]) == fd["mean"]
    assert float(rows[1]["guidance.teacher_scale"]) == 0.5 and not rows[0]["fd.change.mean"]
    assert "fd.change" not in rows[0] and "timing.milliseconds" in rows[0]
    assert (finished / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert found["data"]["accuracy"] > 0.99 and found["settings"]["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (10.8012, 0.3081, "10.80 ± 0.31"),
        (-0.4712, 0.0213, "-0.471 ± 0.021"),
        (12345.6, 250.0, "12346 ± 250"),
        (0.5, 0.0, "0.500 ± 0.000"),
        (0.98123, None, "0.9812"),
    ],
)
def test_figures_are_rounded_to_what_is_known(mean, half, text):
    high = None if half is None else mean + half
    assert evaluate._shown({"mean": mean, "high": high}) == text


def test_a_grid_shows_the_first_images():
    """Class by class, one line under the other, clamped, in grey or in colour."""
    images = torch.linspace(-2, 2, 6).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    tiles = evaluate._mosaic(images, 2, 3)
    assert tiles.shape == (6, 9, 3)
    assert tiles[0, ::3, 0].tolist() == pytest.approx([0, 0, 0.3])
    assert tiles[3, ::3, 0].tolist() == pytest.approx([0.7, 1, 1])
    assert tiles[2].max() == tiles[:, 2].max() == 0  # the gaps
    assert evaluate._mosaic(images[:5, :1], 2, 3).shape == (6, 9)


# What it keeps ------------------------------------------------------------------------------------


def test_what_is_finished_is_not_sampled_again(finished, again, sampled):
    """The same files, byte for byte; a third seed adds its three parts only."""
    run(*PAIR, *SMALL, "--out", again)
    assert sampled() == 0
    for name in ("results.json", "results.csv", "grid.png"):
        assert (again / name).read_bytes() == (finished / name).read_bytes()
    run(*PAIR, "--images", 40, "--seeds", 3, "--out", again)
    assert sampled() == 3
    old, new = figures(finished)["ways"], figures(again)["ways"]
    for a, b in zip(old, new):
        assert all(b["metrics"][m]["values"][:2] == a["metrics"][m]["values"] for m in METRICS)


@pytest.mark.parametrize(
    ("changes", "batches"),
    [
        (["--scale", "0.4"], 4),  # the student alone is there
        (["--teacher-cfg", "1.5"], 7),  # the teacher's own samples change, and all distances
        (["--features", "pixels"], 7),
        (["--images", "41"], 7),
        (["--cfg", "1.2"], 6),
    ],
)
def test_what_other_settings_change_is_sampled(changes, batches, again, sampled):
    run(*PAIR, *SMALL, *changes, "--out", again)
    assert sampled() == batches


def test_a_damaged_part_is_made_again(finished, again, sampled):
    part = max((again / "parts").iterdir(), key=lambda path: path.stat().st_mtime)
    part.write_bytes(part.read_bytes()[:50])
    run(*PAIR, *SMALL, "--out", again)
    assert sampled() == 1 and figures(again) == figures(finished)


def test_no_batches_are_left(finished):
    assert {path.suffix for path in (finished / "parts").iterdir()} == {".safetensors"}
    assert sorted(path.name for path in finished.iterdir()) == [
        "grid.png", "parts", "results.csv", "results.json",
    ]  # fmt: skip


def test_images_that_are_not_finite(tmp_path):
    """Say whose they are; what was finished before stays."""
    student = load_model("digits:student")
    with torch.no_grad():
        student.network.leave.bias.fill_(3e38)
    save_model(tmp_path / "broken", student.network, student.card)
    with pytest.raises(ValueError, match="alone, seed 0: images must be finite"):
        run(tmp_path / "broken", *SMALL, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def mortal(write, folder, *, after):
    """Be killed at the ``write``-th time that a file is put in its place, before or after it."""
    replace, left = os.replace, [write]

    def replaced(*paths):
        left[0] -= 1
        if not left[0] and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    files.os.replace = replaced
    evaluation(folder)


def evaluation(folder):
    """An evaluation of two batches a part, each written at once."""
    sampling.PATIENCE = 0.0
    evaluate.draw = lambda *a, **k: draw(*a, **k, chunk=10)
    data = folder.parent / "data.safetensors"
    run(*PAIR, "--data", data, "--images=20", "--seeds=2", "--out", folder)


def forked(work):
    """Do the work in a process of its own: its number."""
    child = os.fork()
    if child:
        return child
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def kill_evaluations(count, folder):
    """Kill evaluations as they write, and at random moments; compare what those after them find."""
    tqdm.monitor_interval = 0  # a thread, which is not forked
    latents = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = {"latents": 2 * latents, "labels": torch.arange(40) % 10}
    save_file(data, folder / "data.safetensors")
    evaluation(folder / "whole")
    for after in (False, True):
        ends = [-signal.SIGKILL]
        while ends[-1] == -signal.SIGKILL:  # at the fifth write of each, until one has no fifth
            ends.append(end_of(forked(lambda: mortal(5, folder / f"{after}", after=after))))  # noqa: B023
        print(ends)
        assert ends[-1] == 0 and len(ends) > 4
    chance = random.Random(0)
    for _ in range(count):
        child = forked(lambda: evaluation(folder / "random"))
        time.sleep(chance.uniform(0.0, 0.7))
        os.kill(child, signal.SIGKILL)
        end_of(child)
    assert end_of(forked(lambda: evaluation(folder / "random"))) == 0
    for name in ("False", "True", "random"):
        assert figures(folder / name) == figures(folder / "whole")
        assert names_in(folder / name) == names_in(folder / "whole")  # and no half-written files


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def end_of(child):
    """How the process ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork every kill takes seconds")
def test_killed_evaluations_lose_nothing_and_change_nothing(tmp_path):
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, __file__, "4", str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, **one_thread, "PYTHONPATH": paths}, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# What it refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digits:student", "--sampler", "eulr"], "did you mean 'euler'"),
        (["digits:studnt"], "did you mean 'digits:student'"),
        (["digits:student", "--scale", "0.3"], "--scale needs a teacher"),
        (["digits:student", "--guided-steps", "[1]"], "--guided-steps needs a teacher"),
        ([*PAIR, "--guided-steps", "[9]"], "the schedule has 4 steps"),
        ([*PAIR, "--renoise", "nxt"], "renoise is 'nxt'"),
        ([*PAIR, "--scale", "2"], "teacher_scale is 2.0"),
        (["digits:student", "--option", "eat=1"], "unknown option of lcm 'eat'"),
        (["digits:student", "--option", "eta"], "NAME=VALUE"),
        (["digits:student", "--sampler", "dpm_2_ancestral", "--option", "eta=a"], "eta is 'a'"),
        (["digits:student", "--features", "digit"], "features is 'digit'"),
        (["digits:student", "--images", "3"], "--images is 3"),
        (["digits:student", "--seeds", "0"], "--seeds is 0"),
        (["digits:student", "--seed", "-1"], "--seed is -1"),
        (["digits:student", "--steps", "0"], "steps is 0"),
        (["digits:student", "--device", "gpu"], "device"),
        (["digits:student", "--data", "{data}"], "the data have"),
    ],
)
def test_bad_arguments(arguments, said, tmp_path, sampled):
    """One sentence, before any sampling."""
    save_file({"images": torch.zeros(5, 1, 4, 4)}, tmp_path / "data.safetensors")
    given = [text.format(data=tmp_path / "data.safetensors") for text in arguments]
    with pytest.raises(ValueError, match=said):
        run(*given, "--out", tmp_path / "out")
    assert sampled() == 0 and not list(tmp_path.glob("out/*.*"))


@pytest.mark.parametrize("steps", ["x", "[1"])
def test_steps_that_are_no_numbers(steps, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(*PAIR, "--guided-steps", steps, "--out", tmp_path)
    assert "no number and no list" in capsys.readouterr().err


def test_missing_matplotlib(tmp_path, monkeypatch, sampled):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'kdpp\[lab\]'"):
        run(*PAIR, *SMALL, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists() and sampled() == 0


def test_folders_that_cannot_be_used(tmp_path):
    """A file in the folder's place; a folder that another run writes to."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(*PAIR, *SMALL, "--out", tmp_path / "file")
    (tmp_path / "busy").mkdir()
    with files.locked(tmp_path / "busy"), pytest.raises(BlockingIOError, match="another run"):
        run(*PAIR, *SMALL, "--out", tmp_path / "busy")


def test_latents_have_no_picture(tmp_path):
    """Data outside [-1, 1]: measured as they are, in "pixels", without a grid."""
    torch.manual_seed(0)
    latents = {"latents": 2 * torch.randn(40, 1, 8, 8), "labels": torch.arange(40) % 10}
    save_file(latents, tmp_path / "data.safetensors")
    run("digits:student", "--data", tmp_path / "data.safetensors", *SMALL, "--out", tmp_path)
    found = results(tmp_path)
    assert found["settings"]["features"] == "pixels" and not (tmp_path / "grid.png").exists()
    assert "accuracy" not in found["ways"][0]["metrics"] and found["own_samples"] is None


if __name__ == "__main__":
    kill_evaluations(int(sys.argv[1]), Path(sys.argv[2]))
