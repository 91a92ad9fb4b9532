"""A student and its teacher, loaded for a request: of the lab, or two pipelines of diffusers.

A pair fills in what the request leaves open, and makes the conditions and the pixels of pictures.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdpp.checkpoints.encoding import Encoded
from kdpp.checkpoints.files import inspect, part_numbers
from kdpp.checkpoints.load import draws_videos, is_pipeline, load_pipeline
from kdpp.checkpoints.loras import Lora, load_loras
from kdpp.checkpoints.media import Edit, Source, check_webp, read_source
from kdpp.checkpoints.networks import Network
from kdpp.checkpoints.offload import Turns
from kdpp.checkpoints.pipelines import (
    check_alike,
    clips_of,
    decode,
    denoiser_of,
    encode,
    encoders_of,
    latent_shape,
    latents_of,
    network_of,
    pipeline_sigmas,
    size_unit,
)
from kdpp.checkpoints.places import content_digest, remember
from kdpp.checkpoints.presets import PRESETS, Preset, check_levels, named
from kdpp.checkpoints.prompts import READERS, sections
from kdpp.checkpoints.requests import Offload, Picture, Request, Role
from kdpp.denoisers import map_tensors
from kdpp.kinds import OwnCFG, is_flow
from kdpp.lab.models import Model, load_model
from kdpp.lab.sampling import Recipe, solver_for
from kdpp.memory import Borrowed
from kdpp.models import LCMDenoiser
from kdpp.solver import unknown

__all__ = ["LabPair", "PipelinePair", "check_places", "open_pair"]

FRAMES, FPS = 81, 16.0
"""Of a video by default: Wan's."""


UNUSED = ("image_encoder", "safety_checker", "feature_extractor")
"""Parts of a folder that draw nothing."""


def open_pair(
    request: Request, device: torch.device, offload: Offload = "teacher"
) -> LabPair | PipelinePair:
    """Load what the request names.

    Raises OSError for files that are not there, ValueError or TypeError for what these models
    cannot do, or for files that are not those that the request was made with (`digests`).
    """
    source = read_source(request)
    check_places(request)
    pair: LabPair | PipelinePair
    if is_pipeline(request.student):
        pair = PipelinePair(request, device, source, offload)
    else:
        pair = LabPair(request, device, source)
    found = pair.request.digests
    for role, name in request.places.items():
        if request.digests.get(role, found[role]) != found[role]:
            raise ValueError(
                f"{name} is not the {role} that the picture was made with: its content has the "
                f"digest {found[role]}, and the picture's {request.digests[role]}"
            )
    remember({found[role]: name for role, name in request.places.items() if Path(name).exists()})
    return pair


def check_places(request: Request) -> None:
    """FileNotFoundError for a model that is not there; of pictures `read_source` says it."""
    for role, name in request.places.items():
        if role in ("image", "mask"):
            continue
        if not (name.startswith("digits:") or Path(name).exists()):
            raise FileNotFoundError(
                f"there is no file or folder {name}; kdpp fetches nothing: download it first"
            )


def check_texts(request: Request, prompts: Iterable[str | None]) -> None:
    """ValueError for prompts that the student cannot read, before it is loaded."""
    if is_pipeline(request.student) and inspect(request.student).architecture in READERS:
        for text in dict.fromkeys([*prompts, request.negative]):
            sections(text or "")


class Pair:
    """What both kinds of pairs have.

    Attributes:
        request: with nothing left open.
        student, teacher: denoisers; without a teacher both are the student.
        shape: of one latent.
        levels: those that are sampled: the request's, or with an `edit` the last of them.
        edit: the picture that sampling starts from, or None.
        remarks: what the user must know, such as levels that the student was not trained for.
    """

    request: Request
    shape: tuple[int, ...]
    levels: tuple[float, ...]
    edit: Edit | None = None
    remarks: list[str]

    def _start_from(self, source: Source | None, unit: int = 1) -> None:
        """Set `levels`, and of a source the `edit`; sizes are multiples of ``unit``."""
        assert self.request.sigmas and self.request.height and self.request.width
        self.levels = self.request.sigmas
        if source is None:
            return
        source = source.fitted(self.request.height, self.request.width, unit)
        pixels = source.pixels(1 if self.shape[0] == 1 else 3)
        latents = self.latents_of(pixels.movedim(-1, 0)[None] / 255.0)
        self.edit = Edit.of(source, pixels, latents)
        self.levels = self.edit.levels(self.levels)
        steps = f"the last {len(self.levels) - 1} of {len(self.request.sigmas) - 1} steps"
        levels = ", ".join(f"{level:.4g}" for level in self.levels)
        self.remarks.append(f"strength {source.strength:g}: {steps}, at the levels {levels}")

    def pixels(self, latents: Tensor) -> Tensor:
        """uint8 (batch, height, width, channels), of a video (batch, frames, …), on the CPU."""
        pictures = self.decoded(latents).clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)
        pixels = pictures.movedim(1, -1).cpu()
        return self.edit.pasted(pixels) if self.edit else pixels

    def decoded(self, latents: Tensor) -> Tensor:
        """Pictures, numbers in [0, 1], (batch, channels, …, height, width)."""
        raise NotImplementedError

    def latents_of(self, pictures: Tensor) -> Tensor:
        """The reverse of `decoded`."""
        raise NotImplementedError


