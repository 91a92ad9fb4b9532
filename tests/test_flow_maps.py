"""Flow maps, which are told where they go, and TrigFlow networks: against exact solutions."""

import math

import pytest
import torch

import kdpp
from kdpp import FlowDenoiser, FlowMapDenoiser, Teacher, TeacherGuidedDenoiser, TrigFlowDenoiser
from problems import (
    SHAPE,
    Counted,
    NeverCalled,
    conditions,
    gaussian,
    mixture,
    on_schedules,
    per_sample,
    relative,
    run,
    seeded,
    shift,
)

TAUS = torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0], dtype=torch.float64)
SIGMAS = torch.tensor([9.0, 3.0, 1.0, 0.2, 0.0], dtype=torch.float64)
DATA = gaussian(0)
FIRST = ("euler", "euler_ancestral", "euler_ancestral_rf", "ddim_stochastic", "lcm")
OPTIONS = {"extra_args": {}}


class Path:
    """A Gaussian's exact average velocity: (x_t - x_r)/(t - r), at r = t the velocity."""

    def __init__(self, data=DATA):
        self.data, self.asked = data, []

    def deviation(self, tau):
        return ((1 - tau) ** 2 * self.data.variance + tau**2).sqrt()

    def __call__(self, x, t, r, cond=None):
        self.asked.append((float(t[0]), float(r[0])))
        t, r = per_sample(t, x), per_sample(r, x)
        mean = self.data.mean + shift(cond, x)
        score = (x - (1 - t) * mean) / self.deviation(t)
        arrived = (1 - r) * mean + score * self.deviation(r)
        slope = (t - (1 - t) * self.data.variance) / self.deviation(t)  # of the deviation
        velocity = score * slope - mean
        same = (t == r).expand(x.shape)
        return torch.where(
            same, velocity, (x - arrived) / (t - r).where(t != r, torch.ones_like(t))
        )


def flowed(x, tau, tau_next):
    """The trajectory's point at another level."""
    path = Path()
    levels = (torch.tensor(float(level), dtype=torch.float64) for level in (tau, tau_next))
    here, there = (path.deviation(level) for level in levels)
    mean = DATA.mean
    return (1 - tau_next) * mean + (x - (1 - tau) * mean) / here * there


def start(level=1.0):
    return seeded(2, *SHAPE, seed=9) * float(level)


@pytest.mark.parametrize("levels", [TAUS, TAUS[[0, -1]], TAUS[:3]], ids=["4", "1", "unfinished"])
def test_euler_follows_the_map_exactly(levels):
    """However few the steps, x_r is the trajectory's own point; the network is told t and r."""
    path = Path()
    model = TeacherGuidedDenoiser(FlowMapDenoiser(path, time_scale=1.0))
    found = kdpp.sample_euler_tg(model, start(), levels, disable=True)
    assert relative(found, flowed(start(), 1.0, float(levels[-1]))) < 1e-12
    pairs = zip(levels.tolist(), levels.tolist()[1:])
    assert path.asked == [pytest.approx(pair, abs=1e-12) for pair in pairs]


def test_in_ve_coordinates_it_is_the_same_map():
    """as_ve hands the next level on: VE's exact solution in any steps; as_flow brings it back."""
    ve = kdpp.as_ve(FlowMapDenoiser(Path()))
    x = start(9.0)
    found = kdpp.sample_euler_tg(TeacherGuidedDenoiser(ve), x, SIGMAS, disable=True)
    assert relative(found, DATA.solution(x, 9.0, 0.0)) < 1e-12
    again = TeacherGuidedDenoiser(kdpp.as_flow(ve, sigma_max=1e6))
    found = kdpp.sample_euler_tg(again, 0.9 * x / 9.0, TAUS[1:], disable=True)
    assert relative(found, flowed(0.9 * x / 9.0, 0.7, 0.0)) < 1e-9


WHERE = {
    "euler": lambda t, s: s,
    "lcm": lambda t, s: 0.0,
    "euler_ancestral_rf": lambda t, s: s * s / t,
}


