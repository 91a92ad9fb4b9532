"""``kdpp generate``: pictures from the command line, of lab models and of pipelines."""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from PIL import Image

from kdpp.checkpoints import drawing, flags, pairs, places
from kdpp.checkpoints.pairs import load_pipeline
from kdpp.checkpoints.pipelines import latent_shape, network_of
from kdpp.checkpoints.presets import PRESETS
from kdpp.checkpoints.requests import Request, read_png, read_texts
from kdpp.lab import processes
from kdpp.lab.models import load_model, save_model
from kdpp.lab.sampling import INITIAL, Recipe, draw
from kdpp.noise import SeededNoise
from picture_files import run

LAB = ("--student", "digits:student", "--teacher", "digits:teacher")


pytestmark = pytest.mark.usefixtures("own_notes")


def pictures(folder):
    """The bytes of every picture, by its name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!s]*.png"))}


def pixels(path):
    with Image.open(path) as image:
        return torch.tensor(list(image.tobytes()))


# The lab's models ---------------------------------------------------------------------------------


def test_a_lab_models_pictures_are_its_images(tmp_path):
    """Those that `draw` makes of the same seeds, as pixels."""
    assert run(tmp_path, *LAB, "--seed", "3-5", "--teacher-scale", 0.5, "--label", 4) == 0
    student, teacher = map(load_model, (LAB[1], LAB[3]))
    guidance = {"teacher_scale": 0.5, "teacher_cfg_scale": 2.0}
    recipe = Recipe(student, teacher, "lcm", student.levels_for(), guidance=guidance)
    x = draw(recipe, [3, 4, 5], torch.tensor([4, 4, 4]), chunk=1).x
    wanted = x.div(2).add(0.5).clamp(0, 1).mul(255).round().long().flatten(1)
    assert sorted(pictures(tmp_path)) == ["00003.png", "00004.png", "00005.png"]
    for seed, expected in zip((3, 4, 5), wanted):
        assert torch.equal(pixels(tmp_path / f"{seed:05}.png").long(), expected)


def test_a_picture_depends_on_its_seed_and_the_request_alone(tmp_path):
    """Four in one run are four runs, bit for bit; without a label a seed has its own class."""
    assert run(tmp_path / "four", *LAB, "--seed", "0-3") == 0
    for seed in range(4):
        assert run(tmp_path / "one", *LAB, "--seed", seed) == 0
    assert len(pictures(tmp_path / "four")) == 4
    assert pictures(tmp_path / "four") == pictures(tmp_path / "one")
    assert run(tmp_path / "three", *LAB, "--seed", "3", "--label", 3) == 0
    same, seven = (pixels(tmp_path / name / "00003.png") for name in ("one", "three"))
    assert torch.equal(same, seven)
    assert run(tmp_path / "batch", *LAB, "--seed", "0-3", "--batch", 4) == 0
    for name in pictures(tmp_path / "batch"):
        apart = pixels(tmp_path / "batch" / name).int() - pixels(tmp_path / "one" / name).int()
        assert apart.abs().max() <= 1


def test_like_draws_the_same_file_again(tmp_path):
    """With every setting, bit for bit, and no other argument."""
    settings = (*LAB, "--sampler", "euler_ancestral", "--option", "eta=0.7", "--steps", 5,
                "--teacher-steps", "[0, 2]", "--renoise", "random", "--seed", 11)  # fmt: skip
    assert run(tmp_path / "a", *settings) == 0
    assert run(tmp_path / "b", "--like", tmp_path / "a" / "00011.png") == 0
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b") != {}
    assert run(tmp_path / "c", "--like", tmp_path / "a" / "00011.png", "--steps", 4) == 0
    assert pictures(tmp_path / "c") != pictures(tmp_path / "a")


def test_like_finds_a_file_by_what_it_holds(tmp_path, capsys):
    """A picture names no folder; another model in its place is refused."""
    model = load_model("digits:student")
    (tmp_path / "secret").mkdir()
    file = tmp_path / "secret" / "mine.safetensors"
    save_model(file, model.network, model.card)
    assert run(tmp_path / "a", "--student", file, "--seed", 2) == 0
    picture = tmp_path / "a" / "00002.png"
    assert b"secret" not in picture.read_bytes()
    assert run(tmp_path / "b", "--like", picture) == 0
    moved = shutil.move(file, tmp_path / "elsewhere.safetensors")
    capsys.readouterr()
    assert run(tmp_path / "c", "--like", picture) == 1
    assert "mine.safetensors" in capsys.readouterr().err
    shutil.copy(moved, tmp_path / "mine.safetensors")
    assert run(tmp_path / "d", "--like", picture, "--student", tmp_path / "mine.safetensors") == 0
    assert pictures(tmp_path / "b") == pictures(tmp_path / "d") == pictures(tmp_path / "a")
    assert run(tmp_path / "e", "--like", picture, "--student", "digits:teacher") == 1
    assert "is not the student that the picture was made with" in capsys.readouterr().err


def test_places_that_cannot_be_noted_are_no_failure(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    places.remember({"digest": str(tmp_path)})
    assert places.place_of("digest") is None
    assert run(tmp_path / "a", "--student", "digits:student") == 0


def test_compare_draws_three_ways_and_a_sheet(tmp_path):
    """Alone, with the teacher, with itself: three different pictures of one seed."""
    assert run(tmp_path, *LAB, "--compare", "--seed", "0-1", "--teacher-scale", 0.5) == 0
    made = pictures(tmp_path)
    assert sorted(made) == [f"0000{i}-{guide}.png" for i in (0, 1)
                            for guide in ("none", "self", "teacher")]  # fmt: skip
    assert len({bytes(pixels(tmp_path / name).tolist()) for name in made}) == 6
    assert run(tmp_path / "alone", "--student", "digits:student") == 0
    alone = pixels(tmp_path / "alone" / "00000.png")
    assert torch.equal(pixels(tmp_path / "00000-none.png"), alone)
    costs = json.loads((tmp_path / "costs-0.json").read_text())
    assert {name[6:-4]: cost[:2] for name, cost in costs.items() if name.startswith("00000")} == {
        "none": [4, 0], "teacher": [4, 2], "self": [5, 0],
    }  # fmt: skip
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 3 * 216 + 16 and sheet.height == 2 * 256 + 16


def test_a_student_in_its_teachers_place(tmp_path):
    """Without a teacher, if a share is named; its calls count as the student's."""
    words = ("--student", "digits:student", "--teacher-scale", 0.5)
    assert run(tmp_path / "a", *words) == 0
    assert json.loads((tmp_path / "a" / "costs-0.json").read_text())["00000.png"][:2] == [5, 0]
    assert run(tmp_path / "b", *LAB, "--compare", "--teacher-scale", 0.5) == 0
    itself = pixels(tmp_path / "b" / "00000-self.png")
    assert torch.equal(pixels(tmp_path / "a" / "00000.png"), itself)


