"""Solvers with noise keep the marginal: for Gaussian data, variance c + sigma^2 at every level.

Two ways. The exact one runs a batch of unit impulses through a linear denoiser, one per draw, and
adds their squares: no sampling error, only the solver's own, which shrinks with the steps. The
statistical one counts: the variance of N Gaussian numbers has a relative standard error of
sqrt(2 / N), and the bound is 4.5 of them (two-sided alpha 7e-6 per level) plus the solver's error.
"""

import itertools
import math

import pytest
import torch

import kdpp
import problems
from problems import Gaussian, accepts, log_uniform, run

ANCESTRAL = [
    s for s in problems.on_schedules(kdpp.SOLVERS) if accepts(s, "eta") and s.order is not None
]
CHURNING_EULER = [
    s for s in problems.on_schedules(kdpp.SOLVERS) if accepts(s, "s_churn") and s.order == 1
]
MULTISTEP_RANDOM = [
    s for s in kdpp.SOLVERS.values() if accepts(s, "noise_sampler") and not accepts(s, "s_noise")
]
VARIANCE, HIGH, LOW = 0.5, 20.0, 0.05
NUMBERS, SAMPLED_STEPS = 100_000, 600
SAMPLING_ERROR = 4.5 * math.sqrt(2 / NUMBERS)
# First-order solvers are off by about 6.1 / steps at these levels (measured by the exact way).
SOLVER_ERROR = {steps: 6.5 / steps for steps in (250, SAMPLED_STEPS, 1000)}


def by_name(solver):
    """A readable test id."""
    return solver.name


def marginal(sigma):
    """The exact variance at a level."""
    return VARIANCE + sigma**2


def linear(dtype=torch.float64):
    """The denoiser of zero-mean Gaussian data: x times a number."""
    return Gaussian(torch.zeros((), dtype=dtype), torch.tensor(VARIANCE, dtype=dtype))


def unguided(model):
    """The wrapper with the teacher switched off."""
    return kdpp.TeacherGuidedDenoiser(model, model, teacher_scale=0.0, teacher_cfg_scale=1.0)


def no_condition(x):
    """Conditions that change nothing, for CFG++'s sake."""
    zero = x.new_zeros(x.shape[0], 1)
    return {"cond": zero, "uncond": zero}


class Impulses:
    """A noise sampler whose n-th call gives a 1 to sample n + 1 of the batch only."""

    def __init__(self, x):
        self.x, self.calls = x, 0

    def __call__(self, sigma, sigma_next):
        self.calls += 1
        noise = torch.zeros_like(self.x)
        noise[self.calls] = 1.0
        return noise


def exact_variances(solver, steps, **options):
    """The variance of x at every level, and the levels, from impulse responses."""
    sigmas = log_uniform(steps, LOW, HIGH)
    # One sample for every draw: a solver may draw at each of its evaluations.
    x = torch.zeros(steps * solver.evaluations + 1, 1, 1, 1, dtype=torch.float64)
    x[0] = math.sqrt(marginal(HIGH))
    states = []
    last = run(
        solver,
        unguided(linear()),
        x,
        sigmas,
        extra_args=no_condition(x),
        callback=lambda info: states.append(info["x"].clone()),
        noise_sampler=Impulses(x),
        **options,
    )
    variances = torch.stack([*states, last]).square().flatten(1).sum(1)
    return variances, sigmas


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("solver", ANCESTRAL, ids=by_name)
def test_the_exact_variance_approaches_the_marginal(solver, eta):
    """Without sampling error: the largest deviation over all levels falls with the steps."""
    deviations = []
    for steps in (250, 1000):
        variances, sigmas = exact_variances(solver, steps, eta=eta)
        deviations.append(float((variances / marginal(sigmas) - 1).abs().max()))
    assert deviations[1] < SOLVER_ERROR[1000]
    assert deviations[1] < deviations[0] / 3


@pytest.mark.parametrize("solver", ANCESTRAL, ids=by_name)
def test_a_wrong_noise_scale_shows_in_the_exact_variance(solver):
    """s_noise = 1.005 does not pass the bound above."""
    variances, sigmas = exact_variances(solver, 1000, eta=1.0, s_noise=1.005)
    assert float((variances / marginal(sigmas) - 1).abs().max()) > 1.3 * SOLVER_ERROR[1000]


