"""Sources of standard normal noise, ``(sigma, sigma_next) -> noise`` like k-diffusion's."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["NoiseSampler", "checked", "host_noise", "private_noise"]

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


def private_noise(x: Tensor) -> NoiseSampler:
    """Noise from a generator of its own, which leaves the host's random streams where they are.

    The seed is a hash of their states: the same under the same ``torch.manual_seed``, another
    one once anything has been drawn, as a host does for every batch.
    """
    states = [torch.get_rng_state()]
    if x.device.type != "cpu":
        states.append(torch.get_device_module(x.device).get_rng_state(x.device))
    digest = hashlib.blake2b(b"kdpp renoise", digest_size=8)
    for state in states:
        digest.update(state.numpy().tobytes())
    seed = int.from_bytes(digest.digest(), "big")
    generator = torch.Generator(x.device).manual_seed(seed >> 1)  # it takes 63 bits
    return lambda sigma, sigma_next: torch.randn(
        x.shape, generator=generator, device=x.device, dtype=x.dtype
    )


def checked(sampler: NoiseSampler, name: str, x: Tensor) -> NoiseSampler:
    """``sampler`` with its output's shape checked and brought to the latent's dtype and device."""

    def draw(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        noise = sampler(sigma, sigma_next)
        if noise.shape != x.shape:
            raise ValueError(
                f"{name} returned noise of shape {tuple(noise.shape)}; "
                f"the latent has shape {tuple(x.shape)}"
            )
        return noise.to(x)

    return draw
