"""Guided distillation (Meng et al. 2023): one network for D^w at every w, then in few steps.

w is Meng et al.'s here: ``D^w = (1+w)·D_c - w·D_∅``, the CFG scale minus 1, 0 for no guidance.
`kdpp.GuidanceConditioned` with its offset -1 makes it from a sampler's ``cond_scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdpp.digits.schedules import TIMESTEPS
from kdpp.lab.methods import (
    Draws,
    Job,
    Task,
    cosine,
    descend,
    frozen,
    method,
    plain_teacher,
    stretched,
    student_network,
    update_average,
)
from kdpp.lab.methods.progressive import (
    Grid,
    Halving,
    HalvingSettings,
    ddim,
    deterministic_counts,
    grid,
    guided,
    halved,
    pairs,
    share,
    weighted_error,
)
from kdpp.lab.networks import VEDenoiser
from kdpp.lab.settings import setting

PAPER = 'Meng et al. 2023, "On Distillation of Guided Diffusion Models"'


@method(
    "guided-stage-one",
    summary="one network for the guided teacher at every w, which it takes as an input",
    source=f"{PAPER}, Algorithm 1 (in the appendix: 2)",
)
class StageOne(Task):
    """At x = x0 + σ n, t uniform over the schedule and w over [w_min, w_max]::

        loss = ω(SNR)·|D_θ(x, σ, c, w) - ((1+w)·D_c - w·D_∅)|²

    The student starts as the teacher's conditional half: its embedding of w starts without effect.
    """

    @dataclass(frozen=True)
    class Settings:
        w_min: float = setting(0.0, "the smallest w, the CFG scale minus 1", low=-1)
        w_max: float = setting(4.0, "the largest w", low=-1)
        weighting: Literal["truncated", "snr+1", "snr", "constant"] = setting(
            "truncated", "of the squared error of x0: max(SNR, 1), SNR + 1, SNR or 1"
        )
        iterations: int = setting(1500, "optimisation steps", low=1)
        batch: int = setting(256, "images in a step", low=1)
        rate: float = setting(1e-3, "the first learning rate (Adam); it falls as a cosine", low=0)
        average: float = setting(0.99, "decay of the running average (EMA)", low=0, high=1)

    def __init__(self, job: Job) -> None:
        s: StageOne.Settings = job.settings
        if s.w_min > s.w_max:
            raise ValueError(f"w_min is {s.w_min!r} and w_max {s.w_max!r}; w_max must not be less")
        self.settings, self.teacher = s, plain_teacher(job)
        self.network = student_network(job, None, ["w"])
        self.average = frozen(self.network)
        self.student = VEDenoiser(self.network)
        self.iterations = s.iterations
        self.modules = {"network": self.network, "average": self.average}
        self.optimisers = {"network": torch.optim.Adam(self.network.parameters())}

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        images, labels = draws.batch(s.batch)
        sigma = self.network.sigma(draws.uniform(len(images)) * (TIMESTEPS - 1))
        w = s.w_min + (s.w_max - s.w_min) * draws.uniform(len(images))
        x = images + stretched(sigma, images) * draws.noise(images)
        with torch.no_grad():
            target = guided(self.teacher, labels, 1.0 + w)(x, sigma)
        loss = weighted_error(self.student(x, sigma, labels, w=w), target, sigma, s.weighting)
        descend(self.optimisers["network"], loss, cosine(i, s.iterations, s.rate))
        update_average(self.average, self.network, s.average)
        return {"loss": loss.detach()}

    def result(self) -> tuple[nn.Module, dict[str, Any]]:
        s = self.settings
        return self.average, {
            "sampler": "euler",
            "levels": None,
            "conditions": {"w": [s.w_min, s.w_max]},
            "guidance": None,
            "evaluations": 3 * s.iterations * s.batch,
        }


def stochastic_jumps(levels: Sequence[float]) -> Tensor:
    """The jumps of stochastic DDIM, (n, 3) of n + 1 levels: two levels down, the last one alone.

    From σ_i over σ_{i+1} to σ_{i+2}; from σ_{n-1} to σ_n at once, written (σ_{n-1}, σ_{n-1}, σ_n).
    """
    last = [(levels[-2], levels[-2], levels[-1])]
    return torch.tensor([*zip(levels, levels[1:], levels[2:]), *last])


@method(
    "guided-stage-two",
    summary="progressive distillation of the w-conditioned model, for plain or stochastic DDIM",
    source=f"{PAPER}, Algorithms 3 (deterministic) and 4 (stochastic), eqs. (4) to (7)",
)
class StageTwo(Halving):
    """From the w-conditioned teacher's DDIM steps to half as many, and so on; see `Halving`.

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
        w: float | None = setting(
            None, "a single w (the CFG scale minus 1); none: all that the teacher knows", low=-1
        )

    settings: Settings

    def __init__(self, job: Job) -> None:
        s: StageTwo.Settings = job.settings
        if s.kind == "deterministic":
            jumps = [pairs(grid(s.grid, 2 * count)) for count in deterministic_counts(s)]
        else:
            counts = halved(s.start_steps, s.steps)
            jumps = [stochastic_jumps(grid(s.grid, count)) for count in counts]
        super().__init__(job, jumps, s.w)

    def result(self) -> tuple[nn.Module, dict[str, Any]]:
        s = self.settings
        sampler = "euler" if s.kind == "deterministic" else "ddim_stochastic"
        return self.network, self.about(sampler, grid(s.grid, s.steps))


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
        w: float | None = setting(
            None, "a single w (the CFG scale minus 1); none: all that the teacher knows", low=-1
        )

    settings: Settings

    def __init__(self, job: Job) -> None:
        s: Encoder.Settings = job.settings
        assert job.teacher is not None
        self.lowest = float(job.teacher.network.log_sigmas[0].exp())
        counts = deterministic_counts(s)
        super().__init__(job, [pairs(rising(s.grid, 2 * n, self.lowest)) for n in counts], s.w)

    def result(self) -> tuple[nn.Module, dict[str, Any]]:
        s = self.settings
        return self.network, self.about("encode", rising(s.grid, s.steps, self.lowest))


