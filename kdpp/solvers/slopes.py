"""Multistep solvers in the slope (x - x̂)/σ: iPNDM, DEIS, gradient estimation, UD10 AB.

All but the last are `kdpp.solvers.multistep.over_slopes`, as LMS is, with weights of the slopes of
their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from kdpp.driver import Callback, ExtraArgs, sample
from kdpp.plan import Row, Step, euler_row, in_variable, level_before
from kdpp.solver import VARIABLE, Option, solver
from kdpp.solvers.multistep import over_slopes

__all__ = [
    "sample_cfgpp_ud10_ab_tg",
    "sample_deis_tg",
    "sample_gradient_estimation_cfg_pp_tg",
    "sample_gradient_estimation_tg",
    "sample_ipndm_tg",
    "sample_ipndm_v_tg",
]

UP_TO_FOUR = {"max_order": Option(4, low=1, high=4), **VARIABLE}

# ------------------------------------------------------------------------------------------ iPNDM

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""The classical weights for steps of one length."""


def of_equal_steps(nodes: Sequence[float], end: float) -> list[float]:
    """``(end - σ) b_j`` with Adams-Bashforth's weights for steps of one length."""
    return [(end - nodes[0]) * weight for weight in ADAMS_BASHFORTH[len(nodes) - 1]]


@solver(order=2, options=UP_TO_FOUR)
def ipndm(sigmas: Sequence[float], max_order: int, variable: str) -> Iterable[Step]:
    """`over_slopes` as if all steps were of one length."""
    rule = partial(over_slopes, order=max_order, weigh=of_equal_steps)
    return in_variable(variable, sigmas, rule)


@ipndm.public
def sample_ipndm_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, max_order: int = 4, *,
    variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """iPNDM: ``x' = x + (σ' - σ) Σ_j b_j (x_j - x̂_j)/σ_j + (x̂_new - x̂)``.

    b are Adams-Bashforth's weights for steps of one length, (3/2, -1/2), (23, -16, 5)/12, …, though
    the steps are not: it is of order 2 whatever its ``max_order`` (1 to 4), the number of slopes.
    One evaluation a step; first and last steps are Euler. ``variable="tau"``: the rule over τ, see
    `kdpp.solvers`. Raises ValueError for another order.

    Source: Zhang and Chen 2023 (DEIS), section 4 and appendix H.2, after Liu et al. 2022 (PNDM).
    """
    return sample(
        ipndm, model, x, sigmas, extra_args, callback, disable,
        max_order=max_order, variable=variable,
    )  # fmt: skip


def of_lengths(nodes: Sequence[float], end: float) -> list[float]:
    """``(end - σ) b_j`` with iPNDM-v's weights, from this step's length h and u, v, w before it.

    Two slopes: b = (1 + h/(2u), -h/(2u)), which is exact. The third adds f times a second
    difference, where the exact f, of `adams_bashforth`, is (1 - h/(3(h+u)))/2 · h(h+u)/(u(u+v)).
    The fourth adds g times a third difference.
    """
    h = end - nodes[0]
    if len(nodes) == 1:
        return [h]
    u = nodes[0] - nodes[1]
    weights = [1.0 + h / (2.0 * u), -h / (2.0 * u)]
    if len(nodes) > 2:
        v = nodes[1] - nodes[2]
        f = (1.0 - h * h / (3.0 * u * (u + v))) / 2.0
        weights = [weights[0] + f, weights[1] - (1.0 + u / v) * f, u / v * f]
    if len(nodes) > 3:
        w = nodes[2] - nodes[3]
        g = (1.0 - h / (3.0 * (h + u))) / 2.0
        g -= (1.0 - h / (2.0 * (h + u))) * h / (6.0 * (h + u + v))
        g *= h * (h + u) * (h + u + v) / (u * (u + v) * (u + v + w))
        back = u * (u + v) / (v * (v + w)) * g
        change = (g, -(1.0 + u / v) * g - back, u / v * g + (1.0 + v / w) * back, -v / w * back)
        weights = [a + b for a, b in zip((*weights, 0.0), change)]
    return [h * weight for weight in weights]


@solver(order=2, order_from=384, options={"max_order": Option(3, low=1, high=4), **VARIABLE})
def ipndm_v(sigmas: Sequence[float], max_order: int, variable: str) -> Iterable[Step]:
    """`over_slopes` with weights from the steps' lengths."""
    rule = partial(over_slopes, order=max_order, weigh=of_lengths)
    return in_variable(variable, sigmas, rule)


