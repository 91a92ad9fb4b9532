"""Pictures that are given to ``kdpp generate``, parts of them, and videos that it makes."""

import sys

import pytest
import torch
from PIL import Image, ImageDraw

import kdpp
from kdpp.checkpoints import drawing, media, pairs
from kdpp.checkpoints.requests import Picture, Request, read_png, read_texts
from kdpp.lab.models import load_model
from kdpp.lab.sampling import INITIAL
from kdpp.noise import SeededNoise
from picture_files import numbers, pixels, right_half, run, write

CPU = torch.device("cpu")
LAB = ("--student", "digits:student", "--teacher", "digits:teacher", "--teacher-scale", 0.5)


pytestmark = pytest.mark.usefixtures("own_notes")


def pictures(folder):
    """The bytes of every picture and video, by its name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9]*"))}


# Pictures and masks, as they are read -------------------------------------------------------------


def source(**given):
    return media.read_source(Request(**{name: str(value) if name != "strength" else value
                                        for name, value in given.items()}))  # fmt: skip


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    made = write(tmp_path / "plain.png", 6, 4)
    with Image.open(tmp_path / "plain.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
        image.save(tmp_path / "turned.png", exif=exif)
    turned = source(image=tmp_path / "turned.png")
    assert turned.picture.size == (4, 6)
    assert torch.equal(turned.pixels(), made.rot90(-1, (0, 1)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode, tmp_path):
    """Also by a palette's colour; half transparent is half white."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "LA":
        image.putpixel((0, 0), (0, 0, 0, 128))
    image.convert(mode).save(tmp_path / "in.png")
    left = 127 if mode == "LA" else 255
    found = source(image=tmp_path / "in.png").pixels()
    assert found[..., 0].tolist() == [[left, 0]]


def test_sizes(tmp_path):
    """The picture's own, rounded down; or what is asked, the other side in proportion."""
    write(tmp_path / "in.png", 45, 31)
    given = source(image=tmp_path / "in.png")
    assert given.size(None, None, 8) == (24, 40)
    assert given.size(80, None, 8) == (48, 80)  # 80 · 31/45 = 55.1
    assert given.size(None, 62, 8) == (62, 88)
    assert given.size(7, 9, 8) == (9, 7)  # as asked; the model says whether it can
    assert given.size(None, None, 64) == (64, 64)


def test_a_picture_keeps_its_pixels_or_is_resized_and_cropped(tmp_path):
    """Cropped alone where less than a unit is over; the middle of it, in the size that is asked."""
    made = write(tmp_path / "in.png", 45, 31)
    right_half(tmp_path / "mask.png", 45, 31)
    given = source(image=tmp_path / "in.png", mask=tmp_path / "mask.png")
    assert torch.equal(given.fitted(24, 40, 8).pixels(), made[3:27, 2:42])
    bands = Image.new("RGB", (40, 20), "red")
    ImageDraw.Draw(bands).rectangle((10, 0, 29, 19), "blue")
    bands.save(tmp_path / "bands.png")
    fitted = source(image=tmp_path / "bands.png").fitted(8, 8, 2)
    assert fitted.pixels().unique(dim=0).shape == (1, 8, 3)
    assert (fitted.pixels()[:, 3:5] == torch.tensor([0, 0, 255])).all()
    smaller = given.fitted(12, 20, 2)
    assert smaller.mask.size == smaller.picture.size == (20, 12)
    mask = numbers(smaller.mask)[..., 0]
    assert (mask[:, :9] == 0).all() and (mask[:, 12:] == 255).all()


def test_a_mask_of_another_size_is_brought_to_the_pictures(tmp_path):
    write(tmp_path / "in.png", 48, 32)
    right_half(tmp_path / "mask.png", 24, 16)
    mask = source(image=tmp_path / "in.png", mask=tmp_path / "mask.png").mask
    assert mask.size == (48, 32)
    assert mask.getpixel((0, 0)) == 0 and mask.getpixel((47, 31)) == 255


def test_a_place_is_drawn_anew_if_the_mask_touches_it():
    """Places of the latent are 4 pixels wide here; half bright is enough, darker is not."""
    mask = torch.zeros(8, 12, 1, dtype=torch.uint8)
    mask[3, 7], mask[7, 11], mask[7, 0] = 255, 128, 127
    edit = media.Edit(torch.zeros(8, 12, 3), torch.zeros(1, 4, 2, 3), mask, 1.0)
    _, places = edit.known
    assert places.tolist() == [[False, True, False], [False, False, True]]


