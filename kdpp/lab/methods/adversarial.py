"""Adversarial diffusion distillation: real or made, judged on the teacher's own features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpp.digits.networks import VNetwork
from kdpp.digits.schedules import TIMESTEPS
from kdpp.lab.methods import (
    Draws,
    Job,
    Task,
    cosine,
    descend,
    frozen,
    method,
    seeded,
    student_network,
    update_average,
)
from kdpp.lab.methods.progressive import grid, guided, stretched
from kdpp.lab.methods.sfd import plain_teacher
from kdpp.lab.networks import VEDenoiser
from kdpp.lab.settings import setting

__all__ = ["Adversarial", "Discriminator"]

BLOCKS: Mapping[str, Callable[[Any], Sequence[nn.Module]]] = {
    "resmlp": lambda network: list(network.blocks),
    "unet": lambda network: [*network.unet.down_blocks, network.unet.mid_block],
}
"""Of each kind of network, the parts whose outputs are its features."""


class Discriminator(nn.Module):
    """A head on each feature of a frozen network: is an image, noised, a real one?

    Args:
        network: the teacher's. It is no part of this module and takes no gradient.
        example: x (1, *shape), to learn the features' sizes from.

    Source: Sauer et al. 2023, Adversarial Diffusion Distillation; on the teacher's own features at
    a drawn noise level: Sauer et al. 2024, Fast High-Resolution Image Synthesis with Latent ADD.
    """

    def __init__(self, network: VNetwork, example: Tensor, width: int) -> None:
        super().__init__()
        self.features = partial(features, network)
        label = torch.zeros(1, dtype=torch.int64, device=example.device)
        sizes = [f.shape[1] for f in self.features(example, example.new_ones(1), label)]
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(size), nn.Linear(size, width), nn.SiLU(), nn.Linear(width, 1)
            )
            for size in sizes
        )

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        """Each head's verdict (B, heads) on x (B, *shape) at σ (B,): high for real."""
        found = self.features(x, sigma, cond)
        return torch.cat([head(f) for head, f in zip(self.heads, found)], dim=1)


def features(network: VNetwork, x: Tensor, sigma: Tensor, cond: Tensor) -> list[Tensor]:
    """What the parts of a network (`BLOCKS`) answer, each (B, channels), averaged over places."""
    found: list[Tensor] = []

    def keep(part: nn.Module, given: Any, answer: Any) -> None:
        h = answer[0] if isinstance(answer, tuple) else answer
        found.append(h.flatten(2).mean(2) if h.ndim > 2 else h)

    blocks = BLOCKS[network.config.get("kind", "resmlp")](network)
    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        VEDenoiser(network)(x, sigma, cond)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@method(
    "adversarial",
    summary="a discriminator on the teacher's features, and the teacher's estimate (ADD, Turbo)",
    source="Sauer et al. 2023, Adversarial Diffusion Distillation; Sauer et al. 2024, Latent ADD",
)
class Adversarial(Task):
    """From a real image at one of its levels the student makes one that is to pass for real::

        x0   = D_θ(x + σ_k n, σ_k)
        loss = -mean f(x0 + σ n) + weight·α·|x0 - D_ψ^w(x0 + σ' n')|²      α² = 1/(1+σ'²)
        f:     mean relu(1 - f(x + σ n)) + mean relu(1 + f(x0 + σ n))

    f is the `Discriminator`, D_ψ the teacher, which is no more differentiated than in score
    distillation; σ and σ' are drawn over the schedule.
    """

    @dataclass(frozen=True)
    class Settings:
        steps: int = setting(4, "steps of the student")
        grid: Literal["divided", "trailing"] = setting(
            "divided", "the levels: trailing, or those with the tail divided by 2.5"
        )
        guidance: float = setting(2.0, "the teacher's CFG scale (1: none)")
        weight: float = setting(2.5, "of the distillation term")
        range: tuple[float, ...] = setting((0.0, 600.0), "timesteps at which it judges")
        heads: int = setting(64, "width of the discriminator's heads")
        iterations: int = setting(600, "optimisation steps, of student and discriminator each")
        batch: int = setting(256, "images in a step")
        rate: float = setting(2e-4, "the student's first rate (Adam); it falls as a cosine")
        head_rate: float = setting(1e-3, "the discriminator's learning rate")
        average: float = setting(0.98, "decay of the student's running average (EMA)")

    def __init__(self, job: Job) -> None:
        s: Adversarial.Settings = job.settings
        self.settings, self.teacher = s, plain_teacher(job)
        self.levels = grid(s.grid, s.steps)
        self.network = student_network(job, None)
        self.average = frozen(self.network)
        self.student = VEDenoiser(self.network)
        with seeded(job.seed):
            judge = Discriminator(self.teacher.network, job.data.images[:1], s.heads)
        self.discriminator = judge.to(job.device)
        self.iterations = s.iterations
        self.modules = {
            "network": self.network, "average": self.average, "discriminator": self.discriminator
        }  # fmt: skip
        adam = partial(torch.optim.Adam, betas=(0.0, 0.99))
        self.optimisers = {
            "network": adam(self.network.parameters()),
            "discriminator": adam(self.discriminator.parameters()),
        }

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        images, labels = draws.batch(s.batch)
        place = draws.integers(s.steps, len(images))
        sigma = images.new_tensor(self.levels)[place]
        x = images + stretched(sigma, images) * draws.noise(images)
        made = self.student(x, sigma, labels)

        low, high = s.range
        level = self.network.sigma(low + (high - low) * draws.uniform(len(images)))
        judge = partial(self.judge, level, draws)
        for_real, for_made = judge(images, labels), judge(made.detach(), labels)
        judged = F.relu(1 - for_real).mean() + F.relu(1 + for_made).mean()
        descend(self.optimisers["discriminator"], judged, s.head_rate)

        passes = -judge(made, labels).mean()
        distilled = self.distillation(made, labels, draws)
        loss = passes + s.weight * distilled
        descend(self.optimisers["network"], loss, cosine(i, s.iterations, s.rate))
        update_average(self.average, self.network, s.average)
        return {
            "adversarial": passes.detach(),
            "distillation": distilled.detach(),
            "discriminator": judged.detach(),
        }

    def judge(self, sigma: Tensor, draws: Draws, images: Tensor, labels: Tensor) -> Tensor:
        """The discriminator on the images noised to σ."""
        x = images + stretched(sigma, images) * draws.noise(images)
        verdict: Tensor = self.discriminator(x, sigma, labels)
        return verdict

    def distillation(self, made: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """α·|x0 - D_ψ^w(x0 + σ n)|², the mean over all values."""
        sigma = self.network.sigma(draws.uniform(len(made)) * (TIMESTEPS - 1))
        with torch.no_grad():
            x = made + stretched(sigma, made) * draws.noise(made)
            target = guided(self.teacher, labels, self.settings.guidance)(x, sigma)
        alpha = (1 + sigma**2).rsqrt()
        return (stretched(alpha, made) * (made - target) ** 2).mean()

    def result(self) -> tuple[nn.Module, dict[str, Any]]:
        s = self.settings
        return self.average, {
            "sampler": "lcm",
            "levels": list(self.levels),
            "conditions": {},
            "guidance": s.guidance,
            "evaluations": (1 + 3 + 2) * s.iterations * s.batch,
        }
