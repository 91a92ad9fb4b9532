"""Literal references, with a teacher, of the solvers beyond Distillation++'s own.

Each one writes the base solver's update with unrevised estimates and adds (x_new - x0) of the
step's last estimate, coefficient 1. Sources: k-diffusion's and the papers' formulas, in VE.
"""

from __future__ import annotations

from math import exp, expm1, inf, log, sqrt

import numpy as np
import torch
from scipy.integrate import quad

from problems import pairs
from reference import Moment, _ancestral, _noised, _time


def _churned(x, i, sigma, sigmas, s_churn, s_tmin, s_tmax, s_noise):
    """Karras et al.'s churn, drawn from torch's stream as k-diffusion does."""
    gamma = min(s_churn / (len(sigmas) - 1), sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
    hat, fresh = sigma * (1 + gamma), torch.randn_like(x)
    return (x + s_noise * sqrt(hat**2 - sigma**2) * fresh if gamma > 0 else x), hat


def heun(estimate, uncond, revise, x, sigmas, noise, *, s_churn=0.0, s_tmin=0.0, s_tmax=inf,
         s_noise=1.0):  # fmt: skip
    """The mean of the slopes at both ends."""
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        x, hat = _churned(x, i, sigma, sigmas, s_churn, s_tmin, s_tmax, s_noise)
        x0 = estimate(x, hat)
        if end == 0:
            x = revise(Moment(i, sigma, end, x, hat), x0, x0)
            continue
        slope = (x - x0) / hat
        u = x + slope * (end - hat)
        u0 = estimate(u, end)
        new = revise(Moment(i, sigma, end, u, end), u0, u0)
        x = x + (slope + (u - u0) / end) / 2 * (end - hat) + (new - u0)
    return x


def _midpoint(estimate, revise, x, i, sigma, sigma_next, hat, target):
    """DPM-Solver-2 from hat to target."""
    x0 = estimate(x, hat)
    if target == 0:
        return revise(Moment(i, sigma, sigma_next, x, hat), x0, x0)
    middle = exp((log(hat) + log(target)) / 2)
    u = x + (x - x0) / hat * (middle - hat)
    u0 = estimate(u, middle)
    new = revise(Moment(i, sigma, sigma_next, u, middle), u0, u0)
    return x + (u - u0) / middle * (target - hat) + (new - u0)


def dpm_2(estimate, uncond, revise, x, sigmas, noise, *, s_churn=0.0, s_tmin=0.0, s_tmax=inf,
          s_noise=1.0):  # fmt: skip
    """The slope at the geometric middle."""
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        x, hat = _churned(x, i, sigma, sigmas, s_churn, s_tmin, s_tmax, s_noise)
        x = _midpoint(estimate, revise, x, i, sigma, end, hat, end)
    return x


def dpm_2_ancestral(estimate, uncond, revise, x, sigmas, noise, *, eta=1.0, s_noise=1.0):
    """The same to sigma_down, then noise."""
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        down, up = _ancestral(sigma, end, eta)
        x = _midpoint(estimate, revise, x, i, sigma, end, sigma, down)
        x = _noised(x, noise, sigma, end, s_noise * up)
    return x


def _down_in_tau(sigma, end, eta):
    """σ_down and the noise of the flow models' ancestral step, from its formula in (1-τ) x."""
    tau, tau_end = sigma / (1 + sigma), end / (1 + end)
    down = tau_end * max(0.0, 1 + (tau_end / tau - 1) * eta)
    kept = (1 - tau_end) / (1 - down)
    return down / (1 - down), sqrt(max(0.0, tau_end**2 - (down * kept) ** 2)) / (1 - tau_end)


def euler_ancestral_rf(estimate, uncond, revise, x, sigmas, noise, *, eta=1.0, s_noise=1.0):
    """Euler down in tau, then noise."""
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        down, up = _down_in_tau(sigma, end, eta)
        x0 = estimate(x, sigma)
        new = revise(Moment(i, sigma, end, x, sigma), x0, x0)
        x = _noised(new + (x - x0) / sigma * down, noise, sigma, end, s_noise * up)
    return x


def dpm_2_ancestral_rf(estimate, uncond, revise, x, sigmas, noise, *, eta=1.0, s_noise=1.0):
    """The middle's slope in tau, for z = (1-tau) x, then noise."""
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        down, up = _down_in_tau(sigma, end, eta)
        x0 = estimate(x, sigma)
        if down == 0:
            x = revise(Moment(i, sigma, end, x, sigma), x0, x0)
        else:
            tau, tau_down = sigma / (1 + sigma), down / (1 + down)
            z, tau_u = (1 - tau) * x, sqrt(tau * tau_down)
            u = (z + (z - x0) / tau * (tau_u - tau)) / (1 - tau_u)
            middle = tau_u / (1 - tau_u)
            u0 = estimate(u, middle)
            new = revise(Moment(i, sigma, end, u, middle), u0, u0)
            z = z + ((1 - tau_u) * u - u0) / tau_u * (tau_down - tau)
            x = z / (1 - tau_down) + (new - u0)
        x = _noised(x, noise, sigma, end, s_noise * up)
    return x


def dpmpp_2s_ancestral_rf(estimate, uncond, revise, x, sigmas, noise, *, eta=1.0, s_noise=1.0):
    """2S by its middle point's estimate alone, then noise."""
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        down, up = _down_in_tau(sigma, end, eta)
        x0 = estimate(x, sigma)
        if down == 0:
            x = revise(Moment(i, sigma, end, x, sigma), x0, x0)
        else:
            middle = sqrt(sigma * down)
            u = x0 + middle / sigma * (x - x0)
            u0 = estimate(u, middle)
            new = revise(Moment(i, sigma, end, u, middle), u0, u0)
            x = down / sigma * x + (1 - down / sigma) * new
        x = _noised(x, noise, sigma, end, s_noise * up)
    return x


def ddim_stochastic(estimate, uncond, revise, x, sigmas, noise, *, s_noise=1.0):
    """Two levels down, one up (Meng et al., equations 4-7)."""
    levels = [*map(float, sigmas.double()), float(sigmas[-1])]
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        far = levels[i + 2]
        x0 = estimate(x, sigma)
        new = revise(Moment(i, sigma, end, x, sigma), x0, x0)
        x = new + (x - x0) / sigma * far
        if end > far:
            x = x + s_noise * sqrt(end**2 - far**2) * noise(sigma, end)
    return x


def lms(estimate, uncond, revise, x, sigmas, noise, *, order=4, lower_order_final="never"):
    """Adams-Bashforth in sigma; the coefficients by quadrature."""
    levels, slopes = [float(s) for s in sigmas.double()], []
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        x0 = estimate(x, sigma)
        new = revise(Moment(i, sigma, end, x, sigma), x0, x0)
        if end == 0 and lower_order_final == "at 0":
            return new
        slopes.insert(0, (x - x0) / sigma)
        nodes = levels[max(0, i - order + 1) : i + 1][::-1]
        for j, slope in enumerate(slopes[: len(nodes)]):

            def lagrange(t, j=j, nodes=nodes):
                others = [n for k, n in enumerate(nodes) if k != j]
                return np.prod([(t - n) / (nodes[j] - n) for n in others])

            x = x + quad(lagrange, sigma, end, epsabs=1e-14, epsrel=1e-13)[0] * slope
        x = x + (new - x0)
    return x


def dpmpp_sde(estimate, uncond, revise, x, sigmas, noise, *, eta=1.0, s_noise=1.0, r=0.5):
    """2S with noise at the middle and at the end."""
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        x0 = estimate(x, sigma)
        if end == 0:
            x = revise(Moment(i, sigma, end, x, sigma), x0, x0)
            continue
        middle = exp(-(_time(sigma) + r * (_time(end) - _time(sigma))))
        down, up = _ancestral(sigma, middle, eta)
        u = down / sigma * x + (1 - down / sigma) * x0
        u = u + s_noise * up * noise(sigma, middle) if eta * s_noise else u
        u0 = estimate(u, middle)
        new = revise(Moment(i, sigma, end, u, middle), u0, u0)
        down, up = _ancestral(sigma, end, eta)
        mean = (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * u0
        x = down / sigma * x + (1 - down / sigma) * mean + (new - u0)
        x = x + s_noise * up * noise(sigma, end) if eta * s_noise else x
    return x


def _sde_noised(x, noise, sigma, end, eta, s_noise):
    """The exact SDE's noise over a step."""
    if not eta * s_noise:
        return x
    up = end * sqrt(-expm1(-2 * eta * log(sigma / end)))
    return x + s_noise * up * noise(sigma, end)


def dpmpp_2m_sde(estimate, uncond, revise, x, sigmas, noise, *, eta=1.0, s_noise=1.0,
                 solver_type="midpoint"):  # fmt: skip
    """SDE-DPM-Solver++(2M)."""
    before = h_before = None
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        x0 = estimate(x, sigma)
        new = revise(Moment(i, sigma, end, x, sigma), x0, x0)
        if end == 0:
            return new
        h = log(sigma / end)
        x = end / sigma * exp(-eta * h) * x - expm1(-h - eta * h) * x0
        if before is not None:
            slope = (x0 - before) / (h_before / h)
            if solver_type == "midpoint":
                x = x - 0.5 * expm1(-h - eta * h) * slope
            else:
                x = x + (expm1(-h - eta * h) / (h + eta * h) + 1) * slope
        x = _sde_noised(x + (new - x0), noise, sigma, end, eta, s_noise)
        before, h_before = x0, h
    return x


def dpmpp_3m_sde(estimate, uncond, revise, x, sigmas, noise, *, eta=1.0, s_noise=1.0, bend=1.0,
                 start=False):  # fmt: skip
    """3M; ``bend`` 2 is the whole second difference, ``start`` a first step by 2S."""
    past: list = []
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        x0 = estimate(x, sigma)
        if end == 0:
            return revise(Moment(i, sigma, end, x, sigma), x0, x0)
        h = log(sigma / end)
        g = h * (1 + eta)
        if start and i == 0:
            middle = sqrt(sigma * end)
            u = middle / sigma * x + (1 - middle / sigma) * x0
            u0 = estimate(u, middle)
            new = revise(Moment(i, sigma, end, u, middle), u0, u0)
            base = exp(-g) * x + (1 - exp(-g)) * u0 + (new - u0)
        else:
            new = revise(Moment(i, sigma, end, x, sigma), x0, x0)
            base = exp(-g) * x + (1 - exp(-g)) * x0 + (new - x0)
        if len(past) > 1:
            (one, h1), (two, h2) = past[0], past[1]
            r0, r1 = h1 / h, h2 / h
            near, far = (x0 - one) / r0, (one - two) / r1
            second = (near - far) / (r0 + r1)
            first = near + second * r0
            phi2 = expm1(-g) / g + 1
            base = base + phi2 * first - bend * (phi2 / g - 0.5) * second
        elif past:
            base = base + (expm1(-g) / g + 1) * (x0 - past[0][0]) / (past[0][1] / h)
        x = _sde_noised(base, noise, sigma, end, eta, s_noise)
        past.insert(0, (x0, h))
    return x


def dpmpp_3m_sde_o3(*args, **options):
    """3M with the whole second difference, its first step 2S."""
    return dpmpp_3m_sde(*args, **options, bend=2.0, start=True)


def unipc(estimate, uncond, revise, x, sigmas, noise, *, order=2, variant="bh2",
          lower_order_final="at 0"):  # fmt: skip
    """Predict, evaluate, correct, as separate steps (Zhao et al. 2023, algorithms 5 to 8)."""

    def big_b(h):
        return expm1(-h) if variant == "bh2" else -h

    def residual(h, start, others, newest=None):
        """sum_k rho_k (m_k - m_0)/r_k."""
        ratios = [log(sigma_0 / s) / h for _, s in others]
        estimates = [m for m, _ in others]
        if newest is not None:
            ratios, estimates = [*ratios, 1.0], [*estimates, newest]
        if not ratios:
            return torch.zeros_like(start)
        phi, factorial, right = expm1(-h) / -h - 1, 1, []
        for k in range(1, len(ratios) + 1):
            right.append(phi * factorial / big_b(h))
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        matrix = np.array([[r ** (k - 1) for r in ratios] for k in range(1, len(ratios) + 1)])
        rho = [0.5] if len(ratios) == 1 else np.linalg.solve(matrix, np.array(right))
        return sum(
            float(p) * (m - start) / r for p, m, r in zip(rho, estimates, ratios, strict=True)
        )

    history, steps = [], len(sigmas) - 1
    lowers, last = lower_order_final == "always" or float(sigmas[-1]) == 0.0, None
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        point, x0 = x, estimate(x, sigma)
        if last is not None:  # correct the point that was predicted, keeping the teacher's term
            origin, sigma_0, used, shift = last
            h = log(sigma_0 / sigma)
            start, others = history[0][0], history[1:used]
            mean = sigma / sigma_0 * origin - expm1(-h) * start
            x = mean - big_b(h) * residual(h, start, others, newest=x0) + shift
        history.insert(0, (x0, sigma))
        new = revise(Moment(i, sigma, end, point, sigma), x0, x0)
        used = min(order, len(history), steps - i if lowers else order)
        last, sigma_0 = (x, sigma, used, new - x0), sigma
        if end == 0:
            return new
        h = log(sigma / end)
        mean = end / sigma * x - expm1(-h) * x0
        x = mean - big_b(h) * residual(h, x0, history[1:used]) + (new - x0)
    return x


REFERENCES = {
    "euler_ancestral_rf": euler_ancestral_rf,
    "dpm_2_ancestral_rf": dpm_2_ancestral_rf,
    "dpmpp_2s_ancestral_rf": dpmpp_2s_ancestral_rf,
    "heun": heun,
    "dpm_2": dpm_2,
    "dpm_2_ancestral": dpm_2_ancestral,
    "ddim_stochastic": ddim_stochastic,
    "lms": lms,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpmpp_3m_sde_o3": dpmpp_3m_sde_o3,
    "unipc": unipc,
}
