"""Rules over τ = σ/(1+σ), and the ancestral steps that hosts have for flow models."""

import math

import pytest
import torch

import golden
import kdpp
import problems
from kdpp.plan import FLOW, VE, rf_split
from problems import Problem, accepts, karras, log_uniform, mixture, relative, run, seeded
from test_order import FACTORS, HIGH, LOW, TOLERANCE, conditional_gaussian, fitted_order, rms, start

OVER_TAU = [s for s in problems.on_schedules(kdpp.SOLVERS) if accepts(s, "variable")]
over_tau = pytest.mark.parametrize("solver", OVER_TAU, ids=lambda s: s.name)
TAUS = torch.tensor([1.0, 0.93, 0.8, 0.6, 0.4, 0.2, 0.0], dtype=torch.float64)


def test_the_solvers_that_have_both():
    """Those whose hosts run them over τ for flow models."""
    names = {s.name for s in OVER_TAU}
    assert names >= {"dpmpp_2m", "lms", "heun", "dpm_2", "unipc"}
    assert accepts(kdpp.SOLVERS["dpm_fast"], "variable")


@over_tau
def test_the_order_is_the_same(solver):
    """On a Gaussian, as measured over σ."""
    if solver.order is None:
        pytest.skip("it does not follow the ODE")
    model, exact = conditional_gaussian(0)
    problem = Problem(student=model, cond_scale=1.0)
    extra = problem.extra_args
    extra["uncond"] = extra["cond"]
    errors, counts = [], [round(solver.order_from * factor) for factor in FACTORS]
    for steps in counts:
        sigmas = log_uniform(steps, LOW, HIGH)
        found = run(
            solver, problem.guided(teacher_scale=0.0), start(), sigmas,
            extra_args=extra, eta=0.0, variable="tau",
        )  # fmt: skip
        errors.append(rms(found - exact))
    assert fitted_order(errors, counts) == pytest.approx(solver.order, abs=2 * TOLERANCE)


def flow_run(solver, **options):
    """A flow model's run from τ = 1, and its estimate ``(z, τ) -> x0`` written out."""
    problem = Problem(student=golden.Flow(mixture(0)), teacher=golden.Flow(mixture(1)))
    z = seeded(2, *problems.SHAPE, seed=9)
    model = problem.guided(teacher_scale=0.0)
    found = run(solver, model, z, TAUS, extra_args=problem.extra_args, variable="tau", **options)
    return found, z, problem.estimate


def test_heun_of_a_flow_model_is_heun_in_its_own_state():
    """From τ = 1 on: both slopes are velocities."""
    found, z, estimate = flow_run(kdpp.SOLVERS["heun"])
    for tau, end in problems.pairs(TAUS):
        velocity = (z - estimate(z, tau)) / tau
        if end > 0:
            u = z + velocity * (end - tau)
            velocity = (velocity + (u - estimate(u, end)) / end) / 2
        z = z + velocity * (end - tau)
    assert relative(found, z) < 1e-12


def test_2m_of_a_flow_model_is_2m_in_its_own_state():
    """From τ = 1 on, with -log τ for the time."""
    found, z, estimate = flow_run(kdpp.SOLVERS["dpmpp_2m"])
    before = None
    for tau, end in problems.pairs(TAUS):
        x0 = estimate(z, tau)
        mean = x0
        if before is not None and end > 0:
            older, tau_older = before
            r = math.log(tau_older / tau) / math.log(tau / end)
            mean = x0 + (x0 - older) / (2 * r)
        z, before = end / tau * z + (1 - end / tau) * mean, (x0, tau)
    assert relative(found, z) < 1e-12


def test_lms_of_a_flow_model_uses_the_velocity_at_tau_1():
    """Order 2: the second step weighs the first's."""
    found, z, estimate = flow_run(
        kdpp.SOLVERS["lms"], order=2, lower_order_final="at 0"
    )  # fmt: skip
    older = None
    for tau, end in problems.pairs(TAUS):
        velocity, h = (z - estimate(z, tau)) / tau, end - tau
        step = velocity * h
        if older is not None and end > 0:
            step = step + (velocity - older[0]) / older[1] * h * h / 2
        z, older = z + step, (velocity, h)
    assert relative(found, z) < 1e-12


