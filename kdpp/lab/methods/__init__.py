"""The methods by which `kdpp train` makes teachers and students, and what they are written with.

A method is a `Method` with a dataclass of settings, entered by `method`::

    @method("name", summary="one line", source="the paper")
    class Name(Method):
        @dataclass(frozen=True)
        class Settings:
            batch: int = setting(512, "images in a step", low=1)

        def __init__(self, training: Training) -> None: ...      # modules, optimisers, iterations
        def step(self, i: int, draws: Draws) -> dict[str, Tensor]: ...
        def result(self) -> tuple[Network, Usage]: ...

A training is its settings and its seed: whatever iteration i draws comes from (seed, i) alone, and
whatever changes over iterations (rates, phases) is a function of i. So modules, optimisers and i
are all there is to save, and a training that was killed ends as one that was not.

The formulas that methods share are in `kdpp.lab.diffusion`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kdpp.lab import plugins, processes
from kdpp.lab.arithmetic import PLAIN, Arithmetic
from kdpp.lab.data import Data
from kdpp.lab.models import Model, Usage
from kdpp.lab.networks import Network, VNetwork, build
from kdpp.lab.schedules import TIMESTEPS
from kdpp.lab.settings import as_dict

__all__ = [
    "METHODS",
    "Draws",
    "Method",
    "Training",
    "check_range",
    "cosine",
    "descend",
    "frozen",
    "load_methods",
    "method",
    "new_network",
    "plain_teacher",
    "seeded",
    "student_network",
    "update_average",
]


@dataclass(frozen=True)
class Training:
    """What is trained, on what, from which seed: all that decides the outcome.

    Attributes:
        method: the class that trains.
        settings: an instance of the method's ``Settings``.
        data: on the device that the training runs on.
        teacher: on the same device; None for a method that needs none.
        teacher_name: as it was given.
        arithmetic: how it is computed.
    """

    method: type[Method]
    settings: Any
    data: Data
    teacher: Model | None = None
    teacher_name: str | None = None
    seed: int = 0
    arithmetic: Arithmetic = PLAIN

    @property
    def device(self) -> torch.device:
        """Where the data are."""
        return self.data.images.device

    @cached_property
    def data_digest(self) -> str:
        """Of the images and labels."""
        return _digest({"images": self.data.images, "labels": self.data.labels})

    @cached_property
    def teacher_digest(self) -> str | None:
        """Of the teacher's weights."""
        return _digest(self.teacher.network.state_dict()) if self.teacher else None

    @property
    def all_settings(self) -> dict[str, Any]:
        """The method's, and how it is computed where that is not the default: as JSON has them."""
        return as_dict(self.settings) | self.arithmetic.given

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the outcome, as JSON; data and teacher by digests of their contents."""
        return {
            "method": self.method.name,
            "seed": self.seed,
            "data": self.data_digest,
            "teacher": self.teacher_digest,
            **self.all_settings,
        }


class Method:
    """One training by a method; see the module.

    Attributes:
        name, summary, source, needs_teacher: what `method` was told.
        iterations: how many steps there are.
        modules: everything to be saved and restored between steps: the network, its average, a
            phase's teacher, buffers (of fixed shapes). A frozen `training.teacher` need not be
            here. Images that the networks in here and the teacher evaluate are counted.
        optimisers: theirs; their gradients are averaged over processes before each step.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    needs_teacher: ClassVar[bool]
    Settings: ClassVar[type]
    iterations: int
    modules: dict[str, nn.Module]
    optimisers: dict[str, torch.optim.Optimizer]

    def __init__(self, training: Training) -> None:
        raise NotImplementedError

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        """Take optimisation step i and return its losses, 0-dim, by name.

        Every name occurs at step 0; a later step may leave some out.
        """
        raise NotImplementedError

    def result(self) -> tuple[Network, Usage]:
        """The final network (usually the average), and how it is sampled."""
        raise NotImplementedError


METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def method(name: str, *, summary: str, source: str, teacher: bool = True) -> Callable[[M], M]:
    """Enter a `Method` with a dataclass ``Settings`` into `kdpp train`.

    Args:
        name: what it is called there.
        summary: one line of what it is.
        source: the paper.
        teacher: whether it needs one.

    Raises ValueError where the name is taken.
    """

    def enter(kind: M) -> M:
        if name in METHODS:
            raise ValueError(
                f"there is a method named {name!r} already, in {METHODS[name].__module__}"
            )
        kind.name, kind.summary, kind.source, kind.needs_teacher = name, summary, source, teacher
        METHODS[name] = kind
        return kind

    return enter