def test_pixels_are_pasted():
    """Black keeps the picture's to the bit, white takes the drawn, grey mixes."""
    mask = torch.tensor([[0, 255, 51]], dtype=torch.uint8)[..., None]
    own = torch.tensor([[7, 7, 100]], dtype=torch.uint8)[..., None]
    drawn = torch.tensor([[200, 201, 200]], dtype=torch.uint8)[..., None]
    edit = media.Edit(own, torch.zeros(1, 1, 1, 3), mask, 1.0)
    assert edit.pasted(drawn[None])[0, 0, :, 0].tolist() == [7, 201, 120]


def test_strength_says_how_many_steps_are_left():
    """A 4-step student makes 2 of its own steps at 0.5; the levels stay the student's."""
    levels = (1.0, 0.9, 0.75, 0.5, 0.0)

    def kept(strength):
        return media.Edit(None, None, None, strength).levels(levels)

    assert kept(0.5) == (0.75, 0.5, 0.0) and kept(1.0) == levels
    assert kept(0.01) == (0.5, 0.0) and kept(0.7) == (0.9, 0.75, 0.5, 0.0)


@pytest.fixture
def inputs(tmp_path):
    """A folder of files that are given, good and bad."""
    write(tmp_path / "in.png", 8, 8, channels=1)
    write(tmp_path / "wide.png", 16, 8)
    right_half(tmp_path / "mask.png", 8, 8)
    Image.new("L", (8, 8), 100).save(tmp_path / "black.png")
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no picture")
    whole = (tmp_path / "wide.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--image nothing.png", "there is no file nothing.png; --image FILE names it"),
        ("--image in.png --mask nothing.png", "there is no file nothing.png; --mask FILE names it"),
        ("--image text.png", "text.png is not a picture that kdpp can read"),
        ("--image cut.png", "cut.png is not a picture that kdpp can read"),
        ("--image .", "is not a picture that kdpp can read"),
        (
            "--image deep.png",
            "deep.png is not a picture that kdpp can read: more than 8 bits a channel",
        ),
        ("--image in.png --mask wide.png", "the mask has 16 x 8 pixels and the picture 8 x 8"),
        ("--image in.png --mask black.png", "the mask is black all over"),
        ("--mask mask.png", "--mask goes with a picture: --image FILE"),
        ("--strength 0.5", "--strength goes with a picture: --image FILE"),
        ("--image in.png --strength 0", "strength is 0.0; it must be a number in (0, 1]"),
        ("--image in.png --strength 1.5", "strength is 1.5; it must be a number in (0, 1]"),
        ("--image in.png --strength much", "strength is 'much'; it must be a finite number"),
        ("--frames 0", "frames is 0; it must be at least 1"),
        ("--fps 0.1", "fps is 0.1; it must be in [1, 1000]"),
    ],
)
def test_what_cannot_be_started_from_is_said_before_models_are_loaded(
    words, sentence, inputs, capsys, monkeypatch
):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(pairs, "load_model", None)
    assert run("out", *LAB, *words.split()) == 1
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("kdpp: ")]
    assert sentence in line
    assert not (inputs / "out").exists()


def test_a_picture_of_more_pixels_than_pillow_opens(inputs, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ValueError, match=r"wide\.png is not .* exceeds limit of 100 pixels"):
        source(image=inputs / "wide.png")


def test_a_white_spot_that_is_lost_on_the_way(tmp_path):
    """Cropped away, or too small for the size that is asked: nothing would be drawn anew."""
    write(tmp_path / "in.png", 40, 20)
    mask = Image.new("L", (40, 20))
    mask.putpixel((0, 0), 255)
    mask.save(tmp_path / "mask.png")
    given = source(image=tmp_path / "in.png", mask=tmp_path / "mask.png")
    with pytest.raises(ValueError, match="the mask is black all over"):
        given.fitted(20, 20, 2)


# The lab's models ---------------------------------------------------------------------------------


