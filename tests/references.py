"""Every literal reference by its solver's name, and what a run must give by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

import reference
import reference_more
from problems import Problem, Tape, accepts
from reference import Moment, Revision

PAPERS_OWN = frozenset(reference.REFERENCES)
"""Distillation++'s own solvers."""
REFERENCES = {**reference.REFERENCES, **reference_more.REFERENCES}


def expected(
    solver: Any,
    problem: Problem,
    x: Tensor,
    sigmas: Tensor,
    guidance: Mapping[str, Any],
    **options: Any,
) -> Tensor:
    """What `problem.sample` with the same arguments must give; needs the same global seed."""
    known = {name: value for name, value in options.items() if accepts(solver, name)}
    tape = Tape(x, problem.noise_seed + 1)
    revise = Revision(
        problem.teacher_estimate,
        lambda: tape(),
        scale=guidance.get("teacher_scale", 0.1),
        steps=guidance.get("teacher_steps", 1),
        renoise=guidance.get("renoise", "next"),
        eta=guidance.get("renoise_eta", 1.0),
    )
    solve = REFERENCES[solver.name]
    if known.pop("variable", "sigma") == "tau":
        solve = over_tau(solve)
    noise = Tape(x, problem.noise_seed)
    return solve(problem.estimate, problem.unconditional, revise, x, sigmas, noise, **known)


def over_tau(solve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reference for states z = (1-τ) x over τ = σ/(1+σ), its result as x again.

    There the teacher's term has the weight 1-τ' that it has in x, at the end of the step.
    """

    def run(estimate, uncond, revise, x, sigmas, noise, **options):  # type: ignore[no-untyped-def]
        def moved(function):  # type: ignore[no-untyped-def]
            return lambda z, tau: function(z / (1 - tau), tau / (1 - tau))

        def revised(at, x0, direction):  # type: ignore[no-untyped-def]
            levels = (tau / (1 - tau) for tau in (at.sigma, at.sigma_next))
            level = at.point_sigma / (1 - at.point_sigma)
            new = revise(Moment(at.step, *levels, at.point * (1 + level), level), x0, direction)
            return (1 - at.sigma_next) * new + at.sigma_next * direction

        taus = sigmas / (1 + sigmas)
        z = solve(
            moved(estimate), moved(uncond), revised, x * (1 - taus[0]), taus, noise, **options
        )
        return z / (1 - taus[-1])

    return run
