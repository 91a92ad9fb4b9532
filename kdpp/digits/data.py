"""scikit-learn's handwritten digits as tensors, with one fixed split."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
NULL_CLASS = CLASSES
"""The label that stands for "no label": the unconditional half of classifier-free guidance."""

IMAGE_SHAPE = (1, 8, 8)
Split = Literal["all", "train", "held_out"]


def load_data(split: Split = "all") -> tuple[Tensor, Tensor]:
    """Return `(images, labels)`: float32 [N, 1, 8, 8] in [-1, 1] and int64 [N].

    The pixels are 0..16 in the source; here they are `p / 8 - 1`.  The split is a rule and not a
    draw: within each class every fourth image is held out (445 of 1,797).  It separates images,
    not writers: a writer may have digits on both sides.

    Source: `sklearn.datasets.load_digits`, the test part of the UCI "Optical Recognition of
    Handwritten Digits" (Alpaydin and Kaynak, 1998).

    Raises ValueError for an unknown split, ModuleNotFoundError where scikit-learn is missing.
    """
    if split not in ("all", "train", "held_out"):
        raise ValueError(f"split must be 'all', 'train' or 'held_out', got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the digits need scikit-learn: pip install "kdpp[lab]"', name="sklearn"
        ) from error
    source = load_digits()
    images = torch.from_numpy(source.images / 8 - 1).float().unsqueeze(1)
    labels = torch.from_numpy(np.asarray(source.target)).long()
    if split == "all":
        return images, labels
    chosen = _held_out(labels) if split == "held_out" else ~_held_out(labels)
    return images[chosen], labels[chosen]


def _held_out(labels: Tensor) -> Tensor:
    """Return a mask that holds every fourth image of each class."""
    members = torch.nn.functional.one_hot(labels, CLASSES)
    rank = (members.cumsum(0) * members).sum(1)  # 1 for the first image of its class
    return rank % 4 == 0
