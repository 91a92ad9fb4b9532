"""The loop that every sampler runs. It knows rows of coefficients and no solver by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm.auto import trange

from kdpp.checks import check_latent, check_sigmas
from kdpp.denoisers import bind
from kdpp.guidance import Revision, TeacherGuidedDenoiser
from kdpp.lessons import Lesson, check_unwritten, plan_lessons, prepare_guided, writes
from kdpp.noise import NoiseSampler, checked, host_noise, private_generator, private_seed
from kdpp.plan import FLOW, Row, Space, Step
from kdpp.update import Update

__all__ = ["Callback", "Plan", "report", "run"]

Plan = Callable[[Sequence[float]], Iterable[Step]]
Callback = Callable[[dict[str, Any]], Any]


@torch.no_grad()
def run(
    plan: Plan,
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None = None,
    *,
    cfg_pp: bool = False,
    default_noise: Callable[[Tensor, Tensor], NoiseSampler] = lambda x, sigmas: host_noise(x),
) -> Tensor:
    """Check everything, turn the sigmas into coefficients once, and walk the plan's steps.

    ``cfg_pp``: the solver's direction comes from the student's unconditional estimate.
    ``default_noise(x, sigmas)`` makes the noise sampler where none is given. For the other
    arguments and the errors see `kdpp.solvers`.
    """
    model = check_model(model)
    check_latent(x)
    levels, sigmas = check_sigmas(sigmas)
    space = model.space
    check_kind(levels, model, space)
    if len(levels) < 2:
        return x
    course = chart(plan, model, levels, space, cfg_pp, lambda: private_seed(x))
    this = Run(course, model, levels, sigmas, noise_sampler, default_noise)
    recorded = RECORDED.get()
    if recorded is not None:
        recorded.append(this)
        return x
    told = None if callback is None else Told(callback, sigmas.unbind())
    indices = range(len(course.steps)) if disable else trange(len(course.steps), disable=disable)
    state, dtype = this.state(x)
    noise, table = this.noise(state), course.table(x)
    extra_args = {} if extra_args is None else extra_args
    image = walk(course, model, state, table, extra_args, noise, indices, told, dtype)
    return image.to(x.dtype)


class Run(NamedTuple):
    """A run that is planned and not begun: all of it but the latent and the conditions."""

    course: Course
    model: TeacherGuidedDenoiser
    levels: Sequence[float]
    sigmas: Tensor
    noise_sampler: NoiseSampler | None
    default_noise: Callable[[Tensor, Tensor], NoiseSampler]

    def state(self, x: Tensor) -> tuple[Tensor, torch.dtype | None]:
        """The state to start from, and what the networks are given if that is another dtype."""
        small = x.dtype in (torch.float16, torch.bfloat16)
        return (x.float(), x.dtype) if small and self.model.float32_state else (x, None)

    def noise(self, state: Tensor) -> Noise:
        """The sources of noise for one run from this state."""
        noise = Noise(
            self.model.renoise_noise_sampler, state, self.levels, self.sigmas, self.course.teaches
        )
        if self.course.draws:
            given = self.noise_sampler
            noise.sampler = self.default_noise(state, self.sigmas) if given is None else given
        return noise


RECORDED: ContextVar[list[Run] | None] = ContextVar("RECORDED", default=None)
"""Where a list is set, `run` appends the run to it instead of carrying it out."""


class ReadyStage(NamedTuple):
    """A stage made ready: which evaluation it is, its update, and the level noise goes to."""

    evaluation: int
    update: Update
    end: float | None


class ReadyStep(NamedTuple):
    """A step made ready: its churn, its stages, and its teachers' lessons."""

    churn: Update | None
    lifted: float | None
    stages: tuple[ReadyStage, ...]
    lessons: tuple[Lesson, ...]


class Course(NamedTuple):
    """A run in numbers, before any tensor: the same for every run of these settings."""

    steps: tuple[ReadyStep, ...]
    levels: tuple[float, ...]
    """What the student is told, evaluation by evaluation."""
    memory: int
    """How many of the directions that earlier steps began with are kept."""
    states: int
    """How many of the states that earlier steps began with are kept."""
    draws: bool
    teaches: bool
    cfg_pp: bool

    def table(self, x: Tensor) -> Sequence[Tensor]:
        """The student's levels as tensors ``(batch,)`` on x's device; copied there once."""
        levels = torch.tensor(self.levels, dtype=x.dtype).to(x.device, non_blocking=x.is_cuda)
        return levels[:, None].expand(-1, len(x)).contiguous().unbind()


