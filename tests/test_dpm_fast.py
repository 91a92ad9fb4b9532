"""DPM-Solver-fast: k-diffusion's to the last digit, with a teacher in its steps."""

import math

import numpy as np
import pytest
import torch

import kdpp
import needs
from kdpp import Teacher, TeacherGuidedDenoiser
from problems import (
    SHAPE,
    CFGDenoiser,
    Constant,
    Counted,
    NeverCalled,
    Problem,
    Tape,
    gaussian,
    relative,
    seeded,
)

LOW, HIGH = 0.05, 12.0
PROBLEM = Problem()
X = HIGH * seeded(2, *SHAPE, seed=9)
over_n = pytest.mark.parametrize("n", range(1, 11))


def sample(model, n, low=LOW, high=HIGH, extra_args=PROBLEM.extra_args, **options):
    """One run from the same latent, with noise by the number of the call."""
    options.setdefault("noise_sampler", Tape(X, 5))
    return kdpp.sample_dpm_fast_tg(model, X, low, high, n, extra_args, disable=True, **options)


def guided(**settings):
    """The problem's pair; the renoise noise is by the number of the call."""
    return PROBLEM.guided(renoise_noise_sampler=Tape(X, 6), **settings)


def orders(n):
    """The orders of its steps, as the authors give them: as many threes as can be."""
    threes = {0: n // 3 - 1, 1: n // 3, 2: n // 3}[n % 3]
    return [3] * threes + {0: [2, 1], 1: [1], 2: [2]}[n % 3]


# ------------------------------------------------------------------------- against k-diffusion


@pytest.fixture
def float64():
    """k-diffusion makes its times in torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def k_diffusions(n, low=LOW, high=HIGH, **options):
    """Its own sampler over a script's CFGDenoiser."""
    options.setdefault("noise_sampler", Tape(X, 5))
    model, extra_args = CFGDenoiser(PROBLEM.student), PROBLEM.extra_args
    sampler = needs.k_sampling.sample_dpm_fast
    return sampler(model, X, low, high, n, extra_args, disable=True, **options)


@needs.k_diffusion
@over_n
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("s_noise", [1.0, 0.7])
def test_it_is_k_diffusions(n, eta, s_noise, float64):
    """λ = 0, every number of evaluations, with and without noise: to 1e-12."""
    options = {"eta": eta, "s_noise": s_noise}
    found = sample(guided(teacher_scale=0.0), n, **options)
    assert relative(found, k_diffusions(n, **options)) <= 1e-12


@needs.k_diffusion
@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize(("low", "high"), [(0.0292, 14.6146), (0.9, 1.1), (1e-4, 80.0)])
def test_it_is_k_diffusions_between_any_levels(n, low, high, float64):
    """Far apart and close together; the first and last level are the caller's own."""
    found = sample(guided(teacher_scale=0.0), n, low, high, eta=0.5)
    assert relative(found, k_diffusions(n, low, high, eta=0.5)) <= 1e-11


@needs.k_diffusion
@over_n
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_callback_is_k_diffusions(n, eta, float64):
    """The same keys in every step, the same numbers under them, the same order of steps."""
    told, its = [], []
    sample(guided(teacher_scale=0.0), n, eta=eta, callback=told.append)
    k_diffusions(n, eta=eta, callback=its.append)
    assert len(told) == len(its) == len(orders(n))
    for info, expected in zip(told, its):
        assert set(info) == set(expected) == {
            "x", "i", "t", "t_up", "sigma", "sigma_hat", "denoised",
        }  # fmt: skip
        assert info["i"] == expected["i"]
        for name in set(info) - {"i"}:
            found, wanted = torch.as_tensor(info[name]), torch.as_tensor(expected[name])
            assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12), name


@needs.k_diffusion
@pytest.mark.parametrize("n", [4, 6])
def test_the_default_noise_is_k_diffusions(n, float64):
    """The same seed gives the same picture, and leaves the stream where k-diffusion leaves it."""
    runs = []
    for run in (k_diffusions, lambda n, **own: sample(guided(teacher_scale=0.0), n, **own)):
        torch.manual_seed(4)
        runs.append((run(n, eta=1.0, noise_sampler=None), torch.get_rng_state()))
    assert relative(runs[1][0], runs[0][0]) <= 1e-12
    assert torch.equal(runs[1][1], runs[0][1])


