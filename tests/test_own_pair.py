"""``kdpp tune`` and ``kdpp compare`` on pipelines of diffusers: the user's own pair."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")

import kdpp
from kdpp.checkpoints.flags import request_of, settings_of
from kdpp.checkpoints.load import load_pipeline
from kdpp.checkpoints.models import Shelf, open_models, student_request
from kdpp.checkpoints.pipelines import encode, network_of
from kdpp.checkpoints.presets import PRESETS
from kdpp.checkpoints.requests import Request, read_png
from kdpp.cli import MODULES, main
from kdpp.lab import pieces, tune
from kdpp.lab.asked import Asked
from kdpp.lab.data import load_pictures
from kdpp.lab.looks import Look
from kdpp.lab.metrics import frechet_distance
from kdpp.lab.sampling import Recipe, draw
from kdpp.lab.spec import read_spec
from test_loras import lora

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
tiny = pytest.importorskip("tiny_pipelines", reason="needs diffusers and transformers")

CPU = torch.device("cpu")
PROMPTS = ("a red boat", "the green hill", "a dark lighthouse")
FEW = ("--samples", 20, "--detail", 2, "--width", 16, "--height", 16)


pytestmark = pytest.mark.usefixtures("own_notes")


def save(folder, kind):
    """A student's and a teacher's folder, and a file of prompts."""
    for role, seed in (("student", 0), ("teacher", 7)):
        pipe = getattr(tiny, kind)()
        tiny.tiny(network_of(pipe), seed=seed)
        pipe.save_pretrained(folder / role)
    (folder / "prompts.txt").write_text("\n\n".join(PROMPTS))
    return folder


def words_of(folder):
    return [f"--{role}={folder / role}" for role in ("student", "teacher")] + [
        f"--prompts={folder / 'prompts.txt'}"
    ]


def run(command, *words):
    """The command's exit status."""
    return main([command, *map(str, words)])


def asked(*words):
    """What `kdpp tune` makes of its arguments."""
    parser = tune.argparse.ArgumentParser()
    tune.add_arguments(parser)
    return Asked.by(parser.parse_args([*map(str, words), "--out", "nowhere"]))


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return save(tmp_path_factory.mktemp("sd"), "sd")


# kdpp tune ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "qwen_image"])
def test_a_pair_of_pipelines_is_tuned(kind, tmp_path, capsys):
    """The price comes first and is kept; the answer has what it advises, and the command for it."""
    words = [*words_of(save(tmp_path, kind)), "--steps", 2, *FEW, "--teacher-cfg-scale", 3]
    assert run("tune", *words, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    price, *_ = said.splitlines()
    found = json.loads((tmp_path / "out" / "tuning.json").read_text())
    announced = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+)(?= eval| of the t)", price)]
    for most, done in zip(announced, found["evaluations"], strict=True):
        assert 0.5 * most <= done <= most
    assert re.search(r"at \S+ s and \S+ s each about \S+ (seconds|minutes)$", price)
    assert found["samples"] == 20 and found["teacher_cfg_scale"] == 3.0
    assert found["levels"][-1] == 0.0 and found["sampler"] == "euler"
    flow = kind != "sdxl"
    assert found["levels"][0] == pytest.approx(999.0 if flow else 14.6146, rel=1e-3)
    assert ("σ = τ/(1-τ)" in said) == flow
    assert found["command"].startswith("kdpp generate --student") and found["command"] in said


def test_samples_draw_the_prompts_in_turn(sd):
    """Sample i the i-th prompt of the file, and again from the first, encoded as ever."""
    one = asked(*words_of(sd), "--steps", 2, "--negative", "blurry", *FEW)
    parts = one.work().fit
    chosen = torch.cat([part.seeds for part in parts]).tolist()
    pipe = load_pipeline(str(sd / "student"))
    wanted = encode(pipe, [PROMPTS[seed % 3] for seed in chosen], "blurry", height=16, width=16)
    for half in ("cond", "uncond"):
        given = torch.cat([part.extra_args[half]["encoder_hidden_states"] for part in parts])
        assert torch.equal(given, wanted[half]["encoder_hidden_states"])
    assert [len(part.x) for part in parts] == [4, 4, 2]
    assert parts[0].extra_args["cond_scale"] == 1.0 and one.scale == 7.5


