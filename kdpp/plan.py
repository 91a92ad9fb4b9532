"""The arithmetic of a sampling run: rows of float64 coefficients, made from the sigmas alone.

A solver (see `kdpp.solvers`) turns noise levels into `Step`s; nothing here knows tensors, networks
or teachers. σ is the standard deviation of the noise, ``x = x0 + σ n`` (variance exploding); a flow
model's state ``(1-τ) x0 + τ n`` is that with ``σ = τ/(1-τ)``, see `Space`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

__all__ = [
    "FLOW",
    "VARIABLES",
    "VE",
    "Row",
    "Space",
    "Split",
    "Stage",
    "Stages",
    "Step",
    "ancestral",
    "ancestral_split",
    "check_falling",
    "churned",
    "euler_row",
    "from_tau",
    "in_variable",
    "is_first_order",
    "level_before",
    "level_ratio",
    "merge_close",
    "rf_split",
    "rises",
    "two_stages",
    "with_churn",
]


CANCELS = 1e12
"""Weights that sum to 1 and are larger together: of float32's 7 digits they leave none."""
LEAST = 1e-30
"""The lowest level above 0: lower ones are not numbers of float32."""


@dataclass(frozen=True, slots=True)
class Row:
    """One linear update of x: ``target·x/σ + denoised·x̂_new + Σ_j direction[j]·d_j + … + noise·n``.

    - ``x/σ``: the state at the start of the step over its level. A perfect denoiser's x is
      ``x0 + σ n``, so its weight says which level the update goes to, before noise: ``target``.
    - ``x̂_new``: the newest estimate of x0, after the teacher's revision where there is one.
    - ``d_j``: the estimates that give the solver its direction, newest first. They are never
      revised: x̂ itself, or under CFG++ its unconditional part. This split is what makes one plan
      serve the plain solver, its CFG++ form and the teacher's term (Distillation++, section 7.1).
    - ``guided``: for CFG++ forms that also weigh guided estimates x̂_j made before the newest one,
      ``Σ_j guided[j]·x̂_j``, numbered as the d_j are and not revised either.
    - ``past``: for multistep solvers in x, pairs (weight, σ_j) of the states that earlier steps
      started from, newest first; each adds ``weight·x_j/σ_j``.
    - ``n``: standard normal noise. ``noise=None`` draws nothing; 0.0 draws and does not use it,
      where k-diffusion does so, to stay on the same random stream.
    """

    target: float
    denoised: float = 0.0
    direction: tuple[float, ...] = ()
    noise: float | None = None
    past: tuple[tuple[float, float], ...] = ()
    guided: tuple[float, ...] = ()

    @property
    def end(self) -> float:
        """The level that it goes to, before noise."""
        return self.target + sum(weight for weight, _ in self.past)

    @property
    def memory(self) -> int:
        """How many of the newest estimates it weighs."""
        return max(weighed(self.direction), weighed(self.guided))

    def check(self, sigma: float) -> None:
        """ValueError unless the weights of states and estimates sum to one, without cancelling.

        Only then does moving x0 move the result by as much; other weights are a wrong solver.
        """
        past = (weight / sigma_j for weight, sigma_j in self.past)
        estimates = (self.denoised, *self.direction, *self.guided)
        weights = (level_ratio(sigma, self.target), *estimates, *past)
        size = sum(map(abs, weights))
        if size > CANCELS:
            raise ValueError(
                f"the step from σ = {sigma!r} to {self.target!r} weighs estimates by {size:.0e}, "
                "which leaves nothing but rounding: leave out levels so close to 0, or end at 0"
            )
        if not abs(sum(weights) - 1.0) <= 1e-12 * max(1.0, size):
            raise ValueError(f"the weights of {self} from σ = {sigma!r} sum to {sum(weights)!r}")


def weighed(weights: Sequence[float]) -> int:
    """How many of them there are up to the last one that is not 0."""
    return max((j + 1 for j, weight in enumerate(weights) if weight), default=0)


