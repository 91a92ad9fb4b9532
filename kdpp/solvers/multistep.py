"""Multistep solvers: one evaluation a step and the memory of earlier ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial
from numpy.polynomial.polynomial import polyfromroots
from torch import Tensor

from kdpp.driver import Callback, ExtraArgs, sample
from kdpp.noise import NoiseSampler
from kdpp.plan import (
    Row,
    Step,
    ancestral_split,
    euler_row,
    in_variable,
    is_first_order,
    level_before,
    level_ratio,
)
from kdpp.solver import ANCESTRAL, VARIABLE, Option, solver

__all__ = [
    "sample_dpmpp_2m_ancestral_tg",
    "sample_dpmpp_2m_cfg_pp_mixed_tg",
    "sample_dpmpp_2m_cfg_pp_tg",
    "sample_dpmpp_2m_tg",
    "sample_lms_tg",
    "sample_res_multistep_ancestral_cfg_pp_tg",
    "sample_res_multistep_ancestral_tg",
    "sample_res_multistep_cfg_pp_tg",
    "sample_res_multistep_tg",
    "sample_unipc_tg",
]

Split = Callable[[float, float], tuple[float, float | None]]
"""``(sigma, sigma_next) -> (σ_down, noise)``, as `kdpp.plan.ancestral_split` has them."""
Slope = Callable[[float, float, float], tuple[float, float]]
"""``(sigma, sigma_next, sigma_down) -> (c, h)``: a rule's factor, and the length of the step."""


def noiseless(sigma: float, sigma_next: float) -> tuple[float, float | None]:
    """All the way to σ', up or down, and no noise."""
    return sigma_next, None


Share = Callable[[float, float], float]
"""``(σ_down/σ, c/r) -> w``, the weight of x̂_new; the rest of the newest estimate's is direction."""


def whole(ratio: float, weight: float) -> float:
    """1, which is also the teacher's coefficient."""
    return 1.0


def two_estimates(
    sigmas: Sequence[float],
    split: Split,
    slope: Slope,
    share: Share = whole,
    to_down: bool = False,
) -> Iterator[Step]:
    """``x̂_new + σ_down/σ·(x - d) + c/r·(d - d_prev) + noise·n``, with ``r = h_prev/h``.

    Lengths are in -log σ; c and h come from the `Slope`. h_prev lies between full levels, or where
    ``to_down`` from d_prev's to the σ_down of its step. First and last steps are Euler. d_prev is
    the estimate at the last level above σ: a repeated level is no step.
    """
    downs: list[float] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        sigma_down, noise = split(sigma, sigma_next)
        downs.append(sigma_down)
        before = level_before(sigmas, i)
        if before is None or is_first_order(sigma, sigma_down):
            yield Step.single(sigma, sigma_next, euler_row(sigma, sigma_down, noise))
            continue
        c, h = slope(sigma, sigma_next, sigma_down)
        reached = downs[before] if to_down else sigma
        h_prev = math.log(sigmas[before] / reached) if reached > 0.0 else math.inf
        weight = c / (h_prev / h)
        weights = {i: 1.0 - sigma_down / sigma + weight, before: -weight}
        denoised = share(sigma_down / sigma, weight)
        row = estimates_row(i, sigma_down, weights, noise, denoised)
        yield Step.single(sigma, sigma_next, row)


def estimates_row(
    i: int,
    target: float,
    weights: Mapping[int, float],
    noise: float | None = None,
    denoised: float = 1.0,
) -> Row:
    """Step i's row from the weights of the estimates, by the step that made them.

    Weight 1 is x̂_new's, so that the teacher's term has coefficient 1; the rest is direction.
    """
    direction = [0.0] * (i - min(weights) + 1)
    for j, weight in weights.items():
        direction[i - j] = weight
    direction[0] -= denoised
    return Row(target, denoised, tuple(direction), noise)


def midpoint(sigma: float, sigma_next: float, sigma_down: float) -> tuple[float, float]:
    """``c = (1 - e^{-h})/2``, with ``e^{-h} = σ_down/σ``."""
    ratio = sigma_down / sigma
    return (1.0 - ratio) / 2.0, -math.log(ratio)


