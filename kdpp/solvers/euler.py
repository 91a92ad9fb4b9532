"""First-order solvers: Euler, its ancestral form, DDIM with noise; and multistep random."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor

from kdpp.driver import Callback, run
from kdpp.noise import NoiseSampler
from kdpp.plan import Row, Stage, Step, ancestral_split, churned, euler_row, nonnegative
from kdpp.solvers.registry import ExtraArgs, solver

__all__ = [
    "sample_ddim_stochastic_tg",
    "sample_euler_ancestral_cfg_pp_tg",
    "sample_euler_ancestral_tg",
    "sample_euler_cfg_pp_tg",
    "sample_euler_tg",
    "sample_lcm_tg",
]


def euler(
    sigmas: Sequence[float], s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> Iterator[Step]:
    """Churn from σ to σ̂, then ``x̂_new + (x - d)/σ̂·σ'``."""
    lifts = churned(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    for (sigma, sigma_next), (sigma_hat, churn) in zip(pairwise(sigmas), lifts):
        stage = Stage(sigma_hat, euler_row(sigma_hat, sigma_next))
        yield Step(sigma, sigma_next, (stage,), churn)


@solver(order=1)
def sample_euler_tg(
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
    """Euler (= DDIM): ``x' = x̂_new + (x - x̂)/σ·σ'``.

    One evaluation a step, order 1. The plain choice for students that follow a trajectory
    (SDXL-Lightning and other progressive distillations). ``s_churn`` > 0 adds noise, by the factor
    ``s_noise``, before steps with ``s_tmin`` ≤ σ ≤ ``s_tmax``.

    Source: Karras et al. 2022, Algorithm 2; Park et al. 2025, supplement 7.1.
    """
    plan = partial(euler, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    return run(plan, model, x, sigmas, extra_args, callback, disable)


@solver(order=1, cfg_pp=True)
def sample_euler_cfg_pp_tg(
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
    """Euler with CFG++: ``x' = x̂_new + (x - x̂_∅)/σ·σ'``, x̂_∅ the unconditional estimate.

    As `sample_euler_tg`; ``cond_scale`` is CFG++'s scale, in [0, 1] as a rule.

    Source: Chung et al. 2024 (CFG++); Park et al. 2025, supplement 7.1.
    """
    plan = partial(euler, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    return run(plan, model, x, sigmas, extra_args, callback, disable, cfg_pp=True)


def euler_ancestral(sigmas: Sequence[float], eta: float, s_noise: float) -> Iterator[Step]:
    """``x̂_new + (x - d)/σ·σ_down + σ_up n``."""
    nonnegative(eta=eta, s_noise=s_noise)
    for sigma, sigma_next in pairwise(sigmas):
        sigma_down, noise = ancestral_split(sigma, sigma_next, eta, s_noise)
        yield Step.single(sigma, sigma_next, euler_row(sigma, sigma_down, noise))


@solver(order=1)
def sample_euler_ancestral_tg(
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
    """Ancestral Euler: ``x' = x̂_new + (x - x̂)/σ·σ_down + σ_up n``.

    One evaluation a step. The teacher's input is at σ', the level that x' will have.

    Source: k-diffusion; Park et al. 2025, supplement 7.1, where the printed factors σ_down - σ and
    σ on the noise are misprints for σ_down and σ_up: only so does λ = 0 give the plain sampler.
    """
    plan = partial(euler_ancestral, eta=eta, s_noise=s_noise)
    return run(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler)


@solver(order=1, cfg_pp=True)
def sample_euler_ancestral_cfg_pp_tg(
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
    """Ancestral Euler with CFG++: ``x' = x̂_new + (x - x̂_∅)/σ·σ_down + σ_up n``.

    Source: Chung et al. 2024 (CFG++); Park et al. 2025, supplement 7.1.
    """
    plan = partial(euler_ancestral, eta=eta, s_noise=s_noise)
    return run(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler, cfg_pp=True)


def ddim_stochastic(sigmas: Sequence[float], s_noise: float) -> Iterator[Step]:
    """``x̂_new + (x - d)/σ_i·σ_{i+2} + sqrt(σ_{i+1}² - σ_{i+2}²) n``."""
    nonnegative(s_noise=s_noise)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if sigma_next == sigma:
            yield Step.single(sigma, sigma_next, Row(sigma))
            continue
        sigma_down = next((level for level in sigmas[i + 2 :] if level < sigma_next), sigma_next)
        noise = s_noise * math.sqrt((sigma_next - sigma_down) * (sigma_next + sigma_down))
        yield Step.single(sigma, sigma_next, euler_row(sigma, sigma_down, noise or None))


@solver(order=None)
def sample_ddim_stochastic_tg(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """N-step stochastic DDIM: two levels down at once, then noise for one level up again.

    ``x' = x̂_new + (x - x̂)/σ_i·σ_{i+2} + sqrt(σ_{i+1}² - σ_{i+2}²) n``; the last step goes to the
    last level without noise. One evaluation a step. For students trained to take the doubled step
    (guided distillation, stochastic); it does not follow the ODE.

    Source: Meng et al. 2023, equations (4)-(7), written for variances in VE.
    """
    plan = partial(ddim_stochastic, s_noise=s_noise)
    return run(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def lcm(sigmas: Sequence[float]) -> Iterator[Step]:
    """``x̂_new + σ' n``; at σ' = 0 the estimate itself."""
    for sigma, sigma_next in pairwise(sigmas):
        noise = sigma_next if sigma_next > 0 else None
        stays = sigma == 0.0 or math.isinf(sigma_next)
        row = Row(sigma) if stays else Row(0.0, denoised=1.0, noise=noise)
        yield Step.single(sigma, sigma_next, row)


@solver(order=None)
def sample_lcm_tg(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Multistep random (consistency) sampling, for LCM and DMD2: ``x' = x̂_new + σ' n``.

    One evaluation a step. It forgets x, so it suits students that predict the end of the
    trajectory and no others; a repeated level denoises and noises once more.

    Source: Luo et al. 2023 (LCM), Algorithm 3; Park et al. 2025, Algorithm 1.
    """
    return run(lcm, model, x, sigmas, extra_args, callback, disable, noise_sampler)
