"""How good a set of images is, in features that the user names; and what seeds say of a change.

Images are clamped to the data's range first, as a viewer sees them: pixels outside it move the
Fréchet distance more than most samplers do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kdpp.digits.checkpoints import load_classifier
from kdpp.lab.plugins import load_function
from kdpp.lab.processes import single_thread

__all__ = [
    "METRICS",
    "NEIGHBOURS",
    "Estimate",
    "Features",
    "Metric",
    "Points",
    "accuracy",
    "compared",
    "data_range",
    "describe",
    "diversity",
    "estimate",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_features",
    "load_picture_features",
    "measure",
    "paired",
    "precision_recall",
    "remarks",
    "verdict",
]

Floats = NDArray[np.float64]
NEIGHBOURS = 3
"""Of precision and recall: a set needs one point more."""
BLOCK = 500  # rows of a matrix of pairs that are held at a time
BATCH = 100  # images that a feature network is given at a time


class Metric(NamedTuple):
    """A figure of `measure`: its name in tables, what is good, and what it is."""

    title: str
    better: Literal["lower", "higher"] | None
    what: str


METRICS = {
    "fd": Metric("FD", "lower", "Fréchet distance to the data (Heusel et al. 2017)"),
    "fd_teacher": Metric("FD to teacher", "lower", "to the teacher's own many-step samples"),
    "kid": Metric("KID", "lower", "unbiased squared MMD, cubic kernel (Bińkowski et al. 2018)"),
    "kid_teacher": Metric("KID to teacher", "lower", "to the teacher's own many-step samples"),
    "precision": Metric(
        "precision", "higher", "share of the images inside the data (Kynkäänniemi et al. 2019)"
    ),
    "recall": Metric(
        "recall", "higher", "share of the data inside the images (Kynkäänniemi et al. 2019)"
    ),
    "inception_score": Metric("IS", "higher", "inception score (Salimans et al. 2016)"),
    "accuracy": Metric("accuracy", "higher", "share of the images recognised as their label"),
    "diversity": Metric("diversity", None, "mean distance of two images of one class"),
}
"""What `measure` gives, in the order of tables."""


# Features -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """A map from images to vectors in which sets of images are compared.

    ``extract`` maps ``images [n, *shape]``, clamped to ``limits``, to [n, D]; ``classify``, where
    there are classes, such vectors to logits [n, C]. ``labelled``: those classes are the data's
    labels.
    """

    name: str
    extract: Callable[[Tensor], Tensor]
    limits: tuple[float, float]
    classify: Callable[[Tensor], Tensor] | None = None
    labelled: bool = False

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Floats:
        """The images' features, float64 [N, D]; ValueError where an image is not finite."""
        if not bool(images.isfinite().all()):
            raise ValueError("images must be finite, got NaN or infinite pixels")
        parts = [self.extract(part) for part in torch.split(images.clamp(*self.limits), BATCH)]
        return torch.cat(parts).double().numpy(force=True)

    @torch.no_grad()
    def probabilities(self, features: Floats) -> Floats | None:
        """Class probabilities, float64 [N, C]; None for features without classes."""
        if self.classify is None:
            return None
        logits = self.classify(torch.from_numpy(features).float())
        return logits.double().softmax(1).numpy(force=True)


def data_range(images: Tensor) -> tuple[float, float]:
    """What images are clamped to: [-1, 1] for pixels, the extremes of latents that leave it."""
    low, high = float(images.min()), float(images.max())
    return (-1.0, 1.0) if low >= -1.0 and high <= 1.0 else (low, high)


