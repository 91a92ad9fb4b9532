"""The teacher's part: which steps it revises, where its input lies, how much of it is taken."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdpp.denoisers import Denoiser, bind, refuse_unmarked_cfg
from kdpp.noise import NoiseSampler
from kdpp.plan import Row, Step

__all__ = ["Revision", "TeacherGuidedDenoiser"]


@dataclass(frozen=True, slots=True)
class Revision:
    """One guided step, in numbers: ``x̂_new = (1 - scale)·x̂ + scale·D_ψ(x_s, sigma)``.

    ``renoise`` makes x_s from the point that the student saw at σ, its estimate x̂ and direction d:
    ``x_s = x̂ + σ_s (sqrt(1-ρ²)·(point - d)/σ + ρ n)``.
    """

    scale: float
    sigma: float
    renoise: Row


class TeacherGuidedDenoiser(nn.Module):
    """A student and the teacher that helps it while it samples (Distillation++).

    At the first k steps the student's estimate x̂ of x0 is noised again to the level σ_s, the
    teacher denoises that once, and the solver goes on with a mix of both::

        x_s   = x̂ + σ_s ε
        x̂_new = (1 - λ) x̂ + λ D_ψ^ω(x_s, σ_s)

    ``kdpp.sample_*_tg`` do this. Calling the wrapper is calling the student, with the CFG that
    ``extra_args`` asks for, so that it also works in any other sampler, unguided.

    Args:
        student, teacher: denoisers in k-diffusion's sense, ``(x, sigma, **extra_args) -> denoised``
            with x of shape ``(batch, *shape)`` in model space and sigma of shape ``(batch,)``:
            CompVisDenoiser, VDenoiser, …, or any callable, over one latent space. One that does
            its own CFG comes marked, as `kdpp.OwnCFG`. Both get ``extra_args``, less ``uncond`` and
            ``cond_scale``, which kdpp turns into one batched call of both halves.
        teacher_scale: λ in [0, 1]. The paper takes 0.1 for SDXL-Turbo and SDXL-Lightning, 0.02 for
            LCM and DMD2. 0 calls no teacher and draws nothing.
        teacher_steps: k ≥ 0, how many steps are guided, from the first on; steps of no length do
            not count.
        teacher_cfg_scale: ω, the teacher's CFG scale; other than 1 it needs ``uncond``.
        renoise: σ_s: "next", the level that the step goes to (s = t - Δt, the paper's best; a step
            to σ = 0 is not revised then); "current", the step's own (s = t); or a level, σ_s > 0.
        renoise_eta: ρ in [0, 1]: ``ε = sqrt(1-ρ²)·ε̂ + ρ n`` mixes the student's predicted noise
            ``ε̂ = (x - x̂)/σ`` (under CFG++ with x̂_∅) and fresh noise n. 1 is Algorithm 1.
        renoise_noise_sampler: ``(sigma, sigma_next) -> noise``, the source of n, called with the
            step's level and σ_s. By default a generator of its own, which leaves the host's
            random stream where it is and is reproducible under ``torch.manual_seed``.

    Raises:
        TypeError: a model is not callable, or does its own CFG unmarked.
        ValueError: a setting is outside its range.

    Source: Park et al. 2025, "Inference-Time Diffusion Model Distillation", Algorithm 1.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        teacher_scale: float = 0.1,
        teacher_steps: int = 1,
        teacher_cfg_scale: float = 7.5,
        renoise: str | float = "next",
        renoise_eta: float = 1.0,
        renoise_noise_sampler: NoiseSampler | None = None,
    ) -> None:
        super().__init__()
        refuse_unmarked_cfg(student, "student")
        refuse_unmarked_cfg(teacher, "teacher")
        self.student = student
        self.teacher = teacher
        self.teacher_scale = _between(0.0, 1.0, teacher_scale=teacher_scale)
        self.teacher_steps = _count(teacher_steps=teacher_steps)
        self.teacher_cfg_scale = _between(-math.inf, math.inf, teacher_cfg_scale=teacher_cfg_scale)
        self.renoise = _renoise(renoise)
        self.renoise_eta = _between(0.0, 1.0, renoise_eta=renoise_eta)
        self.renoise_noise_sampler = renoise_noise_sampler

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """The student's estimate of x0, guided by ``cond_scale`` where it is given."""
        return bind(self.student, "student", x, extra_args)(x, sigma)[0]

    def revisions(self, steps: Sequence[Step]) -> list[Revision | None]:
        """The teacher's part in every step, None where it has none."""
        left = self.teacher_steps if self.teacher_scale > 0.0 else 0
        revisions: list[Revision | None] = []
        for step in steps:
            guided = left > 0 and step.stages[-1].row.denoised != 0.0
            left -= guided
            sigma = self._renoise_level(step)
            revisions.append(self._revision(step, sigma) if guided and sigma > 0.0 else None)
        return revisions

    def _renoise_level(self, step: Step) -> float:
        if self.renoise == "next":
            return step.sigma_next
        return step.sigma if self.renoise == "current" else float(self.renoise)

    def _revision(self, step: Step, sigma: float) -> Revision:
        rho = self.renoise_eta
        predicted = sigma * math.sqrt(1.0 - rho * rho)
        direction = (-predicted / step.stages[-1].sigma,)
        renoise = Row(predicted, 1.0, direction, noise=rho * sigma or None)
        return Revision(self.teacher_scale, sigma, renoise)


def _between(low: float, high: float, **setting: Any) -> float:
    ((name, value),) = setting.items()
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and low <= value <= high and math.isfinite(value)):
        allowed = f"in [{low:g}, {high:g}]" if math.isfinite(low) else "finite"
        raise ValueError(f"{name} is {value!r}; it must be a number, {allowed}")
    return float(value)


def _count(**setting: Any) -> int:
    ((name, value),) = setting.items()
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be a whole number ≥ 0")
    return int(value)


def _renoise(value: Any) -> str | float:
    if value in ("next", "current"):
        return str(value)
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and 0.0 < value < math.inf):
        raise ValueError(f'renoise is {value!r}; it must be "next", "current" or a noise level > 0')
    return float(value)
