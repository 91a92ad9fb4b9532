"""The engine of `kdpp evaluate` and `kdpp compare`: a spec's cells are sampled and measured.

The result of every cell and seed is a file of its own in ``DIR/cells``. Its name is a digest of all
that determines it, and it is there whole or not at all. A run computes what is missing; what is
reported is a function of these files alone, timings included.

Several processes share the work through the same files. Every process goes through the same list
of jobs and samples its own batches of each; one of them, by turns, waits for the others' batches
and measures. A process that is killed loses half a second of finished work.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from tqdm.auto import tqdm

import kdpp
from kdpp.checkpoints.flags import read_prompts
from kdpp.checkpoints.models import Shelf, open_models, student_request
from kdpp.checkpoints.requests import Request
from kdpp.lab import processes
from kdpp.lab.files import digest, locked, make_folder, remove_leftovers, write_atomically
from kdpp.lab.intervals import estimate, paired, verdict
from kdpp.lab.judges import DataJudge, Judge, PictureJudge
from kdpp.lab.metrics import Points
from kdpp.lab.models import GenerativeModel, Model
from kdpp.lab.sampling import (
    Batches,
    Images,
    Recipe,
    attempt,
    fingerprint,
    image_seeds,
)
from kdpp.lab.settings import fill, to_toml
from kdpp.lab.spec import REFERENCE_SEED, Cell, Guidance, Spec, cells_of

__all__ = ["Bench", "Report", "run"]

RESULTS = "results.json"
PAUSE = 0.1
"""Seconds between two looks for what another process is to finish."""


class Report(NamedTuple):
    """What was found: the results as JSON has them, and pictures as PNG files in base64.

    ``pictures`` holds one of real images, then one of every cell's; nothing for data that are not
    pictures.
    """

    results: dict[str, Any]
    pictures: list[str]


def run(
    spec: Spec,
    out: Path,
    device: str,
    files: Callable[[Report], Mapping[str, bytes]],
    text: str | None = None,
) -> Report | None:
    """Measure the spec's cells; write ``results.json`` and the other ``files`` of the report.

    Args:
        text: the spec as its author wrote it.

    Returns the report, or None on other processes than the main one.

    Raises, before any work, ImportError where a package is missing, OSError where a file cannot be
    read or the folder be written, ValueError for what the spec, its checkpoints and its data cannot
    say or do together, and for a folder that holds results of other students. Later it raises
    OSError where a file cannot be written, and ValueError where images are not finite. What is
    finished is kept then, as it is whenever the run is stopped.
    """
    rank, size = processes.share()
    with processes.single_thread():
        bench = Bench(spec, device, out / "cells")
        _check_folder(out, bench)
        jobs = bench.jobs()
        untried = {job.cell: job for job in jobs if not job.done}
        for job in untried.values():
            bench.judge.attempt(job.recipe.student, attempt(job.recipe, job.cell or job))
        make_folder(out / "cells")
        with locked(out) if rank == 0 else nullcontext():
            for remark in bench.judge.remarks if rank == 0 else ():
                print(f"kdpp: {remark}", file=sys.stderr)
            bench.carry_out(jobs, rank, size)
            if rank > 0:
                return None
            for folder in (out, out / "cells"):
                remove_leftovers(folder)
            report = bench.report(text or to_toml(asdict(spec)))
            written = json.dumps(report.results, indent=1, ensure_ascii=False) + "\n"
            for name, content in {RESULTS: written.encode(), **files(report)}.items():
                write_atomically(out / name, content)
    return report


def _check_folder(out: Path, bench: Bench) -> None:
    """ValueError where the folder holds results of other students alone."""
    try:
        models = json.loads((out / RESULTS).read_bytes())["models"].values()
        checkpoints = {str(model["checkpoint"]) for model in models}
        theirs = checkpoints | {str(model.get("weights")) for model in models}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # nothing, or nothing that was written by this
    ours = {*map(str, bench.spec.students.values()), *bench.weights.values()}
    if theirs and not ours & theirs:
        raise ValueError(
            f"{out} holds results of {', '.join(sorted(checkpoints))}; name another folder"
        )


# What is kept -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What is kept of a cell and a seed."""

    scores: dict[str, Any]
    evaluations: tuple[float, ...]
    compute: float
    picture: str | None
    seconds: float
    memory: int
    finished: str

    @classmethod
    def read(cls, path: Path) -> Result | None:
        """The result in the file; None where there is none that can be read."""
        with suppress(OSError, ValueError, TypeError, AttributeError):
            return fill(cls, json.loads(path.read_bytes()))
        return None


