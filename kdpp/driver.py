"""The loop that every sampler runs. It knows rows of coefficients and no solver by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm.auto import trange

from kdpp.checks import check_flow_levels, check_latent, check_sigmas, check_start
from kdpp.denoisers import bind, check_unwritten, counted, writes
from kdpp.guidance import TeacherGuidedDenoiser
from kdpp.guided_step import Revision, plan_revisions, prepare, weights_of
from kdpp.noise import (
    NoiseSampler,
    brownian_noise,
    checked,
    host_noise,
    private_generator,
    private_seed,
)
from kdpp.plan import FLOW, VE, Row, Space, Step
from kdpp.solver import Solver, solver_of
from kdpp.update import Update

__all__ = ["Callback", "ExtraArgs", "report", "sample"]

Callback = Callable[[dict[str, Any]], Any]
ExtraArgs = Mapping[str, Any] | None


@torch.no_grad()
def sample(
    solver: Solver | str,
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    **options: Any,
) -> Tensor:
    """A run of any solver: check everything, plan it in numbers once, and walk its steps.

    ``sample("euler", model, x, sigmas, …)`` is ``kdpp.sample_euler_tg(model, x, sigmas, …)``.

    Args:
        solver: a `kdpp.Solver`, or its name.
        options: the solver's own, such as eta.

    For the other arguments and the errors see `kdpp.solvers`.
    """
    solver, fixed = solver_of(solver)
    run = plan_run(solver, model, x, sigmas, noise_sampler, {**fixed, **options})
    if not run.plan.steps:
        return x
    state, dtype = run.state(x)
    noise, levels = run.noise(state), run.plan.levels_of(x)
    steps = len(run.plan.steps)
    indices = range(steps) if disable else trange(steps, disable=disable)
    listener = None if callback is None else Listener(callback, run.sigmas.unbind())
    image = walk(
        run.plan, run.model, state, levels, extra_args or {}, noise, indices, listener, dtype
    )
    return image.to(x.dtype)


# A run in numbers ---------------------------------------------------------------------------------


class PlannedRun(NamedTuple):
    """A run that is planned and not begun: all of it but the latent and the conditions."""

    plan: ReadyPlan
    model: TeacherGuidedDenoiser
    levels: Sequence[float]
    sigmas: Tensor
    noise_sampler: NoiseSampler | None
    brownian: bool

    def state(self, x: Tensor) -> tuple[Tensor, torch.dtype | None]:
        """`state_of` its model."""
        return state_of(self.model, x)

    def noise(self, state: Tensor) -> Noise:
        """The sources of noise for one run from this state."""
        # The teachers' generator first: its seed is told from torch's stream, which the tree moves.
        renoise, guided = self.model.renoise_noise_sampler, self.plan.guided
        noise = Noise(self.noise_sampler, renoise, state, self.levels, self.sigmas, guided)
        if noise.sampler is None and self.plan.draws:
            make = partial(brownian_noise, sigmas=self.sigmas) if self.brownian else host_noise
            noise.sampler = make(state)
        return noise


def state_of(model: TeacherGuidedDenoiser, x: Tensor) -> tuple[Tensor, torch.dtype | None]:
    """The state to start from, and what the networks are given if that is another dtype."""
    small = x.dtype in (torch.float16, torch.bfloat16)
    return (x.float(), x.dtype) if small and model.float32_state else (x, None)


def plan_run(
    solver: Solver,
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    noise_sampler: NoiseSampler | None,
    options: Mapping[str, Any],
    seed: Callable[[], int] | None = None,
) -> PlannedRun:
    """Check what is given and turn the sigmas into coefficients; errors as in `kdpp.solvers`.

    ``seed`` gives one for random levels; None tells it from the state of torch's random stream.
    """
    model = check_model(model)
    check_latent(x)
    levels, sigmas = check_sigmas(sigmas, or_rising=solver.inverts)
    space = model.space
    check_kind(levels, model, space)
    if space is VE:
        check_start(x, levels, model.student_range)
    steps = solver.plan(levels, space=space, **options)
    revisions = plan_revisions(model, steps, solver.cfg_pp, seed or partial(private_seed, x))
    plan = ready(steps, revisions, space, solver.cfg_pp, model.combine is not None)
    return PlannedRun(plan, model, levels, sigmas, noise_sampler, solver.noise == "brownian")


class ReadyStage(NamedTuple):
    """A stage made ready: which evaluation it is, its update, and the levels of its noise.

    They are None where they are the step's; ``start`` is not where the row starts from the stage's
    point.
    """

    evaluation: int
    update: Update
    start: float | None
    end: float | None


class ReadyStep(NamedTuple):
    """A step made ready: its churn, its stages, which one is kept, and what teachers are asked."""

    churn: Update | None
    lifted: float | None
    stages: tuple[ReadyStage, ...]
    kept: int
    revisions: tuple[Revision, ...]


class ReadyPlan(NamedTuple):
    """A plan made ready for tensors: numbers still, the same for every run of these settings."""

    steps: tuple[ReadyStep, ...]
    levels: tuple[float, ...]
    """What the student is told, evaluation by evaluation."""
    memory: int
    """How many of the directions that earlier steps kept are weighed."""
    guided_memory: int
    """How many of the guided estimates, for CFG++."""
    states: int
    """How many of the states that earlier steps began with are kept."""
    draws: bool
    guided: bool
    cfg_pp: bool

    def levels_of(self, x: Tensor) -> Sequence[Tensor]:
        """The student's levels as tensors ``(batch,)`` on x's device; copied there once."""
        levels = torch.tensor(self.levels, dtype=x.dtype).to(x.device, non_blocking=x.is_cuda)
        return levels[:, None].expand(-1, len(x)).contiguous().unbind()


@lru_cache(maxsize=64)
def ready(
    steps: tuple[Step, ...],
    revisions: tuple[tuple[Revision, ...], ...],
    space: Space,
    cfg_pp: bool,
    combined: bool,
) -> ReadyPlan:
    """Every step made ready; the teachers' shares go into the update of its last stage."""
    made = []
    levels: list[float] = []
    for step, here in zip(steps, revisions):
        base = step.stages[0].sigma
        churn = None
        if step.churn is not None:
            lift = Row(step.sigma, noise=step.churn)
            churn = Update.of(lift, step.sigma, base, space, cfg_pp)
        stages = []
        for stage, following in zip(step.stages, [*step.stages[1:], None]):
            reached = step.sigma_next if following is None else following.sigma
            weights = () if following else weights_of(here, combined)
            update = Update.of(stage.row, step.base(stage), reached, space, cfg_pp, weights)
            start = space.level(stage.sigma) if stage.onward else None
            end = space.level(reached) if following else None
            stages.append(ReadyStage(len(levels), update, start, end))
            levels.append(space.level(stage.sigma))
        lifted = space.level(base) if churn else None
        made.append(ReadyStep(churn, lifted, tuple(stages), step.kept, here))
    rows = [stage.row for step in steps for stage in step.stages]
    memory = max((step.memory for step in steps), default=0)
    return ReadyPlan(
        tuple(made),
        tuple(levels),
        memory=memory,
        guided_memory=memory if cfg_pp and any(row.guided for row in rows) else 0,
        states=max((len(row.past) for row in rows), default=0),
        draws=any(step.draws for step in steps),
        guided=any(revisions),
        cfg_pp=cfg_pp,
    )


