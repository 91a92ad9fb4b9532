"""The benchmarks run, at sizes at which they say nothing, and their figures are what they claim."""

import json
import sys
from pathlib import Path

import pytest
import torch

import four_plus_one
import measure
import needs
import pipeline_cost
import precision
import size_cost
import step_cost
import training_time
from kdpp.checkpoints import pipelines
from kdpp.lab.methods import load_methods
from kdpp.lab.settings import read_toml


def test_kernels_reads_and_memory_are_counted():
    """By hand: two large kernels, a small one, a draw, a read; two latents alive at most."""
    x = torch.ones(10)
    with measure.Count(10) as counted:
        y = x + 1
        y = y * 2
        z = torch.randn(10)
        small = x[:3] + 1
        float(small[0])
    assert (counted.latent, counted.small, counted.draws, counted.reads) == (2, 1, 1, 1)
    assert counted.peak == 4 * (10 + 10 + 3)
    del y, z, small
    assert counted.alive == 0


@needs.k_diffusion
def test_step_cost():
    """One row: kdpp's kernels fewer than k-diffusion's, no reads against some, ratios of times."""
    shape = (1, 1, 2, 2)
    step_cost.STEPS[shape] = 3
    row = step_cost.measure("euler", shape, 2)
    assert row["counts"]["kdpp"] == {"latent": 1.0, "small": 0.0, "draws": 0.0, "reads": 0.0}
    assert row["counts"]["k-diffusion"]["latent"] > 1 < row["counts"]["k-diffusion"]["reads"]
    assert 0 < row["time_ratio"]["k-diffusion"] < 10


@needs.k_diffusion
def test_precision():
    """A state in float32 is nearer to float64 than one in 16 bits, and than k-diffusion's."""
    row = precision.errors("euler", torch.bfloat16, 20)
    assert row["float32 state"] < row["16-bit state"]
    assert row["float32 state"] < row["k-diffusion"]


@pytest.mark.parametrize(
    ("scales", "evaluations"), [((1.0, 1.0), 1.0), ((1.0, 7.5), 1.2), ((2.0, 7.5), 1.0)]
)
def test_four_plus_one(scales, evaluations, monkeypatch):
    """The ratio of evaluations, both halves of CFG counted."""
    monkeypatch.setattr(four_plus_one, "SHAPE", (1, 4, 8, 8))
    row = four_plus_one.measure(four_plus_one.pair("convolutions"), "euler", scales, 1)
    assert row["evaluations"] == pytest.approx(evaluations)
    assert row["time / evaluations"] > 0


def test_memory_does_not_grow_with_the_steps():
    """Latents alive at once: as many in 40 steps as in 4; slopes of exact powers are exact."""
    rows = [size_cost.measure("dpmpp_2m", "steps", steps, 1) for steps in (4, 40)]
    assert rows[0]["latents"] == pytest.approx(rows[1]["latents"], rel=0.5)
    points = [{"axis": "side", "value": n, "seconds": n**2 / 7} for n in (1, 2, 4, 8)]
    assert size_cost.slope(points, "seconds") == pytest.approx(1.0)


def test_sizes_are_drawn(tmp_path):
    """A picture of all three axes."""
    rows = [
        {"solver": name, "axis": axis, "value": value, "seconds": value, "latents": 3.0}
        for name in size_cost.SAMPLERS
        for axis, values in size_cost.AXES.items()
        for value in values
    ]
    size_cost.plot(rows, tmp_path / "size.png")
    assert (tmp_path / "size.png").read_bytes().startswith(b"\x89PNG")


def test_figures_say_where_they_were_taken(tmp_path):
    """Date, device, versions, beside the rows."""
    measure.write(tmp_path / "a.json", [{"x": 1}])
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["rows"] == [{"x": 1}]
    assert {"date", "device", "threads", "torch", "python"} == set(written["about"])
    assert written["about"]["torch"] in measure.heading(written["about"])


def test_training_time(monkeypatch, capsys, tmp_path):
    """Every way once, the second stage from the first; the sum is of all."""
    kept = ["teacher", "guided-stage-one", "guided-stage-two"]
    monkeypatch.setattr(training_time, "load_methods", lambda: kept)
    monkeypatch.setattr(training_time, "MORE", {"half of it": ("progressive", "--steps", "32")})
    out = tmp_path / "times.json"
    monkeypatch.setattr(sys, "argv", ["training_time", "--iterations", "1", "--json", str(out)])
    training_time.main()
    rows = json.loads(out.read_bytes())["rows"]["methods"]
    assert [row["method"] for row in rows] == [*kept, "half of it"]
    assert f"{sum(row['cpu'] for row in rows):.0f} s =" in capsys.readouterr().out


