"""A teacher: an ordinary diffusion model with label dropout, averaged over training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kdpp.lab.diffusion import v_target
from kdpp.lab.methods import (
    Draws,
    Method,
    Training,
    cosine,
    descend,
    frozen,
    method,
    new_network,
    update_average,
)
from kdpp.lab.models import Usage
from kdpp.lab.networks import TEACHER, VNetwork
from kdpp.lab.settings import setting


@method(
    "teacher",
    summary="a class-conditional diffusion model, for classifier-free guidance",
    source="Ho et al. 2020; Ho and Salimans 2022 (label dropout); Salimans and Ho 2022 (v)",
    teacher=False,
)
class Teacher(Method):
    """At x = x0 + σ n, the label dropped now and then::

        loss = |v_θ - v|²,   v = (n - σ x0) / sqrt(1 + σ²)
        or     |ε_θ - n|²,   ε_θ = (σ x_vp + v_θ) / sqrt(1 + σ²)

    The network predicts v in either case; ε only weighs the loss by 1 / (1 + σ²). Levels are those
    of timesteps uniform over the schedule, or log-normal. With the latter and v this is EDM's
    training (Karras et al. 2022, section 5) for data of σ_data = 1: v is its F with the other sign,
    and its weight λ(σ) is the one that v has.
    """

    @dataclass(frozen=True)
    class Settings:
        network: dict[str, Any] = setting(TEACHER, "the network's configuration")
        loss: Literal["v", "eps"] = setting("v", "what the loss compares")
        lognormal: tuple[float, float] | None = setting(
            None, "mean and deviation of ln σ, as EDM draws levels; none: uniform timesteps"
        )
        iterations: int = setting(3000, "optimisation steps", low=1)
        batch: int = setting(512, "images in a step", low=1)
        rate: float = setting(2e-3, "the first learning rate (Adam); it falls as a cosine", low=0)
        average: float = setting(0.998, "decay of the running average (EMA)", low=0, high=1)
        dropout: float = setting(0.12, "share of labels that are dropped", low=0, high=1)

    def __init__(self, training: Training) -> None:
        self.settings: Teacher.Settings = training.settings
        self.network = new_network(self.settings.network, training)
        self.average = frozen(self.network)
        self.iterations = self.settings.iterations
        self.modules = {"network": self.network, "average": self.average}
        self.optimisers = {"network": torch.optim.Adam(self.network.parameters())}

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        images, labels = draws.batch(s.batch)
        labels = draws.dropped(labels, s.dropout)
        t = self._timesteps(draws, len(images))
        noise = draws.noise(images)
        x_vp, v = v_target(images, noise, self.network.sigma(t))
        if s.loss == "v":
            loss = F.mse_loss(self.network(x_vp, t, labels), v)
        else:
            loss = F.mse_loss(self.network.apply_model(x_vp, t, labels), noise)
        descend(self.optimisers["network"], loss, cosine(i, s.iterations, s.rate))
        update_average(self.average, self.network, s.average)
        return {"loss": loss.detach()}

    def _timesteps(self, draws: Draws, n: int) -> Tensor:
        """Fractional timesteps (n,), those of the levels that the settings ask for."""
        uniform = draws.timesteps(n)
        if self.settings.lognormal is None:
            return uniform
        mean, deviation = self.settings.lognormal
        return self.network.timestep((mean + deviation * draws.noise(uniform)).exp())

    def result(self) -> tuple[VNetwork, Usage]:
        return self.average, Usage(sampler="euler")