def test_a_lab_models_picture_from_a_picture(tmp_path, capsys):
    """That of `kdpp.image_to_image` on the last steps, with the noise of text to image."""
    made = write(tmp_path / "in.png", 8, 8, channels=1)
    words = ("--student", "digits:student", "--image", tmp_path / "in.png", "--label", 4)
    assert run(tmp_path / "a", *words, "--strength", 0.5, "--seed", "3-4") == 0
    model = load_model("digits:student")
    levels = torch.tensor(model.levels_for())
    cut = kdpp.truncate(levels, 0.5)
    assert len(levels) == 5 and len(cut) == 3
    said = ", ".join(f"{level:.4g}" for level in cut.tolist())
    assert f"strength 0.5: the last 2 of 4 steps, at the levels {said}" in capsys.readouterr().err
    for seed in (3, 4):
        x0 = made.movedim(-1, 0)[None] / 255.0 * 2.0 - 1.0
        noise = SeededNoise(x0, torch.tensor([seed]), INITIAL)()
        solver_noise = SeededNoise(x0, torch.tensor([seed]), INITIAL + 1)
        alone = kdpp.TeacherGuidedDenoiser(denoiser := model.denoiser_for(4), denoiser,
                                           teacher_steps=0)  # fmt: skip
        extra_args = {"cond": torch.tensor([4]), "uncond": torch.tensor([10]), "cond_scale": 1.0}
        found = kdpp.image_to_image(
            kdpp.sample_lcm_tg, alone, x0, cut, extra_args, disable=True, noise=noise,
            noise_sampler=solver_noise,
        )  # fmt: skip
        wanted = found.div(2).add(0.5).clamp(0, 1).mul(255).round().to(torch.uint8)[0]
        assert torch.equal(pixels(tmp_path / "a" / f"{seed:05}.png"), wanted.movedim(0, -1))


def test_strengths(tmp_path):
    """By default 0.75, with a mask 1; the smaller, the closer to the picture."""
    made = write(tmp_path / "in.png", 8, 8, channels=1).int()
    right_half(tmp_path / "mask.png", 8, 8)
    words = ("--student", "digits:student", "--image", tmp_path / "in.png")
    far = []
    for strength in (0.25, 0.75, 1):
        assert run(tmp_path / f"{strength}", *words, "--strength", strength) == 0
        found = pixels(tmp_path / f"{strength}" / "00000.png").int()
        far.append((found - made).abs().float().mean().item())
    assert far == sorted(far) and far[0] < far[1]
    assert run(tmp_path / "default", *words) == 0
    assert pictures(tmp_path / "default") == pictures(tmp_path / "0.75")
    assert run(tmp_path / "masked", *words, "--mask", tmp_path / "mask.png") == 0
    assert read_png(tmp_path / "masked" / "00000.png")[0].strength == 1.0
    said = read_texts(tmp_path / "0.25" / "00000.png")["parameters"]
    assert "Denoising strength: 0.25" in said and "Steps: 4" in said


def test_a_part_of_a_lab_models_picture(tmp_path):
    """The kept pixels to the bit, alone and with the teacher; a full mask is no picture at all."""
    made = write(tmp_path / "in.png", 8, 8, channels=1)
    right_half(tmp_path / "mask.png", 8, 8, grey=128)
    Image.new("L", (8, 8), 255).save(tmp_path / "full.png")
    words = (*LAB, "--image", tmp_path / "in.png", "--compare", "--mask")
    assert run(tmp_path / "half", *words, tmp_path / "mask.png") == 0
    assert run(tmp_path / "full", *words, tmp_path / "full.png") == 0
    assert run(tmp_path / "none", *LAB, "--compare") == 0
    drawn = {}
    for guide in ("none", "teacher"):
        found = drawn[guide] = pixels(tmp_path / "half" / f"00000-{guide}.png")
        assert torch.equal(found[:, :4], made[:, :4])
        assert not torch.equal(found[:, 5:], made[:, 5:])
        full = pixels(tmp_path / "full" / f"00000-{guide}.png")
        assert torch.equal(full, pixels(tmp_path / "none" / f"00000-{guide}.png"))
        assert not torch.equal(found[:, 5:], full[:, 5:])  # what is kept is felt
    assert not torch.equal(*drawn.values())


