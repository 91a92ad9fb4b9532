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

from kdpp.driver import Callback, ExtraArgs, sample
from kdpp.noise import NoiseSampler
from kdpp.plan import (
    FLOW,
    VARIABLES,
    VE,
    Row,
    Stage,
    Step,
    ancestral,
    ancestral_split,
    euler_row,
    from_tau,
    rf_split,
    two_stages,
    with_churn,
)
from kdpp.solver import ANCESTRAL, CHURN, VARIABLE, Option, solver

__all__ = [
    "sample_dpm_2_ancestral_rf_tg",
    "sample_dpm_2_ancestral_tg",
    "sample_dpm_2_tg",
    "sample_dpm_fast_tg",
    "sample_dpmpp_2s_ancestral_cfg_pp_tg",
    "sample_dpmpp_2s_ancestral_rf_tg",
    "sample_dpmpp_2s_ancestral_tg",
    "sample_heun_tg",
]

# --------------------------------------------------------------------------------- Heun, DPM-Solver


def heun_stages(sigma: float, target: float, noise: float | None) -> tuple[Stage, ...]:
    """Euler to the target, then the whole step with the mean of both slopes."""
    return two_stages(sigma, target, target, (sigma - target) / (2.0 * target), noise=noise)


@solver(order=2, evaluations=2, options={**CHURN, **VARIABLE})
def heun(
    sigmas: Sequence[float], s_churn: float, s_tmin: float, s_tmax: float, s_noise: float,
    variable: str,
) -> Iterator[Step]:  # fmt: skip
    """Churn from σ to σ̂, then `heun_stages`."""
    return with_churn(sigmas, heun_stages, s_churn, s_tmin, s_tmax, s_noise, variable)


@heun.public
def sample_heun_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
    *, variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """Heun: ``x' = x + (σ' - σ)/2·((x - x̂)/σ + (x_2 - x̂_2)/σ') + (x̂_new,2 - x̂_2)``.

    x_2 is Euler's point at σ', and x̂_2 its estimate, which the teacher revises. Two evaluations a
    step, one in the last; order 2. On few steps it is far behind 2S: its slope at σ' divides by σ'.
    ``variable="tau"``: the rule over τ, see `kdpp.solvers`.

    Source: Karras et al. 2022, Algorithm 2; the teacher's term as in Euler.
    """
    return sample(
        heun, model, x, sigmas, extra_args, callback, disable,
        s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise,
        variable=variable,
    )  # fmt: skip


def dpm_2_stages(sigma: float, target: float, noise: float | None) -> tuple[Stage, ...]:
    """Euler to sqrt(σ σ_target), then the whole step with the slope found there."""
    middle = math.sqrt(sigma * target)
    return two_stages(sigma, middle, target, (sigma - target) / middle, noise=noise)


@solver(order=2, evaluations=2, options={**CHURN, **VARIABLE})
def dpm_2(
    sigmas: Sequence[float], s_churn: float, s_tmin: float, s_tmax: float, s_noise: float,
    variable: str,
) -> Iterator[Step]:  # fmt: skip
    """Churn from σ to σ̂, then `dpm_2_stages`."""
    return with_churn(sigmas, dpm_2_stages, s_churn, s_tmin, s_tmax, s_noise, variable)


@dpm_2.public
def sample_dpm_2_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
    *, variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """DPM-Solver-2: ``x' = x + (σ' - σ)·(u - x̂_u)/σ_u + (x̂_new,u - x̂_u)``, σ_u = sqrt(σ σ').

    u is Euler's point at σ_u. Two evaluations a step, one in the last; order 2. ``variable="tau"``:
    the rule over τ, see `kdpp.solvers`.

    Source: Lu et al. 2022 (DPM-Solver), as in k-diffusion; the teacher's term as in Euler.
    """
    return sample(
        dpm_2, model, x, sigmas, extra_args, callback, disable,
        s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise,
        variable=variable,
    )  # fmt: skip


@solver(order=2, evaluations=2, options=ANCESTRAL, noise="plain")
def dpm_2_ancestral(sigmas: Sequence[float], eta: float, s_noise: float) -> Iterator[Step]:
    """`dpm_2_stages` to σ_down, then ``+ σ_up n``."""
    return ancestral(sigmas, dpm_2_stages, eta, s_noise)


@dpm_2_ancestral.public
def sample_dpm_2_ancestral_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Ancestral DPM-Solver-2: `sample_dpm_2_tg`'s step to σ_down, then ``+ σ_up n``.

    Two evaluations a step, one in the last; order 2 at η = 0.

    Source: k-diffusion; the teacher's term as in Euler.
    """
    return sample(
        dpm_2_ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


@solver(order=2, evaluations=2, options=ANCESTRAL, noise="plain")
def dpm_2_ancestral_rf(sigmas: Sequence[float], eta: float, s_noise: float) -> Iterator[Step]:
    """`dpm_2_stages` over τ to `rf_split`'s level, then noise."""
    return ancestral(sigmas, dpm_2_stages, eta, s_noise, rf_split, "tau")