def test_a_teacher_with_guidance_inside_is_asked_without_more(tmp_path):
    """`digits:student` was distilled at a CFG scale of 2."""
    assert run(tmp_path, "--student", "digits:student", "--teacher", "digits:student") == 0
    assert read_png(tmp_path / "00000.png")[0].teacher_cfg_scale == 1.0


def test_a_run_goes_on_where_it_was_and_keeps_other_pictures(tmp_path, capsys):
    """What is there is not drawn again; a picture of other settings is not replaced."""
    assert run(tmp_path, *LAB, "--seed", "0-1") == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert run(tmp_path, *LAB, "--seed", "0-3") == 0
    assert len(pictures(tmp_path)) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run(tmp_path, *LAB, "--seed", "0-1", "--teacher-scale", 0.3) == 1
    assert "is a picture of other settings; name another folder" in capsys.readouterr().err


def test_progress_names_the_step_and_who_has_helped(tmp_path, capsys, monkeypatch):
    """Once a step, of all pictures that are wanted; those that are there count as done."""
    monkeypatch.setattr(drawing, "tqdm", partial(drawing.tqdm, mininterval=0))
    settings = (*LAB, "--seed", "0-1", "--teacher-steps", "[1]", "--steps", 3)
    assert run(tmp_path, *settings) == 0
    said = capsys.readouterr().err
    assert "6/6" in said and "step 3 of 3, alone" in said
    assert "step 2 of 3, guided" in said and "step 1 of 3, guided" not in said
    memory = float(said.rpartition(" GiB")[0].rpartition(" ")[2])
    assert 0.05 < memory < 30
    (tmp_path / "00001.png").unlink()
    assert run(tmp_path, *settings) == 0
    said = capsys.readouterr().err
    assert "3/6" in said and "2/6" not in said


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--size", "24x16"), {"width": 24, "height": 16}),
        (("--size", "16"), {"width": 16, "height": 16}),
        (("--size", "16×24"), {"width": 16, "height": 24}),
        (("--size", "wide"), "--size is 'wide'; give 832x480, or 512 for a square"),
        (("--size", "1x2x3"), "--size is '1x2x3'"),
        (("--size", "16", "--width", "8"), "--size says width and height"),
    ],
)  # fmt: skip
def test_the_size_in_one_flag(words, found):
    parser = argparse.ArgumentParser()
    flags.add_settings(parser)
    arguments = parser.parse_args(words)
    if isinstance(found, dict):
        assert flags.settings_of(arguments) == found
        return
    with pytest.raises(ValueError, match=re.escape(found)):
        flags.settings_of(arguments)