@method(
    "naive-guided",
    summary="the baseline: both halves of CFG distilled, and guided when it samples",
    source=f"{PAPER}, Algorithm 6",
)
class Naive(Halving):
    """Conditional and unconditional student in one network, distilled side by side::

        x'  = D^w(x, σ) + (x - D^w(x, σ))·σ'/σ         the step of both, guided
        x̃_c = (1-s)·D^w(x, σ) + s·D_c(x', σ')          with s of `share`; x̃_∅ the same with D_∅

    For one label, x̃_c and x̃_∅ guided by w are the target of two guided steps. But x̃_∅ depends on
    the label that guided the first of them, and the unconditional student is not told it: it learns
    a mean over labels, and guidance multiplies what is missing, phase after phase.

    Without w each half takes both steps alone, and the student can be guided by any. It is sampled
    as its teacher is, with classifier-free guidance (CFG scale 1 + w) and two evaluations a step.

    The paper draws w and makes it an input of the network; here there is one, as in its "single-w".
    """

    @dataclass(frozen=True)
    class Settings(HalvingSettings):
        w: float | None = setting(
            1.0, "w of the guided steps (the CFG scale minus 1); none: each half goes alone", low=-1
        )

    settings: Settings

    def __init__(self, job: Job) -> None:
        s: Naive.Settings = job.settings
        plain_teacher(job)
        jumps = [pairs(grid(s.grid, 2 * count)) for count in deterministic_counts(s)]
        super().__init__(job, jumps, 0.0)

    def loss(
        self, phase: int, x: Tensor, jump: Sequence[Tensor], labels: Tensor, draws: Draws
    ) -> Tensor:
        cond = torch.cat((torch.full_like(labels, self.source.classes), labels))
        x = torch.cat((x, x))
        sigma, middle, end = (torch.cat((level, level)) for level in jump)
        with torch.no_grad():
            first = self.teacher(x, sigma, cond)
            if self.settings.w is not None:
                uncond, of_label = first.chunk(2)
                both = torch.lerp(uncond, of_label, 1.0 + self.settings.w)
                first = torch.cat((both, both))
            second = self.teacher(ddim(first, x, sigma, middle), middle, cond)
            target = torch.lerp(first, second, stretched(share(sigma, middle, end), x))
        return self.error(self.student(x, sigma, cond), target, sigma)

    def result(self) -> tuple[nn.Module, dict[str, Any]]:
        about = self.about("euler", grid(self.settings.grid, self.settings.steps))
        return self.network, about | {"guidance": None, "evaluations": 2 * about["evaluations"]}
