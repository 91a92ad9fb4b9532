"""How good a set of digits is: Frechet distance, inception score, accuracy of the asked digit."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kdpp.digits.networks import Classifier

Floats = NDArray[np.float64]


class Scores(NamedTuple):
    """The three figures of one set of images."""

    frechet_distance: float
    inception_score: float
    accuracy: float


def as_viewed(images: Tensor) -> Tensor:
    """Return the images as a viewer sees them: clamped to the data's range, [-1, 1].

    Pixels outside it move the Frechet distance more than most samplers do, and nobody sees them.
    """
    return images.clamp(-1, 1)


def measure(images: Tensor, labels: Tensor, classifier: Classifier, reference: ArrayLike) -> Scores:
    """Score images [N, 1, 8, 8], asked to be the digits `labels` [N], as a viewer sees them.

    `reference` [M, D] holds the classifier's features of the data (`features_of`).
    Raises ValueError where an image is not finite, and for what the single metrics refuse.
    """
    features = features_of(images, classifier)
    with torch.no_grad():
        logits = classifier.head(torch.from_numpy(features).to(images))
    return Scores(
        frechet_distance(features, reference),
        inception_score(logits.double().softmax(1).numpy(force=True)),
        float((logits.argmax(1) == labels).double().mean()),
    )


def features_of(images: Tensor, classifier: Classifier) -> Floats:
    """Return the classifier's features, float64 [N, D], of the images as a viewer sees them.

    Raises ValueError where an image is not finite: clamping would make infinities pass.
    """
    if not bool(images.isfinite().all()):
        raise ValueError("images must be finite, got NaN or infinite pixels")
    with torch.no_grad():
        return classifier.features(as_viewed(images)).double().numpy(force=True)


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Return the Frechet distance of the Gaussians fitted to features a [N, D] and b [M, D].

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
    """Return `exp(mean_i KL(p_i || mean_j p_j))` of class probabilities [N, C], in one split.

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


def _rows(name: str, values: Any) -> Floats:
    """Return the values as a finite float64 matrix of two rows or more."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) < 2:
        raise ValueError(f"{name} must be [N, D] with N >= 2, got shape {list(matrix.shape)}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values")
    return matrix
