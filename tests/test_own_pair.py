"""``kdpp tune`` and ``kdpp compare`` on pipelines of diffusers: the user's own pair."""

import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")

import kdpp
from kdpp.checkpoints.load import load_pipeline
from kdpp.checkpoints.models import open_models
from kdpp.checkpoints.pipelines import encode, network_of
from kdpp.checkpoints.presets import PRESETS
from kdpp.checkpoints.requests import Request
from kdpp.cli import main
from kdpp.lab import pieces, tune
from kdpp.lab.looks import Look
from test_loras import lora

tiny = pytest.importorskip("tiny_pipelines", reason="needs diffusers and transformers")

CPU = torch.device("cpu")
PROMPTS = ("a red boat", "the green hill", "a dark lighthouse")
FEW = ("--samples", 20, "--detail", 2, "--width", 16, "--height", 16)


@pytest.fixture(autouse=True)
def notes(tmp_path, monkeypatch):
    """Notes of places that are the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
    return tune.Asked.by(parser.parse_args([*map(str, words), "--out", "nowhere"]))


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


def test_a_preset_says_how_the_student_is_sampled(tmp_path):
    """Its sampler, levels and scales, without another flag."""
    words = [*words_of(save(tmp_path, "sdxl")), *FEW]
    one = asked(*words, "--preset", "dmd2", "--dtype", "bfloat16")
    preset = PRESETS["dmd2"]
    assert one.recipe.levels == preset.sigmas(None, (16, 16))
    assert (one.recipe.sampler, one.scale) == (preset.sampler, preset.teacher_cfg_scale)
    unet = one.recipe.student.pair.pipe.unet
    assert unet.dtype == torch.bfloat16
    five = asked(*words, "--sigmas", "[14.6, 5, 2, 1, 0.5, 0]", "--sampler", "dpmpp_2m")
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
    part, x = one.work().fit[0], torch.ones(1, 4, 8, 8)
    cond = {key: value[:1] for key, value in part.extra_args["cond"].items()}
    base, _ = open_models(Request(str(sd / "student"), steps=1, width=16, height=16), CPU, PROMPTS)
    with torch.no_grad():
        answers = [
            model.denoiser_for(1)(x, torch.ones(1), cond=cond) for model in (student, teacher, base)
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
    from kdpp.checkpoints.requests import read_png

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