@dataclass(frozen=True, slots=True)
class Stage:
    """Evaluate the network at the current point and level ``sigma``; ``row`` makes the next.

    The row starts from the step's x; ``onward``: from this stage's point, with the noise that has
    come into it, so that x and σ in the row's formula are the point and ``sigma``.
    """

    sigma: float
    row: Row
    onward: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """From ``sigma`` to ``sigma_next`` in one or more stages; the last one's estimate is revised.

    ``churn`` is the standard deviation of noise added to x before the first stage, which then sees
    the higher level ``stages[0].sigma`` (None: nothing is drawn; see `Row.noise`). Rows start from
    that x, if not from their stage's point. ``kept`` is the stage whose estimate later steps weigh.
    Raises ValueError for rows whose weights do not sum to one.
    """

    sigma: float
    sigma_next: float
    stages: tuple[Stage, ...]
    churn: float | None = None
    kept: int = 0

    def __post_init__(self) -> None:
        for stage in self.stages:
            stage.row.check(self.base(stage))

    def base(self, stage: Stage) -> float:
        """The level that the stage's row starts from."""
        return stage.sigma if stage.onward else self.stages[0].sigma

    @property
    def draws(self) -> bool:
        """Whether it draws noise of the solver's."""
        return self.churn is not None or any(s.row.noise is not None for s in self.stages)

    @property
    def gain(self) -> float:
        """The weight of x̂_new in the step's end; 0 for a step of no length: it is not revised."""
        return self.stages[-1].row.denoised if self.sigma_next < self.sigma else 0.0

    @property
    def memory(self) -> int:
        """How many estimates made before its newest one it weighs."""
        return max(0, *(stage.row.memory - 1 for stage in self.stages))

    @property
    def history(self) -> int:
        """How many estimates, or states, of earlier steps it weighs."""
        estimates = (stage.row.memory - made for made, stage in enumerate(self.stages, 1))
        return max(0, *estimates, *(len(stage.row.past) for stage in self.stages))

    @classmethod
    def single(cls, sigma: float, sigma_next: float, row: Row) -> Step:
        return cls(sigma, sigma_next, (Stage(sigma, row),))


class Space(NamedTuple):
    """How a model writes noise levels and states, against σ and ``x = x0 + σ n``.

    ``sigma(level)`` and ``level(sigma)`` translate levels; a state of the model is ``alpha(σ)·x``.
    """

    sigma: Callable[[float], float]
    level: Callable[[float], float]
    alpha: Callable[[float], float]


VE = Space(sigma=float, level=float, alpha=lambda sigma: 1.0)
"""Variance exploding: levels are σ."""

FLOW = Space(
    sigma=lambda level: level / (1.0 - level) if level < 1.0 else math.inf,
    level=lambda sigma: sigma / (1.0 + sigma) if sigma < math.inf else 1.0,
    alpha=lambda sigma: 1.0 / (1.0 + sigma),
)
"""Flow matching, levels τ in [0, 1]: ``(1-τ) x0 + τ n``, so ``σ = τ/(1-τ)`` and α = 1 - τ."""


def rises(sigmas: Sequence[float]) -> bool:
    """Whether the levels lead from an image up to noise: from above 0, and they never fall."""
    never_fall = all(sigma <= sigma_next for sigma, sigma_next in pairwise(sigmas))
    return len(sigmas) > 1 and 0.0 < sigmas[0] < sigmas[-1] and never_fall


def check_falling(sigmas: Sequence[float], or_rising: bool = False) -> None:
    """ValueError unless the levels are 0 or at least `LEAST`, finite and never rise.

    ``or_rising``: or where `rises` says that they only do so.
    """
    for sigma in sigmas:
        if not (sigma == 0.0 or LEAST <= sigma < math.inf):
            raise ValueError(
                f"sigmas holds {sigma!r}; every level must be a finite number ≥ {LEAST}, or 0"
            )
    if or_rising and rises(sigmas):
        return
    allowed = ", or, from a level above 0, never fall" * or_rising
    for sigma, sigma_next in pairwise(sigmas):
        if sigma_next > sigma:
            raise ValueError(
                f"sigmas rises from {sigma!r} to {sigma_next!r}; levels must not increase{allowed}"
            )


CLOSE = 2.0**-22
"""Two roundings of float32: levels that differ by less, relative to each other, count as equal."""


def merge_close(sigmas: Iterable[float]) -> tuple[float, ...]:
    """The levels, one that is all but equal to the one before in the place of itself.

    A multistep solver divides by the distance of two levels, and rounding is not a distance.
    """
    merged: list[float] = []
    for sigma in sigmas:
        close = merged and merged[-1] < math.inf and abs(merged[-1] - sigma) <= CLOSE * merged[-1]
        merged.append(merged[-1] if close else sigma)
    return tuple(merged)


def level_before(sigmas: Sequence[float], i: int) -> int | None:
    """The last step before i that started at another, finite level; None if there is none.

    A multistep solver's previous estimate: a repeated level is a step of no length.
    """
    found = next((j for j in reversed(range(i)) if sigmas[j] != sigmas[i]), None)
    return None if found is None or math.isinf(sigmas[found]) else found


