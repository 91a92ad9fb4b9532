"""The papers' tables, in small, on the digits: trains what is missing, measures, writes the table.

    python benchmarks/papers/tables.py 1 2 3 4 5 --out DIR [--write]

Students are trained into DIR/students by `kdpp train` (students.toml says how); grids are run by
`kdpp compare` into DIR/table1 … table5, each with its page. Everything resumes where it was
stopped. --write puts the tables, and pictures of two, where the docs include them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from kdpp.cli import main as kdpp_command
from kdpp.lab.compare import compare
from kdpp.lab.intervals import estimate, paired, verdict
from kdpp.lab.models import load_model
from kdpp.lab.settings import read_toml
from pictures import PICTURES, png
from rollouts import sweep

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
RESULTS, IMAGES = DOCS / "results" / "papers", DOCS / "images"
SAID: dict[str, Callable[[Any], str]] = {
    "teacher_scale": lambda value: f"λ {value:g}",
    "teacher_steps": lambda value: f"k {value}" if isinstance(value, int) else at(*value),
    "renoise": lambda value: f"s {value}" if isinstance(value, str) else f"σ_s {value:.3g}",
    "renoise_eta": lambda value: f"ρ {value:g}",
    "teacher_cfg_scale": lambda value: f"ω {value:g}",
}
"""How the guidance of a cell is said."""


def at(step: int) -> str:
    """A single guided step."""
    return "last step" if step == -1 else f"step {step}"


Way = tuple[str, int, float]  # a student, its steps, its CFG scale
PAIRS: dict[int, list[tuple[Way, Way]]] = {
    3: [
        (("ours-D-4", 4, 2.0), ("teacher", 4, 2.0)),
        (("ours-D-4", 4, 2.0), ("teacher", 8, 2.0)),
        (("ours-D-4", 4, 2.0), ("teacher", 16, 2.0)),
        (("ours-D-8", 8, 2.0), ("teacher", 16, 2.0)),
        (("ours-D-1", 1, 2.0), ("teacher", 8, 2.0)),
        (("ours-D-4", 4, 2.0), ("single-w-4", 4, 2.0)),
        (("ours-D-4", 4, 2.0), ("halves-4", 4, 2.0)),
        (("ours-D-8", 8, 2.0), ("halves-8", 8, 2.0)),
        *(
            ((f"ours-S-{n}", n, scale), (f"ours-D-{n}", n, scale))
            for n in (8, 4)
            for scale in (1.0, 2.0, 4.0)
        ),
    ],
    5: [
        (("sfd", 4, 1.0), ("progressive", 4, 1.0)),
        (("sfd-50", 4, 1.0), ("progressive", 4, 1.0)),
        (("sfd-50", 4, 1.0), ("sfd", 4, 1.0)),
        (("sfd-100", 4, 1.0), ("sfd", 4, 1.0)),
        (("sfd-euler", 4, 1.0), ("sfd", 4, 1.0)),
        (("sfd-heun", 4, 1.0), ("sfd", 4, 1.0)),
        (("sfd-t-min", 4, 1.0), ("sfd", 4, 1.0)),
        (("sfd-t-min-01", 4, 1.0), ("sfd", 4, 1.0)),
        (("sfd-steps", 4, 1.0), ("sfd", 4, 1.0)),
        (("sfd-steps", 3, 1.0), ("sfd-3", 3, 1.0)),
        (("sfd-steps", 5, 1.0), ("sfd-5", 5, 1.0)),
        (("sfd", 3, 1.0), ("sfd-3", 3, 1.0)),
        (("sfd", 5, 1.0), ("sfd-5", 5, 1.0)),
    ],
}
"""Ways to sample that are compared, the first against the second."""
BASES = {
    "ddil-unreflected": "progressive", "reflected": "progressive", "ddil": "reflected",
    "ddil-lcm-unreflected": "lcm-slow", "reflected-lcm": "lcm-slow", "ddil-lcm": "reflected-lcm",
}  # fmt: skip
"""What a student of table 4 is compared with, of the same training seed."""


def train(name: str, folder: Path) -> None:
    """One student and the one that teaches it, where they are not there yet."""
    kind, _, seed = name.partition("-seed-")
    settings = {**read_toml(HERE / "students.toml")[kind], "seed": int(seed or 0)}
    method, teacher = settings.pop("method"), settings.get("teacher", "")
    if teacher.startswith("students/"):
        train(teacher.removeprefix("students/"), folder)
        settings["teacher"] = str(folder / teacher)
    flags = [
        part
        for key, value in settings.items()
        for part in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]
    if kdpp_command(["train", method, "--out", str(folder / "students" / name), *flags]):
        sys.exit(f"training {name} failed")


def run_grid(number: int, folder: Path) -> dict[str, Any]:
    """The results of one compare run, its students trained before."""
    spec = HERE / f"table{number}.toml"
    for place in read_toml(spec)["students"].values():
        if place.startswith("students/"):
            train(place.removeprefix("students/"), folder)
    copy = folder / spec.name
    copy.write_text(spec.read_text(encoding="utf-8"), encoding="utf-8")
    compare(copy, folder / f"table{number}")
    return stored(number, folder)


def stored(number: int, folder: Path) -> dict[str, Any]:
    """The results of a finished grid."""
    results: dict[str, Any] = json.loads((folder / f"table{number}" / "results.json").read_bytes())
    return results


def figure(value: dict[str, Any], digits: int = 2, sign: str = "") -> str:
    """``mean ± half the 95 % interval``."""
    half = "" if value["low"] is None else f" ± {(value['high'] - value['low']) / 2:.{digits}f}"
    return f"{value['mean']:{sign}.{digits}f}{half}"


def change(value: dict[str, Any] | None) -> str:
    """A paired change, or that none was seen."""
    if value is None:
        return ""
    return "none seen" if value["verdict"] == "none seen" else figure(value, sign="+")


def grid_table(results: dict[str, Any]) -> list[str]:
    """The cells of a compare run as lines of Markdown."""
    guided = [cell for cell in results["cells"] if cell["guide"] == "teacher"]
    cells = [
        cell for cell in results["cells"]
        if cell["guide"] != "self" and "-seed-" not in cell["student"]
    ]  # fmt: skip
    varied = [name for name in SAID if len({str(cell[name]) for cell in guided}) > 1]
    varied = varied or ["teacher_scale"]
    controls = any(cell["metrics"]["fd"]["self_change"] for cell in cells)
    head = ["student", "sampled", *(["guided"] if guided else [])]
    head += ["FD", *(["change"] if guided else []), *(["itself"] if controls else [])]
    head += ["FD to the teacher", "IS", "accuracy, %", "recall"]
    head += ["evaluations", "compute, M", "ms", "training, M"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    models = {name: load_model(told["checkpoint"]) for name, told in results["models"].items()}
    training = {name: model.card.evaluations for name, model in models.items()}
    for cell in cells:
        fd, costs = cell["metrics"]["fd"], cell["costs"]
        scale = "" if cell["cond_scale"] == 1.0 else f", CFG {cell['cond_scale']:g}"
        row = [cell["student"], f"{cell['sampler']} {cell['steps']}{scale}"]
        if guided:
            said = varied if cell in guided else []
            row.append(", ".join(SAID[name](cell[name]) for name in said))
        row.append(figure(fd))
        if guided:
            row += [change(fd["change"])] + ([change(fd["self_change"])] if controls else [])
        evaluations = f"{costs['student_evaluations']:g}"
        if costs["teacher_evaluations"]:
            evaluations += f" + {costs['teacher_evaluations']:g}"
        trained = training[cell["student"]]
        row += [*rest(cell["metrics"]), evaluations, f"{costs['compute'] / 1e6:.2f}"]
        row += [f"{costs['milliseconds']:.3f}", f"{trained / 1e6:.2f}" if trained else ""]
        lines.append(line(row))
    return lines


def line(cells: Sequence[str]) -> str:
    """A row of Markdown; in its cells no line ends at a space."""
    return "| " + " | ".join(cell.replace(" ", "\u00a0") for cell in cells) + " |"


def rest(metrics: dict[str, Any]) -> list[str]:
    """The columns after the Fréchet distance to the data."""
    accuracy = {
        key: 100 * value if isinstance(value, float) else value
        for key, value in metrics["accuracy"].items()
    }
    return [
        figure(metrics["fd_teacher"]), figure(metrics["inception_score"]),
        figure(accuracy, 1), figure(metrics["recall"], 3),
    ]  # fmt: skip


def rollout_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The sweeps of rollouts as lines of Markdown."""
    head = ["student", "who", "FD", "against p_T = 0", "FD to the teacher", "IS", "accuracy, %"]
    head.append("recall")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        if "switch" in row:
            other = "student" if row["first"] == "teacher" else "teacher"
            who = f"{row['first']}, from transition {row['switch']} the {other}"
        else:
            who = f"p_T = {row['teacher_probability']:g}"
        alone = row.get("teacher_probability") == 0.0
        change = "" if alone else seen(row["values"], rows[0]["values"])
        cells = [row["student"], who, figure(row["metrics"]["fd"]), change, *rest(row["metrics"])]
        lines.append(line(cells))
    return lines