def test_every_setting_has_its_flag_in_a_group():
    """`--help` shows all of a request's settings but those that are no flag of their name."""
    shown = {name for group in flags.GROUPS.values() for name in group}
    assert shown == {entry.name for entry in dataclasses.fields(Request)} - set(flags.OWN)


def test_a_preview_shows_the_estimate_of_every_step(tmp_path):
    """The last one is the picture; the picture is the same with and without."""
    settings = (*LAB, "--seed", 4, "--steps", 3, "--sampler", "euler")
    assert run(tmp_path / "a", *settings) == 0
    assert run(tmp_path / "b", *settings, "--preview") == 0
    files = pictures(tmp_path / "b")
    assert files.keys() == {"00004.png", "00004-steps.png"}
    assert files["00004.png"] == pictures(tmp_path / "a")["00004.png"]
    with Image.open(tmp_path / "b" / "00004-steps.png") as image:
        width, height = image.size
        last = image.crop((width - 216, 56, width - 16, 256)).convert("L")
    with Image.open(tmp_path / "b" / "00004.png") as image:
        assert last.tobytes() == image.resize((200, 200), Image.Resampling.NEAREST).tobytes()
    assert width == 3 * 216 + 16 and height == 272
    assert run(tmp_path / "a", *settings, "--preview") == 0  # of a picture that is there already
    assert pictures(tmp_path / "a") == files


def test_the_settings_are_there_as_web_uis_read_them(tmp_path):
    assert run(tmp_path, *LAB, "--seed", 7, "--teacher-steps", "[0, 2]") == 0
    last = read_texts(tmp_path / "00007.png")["parameters"].splitlines()[-1]
    values = dict(part.split(": ", 1) for part in last.split(", ") if ": " in part)
    assert values["Steps"] == "4" and values["Sampler"] == "lcm" and values["Seed"] == "7"
    assert values["Size"] == "8x8" and values["Model"] == '"digits:student"'
    assert 'kdpp teacher steps: "(0, 2)"' in last