@dpm_2_ancestral_rf.public
def sample_dpm_2_ancestral_rf_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Ancestral DPM-Solver-2 as ComfyUI has it for flow models ("RF"): the rule is over τ.

    `sample_dpm_2_tg`'s step with ``variable="tau"`` to the level of `sample_euler_ancestral_rf_tg`,
    then noise. Two evaluations a step, one in the last; order 2 at η = 0.

    Source: ComfyUI's dpm_2_ancestral for flow models; the teacher's term as in Euler.
    """
    return sample(
        dpm_2_ancestral_rf, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


# -------------------------------------------------------------------------------- DPM-Solver++(2S)

MIDDLE = Option(0.5, low=0.0, high=1.0, above=True)
"""r: where the middle point lies, as a fraction of the step in -log σ."""


def dpmpp_2s_stages(
    sigma: float, target: float, noise: float | None, r: float
) -> tuple[Stage, ...]:
    """With ``e^{-h} = σ_target/σ``, u at the fraction r of the step in -log σ:

    ``u = e^{-rh} x + (1 - e^{-rh}) d``,
    ``x' = e^{-h} x + (1 - e^{-h}) d + (1 - e^{-h})/(2r)·(x̂_new,u - d)``.
    """
    ratio = target / sigma
    weight = (1.0 - ratio) / (2.0 * r)
    return two_stages(sigma, sigma * ratio**r, target, weight, weight, noise)


@solver(order=2, evaluations=2, options={**ANCESTRAL, "r": MIDDLE}, noise="plain")
def dpmpp_2s_ancestral(
    sigmas: Sequence[float], eta: float, s_noise: float, r: float
) -> Iterator[Step]:
    """`dpmpp_2s_stages` to σ_down, then ``+ σ_up n``."""
    return ancestral(sigmas, partial(dpmpp_2s_stages, r=r), eta, s_noise)


@dpmpp_2s_ancestral.public
def sample_dpmpp_2s_ancestral_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None, *,
    r: float = 0.5,
) -> Tensor:  # fmt: skip
    """Ancestral DPM-Solver++(2S), its middle point u at the fraction r of the step in -log σ.

    ``u = e^{-rh} x + (1 - e^{-rh}) x̂``,
    ``x' = e^{-h} x + (1 - e^{-h}) (x̂ + (x̂_new,u - x̂)/(2r)) + σ_up n``, with ``e^{-h} = σ_down/σ``:
    the estimate at u is the one the teacher revises, renoised to σ'. Two evaluations a step, one
    in the last; order 2 at η = 0. The paper's choice for SDXL-Turbo. Raises ValueError for r
    outside (0, 1].

    Source: Lu et al. 2022 (DPM-Solver++), Algorithm 1; Park et al. 2025, supplement 7.1.
    """
    return sample(
        dpmpp_2s_ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise, r=r,
    )  # fmt: skip


ALMOST_ONE = 0.9999
"""τ of the middle point of a step from τ = 1, where the middle in -log σ is τ = 1 itself."""


@solver(order=2, evaluations=2, options=ANCESTRAL, noise="plain")
def dpmpp_2s_ancestral_rf(sigmas: Sequence[float], eta: float, s_noise: float) -> Iterator[Step]:
    """`dpmpp_2s_stages` (r = 1/2) to `rf_split`'s level, then noise; two stages from σ = ∞, too."""
    steps = ancestral(sigmas, partial(dpmpp_2s_stages, r=0.5), eta, s_noise, rf_split)
    for step in steps:
        target, noise = rf_split(step.sigma, step.sigma_next, eta, s_noise)
        if math.isinf(step.sigma) and 0.0 < target < math.inf:
            stages = two_stages(step.sigma, FLOW.sigma(ALMOST_ONE), target, 1.0, noise=noise)
            yield Step(step.sigma, step.sigma_next, stages)
        else:
            yield step


