"""The solvers: for each one its rows of coefficients, then its public ``sample_*_tg`` function.

Every function samples a `kdpp.TeacherGuidedDenoiser` and takes what k-diffusion's sampler of the
same name takes, in the same positions:

- ``x``: the starting latent ``(batch, *shape)``, with noise of standard deviation ``sigmas[0]``;
  floating point, in model space. Never written to; the result has its dtype and device.
- ``sigmas``: 1-D, non-increasing noise standard deviations, usually ending in 0.
- ``extra_args``: what the models take: ``cond``, ``uncond``, ``cond_scale``, …
- ``callback``: called once a step with k-diffusion's dict (``x, i, sigma, sigma_hat, denoised``),
  at guided steps also ``denoised_student, renoised, denoised_teacher, denoised_revised``.
- ``disable``: True hides the progress bar.
- ``eta``: 0 the ODE … 1 fully ancestral; ``s_noise``: factor on added noise;
  ``noise_sampler(sigma, sigma_next)``: source of standard normal noise, by default k-diffusion's.

They raise TypeError or ValueError, before any network call, for a model that is not wrapped, an
integer latent, sigmas that are not 1-D, finite, non-negative and non-increasing, a negative eta or
s_noise, or a missing ``uncond``; at the call that shows it, for output or noise of a wrong shape.

To add a solver, write both functions here: rows from sigmas, and the public function under
``@solver(…)``. Every property test then runs over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from torch import Tensor

from kdpp.driver import Callback, run
from kdpp.noise import NoiseSampler
from kdpp.plan import Row, Stage, Step, ancestral_split, euler_row, level_ratio, nonnegative

ExtraArgs = Mapping[str, Any] | None
Sampler = TypeVar("Sampler", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Solver:
    """A public sampler and what is claimed of it; tests measure the claims."""

    sample: Callable[..., Tensor]
    order: int | None
    """Order of convergence to the ODE's solution (at η = 0); None: it does not follow the ODE."""
    evaluations: int
    """Student evaluations in a step (the last one, to σ = 0, always takes one)."""
    cfg_pp: bool

    @property
    def name(self) -> str:
        return self.sample.__name__


SOLVERS: dict[str, Solver] = {}


def solver(
    *, order: int | None, evaluations: int = 1, cfg_pp: bool = False
) -> Callable[[Sampler], Sampler]:
    """Enter the public function into `SOLVERS`."""

    def enter(sample: Sampler) -> Sampler:
        SOLVERS[sample.__name__] = Solver(sample, order, evaluations, cfg_pp)
        return sample

    return enter


def single_stage(sigma: float, sigma_next: float, row: Row) -> Step:
    return Step(sigma, sigma_next, (Stage(sigma, row),))


# ----------------------------------------------------------------------------------- Euler, random


