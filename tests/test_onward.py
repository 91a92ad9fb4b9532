"""Stages that go on from their own point: what noise comes into a step, and where it is asked."""

import itertools
import math

import pytest
import torch

import kdpp
import references
from kdpp.lab import looks
from kdpp.plan import Row, Stage, Step, euler_row, in_variable
from kdpp.solver import solver
from problems import Problem, Tape, karras, relative, run, seeded

SEEDS = {"seeds_2": {"r": 0.3}, "seeds_3": {"r_1": 0.2, "r_2": 0.9}}
over_seeds = pytest.mark.parametrize(("name", "options"), SEEDS.items(), ids=SEEDS)


def nothing(x, sigma, cond=None):
    """A student that says 0, so that a run is x's decay and the noise."""
    return torch.zeros_like(x)


class Impulses:
    """A noise sampler whose n-th call gives a 1 to sample n of the batch; and what it heard."""

    def __init__(self, x):
        self.x, self.heard = x, []

    def __call__(self, sigma, sigma_next):
        noise = torch.zeros_like(self.x)
        noise[len(self.heard)] = 1.0
        self.heard.append((float(sigma), float(sigma_next)))
        return noise


@pytest.mark.parametrize("eta", [0.4, 1.0])
@over_seeds
def test_the_noise_of_a_step_is_the_sdes(name, options, eta):
    """Whatever points it has: variance σ'² (1 - e^{-2ηh}), from draws that do not overlap."""
    sigmas = torch.tensor([9.0, 2.0, 0.5], dtype=torch.float64)
    x = torch.zeros(6, 1, 1, dtype=torch.float64)
    noise = Impulses(x)
    model = kdpp.TeacherGuidedDenoiser(nothing, nothing, teacher_steps=0)
    last = run(kdpp.SOLVERS[name], model, x, sigmas, noise_sampler=noise, eta=eta, **options)
    variance = 0.0
    for sigma, end in ((9.0, 2.0), (2.0, 0.5)):
        decay = (end / sigma) ** (1 + eta)
        variance = decay**2 * variance + end**2 * (1 - (end / sigma) ** (2 * eta))
    assert float(last.square().sum()) == pytest.approx(variance, rel=1e-12)
    levels = [level for pair in noise.heard for level in pair]
    assert levels[1:-1:2] == levels[2::2] and levels[0] == 9.0 and levels[-1] == 0.5
    assert all(start > end for start, end in noise.heard)


@pytest.mark.parametrize(
    ("name", "options"),
    [("seeds_2", {"r": r}) for r in (0.2, 0.7, 1.0)] + [("seeds_3", {}), ("seeds_3", {"r_2": 1.0})],
    ids=str,
)
def test_on_a_brownian_path_the_points_of_a_step_make_no_difference(name, options):
    """Where estimates do not matter: in the time σ^-2 of η = 1 a step's draws are one increment."""
    x = seeded(2, 3, seed=1)
    model = kdpp.TeacherGuidedDenoiser(nothing, nothing, teacher_steps=0)
    path = kdpp.BrownianNoise(x, 0.5, 9.0, seed=3, transform=lambda sigma: sigma**-2)
    once = path.between(9.0, 0.5)
    levels = torch.tensor([9.0, 0.5], dtype=torch.float64)
    found = run(kdpp.SOLVERS[name], model, x, levels, noise_sampler=path, **options)
    decay = 0.5 / 9.0
    assert relative(found, decay**2 * x + 0.5 * math.sqrt(1 - decay**2) * once) < 1e-12


def test_its_end_at_the_middle_point_is_the_exponential_heun_method():
    """SEEDS-2 at r = 1 with "phi_2", with noise; without, it is RES singlestep at any r."""
    problem, sigmas = Problem(), karras(5)
    x, guidance = problem.start(sigmas), {"teacher_scale": 0.4, "teacher_steps": 3}
    two, one = kdpp.SOLVERS["seeds_2"], kdpp.SOLVERS["res_singlestep"]
    for eta in (0.0, 0.5, 1.0):
        options = {"eta": eta, "r": 1.0, "solver_type": "phi_2"}
        expected = references.expected(two, problem, x, sigmas, guidance, **options)
        assert relative(problem.sample(two, x, sigmas, guidance, **options), expected) < 1e-12
    for r in (0.3, 1.0):
        options = {"eta": 0.0, "r": r, "solver_type": "phi_2"}
        expected = problem.sample(two, x, sigmas, guidance, **options)
        assert relative(problem.sample(one, x, sigmas, guidance, r=r), expected) < 1e-12


