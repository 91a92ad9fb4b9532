"""The list of solvers, and what is claimed of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["SOLVERS", "ExtraArgs", "Solver", "solver"]

ExtraArgs = Mapping[str, Any] | None
Sampler = TypeVar("Sampler", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Solver:
    """A public sampler and what is claimed of it; tests measure the claims."""

    sample: Callable[..., Tensor]
    order: float | None
    """Order of convergence to the ODE's solution (at η = 0); None: it does not follow the ODE."""
    evaluations: int
    """Student evaluations in a step (the last one, to σ = 0, always takes one)."""
    cfg_pp: bool
    needs: str
    """What it needs beside torch, or of its schedule."""

    @property
    def name(self) -> str:
        return self.sample.__name__


SOLVERS: dict[str, Solver] = {}


def solver(
    *, order: float | None, evaluations: int = 1, cfg_pp: bool = False, needs: str = ""
) -> Callable[[Sampler], Sampler]:
    """Enter the public function into `SOLVERS`."""

    def enter(sample: Sampler) -> Sampler:
        SOLVERS[sample.__name__] = Solver(sample, order, evaluations, cfg_pp, needs)
        return sample

    return enter
