"""Solvers of the reverse SDE; at η = 0 they solve the ODE.

Their default noise is k-diffusion's Brownian tree, whose increments belong to one path, whatever
the steps; without k-diffusion it is `kdpp.BrownianNoise`. Any ``noise_sampler`` may take its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor

from kdpp.driver import Callback, ExtraArgs, sample
from kdpp.noise import NoiseSampler
from kdpp.plan import (
    Row,
    Stage,
    Step,
    ancestral_split,
    euler_row,
    is_first_order,
    level_before,
    level_ratio,
    two_stages,
)
from kdpp.solver import ANCESTRAL, Option, solver
from kdpp.solvers.multistep import estimates_row, two_estimates
from kdpp.solvers.singlestep import MIDDLE

__all__ = [
    "sample_dpmpp_2m_sde_tg",
    "sample_dpmpp_3m_sde_o3_tg",
    "sample_dpmpp_3m_sde_tg",
    "sample_dpmpp_sde_tg",
]


@solver(order=2, evaluations=2, options={**ANCESTRAL, "r": MIDDLE}, noise="brownian")
def dpmpp_sde(sigmas: Sequence[float], eta: float, s_noise: float, r: float) -> Iterator[Step]:
    """2S whose middle point, at the fraction r of the step in -log σ, is ancestral too."""
    for sigma, sigma_next in pairwise(sigmas):
        sigma_down, noise = ancestral_split(sigma, sigma_next, eta, s_noise)
        if is_first_order(sigma, sigma_next):
            yield Step.single(sigma, sigma_next, euler_row(sigma, sigma_down, noise))
            continue
        middle = sigma * (sigma_next / sigma) ** r
        middle_down, middle_noise = ancestral_split(sigma, middle, eta, s_noise)
        weight = (1.0 - sigma_down / sigma) / (2.0 * r)
        (_, to_end) = two_stages(sigma, middle, sigma_down, weight, noise=noise)
        to_middle = Row(middle_down, direction=(1.0 - middle_down / sigma,), noise=middle_noise)
        yield Step(sigma, sigma_next, (Stage(sigma, to_middle), to_end))


@dpmpp_sde.public
def sample_dpmpp_sde_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    r: float = 0.5,
) -> Tensor:  # fmt: skip
    """DPM-Solver++ (stochastic): 2S with noise to the middle point and to the end.

    ``x' = e x + (1 - e)((1 - 1/(2r)) x̂ + x̂_u/(2r)) + (x̂_new,u - x̂_u) + σ_up n``, e = σ_down/σ. Two
    evaluations a step, one in the last; order 2 at η = 0. Raises ValueError for r outside (0, 1].

    Source: k-diffusion; Lu et al. 2022 (DPM-Solver++); the teacher's term as in Euler.
    """
    return sample(
        dpmpp_sde, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise, r=r,
    )  # fmt: skip


def sde_split(
    sigma: float, sigma_next: float, eta: float, s_noise: float
) -> tuple[float, float | None]:
    """(σ_down, noise) of the exact SDE: ``σ' e^{-ηh}`` and ``s_noise σ' sqrt(1 - e^{-2ηh})``."""
    if sigma_next in (0.0, sigma):
        return ancestral_split(sigma, sigma_next, eta, s_noise)
    decay = (sigma_next / sigma) ** eta
    noise = s_noise * sigma_next * math.sqrt(1.0 - decay * decay)
    return sigma_next * decay, noise if eta * s_noise > 0.0 else None


TYPE = Option("midpoint", choices=("midpoint", "heun"))


@solver(order=2, options={**ANCESTRAL, "solver_type": TYPE}, noise="brownian")
def dpmpp_2m_sde(
    sigmas: Sequence[float], eta: float, s_noise: float, solver_type: str
) -> Iterator[Step]:
    """`two_estimates` to the exact SDE's σ_down; c by the type, with ``W = 1 - e^{-(1+η)h}``."""

    def slope(sigma: float, sigma_next: float, sigma_down: float) -> tuple[float, float]:
        h, total = math.log(sigma / sigma_next), 1.0 - sigma_down / sigma
        return (total / 2.0 if solver_type == "midpoint" else 1.0 - total / ((1.0 + eta) * h)), h

    return two_estimates(sigmas, partial(sde_split, eta=eta, s_noise=s_noise), slope)


