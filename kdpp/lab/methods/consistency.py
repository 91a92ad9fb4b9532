"""Consistency distillation (LCM), and the same with a low-rank student over the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpp.lab.diffusion import cfg, noised, stretched
from kdpp.lab.methods import (
    Draws,
    Method,
    Training,
    check_range,
    cosine,
    descend,
    frozen,
    method,
    plain_teacher,
    seeded,
    student_network,
    update_average,
)
from kdpp.lab.models import Usage
from kdpp.lab.networks import CFG_MINUS_ONE, SMALL, VNetwork
from kdpp.lab.settings import setting

__all__ = ["Consistency", "LoRAConsistency", "consistency_target"]


def consistency_target(
    teacher: VNetwork,
    average: VNetwork,
    x: Tensor,
    t: Tensor,
    labels: Tensor,
    scale: Tensor | float,
    skip: float,
    **conditions: Tensor,
) -> Tensor:
    """``D_ema(x_s, s)``, x_s the end of the teacher's guided DDIM step from (x, t) to s = t - skip.

    Where s < 0 the step ends at σ = 0, and the teacher's estimate itself is the target.

    Args:
        x: (B, *shape), at the timesteps t (B,).
        scale: the CFG scale, one for all or one for each sample (B,).
        conditions: the average's further inputs.
    """
    estimate = cfg(teacher.denoise, labels, teacher.classes, scale, as_written=True)(x, t)
    s = t - skip
    ended = stretched(s < 0, x)
    s = s.clamp(min=0)
    ratio = stretched(average.sigma(s) / average.sigma(t), x)
    x_s = estimate + ratio * (x - estimate)  # `ddim` rounds otherwise, see `cfg_mix`
    return torch.where(ended, estimate, average.denoise(x_s, s, labels, **conditions))


@dataclass(frozen=True)
class Distillation:
    """What both methods have."""

    guidance: float = setting(2.0, "the CFG scale that the student has built in")
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
class Consistency(Method):
    """From x = x0 + σ_t n the teacher, under CFG, takes one DDIM step to s = t - skip::

        D_θ(x, t) = D_ema(x_s, s),   D_θ(x, 0) = x

    Where s < 0 the step ends at σ = 0, and the teacher's estimate itself is the target. The CFG
    scale is ``guidance``, or drawn from ``guidance_range``; it is an input of the student then.
    Timesteps lie off any grid, and the network meets the boundary condition as it stands.

    Raises ValueError for a teacher that has its guidance inside it.
    """

    @dataclass(frozen=True)
    class Settings(Distillation):
        network: dict[str, Any] | None = setting(
            SMALL, "the student's network; none: the teacher's, from its weights"
        )
        guidance_range: tuple[float, float] | None = setting(
            None, "least and most CFG scale, an input then; none: `guidance` is built in", low=0
        )

        def __post_init__(self) -> None:
            if self.guidance_range:
                check_range("guidance_range", self.guidance_range)

    def __init__(self, training: Training) -> None:
        self.settings = training.settings
        self.teacher = plain_teacher(training).network
        self.network = self.student(training)
        self.average = frozen(self.network)
        self.iterations = self.settings.iterations
        self.modules = {"network": self.network, "average": self.average}
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimisers = {"network": torch.optim.Adam(trained)}

    @property
    def conditions(self) -> dict[str, tuple[float, float]]:
        """The least and most of the student's further input, if it has one."""
        scales = getattr(self.settings, "guidance_range", None)
        return {CFG_MINUS_ONE: (scales[0] - 1.0, scales[1] - 1.0)} if scales else {}

    def student(self, training: Training) -> VNetwork:
        """The network to be trained."""
        return student_network(training, self.settings.network, list(self.conditions))

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        images, labels = draws.batch(s.batch)
        labels = draws.dropped(labels, s.dropout)
        t = draws.timesteps(len(images))
        x = noised(images, self.network.sigma(t), draws.noise(images))
        drawn = {
            name: draws.between(*bounds, len(images)) for name, bounds in self.conditions.items()
        }
        scale = 1 + drawn[CFG_MINUS_ONE] if drawn else s.guidance
        with torch.no_grad():
            target = consistency_target(
                self.teacher, self.average, x, t, labels, scale, s.skip, **drawn
            )
        loss = self._distance(self.network.denoise(x, t, labels, **drawn), target)
        self.learn(i, loss)
        return {"loss": loss.detach()}

    def learn(self, i: int, loss: Tensor) -> None:
        """Step i of the optimiser, and of the average."""
        s = self.settings
        descend(self.optimisers["network"], loss, cosine(i, s.iterations, s.rate))
        update_average(self.average, self.network, s.average)

    def result(self) -> tuple[VNetwork, Usage]:
        built_in = None if self.conditions else self.settings.guidance
        return self.average, Usage(sampler="lcm", conditions=self.conditions, guidance=built_in)

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

    def student(self, training: Training) -> VNetwork:
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
        with seeded(training.seed):
            inject_adapter_in_model(config, student)  # in place
        return student

    def result(self) -> tuple[VNetwork, Usage]:
        from peft.tuners.lora import LoraLayer

        merged = frozen(self.teacher)
        weights = dict(merged.named_parameters())
        for name, layer in self.average.named_modules():
            if isinstance(layer, LoraLayer):
                adapted: Any = layer
                weights[f"{name}.weight"].add_(adapted.get_delta_weight("default"))
        return merged, super().result()[1]
