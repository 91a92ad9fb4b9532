"""``kdpp evaluate MODEL --out DIR``: how good a model's images are, alone and with a teacher.

What is finished stays in ``DIR/parts``: a file for every way to sample and seed, there whole or not
at all, and the batches of the one that a run was stopped in. The next run takes them from there.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, distributed
from tqdm.auto import tqdm

import kdpp
from kdpp.checks import check_count
from kdpp.lab import processes
from kdpp.lab.data import Data, load_data
from kdpp.lab.files import digest, locked, make_folder, remove_leftovers, write_atomically
from kdpp.lab.metrics import (
    METRICS,
    NEIGHBOURS,
    Features,
    Points,
    describe,
    estimate,
    load_features,
    measure,
    paired,
    verdict,
)
from kdpp.lab.models import Model, load_model
from kdpp.lab.sampling import Images, Recipe, draw, fingerprint, image_seeds, levels_for

__all__ = ["add_arguments", "run"]

ALONE, TAUGHT, ITSELF = "alone", "with teacher", "with itself"
"""The ways to sample; the last one has the student in the teacher's place."""
OWN_STEPS = 50
"""Of the teacher's own samples."""
OWN_RUN = 10**9
"""The run that they are; nothing is measured against its own noise."""
LINES, COLUMNS = 5, 10
"""Of the picture: images of each class, and of how many classes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Sample a model over several seeds and measure the images: alone, with a teacher's help, "
        "and with itself in the teacher's place. A run that was stopped goes on where it was; "
        "under `accelerate launch` the processes share the work."
    )
    parser.add_argument("model", help="a checkpoint, a run's folder, or digits:student")
    parser.add_argument("--teacher", help="the model that helps, and is compared with")
    add = parser.add_argument_group("sampling").add_argument
    add("--sampler", help="without sample_ and _tg (default: the one that the model is made for)")
    add("--steps", type=int, help="how many (default: what it is made for)")
    add("--cfg", type=float, default=1.0, help="the model's CFG scale (default: 1, none)")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of the sampler")
    add = parser.add_argument_group("the teacher's help").add_argument
    add("--scale", type=float, help="λ, its share (default: 0.1)")
    add(
        "--guided-steps", type=_steps, metavar="K", help="the first k, or a list: [-1] (default: 1)"
    )
    add("--teacher-cfg", type=float, help="its CFG scale (default: 2; 1 if guidance is built in)")
    add("--renoise", type=_level, help="next, current, random or a level (default: next)")
    add("--renoise-eta", type=float, help="ρ, the share of fresh noise (default: 1)")
    add = parser.add_argument_group("measuring").add_argument
    add("--data", help="what to compare with (default: what the model was trained on)")
    add("--features", help="digits, pixels, inception:FILE or clip:FOLDER (default: digits for "
        "the digits, else pixels)")  # fmt: skip
    add("--images", type=int, default=5000, help="of each seed (default: 5000)")
    add("--seeds", type=int, default=5, help="how many runs (default: 5)")
    add("--seed", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(arguments: argparse.Namespace) -> None:
    """Measure; write ``results.json``, ``results.csv`` and, of pictures, ``grid.png``.

    Raises, before any work, ImportError where a package is missing, OSError where a file cannot be
    read or the folder not be written, ValueError for what models, settings and data cannot say or
    do together. Later it raises OSError where a file cannot be written, and ValueError where images
    are not finite. What is finished is kept then.
    """
    task = Task.of(arguments)
    out = arguments.out
    with processes.joined(task.device), processes.single_thread():
        main = processes.rank() == 0
        make_folder(out / "parts")
        with locked(out) if main else nullcontext():
            for recipe in task.recipes:
                draw(recipe, [0])  # whatever a sampler refuses is said now
            parts = _measure_all(task, out / "parts")
            if not main:
                return
            results = summarise(task, parts)
            print(table(results))
            written = {
                "results.json": (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode(),
                "results.csv": as_csv(results).encode(),
            }
            if task.drawable:
                shown = {way: parts[way, task.runs[0]].tensors["images"] for way in task.ways}
                written["grid.png"] = picture(shown, task.data.classes)
            for place in (out, out / "parts"):
                remove_leftovers(place)
            for name, content in written.items():
                write_atomically(out / name, content)
                print(f"wrote {out / name}")


@dataclass(frozen=True)
class Task:
    """The arguments, with all that they name loaded and checked."""

    checkpoints: dict[str, str | None]
    ways: dict[str, Recipe]
    own: Recipe | None
    """How the teacher's own samples are made."""
    data: Data
    features: Features
    runs: range
    images: int
    device: torch.device

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Task:
        device = processes.device(arguments.device)
        model = load_model(arguments.model, device)
        teacher = None if arguments.teacher is None else load_model(arguments.teacher, device)
        ways, own = _ways(arguments, model, teacher)
        data = load_data(arguments.data or model.card.data.source)
        if (model.shape, model.classes) != (data.shape, data.classes):
            raise ValueError(
                f"the model makes images of shape {list(model.shape)} and {model.classes} classes; "
                f"the data have {list(data.shape)} and {data.classes}"
            )
        name = arguments.features or ("digits" if data.source == "digits" else "pixels")
        features = load_features(name, data.images, data.classes)
        check_count("--images", arguments.images, NEIGHBOURS + 1)
        first = check_count("--seed", arguments.seed, 0)
        runs = range(first, first + check_count("--seeds", arguments.seeds, 1))
        image_seeds(runs[-1], arguments.images)
        checkpoints = {"student": arguments.model, "teacher": arguments.teacher}
        task = cls(checkpoints, ways, own, data, features, runs, arguments.images, device)
        if task.drawable:
            _figure()
        return task

    @property
    def recipes(self) -> list[Recipe]:
        """Of all images that are to be made."""
        return [*self.ways.values(), *([self.own] if self.own else [])]

    @property
    def drawable(self) -> bool:
        """Whether the data are pictures."""
        shape = self.data.shape
        return self.data.bounded and len(shape) == 3 and shape[0] in (1, 3)

    @property
    def models(self) -> dict[str, Model]:
        """The student, and the teacher if there is one."""
        found = {"student": self.ways[ALONE].student}
        return found if self.own is None else {**found, "teacher": self.own.student}