@ipndm_v.public
def sample_ipndm_v_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, max_order: int = 3, *,
    variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """iPNDM-v: iPNDM with weights for steps of unequal lengths, as its authors' code has them.

    ``x' = x + (σ' - σ) Σ_j b_j (x_j - x̂_j)/σ_j + (x̂_new - x̂)``. One evaluation a step; first and
    last steps are Euler. With three slopes or four b is not quite Adams-Bashforth's, which
    `sample_lms_tg` has; it agrees where steps are equal. With four, ComfyUI's and the authors' code
    has two slips, which are mended here: u/v in the place of v/w in the last weight, so that the
    weights do not sum to 1 where steps change unevenly, and a step ends at another noise level than
    the next begins with; and a plus before the second term of the factor, with which it does not
    agree where steps are equal. ``variable="tau"``: the rule over τ, see `kdpp.solvers`. Raises
    ValueError for another order.

    Source: Zhou et al. 2024 (AMED-Solver), code (diff-sampler), after Zhang and Chen 2023 (DEIS).
    """
    return sample(
        ipndm_v, model, x, sigmas, extra_args, callback, disable,
        max_order=max_order, variable=variable,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- DEIS

LOWEST, HIGHEST, START = 0.002, 80.0, 1e-3
"""The σ at the times START and 1 of the schedule whose time DEIS interpolates in (EDM's VP)."""
SPREAD = 2.0 * (math.log1p(HIGHEST**2) - math.log1p(LOWEST**2) / START) / (1.0 - START)
OFFSET = math.log1p(HIGHEST**2) - SPREAD / 2.0
NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


def time(sigma: Any) -> Any:
    """The time t at which ``log(1 + σ²) = OFFSET t + SPREAD t²/2``: β is linear in it."""
    return (np.sqrt(OFFSET**2 + 2.0 * SPREAD * np.log1p(sigma**2)) - OFFSET) / SPREAD


def in_time(nodes: Sequence[float], end: float) -> list[float]:
    """For each node the integral over σ, to ``end``, of its Lagrange polynomial in the time."""
    if len(nodes) == 1:
        return [end - nodes[0]]
    log_start, log_end = math.log(nodes[0]), math.log(end)
    sigma = np.exp(log_start + (NODES + 1.0) / 2.0 * (log_end - log_start))
    measure = WEIGHTS / 2.0 * (log_end - log_start) * sigma  # of dσ = σ d(log σ)
    places, at = time(np.array(nodes)), time(sigma)
    weights = []
    for j, place in enumerate(places):
        others = np.delete(places, j)
        basis = np.prod([(at - other) / (place - other) for other in others], axis=0)
        weights.append(float(measure @ basis))
    return weights


@solver(order=2, order_from=384, options={"max_order": Option(3, low=1, high=4), **VARIABLE})
def deis(sigmas: Sequence[float], max_order: int, variable: str) -> Iterable[Step]:
    """`over_slopes`, c_j the integral over σ of the j-th Lagrange polynomial in the time t(σ)."""
    rule = partial(over_slopes, order=max_order, weigh=in_time)
    return in_variable(variable, sigmas, rule)


@deis.public
def sample_deis_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, max_order: int = 3, *,
    variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """DEIS, tAB: ``x' = x + Σ_j c_j (x_j - x̂_j)/σ_j + (x̂_new - x̂)``, ``c_j = ∫ L_j(t(σ)) dσ``.

    L_j are the Lagrange polynomials of up to ``max_order`` (1 to 4) steps in the time t of the
    variance preserving schedule with β linear in t and σ from 0.002 to 80 (t = 0.001 to 1). One
    evaluation a step; first and last steps are Euler, which holds a run to order 2. The integrals
    are exact (64 Gauss points); ComfyUI's are sums of 10,000 float32 points. ρAB, its other mode,
    is `sample_lms_tg`. ``variable="tau"``: the rule over τ, see `kdpp.solvers`. Raises ValueError
    for another order.

    Source: Zhang and Chen 2023 (DEIS), equations (14)-(15), tAB-DEIS.
    """
    return sample(
        deis, model, x, sigmas, extra_args, callback, disable,
        max_order=max_order, variable=variable,
    )  # fmt: skip


# ----------------------------------------------------------------------------- gradient estimation

GAMMA = {"ge_gamma": Option(2.0, low=0.0, high=5.0), **VARIABLE}


@solver(order=1, options=GAMMA)
def gradient_estimation(sigmas: Sequence[float], ge_gamma: float, variable: str) -> Iterable[Step]:
    """`over_slopes` of two: ``(σ' - σ)(γ, 1 - γ)``."""

    def weigh(nodes: Sequence[float], end: float) -> list[float]:
        share = ge_gamma if len(nodes) == 2 else 1.0
        return [(end - nodes[0]) * weight for weight in (share, 1.0 - share)][: len(nodes)]

    return in_variable(variable, sigmas, partial(over_slopes, order=2, weigh=weigh))


@gradient_estimation.public
def sample_gradient_estimation_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, ge_gamma: float = 2.0, *,
    variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """Gradient estimation: ``x' = x + (σ' - σ)(γ ε + (1-γ) ε_prev) + (x̂_new - x̂)``.

    ε = (x - x̂)/σ is a step's slope, ε_prev that of the step before. γ is ``ge_gamma``: 1 is Euler,
    2 the paper's, which carries the slope's change on. One evaluation a step; first and last steps
    are Euler; order 1. ``variable="tau"``: the rule over τ, see `kdpp.solvers`.

    Source: Permenter and Yuan 2024 (Interpreting and Improving Diffusion Models from an
    Optimization Perspective), section 5, Algorithm 2.
    """
    return sample(
        gradient_estimation, model, x, sigmas, extra_args, callback, disable,
        ge_gamma=ge_gamma, variable=variable,
    )  # fmt: skip


gradient_estimation_cfg_pp = gradient_estimation.in_cfg_pp()


@gradient_estimation_cfg_pp.public
def sample_gradient_estimation_cfg_pp_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, ge_gamma: float = 2.0, *,
    variable: str = "sigma",
) -> Tensor:  # fmt: skip
    """Gradient estimation with CFG++: x̂_∅ takes x̂'s place in the slopes.

    ``x' = x̂_new + (x - x̂_∅)/σ·σ' + (γ - 1)(σ' - σ)(ε_∅ - ε_∅,prev)``.

    Source: as `sample_gradient_estimation_tg`; Chung et al. 2024 (CFG++); ComfyUI.
    """
    return sample(
        gradient_estimation_cfg_pp, model, x, sigmas, extra_args, callback, disable,
        ge_gamma=ge_gamma, variable=variable,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- UD10 AB

CARRIED, BLENDED = 0.1, 0.25
"""How far a slope's change is carried on, and how much of Adams-Bashforth there is in a step."""


@solver(order=None, cfg_pp=True)
def cfgpp_ud10_ab(sigmas: Sequence[float]) -> Iterator[Step]:
    """``x + a E + b E_prev`` with `share` and `back` for a and b, E from `carried` slopes.

    To σ = 0 it is the line through the last two guided estimates.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        before = level_before(sigmas, i)
        if before is None or sigma == sigma_next:
            yield Step.single(sigma, sigma_next, euler_row(sigma, sigma_next))
            continue
        older = [0.0] * (i - before)
        if sigma_next == 0.0:
            far = sigma / (sigmas[before] - sigma)
            yield Step.single(sigma, 0.0, Row(0.0, 1.0 + far, guided=(*older, -far)))
            continue
        ratio = (sigma_next - sigma) / (sigma - sigmas[before])
        share, back = 1.0 + BLENDED * ratio / 2.0, -BLENDED * ratio * ratio / 2.0
        slopes = {i: 0.0, before: 0.0}
        for weight, j, end in ((share, i, sigma_next), (back, before, sigma)):
            for k, part in carried(sigmas, j, end).items():
                slopes[k] = slopes.get(k, 0.0) + weight * part
        states = {i: 1.0 - share, before: -back}
        levels = range(i, min(slopes) - 1, -1)
        newest, *past = (
            (states.get(j, 0.0) * sigmas[j] + slopes.get(j, 0.0), sigmas[j]) for j in levels
        )
        direction = tuple(-slopes.get(j, 0.0) / sigmas[j] for j in levels)
        row = Row(newest[0], share, direction, None, tuple(past), (*older, back))
        yield Step.single(sigma, sigma_next, row)


def carried(sigmas: Sequence[float], i: int, end: float) -> dict[int, float]:
    """``end·v_i``: the weights of the slopes in step i's, a part of its last change carried on."""
    before = level_before(sigmas, i)
    if before is None:
        return {i: end}
    more = CARRIED * end * (end - sigmas[i]) / (sigmas[i] - sigmas[before])
    return {i: end + more, before: -more}


@cfgpp_ud10_ab.public
def sample_cfgpp_ud10_ab_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
) -> Tensor:  # fmt: skip
    """UD10 AB: Euler with CFG++, its steps blended with Adams-Bashforth's, as ComfyUI has it.

    ``x' = x + (1 + ρ/8) E - ρ²/8 E_prev + (1 + ρ/8)(x̂_new - x̂)``, ρ the ratio of the step's length
    in σ to that of the one before; ``E = x̂ + σ' v - x`` with the slope ``ε = (x - x̂_∅)/σ`` carried
    on, ``v = ε + ρ (ε - ε_prev)/10``; E_prev is that of the step before. The last step, to 0, goes
    to ``x̂_new + q (x̂_new - x̂_prev)`` with ``q = σ/(σ_prev - σ)``; the first is Euler. It does not
    follow the ODE: the change of v is multiplied by σ', not by the step's length. One evaluation a
    step.

    Source: ComfyUI's cfgpp_ud10_ab (pull request 15951); the teacher's share is x̂'s.
    """
    return sample(cfgpp_ud10_ab, model, x, sigmas, extra_args, callback, disable)
