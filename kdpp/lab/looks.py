"""The looks of `kdpp.lab.tune`, measured: least squares along a student's runs, and whole runs.

A *look* is one call of the teacher at one step, ``b = D_ψ^w(x̂ + σ_s ε, σ_s)``; the formulas stand
in `kdpp.lab.tuning.tune`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import kdpp
from kdpp.checks import check_count, check_number, check_sigmas
from kdpp.denoisers import pick_rows
from kdpp.kinds import Denoiser, trained_range
from kdpp.lab.sampling import RENOISE, SOLVER
from kdpp.noise import SeededNoise
from kdpp.plan import VE, Step, level_ratio
from kdpp.solver import Solver, solver_of

__all__ = [
    "Change",
    "Distances",
    "Half",
    "Longer",
    "Look",
    "Pair",
    "Price",
    "Trial",
    "distances",
    "estimates",
    "possible_looks",
    "steps_of",
]

SURE = 0.95
"""The confidence of every interval."""
EXPLAINED = 0.05
"""The least share of the miss that a look must explain to be tried."""
VISIBLE = 10**-2.5
"""The least gain that counts, as a share of the pictures' variance: 0.3 %, 25 dB below it.

Where the pictures' deviation is a quarter of their range that is a PSNR of 37 dB.
"""
SAME = 1e-6
"""A look whose ``|b - x̂|²`` is a smaller share of the miss says what the student says."""
FEWEST = 8
"""Its fewest steps for one of the student's."""
ROUNDING = 1e-12
FAR = 0.9
"""The quantile of the unguided distances that larger ones count as."""

By = Literal["teacher", "student"]
Sampler = Callable[..., Tensor] | Solver | str


@dataclass(frozen=True)
class Look:
    """One way to spend a call at one step, and what least squares says of it.

    Attributes:
        by: "teacher", or "student" for the control: the student in the teacher's place.
        step, sigma: the guided step, from 0, and the level that it starts at.
        renoise, renoise_eta, cfg_scale: σ_s, ρ and ω, see `kdpp.TeacherGuidedDenoiser`.
        scale, low, high: λ* and its interval, at `SURE` for all looks together (Bonferroni).
        explained: R², the share of ``Σ|miss|²`` that ``λ*(b - x̂)`` takes away.
    """

    by: By
    step: int
    sigma: float
    renoise: float
    renoise_eta: float
    cfg_scale: float
    scale: float = 0.0
    low: float = 0.0
    high: float = 0.0
    explained: float = 0.0

    @property
    def place(self) -> tuple[int, float, float]:
        """Where and with which noise it is taken, whoever takes it."""
        return self.step, self.renoise, self.renoise_eta

    @property
    def worth_a_trial(self) -> bool:
        """Whether λ* is surely not 0 and the look explains enough."""
        return (self.low > 0.0 or self.high < 0.0) and self.explained >= EXPLAINED

    @property
    def settings(self) -> dict[str, Any]:
        """Keywords of `kdpp.TeacherGuidedDenoiser` that do this, λ* rounded to three digits."""
        scale = round(self.scale, 3)
        settings: dict[str, Any] = {
            "teacher_scale": scale,
            "teacher_steps": [self.step],
            "renoise": self.renoise,
            "renoise_eta": self.renoise_eta,
            "teacher_cfg_scale": self.cfg_scale,
        }
        return settings if 0.0 <= scale <= 1.0 else settings | {"extrapolate": True}


@dataclass(frozen=True)
class Change:
    """A paired change of the mean squared distance to the teacher's run.

    ``mean``, in [``low``, ``high``] at `SURE`, is a share of the unguided distance; ``of_variance``
    the same change as a share of the pictures' variance.
    """

    mean: float
    low: float
    high: float
    of_variance: float

    @property
    def counts(self) -> bool:
        """Whether the distance falls, surely and visibly."""
        return self.high < 0.0 and -self.of_variance >= VISIBLE


@dataclass(frozen=True)
class Trial:
    """The best look of the teacher and of the student at one step, in whole runs.

    ``change`` and ``itself_change`` are against no guidance, ``own`` is the teacher's against the
    student's: how much of the change is the teacher's own.
    """

    look: Look
    itself: Look
    change: Change
    itself_change: Change
    own: Change


@dataclass(frozen=True)
class Longer:
    """The control of equal cost: the student alone, in as many more steps as the look takes
    evaluations, at least one.

    Attributes:
        levels: of that run.
        change: of its distance to the run in which the teacher takes every one of *its* steps,
            against the distance of the student's own run to the teacher's.
        over: of the guided distance against this one.
    """

    levels: tuple[float, ...]
    change: Change
    over: Change


