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
from kdpp.lab import compare as command
from kdpp.lab.compare import compare
from kdpp.lab.data import load_data
from kdpp.lab.metrics import Points, load_features, measure
from kdpp.lab.models import DataOrigin, load_model, save_model
from kdpp.lab.networks import build
from kdpp.lab.sampling import Recipe, draw, image_seeds, levels_for
from kdpp.lab.spec import cells_of, read_spec

TABLES = {
    "": {
        "title": '"Tiny"', "images": "50", "seeds": "[3, 5]", "teacher": '"digits:teacher"',
        "self_control": "true",
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
    found, notes = cells(path)
    assert len(found) == len(set(found))
    plain = [(cell.sampler, cell.steps) for cell in found if cell.guide == "none"]
    assert plain == [("lcm", 1), ("lcm", 4), ("euler", 1), ("euler", 4)]
    # One step goes to σ = 0, where nothing is left to guide; 4 of 4 steps guide the first 3.
    guided = [(c.sampler, c.steps, c.guidance.teacher_steps) for c in found if c.guide == "teacher"]
    assert guided == [(s, 4, k) for s in ("lcm", "euler") for k in (1, 3)]
    for i, cell in enumerate(found):
        if cell.guide == "teacher":
            assert found.index(cell.plain) < i and found[i + 1] == cell.itself
            assert cell.guidance.teacher_cfg_scale == 2.0  # the reference's
            assert cell.itself.guidance.teacher_cfg_scale == 1.0  # the student's own
    # At 1 step k = 3 and 4 with λ > 0 are not there, for either sampler.
    assert "left out: 4" in notes[0]
    assert "run once: 20" in notes[1]  # 28 combinations are kept, 8 are not alike


def test_a_plain_student_is_added(tmp_path):
    """Changes have something to be measured against, though the spec did not ask for it."""
    found, notes = cells(spec_of(tmp_path, teacher_scale="0.5"))
    assert [cell.guide for cell in found] == ["none", "teacher", "self"]
    assert notes == ["combinations not asked for, added as what changes are measured against: 1"]


def test_late_steps_and_levels(tmp_path):
    """A list of steps is one value inside a list; negative ones count from the end."""
    path = spec_of(tmp_path, teacher_scale="0.5", teacher_steps="[[-1], [0, 2]]", renoise="0.25")
    found, _ = cells(path)
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
    found, _ = cells(path)
    assert {cell.student for cell in found} == {"small", "teacher"}
    assert {cell.guide for cell in found} == {"none", "teacher", "self"}


def test_paths_are_the_specs(tmp_path):
    """Checkpoints and data lie beside the spec, wherever the command is run."""
    network = build({"shape": [1, 8, 8], "classes": 10, "width": 4, "hidden": 4, "blocks": 1})
    card = replace(load_model("digits:student").card, network=network.config)
    save_model(tmp_path / "mine.safetensors", network, card)
    spec = read_spec(spec_of(tmp_path, students_small='"mine.safetensors"'))
    assert load_model(spec.students["small"]).parameters < 1000
    assert (spec.data, spec.teacher) == ("digits", "digits:teacher")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_scal": "0.5"}, r"of grid 1 'teacher_scal'; did you mean 'teacher_scale'"),
        ({"sampler": '"eulr"'}, r"sampler of grid 1 'eulr'; did you mean 'euler'"),
        ({"student": '"smal"'}, r"'smal'; did you mean 'small'"),
        ({"student": None}, r"student of grid 1 is missing"),
        ({"students_small": '"digits:studnt"'}, r"did you mean 'digits:student'"),
        ({"students_small": '"nowhere.safetensors"'}, r"no checkpoint at .*nowhere"),
        ({"students_small": "3"}, r"student 'small' is 3"),
        ({"students_small": None}, r"names no student"),
        ({"top_imges": "3"}, r"'imges'; did you mean 'images'"),
        ({"top_images": "3"}, r"images is 3; .* ≥ 4"),
        ({"top_images": "0.5"}, r"images is 0.5; it must be a whole number"),
        ({"top_seeds": "[1, 1]"}, r"each once"),
        ({"top_seeds": "[-1]"}, r"≥ 0"),
        ({"top_seeds": "0"}, r"seeds is 0"),
        ({"top_features": '"digts"'}, r"digts"),
        ({"top_data": '"nowhere"'}, r"nowhere"),
        ({"top_teacher": None}, r"name the teacher"),
        (
            {"top_teacher": None, "reference_cond_scale": None, "reference_steps": None},
            r"names no teacher; add one",
        ),
        ({"reference_cond_scale": None}, r"reference has no cond_scale"),
        ({"reference_steps": "0"}, r"steps of reference is 0"),
        ({"reference_stps": "3"}, r"of reference 'stps'; did you mean 'steps'"),
        ({"reference_sampler": '"eulr"'}, r"did you mean 'euler'"),
        ({"steps": "[4, 0]"}, r"steps is 0"),
        ({"cond_scale": "nan"}, r"cond_scale is nan"),
        ({"teacher_scale": "1.5"}, r"teacher_scale of grid 1 is 1.5; .*\[0, 1\]"),
        ({"teacher_scale": "[]"}, r"teacher_scale of grid 1 is an empty list"),
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
    ("text", "message"), [("title = ", "no TOML"), (toml().split("[[")[0], r"has no \[\[grid\]\]")]
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
    seeds = image_seeds(command.REFERENCE_RUN, 50)
    reference = Points(features(draw(own, seeds).x))
    common = {"teacher_scale": 0.5, "teacher_steps": 1, "renoise": "next"}
    recipes = {
        "none": Recipe(student, None, "lcm", levels_for(student)),
        "teacher": Recipe(
            student, teacher, "lcm", levels_for(student), 1.0, {**common, "teacher_cfg_scale": 2.0}
        ),
        "self": Recipe(
            student, student, "lcm", levels_for(student), 1.0, {**common, "teacher_cfg_scale": 1.0}
        ),
    }
    for cell in (plain, guided, itself):
        for place, seed in enumerate((3, 5)):
            images = draw(recipes[cell["guide"]], image_seeds(seed, 50))
            scores = measure(
                images.x, images.labels, features, Points(features(data.images)), reference
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
        # Two seeds, Student's t for one degree of freedom.
        half = 12.7062 * stdev(values) / 2**0.5
        assert found["change"]["high"] == pytest.approx(fmean(values) + half, rel=1e-4, abs=1e-9)
        assert (found["change"]["verdict"] == "none seen") == (abs(fmean(values)) <= half)
        assert found["self_change"] == itself["metrics"][name]["change"]
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
        flat |= cell["costs"]
        for name, found in cell["metrics"].items():
            kinds = {name: found, f"{name}_change": found["change"]}
            kinds[f"{name}_self_change"] = found["self_change"]
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
    for version in found["versions"].values():
        assert f"<td>{version}</td>" in text
    assert "cond_scale = 2.0" in text  # the spec
    assert not [word for word in ("http:", "https:", "src=\"/", "@import", "url(") if
                word in text.replace("http://www.w3.org/2000/svg", "")]  # fmt: skip


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
    monkeypatch.setattr(command, "load_model", lambda name, device: (
        model if name == "digits:student" else load_model(name)))  # fmt: skip
    assert not paths(old) & paths(jobs(spec_of(tmp_path), finished))
    monkeypatch.undo()
    assert paths(old) == paths(jobs(spec_of(tmp_path), finished))
    monkeypatch.setattr(kdpp, "__version__", "other")
    assert not paths(old) & paths(jobs(spec_of(tmp_path), finished))


def jobs(path, out):
    return command.Bench(read_spec(path), "cpu").jobs(out / "cells")


def paths(jobs):
    return {job.path.name for job in jobs}


def test_a_damaged_result_is_computed_again(finished, tmp_path):
    """A file that is cut off, however that came about, is as good as none."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    victim = next((out / "cells").glob("*.json"))
    whole = json.loads(victim.read_bytes())
    victim.write_bytes(victim.read_bytes()[:100])
    compare(spec_of(tmp_path), out)
    again = json.loads(victim.read_bytes())
    assert {**again, "timing": 0} == {**whole, "timing": 0}


def test_images_that_are_not_finite(tmp_path, monkeypatch):
    """They end the run with the cell's name; what is finished is kept."""
    count = 0

    def failing(images, *rest):
        nonlocal count
        count += 1
        return measure(images if count < 3 else images * float("nan"), *rest)

    monkeypatch.setattr(command, "measure", failing)
    with pytest.raises(ValueError, match=r"small, lcm.*seed [35]: images must be finite.*is kept"):
        compare(spec_of(tmp_path), tmp_path / "out")
    assert len(list((tmp_path / "out" / "cells").glob("*.json"))) == 2


def test_a_full_disk(tmp_path, monkeypatch):
    """An error in a sentence; what is finished is kept, nothing is half written."""
    count = 0
    real = command.write_atomically

    def full(path, content):
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, f"{path} could not be written (No space left on device)")
        real(path, content)

    monkeypatch.setattr(command, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        compare(spec_of(tmp_path), tmp_path / "out")
    kept = sorted(path.suffix for path in (tmp_path / "out" / "cells").iterdir())
    assert kept == [".json", ".npy"]
    monkeypatch.undo()
    compare(spec_of(tmp_path), tmp_path / "out")
    assert len(results(tmp_path / "out")["cells"]) == 3


# Killed, and shared out ---------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
from pathlib import Path
from kdpp.lab import compare as command, files

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

command.Bench(command.read_spec(spec), "cpu")  # what it imports, the children need not
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
        result["timing"] = {"seconds": 1.0, "memory": 0, "finished": "then"}
        path.write_text(json.dumps(result, indent=1))
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
    with command.locked(tmp_path / "out"), pytest.raises(BlockingIOError, match="another run"):
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