def sampled_ratios(solver, model, steps=SAMPLED_STEPS, **options):
    """Sample variance over the marginal's, at every level of a run."""
    torch.manual_seed(41)
    sigmas = log_uniform(steps, LOW, HIGH)
    x = math.sqrt(marginal(HIGH)) * torch.randn(2, 1, 1, NUMBERS // 2)
    ratios = []
    if solver.noise == "brownian":  # the tree takes minutes; its draws are k-diffusion's affair
        options["noise_sampler"] = lambda sigma, sigma_next: torch.randn_like(x)

    def measure(x, sigma):
        ratios.append(float(x.double().var()) / marginal(float(sigma)))

    last = run(
        solver,
        unguided(model),
        x,
        sigmas,
        extra_args=no_condition(x),
        callback=lambda info: info["i"] % 20 or measure(info["x"], info["sigma_hat"]),
        **options,
    )
    measure(last, sigmas[-1])
    return torch.tensor(ratios)


@pytest.mark.parametrize("solver", ANCESTRAL, ids=by_name)
def test_the_sampled_variance_is_the_marginals(solver):
    """With the solver's own noise: every level within the statistical bound."""
    ratios = sampled_ratios(solver, linear(torch.float32), eta=1.0)
    assert float((ratios - 1).abs().max()) < SAMPLING_ERROR + SOLVER_ERROR[SAMPLED_STEPS]


@pytest.mark.parametrize("solver", ANCESTRAL, ids=by_name)
def test_a_wrong_noise_scale_is_detected(solver):
    """s_noise = 1.02 fails the bound: the test above can tell."""
    ratios = sampled_ratios(solver, linear(torch.float32), eta=1.0, s_noise=1.02)
    assert float((ratios - 1).abs().max()) > SAMPLING_ERROR + SOLVER_ERROR[SAMPLED_STEPS]


@pytest.mark.parametrize("solver", CHURNING_EULER, ids=by_name)
def test_churn_adds_the_variance_that_its_step_takes_away(solver):
    """At every level the sampled variance is what Karras et al.'s Algorithm 2 gives this data."""
    churn, steps = 8.0, 200
    ratios = sampled_ratios(solver, linear(torch.float32), steps, s_churn=churn)
    levels = log_uniform(steps, LOW, HIGH).tolist()
    variance, expected = marginal(HIGH), []
    for sigma, sigma_next in itertools.pairwise(levels):
        hat = sigma * (1 + churn / steps)
        variance += hat**2 - sigma**2
        expected.append(variance / marginal(hat))
        kept = VARIANCE / marginal(hat)
        # Of second order, a step is as good as exact here; Euler's own error is counted in.
        euler = (kept + (1 - kept) * sigma_next / hat) ** 2
        variance *= euler if solver.order == 1 else marginal(sigma_next) / marginal(hat)
    expected = torch.tensor([*expected, variance / marginal(LOW)])[::20]
    assert float((ratios / expected - 1).abs().max()) < SAMPLING_ERROR


class Consistency(torch.nn.Module):
    """The exact consistency function of the Gaussian: x to the end of its trajectory."""

    def forward(self, x, sigma, cond=None):
        """x * sqrt(c / (c + s^2))."""
        return x * (VARIANCE / marginal(sigma)).sqrt().reshape(-1, 1, 1, 1).to(x.dtype)


@pytest.mark.parametrize("solver", MULTISTEP_RANDOM, ids=by_name)
def test_multistep_random_keeps_the_marginal_of_a_perfect_student(solver):
    """A consistency function answers with true samples: variance c + sigma^2 in any step count."""
    for steps in (1, 4, 40):
        ratios = sampled_ratios(solver, Consistency(), steps=steps)
        assert float((ratios - 1).abs().max()) < SAMPLING_ERROR


def spread_at_every_level(solver, steps, **options):
    """The largest relative error of the variance over the levels, without sampling error."""
    variances, levels = exact_variances(solver, steps, **options)
    return max(abs(v / marginal(s) - 1) for v, s in zip(variances, levels))


def test_stochastic_ddim_approaches_the_marginal():
    """Two levels down, one up: the exact variance comes to c + sigma^2 as the steps grow."""
    solver = kdpp.SOLVERS["ddim_stochastic"]
    coarse, fine = (spread_at_every_level(solver, steps) for steps in (200, 800))
    assert fine < coarse / 3
    assert fine < 0.02
    assert spread_at_every_level(solver, 800, s_noise=1.02) > 0.03  # the noise alone is 4 % more
