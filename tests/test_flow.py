"""Flow models: the same trajectories as in VE form, and a start at τ = 1, where σ is infinite."""

import inspect
import math
import re

import pytest
import torch
from torch import nn

import kdpp
from kdpp import NoiseRange, Teacher, TeacherGuidedDenoiser, sds_scale
from kdpp.models import FlowDenoiser, as_flow, as_ve
from kdpp.plan import FLOW
from problems import (
    SHAPE,
    Counted,
    Gaussian,
    Mixture,
    NeverCalled,
    Tape,
    accepts,
    conditions,
    gaussian,
    has_limit,
    looks_ahead,
    mixture,
    on_schedules,
    per_sample,
    relative,
    run,
    seeded,
    shift,
)

SOLVERS = on_schedules(kdpp.SOLVERS)
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
TAUS = torch.tensor([0.92, 0.75, 0.5, 0.3, 0.1, 0.0], dtype=torch.float64)
SIGMAS = TAUS / (1 - TAUS)


def over_solvers_and_eta(*etas, wanted=lambda solver: True, marks=lambda solver, eta: ()):
    """Every solver with every η that it takes; 0 stands for solvers that have none."""
    return pytest.mark.parametrize(
        ("solver", "eta"),
        [
            pytest.param(solver, eta, id=f"{solver.name}-{eta}", marks=marks(solver, eta))
            for solver in SOLVERS
            if wanted(solver)
            for eta in (etas if accepts(solver, "eta") else (0.0,))
        ],
    )


FROM_NOISE = torch.cat([torch.ones(1, dtype=torch.float64), TAUS[1:]])
CFG = 4.0


class FlowGaussian(Gaussian):
    """E[x0 | x_f], x_f = (1-τ) x0 + τ n, for Gaussian data; finite at τ = 1."""

    flow = True

    def forward(self, x, sigma, cond=None):
        """(c α x_f + τ² μ) / (c α² + τ²)."""
        tau = per_sample(sigma, x)
        alpha, mean = 1 - tau, self.mean + shift(cond, x)
        top = self.variance * alpha * x + tau**2 * mean
        return top / (self.variance * alpha**2 + tau**2)


class FlowMixture(Mixture):
    """The same for a mixture of Gaussians of one variance."""

    flow = True

    def forward(self, x, sigma, cond=None):
        """Components' posterior means, weighted by their responsibilities, in x_f."""
        tau = per_sample(sigma, x)
        alpha = 1 - tau
        centred = x - alpha * shift(cond, x)
        variance = self.variance * alpha**2 + tau**2
        away = centred[:, None] - alpha[:, None] * self.means
        logits = self.log_weights - away.flatten(2).square().sum(-1) / (2 * variance.flatten(1))
        mean = torch.einsum("bk,k...->b...", logits.softmax(1), self.means)
        return (self.variance * alpha * centred + tau**2 * mean) / variance + shift(cond, x)


def in_flow_form(model):
    """The same data's flow model."""
    if isinstance(model, Gaussian):
        return FlowGaussian(model.mean, model.variance)
    return FlowMixture(model.means, model.log_weights.exp(), model.variance)


MODELS = {"Gaussian": (gaussian(0), gaussian(1)), "mixture": (mixture(0), mixture(1))}
over_models = pytest.mark.parametrize("models", MODELS.values(), ids=MODELS)


def extra_args(cond_scale=2.5):
    """Both conditions."""
    cond, uncond = conditions(2)
    return {"cond": cond, "uncond": uncond, "cond_scale": cond_scale}


def sample(solver, model, levels, x, seed=5, **options):
    """A run whose noise is the same in both forms: by the number of the call."""
    torch.manual_seed(31)
    options = {"noise_sampler": Tape(x, seed), "extra_args": extra_args(), **options}
    return run(solver, model, x, levels, **options)


def pair(models, flow, **settings):
    """Student and teacher in VE or in flow form, with renoise noise by the number of the call."""
    student, teacher = (in_flow_form(m) if flow else m for m in models)
    settings.setdefault("teacher_cfg_scale", CFG)
    noise = Tape(torch.zeros(2, *SHAPE, dtype=torch.float64), 6)
    return TeacherGuidedDenoiser(student, teacher, renoise_noise_sampler=noise, **settings)


