"""What samples are measured in: images of the lab against data, or pictures of prompts.

A judge measures the samples of a cell and draws them; `kdpp.lab.bench` runs the cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from kdpp.lab import pictures
from kdpp.lab.data import load_data, load_pictures
from kdpp.lab.files import digest, make_folder, write_atomically
from kdpp.lab.metrics import (
    METRICS,
    NETWORKS,
    Floats,
    Metric,
    Points,
    compared,
    describe,
    load_features,
    load_picture_features,
    measure,
    remarks,
)
from kdpp.lab.models import GenerativeModel, Model
from kdpp.lab.plugins import load_function
from kdpp.lab.sampling import CHUNK, Images
from kdpp.lab.spec import Spec

__all__ = ["DataJudge", "Judge", "PictureJudge"]

SHOWN = pictures.COLUMNS * pictures.LINES
"""Pictures in a grid."""


class Judge(Protocol):
    """What `kdpp.lab.bench` asks.

    Attributes:
        source, features: names, for the report.
        batch: samples in a run.
        real: a grid of real images, as a PNG file in base64; None without.
        remarks: what a reader must know.
        described: the figures of the data themselves.
        metrics: every figure of `scores`, in the order of tables.
    """

    source: str
    features: str
    batch: int
    real: str | None
    remarks: list[str]
    described: dict[str, float]
    metrics: dict[str, Metric]

    def given(self) -> object:
        """All that figures depend on but the samples."""

    def check(self, name: str, model: GenerativeModel) -> None:
        """ValueError unless the model makes what is measured."""

    def load(self) -> None:
        """Have what is compared with; the attributes are there afterwards."""

    def attempt(self, model: GenerativeModel, samples: Images) -> None:
        """Measure one sample, as far as one can be: mistakes of a user's own are seen at once."""

    def labels(self, seed: int, count: int) -> Tensor | None:
        """Which class or prompt each sample of a seed shows; None: as their seeds say."""

    def features_of(self, model: GenerativeModel, samples: Images) -> Floats:
        """Of the teacher's own samples."""

    def scores(
        self, model: GenerativeModel, samples: Images, teacher: Points | None
    ) -> dict[str, float]:
        """The figures; ``teacher`` are the features of its own samples, if they are wanted."""

    def picture(self, model: GenerativeModel, samples: Images) -> str | None:
        """A grid of the first samples, as a PNG file in base64; None for what is no picture."""


class DataJudge:
    """Images or latents of the lab, compared with data."""

    def __init__(self, spec: Spec, first: Model) -> None:
        self.images = spec.images
        self.batch = CHUNK
        self.data = load_data(spec.data or first.card.data.source)
        self.source = self.data.source
        self.metrics = METRICS
        self._default = "digits" if self.source == "digits" else "pixels"
        self._named = spec.features

    def check(self, name: str, model: GenerativeModel) -> None:
        """It must make such images as the data are."""
        made, wanted = (model.shape, model.classes), (self.data.shape, self.data.classes)
        if made != wanted:
            raise ValueError(
                f"{name} makes images of shape {list(made[0])} and {made[1]} classes; the data "
                f"have {list(wanted[0])} and {wanted[1]}"
            )

    def load(self) -> None:
        """The features, and those of the data."""
        name = self._named or self._default
        self.space = load_features(name, self.data.images, self.data.classes)
        self.features = self.space.name
        self.points = Points(self.space(self.data.images))
        self.remarks = remarks(self.points, self.images, None if self._named else self._default)
        drawn = pictures.drawable(self.data)
        self.real = self._grid(pictures.real_images(self.data)) if drawn else None
        self.described = describe(self.points, self.data.labels, self.space)

    def given(self) -> object:
        """A digest of the data, the features, and how many images there are."""
        name = self.features
        return digest([
            self.images, self.data.images.numpy().tobytes(), self.data.classes,
            name, file_content(name),
        ])  # fmt: skip

    def attempt(self, model: GenerativeModel, samples: Images) -> None:
        """Nothing here is the user's own."""

    def labels(self, seed: int, count: int) -> Tensor | None:
        """As their seeds say."""
        return None

    def features_of(self, model: GenerativeModel, samples: Images) -> Floats:
        """Of the images."""
        return self.space(samples.x)

    def scores(
        self, model: GenerativeModel, samples: Images, teacher: Points | None
    ) -> dict[str, float]:
        """See `kdpp.lab.metrics.measure`."""
        return measure(samples.x, samples.labels, self.space, self.points, teacher)

    def picture(self, model: GenerativeModel, samples: Images) -> str | None:
        """A column shows a class."""
        return self._grid(samples.x) if self.real else None

    def _grid(self, images: Tensor) -> str:
        return pictures.grid(images, self.data.classes)