# ------------------------------------------------------------------------- what it does


@over_n
@pytest.mark.parametrize("steps", [0, 1, 99])
def test_it_takes_n_evaluations(n, steps):
    """n of the student's, and one of the teacher's in every guided step; orders as they should."""
    student, teacher = Counted(PROBLEM.student), Counted(PROBLEM.teacher)
    model = TeacherGuidedDenoiser(student, teacher, teacher_steps=steps)
    sample(model, n)
    assert len(student.calls) == n == sum(orders(n))
    assert len(teacher.calls) == min(steps, len(orders(n)))


@over_n
def test_its_steps_are_equal_in_log_sigma(n):
    """The levels that the steps start from, and where the stages lie inside them."""
    student = Counted(PROBLEM.student)
    sample(TeacherGuidedDenoiser(student, PROBLEM.teacher, teacher_scale=0.0), n)
    levels = np.geomspace(HIGH, LOW, len(orders(n)) + 1)
    expected = [
        start * (end / start) ** (k / order)
        for start, end, order in zip(levels, levels[1:], orders(n))
        for k in range(order)
    ]
    asked = [float(call.sigma[0]) for call in student.calls]
    assert asked == pytest.approx(expected, rel=1e-12)


def test_levels_may_be_tensors():
    """As hosts take them from a model's schedule."""
    levels = torch.tensor([LOW, HIGH], dtype=torch.float64)
    model = guided(teacher_scale=0.0)
    assert relative(sample(model, 5, *levels), sample(model, 5)) <= 1e-12


def test_without_noise_none_is_drawn():
    """At η = 0 the stream stays where it is, and a noise sampler is not asked."""
    for options in ({}, {"eta": 1.0, "s_noise": 0.0}):
        tape, before = Tape(X, 5), torch.get_rng_state()
        sample(guided(), 5, noise_sampler=tape, **options)
        assert not tape.asked
        sample(guided(), 5, noise_sampler=None, **options)
        assert torch.equal(torch.get_rng_state(), before)


def test_it_solves_a_gaussians_ode_with_order_3():
    """Regression on the closed form, over counts that end in a step of order 2: 3, …, 3, 2."""
    data, errors, counts = gaussian(0), [], (14, 26, 50)
    model = TeacherGuidedDenoiser(data, data, teacher_scale=0.0)
    for n in counts:
        found = sample(model, n, extra_args=None)
        exact = data.solution(X, HIGH, LOW)
        errors.append(float((found - exact).square().mean().sqrt()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(3.0, abs=0.4)


# ------------------------------------------------------------------------- guided


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_one_step_is_affine_in_lambda(n, eta):
    """x' = x'(0) + λ (x̂_ψ - x̂): coefficient 1 for orders 1 and 2."""
    told = []
    none, found = (
        sample(guided(teacher_scale=s), n, eta=eta, callback=told.append) for s in (0.0, 0.3)
    )
    change = told[-1]["denoised_teacher"] - told[-1]["denoised_student"]
    assert relative(found, none + 0.3 * change) <= 1e-12


@over_n
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_run_is_affine_in_lambda(n, eta):
    """A Gaussian student: the whole run is, whichever step is guided."""
    problem = Problem(student=gaussian())
    for step in range(len(orders(n))):
        none, some, full = (
            sample(
                problem.guided(
                    teacher_scale=scale, teacher_steps={step}, renoise_noise_sampler=Tape(X, 6)
                ),
                n,
                eta=eta,
            )
            for scale in (0.0, 0.3, 1.0)
        )
        assert relative(some, none + 0.3 * (full - none)) <= 1e-12
        assert relative(full, none) > 1e-4


@pytest.mark.parametrize("n", range(4, 11))
def test_every_order_takes_the_revision_by_1(n):
    """A student that always says the same: what the teacher adds shrinks as noise does."""
    student = Constant(seeded(*SHAPE, seed=8))
    levels = np.geomspace(HIGH, LOW, len(orders(n)) + 1)
    exact = student.value + (X - student.value) * LOW / HIGH
    for step in range(len(orders(n))):
        told = []
        teacher = Teacher(PROBLEM.teacher, scale=0.6, steps={step}, cfg_scale=1.0)
        found = sample(
            TeacherGuidedDenoiser(student, teacher), n, extra_args=None, callback=told.append
        )
        info = told[step]
        change = 0.6 * (info["denoised_teacher"] - info["denoised_student"])
        assert relative(found, exact + change * LOW / levels[step + 1]) <= 1e-12


def test_the_teacher_is_asked_at_the_steps_end():
    """renoise="next" is the next of its own levels, the last one being sigma_min."""
    teacher = Counted(PROBLEM.teacher)
    sample(TeacherGuidedDenoiser(PROBLEM.student, teacher, teacher_steps=9), 8, eta=1.0)
    asked = [float(call.sigma[0]) for call in teacher.calls]
    assert asked == pytest.approx(np.geomspace(HIGH, LOW, 4)[1:].tolist(), rel=1e-12)


def test_the_callback_of_a_guided_step():
    """k-diffusion's keys and the teacher's."""
    told = []
    sample(guided(), 5, callback=told.append)
    base = {"x", "i", "t", "t_up", "sigma", "sigma_hat", "denoised"}
    teachers = {"denoised_student", "renoised", "denoised_teacher", "denoised_revised"}
    assert [set(info) for info in told] == [base | teachers, base]


# ------------------------------------------------------------------------- bad input


def untouchable():
    """A wrapper whose networks fail the test when they are called."""
    return TeacherGuidedDenoiser(NeverCalled(), NeverCalled())


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, HIGH),
        (-1.0, HIGH),
        (LOW, 0.0),
        (HIGH, LOW),
        (math.nan, HIGH),
        (LOW, math.nan),
        (LOW, math.inf),
        (math.inf, math.inf),
    ],
)
def test_bad_levels(low, high):
    """Refused before any call, naming both with what was given."""
    with pytest.raises(ValueError, match=rf"sigma_min is {low!r} and sigma_max {high!r}"):
        sample(untouchable(), 5, low, high)


