"""DDIL: distillation on the states that student and teacher reach when they sample by turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpp.digits.schedules import TIMESTEPS
from kdpp.lab.methods import (
    Draws,
    Job,
    Task,
    cosine,
    descend,
    method,
    plain_teacher,
    stretched,
    update_average,
)
from kdpp.lab.methods.consistency import Consistency
from kdpp.lab.methods.progressive import (
    Grid,
    Progressive,
    ddim,
    deterministic_counts,
    grid,
    guided,
    jump_target,
)
from kdpp.lab.networks import VEDenoiser
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


@method(
    "ddil",
    summary="progressive or consistency distillation on states of mixed rollouts, too (DDIL)",
    source="Garrepalli et al. 2024, DDIL, Algorithms 1 and 2",
)
class DDIL(Task):
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
        shares: tuple[float, ...] = setting(
            (0.25, 0.5), "p: of collected states, early and late", low=0, high=1
        )
        turns: tuple[float, ...] = setting(
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

        def __post_init__(self) -> None:
            for name in ("shares", "turns"):
                values = getattr(self, name)
                if len(values) != 2:
                    raise ValueError(f"{name} is {values}; it must be two, early and late")

    own: Settings
    collected: Collected

    def __new__(cls, job: Job) -> DDIL:
        return super().__new__(BASES[job.settings.base] if cls is DDIL else cls)

    def prepare(self, job: Job) -> None:
        """Make room for the states; the base is ready."""
        self.own = job.settings
        self.bounds = float(job.data.images.min()), float(job.data.images.max())
        self.collected = Collected(self.own.capacity, job.data.shape).to(job.device)
        self.modules = {**self.modules, "collected": self.collected}

    def reflect(self, denoise: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The denoiser, reflected if the settings say so."""
        return Reflected(denoise, *self.bounds) if self.own.reflected else denoise

    def late(self, done: int, iterations: int) -> int:
        """0 in the early part of a phase, 1 in the late one: an index of ``shares``, ``turns``."""
        return int(done >= self.own.change * iterations)

    def recall(
        self, share: float, draws: Draws, n: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Collected states, labels and places, and whose turn it is to take them (n,), if any."""
        if not len(self.collected):
            return None
        chosen = draws.uniform(n) < share
        return chosen, *self.collected.pick(draws.uniform(n))

    def collect(
        self,
        student: Callable[..., Tensor],
        teacher: Callable[..., Tensor],
        levels: Sequence[float],
        substeps: int,
        late: int,
        draws: Draws,
    ) -> None:
        """Roll out from pure noise, and keep the states at all levels but the last."""
        steps, known = len(levels) - 1, draws.data.labels
        count = -(-self.own.fresh // steps)
        labels = known[draws.integers(len(known), count)]
        x = levels[0] * draws.noise(draws.data.images[:1].expand(count, *draws.data.shape))
        coins = torch.Generator().manual_seed(int(draws.integers(2**62, 1)))
        rollout = mixed_rollout(
            self.reflect(student),
            self.reflect(teacher),
            x,
            torch.tensor(levels, dtype=torch.float64),
            teacher_substeps=substeps,
            teacher_probability=1.0 - self.own.turns[late],
            extra_args={"cond": labels},
            generator=coins,
            disable=True,
        )
        for place, state in enumerate(rollout.states[:-1]):
            self.collected.add(state, labels, torch.full_like(labels, place))

    def collecting(self, steps: int, iterations: int, teachers: int) -> int:
        """Evaluations expected of a phase's rollouts; a teacher's transition takes ``teachers``."""
        o = self.own
        early = [not self.late(i, iterations) for i in range(0, iterations, o.every)]
        turns = [o.turns[0] if is_early else o.turns[1] for is_early in early]
        trajectories = -(-o.fresh // steps)
        return round(sum(trajectories * steps * (b + (1 - b) * teachers) for b in turns))


class OnProgressive(DDIL, Progressive):  # type: ignore[misc]  # their Settings differ
    """`DDIL` where the base is progressive distillation."""

    def __init__(self, job: Job) -> None:
        s: DDIL.Settings = job.settings
        plain_teacher(job)
        base = Progressive.Settings(
            steps=s.steps, start_steps=s.start_steps, grid=s.grid, guidance=s.guidance,
            batch=s.batch, rate=s.rate,
        )  # fmt: skip
        phases = len(deterministic_counts(base))
        if s.iterations < phases:
            raise ValueError(f"iterations is {s.iterations}; there are {phases} phases")
        base = replace(base, iterations=s.iterations // phases)
        Progressive.__init__(self, replace(job, settings=base))
        self.prepare(job)
        self.stage = 0  # of the iteration that is under way: early or late in its phase

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        phase, done = divmod(i, self.settings.iterations)
        if done == 0:
            self.collected.clear()
        self.stage = self.late(done, self.settings.iterations)
        losses = Progressive.step(self, i, draws)
        if done % self.own.every == 0:
            table = self.jumps[phase]
            levels = [*table[:, 0].tolist(), float(table[-1, 2])]
            two_steps = partial(self.two_steps, phase)
            self.collect(self.student, two_steps, levels, 1, self.stage, draws)
        return losses

    def loss(
        self, phase: int, x: Tensor, jump: Sequence[Tensor], labels: Tensor, draws: Draws
    ) -> Tensor:
        recalled = self.recall(self.own.shares[self.stage], draws, len(x))
        if recalled:
            chosen, states, their_labels, places = recalled
            x = torch.where(stretched(chosen, x), states, x)
            labels = torch.where(chosen, their_labels, labels)
            theirs = self.jumps[phase][places].unbind(1)
            jump = [torch.where(chosen, a, b) for a, b in zip(theirs, jump)]
        with torch.no_grad():
            target = jump_target(self.expert(phase, labels), x, *jump)
        estimate = self.reflect(self.student)(x, jump[0], cond=labels)
        return self.error(estimate, target, jump[0])

    def expert(self, phase: int, labels: Tensor) -> Callable[..., Tensor]:
        """The phase's teacher, under CFG in the first, reflected."""
        if phase == 0 and self.halves == 2:
            return self.reflect(guided(self.source, labels, self.own.guidance))
        return self.reflect(partial(self.teacher, cond=labels))

    def two_steps(self, phase: int, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        """Two of the teacher's steps from σ as the estimate of one: `jump_target`."""
        table = self.jumps[phase]
        row = table[(table[:, 0] - sigma[0]).abs().argmin()]
        return jump_target(self.expert(phase, cond), x, *row.expand(len(x), 3).unbind(1))

    def result(self) -> tuple[nn.Module, dict[str, Any]]:
        network, about = Progressive.result(self)
        for phase, table in enumerate(self.jumps):
            teachers = 2 * (self.halves if phase == 0 else 1)
            about["evaluations"] += self.collecting(len(table), self.settings.iterations, teachers)
        return network, about


class OnConsistency(DDIL, Consistency):  # type: ignore[misc]  # their Settings differ
    """`DDIL` where the base is consistency distillation; the student has the teacher's network."""

    def __init__(self, job: Job) -> None:
        s: DDIL.Settings = job.settings
        base = Consistency.Settings(
            network=None, guidance=s.guidance, iterations=s.iterations, batch=s.batch, rate=s.rate
        )
        Consistency.__init__(self, replace(job, settings=base))
        self.prepare(job)
        self.source = plain_teacher(job)
        self.levels = grid(s.grid, s.steps)
        self.learner, self.roller = VEDenoiser(self.network), VEDenoiser(self.average)

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        late = self.late(i, s.iterations)
        images, labels = draws.batch(s.batch)
        labels = draws.dropped(labels, s.dropout)
        sigma = self.network.sigma(draws.uniform(len(images)) * (TIMESTEPS - 1))
        x = images + stretched(sigma, images) * draws.noise(images)
        recalled = self.recall(self.own.shares[late], draws, len(x))
        if recalled:
            chosen, states, their_labels, places = recalled
            x = torch.where(stretched(chosen, x), states, x)
            labels = torch.where(chosen, their_labels, labels)
            sigma = torch.where(chosen, x.new_tensor(self.levels)[places], sigma)
        with torch.no_grad():
            target = self.target(x, sigma, labels)
        loss = F.mse_loss(self.reflect(self.learner)(x, sigma, cond=labels), target)
        descend(self.optimisers["network"], loss, cosine(i, s.iterations, s.rate))
        update_average(self.average, self.network, s.average)
        if i % self.own.every == 0:
            self.collect(self.roller, self.expert, self.levels, self.own.substeps, late, draws)
        return {"loss": loss.detach()}

    def target(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """The average's estimate at the end of the teacher's step from (x, σ), reflected."""
        t = self.roller.sigma_to_t(sigma) - self.settings.skip
        end = self.roller.t_to_sigma(t.clamp(min=0))
        estimate = self.reflect(self.expert)(x, sigma, cond=labels)
        reached = self.reflect(self.roller)(ddim(estimate, x, sigma, end), end, cond=labels)
        return torch.where(stretched(t < 0, x), estimate, reached)

    def expert(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        """The guided teacher."""
        return guided(self.source, cond, self.own.guidance)(x, sigma)

    def result(self) -> tuple[nn.Module, dict[str, Any]]:
        network, about = Consistency.result(self)
        about["levels"] = list(self.levels)
        about["evaluations"] += self.collecting(
            self.own.steps, self.settings.iterations, 2 * self.own.substeps
        )
        return network, about


BASES: dict[str, type[DDIL]] = {"progressive": OnProgressive, "consistency": OnConsistency}