def test_churn_is_that_of_sigma():
    """Heun over τ: x is lifted to σ̂ as without ``variable``, then steps in z = (1-τ) x."""
    problem, sigmas = Problem(), karras(5)
    x, s_churn = problem.start(sigmas), 2.0
    torch.manual_seed(3)
    found = run(
        kdpp.SOLVERS["heun"], problem.guided(teacher_scale=0.0), x, sigmas,
        extra_args=problem.extra_args, s_churn=s_churn, variable="tau",
    )  # fmt: skip
    torch.manual_seed(3)
    for sigma, end in problems.pairs(sigmas):
        hat = sigma * (1 + s_churn / 5)
        x = x + math.sqrt(hat**2 - sigma**2) * torch.randn_like(x)
        tau, tau_end = hat / (1 + hat), end / (1 + end)
        z, x0 = (1 - tau) * x, problem.estimate(x, hat)
        slope = (z - x0) / tau
        if end > 0:
            u = z + slope * (tau_end - tau)
            slope = (slope + (u - problem.estimate(u / (1 - tau_end), end)) / tau_end) / 2
        x = (z + slope * (tau_end - tau)) / (1 - tau_end)
    assert relative(found, x) < 1e-12


@pytest.mark.parametrize("n", range(1, 8))
def test_dpm_fast_from_tau_1(n):
    """n evaluations at levels equal in -log τ, from exactly 1."""
    student = problems.Counted(golden.Flow(mixture(0)))
    model = kdpp.TeacherGuidedDenoiser(student, golden.Flow(mixture(1)), teacher_steps=0, flow=True)
    z, seen = seeded(2, *problems.SHAPE, seed=9), []
    found = kdpp.sample_dpm_fast_tg(
        model, z, 0.1, 1.0, n, callback=lambda info: seen.append(float(info["sigma"])),
        disable=True, variable="tau",
    )  # fmt: skip
    assert found.isfinite().all()
    assert len(student.calls) == n
    assert seen[0] == 1.0
    ratios = [a / b for a, b in zip([*seen, 0.1], [*seen, 0.1][1:])]
    assert max(ratios) == pytest.approx(min(ratios))
    with pytest.raises(ValueError, match="variable is 'taus'; it must be"):
        kdpp.sample_dpm_fast_tg(model, z, 0.1, 1.0, n, variable="taus")


def test_dpm_fast_over_tau_has_its_order():
    """2, as over σ, against a run of many steps."""
    problem = Problem(student=golden.Flow(mixture(1)), teacher=golden.Flow(mixture(1)))
    z = seeded(2, *problems.SHAPE, seed=9)

    def sample(n):
        model = problem.guided(teacher_scale=0.0)
        return kdpp.sample_dpm_fast_tg(
            model, z, 0.2, 1.0, n, problem.extra_args, disable=True, variable="tau"
        )

    exact, counts = sample(3000), [48, 96, 192]
    assert fitted_order([rms(sample(n) - exact) for n in counts], counts) == pytest.approx(
        2, abs=0.4
    )


# ------------------------------------------------------------------------- ancestral steps, "RF"


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 2.5])
def test_the_split_of_flow_models(eta):
    """Noise makes up for the level stepped below, which is at a fraction of τ'."""
    for sigma, end in [(math.inf, 9.0), (9.0, 2.0), (0.5, 0.1)]:
        down, noise = rf_split(sigma, end, eta, 1.0)
        assert down**2 + (noise or 0.0) ** 2 == pytest.approx(end**2)
        tau, tau_end = FLOW.level(sigma), FLOW.level(end)
        share = max(0.0, 1 - eta * (1 - tau_end / tau))
        assert FLOW.level(down) == pytest.approx(tau_end * share)
    assert rf_split(2.0, 2.0, eta, 1.0)[0] == 2.0
    assert rf_split(2.0, 0.0, eta, 1.0) == (0.0, None)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2s_ancestral"])
def test_at_eta_0_it_is_the_plain_solver(name):
    """Both go to σ' itself."""
    sigmas = karras(6).tolist()
    for one, other in zip(
        kdpp.SOLVERS[name].plan(sigmas, eta=0.0), kdpp.SOLVERS[f"{name}_rf"].plan(sigmas, eta=0.0)
    ):
        for here, there in zip(one.stages, other.stages, strict=True):
            assert here.sigma == pytest.approx(there.sigma, rel=1e-12)
            assert here.row.target == pytest.approx(there.row.target, rel=1e-12)
            assert here.row.direction == pytest.approx(there.row.direction, abs=1e-9)


def test_2s_has_a_middle_point_from_tau_1():
    """At τ = 0.9999; the step weighs its estimate alone."""
    first = kdpp.SOLVERS["dpmpp_2s_ancestral_rf"].plan([1.0, 0.8, 0.0], space=FLOW)[0]
    assert [FLOW.level(stage.sigma) for stage in first.stages] == pytest.approx([1.0, 0.9999])
    assert first.stages[1].row.denoised == 1.0
    assert not any(first.stages[1].row.direction)
    assert VE.level(first.stages[1].row.target) == pytest.approx(FLOW.sigma(0.8 * 0.8))
