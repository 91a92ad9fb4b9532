"""Reflection: a strong step down and a weak one up again, before the solver takes its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdpp.algebra import Place, Weigher, WeightedSum
from kdpp.asking import Denoise, Evaluation, bind
from kdpp.checks import check_number
from kdpp.kinds import Denoiser, check_denoiser
from kdpp.plan import Space, Step
from kdpp.steps import NoiseRange, Steps, chosen, one_by_one, read_steps
from kdpp.update import ddim

__all__ = ["Mirror", "Reflection", "plan_mirrors"]


@dataclass(frozen=True)
class Reflection:
    """Before the first steps: a strong step down, then a weak step of inversion up again.

    With the student's D_θ, at a step from σ to σ'::

        x̃ = D_θ(x, σ) + (x - D_θ(x, σ))/σ·σ'        down, DDIM's step
        x := D_ψ(x̃, σ') + (x̃ - D_ψ(x̃, σ'))/σ'·σ     up, `kdpp.encode`'s

    and the solver takes its step from there. x moves from what the weak model holds for likely to
    what the strong one does: to first order by ``(σ - σ') (D_θ - D_ψ)/σ'``, none if both agree and
    their estimates stay as they are along the step. Two evaluations more in each of its steps. It
    changes where the step starts and nothing of the solver; a multistep solver keeps its memory.

    Args (fields):
        weak: ψ: a worse model, the one without its LoRA (`kdpp.without_adapters`), or the student
            itself with another CFG scale.
        steps: the reflected ones: the first k, indices (negative ones from the end), or a
            `NoiseRange`; one to σ = 0 cannot be.
        cfg_scale: the weak model's CFG scale. None: the student's, ``extra_args["cond_scale"]``.
        extra_args: entries that take the place of the sampler's for the weak model.
        strong: who steps down; None: the student.

    Raises TypeError or ValueError for a setting outside its range; a run does for a range that
    holds no step and for a step to σ = 0 asked for by its index.
    Source: Bai et al. 2025, "Weak-to-Strong Diffusion with Reflection", Algorithm 1; with two CFG
    scales of one model Bai et al. 2024, "Zigzag Diffusion Sampling".
    """

    weak: Denoiser
    steps: Steps = 1
    cfg_scale: float | None = None
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    strong: Denoiser | None = None

    def __post_init__(self) -> None:
        check_denoiser(self.weak, "weak")
        if self.strong is not None:
            check_denoiser(self.strong, "strong")
        object.__setattr__(self, "steps", read_steps("reflection's steps", self.steps))
        if self.cfg_scale is not None:
            check_number("cfg_scale", self.cfg_scale)
        if not isinstance(self.extra_args, Mapping):
            raise TypeError(f"extra_args is {self.extra_args!r}; it must be a dict")
        if "cond_scale" in self.extra_args:
            raise ValueError("the weak model's CFG scale is cfg_scale; take it out of extra_args")
        object.__setattr__(self, "extra_args", dict(self.extra_args))


class Mirror(NamedTuple):
    """A reflected step in numbers: what the strong denoiser is asked, and then the weak one."""

    strong: Evaluation
    weak: Evaluation


def plan_mirrors(
    reflection: Reflection | None, student: Denoiser, steps: Sequence[Step], space: Space
) -> tuple[Mirror | None, ...]:
    """What every step asks for its reflection; errors as in `Reflection`."""
    if reflection is None:
        return (None,) * len(steps)
    able = [i for i, step in enumerate(steps) if 0.0 < step.sigma_next < step.sigma]
    found = set(chosen("reflection's steps", reflection.steps, steps, able, space))
    if isinstance(reflection.steps, NoiseRange) and steps and not found:
        raise ValueError(
            f"reflection's steps is {reflection.steps}, which holds no step down to a level above 0"
        )
    to_zero = [i for i, step in enumerate(steps) if step.sigma_next == 0.0 < step.sigma]
    if one_by_one(reflection.steps):
        for i in chosen("reflection's steps", reflection.steps, steps, to_zero, space):
            raise ValueError(
                f"reflection's steps holds step {i}, which goes to σ = 0, from where no step of "
                "inversion leads up"
            )
    down, up = reflection.strong or student, reflection.weak
    by_strong, by_weak = (
        Weigher(one, steps, space) if isinstance(one, WeightedSum) else None for one in (down, up)
    )

    def asked(weigher: Weigher | None, i: int, level: float, end: float) -> Evaluation:
        start = space.level(steps[i].sigma)
        shares = weigher.shares(Place(level, start, i)) if weigher else ()
        return Evaluation(level, end, shares)

    def mirror(i: int) -> Mirror:
        high, low = space.level(steps[i].stages[0].sigma), space.level(steps[i].sigma_next)
        return Mirror(asked(by_strong, i, high, low), asked(by_weak, i, low, high))

    return tuple(mirror(i) if i in found else None for i in range(len(steps)))


class Bound(NamedTuple):
    """A reflected step with its networks bound."""

    mirror: Mirror
    strong: Denoise
    weak: Denoise

    @classmethod
    def of(
        cls, mirror: Mirror, reflection: Reflection, student: Denoiser, x: Tensor,
        extra_args: Mapping[str, Any], dtype: torch.dtype | None, max_batch: int | None,
    ) -> Bound:  # fmt: skip
        strong = bind(
            reflection.strong or student, "strong model", x, extra_args, at=mirror.strong,
            dtype=dtype, max_batch=max_batch,
        )  # fmt: skip
        weak = bind(
            reflection.weak, "weak model", x, {**extra_args, **reflection.extra_args},
            reflection.cfg_scale, at=mirror.weak, dtype=dtype, max_batch=max_batch,
        )  # fmt: skip
        return cls(mirror, strong, weak)

    def __call__(self, x: Tensor) -> Tensor:
        """The point from which the solver takes its step."""
        high, low = self.mirror.strong.level, self.mirror.weak.level
        for denoise, level, end in ((self.strong, high, low), (self.weak, low, high)):
            denoised, _ = denoise(x, x.new_full(x.shape[:1], level))
            x = ddim(denoised, x, level, end)
        return x
