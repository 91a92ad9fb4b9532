"""The demo's ways to sample: student and teacher alone, and the one with the other's help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kdpp
from kdpp import kdiffusion
from kdpp.digits.data import CLASSES, IMAGE_SHAPE, NULL_CLASS
from kdpp.digits.metrics import Scores
from kdpp.lab.networks import VNetwork
from kdpp.lab.schedules import schedule

TEACHER_CFG = 2.0
"""This data's CFG scale; the paper's 7.5 is Stable Diffusion's and overshoots here."""
WEAK, STRONG, LATE = 0.1, 0.5, 1.17
"""λ of the paper for students that follow a trajectory, a stronger one, `kdpp tune`'s."""


class Counted(torch.nn.Module):
    """A network's denoiser that counts how many images it has evaluated."""

    def __init__(self, network: VNetwork) -> None:
        super().__init__()
        self.denoiser = kdiffusion.external.CompVisDenoiser(network)
        self.images = 0

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        self.images += len(x)
        denoised: Tensor = self.denoiser(x, sigma, **extra_args)
        return denoised


@dataclass
class Way:
    """One way to sample, and what was measured of it: an entry for each seed."""

    name: str
    sample: Callable[..., Tensor]
    model: kdpp.TeacherGuidedDenoiser
    sigmas: Sequence[float]
    cond_scale: float = 1.0
    scores: list[Scores] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: tuple[float, float] = (0.0, 0.0)
    """Network evaluations an image takes, of the student and the teacher, CFG's halves counted."""

    def run(self, seed: int, count: int, callback: Any = None) -> tuple[Tensor, Tensor]:
        """(images, labels) of one seed: the digits 0-9 in turn."""
        torch.manual_seed(seed)
        labels = torch.arange(count) % CLASSES
        x = torch.randn(count, *IMAGE_SHAPE) * self.sigmas[0]
        extra_args = {
            "cond": labels,
            "uncond": torch.full_like(labels, NULL_CLASS),
            "cond_scale": self.cond_scale,
        }
        sigmas = torch.tensor(self.sigmas)
        images = self.sample(self.model, x, sigmas, extra_args, callback, disable=True)
        return images, labels


def build_ways(student: Counted, teacher: Counted) -> dict[str, Way]:
    """The demo's ways to sample; "student" is what every other is compared with."""

    def plain(steps: int) -> Way:
        model = kdpp.TeacherGuidedDenoiser(student, teacher, teacher_steps=0)
        return Way(f"student, {steps} steps", kdpp.sample_lcm_tg, model, schedule(steps))

    def helped(name: str, helper: Counted, scale: float, cfg_scale: float, **look: Any) -> Way:
        model = kdpp.TeacherGuidedDenoiser(
            student, helper, teacher_scale=scale, teacher_cfg_scale=cfg_scale, **look
        )
        step = "last" if look else "first"
        return Way(f"  + {name}, {step} step, λ = {scale}", kdpp.sample_lcm_tg, model, schedule(4))

    def alone(steps: int) -> Way:  # by the solver that is best in 4 steps, not by Euler
        model = kdpp.TeacherGuidedDenoiser(teacher, teacher, teacher_steps=0)
        name = f"teacher, {steps} steps"
        return Way(name, kdpp.sample_unipc_tg, model, schedule(steps), TEACHER_CFG)

    # What `kdpp tune digits:student digits:teacher` names: the last step, noised again to a level
    # of its own with the student's noise, and beyond the teacher's estimate.
    last: dict[str, Any] = {
        "teacher_steps": [3], "renoise": 0.2, "renoise_eta": 0.0, "extrapolate": True,
    }  # fmt: skip
    return {
        "student": plain(4),
        "weak": helped("teacher", teacher, WEAK, TEACHER_CFG),
        "strong": helped("teacher", teacher, STRONG, TEACHER_CFG),
        "late": helped("teacher", teacher, LATE, 1.0, **last),
        "self_weak": helped("itself", student, WEAK, 1.0),
        "self_strong": helped("itself", student, STRONG, 1.0),
        "self_late": helped("itself", student, LATE, 1.0, **last),
        "five": plain(5),
        "six": plain(6),
        "teacher": alone(4),
        "many": alone(50),
    }
