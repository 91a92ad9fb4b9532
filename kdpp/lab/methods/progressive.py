"""Progressive distillation: one step of the student for two of its teacher's, again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdpp.checks import check_count
from kdpp.digits.schedules import schedule, trailing
from kdpp.lab.methods import (
    Draws,
    Job,
    Task,
    descend,
    frozen,
    method,
    stretched,
    student_network,
)
from kdpp.lab.models import Model
from kdpp.lab.networks import VEDenoiser
from kdpp.lab.settings import setting

__all__ = [
    "Halving",
    "HalvingSettings",
    "Weighting",
    "ddim",
    "grid",
    "guided",
    "halved",
    "jump_target",
    "pairs",
    "share",
    "weighted_error",
]

Estimate = Callable[[Tensor, Tensor], Tensor]
"""``(x (B, *shape), σ (B,)) -> D (B, *shape)``."""
Grid = Literal["divided", "trailing"]
Weighting = Literal["truncated", "snr+1", "snr", "constant"]


def ddim(denoised: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """DDIM's step ``D + (x - D)·σ'/σ``, up or down; the levels are (B,), one for each sample."""
    return torch.lerp(denoised, x, stretched(sigma_next / sigma, x))


def share(sigma: Tensor, middle: Tensor, end: Tensor) -> Tensor:
    """The second estimate's share of `jump_target`: ``(1 - σ''/σ') / (1 - σ''/σ)``, (B,)."""
    return (sigma * (middle - end)) / (middle * (sigma - end))


def jump_target(denoise: Estimate, x: Tensor, sigma: Tensor, middle: Tensor, end: Tensor) -> Tensor:
    """The estimate x̃ with which one DDIM step σ → σ'' lands where two of ``denoise`` land.

        x' = D(x, σ) + (x - D(x, σ))·σ'/σ
        x̃ = (x'' - (σ''/σ)·x) / (1 - σ''/σ) = (1-s)·D(x, σ) + s·D(x', σ')

    with s of `share`: a mean of the two estimates, so that nothing cancels where the steps are
    small. At σ'' = 0 it is the second estimate. It holds upwards too (σ < σ' < σ''), and σ' = σ
    stands for a single step, σ → σ''.

    Args:
        x: ``(B, *shape)``, at the level σ.
        sigma, middle, end: (B,), σ, σ' > 0 and σ''.

    Source: Salimans and Ho 2022, Algorithm 2; Meng et al. 2023, Algorithms 3 to 5, where the
    VP's α'' - (σ''/σ)α divided by α'' is the 1 - σ''/σ of VE.
    """
    first = denoise(x, sigma)
    second = denoise(ddim(first, x, sigma, middle), middle)
    return torch.lerp(first, second, stretched(share(sigma, middle, end), x))


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "truncated": lambda snr: snr.clamp(min=1),
    "snr+1": lambda snr: snr + 1,
    "snr": lambda snr: snr,
    "constant": torch.ones_like,
}
"""ω as a function of the signal-to-noise ratio 1/σ²."""


def weighted_error(estimate: Tensor, target: Tensor, sigma: Tensor, weighting: Weighting) -> Tensor:
    """The mean over all values of ``ω·(D - x̃)²``, 0-dim, with ω of SNR = 1/σ².

    - truncated: max(SNR, 1), the larger of the errors of x0 and of ε
    - snr+1: SNR + 1, the error of v
    - snr: SNR, the error of ε
    - constant: 1, the error of x0

    Source: Salimans and Ho 2022, section 4.
    """
    weight = WEIGHTS[weighting](sigma**-2)
    return (stretched(weight, estimate) * (estimate - target) ** 2).mean()


def guided(teacher: Model, labels: Tensor, scale: Tensor | float) -> Estimate:
    """``D^w = D_∅ + scale·(D_c - D_∅)`` of a teacher, both halves in one call.

    ``scale`` is the CFG scale, one for all or one for each sample (B,).
    """
    both_labels = torch.cat((torch.full_like(labels, teacher.classes), labels))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        twice = torch.cat((x, x)), torch.cat((sigma, sigma))
        uncond, cond = teacher.denoiser(*twice, cond=both_labels).chunk(2)
        factor = stretched(scale, x) if isinstance(scale, Tensor) else scale
        return torch.lerp(uncond, cond, factor)

    return denoise


def grid(kind: Grid, steps: int) -> tuple[float, ...]:
    """The levels of so many steps, the last one 0; every other one of twice as many.

    Raises ValueError for a number of steps outside [1, 1000].
    """
    return schedule(steps) if kind == "divided" else trailing(steps)


def halved(start: int, steps: int) -> list[int]:
    """``[start, start/2, …, steps]``; ValueError where halving does not lead there."""
    check_count("steps", steps, 1)
    counts = [check_count("start_steps", start, 1)]
    while counts[-1] > steps and counts[-1] % 2 == 0:
        counts.append(counts[-1] // 2)
    if counts[-1] != steps:
        raise ValueError(
            f"halving does not lead from start_steps={start} to steps={steps}; take for "
            f"start_steps {steps} times a power of 2, such as {16 * steps}"
        )
    return counts


def pairs(levels: Sequence[float]) -> Tensor:
    """The jumps (σ, σ', σ'') over two steps each: (n, 3) of 2n + 1 levels."""
    table = torch.tensor(levels)
    return torch.stack((table[:-1:2], table[1::2], table[2::2]), dim=1)


@dataclass(frozen=True)
class HalvingSettings:
    """What every progressive distillation is told."""

    steps: int = setting(4, "steps of the finished student", low=1)
    start_steps: int = setting(
        64, "DDIM steps of the first teacher: steps times a power of 2", low=1
    )
    grid: Grid = setting(
        "divided", "the levels: at even timesteps, or all but the first of those divided by 2.5"
    )
    weighting: Weighting = setting(
        "truncated", "of the squared error of x0: max(SNR, 1), SNR + 1, SNR or 1"
    )
    iterations: int = setting(200, "optimisation steps of each phase", low=1)
    batch: int = setting(256, "images in a step", low=1)
    rate: float = setting(
        1e-3, "the first learning rate of a phase (Adam); it falls linearly to 0", low=0
    )


class Halving(Task):
    """The phases of a progressive distillation; what a phase's jumps are is the method's.

    A phase's student starts from its teacher's weights with a new optimiser, its learning rate
    falls to 0, and it becomes the next phase's teacher. There is no average (EMA).

    A teacher that takes w as an input has a student that takes it; w is drawn from the range that
    the teacher was trained for, or is one. Of any other teacher the student has one w built in.

    Args:
        jumps: for each phase the table (n, 3) of (σ, σ', σ''): a student's step goes from σ to
            σ'', the teacher's by way of σ'.
        w: the one guidance weight, Meng et al.'s (0: none, the CFG scale minus 1); None draws it.

    Raises ValueError for a teacher with another input than w; where w is needed, outside the range
    that the teacher was trained for, or on top of guidance that the teacher has built in.
    """

    settings: HalvingSettings

    def __init__(self, job: Job, jumps: Sequence[Tensor], w: float | None) -> None:
        assert job.teacher is not None
        self.settings, self.source = job.settings, job.teacher
        self.w = _check_w(job.teacher, w)
        self.jumps = [table.to(job.device) for table in jumps]
        self.network = student_network(job, None, ["w"] if self.source.needs_w else [])
        self.previous = frozen(self.network)
        self.student, self.teacher = VEDenoiser(self.network), VEDenoiser(self.previous)
        self.iterations = len(jumps) * self.settings.iterations
        self.modules = {"network": self.network, "previous": self.previous}
        self.optimisers = {"network": torch.optim.Adam(self.network.parameters())}

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        phase, done = divmod(i, s.iterations)
        if done == 0:
            self.previous.load_state_dict(self.network.state_dict())
            self.optimisers["network"].state.clear()
        images, labels = draws.batch(s.batch)
        table = self.jumps[phase]
        jump = table[draws.integers(len(table), len(images))].unbind(1)
        x = images + stretched(jump[0], images) * draws.noise(images)
        loss = self.loss(phase, x, jump, labels, draws)
        descend(self.optimisers["network"], loss, s.rate * (1 - done / s.iterations))
        return {"loss": loss.detach()}

    def loss(
        self, phase: int, x: Tensor, jump: Sequence[Tensor], labels: Tensor, draws: Draws
    ) -> Tensor:
        """The weighted error of the student's estimate at x (B, *shape), jump 3 × (B,)."""
        given = {"cond": labels, **self.conditions(draws, len(labels))}
        teacher: Estimate = partial(self.teacher, **given)
        if phase == 0 and self.halves == 2:
            teacher = guided(self.source, labels, 1.0 + self.w[0])
        with torch.no_grad():
            target = jump_target(teacher, x, *jump)
        return self.error(self.student(x, jump[0], **given), target, jump[0])

    def error(self, estimate: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
        """`weighted_error` as the settings have it."""
        return weighted_error(estimate, target, sigma, self.settings.weighting)

    def conditions(self, draws: Draws, n: int) -> dict[str, Tensor]:
        """The network's further inputs, (n,)."""
        if not self.source.needs_w:
            return {}
        low, high = self.w
        return {"w": low + (high - low) * draws.uniform(n)}

    @property
    def halves(self) -> int:
        """Evaluations that the first teacher needs for one estimate: 2 with CFG."""
        return 1 if self.source.needs_w or self.w == (0.0, 0.0) else 2

    def about(self, sampler: str, levels: Sequence[float]) -> dict[str, Any]:
        """The result's part of a checkpoint's ``about``."""
        takes_w, built_in = self.source.needs_w, self.source.about["guidance"]
        phases = 3 * len(self.jumps) + 2 * (self.halves - 1)
        return {
            "sampler": sampler,
            "levels": list(levels),
            "conditions": {"w": list(self.w)} if takes_w else {},
            "guidance": None if takes_w else built_in or 1.0 + self.w[0],
            "evaluations": phases * self.settings.iterations * self.settings.batch,
        }


def _check_w(teacher: Model, w: float | None) -> tuple[float, float]:
    """The range that w is drawn from, one point for a single w; see `Halving`."""
    if others := sorted(set(teacher.about["conditions"]) - {"w"}):
        raise ValueError(f"the teacher takes {', '.join(others)} as an input; give one without")
    if teacher.needs_w:
        low, high = teacher.about["conditions"]["w"]
        if w is not None and not low <= w <= high:
            raise ValueError(f"w is {w!r}; the teacher was trained for w in [{low:g}, {high:g}]")
        return (low, high) if w is None else (w, w)
    if w is None:
        raise ValueError(
            "the teacher does not take w as an input; give one that does (guided-stage-one makes "
            "it), or one w"
        )
    built_in = teacher.about["guidance"]
    if built_in is not None and w != 0.0:
        raise ValueError(
            f"the teacher has the CFG scale {built_in:g} built in and cannot be guided again; give "
            "a scale of 1 (w = 0), or the teacher that it was distilled from"
        )
    return w, w


@method(
    "progressive",
    summary="progressive distillation, the guidance built in: half as many steps, phase by phase",
    source="Salimans and Ho 2022, Algorithm 2; CFG in the first phase's teacher",
)
class Progressive(Halving):
    """From the guided teacher's DDIM steps to half as many, and so on; see `Halving`.

    Sampled by Euler, which is DDIM, on the levels that it was trained on.
    """

    @dataclass(frozen=True)
    class Settings(HalvingSettings):
        guidance: float = setting(2.0, "the CFG scale that the student has built in (1: none)")

    settings: Settings

    def __init__(self, job: Job) -> None:
        s: Progressive.Settings = job.settings
        counts = deterministic_counts(s)
        jumps = [pairs(grid(s.grid, 2 * count)) for count in counts]
        super().__init__(job, jumps, s.guidance - 1.0)

    def result(self) -> tuple[nn.Module, dict[str, Any]]:
        return self.network, self.about("euler", grid(self.settings.grid, self.settings.steps))


def deterministic_counts(settings: HalvingSettings) -> list[int]:
    """The steps of each phase's student, which are half of its teacher's.

    Raises ValueError where halving does not lead to ``steps``, or there is nothing to halve.
    """
    counts = halved(settings.start_steps, settings.steps)[1:]
    if not counts:
        raise ValueError(
            f"start_steps and steps are both {settings.steps}; the teacher must take more steps"
        )
    return counts