class LabPair(Pair):
    """Models of the lab (`kdpp.lab.models.load_model`), which draw classes."""

    def __init__(self, request: Request, device: torch.device, source: Source | None) -> None:
        check_lab(request)
        model = load_model(request.student, device)
        teacher = None if request.teacher is None else load_model(request.teacher, device)
        if len(model.shape) != 3 or model.shape[0] not in (1, 3) or not model.card.data.bounded:
            raise ValueError(
                f"{request.student} does not make pictures but data of shape {list(model.shape)}"
            )
        side = (request.height or model.shape[1], request.width or model.shape[2])
        if side != model.shape[1:]:
            raise ValueError(f"{request.student} draws {model.shape[2]} x {model.shape[1]} pixels")
        if request.label is not None and not 0 <= request.label < model.classes:
            raise ValueError(f"label is {request.label}; it must be in 0 … {model.classes - 1}")
        levels = request.sigmas or model.levels_for(request.steps)
        plain = teacher is None or teacher.card.guidance is None
        self.request = replace(
            _guided(request, 0.1, 1, 2.0 if plain else 1.0),
            sampler=request.sampler or model.sampler,
            sigmas=levels,
            steps=len(levels) - 1,
            cond_scale=1.0 if request.cond_scale is None else request.cond_scale,
            width=model.shape[2],
            height=model.shape[1],
            strength=source.strength if source else None,
            digests={
                role: content_digest(Path(name))
                for role, name in request.places.items()
                if role in ("image", "mask")
            }
            | {"student": model.digest()}
            | ({"teacher": teacher.digest()} if teacher else {}),
        )
        self._check(model, teacher)
        steps = len(levels) - 1
        self.student = model.denoiser_for(steps)
        self.teacher = (teacher or model).denoiser_for(steps)
        self.networks = (model.network, (teacher or model).network)
        self.shape, self.classes, self.device = model.shape, model.classes, device
        own = model.levels
        wrong = own and check_levels(request.student, [own], levels)
        self.remarks = [wrong] if wrong else []
        self._start_from(source)

    def _check(self, model: Model, teacher: Model | None) -> None:
        """ValueError for what a recipe of these models cannot be."""
        request = self.request
        guidance = request.guidance if teacher else {}
        assert request.sampler and request.sigmas and request.cond_scale is not None
        Recipe(
            model, teacher, request.sampler, request.sigmas, request.cond_scale, guidance,
            request.options,
        )  # fmt: skip

    def extra_args(self, pictures: Sequence[Picture]) -> dict[str, Any]:
        """Labels as ``cond``, "no label" as ``uncond``."""
        labels = [p.seed % self.classes if p.label is None else p.label for p in pictures]
        cond = torch.tensor(labels, device=self.device)
        uncond = torch.full_like(cond, self.classes)
        return {"cond": cond, "uncond": uncond, "cond_scale": self.request.cond_scale}

    def teacher_args(self, pictures: Sequence[Picture]) -> dict[str, Any]:
        """What the teacher is told in the place of `extra_args`: nothing else."""
        return {}

    def expect(self, batches: Iterable[Sequence[Picture]]) -> None:
        """Nothing is made ahead."""

    def decoded(self, latents: Tensor) -> Tensor:
        return latents / 2.0 + 0.5

    def latents_of(self, pictures: Tensor) -> Tensor:
        return pictures.to(self.device) * 2.0 - 1.0


def check_lab(request: Request) -> None:
    """ValueError for settings that models of the lab do not have."""
    for name in ("prompt", "negative", "clip_skip", "preset", "components", "vae", "tiling",
                 "prediction", "loras"):  # fmt: skip
        if getattr(request, name) not in (None, False, ()):
            raise ValueError(f"a model of the lab takes no {name}; it draws a class: --label N")
    _check_video(request, False)
    if request.dtype != "float32":
        raise ValueError("models of the lab are float32; leave --dtype out")


