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
from kdpp.lab.intervals import differences, estimate, together, verdict
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
from kdpp.lab.search import SEARCH_SEED, SEARCHED_LEVELS, candidates, front
from kdpp.lab.settings import fill, to_toml
from kdpp.lab.spec import REFERENCE_SEED, BestTeacher, Cell, Guidance, Spec, cells_of

__all__ = ["Bench", "Report", "run"]

RESULTS = "results.json"
SIGNS = {"lower": 1.0, "higher": -1.0, None: 0.0}
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
        jobs = [*bench.searches(), *bench.jobs()]
        untried = {id(job.recipe): job for job in jobs if not job.done}
        for job in untried.values():
            bench.judge.attempt(job.recipe.student, attempt(job.recipe, job.cell or job))
        make_folder(out / "cells")
        with locked(out) if rank == 0 else nullcontext():
            for remark in bench.judge.remarks if rank == 0 else ():
                print(f"kdpp: {remark}", file=sys.stderr)
            bench.settle(rank, size)
            bench.carry_out(bench.jobs(), rank, size)
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
        checkpoints = {one for model in models for one in _listed(model["checkpoint"])}
        theirs = checkpoints | {one for model in models for one in _listed(model["weights"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # nothing, or nothing that was written by this
    ours = {one for name in bench.places for one in _listed(bench.places[name])}
    ours |= {one for digests in bench.weights.values() for one in digests}
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
        self.models: dict[str, list[GenerativeModel]] = {}
        self.helpers: dict[str, GenerativeModel | None] = {}
        self.teacher: GenerativeModel | None = None
        self._open()
        self.places = dict(spec.students)
        firsts = {name: models[0] for name, models in self.models.items()}
        first = next(iter(firsts.values()))
        self.judge: Judge = (
            DataJudge(spec, first)
            if isinstance(first, Model)
            else PictureJudge(spec, prompts, folder)
        )
        if self.teacher is not None:
            self.judge.check("the teacher", self.teacher)
        for name, models in self.models.items():
            for model in models:
                self.judge.check(name, model)
        grid = cells_of(spec, firsts)
        self.cells, self.longer, self.notes = grid.cells, grid.longer, grid.notes
        self.candidates = self._candidates(grid.teachers)
        self.weights = {name: [m.digest() for m in models] for name, models in self.models.items()}
        self.recipes = {cell: self._recipes(cell) for cell in [*self.cells, *self._searched]}
        self.judge.load()

    def _open(self) -> None:
        """The students and their teachers: of the lab at once, of pipelines when they are used."""
        spec = self.spec
        if spec.prompts:
            for name, about in spec.students.items():
                request = student_request({**spec.pipelines, **_table(about)}, spec.teacher)
                model, self.helpers[name] = self.shelf.models(request)
                self.models[name] = [model]
            if spec.teacher is not None and spec.own_samples is not None:
                steps = {"model": spec.teacher, "steps": spec.own_samples.steps}
                alone = student_request({**spec.pipelines, **steps}, None)
                self.teacher, _ = self.shelf.models(alone)
            return
        for name, places in spec.students.items():
            requests = [Request(student=place) for place in _listed(places)]
            self.models[name] = [open_models(one, self.device)[0] for one in requests]
            kinds = {(one.sampler, one.levels, one.guidance_range) for one in self.models[name]}
            if len(kinds) > 1:
                raise ValueError(
                    f"the checkpoints of {name} are made for other samplers or levels; those of "
                    "one student differ in their training seed alone"
                )
        if spec.teacher is not None:
            self.teacher, _ = open_models(Request(student=spec.teacher), self.device)
        self.helpers = dict.fromkeys(self.models, self.teacher)

    def _candidates(self, teachers: Sequence[BestTeacher]) -> dict[BestTeacher, list[Cell]]:
        """The cells among which each of these is searched."""
        if not teachers or self.teacher is None:
            return {}
        teacher, place = self.teacher, self.spec.teacher
        name = next((name for name, one in self.places.items() if one == place), None)
        if name is None:
            name = "the teacher" if "teacher" in self.places else "teacher"
            self.places[name], self.models[name] = place, [teacher]
        return {wanted: list(candidates(name, teacher, wanted)) for wanted in teachers}

    @property
    def _searched(self) -> list[Cell]:
        return list(dict.fromkeys(cell for cells in self.candidates.values() for cell in cells))

    def _recipes(self, cell: Cell) -> list[Recipe]:
        """One for each of the student's trainings."""
        return [self._recipe(cell, student) for student in self.models[cell.student]]

    def _recipe(self, cell: Cell, student: GenerativeModel) -> Recipe:
        guides = {"none": None, "teacher": self.helpers.get(cell.student), "self": student}
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
    def _names(self) -> dict[Cell, list[str]]:
        """Digests of all that determines a cell's results but the seed, one for each training."""
        own = self.own and self.own.path.name
        return {
            cell: [digest([self._given, own, fingerprint(recipe)]) for recipe in recipes]
            for cell, recipes in self.recipes.items()
        }

    def path(self, cell: Cell, training: int, seed: int) -> Path:
        return self.folder / f"{digest([self._names[cell][training], seed])}.json"

    def searches(self) -> list[Job]:
        """What is to be sampled to find the best solver for the teacher, as `jobs`."""
        found = self._jobs(self._searched, [SEARCH_SEED])
        return [*([self.own] if self.own else []), *found] if found else []

    def settle(self, rank: int = 0, size: int = 1) -> None:
        """Search the best solver for the teacher, and add what was found to the cells."""
        jobs = self.searches()
        self.carry_out(jobs, rank, size)
        while not all(job.done for job in jobs):
            time.sleep(PAUSE)
        for wanted, cells in self.candidates.items():
            scores = {}
            for cell in cells:
                found = Result.read(self.path(cell, 0, SEARCH_SEED))
                if found is not None:
                    scores[cell] = found.scores["fd"]
            if not scores:
                continue
            best = min(scores, key=lambda cell: scores[cell])
            if best not in self.cells:
                self.cells.append(best)
            solvers = ", ".join(dict.fromkeys(cell.sampler for cell in cells))
            note = (
                f"the teacher alone with at most {wanted.evaluations} evaluations, CFG scale "
                f"{wanted.cond_scale:g}: {best.sampler}, {best.steps} steps on "
                f"[{', '.join(f'{level:.3g}' for level in best.levels)}], the lowest FD of "
                f"{len(cells)} ({solvers}; levels its own, {', '.join(SEARCHED_LEVELS)}) on a seed "
                "of the search's own"
            )
            self.notes.append(note)

    def jobs(self) -> list[Job]:
        """All that is to be computed, each once: one checkpoint may have two names.

        The teacher's own samples come first, because every result needs them. The others are in the
        order of their students, and then of their digests, so that no pattern of the grid makes
        uneven shares.
        """
        found = self._jobs(self.cells, self.spec.seed_list)
        return [*([self.own] if self.own else []), *found]

    def _jobs(self, cells: Sequence[Cell], seeds: Sequence[int]) -> list[Job]:
        jobs = {
            path: Job(cell, recipe, seed, path)
            for cell in cells
            for training, recipe in enumerate(self.recipes[cell])
            for seed in seeds
            for path in [self.path(cell, training, seed)]
        }
        names = list(self.models)
        return sorted(jobs.values(), key=lambda job: (names.index(job.student), job.path))

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
        records = [one for several in found.values() for each in several for one in each]
        names = [name for name in self.judge.metrics if all(name in one.scores for one in records)]
        figures = {name: self._figures(name, found) for name in names}
        costs = {cell: _costs(stored, self.spec.images) for cell, stored in found.items()}
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
                    "longer": numbers.get(self.longer[cell]) if cell in self.longer else None,
                    **_settings(cell),
                    "costs": costs[cell],
                    "metrics": {name: figures[name][cell] for name in names},
                }
                for cell in self.cells
            ],
            "fronts": {
                name: {
                    cost: [
                        numbers[cell]
                        for cell in front(
                            {c: costs[c][cost] for c in costs},
                            {c: figures[name][c]["mean"] * sign for c in costs},
                        )
                    ]
                    for cost in ("evaluations", "compute", "milliseconds")
                }
                for name in names
                if (sign := SIGNS[self.judge.metrics[name].better])
            },
            "spec": text,
        }
        shown = [self.judge.real, *(found[cell][0][0].picture for cell in self.cells)]
        return Report(results, [picture for picture in shown if picture])

    def _stored(self, cell: Cell) -> list[list[Result]]:
        """The cell's results, training by training, a seed after the other."""
        return [
            [
                result
                for seed in self.spec.seed_list
                if (result := Result.read(self.path(cell, training, seed))) is not None
            ]
            for training in range(len(self.recipes[cell]))
        ]

    def _figures(
        self, name: str, found: Mapping[Cell, Sequence[Sequence[Result]]]
    ) -> dict[Cell, dict[str, Any]]:
        """A metric of every cell: over the seeds, or over the trainings' means; and its changes.

        ``change`` is against the plain student, ``self_change`` what the self control changes,
        ``own_share`` the change against the self control, what is the teacher's own, and
        ``over_steps`` the change against as many evaluations as steps of the student's own. The
        intervals of all of them are read together (`kdpp.lab.intervals.together`).
        """
        seeds = {
            cell: [[one.scores[name] for one in results] for results in several]
            for cell, several in found.items()
        }
        units = {
            cell: each[0] if len(each) == 1 else [fmean(values) for values in each]
            for cell, each in seeds.items()
        }
        pairs = {
            (cell, kind): differences(units[cell], units[base])
            for cell in found
            for kind, base in (
                ("change", cell.plain if cell.guide != "none" else None),
                ("own_share", cell.control),
                ("over_steps", self.longer.get(cell)),
            )
            if base in units
        }
        changes = {
            key: asdict(one) | {"verdict": verdict(one)}
            for key, one in zip(pairs, together(list(pairs.values())))
        }
        return {
            cell: {
                **asdict(estimate(units[cell])),
                "values": units[cell],
                "trainings": seeds[cell] if len(seeds[cell]) > 1 else None,
                **{
                    kind: changes.get((cell, kind))
                    for kind in ("change", "own_share", "over_steps")
                },
                "self_change": changes.get((cell.control, "change")) if cell.control else None,
            }
            for cell in found
        }

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
                "weights": self.weights[name] if len(models) > 1 else self.weights[name][0],
                "method": models[0].method,
                "parameters": models[0].parameters,
                "sampler": models[0].sampler,
                "levels": models[0].levels,
            }
            for name, place in self.places.items()
            for models in [self.models[name]]
        }


