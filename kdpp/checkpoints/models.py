"""Models by name, as the lab takes them: its own, or pipelines of diffusers.

`open_models` is for `kdpp tune` and `kdpp compare` what `kdpp.checkpoints.pairs.open_pair` is for
`kdpp generate`.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdpp.checkpoints.flags import ROLES, read_lora, request_of
from kdpp.checkpoints.load import is_pipeline
from kdpp.checkpoints.pairs import PipelinePair, check_lab, check_places, check_texts
from kdpp.checkpoints.pipelines import decode
from kdpp.checkpoints.requests import Picture, Request
from kdpp.lab.files import digest
from kdpp.lab.models import GenerativeModel, load_model
from kdpp.solver import unknown

__all__ = ["PipelineModel", "Shelf", "open_models", "student_request"]


def open_models(
    request: Request, device: torch.device, prompts: Sequence[str] = ()
) -> tuple[GenerativeModel, GenerativeModel | None]:
    """Student and teacher that the request names; None where no teacher is named.

    Args:
        request: its prompt, label and guidance are not used.
        prompts: what pipelines draw; models of the lab draw classes, and take none.

    Raises as `kdpp.checkpoints.pairs.open_pair`, and ValueError for prompts where none are taken,
    or none where they are.
    """
    if prompts:
        check_places(request)
    if not is_pipeline(request.student):
        if prompts:
            raise ValueError(f"{request.student} is a model of the lab, which takes no prompts")
        check_lab(request)
        if (request.width, request.height) != (None, None):
            raise ValueError("a model of the lab has the size of its data; it takes no other")
        teacher = None if request.teacher is None else load_model(request.teacher, device)
        return load_model(request.student, device), teacher
    if not prompts:
        raise ValueError(f"{request.student} draws prompts: name a file of them (--prompts FILE)")
    check_texts(request, prompts)
    pair = PipelinePair(replace(request, prompt=prompts[0]), device, None, "none")
    if pair.teacher_reads_itself:
        raise ValueError(
            f"{request.teacher} has other text encoders than {request.student}; here one encoded "
            "prompt serves both, so give a teacher with the student's (kdpp generate takes both)"
        )
    student = PipelineModel(pair, "student", prompts)
    if pair.teacher is pair.student:
        return student, None
    return student, PipelineModel(pair, "teacher", prompts)


SETTINGS = {
    "components", "vae", "prediction", "preset", "dtype", "negative", "width", "height", "sampler",
    "steps", "sigmas", "cond_scale", "teacher_cfg_scale",
}  # fmt: skip
"""Those of a `Request` that a student of a spec may have."""


class Shelf:
    """Students and their teachers, of which one pair at a time is in memory.

    Pairs of many pipelines do not fit beside each other. The one that was asked for last is kept.
    """

    def __init__(self, device: torch.device, prompts: Sequence[str]) -> None:
        self.device, self.prompts = device, prompts
        self._held: tuple[Request, tuple[PipelineModel, PipelineModel | None]] | None = None

    def models(self, request: Request) -> tuple[GenerativeModel, GenerativeModel | None]:
        """Student and teacher, loaded when they are used."""
        student, teacher = self.open(request)
        return _Shelved(self, request, student), teacher and _Shelved(self, request, teacher)

    def open(self, request: Request) -> tuple[PipelineModel, PipelineModel | None]:
        """The pair itself."""
        if self._held is None or self._held[0] != request:
            self._held = None
            gc.collect()  # a pair holds itself
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            pair: Any = open_models(request, self.device, self.prompts)
            self._held = (request, pair)
        return self._held[1]


class _Shelved:
    """A model of a `Shelf`: what is known of it at once, and the rest where it is loaded."""

    bounds = None
    guidance_range = None

    def __init__(self, shelf: Shelf, request: Request, model: PipelineModel) -> None:
        self._shelf, self._request, self._role = shelf, request, model.role
        self.shape, self.classes, self.device = model.shape, model.classes, model.device
        self.sampler, self.levels, self.method = model.sampler, model.levels, model.method
        self.cond_scale, self.guidance = model.cond_scale, model.guidance
        self.parameters, self._digest = model.parameters, model.digest()

    @property
    def _model(self) -> PipelineModel:
        student, teacher = self._shelf.open(self._request)
        return student if self._role == "student" or teacher is None else teacher

    @property
    def network(self) -> nn.Module:
        return self._model.network

    def levels_for(self, steps: int | None = None) -> tuple[float, ...]:
        if self.levels is not None and steps in (None, len(self.levels) - 1):
            return self.levels
        return self._model.levels_for(steps)

    def denoiser_for(self, steps: int) -> nn.Module:
        return self._model.denoiser_for(steps)

    def conditions(self, labels: Tensor) -> dict[str, Any]:
        return self._model.conditions(labels)

    def decode(self, latents: Tensor) -> Tensor:
        return self._model.decode(latents)

    def digest(self) -> str:
        return self._digest


class PipelineModel:
    """The student or the teacher of a `kdpp.checkpoints.pairs.PipelinePair`, as the lab takes it.

    It is a `kdpp.lab.models.GenerativeModel`, whose labels are the numbers of prompts.
    """

    bounds = None
    guidance_range = None

    def __init__(
        self, pair: PipelinePair, role: Literal["student", "teacher"], prompts: Sequence[str]
    ) -> None:
        self.pair, self.role, self.prompts = pair, role, tuple(prompts)
        self.network = pair.networks[role == "teacher"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent."""
        return self.pair.shape

    @property
    def classes(self) -> int:
        """How many prompts there are."""
        return len(self.prompts)

    @property
    def sampler(self) -> str:
        """The preset's, or the one that the request names."""
        return str(self.pair.request.sampler)

    @property
    def cond_scale(self) -> float:
        """Its own CFG scale: the preset's, or the one that the request names."""
        scale = self.pair.request.cond_scale
        return 1.0 if scale is None else scale

    @property
    def guidance(self) -> float | None:
        """The teacher's CFG scale: the preset's, or the one that the request names."""
        return self.pair.request.teacher_cfg_scale

    @property
    def method(self) -> str:
        """Its preset."""
        return self.pair.request.preset or "pipeline"

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The request's or the preset's."""
        return self.pair.request.sigmas

    @property
    def parameters(self) -> int:
        """How many numbers the network has."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.pair.device

    def levels_for(self, steps: int | None = None) -> tuple[float, ...]:
        """The request's or the preset's levels; those of so many steps, of a preset that has them,
        or else as the pipeline makes them."""
        own = self.pair.request.sigmas
        assert own is not None
        return own if steps in (None, len(own) - 1) else self.pair.levels_of(steps)

    def denoiser_for(self, steps: int) -> nn.Module:
        """The same for any number of steps."""
        return self.pair.student if self.role == "student" else self.pair.teacher

    def conditions(self, labels: Tensor) -> dict[str, Any]:
        """The prompts of these numbers, encoded, and the negative prompt."""
        given = self.pair.extra_args([Picture(0, self.prompts[i]) for i in labels.tolist()])
        return {"cond": given["cond"], "uncond": given["uncond"]}

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, h, w) in [0, 1], on the model's device."""
        return decode(self.pair.pipe, latents)

    def digest(self) -> str:
        """A digest of the files, of how they are read, and of what is drawn."""
        request = self.pair.request
        own = {role: d for role, d in request.digests.items() if role in (self.role, "components")}
        loras = [
            (request.digests[f"lora {i}"], weight, role)
            for i, (_, weight, role) in enumerate(request.loras)
        ]
        # Without a file of its own the teacher is the student's network.
        files = own if self.role in own else request.digests
        return digest([
            self.role, sorted(files.items()), loras, request.preset, request.prediction,
            request.dtype, request.negative, self.shape, self.prompts, self.device.type,
        ])  # fmt: skip


def student_request(about: str | Mapping[str, Any], teacher: str | None) -> Request:
    """The request for a student of a spec: its place, or a table of settings of a `Request`.

    ``model`` names the student, ``lora``, ``student_lora`` and ``teacher_lora`` name LoRAs, each
    ``FILE``, ``FILE:0.8`` or a list of them. A student with LoRAs has no other teacher than its
    network without those that are its own.

    Raises ValueError for an unknown setting, or a value that cannot be.
    """
    given: dict[str, Any] = {"model": about} if isinstance(about, str) else dict(about)
    given["student"] = given.pop("model", "")
    loras = tuple(
        (*read_lora(text), role)
        for kind, (role, _) in ROLES.items()
        for text in _listed(given.pop(f"{kind.replace('-', '_')}lora", []))
    )
    for name in given.keys() - SETTINGS - {"student"}:
        raise ValueError(unknown("setting of a student", name, SETTINGS | {"model", "lora"}))
    if loras:
        given["loras"] = loras
    elif teacher is not None:
        given.setdefault("teacher", teacher)
    return request_of(given)


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]