@solver(order=2, options=VARIABLE)
def dpmpp_2m(sigmas: Sequence[float], variable: str) -> Iterable[Step]:
    """`two_estimates` without noise, c that of the midpoint rule."""
    return in_variable(variable, sigmas, partial(two_estimates, split=noiseless, slope=midpoint))


@dpmpp_2m.public
def sample_dpmpp_2m_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, *, variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M): ``x' = x̂_new - e^{-h} x̂ + (1 - e^{-h})/(2r)·(x̂ - x̂_prev) + e^{-h} x``.

    ``e^{-h} = σ'/σ``, ``r = h_prev/h``; x̂_prev is the unrevised estimate of the step before. One
    evaluation a step, order 2; first and last steps are Euler. ``variable="tau"``: the rule over τ,
    see `kdpp.solvers`.

    Source: Lu et al. 2022 (DPM-Solver++), Algorithm 2; Park et al. 2025, supplement 7.1.
    """
    return sample(dpmpp_2m, model, x, sigmas, extra_args, callback, disable, variable=variable)


dpmpp_2m_cfg_pp = dpmpp_2m.in_cfg_pp()


@dpmpp_2m_cfg_pp.public
def sample_dpmpp_2m_cfg_pp_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, *, variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) with CFG++: x̂_∅ takes x̂'s place in the direction.

    ``x' = x̂_new - e^{-h} x̂_∅ + (1 - e^{-h})/(2r)·(x̂_∅ - x̂_∅,prev) + e^{-h} x``.

    Source: Chung et al. 2024 (CFG++); Park et al. 2025, supplement 7.1.
    """
    return sample(
        dpmpp_2m_cfg_pp, model, x, sigmas, extra_args, callback, disable, variable=variable
    )


@solver(order=2, options=ANCESTRAL, noise="plain")
def dpmpp_2m_ancestral(sigmas: Sequence[float], eta: float, s_noise: float) -> Iterator[Step]:
    """`two_estimates` to σ_down, then ``+ σ_up n``."""
    return two_estimates(sigmas, partial(ancestral_split, eta=eta, s_noise=s_noise), midpoint)


@dpmpp_2m_ancestral.public
def sample_dpmpp_2m_ancestral_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Ancestral DPM-Solver++(2M): 2M to σ_down, then ``+ σ_up n``.

    ``e^{-h} = σ_down/σ``; h_prev lies between full levels. One evaluation a step; order 2 at η = 0,
    where it is `sample_dpmpp_2m_tg`.

    Source: Park et al. 2025, supplement 7.1 ("DPM-Solver++ 2M A").
    """
    return sample(
        dpmpp_2m_ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


@solver(order=2, cfg_pp=True)
def dpmpp_2m_cfg_pp_mixed(sigmas: Sequence[float]) -> Iterator[Step]:
    """`dpmpp_2m` with a share of 1 + c/r for x̂_new."""
    return two_estimates(sigmas, noiseless, midpoint, lambda ratio, weight: 1.0 + weight)


@dpmpp_2m_cfg_pp_mixed.public
def sample_dpmpp_2m_cfg_pp_mixed_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) with CFG++ as ComfyUI has it: guided and unconditional estimates subtracted.

    ``x' = x̂_new - e^{-h} x̂_∅ + (1 - e^{-h})/(2r)·(x̂_new - x̂_∅,prev) + e^{-h} x``, where
    `sample_dpmpp_2m_cfg_pp_tg` has ``x̂_∅ - x̂_∅,prev``: the condition enters that difference, too.
    The teacher's term has the same share, 1 + (1 - e^{-h})/(2r).

    Source: ComfyUI's dpmpp_2m_cfg_pp; the teacher's term as in Euler.
    """
    return sample(dpmpp_2m_cfg_pp_mixed, model, x, sigmas, extra_args, callback, disable)


# ------------------------------------------------------------------------------------ RES multistep


def exponential(sigma: float, sigma_next: float, sigma_down: float) -> tuple[float, float]:
    """``c = 1 - (1 - e^{-h})/h``, with ``e^{-h} = σ_down/σ``: the integral itself."""
    h = -math.log(sigma_down / sigma)
    return 1.0 + math.expm1(-h) / h, h


def shrunk(ratio: float, weight: float) -> float:
    """``e^{-h}``: x moves by x̂ - x̂_∅ before the step shrinks it."""
    return ratio


