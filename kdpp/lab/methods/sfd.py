"""Simple and Fast Distillation: the teacher's trajectory, learnt at the sampling levels alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import kdpp
from kdpp.kinds import Denoiser
from kdpp.lab.diffusion import ddim
from kdpp.lab.methods import (
    Draws,
    Method,
    Training,
    cosine,
    descend,
    method,
    plain_teacher,
    student_network,
)
from kdpp.lab.models import Usage
from kdpp.lab.networks import VEDenoiser, VNetwork
from kdpp.lab.schedules import Grid, grid
from kdpp.lab.settings import setting
from kdpp.rollouts import between

__all__ = ["SFD", "trajectory"]

Solver = Literal["dpmpp_3m", "heun", "euler"]
SOLVERS: dict[Solver, Callable[..., Tensor]] = {
    "dpmpp_3m": partial(kdpp.sample_dpmpp_3m_sde_tg, eta=0.0),
    "heun": kdpp.sample_heun_tg,
    "euler": kdpp.sample_euler_tg,
}


def trajectory(
    solver: Solver,
    model: Denoiser,
    x: Tensor,
    levels: Sequence[float],
    substeps: int,
    extra_args: Mapping[str, Any],
) -> list[Tensor]:
    """The states (B, *shape) at ``levels[1:]`` of the solver's path from x at ``levels[0]``.

    The solver runs once, with ``substeps`` steps between two levels (those of
    `kdpp.mixed_rollout`), so that a multistep one keeps its memory across the levels. "dpmpp_3m" is
    `kdpp.sample_dpmpp_3m_sde_tg` without noise.
    """
    fine = [level for pair in pairwise(levels) for level in between(*pair, substeps)[:-1]]
    sigmas = torch.tensor([*fine, levels[-1]], dtype=torch.float64)
    alone = kdpp.TeacherGuidedDenoiser(model, model, teacher_steps=0)
    begun: list[Tensor] = []
    end = SOLVERS[solver](
        alone, x, sigmas, extra_args, lambda step: begun.append(step["x"]), disable=True
    )
    return [*begun[substeps::substeps], end]


@method(
    "sfd",
    summary="the teacher's trajectory, learnt at the sampling levels alone (SFD)",
    source="Zhou et al. 2024, Simple and Fast Distillation of Diffusion Models, Algorithm 2",
)
class SFD(Method):
    """From x_N = x̃_N = σ_N n the teacher goes its way, K solver's steps between two levels, and the
    student, which starts from its weights, goes its own, learning at every step::

        x̃_n = Solver(x̃_{n+1}; σ_{n+1}, σ_n, K)
        x_n  = D_θ(x_{n+1}, σ_{n+1}) + (x_{n+1} - D_θ)·σ_n/σ_{n+1}
        θ   <- θ - rate·∇ |x_n - x̃_n|,   x_n <- detach(x_n)

    so that it sees the states that sampling will bring it to, and learns to make good for its
    earlier errors. No image is used, only labels. An iteration is one trajectory: N steps of Adam.
    The distance is the mean absolute difference.

    With several numbers of steps, iteration after iteration takes the next one, and N is an input
    of the network, "steps". With guidance 1 the student is distilled from both halves of the
    teacher alone and takes any CFG scale when it samples; else the scale is built in.

    Raises ValueError for settings that make no trajectory, or a teacher with its guidance inside.
    """

    @dataclass(frozen=True)
    class Settings:
        steps: tuple[int, ...] = setting((4,), "numbers of steps to be trained for")
        grid: Grid = setting("divided", "the levels: trailing, or with the tail divided by 2.5")
        t_min: float = setting(
            0.0, "the level at which the last step ends, for the grid's 0", low=0
        )
        solver: Solver = setting("dpmpp_3m", "the teacher's")
        substeps: int = setting(4, "steps of the teacher's in one of the student's, K", low=1)
        guidance: float = setting(2.0, "the CFG scale built in; 1: none, the student takes any")
        iterations: int = setting(
            300, "trajectories, of as many optimisation steps as they have", low=1
        )
        batch: int = setting(256, "trajectories side by side", low=1)
        rate: float = setting(2e-4, "the first learning rate (Adam); it falls as a cosine", low=0)
        dropout: float = setting(
            0.12, "share of labels that are dropped, with guidance 1", low=0, high=1
        )

    def __init__(self, training: Training) -> None:
        s: SFD.Settings = training.settings
        self.settings, self.teacher = s, plain_teacher(training)
        if not s.steps:
            raise ValueError("steps is empty; give the numbers of steps to be trained for")
        self.schedules = {n: schedule_to(s.grid, n, s.t_min) for n in s.steps}
        self.network = student_network(training, None, list(self.conditions))
        self.student = VEDenoiser(self.network)
        self.iterations = s.iterations
        self.modules = {"network": self.network}
        self.optimisers = {"network": torch.optim.Adam(self.network.parameters())}

    @property
    def conditions(self) -> dict[str, tuple[float, float]]:
        """The network is told the number of steps, where there are several."""
        numbers = self.settings.steps
        return {"steps": (min(numbers), max(numbers))} if len(self.schedules) > 1 else {}

    @property
    def built_in(self) -> float | None:
        """The CFG scale that the student has built in, if any."""
        return None if self.settings.guidance == 1.0 else self.settings.guidance

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        levels = self.schedules[s.steps[i % len(s.steps)]]
        images, labels = draws.batch(s.batch)
        if self.built_in is None:
            labels = draws.dropped(labels, s.dropout)
        x = levels[0] * draws.noise(images)
        path = trajectory(s.solver, self.teacher.denoiser, x, levels, s.substeps, {
            "cond": labels,
            "uncond": torch.full_like(labels, self.teacher.classes),
            "cond_scale": s.guidance,
        })  # fmt: skip
        given = {name: x.new_full(x.shape[:1], len(path)) for name in self.conditions}
        rate, losses = cosine(i, s.iterations, s.rate), []
        for (sigma, sigma_next), target in zip(pairwise(levels), path):
            start, end = x.new_full(x.shape[:1], sigma), x.new_full(x.shape[:1], sigma_next)
            moved = ddim(self.student(x, start, labels, **given), x, start, end)
            loss = F.l1_loss(moved, target)
            descend(self.optimisers["network"], loss, rate)
            losses.append(loss.detach())
            x = moved.detach()
        return {"loss": torch.stack(losses).mean(), "last": losses[-1]}

    def result(self) -> tuple[VNetwork, Usage]:
        return self.network, Usage(
            sampler="euler",
            levels=self.schedules[self.settings.steps[-1]],
            conditions=self.conditions,
            guidance=self.built_in,
        )


def schedule_to(kind: Grid, steps: int, t_min: float) -> tuple[float, ...]:
    """The grid's levels, t_min in the place of 0; ValueError unless it is below the others."""
    levels = grid(kind, steps)
    if t_min >= levels[-2]:
        raise ValueError(
            f"t_min is {t_min!r}; {steps} steps start their last one at {levels[-2]:.3g}, and it "
            "must go down"
        )
    return (*levels[:-1], t_min)
