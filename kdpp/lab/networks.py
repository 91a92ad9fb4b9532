"""Networks by configuration only, and their denoiser.

A configuration is a table: ``kind`` and the sizes of that kind, with ``shape`` (of one image),
``classes`` and ``conditions`` (names of further scalar inputs, such as "w" or "steps"). Every
network is a `kdpp.digits.networks.VNetwork`: it predicts v, its null label is ``classes``.

| kind | sizes |
|---|---|
| resmlp | ``width``, ``hidden``, ``blocks``: a residual MLP for small images and latents |
| unet | whatever diffusers' UNet2DModel takes: ``block_out_channels``, ``layers_per_block``, … |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdpp.digits import schedules
from kdpp.digits.networks import ResMLP, Scalars, VNetwork
from kdpp.lab.settings import unknown

__all__ = ["SMALL", "TEACHER", "VEDenoiser", "build"]

TEACHER = {"kind": "resmlp", "width": 192, "hidden": 384, "blocks": 3}
"""The teacher that ships with kdpp: 953 k parameters for the digits."""
SMALL = {"kind": "resmlp", "width": 64, "hidden": 128, "blocks": 1}
"""The student that ships with kdpp: 55 k parameters for the digits."""


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
        super().__init__(shape, classes)
        if len(shape) != 3:
            raise ValueError(f"a unet needs images (channels, height, width), not {list(shape)}")
        try:
            import diffusers
        except ImportError as error:
            raise ImportError('a unet needs diffusers: pip install "kdpp[diffusers]"') from error
        given = {"shape": list(shape), "classes": classes, "conditions": list(conditions)}
        self.config = given | copy.deepcopy(sizes)
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
        """Predict v at x_vp = `x`; arguments as in `kdpp.digits.networks.ResMLP.forward`."""
        embedded = self.scalars(self.label(cond), conditions)
        v: Tensor = self.unet(x, t.to(x.dtype), class_labels=embedded, return_dict=False)[0]
        return v


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
        network = KINDS[kind](**sizes)
    except TypeError as error:
        raise ValueError(f"a network of kind {kind!r} cannot be built: {error}") from error
    network.config = {"kind": kind, **network.config}
    return network


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
        """The fractional timestep of σ > 0, linear in log σ; 0 or 999 outside the range."""
        table = self.inner_model.log_sigmas
        wanted = sigma.to(table.dtype).log().clamp(table[0], table[-1])
        high = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        low = high - 1
        return low + (wanted - table[low]) / (table[high] - table[low])

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """σ at fractional timesteps."""
        return self.inner_model.sigma(t)

    def get_sigmas(self, n: int) -> Tensor:
        """n levels at equal steps of the timestep from the highest σ to the lowest, then 0."""
        t = torch.linspace(schedules.TIMESTEPS - 1, 0, n, device=self.sigmas.device)
        return torch.cat((self.t_to_sigma(t), t.new_zeros(1)))

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor, **conditions: Tensor) -> Tensor:
        level = sigma.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        root = (1.0 + level**2).sqrt()
        v: Tensor = self.inner_model(x / root, self.sigma_to_t(sigma), cond, **conditions)
        return (x / root - level * v) / root