def _ways(
    arguments: argparse.Namespace, model: Model, teacher: Model | None
) -> tuple[dict[str, Recipe], Recipe | None]:
    """The ways to sample, by name, and how the teacher's own samples are made."""
    levels = levels_for(model, arguments.steps)
    options = dict(map(_option, arguments.option))
    sampler = arguments.sampler or model.sampler
    alone = Recipe(model, None, sampler, levels, arguments.cfg, options=options)
    flags = ("scale", "guided_steps", "teacher_cfg", "renoise", "renoise_eta")
    if teacher is None:
        for flag in flags:
            if getattr(arguments, flag) is not None:
                raise ValueError(f"--{flag.replace('_', '-')} needs a teacher: --teacher MODEL")
        return {ALONE: alone}, None
    scale, steps, cfg, renoise, eta = (getattr(arguments, flag) for flag in flags)
    if cfg is None:
        cfg = 2.0 if teacher.card.guidance is None else 1.0
    own = Recipe(teacher, None, "euler", levels_for(teacher, OWN_STEPS), cfg)
    guidance = {
        "teacher_scale": 0.1 if scale is None else scale,
        "teacher_steps": 1 if steps is None else steps,
        "teacher_cfg_scale": cfg,
        "renoise": "next" if renoise is None else renoise,
        "renoise_eta": 1.0 if eta is None else eta,
    }
    taught = replace(alone, teacher=teacher, guidance=guidance)
    control = guidance | {"teacher_cfg_scale": arguments.cfg}
    itself = replace(alone, teacher=model, guidance=control)
    return {ALONE: alone, TAUGHT: taught, ITSELF: itself}, own


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option is {text!r}; it must be NAME=VALUE, such as eta=0.5")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _steps(text: str) -> Any:
    """A number or a list of numbers; the wrapper says what else is wrong with them."""
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number and no list, such as [-1]"
        ) from None


