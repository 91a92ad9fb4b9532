"""The loop that every sampler runs. It knows rows of coefficients and no solver by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import trange

from kdpp.denoisers import Denoise, bind
from kdpp.guidance import Revision, TeacherGuidedDenoiser
from kdpp.noise import NoiseSampler, checked, host_noise, private_noise
from kdpp.plan import Row, Step, level_ratio

__all__ = ["Callback", "Plan", "run"]

Plan = Callable[[Sequence[float]], Iterable[Step]]
Callback = Callable[[dict[str, Any]], Any]
Draw = Callable[[], Tensor]

# The places of a row's tensors; from DIRECTION on come the solver's directions, newest first.
X, DENOISED, TEACHER, DIRECTION = range(4)


class Update(NamedTuple):
    """A row made ready: one interpolation for each tensor after the first, then the noise."""

    first: int
    lerps: tuple[tuple[int, float], ...]
    noise: float | None

    @classmethod
    def of(cls, row: Row, sigma: float, cfg_pp: bool, teacher_scale: float = 0.0) -> Update:
        """The weights of a row from x at ``sigma``, the teacher's share in it, folded into lerps.

        ``Σ w_j p_j = lerp(… lerp(p_0, p_1, w_1/(w_0+w_1)) …, p_n, w_n/Σ w)``, the largest weight
        first: the weights sum to one, so no partial sum vanishes.
        """
        taught = row.denoised * teacher_scale
        weights = [level_ratio(sigma, row.target), row.denoised - taught, taught, *row.direction]
        if row.direction and not cfg_pp:  # the newest direction is the estimate itself
            weights[DENOISED] += weights[DIRECTION]
            weights[DIRECTION] = 0.0
        terms = sorted(((w, place) for place, w in enumerate(weights) if w), reverse=True)
        total = 0.0
        folded = []
        for weight, place in terms:
            total += weight
            folded.append((place, weight / total))
        return cls(folded[0][0], tuple(folded[1:]), row.noise)

    def __call__(self, points: Sequence[Any], draw: Draw) -> Tensor:
        result: Tensor = points[self.first]
        for place, weight in self.lerps:
            result = torch.lerp(result, points[place], weight)
        if self.noise is not None:
            return add_noise(result, self.noise, draw)
        # A network may use its output buffer again: never hand out that very tensor.
        return result if self.lerps or self.first == X else result.clone()


def add_noise(x: Tensor, scale: float, draw: Draw) -> Tensor:
    noise = draw()
    return torch.add(x, noise, alpha=scale) if scale else x


class Lesson(NamedTuple):
    """A guided step's `Revision`, ready to be carried out."""

    revision: Revision
    renoise: Update
    teacher: Denoise
    noise: NoiseSampler

    def __call__(
        self, point: Tensor, denoised: Tensor, direction: Tensor | None, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The student's estimate noised again, and the teacher's estimate from it."""
        sigma_s = point.new_full(point.shape[:1], self.revision.sigma)
        points = (point, denoised, None, direction)
        renoised = self.renoise(points, lambda: self.noise(sigma, sigma_s[0]))
        return renoised, self.teacher(renoised, sigma_s)[0]

    def report(self, denoised: Tensor, renoised: Tensor, taught: Tensor) -> dict[str, Tensor]:
        """What callbacks learn of a guided step."""
        return {
            "denoised_student": denoised,
            "renoised": renoised,
            "denoised_teacher": taught,
            "denoised_revised": torch.lerp(denoised, taught, self.revision.scale),
        }


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
) -> Tensor:
    """Check everything, turn the sigmas into coefficients once, and walk the plan's steps.

    ``cfg_pp``: the solver's direction comes from the student's unconditional estimate. For the
    other arguments and the errors see `kdpp.solvers`.
    """
    model = check_model(model)
    check_latent(x)
    levels, sigmas = check_sigmas(sigmas)
    if len(levels) < 2:
        return x
    extra_args = {} if extra_args is None else extra_args
    steps = list(plan(levels))
    student = bind(model.student, "student", x, extra_args, needs_uncond=cfg_pp)
    lessons = prepare_lessons(model, steps, x, extra_args, cfg_pp)
    updates = prepare_updates(steps, lessons, cfg_pp)
    noise = checked(noise_sampler or host_noise(x), "noise_sampler", x)

    sigma_at = sigmas.unbind()
    memory = max(1, *(stage.row.memory for step in steps for stage in step.stages))
    directions: tuple[Tensor | None, ...] = ()
    for i in trange(len(steps), disable=disable):
        step, lesson, sigma = steps[i], lessons[i], sigma_at[i]
        draw = partial(noise, sigma, sigma_at[i + 1])
        if step.churn is not None:
            x = add_noise(x, step.churn, draw)
        point = x
        info: dict[str, Any] = {}
        for stage, update in zip(step.stages, updates[i]):
            denoised, uncond = student(point, x.new_full(x.shape[:1], stage.sigma))
            direction = uncond if cfg_pp else denoised
            refuse_reuse(direction, directions[: memory - 1], "student")
            directions = (direction, *directions)[:memory]
            taught = None
            if callback and point is x:
                info = report(x, i, sigma, step, denoised)
            if lesson and stage is step.stages[-1]:
                renoised, taught = lesson(point, denoised, direction, sigma)
                refuse_reuse(taught, (denoised,), "teacher")
                if callback:
                    info |= lesson.report(denoised, renoised, taught)
            # As k-diffusion, after the step's first evaluation; where a teacher speaks, after it.
            if callback and stage is step.stages[-1 if lesson else 0]:
                callback(info)
            point = update((x, denoised, taught, *directions), draw)
        x = point
    return x


def refuse_reuse(output: Any, kept: Sequence[Any], name: str) -> None:
    """ValueError where a network answered in a tensor that holds an answer still in use."""
    if any(memory_of(output) == memory_of(tensor) for tensor in kept):
        raise ValueError(
            f"the {name} returned the same memory twice, and the first answer, now overwritten, "
            "is still in use; return a new tensor from every call (clone the output)"
        )


def memory_of(tensor: Tensor) -> tuple[int, Any]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def report(x: Tensor, i: int, sigma: Tensor, step: Step, denoised: Tensor) -> dict[str, Any]:
    """What k-diffusion tells its callbacks."""
    sigma_hat = step.stages[0].sigma
    churned = sigma if sigma_hat == step.sigma else sigma * (sigma_hat / step.sigma)
    return {"x": x, "i": i, "sigma": sigma, "sigma_hat": churned, "denoised": denoised}


def prepare_lessons(
    model: TeacherGuidedDenoiser,
    steps: Sequence[Step],
    x: Tensor,
    extra_args: Mapping[str, Any],
    cfg_pp: bool,
) -> list[Lesson | None]:
    """Every step's lesson; without any, no teacher is bound and no random state is looked at."""
    revisions = model.revisions(steps)
    if not any(revisions):
        return [None] * len(steps)
    teacher = bind(model.teacher, "teacher", x, extra_args, model.teacher_cfg_scale)
    sampler = model.renoise_noise_sampler or private_noise(x)
    noise = checked(sampler, "renoise_noise_sampler", x)

    def lesson(step: Step, revision: Revision) -> Lesson:
        renoise = Update.of(revision.renoise, step.stages[-1].sigma, cfg_pp)
        return Lesson(revision, renoise, teacher, noise)

    return [lesson(step, r) if r else None for step, r in zip(steps, revisions)]


def prepare_updates(
    steps: Sequence[Step], lessons: Sequence[Lesson | None], cfg_pp: bool
) -> list[list[Update]]:
    """Every stage's update; the teacher's share goes into the last one of a guided step."""
    updates = []
    for step, lesson in zip(steps, lessons):
        *before, last = (stage.row for stage in step.stages)
        sigma = step.stages[0].sigma
        scale = lesson.revision.scale if lesson else 0.0
        rows = [Update.of(row, sigma, cfg_pp) for row in before]
        updates.append([*rows, Update.of(last, sigma, cfg_pp, scale)])
    return updates


def check_model(model: Any) -> TeacherGuidedDenoiser:
    if not isinstance(model, TeacherGuidedDenoiser):
        raise TypeError(
            f"model is a {type(model).__name__}; kdpp's samplers take a student with its teacher: "
            "wrap it, kdpp.TeacherGuidedDenoiser(student, teacher)"
        )
    return model


def check_latent(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it must be a tensor (batch, *shape)")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; a latent must be floating point")
    if x.ndim == 0:
        raise ValueError("x has no dimensions; it must be a batch, (batch, *shape)")


def check_sigmas(sigmas: Any) -> tuple[list[float], Tensor]:
    """The levels as float64 numbers, read once, and as the tensor that callbacks see."""
    tensor = torch.as_tensor(sigmas)
    if tensor.ndim != 1:
        raise ValueError(f"sigmas has shape {tuple(tensor.shape)}; it must be 1-D")
    levels: list[float] = tensor.detach().to("cpu", torch.float64).tolist()
    for sigma in levels:
        if not 0.0 <= sigma < math.inf:
            raise ValueError(f"sigmas holds {sigma!r}; every level must be a finite number ≥ 0")
    for sigma, sigma_next in pairwise(levels):
        if sigma_next > sigma:
            raise ValueError(
                f"sigmas rises from {sigma!r} to {sigma_next!r}; levels must not increase"
            )
    return levels, tensor
