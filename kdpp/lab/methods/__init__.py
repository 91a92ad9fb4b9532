"""The methods by which `kdpp train` makes teachers and students, and what they are written with.

A method is a `Task` with a dataclass of settings, entered by `method`::

    @method("name", summary="one line", source="the paper")
    class Name(Task):
        @dataclass(frozen=True)
        class Settings:
            batch: int = setting(512, "images in a batch")

        def __init__(self, job: Job) -> None: ...      # modules, optimisers, iterations
        def step(self, i: int, draws: Draws) -> dict[str, Tensor]: ...
        def result(self) -> tuple[nn.Module, dict[str, Any]]: ...

A run is its settings and its seed: whatever iteration i draws comes from (seed, i) alone, and
whatever changes over iterations (rates, phases) is a function of i. So modules, optimisers and i
are all there is to save, and a run that was killed ends as one that was not.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kdpp.digits.networks import VNetwork
from kdpp.lab import processes
from kdpp.lab.data import Data
from kdpp.lab.models import Model
from kdpp.lab.networks import build

__all__ = [
    "METHODS",
    "Draws",
    "Job",
    "Method",
    "Task",
    "check_rising",
    "cosine",
    "descend",
    "frozen",
    "load_methods",
    "method",
    "new_network",
    "plain_teacher",
    "seeded",
    "stretched",
    "student_network",
    "update_average",
]

MODULES = (
    "teacher",
    "consistency",
    "progressive",
    "guided",
    "sfd",
    "ddil",
    "matching",
    "adversarial",
)


@dataclass(frozen=True)
class Job:
    """What a training run is given; data and teacher are on the device already.

    Attributes:
        teacher: None for a method that needs none.
        settings: an instance of the method's settings.
    """

    data: Data
    teacher: Model | None
    settings: Any
    seed: int
    device: torch.device


class Task:
    """One training run; see the module.

    Attributes:
        iterations: how many steps there are.
        modules: everything to be saved and restored between steps: the network, its average, a
            phase's teacher, buffers (of fixed shapes). A frozen `job.teacher` need not be here.
        optimisers: theirs; their gradients are averaged over processes before each step.
    """

    Settings: ClassVar[type]
    iterations: int
    modules: dict[str, nn.Module]
    optimisers: dict[str, torch.optim.Optimizer]

    def __init__(self, job: Job) -> None:
        raise NotImplementedError

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        """Take optimisation step i and return its losses, 0-dim, by name.

        Every name occurs at step 0; a later step may leave some out.
        """
        raise NotImplementedError

    def result(self) -> tuple[nn.Module, dict[str, Any]]:
        """The final network (usually the average) and its part of a checkpoint's `about`.

        That part is ``sampler``, ``levels``, ``conditions``, ``guidance`` and ``evaluations``,
        see `kdpp.lab.models.save_model`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Method:
    """A way to train: its name, one line of what it is, its source, its settings, its task.

    ``teacher`` says whether it needs one.
    """

    name: str
    summary: str
    source: str
    settings: type
    make: Callable[[Job], Task]
    teacher: bool


METHODS: dict[str, Method] = {}
T = TypeVar("T", bound=type[Task])


def method(name: str, *, summary: str, source: str, teacher: bool = True) -> Callable[[T], T]:
    """Enter a `Task` with a dataclass ``Settings`` as a method of `kdpp train`.

    Raises ValueError where the name is taken.
    """

    def enter(task: T) -> T:
        if name in METHODS:
            raise ValueError(f"there is a method named {name!r} already")
        METHODS[name] = Method(name, summary, source, task.Settings, task, teacher)
        return task

    return enter


def load_methods() -> dict[str, Method]:
    """METHODS, with every module of this package imported."""
    for name in MODULES:
        importlib.import_module(f"{__name__}.{name}")
    return METHODS


class Draws:
    """All that is random in iteration i, from (seed, i) alone, in the order it is asked for.

    It is the same on every device. Under several processes each draws for all and keeps its rows:
    `batch` takes the number of images of the whole batch and gives this process's share; the
    others take the number of rows that are wanted here, such as ``len(images)``.
    """

    def __init__(self, data: Data, seed: int, i: int, device: torch.device) -> None:
        self.data, self.device = data, device
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

    def integers(self, high: int, n: int) -> Tensor:
        """Int64 (n,), uniform in 0 … high - 1."""
        return self._mine(n, self._random.integers(high, size=n * processes.size()))

    def noise(self, like: Tensor) -> Tensor:
        """Float32 Gaussian noise of the shape of `like` (n, …)."""
        shape = (len(like) * processes.size(), *like.shape[1:])
        return self._mine(len(like), self._random.standard_normal(shape, dtype=np.float32))

    def _mine(self, n: int, values: Any) -> Tensor:
        first = n * processes.rank()
        return torch.from_numpy(values[first : first + n]).to(self.device)


def stretched(values: Tensor, x: Tensor) -> Tensor:
    """Values (B,) as (B, 1, …), to go with x (B, *shape)."""
    return values.view(-1, *[1] * (x.ndim - 1))


def check_rising(name: str, values: Sequence[float]) -> None:
    """ValueError unless the setting is a range: two numbers that rise."""
    if len(values) != 2 or values[0] >= values[1]:
        raise ValueError(f"{name} is {values}; it must be two numbers that rise")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global random stream for the block, and put it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def new_network(config: Mapping[str, Any], job: Job, conditions: Sequence[str] = ()) -> VNetwork:
    """A network of this configuration for the job's data, initialised by the job's seed."""
    data = {"shape": list(job.data.shape), "classes": job.data.classes}
    with seeded(job.seed):
        network = build({**config, **data, "conditions": list(conditions)})
    return network.to(job.device)


def plain_teacher(job: Job) -> Model:
    """The job's teacher; ValueError for one that has its guidance inside it."""
    teacher = job.teacher
    assert teacher is not None
    if teacher.needs_w or teacher.about["guidance"] is not None:
        raise ValueError("the teacher is guided already; give a model to be guided by CFG")
    return teacher


def student_network(
    job: Job, config: Mapping[str, Any] | None, conditions: Sequence[str] = ()
) -> VNetwork:
    """A student: a new network of `config`, or for None the teacher's, with its weights.

    The latter keeps the teacher's conditions; those that are new start without effect.
    """
    if config:
        return new_network(config, job, conditions)
    assert job.teacher is not None
    teacher = job.teacher.network
    known = teacher.config.get("conditions", [])
    network = new_network(teacher.config, job, [*known, *(c for c in conditions if c not in known)])
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
