"""`kdpp evaluate`: what it says, what it keeps, what it refuses; killed, and by several processes.

``python tests/test_lab_evaluate.py N FOLDER`` kills N evaluations; the test, a few. Without N it is
one process of several.
"""

import argparse
import csv
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from kdpp.lab import evaluate, files, judges, pictures, sampling, statistics
from kdpp.lab.compare import compare
from kdpp.lab.data import Data, load_data
from kdpp.lab.features import load_features
from kdpp.lab.metrics import METRICS, Points, measure
from kdpp.lab.models import load_model, save_model
from kdpp.lab.sampling import Recipe, draw, image_seeds

PAIR = ["digits:student", "--teacher", "digits:teacher", "--teacher-scale", "0.5"]
SMALL = ["--images", "40", "--seeds", "2"]


def run(*arguments):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.run(parser.parse_args(list(map(str, arguments))))


def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def figures(folder):
    """The results without what they took."""
    found = results(folder) | {"finished": None}
    for cell in found["cells"]:
        cell["costs"] |= {"milliseconds": None, "memory": None}
    for fronts in found["fronts"].values():
        fronts["milliseconds"] = None
    return found


def by_guide(folder):
    """The cells, by who guides them."""
    return {cell["guide"]: cell for cell in results(folder)["cells"]}


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
    """Every cell's scores of the second seed, measured here from images drawn here."""
    student, teacher = load_model("digits:student"), load_model("digits:teacher")
    data = load_data("digits")
    features = load_features("digits", data.images, 10)
    against = statistics.of_data(data, features)
    own = Recipe(teacher, None, "euler", teacher.levels_for(50), 2.0)
    reference = Points(features(draw(own, image_seeds(10**9, 40)).x))
    references = (against.points, reference, against.training)
    levels = student.levels_for(4)
    guidance = {"teacher_scale": 0.5, "teacher_cfg_scale": 2.0}
    recipes = {
        "none": (Recipe(student, None, "lcm", levels), (4, 0)),
        "teacher": (Recipe(student, teacher, "lcm", levels, guidance=guidance), (4, 2)),
        "self": (
            Recipe(student, student, "lcm", levels,
                   guidance={**guidance, "teacher_cfg_scale": 1.0}),
            (5, 0),
        ),
    }  # fmt: skip
    found = by_guide(finished)
    assert list(found) == list(recipes)
    for guide, (recipe, evaluations) in recipes.items():
        made, cell = draw(recipe, image_seeds(1, 40)), found[guide]
        scores = measure(made.x, made.labels, features, *references)
        assert {m: v["values"][1] for m, v in cell["metrics"].items()} == scores
        costs = cell["costs"]
        assert (costs["student_evaluations"], costs["teacher_evaluations"]) == evaluations


def test_results_are_those_of_a_comparison(finished, tmp_path):
    """The spec that it says it was, given to `kdpp compare`: the same cells and the same JSON."""
    found = results(finished)
    (tmp_path / "spec.toml").write_text(found["spec"].replace('data = ""\n', ""), encoding="utf-8")
    shutil.copytree(finished / "cells", tmp_path / "out" / "cells")
    compare(tmp_path / "spec.toml", tmp_path / "out")
    assert {**results(tmp_path / "out"), "spec": None} == {**found, "spec": None}


