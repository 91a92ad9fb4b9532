"""``kdpp evaluate MODEL --out DIR``: how good a model's images are, alone and with a teacher.

It is `kdpp compare` of at most three cells, the model alone, with its teacher, and with itself in
the teacher's place, and prints them as a table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpp.lab.console import say
from kdpp.lab.settings import fill, read_option, read_value

if TYPE_CHECKING:  # this file is read for `kdpp evaluate --help`, which need not wait for torch
    from kdpp.lab.bench import Report
    from kdpp.lab.spec import Spec

__all__ = ["add_arguments", "run"]

NAMES = {"none": "alone", "teacher": "with teacher", "self": "with itself"}
"""How the cells are called, by their guide."""
SAMPLING = {
    "sampler": "a solver, see `kdpp solvers` (default: the one that the model is made for)",
    "steps": "how many (default: what the model is made for)",
    "levels": "the levels themselves, falling to 0, in place of steps",
    "cond_scale": "the model's CFG scale (default: 1)",
}
HELP = {
    "teacher_scale": "λ, the share of the teacher's estimate (default: 0.1)",
    "teacher_steps": "k: the first k steps; or a list of steps (default: 1)",
    "renoise": "σ_s: next, current, random, or a level (default: next)",
    "renoise_eta": "ρ, the share of fresh noise (default: 1.0)",
    "teacher_cfg_scale": "the teacher's CFG scale (default: 2; 1 if guidance is built in)",
    "extrapolate": "true allows λ outside [0, 1] (default: false)",
}
"""The settings of a `kdpp.lab.spec.Combination` that have a flag of their name."""
RENAMED = {
    "--scale": "--teacher-scale",
    "--guided-steps": "--teacher-steps",
    "--teacher-cfg": "--teacher-cfg-scale",
    "--cfg": "--cond-scale",
    "--seed": "--seeds [7, 8]",
}
"""Flags of earlier versions, and what they are now."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments: of sampling and guidance, the settings of a spec's grid."""
    parser.description = (
        "Sample a model over several seeds and measure the images: alone, with a teacher's help, "
        "and with itself in the teacher's place. A run that was stopped goes on where it was; "
        "under `accelerate launch` the processes share the work."
    )
    parser.add_argument("model", help="a checkpoint, a run's folder, or digits:student")
    parser.add_argument("--teacher", help="the model that helps, and is compared with")
    sampling = parser.add_argument_group("sampling")
    guidance = parser.add_argument_group("the teacher's help")
    for group, settings in ((sampling, SAMPLING), (guidance, HELP)):
        for name, about in settings.items():
            group.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=about)
    sampling.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="of the sampler, such as eta=0.5; `kdpp solvers NAME` names them",
    )  # fmt: skip
    add = parser.add_argument_group("measuring").add_argument
    add("--data", default="", help="what to compare with (default: the model's training data)")
    add(
        "--test", default="", help="images that no network was trained on (default: the data's own)"
    )
    add("--statistics", default="", help="a file of kdpp statistics, in place of data")
    add("--features", default="", help="digits, classifier:RUN, pixels, inception:FILE, "
        "clip:FOLDER or timm:FOLDER (default: digits for the digits, else pixels)")  # fmt: skip
    add("--images", metavar="N", default="5000", help="of each seed (default: 5000)")
    add("--seeds", default="5", help="how many, from 0, or a list such as [7,8] (default: 5)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(arguments: argparse.Namespace) -> None:
    """Measure; write ``results.json``, ``results.csv`` and, of pictures, ``grid.png``.

    Raises as `kdpp.lab.bench.run` does.
    """
    from kdpp.lab import bench, pictures, report

    out = arguments.out

    def files(found: Report) -> dict[str, bytes]:
        written = {"results.csv": report.table(found).encode()}
        if found.pictures:
            titles = ["real images", *(NAMES[cell["guide"]] for cell in found.results["cells"])]
            written["grid.png"] = pictures.together(dict(zip(titles, found.pictures)))
        return written

    found = bench.run(spec_of(arguments), out, arguments.device, files)
    if found is not None:
        say(table(found.results))
        for name in (bench.RESULTS, *files(found)):
            say(f"wrote {out / name}")


def spec_of(arguments: argparse.Namespace) -> Spec:
    """The arguments as a spec; ValueError for what it cannot be."""
    from kdpp.checkpoints.load import is_pipeline
    from kdpp.lab.models import load_model
    from kdpp.lab.spec import Combination, Spec, check_spec

    for name in (arguments.model, arguments.teacher):
        if name is not None and is_pipeline(name):
            raise ValueError(
                f"{name} draws prompts, and kdpp evaluate measures models of the lab; kdpp compare "
                "SPEC.toml measures yours, with prompts from a file and metrics that you name"
            )
    given = {
        name: read_value(Combination, name, text)
        for name in (*SAMPLING, *HELP)
        if (text := getattr(arguments, name)) is not None
    }
    given["options"] = dict(map(read_option, arguments.option))
    reference = {}
    if arguments.teacher is None:
        for name in given.keys() & HELP.keys():
            raise ValueError(f"--{name.replace('_', '-')} needs a teacher: --teacher MODEL")
    else:
        given.setdefault("teacher_scale", 0.1)
        scale = given.get("teacher_cfg_scale")
        if scale is None:
            scale = 2.0 if load_model(arguments.teacher).card.guidance is None else 1.0
        reference = {"cond_scale": scale}
    spec = fill(Spec, {
        "title": f"{arguments.model}",
        "data": arguments.data,
        "test": arguments.test,
        "statistics": arguments.statistics,
        "features": arguments.features,
        "images": read_value(Spec, "images", arguments.images),
        "seeds": read_value(Spec, "seeds", arguments.seeds),
        "teacher": arguments.teacher,
        "more_steps": False,
        "best_teacher": False,
        "students": {"model": arguments.model},
        "reference": reference,
        "grid": [{"student": "model", **{name: [value] for name, value in given.items()}}],
    })  # fmt: skip
    check_spec(spec)
    return spec


# The table ----------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    """The results as text: a line for each metric, a column for each cell and change."""
    from kdpp.lab import report

    cells, metrics = results["cells"], results["metrics"]
    titles = [f"{one['title']}, {report.sizes(results, one)}" for one in metrics]
    columns = [["", *titles, *COSTS]]
    for cell in cells:
        found = [cell["metrics"][metric["name"]] for metric in metrics]
        costs = [shown(cell["costs"]) for shown in COSTS.values()]
        columns.append([NAMES[cell["guide"]], *map(_shown, found), *costs])
        for kind, title in (("change", "change"), ("own_share", "against itself")):
            if found[0][kind] is not None:
                changes = [_changed(one[kind]) for one in found]
                columns.append([title, *changes, *[""] * len(COSTS)])
    own = results["data"]
    figures = [f"{own[m['name']]:.4g}" if m["name"] in own else "" for m in metrics]
    columns.append([f"real, N = {results['data_images']:,}", *figures, *[""] * len(COSTS)])
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in zip(*columns)
    ]
    settings, first = results["settings"], cells[0]
    against = settings["compared_with"]
    seeds = len(settings["seeds"])
    head = [
        f"{results['title']}: {first['sampler']}, {first['steps']} step{'s' * (first['steps'] > 1)}"
        f"; {seeds} seed{'s' * (seeds > 1)} of {settings['images']} images; compared with "
        f"{against['images']} {against['part']} images; features: {settings['features']}",
        "±: half the 95 % confidence interval over seeds; changes are paired; "
        '"none seen": the interval, read with the others of its line (Holm), holds 0',
        "",
    ]
    return "\n".join(head + lines)


COSTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "evaluations, student": lambda costs: f"{costs['student_evaluations']:g}",
    "evaluations, teacher": lambda costs: f"{costs['teacher_evaluations']:g}",
    "parameters × evaluations": lambda costs: f"{costs['compute']:.3g}",
    "ms an image": lambda costs: f"{costs['milliseconds']:.3g}",
}


def _shown(figure: Mapping[str, Any], sign: str = "") -> str:
    """``mean ± half the interval``, both to two digits of the latter."""
    if figure["high"] is None:
        return f"{figure['mean']:{sign}.4g}"
    half = figure["high"] - figure["mean"]
    digits = 3 if half <= 0.0 else min(max(1 - math.floor(math.log10(half)), 0), 9)
    return f"{figure['mean']:{sign}.{digits}f} ± {half:.{digits}f}"


def _changed(change: Mapping[str, Any]) -> str:
    return "none seen" if change["verdict"] == "none seen" else _shown(change, "+")
