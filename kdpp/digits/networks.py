"""The digits' networks: the residual MLP (teacher and student) at their size, and a classifier."""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor, nn

from kdpp.digits.data import CLASSES, IMAGE_SHAPE
from kdpp.lab.networks import ResMLP, whole_sizes

PIXELS = math.prod(IMAGE_SHAPE)


def digits_mlp(width: int, hidden: int, blocks: int) -> ResMLP:
    """A teacher or student of the digits, newly initialised; ValueError as in `ResMLP`."""
    return ResMLP(IMAGE_SHAPE, CLASSES, width=width, hidden=hidden, blocks=blocks)


class Classifier(nn.Module):
    """The digit classifier: two convolutions, a feature layer and a linear head."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.config = whole_sizes(channels=channels, features=features)
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * channels * PIXELS // 4, features),
            nn.SiLU(),
        )
        self.head = nn.Linear(features, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate layer [B, features] of images x [B, 1, 8, 8]."""
        return cast(Tensor, self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, 10] of images x [B, 1, 8, 8]."""
        return cast(Tensor, self.head(self.features(x)))