# Noise --------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where `walk` gets noise from."""

    def between(self, step: int, start: float | None, end: float | None) -> Tensor:
        """From one level to another (None: the step's own), shaped like the latent."""

    def renoise(self, like: Tensor, step: int, level: float) -> Tensor:
        """For that step's renoising to ``level``, shaped like ``like``."""


class Noise:
    """The solver's noise sampler, and the teachers': the caller's, or a private stream.

    A noise sampler with a method ``between(sigma, sigma_next)`` is asked there, with numbers, so
    that it has nothing to read back from a device.
    """

    def __init__(
        self,
        sampler: NoiseSampler | None,
        renoise_sampler: NoiseSampler | None,
        x: Tensor,
        levels: Sequence[float],
        sigmas: Tensor,
        guided: bool,
    ) -> None:
        self.sampler, self.renoise_sampler = sampler, renoise_sampler
        self.x, self.levels, self.sigmas = x, levels, sigmas
        own = guided and renoise_sampler is None
        self.generator = private_generator(x) if own else None

    @cached_property
    def sigma_at(self) -> Sequence[Tensor]:
        return self.sigmas.unbind()

    def between(self, step: int, start: float | None, end: float | None) -> Tensor:
        ask: Any = getattr(self.sampler, "between", self.sampler)
        own: Sequence[Any] = self.levels
        made: Callable[[float], Any] = float
        if ask is self.sampler:
            own, made = self.sigma_at, partial(self.sigmas.new_full, ())
        levels = (
            own[i] if level is None else made(level)
            for i, level in ((step, start), (step + 1, end))
        )
        return checked(ask(*levels), "noise_sampler", self.x)

    def renoise(self, like: Tensor, step: int, level: float) -> Tensor:
        if self.renoise_sampler is None:
            return torch.randn(
                like.shape, generator=self.generator, device=like.device, dtype=like.dtype
            )
        noise = self.renoise_sampler(self.sigma_at[step], like.new_full((), level))
        return checked(noise, "renoise_noise_sampler", like)


# The loop -----------------------------------------------------------------------------------------


class Listener(NamedTuple):
    """A callback, and the sigmas that it is told of."""

    callback: Callback
    sigma_at: Sequence[Tensor]