def level_ratio(sigma: float, target: float) -> float:
    """``σ_target/σ = e^{-h}``; 1 for a step of no length, also at σ = 0."""
    return 1.0 if target == sigma else target / sigma


def euler_row(sigma: float, target: float, noise: float | None = None) -> Row:
    """``x̂_new + (x - d)/σ·σ_target`` (DDIM), of first order; equal levels leave x as it is."""
    ratio = level_ratio(sigma, target)
    if ratio == 1.0:
        return Row(target, noise=noise)
    return Row(target, denoised=1.0, direction=(-ratio,), noise=noise)


Split = Callable[[float, float, float, float], tuple[float, float | None]]
"""``(sigma, sigma_next, eta, s_noise) -> (σ_down, noise)``."""


def ancestral_split(
    sigma: float, sigma_next: float, eta: float, s_noise: float
) -> tuple[float, float | None]:
    """(σ_down, noise): step down to σ_down, then add ``noise·n`` to arrive at σ_next.

    ``σ_up = min(σ', η σ' sqrt(1 - σ'²/σ²))``, ``σ_down = sqrt(σ'² - σ_up²)``, noise = s_noise·σ_up,
    as in k-diffusion's ``get_ancestral_step``. Noise is None where the run draws none at all
    (η = 0 or s_noise = 0) and at σ' = 0.
    """
    draws = eta * s_noise > 0.0 and sigma_next > 0.0
    if sigma_next == sigma:
        return sigma, 0.0 if draws else None
    sigma_up = min(sigma_next, eta * sigma_next * math.sqrt(1.0 - (sigma_next / sigma) ** 2))
    sigma_down = math.sqrt((sigma_next - sigma_up) * (sigma_next + sigma_up))
    return sigma_down, s_noise * sigma_up if draws else None


def rf_split(
    sigma: float, sigma_next: float, eta: float, s_noise: float
) -> tuple[float, float | None]:
    """`ancestral_split` for flow models ("RF"): ``τ_down = τ' (1 - η (1 - τ'/τ))``, τ = σ/(1+σ).

    Then ``noise = s_noise sqrt(σ'² - σ_down²)``: at η = 1 it steps to τ'²/τ.
    """
    draws = eta * s_noise > 0.0 and sigma_next > 0.0
    if sigma_next == sigma:
        return sigma, 0.0 if draws else None
    tau, tau_next = FLOW.level(sigma), FLOW.level(sigma_next)
    sigma_down = FLOW.sigma(tau_next * max(0.0, 1.0 - eta * (1.0 - tau_next / tau)))
    sigma_down = min(sigma_down, sigma_next)  # but for rounding at η = 0
    noise = s_noise * math.sqrt((sigma_next - sigma_down) * (sigma_next + sigma_down))
    return sigma_down, noise if draws else None


def churned(
    sigmas: Sequence[float], s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> list[tuple[float, float | None]]:
    """For every step (σ̂, churn): noise of standard deviation ``churn`` lifts x from σ to σ̂.

    ``σ̂ = (1 + γ) σ`` and ``churn = s_noise sqrt(σ̂² - σ²)`` for s_tmin ≤ σ ≤ s_tmax, with
    ``γ = min(s_churn / steps, sqrt(2) - 1)`` (Karras et al. 2022, Algorithm 2). k-diffusion draws
    in every step; so does a run that churns in any, to get the same noise.
    """
    gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2.0) - 1.0)
    if gamma == 0.0:
        return [(sigma, None) for sigma in sigmas[:-1]]
    # A bound that is one of the levels holds it, though float32 has rounded the levels.
    low, high = s_tmin * (1.0 - 1e-6), s_tmax * (1.0 + 1e-6)
    levels: list[tuple[float, float | None]] = []
    for sigma in sigmas[:-1]:
        inside = low <= sigma <= high and sigma < math.inf
        sigma_hat = sigma * (1.0 + gamma) if inside else sigma
        lift = math.sqrt(sigma_hat**2 - sigma**2) if inside else 0.0
        levels.append((sigma_hat, s_noise * lift))
    return levels


# ------------------------------------------------------------------------------ single-step solvers

Stages = Callable[[float, float, float | None], tuple[Stage, ...]]
"""``(sigma, target, noise)``: the stages from σ down to the target, the last one with the noise.

It is the whole of a single-step solver: `ancestral` and `with_churn` make it a plan. It is asked
for steps from a finite σ down to a target in (0, σ) only; all others are Euler's.
"""


