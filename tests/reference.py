"""Slow, literal references, written from the papers' formulas without kdpp.

`dpmpp_2s_vp` and `dpmpp_2m_vp` are Algorithms 1 and 2 of DPM-Solver++ (Lu et al.,
arXiv:2211.01095) in the paper's own variance-preserving notation. The others are the
teacher-guided solvers in the variance-exploding one, each written out on its own: t = -log(sigma).
Estimates are functions `(x, sigma) -> x0`, with `sigma` a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, expm1, inf, log, sqrt

import torch
from torch import Tensor

from problems import pairs

Estimate = Callable[[Tensor, float], Tensor]
Noise = Callable[[float, float], Tensor]


# ------------------------------------------------------- DPM-Solver++ in the paper's notation


def _vp(sigma: float) -> tuple[float, float, float]:
    """alpha_t, sigma_t and lambda_t = log(alpha_t / sigma_t) of the VE level `sigma`."""
    alpha = 1 / sqrt(1 + sigma**2)
    return alpha, sigma * alpha, log(alpha / (sigma * alpha))


def _data_prediction(estimate: Estimate) -> Estimate:
    """x_theta of a VP latent."""
    return lambda x, sigma: estimate(x * sqrt(1 + sigma**2), sigma)


def dpmpp_2s_vp(estimate: Estimate, x: Tensor, sigmas: Tensor, r: float = 0.5) -> Tensor:
    """DPM-Solver++(2S), Algorithm 1; `x` and the result are VE latents."""
    x_theta = _data_prediction(estimate)
    x = x / sqrt(1 + float(sigmas[0]) ** 2)
    for before, after in pairs(sigmas):
        _, sigma_before, lambda_before = _vp(before)
        alpha_after, sigma_after, lambda_after = _vp(after)
        h = lambda_after - lambda_before
        middle = exp(-(lambda_before + r * h))
        alpha_middle, sigma_middle, _ = _vp(middle)
        first = x_theta(x, before)
        u = sigma_middle / sigma_before * x - alpha_middle * (exp(-r * h) - 1) * first
        d = (1 - 1 / (2 * r)) * first + 1 / (2 * r) * x_theta(u, middle)
        x = sigma_after / sigma_before * x - alpha_after * (exp(-h) - 1) * d
    return x * sqrt(1 + float(sigmas[-1]) ** 2)


def dpmpp_2m_vp(estimate: Estimate, x: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M), Algorithm 2; `x` and the result are VE latents."""
    x_theta = _data_prediction(estimate)
    x = x / sqrt(1 + float(sigmas[0]) ** 2)
    buffer: list[Tensor] = []
    steps: list[float] = []
    for before, after in pairs(sigmas):
        _, sigma_before, lambda_before = _vp(before)
        alpha_after, sigma_after, lambda_after = _vp(after)
        h = lambda_after - lambda_before
        buffer.append(x_theta(x, before))
        if len(buffer) == 1:
            d = buffer[-1]
        else:
            r = steps[-1] / h
            d = (1 + 1 / (2 * r)) * buffer[-1] - 1 / (2 * r) * buffer[-2]
        steps.append(h)
        x = sigma_after / sigma_before * x - alpha_after * (exp(-h) - 1) * d
    return x * sqrt(1 + float(sigmas[-1]) ** 2)


# ------------------------------------------------------- teacher revision


@dataclass
class Revision:
    """Distillation++, Algorithm 1, lines 9-16 (supplement), divided by alpha_s."""

    teacher: Estimate
    noise: Callable[[], Tensor]
    scale: float = 0.0
    steps: int = 1
    renoise: str | float = "next"
    eta: float = 1.0

    def __call__(self, at: Moment, estimate: Tensor, direction: Tensor) -> Tensor:
        """(1 - lambda) * estimate + lambda * teacher(estimate + sigma_s * epsilon)."""
        sigma_s = {"next": at.sigma_next, "current": at.sigma}.get(str(self.renoise))
        sigma_s = float(self.renoise) if sigma_s is None else sigma_s
        if at.step >= self.steps or self.scale == 0 or sigma_s == 0:
            return estimate
        predicted = (at.point - direction) / at.point_sigma
        epsilon = sqrt(1 - self.eta**2) * predicted
        if self.eta > 0:
            epsilon = epsilon + self.eta * self.noise()
        renoised = estimate + sigma_s * epsilon
        return (1 - self.scale) * estimate + self.scale * self.teacher(renoised, sigma_s)


