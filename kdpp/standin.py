"""k-diffusion's denoisers and schedules, from their formulas, for where it is not installed.

`kdpp.kdiffusion` hands them out there, under k-diffusion's names and with its arguments; they give
what k-diffusion 0.1.1.post1 gives, bit for bit. Its training losses are left out.

A denoiser makes D, an estimate of x0 in ``x = x0 + σ n``, of what its network predicts. x has the
shape ``(batch, *shape)``, σ ``(batch,)``; further arguments go to the network. With the network's
time t(σ) and σ_data, the standard deviation of the data (1 where it is no argument)::

    c_in = 1/sqrt(σ² + σ_data²),   c_skip = (σ_data c_in)²,   c_out = σ σ_data c_in

    ε     D = x - σ ε(c_in x, t)
    v     D = c_skip x - c_out v(c_in x, t)
    EDM   D = c_skip x + c_out F(c_in x, σ)

Sources: ε: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. (15), with
``x = x_t/sqrt(ᾱ_t)`` and ``σ² = (1 - ᾱ_t)/ᾱ_t``. v: Salimans & Ho 2022, "Progressive Distillation",
section 4. EDM: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
Models", eq. (7) and Table 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "CompVisDenoiser",
    "CompVisVDenoiser",
    "Denoiser",
    "DiscreteEpsDDPMDenoiser",
    "DiscreteSchedule",
    "DiscreteVDDPMDenoiser",
    "OpenAIDenoiser",
    "VDenoiser",
    "append_dims",
    "append_zero",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
]


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """x with dimensions of length 1 after its own, ``target_dims`` in all; ValueError for fewer."""
    if x.ndim > target_dims:
        raise ValueError(f"x has {x.ndim} dimensions; it must have at most {target_dims}")
    return x.reshape(*x.shape, *[1] * (target_dims - x.ndim))


def append_zero(x: Tensor) -> Tensor:
    """The levels of a schedule, and 0."""
    return torch.cat((x, x.new_zeros(1)))


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Any = "cpu"
) -> Tensor:
    """n levels at equal steps of ``σ^(1/ρ)`` from σ_max to σ_min, then 0 (EDM, eq. 5)."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    roots = high + torch.linspace(0, 1, n) * (low - high)
    return append_zero(roots**rho).to(device)


def get_sigmas_exponential(
    n: int, sigma_min: float, sigma_max: float, device: Any = "cpu"
) -> Tensor:
    """n levels at equal steps of ``log σ`` from σ_max to σ_min, then 0."""
    logs = torch.linspace(math.log(sigma_max), math.log(sigma_min), n, device=device)
    return append_zero(logs.exp())


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: Any = "cpu"
) -> Tensor:
    """n levels ``σ_min (σ_max/σ_min)^(u^ρ)``, u from 1 to 0 in equal steps, then 0."""
    low, high = math.log(sigma_min), math.log(sigma_max)
    share = torch.linspace(1, 0, n, device=device) ** rho
    return append_zero((share * (high - low) + low).exp())


def get_sigmas_vp(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    device: Any = "cpu",
) -> Tensor:
    """n levels ``σ = sqrt(exp(β_d t²/2 + β_min t) - 1)``, t from 1 to eps_s in equal steps, then 0.

    Source: the VP process of Song et al. 2021, as EDM's Table 1 writes it.
    """
    t = torch.linspace(1, eps_s, n, device=device)
    return append_zero(((beta_d * t**2 / 2 + beta_min * t).exp() - 1).sqrt())


def edm_scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in of the module's first lines."""
    variance = sigma**2 + sigma_data**2
    root = variance.sqrt()
    return sigma_data**2 / variance, sigma * sigma_data / root, 1 / root


class Denoiser(nn.Module):
    """A network with EDM's preconditioning: ``network(c_in x, σ)``."""

    def __init__(self, inner_model: nn.Module, sigma_data: float = 1.0) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.sigma_data = sigma_data

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, ...]:
        return edm_scalings(sigma, self.sigma_data)

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        c_skip, c_out, c_in = (append_dims(c, x.ndim) for c in self.get_scalings(sigma))
        output: Tensor = self.inner_model(x * c_in, sigma, **kwargs)
        return output * c_out + x * c_skip


