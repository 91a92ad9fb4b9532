"""How good a set of images is, in features that the user names (`kdpp.lab.features`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from kdpp.lab.features import Features, Floats
from kdpp.lab.processes import single_thread

__all__ = [
    "LEAST",
    "METRICS",
    "Metric",
    "Overlap",
    "Points",
    "accuracy",
    "compared",
    "describe",
    "diversity",
    "extrapolated",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "measure",
    "memorised",
    "overlap",
    "remarks",
]

NEIGHBOURS, DENSE = 3, 5
"""Neighbours that make a point's ball: of precision and recall, and of density and coverage. Both
are their papers' choice."""
LEAST = NEIGHBOURS + 1
"""Points of a set, at least. Of fewer than six, density and coverage take balls without end."""
BLOCK = 500  # rows of a matrix of pairs that are held at a time


class Metric(NamedTuple):
    """A figure of `measure`: its name in tables, what is good, what it is, and compared to what."""

    title: str
    better: Literal["lower", "higher"] | None
    what: str
    to: Literal["data", "teacher"] | None = None


METRICS = {
    "fd": Metric("FD", "lower", "Fréchet distance to the data (Heusel et al. 2017)", "data"),
    "fd_infinity": Metric(
        "FD∞", "lower", "FD extrapolated to infinitely many images (Chong and Forsyth 2020)", "data"
    ),
    "kid": Metric(
        "KID", "lower", "unbiased squared MMD, cubic kernel (Bińkowski et al. 2018)", "data"
    ),
    "fd_teacher": Metric(
        "FD to teacher", "lower", "to the teacher's own many-step samples", "teacher"
    ),
    "kid_teacher": Metric(
        "KID to teacher", "lower", "to the teacher's own many-step samples", "teacher"
    ),
    "precision": Metric(
        "precision",
        "higher",
        "share of the images inside the data (Kynkäänniemi et al. 2019)",
        "data",
    ),
    "recall": Metric(
        "recall", "higher", "share of the data inside the images (Kynkäänniemi et al. 2019)", "data"
    ),
    "density": Metric(
        "density",
        "higher",
        "how many of the data's balls hold an image (Naeem et al. 2020)",
        "data",
    ),
    "coverage": Metric(
        "coverage",
        "higher",
        "share of the data's balls that hold an image (Naeem et al. 2020)",
        "data",
    ),
    "memorised": Metric(
        "memorised",
        "lower",
        "share of the images nearer to the training images than to as many unseen ones: "
        "0.5 where nothing is copied",
        "data",
    ),
    "inception_score": Metric("IS", "higher", "inception score (Salimans et al. 2016)"),
    "accuracy": Metric("accuracy", "higher", "share of the images recognised as their label"),
    "diversity": Metric("diversity", None, "mean distance of two images of one class"),
}
"""What `measure` gives, in the order of tables."""


# Distances ----------------------------------------------------------------------------------------


class Points:
    """Features [N, D] of a set of images, with what is asked of one set more than once.

    Raises ValueError for fewer than four rows (three neighbours and itself), or values that are not
    finite.
    """

    def __init__(self, rows: ArrayLike) -> None:
        self.rows: Floats = np.asarray(rows, dtype=np.float64)
        if self.rows.ndim != 2 or len(self.rows) < LEAST:
            raise ValueError(
                f"features have shape {list(self.rows.shape)}; they must be [N, D] with N ≥ {LEAST}"
            )
        if not np.isfinite(self.rows).all():
            raise ValueError("features must be finite, got NaN or infinite values")

    @cached_property
    def nearest(self) -> Floats:
        """The squared distances [N, 5] of every point to its nearest other ones."""
        found = np.empty((len(self.rows), DENSE))
        for start, squares in _squared_distances(self.rows, self.rows):
            own = np.arange(len(squares))
            squares[own, start + own] = np.inf
            for k in range(DENSE):  # many times faster than a partition
                place = squares.argmin(1)
                found[start + own, k] = squares[own, place]
                squares[own, place] = np.inf
        return found

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


def extrapolated(distance: float, a: ArrayLike, b: ArrayLike) -> float:
    """The `frechet_distance` of a to b, which is ``distance``, for infinitely many rows of a.

    It is too large by about c/N for N rows, because the covariance of few rows fits them. From the
    whole of a and from its two halves follows ``2 FD(a) - (FD(first) + FD(second)) / 2``, which is
    free of c/N. The rows must be in no order: halves of different classes would be farther from b.
    Chong and Forsyth 2020 (arXiv 1911.07023) fit the same line through 15 random parts; halves that
    share nothing scatter less. What b's own number of rows does is left in.

    Raises ValueError as `frechet_distance`, for fewer than four rows of a.
    """
    rows = _rows("a", a)
    middle = len(rows) // 2
    halves = [frechet_distance(half, b) for half in (rows[:middle], rows[middle:])]
    return 2.0 * distance - sum(halves) / 2.0


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


