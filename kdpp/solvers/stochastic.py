"""Solvers of the reverse SDE whose steps draw fresh noise: ER-SDE, SEEDS and SA-Solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
from torch import Tensor

from kdpp.driver import Callback, ExtraArgs, sample
from kdpp.noise import NoiseSampler
from kdpp.plan import Row, Stage, Step, euler_row, is_first_order, level_before
from kdpp.solver import ANCESTRAL, CHURN, Option, solver
from kdpp.solvers.multistep import estimates_row, exponential, midpoint
from kdpp.solvers.sde import sde_split
from kdpp.solvers.singlestep import MIDDLE

__all__ = [
    "sample_er_sde_tg",
    "sample_sa_solver_pece_tg",
    "sample_sa_solver_tg",
    "sample_seeds_2_tg",
    "sample_seeds_3_tg",
]

# ----------------------------------------------------------------------------------------- ER-SDE

POINTS = 200
"""Of the sums in the place of two integrals; they belong to the solver, as its authors' code."""


def kept(sigma: float, sigma_next: float) -> float:
    """``φ(σ')/φ(σ)·σ`` with ``φ(σ) = σ (exp(σ^0.3) + 10)``, the level that ER-SDE steps down to."""
    high, low = sigma**0.3, sigma_next**0.3
    return sigma_next * (math.exp(low - high) + 10 * math.exp(-high)) / (1 + 10 * math.exp(-high))


