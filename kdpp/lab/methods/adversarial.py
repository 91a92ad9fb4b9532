"""Adversarial diffusion distillation: real or made, judged on the teacher's own features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpp.lab.diffusion import noised, stretched
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
from kdpp.lab.models import Model, Usage
from kdpp.lab.networks import VEDenoiser, VNetwork
from kdpp.lab.schedules import TIMESTEPS, Grid, grid
from kdpp.lab.settings import setting

__all__ = ["Adversarial", "Discriminator", "features"]

BLOCKS: Mapping[str, Callable[[Any], Sequence[nn.Module]]] = {
    "resmlp": lambda network: list(network.blocks),
    "unet": lambda network: [*network.unet.down_blocks, network.unet.mid_block],
}
"""Of each kind of network, the parts whose answers are its features."""


def features(teacher: Model, x: Tensor, sigma: Tensor, cond: Tensor) -> list[Tensor]:
    """What the parts of the teacher's network (`BLOCKS`) answer for x (B, *shape) at σ (B,).

    Each is (B, channels): the mean over places where there are some.
    """
    found: list[Tensor] = []

    def keep(part: nn.Module, given: Any, answer: Any) -> None:
        h = answer[0] if isinstance(answer, tuple) else answer
        found.append(h.flatten(2).mean(2) if h.ndim > 2 else h)

    parts = BLOCKS[teacher.network.config["kind"]](teacher.network)
    hooks = [part.register_forward_hook(keep) for part in parts]
    try:
        teacher.denoiser(x, sigma, cond=cond)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class Discriminator(nn.Module):
    """A head on each of a frozen teacher's `features`: is an image, noised, a real one?

    The teacher is no part of the module; the heads alone are trained.

    Args:
        example: (1, *shape), an image, to learn the features' sizes from.
        width: of the heads.

    Source: Sauer et al. 2023, Adversarial Diffusion Distillation; on the teacher's own features, at
    a drawn noise level: Sauer et al. 2024, Fast High-Resolution Image Synthesis with Latent ADD.
    """

    def __init__(self, teacher: Model, example: Tensor, width: int) -> None:
        super().__init__()
        self.features = partial(features, teacher)
        label = torch.zeros(1, dtype=torch.int64, device=example.device)
        sizes = [f.shape[1] for f in self.features(example, example.new_ones(1), label)]
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(size), nn.Linear(size, width), nn.SiLU(), nn.Linear(width, 1)
            )
            for size in sizes
        )

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        """Each head's verdict, (B, heads), on x (B, *shape) at σ (B,): high for real."""
        found = self.features(x, sigma, cond)
        return torch.cat([head(f) for head, f in zip(self.heads, found)], dim=1)


@method(
    "adversarial",
    summary="a discriminator on the teacher's features, and the teacher's estimate (ADD, Turbo)",
    source="Sauer et al. 2023, Adversarial Diffusion Distillation; Sauer et al. 2024, Latent ADD",
)
class Adversarial(Method):
    """From a real image x, noised to one of its levels, the student makes one to pass for real::

        x0   = D_θ(x + σ_k n_k, σ_k)
        f:     mean relu(1 - f(x + σ n)) + mean relu(1 + f(x0 + σ n'))
        θ:     -mean f(x0 + σ n'') + weight·α·|x0 - D_ψ^w(x0 + s m)|²,   α² = 1/(1+s²)

    f is the `Discriminator`, D_ψ the teacher, whose estimate is a target without a gradient, as in
    score distillation. σ is drawn over ``judged``, s over the whole schedule. The student starts
    from the teacher's weights.

    It is f that does it: of itself the other term draws all images of a class to its mode. With as
    few images as the digits f soon knows them, and the student gets worse again: the iterations end
    where it is best.

    Raises ValueError for a teacher that has its guidance inside it.
    """

    @dataclass(frozen=True)
    class Settings:
        steps: int = setting(4, "steps of the student")
        grid: Grid = setting("divided", "the levels: trailing, or with the tail divided by 2.5")
        guidance: float = setting(2.0, "the teacher's CFG scale (1: none)")
        weight: float = setting(0.3, "of the distillation term", low=0)
        judged: tuple[float, float] = setting(
            (100.0, 800.0), "timesteps at which f looks", low=0, high=TIMESTEPS - 1
        )
        width: int = setting(64, "of the discriminator's heads", low=1)
        iterations: int = setting(
            400, "optimisation steps, of student and discriminator each", low=1
        )
        batch: int = setting(128, "images in a step", low=1)
        rate: float = setting(
            2e-5, "the student's first learning rate (Adam); falls as a cosine", low=0
        )
        head_rate: float = setting(2e-3, "the discriminator's learning rate", low=0)
        average: float = setting(
            0.98, "decay of the student's running average (EMA)", low=0, high=1
        )

        def __post_init__(self) -> None:
            check_range("judged", self.judged)

    def __init__(self, training: Training) -> None:
        s: Adversarial.Settings = training.settings
        self.settings, self.teacher = s, plain_teacher(training)
        self.levels = grid(s.grid, s.steps)
        self.network = student_network(training, None)
        self.average = frozen(self.network)
        self.student = VEDenoiser(self.network)
        with seeded(training.seed):
            discriminator = Discriminator(self.teacher, training.data.images[:1], s.width)
        self.discriminator = discriminator.to(training.device)
        self.iterations = s.iterations
        self.modules = {
            "network": self.network,
            "average": self.average,
            "discriminator": self.discriminator,
        }
        adam = partial(torch.optim.Adam, betas=(0.0, 0.99))
        self.optimisers = {
            "network": adam(self.network.parameters()),
            "discriminator": adam(self.discriminator.parameters()),
        }

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        images, labels = draws.batch(s.batch)
        place = draws.integers(s.steps, len(images))
        start = images.new_tensor(self.levels)[place]
        made = self.student(noised(images, start, draws.noise(images)), start, labels)
        sigma = self.network.sigma(draws.between(*s.judged, len(images)))

        def verdict(images: Tensor) -> Tensor:
            x = noised(images, sigma, draws.noise(images))
            found: Tensor = self.discriminator(x, sigma, labels)
            return found

        judged = F.relu(1 - verdict(images)).mean() + F.relu(1 + verdict(made.detach())).mean()
        descend(self.optimisers["discriminator"], judged, s.head_rate)

        passes = -verdict(made).mean()
        distilled = self.distillation(made, labels, draws)
        loss = passes + s.weight * distilled
        descend(self.optimisers["network"], loss, cosine(i, s.iterations, s.rate))
        update_average(self.average, self.network, s.average)
        return {
            "adversarial": passes.detach(),
            "distillation": distilled.detach(),
            "discriminator": judged.detach(),
        }

    def distillation(self, made: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """α·|x0 - D_ψ^w(x0 + s m)|², the mean over all values."""
        sigma = self.network.sigma(draws.timesteps(len(made)))
        with torch.no_grad():
            x = noised(made, sigma, draws.noise(made))
            target = self.teacher.with_cfg(labels, self.settings.guidance)(x, sigma)
        alpha = (1 + sigma**2).rsqrt()
        return (stretched(alpha, made) * (made - target) ** 2).mean()

    def result(self) -> tuple[VNetwork, Usage]:
        guidance = self.settings.guidance
        return self.average, Usage(sampler="lcm", levels=self.levels, guidance=guidance)