def test_points_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"r_1 is 0.8 and r_2 0.5; they must be r_1 ≤ r_2"):
        kdpp.SOLVERS["seeds_3"].plan([5.0, 1.0], r_1=0.8, r_2=0.5)


@over_seeds
def test_tune_knows_the_noise_of_a_step(name, options):
    """looks_noise: what the sampler's draws add to a step's end, beside what x is multiplied by."""
    x, levels, seeds = seeded(2, 3, seed=1), [9.0, 2.0, 0.5], torch.tensor([3, 4])
    pair = looks.Pair(
        nothing, nothing, kdpp.SOLVERS[name], levels, {}, 1.0, detail=1, max_batch=None
    )
    half = looks.Half(pair, x, {}, seeds)
    model = kdpp.TeacherGuidedDenoiser(nothing, nothing, teacher_steps=0)
    states = [told["x"] for told in half.sample(model, x)]
    for step, noise, state, after in zip(pair.plan, half.noises, states, states[1:]):
        assert relative(after, looks.Move.of(step).ratio * state + noise) < 1e-12


def halves(levels):
    """Two Euler steps in one, the second from its own point; the second's estimate is kept."""
    for i, (sigma, end) in enumerate(itertools.pairwise(levels)):
        middle = (sigma + end) / 2
        ratio = end / middle
        row = Row(end, 1.0, (-ratio,)) if i == 0 else Row(end, 1.0, (-ratio - 0.1, 0.0, 0.1))
        yield Step(sigma, end, (Stage(sigma, euler_row(sigma, middle)), Stage(middle, row, True)),
                   kept=1)  # fmt: skip


@pytest.mark.parametrize("variable", ["sigma", "tau"])
def test_what_a_step_keeps_and_where_it_goes_on_from(solvers, variable):
    """By hand: later steps weigh the second stage's estimate, in σ and in τ."""
    solver(order=None, name="halves")(lambda sigmas: in_variable(variable, sigmas, halves))
    problem, sigmas = Problem(), karras(4)[:-1]
    x = problem.start(sigmas)
    found = run(kdpp.SOLVERS["halves"], problem.guided(teacher_scale=0.0), x, sigmas,
                extra_args=problem.extra_args)  # fmt: skip
    space = kdpp.plan.VARIABLES[variable]
    scale = (lambda level: 1 - level) if variable == "tau" else (lambda level: 1.0)
    levels = [space.level(sigma) for sigma in sigmas.tolist()]
    z, before = x * scale(levels[0]), None
    for level, end in itertools.pairwise(levels):
        middle = (level + end) / 2
        for start, to in ((level, middle), (middle, end)):
            x0 = problem.estimate(z / scale(start), space.sigma(start))
            z = x0 + (z - x0) / start * to
        z = z if before is None else z + 0.1 * (before - x0)
        before = x0
    assert relative(found, z / scale(levels[-1])) < 1e-12


def test_a_step_weighs_no_more_than_was_kept(solvers):
    """Two stages are one estimate to remember."""

    def plan(sigmas):
        steps = list(halves(sigmas))
        last = steps[-1]
        row = Row(last.sigma_next, 1.0, (-last.sigma_next / last.stages[1].sigma, 0.0, 0.0, 0.1))
        row = Row(row.target, 0.9, row.direction)
        stages = (last.stages[0], Stage(last.stages[1].sigma, row, True))
        return [*steps[:-1], Step(last.sigma, last.sigma_next, stages, kept=1)]

    made = solver(order=None, name="deep")(plan)
    with pytest.raises(ValueError, match=r"step 1 .* weighs 2 earlier estimates; there are 1"):
        made.plan([9.0, 4.0, 1.0])


@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
def test_a_plan_with_guided_weights_is_a_plain_one_without_cfg_pp(solvers, cond_scale):
    """The estimates are the directions then: UD10 AB's plan as a solver of its own."""
    plain = kdpp.solver(order=None, name="ud10_plain")(kdpp.SOLVERS["cfgpp_ud10_ab"].steps)
    problem, sigmas = Problem(cond_scale=cond_scale), karras(5)
    x = problem.start(sigmas)
    found = problem.sample(plain, x, sigmas, {"teacher_scale": 0.0})
    solve = references.REFERENCES["cfgpp_ud10_ab"]
    unguided = references.Revision(lambda x, sigma: x, Tape(x, 0), scale=0.0)
    expected = solve(problem.estimate, problem.estimate, unguided, x, sigmas, None)
    assert relative(found, expected) < 1e-12
