"""The guided steps, carried out: renoise the student's estimate, ask the teachers, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdpp.denoisers import Call, Halves, OwnCFG, halves, shaped
from kdpp.guidance import LatentMap, Revision, Teacher, TeacherGuidedDenoiser
from kdpp.memory import Borrowed, borrowed_in
from kdpp.plan import Space
from kdpp.stacking import Stacked
from kdpp.update import Update

__all__ = ["Guided", "Lesson", "fit_mask", "plan_lessons", "prepare_guided", "writes"]

RenoiseNoise = Callable[[Tensor, int, float], Tensor]
"""``(like, step, level) -> noise`` for that step's renoising to the level."""


class Lesson(NamedTuple):
    """A `Revision` made ready: numbers only, the same for every run on the schedule."""

    place: int
    """Its index among the step's lessons."""
    teacher: int
    level: float
    scale: float
    renoise: Update


def plan_lessons(
    revisions: Iterable[Revision], sigma: float, space: Space, cfg_pp: bool
) -> tuple[Lesson, ...]:
    """The lessons of a step whose newest estimate is made at ``sigma``."""
    return tuple(
        Lesson(
            place,
            revision.teacher,
            space.level(revision.sigma),
            revision.scale,
            Update.of(revision.renoise, sigma, revision.sigma, space, cfg_pp),
        )
        for place, revision in enumerate(revisions)
    )


