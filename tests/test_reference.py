"""The references are checked before anything is checked against them."""

import pytest
import torch

import needs
import reference
from problems import SCHEDULES, Problem, Tape, gaussian, karras, log_uniform, relative

TOLERANCE = 1e-12
SAME_NAME = {
    "sample_euler": reference.euler,
    "sample_euler_ancestral": reference.euler_ancestral,
    "sample_dpmpp_2s_ancestral": reference.dpmpp_2s_ancestral,
    "sample_dpmpp_2m": reference.dpmpp_2m,
}
VARIANTS = {
    "sample_euler": [{}, {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 1.01}],
    "sample_dpmpp_2m": [{}],
}
ANCESTRAL = [{"eta": eta} for eta in (0.0, 0.5, 1.0)] + [{"eta": 1.0, "s_noise": 0.9}]
CASES = [(name, options) for name in SAME_NAME for options in VARIANTS.get(name, ANCESTRAL)]


def unguided(x):
    """A revision that leaves every estimate as it is."""
    return reference.Revision(lambda x, sigma: x, Tape(x, 0), scale=0.0)


@needs.k_diffusion
@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_references_without_a_teacher_are_k_diffusions(name, options, sigmas):
    """λ = 0: each reference that k-diffusion has too gives what k-diffusion gives."""
    problem = Problem()
    x = problem.start(sigmas)
    torch.manual_seed(1)
    found = SAME_NAME[name](
        problem.estimate, problem.unconditional, unguided(x), x, sigmas, Tape(x, 3), **options
    )
    torch.manual_seed(1)
    noise = {} if name in VARIANTS else {"noise_sampler": Tape(x, 3)}
    expected = getattr(needs.k_sampling, name)(
        lambda x, sigma: problem.estimate(x, float(sigma[0])),
        x,
        sigmas,
        disable=True,
        **options,
        **noise,
    )
    assert relative(found, expected) < TOLERANCE


@pytest.mark.parametrize("r", [0.3, 0.5, 0.8])
def test_the_2s_formula_is_the_papers_algorithm_1(r):
    """The VE form of 2S equals the DPM-Solver++ paper's VP algorithm for any stage position."""
    problem, sigmas = Problem(), karras(6)[:-1]
    x = problem.start(sigmas)
    found = reference.dpmpp_2s_ancestral(
        problem.estimate, problem.estimate, unguided(x), x, sigmas, Tape(x, 0), eta=0.0, r=r
    )
    assert relative(found, reference.dpmpp_2s_vp(problem.estimate, x, sigmas, r)) < TOLERANCE


def test_the_2m_formula_is_the_papers_algorithm_2():
    """The VE form of 2M equals the DPM-Solver++ paper's VP algorithm."""
    problem, sigmas = Problem(), karras(6)[:-1]
    x = problem.start(sigmas)
    found = reference.dpmpp_2m(
        problem.estimate, problem.estimate, unguided(x), x, sigmas, Tape(x, 0)
    )
    assert relative(found, reference.dpmpp_2m_vp(problem.estimate, x, sigmas)) < TOLERANCE


@pytest.mark.parametrize("name", reference.REFERENCES)
def test_plus_plus_with_one_estimate_is_the_plain_solver(name):
    """CFG++ whose unconditional estimate is the estimate itself is the solver without CFG++."""
    problem, sigmas = Problem(), karras(6)
    x = problem.start(sigmas)

    def sample(solver):
        noise = (unguided(x), x, sigmas, Tape(x, 3))
        return reference.REFERENCES[solver](problem.estimate, problem.estimate, *noise)

    assert relative(sample(name), sample(name.replace("_cfg_pp", ""))) < TOLERANCE


@pytest.mark.parametrize("solve", [reference.dpmpp_2s_vp, reference.dpmpp_2m_vp])
def test_the_papers_algorithms_solve_a_gaussian(solve):
    """Algorithms 1 and 2 approach the ODE's closed-form solution, so that form is right too."""
    model, sigmas = gaussian(), log_uniform(400, 0.3, 10.0)
    x = Problem().start(sigmas)
    found = solve(lambda x, sigma: model(x, x.new_full((len(x),), sigma)), x, sigmas)
    assert relative(found, model.solution(x, 10.0, 0.3)) < 1e-4
