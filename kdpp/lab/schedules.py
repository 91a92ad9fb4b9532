"""The noise schedule of the lab's networks, and the levels (sigmas) to sample them on."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "SCHEDULE",
    "TIMESTEPS",
    "Grid",
    "alphas_cumprod",
    "grid",
    "interpolate",
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


SCHEDULE = schedule(4)
"""The four steps of the digits' student: 14.61, 1.63, 0.645, 0.277, 0."""