def test_the_table_and_the_files(finished, again, capsys):
    """A line for every metric and cost, the verdicts in words; a CSV row for every cell; a PNG."""
    run(*PAIR, *SMALL, "--out", again)
    said = capsys.readouterr().out
    found, cells = results(finished), by_guide(finished)
    lines = {line.split("  ")[0].split(", N")[0]: line for line in said.splitlines()}
    fd = cells["teacher"]["metrics"]["fd"]
    assert evaluate._shown(fd) in lines["FD"]
    for name in fd_and_others(cells):
        metric = METRICS[name]
        changes = [
            cells[guide]["metrics"][name][kind]
            for guide, kind in (("teacher", "change"), ("teacher", "own_share"), ("self", "change"))
        ]
        seen = [change for change in changes if change["verdict"] != "none seen"]
        assert lines[metric.title].count("none seen") == 3 - len(seen)
        assert all(evaluate._shown(change, "+") in lines[metric.title] for change in seen)
    assert lines["evaluations, teacher"].split()[2:] == ["0", "2", "0"]
    with open(finished / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["guide"] for row in rows] == ["none", "teacher", "self"]
    assert float(rows[1]["fd"]) == fd["mean"]
    assert float(rows[1]["teacher_scale"]) == 0.5 and not rows[0]["fd_change"]
    assert (finished / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert found["data"]["accuracy"] > 0.98 and found["settings"]["seeds"] == [0, 1]
    wrote = [line.split("/")[-1] for line in said.splitlines() if line.startswith("wrote")]
    assert wrote == ["results.json", "results.csv", "grid.png"]


def fd_and_others(cells):
    """The metrics there are; those of test images are there where the digits have some."""
    names = set(METRICS) - set(cells["none"]["metrics"])
    assert names <= {"memorised"}
    return list(cells["none"]["metrics"])


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


def pixels(png):
    from base64 import b64decode

    from PIL import Image

    return torch.tensor(np.asarray(Image.open(io.BytesIO(b64decode(png)))))


def test_a_grid_shows_the_first_images():
    """Class by class, one line under the other, clamped, in grey or in colour."""
    images = torch.linspace(-2, 2, 6).view(6, 1, 1, 1).expand(6, 3, 24, 24)
    found = pixels(pictures.grid(images, 3))
    assert found.shape == (24, 6 * 26 - 2, 3)
    assert found[0, ::26, 0].tolist() == [0, 0, 76, 178, 255, 255]
    assert set(found[:, 24:26].flatten().tolist()) == {pictures.GREY}
    assert pixels(pictures.grid(images[:5, :1], 3)).shape == (24, 5 * 26 - 2)


@pytest.mark.parametrize(
    ("classes", "columns"), [(1, 10), (2, 10), (3, 9), (4, 8), (7, 7), (10, 10), (11, 10)]
)
def test_a_grid_is_readable_for_any_number_of_classes(classes, columns):
    """A column has one class, up to ten; no grid is narrow, none is wide."""
    labels = (torch.arange(60) % classes).view(60, 1, 1, 1).expand(60, 1, 8, 8)
    found = pixels(pictures.grid(labels / 10 - 1, classes))
    assert found.shape == (5 * 26 - 2, columns * 26 - 2)
    if classes <= 10:
        tiles = found[::26, ::26]
        assert (tiles == tiles[0]).all() and len(tiles[0].unique()) == classes
    large = pixels(pictures.grid(torch.zeros(60, 3, 300, 150), classes))
    assert large.shape == (2 * 98 - 2, columns * 50 - 2, 3)


def test_real_images_stand_where_samples_of_their_class_do():
    """Image k is of class k mod classes, and no image twice before all were there."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    data = Data(torch.arange(7.0).view(7, 1, 1, 1) / 10, labels, 3)
    shown = (10 * pictures.real_images(data)).flatten().round().long().tolist()
    assert labels[shown].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert shown == [0, 4, 6, 1, 5, 6, 2]


# What it keeps ------------------------------------------------------------------------------------


def test_what_is_finished_is_not_sampled_again(finished, again, sampled):
    """The same files, byte for byte; a third seed adds its three parts only."""
    run(*PAIR, *SMALL, "--out", again)
    assert sampled() == 0
    for name in ("results.json", "results.csv", "grid.png"):
        assert (again / name).read_bytes() == (finished / name).read_bytes()
    run(*PAIR, "--images", 40, "--seeds", "[0, 1, 2]", "--out", again)
    assert sampled() == 3
    old, new = figures(finished)["cells"], figures(again)["cells"]
    for a, b in zip(old, new):
        assert list(b["metrics"]) == list(a["metrics"])
        for name, found in a["metrics"].items():
            assert b["metrics"][name]["values"][:2] == found["values"]


@pytest.mark.parametrize(
    ("changes", "batches"),
    [
        (["--teacher-scale", "0.4"], 4),  # the student alone is there
        (["--teacher-cfg-scale", "1.5"], 7),  # the teacher's own samples change, and all distances
        (["--features", "pixels"], 7),
        (["--images", "41"], 7),
        (["--cond-scale", "1.2"], 6),
    ],
)
def test_what_other_settings_change_is_sampled(changes, batches, again, sampled):
    run(*PAIR, *SMALL, *changes, "--out", again)
    assert sampled() == batches


def test_a_damaged_result_is_made_again(finished, again, sampled):
    cell = max((again / "cells").glob("*.json"), key=lambda path: path.stat().st_mtime)
    cell.write_bytes(cell.read_bytes()[:50])
    run(*PAIR, *SMALL, "--out", again)
    assert sampled() == 1 and figures(again) == figures(finished)


def test_no_batches_are_left(finished):
    suffixes = sorted(path.suffix for path in (finished / "cells").iterdir())
    assert suffixes == [".json"] * 6 + [".safetensors"]
    assert sorted(path.name for path in finished.iterdir()) == [
        "cells", "grid.png", "results.csv", "results.json",
    ]  # fmt: skip


def test_images_that_are_not_finite(tmp_path):
    """Say whose they are; what was finished before stays."""
    student = load_model("digits:student")
    with torch.no_grad():
        student.network.leave.bias.fill_(3e38)
    save_model(tmp_path / "broken", student.network, student.card)
    with pytest.raises(ValueError, match=r"model, lcm.*seed [01]: images must be finite.*is kept"):
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


def evaluation(folder, patience=0.0):
    """An evaluation of two batches a seed, each written at once."""
    sampling.PATIENCE = patience
    judges.CHUNK = 10
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


def write_latents(folder):
    """Data that take no time to measure."""
    latents = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = {"latents": 2 * latents, "labels": torch.arange(40) % 10}
    save_file(data, folder / "data.safetensors")


def kill_evaluations(count, folder):
    """Kill evaluations as they write, and at random moments; compare what those after them find."""
    tqdm.monitor_interval = 0  # a thread, which is not forked
    write_latents(folder)
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


def launch(folder, count, launcher, **environment):
    """Evaluate into the folder by several processes."""
    module, *flags = {
        "torchrun": ["torch.distributed.run", "--standalone", f"--nproc_per_node={count}"],
        # What accelerate calls many GPUs is many processes; without a GPU they are the CPU's.
        "accelerate": [
            "accelerate.commands.launch", "--multi_gpu", f"--num_processes={count}",
            "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
            "--main_process_port=0",
        ],
    }[launcher]  # fmt: skip
    command = [sys.executable, "-m", module, *flags, __file__, str(folder)]
    own = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **own, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    """A folder with what one process finds."""
    folder = tmp_path_factory.mktemp("several")
    write_latents(folder)
    forked_and_done(lambda: evaluation(folder / "one"))
    return folder / "one"


def forked_and_done(work):
    """Do the work in a process of its own, which may change modules."""
    assert end_of(forked(work)) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_three_processes_find_the_same(by_one):
    """Every process samples its batches and measures its share: the same figures, no litter.

    Batches are held back for ever, until the others wait for them.
    """
    out = by_one.parent / "three"
    done = launch(out, 3, "torchrun")
    assert done.returncode == 0, done.stderr
    assert figures(out) == figures(by_one)
    assert names_in(out) == names_in(by_one)
    assert (out / "results.csv").exists() and done.stdout.count("wrote") == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_of_which_one_is_lost(by_one, monkeypatch, sampled):
    """One is killed: the next run has what both had finished, and finds the same."""
    out = by_one.parent / "two"
    done = launch(out, 2, "accelerate", DIES="1")
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr
    left = [path for path in (out / "cells").glob("[!.]*") if not path.is_dir()]
    names = {path.stem for path in left}
    batches = [path for path in (out / "cells").glob("*/*.safetensors")
               if path.parent.stem not in names]  # fmt: skip
    assert left or batches
    for module, name in ((sampling, "PATIENCE"), (judges, "CHUNK")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    evaluation(out)
    assert sampled() == 2 * (7 - len(left)) - len(batches)
    assert figures(out) == figures(by_one)
    assert names_in(out) == names_in(by_one)


def one_of_several(folder):
    """One process of an evaluation; the one that DIES names is killed at its fourth file."""
    if os.environ.get("DIES") == os.environ["RANK"]:
        mortal(4, folder, after=True)
    evaluation(folder, 0.0 if "DIES" in os.environ else math.inf)


# What it refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digits:student", "--sampler", "eulr"], "did you mean 'euler'"),
        (["digits:student", "--sampler", "sample_eulr_tg"], "did you mean 'euler'"),
        (["digits:studnt"], "did you mean 'digits:student'"),
        (["digits:student", "--teacher-scale", "0.3"], "--teacher-scale needs a teacher"),
        (["digits:student", "--teacher-steps", "[1]"], "--teacher-steps needs a teacher"),
        ([*PAIR, "--teacher-steps", "[9]"], "no combination has these steps, the longest has 4"),
        ([*PAIR, "--teacher-steps", "x"], "teacher_steps is 'x'; it must be a whole number or a"),
        ([*PAIR, "--teacher-steps", "[1"], r"teacher_steps is '\[1'"),
        ([*PAIR, "--renoise", "nxt"], "unknown renoise 'nxt'; did you mean 'next'"),
        ([*PAIR, "--teacher-scale", "2"], "teacher_scale is 2.0; .* extrapolate = true"),
        (["digits:student", "--option", "eat=1"], "unknown option of lcm 'eat'"),
        (["digits:student", "--option", "eta"], "NAME=VALUE"),
        (["digits:student", "--sampler", "dpm_2_ancestral", "--option", "eta=a"], "eta is 'a'"),
        (["digits:student", "--features", "digit"], "features is 'digit'"),
        (["digits:student", "--images", "3"], "images is 3"),
        (["digits:student", "--images", "9" * 30], "images is 9999"),
        (["digits:student", "--seeds", "0"], "seeds is 0"),
        (["digits:student", "--seeds", "[-1]"], r"seeds is \[-1\]"),
        (["digits:student", "--seeds", "[1000000000]"], "must be below 1,000,000,000"),
        (["digits:student", "--steps", "0"], "steps is 0"),
        (["digits:student", "--steps", "9" * 30], "n must be a whole number from 1 to 1000"),
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


def test_missing_pillow(tmp_path, monkeypatch, sampled):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pip install "kdpp\[lab\]"'):
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
    assert "accuracy" not in found["cells"][0]["metrics"]
    assert found["settings"]["reference"] is None


def test_results_of_another_model_are_not_replaced(finished, again):
    """As `kdpp train` refuses another run's folder; the same model goes on, with any settings."""
    with pytest.raises(ValueError, match="holds results of digits:student; name another folder"):
        run("digits:teacher", *SMALL, "--out", again)
    assert (again / "results.json").read_bytes() == (finished / "results.json").read_bytes()
    for damage in ("", "[]", '{"models": 3}'):
        (again / "results.json").write_text(damage)
        run(*PAIR, *SMALL, "--out", again)
        assert results(again) == results(finished)


def test_few_images_and_pixels_are_remarked_on(tmp_path, capsys):
    """Before the work, in the results: a distance from too few images, features nobody chose."""
    torch.manual_seed(0)
    save_file({"images": torch.rand(40, 1, 8, 8), "labels": torch.arange(40) % 10},
              tmp_path / "data.safetensors")  # fmt: skip
    given = ["--data", tmp_path / "data.safetensors", "--images", 20, "--seeds", 1]
    run("digits:student", *given, "--out", tmp_path / "one")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kdpp:")]
    assert [f"kdpp: {remark}" for remark in results(tmp_path / "one")["remarks"]] == said
    assert "pixel by pixel" in said[0]
    assert "no test images" in said[1]
    assert "20 images to 40 in 64 dimensions" in said[2] and "Take 128 or more" in said[2]
    run("digits:student", *given, "--features", "pixels", "--out", tmp_path / "two")
    assert len(results(tmp_path / "two")["remarks"]) == 2


if __name__ == "__main__":
    if len(sys.argv) == 2:
        one_of_several(Path(sys.argv[1]))
    else:
        kill_evaluations(int(sys.argv[1]), Path(sys.argv[2]))
