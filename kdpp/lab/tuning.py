"""Is guidance worth it for a student and its teacher, where, and how much?

A *look* is one call of the teacher at one step, ``b = D_ψ^ω(x̂ + σ_s ε, σ_s)``. Guidance moves the
student's estimate x̂ along ``b - x̂``. The *miss* of a step is how far it ends from where the
teacher's many steps lead from the same state. Least squares of the miss on ``b - x̂`` gives λ*, and
the share of the miss that such a look can correct. The best look of each step is then tried in
whole runs, and the best of these is checked on samples that played no part in the choice. See
`tune`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import kdpp
from kdpp.checks import check_count, check_latent
from kdpp.kinds import Denoiser, is_flow
from kdpp.lab.affordable import LAB
from kdpp.lab.answer import Helper, Tuning, in_words
from kdpp.lab.console import say
from kdpp.lab.looks import (
    EXPLAINED,
    VISIBLE,
    Change,
    Distances,
    Half,
    Longer,
    Look,
    Pair,
    Price,
    Sampler,
    Trial,
    distances,
    estimates,
    possible_looks,
    steps_of,
)
from kdpp.lab.pieces import Pieces, Tensors
from kdpp.lab.sampling import image_seeds
from kdpp.lab.schedules import lengthened

__all__ = [
    "Change",
    "Look",
    "Price",
    "Trial",
    "Tuning",
    "Work",
    "in_ve",
    "levels_in_ve",
    "tune",
]

LEVELS = (0.3, 0.2)
"""Levels of late looks, beside each step's own level and the next one."""
ROWS = 64
"""The most that an evaluation is timed on."""
LEAST = 20
"""Samples, below which no interval is worth its name."""
PURE = 0.999
"""τ in the place of 1, where the VE form of a flow model has infinite noise."""


