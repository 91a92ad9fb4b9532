"""What images are compared with: unseen images beside training images, and files of statistics."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from kdpp.lab import evaluate, judges, metrics, statistics
from kdpp.lab.compare import compare
from kdpp.lab.data import load_data
from kdpp.lab.features import load_features
from kdpp.lab.metrics import Points
from kdpp.lab.models import load_model
from kdpp.lab.sampling import Recipe, draw, image_seeds
from kdpp.lab.spec import read_spec

SPEC = """
images = 40
seeds = 2
{}
[students]
small = "digits:student"
[[grid]]
student = "small"
"""


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A folder with the digits in two array files, and a spec that names them."""
    folder = tmp_path_factory.mktemp("split")
    whole = load_data("digits")
    for name, rows in (("train", slice(0, 1000)), ("test", slice(1000, 1600))):
        tensors = {"images": whole.images[rows].contiguous(), "labels": whole.labels[rows]}
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def compared(folder, lines, out):
    (folder / f"{out}.toml").write_text(SPEC.format(lines))
    compare(folder / f"{out}.toml", folder / out)
    return json.loads((folder / out / "results.json").read_text())


BOTH = 'data = "train.safetensors"\ntest = "test.safetensors"\nfeatures = "pixels"'


@pytest.fixture(scope="module")
def found(split):
    return compared(split, BOTH, "both")


def test_distances_are_to_unseen_images(found, split):
    """FD is to the test images; memorised compares with as many training images, drawn at random;
    the real figure is of training images against the test images."""
    images = load_data(split / "test.safetensors").images
    space = load_features("pixels", images, 10)
    unseen = Points(space(images))
    student = load_model("digits:student")
    made = draw(Recipe(student, None, "lcm", student.levels_for()), image_seeds(0, 40))
    scores = {name: one["values"][0] for name, one in found["cells"][0]["metrics"].items()}
    assert scores["fd"] == metrics.frechet_distance(space(made.x), unseen.rows)
    train = load_data(split / "train.safetensors").images
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:600]
    training = Points(space(train[order]))
    assert scores["memorised"] == metrics.memorised(Points(space(made.x)), training, unseen)
    real = metrics.compared(Points(training.rows[:40]), unseen)
    assert {name: found["data"][name] for name in real} == real and found["data_images"] == 40
    about = {"source": str(split / "train.safetensors"), "part": "test", "images": 600}
    assert found["settings"]["compared_with"] == about
    assert not [one for one in found["remarks"] if "no test images" in one]


def test_every_header_says_how_many(found, split, capsys):
    """In the page and in the table of `kdpp evaluate`."""
    page = (split / "both" / "report.html").read_text(encoding="utf-8")
    for title in ("FD", "FD∞", "KID", "memorised"):
        assert f">{title} (N = 40 : 600)</th>" in page
    assert ">diversity (N = 40)</th>" in page
    assert "Compared with 600 test images of" in page and "The same of 40 real images: FD " in page
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    words = ["digits:student", "--images", "40", "--seeds", "1", "--features", "pixels",
             "--data", split / "train.safetensors", "--test", split / "test.safetensors",
             "--out", split / "evaluated"]  # fmt: skip
    evaluate.run(parser.parse_args(list(map(str, words))))
    said = capsys.readouterr().out
    assert "compared with 600 test images" in said and "real, N = 40" in said
    assert (
        f"FD, N = 40 : 600  {found['cells'][0]['metrics']['fd']['values'][0]:>10.4g}".split()
        == next(line for line in said.splitlines() if line.startswith("FD, ")).split()[:-1]
    )


def test_without_unseen_images_the_report_says_so(split):
    """Distances to the training images themselves, and no figure of memorisation."""
    seen = compared(split, 'data = "train.safetensors"\nfeatures = "pixels"', "seen")
    assert "memorised" not in seen["cells"][0]["metrics"]
    assert seen["settings"]["compared_with"]["part"] == "training"
    assert [one for one in seen["remarks"] if "a copy of these is the best" in one]


def written(split, path, *more):
    parser = argparse.ArgumentParser()
    statistics.add_arguments(parser)
    words = ["--data", split / "train.safetensors", "--test", split / "test.safetensors",
             "--out", path, *more]  # fmt: skip
    statistics.run(parser.parse_args(list(map(str, words))))