@pytest.mark.parametrize("mask", [False, True])
def test_such_pictures_depend_on_their_seed_and_settings_alone(mask, tmp_path, monkeypatch):
    """Four singles are a run of four, two processes are one, `--like` repeats, a run goes on."""
    write(tmp_path / "in.png", 8, 8, channels=1)
    right_half(tmp_path / "mask.png", 8, 8)
    words = [*LAB, "--image", tmp_path / "in.png", "--sampler", "euler_ancestral",
             "--strength", 0.75, *(["--mask", tmp_path / "mask.png"] if mask else [])]  # fmt: skip
    assert run(tmp_path / "four", *words, "--seed", "0-3") == 0
    four = pictures(tmp_path / "four")
    assert len(set(four.values())) == 4
    for seed in range(4):
        assert run(tmp_path / "single", *words, "--seed", seed) == 0
    assert pictures(tmp_path / "single") == four
    assert run(tmp_path / "batch", *words, "--seed", "0-3", "--batch", 4) == 0
    for name in four:
        apart = pixels(tmp_path / "batch" / name).int() - pixels(tmp_path / "four" / name).int()
        assert apart.abs().max() <= 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert run(tmp_path / "two", *words, "--seed", "0-3") == 0
    assert pictures(tmp_path / "two") == four
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "four").glob("*.png")}
    assert run(tmp_path / "four", *words, "--seed", "0-3") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (tmp_path / "in.png").rename(tmp_path / "elsewhere.png")
    picture = tmp_path / "four" / "00002.png"
    assert run(tmp_path / "like", "--like", picture, "--image", tmp_path / "elsewhere.png") == 0
    assert torch.equal(pixels(tmp_path / "like" / "00002.png"), pixels(picture))


def test_like_finds_picture_and_mask_by_what_they_hold(tmp_path, capsys):
    """The PNG names no folder; they may move, and another picture in their place is refused."""
    (tmp_path / "secret").mkdir()
    files = [tmp_path / "secret" / name for name in ("in.png", "mask.png")]
    write(files[0], 8, 8, channels=1)
    right_half(files[1], 8, 8)
    words = ("--image", files[0], "--mask", files[1])
    assert run(tmp_path / "a", *LAB, *words) == 0
    picture = tmp_path / "a" / "00000.png"
    assert b"secret" not in picture.read_bytes()
    assert run(tmp_path / "b", "--like", picture) == 0
    assert pictures(tmp_path / "b") == pictures(tmp_path / "a") != {}
    write(files[0], 8, 8, seed=1, channels=1)
    assert run(tmp_path / "c", "--like", picture) == 1
    assert "in.png is not the image that the picture was made with" in capsys.readouterr().err
    assert run(tmp_path / "d", "--like", picture, "--image", files[0]) == 0  # another picture
    assert not torch.equal(pixels(tmp_path / "d" / "00000.png"), pixels(picture))
    files[0].unlink()
    assert run(tmp_path / "e", "--like", picture) == 1
    assert "there is no file in.png; --image FILE names it" in capsys.readouterr().err


# Pipelines of diffusers ---------------------------------------------------------------------------

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
tiny = pytest.importorskip("tiny_pipelines", reason="needs diffusers and transformers")

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # noqa: E402

from test_pipelines import FAMILIES, apart, sizes  # noqa: E402

IMAGE_PIPELINES = {
    "sd": "StableDiffusionImg2ImgPipeline",
    "sd_v": "StableDiffusionImg2ImgPipeline",
    "sd_zero_snr": "StableDiffusionImg2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux": "FluxImg2ImgPipeline",
    "z_image": "ZImageImg2ImgPipeline",
    "qwen_image": "QwenImageImg2ImgPipeline",
}
"""diffusers' for image to image. LCM's takes other levels than the last of text to image."""


def latents(request, seed=3):
    """What the command samples without a teacher, before it is decoded, and the noise of it."""
    pair = pairs.open_pair(request, CPU)
    pair.pixels = lambda latents: latents
    (drawn,) = drawing.draw(pair, [Picture(seed, request.prompt)], "none")
    like = torch.empty(1, *pair.shape)
    return drawn.pixels[None], SeededNoise(like, torch.tensor([seed]), INITIAL)()


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("family", IMAGE_PIPELINES)
def test_without_the_teacher_a_picture_is_the_pipelines(family, strength, tmp_path, monkeypatch):
    """From the picture's file to the latents; the pipeline's VAE gives its mode, too."""
    pipe, kind = FAMILIES[family](), getattr(diffusers, IMAGE_PIPELINES[family])
    pipe.save_pretrained(tmp_path / "student")
    size, _ = sizes(pipe)
    write(tmp_path / "in.png", size["width"], size["height"])
    found, noise = latents(Request(
        student=str(tmp_path / "student"), image=str(tmp_path / "in.png"), strength=strength,
        prompt="a red boat", steps=4, sampler="euler",
    ))  # fmt: skip
    monkeypatch.setattr(
        sys.modules[kind.__module__], "randn_tensor", lambda shape, **_: noise.view(shape)
    )
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_: self.mode())
    theirs = kind(**pipe.components)
    theirs.set_progress_bar_config(disable=True)
    scale = {"qwen_image": {"true_cfg_scale": 1.0}, "z_image": {"guidance_scale": 0.0}}
    unet = {} if hasattr(pipe, "unet") else size
    with Image.open(tmp_path / "in.png") as image:
        wanted = theirs(
            "a red boat", image=image, strength=strength, num_inference_steps=4,
            output_type="latent", return_dict=False, **unet,
            **scale.get(family, {"guidance_scale": 1.0}),
        )[0]  # fmt: skip
    if family in ("flux", "qwen_image"):
        wanted = theirs._unpack_latents(wanted, *size.values(), theirs.vae_scale_factor)
    assert apart(found, wanted.view(found.shape)) < 1e-4


