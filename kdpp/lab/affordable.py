"""What `kdpp tune` does by default, so that it can be afforded."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LAB", "PIPELINES", "Affordable"]


class Affordable(NamedTuple):
    """How many samples, and how each is worked on; the last three as in `kdpp.lab.tuning.tune`."""

    samples: int
    detail: int
    batch: int | None
    max_batch: int | None


LAB = Affordable(100, 50, None, None)
"""What models of the lab can afford."""
PIPELINES = Affordable(50, 20, 4, 8)
"""What published models can afford."""