def test_a_preset_says_how_the_student_is_sampled(tmp_path, capsys):
    """Its sampler, levels and scales, without another flag."""
    words = [*words_of(save(tmp_path, "sdxl")), *FEW]
    one = asked(*words, "--preset", "dmd2", "--dtype", "bfloat16")
    preset = PRESETS["dmd2"]
    assert one.recipe.levels == preset.sigmas(None, (16, 16))
    assert (one.recipe.sampler, one.scale) == (preset.sampler, preset.teacher_cfg_scale)
    unet = one.recipe.student.pair.pipe.unet
    assert unet.dtype == torch.bfloat16
    five = asked(*words, "--sigmas", "[14.6, 5, 2, 1, 0.5, 0]", "--sampler", "dpmpp_2m")
    assert "trained for" not in capsys.readouterr().err
    asked(*words, "--preset", "dmd2", "--sigmas", "[14.6, 5, 0]")
    assert "dmd2 was trained for the levels" in capsys.readouterr().err
    assert five.recipe.levels == (14.6, 5.0, 2.0, 1.0, 0.5, 0.0)
    assert five.recipe.solver.name == "dpmpp_2m"


def test_a_flow_model_is_tuned_in_its_ve_form(tmp_path):
    """From the same noise the run is that of its own coordinates."""
    levels = (0.9, 0.5, 0.2, 0.0)
    one = asked(*words_of(save(tmp_path, "sd3")), "--sigmas", list(levels), *FEW)
    part = one.work().fit[0]
    x = part.x / 9.0  # the noise
    model = one.recipe.guided()
    alone = kdpp.TeacherGuidedDenoiser(model.student, model.student, teacher_steps=0)
    with torch.no_grad():
        wanted = kdpp.sample(
            "euler", alone, 0.9 * x, torch.tensor(levels), part.extra_args, disable=True
        )
        found = part.plain()
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def base_of(sd):
    """The student without a LoRA."""
    request = Request(str(sd / "student"), steps=1, width=16, height=16)
    return open_models(request, CPU, PROMPTS)[0]


