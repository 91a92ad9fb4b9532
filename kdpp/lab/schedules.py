"""The noise schedule of the lab's networks, and the levels (sigmas) to sample them on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdpp.checks import check_count
from kdpp.solver import unknown

__all__ = [
    "LEVELS",
    "SCHEDULE",
    "TIMESTEPS",
    "Grid",
    "alphas_cumprod",
    "grid",
    "interpolate",
    "lengthened",
    "levels_on",
    "log_sigmas",
    "schedule",
    "trailing",
]

TIMESTEPS = 1000
TAIL_DIVISOR = 2.5
Grid = Literal["divided", "trailing"]
"""A setting: the levels of `schedule` or of `trailing`."""


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's "scaled linear" schedule, float32 [1000].

    `abar_t = prod_{s <= t} (1 - beta_s)`, sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012);
    `sigma_t = sqrt((1 - abar_t) / abar_t)` runs from 0.029 to 14.61.
    """
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64)
    return (1 - roots**2).cumprod(0).float()


def log_sigmas() -> Tensor:
    """log(sigma_t) of every timestep, float64 [1000]."""
    abar = alphas_cumprod().double()
    return ((1 - abar) / abar).log() / 2


def interpolate(table: Tensor, t: Tensor) -> Tensor:
    """`table` [1000] at the fractional timesteps `t`, linearly between its entries."""
    low = t.detach().floor().clamp(0, TIMESTEPS - 2).long()
    return table[low] + (t - low) * (table[low + 1] - table[low])


def trailing(n: int) -> tuple[float, ...]:
    """n + 1 sigmas: n evenly spaced timesteps that start at the last one, then 0.

    `t_i = 999 - 1000 i / n`, i = 0..n-1, log(sigma) linear between whole timesteps.

    Raises ValueError unless 1 <= n <= 1000.
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= TIMESTEPS:
        raise ValueError(f"n must be a whole number from 1 to {TIMESTEPS}, got {n!r}")
    # The last timestep of n = 1000 is 0 up to rounding.
    t = (TIMESTEPS - 1 - torch.arange(n, dtype=torch.float64) * TIMESTEPS / n).clamp(min=0)
    return (*interpolate(log_sigmas(), t).exp().tolist(), 0.0)


def schedule(n: int) -> tuple[float, ...]:
    """n + 1 sigmas: the trailing grid, every level but the first divided by 2.5.

    The first step of the trailing grid ends at sigma 4 (n = 4), nearly pure noise in the 64
    dimensions of a digit, where neither student nor teacher has anything to decide. The divided
    grid suits the teacher as well: better at 4 steps, no worse at 50.

    Raises ValueError unless 1 <= n <= 1000.
    """
    first, *tail = trailing(n)
    return (first, *(sigma / TAIL_DIVISOR for sigma in tail))


def grid(kind: Grid, n: int) -> tuple[float, ...]:
    """The levels of n steps, the last one 0; they are every other level of 2n steps.

    Raises ValueError unless 1 <= n <= 1000.
    """
    return schedule(n) if kind == "divided" else trailing(n)


def levels_on(kind: str, steps: int, low: float, high: float) -> tuple[float, ...]:
    """The levels of so many steps on one of `LEVELS`, from ``high`` to ``low``, and then 0.

    "log_uniform" has steps of equal length in log σ and ends at ``low``, as DPM-Solver's "logSNR";
    "trailing" and "divided" have the lab's own range (`trailing`, `schedule`).

    Raises ValueError for an unknown name (the nearest known one is said) or steps below 1.
    """
    if kind not in LEVELS:
        raise ValueError(unknown("schedule", kind, LEVELS))
    return LEVELS[kind](check_count("steps", steps, 1), low, high)


def _spaced(
    to: Callable[[float], float], back: Callable[[float], float], zero: bool = True
) -> Callable[[int, float, float], tuple[float, ...]]:
    """The levels whose ``to(σ)`` are evenly spaced."""

    def levels(steps: int, low: float, high: float) -> tuple[float, ...]:
        first, last, count = to(high), to(low), steps if zero else steps + 1
        inner = [first + (last - first) * i / (count - 1) for i in range(1, count - 1)]
        return (high, *map(back, inner), *[low] * (count > 1), *[0.0] * zero)

    return levels


LEVELS: dict[str, Callable[[int, float, float], tuple[float, ...]]] = {
    "karras": _spaced(lambda s: s ** (1 / 7), lambda r: r**7),
    "exponential": _spaced(math.log, math.exp),
    "log_uniform": _spaced(math.log, math.exp, zero=False),
    "cosine": _spaced(math.atan, math.tan),
    "trailing": lambda steps, low, high: trailing(steps),
    "divided": lambda steps, low, high: schedule(steps),
}
"""Schedules by name, see `levels_on`: evenly spaced are σ^(1/7) (Karras et al. 2022, eq. 5), log σ,
and for "cosine" t where ``σ = tan(πt/2)`` (Nichol and Dhariwal 2021)."""


def lengthened(levels: Sequence[float], more: int) -> tuple[float, ...]:
    """These levels with so many more steps: log σ between them, by place; 0 stays last."""
    end = levels[-1:] if levels[-1] == 0.0 else ()
    logs = [math.log(level) for level in levels[: len(levels) - len(end)]]
    count = len(logs) + more
    if len(logs) == 1:  # one step to 0
        return (*(levels[0] * (1 - i / count) for i in range(count)), *end)
    places = [i * (len(logs) - 1) / (count - 1) for i in range(count)]
    found = np.interp(places, range(len(logs)), logs).tolist()
    return (levels[0], *(math.exp(one) for one in found[1:]), *end)


SCHEDULE = schedule(4)
"""The four steps of the digits' student: 14.61, 1.63, 0.645, 0.277, 0."""
