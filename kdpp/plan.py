"""The arithmetic of a sampling run: rows of float64 coefficients, made from the sigmas alone.

A solver (see `kdpp.solvers`) turns noise levels into `Step`s; nothing here knows tensors, networks
or teachers. σ is the standard deviation of the noise, ``x = x0 + σ n`` (variance exploding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Row", "Stage", "Step", "ancestral_split", "euler_row", "level_ratio", "nonnegative"]


@dataclass(frozen=True, slots=True)
class Row:
    """One linear update, ``σ_target·(x/σ) + denoised·x̂_new + Σ_j direction[j]·d_j + noise·n``.

    - ``x/σ``: the state at the start of the step over its level. A perfect denoiser's x is
      ``x0 + σ n``, so its weight says which level the update goes to, before noise: ``target``.
    - ``x̂_new``: the newest estimate of x0, after the teacher's revision where there is one.
    - ``d_j``: the estimates that give the solver its direction, newest first. They are never
      revised: x̂ itself, or under CFG++ its unconditional part. This split is what makes one plan
      serve the plain solver, its CFG++ form and the teacher's term (Distillation++, section 7.1).
    - ``n``: standard normal noise. ``noise=None`` draws nothing; 0.0 draws and does not use it,
      where k-diffusion does so, to stay on the same random stream.
    """

    target: float
    denoised: float = 0.0
    direction: tuple[float, ...] = ()
    noise: float | None = None

    @property
    def memory(self) -> int:
        """How many of the newest directions it weighs."""
        return max((j + 1 for j, weight in enumerate(self.direction) if weight), default=0)

    def check(self, sigma: float) -> None:
        """ValueError unless ``target/σ``, ``denoised`` and ``direction`` sum to one.

        Only then does moving x0 move the result by as much; other weights are a wrong solver.
        """
        weights = (level_ratio(sigma, self.target), self.denoised, *self.direction)
        if not abs(sum(weights) - 1.0) <= 1e-12 * max(1.0, sum(map(abs, weights))):
            raise ValueError(f"the weights of {self} from σ = {sigma!r} sum to {sum(weights)!r}")


@dataclass(frozen=True, slots=True)
class Stage:
    """Evaluate the network at the current point and level ``sigma``; ``row`` makes the next."""

    sigma: float
    row: Row


@dataclass(frozen=True, slots=True)
class Step:
    """From ``sigma`` to ``sigma_next`` in one or more stages; the last one's estimate is revised.

    ``churn`` is the standard deviation of noise added to x before the first stage, which then sees
    the higher level ``stages[0].sigma`` (None: nothing is drawn; see `Row.noise`). Every row starts
    from that x. Raises ValueError for rows whose weights do not sum to one.
    """

    sigma: float
    sigma_next: float
    stages: tuple[Stage, ...]
    churn: float | None = None

    def __post_init__(self) -> None:
        for stage in self.stages:
            stage.row.check(self.stages[0].sigma)


def level_ratio(sigma: float, target: float) -> float:
    """``σ_target/σ = e^{-h}``; 1 for a step of no length, also at σ = 0."""
    return 1.0 if target == sigma else target / sigma


def euler_row(sigma: float, target: float, noise: float | None = None) -> Row:
    """``x̂_new + (x - d)/σ·σ_target`` (DDIM), of first order; equal levels leave x as it is."""
    ratio = level_ratio(sigma, target)
    if ratio == 1.0:
        return Row(target, noise=noise)
    return Row(target, denoised=1.0, direction=(-ratio,), noise=noise)


def ancestral_split(
    sigma: float, sigma_next: float, eta: float, s_noise: float
) -> tuple[float, float | None]:
    """(σ_down, noise): step down to σ_down, then add ``noise·n`` to arrive at σ_next.

    ``σ_up = min(σ', η σ' sqrt(1 - σ'²/σ²))``, ``σ_down = sqrt(σ'² - σ_up²)``, noise = s_noise·σ_up,
    as in k-diffusion's ``get_ancestral_step``. Noise is None where the run draws none at all
    (η = 0 or s_noise = 0) and at σ' = 0.
    """
    spread = math.sqrt(1.0 - level_ratio(sigma, sigma_next) ** 2)
    sigma_up = min(sigma_next, eta * sigma_next * spread)
    sigma_down = math.sqrt((sigma_next - sigma_up) * (sigma_next + sigma_up))
    draws = eta * s_noise > 0.0 and sigma_next > 0.0
    return sigma_down, s_noise * sigma_up if draws else None


def nonnegative(**settings: float) -> None:
    """Raise ValueError for a setting that is negative or NaN."""
    for name, value in settings.items():
        if not value >= 0.0:
            raise ValueError(f"{name} is {value!r}; it must be a number ≥ 0")