def load_features(name: str, images: Tensor, classes: int) -> Features:
    """The features of this name, for data ``images [N, *shape]`` of so many classes.

    - "digits": the last hidden layer of the classifier that ships with kdpp, 64 wide.
    - "pixels": the pixels themselves, or latents.
    - "inception:FILE": FID's Inception-v3, 2048 wide, as torch-fidelity has it. FILE holds
      torch-fidelity's weights as safetensors.
    - "clip:FOLDER": the image embedding of a CLIP model, as transformers has it. FOLDER holds
      config.json and model.safetensors.

    Nothing is downloaded. Raises ValueError for another name, for data that the features are not
    made for and for files that hold something else, FileNotFoundError where there is no file,
    ImportError where a package is missing.
    """
    limits, shape = data_range(images), tuple(images.shape[1:])
    kind, _, place = name.partition(":")
    if name == "pixels":
        return Features(name, lambda images: images.flatten(1), limits)
    if name == "digits":
        if shape != (1, 8, 8) or classes != 10 or limits != (-1.0, 1.0):
            raise ValueError(
                f"features 'digits' are made for the 8x8 digits, not for shape {list(shape)} in "
                f"[{limits[0]:g}, {limits[1]:g}] and {classes} classes; take 'pixels' …"
            )
        digits = load_classifier()
        return Features(name, digits.features, limits, digits.head, labelled=True)
    if kind in NETWORKS and place:
        if limits != (-1.0, 1.0) or len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(
                f"features {name!r} take pictures, [1 or 3, height, width] in [-1, 1]; the data "
                f"have shape {list(shape)} in [{limits[0]:g}, {limits[1]:g}]: take 'pixels'"
            )
        return NETWORKS[kind](name, Path(place))
    allowed = "'digits', 'pixels', 'inception:FILE.safetensors' or 'clip:FOLDER'"
    raise ValueError(f"features is {name!r}; it must be {allowed}")


def load_picture_features(name: str) -> Features:
    """Features of pictures (n, 3, h, w) in [-1, 1]: a network of `load_features`, or one's own.

    "module:function" or "FILE.py:function" names a function of pictures in [0, 1] that gives
    vectors, (n, D). Raises as `load_features` and `kdpp.lab.plugins.load_function`.
    """
    kind, _, place = name.partition(":")
    if kind in NETWORKS and place:
        return NETWORKS[kind](name, Path(place))
    function = load_function(name)

    def extract(images: Tensor) -> Tensor:
        return torch.as_tensor(function(images.add(1.0).div(2.0)))

    return Features(name, extract, (-1.0, 1.0))


def _inception(name: str, path: Path) -> Features:
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as source
    except ImportError as error:
        raise ImportError(
            "Inception features need torch-fidelity: pip install torch-fidelity"
        ) from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"no Inception weights at {path}")
    try:
        tensors = load_file(path)
        # Its constructor would download weights or unpickle them; it gets these in their place.
        with patch.object(source, "load_state_dict_from_url", lambda *_, **__: tensors):
            network = source.FeatureExtractorInceptionV3("inception", ["2048"])
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not hold torch-fidelity's Inception-v3 as safetensors: {error}"
        ) from error

    def extract(images: Tensor) -> Tensor:
        pixels = ((images + 1.0) * 127.5).round().to(torch.uint8)
        features: Tensor = network(pixels.expand(-1, 3, -1, -1))[0]
        return features

    def classify(features: Tensor) -> Tensor:  # without the bias, as for every inception score
        return torch.nn.functional.linear(features, network.fc.weight)

    return Features(name, extract, (-1.0, 1.0), classify)


