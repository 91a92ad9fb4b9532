"""Levels that rise: from an image up to the noise that leads to it (inversion, "unsampling")."""

import math

import pytest
import torch

import golden
import kdpp
import problems
from problems import Problem, gaussian, karras, log_uniform, mixture, relative, run, seeded
from test_order import FACTORS, HIGH, LOW, fitted_order, rms

SOLVERS = [s for s in problems.on_schedules(kdpp.SOLVERS) if s.inverts]
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
UP = karras(7)[:-1].flip(0)


def test_which_solvers_go_up():
    """Those without noise; nothing else of them is asked."""
    names = {s.name for s in SOLVERS}
    assert names >= {"euler", "heun", "dpm_2", "dpmpp_2m", "lms", "unipc", "res_multistep", "deis"}
    assert not names & {"euler_ancestral", "lcm", "dpm_fast", "dpmpp_sde", "sa_solver"}


@pytest.mark.parametrize(
    ("solver", "variable"),
    [
        pytest.param(solver, variable, id=f"{solver.name}-{variable}")
        for solver in SOLVERS
        for variable in ("sigma", "tau")
        if variable == "sigma" or "variable" in solver.options
    ],
)
def test_the_order_on_the_way_up(solver, variable):
    """Against a Gaussian's closed form, at the least the order on the way down."""
    model = gaussian(1)
    cond = Problem().extra_args["cond"]
    moved = problems.Gaussian(model.mean + cond[:, :, None, None], model.variance)
    x = seeded(2, *problems.SHAPE, seed=31)
    exact = moved.solution(x, LOW, HIGH)
    problem = Problem(student=model, cond_scale=1.0)
    extra = {**problem.extra_args, "uncond": cond}
    errors, counts = [], [round(96 * factor) for factor in FACTORS]
    for steps in counts:
        sigmas = log_uniform(steps, LOW, HIGH).flip(0)
        guided = problem.guided(teacher_scale=0.0)
        options = {"variable": variable}
        errors.append(rms(run(solver, guided, x, sigmas, extra_args=extra, **options) - exact))
    assert fitted_order(errors, counts) >= solver.order - 0.35


def test_2m_on_the_way_up():
    """Its formula, with lengths that are negative."""
    problem, before = Problem(), None
    x = image = seeded(2, *problems.SHAPE, seed=4)
    model, extra = problem.guided(teacher_scale=0.0), problem.extra_args
    found = run(kdpp.SOLVERS["dpmpp_2m"], model, image, UP, extra_args=extra)
    for sigma, end in problems.pairs(UP):
        x0 = mean = problem.estimate(x, sigma)
        if before is not None:
            r = math.log(before[1] / sigma) / math.log(sigma / end)
            mean = x0 + (x0 - before[0]) / (2 * r)
        x, before = end / sigma * x + (1 - end / sigma) * mean, (x0, sigma)
    assert relative(found, x) < 1e-12


@over_solvers
def test_up_and_down_again(solver):
    """The image comes back but for the solver's error, with no teacher asked on the way up."""
    teacher = problems.Counted(mixture(1))
    problem = Problem(student=gaussian(1), teacher=teacher, cond_scale=1.0)
    cond, image = problem.extra_args["cond"], seeded(2, *problems.SHAPE, seed=4)
    extra, up = {"cond": cond, "uncond": cond}, log_uniform(300, 0.2, 5.0).flip(0)
    asking = problem.guided(teacher_scale=0.5, teacher_steps=99)
    noise = run(solver, asking, image, up, extra_args=extra)
    assert not teacher.calls
    back = run(solver, problem.guided(teacher_scale=0.0), noise, up.flip(0), extra_args=extra)
    assert relative(back, image) < 0.03


@over_solvers
def test_a_flow_model_goes_up_to_below_1(solver):
    """As its σ do; all noise, τ = 1, is refused."""
    flow, ve = (
        Problem(student=golden.Flow(mixture(0)), teacher=golden.Flow(mixture(1))),
        Problem(),
    )
    taus = torch.tensor([0.05, 0.2, 0.2, 0.5, 0.8, 0.95], dtype=torch.float64)
    z, extra = seeded(2, *problems.SHAPE, seed=4), ve.extra_args
    found = run(solver, flow.guided(teacher_scale=0.0), z, taus, extra_args=extra)
    x, sigmas = z / (1 - taus[0]), taus / (1 - taus)
    expected = run(solver, ve.guided(teacher_scale=0.0), x, sigmas, extra_args=extra)
    assert relative(found, (1 - taus[-1]) * expected) < 1e-10
    with pytest.raises(ValueError, match="rises to τ = 1"):
        run(solver, flow.guided(), z, torch.tensor([0.1, 0.5, 1.0]), extra_args=extra)


@pytest.mark.parametrize("sigmas", [[0.0, 1.0, 5.0], [0.1, 2.0, 1.0, 5.0], [5.0, 1.0, 2.0]])
def test_other_levels_are_refused(sigmas):
    """From 0, where x has no noise to scale; and levels that do both."""
    problem = Problem()
    x = seeded(2, *problems.SHAPE, seed=4)
    with pytest.raises(ValueError, match=r"increase, or, .* never fall"):
        run(kdpp.SOLVERS["euler"], problem.guided(), x, torch.tensor(sigmas))
    with pytest.raises(ValueError, match=r"must not increase$"):
        run(kdpp.SOLVERS["euler_ancestral"], problem.guided(), x, UP)