@dataclass(frozen=True)
class Price:
    """What guidance adds to one image; both halves of CFG count.

    ``student`` and ``teacher`` are evaluations of the whole guided run; ``compute`` is its
    parameters × evaluations over those of the unguided run, None where a denoiser is no module.
    """

    student: int
    teacher: int
    compute: float | None


class Move(NamedTuple):
    """What a step does: ``x' = ratio·x`` where every estimate is 0, and a revision's weight in x'.

    The ratio is σ_down/σ: to a student that always says 0 the ODE's solution is proportional to σ.
    """

    ratio: float
    gain: float

    @classmethod
    def of(cls, step: Step) -> Move:
        ratio = 1.0
        for stage in step.stages:
            target = stage.row.end
            if target < ROUNDING * step.sigma:  # weights of several signs, that cancel
                target = 0.0
            onward = ratio if stage.onward else 1.0
            ratio = onward * level_ratio(step.base(stage), target)
        return cls(ratio, step.gain)


class Study(NamedTuple):
    """The unguided pictures, the teacher's in their place, and the sums of every look.

    ``sums`` (n, looks, 3) holds ``<d, miss>``, ``|d|²`` and ``|miss|²`` with ``d = b - x̂``.
    """

    plain: Tensor
    perfect: Tensor
    sums: Tensor


class Pair:
    """Student, teacher and sampler, checked: what a run of theirs does and takes."""

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        sampler: Sampler,
        sigmas: Tensor | Sequence[float],
        extra_args: Mapping[str, Any],
        teacher_cfg_scale: float,
        detail: int,
        max_batch: int | None,
    ) -> None:
        if kdpp.TeacherGuidedDenoiser(student, teacher, teacher_steps=0).space is not VE:
            raise ValueError(
                "tune takes denoisers in VE form: bring a flow model and its teacher over with "
                "kdpp.as_ve, and the levels as σ = τ/(1-τ)"
            )
        self.student, self.teacher = student, teacher
        self.solver, self.options = solver_of(sampler)
        self.extra_args, self.max_batch = extra_args, max_batch
        self.teacher_cfg_scale = check_number("teacher_cfg_scale", teacher_cfg_scale)
        self.own_scale = check_number("cond_scale", extra_args.get("cond_scale", 1.0))
        self.detail = check_count("detail", detail, 1)
        self.halves = self.evaluations_of("student", self.own_scale)
        if self.solver.cfg_pp:
            self.halves = halves_of(student)
        self._take(sigmas)
        self.spent: dict[By, int] = {"student": 0, "teacher": 0}
        self.progress: Callable[[int], object] = lambda count: None

    def _take(self, sigmas: Tensor | Sequence[float]) -> None:
        """The levels, and what the sampler does on them."""
        self.levels = check_sigmas(sigmas)[0]
        if len(self.levels) < 2 or self.levels[0] == 0.0:
            raise ValueError(f"sigmas is {self.levels}; give two levels or more, the first above 0")
        self.plan = self.solver.plan(self.levels, **self.options)
        if any(step.churn is not None for step in self.plan):
            raise ValueError("tune does not follow churn; leave s_churn 0")
        self.moves = [Move.of(step) for step in self.plan]
        self.evaluations = self.halves * sum(len(step.stages) for step in self.plan)

    def on(self, levels: Sequence[float]) -> Pair:
        """The same pair on other levels; what it spends counts here."""
        other = copy.copy(self)
        other._take(levels)
        return other

    def more_steps(self, look: Look) -> int:
        """How many steps of the student's own take as many evaluations as the look, at least 1."""
        each = self.evaluations / len(self.plan)
        return max(1, round(self.evaluations_of(look.by, look.cfg_scale) / each))

    @property
    def steps(self) -> list[int]:
        """The steps that a teacher can revise."""
        return [i for i, move in enumerate(self.moves) if move.gain != 0.0]

    def denoiser(self, by: By) -> Denoiser:
        return self.student if by == "student" else self.teacher

    def model(self, student: Denoiser, teacher: Any, **settings: Any) -> kdpp.TeacherGuidedDenoiser:
        return kdpp.TeacherGuidedDenoiser(
            student, teacher, flow=False, max_batch=self.max_batch, **settings
        )

    def half(
        self, x: Tensor, seeds: Tensor, rows: Tensor, extra_args: Mapping[str, Any] | None = None
    ) -> Half:
        """These of the samples; ``rows`` on the CPU."""
        given = self.extra_args if extra_args is None else extra_args
        return Half(self, x[rows.to(x.device)], pick_rows(given, len(x), rows), seeds[rows])

    def grid(self, i: int) -> list[float]:
        """The levels of the teacher's own run through step i, to where that goes without noise.

        ``tan(φ)`` with evenly spaced φ: finest where σ is about the data's deviation, which is 1.
        """
        start = self.levels[i]
        end = start * min(self.moves[i].ratio, 1.0)
        high, low = math.atan(start), math.atan(end)
        count = max(FEWEST, math.ceil(self.detail * (high - low) / math.atan(self.levels[0])))
        inner = [math.tan(high + (low - high) * k / count) for k in range(1, count)]
        return [start, *inner, end]

    def evaluations_of(self, by: By, scale: float) -> int:
        """Evaluations of one call."""
        return 1 if scale == 1.0 else halves_of(self.denoiser(by))

    def through(self) -> list[int]:
        """Evaluations of the teacher's own run through each step."""
        each = self.evaluations_of("teacher", self.teacher_cfg_scale)
        grids = [self.grid(i) for i in range(len(self.moves))]
        return [each * (len(grid) - 1) * (grid[0] > grid[-1]) for grid in grids]

    def expense(
        self, looks: Sequence[Look], fit: int, check: int, longest: Pair
    ) -> tuple[int, int]:
        """Evaluations of student and teacher, at most, for a tuning with so many samples;
        ``longest`` is the pair on the most levels that are tried."""
        asked: dict[By, list[int]] = {"student": [], "teacher": []}
        for look in looks:
            asked[look.by].append(self.evaluations_of(look.by, look.cfg_scale))
        through = self.through()
        trials = len(steps_of(looks))
        student = fit * (sum(asked["student"]) + self.evaluations * (1 + 2 * trials))
        student += check * (3 * self.evaluations + longest.evaluations)
        student += (fit * trials + check) * max(asked["student"])
        teacher = fit * (sum(asked["teacher"]) + 2 * sum(through) - through[0])
        teacher += check * (sum(through) + sum(longest.through()))
        teacher += (fit * trials + check) * max(asked["teacher"])
        return student, teacher

    def spend(self, by: By, count: int) -> None:
        """Count evaluations."""
        self.spent[by] += count
        self.progress(count)

    def price_of(self, look: Look) -> Price:
        """What an image takes with the look."""
        evaluations: dict[By, int] = {"student": self.evaluations, "teacher": 0}
        evaluations[look.by] += self.evaluations_of(look.by, look.cfg_scale)
        student, teacher = _parameters(self.student), _parameters(self.teacher)
        compute: float | None = None
        if student is not None and teacher is not None:
            compute = student * evaluations["student"] + teacher * evaluations["teacher"]
            compute /= student * self.evaluations
        return Price(evaluations["student"], evaluations["teacher"], compute)


