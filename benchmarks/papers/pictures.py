"""Pictures of the papers' tables: what the teacher changes, and quality against evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from typing import Any

from matplotlib.figure import Figure

Cell = Mapping[str, Any]


def changes(results: Mapping[str, Any]) -> Figure:
    """Table 1: FD with the teacher over FD alone, for each student and way to ask the teacher."""
    cells = [cell for cell in results["cells"] if cell["guide"] == "teacher"]
    alone = {
        cell["student"]: cell["metrics"]["fd"]["mean"]
        for cell in results["cells"] if cell["guide"] == "none"
    }  # fmt: skip
    ways: dict[str, Callable[[Cell], bool]] = {
        "first step, λ = 0.1": lambda cell: first(cell) and cell["teacher_scale"] == 0.1,
        "first step, λ = 0.5": lambda cell: first(cell) and cell["teacher_scale"] == 0.5,
        "where kdpp tune says": lambda cell: not first(cell),
    }
    students = list(dict.fromkeys(cell["student"] for cell in cells))
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for k, chosen in enumerate(ways.values()):
        for cell in filter(chosen, cells):
            fd, place = cell["metrics"]["fd"], students.index(cell["student"]) + 0.26 * (k - 1)
            base = alone[cell["student"]]
            low, high = fd["change"]["low"], fd["change"]["high"]
            axes.barh(place, fd["change"]["mean"] / base, 0.24, color=f"C{k}")
            axes.plot([low / base, high / base], [place, place], color="0.2", lw=1)
            itself = fd["self_change"]["mean"] / base
            axes.plot(itself, place, "d", color="white", mec="black", ms=4, mew=0.8)
    for k, way in enumerate(ways):
        axes.barh(0, 0, color=f"C{k}", label=way)
    axes.plot([], [], "d", color="white", mec="black", ms=4, mew=0.8, label="the student itself")
    axes.axvline(0, color="0.2", lw=0.8)
    axes.set_yticks(range(len(students)), students)
    axes.invert_yaxis()
    axes.set_xlabel("paired change of the Fréchet distance, as a share of it")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    axes.legend(fontsize=8, loc="lower left")
    return figure


def first(cell: Cell) -> bool:
    """Whether the teacher is asked at the first step, as in the paper."""
    return cell["teacher_steps"] == 1


def evaluations(results: Mapping[str, Any]) -> Figure:
    """Table 3: FD against evaluations of an image, at each CFG scale."""
    cells = results["cells"]
    lines = {
        "teacher, DDIM": lambda name: name == "teacher",
        "ours, deterministic": lambda name: name.startswith("ours-D"),
        "ours, stochastic": lambda name: name.startswith("ours-S"),
        "naive": lambda name: name.startswith("naive"),
        "halves apart": lambda name: name.startswith("halves"),
    }
    scales = sorted({cell["cond_scale"] for cell in cells})
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(scales), sharey=True)
    for axes, scale in zip(panels, scales):
        for name, chosen in lines.items():
            found = [c for c in cells if chosen(c["student"]) and c["cond_scale"] == scale]
            draw(axes, name, found)
        axes.set(xscale="log", yscale="log", title=f"CFG {scale:g}", xlabel="evaluations")
        ticks = [1, 2, 4, 8, 16, 32]
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("Fréchet distance")
    panels[0].set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    panels[0].legend(fontsize=8)
    return figure


def draw(axes: Any, name: str, cells: Iterable[Cell]) -> None:
    """A line with its intervals."""
    points = sorted((cell["costs"]["student_evaluations"], *three(cell)) for cell in cells)
    if points:
        x, mean, low, high = zip(*points)
        spread = [[m - a for m, a in zip(mean, low)], [b - m for m, b in zip(mean, high)]]
        axes.errorbar(x, mean, spread, marker="o", ms=3, lw=1.2, capsize=2, label=name)
    else:
        axes.errorbar([], [], marker="o", ms=3, lw=1.2, label=name)


def three(cell: Cell) -> tuple[float, float, float]:
    """FD and its interval."""
    fd = cell["metrics"]["fd"]
    return fd["mean"], fd["low"], fd["high"]


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


PICTURES = {1: changes, 3: evaluations}
