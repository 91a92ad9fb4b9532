"""What a student is to be measured against: the teacher alone at its best, and the Pareto front."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from kdpp.kinds import trained_range
from kdpp.lab.models import GenerativeModel
from kdpp.lab.sampling import solver_for
from kdpp.lab.schedules import levels_on
from kdpp.lab.spec import REFERENCE_SEED, BestTeacher, Cell, calls_of

__all__ = ["SEARCHED", "SEARCHED_LEVELS", "SEARCH_SEED", "candidates", "front"]

SEARCHED = ("unipc", "dpmpp_2m", "deis", "heun", "euler")
"""The solvers that are tried: those that people take at few steps."""
SEARCHED_LEVELS = ("karras", "cosine", "exponential")
"""And the schedules, beside the teacher's own levels."""
SEARCH_SEED = REFERENCE_SEED + 1
"""The seed of the search: what is found is measured on others, which played no part in it."""
Key = TypeVar("Key")


def candidates(name: str, teacher: GenerativeModel, wanted: BestTeacher) -> Iterator[Cell]:
    """The teacher by each solver on each schedule, with as many steps as the evaluations allow.

    ``name`` is the teacher's as a student; nothing where a single step is too dear.
    """
    both = 1 if wanted.cond_scale == 1.0 or teacher.guidance_range else 2
    seen = set()
    for solver in map(solver_for, SEARCHED):
        steps = wanted.evaluations // both
        while (
            steps and calls_of(solver.name, teacher.levels_for(steps)) * both > wanted.evaluations
        ):
            steps -= 1
        if steps < 1:
            continue
        reach = trained_range(teacher.denoiser_for(steps))
        levels = {"": teacher.levels_for(steps)}
        if reach:
            levels |= {kind: levels_on(kind, steps, *reach) for kind in SEARCHED_LEVELS}
        for kind, one in levels.items():
            cell = Cell(name, solver.name, one, wanted.cond_scale, schedule=kind)
            if cell not in seen:
                seen.add(cell)
                yield cell


def front(costs: Mapping[Key, float], losses: Mapping[Key, float]) -> list[Key]:
    """Those of which no other costs at most as much and loses less, the cheapest first."""
    found: list[Key] = []
    for key in sorted(costs, key=lambda key: (costs[key], losses[key])):
        if not found or losses[key] < losses[found[-1]]:
            found.append(key)
    return found