def tau_of(sigma):
    """The flow level of σ."""
    return sigma / (1 + sigma)


def both_forms(solver, models, sigmas=SIGMAS, ve=None, flow=None, **options):
    """One run in VE form and one in flow form, with what their callbacks were told.

    `ve` and `flow` are the settings of the two wrappers, or of the two runs' options.
    """
    runs = []
    taus = tau_of(sigmas)
    start = seeded(2, *SHAPE, seed=9)
    for is_flow, levels, own in ((False, sigmas, ve), (True, taus, flow)):
        told = []
        own = dict(own or {})
        mine = {name: own.pop(name) for name in list(own) if accepts(solver, name)}
        model = pair(models, is_flow, **own)
        x = start * levels[0] if is_flow else start * sigmas[0]
        found = sample(solver, model, levels, x, callback=told.append, **options, **mine)
        runs.append((found, told))
    return runs


def assert_same_trajectory(ve, flow, sigmas=SIGMAS, guided=True):
    """States, estimates and what the teacher was given, after α = 1 - τ is divided out."""
    (found, told), (other, other_told) = ve, flow
    assert relative(other * (1 + sigmas[-1]), found) <= 1e-10
    assert len(told) == len(other_told)
    for info, its in zip(told, other_told):
        assert relative(its["x"] * (1 + float(info["sigma_hat"])), info["x"]) <= 1e-10
        assert relative(its["denoised"], info["denoised"]) <= 1e-10
        assert float(its["sigma"]) == pytest.approx(tau_of(float(info["sigma"])), rel=1e-12)
        assert ("denoised_teacher" in its) == ("denoised_teacher" in info)
        if "denoised_teacher" in info:
            assert relative(its["denoised_teacher"], info["denoised_teacher"]) <= 1e-10
            assert relative(its["denoised_revised"], info["denoised_revised"]) <= 1e-10
    assert any("denoised_teacher" in info for info in told) == guided


# ------------------------------------------------------------------------- two forms of one model


@over_models
@over_solvers_and_eta(0.0, 0.5, 1.0)
def test_both_forms_take_the_same_way_unguided(solver, models, eta):
    """Every solver, CFG and CFG++ and noise included, λ = 0."""
    settings = {"teacher_scale": 0.0}
    runs = both_forms(solver, models, ve=settings, flow=settings, eta=eta)
    assert_same_trajectory(*runs, guided=False)


@over_models
@over_solvers_and_eta(0.0, 1.0)
@pytest.mark.parametrize(("renoise", "rho"), [("next", 1.0), ("current", 0.0), (0.8, 0.6)])
def test_both_forms_take_the_same_way_guided(solver, models, eta, renoise, rho):
    """With a teacher in four steps, its level and noise in every form."""
    settings = {"teacher_scale": 0.4, "teacher_steps": 4, "renoise_eta": rho}
    level = tau_of(renoise) if isinstance(renoise, float) else renoise
    runs = both_forms(
        solver,
        models,
        ve={**settings, "renoise": renoise},
        flow={**settings, "renoise": level},
        eta=eta,
    )
    assert_same_trajectory(*runs)


OPTIONS = {
    "s_noise": {"s_noise": 0.7, "eta": 1.0},
    "churn": {"s_churn": 3.0},
    "churn and s_noise": {"s_churn": 1.0, "s_noise": 1.1},
    "r": {"r": 0.8, "eta": 0.5},
    "order 1": {"order": 1},
    "order 3": {"order": 3},
    "heun": {"solver_type": "heun"},
    "phi_2": {"solver_type": "phi_2", "r": 1.0},
}


def takes(solver, name, value):
    """Whether the solver has the option, and the value is one of its choices if it has any."""
    option = solver.options.get(name)
    return option is not None and value in (option.choices or (value,))


@over_models
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        pytest.param(solver, options, id=f"{solver.name}-{name}")
        for solver in SOLVERS
        for name, options in OPTIONS.items()
        if takes(solver, *next(iter(options.items())))
    ],
)
def test_both_forms_take_the_same_way_with_every_option(solver, models, options):
    """Churn, middle points, orders: nothing in a solver knows the form."""
    settings = {"teacher_scale": 0.3, "teacher_steps": 2}
    ve, flow = both_forms(solver, models, ve=settings, flow=settings, **options)
    assert_same_trajectory(ve, flow)


