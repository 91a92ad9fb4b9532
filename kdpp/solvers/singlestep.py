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
from kdpp.solvers.multistep import exponential

__all__ = [
    "sample_dpm_2_ancestral_rf_tg",
    "sample_dpm_2_ancestral_tg",
    "sample_dpm_2_tg",
    "sample_dpm_fast_tg",
    "sample_dpmpp_2s_ancestral_cfg_pp_mixed_tg",
    "sample_dpmpp_2s_ancestral_cfg_pp_tg",
    "sample_dpmpp_2s_ancestral_rf_tg",
    "sample_dpmpp_2s_ancestral_tg",
    "sample_heun_tg",
    "sample_heunpp2_tg",
    "sample_res_singlestep_tg",
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


@solver(order=1, evaluations=3, extra=-1, options={**CHURN, **VARIABLE})
def heunpp2(
    sigmas: Sequence[float], s_churn: float, s_tmin: float, s_tmax: float, s_noise: float,
    variable: str,
) -> Iterator[Step]:  # fmt: skip
    """Churn from σ to σ̂, then the slopes at σ̂, σ' and the level after it, by `heunpp_stages`."""
    levels = [*dict.fromkeys(map(VARIABLES[variable].level, sigmas))]
    highest = max((level for level in levels if level < math.inf), default=0.0)
    after = dict(pairwise(levels))

    def stages(sigma: float, target: float, noise: float | None) -> tuple[Stage, ...]:
        further = [after[target]] if after.get(target, levels[-1]) != levels[-1] else []
        ends = [target, *further] if target in after else []
        return heunpp_stages(sigma, target, ends, highest)

    return with_churn(sigmas, stages, s_churn, s_tmin, s_tmax, s_noise, variable)


def heunpp_stages(
    sigma: float, target: float, ends: Sequence[float], highest: float
) -> tuple[Stage, ...]:
    """Euler from end to end, then the whole step with the mean of all slopes.

    Those found at the ends have the weight ``end/(n σ_0)`` each, n the number of slopes and σ_0 the
    highest finite level; the first slope has the rest.
    """
    x, *estimates = np.eye(len(ends) + 2)
    point, level, slopes, points = x, sigma, [], []
    for estimate, end in zip(estimates, [*ends, target]):
        slopes.append((point - estimate) / level)
        point, level = point + (end - level) * slopes[-1], end
        points.append(point)
    weights = [end / (len(slopes) * highest) for end in ends]
    slope = sum(w * (one - slopes[0]) for w, one in zip(weights, slopes[1:])) + slopes[0]
    points[-1] = x + (target - sigma) * slope
    rows = [stage_row(sigma, one, made) for made, one in enumerate(points[:-1], 1)]
    rows.append(stage_row(sigma, points[-1], len(points), denoised=1.0))
    return tuple(map(Stage, [sigma, *ends], rows))


@heunpp2.public
def sample_heunpp2_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
    *, variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """Heun++ 2: ``x' = x + (σ' - σ)(w_1 ε + w_2 ε_2 + w_3 ε_3) + (x̂_new,3 - x̂_3)``.

    ε = (x - x̂)/σ; ε_2 and ε_3 are the slopes at Euler's points at σ' and at the level after it,
    σ'', and ``w_2 = σ'/(3σ_0), w_3 = σ''/(3σ_0), w_1 = 1 - w_2 - w_3`` with the highest level σ_0.
    Three evaluations a step; two in the last but one, which has no σ'' above the end
    (``w_2 = σ'/(2σ_0)``), one in the last, which is Euler. These weights are not a quadrature's, so
    that the order is 1. ``variable="tau"``: the rule over τ, see `kdpp.solvers`.

    Source: Carzit's sd-webui-samplers-scheduler, as in ComfyUI; the teacher's term as in Euler.
    """
    return sample(
        heunpp2, model, x, sigmas, extra_args, callback, disable,
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


def mixed_stages(sigma: float, target: float, noise: float | None) -> tuple[Stage, ...]:
    """`dpmpp_2s_stages` with r = 1/2 and guided directions, from ``x + x̂ - d``, d the newest."""
    ratio = target / sigma
    half = math.sqrt(ratio)
    to_middle = Row(sigma * half, direction=(-half,), guided=(1.0,))
    to_end = Row(target, 1.0 - ratio, (-ratio,), noise, guided=(0.0, ratio))
    return Stage(sigma, to_middle), Stage(sigma * half, to_end)


@solver(order=None, evaluations=2, options=ANCESTRAL, noise="plain", cfg_pp=True)
def dpmpp_2s_ancestral_cfg_pp_mixed(
    sigmas: Sequence[float], eta: float, s_noise: float
) -> Iterator[Step]:
    """`mixed_stages` to σ_down, then ``+ σ_up n``."""
    return ancestral(sigmas, mixed_stages, eta, s_noise)


@dpmpp_2s_ancestral_cfg_pp_mixed.public
def sample_dpmpp_2s_ancestral_cfg_pp_mixed_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Ancestral DPM-Solver++(2S) with CFG++ as ComfyUI has it: a guided step from x + x̂ - x̂_∅.

    ``u = e^{-h/2} (x + x̂ - x̂_∅) + (1 - e^{-h/2}) x̂``,
    ``x' = e^{-h} (x + x̂ - x̂_∅,u) + (1 - e^{-h}) x̂_new,u + σ_up n``, with ``e^{-h} = σ_down/σ``: in
    the second line the unconditional estimate is that at u beside the guided one at x. So the
    step's e^{-h} (x̂ - x̂_∅,u) stays where the conditions are equal, and it does not follow the ODE.
    `sample_dpmpp_2s_ancestral_cfg_pp_tg` is the paper's.

    Source: ComfyUI's dpmpp_2s_ancestral_cfg_pp; the teacher's share as in equation (12) there.
    """
    return sample(
        dpmpp_2s_ancestral_cfg_pp_mixed, model, x, sigmas, extra_args, callback, disable,
        noise_sampler, eta=eta, s_noise=s_noise,
    )  # fmt: skip


# --------------------------------------------------------------------------------- RES singlestep


@solver(order=2, evaluations=2, options={"r": MIDDLE})
def res_singlestep(sigmas: Sequence[float], r: float) -> Iterator[Step]:
    """`res_stages`, without noise."""
    return with_churn(sigmas, partial(res_stages, r=r), 0.0, 0.0, math.inf, 1.0)


def res_stages(sigma: float, target: float, noise: float | None, r: float) -> tuple[Stage, ...]:
    """As `dpmpp_2s_stages`, the weight of d_u that of the integral: ``(1 - (1 - e^{-h})/h)/r``."""
    weight = exponential(sigma, target, target)[0] / r
    return two_stages(sigma, sigma * (target / sigma) ** r, target, weight, noise=noise)


@res_singlestep.public
def sample_res_singlestep_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, *, r: float = 0.5,
) -> Tensor:  # fmt: skip
    """RES singlestep of order 2; at ``r`` = 1 the exponential Heun method.

    ``u = e^{-rh} x + (1 - e^{-rh}) x̂``,
    ``x' = e^{-h} x + (1 - e^{-h}) x̂ + c (x̂_u - x̂)/r + (x̂_new,u - x̂_u)``, with ``e^{-h} = σ'/σ``
    and ``c = 1 - (1 - e^{-h})/h``: h φ_1 and h φ_2 of the paper's tableau are 1 - e^{-h} and c. r
    is its c_2, where the middle point lies in -log σ. Two evaluations a step, one in the last;
    order 2. Raises ValueError for r outside (0, 1].

    Source: Zhang et al. 2023 (RES, arXiv 2308.02157), single-step scheme of order 2; Hochbruck and
    Ostermann 2005, equation (5.3). ComfyUI's exp_heun_2_x0 is r = 1.
    """
    return sample(res_singlestep, model, x, sigmas, extra_args, callback, disable, r=r)


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
    sigma: float, target: float, order: int, noise: float | None = None, r: float | None = None
) -> tuple[Stage, ...]:
    """DPM-Solver-1, -2 (r = 1/2) or -3 (1/3, 2/3), in the noise ε = (x - d)/σ.

    Points and noises are vectors of the weights of (x, d, d_1, d_2), so the paper's formulas stand
    as they are: ``u = x - σ_u (e^{rh} - 1) ε - …``. ``r`` is another one for the first point.
    """
    if order == 1 or target == sigma:
        return (Stage(sigma, euler_row(sigma, target, noise)),)
    h = math.log(sigma / target)
    x, *estimates = np.eye(order + 1)

    def level(r: float) -> float:
        return float(sigma * math.exp(-r * h))

    epsilon = (x - estimates[0]) / sigma
    r = r or 1 / order
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
