"""Solvers as values: their plans, options, levels, and how they are found."""

import itertools
import math

import pytest
import torch

import kdpp
import problems
from kdpp import Option
from kdpp.plan import FLOW, Row, Step, euler_row
from kdpp.solver import SOLVERS, Solver, solver, solver_of

SIGMAS = [14.6, 4.0, 1.2, 0.4, 0.0]
over_solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=lambda s: s.name)
on_schedules = pytest.mark.parametrize(
    "solver", problems.on_schedules(SOLVERS), ids=lambda s: s.name
)


@on_schedules
def test_a_plan_has_a_step_for_each_pair_of_levels(solver):
    """With as many evaluations as the solver says: one in the last step, and the extra ones."""
    steps = solver.plan(SIGMAS)
    assert [(step.sigma, step.sigma_next) for step in steps] == list(itertools.pairwise(SIGMAS))
    counts = [len(step.stages) for step in steps]
    assert sum(counts) == solver.evaluations * (len(steps) - 1) + 1 + solver.extra
    assert counts[1] == solver.evaluations
    assert [len(step.stages) for step in solver.plan([5.0, 0.0])] == [1]
    assert solver.plan(torch.tensor(SIGMAS, dtype=torch.float64)) is steps  # kept


@on_schedules
def test_a_flow_models_plan_is_that_of_its_sigmas(solver):
    """σ = τ/(1-τ)."""
    taus = [0.9, 0.5, 0.2, 0.0]
    flow = solver.plan(taus, space=FLOW)
    ve = solver.plan([tau / (1 - tau) for tau in taus])
    assert [step.stages for step in flow] == [step.stages for step in ve]
    assert solver.plan([1.0, 0.5], space=FLOW)[0].sigma == math.inf


@over_solvers
def test_options_are_checked_one_by_one(solver):
    """An unknown one, one outside its range, one of another kind: what is allowed is said."""
    levels = solver.levels(0.1, 10.0, 8) if solver.own_levels else SIGMAS
    with pytest.raises(ValueError, match=f"unknown option of {solver.name} 'etta'"):
        solver.plan(levels, etta=1.0)
    for name, option in solver.options.items():
        bad = [None, math.nan, -math.inf, True, [1.0], "sideways"]
        bad += [] if option.default == math.inf else [math.inf]
        bad += [] if option.choices or isinstance(option.default, float) else [1.5]
        for value in bad:
            with pytest.raises(ValueError, match=rf"^{name} is .*; it must be "):
                solver.plan(levels, **{name: value})


@pytest.mark.parametrize(
    ("option", "words", "good", "bad"),
    [
        (Option(1.0, low=0.0), "a number ≥ 0", [0, 0.5, 9.0], [-1e-9, math.inf]),
        (Option(math.inf, low=0.0), "a number ≥ 0", [0.0, math.inf], [-1.0]),
        (Option(0.5, 0.0, 1.0, above=True), "a number in (0, 1]", [1e-9, 1], [0.0, 1.1]),
        (Option(2, low=1, high=3), "a whole number from 1 to 3", [1, 3], [0, 4, 2.0]),
        (Option("a", choices=("a", "b")), '"a" or "b"', ["a", "b"], ["c", 1]),
    ],
    ids=str,
)
def test_what_an_option_may_be(option, words, good, bad):
    """In words, and as the numbers that the plan gets."""
    assert str(option) == words
    for value in good:
        assert type(option.read("it", value)) is type(option.default)
        assert option.read("it", value) == value
    for value in bad:
        with pytest.raises(ValueError, match=r"it is .*; it must be"):
            option.read("it", value)


def test_levels_of_one_that_makes_its_own():
    """DPM-Solver-fast: equal steps in -log σ, of the orders that make n evaluations."""
    fast = SOLVERS["dpm_fast"]
    for n in range(1, 13):
        levels = fast.levels(0.1, 10.0, n)
        plan = fast.plan(levels, n=n)
        assert sum(len(step.stages) for step in plan) == n
        assert (levels[0], levels[-1]) == pytest.approx((10.0, 0.1))
    with pytest.raises(ValueError, match="n is 8, which makes 3 steps; there are 4"):
        fast.plan([10.0, 5.0, 1.0, 0.5, 0.1], n=8)
    with pytest.raises(ValueError, match="euler takes any levels"):
        SOLVERS["euler"].levels(0.1, 10.0, 8)
    for bad in ((0.0, 1.0, 3), (2.0, 1.0, 3), (0.1, math.inf, 3)):
        with pytest.raises(ValueError, match="0 < sigma_min ≤ sigma_max"):
            fast.levels(*bad)
    with pytest.raises(ValueError, match="n is 0; it must be a whole number"):
        fast.levels(0.1, 1.0, 0)


def test_natures():
    """What the rows of a plan tell of a solver."""
    multistep = {s.name for s in SOLVERS.values() if s.multistep}
    assert multistep >= {"dpmpp_2m", "lms", "unipc", "dpmpp_3m_sde"}
    assert not multistep & {"euler", "heun", "dpmpp_2s_ancestral", "dpmpp_sde", "lcm", "dpm_fast"}
    keeping = {s.name for s in SOLVERS.values() if s.keeps}
    assert keeping >= {"dpmpp_2m", "heun", "dpm_2"}
    assert not keeping & {"euler", "lcm", "dpmpp_2s_ancestral", "dpmpp_sde"}


