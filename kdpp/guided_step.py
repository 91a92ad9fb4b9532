"""A guided step: the student's estimate is noised again, the teachers denoise it, both are mixed.

Distillation++, Algorithm 1 (Park et al. 2025). At the point x, level σ, the student's estimate is x̂
and the solver's direction d (x̂ too; under CFG++ the unconditional estimate)::

    x_s   = x̂ + σ_s ε,   ε = sqrt(1-ρ²)·(x - d)/σ + ρ n         `renoise_row`
    x̂_ψ   = D_ψ^ω(x_s, σ_s)                                     `GuidedStep.revise`
    x̂_new = x̂ + Σ_j λ_j (x̂_ψj - x̂)                              `mix`

`plan_revisions` says in numbers who is asked at which step, from which level and with which share;
`prepare` binds the networks for a run; `GuidedStep.revise` carries one step out. The solver's row
weighs x̂_new. Where it is `mix`'s, the update takes its terms instead, which saves a kernel and is
the same (`kdpp.update`).
"""

from __future__ import annotations

import math
import numbers
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdpp.checks import check_number
from kdpp.denoisers import (
    Call,
    Conditioning,
    Unlike,
    check_unwritten,
    conditioning_of,
    counted,
    shaped,
    writes,
)
from kdpp.guidance import Combine, LatentMap, NoiseRange, Renoise, Scale, Teacher
from kdpp.guidance import TeacherGuidedDenoiser as Model
from kdpp.kinds import OwnCFG
from kdpp.memory import Borrowed, borrowed_in
from kdpp.plan import Row, Space, Step
from kdpp.stacking import Stacked
from kdpp.update import Update

__all__ = ["GuidedStep", "Revision", "mix", "plan_revisions", "prepare", "weights_of"]

RenoiseNoise = Callable[[Tensor, int, float], Tensor]
"""``(like, step, level) -> noise`` for that step's renoising to the level."""
HIGHEST = 1e6
"""The highest σ_s: a flow model's τ = 1 is σ = ∞, all noise whatever the estimate."""