def test_a_file_stands_for_the_data(found, split):
    """Every figure is the same, to the bit, and the images are not needed."""
    written(split, split / "kept" / "stats.safetensors", "--features", "pixels")
    again = compared(split, 'statistics = "kept/stats.safetensors"', "kept-out")
    ours, theirs = ([cell["metrics"] for cell in one["cells"]] for one in (again, found))
    assert ours == theirs and again["data"] == found["data"]
    assert again["settings"]["compared_with"] == found["settings"]["compared_with"]
    with safe_open(split / "kept" / "stats.safetensors", "pt") as file:
        said = json.loads(file.metadata()["kdpp.statistics"])
    assert said["preparation"] == "clamped to [-1, 1], as it is" and said["features"] == "pixels"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda about: about.update(preparation="resized to 7"), "preparation 'resized to 7'"),
        (lambda about: about.update(features="digits"), "features 'digits', and here they are 'pi"),
        (lambda about: about.update(weights="0"), "made with weights '0'"),
        (lambda about: about.pop("shape"), "no file of kdpp statistics"),
    ],
)
def test_statistics_that_do_not_fit(split, tmp_path, edit, said):
    """Other features, another network or another preparation: refused before any work."""
    whole = tmp_path / "whole.safetensors"
    written(split, whole, "--features", "pixels")
    with safe_open(whole, "pt") as file:
        about = json.loads(file.metadata()["kdpp.statistics"])
    edit(about)
    meta = {"kdpp.statistics": json.dumps(about)}
    save_file(load_file(whole), tmp_path / "other.safetensors", meta)
    (tmp_path / "s.toml").write_text(
        SPEC.format('statistics = "other.safetensors"\nfeatures = "pixels"')
    )
    with pytest.raises(ValueError, match=said):
        compare(tmp_path / "s.toml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_features_of_another_width_are_refused(split, tmp_path):
    """A file that says it fits, and does not."""
    path = tmp_path / "stats.safetensors"
    written(split, path, "--features", "pixels")
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    narrow = {name: rows[:, :32].contiguous() if rows.ndim == 2 else rows
              for name, rows in load_file(path).items()}  # fmt: skip
    save_file(narrow, path, meta)
    space = load_features("pixels", torch.zeros(1, 1, 8, 8), 10)
    with pytest.raises(ValueError, match=r"shape \[600, 32\]; those of pixels are 64 wide"):
        statistics.read(path, space)


def test_what_cannot_be_compared_with(split, tmp_path):
    """Both data and statistics; no file; a file of something else; test images of another kind."""
    for lines, said in (
        (BOTH + '\nstatistics = "x.safetensors"', "in place of data and test"),
        ('statistics = "nowhere.safetensors"', "no statistics at .*nowhere"),
        (f'statistics = "{split}/train.safetensors"', "no file of kdpp statistics"),
        (f'data = "{split}/train.safetensors"\ntest = "other.npy"', r"of shape \[1, 4, 4\]"),
    ):
        np.save(tmp_path / "other.npy", np.zeros((9, 4, 4), np.float32))
        (tmp_path / "s.toml").write_text(SPEC.format(lines))
        with pytest.raises((ValueError, OSError), match=said):
            compare(tmp_path / "s.toml", tmp_path / "out")


def test_a_test_set_of_the_data_is_taken_by_itself(monkeypatch, tmp_path):
    """`Data.test` is what distances are to; the names of results know both parts."""
    whole = load_data("digits")
    data = replace(whole, images=whole.images[:900], labels=whole.labels[:900])
    test = replace(whole, images=whole.images[900:], labels=whole.labels[900:])
    names = []
    for found in (replace(data, test=test), replace(test, test=data), data):
        monkeypatch.setattr(statistics, "load_data", lambda _, found=found: found)
        (tmp_path / "s.toml").write_text(SPEC.format(""))
        judge = judges.DataJudge(read_spec(tmp_path / "s.toml"), load_model("digits:student"))
        judge.load()
        assert len(judge.against.points.rows) == len((found.test or found).images)
        names.append(judge.given())
    assert len(set(names)) == 3
