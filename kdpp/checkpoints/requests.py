"""What a picture is made of: every setting but its seed, and how a PNG file keeps them.

A picture's file has two texts. ``kdpp`` is the request in JSON, with nothing left open, from which
`kdpp generate --like` makes the picture again. ``parameters`` says the same as web UIs write it, so
that their readers understand it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kdpp._version import __version__
from kdpp.lab.settings import from_json, setting

if TYPE_CHECKING:  # this file is read for `kdpp generate --help`, which need not wait for torch
    from torch import Tensor

__all__ = ["GUIDES", "Guide", "Offload", "Picture", "Request", "infotext", "png", "read_png"]

Role = Literal["both", "student", "teacher"]
Offload = Literal["none", "teacher", "model", "sequential"]
"""What leaves the device while it does not compute: nothing, the teacher, every model, every layer.
It is no part of a request: the pictures are the same."""
Guide = Literal["teacher", "none", "self"]
"""Who is in the teacher's place: the teacher, nobody, the student itself."""
GUIDES: dict[Guide, str] = {"none": "alone", "teacher": "with teacher", "self": "with itself"}
"""The guides of `--compare`, in its order, and what its sheet says of them."""


class Picture(NamedTuple):
    """Which picture: its seed, and what it shows."""

    seed: int
    prompt: str | None = None
    label: int | None = None
    line: int | None = None
    """Of a file of prompts, from 0."""


@dataclass(frozen=True)
class Request:
    """All that a picture depends on but its seed; None where the model or its preset decides."""

    student: str = setting(
        "", "a safetensors file, a folder as diffusers saves it, or a checkpoint of the lab"
    )
    teacher: str | None = setting(None, "the same for the teacher (default: no teacher)")
    components: str | None = setting(
        None, "a folder or file with what a UNet or transformer alone does not hold"
    )
    vae: str | None = setting(
        None, "another VAE: a safetensors file or a folder of diffusers (default: the model's)"
    )
    tiling: bool = setting(False, "decode large pictures in tiles, which takes less memory")
    prediction: Literal["epsilon", "v", "x0"] | None = setting(
        None, "epsilon, v or x0, of a file that does not say what its UNet predicts"
    )
    preset: str | None = setting(None, "how the student is sampled (default: by its name)")
    prompt: str | None = setting(None, "what the picture shows")
    negative: str | None = setting(None, "what it does not; for models with CFG")
    clip_skip: int | None = setting(
        None, "CLIP's layer, counted from the last as web UIs do (default: 1, of SDXL 2)"
    )
    image: str | None = setting(None, "a picture to start from")
    mask: str | None = setting(
        None, "a picture: white where the image is drawn anew, black where it is kept"
    )
    strength: float | None = setting(
        None, "how much of the image goes, in (0, 1] (default: 0.75; with a mask 1)"
    )
    label: int | None = setting(None, "the class, of a lab model (default: seed mod classes)")
    width: int | None = setting(None, "of the picture (default: the model's)")
    height: int | None = setting(None, "of the picture (default: the model's)")
    frames: int | None = setting(None, "of a video (default: 81)", low=1)
    fps: float | None = setting(
        None, "frames a second of a video's animation (default: 16)", low=1, high=1000
    )
    sampler: str | None = setting(None, "a solver, see `kdpp solvers` (default: the model's)")
    options: dict[str, Any] = setting({}, "of the sampler, such as {eta = 0.5}")
    steps: int | None = setting(None, "how many (default: the model's)")
    sigmas: tuple[float, ...] | None = setting(
        None, "the levels themselves, falling to 0, in place of steps; τ for flow models"
    )
    cond_scale: float | None = setting(None, "the student's CFG scale (default: the model's)")
    teacher_scale: float | None = setting(None, "λ, the teacher's share (default: 0.1)")
    teacher_steps: int | tuple[int, ...] | None = setting(
        None, "k: the first k steps; or a list of steps (default: 1)"
    )
    teacher_cfg_scale: float | None = setting(
        None,
        "the teacher's CFG scale (default: the preset's, or 7.5; for the lab's models 2, or 1 "
        "if guidance is built in)",
    )
    renoise: str | float = setting("next", "σ_s: next, current, random, or a level")
    renoise_eta: float = setting(1.0, "ρ, the share of fresh noise")
    extrapolate: bool = setting(False, "allow λ outside [0, 1]")
    dtype: Literal["float32", "float16", "bfloat16"] = setting(
        "float32", "of the networks: float32, float16 or bfloat16"
    )
    loras: tuple[tuple[str, float | None, Role], ...] = ()  # file, weight, for whom
    digests: dict[str, Any] = field(default_factory=dict)  # of `places`

    @property
    def places(self) -> dict[str, str]:
        """The files and folders that it names, by what they are for."""
        roles = ("student", "teacher", "components", "vae", "image", "mask")
        named = {role: getattr(self, role) for role in roles}
        named |= {f"lora {i}": path for i, (path, _, _) in enumerate(self.loras)}
        return {role: name for role, name in named.items() if name}

    def moved(self, places: Mapping[str, str]) -> Request:
        """The same request, of `places` elsewhere."""
        own: dict[str, Any] = {
            role: place for role, place in places.items() if not role.startswith("lora ")
        }
        loras = tuple(
            (places.get(f"lora {i}", path), weight, role)
            for i, (path, weight, role) in enumerate(self.loras)
        )
        return replace(self, loras=loras, **own)

    @property
    def guidance(self) -> dict[str, Any]:
        """The keywords of `kdpp.TeacherGuidedDenoiser`."""
        names = ("teacher_scale", "teacher_steps", "teacher_cfg_scale", "renoise", "renoise_eta")
        return {name: getattr(self, name) for name in (*names, "extrapolate")}