def chart(
    plan: Plan,
    model: TeacherGuidedDenoiser,
    levels: Sequence[float],
    space: Space,
    cfg_pp: bool,
    seed: Callable[[], int],
) -> Course:
    """The run's coefficients, from its levels and settings; ``seed`` is for random levels."""
    steps = planned(plan, tuple(map(space.sigma, levels)))
    revisions = model.revisions(steps, seed)
    return ready(steps, tuple(map(tuple, revisions)), space, cfg_pp)


def planned(plan: Plan, sigmas: tuple[float, ...]) -> tuple[Step, ...]:
    """The plan's steps; those of a schedule that was planned before are kept."""
    function, settings = (plan.func, plan.keywords) if isinstance(plan, partial) else (plan, {})
    try:
        return _planned(function, sigmas, **settings)
    except TypeError:  # a setting that cannot be hashed; the plan itself says what is wrong with it
        return tuple(plan(sigmas))


@lru_cache(maxsize=64, typed=True)  # 2 and 2.0 are equal, and not both an order
def _planned(
    function: Callable[..., Iterable[Step]], sigmas: tuple[float, ...], **settings: Any
) -> tuple[Step, ...]:
    return tuple(function(sigmas, **settings))


@lru_cache(maxsize=64)
def ready(
    steps: tuple[Step, ...],
    revisions: tuple[tuple[Revision, ...], ...],
    space: Space,
    cfg_pp: bool,
) -> Course:
    """Every step made ready; the teachers' shares go into its last stage."""
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
            scales = [] if following else [revision.scale for revision in here]
            update = Update.of(stage.row, base, reached, space, cfg_pp, scales)
            end = space.level(reached) if following else None
            stages.append(ReadyStage(len(levels), update, end))
            levels.append(space.level(stage.sigma))
        lifted = space.level(base) if churn else None
        lessons = plan_lessons(here, step.stages[-1].sigma, space, cfg_pp)
        made.append(ReadyStep(churn, lifted, tuple(stages), lessons))
    return Course(
        tuple(made),
        tuple(levels),
        memory=max(step.memory for step in steps),
        states=max(len(stage.row.past) for step in steps for stage in step.stages),
        draws=any(step.draws for step in steps),
        teaches=any(revisions),
        cfg_pp=cfg_pp,
    )


class Source(Protocol):
    """Where `walk` gets noise from."""

    def between(self, step: int, level: float | None) -> Tensor:
        """From the step's level to ``level`` (None: to the step's end), shaped like the latent."""

    def renoise(self, like: Tensor, step: int, level: float) -> Tensor:
        """For that step's renoising to ``level``, shaped like ``like``."""


class Noise:
    """The solver's noise sampler, and the teachers': the caller's, or a private stream.

    A noise sampler with a method ``between(sigma, sigma_next)`` is asked there, with numbers, so
    that it has nothing to read back from a device.
    """

    def __init__(
        self,
        renoise_sampler: NoiseSampler | None,
        x: Tensor,
        levels: Sequence[float],
        sigmas: Tensor,
        teaches: bool,
    ) -> None:
        self.sampler: NoiseSampler | None = None
        self.renoise_sampler = renoise_sampler
        self.x, self.levels, self.sigmas = x, levels, sigmas
        own = teaches and renoise_sampler is None
        self.generator = private_generator(x) if own else None

    @cached_property
    def sigma_at(self) -> Sequence[Tensor]:
        return self.sigmas.unbind()

    def between(self, step: int, level: float | None) -> Tensor:
        by_numbers = getattr(self.sampler, "between", None)
        if by_numbers is not None:
            noise = by_numbers(self.levels[step], self.levels[step + 1] if level is None else level)
        else:
            end = self.sigma_at[step + 1] if level is None else self.sigmas.new_full((), level)
            assert self.sampler is not None
            noise = self.sampler(self.sigma_at[step], end)
        return checked(noise, "noise_sampler", self.x)

    def renoise(self, like: Tensor, step: int, level: float) -> Tensor:
        if self.renoise_sampler is None:
            return torch.randn(
                like.shape, generator=self.generator, device=like.device, dtype=like.dtype
            )
        noise = self.renoise_sampler(self.sigma_at[step], like.new_full((), level))
        return checked(noise, "renoise_noise_sampler", like)