@pytest.mark.parametrize("n", [0, -1, 2.5, "5"])
def test_bad_counts(n):
    """Refused before any call, naming what was given."""
    with pytest.raises(ValueError, match=rf"n is {n!r}.*≥ 1"):
        sample(untouchable(), n)


@pytest.mark.parametrize("n", [math.nan, math.inf, None])
def test_counts_that_are_no_numbers(n):
    """The same for what has no whole part."""
    with pytest.raises((TypeError, ValueError), match=rf"n is {n!r}"):
        sample(untouchable(), n)


@pytest.mark.parametrize(("name", "value"), [("eta", -0.1), ("eta", math.nan), ("s_noise", -1.0)])
def test_bad_noise_settings(name, value):
    """Refused before any call."""
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        sample(untouchable(), 5, **{name: value})


def test_wrong_model_and_latent():
    """As every other sampler."""
    with pytest.raises(TypeError, match="TeacherGuidedDenoiser"):
        sample(NeverCalled(), 5)
    with pytest.raises(TypeError, match="floating"):
        kdpp.sample_dpm_fast_tg(untouchable(), torch.ones(2, 3, dtype=torch.int64), LOW, HIGH, 5)


def test_levels_that_are_one():
    """sigma_min = sigma_max: nowhere to go, nothing is called."""
    assert torch.equal(sample(guided(), 5, 3.0, 3.0), X)


@pytest.mark.parametrize(("s_noise", "right"), [(1.0, True), (1.02, False)])
def test_it_keeps_the_marginal(s_noise, right):
    """Ancestral, on a Gaussian: variance c + sigma² at every level; 2 % more noise shows."""
    variance, count = 0.5, 60_000
    bound = 4.5 * math.sqrt(2 / count) + 0.004  # of the sample, and the solver's own at these steps

    def denoiser(x, sigma):
        return variance * x / (variance + sigma.reshape(-1, 1) ** 2)

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 1, generator=generator) * math.sqrt(variance + HIGH**2)
    seen = []

    def measure(info):
        exact = variance + float(info["sigma"]) ** 2
        seen.append(abs(float(info["x"].double().var()) / exact - 1))

    model = TeacherGuidedDenoiser(denoiser, denoiser, teacher_steps=0)
    kdpp.sample_dpm_fast_tg(
        model, x, LOW, HIGH, 899, None, measure, True, 1.0, s_noise,
        lambda sigma, sigma_next: torch.randn(x.shape, generator=generator),
    )  # fmt: skip
    assert (max(seen) < bound) == right
