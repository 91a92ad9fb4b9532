"""UniPC: against the method written out in two steps, and against diffusers'."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.polynomial.legendre import leggauss
from numpy.polynomial.polynomial import polyfit, polyval

import kdpp
from kdpp import Teacher, TeacherGuidedDenoiser
from problems import (
    SCHEDULES,
    SHAPE,
    Constant,
    NeverCalled,
    Problem,
    Tape,
    gaussian,
    log_uniform,
    mixture,
    relative,
    seeded,
)

PROBLEM = Problem()
ORDERS = pytest.mark.parametrize("order", [1, 2, 3])
over_schedules = pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)


def sample(model, sigmas, x=None, extra_args=PROBLEM.extra_args, **options):
    """One run with the problem's conditions."""
    x = PROBLEM.start(sigmas) if x is None else x
    return kdpp.sample_unipc_tg(model, x, sigmas, extra_args, disable=True, **options)


def guided(**settings):
    """The problem's pair; the renoise noise is by the number of the call."""
    x = PROBLEM.start(torch.ones(1))
    settings.setdefault("renoise_noise_sampler", Tape(x, 6))
    return PROBLEM.guided(**settings)


# ------------------------------------------------------------------------- written out

POINTS, WEIGHTS = leggauss(60)


def integral(h, places, values):
    """∫ e^{u-h} P(u) du over [0, h]; P is the polynomial through the values at the places h·r."""
    u = (POINTS + 1) * h / 2
    factor = WEIGHTS * h / 2 * np.exp(u - h)
    unit = np.eye(len(places))
    shares = [factor @ polyval(u / h, polyfit(places, row, len(places) - 1)) for row in unit]
    return sum(share * value for share, value in zip(shares, values))


def unified(x, sigma, target, places, values):
    """UniP or UniC with B(h) = e^{-h} - 1: values[0] is the estimate at σ, where λ = -log σ.

    ``x' = e^{-h} x + (1 - e^{-h}) m_0 - B(h) Σ_k ρ_k (m_k - m_0)/r_k``: the ρ solve the conditions
    that make it exact for polynomials in λ, which is to integrate the one through all values; but
    where there is one ρ alone, the authors take 1/2.
    """
    decay = target / sigma
    if len(values) == 1 or target == 0:
        return decay * x + (1 - decay) * values[0]
    if len(values) == 2:
        slope = (values[1] - values[0]) / places[1]
        return decay * x + (1 - decay) * (values[0] + slope / 2)
    return decay * x + integral(math.log(sigma / target), places, values)


def literal(x, sigmas, order, estimate, guidance=lambda i, x, sigma, sigma_next, estimate: 0.0):
    """Predict, evaluate, correct: Zhao et al. 2023, in VE (x is their x_t over α_t).

    The estimate at the predicted point corrects it, from the last corrected point; the network is
    not asked again. What the teacher adds to a step stays in the point after it.
    """
    levels = sigmas.tolist()
    steps = len(levels) - 1
    made = []  # (σ, estimate), oldest first
    last = None  # the corrected point before, its level, the order used from it, what was added
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        new = estimate(x, sigma)
        if last is not None:
            start, level, used, added = last
            history = made[::-1][:used]
            h = math.log(level / sigma)
            places = [math.log(level / s) / h for s, _ in history]
            values = [m for _, m in history]
            x = unified(start, level, sigma, [*places, 1.0], [*values, new]) + added
        made.append((sigma, new))
        use = min(order, i + 1)
        if levels[-1] == 0:
            use = min(use, steps - i)
        history = made[::-1][:use]
        h = math.log(sigma / sigma_next) if sigma_next else math.inf
        places = [math.log(sigma / s) / h for s, _ in history]
        added = guidance(i, x, sigma, sigma_next, new)
        last = (x, sigma, use, added)
        x = unified(x, sigma, sigma_next, places, [m for _, m in history]) + added
    return x


@ORDERS
@over_schedules
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_method(sigmas, order, seed):
    """Any schedule, ending at 0 or above: predictor and corrector in one row are the two steps."""
    problem = Problem(student=mixture(seed))
    x = problem.start(sigmas)
    found = sample(problem.guided(teacher_scale=0.0), sigmas, order=order)
    assert relative(found, literal(x, sigmas, order, problem.estimate)) <= 1e-11


def test_the_order_is_2_unless_it_is_given():
    """The default, and a higher order is another solver."""
    sigmas, model = SCHEDULES["karras"], guided(teacher_scale=0.0)
    runs = {order: sample(model, sigmas, order=order) for order in (1, 2, 3)}
    assert torch.equal(sample(model, sigmas), runs[2])
    assert relative(runs[1], runs[2]) > 1e-4 and relative(runs[3], runs[2]) > 1e-4


@ORDERS
@over_schedules
def test_guided_it_is_the_method_with_the_teachers_term(sigmas, order):
    """x' + λ (x̂_ψ - x̂), at every step; the corrector corrects the solver's part and no more."""
    steps = len(sigmas) - 1
    noise = Tape(PROBLEM.start(sigmas), 6)

    def teach(i, x, sigma, sigma_next, estimate):
        if sigma_next == 0:
            return 0.0
        taught = PROBLEM.teacher_estimate(estimate + sigma_next * noise(), sigma_next)
        return 0.4 * (taught - estimate)

    expected = literal(PROBLEM.start(sigmas), sigmas, order, PROBLEM.estimate, teach)
    found = sample(guided(teacher_scale=0.4, teacher_steps=steps), sigmas, order=order)
    assert relative(found, expected) <= 1e-11


