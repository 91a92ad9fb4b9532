"""The digits' networks: a conditional residual MLP (teacher and student) and a classifier."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpp.digits import schedules
from kdpp.digits.data import CLASSES, IMAGE_SHAPE

PIXELS = math.prod(IMAGE_SHAPE)
LARGEST = 4096


class Block(nn.Module):
    """One residual step `h + gate * MLP(norm(h) * (1 + scale) + shift)`.

    scale, shift and gate are linear in the condition and start at 0 ("adaLN-Zero", Peebles and
    Xie 2023, arXiv 2212.09748), so that a new network is the identity between its ends.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.modulation = _zeroed(nn.Linear(width, 3 * width))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """Map h [B, width] under condition [B, width] to [B, width]."""
        scale, shift, gate = self.modulation(condition).chunk(3, dim=1)
        normed = F.layer_norm(h, h.shape[1:])
        return cast(Tensor, h + gate * self.mlp(normed * (1 + scale) + shift))


class ResMLP(nn.Module):
    """A class-conditional noise predictor for 8x8 images, as CompVisDenoiser expects one.

    The head predicts v = (n - sigma x0) / sqrt(1 + sigma^2) (Salimans and Ho 2022, arXiv
    2202.00512) and `apply_model` returns the noise that follows from it,

        eps = (sigma x_vp + v) / sqrt(1 + sigma^2),   x_vp = x / sqrt(1 + sigma^2),

    which divides by nothing small at either end of the schedule.  The denoiser is then

        D(x, sigma) = x - sigma eps = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v,

    that is, c_skip and c_out of Karras et al. 2022 (arXiv 2206.00364) for sigma_data = 1.  Since
    c_skip = 1 and c_out = 0 at sigma = 0, D meets the boundary condition D(x, 0) = x of a
    consistency function as it stands: the student needs no further scaling.

    Raises ValueError for a size that is not a whole number from 1 to 4096.
    """

    alphas_cumprod: Tensor
    log_sigmas: Tensor

    def __init__(self, width: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.config = _sizes(width=width, hidden=hidden, blocks=blocks)
        self.register_buffer("alphas_cumprod", schedules.alphas_cumprod(), persistent=False)
        self.register_buffer("log_sigmas", schedules.log_sigmas().float(), persistent=False)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES + 1, width)
        self.enter = nn.Linear(PIXELS, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(blocks))
        self.modulation = _zeroed(nn.Linear(width, 2 * width))
        self.leave = _zeroed(nn.Linear(width, PIXELS))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Predict v, shaped as x [B, 1, 8, 8], at x_vp = `x`.

        `t` [B] is the timestep, 0..999, whole or fractional; `cond` int64 [B] the digit, or
        NULL_CLASS.  Raises ValueError for another image shape, IndexError for an unknown label.
        """
        if x.shape[1:] != IMAGE_SHAPE:
            raise ValueError(f"x must be [B, 1, 8, 8], got {list(x.shape)}")
        t = t.to(x.dtype)
        condition = F.silu(self.time(self._embed(t)) + self.label(cond))
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, condition)
        scale, shift = self.modulation(condition).chunk(2, dim=1)
        v: Tensor = self.leave(F.layer_norm(h, h.shape[1:]) * (1 + scale) + shift)
        return v.view_as(x)

    def apply_model(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Predict the noise in x_vp = `x`; arguments and errors as in `forward`."""
        sigma = self.sigma(t.to(x.dtype)).view(-1, 1, 1, 1)
        v: Tensor = self(x, t, cond)
        return (sigma * x + v) / (1 + sigma**2).sqrt()

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Return D(x, sigma(t)) for x = x0 + sigma n: CompVisDenoiser's formula, by timestep."""
        sigma = self.sigma(t).view(-1, 1, 1, 1)
        return x - sigma * self.apply_model(x / (1 + sigma**2).sqrt(), t, cond)

    def sigma(self, t: Tensor) -> Tensor:
        """Return sigma at the fractional timesteps `t`, log-linear between the whole ones."""
        return schedules.interpolate(self.log_sigmas, t).exp()

    def _embed(self, t: Tensor) -> Tensor:
        """Return sines and cosines of t [B] at periods from 2 pi to 1e4 * 2 pi: [B, width]."""
        width = self.config["width"]
        steps = torch.arange((width + 1) // 2, device=t.device, dtype=t.dtype)
        angles = t[:, None] * torch.exp(-math.log(1e4) * 2 * steps / width)
        return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


class Classifier(nn.Module):
    """The digit classifier: two convolutions, a feature layer and a linear head."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.config = _sizes(channels=channels, features=features)
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


def guided_denoise(net: ResMLP, x: Tensor, t: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Return `D_null + scale * (D_cond - D_null)`, both halves in one call of the network."""
    null = torch.full_like(cond, CLASSES)
    both = net.denoise(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, cond]))
    unconditional, conditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def _zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _sizes(**sizes: int) -> dict[str, int]:
    """Return the sizes if each is a whole number that a small network can have."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST:
            raise ValueError(f"{name} must be a whole number from 1 to {LARGEST}, got {size!r}")
    return sizes
