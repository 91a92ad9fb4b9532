"""``kdpp generate`` with a tiny pipeline of every architecture, from folders, by its command.

What the pictures are is tested elsewhere (test_pipelines.py, test_media.py); here that each
architecture makes them each way: alone and with a teacher, from text, from a picture, a part of a
picture, and videos.
"""

import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
tiny = pytest.importorskip("tiny_pipelines", reason="needs diffusers and transformers")

from kdpp.checkpoints.pipelines import network_of  # noqa: E402
from kdpp.cli import main  # noqa: E402
from picture_files import pixels, right_half, write  # noqa: E402

PAIRS = {
    "sd": (tiny.sd, tiny.sd),
    "sd_v": (lambda: tiny.sd(tiny.euler(prediction_type="v_prediction")), tiny.sd),
    "lcm": (tiny.lcm, tiny.sd),
    "sdxl": (tiny.sdxl, tiny.sdxl),
    "sd3": (tiny.sd3, tiny.sd3),
    "flux": (lambda: tiny.flux(guidance=True), tiny.flux),
    "flux2": (tiny.flux2, tiny.flux2),
    "krea2": (lambda: tiny.krea2(distilled=True), tiny.krea2),
    "z_image": (tiny.z_image, tiny.z_image),
    "qwen_image": (tiny.qwen_image, tiny.qwen_image),
    "wan": (tiny.wan, tiny.wan),
    "wan_experts": (lambda: tiny.wan(boundary=0.9), tiny.wan),
}
"""Student and teacher of each architecture."""


@pytest.mark.usefixtures("own_notes")
@pytest.mark.parametrize("family", PAIRS)
def test_every_way(family, tmp_path):
    """In the asked size; the teacher is felt each time, and so are picture and mask."""
    student, teacher = (make() for make in PAIRS[family])
    tiny.tiny(network_of(teacher), seed=7)
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    made = write(tmp_path / "in.png", 32, 16)
    right_half(tmp_path / "mask.png", 32, 16)
    words = ["--student", tmp_path / "student", "--prompt", "a red boat", "--steps", 3,
             "--width", 32, "--height", 16]  # fmt: skip
    guidance = ["--teacher", tmp_path / "teacher", "--teacher-scale", 0.5]
    image = ["--image", tmp_path / "in.png", "--strength", 0.7]
    ways = {"text": [], "image": image, "part": [*image, "--mask", tmp_path / "mask.png"]}
    if family.startswith("wan"):
        ways = {"picture": ["--frames", 1], "video": ["--frames", 5]}
    drawn = {}
    for way, more in ways.items():
        for who, guide in (("alone", []), ("guided", guidance)):
            out = tmp_path / f"{way}-{who}"
            given = ["generate", *words, *more, *guide, "--out", out]
            assert main(list(map(str, given))) == 0
            files = sorted(out.glob("*.png"))
            assert len(files) == (5 if way == "video" else 1)
            drawn[way, who] = torch.stack([pixels(path) for path in files])
            assert drawn[way, who].shape[1:] == (16, 32, 3)
        assert not torch.equal(drawn[way, "alone"], drawn[way, "guided"])
    for who in ("alone", "guided"):
        if "video" in ways:
            with Image.open(tmp_path / f"video-{who}" / "00000.webp") as file:
                assert file.n_frames == 5
        else:
            assert torch.equal(drawn["part", who][0, :, :16], made[:, :16])
            different = {bytes(drawn[way, who].flatten().tolist()) for way in ways}
            assert len(different) == 3