def test_one_network_with_a_speed_lora(sd, tmp_path):
    """The student has it, the teacher has not; the command that is printed names it."""
    file = lora(tmp_path / "speed.safetensors", 3)
    words = [f"--student={sd / 'student'}", f"--prompts={sd / 'prompts.txt'}", "--steps", 1, *FEW]
    assert run("tune", *words, "--student-lora", f"{file}:0.5", "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert found["teacher"] is None and found["distance"] > 0.0
    assert found["command"] is None or f"--student-lora {file}:0.5" in found["command"]
    one = asked(*words, "--student-lora", f"{file}:0.5")
    student, teacher = one.recipe.student, one.recipe.teacher
    assert student.parameters == teacher.parameters and student.digest() != teacher.digest()
    full = asked(*words, "--student-lora", file).recipe.student
    assert len({one.digest() for one in (student, full, base_of(sd))}) == 3
    part, x = one.work().fit[0], torch.ones(1, 4, 8, 8)
    cond = {key: value[:1] for key, value in part.extra_args["cond"].items()}
    with torch.no_grad():
        answers = [
            model.denoiser_for(1)(x, torch.ones(1), cond=cond)
            for model in (student, teacher, base_of(sd))
        ]
    assert torch.equal(answers[1], answers[2]) and not torch.equal(answers[0], answers[1])


def stopped(monkeypatch, after):
    """Ctrl-C once so many parts have been written."""
    count, write = [], pieces.write_atomically

    def written(path, content):
        write(path, content)
        count.append(path)
        if len(count) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(pieces, "write_atomically", written)
    return count


def test_a_stopped_run_goes_on(sd, tmp_path, monkeypatch, capsys):
    """What was finished is not asked for again, and the answer is the same to the bit."""
    words = [*words_of(sd), "--steps", 1, *FEW]
    with monkeypatch.context() as patch:
        stopped(patch, 2)
        assert run("tune", *words, "--out", tmp_path / "two") == 130
    assert "what is finished is kept" in capsys.readouterr().err
    (folder,) = (tmp_path / "two" / "parts").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(path.name for path in before) == ["study-0000.safetensors",
                                                    "study-0001.safetensors"]  # fmt: skip
    with monkeypatch.context() as patch:
        made = stopped(patch, None)
        assert run("tune", *words, "--out", tmp_path / "two") == 0
        assert run("tune", *words, "--out", tmp_path / "one") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    kept = [sum(folder.name in str(path) and out in str(path) for path in made)
            for out in ("/one/", "/two/")]  # fmt: skip
    assert kept[0] == kept[1] + 2
    found = [(tmp_path / name / "tuning.json").read_bytes() for name in ("one", "two")]
    assert found[0] == found[1]
    other = [*words[:-1], 24, "--out", tmp_path / "two"]  # another height
    assert run("tune", *other) == 0
    assert len(list((tmp_path / "two" / "parts").iterdir())) == 2


def test_each_process_makes_its_own_parts(tmp_path):
    made = []
    share = pieces.Pieces(tmp_path, 1, 3).make("study", 7, lambda i: made.append(i) or {})
    assert made == list(share) == [1, 4]


def test_two_processes_tune_as_one(tmp_path):
    """Each works on its own parts of the samples; one writes the answer. (On the lab's models,
    which load at once: sharing knows nothing of pipelines.)"""
    words = ["digits:student", "digits:teacher", "--samples", "20", "--batch", "3"]
    assert run("tune", *words, "--out", tmp_path / "one") == 0
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "kdpp", "tune", *words, "--out", str(tmp_path / "two")],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert b"Guide" in said[0][0] or b"Do not" in said[0][0]
    assert said[1][0] == b""
    found = [(tmp_path / name / "tuning.json").read_bytes() for name in ("one", "two")]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_what_is_advised_is_taken_by_generate(kind, tmp_path):
    """The command that is printed draws, with these settings; a flow model's level is a τ."""
    folder = save(tmp_path, kind)
    one = asked(*words_of(folder), "--steps", 2, "--option", "s_noise=0.5", *FEW)
    look = Look("teacher", 1, 0.3, 0.25, 0.0, 3.0, scale=1.25)
    advice = SimpleNamespace(by="teacher", guide=True, settings=look.settings)
    words = shlex.split(one.command(advice))
    words[words.index("DIR")] = str(tmp_path / "out")
    assert main([*words[1:], "--seed", "5"]) == 0
    request, _, _ = read_png(tmp_path / "out" / "00001-00005-teacher.png")
    level = 0.2 if kind == "sd3" else 0.25
    assert request.guidance == look.settings | {"renoise": level, "teacher_steps": (1,)}
    assert request.steps == 2 and request.options == {"s_noise": 0.5}
    assert request.prompt == PROMPTS[1]
    assert one.command(SimpleNamespace(by=None)) is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "which model?"),
        (("--student", "STUDENT"), "whose help? --teacher MODEL"),
        (("STUDENT", "TEACHER", "--steps", "2"), "name a file of them (--prompts FILE)"),
        (("STUDENT", "TEACHER", "--prompts", "EMPTY", "--steps", "2"), "holds no prompt"),
        (("STUDENT", "TEACHER", "--prompts", "PROMPTS"), "--preset NAME, or --steps N"),
        (("STUDENT", "TEACHER", "--prompts", "PROMPTS", "--steps", "2", "--samples", "9"),
         "--samples is 9"),
        (("STUDENT", "TEACHER", "--prompts", "PROMPTS", "--steps", "2", "--batch", "0"),
         "batch is 0"),
        (("digits:student", "digits:teacher", "--prompts", "PROMPTS"), "takes no prompts"),
        (("digits:student", "digits:teacher", "--preset", "dmd2"), "takes no preset"),
        (("digits:student", "digits:teacher", "--width", "16"), "has the size of its data"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_said_before_any_work(words, sentence, sd, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n\n")
    places = {"STUDENT": sd / "student", "TEACHER": sd / "teacher",
              "PROMPTS": sd / "prompts.txt", "EMPTY": tmp_path / "empty.txt"}  # fmt: skip
    words = [places.get(word, word) for word in words]
    assert run("tune", *words, "--out", tmp_path / "out") == 1
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("kdpp: ")]
    assert sentence in line
    assert not list((tmp_path / "out" / "parts").glob("*"))


def test_a_teacher_that_reads_prompts_by_itself_is_refused(sd, tmp_path, capsys):
    """Here one encoded prompt serves both; otherwise the teacher would be asked wrongly."""
    other = tiny.sd(seed=7)
    tiny.tiny(other.text_encoder, seed=5)
    other.save_pretrained(tmp_path / "other")
    words = ["--student", sd / "student", "--teacher", tmp_path / "other",
             "--prompts", sd / "prompts.txt", "--steps", 2, *FEW]  # fmt: skip
    assert run("tune", *words, "--out", tmp_path / "out") == 1
    assert "has other text encoders than" in capsys.readouterr().err


def test_a_prompt_that_cannot_be_read_is_refused_before_any_work(sd, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a boat\na [red:green:0.5] boat\n")
    words = ["--student", sd / "student", "--teacher", sd / "teacher", "--steps", 2, *FEW,
             "--prompts", tmp_path / "prompts.txt"]  # fmt: skip
    assert run("tune", *words, "--out", tmp_path / "out") == 1
    assert "the prompt holds '[red:green:0.5]'" in capsys.readouterr().err


# kdpp compare -------------------------------------------------------------------------------------

METRICS = '''
from pathlib import Path

import torch


def brightness(pictures, prompts):
    """How bright a picture is."""
    assert pictures.shape == (len(prompts), 3, *pictures.shape[2:])
    assert 0.0 <= pictures.min() and pictures.max() <= 1.0
    with open(Path(__file__).with_name("seen.txt"), "a") as file:
        file.writelines(f"{prompt}\\n" for prompt in prompts)
    return pictures.mean((1, 2, 3))


def noise(pictures, prompts):
    return [float(picture.std()) for picture in pictures]


noise.better = "lower"


def corners(pictures):
    return torch.nn.functional.adaptive_avg_pool2d(pictures, 1).flatten(1)


def too_few(pictures, prompts):
    return [1.0]


def fd(pictures, prompts):
    return torch.zeros(len(pictures))


def broken(pictures, prompts):
    raise RuntimeError("no weights")
'''
SPEC = """
prompts = "prompts.txt"
images = 4
seeds = 2
batch = 3
metrics = ["mine.py:brightness", "mine.py:noise"]
teacher = "teacher"
self_control = true

[pipelines]
width = 16
height = 16
steps = 2

[students]
mine = "student"

[[grid]]
student = "mine"
teacher_scale = [0.0, 0.5]
"""


def compared(folder, spec, tmp_path, *changes):
    """The command's status, with texts of the spec replaced; the folder of results."""
    (folder / "mine.py").write_text(METRICS)
    (folder / "seen.txt").unlink(missing_ok=True)
    for old, new in changes:
        assert old in spec
        spec = spec.replace(old, new)
    file = folder / f"{tmp_path.name}.toml"
    file.write_text(spec)
    return run("compare", file, "--out", tmp_path / "out"), tmp_path / "out"


def results(out):
    return json.loads((out / "results.json").read_text())


def references(folder, count=6):
    """Pictures of two sizes."""
    (folder / "coco").mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(256, (16 + i % 2, 20, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "coco" / f"{i}.png")


def test_a_pair_of_pipelines_is_compared(sd, tmp_path):
    """Alone, with the teacher, with itself; each figure is that of pictures drawn by hand."""
    status, out = compared(sd, SPEC, tmp_path)
    assert status == 0
    found = results(out)
    assert [cell["guide"] for cell in found["cells"]] == ["none", "teacher", "self"]
    assert [metric["name"] for metric in found["metrics"]] == ["brightness", "noise"]
    assert [metric["better"] for metric in found["metrics"]] == ["higher", "lower"]
    assert found["metrics"][0]["what"] == "How bright a picture is."
    plain, taught, _ = found["cells"]
    costs = [plain["costs"][f"{who}_evaluations"] for who in ("student", "teacher")]
    assert costs == [2, 0] and taught["costs"]["teacher_evaluations"] == 2  # CFG 7.5
    assert taught["teacher_cfg_scale"] == 7.5 and taught["steps"] == 2
    change = taught["metrics"]["brightness"]
    values = [one["metrics"]["brightness"]["values"] for one in (plain, taught)]
    assert change["change"]["mean"] == pytest.approx(
        sum(b - a for a, b in zip(*values, strict=True)) / 2
    )
    assert change["own_share"] is not None and change["change"]["low"] < change["change"]["high"]
    # Seed 0 draws prompts 0 to 3, seed 1 goes on with the 4th.
    student, teacher = open_models(
        Request(str(sd / "student"), str(sd / "teacher"), steps=2, width=16, height=16),
        CPU,
        PROMPTS,
    )
    guidance = {"teacher_scale": 0.5, "teacher_cfg_scale": 7.5}
    for k, recipe in enumerate((
        Recipe(student, None, "euler", student.levels_for()),
        Recipe(student, teacher, "euler", student.levels_for(), guidance=guidance),
    )):  # fmt: skip
        for seed in (0, 1):
            labels = torch.tensor([(4 * seed + i) % 3 for i in range(4)])
            x = draw(recipe, range(seed * 10**6, seed * 10**6 + 4), labels, chunk=3).x
            wanted = float(student.decode(x).mean((1, 2, 3)).mean())
            assert values[k][seed] == pytest.approx(wanted, rel=1e-6)
    seen = (sd / "seen.txt").read_text().splitlines()
    assert len(seen) == 3 + 3 * 2 * 4 and set(seen) == set(PROMPTS)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 3 and "real images" not in page
    # Once more: nothing is measured.
    (sd / "seen.txt").unlink()
    assert run("compare", sd / f"{tmp_path.name}.toml", "--out", out) == 0
    assert not (sd / "seen.txt").exists() and results(out) == found


def test_the_papers_table_is_a_spec(tmp_path):
    """benchmarks/paper_table.toml, run to the end on tiny models with other places and sizes."""
    folder = tmp_path / "files"
    folder.mkdir()
    for seed, name in enumerate(("sdxl", "lightning", "dmd2", "turbo")):
        tiny.sdxl(seed=seed).save_pretrained(folder / name)
    scheduler = diffusers.LCMScheduler(**tiny.TABLE)
    tiny.sdxl(scheduler, seed=5, time_cond_proj_dim=8).save_pretrained(folder / "lcm")
    lora(folder / "lcm_lora_sdxl.safetensors", 3, width=(8, 32))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    references(folder)
    spec = (Path(__file__).parents[1] / "benchmarks" / "paper_table.toml").read_text()
    status, out = compared(
        folder, spec, tmp_path,
        ('components = "sdxl.safetensors"\n', ""), ('"sdxl.safetensors"', '"sdxl"'),
        ("lcm_sdxl_unet.safetensors", "lcm"), ("dmd2_sdxl_4step_unet.safetensors", "dmd2"),
        ("sdxl_lightning_4step_unet.safetensors", "lightning"),
        ("sd_xl_turbo.safetensors", "turbo"), ("= 2500 ", "= 4 "), ("seeds = 4 ", "seeds = 2 "),
        ("= 1024", "= 16"), ("= 512", "= 24"), ('"float16"', '"float32"'),
        ("inception:inception.safetensors", "mine.py:corners"),
        ("my_metrics.py:image_reward", "mine.py:brightness"),
        ("my_metrics.py:pick_score", "mine.py:noise"),
    )  # fmt: skip
    assert status == 0
    found = results(out)
    ways = {}
    for cell in found["cells"]:
        costs = tuple(cell["costs"][f"{who}_evaluations"] for who in ("student", "teacher"))
        ways.setdefault(cell["student"], []).append((cell["guide"], cell["steps"], costs))
    names = ("lcm", "lcm-lora", "lightning", "dmd2", "turbo")
    assert sorted(ways) == sorted(names)
    for name in names:
        own = {4: 7, 5: 9} if name == "turbo" else {4: 4, 5: 5}  # 2S: two calls, and one at last
        assert sorted(ways[name]) == sorted([
            ("none", 4, (own[4], 0)), ("teacher", 4, (own[4], 2)), ("self", 4, (own[4] + 1, 0)),
            ("none", 5, (own[5], 0)),
        ])  # fmt: skip
    lightning = [cell for cell in found["cells"] if cell["student"] == "lightning"]
    assert lightning[1]["teacher_scale"] == 0.1 and lightning[1]["teacher_cfg_scale"] == 7.5
    assert len({cell["metrics"]["brightness"]["mean"] for cell in found["cells"]}) == 20
    assert {"fd", "kid", "brightness", "noise"} <= {one["name"] for one in found["metrics"]}
    lines = (out / "results.csv").read_text().splitlines()
    page = (out / "report.html").read_text()
    assert len(lines) == 21 and page.count("real images") == 5 and "brightness" in page


def test_the_fd_is_that_of_the_named_features(sd, tmp_path):
    """Between the reference pictures, of any sizes, and the samples; and to the teacher's own."""
    references(sd)
    status, out = compared(
        sd, SPEC, tmp_path, ("batch = 3", 'batch = 3\ndata = "coco"\nfeatures = "mine.py:corners"'),
        ("[students]", "[reference]\ncond_scale = 3.0\nsteps = 3\n\n[students]"),
        ("[0.0, 0.5]", "0.0"), ("seeds = 2", "seeds = 1"),
    )  # fmt: skip
    assert status == 0
    (cell,) = results(out)["cells"]
    request = Request(str(sd / "student"), str(sd / "teacher"), steps=2, width=16, height=16)
    student, teacher = open_models(request, CPU, PROMPTS)
    labels = torch.tensor([0, 1, 2, 0])

    def rows(recipe, seed, labels):
        seeds = range(seed * 10**6, seed * 10**6 + 4)
        return student.decode(draw(recipe, seeds, labels, chunk=3).x).mean((2, 3)).double()

    made = rows(Recipe(student, None, "euler", student.levels_for()), 0, labels)
    real = torch.cat([one.add(1).div(2).mean((2, 3)) for one in load_pictures(sd / "coco")])
    wanted = frechet_distance(made, real.double())
    assert cell["metrics"]["fd"]["mean"] == pytest.approx(wanted, rel=1e-4)
    own = Recipe(teacher, None, "euler", student.levels_for(3), 3.0)
    theirs = rows(own, 10**9, (torch.arange(4) + 10**9 * 4) % 3)
    wanted = frechet_distance(made, theirs)
    assert cell["metrics"]["fd_teacher"]["mean"] == pytest.approx(wanted, rel=1e-3, abs=1e-9)


def test_one_pair_at_a_time_is_in_memory(sd):
    """What is known of the others stays; they are loaded again when they are used."""
    shelf = Shelf(CPU, PROMPTS)
    settings = {"steps": 2, "width": 16, "height": 16}
    first, _ = shelf.models(Request(str(sd / "student"), str(sd / "teacher"), **settings))
    held = [weakref.ref(first.network), weakref.ref(shelf.open(first._request)[1].network)]
    assert all(one() is not None for one in held)
    second, none = shelf.models(Request(str(sd / "teacher"), **settings))
    assert none is None and all(one() is None for one in held)
    assert first.shape == second.shape and first.digest() != second.digest()
    assert first.levels_for(3) == second.levels_for(3)
    assert first.network is not second.network


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ([("mine.py:noise", "mine.py:nose")], "mine.py has no function 'nose'"),
        ([("mine.py:noise", "noise")], "must be module:function, or FILE.py:function"),
        ([("mine.py:noise", "no_such_module:noise")], "no_such_module"),
        ([("mine.py:noise", "mine.py:brightness")], "give each its own name"),
        ([("mine.py:noise", "mine.py:fd")], "give each its own name"),
        ([("mine.py:noise", "mine.py:too_few")], "gave 1 scores for 3 pictures"),
        ([('["mine.py:brightness", "mine.py:noise"]', "[]")], "nothing is measured"),
        ([("batch = 3", 'batch = 3\ndata = "coco"')], "give both or neither"),
        ([("batch = 3", "batch = 0")], "batch is 0"),
        ([('prompts = "prompts.txt"', "")], "give prompts, a file"),
        ([("prompts.txt", "nothing.txt")], "nothing.txt"),
        ([('"student"\n', '{model = "student", preset = "dmd3"}\n')], "did you mean 'dmd2'"),
        ([('"student"\n', '{model = "student", pre = "dmd2"}\n')], "did you mean 'preset'"),
        ([('"student"\n', '{model = "nowhere"}\n')], "there is no file or folder"),
        ([("[0.0, 0.5]", "0.5\nsteps = 3\nlevels = [[2.0, 0.0]]")], "say the same"),
        ([('teacher = "teacher"', "")], "no teacher is named"),
        ([('mine = "student"', 'mine = "digits:student"')], "a model of the lab, which takes no"),
    ],
)
def test_what_cannot_be_compared_is_said(changes, sentence, sd, tmp_path, capsys):
    status, _ = compared(sd, SPEC, tmp_path, *changes)
    assert status == 1
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("kdpp: ")]
    assert sentence in line


