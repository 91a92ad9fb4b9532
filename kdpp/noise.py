"""Sources of standard normal noise, ``(sigma, sigma_next) -> noise`` like k-diffusion's."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "NoiseSampler",
    "brownian_noise",
    "checked",
    "host_noise",
    "private_generator",
    "private_seed",
]

NoiseSampler = Callable[[Tensor, Tensor], Tensor]


def host_noise(x: Tensor) -> NoiseSampler:
    """The default of a k-diffusion that is already loaded, else ``torch.randn_like``.

    Looked up at call time: web UIs put their per-image seeds there. Both use the same stream.
    """
    sampling = sys.modules.get("k_diffusion.sampling")
    if sampling is not None:
        sampler: NoiseSampler = sampling.default_noise_sampler(x)
        return sampler
    return lambda sigma, sigma_next: torch.randn_like(x)


def brownian_noise(x: Tensor, sigmas: Tensor) -> NoiseSampler:
    """k-diffusion's Brownian tree over the schedule: increments of one path, normalised.

    Takes one integer from torch's stream for its seed, as k-diffusion does. Raises ImportError
    without a working k-diffusion.
    """
    from kdpp.kdiffusion import sampling

    tree = sampling.BrownianTreeNoiseSampler
    sampler: NoiseSampler = tree(x, sigmas[sigmas > 0].min(), sigmas.max())
    return sampler


def private_seed(x: Tensor) -> int:
    """A seed from the states of torch's random streams, without drawing from them.

    The same under the same ``torch.manual_seed``, another one once anything has been drawn, as a
    host does for every batch.
    """
    states = [torch.get_rng_state()]
    if x.device.type != "cpu":
        module = torch.get_device_module(x.device)
        indexed = x.device.type in ("cuda", "xpu")
        states.append(module.get_rng_state(x.device) if indexed else module.get_rng_state())
    digest = hashlib.blake2b(b"kdpp renoise", digest_size=8)
    for state in states:
        digest.update(state.numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1  # generators take 63 bits


def private_generator(x: Tensor) -> torch.Generator:
    """A generator on x's device that leaves the host's random streams where they are."""
    return torch.Generator(x.device).manual_seed(private_seed(x))


def checked(noise: Tensor, name: str, x: Tensor) -> Tensor:
    """``noise`` in the latent's dtype and on its device; ValueError for another shape."""
    if not isinstance(noise, Tensor):
        raise TypeError(f"{name} returned {type(noise).__name__}; it must return a tensor of noise")
    if noise.shape != x.shape:
        raise ValueError(
            f"{name} returned noise of shape {tuple(noise.shape)}; "
            f"the latent has shape {tuple(x.shape)}"
        )
    return noise.to(x)