def infotext(request: Request, seed: int, guide: Guide) -> str:
    """The settings as the web UIs write and read them: prompt, negative prompt, ``Name: value``."""
    values: dict[str, Any] = {
        "Steps": len(request.sigmas or ()) - 1,
        "Sampler": request.sampler,
        "CFG scale": request.cond_scale,
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        **({"Denoising strength": f"{request.strength:g}"} if request.strength else {}),
        "Model hash": str(request.digests.get("student", ""))[:10],
        "Model": request.student,
    }
    if request.clip_skip is not None:
        values["Clip skip"] = request.clip_skip
    if request.vae:
        values["VAE hash"] = str(request.digests.get("vae", ""))[:10]
        values["VAE"] = request.vae
    if guide == "teacher":
        values["kdpp teacher"] = request.teacher or request.student
    if guide != "none" and request.teacher_scale:
        values["kdpp teacher scale"] = request.teacher_scale
        values["kdpp teacher steps"] = request.teacher_steps
        values["kdpp teacher CFG scale"] = request.teacher_cfg_scale
    for path, weight, role in request.loras:
        values[f"kdpp LoRA {Path(path).stem}"] = f"{weight or 1.0:g} ({role})"
    values["Version"] = f"kdpp {__version__}"
    lines = [request.prompt or ""]
    if request.negative:
        lines.append(f"Negative prompt: {request.negative}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in values.items()))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    """As the web UIs do, in quotes where a comma or a colon would end the value."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text


def png(pixels: Tensor, texts: Mapping[str, str]) -> bytes:
    """A PNG file of uint8 pixels (height, width) or (height, width, 3), with these texts."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png", pnginfo=info)
    return file.getvalue()


def texts_of(request: Request, seed: int, guide: Guide) -> dict[str, str]:
    """A picture's two texts; of its models they hold the names, and not where they lie."""
    import torch

    request = request.moved({role: Path(name).name for role, name in request.places.items()})
    about = {"kdpp": __version__, "torch": torch.__version__, "seed": seed, "guide": guide}
    return {
        "parameters": infotext(request, seed, guide),
        "kdpp": json.dumps(about | {"request": asdict(request)}, ensure_ascii=False),
    }


def read_texts(path: Path) -> dict[str, str]:
    """The texts of a PNG file; OSError or ValueError for one that cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return {name: str(text) for name, text in getattr(image, "text", {}).items()}
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture") from error


def read_png(path: Path) -> tuple[Request, int, Guide]:
    """What a picture of `kdpp generate` was made of.

    Raises OSError for a file that cannot be read, ValueError for one without these settings.
    """
    text = read_texts(path).get("kdpp")
    if text is None:
        raise ValueError(f"{path} does not say how it was made; give a PNG of `kdpp generate`")
    try:
        about = json.loads(text)
        request, seed, guide = about["request"], about["seed"], about["guide"]
        if guide not in ("teacher", "none", "self") or not isinstance(seed, int):
            raise ValueError(f"guide is {guide!r} and seed {seed!r}")
        return from_json(Request, request), seed, guide
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has settings that kdpp cannot read: {error}") from error
