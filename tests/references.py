"""Every literal reference by its solver's name, and what a run must give by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

import reference
import reference_more
from problems import Problem, Tape, accepts
from reference import Revision

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
    noise = Tape(x, problem.noise_seed)
    return solve(problem.estimate, problem.unconditional, revise, x, sigmas, noise, **known)