@over_solvers
def test_both_forms_end_at_any_level(solver):
    """A schedule that stops above 0, and one that repeats levels."""
    settings = {"teacher_scale": 0.3, "teacher_steps": 9}
    for sigmas in (SIGMAS[:-2], SIGMAS[[0, 0, 1, 2, 2, 2, 3, 5, 5]]):
        runs = both_forms(solver, MODELS["mixture"], sigmas, ve=settings, flow=settings)
        assert_same_trajectory(*runs, sigmas=sigmas)


@pytest.mark.parametrize(
    ("ve", "flow"),
    [
        ({"teacher_steps": NoiseRange(0.4, 5.0)}, {"teacher_steps": NoiseRange(2 / 7, 5 / 6)}),
        ({"teacher_steps": {-1, 0}, "renoise": 1.0}, {"teacher_steps": {-1, 0}, "renoise": 0.5}),
        (
            {"renoise": lambda i, sigma, sigma_next: (sigma + sigma_next) / 2},
            {"renoise": lambda i, t, u: tau_of((t / (1 - t) + u / (1 - u)) / 2)},
        ),
        (
            {"teacher_scale": lambda i, sigma: min(1.0, 0.3 / sigma)},
            {"teacher_scale": lambda i, tau: min(1.0, 0.3 * (1 - tau) / tau)},
        ),
    ],
    ids=["noise range", "level", "function for the level", "function for the scale"],
)
def test_settings_are_in_the_models_levels(ve, flow):
    """Ranges, levels and functions of a level are τ for a flow model."""
    solver = kdpp.SOLVERS["dpmpp_2m"]
    runs = both_forms(solver, MODELS["mixture"], ve=ve, flow=flow)
    assert_same_trajectory(*runs)


def test_sds_scale_in_both_forms():
    """The SDS loss's weight ᾱ/(1-ᾱ) is 1/σ_s² in VE and (1-τ_s)²/τ_s² in flow form."""
    ve, flow = (
        {"teacher_scale": sds_scale(0.2, flow=flow), "teacher_steps": 4} for flow in (False, True)
    )
    solver = kdpp.SOLVERS["euler"]
    runs = both_forms(solver, MODELS["mixture"], ve=ve, flow=flow)
    assert_same_trajectory(*runs)


CHURNING = pytest.mark.parametrize(
    "solver", [s for s in SOLVERS if accepts(s, "s_churn")], ids=lambda s: s.name
)


@CHURNING
def test_the_callback_is_told_the_churned_level(solver):
    """sigma_hat is the level that the network is asked at: never above 1 for a flow model."""
    asked = Counted(in_flow_form(mixture(0)))
    asked.flow = True
    told = []
    model = TeacherGuidedDenoiser(asked, in_flow_form(mixture(1)), teacher_scale=0.0)
    x = seeded(2, *SHAPE, seed=9)
    sample(solver, model, TAUS[[0, -1]], x, s_churn=3.0, callback=told.append)
    assert float(told[0]["sigma_hat"]) == pytest.approx(float(asked.calls[0].sigma[0]))


@CHURNING
def test_churn_is_bounded_in_the_models_levels(solver):
    """s_tmin and s_tmax are σ, of a flow model too, as the docs say."""
    runs = both_forms(
        solver,
        MODELS["mixture"],
        ve={"s_tmin": 0.4, "s_tmax": 4.0},
        flow={"s_tmin": 0.4, "s_tmax": 4.0},
        s_churn=3.0,
    )
    assert_same_trajectory(*runs)


def test_a_flow_teachers_trained_range_is_in_tau():
    """sigma_min and sigma_max of a flow teacher are τ: clamped to those, with the warning."""
    teacher = Counted(in_flow_form(mixture(1)))
    teacher.flow, teacher.sigma_min, teacher.sigma_max = True, 0.2, 0.8
    model = TeacherGuidedDenoiser(
        in_flow_form(mixture(0)),
        [Teacher(teacher, cfg_scale=1.0, renoise=level) for level in (0.9, 0.1, 0.6)],
    )
    with pytest.warns(UserWarning, match=r"\[0\.2, 0\.8\].*clamped") as caught:
        sample(kdpp.SOLVERS["euler"], model, TAUS, seeded(2, *SHAPE, seed=9))
    assert len(caught) == 1
    (call,) = teacher.calls  # three levels, two samples each
    assert call.sigma[::2].tolist() == pytest.approx([0.8, 0.2, 0.6], rel=1e-12)