class Overlap(NamedTuple):
    """How far images and data lie in the same places, see `overlap`."""

    precision: float
    recall: float
    density: float
    coverage: float


def overlap(images: Points, data: Points) -> Overlap:
    """Precision, recall, density and coverage.

    A point's ball reaches to its k-th nearest neighbour in its own set. Precision is the share of
    the images that lie in a ball of the data, recall the share of the data that lie in a ball of
    the images, k = 3. Density is the mean, over images, of the number of the data's balls that hold
    it, divided by k; coverage the share of the data's balls that hold an image, k = 5.

    Sources: Kynkäänniemi et al. 2019 (arXiv 1904.06991), eq. (1), (2); Naeem et al. 2020
    (arXiv 2002.09797), eq. (2), (3).

    Raises ValueError where they are not equally wide.
    """
    _check_widths(images, data)
    precise = held = 0
    recalled, covered = np.zeros((2, len(data.rows)), dtype=bool)
    ours, theirs = images.nearest[:, NEIGHBOURS - 1], data.nearest[:, NEIGHBOURS - 1]
    for start, squares in _squared_distances(images.rows, data.rows):
        precise += int((squares <= theirs).any(1).sum())
        recalled |= (squares <= ours[start : start + len(squares), None]).any(0)
        dense = squares <= data.nearest[:, DENSE - 1]
        held += int(dense.sum())
        covered |= dense.any(0)
    count = len(images.rows)
    return Overlap(
        precise / count, float(recalled.mean()), held / (DENSE * count), float(covered.mean())
    )


def memorised(images: Points, training: Points, unseen: Points) -> float:
    """The share of the images that are nearer to a training image than to any unseen one.

    With equally many of both it is 0.5 for images that owe nothing to single training images.
    A tie counts half. As the test of Meehan et al. 2020 (arXiv 2004.05675), as a share.

    Raises ValueError for sets of unequal size or width.
    """
    if training.rows.shape != unseen.rows.shape:
        raise ValueError(
            f"there are {training.rows.shape} training and {unseen.rows.shape} unseen features; "
            "give as many of both, equally wide"
        )
    _check_widths(images, unseen)
    near = [
        np.concatenate([squares.min(1) for _, squares in _squared_distances(images.rows, rows)])
        for rows in (training.rows, unseen.rows)
    ]
    return float((0.5 * (np.sign(near[1] - near[0]) + 1.0)).mean())


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
    training: Points | None = None,
) -> dict[str, float]:
    """The `METRICS` of ``images [N, *shape]``, asked to be of the classes ``labels`` [N].

    ``data`` and ``teacher`` are the features of the data and of the teacher's own many-step
    samples; ``training`` those of as many training images, where the data are unseen ones. Features
    without classes give no inception score, those whose classes are not the data's no accuracy,
    classes of one image each no diversity.

    It works on one thread, since the last bits of sums depend on how many there are.

    Raises ValueError for fewer than four images, or images that are not finite; ImportError without
    threadpoolctl.
    """
    points = Points(features(images))
    scores = compared(points, data, teacher, training) | describe(points, labels, features)
    return {name: scores[name] for name in METRICS if name in scores}


@_single_thread()
def compared(
    points: Points, data: Points, teacher: Points | None = None, training: Points | None = None
) -> dict[str, float]:
    """Those of the `METRICS` that compare points with the data, and with the teacher's samples."""
    distance = frechet_distance(points.rows, data.rows)
    scores = {
        "fd": distance,
        "fd_infinity": extrapolated(distance, points.rows, data.rows),
        "kid": kernel_distance(points, data),
        **overlap(points, data)._asdict(),
    }
    if teacher is not None:
        scores["fd_teacher"] = frechet_distance(points.rows, teacher.rows)
        scores["kid_teacher"] = kernel_distance(points, teacher)
    if training is not None:
        scores["memorised"] = memorised(points, training, data)
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


def remarks(data: Points, images: int, default: str | None, part: str = "test") -> list[str]:
    """What a reader must know of figures from so many images, compared with these data.

    ``default`` names the features where the user has named none; ``part`` says which images the
    data are, see `kdpp.lab.statistics.Against`.
    """
    said = []
    count, width = data.rows.shape
    if default == "pixels":
        said.append(
            "no features are named, so images are compared pixel by pixel, which sees a shift of "
            "one pixel and little of what they show; inception:FILE, clip:FOLDER or timm:FOLDER "
            "compare that"
        )
    if part == "training":
        said.append(
            "the data have no test images, so distances are to those that networks were trained "
            "on, and a copy of these is the best there is; name others (test)"
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