class PipelinePair(Pair):
    """Two pipelines of diffusers, or one with LoRAs.

    Without a teacher the student stands in its place, without its LoRAs if it has some. The
    teacher's VAE is not loaded: the pictures are the student's. Nor are text encoders kept that
    hold the same weights as the student's; others encode the prompt for the teacher.

    On a device beside the CPU the text encoders are there while they encode, one at a time, and the
    networks come afterwards. `Offload` says what leaves then: the teacher after the guided steps
    (`kdpp.Borrowed`), or every network and the VAE when another's turn comes (`Turns`), or each
    layer after its call (diffusers' ``enable_sequential_cpu_offload``).
    """

    def __init__(
        self,
        request: Request,
        device: torch.device,
        source: Source | None = None,
        offload: Offload = "teacher",
    ) -> None:
        if request.label is not None:
            raise ValueError("these models take a prompt and no label")
        if request.prompt is None:
            raise ValueError("say what the picture shows: --prompt TEXT")
        video = draws_videos(request.student)
        _check_video(request, video)
        preset = preset_of(request)
        self.remarks: list[str] = []
        self.pipe = pipe = load_pipeline(
            request.student, request.dtype, components=request.components,
            prediction=request.prediction, vae=request.vae, without=UNUSED,
        )  # fmt: skip
        if request.clip_skip is not None:
            clips_of(pipe, request.clip_skip)
        pipe.vae.enable_slicing()  # a batch is decoded picture by picture
        if request.tiling:
            pipe.vae.enable_tiling()
        teacher_pipe = self._teacher_pipe(request)
        self._encoding = [one for one in (pipe, teacher_pipe) if one and encoders_of(one)]
        self._texts = Encoded(self._encode, self._drop_encoders)
        lcm = preset.boundary_scalings if preset else None
        borrowed = teacher_pipe is not None and device.type != "cpu" and offload == "teacher"
        request = replace(request, loras=with_weights(request, preset))
        loras = [Lora._make(lora) for lora in request.loras]
        if teacher_pipe is None:
            self.student, self.teacher = denoisers(pipe, loras, lcm, device)
        else:
            own, its = (
                [lora for lora in loras if lora.role in ("both", role)]
                for role in ("student", "teacher")
            )
            self.student, _ = denoisers(pipe, own, lcm, device)
            where = torch.device("cpu") if borrowed else device
            _, self.teacher = denoisers(teacher_pipe, its, None, where)
        self.networks = tuple(_asked(one) for one in (self.student, self.teacher))
        pipes = [pipe] if teacher_pipe is None else [pipe, teacher_pipe]
        self._turns, self._seen = place(pipes, device, offload)
        if borrowed:
            self.teacher = borrowed_by(self.teacher, device)
        height, width = size = self._size(request, source)
        frames = (request.frames or FRAMES) if video else None
        self.shape, self.device = latent_shape(pipe, height, width, frames or 1), device
        levels = self._levels(request, preset, size)
        guided = (
            (preset.teacher_scale, preset.teacher_steps, preset.teacher_cfg_scale)
            if preset
            else (0.1, 1, 7.5)
        )
        scale = preset.cond_scale if preset else 1.0
        consistent = any(isinstance(part, LCMDenoiser) for part in self.student.modules())
        self.request = replace(
            _guided(request, *guided),
            preset=preset.name if preset else None,
            sampler=request.sampler
            or (preset.sampler if preset else "lcm" if consistent else "euler"),
            sigmas=levels,
            steps=len(levels) - 1,
            cond_scale=scale if request.cond_scale is None else request.cond_scale,
            width=width,
            height=height,
            frames=frames,
            fps=(request.fps or FPS) if video else None,
            strength=source.strength if source else None,
            digests={role: content_digest(Path(name)) for role, name in request.places.items()},
        )
        assert self.request.sampler is not None
        solver_for(self.request.sampler)
        if preset is not None and (wrong := preset.check(levels, size)):
            self.remarks.append(wrong)
        self._start_from(source, size_unit(pipe))

    def _teacher_pipe(self, request: Request) -> Any:
        """The teacher's pipeline, if one is named: without a VAE, and without text encoders if the
        student's do the same."""
        name, rest = request.teacher, request.components or request.student
        if name is None:
            return None
        parts = [part for part in self.pipe.components if part.startswith(("text_", "tokenizer"))]
        own = "text encoders" in part_numbers(name) and Path(name).resolve() != Path(rest).resolve()
        without = ["vae", *UNUSED, *(() if own else parts)]
        teacher = load_pipeline(name, request.dtype, without=without)
        check_alike(self.pipe, teacher)
        if own and same_weights(encoders_of(self.pipe), encoders_of(teacher)):
            teacher.register_modules(**dict.fromkeys(parts))
        elif own:
            self.remarks.append(f"{name} has text encoders of its own; they encode its prompt")
        return teacher

    def _levels(
        self, request: Request, preset: Preset | None, size: tuple[int, int]
    ) -> tuple[float, ...]:
        """Those that are given, else the preset's, else the pipeline's for so many steps."""
        if preset is not None and preset.flow != is_flow(self.student):
            kinds = ("a flow model", "a model that predicts ε or v")
            raise ValueError(
                f"the preset {preset.name} is for {kinds[not preset.flow]}, and {request.student} "
                f"is {kinds[preset.flow]}"
            )
        if request.sigmas is not None:
            return request.sigmas
        if preset is not None:
            return preset.sigmas(request.steps, size)
        if request.steps is None:
            raise ValueError("say how the student is sampled: --preset NAME, or --steps N")
        return tuple(pipeline_sigmas(self.pipe, request.steps, *size).tolist())

    def levels_of(self, steps: int) -> tuple[float, ...]:
        """Those of so many steps, whatever the request says."""
        request = self.request
        assert request.height is not None and request.width is not None
        preset = None if request.preset is None else PRESETS[request.preset]
        asked = replace(request, steps=steps, sigmas=None)
        return self._levels(asked, preset, (request.height, request.width))

    def _size(self, request: Request, source: Source | None) -> tuple[int, int]:
        """(height, width) of the pictures; by default the given picture's, or the training's."""
        if source is not None:
            return source.size(request.width, request.height, size_unit(self.pipe))
        side = getattr(self.pipe, "default_sample_size", None) or getattr(
            network_of(self.pipe).config, "sample_size", None
        )
        if not isinstance(side, int) and None in (request.height, request.width):
            raise ValueError("say the size of the pictures: --width and --height")
        pixels = side * self.pipe.vae_scale_factor if isinstance(side, int) else 0
        return request.height or pixels, request.width or pixels

    def expect(self, batches: Iterable[Sequence[Picture]]) -> None:
        """Say which batches will be drawn, in their order, and no others: then the prompts are
        encoded ahead, and the text encoders are dropped afterwards."""
        self._texts.expect(map(_prompts, batches))

    def extra_args(self, pictures: Sequence[Picture]) -> dict[str, Any]:
        """The prompts, encoded, as ``cond``; the negative prompt as ``uncond``."""
        return {**self._here(pictures, 0), "cond_scale": self.request.cond_scale}

    def teacher_args(self, pictures: Sequence[Picture]) -> dict[str, Any]:
        """``cond`` and ``uncond`` for a teacher with text encoders of its own; else empty."""
        return self._here(pictures, 1) if self.teacher_reads_itself else {}

    @property
    def teacher_reads_itself(self) -> bool:
        """Whether the teacher has text encoders that are not the student's."""
        return len(self._encoding) > 1

    def _here(self, pictures: Sequence[Picture], number: int) -> dict[str, Any]:
        texts: dict[str, Any] = self._texts[_prompts(pictures)][number]
        return dict(map_tensors(texts, lambda tensor: tensor.to(self.device)))

    def _encode(self, prompts: tuple[str, ...]) -> list[dict[str, Any]]:
        """The prompts as each pipeline with text encoders has them, on the CPU."""
        request = self.request
        names = ("height", "width", "clip_skip")
        given: dict[str, Any] = {name: getattr(request, name) for name in names}
        texts = [
            encode(pipe, list(prompts), request.negative, device=self.device, **given)
            for pipe in self._encoding
        ]
        return [map_tensors(one, Tensor.cpu) for one in texts]

    def _drop_encoders(self) -> None:
        self._turns.take(None)
        for pipe in self._encoding:
            pipe.register_modules(**dict.fromkeys(encoders_of(pipe)))
        if self.device.type != "cpu":
            gc.collect()  # a hook and its group hold each other

    def decoded(self, latents: Tensor) -> Tensor:
        self._turns.take(self._seen)
        pictures = decode(self.pipe, latents)
        return pictures[:, :, 0] if self.request.frames == 1 else pictures

    def latents_of(self, pictures: Tensor) -> Tensor:
        self._turns.take(self._seen)
        return latents_of(self.pipe, pictures)