# ------------------------------------------------------------------------- from τ = 1 on


@over_solvers
@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_scale": 0.0},
        {},
        {"renoise": "current"},
        {"renoise": "current", "renoise_eta": 0.0},
        {"renoise": "next", "renoise_eta": 0.5},
        {"renoise": "random"},
        {"renoise": 1.0},
        {"renoise": 0.5, "renoise_eta": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"eta": 0.5, "s_churn": 3.0}, {"eta": 0.0}], ids=str)
def test_from_pure_noise_everything_is_finite(solver, settings, options):
    """τ = 1, guided in every way or not, with noise of every kind or none."""
    settings = {"teacher_scale": 0.4, "teacher_steps": 4, **settings}
    told = []
    model = pair(MODELS["mixture"], True, **settings)
    x = seeded(2, *SHAPE, seed=9)
    found = sample(solver, model, FROM_NOISE, x, callback=told.append, **options)
    assert found.isfinite().all()
    for info in told:
        tensors = [v for v in info.values() if isinstance(v, torch.Tensor)]
        assert all(tensor.isfinite().all() for tensor in tensors)


def starts_by_euler(solver):
    """Whether a step from τ = 1 has one stage; ancestral forms for flow models may have two."""
    return len(solver.plan([1.0, 0.5], space=FLOW)[0].stages) == 1


@pytest.mark.parametrize(
    "solver",
    [s for s in SOLVERS if s.order is not None and starts_by_euler(s)],
    ids=lambda s: s.name,
)
def test_the_first_step_from_pure_noise_is_euler(solver):
    """From τ = 1 to τ': (1-τ') x̂ + τ' x at η = 0; x̂ is guided under CFG++ too, x is all noise."""
    student, x = in_flow_form(mixture(0)), seeded(2, *SHAPE, seed=9)
    model = TeacherGuidedDenoiser(student, student, teacher_scale=0.0)
    found = sample(solver, model, FROM_NOISE[:2], x, eta=0.0)
    ones, after = torch.ones(2, dtype=torch.float64), FROM_NOISE[1]
    free, cond = (student(x, ones, cond=extra_args()[name]) for name in ("uncond", "cond"))
    estimate = free + 2.5 * (cond - free)
    assert relative(found, (1 - after) * estimate + after * x) <= 1e-12


class ByLevel:
    """Noise that depends on the level it is for, so that a step's stages may differ in number."""

    def __call__(self, sigma, sigma_next):
        return seeded(2, *SHAPE, seed=10**6 + round(1e6 * float(sigma_next)))


def near_noise(solver, model, levels, gap, **options):
    """The same run from τ = 1 and from τ = 1 - gap."""
    x = seeded(2, *SHAPE, seed=9)
    below = levels.clone()
    below[0] = 1 - gap
    options = {"noise_sampler": ByLevel(), **options}
    return [sample(solver, model(), each, x, **options) for each in (levels, below)]


@over_models
@over_solvers_and_eta(0.0, 0.5, 1.0, wanted=lambda s: has_limit(s) and s.name != "heunpp2")
@pytest.mark.parametrize("scale", [0.0, 0.4])
def test_pure_noise_is_the_limit(solver, eta, models, scale):
    """A start at τ = 1 - 1e-9 gives the same to 1e-6.

    Of multistep solvers the first step: they forget an infinite level, and in the limit its weight
    falls as 1/log σ, so that it is not seen in numbers (see the next test). Of solvers with a
    middle point at a distance of 1e-13: as near as that point comes, or the one that it has from
    τ = 1, and where noise goes on from it, as that noise falls. Not of Heun, Heun++ and
    DPM-Solver-2, which divide a slope by σ' or sqrt(σ σ').
    """
    levels = FROM_NOISE[:2] if solver.multistep else FROM_NOISE
    gap, tolerance = 1e-9, 1e-6
    if solver.evaluations > 1 or solver.extra:
        gap = 1e-13
        options = {"eta": eta} if accepts(solver, "eta") else {}
        starts = (
            solver.plan([start, levels[1]], space=FLOW, **options)[0] for start in (1 - gap, 1)
        )
        last = [(step.stages[-1], step.sigma_next) for step in starts]
        tolerance = max(1e-5, *(3.0 / stage.sigma for stage, _ in last))
        if any(stage.onward for stage, _ in last):
            tolerance = max(tolerance, *(10.0 * (end / stage.sigma) ** eta for stage, end in last))
    if solver.multistep and solver.noise == "brownian" and eta == 0.5:
        tolerance = 1e-4  # the exact SDE's σ_down falls like gap ** η
    if solver.name.startswith("sa_solver") and eta == 0.5:
        tolerance = 2 * gap**0.25  # its η is squared

    def model():
        return pair(models, True, teacher_scale=scale, teacher_steps=2)

    found, near = near_noise(solver, model, levels, gap, eta=eta)
    assert relative(near, found) <= tolerance