def mix(denoised: Tensor, estimates: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """``x̂_new = x̂ + Σ_j λ_j (x̂_ψj - x̂)``, of the student's estimate and the teachers'."""
    shares = (scale * (estimate - denoised) for scale, estimate in zip(scales, estimates))
    return sum(shares, start=denoised)


def renoise_row(sigma: float, sigma_s: float, rho: float) -> Row:
    """``x_s = x̂ + σ_s (sqrt(1-ρ²)·(x - d)/σ + ρ n)``, a row from x at σ."""
    predicted = sigma_s * math.sqrt(1.0 - rho * rho)
    return Row(predicted, 1.0, (-predicted / sigma,), noise=rho * sigma_s or None)


# In numbers ---------------------------------------------------------------------------------------


class Revision(NamedTuple):
    """One estimate that a teacher is asked for at a step, in numbers."""

    teacher: int
    scale: float
    """λ; 0 for a teacher that observes."""
    level: float
    """σ_s, as the model writes levels."""
    renoise: Update
    """What makes x_s of (x, x̂, d, n)."""


def plan_revisions(
    model: Model, steps: Sequence[Step], cfg_pp: bool, seed: Callable[[], int]
) -> tuple[tuple[Revision, ...], ...]:
    """Every step's revisions; ``seed`` gives one for random levels.

    Raises ValueError for settings that do not fit these steps: a list of scales of another length,
    an index outside them, a step to σ = 0 without a level of its own, Σλ outside [0, 1].
    """
    space = model.space
    planned: list[list[Revision]] = [[] for _ in steps]
    for j, teacher in enumerate(model.teachers):
        if isinstance(teacher.scale, Sequence) and len(teacher.scale) != len(steps):
            raise ValueError(
                f"teacher_scale holds {len(teacher.scale)} numbers for {len(steps)} steps; "
                "give one for each"
            )
        level_at = _levels(teacher.renoise, steps, space, partial(_mixed, seed, j))
        for i in _guided(teacher, steps, space):
            sigma_s = _within_training(model, j, level_at(i))
            if sigma_s == 0.0:
                if _chosen_one_by_one(teacher.steps):
                    raise ValueError(
                        f"teacher_steps holds step {i}, which goes to σ = 0, where "
                        f"renoise={teacher.renoise!r} revises nothing: give a level, renoise=σ_s"
                    )
                continue
            scale = 0.0 if teacher.observe else _scale_at(model, teacher.scale, i, sigma_s)
            if scale != 0.0 or teacher.observe:
                sigma = steps[i].stages[-1].sigma
                renoise = _renoise(sigma, sigma_s, float(teacher.renoise_eta), space, cfg_pp)
                one = Revision(j, scale / teacher.draws, space.level(sigma_s), renoise)
                planned[i] += [one] * teacher.draws
    for i, revisions in enumerate(planned):
        total = sum(revision.scale for revision in revisions)
        if total > 1.0 + 1e-9 and not model.extrapolate:
            raise ValueError(
                f"the teachers' scales sum to {total:g} at step {i}; Σλ must not exceed 1 "
                "(unless extrapolate=True)"
            )
    return tuple(map(tuple, planned))


def weights_of(revisions: Iterable[Revision], combined: bool) -> tuple[float, ...]:
    """The shares of what `GuidedStep.revise` gives in x̂_new; the rest is x̂'s."""
    scales = tuple(revision.scale for revision in revisions)
    return (1.0,) * any(scales) if combined else scales


def _mixed(seed: Callable[[], int], j: int) -> str:
    """A seed of teacher j's own."""
    return f"{seed()} {j}"


def _guided(teacher: Teacher, steps: Sequence[Step], space: Space) -> list[int]:
    """The indices of the steps that the teacher revises; steps of no length are left out."""
    able = (i for i, step in enumerate(steps) if step.gain != 0.0)
    wanted: Any = teacher.steps
    if isinstance(wanted, numbers.Integral):
        return list(islice(able, int(wanted)))
    if isinstance(wanted, NoiseRange):
        # A bound that is one of the levels holds it, though float32 has rounded the levels.
        low, high = wanted.low * (1.0 - 1e-6), wanted.high * (1.0 + 1e-6)
        return [i for i in able if low <= space.level(steps[i].sigma) <= high]
    count = len(steps)
    for i in wanted:
        if not -count <= i < count:
            raise ValueError(f"teacher_steps holds {i}; the schedule has {count} steps")
    chosen = {i % count for i in wanted}
    return [i for i in able if i in chosen]


@lru_cache(maxsize=256)
def _renoise(sigma: float, sigma_s: float, rho: float, space: Space, cfg_pp: bool) -> Update:
    return Update.of(renoise_row(sigma, sigma_s, rho), sigma, sigma_s, space, cfg_pp)


def _chosen_one_by_one(steps: Any) -> bool:
    return not isinstance(steps, numbers.Integral | NoiseRange)


def _scale_at(model: Model, scale: Scale, i: int, sigma_s: float) -> float:
    """λ at step i."""
    if callable(scale):
        return model.check_scale(scale(i, model.space.level(sigma_s)))
    return float(scale[i] if isinstance(scale, Sequence) else scale)


def _levels(
    renoise: Renoise, steps: Sequence[Step], space: Space, seed: Callable[[], str]
) -> Callable[[int], float]:
    """σ_s for a step's index, before it is clamped to the teacher's trained range."""
    if renoise == "next":
        return lambda i: steps[i].sigma_next
    if renoise == "current":
        return lambda i: min(steps[i].sigma, HIGHEST)
    if renoise == "random":
        levels = [sigma for step in steps for sigma in (step.sigma, step.sigma_next)]
        inside = [math.log(sigma) for sigma in levels if 0.0 < sigma < math.inf]
        uniform = random.Random(seed()).uniform
        return lambda i: math.exp(uniform(min(inside), max(inside)))
    if callable(renoise):

        def level(i: int) -> float:
            step = steps[i]
            value = renoise(i, space.level(step.sigma), space.level(step.sigma_next))
            return min(space.sigma(check_number("renoise's level", value, 0.0, math.inf)), HIGHEST)

        return level
    sigma = min(space.sigma(float(renoise)), HIGHEST)
    return lambda i: sigma


def _within_training(model: Model, j: int, sigma: float) -> float:
    """σ_s clamped to the range that teacher j was trained on; said once, by a warning."""
    trained = model.trained[j]
    if trained is None or sigma == 0.0:
        return sigma
    space = model.space
    clamped = min(max(sigma, space.sigma(trained[0])), space.sigma(trained[1]))
    # Schedules start a few float32 roundings above sigma_max.
    if not math.isclose(clamped, sigma, rel_tol=1e-4) and not model.warned:
        model.warned = True
        warnings.warn(
            f"a level σ_s = {space.level(sigma):g} lies outside the teacher's trained "
            f"range, [{trained[0]:g}, {trained[1]:g}]; it is clamped",
            stacklevel=2,
        )
    return clamped


# Carried out --------------------------------------------------------------------------------------


class Question(NamedTuple):
    """What one network is asked at a step, in one call: some of the step's revisions."""

    places: tuple[int, ...]
    """Which of the step's revisions."""
    revisions: tuple[Revision, ...]
    conditionings: tuple[Conditioning, ...]
    """One for each revision."""
    call: Call
    maps: tuple[LatentMap, LatentMap] | None

    def ask(
        self, x: Tensor, denoised: Tensor, direction: Tensor, step: int, noise: RenoiseNoise
    ) -> tuple[list[Tensor], list[Tensor]]:
        """x_s and x̂_ψ of each revision."""
        clean = denoised if self.maps is None else self.maps[0](denoised)
        groups = ((x, clean), (), (direction,))
        renoised, xs, sigmas = [], [], []
        for revision, given in zip(self.revisions, self.conditionings):
            draws = revision.renoise.noise is not None
            fresh = noise(clean, step, revision.level) if draws else None
            renoised.append(revision.renoise(groups, fresh))
            dtype = self.call.dtype or clean.dtype
            sigma = clean.new_full(clean.shape[:1], revision.level, dtype=dtype)
            xs += [renoised[-1]] * len(given.parts)
            sigmas += [sigma] * len(given.parts)
        answers = iter(self.call.parts(xs, sigmas))
        estimates = [
            given.join([next(answers) for _ in given.parts])[0] for given in self.conditionings
        ]
        if self.maps is not None:
            back = self.maps[1]
            estimates = [shaped(back(one), "teacher's map back", denoised) for one in estimates]
        return renoised, estimates


class GuidedStep(NamedTuple):
    """A guided step with its networks bound."""

    revisions: tuple[Revision, ...]
    questions: tuple[Question, ...]
    combine: Combine | None
    mask: Tensor | None
    arriving: tuple[Borrowed, ...]
    """The borrowed teachers that are asked for the first time."""
    leaving: tuple[Borrowed, ...]
    """Those that are asked for the last time."""

    def fetch(self) -> None:
        """To be called before the student's work of the step, which it may overlap."""
        for teacher in self.arriving:
            teacher.fetch()

    def release(self) -> None:
        """Let borrowed teachers go; also after a run that broke off."""
        for teacher in self.leaving:
            teacher.release()

    def revise(
        self, x: Tensor, denoised: Tensor, direction: Tensor, step: int, noise: RenoiseNoise
    ) -> Revised:
        """Ask the teachers, and say what x̂_new is made of.

        ``denoised`` and ``direction`` are the student's estimate and the solver's direction at x.
        Raises ValueError where a teacher writes its answer over an estimate that is still in use.
        """
        renoised: dict[int, Tensor] = {}
        said: dict[int, Tensor] = {}
        kept = [denoised, direction]
        for question in self.questions:
            before = writes(kept)
            points, estimates = question.ask(x, denoised, direction, step, noise)
            check_unwritten(kept, before, "teacher")
            if len(self.questions) > 1:  # the next network may use the same memory
                estimates = list(map(counted, estimates))
            kept += estimates
            renoised |= zip(question.places, points)
            said |= zip(question.places, estimates)
        self.release()
        places = range(len(self.revisions))
        taught = tuple(said[place] for place in places)
        given = tuple(renoised[place] for place in places)
        return Revised(self.heard(denoised, taught), taught, given)

    def heard(self, denoised: Tensor, estimates: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the solver's update weighs, by `weights_of`, in the place of x̂_new."""
        if self.combine is not None:
            new = self.new(denoised, estimates)
            return () if new is None else (new,)
        return tuple(self.masked(denoised, estimate) for estimate in estimates)

    def new(self, denoised: Tensor, estimates: Sequence[Tensor]) -> Tensor | None:
        """x̂_new itself; None where no teacher does more than observe."""
        pairs = [(e, r.scale) for e, r in zip(estimates, self.revisions) if r.scale != 0.0]
        if not pairs:
            return None
        new = (self.combine or mix)(denoised, *map(list, zip(*pairs)))
        return self.masked(denoised, shaped(new, "combine function", denoised))

    def masked(self, denoised: Tensor, estimate: Tensor) -> Tensor:
        """The estimate where the mask lets it be heard, the student's where it does not."""
        return estimate if self.mask is None else torch.lerp(denoised, estimate, self.mask)

    def report(self, denoised: Tensor, revised: Revised) -> dict[str, Any]:
        """What callbacks learn of the step; lists where there are several revisions."""
        new = self.new(denoised, revised.estimates)
        one = len(self.revisions) == 1
        return {
            "denoised_student": denoised,
            "renoised": revised.renoised[0] if one else list(revised.renoised),
            "denoised_teacher": revised.estimates[0] if one else list(revised.estimates),
            "denoised_revised": denoised if new is None else new,
        }


class Revised(NamedTuple):
    """What a guided step's teachers said: all in the order of the step's revisions."""

    heard: tuple[Tensor, ...]
    """What the update weighs; see `GuidedStep.heard`."""
    estimates: tuple[Tensor, ...]
    """The teachers' own estimates x̂_ψ."""
    renoised: tuple[Tensor, ...]
    """What they were given, x_s."""


# Before the loop ----------------------------------------------------------------------------------


def prepare(
    model: Model,
    steps: Sequence[tuple[Revision, ...]],
    x: Tensor,
    extra_args: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> list[GuidedStep | None]:
    """Every step's revisions with their networks bound; None for a step without."""
    mask = fit_mask(model.teacher_mask, x)
    given = {
        j: conditioning_of(
            model.teachers[j].denoiser,
            "teacher",
            {**extra_args, **(model.teachers[j].extra_args or {})},
            model.teachers[j].cfg_scale,
        )
        for j in sorted({revision.teacher for revisions in steps for revision in revisions})
    }
    first: dict[Borrowed, int] = {}
    last: dict[Borrowed, int] = {}
    for i, revisions in enumerate(steps):
        for revision in revisions:
            for part in borrowed_in(model.teachers[revision.teacher].denoiser):
                first.setdefault(part, i)
                last[part] = i
    asker = Asker(model, given, len(x), dtype)
    return [
        GuidedStep(
            revisions,
            asker.questions(revisions),
            model.combine,
            mask,
            arriving=tuple(part for part, step in first.items() if step == i),
            leaving=tuple(part for part, step in last.items() if step == i),
        )
        if revisions
        else None
        for i, revisions in enumerate(steps)
    ]


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


class Asker:
    """Puts a step's revisions into as few calls as can be.

    All that one network is asked is one call; so is what all members of a stack are asked, if each
    has as many rows. Apart stay what a denoiser with its own CFG is asked (its keywords cannot be
    joined), what needs maps to another latent space, and teachers whose keywords do not fit into
    one batch.
    """

    def __init__(
        self, model: Model, given: Mapping[int, Conditioning], batch: int, dtype: torch.dtype | None
    ) -> None:
        self.model, self.given, self.batch, self.dtype = model, given, batch, dtype
        self.calls: dict[tuple[int, ...], Call] = {}  # by teachers, to be used by later steps too

    def questions(self, revisions: Sequence[Revision]) -> tuple[Question, ...]:
        """The calls of a step."""
        asked: list[Question] = []
        for places in grouped(range(len(revisions)), lambda p: self.network(p, revisions[p])):
            for together in self.together(places, revisions):
                try:
                    asked.append(self.question(together, revisions))
                except Unlike:
                    apart = grouped(together, lambda p: revisions[p].teacher)
                    asked += [self.question(places, revisions) for places in apart]
        return tuple(asked)

    def network(self, place: int, revision: Revision) -> tuple[str, int]:
        """Equal for revisions that one network can hear together."""
        denoiser = self.denoiser(revision)
        if isinstance(denoiser, OwnCFG):
            return ("own CFG", place)
        if self.model.teachers[revision.teacher].maps is not None:
            return ("maps", revision.teacher)
        return ("network", id(denoiser.stack if isinstance(denoiser, Stacked) else denoiser))

    def together(self, places: Sequence[int], revisions: Sequence[Revision]) -> list[list[int]]:
        """One network's revisions as they are called: a stack as a whole, or member by member."""
        stack = getattr(self.denoiser(revisions[places[0]]), "stack", None)
        if stack is None:
            return [list(places)]
        members = grouped(places, lambda p: self.denoiser(revisions[p]).index)
        members.sort(key=lambda member: self.denoiser(revisions[member[0]]).index)
        rows = [
            sum(self.batch * len(self.given[revisions[p].teacher].parts) for p in member)
            for member in members
        ]
        fits = self.model.max_batch is None or sum(rows) <= self.model.max_batch
        if fits and rows == [rows[0]] * len(stack):
            return [[place for member in members for place in member]]
        return members

    def question(self, places: Sequence[int], revisions: Sequence[Revision]) -> Question:
        """These revisions as one call; `Unlike` where their keywords do not fit into one batch."""
        chosen = tuple(revisions[place] for place in places)
        given = tuple(self.given[revision.teacher] for revision in chosen)
        teachers = tuple(revision.teacher for revision in chosen)
        if teachers not in self.calls:
            parts = [part for one in given for part in one.parts]
            self.calls[teachers] = Call(
                self.answering(chosen), "teacher", parts, self.batch,
                dtype=self.dtype, max_batch=self.model.max_batch,
            )  # fmt: skip
        maps = self.model.teachers[teachers[0]].maps
        return Question(tuple(places), chosen, given, self.calls[teachers], maps)

    def answering(self, revisions: Sequence[Revision]) -> Any:
        """The network that answers all of these in one call."""
        first = self.denoiser(revisions[0])
        alone = all(self.denoiser(revision) is first for revision in revisions)
        return first if alone else first.stack

    def denoiser(self, revision: Revision) -> Any:
        return self.model.teachers[revision.teacher].denoiser


def grouped(items: Iterable[int], key: Callable[[int], Any]) -> list[list[int]]:
    """The items by their key, in the order in which the keys occur."""
    groups: dict[Any, list[int]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
