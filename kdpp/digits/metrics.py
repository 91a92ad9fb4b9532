"""How good a set of digits is: Fréchet distance, inception score, accuracy of the asked digit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from kdpp.lab.features import Floats
from kdpp.lab.metrics import frechet_distance, inception_score
from kdpp.lab.networks import Classifier


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
