"""DDIL: distillation on the states that student and teacher reach when they sample by turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpp.kinds import Denoiser
from kdpp.lab.diffusion import ddim, jump_target, noised, stretched
from kdpp.lab.methods import Draws, Method, Training, method, plain_teacher
from kdpp.lab.methods.consistency import Consistency
from kdpp.lab.methods.progressive import Progressive, deterministic_counts
from kdpp.lab.models import Usage
from kdpp.lab.networks import VEDenoiser, VNetwork
from kdpp.lab.schedules import Grid, grid
from kdpp.lab.settings import setting
from kdpp.rollouts import mixed_rollout

__all__ = ["DDIL", "Collected", "Reflected"]


class Reflected(nn.Module):
    """A denoiser whose estimates are clipped to the data's range, ``min(max(D, low), high)``.

    The gradient passes the clipping as if it were not there, so that an estimate outside the range
    is drawn back to a target inside, and left alone where the target is the range's end.

    Source: Lou and Ermon 2023, Reflected Diffusion Models; DDIL's supplement, section A.
    """

    def __init__(self, denoiser: Any, low: float, high: float) -> None:
        super().__init__()
        self.denoiser, self.low, self.high = denoiser, low, high

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        denoised: Tensor = self.denoiser(x, sigma, **extra_args)
        if torch.is_grad_enabled():
            return denoised + (denoised.clamp(self.low, self.high) - denoised).detach()
        return denoised.clamp(self.low, self.high)


class Collected(nn.Module):
    """The aggregated dataset (DAgger): the newest states of all rollouts, a ring of fixed size.

    Its tensors are buffers, so that a checkpoint of the training holds them.
    """

    x: Tensor
    labels: Tensor
    places: Tensor
    added: Tensor

    def __init__(self, capacity: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("x", torch.zeros(capacity, *shape))
        self.register_buffer("labels", torch.zeros(capacity, dtype=torch.int64))
        self.register_buffer("places", torch.zeros(capacity, dtype=torch.int64))
        self.register_buffer("added", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(int(self.added), len(self.labels))

    def add(self, x: Tensor, labels: Tensor, places: Tensor) -> None:
        """States (n, *shape), their labels and the indices of their levels (n,); the last stay."""
        n, capacity = len(x), len(self.labels)
        rows = (self.added + torch.arange(n, device=x.device))[-capacity:] % capacity
        for kept, new in ((self.x, x), (self.labels, labels), (self.places, places)):
            kept[rows] = new[-capacity:]
        self.added += n

    def clear(self) -> None:
        """Forget all."""
        self.added.zero_()

    def pick(self, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A state, label and level's index for each number (n,) in [0, 1); at least one is here."""
        rows = (uniform * len(self)).long()
        return self.x[rows], self.labels[rows], self.places[rows]


@dataclass(frozen=True)
class States:
    """What a step learns from.

    Attributes:
        x: (B, *shape).
        labels: int64 (B,).
        where: the base's own account of the levels, tensors of B rows.
    """

    x: Tensor
    labels: Tensor
    where: Tensor