def pair_table(results: dict[str, Any], pairs: Sequence[tuple[Way, Way]]) -> list[str]:
    """Paired changes from one way to another, over sampling seeds."""
    found = {
        (cell["student"], cell["steps"], cell["cond_scale"]): cell["metrics"]
        for cell in results["cells"] if cell["guide"] == "none"
    }  # fmt: skip
    head = ["first", "against", "change of FD", "of FD to the teacher"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for ways in pairs:
        row = [f"{name}, {steps} steps, CFG {scale:g}" for name, steps, scale in ways]
        for metric in ("fd", "fd_teacher"):
            row.append(seen(*(found[way][metric]["values"] for way in ways)))
        lines.append(line(row))
    return lines


def seen(values: Sequence[float], base: Sequence[float]) -> str:
    """A paired change; in brackets where its interval holds 0."""
    found = paired(values, base)
    said = figure(asdict(found), sign="+")
    return f"none seen ({said})" if verdict(found) == "none seen" else said


def training_table(results: dict[str, Any]) -> list[str]:
    """FD over training seeds, those of one kind of student in a row."""
    of: dict[str, list[float]] = {}  # by kind, in the order of the seeds
    for cell in (cell for cell in results["cells"] if cell["guide"] == "none"):
        kind = cell["student"].partition("-seed-")[0]
        of.setdefault(kind, []).append(cell["metrics"]["fd"]["mean"])
    lines = ["| student | FD, by training seed | mean | change | against |", "|" + "---|" * 5]
    for kind, values in of.items():
        if len(values) > 1:
            each, base = ", ".join(f"{value:.2f}" for value in values), BASES.get(kind, "")
            change = seen(values, of[base]) if base else ""
            row = [kind, each, figure(asdict(estimate(values))), change, base]
            lines.append(line(row))
    return lines


def table(number: int, folder: Path) -> str:
    """One table as Markdown, with how it was made."""
    results = run_grid(number, folder)
    lines = grid_table(results)
    if number in PAIRS:
        lines += ["", *pair_table(results, PAIRS[number])]
    settings, versions = results["settings"], results["versions"]
    if number == 4:
        lines += ["", *training_table(results)]
        seeds = settings["seeds"]
        for name in ("ddil", "progressive-short", "lcm"):
            train(name, folder)
            rows = sweep(folder, name, seeds, settings["images"])
            lines += ["", *rollout_table(rows)]
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    foot = (
        f"{date.today()}; {made}; CPU. {len(settings['seeds'])} seeds of {settings['images']} "
        "images, clamped; ± is half of the 95 % interval over seeds. "
        f"`python benchmarks/papers/tables.py {number} --out DIR`"
    )
    return "\n".join([*lines, "", foot]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=int, nargs="+", choices=range(1, 6))
    parser.add_argument("--out", type=Path, required=True, help="folder of students and results")
    parser.add_argument("--write", action="store_true", help="also write docs/results/papers")
    settings = parser.parse_args()
    for number in settings.tables:
        text = table(number, settings.out)
        print(text)
        if settings.write and number in PICTURES:
            picture = PICTURES[number](stored(number, settings.out))
            (IMAGES / f"papers-{number}.png").write_bytes(png(picture))
        if settings.write:
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"table{number}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
