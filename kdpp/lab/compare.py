"""``kdpp compare SPEC.toml --out DIR``: a grid of ways to sample, measured, as a page and tables.

The result of every cell and seed is a file of its own in ``DIR/cells``, named by a digest of all
that determines it, and there whole or not at all. A run computes those that are missing; what it
reports is a function of these files alone, timings included.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from datetime import datetime, timezone
from importlib.resources import as_file, files
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

import kdpp
from kdpp.lab import processes
from kdpp.lab.data import Data, load_data
from kdpp.lab.files import digest, locked, make_folder, remove_leftovers, write_atomically
from kdpp.lab.metrics import METRICS, Points, estimate, load_features, measure, paired, verdict
from kdpp.lab.models import Model, load_model
from kdpp.lab.sampling import Recipe, draw, fingerprint, image_seeds, levels_for
from kdpp.lab.spec import Cell, Guidance, Spec, cells_of, read_spec

__all__ = ["add_arguments", "compare", "run"]

REFERENCE_RUN = 10**9
"""The run that the teacher's own samples are; a cell is not measured against its own noise."""
PAUSE = 0.1
"""Seconds between two looks for what another process is to finish."""
COLUMNS, LINES, HEIGHT = 10, 5, 160
"""The samples shown of a cell: at most so many in a line, lines, and pixels from top to bottom."""
SMALL, GAP, GREY = 24, 2, 80
"""Smaller images are shown about so high; what lies between two of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Run a grid of students, samplers, steps and kinds of guidance over several seeds, and "
        "write report.html, results.csv and results.json. A run that was stopped goes on where it "
        "was; under `accelerate launch` the processes share the work."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("spec", nargs="?", type=Path, metavar="SPEC.toml", help="what to compare")
    what.add_argument("--example", action="store_true", help="run the spec that ships with kdpp")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and page")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(arguments: argparse.Namespace) -> None:
    """Run the command; errors as in `compare`."""
    example = files("kdpp.lab") / "examples" / "digits.toml"
    with as_file(example) if arguments.example else nullcontext(arguments.spec) as path:
        compare(path, arguments.out, arguments.device)


def compare(path: Path, out: Path, device: str = "cpu") -> None:
    """Run the spec in the file; write ``report.html``, ``results.csv`` and ``results.json``.

    Raises, before any work, ImportError where a package is missing, OSError where a file cannot be
    read or the folder be written, ValueError for what a spec, its checkpoints and its data cannot
    say or do together. Later it raises OSError where a file cannot be written, and ValueError where
    images are not finite. What is finished is kept then, as it is whenever the run is stopped.
    """
    from kdpp.lab.report import page, table

    spec = read_spec(path)
    text = path.read_text(encoding="utf-8")
    with _apart() as (rank, size), processes.single_thread():
        bench = Bench(spec, device)
        jobs = bench.jobs(out / "cells")
        for cell in {job.cell: None for job in jobs if _stored(job.path) is None}:
            bench.attempt(cell)
        make_folder(out / "cells")
        with locked(out) if rank == 0 else nullcontext():
            bench.measure_teacher(out / "cells", rank)
            _carry_out(bench, jobs, rank, size)
            if rank > 0:
                return
            for folder in (out, out / "cells"):
                remove_leftovers(folder)
            records = {job[:2]: json.loads(job.path.read_bytes()) for job in jobs}
            results = summarise(bench, records) | {"spec": text}
            pictures = [records[cell, spec.runs[0]]["picture"] for cell in bench.cells]
            for name, content in {
                "results.json": json.dumps(results, indent=1, ensure_ascii=False) + "\n",
                "results.csv": table(results),
                "report.html": page(results, pictures),
            }.items():
                write_atomically(out / name, content.encode())
                print(f"wrote {out / name}")


class Job(NamedTuple):
    """A cell and a seed, and where their result is kept."""

    cell: Cell
    seed: int
    path: Path


class Bench:
    """A spec with all that it names loaded and checked: it computes any cell.

    Raises as `compare` does before any work.
    """

    def __init__(self, spec: Spec, device: str) -> None:
        self.spec, self.device = spec, processes.device(device)
        students = spec.students.items()
        self.models = {name: load_model(place, self.device) for name, place in students}
        self.teacher = None if spec.teacher is None else load_model(spec.teacher, self.device)
        self.data = load_data(spec.data)
        for name, model in {**self.models, "the teacher": self.teacher}.items():
            if model is not None:
                _check_fit(name, model, self.data)
        self.cells, self.notes = cells_of(spec, self.models)
        self.recipes = {cell: self._recipe(cell) for cell in self.cells}
        self.features = load_features(spec.features, self.data.images, self.data.classes)
        self.points = Points(self.features(self.data.images))
        self.teacher_points: Points | None = None
        _picture(self.data.images, self.data)  # whether Pillow is there

    def _recipe(self, cell: Cell) -> Recipe:
        student = self.models[cell.student]
        guides = {"none": None, "teacher": self.teacher, "self": student}
        try:
            return Recipe(
                student, guides[cell.guide], cell.sampler, cell.levels, cell.cond_scale,
                cell.keywords,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ValueError(f"{cell}: {error}") from error

    @property
    def _teacher_recipe(self) -> Recipe | None:
        """How the teacher's own samples are made, where they are wanted."""
        wanted = self.spec.own_samples
        if wanted is None or self.teacher is None:
            return None
        levels = levels_for(self.teacher, wanted.steps)
        return Recipe(self.teacher, None, wanted.sampler, levels, wanted.cond_scale)

    def jobs(self, folder: Path) -> list[Job]:
        """All that is to be computed, by digest: no pattern of the grid makes uneven shares."""
        common = self._common()
        digests = {cell: [common, fingerprint(recipe)] for cell, recipe in self.recipes.items()}
        jobs = [
            Job(cell, seed, folder / f"{digest([*digests[cell], seed])}.json")
            for seed in self.spec.runs
            for cell in self.cells
        ]
        return sorted(jobs, key=lambda job: job.path.name)

    def _common(self) -> str:
        """A digest of what all cells are measured with."""
        own = self._teacher_recipe
        return digest([
            self.spec.images, self.data.images.numpy().tobytes(), self.data.classes,
            self.spec.features, _file_content(self.spec.features), own and fingerprint(own),
        ])  # fmt: skip

    def attempt(self, cell: Cell) -> None:
        """Draw one image, to see that it can be done; ValueError says of which cell it cannot."""
        try:
            draw(self.recipes[cell], [0])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{cell}: {error}") from error

    def measure_teacher(self, folder: Path, rank: int) -> None:
        """Have the features of the teacher's own samples: from the folder, or computed once."""
        recipe = self._teacher_recipe
        if recipe is None:
            return
        path = folder / f"teacher-{self._common()}.npy"
        if rank == 0 and not path.exists():
            seeds = image_seeds(REFERENCE_RUN, self.spec.images)
            images = draw(recipe, seeds, progress=True)
            content = io.BytesIO()
            np.save(content, self.features(images.x))
            write_atomically(path, content.getvalue())
        while not path.exists():  # the main process is at it
            time.sleep(PAUSE)
        self.teacher_points = Points(np.load(path, allow_pickle=False))

    def result(self, cell: Cell, seed: int) -> dict[str, Any]:
        """The result of one cell and seed, as it is stored."""
        seeds = image_seeds(seed, self.spec.images)
        images = draw(self.recipes[cell], seeds)
        try:
            scores = measure(
                images.x, images.labels, self.features, self.points, self.teacher_points
            )
        except ValueError as error:
            raise ValueError(f"{cell}, seed {seed}: {error}; what is finished is kept") from error
        return {
            "scores": scores,
            "evaluations": images.evaluations,
            "compute": images.compute,
            "picture": _picture(images.x, self.data),
            "timing": {
                "seconds": images.seconds,
                "memory": images.memory,
                "finished": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            },
        }