@method(
    "ddil",
    summary="progressive or consistency distillation on states of mixed rollouts, too (DDIL)",
    source="Garrepalli et al. 2024, DDIL, Algorithms 1 and 2",
)
class DDIL(Method):
    """The base's loss at two kinds of states: noised images, and those that sampling comes by.

    Now and then student and teacher take turns on the way down from pure noise
    (`kdpp.mixed_rollout`), the student with probability β. All states go, with their labels and
    levels, into one dataset (DAgger), of which a share p of every batch is made; the rest comes
    from the forward process. What is learnt at a state is the base's, so that the teacher tells the
    student the way on from wherever it has got to. All estimates but those that are trained are
    reflected, clipped to the range of the data.

    progressive: a transition is one step of the phase's student or two of its teacher's. p and β
    begin anew in every phase, and so does the dataset.

    consistency: a transition is one step of the student's average or ``substeps`` of the teacher's,
    over the levels that it will be sampled on.

    Several processes collect each for itself; only the main one's states are saved.
    """

    @dataclass(frozen=True)
    class Settings:
        base: Literal["progressive", "consistency"] = setting("progressive", "what it is on top of")
        steps: int = setting(4, "steps of the finished student")
        start_steps: int = setting(64, "progressive: DDIM steps of the first teacher")
        substeps: int = setting(8, "consistency: the teacher's steps in a transition", low=1)
        grid: Grid = setting("divided", "the levels: trailing, or with the tail divided by 2.5")
        guidance: float = setting(2.0, "the CFG scale built in (1: none)")
        shares: tuple[float, float] = setting(
            (0.25, 0.5), "p: of collected states, early and late", low=0, high=1
        )
        turns: tuple[float, float] = setting(
            (0.15, 0.8), "β: of the student's turns, early and late", low=0, high=1
        )
        change: float = setting(0.6, "the share of a phase that is early", low=0, high=1)
        every: int = setting(20, "iterations from one collecting to the next", low=1)
        fresh: int = setting(1024, "states that are collected at a time", low=1)
        capacity: int = setting(8192, "states that are kept, the newest", low=1)
        reflected: bool = setting(True, "clip estimates to the range of the data")
        iterations: int = setting(800, "optimisation steps, shared by the phases", low=1)
        batch: int = setting(256, "images in a step", low=1)
        rate: float = setting(1e-3, "the first learning rate (Adam); it falls to 0", low=0)

    def __init__(self, training: Training) -> None:
        s: DDIL.Settings = training.settings
        self.settings = s
        self.bounds = float(training.data.images.min()), float(training.data.images.max())
        self.base: Base = BASES[s.base](training, self.reflect)
        self.collected = Collected(s.capacity, training.data.shape).to(training.device)
        self.iterations = self.base.method.iterations
        self.modules = {**self.base.method.modules, "collected": self.collected}
        self.optimisers = self.base.method.optimisers

    def reflect(self, denoise: Denoiser) -> Denoiser:
        """The denoiser, reflected if the settings say so."""
        return Reflected(denoise, *self.bounds) if self.settings.reflected else denoise

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        phase, done = divmod(i, self.base.phase_length)
        late = int(done >= s.change * self.base.phase_length)
        if done == 0:
            self.collected.clear()
        self.base.begin(phase, done)
        states = self.mixed(self.base.noised(phase, draws), phase, s.shares[late], draws)
        loss = self.base.learn(phase, done, states)
        if done % s.every == 0:
            self.collect(phase, s.turns[late], draws)
        return {"loss": loss.detach()}

    def mixed(self, states: States, phase: int, share: float, draws: Draws) -> States:
        """The states, about this share of them replaced by collected ones, once there are some."""
        if not len(self.collected):
            return states
        n = len(states.x)
        chosen = draws.uniform(n) < share
        x, labels, places = self.collected.pick(draws.uniform(n))
        where = self.base.at(phase, places)
        return States(
            torch.where(stretched(chosen, x), x, states.x),
            torch.where(chosen, labels, states.labels),
            torch.where(stretched(chosen, where), where, states.where),
        )

    def collect(self, phase: int, turns: float, draws: Draws) -> None:
        """Roll out from pure noise, and keep the states at all levels but the last."""
        levels, known = self.base.levels(phase), draws.data.labels
        count = -(-self.settings.fresh // (len(levels) - 1))
        labels = known[draws.integers(len(known), count)]
        x = levels[0] * draws.noise(draws.data.images[:1].expand(count, *draws.data.shape))
        coins = torch.Generator().manual_seed(int(draws.integers(2**62, 1)))
        rollout = mixed_rollout(
            self.reflect(self.base.student),
            self.reflect(partial(self.base.transition, phase)),
            x,
            torch.tensor(levels, dtype=torch.float64),
            teacher_substeps=self.base.substeps,
            teacher_probability=1.0 - turns,
            extra_args={"cond": labels},
            generator=coins,
            disable=True,
        )
        for place, state in enumerate(rollout.states[:-1]):
            self.collected.add(state, labels, torch.full_like(labels, place))

    def result(self) -> tuple[VNetwork, Usage]:
        return self.base.result()


class OnProgressive:
    """Progressive distillation as `DDIL` uses it; states are at jumps (B, 3), see `Halving`."""

    substeps = 1

    def __init__(self, training: Training, reflect: Callable[[Denoiser], Denoiser]) -> None:
        s: DDIL.Settings = training.settings
        plain_teacher(training)
        settings = Progressive.Settings(
            steps=s.steps, start_steps=s.start_steps, grid=s.grid, guidance=s.guidance,
            batch=s.batch, rate=s.rate,
        )  # fmt: skip
        phases = len(deterministic_counts(settings))
        if s.iterations < phases:
            raise ValueError(f"iterations is {s.iterations}; there are {phases} phases")
        self.phase_length = s.iterations // phases
        settings = replace(settings, iterations=self.phase_length)
        self.method, self.reflect = Progressive(replace(training, settings=settings)), reflect
        self.student = self.method.student

    def begin(self, phase: int, done: int) -> None:
        """A phase's first step makes the student its teacher."""
        self.method.begin(done)

    def noised(self, phase: int, draws: Draws) -> States:
        """Images, noised to where jumps begin."""
        x, jump, labels = self.method.noised(phase, draws)
        return States(x, labels, torch.stack(tuple(jump), 1))

    def at(self, phase: int, places: Tensor) -> Tensor:
        """The jumps from the levels of these places."""
        return self.method.jumps[phase][places]

    def levels(self, phase: int) -> list[float]:
        """What the phase's student is sampled on."""
        table = self.method.jumps[phase]
        return [*table[:, 0].tolist(), float(table[-1, 2])]

    def learn(self, phase: int, done: int, states: States) -> Tensor:
        """Take the step, and return its loss."""
        jump = states.where.unbind(1)
        with torch.no_grad():
            target = jump_target(self.teacher(phase, states.labels), states.x, *jump)
        estimate = self.reflect(self.student)(states.x, jump[0], cond=states.labels)
        loss = self.method.error(estimate, target, jump[0])
        self.method.learn(done, loss)
        return loss

    def teacher(self, phase: int, labels: Tensor) -> Denoiser:
        """The phase's teacher, reflected."""
        return self.reflect(self.method.phase_teacher(phase, cond=labels))

    def transition(self, phase: int, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        """Two of the teacher's steps from σ as the estimate of one: `jump_target`."""
        table = self.method.jumps[phase]
        row = table[(table[:, 0] - sigma[0]).abs().argmin()]
        return jump_target(self.teacher(phase, cond), x, *row.expand(len(x), 3).unbind(1))

    def result(self) -> tuple[VNetwork, Usage]:
        return self.method.result()


class OnConsistency:
    """Consistency distillation as `DDIL` uses it: the student has the teacher's network, states are
    at levels σ (B,)."""

    def __init__(self, training: Training, reflect: Callable[[Denoiser], Denoiser]) -> None:
        s: DDIL.Settings = training.settings
        settings = Consistency.Settings(
            network=None, guidance=s.guidance, iterations=s.iterations, batch=s.batch, rate=s.rate
        )
        self.method, self.reflect = Consistency(replace(training, settings=settings)), reflect
        self.phase_length, self.substeps = s.iterations, s.substeps
        self.source, self.guidance = plain_teacher(training), s.guidance
        self.grid = grid(s.grid, s.steps)
        self.learner = VEDenoiser(self.method.network)
        self.student = VEDenoiser(self.method.average)

    def begin(self, phase: int, done: int) -> None:
        """There is one phase."""

    def noised(self, phase: int, draws: Draws) -> States:
        """Images, noised to levels all over the schedule."""
        s = self.method.settings
        images, labels = draws.batch(s.batch)
        labels = draws.dropped(labels, s.dropout)
        sigma = self.method.network.sigma(draws.timesteps(len(images)))
        return States(noised(images, sigma, draws.noise(images)), labels, sigma)

    def at(self, phase: int, places: Tensor) -> Tensor:
        """The levels of these places."""
        return torch.tensor(self.grid, device=places.device)[places]

    def levels(self, phase: int) -> tuple[float, ...]:
        """What the student will be sampled on."""
        return self.grid

    def learn(self, phase: int, done: int, states: States) -> Tensor:
        """Take the step, and return its loss."""
        with torch.no_grad():
            target = self.target(states.x, states.where, states.labels)
        estimate = self.reflect(self.learner)(states.x, states.where, cond=states.labels)
        loss = F.mse_loss(estimate, target)
        self.method.learn(done, loss)
        return loss

    def target(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """The average's estimate at the end of the teacher's step from (x, σ), reflected."""
        t = self.student.sigma_to_t(sigma) - self.method.settings.skip
        end = self.student.t_to_sigma(t.clamp(min=0))
        estimate = self.reflect(self.source.with_cfg(labels, self.guidance))(x, sigma)
        reached = self.reflect(self.student)(ddim(estimate, x, sigma, end), end, cond=labels)
        return torch.where(stretched(t < 0, x), estimate, reached)

    def transition(self, phase: int, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        """The guided teacher."""
        return self.source.with_cfg(cond, self.guidance)(x, sigma)

    def result(self) -> tuple[VNetwork, Usage]:
        network, usage = self.method.result()
        return network, replace(usage, levels=self.grid)


Base = OnProgressive | OnConsistency
BASES: dict[str, type[Base]] = {"progressive": OnProgressive, "consistency": OnConsistency}
