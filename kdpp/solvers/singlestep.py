"""Single-step solvers: two or three evaluations a step, no memory of earlier ones."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpp.driver import Callback, run
from kdpp.noise import NoiseSampler
from kdpp.plan import (
    VE,
    Row,
    Stage,
    Step,
    ancestral_split,
    churned,
    euler_row,
    level_ratio,
    nonnegative,
)
from kdpp.solvers.registry import ExtraArgs, solver

__all__ = [
    "sample_dpm_2_ancestral_tg",
    "sample_dpm_2_tg",
    "sample_dpm_fast_tg",
    "sample_dpmpp_2s_ancestral_cfg_pp_tg",
    "sample_dpmpp_2s_ancestral_tg",
    "sample_heun_tg",
]


def two_stages(
    sigma: float,
    sigma_middle: float,
    sigma_end: float,
    weight: float,
    denoised: float = 1.0,
    noise: float | None = None,
) -> tuple[Stage, Stage]:
    """A first-order step to a middle point u, and one to the end that weighs its estimate, d_u.

    ``x' = e x + (1 - e - weight) d + weight d_u``, with e = σ_end/σ; of the newest estimate's
    weight ``denoised`` is revisable, the rest is direction.
    """
    ratio = sigma_end / sigma
    to_middle = Row(sigma_middle, direction=(1.0 - sigma_middle / sigma,))
    to_end = Row(sigma_end, denoised, (weight - denoised, 1.0 - ratio - weight), noise)
    return Stage(sigma, to_middle), Stage(sigma_middle, to_end)


def is_first_order(sigma: float, target: float) -> bool:
    """Whether a step must be Euler: from σ = ∞, to σ = 0, or of no length."""
    return level_ratio(sigma, target) in (0.0, 1.0)


# --------------------------------------------------------------------------------- Heun, DPM-Solver


def heun(
    sigmas: Sequence[float], s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> Iterator[Step]:
    """Euler to σ', then the mean of both slopes; Euler alone to σ' = 0."""
    lifts = churned(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    for (sigma, sigma_next), (sigma_hat, churn) in zip(pairwise(sigmas), lifts):
        if is_first_order(sigma_hat, sigma_next):
            stages: tuple[Stage, ...] = (Stage(sigma_hat, euler_row(sigma_hat, sigma_next)),)
        else:
            weight = (sigma_hat - sigma_next) / (2.0 * sigma_next)
            stages = two_stages(sigma_hat, sigma_next, sigma_next, weight)
        yield Step(sigma, sigma_next, stages, churn)


@solver(order=2, evaluations=2)
def sample_heun_tg(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun: ``x' = x + (σ' - σ)/2·((x - x̂)/σ + (x_2 - x̂_2)/σ') + (x̂_new,2 - x̂_2)``.

    x_2 is Euler's point at σ', and x̂_2 its estimate, which the teacher revises. Two evaluations a
    step, one in the last; order 2. On few steps it is far behind 2S: its slope at σ' divides by σ'.

    Source: Karras et al. 2022, Algorithm 2; the teacher's term as in Euler.
    """
    plan = partial(heun, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    return run(plan, model, x, sigmas, extra_args, callback, disable)


def dpm_2(
    sigmas: Sequence[float], s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> Iterator[Step]:
    """Euler to sqrt(σ̂ σ'), then the whole step with the slope found there."""
    lifts = churned(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    for (sigma, sigma_next), (sigma_hat, churn) in zip(pairwise(sigmas), lifts):
        if is_first_order(sigma_hat, sigma_next):
            stages: tuple[Stage, ...] = (Stage(sigma_hat, euler_row(sigma_hat, sigma_next)),)
        else:
            middle = math.sqrt(sigma_hat * sigma_next)
            stages = two_stages(sigma_hat, middle, sigma_next, (sigma_hat - sigma_next) / middle)
        yield Step(sigma, sigma_next, stages, churn)


@solver(order=2, evaluations=2)
def sample_dpm_2_tg(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver-2: ``x' = x + (σ' - σ)·(u - x̂_u)/σ_u + (x̂_new,u - x̂_u)``, σ_u = sqrt(σ σ').

    u is Euler's point at σ_u. Two evaluations a step, one in the last; order 2.

    Source: Lu et al. 2022 (DPM-Solver), as in k-diffusion; the teacher's term as in Euler.
    """
    plan = partial(dpm_2, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    return run(plan, model, x, sigmas, extra_args, callback, disable)


def dpm_2_ancestral(sigmas: Sequence[float], eta: float, s_noise: float) -> Iterator[Step]:
    """DPM-Solver-2 to σ_down, then ``+ σ_up n``."""
    nonnegative(eta=eta, s_noise=s_noise)
    for sigma, sigma_next in pairwise(sigmas):
        sigma_down, noise = ancestral_split(sigma, sigma_next, eta, s_noise)
        if is_first_order(sigma, sigma_down):
            yield Step.single(sigma, sigma_next, euler_row(sigma, sigma_down, noise))
            continue
        middle = math.sqrt(sigma * sigma_down)
        weight = (sigma - sigma_down) / middle
        yield Step(sigma, sigma_next, two_stages(sigma, middle, sigma_down, weight, noise=noise))


@solver(order=2, evaluations=2)
def sample_dpm_2_ancestral_tg(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral DPM-Solver-2: `sample_dpm_2_tg`'s step to σ_down, then ``+ σ_up n``.

    Two evaluations a step, one in the last; order 2 at η = 0.

    Source: k-diffusion; the teacher's term as in Euler.
    """
    plan = partial(dpm_2_ancestral, eta=eta, s_noise=s_noise)
    return run(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler)


# -------------------------------------------------------------------------------- DPM-Solver++(2S)


def dpmpp_2s_ancestral(
    sigmas: Sequence[float], eta: float, s_noise: float, r: float = 0.5
) -> Iterator[Step]:
    """With ``e^{-h} = σ_down/σ`` and the middle point u at the fraction r of the step in -log σ:

    ``u = e^{-rh} x + (1 - e^{-rh}) d``,
    ``x' = e^{-h} x + (1 - e^{-h}) d + (1 - e^{-h})/(2r)·(x̂_new,u - d) + σ_up n``.
    """
    nonnegative(eta=eta, s_noise=s_noise)
    check_middle(r)
    for sigma, sigma_next in pairwise(sigmas):
        sigma_down, noise = ancestral_split(sigma, sigma_next, eta, s_noise)
        if is_first_order(sigma, sigma_down):
            yield Step.single(sigma, sigma_next, euler_row(sigma, sigma_down, noise))
            continue
        ratio = sigma_down / sigma
        weight = (1.0 - ratio) / (2.0 * r)
        stages = two_stages(sigma, sigma * ratio**r, sigma_down, weight, weight, noise)
        yield Step(sigma, sigma_next, stages)


def check_middle(r: float) -> None:
    """ValueError for a middle point outside its step."""
    if not (isinstance(r, numbers.Real) and 0.0 < r <= 1.0):
        raise ValueError(f"r is {r!r}; the middle point lies in (0, 1] of the step")


@solver(order=2, evaluations=2)
def sample_dpmpp_2s_ancestral_tg(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    r: float = 0.5,
) -> Tensor:
    """Ancestral DPM-Solver++(2S), its middle point u at the fraction r of the step in -log σ.

    ``u = e^{-rh} x + (1 - e^{-rh}) x̂``,
    ``x' = e^{-h} x + (1 - e^{-h}) (x̂ + (x̂_new,u - x̂)/(2r)) + σ_up n``, with ``e^{-h} = σ_down/σ``:
    the estimate at u is the one the teacher revises, renoised to σ'. Two evaluations a step, one
    in the last; order 2 at η = 0. The paper's choice for SDXL-Turbo. Raises ValueError for r
    outside (0, 1].

    Source: Lu et al. 2022 (DPM-Solver++), Algorithm 1; Park et al. 2025, supplement 7.1.
    """
    plan = partial(dpmpp_2s_ancestral, eta=eta, s_noise=s_noise, r=r)
    return run(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler)


@solver(order=2, evaluations=2, cfg_pp=True)
def sample_dpmpp_2s_ancestral_cfg_pp_tg(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    r: float = 0.5,
) -> Tensor:
    """Ancestral DPM-Solver++(2S) with CFG++: x̂_∅ takes x̂'s place in the direction.

    ``u = e^{-rh} x + (1 - e^{-rh}) x̂_∅``,
    ``x' = e^{-h} x + (1 - e^{-h}) (x̂_∅ + (x̂_new,u - x̂_∅)/(2r)) + σ_up n``.
    This is equation (12) of Distillation++. The CFG++ authors' code has another form,
    ``x̂_u - e^{-h} x̂_∅,u + e^{-h} x``, and the web UIs have a third: figures do not carry over.

    Source: Park et al. 2025, supplement, equation (12).
    """
    plan = partial(dpmpp_2s_ancestral, eta=eta, s_noise=s_noise, r=r)
    return run(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler, cfg_pp=True)


# --------------------------------------------------------------------------------- DPM-Solver-fast


def fast_orders(n: int) -> list[int]:
    """The orders of the steps that make n evaluations: threes, then what is left."""
    m = n // 3 + 1
    return [3] * (m - 2) + [2, 1] if n % 3 == 0 else [3] * (m - 1) + [n % 3]


def dpm_fast(
    sigmas: Sequence[float], orders: Sequence[int], eta: float, s_noise: float
) -> Iterator[Step]:
    """Steps of DPM-Solver of the given orders to σ_down, then ``+ σ_up n``."""
    nonnegative(eta=eta, s_noise=s_noise)
    for (sigma, sigma_next), order in zip(pairwise(sigmas), orders):
        down, _ = ancestral_split(sigma, sigma_next, eta, s_noise)
        sigma_down = max(down, sigmas[-1])
        noise = s_noise * math.sqrt((sigma_next - sigma_down) * (sigma_next + sigma_down))
        stages = dpm_solver(sigma, sigma_down, order, noise if eta * s_noise > 0.0 else None)
        yield Step(sigma, sigma_next, stages)


def dpm_solver(
    sigma: float, target: float, order: int, noise: float | None = None
) -> tuple[Stage, ...]:
    """DPM-Solver-1, -2 (r = 1/2) or -3 (1/3, 2/3), in the noise ε = (x - d)/σ.

    Points and noises are vectors of the weights of (x, d, d_1, d_2), so the paper's formulas stand
    as they are: ``u = x - σ_u (e^{rh} - 1) ε - …``.
    """
    if order == 1 or target == sigma:
        return (Stage(sigma, euler_row(sigma, target, noise)),)
    h = math.log(sigma / target)
    x, *estimates = np.eye(order + 1)

    def level(r: float) -> float:
        return float(sigma * math.exp(-r * h))

    epsilon = (x - estimates[0]) / sigma
    r = 1 / order
    u = x - level(r) * math.expm1(r * h) * epsilon
    points, levels = [u], [level(r)]
    change = (u - estimates[1]) / level(r) - epsilon
    if order == 2:
        end = x - target * math.expm1(h) * (epsilon + change / (2 * r))
    else:
        r_2 = 2 / 3
        bend = math.expm1(r_2 * h) / (r_2 * h) - 1
        v = x - level(r_2) * (math.expm1(r_2 * h) * epsilon + r_2 / r * bend * change)
        points, levels = [u, v], [level(r), level(r_2)]
        change = (v - estimates[2]) / level(r_2) - epsilon
        bend = math.expm1(h) / h - 1
        end = x - target * (math.expm1(h) * epsilon + bend / r_2 * change)
    rows = [stage_row(sigma, point, j + 1) for j, point in enumerate(points)]
    rows.append(stage_row(sigma, end, order, denoised=1.0, noise=noise))
    return tuple(map(Stage, [sigma, *levels], rows))


def stage_row(
    sigma: float,
    weights: NDArray[np.float64],
    known: int,
    denoised: float = 0.0,
    noise: float | None = None,
) -> Row:
    """A row from the weights of (x, first estimate, second, …), of which ``known`` are made."""
    newest, *older = (float(weight) for weight in weights[known:0:-1])
    return Row(sigma * float(weights[0]), denoised, (newest - denoised, *older), noise)


@solver(order=2, evaluations=3, needs="σ_min > 0; its steps are its own")
def sample_dpm_fast_tg(
    model: Any,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    n: int,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver-fast: ``n`` evaluations from ``sigma_max`` to ``sigma_min``, in steps of order 3.

    Steps are equal in -log σ; the last one or two are of lower order, as the count demands, which
    holds the run to order 2 (3 where n = 2 modulo 3). It ends at sigma_min > 0. The teacher revises
    a guided step's newest estimate, with coefficient 1. The callback's dict also has ``t`` = -log σ
    and ``t_up``.

    Raises ValueError for levels that are not 0 < sigma_min ≤ sigma_max < ∞ (a flow model's: below
    τ = 1) and for n < 1.
    Source: Lu et al. 2022 (DPM-Solver), as in k-diffusion.
    """
    numeric = all(isinstance(level, numbers.Real | Tensor) for level in (sigma_min, sigma_max))
    if not (numeric and 0.0 < sigma_min <= sigma_max < math.inf):
        raise ValueError(
            f"sigma_min is {sigma_min!r} and sigma_max {sigma_max!r}; "
            "they must be 0 < sigma_min ≤ sigma_max < inf"
        )
    if not isinstance(n, numbers.Integral) or n < 1:
        raise ValueError(f"n is {n!r}; it must be a whole number of evaluations ≥ 1")
    space = getattr(model, "space", VE)
    low, high = space.sigma(float(sigma_min)), space.sigma(float(sigma_max))
    if math.isinf(high):
        raise ValueError(f"sigma_max is {sigma_max!r}, σ = ∞: steps equal in -log σ start below")
    orders = tuple(fast_orders(int(n)))
    sigmas = np.geomspace(high, low, len(orders) + 1).tolist()
    levels = torch.tensor([space.level(sigma) for sigma in sigmas], dtype=torch.float64)

    def tell(info: dict[str, Any]) -> None:
        if callback is not None:
            callback({**info, "t": -info["sigma"].log(), "t_up": -info["sigma_hat"].log()})

    plan = partial(dpm_fast, orders=orders, eta=eta, s_noise=s_noise)
    return run(plan, model, x, levels, extra_args, callback and tell, disable, noise_sampler)