@pytest.mark.parametrize("family", ["wan", "wan_experts"])
def test_without_the_teacher_a_video_is_the_pipelines(family, tmp_path):
    pipe = FAMILIES[family]()
    pipe.save_pretrained(tmp_path / "student")
    size, frames = sizes(pipe)
    found, noise = latents(Request(
        student=str(tmp_path / "student"), prompt="a red boat", steps=4, sampler="euler",
        **size, **frames,
    ))  # fmt: skip
    assert found.ndim == 5
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe("a red boat", latents=noise, num_inference_steps=4, guidance_scale=1.0,
                  num_frames=frames["frames"], output_type="latent", return_dict=False,
                  **size)[0]  # fmt: skip
    assert apart(found, wanted) < 1e-4


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_nothing_of_the_picture_is_left_by_a_full_mask(family, tmp_path):
    """And of a flow model by strength 1: then it is text to image, bit for bit."""
    FAMILIES[family]().save_pretrained(tmp_path / "student")
    write(tmp_path / "in.png", 24, 16)
    Image.new("L", (24, 16), 255).save(tmp_path / "full.png")
    words = ("--student", tmp_path / "student", "--prompt", "a red boat", "--steps", 2)
    given = (*words, "--image", tmp_path / "in.png", "--strength", 1)
    assert run(tmp_path / "text", *words, "--width", 24, "--height", 16) == 0
    assert run(tmp_path / "image", *given) == 0
    assert run(tmp_path / "full", *given, "--mask", tmp_path / "full.png") == 0
    text, image, full = (pixels(tmp_path / n / "00000.png") for n in ("text", "image", "full"))
    assert torch.equal(full, text)
    assert torch.equal(image, text) == (family == "sd3")


# Videos -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A student's and a teacher's folder, the student's of two experts."""
    folder = tmp_path_factory.mktemp("wan")
    tiny.wan(boundary=0.9).save_pretrained(folder / "student")
    tiny.wan(seed=7).save_pretrained(folder / "teacher")
    return folder


def video(wan, *words):
    return ("--student", wan / "student", "--teacher", wan / "teacher", "--teacher-scale", 0.5,
            "--prompt", "a red boat", "--steps", 2, "--width", 32, "--height", 16,
            *(words or ("--frames", 5)))  # fmt: skip


def test_a_video_is_frames_and_an_animation(wan, tmp_path):
    """Five frames in the PNGs as decoded, each with its settings; the WebP shows the same."""
    assert run(tmp_path / "a", *video(wan), "--fps", 12) == 0
    frames = [f"00000-{i:03}.png" for i in range(5)]
    assert sorted(pictures(tmp_path / "a")) == [*frames, "00000.webp"]
    made = torch.stack([pixels(tmp_path / "a" / name) for name in frames])
    assert made.shape == (5, 16, 32, 3) and len(made.flatten(1).unique(dim=0)) == 5
    with Image.open(tmp_path / "a" / "00000.webp") as image:
        assert image.n_frames == 5 and image.info["loop"] == 0
        times = []
        for i in range(5):
            image.seek(i)
            image.load()
            times.append(image.info["duration"])
            shown = numbers(image.convert("RGB")).float()
            assert (shown - made[i].float()).abs().mean() < 25
            if i:
                assert (shown - made[i].float()).norm() < (shown - made[i - 1].float()).norm()
    assert times == [83, 84, 83, 83, 84]
    request, seed, guide = read_png(tmp_path / "a" / frames[3])
    assert (request.frames, request.fps, seed, guide) == (5, 12.0, 0, "teacher")
    places = {role: str(wan / role) for role in ("student", "teacher")}
    pair = pairs.open_pair(request.moved(places), CPU)
    (drawn,) = drawing.draw(pair, [Picture(0, "a red boat")], "teacher")
    assert torch.equal(drawn.pixels, made)


