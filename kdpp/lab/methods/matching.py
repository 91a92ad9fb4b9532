"""Distribution matching: a few-step student whose images the teacher finds as likely as its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kdpp.kinds import Denoiser
from kdpp.lab.diffusion import noised, stretched, v_target
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
    student_network,
    update_average,
)
from kdpp.lab.models import Usage
from kdpp.lab.networks import VEDenoiser, VNetwork
from kdpp.lab.schedules import TIMESTEPS, Grid, grid
from kdpp.lab.settings import setting

__all__ = ["Matching", "matching_gradient"]


def matching_gradient(
    real: Denoiser, fake: Denoiser, made: Tensor, x: Tensor, sigma: Tensor
) -> Tensor:
    """How the student's images are to move: ``(D_fake(x, σ) - D_real(x, σ)) / mean|x0 - D_real|``.

    D = x + σ²·score, so that the difference is σ² times that of the scores; its mean over the noise
    is the gradient of the divergence of the student's noised distribution from the teacher's (KL),
    and 0 where they are one. The denominator is each sample's own, the mean over its values.

    Args:
        real, fake: the denoisers of the teacher's and of the student's images.
        made: x0 (B, *shape), the student's images.
        x: x0 with noise of standard deviation σ (B,).

    Source: Yin et al. 2024, One-step Diffusion with Distribution Matching Distillation, eqs. 7, 8.
    """
    wanted = real(x, sigma)
    distance = (made - wanted).abs().flatten(1).mean(1)
    return (fake(x, sigma) - wanted) / stretched(distance, x)


@method(
    "matching",
    summary="distribution matching with a second network for the student's own score (DMD2)",
    source="Yin et al. 2024, Improved Distribution Matching Distillation (DMD2)",
)
class Matching(Method):
    """The student's images, noised, are to be as likely under the teacher as under themselves::

        x_k  = the state at a random one of the student's levels, from its own sampling
        x0   = D_θ(x_k, σ_k)
        θ   <- θ - rate·(dx0/dθ)·`matching_gradient`(x0 + σ n)
        φ   <- φ - rate·∇ |v_φ(x0 + σ n) - v|²

    φ, the fake denoiser, learns what the student makes; it takes a step in every iteration, θ in
    one of ``ratio``. Both start from the teacher's weights. No image is used, only labels. There is
    no discriminator.

    Raises ValueError for a teacher that has its guidance inside it.
    """

    @dataclass(frozen=True)
    class Settings:
        steps: int = setting(4, "steps of the student")
        grid: Grid = setting("divided", "the levels: trailing, or with the tail divided by 2.5")
        guidance: float = setting(1.5, "the teacher's CFG scale (1: none)")
        ratio: int = setting(5, "steps of the fake denoiser for one of the student's", low=1)
        compared: tuple[float, float] = setting(
            (20.0, 980.0), "timesteps at which both are compared", low=0, high=TIMESTEPS - 1
        )
        iterations: int = setting(1000, "optimisation steps of the fake denoiser", low=1)
        batch: int = setting(128, "images in a step", low=1)
        rate: float = setting(
            2e-4, "the student's first learning rate (Adam); falls as a cosine", low=0
        )
        fake_rate: float = setting(5e-4, "the fake denoiser's learning rate", low=0)
        average: float = setting(
            0.98, "decay of the student's running average (EMA)", low=0, high=1
        )

        def __post_init__(self) -> None:
            check_range("compared", self.compared)

    def __init__(self, training: Training) -> None:
        s: Matching.Settings = training.settings
        self.settings, self.teacher = s, plain_teacher(training)
        self.levels = grid(s.grid, s.steps)
        self.network = student_network(training, None)
        self.average = frozen(self.network)
        self.fake = student_network(training, None)
        self.student = VEDenoiser(self.network)
        self.iterations = s.iterations
        self.modules = {"network": self.network, "average": self.average, "fake": self.fake}
        adam = partial(torch.optim.Adam, betas=(0.0, 0.99))
        self.optimisers = {
            "network": adam(self.network.parameters()), "fake": adam(self.fake.parameters())
        }  # fmt: skip

    def step(self, i: int, draws: Draws) -> dict[str, Tensor]:
        s = self.settings
        losses = {}
        if i % s.ratio == 0:
            made, labels = self.make(draws)
            sigma = self.network.sigma(draws.between(*s.compared, len(made)))
            x = noised(made.detach(), sigma, draws.noise(made))
            real = self.teacher.with_cfg(labels, s.guidance)
            fake = partial(VEDenoiser(self.fake), cond=labels)
            with torch.no_grad():
                gradient = matching_gradient(real, fake, made, x, sigma)
            loss = F.mse_loss(made, made.detach() - gradient) / 2
            descend(self.optimisers["network"], loss, cosine(i, s.iterations, s.rate))
            update_average(self.average, self.network, s.average)
            losses["matching"] = gradient.square().mean()
        with torch.no_grad():
            made, labels = self.make(draws)
        t = draws.timesteps(len(made))
        x_vp, v = v_target(made, draws.noise(made), self.fake.sigma(t))
        loss = F.mse_loss(self.fake(x_vp, t, labels), v)
        descend(self.optimisers["fake"], loss, s.fake_rate)
        return losses | {"fake": loss.detach()}

    def make(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The student's images from a random one of its levels each, and their labels."""
        s = self.settings
        images, labels = draws.batch(s.batch)
        place = draws.integers(s.steps, len(images))
        x = state = self.levels[0] * draws.noise(images)
        with torch.no_grad():
            for k, sigma in enumerate(self.levels[1:-1]):
                before = x.new_full(x.shape[:1], self.levels[k])
                x = self.student(x, before, labels) + sigma * draws.noise(images)
                state = torch.where(stretched(place == k + 1, x), x, state)
        return self.student(state, x.new_tensor(self.levels)[place], labels), labels

    def result(self) -> tuple[VNetwork, Usage]:
        guidance = self.settings.guidance
        return self.average, Usage(sampler="lcm", levels=self.levels, guidance=guidance)