class _VPrediction(nn.Module):
    """What denoisers of v networks share; each has its own t(σ)."""

    inner_model: Any
    sigma_to_t: Any
    sigma_data = 1.0

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, ...]:
        c_skip, c_out, c_in = edm_scalings(sigma, self.sigma_data)
        return c_skip, -c_out, c_in

    def get_v(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner_model(*args, **kwargs)

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        c_skip, c_out, c_in = (append_dims(c, x.ndim) for c in self.get_scalings(sigma))
        v: Tensor = self.get_v(x * c_in, self.sigma_to_t(sigma), **kwargs)
        return v * c_out + x * c_skip


class VDenoiser(_VPrediction):
    """A v network on the continuous cosine schedule: ``t = (2/π) atan σ`` in [0, 1]."""

    def __init__(self, inner_model: nn.Module) -> None:
        super().__init__()
        self.inner_model = inner_model

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        return sigma.atan() / math.pi * 2

    def t_to_sigma(self, t: Tensor) -> Tensor:
        return (t * math.pi / 2).tan()


class DiscreteSchedule(nn.Module):
    """The levels of timesteps 0, 1, …; between two of them log σ is linear in t.

    Args:
        sigmas: the level of each timestep, rising.
        quantize: True takes the nearest timestep, in log σ, instead of one between two.
    """

    sigmas: Tensor
    log_sigmas: Tensor

    def __init__(self, sigmas: Tensor, quantize: bool) -> None:
        super().__init__()
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("log_sigmas", sigmas.log())
        self.quantize = quantize

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """n levels at equal steps of t, or all for None, from the highest to the lowest; then 0."""
        if n is None:
            return append_zero(self.sigmas.flip(0))
        last = len(self.sigmas) - 1
        return append_zero(self.t_to_sigma(torch.linspace(last, 0, n, device=self.sigmas.device)))

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """t of a level: a whole number if quantised; outside the table that of its nearer end."""
        level, table = sigma.log(), self.log_sigmas
        away = level[..., None] - table
        if self.quantize if quantize is None else quantize:
            return away.abs().argmin(-1)
        low = ((away >= 0).sum(-1) - 1).clamp(0, len(table) - 2)
        share = ((table[low] - level) / (table[low] - table[low + 1])).clamp(0, 1)
        return (1 - share) * low + share * (low + 1)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The level of t in [0, number of timesteps - 1]."""
        t = t.float()
        low, high, share = t.floor().long(), t.ceil().long(), t.frac()
        return ((1 - share) * self.log_sigmas[low] + share * self.log_sigmas[high]).exp()


def vp_sigmas(alphas_cumprod: Tensor) -> Tensor:
    """``σ = sqrt((1 - ᾱ)/ᾱ)``."""
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


class DiscreteEpsDDPMDenoiser(DiscreteSchedule):
    """A network that predicts ε at discrete timesteps, with their ᾱ."""

    sigma_data = 1.0

    def __init__(self, model: Any, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(vp_sigmas(alphas_cumprod), quantize)
        self.inner_model = model

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """-σ and c_in."""
        return -sigma, edm_scalings(sigma, self.sigma_data)[2]

    def get_eps(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner_model(*args, **kwargs)

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        c_out, c_in = (append_dims(c, x.ndim) for c in self.get_scalings(sigma))
        eps: Tensor = self.get_eps(x * c_in, self.sigma_to_t(sigma), **kwargs)
        return x + eps * c_out


class OpenAIDenoiser(DiscreteEpsDDPMDenoiser):
    """An ε network of OpenAI's guided-diffusion, whose ``diffusion`` has the ᾱ.

    ``has_learned_sigmas``: the second half of its output's channels are variances, and dropped.
    """

    def __init__(
        self,
        model: Any,
        diffusion: Any,
        quantize: bool = False,
        has_learned_sigmas: bool = True,
        device: Any = "cpu",
    ) -> None:
        alphas_cumprod = torch.as_tensor(
            diffusion.alphas_cumprod, dtype=torch.float32, device=device
        )
        super().__init__(model, alphas_cumprod, quantize)
        self.has_learned_sigmas = has_learned_sigmas

    def get_eps(self, *args: Any, **kwargs: Any) -> Any:
        output = super().get_eps(*args, **kwargs)
        return output.chunk(2, dim=1)[0] if self.has_learned_sigmas else output


class CompVisDenoiser(DiscreteEpsDDPMDenoiser):
    """An ε model with Stable Diffusion's ``apply_model(x, t, cond)`` and ``alphas_cumprod``.

    ``device`` is not used: the schedule lies where ``alphas_cumprod`` does.
    """

    def __init__(self, model: Any, quantize: bool = False, device: Any = "cpu") -> None:
        super().__init__(model, model.alphas_cumprod, quantize)

    def get_eps(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner_model.apply_model(*args, **kwargs)


class DiscreteVDDPMDenoiser(_VPrediction, DiscreteSchedule):
    """A network that predicts v at discrete timesteps, with their ᾱ."""

    def __init__(self, model: Any, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(vp_sigmas(alphas_cumprod), quantize)
        self.inner_model = model


class CompVisVDenoiser(DiscreteVDDPMDenoiser):
    """A v model with ``apply_model`` and ``alphas_cumprod``; it is given ``cond`` and nothing else.

    ``device`` is not used: the schedule lies where ``alphas_cumprod`` does.
    """

    def __init__(self, model: Any, quantize: bool = False, device: Any = "cpu") -> None:
        super().__init__(model, model.alphas_cumprod, quantize)

    def get_v(self, x: Tensor, t: Tensor, cond: Any, **kwargs: Any) -> Any:
        return self.inner_model.apply_model(x, t, cond)
