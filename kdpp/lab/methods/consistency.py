"""Consistency distillation (LCM), and the same with a low-rank student over the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpp.digits.networks import VNetwork, guided_denoise
from kdpp.digits.schedules import TIMESTEPS
from kdpp.lab.methods import (
    Draws,
    Job,
    Task,
    check_rising,
    cosine,
    descend,
    frozen,
    method,
    plain_teacher,
    seeded,
    stretched,
    student_network,
    update_average,
)
from kdpp.lab.networks import SMALL
from kdpp.lab.settings import setting


@dataclass(frozen=True)
class Distillation:
    """What both methods have."""

    guidance: float = setting(2.0, "the CFG scale w baked into the student")
    skip: float = setting(20.0, "timesteps between the two ends of the teacher's step", low=0)
    loss: Literal["squared", "huber"] = setting("squared", "how the two ends are compared")
    huber: float = setting(1e-3, "c of the pseudo-Huber loss, sqrt(d² + c²) - c", low=1e-8)
    iterations: int = setting(1000, "optimisation steps", low=1)
    batch: int = setting(512, "images in a step", low=1)
    rate: float = setting(2e-3, "the first learning rate (Adam); it falls as a cosine", low=0)
    average: float = setting(0.95, "decay of the target's running average (EMA)", low=0, high=1)
    dropout: float = setting(0.12, "share of labels that are dropped", low=0, high=1)


@method(
    "consistency",
    summary="one function from every point of the teacher's trajectories to their end (LCM)",
    source="Song et al. 2023; Luo et al. 2023 (LCM), Algorithm 1",
)
class Consistency(Task):
    """From x = x0 + σ_t n the teacher, under CFG, takes one DDIM step to s = t - skip::

        D_θ(x, t, w) = D_ema(x_s, s, w),   D_θ(x, 0) = x

    Where s < 0 the step ends at σ = 0, and the teacher's estimate itself is the target. The CFG
    scale is `guidance`, or 1 + w with w drawn from `w_range` and then an input of the student.
    Timesteps lie off any grid, and the network meets the boundary condition as it stands.

    Raises ValueError for a teacher that has its guidance inside it.
    """

    @dataclass(frozen=True)
    class Settings(Distillation):
        network: dict[str, Any] | None = setting(
            SMALL, "the student's network; none: the teacher's, from its weights"
        )
        w_range: tuple[float, ...] = setting(
            (), "least and most w (the CFG scale minus 1), an input then; empty: `guidance`", low=-1
        )

        def __post_init__(self) -> None:
            if self.w_range:
                check_rising("w_range", self.w_range)

    def __init__(self, job: Job) -> None:
        self.settings = job.settings
        self.teacher = plain_teacher(job).network
        self.network = self.student(job)
        self.average = frozen(self.network)
        self.iterations = self.settings.iterations
        self.modules = {"network": self.network, "average": self.average}
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimisers = {"network": torch.optim.Adam(trained)}

    @property
    def w_range(self) -> tuple[float, ...]:
        """The least and the most of w, empty where it is no input."""
        return tuple(self.settings.w_range)

    def student(self, job: Job) -> VNetwork:
        """The network to be trained."""
        return student_network(job, self.settings.network, ("w",) if self.w_range else ())

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        images, labels = draws.batch(s.batch)
        labels = draws.dropped(labels, s.dropout)
        t = draws.uniform(len(images)) * (TIMESTEPS - 1)
        x = images + stretched(self.network.sigma(t), images) * draws.noise(images)
        conditions = {}
        if self.w_range:
            low, high = self.w_range
            conditions["w"] = low + (high - low) * draws.uniform(len(images))
        with torch.no_grad():
            target = self._target(x, t, labels, conditions)
        loss = self._distance(self.network.denoise(x, t, labels, **conditions), target)
        descend(self.optimisers["network"], loss, cosine(i, s.iterations, s.rate))
        update_average(self.average, self.network, s.average)
        return {"loss": loss.detach()}

    def result(self) -> tuple[nn.Module, dict[str, Any]]:
        s = self.settings
        return self.average, {
            "sampler": "lcm",
            "levels": None,
            "conditions": {"w": list(self.w_range)} if self.w_range else {},
            "guidance": None if self.w_range else s.guidance,
            "evaluations": 4 * s.iterations * s.batch,
        }

    def _target(
        self, x: Tensor, t: Tensor, labels: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """D_ema at the end of the teacher's step from (x, t)."""
        scale = stretched(1 + conditions["w"], x) if conditions else self.settings.guidance
        estimate = guided_denoise(self.teacher, x, t, labels, scale)
        s = t - self.settings.skip
        ended = stretched(s < 0, x)
        s = s.clamp(min=0)
        ratio = stretched(self.network.sigma(s) / self.network.sigma(t), x)
        x_s = estimate + ratio * (x - estimate)
        return torch.where(ended, estimate, self.average.denoise(x_s, s, labels, **conditions))

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        if self.settings.loss == "squared":
            return F.mse_loss(a, b)
        c = self.settings.huber
        each: Tensor = ((a - b).square() + c**2).sqrt() - c
        return each.mean()


@method(
    "lora-consistency",
    summary="LCM as a low-rank change of the frozen teacher (LCM-LoRA); saved merged",
    source="Luo et al. 2023 (LCM-LoRA); Hu et al. 2021 (LoRA)",
)
class LoRAConsistency(Consistency):
    """`Consistency` where each linear layer and convolution W of the teacher becomes
    ``W + alpha/rank · B A``, and A and B alone, of this rank, are trained.

    The checkpoint holds the sums, so that it is a network as any other.

    Raises ImportError where peft is missing.
    """

    @dataclass(frozen=True)
    class Settings(Distillation):
        iterations: int = setting(500, "optimisation steps", low=1)
        rank: int = setting(16, "of the change of each layer", low=1)
        alpha: float = setting(16.0, "the change is scaled by alpha / rank")

    w_range = ()

    def student(self, job: Job) -> VNetwork:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError('a low-rank student needs peft: pip install "kdpp[lab]"') from error
        layers = [
            name
            for name, layer in self.teacher.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        ]
        config = LoraConfig(
            r=self.settings.rank, lora_alpha=self.settings.alpha, target_modules=layers
        )
        student = frozen(self.teacher)
        with seeded(job.seed):
            inject_adapter_in_model(config, student)  # in place
        return student

    def result(self) -> tuple[nn.Module, dict[str, Any]]:
        from peft.tuners.lora import LoraLayer

        merged = frozen(self.teacher)
        weights = dict(merged.named_parameters())
        for name, layer in self.average.named_modules():
            if isinstance(layer, LoraLayer):
                adapted: Any = layer
                weights[f"{name}.weight"].add_(adapted.get_delta_weight("default"))
        return merged, super().result()[1]
