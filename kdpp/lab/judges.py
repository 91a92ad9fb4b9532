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
from torch import Tensor

from kdpp.lab import pictures, statistics
from kdpp.lab.data import load_pictures
from kdpp.lab.features import Floats, load_features, load_picture_features
from kdpp.lab.files import digest, make_folder
from kdpp.lab.metrics import METRICS, Metric, Points, compared, describe, measure, remarks
from kdpp.lab.models import GenerativeModel, Model
from kdpp.lab.plugins import load_function
from kdpp.lab.sampling import CHUNK, Images
from kdpp.lab.spec import Spec
from kdpp.lab.statistics import Against

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
        described, described_images: the figures of so many real images themselves.
        metrics: every figure of `scores`, in the order of tables.
    """

    source: str
    features: str
    batch: int
    real: str | None
    remarks: list[str]
    described: dict[str, float]
    described_images: int
    metrics: dict[str, Metric]

    @property
    def against(self) -> Against | None:
        """What is compared with; None where nothing is."""

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
    """Images or latents of the lab, compared with data or with a file of `kdpp statistics`."""

    def __init__(self, spec: Spec, first: Model) -> None:
        self.images, self.batch, self.metrics = spec.images, CHUNK, METRICS
        self.kept = Path(spec.statistics) if spec.statistics else None
        self.data = None
        if self.kept is not None:
            said = statistics.about(self.kept)
            self.shape, self.classes, self.source = said["shape"], said["classes"], said["source"]
            looks_like = statistics.images_of(said["shape"], said["limits"])
            default = said["features"]
        else:
            self.data = statistics.load_both(spec.data or first.card.data.source, spec.test)
            self.shape, self.classes, self.source = (
                self.data.shape, self.data.classes, self.data.source
            )  # fmt: skip
            looks_like = self.data.images
            default = "digits" if self.source == "digits" else "pixels"
        self._default = None if spec.features else default
        self.space = load_features(spec.features or default, looks_like, self.classes)
        self.features = self.space.name

    def check(self, name: str, model: GenerativeModel) -> None:
        """It must make such images as the data are."""
        made, wanted = (model.shape, model.classes), (self.shape, self.classes)
        if made != wanted:
            raise ValueError(
                f"{name} makes images of shape {list(made[0])} and {made[1]} classes; the data "
                f"have {list(wanted[0])} and {wanted[1]}"
            )

    def load(self) -> None:
        """The features of the data."""
        if self.kept is not None:
            self.against: Against = statistics.read(self.kept, self.space)
        else:
            assert self.data is not None
            self.against = statistics.of_data(self.data, self.space)
        points = self.against.points
        self.remarks = remarks(points, self.images, self._default, self.against.part)
        self.described, self.described_images = self.against.real(self.space, self.images)
        shown = self.data and (self.data.test or self.data)
        drawn = shown is not None and pictures.drawable(shown)
        self.real = self._grid(pictures.real_images(shown)) if shown and drawn else None

    def given(self) -> object:
        """A digest of what is compared with, the features, and how many images there are."""
        rows = (self.against.points, self.against.training)
        return digest([
            self.images, self.classes, sorted(self.space.about.items()),
            *(one and one.rows.tobytes() for one in rows),
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
        against = self.against
        return measure(
            samples.x, samples.labels, self.space, against.points, teacher, against.training
        )

    def picture(self, model: GenerativeModel, samples: Images) -> str | None:
        """A column shows a class."""
        return self._grid(samples.x) if self.real else None

    def _grid(self, images: Tensor) -> str:
        return pictures.grid(images, self.classes)


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
        self.kept = Path(spec.statistics) if spec.statistics else None
        self.source, self.features, self.folder = spec.data, spec.features, folder
        self.scorers = [Scorer(name, load_function(name)) for name in spec.metrics]
        names = [scorer.name for scorer in self.scorers]
        if len(set(names)) < len(names) or set(names) & METRICS.keys():
            raise ValueError(f"the metrics are called {', '.join(names)}; give each its own name")
        if bool(spec.data or spec.statistics) != bool(spec.features):
            raise ValueError(
                "data is a folder of reference pictures, or statistics a file of theirs, and "
                "features is what they are compared in; give both or neither"
            )
        if not self.scorers and not spec.features:
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
        self.remarks: list[str] = []
        self.described: dict[str, float] = {}
        self.described_images = 0
        if self.against is not None and self.space is not None:
            self.remarks = remarks(self.against.points, self.images, None, self.against.part)
            self.described, self.described_images = self.against.real(self.space, self.images)
        few = islice(load_pictures(self.source), SHOWN) if self.source else ()
        self.real = _thumbnails(few) if self.source else None

    @cached_property
    def against(self) -> Against | None:
        """The reference pictures' features; kept, since there are many."""
        if self.space is None:
            return None
        path = self.kept or self.folder / f"data-{digest([self._reference])}.safetensors"
        if not path.exists() and self.kept is None:
            make_folder(self.folder)
            statistics.write(path, statistics.of_pictures(self.source, self.space), self.space)
        return statistics.read(path, self.space)

    @cached_property
    def _reference(self) -> object:
        if self.space is None:
            return None
        files = self.kept.read_bytes() if self.kept else folder_content(self.source)
        return sorted(self.space.about.items()), files

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
        if self.space is not None and self.against is not None:
            made = Points(torch.cat(rows).numpy())
            scores = compared(made, self.against.points, teacher, self.against.training)
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
    """A digest of the file that a metric is read from; None where there is none."""
    kind, _, _ = name.partition(":")
    return digest([Path(kind).read_bytes()]) if kind.endswith(".py") else None


def folder_content(folder: str) -> str | None:
    """A digest of all files in a folder, and in those inside it."""
    if not folder:
        return None
    return digest(path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file())