def _batches(job: Job) -> Path:
    """The folder of a job's finished batches."""
    return job.path.with_suffix(".batches")


def _listed(value: Any) -> list[str]:
    return list(map(str, value)) if isinstance(value, list) else [str(value)]


def _table(about: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return {"model": about} if isinstance(about, str) else about


def _settings(cell: Cell) -> dict[str, Any]:
    """Every setting of a cell; None where it has no guide."""
    return {
        "student": cell.student,
        "sampler": cell.sampler,
        "steps": cell.steps,
        "schedule": cell.schedule,
        "levels": list(cell.levels),
        "options": dict(cell.options),
        "cond_scale": cell.cond_scale,
        "guide": cell.guide,
        **{field.name: cell.keywords.get(field.name) for field in fields(Guidance)},
    }


def _costs(stored: Sequence[Sequence[Result]], images: int) -> dict[str, float]:
    """What one image costs; the time is the mean over the seeds, memory the most of any."""
    results = [result for each in stored for result in each]
    student, teacher = results[0].evaluations
    return {
        "student_evaluations": student,
        "teacher_evaluations": teacher,
        "evaluations": student + teacher,
        "compute": results[0].compute,
        "milliseconds": 1e3 * fmean(result.seconds for result in results) / images,
        "memory": max(result.memory for result in results),
    }