def euler(
    sigmas: Sequence[float], s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> Iterator[Step]:
    """Churn from σ to ``σ̂ = (1 + γ) σ``, then ``x̂_new + (x - d)/σ̂·σ'``."""
    nonnegative(s_churn=s_churn, s_noise=s_noise)
    gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    # A bound that is one of the levels holds it, though float32 has rounded the levels.
    low, high = s_tmin * (1 - 1e-6), s_tmax * (1 + 1e-6)
    for sigma, sigma_next in pairwise(sigmas):
        sigma_hat = sigma * (1 + gamma) if low <= sigma <= high else sigma
        # k-diffusion draws in every step; so does a run that churns in any, to get the same noise.
        churn = s_noise * math.sqrt(sigma_hat**2 - sigma**2) if gamma > 0 else None
        stage = Stage(sigma_hat, euler_row(sigma_hat, sigma_next))
        yield Step(sigma, sigma_next, (stage,), churn)


@solver(order=1)
def sample_euler_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
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
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
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
        yield single_stage(sigma, sigma_next, euler_row(sigma, sigma_down, noise))


@solver(order=1)
def sample_euler_ancestral_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
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
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral Euler with CFG++: ``x' = x̂_new + (x - x̂_∅)/σ·σ_down + σ_up n``.

    Source: Chung et al. 2024 (CFG++); Park et al. 2025, supplement 7.1.
    """
    plan = partial(euler_ancestral, eta=eta, s_noise=s_noise)
    return run(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler, cfg_pp=True)


def lcm(sigmas: Sequence[float]) -> Iterator[Step]:
    """``x̂_new + σ' n``; at σ' = 0 the estimate itself."""
    for sigma, sigma_next in pairwise(sigmas):
        noise = sigma_next if sigma_next > 0 else None
        row = Row(0.0, denoised=1.0, noise=noise) if sigma > 0 else Row(0.0)
        yield single_stage(sigma, sigma_next, row)


@solver(order=None)
def sample_lcm_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Multistep random (consistency) sampling, for LCM and DMD2: ``x' = x̂_new + σ' n``.

    One evaluation a step. It forgets x, so it suits students that predict the end of the
    trajectory and no others; a repeated level denoises and noises once more.

    Source: Luo et al. 2023 (LCM), Algorithm 3; Park et al. 2025, Algorithm 1.
    """
    return run(lcm, model, x, sigmas, extra_args, callback, disable, noise_sampler)


# -------------------------------------------------------------------------------- DPM-Solver++(2S)


def dpmpp_2s_ancestral(
    sigmas: Sequence[float], eta: float, s_noise: float, r: float = 0.5
) -> Iterator[Step]:
    """With ``e^{-h} = σ_down/σ`` and the middle point u at the fraction r of the step in -log σ:

    ``u = e^{-rh} x + (1 - e^{-rh}) d``,
    ``x' = e^{-h} x + (1 - e^{-h}) d + (1 - e^{-h})/(2r)·(x̂_new,u - d) + σ_up n``.
    """
    nonnegative(eta=eta, s_noise=s_noise)
    for sigma, sigma_next in pairwise(sigmas):
        sigma_down, noise = ancestral_split(sigma, sigma_next, eta, s_noise)
        ratio = level_ratio(sigma, sigma_down)
        if ratio in (0.0, 1.0):
            yield single_stage(sigma, sigma_next, euler_row(sigma, sigma_down, noise))
            continue
        middle = ratio**r
        weight = (1 - ratio) / (2 * r)
        sigma_middle = sigma * middle
        to_middle = Row(sigma_middle, direction=(1 - middle,))
        to_next = Row(sigma_down, weight, (0.0, 1 - ratio - weight), noise)
        stages = (Stage(sigma, to_middle), Stage(sigma_middle, to_next))
        yield Step(sigma, sigma_next, stages)


@solver(order=2, evaluations=2)
def sample_dpmpp_2s_ancestral_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral DPM-Solver++(2S), its middle point at r = 1/2 in -log σ.

    ``u = e^{-h/2} x + (1 - e^{-h/2}) x̂``, ``x' = e^{-h} x + (1 - e^{-h}) x̂_new,u + σ_up n`` with
    ``e^{-h} = σ_down/σ``: the estimate at u is the one the teacher revises, renoised to σ'. Two
    evaluations a step, one in the last; order 2 at η = 0. The paper's choice for SDXL-Turbo.

    Source: Lu et al. 2022 (DPM-Solver++), Algorithm 1; Park et al. 2025, supplement 7.1.
    """
    plan = partial(dpmpp_2s_ancestral, eta=eta, s_noise=s_noise)
    return run(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler)


@solver(order=2, evaluations=2, cfg_pp=True)
def sample_dpmpp_2s_ancestral_cfg_pp_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral DPM-Solver++(2S) with CFG++: x̂_∅ takes x̂'s place in the direction.

    ``u = e^{-h/2} x + (1 - e^{-h/2}) x̂_∅``, ``x' = e^{-h} x + (1 - e^{-h}) x̂_new,u + σ_up n``.
    This is equation (12) of Distillation++ at r = 1/2. The CFG++ authors' code has another form,
    ``x̂_u - e^{-h} x̂_∅,u + e^{-h} x``, and the web UIs have a third: figures do not carry over.

    Source: Park et al. 2025, supplement, equation (12).
    """
    plan = partial(dpmpp_2s_ancestral, eta=eta, s_noise=s_noise)
    return run(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler, cfg_pp=True)


# -------------------------------------------------------------------------------- DPM-Solver++(2M)


def dpmpp_2m(sigmas: Sequence[float], eta: float = 0.0, s_noise: float = 1.0) -> Iterator[Step]:
    """``x̂_new + e^{-h} (x - d) + (1 - e^{-h})/(2r)·(d - d_prev) + σ_up n``.

    ``h = log(σ/σ_down)``; ``r = h_prev/h`` with h_prev between full levels. First and last steps
    are Euler. d_prev is the estimate at the last level above σ: a repeated level is no step.
    """
    nonnegative(eta=eta, s_noise=s_noise)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        sigma_down, noise = ancestral_split(sigma, sigma_next, eta, s_noise)
        ratio = level_ratio(sigma, sigma_down)
        before = next((j for j in reversed(range(i)) if sigmas[j] > sigma), None)
        if before is None or ratio in (0.0, 1.0):
            yield single_stage(sigma, sigma_next, euler_row(sigma, sigma_down, noise))
            continue
        r = math.log(sigmas[before] / sigma) / -math.log(ratio)
        weight = (1 - ratio) / (2 * r)
        repeats = (0.0,) * (i - before - 1)
        row = Row(sigma_down, 1.0, (weight - ratio, *repeats, -weight), noise)
        yield single_stage(sigma, sigma_next, row)


@solver(order=2)
def sample_dpmpp_2m_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M): ``x' = x̂_new - e^{-h} x̂ + (1 - e^{-h})/(2r)·(x̂ - x̂_prev) + e^{-h} x``.

    ``e^{-h} = σ'/σ``, ``r = h_prev/h``; x̂_prev is the unrevised estimate of the step before. One
    evaluation a step, order 2; first and last steps are Euler.

    Source: Lu et al. 2022 (DPM-Solver++), Algorithm 2; Park et al. 2025, supplement 7.1.
    """
    return run(dpmpp_2m, model, x, sigmas, extra_args, callback, disable)


@solver(order=2, cfg_pp=True)
def sample_dpmpp_2m_cfg_pp_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M) with CFG++: x̂_∅ takes x̂'s place in the direction.

    ``x' = x̂_new - e^{-h} x̂_∅ + (1 - e^{-h})/(2r)·(x̂_∅ - x̂_∅,prev) + e^{-h} x``.

    Source: Chung et al. 2024 (CFG++); Park et al. 2025, supplement 7.1.
    """
    return run(dpmpp_2m, model, x, sigmas, extra_args, callback, disable, cfg_pp=True)


@solver(order=2)
def sample_dpmpp_2m_ancestral_tg(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral DPM-Solver++(2M): 2M to σ_down, then ``+ σ_up n``.

    ``e^{-h} = σ_down/σ``; h_prev lies between full levels. One evaluation a step; order 2 at η = 0,
    where it is `sample_dpmpp_2m_tg`.

    Source: Park et al. 2025, supplement 7.1 ("DPM-Solver++ 2M A").
    """
    plan = partial(dpmpp_2m, eta=eta, s_noise=s_noise)
    return run(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler)