@over_models
@over_solvers_and_eta(0.0, 1.0, wanted=lambda s: not looks_ahead(s))
def test_an_infinite_level_is_no_memory(solver, models, eta):
    """From τ = 1: one step, and then the solver as it starts from the level after it.

    Not so DDIM with noise, which looks one level ahead.
    """
    x, noise = seeded(2, *SHAPE, seed=9), ByLevel()
    options = {"eta": eta, "noise_sampler": noise}

    def part(levels, x):
        return sample(solver, pair(models, True, teacher_scale=0.0), levels, x, **options)

    expected = part(FROM_NOISE[1:], part(FROM_NOISE[:2], x))
    assert relative(part(FROM_NOISE, x), expected) <= 1e-12


DETERMINISTIC = [s for s in SOLVERS if accepts(s, "eta") or not accepts(s, "noise_sampler")]


@over_models
@pytest.mark.parametrize("solver", DETERMINISTIC, ids=lambda s: s.name)
def test_repeated_levels_change_nothing(solver, models):
    """[1, 1, a, b, b, 0, 0] gives what [1, a, b, 0] gives, guided."""
    x = seeded(2, *SHAPE, seed=9)
    doubled = FROM_NOISE[[0, 0, 0, 1, 2, 2, 3, 4, 4, 5, 5]]
    found, expected = (
        sample(solver, pair(models, True, teacher_scale=0.4, teacher_steps=2), each, x, eta=0.0)
        for each in (doubled, FROM_NOISE)
    )
    assert relative(found, expected) <= 1e-12


@over_solvers
@pytest.mark.parametrize("levels", [(1.0, 1.0), (1.0, 1.0, 0.5, 0.5), (1.0, 0.0), (1.0, 0.0, 0.0)])
def test_schedules_of_repeats_stay_finite(solver, levels):
    """With noise and a teacher everywhere."""
    model = pair(MODELS["mixture"], True, teacher_scale=0.4, teacher_steps=9)
    levels = torch.tensor(levels, dtype=torch.float64)
    found = sample(solver, model, levels, seeded(2, *SHAPE, seed=9), eta=1.0, s_churn=2.0)
    assert found.isfinite().all()


def test_one_step_from_pure_noise_is_the_estimate():
    """[1, 0] returns D(x, 1): for Gaussian data its mean."""
    data = gaussian(0)
    model = TeacherGuidedDenoiser(in_flow_form(data), in_flow_form(data), teacher_cfg_scale=1.0)
    x = seeded(2, *SHAPE, seed=9)
    for solver in SOLVERS:
        args = {"cond": torch.zeros(2, SHAPE[0]), "uncond": torch.zeros(2, SHAPE[0])}
        found = sample(solver, model, torch.tensor([1.0, 0.0]), x, extra_args=args)
        assert relative(found, data.mean.expand_as(x)) <= 1e-12, solver.name


def test_the_ode_from_pure_noise_is_solved():
    """x(τ=1) = n arrives at μ + sqrt(c) n, the closed form, with second order (2M)."""
    data, x = gaussian(0), seeded(2, *SHAPE, seed=9)
    model = TeacherGuidedDenoiser(in_flow_form(data), in_flow_form(data), teacher_scale=0.0)
    exact, errors = data.mean + data.variance.sqrt() * x, []
    for steps in (100, 200):
        # Dense near both ends, where the infinite and the final step are of first order.
        ramp = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        taus = ramp**3 / (ramp**3 + (1 - ramp) ** 3)
        found = kdpp.sample_dpmpp_2m_tg(model, x, taus, disable=True)
        errors.append(relative(found, exact))
    assert errors[1] <= 1e-3
    assert errors[0] / errors[1] >= 3.5


