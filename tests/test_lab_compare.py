"""`kdpp compare`: what is run, what is kept, what is reported; killed, resumed and shared out."""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from statistics import fmean, stdev

import numpy as np
import pytest
import torch

import kdpp
from kdpp.checkpoints import models
from kdpp.lab import bench, judges, report, statistics
from kdpp.lab import compare as command
from kdpp.lab import features as spaces
from kdpp.lab.compare import compare
from kdpp.lab.data import load_data
from kdpp.lab.features import load_features
from kdpp.lab.intervals import together, verdict
from kdpp.lab.metrics import Points, measure
from kdpp.lab.models import DataOrigin, load_model, save_model
from kdpp.lab.networks import build
from kdpp.lab.sampling import Recipe, draw, image_seeds
from kdpp.lab.spec import REFERENCE_SEED, cells_of, read_spec

TABLES = {
    "": {
        "title": '"Tiny"', "images": "50", "seeds": "[3, 5]", "teacher": '"digits:teacher"',
        "more_steps": "false", "best_teacher": "false",
    },
    "[students]": {"small": '"digits:student"'},
    "[reference]": {"steps": "4", "cond_scale": "2.0"},
    "[[grid]]": {"student": '"small"', "teacher_scale": "[0.0, 0.5]"},
}  # fmt: skip
REPORTS = ("results.json", "results.csv", "report.html")


def toml(**changes):
    """The tiny spec, with other values for some keys of the grid; None takes a key out.

    ``top_…``, ``students_…`` and ``reference_…`` are keys of the other tables.
    """
    tables = {header: dict(table) for header, table in TABLES.items()}
    for name, value in changes.items():
        table, _, key = name.partition("_")
        header = {"top": "", "students": "[students]", "reference": "[reference]"}.get(table)
        key = name if header is None else key
        tables["[[grid]]" if header is None else header][key] = value
    return "\n".join(
        line
        for header, table in tables.items()
        for line in [header, *(f"{k} = {v}" for k, v in table.items() if v is not None)]
        if header in ("", "[[grid]]") or table
    )


def written(folder, text):
    """The spec as a file."""
    (folder / "spec.toml").write_text(text, encoding="utf-8")
    return folder / "spec.toml"


