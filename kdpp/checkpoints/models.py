"""Models by name, as the lab takes them: its own, or pipelines of diffusers.

`open_models` is for `kdpp tune` and `kdpp compare` what `kdpp.checkpoints.pairs.open_pair` is for
`kdpp generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdpp.checkpoints.load import is_pipeline
from kdpp.checkpoints.pairs import PipelinePair, check_lab
from kdpp.checkpoints.requests import Picture, Request
from kdpp.lab.files import digest
from kdpp.lab.models import GenerativeModel, load_model

__all__ = ["PipelineModel", "open_models"]


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
    pair = PipelinePair(replace(request, prompt=prompts[0]), device)
    student = PipelineModel(pair, "student", prompts)
    if pair.teacher is pair.student:
        return student, None
    return student, PipelineModel(pair, "teacher", prompts)


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
        return own if steps in (None, len(own) - 1) else self.pair.levels(steps)

    def denoiser_for(self, steps: int) -> nn.Module:
        """The same for any number of steps."""
        return self.pair.student if self.role == "student" else self.pair.teacher

    def conditions(self, labels: Tensor) -> dict[str, Any]:
        """The prompts of these numbers, encoded, and the negative prompt."""
        given = self.pair.extra_args([Picture(0, self.prompts[i]) for i in labels.tolist()])
        return {"cond": given["cond"], "uncond": given["uncond"]}

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
