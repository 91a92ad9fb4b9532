"""A classifier of the data: its last hidden layer is what samples are compared in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kdpp.lab.methods import Draws, Method, Training, cosine, descend, method, seeded
from kdpp.lab.models import Usage
from kdpp.lab.networks import Classifier
from kdpp.lab.settings import setting


@method(
    "classifier",
    summary="a classifier of the data, in whose features samples are measured",
    source="as FID's Inception (Heusel et al. 2017), for data that it does not know",
    teacher=False,
)
class ClassifierTraining(Method):
    """Cross-entropy of noised images, ``x0 + noise·n``, labels smoothed (Szegedy et al. 2016).

    The noise is against overfitting, the smoothing keeps features and certainty in bounds.
    """

    @dataclass(frozen=True)
    class Settings:
        channels: int = setting(16, "of the first convolution; the second has twice as many", low=1)
        features: int = setting(64, "width of the last hidden layer", low=1)
        iterations: int = setting(800, "optimisation steps", low=1)
        batch: int = setting(512, "images in a step", low=1)
        rate: float = setting(2e-3, "the first learning rate (Adam); it falls as a cosine", low=0)
        noise: float = setting(0.2, "standard deviation of the noise on the images", low=0)
        smoothing: float = setting(0.05, "share of a label that goes to all classes", low=0, high=1)

    def __init__(self, training: Training) -> None:
        self.settings: ClassifierTraining.Settings = training.settings
        sizes = {"channels": self.settings.channels, "features": self.settings.features}
        with seeded(training.seed):
            network = Classifier(training.data.shape, training.data.classes, **sizes)
        self.network = network.to(training.device)
        self.iterations = self.settings.iterations
        self.modules = {"network": self.network}
        self.optimisers = {"network": torch.optim.Adam(self.network.parameters())}

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        images, labels = draws.batch(s.batch)
        logits = self.network(images + s.noise * draws.noise(images))
        loss = F.cross_entropy(logits, labels, label_smoothing=s.smoothing)
        descend(self.optimisers["network"], loss, cosine(i, s.iterations, s.rate))
        return {"loss": loss.detach()}

    def result(self) -> tuple[Classifier, Usage]:
        return self.network, Usage(sampler="classify")