@dpmpp_2m_sde.public
def sample_dpmpp_2m_sde_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) SDE: ``x' = σ'/σ e^{-ηh} x + W x̂ + c (x̂ - x̂_prev)/r + (x̂_new - x̂) + s n``.

    ``W = 1 - e^{-(1+η)h}``, ``s = σ' sqrt(1 - e^{-2ηh})``; c = W/2 for ``solver_type`` "midpoint",
    ``1 - W/((1+η)h)`` for "heun". One evaluation a step; order 2 at η = 0.

    Source: k-diffusion; Lu et al. 2022 (DPM-Solver++), SDE-DPM-Solver++(2M).
    """
    return sample(
        dpmpp_2m_sde, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise, solver_type=solver_type,
    )  # fmt: skip


def three_estimates(
    sigmas: Sequence[float], eta: float, s_noise: float, third_order: bool
) -> Iterator[Step]:
    """``σ_down/σ x + W d + φ_2 d' - φ_3 d''`` from two earlier estimates, or fewer.

    d' and d'' are the first and second divided differences of the estimates in -log σ, times h and
    h². d'' is half the second derivative, so third order needs it twice; and a start by 2S.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        sigma_down, noise = sde_split(sigma, sigma_next, eta, s_noise)
        before = level_before(sigmas, i)
        total = 1.0 - level_ratio(sigma, sigma_down)
        if is_first_order(sigma, sigma_next) or (before is None and not third_order):
            yield Step.single(sigma, sigma_next, euler_row(sigma, sigma_down, noise))
            continue
        if before is None:
            middle = math.sqrt(sigma * sigma_next)
            stages = two_stages(sigma, middle, sigma_down, total, noise=noise)
            yield Step(sigma, sigma_next, stages)
            continue
        h = math.log(sigma / sigma_next)
        phi_2 = 1.0 - total / ((1.0 + eta) * h)
        phi_3 = phi_2 / ((1.0 + eta) * h) - 0.5
        r_0 = math.log(sigmas[before] / sigma) / h
        weights = {i: total, before: 0.0}
        earlier = level_before(sigmas, before)
        if earlier is None:
            add_difference(weights, phi_2 / r_0, i, before)
        else:
            r_1 = math.log(sigmas[earlier] / sigmas[before]) / h
            bend = (phi_2 * r_0 - (2.0 if third_order else 1.0) * phi_3) / (r_0 + r_1)
            weights[earlier] = 0.0
            add_difference(weights, (phi_2 + bend) / r_0, i, before)
            add_difference(weights, -bend / r_1, before, earlier)
        yield Step.single(sigma, sigma_next, estimates_row(i, sigma_down, weights, noise))


def add_difference(weights: dict[int, float], factor: float, newer: int, older: int) -> None:
    """Add ``factor·(d_newer - d_older)``."""
    weights[newer] += factor
    weights[older] -= factor


@solver(order=2, options=ANCESTRAL, noise="brownian")
def dpmpp_3m_sde(sigmas: Sequence[float], eta: float, s_noise: float) -> Iterator[Step]:
    """`three_estimates` with half of the second difference, from an Euler start."""
    return three_estimates(sigmas, eta, s_noise, third_order=False)


@dpmpp_3m_sde.public
def sample_dpmpp_3m_sde_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(3M) SDE as k-diffusion, diffusers and the authors' code have it: of order 2.

    ``x' = σ'/σ e^{-ηh} x + W x̂ + φ_2 d' - φ_3 d'' + (x̂_new - x̂) + s n`` with the difference
    quotients d', d'' of three estimates; the weight of d'' is half of what third order needs, see
    `sample_dpmpp_3m_sde_o3_tg`. One evaluation a step.

    Source: k-diffusion.
    """
    return sample(
        dpmpp_3m_sde, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


@solver(order=3, extra=1, options=ANCESTRAL, noise="brownian")
def dpmpp_3m_sde_o3(sigmas: Sequence[float], eta: float, s_noise: float) -> Iterator[Step]:
    """`three_estimates` with the whole second difference, from a start by 2S."""
    return three_estimates(sigmas, eta, s_noise, third_order=True)


@dpmpp_3m_sde_o3.public
def sample_dpmpp_3m_sde_o3_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(3M) SDE of true third order: ``… + φ_2 d' - 2 φ_3 d'' + …``.

    One evaluation a step, and one more in the first, which is 2S: an Euler start would hold the
    whole run to order 2. With few steps it was mostly worse than `sample_dpmpp_3m_sde_tg`.

    Source: the expansion of the exponential integral, Lu et al. 2022 (DPM-Solver++), section 4.
    """
    return sample(
        dpmpp_3m_sde_o3, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip
