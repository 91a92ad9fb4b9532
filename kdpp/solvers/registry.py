"""The list of solvers, and what is claimed of each."""

from __future__ import annotations

import inspect
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
    order: int | None
    """Order of convergence to the ODE's solution (at η = 0); None: it does not follow the ODE."""
    evaluations: int
    """Student evaluations in a step (the last one, to σ = 0, always takes one)."""
    cfg_pp: bool
    needs: str
    """What it needs beside torch, or of its schedule."""
    extra: int
    """Evaluations that a run makes once, at its start."""

    @property
    def name(self) -> str:
        return self.sample.__name__

    @property
    def stochastic(self) -> bool:
        """Whether it adds noise unless told otherwise."""
        default = inspect.signature(self.sample).parameters.get("eta")
        noise = "noise_sampler" in inspect.signature(self.sample).parameters
        return noise and (default is None or default.default > 0.0)


SOLVERS: dict[str, Solver] = {}


def solver(
    *,
    order: int | None,
    evaluations: int = 1,
    cfg_pp: bool = False,
    needs: str = "",
    extra: int = 0,
) -> Callable[[Sampler], Sampler]:
    """Enter the public function into `SOLVERS`."""

    def enter(sample: Sampler) -> Sampler:
        SOLVERS[sample.__name__] = Solver(sample, order, evaluations, cfg_pp, needs, extra)
        return sample

    return enter
