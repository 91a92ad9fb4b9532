"""DDIL's rollouts: student and teacher by turns, for every p_T and every switch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import kdpp
from kdpp.lab import processes
from kdpp.lab.data import load_data
from kdpp.lab.features import load_features
from kdpp.lab.intervals import estimate
from kdpp.lab.metrics import Points, measure
from kdpp.lab.models import Model, load_model
from kdpp.lab.sampling import Recipe, draw, image_seeds
from kdpp.noise import SeededNoise

SUBSTEPS = 8
CFG = 2.0
PROBABILITIES = (0.0, 0.15, 0.25, 0.5, 0.75, 0.85, 1.0)


def settings(steps: int) -> Iterator[dict[str, Any]]:
    """The rows: p_T, and the first transition of the other network, both ways."""
    for probability in PROBABILITIES:
        yield {"teacher_probability": probability}
    for first in ("teacher", "student"):
        for switch in range(1, steps):
            yield {"first": first, "switch": switch}


def images(student: Model, teacher: Model, seed: int, count: int, row: dict[str, Any]) -> Tensor:
    """One rollout from the noise of the run's seeds; coins from a generator of the seed."""
    levels = student.levels_for()
    seeds = torch.tensor(image_seeds(seed, count))
    like = torch.empty(count, *student.shape)
    labels = seeds % student.classes
    rollout = kdpp.mixed_rollout(
        student.denoiser, teacher.denoiser, SeededNoise(like, seeds)() * levels[0],
        torch.tensor(levels), teacher_substeps=SUBSTEPS, teacher_cfg_scale=CFG,
        extra_args={"cond": labels, "uncond": torch.full_like(labels, student.classes)},
        generator=torch.Generator().manual_seed(seed), disable=True, **row,
    )  # fmt: skip
    return rollout.x


def sweep(folder: Path, name: str, seeds: Sequence[int], count: int) -> list[dict[str, Any]]:
    """Every row's figures over the seeds, for the student in ``folder``/students/``name``.

    ``values`` are the Fréchet distances to the test part of the data, one for each seed.
    """
    student, teacher = load_model(folder / "students" / name), load_model("digits:teacher")
    data = load_data("digits").test
    assert data is not None
    features = load_features("digits", data.images, data.classes)
    reference = Points(features(data.images))
    own = Recipe(teacher, None, "euler", teacher.levels_for(50), cond_scale=CFG)
    rows = []
    with processes.single_thread():
        # Seeds of its own: a teacher's trajectory from the same noise would be too near.
        theirs = Points(features(draw(own, image_seeds(900, count)).x))
        for row in tqdm(list(settings(len(student.levels_for()) - 1)), desc=f"rollouts of {name}"):
            scores = []
            for seed in seeds:
                x = images(student, teacher, seed, count, row)
                labels = torch.tensor(image_seeds(seed, count)) % student.classes
                scores.append(measure(x, labels, features, reference, theirs))
            means = {key: asdict(estimate([one[key] for one in scores])) for key in scores[0]}
            values = [one["fd"] for one in scores]
            rows.append({"student": name, **row, "metrics": means, "values": values})
    return rows