@pytest.mark.parametrize("name", WHERE)
def test_the_level_is_where_the_update_goes_before_noise(name):
    """σ' for Euler, σ_down for ancestral ones, 0 for LCM."""
    path, levels = Path(), TAUS[1:]
    model = TeacherGuidedDenoiser(FlowMapDenoiser(path))
    run(kdpp.SOLVERS[name], model, start(0.7), levels, **OPTIONS)
    expected = [(t, WHERE[name](t, s)) for t, s in zip(levels.tolist(), levels.tolist()[1:])]
    assert path.asked == [pytest.approx(pair, abs=1e-9) for pair in expected]


@pytest.mark.parametrize("solver", on_schedules(kdpp.SOLVERS), ids=lambda s: s.name)
def test_solvers_that_use_an_answer_twice_refuse_it(solver):
    """An answer is for one level: several stages and memories cannot give it, nothing is called."""
    levels = TAUS[1:]
    given = {"cond": torch.zeros(2, SHAPE[0]), "uncond": torch.zeros(2, SHAPE[0])}
    steps = solver.plan([10.0, 5.0, 2.0, 1.0, 0.5, 0.0])
    if all(len(step.stages) == 1 and step.history == 0 for step in steps):
        assert solver.name.removesuffix("_cfg_pp") in FIRST or not solver.multistep
        model = TeacherGuidedDenoiser(FlowMapDenoiser(Path()))
        assert run(solver, model, start(0.7), levels, extra_args=given).isfinite().all()
        return
    model = TeacherGuidedDenoiser(FlowMapDenoiser(NeverCalled()))
    with pytest.raises(ValueError, match="takes sigma_next, the one level"):
        run(solver, model, start(0.7), levels, extra_args=given)


def test_cfg_and_parts_of_a_batch():
    """Both halves are told where they go, also in calls of a few rows each."""
    cond, uncond = conditions(2)
    given = {"cond": cond, "uncond": uncond, "cond_scale": 2.0}
    found = []
    for most in (None, 1):
        model = TeacherGuidedDenoiser(FlowMapDenoiser(Path()), max_batch=most)
        found.append(run(kdpp.SOLVERS["euler"], model, start(), TAUS, extra_args=given))
    assert relative(*found) < 1e-12
    # Means shifted by the condition: the guided map is that of the guided mean.
    shifted = gaussian(0)
    shifted.mean = DATA.mean + shift(uncond + 2.0 * (cond - uncond), start())
    expected = FlowMapDenoiser(Path(shifted))
    model = TeacherGuidedDenoiser(expected)
    assert relative(found[0], kdpp.sample_euler_tg(model, start(), TAUS, disable=True)) < 1e-12


def test_elsewhere_it_is_a_flow_model():
    """Called without a level r is t; up, too; a teacher is asked for the whole way, r = 0."""
    path = Path()
    flow_map = FlowMapDenoiser(path)
    x, level = start(0.5), torch.full((2,), 0.5, dtype=torch.float64)
    alpha, variance = 0.5, DATA.variance
    exact = (variance * alpha * x + 0.25 * DATA.mean) / (variance * alpha**2 + 0.25)
    assert relative(flow_map(x, level), exact) < 1e-12
    up = TAUS[1:-1].flip(0)
    path.asked.clear()
    kdpp.encode(flow_map, x, up, disable=True)
    kdpp.sample_euler_tg(TeacherGuidedDenoiser(flow_map), x, up, disable=True)
    assert all(t == r for t, r in path.asked)
    path.asked.clear()
    student = FlowDenoiser(lambda x, t: 0.1 * x)
    teacher = Teacher(flow_map, steps=2, cfg_scale=1.0)
    kdpp.sample_euler_tg(TeacherGuidedDenoiser(student, teacher), start(), TAUS, disable=True)
    assert path.asked == [(pytest.approx(0.7), 0.0), (pytest.approx(0.4), 0.0)]