def _level(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


# What is measured ---------------------------------------------------------------------------------


class Part(NamedTuple):
    """What is kept of one way and seed: figures as JSON has them, and tensors."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]


def _measure_all(task: Task, folder: Path) -> dict[tuple[str, int], Part]:
    """Every way's part of every seed; empty on other processes than the main one."""
    data = Points(task.features(task.data.images))
    common: list[object] = [task.features.name, data.rows.tobytes()]
    parts: dict[tuple[str, int], Part] = {}
    total = len(task.runs) * len(task.ways) + (task.own is not None)
    with tqdm(total=total, desc="runs", disable=processes.rank() > 0) as bar:

        def part(name: str, recipe: Recipe, run: int, judge: Callable[[Images], Part]) -> None:
            bar.set_postfix_str(name)
            try:
                found = _part(task, folder, recipe, run, common, judge)
            except ValueError as error:
                raise ValueError(
                    f"{name}, seed {run}: {error}; what is finished is kept"
                ) from error
            bar.update()
            if found is not None:
                parts[name, run] = found

        teacher = None
        if task.own is not None:
            part("the teacher's own", task.own, OWN_RUN, lambda images: _own(task, images))
            if parts:
                own = parts.pop(("the teacher's own", OWN_RUN))
                teacher = Points(own.tensors["features"].numpy())
                common.append(teacher.rows.tobytes())
        for run in task.runs:
            for name, recipe in task.ways.items():
                part(name, recipe, run, lambda images: _judged(task, images, data, teacher))
    return parts


def _part(
    task: Task,
    folder: Path,
    recipe: Recipe,
    run: int,
    common: Sequence[object],
    judge: Callable[[Images], Part],
) -> Part | None:
    """What `judge` makes of the run's images: from its file, or made and kept there.

    All processes draw; the main one alone judges, writes and returns it. ``common`` is what the
    judgement depends on beside the images.
    """
    images = [fingerprint(recipe), run, task.images]
    path = folder / f"{digest([*images, *common])}.safetensors"
    batches = folder / digest(images)
    main = processes.rank() == 0
    part = _read(path) if main else None
    if not _mains_word(part is not None, task.device):
        drawn = draw(recipe, image_seeds(run, task.images), folder=batches, progress=True)
        if main:
            part = judge(drawn)
            write_atomically(path, to_bytes(part.tensors, {"about": json.dumps(part.about)}))
    if main:
        shutil.rmtree(batches, ignore_errors=True)
    return part


def _own(task: Task, images: Images) -> Part:
    return Part({}, {"features": torch.from_numpy(task.features(images.x))})


def _judged(task: Task, images: Images, data: Points, teacher: Points | None) -> Part:
    about = {
        "scores": measure(images.x, images.labels, task.features, data, teacher),
        "evaluations": images.evaluations,
        "compute": images.compute,
        "seconds": images.seconds,
        "memory": images.memory,
    }
    return Part(about, {"images": images.x[: LINES * COLUMNS].clone()})


def _read(path: Path) -> Part | None:
    """The part in the file; None where there is none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            return Part(about, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _mains_word(yes: bool, device: torch.device) -> bool:
    """What the main process says; the others may not see its files."""
    if processes.size() == 1:
        return yes
    word = torch.tensor([yes], dtype=torch.int64, device=device)
    distributed.broadcast(word, 0)
    return bool(word)


# What is reported ---------------------------------------------------------------------------------


def summarise(task: Task, parts: Mapping[tuple[str, int], Part]) -> dict[str, Any]:
    """All results, as JSON has them: settings, models, versions, and every way to sample."""
    abouts = {name: [parts[name, run].about for run in task.runs] for name in task.ways}
    names = list(abouts[ALONE][0]["scores"])

    def values(way: str, name: str) -> list[float]:
        return [about["scores"][name] for about in abouts[way]]

    def change(way: str, base: str, name: str) -> dict[str, Any] | None:
        if way == base or base not in task.ways or (base == ITSELF and way != TAUGHT):
            return None
        found = paired(values(way, name), values(base, name))
        return asdict(found) | {"verdict": verdict(found)}

    def metric(way: str, name: str) -> dict[str, Any]:
        return {
            **asdict(estimate(values(way, name))),
            "values": values(way, name),
            "change": change(way, ALONE, name),
            "own_share": change(way, ITSELF, name),
        }

    def described(way: str, recipe: Recipe) -> dict[str, Any]:
        first = abouts[way][0]
        return {
            "way": way,
            "sampler": recipe.sampler,
            "steps": recipe.steps,
            "levels": recipe.levels,
            "cond_scale": recipe.cond_scale,
            "options": dict(recipe.options),
            "guidance": dict(recipe.guidance),
            "evaluations": dict(zip(("student", "teacher"), first["evaluations"])),
            "compute": first["compute"],
            "timing": {
                "milliseconds": 1e3 * fmean(a["seconds"] for a in abouts[way]) / task.images,
                "memory": max(about["memory"] for about in abouts[way]),
            },
            "metrics": {name: metric(way, name) for name in names},
        }

    return {
        "settings": {
            "data": task.data.source,
            "features": task.features.name,
            "images": task.images,
            "seeds": list(task.runs),
            "device": task.device.type,
        },
        "models": {
            role: {
                "checkpoint": task.checkpoints[role],
                "method": model.card.method,
                "parameters": model.parameters,
            }
            for role, model in task.models.items()
        },
        "own_samples": None if task.own is None else {
            "sampler": task.own.sampler, "steps": task.own.steps, "cond_scale": task.own.cond_scale,
        },
        "versions": {
            "kdpp": kdpp.__version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
        },
        "metrics": [{"name": name, **METRICS[name]._asdict()} for name in names],
        "data": describe(Points(task.features(task.data.images)), task.data.labels, task.features),
        "ways": [described(way, recipe) for way, recipe in task.ways.items()],
    }  # fmt: skip


def table(results: Mapping[str, Any]) -> str:
    """The results as text: a line for each metric, a column for each way and change."""
    ways = results["ways"]
    columns = [[""] + [metric["title"] for metric in results["metrics"]] + list(COSTS)]
    for way in ways:
        metrics = way["metrics"].values()
        columns.append([way["way"], *map(_shown, metrics), *(cost(way) for cost in COSTS.values())])
        for kind, title in (("change", "change"), ("own_share", "against itself")):
            found = [metric[kind] for metric in metrics]
            if found[0] is not None:
                columns.append([title, *map(_changed, found), *[""] * len(COSTS)])
    own = results["data"]
    figures = [f"{own[m['name']]:.4g}" if m["name"] in own else "" for m in results["metrics"]]
    columns.append(["the data", *figures, *[""] * len(COSTS)])
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in zip(*columns)
    ]
    settings, first = results["settings"], ways[0]
    head = [
        f"{results['models']['student']['checkpoint']}: {first['sampler']}, {first['steps']} "
        f"steps; {len(settings['seeds'])} seeds of {settings['images']} images; features: "
        f"{settings['features']}",
        "±: half the 95 % confidence interval over seeds; changes are paired; "
        '"none seen": the interval holds 0',
        "",
    ]
    return "\n".join(head + lines)


COSTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "evaluations, student": lambda way: f"{way['evaluations']['student']:g}",
    "evaluations, teacher": lambda way: f"{way['evaluations']['teacher']:g}",
    "parameters × evaluations": lambda way: f"{way['compute']:.3g}",
    "ms an image": lambda way: f"{way['timing']['milliseconds']:.3g}",
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


def as_csv(results: Mapping[str, Any]) -> str:
    """The results as a table, a row for each way: settings, costs, metrics, spreads, changes."""
    rows = []
    for way in results["ways"]:
        row = {name: value for name, value in way.items() if name != "metrics"}
        rows.append(dict(_flat({**row, **way["metrics"]})))
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a table of tables, their names joined by dots; lists as JSON."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, json.dumps(value) if isinstance(value, list | tuple) else value


def picture(shown: Mapping[str, Tensor], classes: int) -> bytes:
    """A PNG of the ways' first images side by side, from the same noise, a class to a column."""
    columns = classes if 1 < classes <= COLUMNS else COLUMNS
    figure = _figure()(figsize=(3.7 * len(shown), 2.1), layout="constrained")
    for axes, (name, images) in zip(
        figure.subplots(1, len(shown), squeeze=False).flat, shown.items()
    ):
        lines = min(LINES, -(-len(images) // columns))
        axes.imshow(_mosaic(images, lines, columns), cmap="gray", vmin=0, vmax=1)
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def _mosaic(images: Tensor, lines: int, columns: int) -> Any:
    """Images (n, 1 or 3, h, w) in [-1, 1] as one array in [0, 1], a dark pixel between them."""
    pixels = images[: lines * columns].clamp(-1, 1).add(1).div(2)
    tiles = torch.zeros(lines * columns, images.shape[1], images.shape[2] + 1, images.shape[3] + 1)
    tiles[: len(pixels), :, :-1, :-1] = pixels
    tiles = tiles.view(lines, columns, *tiles.shape[1:]).permute(0, 3, 1, 4, 2)
    return tiles.flatten(2, 3).flatten(0, 1).squeeze(-1).numpy()


def _figure() -> Any:
    """matplotlib's Figure; ImportError says what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'kdpp[lab]'") from error
    return Figure
