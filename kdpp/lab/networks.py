"""Networks by configuration only, and their denoiser.

A configuration is a table: ``kind``, the sizes of that kind, and what the data say: ``shape`` (of
one image) and ``classes``. A network that generates is a `VNetwork`: it predicts v, and the label
``classes`` stands for none. ``conditions`` names its further scalar inputs:

- ``w`` (`CFG_MINUS_ONE`): the CFG scale minus one, as the networks of Meng et al. and of LCM take
  their guidance; `kdpp.GuidanceConditioned` makes it from a sampler's ``cond_scale``.
- ``steps``: the number of steps that an image is sampled in.

| kind | sizes |
|---|---|
| resmlp | ``width``, ``hidden``, ``blocks``: a residual MLP for small images and latents |
| unet | whatever diffusers' UNet2DModel takes: ``block_out_channels``, ``layers_per_block``, … |

A `Classifier` generates nothing; it measures what others have generated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpp.lab import schedules
from kdpp.lab.diffusion import stretched
from kdpp.solver import unknown

__all__ = [
    "CFG_MINUS_ONE",
    "SMALL",
    "TEACHER",
    "UNET",
    "Classifier",
    "Network",
    "ResMLP",
    "VEDenoiser",
    "VNetwork",
    "build",
    "whole_sizes",
]

CFG_MINUS_ONE = "w"
"""The network's input that holds the CFG scale minus one, by its name in files."""
TEACHER = {"kind": "resmlp", "width": 192, "hidden": 384, "blocks": 3}
"""The teacher that ships with kdpp: 953 k parameters for the digits."""
SMALL = {"kind": "resmlp", "width": 64, "hidden": 128, "blocks": 1}
"""The student that ships with kdpp: 55 k parameters for the digits."""
UNET = {
    "kind": "unet",
    "block_out_channels": [64, 128],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
}
"""A small U-Net, for images of 16 x 16 pixels and more."""
LARGEST = 4096
PER_UNIT = 100.0  # a further condition's unit, in timesteps, for the sines that embed both


class Network(nn.Module):
    """A network that a configuration makes.

    Attributes:
        config: what it is made from: kind, sizes, shape, classes.
        shape: of one image.
        classes: how many there are.
    """

    config: dict[str, Any]

    def __init__(self, kind: str, shape: Sequence[int], classes: int, **rest: Any) -> None:
        super().__init__()
        self.shape, self.classes = tuple(shape), classes
        given = {"shape": list(shape), "classes": classes}
        self.config = {"kind": kind, **given, **copy.deepcopy(rest)}


class VNetwork(Network):
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

    The schedule is `kdpp.lab.schedules`' of 1000 timesteps.
    """

    alphas_cumprod: Tensor
    log_sigmas: Tensor

    def __init__(
        self, kind: str, shape: Sequence[int], classes: int, conditions: Sequence[str], **sizes: Any
    ) -> None:
        super().__init__(kind, shape, classes, conditions=list(conditions), **sizes)
        self.register_buffer("alphas_cumprod", schedules.alphas_cumprod(), persistent=False)
        self.register_buffer("log_sigmas", schedules.log_sigmas().float(), persistent=False)

    def apply_model(self, x: Tensor, t: Tensor, cond: Tensor, **conditions: Tensor) -> Tensor:
        """Predict the noise in x_vp = `x`; arguments and errors as in `forward`."""
        sigma = stretched(self.sigma(t.to(x.dtype)), x)
        v: Tensor = self(x, t, cond, **conditions)
        return (sigma * x + v) / (1 + sigma**2).sqrt()

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor, **conditions: Tensor) -> Tensor:
        """Return D(x, sigma(t)) for x = x0 + sigma n: CompVisDenoiser's formula, by timestep."""
        sigma = stretched(self.sigma(t), x)
        return x - sigma * self.apply_model(x / (1 + sigma**2).sqrt(), t, cond, **conditions)

    def sigma(self, t: Tensor) -> Tensor:
        """Return sigma at the fractional timesteps `t`, log-linear between the whole ones."""
        return schedules.interpolate(self.log_sigmas, t).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The fractional timestep of σ > 0, linear in log σ; 0 or 999 outside the range."""
        table = self.log_sigmas
        wanted = sigma.to(table.dtype).log().clamp(table[0], table[-1])
        high = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        low = high - 1
        return low + (wanted - table[low]) / (table[high] - table[low])

    def _embedded(self, table: nn.Embedding, cond: Tensor) -> Tensor:
        """The labels' rows of the table; ValueError for a label that there is not."""
        try:
            rows: Tensor = table(cond)
        except IndexError as error:  # on a GPU torch says it in its own way
            raise ValueError(
                f"cond holds labels from {int(cond.min())} to {int(cond.max())}; the network knows "
                f"0 to {self.classes - 1}, and {self.classes} for no label"
            ) from error
        return rows


