"""Literal references, with a teacher, of the solvers beyond Distillation++'s own.

Each one writes the base solver's update with unrevised estimates and adds (x_new - x0) of the
step's last estimate, coefficient 1. Sources: k-diffusion's and the papers' formulas, in VE.
"""

from __future__ import annotations

from functools import partial
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


def _over_slopes(x, x0, new, slopes, weights):
    """x + Σ c_j ε_j, and the teacher's term."""
    return x + sum(c * slope for c, slope in zip(weights, slopes)) + (new - x0)


def _multistep(weigh, most, cfg_pp=False):
    """A rule over slopes: ``weigh(levels, end, **options)`` gives their weights, newest first."""

    def solve(estimate, uncond, revise, x, sigmas, noise, **options):
        count = options.pop("max_order", most)
        slopes, levels = [], []
        for i, (sigma, end) in enumerate(pairs(sigmas)):
            x0 = estimate(x, sigma)
            direction = uncond(x, sigma) if cfg_pp else x0
            new = revise(Moment(i, sigma, end, x, sigma), x0, direction)
            slopes, levels = [(x - direction) / sigma, *slopes], [sigma, *levels]
            if end == 0:
                return new
            used = levels[:count]
            weights = weigh(used, end, **options) if len(used) > 1 else [end - sigma]
            x = _over_slopes(x, direction, new, slopes, weights)
        return x

    return solve


def _ipndm(levels, end):
    """Adams-Bashforth's table (Hairer, Nørsett and Wanner, III.1)."""
    table = {2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9]}[len(levels)]
    return [(end - levels[0]) * weight / sum(table) for weight in table]


def _ipndm_v(levels, end):
    """The exact weights of the first two; the third's factor as in the code of the authors.

    The fourth's by the divided difference of all four slopes.
    """

    def divided(nodes):
        """The weights of the slopes in their divided difference."""
        return np.array([1 / np.prod([a - b for b in nodes if b != a]) for a in nodes])

    h, u = end - levels[0], levels[0] - levels[1]
    slope = h * h / 2 / u  # of the first difference: the integral of (s - σ) over the step
    weights = [h + slope, -slope]
    if len(levels) > 2:
        v = levels[1] - levels[2]
        factor = h / 2 * (1 - h / (3 * (h + u)) * (h * (h + u)) / (u * (u + v)))
        ratio = u / v
        weights = [weights[0] + factor, weights[1] - factor - ratio * factor, ratio * factor]
    if len(levels) > 3:
        third = (1 - h / (3 * (h + u))) / 2
        third -= (1 - h / (2 * (h + u))) * h / (6 * (h + u + v))
        third *= h * h * (h + u) * (h + u + v)
        weights = list(np.array([*weights, 0.0]) + third * divided(levels))
    return weights


def _deis(levels, end):
    """Integrals by quadrature, over the noise level, of polynomials in the time."""
    low, high, first = 0.002, 80.0, 1e-3
    slope = 2 * (log(high**2 + 1) - log(low**2 + 1) / first) / (1 - first)
    least = log(high**2 + 1) - slope / 2

    def time(sigma):
        return (sqrt(least**2 + 2 * slope * log(1 + sigma**2)) - least) / slope

    def basis(sigma, j):
        nodes = [time(level) for level in levels]
        return np.prod([(time(sigma) - n) / (nodes[j] - n) for k, n in enumerate(nodes) if k != j])

    return [
        quad(lambda t, j=j: basis(exp(t), j) * exp(t), log(levels[0]), log(end), epsabs=1e-14,
             epsrel=1e-13)[0]
        for j in range(len(levels))
    ]  # fmt: skip


def _gradient(levels, end, ge_gamma=2.0):
    """The slope, carried on by its last change."""
    step = end - levels[0]
    return [step + (ge_gamma - 1) * step, -(ge_gamma - 1) * step]


def _res(ancestral=False, cfg_pp=False):
    """RES 2M in φ functions; the lengths of steps to sigma_down."""

    def solve(estimate, uncond, revise, x, sigmas, noise, *, eta=1.0, s_noise=1.0):
        before = None
        for i, (sigma, end) in enumerate(pairs(sigmas)):
            down, up = _ancestral(sigma, end, eta) if ancestral else (end, 0.0)
            x0 = estimate(x, sigma)
            direction = uncond(x, sigma) if cfg_pp else x0
            new = revise(Moment(i, sigma, end, x, sigma), x0, direction)
            if before is None or down == 0:
                moved = new + (x - direction) / sigma * down
            else:
                older, last = before
                h = log(sigma / down)
                phi1 = expm1(-h) / -h
                phi2 = (phi1 - 1) / -h
                c2 = -last / h
                mean = h * (phi1 - phi2 / c2) * direction + h * phi2 / c2 * older
                if cfg_pp:
                    moved = exp(-h) * (x + new - direction) + mean
                else:
                    moved = exp(-h) * x + mean + (new - x0)
            before = (direction, log(sigma / down) if down else inf)
            x = _noised(moved, noise, sigma, end, s_noise * up)
        return x

    return solve


