"""The loop that every sampler runs. It knows rows of coefficients and no solver by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm.auto import trange

from kdpp.algebra import Shares, WeightedSum, shares_of, switches
from kdpp.asking import Evaluation, asks_where, bind_all, networks_of
from kdpp.checks import check_flow_levels, check_latent, check_sigmas, check_start
from kdpp.denoisers import check_unwritten, counted, writes
from kdpp.guidance import TeacherGuidedDenoiser
from kdpp.guided_step import Revision, plan_revisions, prepare, weights_of
from kdpp.kinds import leaves_of, takes_sigma_next
from kdpp.memory import Loans
from kdpp.noise import (
    NoiseSampler,
    brownian_noise,
    checked,
    host_noise,
    private_generator,
    private_seed,
)
from kdpp.plan import FLOW, VE, Row, Space, Step
from kdpp.reflection import Bound, Mirror, plan_mirrors
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
    shares = shares_of(model.student, steps, space)
    if isinstance(model.student, WeightedSum) and solver.multistep and not solver.own_levels:
        for i in switches(shares, steps):  # the difference of two models is not a slope
            steps = steps[:i] + solver.plan(levels[i:], space=space, **options)
        shares = shares_of(model.student, steps, space)
    revisions = plan_revisions(model, steps, solver.cfg_pp, seed or partial(private_seed, x))
    mirrors = plan_mirrors(model.reflection, model.student, steps, space)
    plan = ready(steps, revisions, shares, mirrors, space, solver.cfg_pp, model.combine is not None)
    check_ends(model, plan, solver)
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
    """A step made ready: churn, reflection, stages, which one is kept, what teachers are asked."""

    churn: Update | None
    lifted: float | None
    mirror: Mirror | None
    stages: tuple[ReadyStage, ...]
    kept: int
    revisions: tuple[Revision, ...]


class ReadyPlan(NamedTuple):
    """A plan made ready for tensors: numbers still, the same for every run of these settings."""

    steps: tuple[ReadyStep, ...]
    evaluations: tuple[Evaluation, ...]
    """What the student is asked."""
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
        told = [evaluation.level for evaluation in self.evaluations]
        levels = torch.tensor(told, dtype=x.dtype).to(x.device, non_blocking=x.is_cuda)
        return levels[:, None].expand(-1, len(x)).contiguous().unbind()


@lru_cache(maxsize=64)
def ready(
    steps: tuple[Step, ...],
    revisions: tuple[tuple[Revision, ...], ...],
    shares: Shares,
    mirrors: tuple[Mirror | None, ...],
    space: Space,
    cfg_pp: bool,
    combined: bool,
) -> ReadyPlan:
    """Every step made ready; the teachers' shares go into the update of its last stage."""
    made = []
    asked: list[Evaluation] = []
    used = used_once(steps)
    for step, here, weighs, mirror in zip(steps, revisions, shares, mirrors):
        base = step.stages[0].sigma
        churn = None
        if step.churn is not None:
            lift = Row(step.sigma, noise=step.churn)
            churn = Update.of(lift, step.sigma, base, space, cfg_pp)
        stages = []
        following_stages = [*step.stages[1:], None]
        for stage, following, share in zip(step.stages, following_stages, weighs):
            reached = step.sigma_next if following is None else following.sigma
            weights = () if following else weights_of(here, combined)
            update = Update.of(stage.row, step.base(stage), reached, space, cfg_pp, weights)
            start = space.level(stage.sigma) if stage.onward else None
            end = space.level(reached) if following else None
            stages.append(ReadyStage(len(asked), update, start, end))
            alone = len(asked) in used
            goes_to = space.level(stage.row.end) if alone else None
            asked.append(Evaluation(space.level(stage.sigma), goes_to, share))
        lifted = space.level(base) if churn else None
        made.append(ReadyStep(churn, lifted, mirror, tuple(stages), step.kept, here))
    rows = [stage.row for step in steps for stage in step.stages]
    memory = max((step.memory for step in steps), default=0)
    return ReadyPlan(
        tuple(made),
        tuple(asked),
        memory=memory,
        guided_memory=memory if cfg_pp and any(row.guided for row in rows) else 0,
        states=max((len(row.past) for row in rows), default=0),
        draws=any(step.draws for step in steps),
        guided=any(revisions),
        cfg_pp=cfg_pp,
    )