def place(
    pipes: Sequence[Any], device: torch.device, offload: Offload
) -> tuple[Turns, nn.ModuleList]:
    """Let the parts of loaded pipelines come to the device; the groups' turns, and the VAE's group.

    The first pipeline is the student's. With ``teacher`` the networks of the others are left alone.
    """
    if offload == "sequential" and device.type != "cpu":
        for pipe in pipes:
            pipe.enable_sequential_cpu_offload(device=device)
        device = torch.device("cpu")  # nothing else is moved
    turns = Turns(device)
    for pipe in pipes:
        for encoder in encoders_of(pipe).values():
            turns.group([encoder])
    drawing = pipes[:1] if offload == "teacher" else pipes
    names = ("unet", "transformer", "transformer_2")
    parts = [getattr(pipe, name, None) for pipe in drawing for name in names]
    held = [part for part in [*parts, pipes[0].vae] if part is not None]
    if offload != "model":
        return turns, turns.group(held)
    *_, seen = [turns.group([part]) for part in held]
    return turns, seen


def borrowed_by(denoiser: nn.Module, device: torch.device) -> nn.Module:
    """The denoiser as `kdpp.Borrowed`, inside the CFG that it does itself, if it does."""
    if isinstance(denoiser, OwnCFG):
        inner: Any = denoiser.model
        return type(denoiser)(Borrowed(inner, device=device))
    return Borrowed(denoiser, device=device)