@dataclass
class Moment:
    """Where in a run an estimate was made: the step, its levels, the point and its level."""

    step: int
    sigma: float
    sigma_next: float
    point: Tensor
    point_sigma: float


def _ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """sigma_down and sigma_up (Song et al.; k-diffusion's get_ancestral_step)."""
    variance = sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2
    up = min(sigma_next, eta * sqrt(variance))
    return sqrt(max(sigma_next**2 - up**2, 0.0)), up


def _time(sigma: float) -> float:
    """t = -log(sigma), infinite at 0."""
    return inf if sigma == 0 else -log(sigma)


def _noised(x: Tensor, noise: Noise, sigma: float, sigma_next: float, up: float) -> Tensor:
    """Adds the noise that ends a step to a level above 0."""
    return x + up * noise(sigma, sigma_next) if sigma_next > 0 else x


# ------------------------------------------------------- the solvers


def euler(
    estimate: Estimate,
    uncond: Estimate,
    revise: Revision,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = inf,
    s_noise: float = 1.0,
    cfg_pp: bool = False,
) -> Tensor:
    """x' = x_new + (x - x0)/sigma * sigma', after Karras et al.'s churn."""
    for i, (sigma, sigma_next) in enumerate(pairs(sigmas)):
        gamma = min(s_churn / (len(sigmas) - 1), sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        hat = sigma * (1 + gamma)
        fresh = torch.randn_like(x)
        if gamma > 0:
            x = x + s_noise * sqrt(hat**2 - sigma**2) * fresh
        x0 = estimate(x, hat)
        direction = uncond(x, hat) if cfg_pp else x0
        new = revise(Moment(i, sigma, sigma_next, x, hat), x0, direction)
        x = new + (x - direction) / hat * sigma_next
    return x


def euler_ancestral(
    estimate: Estimate,
    uncond: Estimate,
    revise: Revision,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    cfg_pp: bool = False,
) -> Tensor:
    """x' = x_new + (x - x0)/sigma * sigma_down + sigma_up * n."""
    for i, (sigma, sigma_next) in enumerate(pairs(sigmas)):
        down, up = _ancestral(sigma, sigma_next, eta)
        x0 = estimate(x, sigma)
        direction = uncond(x, sigma) if cfg_pp else x0
        new = revise(Moment(i, sigma, sigma_next, x, sigma), x0, direction)
        x = new + (x - direction) / sigma * down
        x = _noised(x, noise, sigma, sigma_next, s_noise * up)
    return x


def dpmpp_2s_ancestral(
    estimate: Estimate,
    uncond: Estimate,
    revise: Revision,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Tensor:
    """DPM-Solver++(2S) to sigma_down; the second estimate is the one that is revised."""
    for i, (sigma, sigma_next) in enumerate(pairs(sigmas)):
        down, up = _ancestral(sigma, sigma_next, eta)
        x0 = estimate(x, sigma)
        if down == 0:
            x = revise(Moment(i, sigma, sigma_next, x, sigma), x0, x0)
        else:
            t, h = _time(sigma), _time(down) - _time(sigma)
            sigma_u = exp(-(t + r * h))
            u = exp(-r * h) * x + (1 - exp(-r * h)) * x0
            x0_u = estimate(u, sigma_u)
            new_u = revise(Moment(i, sigma, sigma_next, u, sigma_u), x0_u, x0_u)
            base = exp(-h) * x + (1 - exp(-h)) * x0 + (1 - exp(-h)) / (2 * r) * (x0_u - x0)
            x = base + (1 - exp(-h)) / (2 * r) * (new_u - x0_u)
        x = _noised(x, noise, sigma, sigma_next, s_noise * up)
    return x


def dpmpp_2s_ancestral_cfg_pp(
    estimate: Estimate,
    uncond: Estimate,
    revise: Revision,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Tensor:
    """Distillation++, eq. (12), to sigma_down; Euler CFG++ where sigma_down is 0."""
    for i, (sigma, sigma_next) in enumerate(pairs(sigmas)):
        down, up = _ancestral(sigma, sigma_next, eta)
        free = uncond(x, sigma)
        if down == 0:
            x = revise(Moment(i, sigma, sigma_next, x, sigma), estimate(x, sigma), free)
        else:
            t, h = _time(sigma), _time(down) - _time(sigma)
            sigma_u = exp(-(t + r * h))
            u = exp(-r * h) * x + (1 - exp(-r * h)) * free
            new_u = revise(
                Moment(i, sigma, sigma_next, u, sigma_u), estimate(u, sigma_u), uncond(u, sigma_u)
            )
            x = free - exp(-h) * free + (1 - exp(-h)) / (2 * r) * (new_u - free) + exp(-h) * x
        x = _noised(x, noise, sigma, sigma_next, s_noise * up)
    return x


def dpmpp_2m(
    estimate: Estimate,
    uncond: Estimate,
    revise: Revision,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver++(2M), to sigma_down where eta > 0; the history is the unrevised estimate."""
    previous: tuple[Tensor, float] | None = None
    for i, (sigma, sigma_next) in enumerate(pairs(sigmas)):
        down, up = _ancestral(sigma, sigma_next, eta)
        x0 = estimate(x, sigma)
        new = revise(Moment(i, sigma, sigma_next, x, sigma), x0, x0)
        if previous is None or down == 0:
            base = x0 + (x - x0) / sigma * down
        else:
            before, sigma_before = previous
            h, h_before = _time(down) - _time(sigma), _time(sigma) - _time(sigma_before)
            r = h_before / h
            base = exp(-h) * x - expm1(-h) * ((1 + 1 / (2 * r)) * x0 - before / (2 * r))
        x = base + (new - x0)
        x = _noised(x, noise, sigma, sigma_next, s_noise * up)
        previous = (x0, sigma)
    return x


def dpmpp_2m_ancestral(
    estimate: Estimate,
    uncond: Estimate,
    revise: Revision,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """2M with its steps to sigma_down and sigma_up * n after them."""
    return dpmpp_2m(estimate, uncond, revise, x, sigmas, noise, eta=eta, s_noise=s_noise)


def dpmpp_2m_cfg_pp(
    estimate: Estimate,
    uncond: Estimate,
    revise: Revision,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
) -> Tensor:
    """x' = x_new - e^-h x0_free + (1 - e^-h)/(2r) (x0_free - x0_free,prev) + e^-h x."""
    previous: tuple[Tensor, float] | None = None
    for i, (sigma, sigma_next) in enumerate(pairs(sigmas)):
        free = uncond(x, sigma)
        new = revise(Moment(i, sigma, sigma_next, x, sigma), estimate(x, sigma), free)
        e = sigma_next / sigma
        if previous is None or sigma_next == 0:
            x = new - e * free + e * x
        else:
            before, sigma_before = previous
            h, h_before = _time(sigma_next) - _time(sigma), _time(sigma) - _time(sigma_before)
            x = new - e * free + (1 - e) / (2 * h_before / h) * (free - before) + e * x
        previous = (free, sigma)
    return x


def lcm(
    estimate: Estimate,
    uncond: Estimate,
    revise: Revision,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
) -> Tensor:
    """Multistep random sampling: x' = x_new + sigma' * n."""
    for i, (sigma, sigma_next) in enumerate(pairs(sigmas)):
        x0 = estimate(x, sigma)
        x = revise(Moment(i, sigma, sigma_next, x, sigma), x0, x0)
        x = _noised(x, noise, sigma, sigma_next, sigma_next)
    return x


def _plus_plus(solver: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The CFG++ form of a solver that has one under the flag `cfg_pp`."""
    return lambda *args, **options: solver(*args, **options, cfg_pp=True)


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_ancestral": dpmpp_2m_ancestral,
    "lcm": lcm,
    "euler_cfg_pp": _plus_plus(euler),
    "euler_ancestral_cfg_pp": _plus_plus(euler_ancestral),
    "dpmpp_2s_ancestral_cfg_pp": dpmpp_2s_ancestral_cfg_pp,
    "dpmpp_2m_cfg_pp": dpmpp_2m_cfg_pp,
}