class Scorer(NamedTuple):
    """A metric of the user's own: ``(pictures (n, 3, h, w) in [0, 1], prompts) -> scores (n,)``."""

    place: str
    function: Callable[[Tensor, list[str]], Any]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def metric(self) -> Metric:
        """It is better higher, unless the function's ``better`` says "lower"."""
        about = (self.function.__doc__ or "").strip().splitlines()
        lower = getattr(self.function, "better", "higher") == "lower"
        better: Literal["lower", "higher"] = "lower" if lower else "higher"
        return Metric(self.name.replace("_", " "), better, about[0] if about else self.place)

    def __call__(self, shown: Tensor, prompts: list[str]) -> list[float]:
        """One finite number for each picture, or ValueError."""
        scores = torch.as_tensor(self.function(shown, prompts)).detach().double().flatten().tolist()
        if len(scores) != len(prompts) or not all(map(math.isfinite, scores)):
            raise ValueError(
                f"{self.place} gave {len(scores)} scores for {len(prompts)} pictures; it must give "
                "one finite number for each"
            )
        return scores


class PictureJudge:
    """Pictures of prompts: against reference pictures, and by metrics of the user's own.

    Pictures are decoded a batch at a time, so that never more than one batch is in memory.
    """

    def __init__(self, spec: Spec, prompts: Sequence[str], folder: Path) -> None:
        self.images, self.batch, self.prompts = spec.images, spec.batch, tuple(prompts)
        self.source, self.features, self.folder = spec.data, spec.features, folder
        self.scorers = [Scorer(name, load_function(name)) for name in spec.metrics]
        names = [scorer.name for scorer in self.scorers]
        if len(set(names)) < len(names) or set(names) & METRICS.keys():
            raise ValueError(f"the metrics are called {', '.join(names)}; give each its own name")
        if bool(spec.data) != bool(spec.features):
            raise ValueError(
                "data is a folder of reference pictures, and features is what they are compared "
                "in; give both or neither"
            )
        if not self.scorers and not spec.data:
            raise ValueError(
                'nothing is measured: give metrics = ["module:function"], or data and features'
            )
        self.metrics = METRICS | {scorer.name: scorer.metric for scorer in self.scorers}

    def check(self, name: str, model: GenerativeModel) -> None:
        """It must make pictures."""
        if len(model.shape) != 3:
            raise ValueError(f"{name} makes videos; kdpp compare measures pictures")

    def load(self) -> None:
        """The features, and those of the reference pictures."""
        self.space = load_picture_features(self.features) if self.features else None
        self.remarks = [] if self.points is None else remarks(self.points, self.images, "given")
        self.described = {}
        if self.points is not None:
            # Reference pictures have no classes: what is left is the inception score.
            assert self.space is not None
            once = torch.arange(len(self.points.rows))
            self.described = describe(self.points, once, self.space)
        few = islice(load_pictures(self.source), SHOWN) if self.source else ()
        self.real = _thumbnails(few) if self.source else None

    @cached_property
    def points(self) -> Points | None:
        """The reference pictures' features; kept, since there are many."""
        if self.space is None:
            return None
        path = self.folder / f"data-{digest([self._reference])}.safetensors"
        if not path.exists():
            rows = [self.space(picture) for picture in load_pictures(self.source)]
            features = torch.cat(list(map(torch.from_numpy, rows)))
            make_folder(self.folder)
            write_atomically(path, to_bytes({"features": features}))
        return Points(load_file(path)["features"].numpy())

    @cached_property
    def _reference(self) -> object:
        return (self.features, file_content(self.features), folder_content(self.source))

    def given(self) -> object:
        """A digest of references, features, metrics and the size of a batch."""
        about = [(scorer.place, file_content(scorer.place)) for scorer in self.scorers]
        return digest([self.images, self.batch, self._reference, about])

    def attempt(self, model: GenerativeModel, samples: Images) -> None:
        """Decode the picture, and give it to every metric and to the features."""
        for shown, prompts in self._shown(model, samples):
            for scorer in self.scorers:
                scorer(shown, prompts)
            if self.space is not None:
                self._space(shown)

    def labels(self, seed: int, count: int) -> Tensor | None:
        """Prompts go on from seed to seed: n seeds of m samples draw n·m prompts in turn."""
        return (torch.arange(count) + seed * count) % len(self.prompts)

    def features_of(self, model: GenerativeModel, samples: Images) -> Floats:
        """Of the pictures."""
        rows = [self._space(shown) for shown, _ in self._shown(model, samples)]
        return torch.cat(list(map(torch.from_numpy, rows))).numpy()

    def scores(
        self, model: GenerativeModel, samples: Images, teacher: Points | None
    ) -> dict[str, float]:
        """Distances to the reference pictures and to the teacher's, and the means of metrics."""
        rows: list[Tensor] = []
        found: dict[str, list[float]] = {scorer.name: [] for scorer in self.scorers}
        for shown, prompts in self._shown(model, samples):
            if self.space is not None:
                rows.append(torch.from_numpy(self._space(shown)))
            for scorer in self.scorers:
                found[scorer.name] += scorer(shown, prompts)
        scores: dict[str, float] = {}
        if self.space is not None and self.points is not None:
            made = Points(torch.cat(rows).numpy())
            scores = compared(made, self.points, teacher)
            scores |= describe(made, torch.arange(len(made.rows)), self.space)
        return scores | {name: sum(values) / len(values) for name, values in found.items()}

    def picture(self, model: GenerativeModel, samples: Images) -> str | None:
        """The first prompts, in their order."""
        few = replace(samples, x=samples.x[:SHOWN], labels=samples.labels[:SHOWN])
        return _thumbnails(shown.mul(2.0).sub(1.0) for shown, _ in self._shown(model, few))

    def _space(self, shown: Tensor) -> Floats:
        if self.space is None:
            raise ValueError("the teacher's own samples are compared in features; name them")
        return self.space(shown.mul(2.0).sub(1.0))

    def _shown(self, model: GenerativeModel, samples: Images) -> Iterator[tuple[Tensor, list[str]]]:
        """Pictures in [0, 1] on the model's device, and their prompts, a batch at a time."""
        decode: Any = getattr(model, "decode", None)
        rows = (torch.split(part, self.batch) for part in (samples.x, samples.labels))
        for x, labels in zip(*rows):
            yield decode(x), [self.prompts[i] for i in labels.tolist()]


def _thumbnails(shown: Iterable[Tensor]) -> str:
    """Pictures (n, 3, h, w) in [-1, 1], of any sizes, as a grid of squares."""
    return pictures.grid(torch.cat([pictures.square(one) for one in shown]), 1)


def file_content(name: str) -> str | None:
    """A digest of the files that features or a metric are read from; None where there is none."""
    kind, _, place = name.partition(":")
    if kind.endswith(".py"):
        return digest([Path(kind).read_bytes()])
    if not place or kind not in NETWORKS:
        return None
    path = Path(place)
    paths = sorted(path.iterdir()) if path.is_dir() else [path]
    return digest(path.read_bytes() for path in paths if path.is_file())


def folder_content(folder: str) -> str | None:
    """A digest of all files in a folder, and in those inside it."""
    if not folder:
        return None
    return digest(path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file())