# ------------------------------------------------------------------------- kdpp.models


class Velocity(nn.Module):
    """A network that predicts E[n - x0 | x_f] of Gaussian data, for times up to `scale`."""

    def __init__(self, data, scale=1.0):
        super().__init__()
        self.data, self.scale = data, scale

    def forward(self, x, time, cond=None):
        """(x (τ - c α) - τ μ) / (c α² + τ²): nothing is divided by τ or α."""
        tau = per_sample(time / self.scale, x)
        alpha, variance = 1 - tau, self.data.variance
        mean = self.data.mean + shift(cond, x)
        top = x * (tau - variance * alpha) - tau * mean
        return top / (variance * alpha**2 + tau**2)


@over_solvers
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_native_flow_student_with_a_ve_teacher(solver, scale):
    """FlowDenoiser and as_flow on a flow schedule: what both in VE form give on σ."""
    student, teacher = gaussian(0), mixture(1)
    start = seeded(2, *SHAPE, seed=9)
    settings = {"teacher_cfg_scale": CFG, "teacher_scale": 0.4, "teacher_steps": 3}

    def wrapper(*models):
        return TeacherGuidedDenoiser(*models, renoise_noise_sampler=Tape(start, 6), **settings)

    expected = sample(solver, wrapper(student, teacher), SIGMAS, start * SIGMAS[0])
    native = FlowDenoiser(Velocity(student, scale), time_scale=scale)
    found = sample(solver, wrapper(native, as_flow(teacher)), TAUS, start * TAUS[0])
    assert relative(found, expected) <= 1e-10
    found = sample(solver, wrapper(as_ve(native), teacher), SIGMAS, start * SIGMAS[0])
    assert relative(found, expected) <= 1e-10
    assert sample(solver, wrapper(native, as_flow(teacher)), FROM_NOISE, start).isfinite().all()


@over_solvers
def test_a_ve_student_as_a_flow_model_starts_at_pure_noise(solver):
    """as_flow(student) from τ = 1: its start is the VE sampler's at σ_max, to first order in it."""
    student = gaussian(0)
    x = seeded(2, *SHAPE, seed=9)
    model = TeacherGuidedDenoiser(as_flow(student), as_flow(mixture(1)), teacher_cfg_scale=CFG)
    exact = TeacherGuidedDenoiser(
        in_flow_form(student), in_flow_form(mixture(1)), teacher_cfg_scale=CFG
    )
    found, expected = (
        sample(solver, each, FROM_NOISE, x, noise_sampler=ByLevel()) for each in (model, exact)
    )
    assert relative(found, expected) <= 1e-3


# ------------------------------------------------------------------------- wrong kinds


class NeverCalledFlow(NeverCalled):
    """A flow model that must not be evaluated."""

    flow = True


VE_PAIR, FLOW_PAIR = (NeverCalled, NeverCalled), (NeverCalledFlow, NeverCalledFlow)


def untouchable(models, **settings):
    """A wrapper whose networks fail the test when they are called."""
    return TeacherGuidedDenoiser(*(model() for model in models), teacher_cfg_scale=1.0, **settings)


@over_solvers
@pytest.mark.parametrize("levels", [SIGMAS, torch.tensor([1.0001, 0.5, 0.0]), [2.0]])
def test_a_flow_model_given_sigmas(solver, levels):
    """A level above 1 is none of a flow model's: refused, and as_ve is named."""
    with pytest.raises(ValueError, match=r"sigmas holds .*flow model.*\[0, 1\].*as_ve"):
        sample(solver, untouchable(FLOW_PAIR), levels, seeded(2, *SHAPE, seed=1))


@over_solvers
def test_a_ve_model_given_a_flow_schedule(solver):
    """From exactly 1 to exactly 0: refused, and the ways out are named."""
    with pytest.raises(ValueError, match=r"from exactly 1 to 0.*FlowDenoiser.*flow=False"):
        sample(solver, untouchable(VE_PAIR), FROM_NOISE, seeded(2, *SHAPE, seed=1))