@ORDERS
def test_the_teachers_term_has_coefficient_1(order):
    """One guided step, the first, one in the middle or the last: the point after it moves by it."""
    sigmas = log_uniform(5)
    own = {"teacher_scale": 0.6, "renoise": 0.7}
    for step in range(4):
        told, levels = [], sigmas[: step + 2]  # the schedule ends with that step
        model = guided(teacher_steps={step}, **own)
        found = sample(model, levels, order=order, callback=told.append)
        none = sample(guided(teacher_scale=0.0), levels, order=order)
        change = told[step]["denoised_teacher"] - told[step]["denoised_student"]
        assert relative(found, none + 0.6 * change) <= 1e-12


@ORDERS
@pytest.mark.parametrize("guided_step", [0, 1, 2])
def test_the_corrector_does_not_undo_the_teacher(order, guided_step):
    """With a student that always says the same, what the teacher adds shrinks as noise does."""
    sigmas = log_uniform(5)
    student, told = Constant(seeded(*SHAPE, seed=8)), []
    teacher = Teacher(mixture(1), scale=0.6, steps={guided_step}, cfg_scale=1.0)
    model = TeacherGuidedDenoiser(student, teacher)
    x = PROBLEM.start(sigmas)
    found = sample(model, sigmas, x, None, order=order, callback=told.append)
    info = told[guided_step]
    change = 0.6 * (info["denoised_teacher"] - info["denoised_student"])
    exact = student.value + (x - student.value) * sigmas[-1] / sigmas[0]
    expected = exact + change * sigmas[-1] / sigmas[guided_step + 1]
    assert relative(found, expected) <= 1e-12


# ------------------------------------------------------------------------- against diffusers


@pytest.fixture
def float64():
    """diffusers makes its coefficients in torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def diffusers_unipc(estimate, x, sigmas, order):
    """diffusers' scheduler over the same levels; it works on VP latents x / sqrt(1 + σ²)."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type="bh2", predict_x0=True, prediction_type="sample"
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.timesteps = torch.arange(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    x = x / (1 + sigmas[0] ** 2).sqrt()
    for t, sigma in zip(scheduler.timesteps, sigmas):
        denoised = estimate(x * (1 + sigma**2).sqrt(), float(sigma))
        x = scheduler.step(denoised, t, x).prev_sample
    return x * (1 + sigmas[-1] ** 2).sqrt()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n, s in SCHEDULES.items() if s[-1] == 0])
@ORDERS
def test_it_is_diffusers(name, order, float64):
    """UniPCMultistepScheduler fed the same sigmas, for schedules that end at 0."""
    sigmas = SCHEDULES[name]
    x = PROBLEM.start(sigmas)
    expected = diffusers_unipc(PROBLEM.estimate, x, sigmas, order)
    found = sample(guided(teacher_scale=0.0), sigmas, order=order)
    assert relative(found, expected) <= 1e-11


# ------------------------------------------------------------------------- order


def measured(solve, order, counts=(40, 80, 160)):
    """The slope of log error over log steps, to a level above 0."""
    errors = []
    for steps in counts:
        # From a level as low as this the first steps, of lower order, are felt.
        sigmas = log_uniform(steps, low=0.1, high=2.0)
        errors.append(solve(sigmas, order))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    return -float(slope)


def error(sigmas, order):
    """Against the exact solution, a mean over several Gaussians."""
    errors = []
    for seed in range(3):
        data = gaussian(seed)
        x = seeded(2, *SHAPE, seed=40 + seed) * sigmas[0]
        model = TeacherGuidedDenoiser(data, data, teacher_scale=0.0)
        found = sample(model, sigmas, x, None, order=order)
        exact = data.solution(x, float(sigmas[0]), float(sigmas[-1]))
        errors.append(float((found - exact).square().mean().sqrt()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize(("order", "expected"), [(1, 2.0), (2, 3.0), (3, 3.0)])
def test_measured_order(order, expected):
    """To σ > 0 the corrector lifts order p to p + 1, but 3 stays at 3: its start holds it there.

    The first point is corrected by UniC-1 alone, with a local error of third order.
    """
    assert measured(error, order) == pytest.approx(expected, abs=0.25)


def test_order_3_is_the_better_one():
    """On the same levels."""
    sigmas = log_uniform(40, low=0.1, high=10.0)
    assert error(sigmas, 3) < error(sigmas, 2) < error(sigmas, 1)


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("order", [0, 4, -1, 2.5, math.nan, math.inf, None, "2"])
def test_orders_that_it_has_not(order):
    """Refused before any call, naming the orders that there are."""
    model = TeacherGuidedDenoiser(NeverCalled(), NeverCalled())
    with pytest.raises(ValueError, match=r"order is .* 1 to 3"):
        sample(model, SCHEDULES["karras"], order=order)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
def test_an_order_that_is_a_whole_float(order):
    """Refused as any other, also where the whole number's coefficients are kept."""
    model = guided(teacher_scale=0.0)
    sample(model, SCHEDULES["karras"], order=int(order))
    with pytest.raises(ValueError, match="order is"):
        sample(model, SCHEDULES["karras"], order=order)
