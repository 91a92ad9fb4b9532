"""Guided distillation (Meng et al. 2023): one network for every CFG scale, then in few steps.

The scale is an input of the network. Settings and messages speak of the CFG scale (1: no guidance),
as everywhere; the network takes it minus one, which is the paper's w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdpp.lab.diffusion import (
    Weighting,
    cfg_mix,
    ddim,
    noised,
    second_share,
    stretched,
    weighted_error,
)
from kdpp.lab.methods import (
    Draws,
    Method,
    Training,
    check_range,
    cosine,
    descend,
    frozen,
    method,
    plain_teacher,
    student_network,
    update_average,
)
from kdpp.lab.methods.progressive import (
    Halving,
    HalvingSettings,
    deterministic_counts,
    halved,
    pairs,
)
from kdpp.lab.models import Usage
from kdpp.lab.networks import CFG_MINUS_ONE, VEDenoiser, VNetwork
from kdpp.lab.schedules import Grid, grid
from kdpp.lab.settings import setting

PAPER = 'Meng et al. 2023, "On Distillation of Guided Diffusion Models"'


@method(
    "guided-stage-one",
    summary="one network for the guided teacher at every CFG scale, which it takes as an input",
    source=f"{PAPER}, Algorithm 1 (in the appendix: 2)",
)
class StageOne(Method):
    """At x = x0 + σ n, t uniform over the schedule and the CFG scale over ``guidance_range``::

        loss = ω(SNR)·|D_θ(x, σ, c, scale - 1) - (D_∅ + scale·(D_c - D_∅))|²

    The student starts as the teacher's conditional half: its embedding of the scale starts without
    effect.
    """

    @dataclass(frozen=True)
    class Settings:
        guidance_range: tuple[float, float] = setting((1.0, 5.0), "least and most CFG scale", low=0)
        weighting: Weighting = setting(
            "truncated", "of the squared error of x0: max(SNR, 1), SNR + 1, SNR or 1"
        )
        iterations: int = setting(1500, "optimisation steps", low=1)
        batch: int = setting(256, "images in a step", low=1)
        rate: float = setting(1e-3, "the first learning rate (Adam); it falls as a cosine", low=0)
        average: float = setting(0.99, "decay of the running average (EMA)", low=0, high=1)

        def __post_init__(self) -> None:
            check_range("guidance_range", self.guidance_range)

    def __init__(self, training: Training) -> None:
        s: StageOne.Settings = training.settings
        self.settings, self.teacher = s, plain_teacher(training)
        self.cfg_minus_one = s.guidance_range[0] - 1.0, s.guidance_range[1] - 1.0
        self.network = student_network(training, None, [CFG_MINUS_ONE])
        self.average = frozen(self.network)
        self.student = VEDenoiser(self.network)
        self.iterations = s.iterations
        self.modules = {"network": self.network, "average": self.average}
        self.optimisers = {"network": torch.optim.Adam(self.network.parameters())}

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        images, labels = draws.batch(s.batch)
        sigma = self.network.sigma(draws.timesteps(len(images)))
        cfg_minus_one = draws.between(*self.cfg_minus_one, len(images))
        x = noised(images, sigma, draws.noise(images))
        with torch.no_grad():
            target = self.teacher.with_cfg(labels, 1.0 + cfg_minus_one)(x, sigma)
        estimate = self.student(x, sigma, labels, **{CFG_MINUS_ONE: cfg_minus_one})
        loss = weighted_error(estimate, target, sigma, s.weighting)
        descend(self.optimisers["network"], loss, cosine(i, s.iterations, s.rate))
        update_average(self.average, self.network, s.average)
        return {"loss": loss.detach()}

    def result(self) -> tuple[VNetwork, Usage]:
        taken = {CFG_MINUS_ONE: self.cfg_minus_one}
        return self.average, Usage(sampler="euler", conditions=taken)


def stochastic_jumps(levels: Sequence[float]) -> Tensor:
    """The jumps of stochastic DDIM, (n, 3) of n + 1 levels: two levels down, the last one alone.

    From σ_i over σ_{i+1} to σ_{i+2}; from σ_{n-1} to σ_n at once, written (σ_{n-1}, σ_{n-1}, σ_n).
    """
    last = [(levels[-2], levels[-2], levels[-1])]
    return torch.tensor([*zip(levels, levels[1:], levels[2:]), *last])


@method(
    "guided-stage-two",
    summary="progressive distillation of a model that takes its guidance, for DDIM, plain or noisy",
    source=f"{PAPER}, Algorithms 3 (deterministic) and 4 (stochastic), eqs. (4) to (7)",
)
class StageTwo(Halving):
    """From DDIM steps of a teacher that takes its guidance to half as many, and so on; see
    `Halving`.

    deterministic: a student of N steps makes one of two teacher's steps of length 1/2N. It is
    sampled by Euler, which is DDIM.

    stochastic: a student of N steps makes one of two teacher's steps of length 1/N, so that its own
    are twice as long as the grid's; the last one, from the lowest level to 0, is one teacher's
    step. It is sampled by `kdpp.sample_ddim_stochastic_tg`, a step down and noise half of the way
    up again. The first phase's student has as many steps as its teacher.
    """

    @dataclass(frozen=True)
    class Settings(HalvingSettings):
        kind: Literal["deterministic", "stochastic"] = setting(
            "deterministic", "the sampling that the student is made for"
        )
        guidance: float | None = setting(
            None, "a single CFG scale; none: all that the teacher was trained for", low=0
        )

    settings: Settings

    def __init__(self, training: Training) -> None:
        s: StageTwo.Settings = training.settings
        if s.kind == "deterministic":
            jumps = [pairs(grid(s.grid, 2 * count)) for count in deterministic_counts(s)]
        else:
            counts = halved(s.start_steps, s.steps)
            jumps = [stochastic_jumps(grid(s.grid, count)) for count in counts]
        super().__init__(training, jumps, s.guidance)

    def result(self) -> tuple[VNetwork, Usage]:
        s = self.settings
        sampler = "euler" if s.kind == "deterministic" else "ddim_stochastic"
        return self.network, self.usage(sampler, grid(s.grid, s.steps))


def rising(kind: Grid, steps: int, lowest: float) -> list[float]:
    """The levels of an encoding in so many steps: the grid's upwards, from ``lowest`` instead of 0.

    Raises ValueError where the grid has a level that is not above the lowest.
    """
    levels = [lowest, *reversed(grid(kind, steps)[:-1])]
    if levels[1] <= lowest:
        raise ValueError(
            f"a grid of {steps} steps goes down to {levels[1]:.3g}, and the network to {lowest:.3g}"
            "; take fewer start_steps"
        )
    return levels


@method(
    "encoder",
    summary="reversed DDIM in few steps, from an image up to its latent noise",
    source=f"{PAPER}, Algorithm 5",
)
class Encoder(Halving):
    """As `guided-stage-two`, deterministic, with every step upwards; see `Halving`.

    An encoding starts at the lowest level that the teacher was trained on, in the place of 0, where
    there is nothing to be told from. For `kdpp.encode`; the levels of the result rise.
    """

    @dataclass(frozen=True)
    class Settings(HalvingSettings):
        guidance: float | None = setting(
            None, "a single CFG scale; none: all that the teacher was trained for", low=0
        )

    settings: Settings

    def __init__(self, training: Training) -> None:
        s: Encoder.Settings = training.settings
        assert training.teacher is not None
        self.lowest = float(training.teacher.network.log_sigmas[0].exp())
        counts = deterministic_counts(s)
        jumps = [pairs(rising(s.grid, 2 * count, self.lowest)) for count in counts]
        super().__init__(training, jumps, s.guidance)

    def result(self) -> tuple[VNetwork, Usage]:
        s = self.settings
        return self.network, self.usage("encode", rising(s.grid, s.steps, self.lowest))


@method(
    "naive-guided",
    summary="the baseline: both halves of CFG distilled, and guided when it samples",
    source=f"{PAPER}, Algorithm 6",
)
class Naive(Halving):
    """Conditional and unconditional student in one network, distilled side by side::

        x'  = D(x, σ) + (x - D(x, σ))·σ'/σ             the step of both, D guided
        x̃_c = (1-s)·D(x, σ) + s·D_c(x', σ')            with s of `second_share`; x̃_∅ with D_∅

    For one label, x̃_c and x̃_∅ under the same guidance are the target of two guided steps. But x̃_∅
    depends on the label that guided the first of them, and the unconditional student is not told
    it: it learns a mean over labels, and guidance multiplies what is missing, phase after phase.

    Without ``guidance`` each half takes both steps alone, and the student can be guided by any CFG
    scale. It is sampled as its teacher is, with classifier-free guidance and two evaluations a
    step.

    The paper draws the scale and makes it an input of the network; here there is one, as in its
    "single-w".
    """

    @dataclass(frozen=True)
    class Settings(HalvingSettings):
        guidance: float | None = setting(
            2.0, "the CFG scale of the guided steps; none: each half goes alone", low=0
        )

    settings: Settings

    def __init__(self, training: Training) -> None:
        s: Naive.Settings = training.settings
        plain_teacher(training)
        jumps = [pairs(grid(s.grid, 2 * count)) for count in deterministic_counts(s)]
        super().__init__(training, jumps, 1.0)

    def loss(
        self, phase: int, x: Tensor, jump: Sequence[Tensor], labels: Tensor, draws: Draws
    ) -> Tensor:
        cond = torch.cat((torch.full_like(labels, self.first_teacher.classes), labels))
        x = torch.cat((x, x))
        sigma, middle, end = (torch.cat((level, level)) for level in jump)
        with torch.no_grad():
            first = self.teacher(x, sigma, cond)
            if self.settings.guidance is not None:
                uncond, of_label = first.chunk(2)
                guided = cfg_mix(uncond, of_label, self.settings.guidance)
                first = torch.cat((guided, guided))
            second = self.teacher(ddim(first, x, sigma, middle), middle, cond)
            target = torch.lerp(first, second, stretched(second_share(sigma, middle, end), x))
        return self.error(self.student(x, sigma, cond), target, sigma)

    def result(self) -> tuple[VNetwork, Usage]:
        s = self.settings
        return self.network, Usage(sampler="euler", levels=grid(s.grid, s.steps))