@dataclass(frozen=True)
class Half:
    """One half of the samples, and what the pair does with them."""

    pair: Pair
    x: Tensor
    extra_args: Mapping[str, Any]
    seeds: Tensor

    def parts(self, batch: int | None) -> list[Half]:
        """The same samples, so many at a time."""
        return [
            self.pair.half(self.x, self.seeds, rows, self.extra_args)
            for rows in torch.split(torch.arange(len(self.x)), batch or len(self.x))
        ]

    @cached_property
    def noises(self) -> list[Tensor]:
        """What the sampler's noise adds in each step."""
        draw = SeededNoise(self.x, self.seeds, SOLVER)
        added = []
        for step in self.pair.plan:
            noise = torch.zeros_like(self.x)
            for stage in step.stages:  # a draw goes to its stage's point, and onward from there
                kept = level_ratio(stage.sigma, stage.row.end) if stage.onward else 0.0
                noise = noise * kept
                if stage.row.noise is not None:
                    noise = noise + stage.row.noise * draw()
            added.append(noise)
        return added

    def sample(self, model: Any, x: Tensor) -> list[dict[str, Any]]:
        """What the callback is told of every step of a run, and at the end the result as ``x``."""
        pair, told = self.pair, list[dict[str, Any]]()
        noise = SeededNoise(x, self.seeds, SOLVER) if pair.solver.noise != "none" else None
        sigmas = torch.tensor(pair.levels, dtype=torch.float64)
        result = kdpp.sample(
            pair.solver, model, x, sigmas, self.extra_args, told.append, True, noise,
            **pair.options,
        )  # fmt: skip
        return [*told, {"x": result}]

    def guided(self, look: Look) -> Tensor:
        """The pictures with the look's guidance."""
        pair = self.pair
        noise = SeededNoise(self.x, self.seeds, RENOISE)
        helper = pair.denoiser(look.by)
        model = pair.model(pair.student, helper, renoise_noise_sampler=noise, **look.settings)
        pictures: Tensor = self.sample(model, self.x)[-1]["x"]
        pair.spend("student", len(self.x) * pair.evaluations)
        if model.teachers[0].scale != 0.0:
            pair.spend(look.by, len(self.x) * pair.evaluations_of(look.by, look.cfg_scale))
        return pictures

    def plain(self) -> Tensor:
        """The pictures of the student alone."""
        pair = self.pair
        model = pair.model(pair.student, pair.teacher, teacher_steps=0)
        pictures: Tensor = self.sample(model, self.x)[-1]["x"]
        pair.spend("student", len(self.x) * pair.evaluations)
        return pictures

    def follow(self, x: Tensor, i: int) -> Tensor:
        """Φ_ψ: where the teacher's own run takes the state, as far as step i goes without noise."""
        pair, levels = self.pair, self.pair.grid(i)
        if levels[0] == levels[-1]:
            return x
        alone = pair.model(pair.teacher, pair.teacher, teacher_steps=0)
        extra_args = {**self.extra_args, "cond_scale": pair.teacher_cfg_scale}
        sigmas = torch.tensor(levels, dtype=torch.float64)
        pair.spend(
            "teacher",
            len(x) * pair.evaluations_of("teacher", pair.teacher_cfg_scale) * (len(levels) - 1),
        )
        return kdpp.sample_dpmpp_2m_tg(alone, x, sigmas, extra_args, None, True)

    def perfect(self, first: Tensor | None = None) -> Tensor:
        """The teacher in the student's place: the run in which every step is Φ_ψ, and its noise."""
        x = self.x
        for i, noise in enumerate(self.noises):
            x = (self.follow(x, i) if first is None or i else first) + noise
        return x

    def study(self, looks: Sequence[Look]) -> Study:
        """One unguided run, in which every look is taken and none heard."""
        pair, count = self.pair, len(self.x)
        teachers = [
            kdpp.Teacher(
                pair.denoiser(look.by), 0.0, [look.step], look.cfg_scale, look.renoise,
                look.renoise_eta, observe=True,
            )
            for look in looks
        ]  # fmt: skip
        noise = SeededNoise(self.x, self.seeds, RENOISE)
        model = pair.model(pair.student, teachers, renoise_noise_sampler=noise)
        told = self.sample(model, self.x)
        pair.spend("student", count * pair.evaluations)
        for look in looks:
            pair.spend(look.by, count * pair.evaluations_of(look.by, look.cfg_scale))
        sums = []
        first = None
        for i in steps_of(looks):
            info, after = told[i], told[i + 1]["x"]
            there = self.follow(info["x"], i)
            first = there if i == 0 else first
            miss = (there + self.noises[i] - after) / pair.moves[i].gain
            own, answers = info["denoised_student"], info["denoised_teacher"]
            for answer in answers if isinstance(answers, list) else [answers]:
                d = answer - own
                sums.append(torch.stack([_dot(d, miss), _dot(d, d), _dot(miss, miss)], -1))
        return Study(told[-1]["x"], self.perfect(first), torch.stack(sums, 1))