@dataclass(frozen=True)
class Job:
    """A cell and a seed; without a cell, the teacher's own samples."""

    cell: Cell | None
    recipe: Recipe
    seed: int
    path: Path
    """The file of what is found: a `Result`, or the features of the teacher's own samples."""

    def __str__(self) -> str:
        return f"{self.cell}, seed {self.seed}" if self.cell else "the teacher's own samples"

    @property
    def features(self) -> Points | None:
        """Of the teacher's own samples; None where there are none that can be read."""
        with suppress(OSError, SafetensorError, KeyError, ValueError):
            return Points(load_file(self.path)["features"].numpy())
        return None

    @property
    def student(self) -> str:
        """Its name; nothing without a cell."""
        return self.cell.student if self.cell else ""

    @property
    def done(self) -> bool:
        return (Result.read(self.path) if self.cell else self.features) is not None


# What is computed ---------------------------------------------------------------------------------


class Bench:
    """A spec with all that it names loaded and checked; raises as `run` does before any work.

    Its results are kept in ``folder``.
    """

    def __init__(self, spec: Spec, device: str, folder: Path) -> None:
        self.spec, self.device, self.folder = spec, processes.device(device), folder
        prompts = read_prompts(Path(spec.prompts)) if spec.prompts else ()
        self.shelf = Shelf(self.device, prompts)
        self.models: dict[str, GenerativeModel] = {}
        self.helpers: dict[str, GenerativeModel | None] = {}
        self.teacher: GenerativeModel | None = None
        self._open()
        first = next(iter(self.models.values()))
        self.weights = {name: model.digest() for name, model in self.models.items()}
        self.judge: Judge = (
            DataJudge(spec, first)
            if isinstance(first, Model)
            else PictureJudge(spec, prompts, folder)
        )
        for name, model in {**self.models, "the teacher": self.teacher}.items():
            if model is not None:
                self.judge.check(name, model)
        self.cells, self.notes = cells_of(spec, self.models)
        by_student = sorted(self.cells, key=lambda cell: list(self.models).index(cell.student))
        self.recipes = {cell: self._recipe(cell) for cell in by_student}
        self.judge.load()

    def _open(self) -> None:
        """The students and their teachers: of the lab at once, of pipelines when they are used."""
        spec = self.spec
        if spec.prompts:
            for name, about in spec.students.items():
                request = student_request({**spec.pipelines, **_table(about)}, spec.teacher)
                self.models[name], self.helpers[name] = self.shelf.models(request)
            if spec.teacher is not None and spec.own_samples is not None:
                steps = {"model": spec.teacher, "steps": spec.own_samples.steps}
                alone = student_request({**spec.pipelines, **steps}, None)
                self.teacher, _ = self.shelf.models(alone)
            return
        for name, place in spec.students.items():
            self.models[name], _ = open_models(Request(student=place), self.device)
        if spec.teacher is not None:
            self.teacher, _ = open_models(Request(student=spec.teacher), self.device)
        self.helpers = dict.fromkeys(self.models, self.teacher)

    def _recipe(self, cell: Cell) -> Recipe:
        student = self.models[cell.student]
        guides = {"none": None, "teacher": self.helpers[cell.student], "self": student}
        if cell.guide == "teacher" and guides["teacher"] is None:
            raise ValueError(f"{cell}: no teacher is named; name one")
        try:
            return Recipe(
                student, guides[cell.guide], cell.sampler, cell.levels, cell.cond_scale,
                cell.keywords, dict(cell.options),
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ValueError(f"{cell}: {error}") from error

    @cached_property
    def own(self) -> Job | None:
        """The teacher's own samples, where they are wanted."""
        wanted = self.spec.own_samples
        if wanted is None or self.teacher is None:
            return None
        levels = self.teacher.levels_for(wanted.steps)
        recipe = Recipe(self.teacher, None, wanted.sampler, levels, wanted.cond_scale)
        name = digest([self._given, fingerprint(recipe)])
        return Job(None, recipe, REFERENCE_SEED, self.folder / f"teacher-{name}.safetensors")

    @cached_property
    def _given(self) -> object:
        """All that figures depend on but the samples."""
        return self.judge.given()

    @cached_property
    def _names(self) -> dict[Cell, str]:
        """A digest of all that determines a cell's results but the seed."""
        own = self.own and self.own.path.name
        return {
            cell: digest([self._given, own, fingerprint(recipe)])
            for cell, recipe in self.recipes.items()
        }

    def path(self, cell: Cell, seed: int) -> Path:
        return self.folder / f"{digest([self._names[cell], seed])}.json"

    def jobs(self) -> list[Job]:
        """All that is to be computed, each once: one checkpoint may have two names.

        The teacher's own samples come first, because every result needs them. The others are in the
        order of their students, and then of their digests, so that no pattern of the grid makes
        uneven shares.
        """
        jobs = {
            path: Job(cell, recipe, seed, path)
            for cell, recipe in self.recipes.items()
            for seed in self.spec.seed_list
            for path in [self.path(cell, seed)]
        }
        names = list(self.models)
        others = sorted(jobs.values(), key=lambda job: (names.index(job.student), job.path))
        return [*([self.own] if self.own else []), *others]

    def carry_out(self, jobs: Sequence[Job], rank: int = 0, size: int = 1) -> None:
        """Compute what is missing of this process's share; the main one then waits for the rest.

        Should another one die, its launcher ends this one. Files are waited for, not a barrier of
        torch's, which gives up after half an hour.
        """
        with tqdm(total=len(jobs), desc="cells", unit="cell", disable=rank > 0) as bar:
            for number, job in enumerate(jobs):
                if not job.done:
                    bar.set_postfix_str(job.student or str(job))
                    self._work(job, number, rank, size)
                bar.update()
        while rank == 0 and not all(job.done for job in jobs):
            time.sleep(PAUSE)
        for job in jobs:
            if job.done:
                shutil.rmtree(_batches(job), ignore_errors=True)

    def _work(self, job: Job, number: int, rank: int, size: int) -> None:
        """Sample this process's batches of a job; measure all of them if it is its turn."""
        seeds = image_seeds(job.seed, self.spec.images)
        labels = self.judge.labels(job.seed, self.spec.images)
        batches = Batches(job.recipe, seeds, labels, self.judge.batch, _batches(job))
        count = len(batches)
        mine = [i for i in range(count) if (number * count + i) % size == rank]
        batches.make(mine, progress=rank == 0)
        if number % size == rank:
            while not batches.complete():
                time.sleep(PAUSE)
            self._keep(job, batches.images())
            shutil.rmtree(_batches(job), ignore_errors=True)
        elif not job.done:
            batches.flush()

    def _keep(self, job: Job, images: Images) -> None:
        """Measure the images, and write what is found."""
        try:
            if job.cell is None:
                features = self.judge.features_of(job.recipe.student, images)
                content = to_bytes({"features": torch.from_numpy(features)})
            else:
                found = self._result(job.recipe.student, images)
                content = json.dumps(asdict(found), indent=1).encode()
        except ValueError as error:
            raise ValueError(f"{job}: {error}; what is finished is kept") from error
        write_atomically(job.path, content)

    def _result(self, student: GenerativeModel, images: Images) -> Result:
        return Result(
            scores=self.judge.scores(student, images, self._reference),
            evaluations=images.evaluations,
            compute=images.compute,
            picture=self.judge.picture(student, images),
            seconds=images.seconds,
            memory=images.memory,
            finished=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        )

    @cached_property
    def _reference(self) -> Points | None:
        """The features of the teacher's own samples, once they are there."""
        if self.own is None:
            return None
        while (points := self.own.features) is None:
            time.sleep(PAUSE)
        return points

    # What is reported -----------------------------------------------------------------------------

    def report(self, text: str) -> Report:
        """All results, which must be there; ``text`` is the spec as it was written."""
        found = {cell: self._stored(cell) for cell in self.cells}
        records = [record for records in found.values() for record in records]
        names = [name for name in self.judge.metrics if all(name in one.scores for one in records)]
        values = {
            cell: {name: [one.scores[name] for one in records] for name in names}
            for cell, records in found.items()
        }
        numbers = {cell: number for number, cell in enumerate(self.cells, 1)}
        results = {
            "title": self.spec.title,
            "settings": self._settings(),
            "remarks": self.judge.remarks,
            "models": self._models(),
            "versions": {
                "kdpp": kdpp.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "Python": platform.python_version(),
            },
            "finished": max(record.finished for record in records),
            "notes": self.notes,
            "metrics": [{"name": name, **self.judge.metrics[name]._asdict()} for name in names],
            "data": self.judge.described,
            "data_images": self.judge.described_images,
            "cells": [
                {
                    "cell": numbers[cell],
                    "plain": numbers[cell.plain] if cell.guide != "none" else None,
                    "self": numbers.get(cell.control) if cell.control else None,
                    **_settings(cell),
                    "costs": _costs(found[cell], self.spec.images),
                    "metrics": {name: _metric(cell, name, values) for name in names},
                }
                for cell in self.cells
            ],
            "spec": text,
        }
        shown = [self.judge.real, *(found[cell][0].picture for cell in self.cells)]
        return Report(results, [picture for picture in shown if picture])

    def _stored(self, cell: Cell) -> list[Result]:
        """The cell's results, a seed after the other."""
        read = (Result.read(self.path(cell, seed)) for seed in self.spec.seed_list)
        return [result for result in read if result is not None]

    def _settings(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "data": self.judge.source,
            "compared_with": self.judge.against and self.judge.against.about,
            "features": self.judge.features,
            "images": spec.images,
            "seeds": list(spec.seed_list),
            "teacher": spec.teacher,
            "reference": spec.own_samples and asdict(spec.own_samples),
            "self_control": spec.self_control,
            "device": self.device.type,
        }

    def _models(self) -> dict[str, Any]:
        return {
            name: {
                "checkpoint": place,
                "weights": self.weights[name],
                "method": self.models[name].method,
                "parameters": self.models[name].parameters,
                "sampler": self.models[name].sampler,
                "levels": self.models[name].levels,
            }
            for name, place in self.spec.students.items()
        }


def _batches(job: Job) -> Path:
    """The folder of a job's finished batches."""
    return job.path.with_suffix(".batches")


def _table(about: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return {"model": about} if isinstance(about, str) else about


def _metric(
    cell: Cell, name: str, values: Mapping[Cell, Mapping[str, Sequence[float]]]
) -> dict[str, Any]:
    """A figure of a cell: over the seeds, and its changes.

    ``change`` is against the plain student, ``self_change`` what the self control changes, and
    ``own_share`` the change against the self control: what is the teacher's own.
    """

    def change(first: Cell | None, base: Cell | None) -> dict[str, Any] | None:
        if first is None or base is None or first not in values:
            return None
        found = paired(values[first][name], values[base][name])
        return asdict(found) | {"verdict": verdict(found)}

    control = cell.control if cell.control in values else None
    return {
        **asdict(estimate(values[cell][name])),
        "values": values[cell][name],
        "change": change(cell, cell.plain) if cell.guide != "none" else None,
        "self_change": change(control, cell.plain),
        "own_share": change(cell, control),
    }


def _settings(cell: Cell) -> dict[str, Any]:
    """Every setting of a cell; None where it has no guide."""
    return {
        "student": cell.student,
        "sampler": cell.sampler,
        "steps": cell.steps,
        "levels": list(cell.levels),
        "options": dict(cell.options),
        "cond_scale": cell.cond_scale,
        "guide": cell.guide,
        **{field.name: cell.keywords.get(field.name) for field in fields(Guidance)},
    }


def _costs(results: Sequence[Result], images: int) -> dict[str, float]:
    """What one image costs; the time is the mean over the seeds, memory the most of any."""
    student, teacher = results[0].evaluations
    return {
        "student_evaluations": student,
        "teacher_evaluations": teacher,
        "evaluations": student + teacher,
        "compute": results[0].compute,
        "milliseconds": 1e3 * fmean(result.seconds for result in results) / images,
        "memory": max(result.memory for result in results),
    }