def with_churn(
    sigmas: Sequence[float],
    stages: Stages,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
    variable: str = "sigma",
) -> Iterator[Step]:
    """A single-step solver from σ̂, where `churned` noise has lifted x, to σ'.

    ``variable="tau"``: its stages are those from τ̂ to τ', see `from_tau`.
    """
    lifts = churned(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    for (sigma, sigma_next), (sigma_hat, churn) in zip(pairwise(sigmas), lifts):
        step = _stages(stages, sigma_hat, sigma_next, None, variable)
        yield Step(sigma, sigma_next, step, churn)


def ancestral(
    sigmas: Sequence[float],
    stages: Stages,
    eta: float,
    s_noise: float,
    split: Split = ancestral_split,
    variable: str = "sigma",
) -> Iterator[Step]:
    """A single-step solver to σ_down, then noise up to σ', as ``split`` has them."""
    for sigma, sigma_next in pairwise(sigmas):
        sigma_down, noise = split(sigma, sigma_next, eta, s_noise)
        yield Step(sigma, sigma_next, _stages(stages, sigma, sigma_down, noise, variable))


def _stages(
    stages: Stages, sigma: float, target: float, noise: float | None, variable: str
) -> tuple[Stage, ...]:
    space = VARIABLES[variable]
    start, end = space.level(sigma), space.level(target)
    if is_first_order(start, end):
        return (Stage(sigma, euler_row(sigma, target, noise)),)
    made = stages(start, end, noise)
    return made if space is VE else from_tau(sigma, made)


def is_first_order(sigma: float, target: float) -> bool:
    """Whether a step must be Euler: from σ = ∞, to σ = 0, or of no length."""
    return level_ratio(sigma, target) in (0.0, 1.0)


def two_stages(
    sigma: float,
    sigma_middle: float,
    sigma_end: float,
    weight: float,
    denoised: float = 1.0,
    noise: float | None = None,
) -> tuple[Stage, Stage]:
    """A first-order step to a middle point u, and one to the end that weighs its estimate, d_u.

    ``x' = e x + (1 - e - weight) d + weight d_u``, with e = σ_end/σ; of the newest estimate's
    weight ``denoised`` is revisable, the rest is direction.
    """
    ratio = sigma_end / sigma
    to_middle = Row(sigma_middle, direction=(1.0 - sigma_middle / sigma,))
    to_end = Row(sigma_end, denoised, (weight - denoised, 1.0 - ratio - weight), noise)
    return Stage(sigma, to_middle), Stage(sigma_middle, to_end)


# ---------------------------------------------------------------------------------- rules over τ

VARIABLES = {"sigma": VE, "tau": FLOW}
"""What a rule takes for the level: σ, or ``τ = σ/(1+σ)``, a flow model's."""


def in_variable(
    variable: str, sigmas: Sequence[float], plan: Callable[[Sequence[float]], Iterable[Step]]
) -> Iterable[Step]:
    """The plan over σ; with ``variable="tau"`` the plan over τ, in σ again (`from_tau`)."""
    if variable == "sigma":
        return plan(sigmas)
    steps = zip(pairwise(sigmas), plan([FLOW.level(sigma) for sigma in sigmas]))
    return (Step(*pair, from_tau(pair[0], one.stages), kept=one.kept) for pair, one in steps)


def from_tau(sigma: float, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Stages from σ that were made over τ, for ``z = (1-τ) x0 + τ n``, in σ and ``x = z/(1-τ)``.

    ``x/σ = z/τ``, so every weight of a row that goes to τ' is divided by 1 - τ'. The weight of
    x̂_new stays, so that the teacher's term has the same coefficient; the rest is direction. Noise
    is that of σ already.
    """
    start = stages[0].sigma
    made = []
    for stage in stages:
        row = stage.row
        level = sigma if stage is stages[0] else FLOW.sigma(stage.sigma)
        if row.end == (stage.sigma if stage.onward else start):  # no length, also at τ = 1
            row = Row(level if stage.onward else sigma, noise=row.noise)
        else:
            alpha = 1.0 - row.end
            newest, *older = row.direction or (0.0,)
            direction = (
                (row.denoised + newest) / alpha - row.denoised,
                *(w / alpha for w in older),
            )
            past = tuple((weight / alpha, FLOW.sigma(tau)) for weight, tau in row.past)
            guided = tuple(weight / alpha for weight in row.guided)
            row = Row(row.target / alpha, row.denoised, direction, row.noise, past, guided)
        made.append(Stage(level, row, stage.onward))
    return tuple(made)