def walk(
    plan: ReadyPlan,
    model: TeacherGuidedDenoiser,
    x: Tensor,
    levels: Sequence[Tensor],
    extra_args: Mapping[str, Any],
    noise: Source,
    indices: Iterable[int],
    listener: Listener | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The loop. ``dtype``: what the networks are given, where it is not x's."""
    run = Walk(plan, model, x, levels, extra_args, noise, listener, dtype)
    try:
        for i in indices:
            x = run.step(i, x)
    finally:
        run.release()
    return x


class Walk:
    """A run that is walked step by step: by `walk`, or by a host that has a loop of its own.

    x gives the batch, and the arguments are those of `walk`; `step` is called for the steps in
    their order, each with the state that the one before gave.
    """

    def __init__(
        self,
        plan: ReadyPlan,
        model: TeacherGuidedDenoiser,
        x: Tensor,
        levels: Sequence[Tensor],
        extra_args: Mapping[str, Any],
        noise: Source,
        listener: Listener | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.plan, self.levels, self.noise, self.listener = plan, levels, noise, listener
        self.student = bind(
            model.student, "student", x, extra_args, needs_uncond=plan.cfg_pp,
            dtype=dtype, max_batch=model.max_batch,
        )  # fmt: skip
        revisions = [step.revisions for step in plan.steps]
        self.guided = prepare(model, revisions, x, extra_args, dtype) if plan.guided else None
        self.earlier: tuple[Any, ...] = ()  # the directions that earlier steps kept, newest first,
        self.guided_earlier: tuple[Tensor, ...] = ()  # CFG++'s guided estimates,
        self.past: tuple[Tensor, ...] = ()  # and the states that the steps began with

    def step(self, i: int, x: Tensor) -> Tensor:
        """The state after step i, from the state before it."""
        plan, noise, listener = self.plan, self.noise, self.listener
        step, memory, cfg_pp = plan.steps[i], plan.memory, plan.cfg_pp
        first, last = step.stages[0], step.stages[-1]
        teachers = self.guided[i] if self.guided else None
        if step.churn is not None:
            x = step.churn(((x,),), noise.between(i, None, None))
        if teachers is not None:
            teachers.fetch()
        point, directions, guided = x, self.earlier, self.guided_earlier
        for stage in step.stages:
            kept = (*directions[:memory], *guided[: plan.guided_memory])
            before = writes(kept) if kept else None
            denoised, uncond = self.student(point, self.levels[stage.evaluation])
            if before is not None:
                check_unwritten(kept, before, "student")
            if memory or teachers:  # to be used after the next call of a network
                denoised = counted(denoised)
                uncond = counted(uncond) if cfg_pp and uncond is not None else uncond
            directions = (uncond if cfg_pp else denoised, *directions)
            guided = (denoised, *guided)
            if listener and stage is first:
                info = report(x, i, listener.sigma_at[i], denoised, step.lifted)
            heard: tuple[Tensor, ...] = ()
            if teachers and stage is last:
                revised = teachers.revise(point, denoised, directions[0], i, noise.renoise)
                heard = revised.heard
                if listener:
                    info |= teachers.report(denoised, revised)
            # As k-diffusion, after the step's first evaluation; where teachers speak, after.
            if listener and stage is (last if teachers else first):
                listener.callback(info)
            draws = stage.update.noise is not None
            fresh = noise.between(i, stage.start, stage.end) if draws else None
            base = x if stage.start is None else point
            point = stage.update(((base, denoised), heard, directions, self.past, guided), fresh)
        newest = len(step.stages) - 1 - step.kept
        if memory:
            self.earlier = (directions[newest], *self.earlier)[:memory]
        if plan.guided_memory:
            self.guided_earlier = (guided[newest], *self.guided_earlier)[: plan.guided_memory]
        if plan.states:
            self.past = (x, *self.past)[: plan.states]
        return point

    def release(self) -> None:
        """Let borrowed teachers go; also after a run that broke off."""
        for one in self.guided or ():
            if one is not None:
                one.release()


def report(
    x: Tensor, i: int, sigma: Tensor, denoised: Tensor, level: float | None = None
) -> dict[str, Any]:
    """What k-diffusion tells its callbacks; ``level`` is where churn has lifted x."""
    churned = sigma if level is None else sigma.new_full((), level)
    return {"x": x, "i": i, "sigma": sigma, "sigma_hat": churned, "denoised": denoised}


# What is given ------------------------------------------------------------------------------------


def check_model(model: Any) -> TeacherGuidedDenoiser:
    """TypeError for a model that is not wrapped."""
    if not isinstance(model, TeacherGuidedDenoiser):
        raise TypeError(
            f"model is a {type(model).__name__}; kdpp's samplers take a student with its teacher: "
            "wrap it, kdpp.TeacherGuidedDenoiser(student, teacher) (a host's own model becomes a "
            "denoiser by kdpp.HostModel)"
        )
    return model


def check_kind(levels: Sequence[float], model: TeacherGuidedDenoiser, space: Space) -> None:
    """ValueError for a flow model's schedule given to another model, or the reverse."""
    if space is FLOW:
        check_flow_levels(levels)
    elif model.flow is None and levels and levels[0] == 1.0 and levels[-1] == 0.0:
        raise ValueError(
            "sigmas runs from exactly 1 to 0, as a flow model's do, and the student is not marked "
            "as one: mark it (kdpp.FlowDenoiser, or flow=True), or say flow=False if σ = 1 is meant"
        )
