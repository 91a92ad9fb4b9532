"""A teacher: an ordinary diffusion model with label dropout, averaged over training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpp.digits.schedules import TIMESTEPS
from kdpp.lab.methods import (
    Draws,
    Job,
    Task,
    cosine,
    descend,
    frozen,
    method,
    new_network,
    stretched,
    update_average,
)
from kdpp.lab.networks import TEACHER
from kdpp.lab.settings import setting


@method(
    "teacher",
    summary="a class-conditional diffusion model, for classifier-free guidance",
    source="Ho et al. 2020; Ho and Salimans 2022 (label dropout); Salimans and Ho 2022 (v)",
    teacher=False,
)
class Teacher(Task):
    """At x = x0 + σ n, t uniform over the schedule and the label dropped now and then::

        loss = |v_θ - v|²,   v = (n - σ x0) / sqrt(1 + σ²)
        or     |ε_θ - n|²,   ε_θ = (σ x_vp + v_θ) / sqrt(1 + σ²)

    The network predicts v in either case; ε only weighs the loss by 1 / (1 + σ²).
    """

    @dataclass(frozen=True)
    class Settings:
        network: dict[str, Any] = setting(TEACHER, "the network's configuration")
        loss: Literal["v", "eps"] = setting("v", "what the loss compares")
        iterations: int = setting(3000, "optimisation steps", low=1)
        batch: int = setting(512, "images in a step", low=1)
        rate: float = setting(2e-3, "the first learning rate (Adam); it falls as a cosine", low=0)
        average: float = setting(0.998, "decay of the running average (EMA)", low=0, high=1)
        dropout: float = setting(0.12, "share of labels that are dropped", low=0, high=1)

    def __init__(self, job: Job) -> None:
        self.settings: Teacher.Settings = job.settings
        self.network = new_network(self.settings.network, job)
        self.average = frozen(self.network)
        self.iterations = self.settings.iterations
        self.modules = {"network": self.network, "average": self.average}
        self.optimisers = {"network": torch.optim.Adam(self.network.parameters())}

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        images, labels = draws.batch(s.batch)
        labels = draws.dropped(labels, s.dropout)
        t = draws.uniform(len(images)) * (TIMESTEPS - 1)
        noise = draws.noise(images)
        sigma = stretched(self.network.sigma(t), images)
        root = (1 + sigma**2).sqrt()
        x_vp = (images + sigma * noise) / root
        if s.loss == "v":
            predicted, wanted = self.network(x_vp, t, labels), (noise - sigma * images) / root
        else:
            predicted, wanted = self.network.apply_model(x_vp, t, labels), noise
        loss = F.mse_loss(predicted, wanted)
        descend(self.optimisers["network"], loss, cosine(i, s.iterations, s.rate))
        update_average(self.average, self.network, s.average)
        return {"loss": loss.detach()}

    def result(self) -> tuple[nn.Module, dict[str, Any]]:
        s = self.settings
        return self.average, {
            "sampler": "euler",
            "levels": None,
            "conditions": {},
            "guidance": None,
            "evaluations": s.iterations * s.batch,
        }
