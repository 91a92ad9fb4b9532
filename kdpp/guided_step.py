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
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdpp.algebra import Place, Weigher, WeightedSum
from kdpp.asking import Answer, Asker, Evaluation, Group, Term, ask_all, terms_of, weighing
from kdpp.checks import check_number
from kdpp.denoisers import check_unwritten, shaped, writes
from kdpp.guidance import Combine, LatentMap, Renoise, Scale
from kdpp.guidance import TeacherGuidedDenoiser as Model
from kdpp.plan import Row, Space, Step
from kdpp.steps import chosen, one_by_one
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
    shares: tuple[float, ...] = ()
    """Of a teacher that is a weighted sum: what each of its networks weighs."""


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
        summed = teacher.denoiser if isinstance(teacher.denoiser, WeightedSum) else None
        weigher = summed and Weigher(summed, steps, space)
        able = (i for i, step in enumerate(steps) if step.gain != 0.0)
        for i in chosen("teacher_steps", teacher.steps, steps, able, space):
            sigma_s = _within_training(model, j, level_at(i))
            if sigma_s == 0.0:
                if one_by_one(teacher.steps):
                    raise ValueError(
                        f"teacher_steps holds step {i}, which goes to σ = 0, where "
                        f"renoise={teacher.renoise!r} revises nothing: give a level, renoise=σ_s"
                    )
                continue
            scale = 0.0 if teacher.observe else _scale_at(model, teacher.scale, i, sigma_s)
            if scale != 0.0 or teacher.observe:
                sigma = steps[i].stages[-1].sigma
                renoise = _renoise(sigma, sigma_s, float(teacher.renoise_eta), space, cfg_pp)
                level = space.level(sigma_s)
                shares = weigher.shares(Place(level, level, i)) if weigher else ()
                one = Revision(j, scale / teacher.draws, level, renoise, shares)
                planned[i] += [one] * teacher.draws
        if weigher and any(revision.teacher == j for step in planned for revision in step):
            weigher.check_met()
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


@lru_cache(maxsize=256)
def _renoise(sigma: float, sigma_s: float, rho: float, space: Space, cfg_pp: bool) -> Update:
    return Update.of(renoise_row(sigma, sigma_s, rho), sigma, sigma_s, space, cfg_pp)


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


class GuidedStep(NamedTuple):
    """A guided step with its networks bound."""

    revisions: tuple[Revision, ...]
    terms: tuple[Term, ...]
    """What all revisions ask, one after the other."""
    owners: tuple[int, ...]
    """The revision that a term is for."""
    groups: tuple[Group, ...]
    """The calls that ask all terms."""
    weigh: tuple[Callable[[Sequence[Answer]], Answer], ...]
    """What makes a revision's estimate of its terms' answers."""
    maps: tuple[tuple[LatentMap, LatentMap] | None, ...]
    """Of each revision, to the teacher's latent space and back."""
    dtype: torch.dtype | None
    combine: Combine | None
    mask: Tensor | None

    def revise(
        self, x: Tensor, denoised: Tensor, direction: Tensor, step: int, noise: RenoiseNoise
    ) -> Revised:
        """Ask the teachers, and say what x̂_new is made of.

        ``denoised`` and ``direction`` are the student's estimate and the solver's direction at x.
        Raises ValueError where a teacher writes its answer over an estimate that is still in use.
        """
        mapped: dict[int, Tensor] = {}
        points: dict[int, tuple[Tensor, Tensor]] = {}

        def point(term: int) -> tuple[Tensor, Tensor]:
            """x_s and σ_s of the revision that a term is for."""
            place = self.owners[term]
            if place not in points:
                revision, maps = self.revisions[place], self.maps[place]
                clean = denoised
                if maps is not None:
                    if revision.teacher not in mapped:
                        mapped[revision.teacher] = maps[0](denoised)
                    clean = mapped[revision.teacher]
                draws = revision.renoise.noise is not None
                fresh = noise(clean, step, revision.level) if draws else None
                renoised = revision.renoise(((x, clean), (), (direction,)), fresh)
                dtype = self.dtype or clean.dtype
                sigma = clean.new_full(clean.shape[:1], revision.level, dtype=dtype)
                points[place] = renoised, sigma
            return points[place]

        answers = iter(ask_all(self.groups, point, (denoised, direction), "teacher"))
        taught: list[Tensor] = []
        for place, (weigh, maps) in enumerate(zip(self.weigh, self.maps)):
            estimate, _ = weigh([next(answers) for _ in range(self.owners.count(place))])
            if maps is not None:
                before = writes(taught)
                estimate = shaped(maps[1](estimate), "teacher's map back", denoised)
                check_unwritten(taught, before, "teacher's map back")
            taught.append(estimate)
        given = tuple(points[place][0] for place in range(len(self.revisions)))
        return Revised(self.heard(denoised, taught), tuple(taught), given)

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
    asker = Asker("teacher", len(x), dtype, model.max_batch)
    known: dict[tuple[int, tuple[float, ...]], tuple[Term, ...]] = {}

    def terms_for(revision: Revision) -> tuple[Term, ...]:
        """What a revision asks; the same for equal ones, which may then share a call."""
        key = revision.teacher, revision.shares
        if key not in known:
            teacher = model.teachers[revision.teacher]
            known[key] = terms_of(
                teacher.denoiser, "teacher", x, {**extra_args, **(teacher.extra_args or {})},
                teacher.cfg_scale, at=Evaluation(revision.level, 0.0, revision.shares),
                apart=None if teacher.maps is None else revision.teacher,
            )  # fmt: skip
        return known[key]

    def prepared(revisions: tuple[Revision, ...]) -> GuidedStep:
        asked = [terms_for(revision) for revision in revisions]
        terms = tuple(term for terms in asked for term in terms)
        return GuidedStep(
            revisions,
            terms,
            owners=tuple(place for place, terms in enumerate(asked) for _ in terms),
            groups=asker.groups(terms),
            weigh=tuple(weighing([term.share for term in terms]) for terms in asked),
            maps=tuple(model.teachers[revision.teacher].maps for revision in revisions),
            dtype=dtype,
            combine=model.combine,
            mask=mask,
        )

    return [prepared(revisions) if revisions else None for revisions in steps]


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