@solver(order=2, options=VARIABLE)
def res_multistep(sigmas: Sequence[float], variable: str) -> Iterable[Step]:
    """`two_estimates` without noise, c the integral's."""
    rule = partial(two_estimates, split=noiseless, slope=exponential)
    return in_variable(variable, sigmas, rule)


@res_multistep.public
def sample_res_multistep_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, *, variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """RES 2M: ``x' = x̂_new - e^{-h} x̂ + c (x̂ - x̂_prev)/r + e^{-h} x``, ``c = 1 - (1 - e^{-h})/h``.

    ``e^{-h} = σ'/σ``, ``r = h_prev/h``: 2M with the integral's c for the midpoint rule's. One
    evaluation a step, order 2; first and last steps are Euler. ``variable="tau"``: the rule over τ,
    see `kdpp.solvers`.

    Source: Zhang et al. 2023 (RES, arXiv 2308.02157), multistep scheme of order 2.
    """
    return sample(res_multistep, model, x, sigmas, extra_args, callback, disable, variable=variable)


@solver(order=2, options=ANCESTRAL, noise="plain")
def res_multistep_ancestral(sigmas: Sequence[float], eta: float, s_noise: float) -> Iterator[Step]:
    """`two_estimates` to σ_down, then ``+ σ_up n``; h_prev is the length of the step to σ_down."""
    split = partial(ancestral_split, eta=eta, s_noise=s_noise)
    return two_estimates(sigmas, split, exponential, to_down=True)