class Told(NamedTuple):
    """A callback, and the sigmas that it is told of."""

    callback: Callback
    sigma_at: Sequence[Tensor]


def walk(
    course: Course,
    model: TeacherGuidedDenoiser,
    x: Tensor,
    table: Sequence[Tensor],
    extra_args: Mapping[str, Any],
    noise: Source,
    indices: Iterable[int],
    told: Told | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The loop. ``dtype``: what the networks are given, where it is not x's."""
    cfg_pp, memory = course.cfg_pp, course.memory
    student = bind(
        model.student, "student", x, extra_args, needs_uncond=cfg_pp,
        dtype=dtype, max_batch=model.max_batch,
    )  # fmt: skip
    lessons = [step.lessons for step in course.steps]
    guided = prepare_guided(model, lessons, x, extra_args, dtype) if course.teaches else None
    earlier: tuple[Any, ...] = ()  # the directions that earlier steps began with, newest first
    past: tuple[Tensor, ...] = ()  # the states that they began with
    try:
        for i in indices:
            churn, lifted, stages, _ = course.steps[i]
            here = guided[i] if guided else None
            if churn is not None:
                x = churn(((x,),), noise.between(i, None))
            if here is not None:
                here.fetch()
            point, directions = x, earlier
            taught: tuple[Tensor, ...] = ()
            info: dict[str, Any] = {}
            for stage in stages:
                kept = directions[:memory]
                before = writes(kept) if kept else None
                denoised, uncond = student(point, table[stage.evaluation])
                if before is not None:
                    check_unwritten(kept, before, "student")
                directions = (uncond if cfg_pp else denoised, *directions)
                if told and stage is stages[0]:
                    info = report(x, i, told.sigma_at[i], denoised, lifted)
                if here and stage is stages[-1]:
                    renoised, taught = here.teach(point, denoised, directions[0], i, noise.renoise)
                    if told:
                        info |= here.report(denoised, renoised, taught)
                # As k-diffusion, after the step's first evaluation; where a teacher speaks, after.
                if told and stage is stages[-1 if here else 0]:
                    told.callback(info)
                groups = ((x, denoised), taught, directions, past)
                update = stage.update
                fresh = None if update.noise is None else noise.between(i, stage.end)
                point = update(groups, fresh)
            if memory:
                earlier = (directions[len(directions) - len(earlier) - 1], *earlier)[:memory]
            if course.states:
                past = (x, *past)[: course.states]
            x = point
    finally:
        for one in guided or ():
            if one is not None:
                one.release()
    return x


def report(
    x: Tensor, i: int, sigma: Tensor, denoised: Tensor, level: float | None = None
) -> dict[str, Any]:
    """What k-diffusion tells its callbacks; ``level`` is where churn has lifted x."""
    churned = sigma if level is None else sigma.new_full((), level)
    return {"x": x, "i": i, "sigma": sigma, "sigma_hat": churned, "denoised": denoised}


def check_model(model: Any) -> TeacherGuidedDenoiser:
    if not isinstance(model, TeacherGuidedDenoiser):
        raise TypeError(
            f"model is a {type(model).__name__}; kdpp's samplers take a student with its teacher: "
            "wrap it, kdpp.TeacherGuidedDenoiser(student, teacher)"
        )
    return model


def check_kind(levels: Sequence[float], model: TeacherGuidedDenoiser, space: Space) -> None:
    """ValueError for a flow model's schedule given to another model, or the reverse."""
    if space is FLOW:
        if levels and levels[0] > 1.0:
            raise ValueError(
                f"sigmas starts at {levels[0]:g}; the student is a flow model, whose levels lie in "
                "[0, 1] (for a schedule of σ = τ/(1-τ), bring the student over with kdpp.as_ve)"
            )
    elif model.flow is None and levels and levels[0] == 1.0 and levels[-1] == 0.0:
        raise ValueError(
            "sigmas runs from exactly 1 to 0, as a flow model's do; the student is none. Mark it "
            "(kdpp.FlowDenoiser, or flow=True), or say flow=False if σ = 1 is meant"
        )