def dpmpp_2m_cfg_pp_mixed(estimate, uncond, revise, x, sigmas, noise):
    """2M with CFG++ whose difference is of the guided and the last unconditional estimate."""
    before = None
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        free = uncond(x, sigma)
        new = revise(Moment(i, sigma, end, x, sigma), estimate(x, sigma), free)
        e, mixed = end / sigma, 0.0
        if before is not None and end > 0:
            older, h_before = before
            mixed = (1 - e) / (2 * h_before / log(sigma / end)) * (new - older)
        x = new - e * free + mixed + e * x
        before = (free, log(sigma / end) if end else inf)
    return x


def er_sde(estimate, uncond, revise, x, sigmas, noise, *, s_noise=1.0, max_stage=3):
    """ER-SDE-Solver-1 to -3 in the noise level, the integrals as sums of 200 points."""

    def phi(level):
        return level * (exp(level**0.3) + 10)

    past = []  # (level, estimate, its difference), the newest first
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        x0 = estimate(x, sigma)
        new = revise(Moment(i, sigma, end, x, sigma), x0, x0)
        if end == 0:
            return new
        r, change, slope = phi(end) / phi(sigma), end - sigma, None
        moved = r * x + (1 - r) * x0 + (new - x0)
        grid = end + (sigma - end) / 200 * np.arange(200)
        if past and max_stage > 1:
            inverse = np.array([1 / phi(level) for level in grid]) * (sigma - end) / 200
            slope = (x0 - past[0][1]) / (sigma - past[0][0])
            moved = moved + (change + inverse.sum() * phi(end)) * slope
            if past[0][2] is not None and max_stage > 2:
                bend = (slope - past[0][2]) / ((sigma - past[1][0]) / 2)
                second = (inverse * (grid - sigma)).sum() * phi(end)
                moved = moved + (change**2 / 2 + second) * bend
        up = sqrt(max(0.0, end**2 - (r * sigma) ** 2))
        x = moved + s_noise * up * noise(sigma, end) if s_noise else moved
        past.insert(0, (sigma, x0, slope))
    return x


def heunpp2(estimate, uncond, revise, x, sigmas, noise, *, s_churn=0.0, s_tmin=0.0, s_tmax=inf,
            s_noise=1.0):  # fmt: skip
    """Heun++: slopes at this, the next and the next but one level, weighed by the levels."""
    levels = [float(sigma) for sigma in sigmas.double()]
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        x, hat = _churned(x, i, sigma, sigmas, s_churn, s_tmin, s_tmax, s_noise)
        x0 = estimate(x, hat)
        one = (x - x0) / hat
        if end == levels[-1]:
            x = x + one * (end - hat) + (revise(Moment(i, sigma, end, x, hat), x0, x0) - x0)
            continue
        u = x + one * (end - hat)
        u0 = estimate(u, end)
        two = (u - u0) / end
        after = levels[i + 2]
        if after == levels[-1]:
            new = revise(Moment(i, sigma, end, u, end), u0, u0) - u0
            w2 = end / (2 * levels[0])
            slope = (1 - w2) * one + w2 * two
        else:
            v = u + two * (after - end)
            v0 = estimate(v, after)
            new = revise(Moment(i, sigma, end, v, after), v0, v0) - v0
            w2, w3 = end / (3 * levels[0]), after / (3 * levels[0])
            slope = (1 - w2 - w3) * one + w2 * two + w3 * (v - v0) / after
        x = x + slope * (end - hat) + new
    return x


def res_singlestep(estimate, uncond, revise, x, sigmas, noise, *, r=0.5):
    """The exponential Runge-Kutta method of order 2 by its tableau: a_21 = c_2 φ_1(-c_2 h)."""

    def phi(j, z):
        """(e^z - 1)/z, and the one after it."""
        return expm1(z) / z if j == 1 else (phi(1, z) - 1) / z

    for i, (sigma, end) in enumerate(pairs(sigmas)):
        x0 = estimate(x, sigma)
        if end == 0:
            return revise(Moment(i, sigma, end, x, sigma), x0, x0)
        h = log(sigma / end)
        u = exp(-r * h) * x + h * r * phi(1, -r * h) * x0
        middle = sigma * exp(-r * h)
        u0 = estimate(u, middle)
        b2 = phi(2, -h) / r
        b1 = phi(1, -h) - b2
        new = revise(Moment(i, sigma, end, u, middle), u0, u0)
        x = exp(-h) * x + h * (b1 * x0 + b2 * u0) + (new - u0)
    return x


