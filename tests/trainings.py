"""What the tests of training share: small data, their teachers, a training in a line."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kdpp.lab.data import Data
from kdpp.lab.methods import Draws, Method, Training, load_methods
from kdpp.lab.models import DataOrigin, Model, ModelCard, load_model
from kdpp.lab.networks import VEDenoiser
from kdpp.lab.sampling import Recipe, draw
from kdpp.lab.settings import fill
from kdpp.lab.trainer import train
from problems import seeded

TINY = {"kind": "resmlp", "width": 16, "hidden": 32, "blocks": 1}


def spots(count: int = 60, shape: tuple[int, ...] = (1, 4, 4)) -> Data:
    """Three classes, each with a bright spot somewhere else."""
    labels = torch.arange(count) % 3
    images = torch.full((count, *shape), -0.8)
    images.flatten(1)[torch.arange(count), labels * 3] = 0.8
    images += 0.1 * seeded(*images.shape, seed=0, dtype=torch.float32)
    return Data(images.clamp(-1, 1), labels, 3, "spots")


def draws(i: int, seed: int = 0, data: Data | None = None) -> Draws:
    return Draws(data or spots(), seed, i)


def small(kind: type[Method]) -> dict[str, Any]:
    """Settings for a short training, of those that the method has."""
    names = {field.name for field in fields(kind.Settings)}
    sizes = {"iterations": 24, "batch": 16, "network": TINY}
    if "start_steps" in names:  # of two phases or three
        sizes |= {"iterations": 12, "start_steps": 8, "steps": 2}
    return {name: value for name, value in sizes.items() if name in names}


def training_of(name: str, settings: dict[str, Any], seed: int = 0, **rest: Any) -> Training:
    """Of the spots, by default with their teacher."""
    kind = load_methods()[name]
    given = {"data": spots(), "teacher": teacher() if kind.needs_teacher else None}
    return Training(kind, fill(kind.Settings, settings), **(given | rest), seed=seed)


def method_of(name: str, settings: dict[str, Any], seed: int = 0, **rest: Any) -> Any:
    training = training_of(name, settings, seed, **rest)
    return training.method(training)


def losses_of(method: Method) -> list[dict[str, float]]:
    """Of all its steps."""
    found = []
    for i in range(method.iterations):
        found.append({name: value.item() for name, value in method.step(i, draws(i)).items()})
    return found


def model_of(method: Method, data: Data | None = None) -> Model:
    """The model of a method as it stands."""
    data = data or spots()
    network, usage = method.result()
    network = network.eval()
    origin = DataOrigin(
        source=data.source, shape=data.shape, classes=data.classes, bounded=data.bounded
    )
    card = ModelCard(**vars(usage), network=network.config, data=origin, method="tests")
    return Model(VEDenoiser(network), network, card)


@lru_cache(maxsize=1)
@torch.enable_grad()
def teacher() -> Model:
    """A teacher of the spots, good enough to be distilled."""
    settings = {"iterations": 200, "batch": 64, "rate": 5e-3, "average": 0.9, "network": TINY}
    method = method_of("teacher", settings)
    losses_of(method)
    return model_of(method)


@lru_cache(maxsize=1)
@torch.enable_grad()
def guidable_teacher() -> Model:
    """One that takes its guidance as an input."""
    settings = {"iterations": 30, "batch": 64, "rate": 2e-3, "average": 0.9}
    method = method_of("guided-stage-one", settings | {"guidance_range": [1.0, 3.0]})
    losses_of(method)
    return model_of(method)


def trained(folder: Path, name: str, settings: dict[str, Any], **rest: Any) -> Model:
    """The model of a training in a folder."""
    train(training_of(name, settings, **rest), folder, disable=True)
    return load_model(folder)


def check_samples(student: Model, steps: int | None = None, sampler: str | None = None) -> float:
    """The share of the student's images whose spot is where it was asked for."""
    levels = student.levels_for(steps)
    made = draw(Recipe(student, None, sampler or student.sampler, levels), range(90))
    assert made.x.isfinite().all() and made.x.shape == (90, 1, 4, 4)
    assert made.evaluations == (len(levels) - 1, 0)
    return float((made.x.flatten(1).argmax(1) == 3 * made.labels).double().mean())