def test_a_video_depends_on_its_seed_and_settings_alone(wan, tmp_path, monkeypatch):
    """Drawn again by any of its frames; a run that was stopped goes on; two processes are one."""
    assert run(tmp_path / "two", *video(wan), "--seed", "0-1") == 0
    both = pictures(tmp_path / "two")
    assert len(both) == 12
    assert run(tmp_path / "like", "--like", tmp_path / "two" / "00001-002.png") == 0
    one = {name: content for name, content in both.items() if name.startswith("00001")}
    assert pictures(tmp_path / "like") == one
    write_file = drawing.write_atomically

    def full(path, content):
        if path.name == "00001-002.png":
            raise OSError("no space is left")
        write_file(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "write_atomically", full)
        assert run(tmp_path / "stopped", *video(wan), "--seed", "0-1") == 1
    before = (tmp_path / "stopped" / "00000.webp").stat().st_mtime_ns
    assert run(tmp_path / "stopped", *video(wan), "--seed", "0-1") == 0
    assert pictures(tmp_path / "stopped") == both
    assert (tmp_path / "stopped" / "00000.webp").stat().st_mtime_ns == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert run(tmp_path / "shared", *video(wan), "--seed", "0-1") == 0
    assert pictures(tmp_path / "shared") == both


def test_sheets_and_previews_of_videos_show_three_frames(wan, tmp_path):
    """The first, the middle and the last."""
    assert run(tmp_path / "a", *video(wan), "--compare", "--preview") == 0
    with Image.open(tmp_path / "a" / "sheet.png") as sheet:
        zoom = -(-200 // 96)
        assert sheet.width == 3 * (3 * 32 * zoom + 16) + 16
        tile = sheet.crop((16, 56, 16 + 96 * zoom, 56 + 16 * zoom)).resize((96, 16), 0)
    parts = [pixels(tmp_path / "a" / f"00000-none-{i:03}.png") for i in (0, 2, 4)]
    assert torch.equal(numbers(tile), torch.cat(parts, dim=1))
    steps = sorted(path.name for path in (tmp_path / "a").glob("*-steps.png"))
    assert steps == [f"00000-{guide}-steps.png" for guide in ("none", "self", "teacher")]
    assert media.shown_frames(2) == [0, 1] and media.shown_frames(81) == [0, 40, 80]


def test_one_frame_is_a_picture(wan, tmp_path):
    request = Request(student=str(wan / "student"), prompt="a boat", steps=1, width=16, height=16,
                      frames=1)  # fmt: skip
    (drawn,) = drawing.draw(pairs.open_pair(request, CPU), [Picture(0, "a boat")], "none")
    assert drawn.pixels.shape == (16, 16, 3)
    assert run(tmp_path / "a", *video(wan, "--frames", 1)) == 0
    assert list(pictures(tmp_path / "a")) == ["00000.png"]
    assert pixels(tmp_path / "a" / "00000.png").shape == (16, 32, 3)


def test_by_default_a_video_is_as_long_as_wans(wan):
    request = Request(student=str(wan / "student"), prompt="a boat", steps=1, width=16, height=16)
    pair = pairs.open_pair(request, CPU)
    assert pair.shape == (4, 21, 2, 2)
    assert (pair.request.frames, pair.request.fps) == (81, 16.0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--frames", 4), "frames is 4; it must be 1 more than a multiple of 4"),
        (("--image", "in.png"), "makes videos; --image is for models of pictures"),
    ],
)
def test_what_a_model_of_videos_cannot(words, sentence, wan, inputs, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    assert run("out", *video(wan, *words)) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--frames", "--fps"])
def test_what_a_model_of_pictures_cannot(flag, tmp_path, capsys, monkeypatch):
    """Said before the weights are read."""
    tiny.sd().save_pretrained(tmp_path / "student")
    monkeypatch.setattr(pairs, "load_pipeline", None)
    monkeypatch.setattr(pairs, "load_model", None)
    for words in (("--student", tmp_path / "student", "--prompt", "a boat"), LAB):
        assert run(tmp_path / "out", *words, flag, 5) == 1
        assert f"makes pictures; {flag} is for models of videos" in capsys.readouterr().err


def test_a_pillow_without_webp(wan, tmp_path, capsys, monkeypatch):
    from PIL import features

    monkeypatch.setattr(features, "check", lambda name: name != "webp")
    monkeypatch.setattr(pairs, "load_pipeline", None)
    assert run(tmp_path / "out", *video(wan)) == 1
    assert "videos need a Pillow with WebP" in capsys.readouterr().err