def used_once(steps: Sequence[Step]) -> set[int]:
    """The evaluations that one row alone weighs, and with no other: first-order steps."""
    alone: set[int] = set()
    count = 0
    for step in steps:
        alone -= set(range(count - step.history, count))
        if len(step.stages) == 1 and step.history == 0:
            alone.add(count)
        count += len(step.stages)
    return alone


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
        self.students = bind_all(
            model.student, "student", x, extra_args, plan.evaluations, needs_uncond=plan.cfg_pp,
            dtype=dtype, max_batch=model.max_batch,
        )  # fmt: skip
        revisions = [step.revisions for step in plan.steps]
        self.guided = prepare(model, revisions, x, extra_args, dtype) if plan.guided else None
        self.mirrors = {
            i: Bound.of(
                step.mirror, model.reflection, model.student, x, extra_args, dtype, model.max_batch
            )
            for i, step in enumerate(plan.steps)
            if step.mirror is not None and model.reflection is not None
        }
        self.loans = loans(model, plan)
        self.earlier: tuple[Any, ...] = ()  # the directions that earlier steps kept, newest first,
        self.guided_earlier: tuple[Tensor, ...] = ()  # CFG++'s guided estimates,
        self.past: tuple[Tensor, ...] = ()  # and the states that the steps began with

    def step(self, i: int, x: Tensor) -> Tensor:
        """The state after step i, from the state before it."""
        plan, noise, listener = self.plan, self.noise, self.listener
        step, memory, cfg_pp = plan.steps[i], plan.memory, plan.cfg_pp
        first, last = step.stages[0], step.stages[-1]
        teachers = self.guided[i] if self.guided else None
        if self.loans is not None:
            self.loans.fetch(i)
        if step.churn is not None:
            x = step.churn(((x,),), noise.between(i, None, None))
        if step.mirror is not None:
            kept = (*self.earlier, *self.guided_earlier)
            before = writes(kept)
            x = self.mirrors[i](x)
            check_unwritten(kept, before, "reflection's model")
        point, directions, guided = x, self.earlier, self.guided_earlier
        for stage in step.stages:
            kept = (*directions[:memory], *guided[: plan.guided_memory])
            before = writes(kept) if kept else []
            ask, level = self.students[stage.evaluation], self.levels[stage.evaluation]
            denoised, uncond = ask(point, level)
            if kept:
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
        if self.loans is not None:
            self.loans.release(i)
        newest = len(step.stages) - 1 - step.kept
        if memory:
            self.earlier = (directions[newest], *self.earlier)[:memory]
        if plan.guided_memory:
            self.guided_earlier = (guided[newest], *self.guided_earlier)[: plan.guided_memory]
        if plan.states:
            self.past = (x, *self.past)[: plan.states]
        return point

    def release(self) -> None:
        """Let borrowed networks go; also after a run that broke off."""
        if self.loans is not None:
            self.loans.release()


def loans(model: TeacherGuidedDenoiser, plan: ReadyPlan) -> Loans | None:
    """What a run borrows: networks that come and go, all but a student that is one; None: none."""
    reflection, summed = model.reflection, leaves_of(model.student) is not None
    asked: dict[int, list[Any]] = {}
    for i, step in enumerate(plan.steps):
        found: list[Any] = []
        if summed:
            for stage in step.stages:
                found += networks_of(model.student, plan.evaluations[stage.evaluation])
        found += networks_asked(model, step.revisions)
        if step.mirror is not None and reflection is not None:
            found += networks_of(reflection.weak, step.mirror.weak)
            if reflection.strong is not None:
                found += networks_of(reflection.strong, step.mirror.strong)
        if found:
            asked[i] = found
    made = Loans(asked)
    return made if made.last else None


def networks_asked(model: TeacherGuidedDenoiser, revisions: Iterable[Revision]) -> list[Any]:
    """The networks that a step's revisions ask."""
    found: list[Any] = []
    for revision in revisions:
        at = Evaluation(revision.level, None, revision.shares)
        found += networks_of(model.teachers[revision.teacher].denoiser, at)
    return found


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


def check_ends(model: TeacherGuidedDenoiser, plan: ReadyPlan, solver: Solver) -> None:
    """ValueError where a student that takes ``sigma_next`` is asked and there is none."""
    if not asks_where(model.student):
        return
    for at in plan.evaluations:
        if at.end is None and any(map(takes_sigma_next, networks_of(model.student, at))):
            raise ValueError(
                "the student takes sigma_next, the one level that its answer is for, and "
                f"{solver.name} uses its answer at {at.level:g} otherwise; take a solver of first "
                "order without a memory: euler, euler_ancestral, ddim_stochastic, lcm"
            )


def check_kind(levels: Sequence[float], model: TeacherGuidedDenoiser, space: Space) -> None:
    """ValueError for a flow model's schedule given to another model, or the reverse."""
    if space is FLOW:
        check_flow_levels(levels)
    elif model.flow is None and levels and levels[0] == 1.0 and levels[-1] == 0.0:
        raise ValueError(
            "sigmas runs from exactly 1 to 0, as a flow model's do, and the student is not marked "
            "as one: mark it (kdpp.FlowDenoiser, or flow=True), or say flow=False if σ = 1 is meant"
        )
