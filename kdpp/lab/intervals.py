"""What seeds say: means, paired changes and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Estimate", "differences", "estimate", "paired", "together", "verdict"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds: its standard deviation over them and its confidence interval.

    Of one seed neither is known: deviation, low and high are None.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    count: int


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean with its interval ``mean ± t s/√n``, t Student's quantile for n - 1 degrees.

    Raises ValueError for no values, values that are not finite, and a confidence outside (0, 1).
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence!r}; it must be in (0, 1)")
    if not len(values) or not all(map(math.isfinite, values)):
        raise ValueError(f"values is {values!r}; it must hold finite numbers, one or more")
    from scipy.special import stdtrit

    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Estimate(mean, None, None, None, 1)
    deviation = float(np.std(values, ddof=1))
    half = float(stdtrit(count - 1, (1.0 + confidence) / 2.0)) * deviation / math.sqrt(count)
    return Estimate(mean, deviation, mean - half, mean + half, count)


def together(values: Sequence[Sequence[float]], confidence: float = 0.95) -> list[Estimate]:
    """An `estimate` for each of the lists, whose intervals are read together.

    They are ordered by the p-values of their t-tests against 0. Of n lists the k-th has an interval
    at ``1 - (1 - confidence)/(n - k + 1)``, up to the first interval that holds 0; this one and all
    later ones have its confidence. So an interval leaves out 0 where Holm's test rejects, and the
    chance that any does so although its mean is 0 is at most ``1 - confidence``.

    Sources: Holm 1979, "A simple sequentially rejective multiple test procedure"; as intervals
    Serlin 1993, "Confidence intervals and the scientific method: a case for Holm on the range".

    Raises ValueError as `estimate`.
    """
    several = [i for i, one in enumerate(values) if len(one) > 1]
    found = [estimate(one, confidence) for one in values]
    left = len(several)
    for i in sorted(several, key=lambda i: _p_value(found[i])):
        found[i] = estimate(values[i], 1.0 - (1.0 - confidence) / left)
        if verdict(found[i]) != "none seen":
            left = max(left - 1, 1)
    return found


def _p_value(found: Estimate) -> float:
    """Of the two-sided t-test against 0."""
    from scipy.special import stdtr

    if not found.deviation:
        return float(found.mean == 0.0)
    t = abs(found.mean) / found.deviation * math.sqrt(found.count)
    return 2.0 * float(stdtr(found.count - 1, -t))


def differences(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """``values[i] - base[i]``, entry i of both from one seed; ValueError for unequal lengths."""
    if len(values) != len(base):
        raise ValueError(f"{len(values)} values and {len(base)} to compare with; give pairs")
    return [value - other for value, other in zip(values, base)]


def paired(values: Sequence[float], base: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The `estimate` of the changes ``values[i] - base[i]``, entry i of both from one seed.

    What both share, the initial noise above all, drops out: small changes can be told from noise.
    Raises ValueError for unequal lengths, and as `estimate`.
    """
    return estimate(differences(values, base), confidence)


def verdict(change: Estimate) -> Literal["higher", "lower", "none seen"]:
    """Whether a change was seen: its interval leaves out 0. Of a single seed nothing is seen."""
    if change.low is None or change.high is None or change.low <= 0.0 <= change.high:
        return "none seen"
    return "higher" if change.mean > 0.0 else "lower"
