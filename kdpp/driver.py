"""The loop that every sampler runs. It knows rows of coefficients and no solver by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import trange

from kdpp.checks import check_latent, check_sigmas
from kdpp.denoisers import Denoise, bind, shaped
from kdpp.guidance import LatentMap, Revision, TeacherGuidedDenoiser
from kdpp.noise import NoiseSampler, checked, host_noise, private_generator, private_seed
from kdpp.plan import FLOW, Row, Space, Step
from kdpp.update import Update

__all__ = ["Callback", "Plan", "report", "run"]

Plan = Callable[[Sequence[float]], Iterable[Step]]
Callback = Callable[[dict[str, Any]], Any]
RenoiseNoise = Callable[[Tensor, Tensor, Tensor], Tensor]
nothing = nullcontext()


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
    check_kind(levels, model)
    if len(levels) < 2:
        return x
    extra_args = {} if extra_args is None else extra_args
    space = model.space
    steps = planned(plan, tuple(space.sigma(level) for level in levels))
    revisions = model.revisions(steps, lambda: private_seed(x))
    student = bind(model.student, "student", x, extra_args, needs_uncond=cfg_pp)
    lessons = prepare_lessons(model, steps, revisions, x, extra_args, cfg_pp)
    ready = prepare_steps(steps, tuple(map(tuple, revisions)), space, cfg_pp)
    if noise_sampler is None and any(one.draws for one in ready):
        noise_sampler = default_noise(x, sigmas)
    sigma_at = sigmas.unbind()

    def draw(i: int, level: float | None) -> Tensor:
        """Noise from step i's level to ``level``, or to the step's end."""
        assert noise_sampler is not None
        end = sigma_at[i + 1] if level is None else sigmas.new_full((), level)
        return checked(noise_sampler(sigma_at[i], end), "noise_sampler", x)

    memory, states = max(one.memory for one in ready), max(one.states for one in ready)
    earlier: tuple[Any, ...] = ()  # the directions that earlier steps began with, newest first
    past: tuple[Tensor, ...] = ()  # the states that they began with
    for i in trange(len(steps), disable=disable):
        churn, stages, here = ready[i].churn, ready[i].stages, lessons[i]
        if churn is not None:
            x = churn(((x,),), partial(draw, i, None))
        point, directions = x, earlier
        taught: tuple[Tensor, ...] = ()
        info: dict[str, Any] = {}
        for stage in stages:
            level = x.new_full(x.shape[:1], stage.level)
            with unwritten(directions[:memory], "student") if directions else nothing:
                denoised, uncond = student(point, level)
            directions = (uncond if cfg_pp else denoised, *directions)
            if callback and stage is stages[0]:
                info = report(x, i, sigma_at[i], denoised, stage.level if churn else None)
            if here and stage is stages[-1]:
                renoised, taught = teach(here, point, denoised, directions[0], sigma_at[i])
                if callback:
                    info |= report_lessons(here, denoised, renoised, taught)
            # As k-diffusion, after the step's first evaluation; where a teacher speaks, after it.
            if callback and stage is stages[-1 if here else 0]:
                callback(info)
            groups = ((x, denoised), taught, directions, past)
            point = stage.update(groups, partial(draw, i, stage.end))
        earlier = (directions[len(directions) - len(earlier) - 1], *earlier)[:memory]
        past = (x, *past)[:states]
        x = point
    return x


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


class ReadyStage(NamedTuple):
    """A stage made ready: the level its network sees, its update, and the level noise goes to."""

    level: float
    update: Update
    end: float | None


class ReadyStep(NamedTuple):
    """A step made ready: its churn, its stages, and what of the past it needs."""

    churn: Update | None
    stages: tuple[ReadyStage, ...]
    draws: bool
    memory: int
    states: int


@lru_cache(maxsize=64)
def prepare_steps(
    steps: tuple[Step, ...],
    revisions: tuple[tuple[Revision, ...], ...],
    space: Space,
    cfg_pp: bool,
) -> tuple[ReadyStep, ...]:
    """Every step made ready; the teachers' shares go into its last stage."""
    ready = []
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
            stages.append(ReadyStage(space.level(stage.sigma), update, end))
        states = max(len(stage.row.past) for stage in step.stages)
        ready.append(ReadyStep(churn, tuple(stages), step.draws, step.memory, states))
    return tuple(ready)