def _bend(g):
    """∫ over a step of length g of e^{s - g} s/g ds: the weight of a slope's value at its end."""
    return 1 + expm1(-g) / g


class _Path:
    """The noise of one step of the SDE, in units of the level: what came in decays from then on."""

    def __init__(self, noise, sigma, eta, s_noise):
        self.noise, self.level, self.eta, self.s_noise = noise, sigma, eta, s_noise
        self.sum = 0.0

    def to(self, level):
        """The noise in the state at a lower level; independent of the sum for the way between."""
        if not self.eta * self.s_noise:
            return 0.0
        passed = max(0.0, log(self.level / level))
        fresh = sqrt(-expm1(-2 * self.eta * passed)) * self.noise(self.level, level)
        self.sum = exp(-self.eta * passed) * self.sum + fresh
        self.level = level
        return self.s_noise * level * self.sum


def seeds_2(estimate, uncond, revise, x, sigmas, noise, *, eta=1.0, s_noise=1.0, r=0.5,
            solver_type="phi_1"):  # fmt: skip
    """SEEDS-2: both points from x, each with the noise of the path so far."""
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        x0 = estimate(x, sigma)
        if end == 0:
            return revise(Moment(i, sigma, end, x, sigma), x0, x0)
        path, h = _Path(noise, sigma, eta, s_noise), log(sigma / end)
        g, middle = h * (1 + eta), sigma * exp(-r * h)
        u = exp(-r * g) * x + (1 - exp(-r * g)) * x0 + path.to(middle)
        u0 = estimate(u, middle)
        new = revise(Moment(i, sigma, end, u, middle), u0, u0)
        weight = (1 - exp(-g)) / 2 if solver_type == "phi_1" else _bend(g)
        x = exp(-g) * x + (1 - exp(-g)) * x0 + weight / r * (u0 - x0) + path.to(end) + (new - u0)
    return x


def seeds_3(estimate, uncond, revise, x, sigmas, noise, *, eta=1.0, s_noise=1.0, r_1=1 / 3,
            r_2=2 / 3):  # fmt: skip
    """SEEDS-3, written as seeds_2."""
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        x0 = estimate(x, sigma)
        if end == 0:
            return revise(Moment(i, sigma, end, x, sigma), x0, x0)
        path, h = _Path(noise, sigma, eta, s_noise), log(sigma / end)
        g, one, two = h * (1 + eta), sigma * exp(-r_1 * h), sigma * exp(-r_2 * h)
        u = exp(-r_1 * g) * x + (1 - exp(-r_1 * g)) * x0 + path.to(one)
        slope = (estimate(u, one) - x0) / r_1
        v = exp(-r_2 * g) * x + (1 - exp(-r_2 * g)) * x0
        v = v + r_2 * _bend(r_2 * g) * slope + path.to(two)
        v0 = estimate(v, two)
        new = revise(Moment(i, sigma, end, v, two), v0, v0)
        x = exp(-g) * x + (1 - exp(-g)) * x0 + _bend(g) * (v0 - x0) / r_2
        x = x + path.to(end) + (new - v0)
    return x


def dpmpp_2s_ancestral_cfg_pp_mixed(estimate, uncond, revise, x, sigmas, noise, *, eta=1.0,
                                    s_noise=1.0):  # fmt: skip
    """2S to sigma_down from x + x0 - x0_free, the latter the newest there is."""
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        down, up = _ancestral(sigma, end, eta)
        x0, free = estimate(x, sigma), uncond(x, sigma)
        if down == 0:
            x = revise(Moment(i, sigma, end, x, sigma), x0, free)
        else:
            e, middle = down / sigma, sqrt(sigma * down)
            u = sqrt(e) * (x + x0 - free) + (1 - sqrt(e)) * x0
            u0, free_u = estimate(u, middle), uncond(u, middle)
            new = revise(Moment(i, sigma, end, u, middle), u0, free_u)
            x = e * (x + x0 - free_u) + (1 - e) * new
        x = _noised(x, noise, sigma, end, s_noise * up)
    return x