def _clip(name: str, path: Path) -> Features:
    try:
        from transformers import CLIPVisionModelWithProjection
        from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    except ImportError as error:
        raise ImportError("CLIP features need transformers: pip install transformers") from error
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no CLIP model in {path}: it must hold config.json")
    try:
        network: Any = CLIPVisionModelWithProjection.from_pretrained(
            path, local_files_only=True, use_safetensors=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold a CLIP image model: {error}") from error
    network.eval().requires_grad_(False)
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    size = network.config.image_size

    def extract(images: Tensor) -> Tensor:
        resized = torch.nn.functional.interpolate(
            (images.float().expand(-1, 3, -1, -1) + 1.0) / 2.0,
            size=(size, size),
            mode="bicubic",
            antialias=True,
        )
        features: Tensor = network((resized.clamp(0.0, 1.0) - mean) / deviation).image_embeds
        return features

    return Features(name, extract, (-1.0, 1.0))


NETWORKS: dict[str, Callable[[str, Path], Features]] = {"inception": _inception, "clip": _clip}


# Distances ----------------------------------------------------------------------------------------


class Points:
    """Features [N, D] of a set of images, with what is asked of one set more than once.

    Raises ValueError for fewer than four rows (three neighbours and itself), or values that are not
    finite.
    """

    def __init__(self, rows: ArrayLike) -> None:
        self.rows: Floats = np.asarray(rows, dtype=np.float64)
        if self.rows.ndim != 2 or len(self.rows) <= NEIGHBOURS:
            raise ValueError(
                f"features have shape {list(self.rows.shape)}; they must be [N, D] with "
                f"N ≥ {NEIGHBOURS + 1}"
            )
        if not np.isfinite(self.rows).all():
            raise ValueError("features must be finite, got NaN or infinite values")

    @cached_property
    def radii(self) -> Floats:
        """The squared distance of every point to its third nearest other one."""
        nearest = []
        for start, squares in _squared_distances(self.rows, self.rows):
            own = np.arange(len(squares))
            squares[own, start + own] = np.inf
            for _ in range(NEIGHBOURS - 1):  # many times faster than a partition
                squares[own, squares.argmin(1)] = np.inf
            nearest.append(squares.min(1))
        return np.concatenate(nearest)

    @cached_property
    def kernel(self) -> float:
        """The mean of `_cubic` over all pairs of different points."""
        count, width = self.rows.shape
        itself = (np.square(self.rows).sum(1) / width + 1.0) ** 3
        total = _cubic_sum(self.rows, self.rows) - itself.sum()
        return float(total / (count * (count - 1)))


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """The Fréchet distance of the Gaussians fitted to features a [N, D] and b [M, D].

        |mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^{1/2} C_b C_a^{1/2})^{1/2})

    in float64, C the unbiased covariance; both roots through symmetric eigenvalues, which stay
    real where a covariance is singular.  It is a squared distance in the features' unit.
    Source: Dowson and Landau 1982; as a metric of images, Heusel et al. 2017 (arXiv 1706.08500).

    Raises ValueError for fewer than two rows, for different widths and for values not finite.
    """
    a, b = _rows("a", a), _rows("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must be equally wide, got {a.shape[1]} and {b.shape[1]}")
    cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    shift = a.mean(0) - b.mean(0)
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def inception_score(probabilities: ArrayLike) -> float:
    """`exp(mean_i KL(p_i || mean_j p_j))` of class probabilities [N, C], in one split.

    It lies between 1 and C: high where each image is one class for certain and all classes occur.
    Source: Salimans et al. 2016 (arXiv 1606.03498).

    Raises ValueError for fewer than two rows, values not finite and rows that do not sum to 1.
    """
    p = _rows("probabilities", probabilities)
    if (p < 0).any() or not np.allclose(p.sum(1), 1, atol=1e-6):
        raise ValueError("probabilities must not be negative and each row must sum to 1")
    tiny = np.finfo(np.float64).tiny  # p log p -> 0 as p -> 0
    divergence = (p * np.log(p.clip(tiny) / p.mean(0).clip(tiny))).sum(1)
    return float(np.exp(divergence.mean()))


def kernel_distance(a: Points, b: Points) -> float:
    """The kernel distance (KID): the unbiased estimate of MMD² with ``k(x, y) = (x·y/D + 1)³``.

        mean_{i≠j} k(a_i, a_j) + mean_{i≠j} k(b_i, b_j) - 2 mean_{i,j} k(a_i, b_j)

    over all pairs, not over subsets. It may be negative: its mean is 0 for two samples of one
    distribution. Source: Bińkowski et al. 2018 (arXiv 1801.01401), section 4.

    Raises ValueError where a and b are not equally wide.
    """
    _check_widths(a, b)
    across = _cubic_sum(a.rows, b.rows) / (len(a.rows) * len(b.rows))
    return float(a.kernel + b.kernel - 2.0 * across)


def precision_recall(images: Points, data: Points) -> tuple[float, float]:
    """The share of the images that lie inside the data, and of the data inside the images.

    A point is inside a set where it is no further from one of its points than that point's third
    nearest neighbour in the set. Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), eq. (1), (2).

    Raises ValueError where they are not equally wide.
    """
    _check_widths(images, data)
    precise = 0
    recalled = np.zeros(len(data.rows), dtype=bool)
    for start, squares in _squared_distances(images.rows, data.rows):
        precise += int((squares <= data.radii).any(1).sum())
        radii = images.radii[start : start + len(squares), None]
        recalled |= (squares <= radii).any(0)
    return precise / len(images.rows), float(recalled.mean())


def diversity(features: ArrayLike, labels: ArrayLike) -> float:
    """The mean Euclidean distance of two images of one class, averaged over classes.

    As LPIPS diversity, but in whole feature vectors, and not normalised. Classes of fewer than two
    images say nothing; NaN where there is no other.
    """
    rows, classes = np.asarray(features, dtype=np.float64), np.asarray(labels)
    means = []
    for label in np.unique(classes):
        own = rows[classes == label]
        count = len(own)
        if count > 1:
            total = sum(np.sqrt(squares).sum() for _, squares in _squared_distances(own, own))
            means.append(total / (count * (count - 1)))
    return float(np.mean(means)) if means else math.nan


def accuracy(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """The share of the images [N] whose likeliest class [N, C] is their label."""
    return float((np.argmax(np.asarray(probabilities), 1) == np.asarray(labels)).mean())


@contextmanager
def _single_thread() -> Iterator[None]:
    """One thread for torch and for numpy's linear algebra."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError("metrics need threadpoolctl: pip install 'kdpp[lab]'") from error
    with single_thread(), threadpool_limits(1):
        yield


@_single_thread()
def measure(
    images: Tensor,
    labels: Tensor,
    features: Features,
    data: Points,
    teacher: Points | None = None,
) -> dict[str, float]:
    """The `METRICS` of ``images [N, *shape]``, asked to be of the classes ``labels`` [N].

    ``data`` and ``teacher`` are the features of the data and of the teacher's own many-step
    samples. Features without classes give no inception score, those whose classes are not the
    data's no accuracy, classes of one image each no diversity.

    It works on one thread, since the last bits of sums depend on how many there are.

    Raises ValueError for fewer than four images, or images that are not finite; ImportError without
    threadpoolctl.
    """
    points = Points(features(images))
    scores = compared(points, data, teacher) | describe(points, labels, features)
    return {name: scores[name] for name in METRICS if name in scores}


@_single_thread()
def compared(points: Points, data: Points, teacher: Points | None = None) -> dict[str, float]:
    """Those of the `METRICS` that compare points with the data, and with the teacher's samples."""
    precision, recall = precision_recall(points, data)
    scores = {
        "fd": frechet_distance(points.rows, data.rows),
        "kid": kernel_distance(points, data),
        "precision": precision,
        "recall": recall,
    }
    if teacher is not None:
        scores["fd_teacher"] = frechet_distance(points.rows, teacher.rows)
        scores["kid_teacher"] = kernel_distance(points, teacher)
    return scores


@_single_thread()
def describe(points: Points, labels: Tensor, features: Features) -> dict[str, float]:
    """Those of the `METRICS` of ``points``, made by ``features``, that compare with nothing."""
    scores = {}
    probabilities = features.probabilities(points.rows)
    if probabilities is not None:
        scores["inception_score"] = inception_score(probabilities)
        if features.labelled:
            scores["accuracy"] = accuracy(probabilities, labels.cpu())
    spread = diversity(points.rows, labels.cpu())
    return scores if math.isnan(spread) else {**scores, "diversity": spread}


def _rows(name: str, values: Any) -> Floats:
    """The values as a finite float64 matrix of two rows or more."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) < 2:
        raise ValueError(f"{name} must be [N, D] with N >= 2, got shape {list(matrix.shape)}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values")
    return matrix


def remarks(data: Points, images: int, default: str | None) -> list[str]:
    """What a reader must know of figures from so many images, compared with these data.

    ``default`` names the features where the user has named none.
    """
    said = []
    count, width = data.rows.shape
    if default == "pixels":
        said.append(
            "no features are named, so images are compared pixel by pixel, which sees a shift of "
            "one pixel and little of what they show; inception:FILE or clip:FOLDER compare that"
        )
    if min(count, images) < 2 * width:
        said.append(
            f"the Fréchet distance is of {images:,} images to {count:,} in {width:,} dimensions, "
            "too few to know their covariance: it comes out too large. Take "
            f"{2 * width:,} or more, features of fewer dimensions, or KID, which has no such bias"
        )
    return said


def _squared_distances(a: Floats, b: Floats) -> Iterator[tuple[int, Floats]]:
    """(first row, squared distances [n, M]) of blocks of the rows of a to all rows of b."""
    norms = np.square(b).sum(1)
    for start in range(0, len(a), BLOCK):
        part = a[start : start + BLOCK]
        squares = part @ (-2.0 * b.T)
        squares += norms
        squares += np.square(part).sum(1)[:, None]
        yield start, squares.clip(0.0, out=squares)


def _cubic_sum(a: Floats, b: Floats) -> float:
    """The sum of ``(a_i·b_j/D + 1)³`` over all i and j."""
    total = 0.0
    for start in range(0, len(a), BLOCK):
        base = a[start : start + BLOCK] @ b.T
        base /= a.shape[1]
        base += 1.0
        total += float(np.vdot(base * base, base))
    return total


def _check_widths(a: Points, b: Points) -> None:
    if a.rows.shape[1] != b.rows.shape[1]:
        raise ValueError(
            f"features must be equally wide, got {a.rows.shape[1]} and {b.rows.shape[1]}"
        )


# What seeds say -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds: its standard deviation over them and its confidence interval.

    Of one seed neither is known: deviation, low and high are None.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    count: int


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean with its interval ``mean ± t s/√n``, t Student's quantile for n - 1 degrees.

    Raises ValueError for no values, values that are not finite, and a confidence outside (0, 1).
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence!r}; it must be in (0, 1)")
    if not len(values) or not all(map(math.isfinite, values)):
        raise ValueError(f"values is {values!r}; it must hold finite numbers, one or more")
    from scipy.special import stdtrit

    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Estimate(mean, None, None, None, 1)
    deviation = float(np.std(values, ddof=1))
    half = float(stdtrit(count - 1, (1.0 + confidence) / 2.0)) * deviation / math.sqrt(count)
    return Estimate(mean, deviation, mean - half, mean + half, count)


def paired(values: Sequence[float], base: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The `estimate` of the changes ``values[i] - base[i]``, entry i of both from one seed.

    What both share, the initial noise above all, drops out: small changes can be told from noise.
    Raises ValueError for unequal lengths, and as `estimate`.
    """
    if len(values) != len(base):
        raise ValueError(f"{len(values)} values and {len(base)} to compare with; give pairs")
    return estimate([value - other for value, other in zip(values, base)], confidence)


def verdict(change: Estimate) -> Literal["higher", "lower", "none seen"]:
    """Whether a change was seen: its interval leaves out 0. Of a single seed nothing is seen."""
    if change.low is None or change.high is None or change.low <= 0.0 <= change.high:
        return "none seen"
    return "higher" if change.mean > 0.0 else "lower"