@solver(
    order=None, options={"max_stage": Option(3, low=1, high=3), "s_noise": ANCESTRAL["s_noise"]},
    noise="plain",
)  # fmt: skip
def er_sde(sigmas: Sequence[float], max_stage: int, s_noise: float) -> Iterator[Step]:
    """Down to `kept` with up to two differences of the estimates over σ, then noise up to σ'."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if sigma_next in (0.0, sigma):
            noise = 0.0 if s_noise > 0.0 and sigma_next > 0.0 else None
            yield Step.single(sigma, sigma_next, euler_row(sigma, sigma_next, noise))
            continue
        down = kept(sigma, sigma_next)
        noise = s_noise * math.sqrt((sigma_next - down) * (sigma_next + down)) or None
        weights = {i: 1.0 - down / sigma}
        before = level_before(sigmas, i)
        earlier = None if before is None else level_before(sigmas, before)
        if max_stage > 1 and before is not None:
            size = (sigma - sigma_next) / POINTS
            points = [sigma_next + k * size for k in range(POINTS)]
            shares = [kept(point, sigma_next) / point * size for point in points]  # φ(σ')/φ
            first = sigma_next - sigma + math.fsum(shares)
            slope = {i: 1.0 / (sigma - sigmas[before]), before: -1.0 / (sigma - sigmas[before])}
            add(weights, first, slope)
            if max_stage > 2 and earlier is not None:
                bend = (sigma - sigma_next) ** 2 / 2
                bend += math.fsum((p - sigma) * share for p, share in zip(points, shares))
                span, far = (sigma - sigmas[earlier]) / 2, sigmas[before] - sigmas[earlier]
                add(weights, bend / span, slope)
                add(weights, -bend / span, {before: 1.0 / far, earlier: -1.0 / far})
        yield Step.single(sigma, sigma_next, estimates_row(i, down, weights, noise))


def add(weights: dict[int, float], factor: float, terms: dict[int, float]) -> None:
    """Add ``factor·terms``."""
    for j, term in terms.items():
        weights[j] = weights.get(j, 0.0) + factor * term


@er_sde.public
def sample_er_sde_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None, *, max_stage: int = 3,
) -> Tensor:  # fmt: skip
    """ER-SDE-Solver, of 1 to 3 stages (``max_stage``): a reverse SDE of less noise at high levels.

    ``x' = r x + (1 - r) x̂ + A x̂_σ + B x̂_σσ + (x̂_new - x̂) + s_noise sqrt(σ'² - r²σ²) n`` with
    ``r = φ(σ')/φ(σ)``, ``φ(σ) = σ (exp(σ^0.3) + 10)``, ``A = σ' - σ + φ(σ') ∫ dσ/φ``,
    ``B = (σ - σ')²/2 + φ(σ') ∫ (s - σ) ds/φ(s)``; x̂_σ and x̂_σσ are differences of two and three
    estimates. The integrals, from σ' to σ, are the authors' sums over 200 points. One evaluation a
    step; the last is Euler. Raises ValueError for another number of stages.

    Source: Cui et al. 2023 (ER-SDE-Solvers), Algorithms 1-3 and their code; ComfyUI's er_sde.
    """
    return sample(
        er_sde, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        s_noise=s_noise, max_stage=max_stage,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ SEEDS

Point = tuple[float, Sequence[float]]
"""A level, and the weights of the step's estimates d_0, d_1, … in the point there, as from x."""


def on_one_path(
    sigmas: Sequence[float],
    eta: float,
    s_noise: float,
    points: Callable[[float, float], Sequence[Point]],
) -> Iterator[Step]:
    """Steps through ``points(sigma, sigma_next)`` on one path of the exact SDE.

    Each point goes on from the one before: the noise that came into an estimate stays, with the
    SDE's decay, in the points after it, and each adds fresh noise for its part of the way. To σ = 0
    and from σ = ∞ a step is Euler.
    """
    for sigma, sigma_next in pairwise(sigmas):
        if is_first_order(sigma, sigma_next):
            row = euler_row(sigma, *sde_split(sigma, sigma_next, eta, s_noise))
            yield Step.single(sigma, sigma_next, row)
            continue
        stages: list[Stage] = []
        known: Sequence[float] = ()
        level, made = sigma, points(sigma, sigma_next)
        for end, weights in made:
            down, noise = sde_split(level, end, eta, s_noise)
            denoised = 1.0 if len(stages) + 1 == len(made) else 0.0
            pairs = zip_longest(weights, known, fillvalue=0.0)
            *older, newest = (weight - down / level * before for weight, before in pairs)
            row = Row(down, denoised, (newest - denoised, *reversed(older)), noise)
            stages.append(Stage(level, row, onward=bool(stages)))
            level, known = end, weights
        yield Step(sigma, sigma_next, tuple(stages))


def decay(sigma: float, level: float, eta: float) -> float:
    """``e^{-(1+η)h}``, the weight of x in a point of the path at the level."""
    return float((level / sigma) ** (1.0 + eta))


def level_at(sigma: float, sigma_next: float, r: float) -> float:
    """The level at the fraction r of the step in -log σ; its very end at r = 1."""
    return float(sigma * (sigma_next / sigma) ** r) if r < 1.0 else sigma_next


PHI = {"phi_1": midpoint, "phi_2": exponential}
SEEDS_2 = {**ANCESTRAL, "r": MIDDLE, "solver_type": Option("phi_1", choices=tuple(PHI))}


@solver(order=2, evaluations=2, options=SEEDS_2, noise="plain")
def seeds_2(
    sigmas: Sequence[float], eta: float, s_noise: float, r: float, solver_type: str
) -> Iterator[Step]:
    """`on_one_path` through one point at the fraction r of a step."""

    def points(sigma: float, sigma_next: float) -> list[Point]:
        middle = level_at(sigma, sigma_next, r)
        first, ratio = (decay(sigma, level, eta) for level in (middle, sigma_next))
        weight = PHI[solver_type](sigma, sigma_next, sigma * ratio)[0] / r
        return [(middle, [1.0 - first]), (sigma_next, [1.0 - ratio - weight, weight])]

    return on_one_path(sigmas, eta, s_noise, points)


@seeds_2.public
def sample_seeds_2_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    r: float = 0.5, *, solver_type: str = "phi_1",
) -> Tensor:  # fmt: skip
    """SEEDS-2, data prediction: 2S of the exact SDE, whose noise follows one path.

    With ``g = (1+η) h``, ``h = log(σ/σ')`` and u at the fraction r of the step in -log σ,
    ``u = e^{-rg} x + (1 - e^{-rg}) x̂ + σ_u sqrt(1 - e^{-2rηh}) s_noise n``,
    ``x' = e^{-g} x + (1 - e^{-g}) x̂ + b (x̂_u - x̂) + (x̂_new,u - x̂_u) + σ' s_noise m``,
    ``m = e^{-(1-r)ηh} sqrt(1 - e^{-2rηh}) n + sqrt(1 - e^{-2(1-r)ηh}) n_2``. ``solver_type`` is the
    weight b: "phi_1" ``(1 - e^{-g})/(2r)``, "phi_2" ``(1 - (1 - e^{-g})/g)/r``. Two evaluations a
    step, one in the last; order 2 at η = 0. Raises ValueError for r outside (0, 1].

    Source: Gonzalez et al. 2023 (SEEDS, arXiv 2305.14267), SEEDS-2 in data prediction, as in
    ComfyUI; ComfyUI's exp_heun_2_x0_sde is r = 1 with "phi_2".
    """
    return sample(
        seeds_2, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise, r=r, solver_type=solver_type,
    )  # fmt: skip


SEEDS_3 = {
    **ANCESTRAL,
    "r_1": replace(MIDDLE, default=1 / 3),
    "r_2": replace(MIDDLE, default=2 / 3),
}


@solver(order=3, evaluations=3, options=SEEDS_3, noise="plain")
def seeds_3(
    sigmas: Sequence[float], eta: float, s_noise: float, r_1: float, r_2: float
) -> Iterator[Step]:
    """`on_one_path` through points at the fractions r_1 and r_2 of a step."""
    if r_1 > r_2:
        raise ValueError(f"r_1 is {r_1:g} and r_2 {r_2:g}; they must be r_1 ≤ r_2")

    def points(sigma: float, sigma_next: float) -> list[Point]:
        one, two = (level_at(sigma, sigma_next, r) for r in (r_1, r_2))
        first, second, ratio = (decay(sigma, level, eta) for level in (one, two, sigma_next))
        middle = exponential(sigma, two, sigma * second)[0] * r_2 / r_1
        end = exponential(sigma, sigma_next, sigma * ratio)[0] / r_2
        return [
            (one, [1.0 - first]),
            (two, [1.0 - second - middle, middle]),
            (sigma_next, [1.0 - ratio - end, 0.0, end]),
        ]

    return on_one_path(sigmas, eta, s_noise, points)


@seeds_3.public
def sample_seeds_3_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    r_1: float = 1 / 3, r_2: float = 2 / 3,
) -> Tensor:  # fmt: skip
    """SEEDS-3, data prediction: three evaluations on one path of the exact SDE.

    With ``g = (1+η) h`` and ``c(g) = 1 - (1 - e^{-g})/g``, points u and v at the fractions r_1 and
    r_2 of the step in -log σ, and without the noise, which is that of `sample_seeds_2_tg`,
    ``u = e^{-r_1 g} x + (1 - e^{-r_1 g}) x̂``,
    ``v = e^{-r_2 g} x + (1 - e^{-r_2 g}) x̂ + r_2/r_1 c(r_2 g) (x̂_u - x̂)``,
    ``x' = e^{-g} x + (1 - e^{-g}) x̂ + c(g)/r_2 (x̂_v - x̂) + (x̂_new,v - x̂_v)``. Three evaluations a
    step, one in the last; order 3 at η = 0. Raises ValueError unless 0 < r_1 ≤ r_2 ≤ 1.

    Source: Gonzalez et al. 2023 (SEEDS, arXiv 2305.14267), SEEDS-3 in data prediction, as in
    ComfyUI.
    """
    return sample(
        seeds_3, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise, r_1=r_1, r_2=r_2,
    )  # fmt: skip


