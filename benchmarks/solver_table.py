"""The table of solvers in the docs: what each claims, and what was measured.

    python benchmarks/solver_table.py                  # measures the solvers that it lacks
    python benchmarks/solver_table.py --all            # measures all anew: a minute
    python benchmarks/solver_table.py --plot           # draws docs/images/solver_errors.png

Orders: deterministic runs (η = 0, no teacher) on five Gaussians with the closed-form solution of
the probability-flow ODE, σ from 10 to 0.2 in equal steps of -log σ; the fitted slope of
log(rms error) over log(steps), mean and range over the problems. Errors: five Gaussian mixtures, σ
from 14.61 to 0.0292 and then 0, the rms distance to the solution by DOP853 at 1e-10, geometric mean
over the problems, at a number of network evaluations (solvers of two a step: one fewer; the first
step of `o3` makes one more, so it has a step less). Everything in float64.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from tqdm import tqdm

import kdpp
from kdpp import Solver

DOCS = Path(__file__).parents[1] / "docs"
TABLE, PLOT = DOCS / "solver_table.md", DOCS / "images" / "solver_errors.png"
HIGH, LOW = 10.0, 0.2
FACTORS = (0.75, 1.0, 1.5, 2.0)
"""Of the number of steps from which a solver's order is seen."""
VARIANTS = {"unipc": ({}, {"order": 3})}
"""Settings that make another solver."""
SIGMA_MAX, SIGMA_MIN = 14.6146, 0.0292
EVALUATIONS = (4, 6, 8)
PROBLEMS = 5
DIMENSIONS = 12


@dataclass
class Gaussian:
    """Data N(mean, diag(variance)): ``D = (c x + σ² μ)/(c + σ²)``, and its exact ODE solution."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def random(cls, seed: int) -> Gaussian:
        draw = np.random.default_rng(seed)
        mean, spread = draw.normal(size=DIMENSIONS), draw.uniform(0.3, 2.0, size=DIMENSIONS)
        return cls(torch.from_numpy(mean), torch.from_numpy(spread))

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: object) -> Tensor:
        level = sigma[:, None] ** 2
        return (self.variance * x + level * self.mean) / (self.variance + level)

    def solution(self, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        shrink = ((self.variance + sigma_next**2) / (self.variance + sigma**2)).sqrt()
        return self.mean + (x - self.mean) * shrink


@dataclass
class Mixture:
    """Equal Gaussians around ``means`` (k, d), each of variance ``variance``."""

    means: Tensor
    variance: float

    @classmethod
    def random(cls, seed: int) -> Mixture:
        draw = np.random.default_rng(100 + seed)
        return cls(torch.from_numpy(draw.normal(size=(6, DIMENSIONS))), 0.05)

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: object) -> Tensor:
        total = self.variance + sigma[:, None] ** 2
        share = (-(torch.cdist(x, self.means) ** 2) / (2 * total)).softmax(1)
        return (self.variance * x + sigma[:, None] ** 2 * (share @ self.means)) / total

    def solution(self, x: Tensor, sigma: float) -> Tensor:
        """The ODE from sigma to SIGMA_MIN, then the estimate there, as σ = 0 is reached."""

        def slope(t: float, flat: np.ndarray) -> np.ndarray:
            state = torch.from_numpy(flat).view_as(x)
            return (self(state, x.new_full((len(x),), math.exp(-t))) - state).flatten().numpy()

        span = (-math.log(sigma), -math.log(SIGMA_MIN))
        end = solve_ivp(slope, span, x.flatten().numpy(), "DOP853", rtol=1e-10, atol=1e-12).y[:, -1]
        state = torch.from_numpy(end).view_as(x)
        return self(state, x.new_full((len(x),), SIGMA_MIN))


def sample(
    solver: Solver,
    settings: Mapping[str, object],
    model: object,
    x: Tensor,
    sigmas: Sequence[float],
) -> Tensor:
    """A deterministic run without a teacher."""
    wrapped = kdpp.TeacherGuidedDenoiser(model, model, teacher_steps=0)
    options = {**settings, "eta": 0.0} if "eta" in solver.options else dict(settings)
    cond = torch.zeros(len(x), 1)
    extra_args = {"cond": cond, "uncond": cond} if solver.cfg_pp else {}
    if solver.own_levels is not None:
        options["n"] = solver.evaluations * (len(sigmas) - 1)
        sigmas = solver.levels(sigmas[-1], sigmas[0], options["n"])
    levels = torch.tensor(sigmas, dtype=torch.float64)
    return kdpp.sample(solver, wrapped, x, levels, extra_args, disable=True, **options)


def rms(difference: Tensor) -> float:
    return math.sqrt(float(difference.square().mean()))


def measured_orders(
    solver: Solver, settings: Mapping[str, object], problems: int = PROBLEMS
) -> list[float]:
    """The fitted order on each Gaussian."""
    steps = [round(factor * solver.order_from) for factor in FACTORS]
    orders = []
    for seed in range(problems):
        model = Gaussian.random(seed)
        x = HIGH * start(seed, 4)
        exact = model.solution(x, HIGH, LOW)
        errors = []
        for n in steps:
            levels = np.geomspace(HIGH, LOW, n + 1).tolist()
            errors.append(rms(sample(solver, settings, model, x, levels) - exact))
        orders.append(float(-np.polyfit(np.log(steps), np.log(errors), 1)[0]))
    return orders


def start(seed: int, batch: int) -> Tensor:
    """Standard normal noise of its own seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, DIMENSIONS, generator=generator, dtype=torch.float64)