def test_in_a_handover_each_step_is_its_own_networks():
    """A flow map takes the first step exactly, an ordinary model the others; rollouts, too."""
    path = Path()
    student = FlowDenoiser(lambda x, t, cond=None: 0.1 * x)
    model = TeacherGuidedDenoiser(kdpp.handover(student, FlowMapDenoiser(path)))
    kept = []
    kdpp.sample_euler_tg(model, start(), TAUS, callback=lambda i: kept.append(i["x"]), disable=True)
    assert relative(kept[1], flowed(start(), 1.0, 0.7)) < 1e-12
    assert path.asked == [(1.0, pytest.approx(0.7))]
    second = TeacherGuidedDenoiser(kdpp.handover(student, FlowMapDenoiser(NeverCalled()), {1}))
    with pytest.raises(ValueError, match="takes sigma_next"):  # 2M uses it again in the third
        kdpp.sample_dpmpp_2m_tg(
            TeacherGuidedDenoiser(kdpp.WeightedSum(student, kdpp.Weighted(
                FlowMapDenoiser(NeverCalled()), 0.5, steps={1}))), start(), TAUS, disable=True
        )  # fmt: skip
    assert second.space.alpha(1.0) == 0.5
    rollout = kdpp.mixed_rollout(student, FlowMapDenoiser(Path()), start(), TAUS, switch=1,
                                 disable=True)  # fmt: skip
    assert relative(rollout.states[1], flowed(start(), 1.0, 0.7)) < 1e-12


def test_a_reflection_by_flow_maps():
    """The way down is the map's; up it is an ordinary model."""
    path = Path()
    weak = FlowMapDenoiser(Path())
    model = TeacherGuidedDenoiser(
        FlowMapDenoiser(path), reflection=kdpp.Reflection(weak, steps={1})
    )
    kdpp.sample_euler_tg(model, start(), TAUS, disable=True)
    assert path.asked[1] == (pytest.approx(0.7), pytest.approx(0.4))
    assert weak.network.asked == [(pytest.approx(0.4), pytest.approx(0.4))]


def test_a_wrapper_says_that_it_takes_the_level():
    """OwnCFG and the guidance's input hand it on."""
    path = Path()

    def guided(x, sigma, sigma_next=None, w=None, cond=None):
        path.asked.append((float(sigma[0]), float(sigma_next[0])))
        return 0.1 * x

    guided.takes_sigma_next, guided.flow = True, True
    marked = kdpp.GuidanceConditioned(guided)
    model = TeacherGuidedDenoiser(marked, flow=True)
    kdpp.sample_euler_tg(model, start(), TAUS[:2], {"cond_scale": 2.0}, disable=True)
    assert path.asked == [(1.0, pytest.approx(0.7))]


# ------------------------------------------------------------------------- TrigFlow


SIGMA_DATA = 0.5


class Trig:
    """The exact F of Gaussian data in TrigFlow's own terms, by Lu & Song's definitions.

    x_t = cos t x0 + sin t z, z ~ N(0, σ_d²); f(x_t, t) = cos t x_t - sin t σ_d F(x_t/σ_d, t) is
    E[x0 | x_t], the posterior mean of that Gaussian pair.
    """

    def __init__(self, scale=1.0, sigma_data=SIGMA_DATA):
        self.scale, self.sigma_data, self.times = scale, sigma_data, []

    def __call__(self, x, t, cond=None):
        self.times.append(float(t[0]))
        t = per_sample(t, x) / self.scale
        x_t = x * self.sigma_data
        noise = (torch.sin(t) * self.sigma_data) ** 2
        gain = torch.cos(t) * DATA.variance / (torch.cos(t) ** 2 * DATA.variance + noise)
        mean = DATA.mean + gain * (x_t - torch.cos(t) * DATA.mean)
        return (torch.cos(t) * x_t - mean) / (torch.sin(t) * self.sigma_data)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0, 80.0])
@pytest.mark.parametrize(("scale", "sigma_data"), [(1.0, 0.5), (1000.0, 1.3)])
def test_trigflow_is_the_denoiser_of_its_data(sigma, scale, sigma_data):
    """In VE form it is the Gaussian's exact denoiser; its time is arctan(σ/σ_d)."""
    network = Trig(scale, sigma_data)
    x, level = start(sigma), torch.full((2,), sigma, dtype=torch.float64)
    found = TrigFlowDenoiser(network, sigma_data, scale)(x, level)
    assert relative(found, DATA(x, level)) < 1e-9
    assert network.times == [pytest.approx(scale * math.atan(sigma / sigma_data))]


