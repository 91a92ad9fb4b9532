"""The formulas that the methods share: v, guidance, DDIM's step, two steps as one, errors.

Everything is in the VE form, x = x0 + σ n. Levels are tensors (B,), one for each sample, and a
denoiser is a function ``(x (B, *shape), σ (B,)) -> D (B, *shape)``, an estimate of x0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kdpp.kinds import Denoiser

__all__ = [
    "Weighting",
    "cfg",
    "cfg_mix",
    "ddim",
    "jump_target",
    "noised",
    "second_share",
    "stretched",
    "v_target",
    "weighted_error",
]

Weighting = Literal["truncated", "snr+1", "snr", "constant"]


def stretched(values: Tensor, x: Tensor) -> Tensor:
    """Values (B,) as (B, 1, …), to go with x ``(B, *shape)``."""
    return values.view(-1, *[1] * (x.ndim - 1))


def noised(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x = x0 + σ n."""
    return x0 + stretched(sigma, x0) * noise


def v_target(x0: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What a network that predicts v is given and what it is to answer at x = x0 + σ n::

        x_vp = (x0 + σ n) / sqrt(1 + σ²),   v = (n - σ x0) / sqrt(1 + σ²)

    Source: Salimans and Ho 2022, appendix D.
    """
    sigma = stretched(sigma, x0)
    root = (1 + sigma**2).sqrt()
    return (x0 + sigma * noise) / root, (noise - sigma * x0) / root


def cfg_mix(
    uncond: Tensor, cond: Tensor, scale: Tensor | float, as_written: bool = False
) -> Tensor:
    """Classifier-free guidance, ``D_∅ + scale·(D_c - D_∅)``.

    Args:
        scale: the CFG scale (1: no guidance), one for all or one for each sample (B,).
        as_written: add up as the formula says; torch.lerp rounds otherwise where the scale is
            above 1/2. What was first trained in this way comes out the same, bit for bit.
    """
    scale = stretched(scale, cond) if isinstance(scale, Tensor) else scale
    return uncond + scale * (cond - uncond) if as_written else torch.lerp(uncond, cond, scale)


def cfg(
    denoise: Callable[..., Tensor],
    labels: Tensor,
    null: int,
    scale: Tensor | float,
    as_written: bool = False,
) -> Denoiser:
    """The denoiser of `cfg_mix`, both halves in one call.

    Args:
        denoise: ``(x, level, cond=labels) -> D``; its level is σ or whatever else it takes.
        labels: int64 (B,).
        null: the label that stands for none.
        scale, as_written: see `cfg_mix`.
    """
    both = torch.cat((torch.full_like(labels, null), labels))

    def guided(x: Tensor, level: Tensor) -> Tensor:
        halves = denoise(torch.cat((x, x)), torch.cat((level, level)), cond=both)
        uncond, cond = halves.chunk(2)
        return cfg_mix(uncond, cond, scale, as_written)

    return guided


def ddim(denoised: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """DDIM's step ``D + (x - D)·σ'/σ``, up or down."""
    return torch.lerp(denoised, x, stretched(sigma_next / sigma, x))


def second_share(sigma: Tensor, middle: Tensor, end: Tensor) -> Tensor:
    """The second estimate's share in `jump_target`: ``(1 - σ''/σ') / (1 - σ''/σ)``, (B,)."""
    return (sigma * (middle - end)) / (middle * (sigma - end))


def jump_target(denoise: Denoiser, x: Tensor, sigma: Tensor, middle: Tensor, end: Tensor) -> Tensor:
    """The estimate x̃ with which one DDIM step σ → σ'' lands where two of ``denoise`` land::

        x' = D(x, σ) + (x - D(x, σ))·σ'/σ
        x̃ = (x'' - (σ''/σ)·x) / (1 - σ''/σ) = (1-s)·D(x, σ) + s·D(x', σ')

    with s of `second_share`: a mean of the two estimates, so that nothing cancels where the steps
    are small. At σ'' = 0 it is the second estimate. It holds upwards too (σ < σ' < σ''), and σ' = σ
    stands for a single step, σ → σ''.

    Args:
        x: ``(B, *shape)``, at the level σ.
        sigma, middle, end: (B,), σ, σ' > 0 and σ''.

    Source: Salimans and Ho 2022, Algorithm 2; Meng et al. 2023, Algorithms 3 to 5, where the
    VP's α'' - (σ''/σ)α divided by α'' is the 1 - σ''/σ of VE.
    """
    first = denoise(x, sigma)
    second = denoise(ddim(first, x, sigma, middle), middle)
    return torch.lerp(first, second, stretched(second_share(sigma, middle, end), x))


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "truncated": lambda snr: snr.clamp(min=1),
    "snr+1": lambda snr: snr + 1,
    "snr": lambda snr: snr,
    "constant": torch.ones_like,
}
"""ω as a function of the signal-to-noise ratio 1/σ²."""


def weighted_error(estimate: Tensor, target: Tensor, sigma: Tensor, weighting: Weighting) -> Tensor:
    """The mean over all values of ``ω·(D - x̃)²``, 0-dim, with ω of SNR = 1/σ².

    - truncated: max(SNR, 1), the larger of the errors of x0 and of ε
    - snr+1: SNR + 1, the error of v
    - snr: SNR, the error of ε
    - constant: 1, the error of x0

    Source: Salimans and Ho 2022, section 4.
    """
    weight = WEIGHTS[weighting](sigma**-2)
    return (stretched(weight, estimate) * (estimate - target) ** 2).mean()