def _carry_out(bench: Bench, jobs: Sequence[Job], rank: int, size: int) -> None:
    """Compute what is missing of this process's share; the main one then waits for the others.

    Should another one die, its launcher ends this one. Files are waited for, not a barrier of
    torch's, which gives up after half an hour.
    """
    jobs = list({job.path: job for job in jobs}.values())  # one checkpoint may have two names
    missing = [job for job in jobs if _stored(job.path) is None]
    mine = [job for job in jobs[rank::size] if job in missing]
    there = len(jobs) - len(missing)
    with tqdm(total=len(jobs), initial=there, desc="cells", unit="cell", disable=rank > 0) as bar:

        def all_there() -> bool:
            missing[:] = [job for job in missing if _stored(job.path) is None]
            bar.update(len(jobs) - len(missing) - bar.n)
            return not missing

        for job in mine:
            bar.set_postfix_str(f"{job.cell.student}, {job.cell.sampler}, seed {job.seed}")
            result = bench.result(job.cell, job.seed)
            write_atomically(job.path, json.dumps(result, indent=1).encode())
            all_there()
        while rank == 0 and not all_there():
            time.sleep(PAUSE)


def _stored(path: Path) -> dict[str, Any] | None:
    """The result in the file; None where there is none that can be read."""
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return result


@contextmanager
def _apart() -> Iterator[tuple[int, int]]:
    """(this process's number, how many there are), each of which draws its cells alone.

    The processes share cells, not batches, so for the time being `draw` is not told of the others.
    """
    names = ("RANK", "WORLD_SIZE")
    told = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield int(told.get("RANK", "0")), int(told.get("WORLD_SIZE", "1"))
    finally:
        os.environ.update(told)


def _check_fit(name: str, model: Model, data: Data) -> None:
    """ValueError unless the model makes such images as the data are."""
    made, wanted = (model.shape, model.classes), (data.shape, data.classes)
    if made != wanted:
        raise ValueError(
            f"{name} makes images of shape {list(made[0])} and {made[1]} classes; the data have "
            f"{list(wanted[0])} and {wanted[1]}"
        )