def test_trigflow_samples_to_the_exact_solution():
    """DPM-Solver++(2M) over the converted network ends where the ODE does."""
    levels = torch.linspace(math.log(20.0), math.log(0.01), 257, dtype=torch.float64).exp()
    model = TeacherGuidedDenoiser(TrigFlowDenoiser(Trig()))
    x = start(20.0)
    found = kdpp.sample_dpmpp_2m_tg(model, x, levels, disable=True)
    assert relative(found, DATA.solution(x, 20.0, 0.01)) < 1e-3


def test_trigflows_first_order_step_is_the_papers():
    """DDIM in TrigFlow, x_s = cos(t - s) x_t - sin(t - s) σ_d F, is Euler's step in VE."""
    t, s = (math.atan(sigma / SIGMA_DATA) for sigma in (3.0, 1.0))
    network = Trig()
    x = start(3.0)
    x_t = math.cos(t) * x
    answer = network(x_t / SIGMA_DATA, torch.full((2,), t, dtype=torch.float64))
    expected = math.cos(t - s) * x_t - math.sin(t - s) * SIGMA_DATA * answer
    model = TeacherGuidedDenoiser(TrigFlowDenoiser(network))
    found = kdpp.sample_euler_tg(model, x, torch.tensor([3.0, 1.0]), disable=True)
    assert relative(math.cos(s) * found, expected) < 1e-6


def test_at_no_noise_it_is_the_image():
    """t = 0: D = x, whatever the network says."""
    x = start(0.3)
    assert torch.equal(TrigFlowDenoiser(lambda x, t: 7.0 * x)(x, torch.zeros(2).double()), x)


def test_sana_sprints_transformation_is_a_flow_model():
    """Its F of a flow network's answer (section 3.1), in TrigFlow, is FlowDenoiser's estimate.

    The formulas are those of the paper and of its pipeline: t_FM = sin t/(sin t + cos t), x_FM =
    x_t/σ_d sqrt(t_FM² + (1 - t_FM)²), F = ((1 - 2 t_FM) x_FM + (1 - 2 t_FM + 2 t_FM²) v)/sqrt(…).
    """
    inner = mixture(1)

    def velocity(x, tau, cond=None):
        alpha = 1 - per_sample(tau, x)
        return (x - inner(x / alpha, tau / (1 - tau), cond)) / per_sample(tau, x)

    def transformed(x, t, cond=None):
        s = per_sample(torch.sin(t) / (torch.sin(t) + torch.cos(t)), x)
        root = torch.sqrt(s**2 + (1 - s) ** 2)
        state = x * root
        answer = velocity(state, s.flatten(), cond)
        return ((1 - 2 * s) * state + (1 - 2 * s + 2 * s**2) * answer) / root

    x, sigma = start(2.0), torch.full((2,), 2.0, dtype=torch.float64)
    # Latents of the pipeline are σ_d times the transformer's, and so are noise levels.
    trig = TrigFlowDenoiser(transformed, SIGMA_DATA)(SIGMA_DATA * x, SIGMA_DATA * sigma)
    flow = kdpp.as_ve(FlowDenoiser(velocity))(x, sigma)
    assert relative(trig / SIGMA_DATA, flow) < 1e-11
    assert relative(flow, inner(x, sigma)) < 1e-11


def test_what_they_refuse():
    for made in (FlowMapDenoiser, TrigFlowDenoiser):
        with pytest.raises(TypeError, match=f"{made.__name__} takes a network"):
            made(3)
        with pytest.raises(ValueError, match="time_scale is 0"):
            made(lambda x, t: x, time_scale=0.0)
    with pytest.raises(ValueError, match="sigma_data is -1"):
        TrigFlowDenoiser(lambda x, t: x, sigma_data=-1.0)
    counted = Counted(FlowMapDenoiser(Path()))
    assert not kdpp.kinds.takes_sigma_next(lambda x: x)
    assert kdpp.kinds.takes_sigma_next(counted)