# -------------------------------------------------------------------------------------- SA-Solver

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)
SA_SOLVER = {
    **ANCESTRAL,
    "s_tmin": CHURN["s_tmin"],
    "s_tmax": CHURN["s_tmax"],
    "predictor_order": Option(3, low=1, high=4),
    "corrector_order": Option(4, low=1, high=4),
}


def adams(
    sigmas: Sequence[float], nodes: Sequence[int], start: float, end: float, eta: float
) -> dict[int, float]:
    """Weights of the nodes' estimates in a step between levels (equations 15 and 18).

    ``∫ a e^{a(λ - λ')} L_j(λ) dλ`` over the step in λ = -log σ, ``a = 1 + η²``, L_j the Lagrange
    polynomials of the nodes' estimates: with the step's end among them it is the corrector.
    """
    h = math.log(start / end)
    a = 1.0 + eta * eta
    if len(nodes) == 1:
        return {nodes[0]: -math.expm1(-a * h)}
    at = (NODES - 1.0) / 2.0 * h
    measure = WEIGHTS / 2.0 * h * a * np.exp(a * at)
    places = np.array([math.log(end / sigmas[j]) for j in nodes])
    weights = {}
    for k, j in enumerate(nodes):
        others = np.delete(places, k)
        basis = np.prod([(at - other) / (places[k] - other) for other in others], axis=0)
        weights[j] = float(measure @ basis)
    return weights