def test_two_processes_draw_what_one_does(tmp_path):
    """Each its share of the pictures, into one folder."""
    words = ["generate", *LAB, "--seed", "0-4", "--compare"]
    assert run(tmp_path / "one", *words[1:]) == 0
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "kdpp", *words, "--out", str(tmp_path / "two")],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert pictures(tmp_path / "one") == pictures(tmp_path / "two")
    drawn = [set(json.loads(path.read_text())) for path in (tmp_path / "two").glob("costs-*.json")]
    assert sorted(map(len, drawn)) == [6, 9] and not drawn[0] & drawn[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "which model? --student MODEL"),
        ((*LAB, "--seed", "9-3"), "--seed is '9-3'; give 7, 0-99 or [3, 5]"),
        ((*LAB, "--seed", "-1"), "--seed is '-1'"),
        ((*LAB, "--label", 10), "label is 10; it must be in 0 … 9"),
        ((*LAB, "--prompt", "a boat"), "takes no prompt; it draws a class: --label N"),
        ((*LAB, "--clip-skip", 2), "takes no clip_skip"),
        ((*LAB, "--width", 16), "digits:student draws 8 x 8 pixels"),
        ((*LAB, "--teacher-scale", 2), "teacher_scale"),
        ((*LAB, "--sampler", "oiler"), "did you mean 'euler'"),
        ((*LAB, "--dtype", "float16"), "models of the lab are float32"),
        (("--student", "digits:student", "--compare"), "--compare needs a teacher"),
        (("--student", "nowhere.safetensors"), "nowhere.safetensors"),
        ((*LAB, "--steps", 2, "--sigmas", "[2, 1, 0]"), "give one of them"),
        (("--like", "nothing.png"), "nothing.png"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_any_work(words, sentence, capsys, tmp_path):
    assert run(tmp_path / "out", *words) == 1
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("kdpp: ")]
    assert sentence in line
    assert not (tmp_path / "out").exists()


def test_levels_that_the_student_was_not_trained_on_are_remarked(tmp_path, capsys):
    """Of a lab model that knows its own."""
    model = load_model("digits:student")
    card = dataclasses.replace(model.card, levels=(14.6, 1.6, 0.6, 0.0))
    save_model(tmp_path / "own.safetensors", model.network, card)
    assert run(tmp_path / "a", "--student", tmp_path / "own.safetensors") == 0
    assert "trained for" not in capsys.readouterr().err
    assert run(tmp_path / "b", "--student", tmp_path / "own.safetensors", "--steps", 5) == 0
    assert "own.safetensors was trained for the levels 14.6, 1.6, 0.6, 0" in capsys.readouterr().err