@torch.no_grad()
def tune(
    student: Denoiser,
    teacher: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    extra_args: Mapping[str, Any] | None = None,
    *,
    sampler: Sampler,
    teacher_cfg_scale: float = 1.0,
    levels: Sequence[float] = LEVELS,
    longer: Callable[[int], Sequence[float]] | None = None,
    bounds: tuple[float, float] | None = None,
    detail: int = LAB.detail,
    max_batch: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Tuning:
    """Whether, where and how much the teacher should guide the student.

    Half of the samples, drawn by the seed, chooses; the other half checks. Step i of the student's
    own run leads from the state x_i at σ_i, by the estimate x̂ and the noise N_i, to x_{i+1}. It
    should lead to where the teacher's many steps lead::

        miss_i = (Φ_ψ(x_i; σ_i → σ_down) + N_i - x_{i+1}) / c_i

    with Φ_ψ the teacher's ODE, solved in many steps, σ_down the level that the step goes to before
    it adds noise, and c_i the weight of a revision. For LCM σ_down is 0, and ``x̂ + miss`` is the
    end of the teacher's run. For Euler it is σ_{i+1}: a student that follows the teacher's path
    misses nothing. Over samples and pixels, for each look ``b = D_ψ^ω(x̂ + σ_s ε, σ_s)``::

        λ* = Σ<b - x̂, miss> / Σ|b - x̂|²      R² = Σ<b - x̂, miss>² / (Σ|b - x̂|² Σ|miss|²)

    with a jackknife's interval over samples, at 95 % for all looks together. At each step the look
    with the largest R² is tried in runs that are guided to the end. So is, as a control, the
    student's own best look in the teacher's place. Both are compared with the run from the same
    noise in which the teacher takes every step, Φ_ψ. A gain counts if it is sure and at least 0.3 %
    of the pictures' variance (25 dB below it). Chosen is the step where the teacher's look surely
    gains most, of those where it gains more than the control. With a sampler that adds noise it is
    the latest step that gains half as much: after an early step the noise of the later ones can
    still lead to another picture, and nothing changes what the last step leaves. The other half of
    the samples checks the choice: there too the gain must count, exceed the control's, and that of
    a second control, the student alone in as many more steps as the look takes evaluations. These
    have noise of their own; the distance is to the run in which the teacher takes every one of
    them.

    Distances count up to the 90 % quantile of the unguided ones. Two runs that are farther apart
    have come to different pictures, and how far those are apart is chance.

    λ* makes a squared distance small. It says whether guidance gains something, and roughly where;
    of two settings that both gain it cannot say which looks better.

    Args:
        student, teacher: denoisers as `kdpp.TeacherGuidedDenoiser` takes them, in VE form.
        x: the starting latents, ``(samples, *shape)``, with noise of standard deviation sigmas[0];
            at least 20, better 50 to 200.
        sigmas: the student's levels, as the sampler takes them.
        extra_args: as the sampler takes them; tensors with x's batch size go by sample.
        sampler: one of kdpp's samplers, a partial of one, or its name; its noise comes from the
            seed. Churn is refused.
        teacher_cfg_scale: the CFG scale ω of the teacher's own run, which the student is meant to
            reach. The looks have this scale and 1.
        levels: σ_s to try at every step that starts above it, beside the step's own level and the
            next. Those outside the models' trained range are left out.
        longer: the student's levels for so many steps, for the control of equal cost; by default
            there are more between those given.
        bounds: the pictures' range, (low, high): distances are measured clamped, as viewers see
            them. None for latents.
        detail: steps of the teacher's run from sigmas[0] to 0 (DPM-Solver++(2M), levels
            ``tan(φ)`` with evenly spaced φ).
        max_batch: the most rows of a network's call, as in the wrapper; without it all looks of a
            step, of half the samples, go in one call.
        batch: the most samples that are worked on at a time; without it half of them.
        seed: of the split, of the sampler's noise and of the looks'.
        progress: show a bar, in network evaluations of one sample.

    Torch's random streams are left as they are.

    Raises:
        TypeError, ValueError: what the wrapper and the sampler refuse; a flow model (bring both
            over with `kdpp.as_ve`); fewer than 20 samples; a student or teacher that answers
            with numbers that are not finite.
    """
    pair = Pair(
        student, teacher, sampler, sigmas, extra_args or {}, teacher_cfg_scale, detail, max_batch
    )
    work = Work.of(pair, x, levels, bounds, batch, seed, longer)
    if progress:
        say(work.price())
    found = work.run(Pieces(), progress)
    assert found is not None
    return found


@dataclass(frozen=True)
class Work:
    """What `tune` is to do: checked, divided into parts, and not begun."""

    pair: Pair
    fit: Sequence[Half]
    check: Sequence[Half]
    looks: Sequence[Look]
    bounds: tuple[float, float] | None
    seed: int
    longer: Callable[[int], Sequence[float]] | None = None

    @classmethod
    def of(
        cls,
        pair: Pair,
        x: Tensor,
        levels: Sequence[float],
        bounds: tuple[float, float] | None,
        batch: int | None,
        seed: int,
        longer: Callable[[int], Sequence[float]] | None = None,
    ) -> Work:
        """The arguments are those of `tune`, which says what it raises."""
        check_latent(x)
        if len(x) < LEAST:
            raise ValueError(f"x holds {len(x)} samples; give {LEAST} or more, better 50 to 200")
        if batch is not None:
            check_count("batch", batch, 1)
        looks = possible_looks(pair, levels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        halves = order[: len(x) // 2].sort().values, order[len(x) // 2 :].sort().values
        seeds = torch.tensor(image_seeds(check_count("seed", seed, 0), len(x)))
        fit, check = (pair.half(x, seeds, rows).parts(batch) for rows in halves)
        return cls(pair, fit, check, looks, bounds, seed, longer)

    def with_steps_of(self, look: Look) -> Pair:
        """The student alone with as many evaluations as with the look."""
        more, levels = self.pair.more_steps(look), self.pair.levels
        made = self.longer and self.longer(len(levels) - 1 + more)
        return self.pair.on(made or lengthened(levels, more))

    @property
    def samples(self) -> tuple[int, int]:
        """How many choose, and how many check."""
        fit, check = (sum(len(part.x) for part in parts) for parts in (self.fit, self.check))
        return fit, check

    @property
    def expense(self) -> tuple[int, int]:
        """Evaluations of student and teacher, at most."""
        dearest = max(self.looks, key=self.pair.more_steps)
        return self.pair.expense(self.looks, *self.samples, self.with_steps_of(dearest))

    @torch.no_grad()
    def seconds(self) -> tuple[float, float]:
        """Those of one evaluation of student and teacher, measured on as many rows as they get."""
        pair, part = self.pair, self.fit[0]
        rows = torch.arange(min(len(part.x), pair.max_batch or ROWS))
        few = pair.half(part.x, part.seeds, rows, part.extra_args)
        extra_args, sigmas = {**few.extra_args, "cond_scale": 1.0}, torch.tensor(pair.levels[:2])
        found = []
        for denoiser in (pair.student, pair.teacher):
            alone = pair.model(denoiser, denoiser, teacher_steps=0)
            for _ in range(2):  # the first one is slower
                start = time.perf_counter()
                x = kdpp.sample("euler", alone, few.x, sigmas, extra_args, disable=True)
                float(x.sum())  # a GPU has then finished
                taken = time.perf_counter() - start
            found.append(taken / len(rows))
        return found[0], found[1]

    def price(self, seconds: tuple[float, float] | None = None, processes: int = 1) -> str:
        """What it will take, in words; ``seconds`` are those of one evaluation of each."""
        student, teacher = self.expense
        said = (
            f"{sum(self.samples)} samples, {len(self.looks)} looks: at most {student:,} "
            f"evaluations of the student, {teacher:,} of the teacher"
        )
        if seconds is None:
            return said
        total = (student * seconds[0] + teacher * seconds[1]) / processes
        each = f"at {seconds[0]:.2g} s and {seconds[1]:.2g} s each"
        return f"{said}; {each} about {_duration(total)}"

    @torch.no_grad()
    def run(
        self,
        pieces: Pieces,
        progress: bool = False,
        report: Callable[[int], object] = lambda count: None,
    ) -> Tuning | None:
        """The answer; None on other processes than the main one.

        ``report`` hears of evaluations as they are made, `expense` in all at most.
        """
        total = sum(self.expense)
        with tqdm(total=total, desc="tuning", unit="eval", disable=not progress) as bar:

            def made(count: int) -> None:
                bar.update(count * pieces.size)
                report(count)

            self.pair.progress = made
            return self._run(pieces, bar)

    def _run(self, pieces: Pieces, bar: Any) -> Tuning | None:
        spent = torch.zeros(2, dtype=torch.int64)

        def stage(name: str, parts: Sequence[Half], make: Callable[[int], Tensors]) -> Tensors:
            """What all parts give, one after the other; on other processes, at the last, theirs."""
            mine = pieces.make(name, len(parts), lambda i: self._counted(make, i))
            if name == "check" and pieces.rank > 0:
                return {}
            found = pieces.all(name, len(parts), mine)
            spent.add_(sum(one["spent"] for one in found))
            _go_on(bar, int(spent.sum()))
            return {key: torch.cat([one[key] for one in found]) for key in found[0]}

        def study(i: int) -> Tensors:
            found = self.fit[i].study(self.looks)
            return {"sums": found.sums, **self._compared(found.plain, found.perfect)}

        learnt = stage("study", self.fit, study)
        looks = estimates(self.looks, learnt["sums"])
        near = Distances(learnt["plain"], learnt["perfect"], self.bounds)
        trials = []
        for look, itself in (_best_of(looks, step) for step in steps_of(looks)):
            if look.worth_a_trial:
                tried = self._tried(self.fit, learnt["perfect"], look, itself)
                made = stage(f"trial-{look.step}", self.fit, tried)
                trials.append(near.trial(look, itself, made["taught"], made["itself"]))
        renewed = any(bool(noise.any()) for noise in self.fit[0].noises)
        chosen = _choose(trials, renewed) if trials else None

        def check(i: int) -> Tensors:
            part = self.check[i]
            found = self._compared(part.plain(), part.perfect())
            if chosen is None:
                return found
            longer = replace(part, pair=self.with_steps_of(chosen.look))
            alone = distances(longer.plain(), longer.perfect(), self.bounds)
            guided = self._guided(part, found["perfect"], chosen.look, chosen.itself)
            return {**found, **guided, "longer": alone}

        fresh = stage("check", self.check, check)
        if not fresh:
            return None
        far = Distances(fresh["plain"], fresh["perfect"], self.bounds)
        checked = longer = None
        if chosen is not None:
            checked = far.trial(chosen.look, chosen.itself, fresh["taught"], fresh["itself"])
            levels = self.with_steps_of(chosen.look).levels
            longer = far.longer(levels, fresh["longer"], fresh["taught"])
        distance = float(far.plain.mean()) / far.variance
        student, teacher = spent.tolist()
        return self._tuning(looks, trials, checked, longer, distance, (student, teacher))

    def _counted(self, make: Callable[[int], Tensors], i: int) -> Tensors:
        """A part's tensors, on the CPU, with the evaluations that they took."""
        before = list(self.pair.spent.values())
        found = {name: value.cpu() for name, value in make(i).items()}
        taken = [now - then for now, then in zip(self.pair.spent.values(), before)]
        return {**found, "spent": torch.tensor(taken)}

    def _compared(self, plain: Tensor, perfect: Tensor) -> Tensors:
        return {"plain": distances(plain, perfect, self.bounds), "perfect": perfect}

    def _guided(self, part: Half, perfect: Tensor, look: Look, itself: Look) -> Tensors:
        """Distances to the teacher's pictures with both looks, in whole runs."""
        return {
            name: distances(part.guided(one), perfect.to(part.x.device), self.bounds)
            for name, one in (("taught", look), ("itself", itself))
        }

    def _tried(
        self, parts: Sequence[Half], perfect: Tensor, look: Look, itself: Look
    ) -> Callable[[int], Tensors]:
        theirs = torch.split(perfect, [len(part.x) for part in parts])
        return lambda i: self._guided(parts[i], theirs[i], look, itself)

    def _tuning(
        self,
        looks: Sequence[Look],
        trials: Sequence[Trial],
        checked: Trial | None,
        longer: Longer | None,
        distance: float,
        evaluations: tuple[int, int],
    ) -> Tuning:
        pair = self.pair
        by, reason = _judge(checked, longer)
        advised = None
        if checked is not None and by in ("teacher", "student"):
            advised = checked.look if by == "teacher" else checked.itself
        return Tuning(
            by=by,
            reason=reason,
            settings=advised.settings if advised else {"teacher_steps": 0},
            looks=tuple(looks),
            trials=tuple(trials),
            check=checked,
            longer=longer,
            distance=distance,
            cost=pair.price_of(advised) if advised else None,
            sampler=_name(pair),
            levels=tuple(pair.levels),
            teacher_cfg_scale=pair.teacher_cfg_scale,
            samples=sum(self.samples),
            seed=self.seed,
            evaluations=evaluations,
        )


def levels_in_ve(taus: Sequence[float]) -> tuple[float, ...]:
    """A flow model's levels as those of its VE form, σ = τ/(1-τ), from `PURE` down."""
    return tuple(tau / (1.0 - tau) for tau in (min(tau, PURE) for tau in taus))


def in_ve(denoiser: Denoiser) -> Denoiser:
    """The denoiser in VE form, and marked as it was."""
    if not is_flow(denoiser):
        return denoiser
    if not isinstance(denoiser, kdpp.OwnCFG):
        return kdpp.as_ve(denoiser)
    marked = kdpp.OwnCFG(kdpp.as_ve(_Unmarked(denoiser)), denoiser.uncond_denoised)
    marked.divisible, marked.halves = denoiser.divisible, denoiser.halves
    return marked


class _Unmarked(nn.Module):
    """A flow model that does its own CFG, without the mark."""

    flow = True

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.inner_model = denoiser

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        denoised: Tensor = self.inner_model(x, sigma, **extra_args)
        return denoised


def _go_on(bar: Any, done: int) -> None:
    """Set a bar to what is done; what others did, or an earlier run, is not in its speed."""
    if bar.disable:
        return
    found = done - bar.n
    bar.initial += found
    bar.last_print_n += found
    bar.n = done
    bar.refresh()


def _duration(seconds: float) -> str:
    """In words, to two digits."""
    for name, unit in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.2g} {name}"
    return f"{max(seconds, 1.0):.2g} seconds"


def _best_of(looks: Sequence[Look], step: int) -> tuple[Look, Look]:
    """The teacher's and the student's look at the step that explain most."""
    here = [look for look in looks if look.step == step]
    teacher, student = (
        max((look for look in here if look.by == by), key=lambda look: look.explained)
        for by in ("teacher", "student")
    )
    return teacher, student


def _choose(trials: Sequence[Trial], renewed: bool) -> Trial:
    """See `tune`; ``renewed``: the sampler adds noise."""
    worth = [trial for trial in trials if trial.change.counts and trial.own.high < 0.0]
    if not worth:
        return min(trials, key=lambda trial: min(trial.change.high, trial.itself_change.high))
    best = min(worth, key=lambda trial: trial.change.high)
    if not renewed:
        return best
    return [trial for trial in worth if trial.change.mean <= 0.5 * best.change.mean][-1]


def _judge(check: Trial | None, longer: Longer | None = None) -> tuple[Helper | None, str]:
    """Whose help is worth its price, and why: the student's own where it gains as much."""
    if check is None:
        return None, f"no look surely explains {100 * EXPLAINED:g} % of what the student misses"
    said = f"on fresh samples the squared distance to the teacher's run {in_words(check.change)}"
    own: dict[Helper, tuple[Change, str]] = {
        "student": (check.itself_change, "with the student's own look it")
    }
    if longer is not None:
        own["steps"] = (longer.change, f"of {len(longer.levels) - 1} steps of the student alone it")
    # The teacher's look is the dearer one: a gain that is not surely larger is not worth it.
    surely = {"student": check.own.high < 0.0, "steps": longer is None or longer.over.mean < 0.0}
    gains = {name: one for name, one in own.items() if one[0].counts and not surely[name]}
    if gains:
        best = min(gains, key=lambda name: gains[name][0].mean)
        change, what = gains[best]
        return best, f"{said}; {what} {in_words(change)}"
    if check.change.counts:
        return "teacher", said
    if check.change.high >= 0.0:
        return None, f"{said}: no gain is sure"
    return None, f"{said}: a gain below {100 * VISIBLE:.1g} % cannot be seen"


def _name(pair: Pair) -> str:
    """The sampler, with the options that are fixed in it."""
    options = ", ".join(f"{name}={value!r}" for name, value in pair.options.items())
    return pair.solver.name + f"({options})" * bool(options)
