"""Measured convergence orders, fitted by regression against exact or very fine solutions."""

import math

import numpy as np
import pytest
import torch

import kdpp
import problems
from problems import (
    Gaussian,
    Mixture,
    Problem,
    gaussian,
    log_uniform,
    mixture,
    run,
    seeded,
)

WITH_ORDER = [s for s in problems.on_schedules(kdpp.SOLVERS) if s.order is not None]
HIGH, LOW = 10.0, 0.2
FACTORS = (1, 4 / 3, 2, 8 / 3)  # of the number of steps from which the order is seen
TOLERANCE = 0.15


def solve(solver, student, steps, x):
    """A deterministic run without guidance whose direction is the estimate (cond = uncond)."""
    problem = Problem(student=student, cond_scale=1.0)
    extra = problem.extra_args
    extra["uncond"] = extra["cond"]
    model = problem.guided(teacher_scale=0.0)
    return run(solver, model, x, log_uniform(steps, LOW, HIGH), extra_args=extra, eta=0.0)


def start():
    """Where every run begins."""
    return HIGH * seeded(2, 3, 2, 2, seed=31)


def fitted_order(errors, steps):
    """Minus the slope of log(error) over log(steps)."""
    slope, _ = np.polyfit(np.log(steps), np.log(errors), 1)
    return -slope


def rms(difference):
    """Root mean square."""
    return math.sqrt(float(difference.square().mean()))


def conditional_gaussian(seed):
    """A Gaussian denoiser and the closed-form solution under the problem's condition."""
    model, cond = gaussian(seed), Problem().extra_args["cond"]
    moved = Gaussian(model.mean + cond[:, :, None, None], model.variance)
    return model, moved.solution(start(), HIGH, LOW)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("solver", WITH_ORDER, ids=lambda s: s.name)
def test_order_on_a_gaussian(solver, seed):
    """Against the ODE's closed-form solution the fitted order is the one that is stated."""
    model, exact = conditional_gaussian(seed)
    counts = [round(solver.order_from * factor) for factor in FACTORS]
    errors = [rms(solve(solver, model, steps, start()) - exact) for steps in counts]
    assert fitted_order(errors, counts) == pytest.approx(solver.order, abs=TOLERANCE)


@pytest.fixture(scope="module")
def fine():
    """The mixture and its solution by 4,000 classical Runge-Kutta steps, without kdpp."""
    model, cond = smooth_mixture(), Problem().extra_args["cond"]
    return model, runge_kutta(lambda x, s: model(x, x.new_full((2,), s), cond=cond), start(), 4000)


def smooth_mixture() -> Mixture:
    """A mixture wide enough for the asymptotic regime to begin at the steps fitted."""
    model = mixture(1)
    return Mixture(0.5 * model.means, model.log_weights.exp(), 0.6)


def runge_kutta(estimate, x, steps):
    """dx/dt = estimate - x in t = -log(sigma), fourth order."""
    begin, end = -math.log(HIGH), -math.log(LOW)
    h = (end - begin) / steps

    def slope(t, x):
        return estimate(x, math.exp(-t)) - x

    for i in range(steps):
        t = begin + i * h
        k1 = slope(t, x)
        k2 = slope(t + h / 2, x + h / 2 * k1)
        k3 = slope(t + h / 2, x + h / 2 * k2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(t + h, x + h * k3))
    return x


@pytest.mark.parametrize("solver", WITH_ORDER, ids=lambda s: s.name)
def test_order_on_a_mixture(solver, fine):
    """The same on a denoiser that is not linear, against a fine Runge-Kutta solution."""
    model, exact = fine
    counts = [round(solver.order_from * factor) for factor in FACTORS]
    errors = [rms(solve(solver, model, steps, start()) - exact) for steps in counts]
    assert fitted_order(errors, counts) == pytest.approx(solver.order, abs=TOLERANCE)


@pytest.mark.parametrize("solver", WITH_ORDER, ids=lambda s: s.name)
def test_guidance_by_the_same_gaussian_does_not_break_convergence(solver):
    """A guided first step by a perfect teacher costs one step's error, which vanishes."""
    model, exact = conditional_gaussian(0)
    problem = Problem(student=model, teacher=model, cond_scale=1.0, teacher_cfg_scale=1.0)
    extra = problem.extra_args
    extra["uncond"] = extra["cond"]
    errors = []
    for steps in (32, 256):
        sigmas = log_uniform(steps, LOW, HIGH)
        guided = problem.guided(teacher_scale=0.1, renoise_eta=0.0)
        found = run(solver, guided, start(), sigmas, extra_args=extra, eta=0.0)
        errors.append(rms(found - exact))
    assert errors[1] < errors[0] / 4
    assert torch.isfinite(torch.tensor(errors)).all()
