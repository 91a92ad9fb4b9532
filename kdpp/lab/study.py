"""``kdpp compare --solvers MODEL``: which solver, at so many evaluations, for this model?

Every solver that takes any levels is run on several schedules with as many steps as the evaluations
allow, over several seeds. It is a spec like any other; beside the page there is an answer in words
and a plot of the error against evaluations.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import kdpp
from kdpp.checkpoints.models import open_models
from kdpp.checkpoints.requests import Request
from kdpp.lab import processes
from kdpp.lab.answer import need_matplotlib
from kdpp.lab.models import GenerativeModel
from kdpp.lab.spec import Spec, calls_of, check_spec

__all__ = ["EVALUATIONS", "SCHEDULES", "answer", "draw", "spec_for"]

EVALUATIONS = (4, 5, 6, 8, 10, 20)
"""Calls of the denoiser in a run; with CFG each is two evaluations of the network."""
SCHEDULES = (None, "karras", "cosine", "exponential")
SHOWN = 3
"""So many of the best are named at each number of evaluations."""


def studied() -> list[str]:
    """The solvers that take any levels and the model's own guidance, by name."""
    return [
        name
        for name, solver in kdpp.SOLVERS.items()
        if solver.own_levels is None and not solver.cfg_pp and solver.noise != "brownian"
    ]


def spec_for(model: str, cond_scale: float, images: int = 500, seeds: int = 3) -> Spec:
    """The study of a model of the lab as a spec.

    A solver of two calls a step gets half as many steps. Raises as `load_model`.
    """
    network, _ = open_models(Request(student=model), processes.device("cpu"))
    grids = []
    for sampler in studied():
        steps = sorted({_steps(sampler, network, count) for count in EVALUATIONS} - {0})
        grids += [
            {"student": "model", "sampler": sampler, "steps": steps, "cond_scale": cond_scale}
            | ({} if schedule is None else {"schedule": schedule})
            for schedule in SCHEDULES
        ]
    spec = Spec(
        title=f"Which solver? {model}, CFG scale {cond_scale:g}",
        images=images,
        seeds=seeds,
        students={"model": model},
        grid=tuple(grids),
    )
    check_spec(spec)
    return spec


def _steps(sampler: str, model: GenerativeModel, calls: int) -> int:
    """The most steps that take at most so many calls."""
    steps = calls
    while steps and calls_of(sampler, model.levels_for(steps)) > calls:
        steps -= 1
    return steps


def best(results: Mapping[str, Any]) -> dict[int, list[Mapping[str, Any]]]:
    """The cells of each number of calls, the lowest FD first, each solver by its best schedule."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for cell in sorted(results["cells"], key=_distance):
        solvers = found.setdefault(_calls(cell), [])
        if cell["sampler"] not in [other["sampler"] for other in solvers]:
            solvers.append(cell)
    return dict(sorted(found.items()))


def answer(results: Mapping[str, Any]) -> str:
    """The best solvers at each number of calls, in words."""
    lines = [f"{results['title']}: FD (N = {results['settings']['images']}), mean ± half its 95 % "
             "interval over seeds; each solver by its best schedule"]  # fmt: skip
    for calls, cells in best(results).items():
        if calls not in EVALUATIONS:
            continue
        said = []
        for cell in cells[:SHOWN]:
            fd = cell["metrics"]["fd"]
            half = "" if fd["high"] is None else f" ± {fd['high'] - fd['mean']:.2f}"
            levels = cell["schedule"] or "own levels"
            said.append(f"{cell['sampler']} ({levels}) {fd['mean']:.2f}{half}")
        lines.append(f"{calls:3} evaluations: " + "; ".join(said))
    return "\n".join(lines)


def draw(results: Mapping[str, Any]) -> bytes:
    """FD against calls, a line for each solver by its best schedules, as a PNG file.

    Raises ImportError where matplotlib is missing.
    """
    figure = need_matplotlib()
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for calls, cells in best(results).items():
        for cell in cells:
            lines.setdefault(cell["sampler"], []).append((calls, _distance(cell)))
    for k, (sampler, points) in enumerate(lines.items()):
        style = ("-", "--", ":")[k // 10 % 3]
        axes.loglog(*zip(*points), style, marker=".", color=f"C{k % 10}", label=sampler)
    axes.set_xticks(EVALUATIONS, list(map(str, EVALUATIONS)))
    axes.minorticks_off()
    axes.set_xlabel("evaluations (calls of the denoiser)")
    axes.set_ylabel("FD")
    axes.set_title(results["title"], fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncols=2, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _distance(cell: Mapping[str, Any]) -> float:
    return float(cell["metrics"]["fd"]["mean"])


def _calls(cell: Mapping[str, Any]) -> int:
    levels: Sequence[float] = cell["levels"]
    return calls_of(cell["sampler"], levels)