@res_multistep_ancestral.public
def sample_res_multistep_ancestral_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Ancestral RES 2M: RES 2M to σ_down, then ``+ σ_up n``, as ComfyUI has it.

    ``e^{-h} = σ_down/σ``; h_prev is the length of the step before to its own σ_down. One evaluation
    a step; order 2 at η = 0, where it is `sample_res_multistep_tg`.

    Source: Zhang et al. 2023 (RES); ComfyUI's res_multistep_ancestral.
    """
    return sample(
        res_multistep_ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


@solver(order=2, cfg_pp=True)
def res_multistep_cfg_pp(sigmas: Sequence[float]) -> Iterator[Step]:
    """`res_multistep`, its share of x̂_new `shrunk`."""
    return two_estimates(sigmas, noiseless, exponential, shrunk)


@solver(order=2, options=ANCESTRAL, noise="plain", cfg_pp=True)
def res_multistep_ancestral_cfg_pp(
    sigmas: Sequence[float], eta: float, s_noise: float
) -> Iterator[Step]:
    """`res_multistep_ancestral`, its share of x̂_new `shrunk`."""
    split = partial(ancestral_split, eta=eta, s_noise=s_noise)
    return two_estimates(sigmas, split, exponential, shrunk, to_down=True)


@res_multistep_cfg_pp.public
def sample_res_multistep_cfg_pp_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
) -> Tensor:  # fmt: skip
    """RES 2M with CFG++: `sample_res_multistep_tg`'s step of x̂_∅, from ``x + x̂_new - x̂_∅``.

    ``x' = e^{-h} (x + x̂_new - x̂_∅) + (1 - e^{-h}) x̂_∅ + c (x̂_∅ - x̂_∅,prev)/r``; first and last
    steps are `sample_euler_cfg_pp_tg`'s. The teacher's term has x̂_new's share, e^{-h}.

    Source: Zhang et al. 2023 (RES); Chung et al. 2024 (CFG++); ComfyUI's res_multistep_cfg_pp.
    """
    return sample(res_multistep_cfg_pp, model, x, sigmas, extra_args, callback, disable)


@res_multistep_ancestral_cfg_pp.public
def sample_res_multistep_ancestral_cfg_pp_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Ancestral RES 2M with CFG++: `sample_res_multistep_cfg_pp_tg` to σ_down, then ``+ σ_up n``.

    Lengths as in `sample_res_multistep_ancestral_tg`.

    Source: as there; ComfyUI's res_multistep_ancestral_cfg_pp.
    """
    return sample(
        res_multistep_ancestral_cfg_pp, model, x, sigmas, extra_args, callback, disable,
        noise_sampler, eta=eta, s_noise=s_noise,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- LMS


LMS = {
    "order": Option(4, low=1, high=4),
    "lower_order_final": Option("never", choices=("never", "at 0")),
    **VARIABLE,
}


@solver(order=2, order_from=384, options=LMS)
def lms(
    sigmas: Sequence[float], order: int, lower_order_final: str, variable: str
) -> Iterable[Step]:
    """`over_slopes`, c_j the integral of the j-th Lagrange polynomial in σ."""
    to_zero = lower_order_final == "never"
    weigh = adams_bashforth if variable == "sigma" else from_the_newest
    rule = partial(over_slopes, order=order, weigh=weigh, to_zero=to_zero)
    return in_variable(variable, sigmas, rule)


Weigh = Callable[[Sequence[float], float], Sequence[float]]
"""``(nodes, end) -> (c_0, c_1, …)``: the weights of slopes at the nodes, newest first."""


def over_slopes(
    sigmas: Sequence[float], order: int, weigh: Weigh, to_zero: bool = False
) -> Iterator[Step]:
    """``x + Σ_j c_j (x_j - d_j)/σ_j`` with up to ``order`` slopes; to σ = 0 Euler, unless to_zero.

    The last estimate's share of the result is x̂_new's, so the teacher's term has coefficient 1.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if math.isinf(sigma) or sigma == sigma_next or (sigma_next == 0.0 and not to_zero):
            yield Step.single(sigma, sigma_next, euler_row(sigma, sigma_next))
            continue
        nodes = [i]
        while len(nodes) < order and (before := level_before(sigmas, nodes[-1])) is not None:
            nodes.append(before)
        slopes = dict(zip(nodes, weigh([sigmas[j] for j in nodes], sigma_next)))
        weights = {j: -slope / sigmas[j] for j, slope in slopes.items()}
        row = estimates_row(i, sigma + slopes[i], weights)
        earlier = range(i - 1, nodes[-1] - 1, -1)
        past = tuple((slopes.get(j, 0.0), sigmas[j]) for j in earlier)
        yield Step.single(sigma, sigma_next, replace(row, past=past))


def adams_bashforth(nodes: Sequence[float], end: float) -> list[float]:
    """For each node the integral of its Lagrange polynomial from nodes[0] to ``end``."""
    weights = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        scale = math.prod(node - other for other in others)
        integral = Polynomial(polyfromroots(others)).integ()
        weights.append(float(integral(end) - integral(nodes[0])) / scale)
    return weights


def from_the_newest(nodes: Sequence[float], end: float) -> list[float]:
    """`adams_bashforth` of differences, which keep their digits where levels are close: high τ."""
    return adams_bashforth([node - nodes[0] for node in nodes], end - nodes[0])


@lms.public
def sample_lms_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, order: int = 4, *,
    lower_order_final: str = "never", variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """Linear multistep (Adams-Bashforth in σ): ``x' = x + Σ_j c_j (x_j - x̂_j)/σ_j + (x̂_new - x̂)``.

    One evaluation a step and the slopes of up to ``order`` (1 to 4) steps. Its start by Euler holds
    a run to order 2; order 3 was measured up to 64 steps. ``lower_order_final="at 0"``: a last step
    to σ = 0 is Euler, as ComfyUI has it. ``variable="tau"``: the rule over τ, see `kdpp.solvers`.
    Raises ValueError for another order.

    Source: k-diffusion; the teacher's term as in Euler.
    """
    return sample(
        lms, model, x, sigmas, extra_args, callback, disable,
        order=order, lower_order_final=lower_order_final, variable=variable,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ UniPC


UNIPC = {
    "order": Option(2, low=1, high=3),
    "variant": Option("bh2", choices=("bh1", "bh2")),
    "lower_order_final": Option("at 0", choices=("at 0", "always")),
    **VARIABLE,
}


@solver(order=3, options=UNIPC)
def unipc(
    sigmas: Sequence[float], order: int, variant: str, lower_order_final: str, variable: str
) -> Iterable[Step]:
    """`corrected`, in σ or τ."""
    lowers = lower_order_final == "always" or sigmas[-1] == 0.0
    rule = partial(corrected, order=order, variant=variant, lowers=lowers)
    return in_variable(variable, sigmas, rule)


def corrected(sigmas: Sequence[float], order: int, variant: str, lowers: bool) -> Iterator[Step]:
    """Correct x with the newest estimate, then predict the next point: in one row.

    The corrector and the predictor of one move give x the same weight, so correcting is adding the
    difference of their weights of the estimates.
    """
    used: dict[int, int] = {}  # the order of the prediction that left a step
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        ratio = level_ratio(sigma, sigma_next)
        left = sum(a != b for a, b in pairwise(sigmas[i:]))
        if ratio == 1.0 or math.isinf(sigma):
            yield Step.single(sigma, sigma_next, euler_row(sigma, sigma_next))
            continue
        nodes = [i]
        while len(nodes) <= order and (before := level_before(sigmas, nodes[-1])) is not None:
            nodes.append(before)
        # Towards σ = 0 the order falls to 1, as in the authors' code.
        used[i] = min(order, len(nodes), left if lowers else order)
        weights = unified(sigmas, nodes[: used[i]], sigma_next, variant)
        if len(nodes) > 1:
            earlier = nodes[1 : 1 + used[nodes[1]]]
            right = unified(sigmas, earlier, sigma, variant, newest=i)
            predicted = unified(sigmas, earlier, sigma, variant)
            for j in nodes:
                change = right.get(j, 0.0) - predicted.get(j, 0.0)
                weights[j] = weights.get(j, 0.0) + ratio * change
        yield Step.single(sigma, sigma_next, estimates_row(i, sigma_next, weights))


def unified(
    sigmas: Sequence[float],
    nodes: Sequence[int],
    target: float,
    variant: str,
    newest: int | None = None,
) -> dict[int, float]:
    """Weights of the estimates in UniP (``newest`` None) or UniC, by the step that made them.

    ``W m_0 - B Σ_k ρ_k (m_k - m_0)/r_k``, ``W = 1 - e^{-h}``, with B = e^{-h} - 1 ("bh2") or
    -h ("bh1") and the ρ that make the sum exact for polynomials in λ = -log σ; m_0 is nodes[0]'s
    estimate, the corrector's last m_k (r_k = 1) that of the step ``newest``, made at the target.
    """
    start = sigmas[nodes[0]]
    total = 1.0 - target / start
    places = list(nodes[1:])
    if target == 0.0 or (not places and newest is None):
        return {nodes[0]: total}
    h = math.log(start / target)
    r = [math.log(start / sigmas[j]) / h for j in places]
    if newest is not None:
        places, r = [*places, newest], [*r, 1.0]
    # φ_k(-h) k!/B(h), k = 1, 2, …
    phi, right = math.expm1(-h) / -h - 1.0, []
    for k in range(1, len(r) + 1):
        right.append(phi * math.factorial(k) / math.expm1(-h))
        phi = phi / -h - 1.0 / math.factorial(k + 1)
    # With one unknown the authors take 1/2, which keeps the order and is simpler.
    rho = [0.5] if len(r) == 1 else np.linalg.solve(np.vander(r, increasing=True).T, right)
    weights = {nodes[0]: total}
    # B cancels where ρ is solved for: the variants differ where it is 1/2.
    scale = h if variant == "bh1" and len(r) == 1 else total
    for j, r_j, rho_j in zip(places, r, rho):
        weights[j] = scale * float(rho_j) / r_j
        weights[nodes[0]] -= weights[j]
    return weights


@unipc.public
def sample_unipc_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, order: int = 2, *,
    variant: str = "bh2", lower_order_final: str = "at 0", variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """UniPC of ``order`` p = 1 to 3: predict, evaluate, correct.

    One evaluation a step: the estimate at a predicted point also corrects that point, which makes
    the run's order p + 1. The teacher revises the newest estimate with coefficient 1. On schedules
    that end at 0 the last step is of first order, the one before of second at most, as in the
    authors' code; ``lower_order_final="always"``: on all others, too. ``variant`` is the paper's
    B(h): "bh2" is e^{-h} - 1, "bh1" is -h. ``variable="tau"``: the rule over τ, see `kdpp.solvers`.
    Raises ValueError for another order or word.

    Source: Zhao et al. 2023 (UniPC), Algorithms 5-8.
    """
    return sample(
        unipc, model, x, sigmas, extra_args, callback, disable,
        order=order, variant=variant, lower_order_final=lower_order_final, variable=variable,
    )  # fmt: skip