def test_a_picture_without_settings_is_refused(tmp_path, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "bare.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, sentence in (("bare", "does not say how it was made"), ("text", "is not a picture")):
        assert run(tmp_path / "out", "--like", tmp_path / f"{name}.png") == 1
        assert sentence in capsys.readouterr().err


# Pipelines of diffusers ---------------------------------------------------------------------------

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
tiny = pytest.importorskip("tiny_pipelines", reason="needs diffusers and transformers")


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3", "flux"])
def folders(request, tmp_path_factory):
    """A student's and a teacher's folder, as diffusers saves them."""
    folder = tmp_path_factory.mktemp(request.param)
    for role, seed in (("student", 0), ("teacher", 7)):
        pipe = getattr(tiny, request.param)()
        tiny.tiny(network_of(pipe), seed=seed)
        pipe.save_pretrained(folder / role)
    return folder


def pair(folders):
    return ("--student", folders / "student", "--teacher", folders / "teacher", "--steps", 2,
            "--prompt", "a red boat", "--width", 24, "--height", 16)  # fmt: skip


def test_a_pipelines_pictures(folders, tmp_path):
    """In its size; like those of its own pipeline; the teacher is felt, and `--like` repeats it."""
    assert run(tmp_path / "a", *pair(folders), "--compare", "--teacher-scale", 0.5) == 0
    made = {name: pixels(tmp_path / "a" / f"00000-{name}.png") for name in ("none", "teacher")}
    with Image.open(tmp_path / "a" / "00000-none.png") as image:
        assert image.size == (24, 16) and image.mode == "RGB"
    assert not torch.equal(*made.values())
    pipe = load_pipeline(str(folders / "student"), "float32", torch.device("cpu"))
    shape = latent_shape(pipe, 16, 24)
    like = torch.empty(1, *shape)
    noise = SeededNoise(like, torch.tensor([0]), INITIAL)()
    packed = isinstance(pipe, diffusers.FluxPipeline)
    own = pipe("a red boat", height=16, width=24, num_inference_steps=2, output_type="pt",
               guidance_scale=1.0, return_dict=False,
               latents=pipe._pack_latents(noise, *noise.shape) if packed else noise)[0]  # fmt: skip
    wanted = own.clamp(0, 1).mul(255).round()[0].permute(1, 2, 0).flatten()
    assert (made["none"] - wanted).abs().max() <= 1
    assert run(tmp_path / "b", "--like", tmp_path / "a" / "00000-teacher.png") == 0
    (again,) = pictures(tmp_path / "b").values()
    assert again == (tmp_path / "a" / "00000-teacher.png").read_bytes()


def test_the_number_of_threads_is_no_launchers(folders, tmp_path, monkeypatch):
    """Bits on the CPU depend on it, and a launcher of several processes gives each one thread."""
    seen = []
    monkeypatch.setattr(drawing, "draw_all", lambda *_, **__: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(processes, "cores", lambda: 3)
    monkeypatch.setattr(drawing.Path, "exists", lambda path: path.is_absolute())  # the pictures
    with processes.threads(1):
        assert run(tmp_path / "a", *pair(folders)) == 0
    with processes.threads(2):
        assert run(tmp_path / "b", *LAB) == 0
        assert torch.get_num_threads() == 2
    assert seen == [3, 1]


def test_prompts_from_a_file(folders, tmp_path):
    """A picture for every prompt and seed; each is the one of its prompt alone."""
    (tmp_path / "prompts.txt").write_text("a red boat\n\nthe green hill\n")
    words = [*pair(folders), "--seed", "4-5"]
    del words[words.index("--prompt") : words.index("--prompt") + 2]
    assert run(tmp_path / "all", *words, "--prompts", tmp_path / "prompts.txt") == 0
    names = sorted(pictures(tmp_path / "all"))
    assert names == ["00000-00004.png", "00000-00005.png", "00001-00004.png", "00001-00005.png"]
    assert run(tmp_path / "one", *words, "--prompt", "the green hill") == 0
    same = (tmp_path / "one" / "00005.png").read_bytes()
    assert (tmp_path / "all" / "00001-00005.png").read_bytes() == same


def test_long_prompts_and_clip_skip(tmp_path, capsys):
    """Four lengths in one run are four runs; the layer is in the file, and `--like` reads it."""
    tiny.sd().save_pretrained(tmp_path / "student")
    words = ("--student", tmp_path / "student", "--steps", 2, "--width", 16, "--height", 16,
             "--cond-scale", 3, "--negative", "(dark:1.2)")  # fmt: skip
    prompts = ["a boat", "the (green:1.4) hill " * 9, "a lighthouse BREAK a boat", "on a hill"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    for name, batch in (("four", 4), ("one", 1)):
        batched = ("--prompts", tmp_path / "prompts.txt", "--batch", batch, "--clip-skip", 2)
        assert run(tmp_path / name, *words, *batched) == 0
    assert len(pictures(tmp_path / "four")) == 4
    for name in pictures(tmp_path / "four"):
        apart = pixels(tmp_path / "four" / name).int() - pixels(tmp_path / "one" / name).int()
        assert apart.abs().max() <= 1
    assert run(tmp_path / "single", *words, "--prompt", prompts[1], "--clip-skip", 2) == 0
    picture = tmp_path / "one" / "00001-00000.png"
    assert torch.equal(pixels(tmp_path / "single" / "00000.png"), pixels(picture))
    assert ", Clip skip: 2, " in read_texts(picture)["parameters"]
    assert run(tmp_path / "again", "--like", picture) == 0
    assert list(pictures(tmp_path / "again").values()) == [picture.read_bytes()]
    assert run(tmp_path / "last", *words, "--prompt", prompts[1]) == 0
    assert not torch.equal(pixels(tmp_path / "last" / "00000.png"), pixels(picture))
    assert "Clip skip" not in read_texts(tmp_path / "last" / "00000.png")["parameters"]
    said = capsys.readouterr().err
    assert "sequence length" not in said and "truncated" not in said


def test_prompts_that_cannot_be_read_are_refused_before_any_work(tmp_path, capsys, monkeypatch):
    """Of a file, too, and the negative one; for other encoders than CLIP they are text."""
    tiny.sd().save_pretrained(tmp_path / "sd")
    tiny.flux().save_pretrained(tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a boat\na [red:green:0.5] boat\n")
    words = ("--steps", 1, "--width", 16, "--height", 16)
    editing = ("--prompts", tmp_path / "prompts.txt")
    assert run(tmp_path / "flux-out", "--student", tmp_path / "flux", *words, *editing) == 0
    monkeypatch.setattr("kdpp.checkpoints.pairs.load_pipeline", None)  # not reached
    for asked in (editing, ("--prompt", "a boat", "--negative", "[a|b]")):
        assert run(tmp_path / "out", "--student", tmp_path / "sd", *words, *asked) == 1
        assert "by which the web UIs change it from step to step" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_preset_says_how_its_student_is_sampled(tmp_path, capsys):
    """Levels, sampler and the teacher's share; other levels of a named student get a remark."""
    tiny.sd().save_pretrained(tmp_path / "student")
    words = ["--student", tmp_path / "student", "--prompt", "a red boat", "--preset", "sd-turbo"]
    assert run(tmp_path / "a", *words, "--teacher", tmp_path / "student") == 0
    found, _, _ = read_png(tmp_path / "a" / "00000.png")
    preset = PRESETS["sd-turbo"]
    assert found.sigmas == preset.sigmas() and found.sampler == preset.sampler
    assert (found.teacher_scale, found.teacher_cfg_scale) == (0.1, 7.5)
    assert "was trained for the levels" not in capsys.readouterr().err
    assert run(tmp_path / "b", *words, "--sigmas", "[14, 7, 1, 0]") == 0
    assert "sd-turbo was trained for the levels" in capsys.readouterr().err
    assert run(tmp_path / "c", *words, "--steps", 5) == 1
    assert "sd-turbo was made for 1 or 2 or 3 or 4 steps, not 5" in capsys.readouterr().err
    assert run(tmp_path / "d", *words[:-1], "flux-schnell") == 1
    assert "the preset flux-schnell is for a flow model" in capsys.readouterr().err
    assert run(tmp_path / "e", *words[:-2]) == 1
    assert "say how the student is sampled: --preset NAME, or --steps N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--label", 3), "take a prompt and no label"),
        (("--clip-skip", 3), "clip_skip is "),
        (("--width", 25), "width is 25; it must be a multiple of"),
        (("--preset", "nothing"), "unknown preset 'nothing'"),
        (("--teacher", "digits:teacher"), "there is no file or folder digits:teacher"),
    ],
)
def test_what_a_pipeline_cannot_is_said(folders, words, sentence, tmp_path, capsys):
    assert run(tmp_path / "out", *pair(folders), *words) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