def same_weights(some: Mapping[str, nn.Module], others: Mapping[str, nn.Module]) -> bool:
    """Whether modules of the same names hold the same weights."""
    one, other = nn.ModuleDict(some).state_dict(), nn.ModuleDict(others).state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def denoisers(
    pipe: Any, loras: Sequence[Lora], lcm: bool | None, device: torch.device
) -> tuple[nn.Module, nn.Module]:
    """The student and the teacher that a pipeline is; without LoRAs one is both."""
    if loras:
        return load_loras(pipe, loras, lcm=lcm, device=device)
    denoiser = denoiser_of(pipe, lcm=lcm, device=device)
    return denoiser, denoiser


def preset_of(request: Request) -> Preset | None:
    """The preset that the request names; else the one that the student's file name tells of.

    The file is its LoRA where it has one of its own. Where the request says the levels or their
    number itself, a name alone tells nothing.
    """
    if request.preset is None:
        said = request.sigmas is not None or request.steps is not None
        own = [path for path, _, role in request.loras if role == "student"]
        return None if said else named(inspect(own[0] if own else request.student))
    if request.preset not in PRESETS:
        raise ValueError(unknown("preset", request.preset, PRESETS))
    return PRESETS[request.preset]


def with_weights(request: Request, preset: Preset | None) -> tuple[tuple[str, float, Role], ...]:
    """The LoRAs with their weights: of the student's own without one the preset's, else 1."""
    own = (preset and preset.lora_weight) or 1.0
    usual = {"student": own, "teacher": 1.0, "both": 1.0}
    return tuple(
        (path, usual[role] if weight is None else weight, role)
        for path, weight, role in request.loras
    )


def _prompts(pictures: Sequence[Picture]) -> tuple[str, ...]:
    return tuple(picture.prompt or "" for picture in pictures)


def _guided(request: Request, scale: float, steps: int, cfg_scale: float) -> Request:
    """The request with these settings of guidance where it has none."""
    return replace(
        request,
        teacher_scale=scale if request.teacher_scale is None else request.teacher_scale,
        teacher_steps=steps if request.teacher_steps is None else request.teacher_steps,
        teacher_cfg_scale=(
            cfg_scale if request.teacher_cfg_scale is None else request.teacher_cfg_scale
        ),
    )


def _asked(denoiser: nn.Module) -> nn.Module:
    """The network inside a denoiser, whose calls are its evaluations."""
    return next(module for module in denoiser.modules() if isinstance(module, Network))


def _check_video(request: Request, video: bool) -> None:
    """ValueError for what only a model of pictures, or only one of videos takes."""
    for name in ("image",) if video else ("frames", "fps"):
        if getattr(request, name) is not None:
            own, other = ("videos", "pictures") if video else ("pictures", "videos")
            raise ValueError(f"{request.student} makes {own}; --{name} is for models of {other}")
    if video:
        check_webp()