class Round(NamedTuple):
    """The lessons of a step that are one call of a network."""

    lessons: tuple[Lesson, ...]
    halves: tuple[Halves, ...]
    call: Call
    maps: tuple[LatentMap, LatentMap] | None
    mask: Tensor | None

    def teach(
        self, point: Tensor, denoised: Tensor, direction: Tensor, step: int, noise: RenoiseNoise
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the teachers are given, and their estimates.

        ``denoised`` and ``direction`` are the student's estimate and the solver's direction at
        ``point``.
        """
        clean = denoised if self.maps is None else self.maps[0](denoised)
        groups = ((point, clean), (), (direction,))
        renoised, xs, sigmas = [], [], []
        for lesson, given in zip(self.lessons, self.halves):
            fresh = noise(clean, step, lesson.level) if lesson.renoise.noise is not None else None
            renoised.append(lesson.renoise(groups, fresh))
            dtype = self.call.dtype or clean.dtype
            sigma = clean.new_full(clean.shape[:1], lesson.level, dtype=dtype)
            xs += [renoised[-1]] * len(given.conditions)
            sigmas += [sigma] * len(given.conditions)
        answers = iter(self.call.parts(xs, sigmas))
        taught = [given.join([next(answers) for _ in given.conditions])[0] for given in self.halves]
        if self.maps is not None:
            taught = [shaped(self.maps[1](one), "teacher's map back", denoised) for one in taught]
        if self.mask is not None:
            taught = [torch.lerp(denoised, one, self.mask) for one in taught]
        return renoised, taught


class Guided(NamedTuple):
    """A guided step: its rounds, and what borrowed teachers are to do before and after it."""

    rounds: tuple[Round, ...]
    lessons: tuple[Lesson, ...]
    arriving: tuple[Borrowed, ...]
    """The borrowed teachers that are heard for the first time."""
    leaving: tuple[Borrowed, ...]
    """Those that are heard for the last time."""

    def fetch(self) -> None:
        """To be called before the student's work of the step, which it may overlap."""
        for teacher in self.arriving:
            teacher.fetch()

    def release(self) -> None:
        """Let borrowed teachers go; also after a run that broke off."""
        for teacher in self.leaving:
            teacher.release()

    def teach(
        self, point: Tensor, denoised: Tensor, direction: Tensor, step: int, noise: RenoiseNoise
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What every lesson's teacher is given, and its estimate, in the lessons' order.

        Raises ValueError where a teacher writes its answer over an estimate still in use.
        """
        given: dict[int, Tensor] = {}
        taught: dict[int, Tensor] = {}
        for one in self.rounds:
            kept = (denoised, *taught.values())
            before = writes(kept)
            points, estimates = one.teach(point, denoised, direction, step, noise)
            check_unwritten(kept, before, "teacher")
            for lesson, x, estimate in zip(one.lessons, points, estimates):
                given[lesson.place], taught[lesson.place] = x, estimate
        self.release()
        order = range(len(self.lessons))
        return tuple(given[j] for j in order), tuple(taught[j] for j in order)

    def report(
        self, denoised: Tensor, renoised: Sequence[Tensor], taught: Sequence[Tensor]
    ) -> dict[str, Any]:
        """What callbacks learn of the step; lists where there are several lessons."""
        revised = denoised
        for lesson, estimate in zip(self.lessons, taught):
            revised = revised + lesson.scale * (estimate - denoised)
        one = len(taught) == 1
        return {
            "denoised_student": denoised,
            "renoised": renoised[0] if one else list(renoised),
            "denoised_teacher": taught[0] if one else list(taught),
            "denoised_revised": revised,
        }


def prepare_guided(
    model: TeacherGuidedDenoiser,
    steps: Sequence[tuple[Lesson, ...]],
    x: Tensor,
    extra_args: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> list[Guided | None]:
    """Every step's lessons with their networks bound; None where there are none."""
    mask = fit_mask(model.teacher_mask, x)
    given = {
        j: halves(
            model.teachers[j].denoiser,
            "teacher",
            {**extra_args, **(model.teachers[j].extra_args or {})},
            model.teachers[j].cfg_scale,
        )
        for j in sorted({lesson.teacher for lessons in steps for lesson in lessons})
    }
    calls: dict[tuple[int, ...], Call] = {}  # by the teachers who share one

    def one_round(lessons: tuple[Lesson, ...]) -> Round:
        teachers = tuple(lesson.teacher for lesson in lessons)
        mine = tuple(given[j] for j in teachers)
        if teachers not in calls:
            conditions = [condition for one in mine for condition in one.conditions]
            network = network_of([model.teachers[j] for j in teachers])
            calls[teachers] = Call(
                network, "teacher", conditions, len(x), dtype=dtype, max_batch=model.max_batch
            )
        return Round(lessons, mine, calls[teachers], model.teachers[teachers[0]].maps, mask)

    first: dict[Borrowed, int] = {}
    last: dict[Borrowed, int] = {}
    for i, lessons in enumerate(steps):
        for lesson in lessons:
            for part in borrowed_in(model.teachers[lesson.teacher].denoiser):
                first.setdefault(part, i)
                last[part] = i
    guided: list[Guided | None] = []
    for i, lessons in enumerate(steps):
        if not lessons:
            guided.append(None)
            continue
        rounds = tuple(one_round(shared) for shared in share(lessons, model, given, len(x)))
        arriving = tuple(part for part, step in first.items() if step == i)
        leaving = tuple(part for part, step in last.items() if step == i)
        guided.append(Guided(rounds, lessons, arriving, leaving))
    return guided


def share(
    lessons: tuple[Lesson, ...],
    model: TeacherGuidedDenoiser,
    given: Mapping[int, Halves],
    batch: int,
) -> list[tuple[Lesson, ...]]:
    """The lessons of a step, those together that can be one call of a network.

    One network's are, unless it does its own CFG (its keywords cannot be joined) or its teacher has
    a latent space of its own. So are those of all members of a stack, if each has as many rows.
    """
    groups: dict[Any, list[Lesson]] = {}
    for lesson in lessons:
        groups.setdefault(key_of(lesson, model.teachers[lesson.teacher]), []).append(lesson)
    shared: list[tuple[Lesson, ...]] = []
    for group in groups.values():
        members: dict[int, list[Lesson]] = {}
        for lesson in group:
            denoiser = model.teachers[lesson.teacher].denoiser
            index = denoiser.index if isinstance(denoiser, Stacked) else 0
            members.setdefault(index, []).append(lesson)
        rows = [
            sum(batch * len(given[lesson.teacher].conditions) for lesson in members[index])
            for index in sorted(members)
        ]
        ordered = [tuple(members[index]) for index in sorted(members)]
        fits = model.max_batch is None or sum(rows) <= model.max_batch
        denoiser = model.teachers[group[0].teacher].denoiser
        if isinstance(denoiser, Stacked) and fits and rows == [rows[0]] * len(denoiser.stack):
            ordered = [tuple(lesson for one in ordered for lesson in one)]
        shared += ordered
    return shared


def key_of(lesson: Lesson, teacher: Teacher) -> tuple[Any, ...]:
    """Equal for lessons that one network can hear together."""
    denoiser = teacher.denoiser
    if isinstance(denoiser, OwnCFG):
        return ("own", lesson.place)
    if teacher.maps is not None:
        return ("maps", lesson.teacher)
    return ("network", id(denoiser.stack if isinstance(denoiser, Stacked) else denoiser))


def network_of(teachers: Sequence[Teacher]) -> Any:
    """The network that answers for these teachers in one call."""
    first = teachers[0].denoiser
    several = len({id(teacher.denoiser) for teacher in teachers}) > 1
    return first.stack if isinstance(first, Stacked) and several else first


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


def writes(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written to, by torch's count, which inference mode does not keep."""
    if torch.compiler.is_compiling():
        return []
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def check_unwritten(tensors: Sequence[Tensor], before: list[int], name: str) -> None:
    """ValueError where a network wrote its answer over ``tensors``, earlier ones still in use."""
    if writes(tensors) != before:
        raise ValueError(
            f"the {name} wrote its answer into memory that holds an earlier one, still in "
            "use; return a new tensor from every call (clone the output)"
        )