@over_solvers
def test_it_prints_as_something_to_read(solver):
    """A line of what it is, a line for each option."""
    first, *options = str(solver).splitlines()
    assert first.startswith(f"{solver.name}: ") and first in f"{solver.name}: {solver.traits}"
    assert [line.split()[0] for line in options] == list(solver.options)
    assert repr(solver) == f"<Solver {solver.name}: {solver.traits}>"


def test_the_nearest_name_is_said():
    """Of an unknown solver; what is no sampler at all is refused, too."""
    with pytest.raises(ValueError, match="unknown solver 'eular'; did you mean 'euler'"):
        solver_of("eular")
    with pytest.raises(ValueError, match="'print' is no sampler of kdpp"):
        solver_of(print)


def test_a_solvers_own_mistake_is_raised_once(solvers):
    """A TypeError inside a plan is the plan's, and it is not carried out a second time."""
    calls = []

    @solver(order=1)
    def broken(sigmas):
        calls.append(sigmas)
        raise TypeError("a mistake of the plan's")

    with pytest.raises(TypeError, match="a mistake of the plan's"):
        broken.plan(SIGMAS)
    assert len(calls) == 1
    assert isinstance(broken, Solver) and kdpp.SOLVERS["broken"] is broken
    with pytest.raises(ValueError, match="there is a solver named 'broken' already"):
        solver(order=1, name="broken")(lambda sigmas: [])


def euler_to(fraction, noise=None):
    """Rows to a fraction of each next level, which but for fraction 1 is no solver."""

    def rows(sigmas):
        for sigma, sigma_next in itertools.pairwise(sigmas):
            row = euler_row(sigma, fraction * sigma_next, noise)
            yield Step.single(sigma, sigma_next, row)

    return rows


def too_deep(sigmas):
    """A two-step rule that forgets that its first step has no estimate before it."""
    for sigma, sigma_next in itertools.pairwise(sigmas):
        ratio = sigma_next / sigma
        yield Step.single(sigma, sigma_next, Row(sigma_next, 1.0, (0.5 - ratio, -0.5)))


WRONG = {
    "the last step is missing": (
        lambda sigmas: [*euler_to(1.0)(sigmas)][:-1],
        r"one step for each pair of levels; .* it gave 14.6 to 4, 4 to 1.2, 1.2 to 0.4$",
    ),
    "every step twice": (
        lambda sigmas: [step for step in euler_to(1.0)(sigmas) for _ in range(2)],
        "one step for each pair of levels",
    ),
    "no steps": (lambda sigmas: [], "it gave no step"),
    "short of the level": (euler_to(0.7), r"step 0 of .* ends at σ = 2.8 and not at 4"),
    "noise that it denies": (euler_to(1.0, noise=0.1), 'step 0 of .* draws noise, and .*"none"'),
    "a memory it has not": (too_deep, "step 0 of .* weighs 1 earlier estimates; there are 0"),
}


@pytest.mark.parametrize("plan, sentence", WRONG.values(), ids=WRONG)
def test_a_plan_that_is_none_is_refused(solvers, plan, sentence):
    """It would run, and give wrong images without a word."""
    with pytest.raises(ValueError, match=sentence):
        solver(order=1, name="wrong")(plan).plan(SIGMAS)


def test_such_a_plan_that_is_right_is_taken(solvers):
    assert len(solver(order=1, name="right")(euler_to(1.0)).plan(SIGMAS)) == 4


TINY = [[14.6, 1e-20, 0.0], [5.0, 1.0, 1e-20, 0.0], [1e-20, 5e-21], [1e-20, 1e-25, 0.0],
        [5.0, 1e-29, 0.0], [1e-28, 1e-30, 0.0]]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sigmas", TINY, ids=str)
@on_schedules
def test_tiny_levels_give_finite_images_or_are_refused(solver, sigmas, dtype):
    """A second-order step to such a level weighs estimates by 1/σ, and only rounding is left."""
    model = kdpp.TeacherGuidedDenoiser(
        lambda x, sigma, cond: 0.1 * x, lambda x, sigma, cond: 0.2 * x,
        teacher_steps=3, teacher_cfg_scale=1.0, max_batch=None,
    )  # fmt: skip
    x = torch.ones(1, 1, 8, 8, dtype=dtype) * sigmas[0]
    levels = torch.tensor(sigmas, dtype=torch.float64)
    try:
        extra_args = {"cond": torch.ones(1), "uncond": torch.zeros(1), "cond_scale": 1.5}
        images = kdpp.sample(solver, model, x, levels, extra_args, disable=True)
    except ValueError as error:
        assert "leaves nothing but rounding" in str(error)
    else:
        assert images.isfinite().all()


def test_levels_that_float32_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"holds 1e-200; every level must be .* ≥ 1e-30"):
        SOLVERS["euler"].plan([5.0, 1e-200, 0.0])
