"""Progressive distillation: one step of the student for two of its teacher's, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kdpp.checks import check_count
from kdpp.kinds import Denoiser
from kdpp.lab.diffusion import Weighting, jump_target, noised, weighted_error
from kdpp.lab.methods import (
    Draws,
    Method,
    Training,
    descend,
    frozen,
    method,
    student_network,
)
from kdpp.lab.models import Model, Usage
from kdpp.lab.networks import CFG_MINUS_ONE, VEDenoiser, VNetwork
from kdpp.lab.schedules import Grid, grid
from kdpp.lab.settings import setting

__all__ = ["Halving", "HalvingSettings", "Progressive", "deterministic_counts", "halved", "pairs"]


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


class Halving(Method):
    """The phases of a progressive distillation; what a phase's jumps are is the method's.

    A phase's student starts from its teacher's weights with a new optimiser, its learning rate
    falls to 0, and it becomes the next phase's teacher. There is no average (EMA).

    A teacher that takes its guidance as an input has a student that takes it; the CFG scale is
    drawn from the range that the teacher was trained for, or is one. Of any other teacher the
    student has one CFG scale built in.

    Args:
        jumps: for each phase the table (n, 3) of (σ, σ', σ''): a student's step goes from σ to
            σ'', the teacher's by way of σ'.
        scale: the one CFG scale (1: no guidance); None draws it.

    Raises ValueError for a teacher with another input than guidance, and for a scale that is
    missing, outside the range that the teacher was trained for, or on top of guidance that the
    teacher has built in.
    """

    settings: HalvingSettings

    def __init__(self, training: Training, jumps: Sequence[Tensor], scale: float | None) -> None:
        assert training.teacher is not None
        self.settings, self.first_teacher = training.settings, training.teacher
        self.cfg_minus_one = _checked_range(self.first_teacher, scale)
        self.takes_guidance = self.first_teacher.guidance_range is not None
        self.jumps = [table.to(training.device) for table in jumps]
        self.network = student_network(training, None)
        self.previous = frozen(self.network)
        self.student, self.teacher = VEDenoiser(self.network), VEDenoiser(self.previous)
        self.iterations = len(jumps) * self.settings.iterations
        self.modules = {"network": self.network, "previous": self.previous}
        self.optimisers = {"network": torch.optim.Adam(self.network.parameters())}

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        phase, done = divmod(i, self.settings.iterations)
        self.begin(done)
        x, jump, labels = self.noised(phase, draws)
        loss = self.loss(phase, x, jump, labels, draws)
        self.learn(done, loss)
        return {"loss": loss.detach()}

    def begin(self, done: int) -> None:
        """At a phase's first step: the student becomes the teacher, the optimiser is new."""
        if done == 0:
            self.previous.load_state_dict(self.network.state_dict())
            self.optimisers["network"].state.clear()

    def noised(self, phase: int, draws: Draws) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """Images noised to where a jump begins (B, *shape), their jumps 3 × (B,), their labels."""
        images, labels = draws.batch(self.settings.batch)
        table = self.jumps[phase]
        jump = table[draws.integers(len(table), len(images))].unbind(1)
        return noised(images, jump[0], draws.noise(images)), jump, labels

    def learn(self, done: int, loss: Tensor) -> None:
        """The phase's step of the optimiser, after so many."""
        s = self.settings
        descend(self.optimisers["network"], loss, s.rate * (1 - done / s.iterations))

    def loss(
        self, phase: int, x: Tensor, jump: Sequence[Tensor], labels: Tensor, draws: Draws
    ) -> Tensor:
        """The weighted error of the student's estimate at x (B, *shape), jump 3 × (B,)."""
        given = {"cond": labels}
        if self.takes_guidance:
            given[CFG_MINUS_ONE] = draws.between(*self.cfg_minus_one, len(labels))
        with torch.no_grad():
            target = jump_target(self.phase_teacher(phase, **given), x, *jump)
        return self.error(self.student(x, jump[0], **given), target, jump[0])

    def error(self, estimate: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
        """`weighted_error` as the settings have it."""
        return weighted_error(estimate, target, sigma, self.settings.weighting)

    def phase_teacher(self, phase: int, **given: Tensor) -> Denoiser:
        """The phase's teacher for these labels (cond) and conditions; the first one under CFG."""
        if phase == 0 and not self.takes_guidance and self.cfg_minus_one != (0.0, 0.0):
            return self.first_teacher.with_cfg(given["cond"], 1.0 + self.cfg_minus_one[0])
        return partial(self.teacher, **given)

    def usage(self, sampler: str, levels: Sequence[float]) -> Usage:
        """How the result is sampled."""
        if self.takes_guidance:
            taken = {CFG_MINUS_ONE: self.cfg_minus_one}
            return Usage(sampler=sampler, levels=tuple(levels), conditions=taken)
        built_in = self.first_teacher.card.guidance
        if built_in is None:
            built_in = 1.0 + self.cfg_minus_one[0]
        return Usage(sampler=sampler, levels=tuple(levels), guidance=built_in)


def _checked_range(teacher: Model, scale: float | None) -> tuple[float, float]:
    """The CFG scale minus one, the least and the most that is drawn; see `Halving`."""
    if others := sorted(set(teacher.card.conditions) - {CFG_MINUS_ONE}):
        raise ValueError(f"the teacher takes {', '.join(others)} as an input; give one without")
    if teacher.guidance_range:
        low, high = teacher.guidance_range
        if scale is None:
            return teacher.card.conditions[CFG_MINUS_ONE]
        if not low <= scale <= high:
            raise ValueError(
                f"guidance is {scale!r}; the teacher was trained for CFG scales in [{low:g}, "
                f"{high:g}]"
            )
    elif scale is None:
        raise ValueError(
            "the teacher does not take its guidance as an input; give one that does "
            "(guided-stage-one makes it), or one CFG scale: guidance"
        )
    built_in = teacher.card.guidance
    if built_in is not None and scale != 1.0:
        raise ValueError(
            f"the teacher has the CFG scale {built_in:g} built in and cannot be guided again; give "
            "guidance 1, or the teacher that it was distilled from"
        )
    return scale - 1.0, scale - 1.0


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

    def __init__(self, training: Training) -> None:
        s: Progressive.Settings = training.settings
        jumps = [pairs(grid(s.grid, 2 * count)) for count in deterministic_counts(s)]
        super().__init__(training, jumps, s.guidance)

    def result(self) -> tuple[VNetwork, Usage]:
        return self.network, self.usage("euler", grid(self.settings.grid, self.settings.steps))


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
