"""The digits' networks: a conditional residual MLP (teacher and student) and a classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpp.digits import schedules
from kdpp.digits.data import CLASSES, IMAGE_SHAPE

PIXELS = math.prod(IMAGE_SHAPE)
LARGEST = 4096
PER_UNIT = 100.0  # a further condition's unit, in timesteps, for the sines that embed both


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


class VNetwork(nn.Module):
    """A class-conditional network that predicts v, as CompVisDenoiser expects a noise predictor.

    `forward(x_vp, t, cond, **conditions)` of a subclass gives v = (n - sigma x0) / sqrt(1 +
    sigma^2) (Salimans and Ho 2022, arXiv 2202.00512) and `apply_model` returns the noise that
    follows from it,

        eps = (sigma x_vp + v) / sqrt(1 + sigma^2),   x_vp = x / sqrt(1 + sigma^2),

    which divides by nothing small at either end of the schedule.  The denoiser is then

        D(x, sigma) = x - sigma eps = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v,

    that is, c_skip and c_out of Karras et al. 2022 (arXiv 2206.00364) for sigma_data = 1.  Since
    c_skip = 1 and c_out = 0 at sigma = 0, D meets the boundary condition D(x, 0) = x of a
    consistency function as it stands: the student needs no further scaling.

    The schedule is `kdpp.digits.schedules`' of 1000 timesteps.
    """

    alphas_cumprod: Tensor
    log_sigmas: Tensor
    config: dict[str, Any]

    def __init__(self, shape: Sequence[int], classes: int) -> None:
        super().__init__()
        self.shape, self.classes = tuple(shape), classes
        self.register_buffer("alphas_cumprod", schedules.alphas_cumprod(), persistent=False)
        self.register_buffer("log_sigmas", schedules.log_sigmas().float(), persistent=False)

    def apply_model(self, x: Tensor, t: Tensor, cond: Tensor, **conditions: Tensor) -> Tensor:
        """Predict the noise in x_vp = `x`; arguments and errors as in `forward`."""
        sigma = _along(self.sigma(t.to(x.dtype)), x)
        v: Tensor = self(x, t, cond, **conditions)
        return (sigma * x + v) / (1 + sigma**2).sqrt()

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor, **conditions: Tensor) -> Tensor:
        """Return D(x, sigma(t)) for x = x0 + sigma n: CompVisDenoiser's formula, by timestep."""
        sigma = _along(self.sigma(t), x)
        return x - sigma * self.apply_model(x / (1 + sigma**2).sqrt(), t, cond, **conditions)

    def sigma(self, t: Tensor) -> Tensor:
        """Return sigma at the fractional timesteps `t`, log-linear between the whole ones."""
        return schedules.interpolate(self.log_sigmas, t).exp()


class Scalars(nn.ModuleDict):
    """The sum of the embeddings of further scalar conditions, each by its name.

    Each is embedded as time is, a unit of it as 100 timesteps, and its last layer starts at 0: a
    network that is given the weights of one without the condition computes the same at first.
    """

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        self.width = width
        for name in names:
            last = _zeroed(nn.Linear(width, width))
            self[name] = nn.Sequential(nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, condition: Tensor, values: dict[str, Tensor]) -> Tensor:
        """Add them to `condition` [B, width]; each value is [B] or without dimensions.

        Raises ValueError where a condition is missing or unknown.
        """
        if values.keys() != set(self):
            raise ValueError(
                f"the network's conditions are {sorted(self) or 'none'}, given: {sorted(values)}"
            )
        for name, embed in self.items():
            value = torch.as_tensor(values[name]).to(condition).expand(len(condition))
            condition = condition + embed(waves(PER_UNIT * value, self.width))
        return condition


class ResMLP(VNetwork):
    """The residual MLP: for 8x8 digits, or with `shape` and `classes` for any small data.

    Raises ValueError for a size that is not a whole number from 1 to 4096.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        blocks: int,
        shape: Sequence[int] = IMAGE_SHAPE,
        classes: int = CLASSES,
        conditions: Sequence[str] = (),
    ) -> None:
        super().__init__(shape, classes)
        self.config = dict(_sizes(width=width, hidden=hidden, blocks=blocks))
        if (*shape, classes, *conditions) != (*IMAGE_SHAPE, CLASSES):
            self.config |= {"shape": list(shape), "classes": classes}
            self.config |= {"conditions": list(conditions)}
        pixels = math.prod(shape)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.enter = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(blocks))
        self.modulation = _zeroed(nn.Linear(width, 2 * width))
        self.leave = _zeroed(nn.Linear(width, pixels))
        self.scalars = Scalars(conditions, width)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, **conditions: Tensor) -> Tensor:
        """Predict v, shaped as x [B, *shape], at x_vp = `x`.

        `t` [B] is the timestep, 0..999, whole or fractional; `cond` int64 [B] the label, or the
        number of classes for none; `conditions` as `Scalars` takes them.  Raises ValueError for
        another image shape or other conditions, IndexError for an unknown label.
        """
        if x.shape[1:] != self.shape:
            shape = ", ".join(map(str, self.shape))
            raise ValueError(f"x must be [B, {shape}], got {list(x.shape)}")
        t = t.to(x.dtype)
        time = self.time(waves(t, self.config["width"]))
        condition = F.silu(self.scalars(time + self.label(cond), conditions))
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, condition)
        scale, shift = self.modulation(condition).chunk(2, dim=1)
        v: Tensor = self.leave(F.layer_norm(h, h.shape[1:]) * (1 + scale) + shift)
        return v.view_as(x)


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


def waves(t: Tensor, width: int) -> Tensor:
    """Return sines and cosines of t [B] at periods from 2 pi to 1e4 * 2 pi: [B, width]."""
    steps = torch.arange((width + 1) // 2, device=t.device, dtype=t.dtype)
    angles = t[:, None] * torch.exp(-math.log(1e4) * 2 * steps / width)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def guided_denoise(
    net: VNetwork, x: Tensor, t: Tensor, cond: Tensor, scale: float | Tensor
) -> Tensor:
    """Return `D_null + scale * (D_cond - D_null)`, both halves in one call of the network.

    A scale for each sample must be shaped to go with x.
    """
    null = torch.full_like(cond, net.classes)
    both = net.denoise(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, cond]))
    unconditional, conditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def _along(values: Tensor, x: Tensor) -> Tensor:
    """Return values [B] as [B, 1, ...], to go with x."""
    return values.view(-1, *[1] * (x.ndim - 1))


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