def spec_of(folder, **changes):
    """The tiny spec with changes, see `toml`, as a file."""
    return written(folder, toml(**changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the finished tiny comparison."""
    folder = tmp_path_factory.mktemp("finished")
    compare(spec_of(folder), folder / "out")
    return folder / "out"


def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


# What is run --------------------------------------------------------------------------------------


def cells(path):
    spec = read_spec(path)
    return cells_of(spec, {name: load_model(place) for name, place in spec.students.items()})


def test_the_cells_of_a_grid(tmp_path):
    """All combinations; those that sample alike once; plain students and self controls added."""
    path = spec_of(
        tmp_path, sampler='["lcm", "euler"]', steps="[1, 4]", teacher_scale="[0.0, 0.5]",
        teacher_steps="[0, 1, 3, 4]",
    )  # fmt: skip
    found, _, _, notes = cells(path)
    assert len(found) == len(set(found))
    plain = [(cell.sampler, cell.steps) for cell in found if cell.guide == "none"]
    assert plain == [("lcm", 1), ("lcm", 4), ("euler", 1), ("euler", 4)]
    # One step goes to σ = 0, where nothing is left to guide; 4 of 4 steps guide the first 3.
    guided = [(c.sampler, c.steps, c.guidance.teacher_steps) for c in found if c.guide == "teacher"]
    assert guided == [(s, 4, k) for s in ("lcm", "euler") for k in (1, 3)]
    for i, cell in enumerate(found):
        if cell.guide == "teacher":
            assert found.index(cell.plain) < i and found[i + 1] == cell.control
            assert cell.guidance.teacher_cfg_scale == 2.0  # the reference's
            assert cell.control.guidance.teacher_cfg_scale == 1.0  # the student's own
    # At 1 step k = 3 and 4 with λ > 0 are not there, for either sampler.
    assert notes[0].endswith("do not exist: 4")
    assert notes[1].endswith("last step): 20")  # 28 combinations are kept, 8 are not alike


def test_a_plain_student_is_added(tmp_path):
    """Changes have something to be measured against, though the spec did not ask for it."""
    found, _, _, notes = cells(spec_of(tmp_path, teacher_scale="0.5"))
    assert [cell.guide for cell in found] == ["none", "teacher", "self"]
    assert notes == ["plain students added, against which changes are measured: 1"]


def test_late_steps_and_levels(tmp_path):
    """A list of steps is one value inside a list; negative ones count from the end."""
    path = spec_of(tmp_path, teacher_scale="0.5", teacher_steps="[[-1], [0, 2]]", renoise="0.25")
    found = cells(path).cells
    assert [c.guidance.teacher_steps for c in found if c.guide == "teacher"] == [(3,), (0, 2)]
    assert found[1].guidance.renoise == 0.25


def test_the_page_has_as_many_colours_as_it_counts():
    """In light and in dark; no other place counts them."""
    folder = files("kdpp.lab") / "templates"
    style, script = ((folder / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    (count,) = re.findall(r"const COLOURS = (\d+);", script)
    found = re.findall(r"--s(\d+): (#[0-9a-f]{6});", style)
    assert [int(number) for number, _ in found] == [*range(int(count))] * 2
    assert len(set(found)) == 2 * int(count) and script.count("var(--s") == 1


def test_the_example_is_sound():
    """The shipped spec is read, and says what it compares."""
    path = files("kdpp.lab") / "examples" / "digits.toml"
    found = cells(path).cells
    assert {cell.student for cell in found} == {"small", "teacher"}
    assert {cell.guide for cell in found} == {"none", "teacher", "self"}


def test_paths_are_the_specs(tmp_path):
    """Checkpoints and data lie beside the spec, wherever the command is run."""
    network = build({"shape": [1, 8, 8], "classes": 10, "width": 4, "hidden": 4, "blocks": 1})
    card = replace(load_model("digits:student").card, network=network.config)
    save_model(tmp_path / "mine.safetensors", network, card)
    spec = read_spec(spec_of(tmp_path, students_small='"mine.safetensors"'))
    assert load_model(spec.students["small"]).parameters < 1000
    assert (spec.data, spec.teacher) == ("", "digits:teacher")
    spec = read_spec(spec_of(tmp_path, top_data='"mine.npy"', top_features='"clip:model"'))
    assert (spec.data, spec.features) == (f"{tmp_path}/mine.npy", f"clip:{tmp_path}/model")


def test_options_of_the_sampler(tmp_path):
    """A table, or a list of them; what is the sampler's default makes no other cell."""
    options = "[{}, {eta = 1.0}, {eta = 0.5}, {eta = 0.5, s_noise = 1}]"
    path = spec_of(tmp_path, sampler='"sample_euler_ancestral_tg"', options=options)
    found, _, _, notes = cells(path)
    plain = [(cell.sampler, cell.options) for cell in found if cell.guide == "none"]
    assert plain == [("euler_ancestral", ()), ("euler_ancestral", (("eta", 0.5),))]
    assert notes[0].endswith("last step): 4")
    assert sum("eta 0.5" in str(cell) for cell in found) == 3


def test_a_scale_outside_its_range_is_asked_for(tmp_path):
    """As `kdpp tune` may advise it, with extrapolate = true."""
    found, *_ = cells(spec_of(tmp_path, teacher_scale="[0.5, 2.391, -0.1]", extrapolate="true"))
    guided = [c.guidance for c in found if c.guide == "teacher"]
    assert [(g.teacher_scale, g.extrapolate) for g in guided] == [
        (0.5, False), (2.391, True), (-0.1, True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_scal": "0.5"}, r"setting 'teacher_scal'; did you mean 'teacher_scale'"),
        ({"sampler": '"eulr"'}, r"'eulr'; did you mean 'euler'"),
        ({"student": '"smal"'}, r"'smal'; did you mean 'small'"),
        ({"student": None}, r"student is missing"),
        ({"students_small": '"digits:studnt"'}, r"did you mean 'digits:student'"),
        ({"students_small": '"nowhere.safetensors"'}, r"no checkpoint at .*nowhere"),
        ({"students_small": "3"}, r"student 'small' is 3"),
        ({"students_small": None}, r"no student is named"),
        ({"top_imges": "3"}, r"'imges'; did you mean 'images'"),
        ({"top_images": "3"}, r"images is 3; .* ≥ 4"),
        ({"top_images": "0.5"}, r"images is 0.5; it must be a whole number"),
        ({"top_seeds": "[1, 1]"}, r"each once"),
        ({"top_seeds": "[-1]"}, r"≥ 0"),
        ({"top_seeds": "0"}, r"seeds is 0"),
        ({"top_seeds": "1000000000"}, r"seeds is 1000000000; give at most 100,000"),
        ({"top_seeds": "[1000000000]"}, r"holds 1000000000; they must be below 1,000,000,000"),
        ({"top_seeds": f"[{10**18}]"}, r"must be below 1,000,000,000"),
        ({"top_images": "1000001"}, r"images is 1000001"),
        ({"options": "{eat = 1}"}, r"unknown option of lcm 'eat'"),
        ({"sampler": '"euler"', "options": "{s_churn = 1}"}, r"s_churn adds noise"),
        ({"sampler": '"dpm_fast"'}, r"dpm_fast makes its own levels"),
        ({"steps": str([*range(1, 1001)] * 101)}, r"lists have more than 100,000 combinations"),
        ({"cond_scale": str([*range(60_000)]), "teacher_scale": "0.0"}, r"120,000 results"),
        ({"top_features": '"digts"'}, r"digts"),
        ({"top_data": '"nowhere"'}, r"nowhere"),
        ({"top_teacher": None}, r"name the teacher"),
        (
            {"top_teacher": None, "reference_cond_scale": None, "reference_steps": None},
            r"no teacher is named; name one",
        ),
        ({"reference_cond_scale": None}, r"reference has no cond_scale"),
        ({"reference_steps": "0"}, r"steps of reference is 0"),
        ({"reference_stps": "3"}, r"of reference 'stps'; did you mean 'steps'"),
        ({"reference_sampler": '"eulr"'}, r"did you mean 'euler'"),
        ({"steps": "[4, 0]"}, r"steps is 0"),
        ({"cond_scale": "nan"}, r"cond_scale is nan"),
        ({"teacher_scale": "1.5"}, r"teacher_scale is 1.5; .*\[0, 1\], or .* extrapolate = true"),
        ({"teacher_scale": "[]"}, r"teacher_scale is an empty list"),
        ({"teacher_scale": '"much"'}, r"'much'; it must be a finite number"),
        ({"teacher_steps": "5"}, r"holds 5; no combination has these steps, the longest has 4"),
        ({"teacher_steps": "[[-5]]"}, r"holds \[-5\]"),
        ({"teacher_steps": "[[-1]]"}, r"goes to σ = 0"),
        ({"renoise": '"nxt"'}, r"did you mean 'next'"),
        ({"renoise": "-1.0"}, r"renoise is -1"),
        ({"renoise_eta": "2.0"}, r"renoise_eta"),
    ],
)  # fmt: skip
def test_bad_specs(tmp_path, changes, message):
    """Refused in one sentence, before any work: no folder is made."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        compare(spec_of(tmp_path, **changes), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "no TOML"),
        (toml().split("[[")[0], r"there is no \[\[grid\]\]"),
        (toml() + '\n[[grid]]\nstudent = "smal"', r"student of grid 2 'smal'"),
    ],
)
def test_bad_files(tmp_path, text, message):
    """What is no spec at all is refused as well."""
    with pytest.raises(ValueError, match=message):
        compare(written(tmp_path, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_student_of_other_images(tmp_path):
    """A network that makes other images than the data is refused before any work."""
    network = build({"shape": [1, 4, 4], "classes": 10, "width": 4, "hidden": 4, "blocks": 1})
    card = load_model("digits:student").card
    card = replace(card, network=network.config, data=replace(card.data, shape=(1, 4, 4)))
    save_model(tmp_path / "m.safetensors", network, card)
    path = spec_of(tmp_path, students_small='"m.safetensors"')
    with pytest.raises(ValueError, match=r"small makes images of shape \[1, 4, 4\]"):
        compare(path, tmp_path / "out")


# What is reported ---------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_samplers(finished):
    """A cell's values are what `draw` and `measure` give for it; the reference is the teacher's."""
    plain, guided, itself = results(finished)["cells"]
    assert [cell["guide"] for cell in (plain, guided, itself)] == ["none", "teacher", "self"]
    student, teacher = load_model("digits:student"), load_model("digits:teacher")
    data = load_data("digits")
    features = load_features("digits", data.images, data.classes)
    own = Recipe(teacher, None, "euler", kdpp.digits.schedule(4), 2.0)
    seeds = image_seeds(REFERENCE_SEED, 50)
    reference = Points(features(draw(own, seeds).x))
    against = statistics.of_data(data, features)
    common = {"teacher_scale": 0.5, "teacher_steps": 1, "renoise": "next"}
    recipes = {
        "none": Recipe(student, None, "lcm", student.levels_for()),
        "teacher": Recipe(
            student, teacher, "lcm", student.levels_for(), 1.0, {**common, "teacher_cfg_scale": 2.0}
        ),
        "self": Recipe(
            student, student, "lcm", student.levels_for(), 1.0, {**common, "teacher_cfg_scale": 1.0}
        ),
    }
    for cell in (plain, guided, itself):
        for place, seed in enumerate((3, 5)):
            images = draw(recipes[cell["guide"]], image_seeds(seed, 50))
            scores = measure(
                images.x, images.labels, features, against.points, reference, against.training
            )
            assert {n: f["values"][place] for n, f in cell["metrics"].items()} == scores
    assert guided["costs"]["student_evaluations"] == 4
    assert guided["costs"]["teacher_evaluations"] == 2  # one look, with CFG
    assert guided["costs"]["compute"] == 4 * student.parameters + 2 * teacher.parameters
    assert itself["costs"]["student_evaluations"] == 5
    assert all(cell["costs"]["milliseconds"] > 0 for cell in (plain, guided, itself))


def test_changes_are_paired(finished):
    """Seed by seed, against the cell's own plain student; the self control's stands beside."""
    plain, guided, itself = results(finished)["cells"]
    assert (guided["plain"], guided["self"]) == (plain["cell"], itself["cell"])
    for name, found in guided["metrics"].items():
        values = [a - b for a, b in zip(found["values"], plain["metrics"][name]["values"])]
        assert found["change"]["mean"] == pytest.approx(fmean(values), abs=1e-12)
        assert found["change"]["deviation"] == pytest.approx(stdev(values), abs=1e-12)
        assert found["self_change"] == itself["metrics"][name]["change"]
        own = [a - b for a, b in zip(found["values"], itself["metrics"][name]["values"])]
        assert found["own_share"]["mean"] == pytest.approx(fmean(own), abs=1e-12)
        other = [a - b for a, b in zip(itself["metrics"][name]["values"],
                                       plain["metrics"][name]["values"])]  # fmt: skip
        # The three intervals of a metric are read together.
        reported = [found["change"], found["own_share"], found["self_change"]]
        for change, one in zip(reported, together([values, own, other]), strict=True):
            assert change["high"] == pytest.approx(one.high, rel=1e-9, abs=1e-12)
            assert change["verdict"] == verdict(one)
        assert itself["metrics"][name]["own_share"] is plain["metrics"][name]["own_share"] is None
        assert plain["metrics"][name]["change"] is None
    # The teacher moves FD by far more than two seeds of one student differ.
    assert guided["metrics"]["fd"]["change"]["mean"] < -1.0


def test_the_tables_agree(finished):
    """results.csv holds, cell by cell, what results.json holds."""
    with open(finished / "results.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    cells = results(finished)["cells"]
    assert len(lines) == len(cells) == 3
    for line, cell in zip(lines, cells):
        flat = {key: value for key, value in cell.items() if key not in ("costs", "metrics")}
        flat["levels"] = " ".join(map(repr, cell["levels"]))
        flat["options"] = None
        flat |= cell["costs"]
        for name, found in cell["metrics"].items():
            kinds = {name: found, f"{name}_change": found["change"]}
            kinds |= {f"{name}_{kind}": found[kind] for kind in
                      ("self_change", "own_share", "over_steps")}  # fmt: skip
            for key, estimate in kinds.items():
                known = estimate or {}
                ends = {"": "mean", "_sd": "deviation", "_low": "low", "_high": "high"}
                flat |= {key + end: known.get(part) for end, part in ends.items()}
                if key != name:
                    flat[f"{key}_verdict"] = known.get("verdict")
        assert line == {key: "" if value is None else str(value) for key, value in flat.items()}


def test_the_page_holds_everything(finished):
    """Every cell, setting and version is in the page, and nothing in it lies elsewhere."""
    text, found = (finished / "report.html").read_text(encoding="utf-8"), results(finished)
    assert text.count("<tr><td") == text.count("<figure id=") == len(found["cells"])
    assert text.count("<figure><img") == 1  # real images, beside those of the only student
    for version in found["versions"].values():
        assert f"<td>{version}</td>" in text
    assert "cond_scale = 2.0" in text  # the spec
    assert not [word for word in ("http:", "https:", "src=\"/", "@import", "url(") if
                word in text.replace("http://www.w3.org/2000/svg", "")]  # fmt: skip


def test_better_is_green_and_worse_is_not():
    """Whichever way a metric is better; a change that was not seen, and one without a good, are
    neither."""

    def shown(better, mean, verdict):
        metric = {"name": "m", "title": "M", "better": better, "what": ""}
        change = {"mean": mean, "deviation": 0.1, "verdict": verdict}
        cell = {"metrics": {"m": {"change": change}}}
        return report._change(metric, "change", 2)(cell)[0].split('"')[1]

    assert shown("lower", -1.0, "lower") == shown("higher", 1.0, "higher") == "better"
    assert shown("lower", 1.0, "higher") == shown("higher", -1.0, "lower") == "worse"
    assert shown("lower", -1.0, "none seen") == "none"
    assert shown(None, -1.0, "lower") == ""
    style = (files("kdpp.lab") / "templates" / "report.css").read_text(encoding="utf-8")
    for name, greener in (("better", True), ("worse", False)):
        (variable,) = re.findall(rf"\.{name} {{ color: var\(--(\w+)\); }}", style)
        colours = re.findall(rf"--{variable}: #(..)(..)..;", style)
        assert len(colours) == 2  # light and dark
        assert all((int(green, 16) > int(red, 16)) is greener for red, green in colours)


def test_a_table_runs_no_formula(finished, tmp_path):
    """A student's name that a spreadsheet would take for a formula is marked as text."""
    shutil.copytree(finished / "cells", tmp_path / "out" / "cells")
    text = toml(student="\"=cmd|'/C calc'!A0\"").replace("small", "\"=cmd|'/C calc'!A0\"")
    compare(written(tmp_path, text), tmp_path / "out")
    with open(tmp_path / "out" / "results.csv", encoding="utf-8", newline="") as file:
        students = [line["student"] for line in csv.DictReader(file)]
    assert students == ["'=cmd|'/C calc'!A0"] * 3
    assert results(tmp_path / "out")["cells"][0]["student"] == "=cmd|'/C calc'!A0"


def test_names_are_escaped(finished, tmp_path):
    """What a spec says is text wherever it stands in the page."""
    evil = "</script><img src=x onerror=alert(1)> & \\\"'"
    text = toml(top_title=f'"{evil}"', student=f'"{evil}"').replace("small", f'"{evil}"')
    shutil.copytree(finished / "cells", tmp_path / "out" / "cells")
    compare(written(tmp_path, text), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and page.count("</script>") == 2
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt; &amp; &quot;&#x27;" in page


def test_one_seed(finished, tmp_path):
    """Without a second seed there is no spread, and no change can be told from noise."""
    shutil.copytree(finished / "cells", tmp_path / "out" / "cells")
    compare(spec_of(tmp_path, top_seeds="[3]"), tmp_path / "out")
    found = results(tmp_path / "out")["cells"][1]["metrics"]["fd"]
    assert found["deviation"] is None and found["change"]["verdict"] == "none seen"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "none seen</span>" not in page


def test_data_that_are_no_pictures(tmp_path):
    """Latents are compared in themselves, and the page says that they are not drawn."""
    torch.manual_seed(0)
    np.save(tmp_path / "latents.npy", 3 * torch.randn(40, 4, 2, 2).numpy())
    network = build({"shape": [4, 2, 2], "classes": 1, "width": 4, "hidden": 4, "blocks": 1})
    data = DataOrigin(source="", shape=(4, 2, 2), classes=1, bounded=False)
    card = replace(load_model("digits:teacher").card, network=network.config, data=data)
    save_model(tmp_path / "m.safetensors", network, card)
    text = (
        'data = "latents.npy"\nimages = 20\nseeds = 2\n[students]\na = "m.safetensors"\n'
        '[[grid]]\nstudent = "a"\nsteps = 2\n'
    )
    compare(written(tmp_path, text), tmp_path / "out")
    assert "fd" in results(tmp_path / "out")["cells"][0]["metrics"]
    assert "the data are no pictures" in (tmp_path / "out" / "report.html").read_text()


# What is kept -------------------------------------------------------------------------------------


TIMING = {"seconds": 1.0, "memory": 0, "finished": "then"}


def stamps(folder):
    """When each result was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}


def test_finished_cells_are_not_run_again(finished, tmp_path):
    """A second run computes nothing and writes the same bytes; a wider grid only what is new."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before, reports = stamps(out), [(out / name).read_bytes() for name in REPORTS]
    compare(spec_of(tmp_path), out)
    assert stamps(out) == before
    assert [(out / name).read_bytes() for name in REPORTS] == reports
    compare(spec_of(tmp_path, teacher_scale="[0.0, 0.1, 0.5]", top_title='"Other"'), out)
    after = stamps(out)
    assert {name: after[name] for name in before} == before
    assert len(after) - len(before) == 2 * 2  # λ = 0.1 and its self control, two seeds
    assert len(results(out)["cells"]) == 5


@pytest.mark.parametrize(
    "change", [{"top_images": "51"}, {"reference_cond_scale": "1.5"}, {"steps": "5"}]
)
def test_other_settings_are_other_cells(finished, tmp_path, change):
    """What determines a result is in its name: nothing stale is taken for it."""
    old = {job.path.name for job in jobs(spec_of(tmp_path), finished)}
    new = {job.path.name for job in jobs(spec_of(tmp_path, **change), finished)}
    assert len(old) == len(new) == 6 and not old & new


def test_other_weights_are_other_cells(finished, tmp_path, monkeypatch):
    """The checkpoint's content counts, not its name; so does kdpp's version."""
    old = jobs(spec_of(tmp_path), finished)
    model = load_model("digits:student")
    model.network.leave.bias[0] += 1e-3
    monkeypatch.setattr(models, "load_model", lambda name, device: (
        model if name == "digits:student" else load_model(name)))  # fmt: skip
    assert not paths(old) & paths(jobs(spec_of(tmp_path), finished))
    monkeypatch.undo()
    assert paths(old) == paths(jobs(spec_of(tmp_path), finished))
    monkeypatch.setattr(kdpp, "__version__", "other")
    assert not paths(old) & paths(jobs(spec_of(tmp_path), finished))


def jobs(path, out):
    """All but the teacher's own samples."""
    every = bench.Bench(read_spec(path), "cpu", out / "cells").jobs()
    return [job for job in every if job.cell]


def paths(jobs):
    return {job.path.name for job in jobs}


def test_a_checkpoint_of_two_names_is_measured_once(finished, tmp_path):
    """Every result is computed by one job; what is reported names both."""
    path = spec_of(tmp_path, students_other='"digits:student"', student='["small", "other"]')
    found = jobs(path, finished)
    assert len(found) == len(paths(found)) and paths(found) == paths(
        jobs(spec_of(tmp_path), finished)
    )


def test_what_images_are_compared_with_names_a_result(finished, tmp_path, monkeypatch):
    """The number of classes, and the content of the features' file, whatever it is called."""
    old = paths(jobs(spec_of(tmp_path), finished))
    fits = judges.DataJudge.check
    monkeypatch.setattr(judges.DataJudge, "check", lambda *_: None)
    data = replace(load_data("digits"), classes=11)
    monkeypatch.setattr(statistics, "load_data", lambda _: data)
    pixels = '"pixels"'
    new = jobs(spec_of(tmp_path, top_features=pixels), finished)
    monkeypatch.undo()
    other = jobs(spec_of(tmp_path, top_features=pixels), finished)
    assert not paths(new) & paths(other) and not paths(other) & old
    assert fits is judges.DataJudge.check

    def named():
        weights = spaces._content(tmp_path / "clip")
        features = replace(load_features("pixels", data.images, 10), weights=weights)
        monkeypatch.setattr(judges, "load_features", lambda *_: features)
        return paths(jobs(spec_of(tmp_path), finished))

    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"one")
    first = named()
    assert first == named()
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"two")
    assert not first & named()


def test_an_edited_solver_is_measured_anew(finished, tmp_path, monkeypatch):
    """A cell is named by what its solver's plan does, not by the solver's name."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = stamps(out)
    lcm = kdpp.SOLVERS["lcm"]

    def half_the_noise(sigmas):
        for step in lcm.steps(sigmas):
            (stage,) = step.stages
            row = replace(stage.row, noise=stage.row.noise and 0.5 * stage.row.noise)
            yield replace(step, stages=(replace(stage, row=row),))

    monkeypatch.setitem(kdpp.SOLVERS, "lcm", replace(lcm, steps=half_the_noise))
    compare(spec_of(tmp_path), out)
    new = stamps(out)
    assert before.items() < new.items() and len(new) == len(before) + 6
    old = results(finished)["cells"][0]["metrics"]["fd"]["values"]
    assert results(out)["cells"][0]["metrics"]["fd"]["values"] != old


def test_results_of_other_students_are_not_replaced(finished, tmp_path):
    """Refused before any work; a folder with some of the same students is extended."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    whole = (out / "results.json").read_bytes()
    with pytest.raises(ValueError, match="holds results of digits:student; name another folder"):
        compare(spec_of(tmp_path, students_small='"digits:teacher"'), out)
    assert (out / "results.json").read_bytes() == whole
    compare(spec_of(tmp_path, students_other='"digits:teacher"', teacher_scale="0.0"), out)
    assert len(results(out)["models"]) == 2


@pytest.mark.parametrize("damage", [b'{"scores": {"fd"', b"", b"{}", b"1", b"[]", b"null"])
def test_a_damaged_result_is_computed_again(finished, tmp_path, damage):
    """A file that is cut off, or holds something else, is as good as none."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    victim = next((out / "cells").glob("*.json"))
    whole = json.loads(victim.read_bytes())
    victim.write_bytes(damage)
    compare(spec_of(tmp_path), out)
    again = json.loads(victim.read_bytes())
    assert {**again, **TIMING} == {**whole, **TIMING}


def test_the_teachers_samples_are_made_again_if_damaged(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (victim,) = (out / "cells").glob("*.safetensors")
    whole = victim.read_bytes()
    for damage in (b"", whole[:100], whole[:-8]):
        victim.write_bytes(damage)
        compare(spec_of(tmp_path), out)
        assert victim.read_bytes() == whole


def test_images_that_are_not_finite(tmp_path, monkeypatch):
    """They end the run with the cell's name; what is finished is kept."""
    count = 0

    def failing(images, *rest):
        nonlocal count
        count += 1
        return measure(images if count < 3 else images * float("nan"), *rest)

    monkeypatch.setattr(judges, "measure", failing)
    with pytest.raises(ValueError, match=r"small, lcm.*seed [35]: images must be finite.*is kept"):
        compare(spec_of(tmp_path), tmp_path / "out")
    assert len(list((tmp_path / "out" / "cells").glob("*.json"))) == 2


def test_a_full_disk(tmp_path, monkeypatch):
    """An error in a sentence; what is finished is kept, nothing is half written."""
    count = 0
    real = bench.write_atomically

    def full(path, content):
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, f"{path} could not be written (No space left on device)")
        real(path, content)

    monkeypatch.setattr(bench, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        compare(spec_of(tmp_path), tmp_path / "out")
    kept = sorted(path.suffix for path in (tmp_path / "out" / "cells").iterdir())
    assert kept == [".json", ".safetensors"]
    monkeypatch.undo()
    compare(spec_of(tmp_path), tmp_path / "out")
    assert len(results(tmp_path / "out")["cells"]) == 3


# Killed, and shared out ---------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
from pathlib import Path
from kdpp.lab import bench, compare as command, files
from kdpp.lab.spec import read_spec

spec, out = Path(sys.argv[1]), Path(sys.argv[2])

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed(folder, moment):
    # Dies at the moment-th file: with its content beside it, and not yet in place.
    replace, count = os.replace, 0
    def replace_or_die(*paths):
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
    files.os.replace = replace_or_die
    command.compare(spec, folder)

bench.Bench(read_spec(spec), "cpu", out)  # what it imports, the children need not
for moment in map(int, sys.argv[3].split()):
    folder = out / f"killed{moment}"
    codes = [ended(child(lambda: killed(folder, moment)))]
    codes.append(ended(child(lambda: command.compare(spec, folder))))
    print("killed", codes)

for size in (2, 3):
    def share(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        command.compare(spec, out / f"shared{size}")
    pids = [child(lambda: share(rank)) for rank in reversed(range(size))]
    print("shared", [ended(pid) for pid in pids])
"""


def without_timings(folder, spec):
    """The reports as they are when every timing is the same: they are made of the stored cells."""
    for path in (folder / "cells").glob("*.json"):
        result = json.loads(path.read_bytes())
        path.write_text(json.dumps({**result, **TIMING}, indent=1))
    compare(spec, folder)
    return [(folder / name).read_bytes() for name in REPORTS]


def test_kills_and_processes_change_no_result(tmp_path):
    """Killed at any file and resumed, or shared by 2 and 3 processes: the same bytes, no litter."""
    moments = [1, 3, 5, 7]  # the teacher's samples, a cell, the last cell, the second report
    (tmp_path / "run.py").write_text(SCRIPT)
    spec = spec_of(tmp_path, top_self_control="false")
    ran = subprocess.run(
        [sys.executable, tmp_path / "run.py", spec, tmp_path, " ".join(map(str, moments))],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = [line for line in ran.stdout.splitlines() if not line.startswith("wrote")]
    shared = ["shared [0, 0]", "shared [0, 0, 0]"]
    assert said == ["killed [-9, 0]"] * len(moments) + shared, ran.stderr
    whole = tmp_path / "whole"
    compare(spec, whole)
    expected = without_timings(whole, spec)
    names = {path.name for path in whole.rglob("*")}
    for folder in [*(f"killed{moment}" for moment in moments), "shared2", "shared3"]:
        assert without_timings(tmp_path / folder, spec) == expected, folder
        assert {path.name for path in (tmp_path / folder).rglob("*")} == names


def test_threads_change_no_result(tmp_path):
    """However many the host leaves to torch and numpy, the scores are the same to the bit."""
    from threadpoolctl import threadpool_limits

    before, scores = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            compare(spec_of(tmp_path), tmp_path / str(threads))
        stored = sorted((tmp_path / str(threads) / "cells").glob("*.json"))
        scores.append([json.loads(path.read_bytes())["scores"] for path in stored])
    torch.set_num_threads(before)
    assert scores[0] == scores[1]


def test_two_runs_at_once(finished, tmp_path):
    """The second is told that the first is at work."""
    shutil.copytree(finished, tmp_path / "out")
    with bench.locked(tmp_path / "out"), pytest.raises(BlockingIOError, match="another run"):
        compare(spec_of(tmp_path), tmp_path / "out")


def test_the_command(finished, tmp_path, capsys):
    """A spec or --example, and where to; it says what it wrote."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    shutil.copytree(finished / "cells", tmp_path / "out" / "cells")
    command.run(parser.parse_args([str(spec_of(tmp_path)), "--out", str(tmp_path / "out")]))
    assert [line.split("/")[-1] for line in capsys.readouterr().out.splitlines()] == list(REPORTS)
    for wrong in ([], ["a.toml"], ["a.toml", "--example", "--out", "x"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
    assert parser.parse_args(["--example", "--out", "x"]).example