def test_a_mistake_in_a_metric_is_named_by_its_line(sd, tmp_path, capsys):
    """Before any cell is sampled."""
    status, out = compared(sd, SPEC, tmp_path, ("mine.py:noise", "mine.py:broken"))
    assert status == 1 and not out.exists()
    assert "mine.py, line 36: RuntimeError: no weights" in capsys.readouterr().err


@pytest.mark.parametrize("page", ["tuning", "comparing"])
def test_the_pages_on_ones_own_models(page, tmp_path):
    """Their commands are read, and the spec and the metric are ones."""
    text = (Path(__file__).parents[1] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```console\n(.*?)```", text, re.S)).replace("\\\n", " ")
    commands = [
        line.partition("kdpp ")[2].split() for line in blocks.splitlines() if "kdpp" in line
    ]
    assert len(commands) == 2
    for name, *words in commands:
        module = importlib.import_module(MODULES[name])
        parser = module.argparse.ArgumentParser()
        module.add_arguments(parser)
        given = parser.parse_args(words)
        if name == "tune":
            assert PRESETS[request_of(settings_of(given)).preset]
    if page == "comparing":
        (spec,) = [b for b in re.findall(r"```toml\n(.*?)```", text, re.S) if "prompts =" in b]
        (tmp_path / "mine.toml").write_text(spec)
        students = read_spec(tmp_path / "mine.toml").students
        requests = {name: student_request(about, "teacher") for name, about in students.items()}
        assert requests["lcm-lora"].loras[0][1:] == (None, "student")
        assert requests["lcm-lora"].teacher is None and requests["lightning"].teacher == "teacher"
        (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
        names = {}
        exec(compile(code, page, "exec"), names)
        assert names["brightness"](torch.full((2, 3, 4, 4), 0.5), ["", ""]).tolist() == [0.5, 0.5]