def load_methods() -> dict[str, type[Method]]:
    """Every method there is, those without a teacher first.

    They are kdpp's own (every module of this package), those of installed packages (entry points of
    the group ``kdpp.methods``), and whatever was imported before (`kdpp.lab.plugins.import_file`).

    Raises ImportError where a package's entry point cannot be loaded.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    plugins.load_entry_points("kdpp.methods")
    order = sorted(METHODS.values(), key=lambda kind: (kind.needs_teacher, kind.__module__))
    return {kind.name: kind for kind in order}


class Draws:
    """All that is random in iteration i, from (seed, i) alone, in the order it is asked for.

    It is the same on every device. Under several processes each draws for all and keeps its rows:
    `batch` takes the number of images of the whole batch and gives this process's share; the
    others take the number of rows that are wanted here, such as ``len(images)``.
    """

    def __init__(self, data: Data, seed: int, i: int) -> None:
        self.data = data
        self._random = np.random.Generator(np.random.Philox(key=np.array([seed, i], np.uint64)))

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """This process's share of n images, drawn with replacement, and their labels.

        Raises ValueError unless n is a multiple of the number of processes.
        """
        share, rest = divmod(n, processes.size())
        if rest or not share:
            raise ValueError(
                f"a batch of {n} cannot be shared by {processes.size()} processes; make it a "
                "multiple of their number"
            )
        rows = self.integers(len(self.data.labels), share)
        return self.data.images[rows], self.data.labels[rows]

    def dropped(self, labels: Tensor, share: float) -> Tensor:
        """The labels, about this share of them replaced by "no label"."""
        return labels.masked_fill(self.uniform(len(labels)) < share, self.data.classes)

    def uniform(self, n: int) -> Tensor:
        """Float32 (n,), uniform in [0, 1)."""
        return self._mine(n, self._random.random(n * processes.size(), dtype=np.float32))

    def between(self, low: float, high: float, n: int) -> Tensor:
        """Float32 (n,), uniform in [low, high)."""
        return low + (high - low) * self.uniform(n)

    def timesteps(self, n: int) -> Tensor:
        """Float32 (n,), uniform over the schedule's timesteps and between them."""
        return self.between(0, TIMESTEPS - 1, n)

    def integers(self, high: int, n: int) -> Tensor:
        """Int64 (n,), uniform in 0 … high - 1."""
        return self._mine(n, self._random.integers(high, size=n * processes.size()))

    def noise(self, like: Tensor) -> Tensor:
        """Float32 Gaussian noise of the shape of `like` (n, …)."""
        shape = (len(like) * processes.size(), *like.shape[1:])
        return self._mine(len(like), self._random.standard_normal(shape, dtype=np.float32))

    def _mine(self, n: int, values: Any) -> Tensor:
        first = n * processes.rank()
        return torch.from_numpy(values[first : first + n]).to(self.data.images.device)


def check_range(name: str, values: tuple[float, float]) -> None:
    """ValueError unless the setting is a range: the second number not below the first."""
    if values[0] > values[1]:
        raise ValueError(f"{name} is {values}; it must be two numbers, the least and the most")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global random stream for the block, and put it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def new_network(
    config: Mapping[str, Any], training: Training, conditions: Sequence[str] = ()
) -> VNetwork:
    """A network of this configuration for the training's data, initialised by its seed."""
    data = {"shape": list(training.data.shape), "classes": training.data.classes}
    with seeded(training.seed):
        network = build({**config, **data, "conditions": list(conditions)})
    return network.to(training.device)


def plain_teacher(training: Training) -> Model:
    """The training's teacher; ValueError for one that has its guidance inside it."""
    teacher = training.teacher
    assert teacher is not None
    if teacher.guidance_range or teacher.card.guidance is not None:
        raise ValueError("the teacher is guided already; give a model to be guided by CFG")
    return teacher


def student_network(
    training: Training, config: Mapping[str, Any] | None, conditions: Sequence[str] = ()
) -> VNetwork:
    """A student: a new network of `config`, or for None the teacher's, with its weights.

    The latter keeps the teacher's conditions; those that are new start without effect.
    """
    if config:
        return new_network(config, training, conditions)
    assert training.teacher is not None
    teacher = training.teacher.network
    known = teacher.config["conditions"]
    more = [name for name in conditions if name not in known]
    network = new_network(teacher.config, training, [*known, *more])
    network.load_state_dict(network.state_dict() | teacher.state_dict())
    return network


def frozen(network: VNetwork) -> VNetwork:
    """A copy of the network as it is, that takes no gradients: an average, a phase's teacher."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the average (EMA) towards the network: ``a <- decay·a + (1 - decay)·p``."""
    for a, p in zip(average.parameters(), network.parameters(), strict=True):
        a.lerp_(p, 1 - decay)


def cosine(i: int, iterations: int, rate: float) -> float:
    """The learning rate of step i: from `rate` at 0 along half a cosine to 0 at the end."""
    return rate * (1 + math.cos(math.pi * i / iterations)) / 2


def descend(optimiser: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One step of the optimiser down the loss, at this learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