def schedule(name: str, steps: int) -> list[float]:
    """``steps`` levels from SIGMA_MAX to SIGMA_MIN, and 0."""
    power = {"log-uniform": 0.0, "Karras": 1 / 7}[name]
    if power == 0.0:
        levels = np.geomspace(SIGMA_MAX, SIGMA_MIN, steps)
    else:
        levels = np.linspace(SIGMA_MAX**power, SIGMA_MIN**power, steps) ** (1 / power)
    return [*levels.tolist(), 0.0]


@cache
def mixture_problem(seed: int) -> tuple[Mixture, Tensor, Tensor]:
    """A mixture, a start at SIGMA_MAX and the exact end."""
    model, x = Mixture.random(seed), SIGMA_MAX * start(seed, 32)
    return model, x, model.solution(x, SIGMA_MAX)


def few_step_error(
    solver: Solver, settings: Mapping[str, object], name: str, evaluations: int
) -> float:
    """Geometric mean error of the run that makes this many evaluations, or one fewer."""
    # The last step, to 0, takes one evaluation.
    steps = (evaluations - 1 - solver.extra) // solver.evaluations
    errors = []
    for seed in range(PROBLEMS):
        model, x, exact = mixture_problem(seed)
        found = sample(solver, settings, model, x, schedule(name, steps + 1))
        errors.append(rms(found - exact))
    return math.exp(float(np.mean(np.log(errors))))


NOISE = {"none": "–", "plain": "plain", "brownian": "Brownian"}
FACTS = ["solver", "evaluations a step", "order", "multistep", "noise", "levels"]


def facts(solver: Solver, settings: Mapping[str, object]) -> list[str]:
    """The cells that the solver itself gives."""
    call = "".join(f"{key}={value}" for key, value in settings.items())
    name = f"`{solver.name}({call})`" if call else f"`{solver.name}`"
    each = str(solver.evaluations) + (f" ({solver.extra:+d} once)" if solver.extra else "")
    order = "–" if solver.order is None else str(solver.order + ("order" in settings))
    multistep = "yes" if solver.multistep else "no"
    return [
        name,
        each,
        order,
        multistep,
        NOISE[solver.noise],
        "own" if solver.own_levels else "any",
    ]


def figures(solver: Solver, settings: Mapping[str, object]) -> list[str]:
    """The cells that are measured: order, then errors."""
    if solver.order is None:
        return ["–"] * (1 + 2 * len(EVALUATIONS))
    orders = measured_orders(solver, settings)
    cells = [f"{np.mean(orders):.2f} ({min(orders):.2f}–{max(orders):.2f})"]
    if solver.own_levels is not None:  # it does not go to 0
        return cells + ["–"] * (2 * len(EVALUATIONS))
    return cells + [
        f"{few_step_error(solver, settings, name, n):.3f}"
        for name in ("log-uniform", "Karras")
        for n in EVALUATIONS
    ]


def lines() -> list[tuple[Solver, Mapping[str, object]]]:
    """Every solver, and its variants."""
    return [(s, v) for s in kdpp.SOLVERS.values() for v in VARIANTS.get(s.name, ({},))]


HEAD = [*FACTS, "measured order"]
HEAD += [f"log-uniform, {n}" for n in EVALUATIONS] + [f"Karras, {n}" for n in EVALUATIONS]


def stored() -> list[list[str]]:
    """The cells of the table as it stands, line by line."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


def write(anew: bool) -> None:
    """Write the table: facts from the solvers, figures measured where they are not there yet."""
    known = {} if anew else {row[0]: row[len(FACTS) :] for row in stored()}
    rows = []
    for line in tqdm(lines(), desc="measuring"):
        cells = facts(*line)
        rows.append(cells + (known.get(cells[0]) or figures(*line)))
    text = ["| " + " | ".join(row) + " |" for row in (HEAD, *rows)]
    text.insert(1, "|" + "---|" * len(HEAD))
    TABLE.write_text("\n".join(text) + "\n", encoding="utf-8")


PLOTTED = ("euler", "dpmpp_2m", "unipc", "dpmpp_2s_ancestral", "heun", "dpmpp_3m_sde",
           "dpmpp_3m_sde_o3")  # fmt: skip


def plot(path: Path) -> None:
    """Error against evaluations on both kinds of levels, at the evaluations really made."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("log-uniform", "Karras")):
        for short in tqdm(PLOTTED, desc=name):
            solver = kdpp.SOLVERS[short]
            made = [solver.evaluations * k + 1 + solver.extra for k in range(1, 20)]
            made = [n for n in made if 3 <= n <= 20]
            errors = [few_step_error(solver, {}, name, n) for n in made]
            axes.loglog(made, errors, marker=".", label=short)
        axes.set_title(f"{name} levels")
        axes.set_xlabel("network evaluations")
        axes.set_xticks([3, 4, 6, 8, 12, 20], ["3", "4", "6", "8", "12", "20"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("rms error, 5 mixtures")
    figure.axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="measure every solver anew")
    parser.add_argument("--plot", action="store_true", help="draw the plot instead")
    chosen = parser.parse_args()
    if chosen.plot:
        plot(PLOT)
    else:
        write(chosen.all)


if __name__ == "__main__":
    main()
