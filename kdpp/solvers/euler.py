"""First-order solvers: Euler, its ancestral form, DDIM with noise; and multistep random."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from kdpp.driver import Callback, ExtraArgs, sample
from kdpp.noise import NoiseSampler
from kdpp.plan import Row, Stage, Step, ancestral, euler_row, rf_split, with_churn
from kdpp.solver import ANCESTRAL, CHURN, solver

__all__ = [
    "sample_ddim_stochastic_tg",
    "sample_euler_ancestral_cfg_pp_tg",
    "sample_euler_ancestral_rf_tg",
    "sample_euler_ancestral_tg",
    "sample_euler_cfg_pp_tg",
    "sample_euler_tg",
    "sample_lcm_tg",
]


def first_order(sigma: float, target: float, noise: float | None) -> tuple[Stage, ...]:
    """``x̂_new + (x - d)/σ·σ_target + noise·n``."""
    return (Stage(sigma, euler_row(sigma, target, noise)),)


@solver(order=1, options=CHURN)
def euler(
    sigmas: Sequence[float], s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> Iterator[Step]:
    """Churn from σ to σ̂, then ``x̂_new + (x - d)/σ̂·σ'``."""
    return with_churn(sigmas, first_order, s_churn, s_tmin, s_tmax, s_noise)


@euler.public
def sample_euler_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Euler (= DDIM): ``x' = x̂_new + (x - x̂)/σ·σ'``.

    One evaluation a step, order 1. The plain choice for students that follow a trajectory
    (SDXL-Lightning and other progressive distillations). ``s_churn`` > 0 adds noise, by the factor
    ``s_noise``, before steps with ``s_tmin`` ≤ σ ≤ ``s_tmax``.

    Source: Karras et al. 2022, Algorithm 2; Park et al. 2025, supplement 7.1.
    """
    return sample(
        euler, model, x, sigmas, extra_args, callback, disable,
        s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise,
    )  # fmt: skip


euler_cfg_pp = euler.in_cfg_pp()


@euler_cfg_pp.public
def sample_euler_cfg_pp_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Euler with CFG++: ``x' = x̂_new + (x - x̂_∅)/σ·σ'``, x̂_∅ the unconditional estimate.

    As `sample_euler_tg`; ``cond_scale`` is CFG++'s scale, in [0, 1] as a rule.

    Source: Chung et al. 2024 (CFG++); Park et al. 2025, supplement 7.1.
    """
    return sample(
        euler_cfg_pp, model, x, sigmas, extra_args, callback, disable,
        s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise,
    )  # fmt: skip


@solver(order=1, options=ANCESTRAL, noise="plain")
def euler_ancestral(sigmas: Sequence[float], eta: float, s_noise: float) -> Iterator[Step]:
    """``x̂_new + (x - d)/σ·σ_down + σ_up n``."""
    return ancestral(sigmas, first_order, eta, s_noise)


@euler_ancestral.public
def sample_euler_ancestral_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Ancestral Euler: ``x' = x̂_new + (x - x̂)/σ·σ_down + σ_up n``.

    One evaluation a step. The teacher's input is at σ', the level that x' will have.

    Source: k-diffusion; Park et al. 2025, supplement 7.1, where the printed factors σ_down - σ and
    σ on the noise are misprints for σ_down and σ_up: only so does λ = 0 give the plain sampler.
    """
    return sample(
        euler_ancestral, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


euler_ancestral_cfg_pp = euler_ancestral.in_cfg_pp()


@euler_ancestral_cfg_pp.public
def sample_euler_ancestral_cfg_pp_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Ancestral Euler with CFG++: ``x' = x̂_new + (x - x̂_∅)/σ·σ_down + σ_up n``.

    Source: Chung et al. 2024 (CFG++); Park et al. 2025, supplement 7.1.
    """
    return sample(
        euler_ancestral_cfg_pp, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


@solver(order=1, options=ANCESTRAL, noise="plain")
def euler_ancestral_rf(sigmas: Sequence[float], eta: float, s_noise: float) -> Iterator[Step]:
    """`euler_ancestral`, split by `rf_split`."""
    return ancestral(sigmas, first_order, eta, s_noise, rf_split)


@euler_ancestral_rf.public
def sample_euler_ancestral_rf_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Ancestral Euler as ComfyUI has it for flow models ("RF"): steps down in τ instead of σ.

    ``τ_down = τ' (1 - η (1 - τ'/τ))``, ``τ = σ/(1+σ)``; then ``+ s_noise sqrt(σ'² - σ_down²) n``,
    as in `sample_euler_ancestral_tg`, whose σ_down is another. One evaluation a step.

    Source: ComfyUI's euler_ancestral for flow models; the teacher's term as in Euler.
    """
    return sample(
        euler_ancestral_rf, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        eta=eta, s_noise=s_noise,
    )  # fmt: skip


@solver(order=None, options={"s_noise": ANCESTRAL["s_noise"]}, noise="plain")
def ddim_stochastic(sigmas: Sequence[float], s_noise: float) -> Iterator[Step]:
    """``x̂_new + (x - d)/σ_i·σ_{i+2} + sqrt(σ_{i+1}² - σ_{i+2}²) n``."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if sigma_next == sigma:
            yield Step.single(sigma, sigma_next, Row(sigma))
            continue
        sigma_down = next((level for level in sigmas[i + 2 :] if level < sigma_next), sigma_next)
        noise = s_noise * math.sqrt((sigma_next - sigma_down) * (sigma_next + sigma_down))
        yield Step.single(sigma, sigma_next, euler_row(sigma, sigma_down, noise or None))


@ddim_stochastic.public
def sample_ddim_stochastic_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """N-step stochastic DDIM: two levels down at once, then noise for one level up again.

    ``x' = x̂_new + (x - x̂)/σ_i·σ_{i+2} + sqrt(σ_{i+1}² - σ_{i+2}²) n``; the last step goes to the
    last level without noise. One evaluation a step. For students trained to take the doubled step
    (guided distillation, stochastic); it does not follow the ODE.

    Source: Meng et al. 2023, equations (4)-(7), written for variances in VE.
    """
    return sample(
        ddim_stochastic, model, x, sigmas, extra_args, callback, disable, noise_sampler,
        s_noise=s_noise,
    )  # fmt: skip


@solver(order=None, noise="plain")
def lcm(sigmas: Sequence[float]) -> Iterator[Step]:
    """``x̂_new + σ' n``; at σ' = 0 the estimate itself."""
    for sigma, sigma_next in pairwise(sigmas):
        noise = sigma_next if sigma_next > 0 else None
        stays = sigma == 0.0 or math.isinf(sigma_next)
        row = Row(sigma) if stays else Row(0.0, denoised=1.0, noise=noise)
        yield Step.single(sigma, sigma_next, row)


@lcm.public
def sample_lcm_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:  # fmt: skip
    """Multistep random (consistency) sampling, for LCM and DMD2: ``x' = x̂_new + σ' n``.

    One evaluation a step. It forgets x, so it suits students that predict the end of the
    trajectory and no others; a repeated level denoises and noises once more.

    Source: Luo et al. 2023 (LCM), Algorithm 3; Park et al. 2025, Algorithm 1.
    """
    return sample(lcm, model, x, sigmas, extra_args, callback, disable, noise_sampler)