def test_a_table_of_the_papers(monkeypatch, tmp_path, capsys):
    """Trains what is named, its teacher too, measures, compares; again it finds all there."""
    monkeypatch.syspath_prepend(str(Path(training_time.__file__).parent / "papers"))
    import tables

    (tmp_path / "students.toml").write_text(
        '[a]\nmethod = "guided-stage-one"\niterations = 1\n'
        '[b]\nmethod = "guided-stage-two"\niterations = 1\nteacher = "students/a"\n'
        'start_steps = 8\n[c]\nmethod = "consistency"\niterations = 1\n'
    )
    names = ["b", "c", "c-seed-1", "c-seed-2"]
    (tmp_path / "table5.toml").write_text(
        'title = "t"\nimages = 20\nseeds = 2\nteacher = "digits:teacher"\n'
        "self_control = false\nmore_steps = false\nbest_teacher = false\n[students]\n"
        + "".join(f'{name} = "students/{name}"\n' for name in names)
        + "[reference]\nsteps = 4\ncond_scale = 1.0\n[[grid]]\nstudent = "
        + json.dumps(names)
        + '\n[[grid]]\nstudent = "c"\nteacher_scale = 0.5\n'
    )
    pairs = [(("b", 4, 1.0), ("c", 4, 1.0))]
    monkeypatch.setattr(tables, "HERE", tmp_path)
    monkeypatch.setattr(tables, "PAIRS", {5: pairs})
    out = tmp_path / "out"
    out.mkdir()
    text = tables.table(5, out)
    lines = text.replace("\u00a0", " ").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    # Training seeds go by themselves.
    assert [row[:3] for row in rows[2:4]] == [["b", "euler 4", ""], ["c", "lcm 4", ""]]
    assert rows[4][:3] == ["c", "lcm 4", "λ 0.5"] and rows[4][-4] == "4 + 1"
    assert len({len(row) for row in rows[:5]}) == 1
    assert rows[8][:2] == ["b, 4 steps, CFG 1", "c, 4 steps, CFG 1"]
    results = tables.stored(5, out)
    plain = [cell for cell in results["cells"] if cell["guide"] == "none"]
    fd = {cell["student"]: cell["metrics"]["fd"]["values"] for cell in plain}
    mean = sum(a - b for a, b in zip(fd["b"], fd["c"])) / 2
    assert f"{mean:+.2f} ±" in rows[8][2]
    per_seed = tables.training_table(results)
    assert len(per_seed) == 3 and per_seed[2].startswith("| c | ")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    assert len(before) == 5 and tables.table(5, out) == text
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}


def test_every_student_of_the_papers_tables_can_be_trained():
    """Named in students.toml, by a method that there is; so is who teaches it."""
    folder = Path(training_time.__file__).parent / "papers"
    students = read_toml(folder / "students.toml")
    assert {settings["method"] for settings in students.values()} <= set(load_methods())
    places = [settings["teacher"] for settings in students.values() if "teacher" in settings]
    for spec in folder.glob("table*.toml"):
        places += read_toml(spec)["students"].values()
    named = [place.removeprefix("students/") for place in places if not place.startswith("digits:")]
    assert len(named) > 50
    assert {name.partition("-seed-")[0] for name in named} <= set(students)


def test_pipeline_cost():
    """Both loops ask the network as often, and give the same latents."""
    pytest.importorskip("diffusers")
    tiny = pytest.importorskip("tiny_pipelines", reason="needs transformers")
    for family in pipeline_cost.FAMILIES:
        pipe = getattr(tiny, family)()
        pipe.set_progress_bar_config(disable=True)
        calls, latents = [], []
        pipelines.network_of(pipe).register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        for run in pipeline_cost.runs(pipe).values():
            calls.clear()
            found = run()
            found = found if isinstance(found, torch.Tensor) else found.images
            packed = found.ndim == 3
            latents.append(pipe._unpack_latents(found, 32, 32, 2) if packed else found)
            assert len(calls) == pipeline_cost.STEPS
        torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)