class Lesson(NamedTuple):
    """A `Revision` made ready to be carried out."""

    level: float
    scale: float
    renoise: Update
    teacher: Denoise
    maps: tuple[LatentMap, LatentMap] | None
    mask: Tensor | None
    noise: RenoiseNoise

    def __call__(
        self,
        point: Tensor,
        denoised: Tensor,
        direction: Tensor,
        sigma: Tensor,
        others: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The student's estimate noised again, and the teacher's estimate from it."""
        clean = denoised if self.maps is None else self.maps[0](denoised)
        level = clean.new_full(clean.shape[:1], self.level)
        draw = partial(self.noise, clean, sigma, clean.new_full((), self.level))
        renoised = self.renoise(((point, clean), (), (direction,)), draw)
        with unwritten((denoised, *others), "teacher"):
            taught, _ = self.teacher(renoised, level)
        if self.maps is not None:
            taught = shaped(self.maps[1](taught), "teacher's map back", denoised)
        if self.mask is not None:
            taught = torch.lerp(denoised, taught, self.mask)
        return renoised, taught


def teach(
    lessons: Sequence[Lesson],
    point: Tensor,
    denoised: Tensor,
    direction: Tensor,
    sigma: Tensor,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What each lesson's teacher was given, and its estimate."""
    renoised: tuple[Tensor, ...] = ()
    taught: tuple[Tensor, ...] = ()
    for lesson in lessons:
        given, estimate = lesson(point, denoised, direction, sigma, taught)
        renoised, taught = (*renoised, given), (*taught, estimate)
    return renoised, taught


def prepare_lessons(
    model: TeacherGuidedDenoiser,
    steps: Sequence[Step],
    revisions: Sequence[Sequence[Revision]],
    x: Tensor,
    extra_args: Mapping[str, Any],
    cfg_pp: bool,
) -> list[list[Lesson]]:
    """Every step's lessons; without any, no teacher is bound and no random state is looked at."""
    mask = fit_mask(model.teacher_mask, x)
    used = {revision.teacher for here in revisions for revision in here}
    if not used:
        return [[] for _ in steps]
    noise = renoise_noise(model.renoise_noise_sampler, x)
    bound = {}
    for j in used:
        one = model.teachers[j]
        own = {**extra_args, **(one.extra_args or {})}
        bound[j] = bind(one.denoiser, "teacher", x, own, one.cfg_scale)

    def lesson(step: Step, revision: Revision) -> Lesson:
        sigma, space = revision.sigma, model.space
        update = Update.of(revision.renoise, step.stages[-1].sigma, sigma, space, cfg_pp)
        maps = model.teachers[revision.teacher].maps
        teacher = bound[revision.teacher]
        return Lesson(space.level(sigma), revision.scale, update, teacher, maps, mask, noise)

    return [[lesson(step, r) for r in here] for step, here in zip(steps, revisions)]


def renoise_noise(sampler: NoiseSampler | None, x: Tensor) -> RenoiseNoise:
    """The renoise draws, shaped like their first argument: the caller's, or a private stream."""
    generator = private_generator(x) if sampler is None else None

    def draw(like: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
        if sampler is None:
            return torch.randn(
                like.shape, generator=generator, device=like.device, dtype=like.dtype
            )
        return checked(sampler(sigma, sigma_s), "renoise_noise_sampler", like)

    return draw


class unwritten:
    """ValueError where a network writes its answer over ``tensors``, earlier ones still in use.

    By torch's count of in-place writes, which inference mode and compiled code do not keep.
    """

    def __init__(self, tensors: Sequence[Any], name: str) -> None:
        counted = not torch.compiler.is_compiling()
        self.tensors = [t for t in tensors if counted and not t.is_inference()]
        self.writes = [tensor._version for tensor in self.tensors]
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self.writes != [tensor._version for tensor in self.tensors]:
            raise ValueError(
                f"the {self.name} wrote its answer into memory that holds an earlier one, still in "
                "use; return a new tensor from every call (clone the output)"
            )


def report(
    x: Tensor, i: int, sigma: Tensor, denoised: Tensor, level: float | None = None
) -> dict[str, Any]:
    """What k-diffusion tells its callbacks; ``level`` is where churn has lifted x."""
    churned = sigma if level is None else sigma.new_full((), level)
    return {"x": x, "i": i, "sigma": sigma, "sigma_hat": churned, "denoised": denoised}


def report_lessons(
    lessons: Sequence[Lesson],
    denoised: Tensor,
    renoised: Sequence[Tensor],
    taught: Sequence[Tensor],
) -> dict[str, Any]:
    """What callbacks learn of a guided step; lists where there are several lessons."""
    revised = denoised
    for lesson, estimate in zip(lessons, taught):
        revised = revised + lesson.scale * (estimate - denoised)
    one = len(lessons) == 1
    return {
        "denoised_student": denoised,
        "renoised": renoised[0] if one else list(renoised),
        "denoised_teacher": taught[0] if one else list(taught),
        "denoised_revised": revised,
    }


def check_model(model: Any) -> TeacherGuidedDenoiser:
    if not isinstance(model, TeacherGuidedDenoiser):
        raise TypeError(
            f"model is a {type(model).__name__}; kdpp's samplers take a student with its teacher: "
            "wrap it, kdpp.TeacherGuidedDenoiser(student, teacher)"
        )
    return model


def check_kind(levels: Sequence[float], model: TeacherGuidedDenoiser) -> None:
    """ValueError for a flow model's schedule given to another model, or the reverse."""
    if model.space is FLOW:
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


def fit_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask in the latent's dtype and on its device; ValueError where it does not fit."""
    if mask is None:
        return None
    try:
        mask.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"teacher_mask has shape {tuple(mask.shape)}, which does not broadcast to the latent's "
            f"{tuple(x.shape)}"
        ) from None
    return mask.to(x)