def cfgpp_ud10_ab(estimate, uncond, revise, x, sigmas, noise):
    """Euler steps of CFG++, blended with Adams-Bashforth's of two of them; the end by a line."""
    older = None
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        x0, free = estimate(x, sigma), uncond(x, sigma)
        new = revise(Moment(i, sigma, end, x, sigma), x0, free)
        slope = carried = (x - free) / sigma
        if older is None:
            step, x = x0 + end * slope - x, new + end * slope
        else:
            step_before, x0_before, slope_before, sigma_before = older
            if end == 0:
                return new + (new - x0_before) * sigma / (sigma_before - sigma)
            last, length = sigma - sigma_before, end - sigma
            carried = slope + 0.1 * (slope - slope_before) / last * length
            step = x0 + end * carried - x
            rate, rate_before = step / length, step_before / last
            bashforth = length * rate + length**2 / 2 * (rate - rate_before) / last
            shared = 0.75 + 0.25 * (1 + length / last / 2)  # of x0 in what is added
            x = x + 0.75 * step + 0.25 * bashforth + shared * (new - x0)
        older = step, x0, slope, sigma
    return x


def sa_solver(estimate, uncond, revise, x, sigmas, noise, *, eta=1.0, s_noise=1.0, s_tmin=0.0,
              s_tmax=inf, predictor_order=3, corrector_order=4, again=False):  # fmt: skip
    """SA-Solver with its corrected states kept beside the predicted ones; integrals by parts.

    ``again``: evaluated at the corrected states, too (PECE).
    """

    def adams(start, end, nodes, rate):
        """∫ rate e^{rate (u - end)} times each Lagrange polynomial, from start to end."""
        moments = []
        for p in range(len(nodes)):
            # ∫ rate e^{rate v} v^p over v from start - end to 0
            edge = -((start - end) ** p) * exp(rate * (start - end)) + (1.0 if p == 0 else 0.0)
            moments.append(edge - (p / rate * moments[-1] if p else 0.0))
        matrix = np.vander([node - end for node in nodes], increasing=True).T
        return [float(b) for b in np.linalg.solve(matrix, moments)]

    def strength(level):
        return eta if s_tmin * (1 - 1e-6) <= level <= s_tmax * (1 + 1e-6) else 0.0

    levels = [float(sigma) for sigma in sigmas.double()]
    lowers, steps, history, last = levels[-1] == 0, len(levels) - 1, [], None
    for i, (sigma, end) in enumerate(pairs(sigmas)):
        point, x0 = x, estimate(x, sigma)
        history = [(-log(sigma), x0), *history]
        new = None if again else revise(Moment(i, sigma, end, point, sigma), x0, x0)
        if end == 0 and not again:
            return new
        if last is not None:
            origin, begin, drawn = last
            order = min(corrector_order, len(history), steps - i if lowers else corrector_order)
            nodes, rate = history[:order], 1 + strength(sigma) ** 2
            weights = adams(begin, nodes[0][0], [node for node, _ in nodes], rate)
            decay = exp(-rate * (nodes[0][0] - begin))
            x = decay * origin + sum(b * d for b, (_, d) in zip(weights, nodes)) + drawn
        if again:
            x0 = history[0][1] if last is None else estimate(x, sigma)
            history[0] = history[0][0], x0
            new = revise(Moment(i, sigma, end, x, sigma), x0, x0)
            if end == 0:
                return new
        order = min(predictor_order, len(history), steps - 1 - i if lowers else predictor_order)
        nodes, rate = history[:order], 1 + strength(end) ** 2
        h = log(sigma / end)
        weights = adams(nodes[0][0], -log(end), [node for node, _ in nodes], rate)
        drawn = new - x0
        if (rate - 1) * s_noise:
            drawn = drawn + s_noise * end * sqrt(-expm1(-2 * (rate - 1) * h)) * noise(sigma, end)
        last = (x, nodes[0][0], drawn)
        x = exp(-rate * h) * x + sum(b * d for b, (_, d) in zip(weights, nodes)) + drawn
    return x


REFERENCES = {
    "ipndm": _multistep(_ipndm, 4),
    "ipndm_v": _multistep(_ipndm_v, 3),
    "deis": _multistep(_deis, 3),
    "gradient_estimation": _multistep(_gradient, 2),
    "gradient_estimation_cfg_pp": _multistep(_gradient, 2, cfg_pp=True),
    "res_multistep": _res(),
    "res_multistep_ancestral": _res(ancestral=True),
    "res_multistep_cfg_pp": _res(cfg_pp=True),
    "res_multistep_ancestral_cfg_pp": _res(ancestral=True, cfg_pp=True),
    "dpmpp_2m_cfg_pp_mixed": dpmpp_2m_cfg_pp_mixed,
    "er_sde": er_sde,
    "heunpp2": heunpp2,
    "res_singlestep": res_singlestep,
    "seeds_2": seeds_2,
    "seeds_3": seeds_3,
    "dpmpp_2s_ancestral_cfg_pp_mixed": dpmpp_2s_ancestral_cfg_pp_mixed,
    "cfgpp_ud10_ab": cfgpp_ud10_ab,
    "sa_solver": sa_solver,
    "sa_solver_pece": partial(sa_solver, again=True),
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