class ResMLP(VNetwork):
    """The residual MLP, for the digits and any data as small.

    Raises ValueError for a size that is not a whole number from 1 to 4096.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        conditions: Sequence[str] = (),
        *,
        width: int,
        hidden: int,
        blocks: int,
    ) -> None:
        sizes = whole_sizes(width=width, hidden=hidden, blocks=blocks)
        super().__init__("resmlp", shape, classes, conditions, **sizes)
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
        another image shape, other conditions or an unknown label.
        """
        if x.shape[1:] != self.shape:
            shape = ", ".join(map(str, self.shape))
            raise ValueError(f"x must be [B, {shape}], got {list(x.shape)}")
        t = t.to(x.dtype)
        time = self.time(waves(t, self.config["width"]))
        condition = F.silu(self.scalars(time + self._embedded(self.label, cond), conditions))
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, condition)
        scale, shift = self.modulation(condition).chunk(2, dim=1)
        v: Tensor = self.leave(F.layer_norm(h, h.shape[1:]) * (1 + scale) + shift)
        return v.view_as(x).to(x.dtype)  # autocast leaves it in 16 bits


class UNet(VNetwork):
    """diffusers' UNet2DModel as a network that predicts v; images are (channels, height, width).

    The label and further scalar conditions are embedded here and handed to it as the class
    embedding, which it adds to that of time.

    Raises:
        ImportError: diffusers is missing.
        ValueError: the shape has not three dimensions, or UNet2DModel refuses the sizes.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, conditions: Sequence[str] = (), **sizes: Any
    ) -> None:
        if len(shape) != 3:
            raise ValueError(f"a unet needs images (channels, height, width), not {list(shape)}")
        super().__init__("unet", shape, classes, conditions, **sizes)
        try:
            import diffusers
        except ImportError as error:
            raise ImportError('a unet needs diffusers: pip install "kdpp[diffusers]"') from error
        channels, height, width = shape
        try:
            self.unet: Any = _library(diffusers).UNet2DModel(
                sample_size=(height, width),
                in_channels=channels,
                out_channels=channels,
                class_embed_type="identity",
                **sizes,
            )
        except TypeError as error:
            raise ValueError(f"a unet of {sizes} cannot be built: {error}") from error
        self.width = self.unet.time_embedding.linear_2.out_features
        self.label = nn.Embedding(classes + 1, self.width)
        self.scalars = Scalars(conditions, self.width)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, **conditions: Tensor) -> Tensor:
        """Predict v at x_vp = `x`; arguments and errors as in `ResMLP.forward`."""
        embedded = self.scalars(self._embedded(self.label, cond), conditions)
        v: Tensor = self.unet(x, t.to(x.dtype), class_labels=embedded, return_dict=False)[0]
        return v.to(x.dtype)


class Classifier(Network):
    """A classifier of small images: two convolutions, a feature layer and a linear head.

    Raises ValueError for images that are not (channels, height, width) of 2 x 2 pixels and more,
    and for a size that is not a whole number from 1 to 4096.
    """

    def __init__(self, shape: Sequence[int], classes: int, *, channels: int, features: int) -> None:
        if len(shape) != 3 or min(shape[1:]) < 2:
            raise ValueError(f"a classifier takes images (channels, height, width), not {shape}")
        sizes = whole_sizes(channels=channels, features=features)
        super().__init__("classifier", shape, classes, **sizes)
        halved = (shape[1] // 2) * (shape[2] // 2)
        self.body = nn.Sequential(
            nn.Conv2d(shape[0], channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * channels * halved, features),
            nn.SiLU(),
        )
        self.head = nn.Linear(features, classes)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer [B, features] of images x [B, *shape]."""
        return cast(Tensor, self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        """The logits [B, classes] of images x [B, *shape]."""
        return cast(Tensor, self.head(self.features(x)))


def _library(module: Any) -> Any:
    """A package whose annotations are incomplete."""
    return module


KINDS: dict[str, Callable[..., VNetwork]] = {"resmlp": ResMLP, "unet": UNet}


def build(config: Mapping[str, Any]) -> VNetwork:
    """The network of a configuration, newly initialised from torch's global random stream.

    Raises ValueError for an unknown kind and for sizes that it does not have.
    """
    sizes = {"kind": "resmlp", **config}
    kind = sizes.pop("kind")
    if kind not in KINDS:
        raise ValueError(unknown("network kind", kind, KINDS))
    try:
        return KINDS[kind](**sizes)
    except TypeError as error:
        raise ValueError(f"a network of kind {kind!r} cannot be built: {error}") from error


class VEDenoiser(nn.Module):
    """The denoiser of a network that predicts v, as kdpp's and k-diffusion's samplers take it.

        D(x, σ) = x/(1+σ²) - σ/sqrt(1+σ²)·v(x/sqrt(1+σ²), t(σ))

    x ``(batch, *shape)`` holds noise of standard deviation σ ``(batch,)``; ``cond`` int64
    ``(batch,)`` and further conditions go to the network. `sigma_min`, `sigma_max`, `sigma_to_t`,
    `t_to_sigma` and `get_sigmas` are those of k-diffusion's CompVisDenoiser, which gives the same
    estimate between `sigma_min` and `sigma_max`; beyond, t(σ) is that of the nearer end.
    """

    sigmas: Tensor

    def __init__(self, network: VNetwork) -> None:
        super().__init__()
        self.inner_model = network
        self.register_buffer("sigmas", network.log_sigmas.exp(), persistent=False)

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """The network's `timestep`."""
        return self.inner_model.timestep(sigma)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """σ at fractional timesteps."""
        return self.inner_model.sigma(t)

    def get_sigmas(self, n: int) -> Tensor:
        """n levels at equal steps of the timestep from the highest σ to the lowest, then 0."""
        t = torch.linspace(schedules.TIMESTEPS - 1, 0, n, device=self.sigmas.device)
        return torch.cat((self.t_to_sigma(t), t.new_zeros(1)))

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor, **conditions: Tensor) -> Tensor:
        level = stretched(sigma, x).to(x.dtype)
        root = (1.0 + level**2).sqrt()
        v: Tensor = self.inner_model(x / root, self.sigma_to_t(sigma), cond, **conditions)
        return (x / root - level * v) / root


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


def waves(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t [B] at periods from 2 pi to 1e4 * 2 pi: [B, width]."""
    steps = torch.arange((width + 1) // 2, device=t.device, dtype=t.dtype)
    angles = t[:, None] * torch.exp(-math.log(1e4) * 2 * steps / width)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def _zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def whole_sizes(**sizes: int) -> dict[str, int]:
    """The sizes, if each is a whole number that a small network can have; else ValueError."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST:
            raise ValueError(f"{name} must be a whole number from 1 to {LARGEST}, got {size!r}")
    return sizes