def test_a_lora_student_and_its_base(tmp_path, capsys):
    """One checkpoint in two roles, as two folders would give it; `--like` finds the LoRA."""
    pytest.importorskip("peft", reason="needs peft (extra: diffusers)")
    import test_loras

    tiny.sd().save_pretrained(tmp_path / "base")
    speed = test_loras.lora(tmp_path / "speed.safetensors", 0)
    style = test_loras.lora(tmp_path / "style.safetensors", 1)
    words = ["--student", tmp_path / "base", "--prompt", "a red boat", "--steps", 2,
             "--width", 16, "--height", 16, "--teacher-scale", 0.5]  # fmt: skip
    loras = ["--student-lora", speed, "--lora", f"{style}:0.8"]
    assert run(tmp_path / "one", *words, *loras, "--compare") == 0
    pipe = tiny.sd()
    for path, weight in ((style, 0.8), (speed, 1.0)):
        pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
        pipe.fuse_lora(lora_scale=weight)
        pipe.unload_lora_weights()
        pipe.save_pretrained(tmp_path / f"with-{path.stem}")
    fused = ["--student", tmp_path / "with-speed", "--teacher", tmp_path / "with-style"]
    assert run(tmp_path / "two", *fused, *words[2:], "--compare") == 0
    for name in pictures(tmp_path / "one"):
        apart = pixels(tmp_path / "one" / name).int() - pixels(tmp_path / "two" / name).int()
        assert apart.abs().max() <= 1
    ways = {bytes(pixels(tmp_path / "one" / name).tolist()) for name in pictures(tmp_path / "one")}
    assert len(ways) == 3
    picture = tmp_path / "one" / "00000-teacher.png"
    assert run(tmp_path / "again", "--like", picture) == 0
    assert list(pictures(tmp_path / "again").values()) == [picture.read_bytes()]
    assert "kdpp LoRA style: 0.8 (both)" in read_texts(picture)["parameters"]
    speed.write_bytes(style.read_bytes())
    assert run(tmp_path / "other", "--like", picture) == 1
    assert "is not the lora 1 that the picture was made with" in capsys.readouterr().err
    speed = test_loras.lora(tmp_path / "speed.safetensors", 0)
    other = ["--teacher", tmp_path / "base"]  # a checkpoint beside them takes those for both
    assert run(tmp_path / "three", *words, *loras, *other, "--compare") == 0
    for name in pictures(tmp_path / "three"):
        apart = pixels(tmp_path / "one" / name).int() - pixels(tmp_path / "three" / name).int()
        assert apart.abs().max() <= 1
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    test_loras.lora(style, 0, [text], width=(16,), rows=16)
    assert run(tmp_path / "no", *words, *loras, *other) == 1
    said = capsys.readouterr().err
    assert "changes the text encoder, and this model is held without" in said
    assert run(tmp_path / "no", *LAB, *loras) == 1
    assert "a model of the lab takes no loras" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
def test_a_speed_loras_weight_is_its_presets(tmp_path, monkeypatch):
    """Unless it is given; a style's is 1. The preset is told by the name of the student's LoRA."""
    pytest.importorskip("peft", reason="needs peft (extra: diffusers)")
    import test_loras

    tiny.sd().save_pretrained(tmp_path / "base")
    speed = test_loras.lora(tmp_path / "speed.safetensors", 0)
    style = test_loras.lora(tmp_path / "style.safetensors", 1)
    words = ["--student", tmp_path / "base", "--prompt", "a red boat", "--width", 16,
             "--height", 16, "--lora", style]  # fmt: skip
    asked = []

    def named(facts):
        asked.append(facts.path)
        return PRESETS["dmd2-lora-8"]

    monkeypatch.setattr(pairs, "named", named)
    for weight, given in ((0.7, speed), (0.9, f"{speed}:0.9")):
        folder = tmp_path / str(weight)
        assert run(folder, *words, "--student-lora", given) == 0
        request, _, _ = read_png(folder / "00000.png")
        assert [(one[1], one[2]) for one in request.loras] == [(1.0, "both"), (weight, "student")]
        assert request.preset == "dmd2-lora-8" and request.steps == 8
    assert set(asked) == {speed}