def stochastic_adams(
    sigmas: Sequence[float], eta: float, s_noise: float, s_tmin: float, s_tmax: float,
    predictor_order: int, corrector_order: int, again: bool,
) -> Iterator[Step]:  # fmt: skip
    """Correct x with the newest estimate, then predict the next point: in one row, as `unipc`.

    The corrector has the predictor's weight of x and its noise, so correcting is adding the
    difference of their weights of the estimates. ``again``: the corrected point is evaluated, too,
    and its estimate stands for the step from there on.
    """
    low, high = s_tmin * (1.0 - 1e-6), s_tmax * (1.0 + 1e-6)  # float32 has rounded the levels
    predicted: dict[int, dict[int, float]] = {}
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        here = eta if low <= sigma_next <= high else 0.0
        sigma_down, noise = sde_split(sigma, sigma_next, here * here, s_noise)
        if math.isinf(sigma) or sigma_next == sigma or (sigma_next == 0.0 and not again):
            yield Step.single(sigma, sigma_next, euler_row(sigma, sigma_down, noise))
            continue
        nodes = [i]
        while len(nodes) < 4 and (before := level_before(sigmas, nodes[-1])) is not None:
            nodes.append(before)
        left = sum(a > b > 0.0 for a, b in pairwise(sigmas[i:]))
        lowers = sigmas[-1] == 0.0  # towards σ = 0 the order falls, as in the authors' code
        weights, change = {i: 1.0}, dict[int, float]()
        if sigma_next > 0.0:
            order = min(predictor_order, left if lowers else predictor_order)
            weights = predicted[i] = adams(sigmas, nodes[:order], sigma, sigma_next, here)
        if len(nodes) > 1 and nodes[1] in predicted:
            order = min(corrector_order, left + 1 if lowers else corrector_order)
            was, start = eta if low <= sigma <= high else 0.0, nodes[1]
            corrected = adams(sigmas, nodes[:order], sigmas[start], sigma, was)
            for j in {*corrected, *predicted[start]}:
                change[j] = corrected.get(j, 0.0) - predicted[start].get(j, 0.0)
        if again and change:
            newest, *older = estimates_row(i, sigma_down, weights, noise).direction
            onward = Row(sigma_down, 1.0, (newest, 0.0, *older), noise)
            correct = estimates_row(i, sigma, change, denoised=0.0)
            stages = Stage(sigma, correct), Stage(sigma, onward, onward=True)
            yield Step(sigma, sigma_next, stages, kept=1)
            continue
        weights = dict(weights)
        for j in change:
            weights[j] = weights.get(j, 0.0) + sigma_down / sigma * change[j]
        yield Step.single(sigma, sigma_next, estimates_row(i, sigma_down, weights, noise))


@solver(order=3, order_from=1536, options=SA_SOLVER, noise="plain")
def sa_solver(sigmas: Sequence[float], **options: Any) -> Iterator[Step]:
    """`stochastic_adams`, the corrected point not evaluated again (PEC)."""
    return stochastic_adams(sigmas, **options, again=False)


@solver(order=3, order_from=1536, evaluations=2, options=SA_SOLVER, noise="plain")
def sa_solver_pece(sigmas: Sequence[float], **options: Any) -> Iterator[Step]:
    """`stochastic_adams`, the corrected point evaluated, too (PECE)."""
    return stochastic_adams(sigmas, **options, again=True)


@sa_solver.public
def sample_sa_solver_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None, *,
    s_tmin: float = 0.0, s_tmax: float = math.inf,
    predictor_order: int = 3, corrector_order: int = 4,
) -> Tensor:  # fmt: skip
    """SA-Solver (stochastic Adams), data prediction: predict, evaluate, correct.

    ``x' = σ'/σ e^{-η²h} x + Σ_j b_j x̂_j + (x̂_new - x̂) + σ' sqrt(1 - e^{-2η²h}) s_noise n``, b_j the
    integrals of the last estimates' Lagrange polynomials. The estimate at a predicted point also
    corrects it, with the same noise. η is the paper's τ: it holds in steps that end at a σ' in
    [``s_tmin``, ``s_tmax``], where ComfyUI takes the levels of 80 and 20 % of a model's schedule;
    other steps solve the ODE. Orders are numbers of estimates, 1 to 4; on schedules that end at 0
    they fall towards the end. One evaluation a step; a last step to 0 is Euler; order 3 at η = 0.

    Source: Xue et al. 2023 (SA-Solver), Algorithm 1, equations (15) and (18).
    """
    return sample(
        sa_solver, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise, s_tmin=s_tmin, s_tmax=s_tmax,
        predictor_order=predictor_order, corrector_order=corrector_order,
    )  # fmt: skip


@sa_solver_pece.public
def sample_sa_solver_pece_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None, *,
    s_tmin: float = 0.0, s_tmax: float = math.inf,
    predictor_order: int = 3, corrector_order: int = 4,
) -> Tensor:  # fmt: skip
    """SA-Solver, predict, evaluate, correct, evaluate: the corrected point is evaluated, too.

    `sample_sa_solver_tg` whose predictor, and all later steps, take the estimate at the corrected
    point, which is the one that the teacher revises. Two evaluations a step, one in the first.

    Source: Xue et al. 2023 (SA-Solver), Algorithm 1 in PECE mode, as in ComfyUI.
    """
    return sample(
        sa_solver_pece, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise, s_tmin=s_tmin, s_tmax=s_tmax,
        predictor_order=predictor_order, corrector_order=corrector_order,
    )  # fmt: skip