def _file_content(features: str) -> str | None:
    """A digest of the files that features are read from."""
    place = Path(features.partition(":")[2])
    if place == Path():
        return None
    paths = sorted(place.iterdir()) if place.is_dir() else [place]
    return digest([path.read_bytes() for path in paths if path.is_file()])


# What is reported ---------------------------------------------------------------------------------


def summarise(bench: Bench, stored: Mapping[tuple[Cell, int], Any]) -> dict[str, Any]:
    """All results, as JSON has them: settings, models, versions, and every cell."""
    spec = bench.spec
    records = {cell: [stored[cell, seed] for seed in spec.runs] for cell in bench.cells}
    numbers = {cell: number for number, cell in enumerate(bench.cells, 1)}
    names = [name for name in METRICS if name in records[bench.cells[0]][0]["scores"]]

    def values(cell: Cell, name: str) -> list[float]:
        return [record["scores"][name] for record in records[cell]]

    def change(cell: Cell | None, name: str) -> dict[str, Any] | None:
        if cell is None or cell.guidance is None or cell not in records:
            return None
        found = paired(values(cell, name), values(cell.plain, name))
        return asdict(found) | {"verdict": verdict(found)}

    def described(cell: Cell) -> dict[str, Any]:
        return {
            "cell": numbers[cell],
            "plain": numbers[cell.plain] if cell.guidance else None,
            "self": numbers.get(_control(cell)),  # type: ignore[arg-type]
            **_settings(cell),
            "costs": _costs(records[cell], spec.images),
            "metrics": {
                name: {
                    **asdict(estimate(values(cell, name))),
                    "values": values(cell, name),
                    "change": change(cell, name),
                    "self_change": change(_control(cell), name),
                }
                for name in names
            },
        }

    return {
        "title": spec.title,
        "settings": {
            "data": spec.data,
            "features": spec.features,
            "images": spec.images,
            "seeds": list(spec.runs),
            "teacher": spec.teacher,
            "reference": spec.own_samples and asdict(spec.own_samples),
            "self_control": spec.self_control,
            "device": bench.device.type,
        },
        "models": {
            name: {
                "checkpoint": place,
                "method": bench.models[name].card.method,
                "parameters": bench.models[name].parameters,
                "sampler": bench.models[name].sampler,
                "levels": bench.models[name].levels,
            }
            for name, place in spec.students.items()
        },
        "versions": {
            "kdpp": kdpp.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "Python": platform.python_version(),
        },
        "finished": max(record["timing"]["finished"] for record in stored.values()),
        "notes": bench.notes,
        "metrics": [{"name": name, **METRICS[name]._asdict()} for name in names],
        "cells": [described(cell) for cell in bench.cells],
    }


def _control(cell: Cell) -> Cell | None:
    """The self control of a cell that the teacher guides."""
    return cell.itself if cell.guide == "teacher" else None


def _settings(cell: Cell) -> dict[str, Any]:
    """Every setting of a cell; None where it has no guide."""
    return {
        "student": cell.student,
        "sampler": cell.sampler,
        "steps": cell.steps,
        "levels": list(cell.levels),
        "cond_scale": cell.cond_scale,
        "guide": cell.guide,
        **{field.name: cell.keywords.get(field.name) for field in fields(Guidance)},
    }


def _costs(records: Sequence[Mapping[str, Any]], images: int) -> dict[str, float]:
    """What one image costs; the time is the mean over the seeds, memory the most of any."""
    student, teacher = records[0]["evaluations"]
    return {
        "student_evaluations": student,
        "teacher_evaluations": teacher,
        "evaluations": student + teacher,
        "compute": records[0]["compute"],
        "milliseconds": 1e3 * fmean(r["timing"]["seconds"] for r in records) / images,
        "memory": max(r["timing"]["memory"] for r in records),
    }


def _picture(x: Tensor, data: Data) -> str | None:
    """The first images side by side, as a PNG data URI; None for data that are no pictures."""
    if not data.bounded or len(data.shape) != 3 or data.shape[0] not in (1, 3):
        return None
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('pictures need Pillow: pip install "kdpp[lab]"') from error
    channels, height, _ = data.shape
    columns = min(data.classes if data.classes > 1 else COLUMNS, COLUMNS, len(x))
    lines = min(LINES, max(HEIGHT // height, 1), len(x) // columns)
    tiles = x[: lines * columns].clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    size = max(SMALL // height, 1)
    tiles = tiles.repeat_interleave(size, 2).repeat_interleave(size, 3)
    tiles = pad(tiles, (0, GAP, 0, GAP), value=GREY)
    tiles = tiles.view(lines, columns, *tiles.shape[1:])
    whole = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:-GAP, :-GAP].numpy()
    file = io.BytesIO()
    Image.fromarray(whole[..., 0] if channels == 1 else whole).save(file, "png")
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()