@dpmpp_2s_ancestral_rf.public
def sample_dpmpp_2s_ancestral_rf_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Ancestral DPM-Solver++(2S) as ComfyUI has it for flow models ("RF"): down in τ, see below.

    `sample_dpmpp_2s_ancestral_tg`'s step (r = 1/2) to the level of `sample_euler_ancestral_rf_tg`,
    then noise. From τ = 1 it has a middle point, too, at τ = 0.9999. Two evaluations a step, one in
    the last; order 2 at η = 0.

    Source: ComfyUI's dpmpp_2s_ancestral for flow models; the teacher's term as in Euler.
    """
    return sample(
        dpmpp_2s_ancestral_rf, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


dpmpp_2s_ancestral_cfg_pp = dpmpp_2s_ancestral.in_cfg_pp()


@dpmpp_2s_ancestral_cfg_pp.public
def sample_dpmpp_2s_ancestral_cfg_pp_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None, *,
    r: float = 0.5,
) -> Tensor:  # fmt: skip
    """Ancestral DPM-Solver++(2S) with CFG++: x̂_∅ takes x̂'s place in the direction.

    ``u = e^{-rh} x + (1 - e^{-rh}) x̂_∅``,
    ``x' = e^{-h} x + (1 - e^{-h}) (x̂_∅ + (x̂_new,u - x̂_∅)/(2r)) + σ_up n``.
    This is equation (12) of Distillation++. The CFG++ authors' code has another form,
    ``x̂_u - e^{-h} x̂_∅,u + e^{-h} x``, and the web UIs have a third: figures do not carry over.

    Source: Park et al. 2025, supplement, equation (12).
    """
    return sample(
        dpmpp_2s_ancestral_cfg_pp, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise, r=r,
    )  # fmt: skip


# --------------------------------------------------------------------------------- DPM-Solver-fast


def fast_orders(n: int) -> list[int]:
    """The orders of the steps that make n evaluations: threes, then what is left."""
    m = n // 3 + 1
    return [3] * (m - 2) + [2, 1] if n % 3 == 0 else [3] * (m - 1) + [n % 3]


def fast_levels(sigma_min: float, sigma_max: float, n: int) -> list[float]:
    """The ends of those steps, equal in -log σ."""
    levels: list[float] = np.geomspace(sigma_max, sigma_min, len(fast_orders(n)) + 1).tolist()
    return levels


@solver(
    order=2, evaluations=3, levels=fast_levels, noise="plain",
    options={"n": Option(8, low=1), "eta": Option(0.0, low=0.0), "s_noise": ANCESTRAL["s_noise"],
             **VARIABLE},
)  # fmt: skip
def dpm_fast(
    sigmas: Sequence[float], n: int, eta: float, s_noise: float, variable: str
) -> Iterator[Step]:
    """Steps of DPM-Solver of orders 3, 3, …, that make n evaluations, then ``+ σ_up n``."""
    orders = fast_orders(n)
    if len(orders) != len(sigmas) - 1:
        raise ValueError(f"n is {n}, which makes {len(orders)} steps; there are {len(sigmas) - 1}")
    for (sigma, sigma_next), order in zip(pairwise(sigmas), orders):
        down, _ = ancestral_split(sigma, sigma_next, eta, s_noise)
        sigma_down = max(down, sigmas[-1])
        lift = s_noise * math.sqrt((sigma_next - sigma_down) * (sigma_next + sigma_down))
        noise = lift if eta * s_noise > 0.0 else None
        if variable == "tau":
            start, end = FLOW.level(sigma), FLOW.level(sigma_down)
            yield Step(sigma, sigma_next, from_tau(sigma, dpm_solver(start, end, order, noise)))
        else:
            yield Step(sigma, sigma_next, dpm_solver(sigma, sigma_down, order, noise))


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


@dpm_fast.public
def sample_dpm_fast_tg(
    model: Any, x: Tensor, sigma_min: float, sigma_max: float, n: int,
    extra_args: ExtraArgs = None, callback: Callback | None = None, disable: bool | None = None,
    eta: float = 0.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None, *,
    variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """DPM-Solver-fast: ``n`` evaluations from ``sigma_max`` to ``sigma_min``, in steps of order 3.

    Steps are equal in -log σ; the last one or two are of lower order, as the count demands, which
    holds the run to order 2 (3 where n = 2 modulo 3). It ends at sigma_min > 0. The teacher revises
    a guided step's newest estimate, with coefficient 1. The callback's dict also has ``t`` = -log σ
    and ``t_up``. ``variable="tau"``: levels and rule over τ, see `kdpp.solvers`; so they may start
    at a flow model's τ = 1.

    Raises ValueError for levels that are not 0 < sigma_min ≤ sigma_max < ∞ (a flow model's: below
    τ = 1) and for n < 1.
    Source: Lu et al. 2022 (DPM-Solver), as in k-diffusion.
    """
    space = getattr(model, "space", VE)
    dpm_fast.settings({"variable": variable})
    rule = VARIABLES[variable]
    low, high = (
        rule.level(space.sigma(float(level))) if isinstance(level, numbers.Real | Tensor) else level
        for level in (sigma_min, sigma_max)
    )
    sigmas = [space.level(rule.sigma(level)) for level in dpm_fast.levels(low, high, n)]

    def tell(info: dict[str, Any]) -> None:
        if callback is not None:
            callback({**info, "t": -info["sigma"].log(), "t_up": -info["sigma_hat"].log()})

    return sample(
        dpm_fast, model, x, torch.tensor(sigmas, dtype=torch.float64), extra_args,
        callback and tell, disable, noise_sampler, n=n, eta=eta, s_noise=s_noise,
        variable=variable,
    )  # fmt: skip