@pytest.mark.parametrize("models", [VE_PAIR[:1] + FLOW_PAIR[:1], FLOW_PAIR[:1] + VE_PAIR[:1]])
def test_a_pair_of_two_kinds(models):
    """Refused when the wrapper is made, naming as_flow and as_ve."""
    with pytest.raises(ValueError, match=r"student and teacher.*as_flow.*as_ve"):
        untouchable(models)


def test_one_teacher_of_another_kind_among_several():
    """Every teacher is looked at."""
    teachers = [Teacher(NeverCalledFlow()), Teacher(NeverCalled())]
    with pytest.raises(ValueError, match="as_flow"):
        TeacherGuidedDenoiser(NeverCalledFlow(), teachers)


def test_marked_models_say_their_kind():
    """OwnCFG around a flow model is a flow model."""
    with pytest.raises(ValueError, match="flow model"):
        model = TeacherGuidedDenoiser(*(kdpp.OwnCFG(NeverCalledFlow()) for _ in range(2)))
        sample(kdpp.SOLVERS["euler"], model, SIGMAS, seeded(2, *SHAPE, seed=1))


@over_solvers
def test_a_schedule_of_1_to_0_in_ve_can_be_meant(solver):
    """flow=False says so; schedules that only start or only end like a flow's need not."""
    models = MODELS["mixture"]
    x = seeded(2, *SHAPE, seed=1)
    meant = TeacherGuidedDenoiser(*models, teacher_cfg_scale=CFG, flow=False)
    assert sample(solver, meant, FROM_NOISE, x).isfinite().all()
    for levels in (FROM_NOISE[:-1], torch.tensor([0.99, 0.5, 0.0])):
        assert sample(solver, pair(models, False), levels, x).isfinite().all()


@over_solvers
def test_flow_can_be_said_of_models_that_do_not(solver):
    """flow=True on plain functions is what the attribute is."""
    x = seeded(2, *SHAPE, seed=9)

    def plain(model):
        inner = in_flow_form(model)
        return lambda x, sigma, cond=None: inner(x, sigma, cond=cond)

    student, teacher = MODELS["mixture"]
    settings = {"teacher_cfg_scale": CFG, "renoise_noise_sampler": Tape(x, 6)}
    said = TeacherGuidedDenoiser(plain(student), plain(teacher), flow=True, **settings)
    expected = sample(solver, pair((student, teacher), True), FROM_NOISE, x)
    assert torch.equal(sample(solver, said, FROM_NOISE, x), expected)


def test_levels_above_1_of_a_flow_models_settings():
    """The defaults know the kind; the wrapper's parameter is documented."""
    assert "flow" in inspect.signature(TeacherGuidedDenoiser).parameters
    assert re.search(r"flow: .*τ in \[0, 1\]", TeacherGuidedDenoiser.__doc__ or "")


# ------------------------------------------------------------------------- DPM-Solver-fast

FAST = kdpp.sample_dpm_fast_tg


def fast(flow, low, high, n, **options):
    """A run of dpm_fast in one form."""
    x = seeded(2, *SHAPE, seed=9) * high
    model = pair(MODELS["mixture"], flow, teacher_scale=0.4)
    options = {"noise_sampler": Tape(x, 5), "extra_args": extra_args(), **options}
    return FAST(model, x, low, high, n, disable=True, **options)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("n", range(3, 8))
def test_dpm_fast_takes_the_same_way_in_both_forms(n, eta):
    """Its steps are equal in -log σ, for a flow model too."""
    low, high = 0.05, 12.0
    expected = fast(False, low, high, n, eta=eta)
    found = fast(True, tau_of(low), tau_of(high), n, eta=eta)
    assert relative(found * (1 + low), expected) <= 1e-10


@pytest.mark.parametrize("n", [1, 2])
def test_dpm_fast_in_one_step_takes_the_same_way_in_both_forms(n):
    """One step, of order 1 or 2, has no level between."""
    low, high = 0.05, 12.0
    expected = fast(False, low, high, n)
    assert relative(fast(True, tau_of(low), tau_of(high), n) * (1 + low), expected) <= 1e-10


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_dpm_fast_from_pure_noise(n, eta):
    """From τ = 1 it is finite, or says that it cannot start there."""
    try:
        found = fast(True, 0.05, 1.0, n, eta=eta)
    except ValueError as error:
        assert "sigma_max" in str(error)
    else:
        assert math.isfinite(float(found.abs().max()))