def seen(pictures: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """The pictures as a viewer sees them; ValueError for numbers that are not finite."""
    if not bool(pictures.isfinite().all()):
        raise ValueError("a run of the student or the teacher ended in NaN or infinite numbers")
    pictures = pictures.double()
    return pictures if bounds is None else pictures.clamp(*bounds)


def distances(a: Tensor, b: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Mean squared distances of pictures, sample by sample."""
    return (seen(a, bounds) - seen(b, bounds)).square().flatten(1).mean(1)


class Distances:
    """What guidance changes of the distances to the teacher's pictures.

    Args:
        plain: the unguided distances, one for each sample (`distances`).
        perfect: the teacher's pictures.
    """

    def __init__(self, plain: Tensor, perfect: Tensor, bounds: tuple[float, float] | None) -> None:
        self.variance = float(seen(perfect, bounds).var(0).mean())
        if self.variance == 0.0:
            raise ValueError("the teacher's pictures are all the same; there is nothing to tune")
        self.farthest = float(plain.quantile(FAR))
        self.plain = plain.clamp(max=self.farthest)

    def trial(self, look: Look, itself: Look, taught: Tensor, second: Tensor) -> Trial:
        """What both looks change; ``taught`` and ``second`` are the distances with each."""
        taught, second = (one.clamp(max=self.farthest) for one in (taught, second))
        changes = (taught - self.plain, second - self.plain, taught - second)
        return Trial(look, itself, *map(self.change, changes))

    def longer(self, levels: Sequence[float], alone: Tensor, guided: Tensor) -> Longer:
        """What more steps change; ``alone`` are the distances with them, ``guided`` with a look."""
        alone, guided = (one.clamp(max=self.farthest) for one in (alone, guided))
        return Longer(tuple(levels), self.change(alone - self.plain), self.change(guided - alone))

    def change(self, difference: Tensor) -> Change:
        mean, low, high = (float(number) for number in jackknife(difference, self.plain, SURE))
        return Change(mean, low, high, mean * float(self.plain.mean()) / self.variance)


def possible_looks(pair: Pair, levels: Sequence[float]) -> list[Look]:
    """The looks to measure, in the order of steps."""
    for level in levels:
        check_number("levels holds a level that", level, 0.0, math.inf)
    ranges = [trained_range(model) for model in (pair.student, pair.teacher)]
    low, high = (
        pick(bound[k] for bound in [(0.0, math.inf), *filter(None, ranges)])
        for k, pick in enumerate((max, min))
    )
    scales = dict.fromkeys((1.0, pair.teacher_cfg_scale))
    askers: list[tuple[By, float]] = [("teacher", scale) for scale in scales]
    askers.append(("student", pair.own_scale))
    looks = []
    for i in pair.steps:
        sigma, after = pair.levels[i : i + 2]
        # Six digits, so that what is measured is what the settings print.
        near = [float(f"{level:.6g}") for level in (sigma, after)]
        for level in dict.fromkeys([*near, *(level for level in levels if level < sigma)]):
            if level > 0.0 and low * (1 - 1e-4) <= level <= high * (1 + 1e-4):
                looks += [
                    Look(by, i, sigma, level, eta, scale)
                    for eta in (1.0, 0.0)
                    for by, scale in askers
                ]
    if not looks:
        raise ValueError(
            f"no step can be revised from a level that both networks were trained for, "
            f"[{low:g}, {high:g}]; the sampler's are {pair.levels}"
        )
    return looks


def steps_of(looks: Sequence[Look]) -> list[int]:
    """The steps that have looks."""
    return list(dict.fromkeys(look.step for look in looks))


def estimates(looks: Sequence[Look], sums: Tensor) -> list[Look]:
    """The looks with what least squares says of them; ``sums`` as in `Study`, of all samples."""
    sure = 1.0 - (1.0 - SURE) / len(looks)
    uv, vv, ee = sums.unbind(-1)
    rows = torch.stack(fitted(uv, vv, ee, sure), -1).tolist()
    names = ("scale", "low", "high", "explained")
    return [replace(look, **dict(zip(names, row))) for look, row in zip(looks, rows)]


def fitted(uv: Tensor, vv: Tensor, ee: Tensor, sure: float) -> tuple[Tensor, ...]:
    """λ*, its interval and R², of sums (n, looks) for each sample; 0 where a look says the same."""
    scale, low, high = jackknife(uv, vv, sure)
    miss = ee.sum(0)
    explained = scale * uv.sum(0) / miss
    says = (miss > 0.0) & (vv.sum(0) > SAME * miss)
    return tuple(torch.where(says, value, 0.0) for value in (scale, low, high, explained))


def jackknife(above: Tensor, below: Tensor, sure: float) -> tuple[Tensor, Tensor, Tensor]:
    """``Σ above / Σ below`` over the samples (dimension 0), and its interval by the jackknife.

    The ratio is computed anew without each sample; from the spread of these follows its standard
    error, ``sqrt((n-1)/n Σ (r_j - r̄)²)``, and with Student's t for n - 1 the interval.
    """
    from scipy.stats import t

    count = len(above)
    ratio = above.sum(0) / below.sum(0)
    without = (above.sum(0) - above) / (below.sum(0) - below)
    error = ((count - 1) / count * (without - without.mean(0)).square().sum(0)).sqrt()
    reach = float(t.ppf((1.0 + sure) / 2.0, count - 1)) * error
    return ratio, ratio - reach, ratio + reach


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products, sample by sample."""
    return (a.double() * b.double()).flatten(1).sum(1)


def halves_of(denoiser: Denoiser) -> int:
    """How often a call evaluates a network where the CFG scale is not 1."""
    return denoiser.halves if isinstance(denoiser, kdpp.OwnCFG) else 2


def _parameters(denoiser: Denoiser) -> int | None:
    """How many numbers a network has, if it is one."""
    if not isinstance(denoiser, nn.Module):
        return None
    return sum(p.numel() for p in denoiser.parameters()) or None
