"""Which steps of a run: the first k, some by index, or those in a range of noise levels."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from kdpp.checks import check_count
from kdpp.plan import Space, Step

__all__ = ["NoiseRange", "Steps", "chosen", "one_by_one", "read_steps"]


class NoiseRange(NamedTuple):
    """The steps that start at a level from ``low`` to ``high``."""

    low: float
    high: float

    def holds(self, level: float) -> bool:
        """Whether it holds the level; a bound that float32 has rounded is in it."""
        return self.low * (1.0 - 1e-6) <= level <= self.high * (1.0 + 1e-6)


Steps = int | Collection[int] | NoiseRange
"""The first k; or indices, negative ones from the end; or a range of levels."""


def read_steps(name: str, steps: Any) -> Steps:
    """The steps, a list copied; ValueError for anything else, see `Steps`."""
    steps = steps.tolist() if isinstance(steps, Tensor) else steps
    if isinstance(steps, NoiseRange):
        low = high = math.nan
        with suppress(TypeError, ValueError, OverflowError):  # the last of whole numbers too large
            low, high = map(float, steps)
        if not 0.0 <= low <= high:
            raise ValueError(f"{name} is {steps}; it must have 0 ≤ low ≤ high")
    elif isinstance(steps, Collection) and not isinstance(steps, str):
        for step in steps:
            if not isinstance(step, numbers.Integral) or isinstance(step, bool):
                raise ValueError(f"{name} holds {step!r}; it must hold whole numbers")
    else:
        check_count(name, steps, 0)
    return tuple(steps) if isinstance(steps, list) else steps


def one_by_one(steps: Steps) -> bool:
    """Whether the steps are given by their indices."""
    return not isinstance(steps, numbers.Integral | NoiseRange)


def chosen(
    name: str, wanted: Steps, steps: Sequence[Step], able: Iterable[int], space: Space
) -> list[int]:
    """The indices of those steps that are wanted, of the ``able`` ones.

    Others are not counted among the first k. Raises ValueError for an index that no step has.
    """
    if isinstance(wanted, NoiseRange):
        return [i for i in able if wanted.holds(space.level(steps[i].sigma))]
    if isinstance(wanted, numbers.Integral):
        return list(islice(able, int(wanted)))
    count = len(steps)
    indices: Any = wanted
    for i in indices:
        if not -count <= i < count:
            raise ValueError(f"{name} holds {i}; the schedule has {count} steps")
    inside = {i % count for i in indices}
    return [i for i in able if i in inside]
