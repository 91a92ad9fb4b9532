"""Models as denoisers: every form of one model says the same, and samples, on either side."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import kdpp
from kdpp.kdiffusion import external
from kdpp.models import (
    FlowDenoiser,
    GuidanceConditioned,
    LCMDenoiser,
    X0Denoiser,
    as_flow,
    as_ve,
)
from problems import SHAPE, Counted, Gaussian, Problem, conditions, relative, seeded

BATCH = 3
SIGMAS = torch.tensor([9.0, 3.0, 1.0, 0.3, 0.0], dtype=torch.float64)


# --------------------------------------------------- one Gaussian model, in every form, by hand


def alphas_cumprod(low=0.00085, high=0.012):
    """Of Stable Diffusion's kind of schedule, in float64."""
    betas = torch.linspace(low**0.5, high**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def column(numbers):
    """One number per sample, for an image."""
    return numbers.reshape(-1, *[1] * len(SHAPE))


def data(seed=0):
    """Mean and variance of every pixel."""
    return seeded(*SHAPE, seed=30 + seed), seeded(*SHAPE, seed=31 + seed).square() + 0.1


class Exact(nn.Module):
    """What a perfect network of any kind predicts for N(mean, variance), from α x0 + β n.

    E[x0] and E[n] are each written out as a Gaussian's conditional mean; `says` combines them.
    """

    def __init__(self, level, says, seed=0):
        super().__init__()
        mean, variance = data(seed)
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)
        self.level, self.says = level, says

    def forward(self, z, t, cond=None):
        """The prediction at z = α x0 + β n."""
        alpha, beta = (column(part).to(z.dtype) for part in self.level(t))
        mean = self.mean.to(z.dtype)
        if cond is not None:
            mean = mean + cond.to(z.dtype)[:, :, None, None]
        variance = self.variance.to(z.dtype)
        surprise = (z - alpha * mean) / (alpha**2 * variance + beta**2)
        return self.says(alpha, beta, mean + alpha * variance * surprise, beta * surprise)

    def apply_model(self, x, t, cond=None, **kwargs):
        """What CompVis' latent diffusion calls it."""
        return self(x, t, cond=cond, **kwargs)


def epsilon(alpha, beta, x0, noise):
    """The noise."""
    return noise


def v(alpha, beta, x0, noise):
    """Salimans and Ho's v."""
    return alpha * noise - beta * x0


def clean(alpha, beta, x0, noise):
    """x0 itself."""
    return x0


def velocity(alpha, beta, x0, noise):
    """A flow's velocity."""
    return noise - x0


def discrete(alphas):
    """(α, β) of a VP schedule at a timestep, whole or between two, by interpolating log σ."""
    log_sigma = ((1 - alphas) / alphas).sqrt().log()

    def level(t):
        t = t.double()
        low = t.floor().long().clamp(max=998)
        table = log_sigma.to(t.device)
        between = table[low] + (t - low) * (table[low + 1] - table[low])
        return vp(between.exp())

    return level


def vp(sigma):
    """(α, β) of the VP latent that has VE level σ."""
    return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5


def cosine(t):
    """(α, β) of v-diffusion, t in [0, 1]."""
    return (t * math.pi / 2).cos(), (t * math.pi / 2).sin()


def comp_vis(kind, says, alphas, seed=0):
    """A CompVis denoiser in float64 around the exact network of that schedule."""
    network = Exact(discrete(alphas), says, seed)
    network.alphas_cumprod = alphas
    return kind(network).double()


def eps_model(seed=0, alphas=None):
    """Stable Diffusion's kind."""
    alphas = alphas_cumprod() if alphas is None else alphas
    return comp_vis(external.CompVisDenoiser, epsilon, alphas, seed)


def flow_model(scale=1.0, seed=0):
    """A flow model whose network takes times from 0 to `scale`."""
    return FlowDenoiser(Exact(lambda t: (1 - t / scale, t / scale), velocity, seed), scale)


def timed_x0_model(seed=0):
    """An x0 model of a discrete schedule."""
    schedule = eps_model()
    return X0Denoiser(Exact(discrete(alphas_cumprod()), clean, seed), schedule.sigma_to_t)


FORMS = {
    "epsilon": eps_model,
    "v, discrete": lambda seed=0: comp_vis(external.CompVisVDenoiser, v, alphas_cumprod(), seed),
    "v, continuous": lambda seed=0: external.VDenoiser(Exact(cosine, v, seed)),
    "x0": lambda seed=0: X0Denoiser(Exact(vp, clean, seed)),
    "x0, discrete": timed_x0_model,
    "flow": lambda seed=0: as_ve(flow_model(seed=seed)),
    "flow, 1000": lambda seed=0: as_ve(flow_model(1000.0, seed)),
    "there and back": lambda seed=0: as_ve(as_flow(Gaussian(*data(seed)))),
}
over_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def named(solver):
    """A sampler by its k-diffusion name."""
    return kdpp.SOLVERS[solver]


def points(*levels):
    """x of that many samples, each of its level, and the levels."""
    sigma = torch.tensor(levels, dtype=torch.float64)
    return seeded(len(levels), *SHAPE, seed=40) * column((1 + sigma**2).sqrt()), sigma


@over_forms
def test_every_form_of_one_model_says_the_same(form):
    """The posterior mean (c x + σ² μ)/(c + σ²), at three levels in one batch, with a condition."""
    x, sigma = points(0.05, 0.7, 11.0)
    for cond in (None, conditions(BATCH)[0]):
        extra_args = {} if cond is None else {"cond": cond}
        if cond is None and form is FORMS["v, discrete"]:
            extra_args = {"cond": None}  # k-diffusion's own takes no call without
        expected = Gaussian(*data())(x, sigma, cond)
        assert relative(form()(x, sigma, **extra_args), expected) <= 1e-12


def test_forms_sample_together():
    """Student and teacher of every two forms draw what the same pair in one form draws."""
    for i, student in enumerate(FORMS):
        teacher = list(FORMS)[i - 1]
        sampled = []
        for pair in (
            (FORMS[student](0), FORMS[teacher](5)),
            (Gaussian(*data(0)), Gaussian(*data(5))),
        ):
            problem = Problem(student=pair[0], teacher=pair[1])
            x = problem.start(SIGMAS)
            guidance = {"teacher_scale": 0.4, "teacher_steps": 2}
            sampled.append(
                [problem.sample(named(s), x, SIGMAS, guidance) for s in ("euler", "lcm")]
            )
        for found, expected in zip(*sampled):
            assert relative(found, expected) <= 1e-11, (student, teacher)


def test_schedules_of_their_own():
    """Two discrete schedules: each network is asked at its own timestep of the common σ."""
    other = alphas_cumprod(0.0001, 0.02)
    student, teacher = eps_model(), eps_model(seed=5, alphas=other)
    assert float(student.sigma_to_t(SIGMAS[1])) != float(teacher.sigma_to_t(SIGMAS[1]))
    problem = Problem(student=student, teacher=teacher)
    alike = Problem(student=Gaussian(*data(0)), teacher=Gaussian(*data(5)))
    x = problem.start(SIGMAS)
    for solver in ("euler", "dpmpp_2m", "dpmpp_2s_ancestral"):
        found, expected = (
            p.sample(named(solver), x, SIGMAS, {"teacher_scale": 0.4, "teacher_steps": 2})
            for p in (problem, alike)
        )
        assert relative(found, expected) <= 1e-11


# ------------------------------------------------------------------------------------ LCM


@pytest.mark.parametrize("settings", [{}, {"sigma_data": 1.3, "timestep_scaling": 0.02}])
def test_lcm_by_hand(settings):
    """At whole timesteps, in plain numbers: c_out D_ε + c_skip x_vp."""
    data_std, scaling = settings.get("sigma_data", 0.5), settings.get("timestep_scaling", 10.0)
    mean, variance = data()
    alphas = alphas_cumprod()
    model = LCMDenoiser(eps_model(), **settings)
    for t in (0, 1, 250, 999):
        sigma = math.sqrt((1 - float(alphas[t])) / float(alphas[t]))
        x, levels = points(sigma)
        denoised = (variance * x + sigma**2 * mean) / (variance + sigma**2)
        norm = (scaling * t) ** 2 + data_std**2
        c_out, c_skip = scaling * t / math.sqrt(norm), data_std**2 / norm
        expected = c_out * denoised + c_skip * math.sqrt(float(alphas[t])) * x
        assert relative(model(x, levels), expected) <= 1e-12


def test_lcm_at_its_boundary():
    """At the first timestep the model is the VP latent, and so it is below; at σ = 0 it is x."""
    model = LCMDenoiser(eps_model())
    lowest = float(model.sigma_min)
    for sigma in (lowest, lowest / 10, 0.0):
        x, levels = points(sigma)
        assert relative(model(x, levels), x / math.sqrt(1 + sigma**2)) <= 1e-9
    x, levels = points(5.0)
    assert relative(model(x, levels), Gaussian(*data())(x, levels)) < 1e-3  # far from it: D_ε


def test_lcm_has_the_schedule_of_its_network():
    """k-diffusion's scripts ask the model for its levels; a copy is still such a model."""
    inner = eps_model()
    model = copy.deepcopy(LCMDenoiser(inner))
    assert torch.equal(model.get_sigmas(4), inner.get_sigmas(4))
    assert model.sigma_max == inner.sigma_max and model.sigma_min == inner.sigma_min
    assert not getattr(model, "flow", False)
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018
    assert set(model.state_dict()) == {f"denoiser.{key}" for key in inner.state_dict()}


def test_lcm_samples_with_its_teacher():
    """As a student under CFG, against the loop written out."""
    problem = Problem(student=LCMDenoiser(eps_model()), teacher=timed_x0_model(5))
    x = problem.start(SIGMAS)
    guidance = {"teacher_scale": 0.3, "renoise_eta": 0.0}
    found = problem.sample(named("euler"), x, SIGMAS, guidance)
    for i, (sigma, sigma_next) in enumerate(zip(SIGMAS.tolist(), SIGMAS.tolist()[1:])):
        estimate = problem.estimate(x, sigma)
        noise = (x - estimate) / sigma
        if i == 0:
            taught = problem.teacher_estimate(estimate + sigma_next * noise, sigma_next)
            estimate = estimate + 0.3 * (taught - estimate)
        x = estimate + sigma_next * noise
    assert relative(found, x) <= 1e-12


# ----------------------------------------------------------------------------------- flow


def test_flow_is_exact_from_noise_to_data():
    """Natively, τ = 1 and τ = 0 too, where the VE form has σ = ∞ and the mean, and x itself."""
    tau = torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64)
    x = seeded(BATCH, *SHAPE, seed=41)
    mean, variance = data()
    a, b = column(1 - tau), column(tau)
    expected = (a * variance * x + b**2 * mean) / (a**2 * variance + b**2)
    for model in (flow_model(), flow_model(1000.0)):
        assert model.flow is True
        found = model(x, tau)
        assert relative(found, expected) <= 1e-12
        assert relative(found[0], mean) <= 1e-12 and relative(found[2], x[2]) <= 1e-12


def test_there_and_back():
    """as_flow undoes as_ve and as_ve as_flow, up to rounding."""
    flow, ve = flow_model(), Gaussian(*data())
    x = seeded(BATCH, *SHAPE, seed=42)
    tau = torch.tensor([0.999, 0.5, 0.0], dtype=torch.float64)
    assert relative(as_flow(as_ve(flow))(x, tau), flow(x, tau)) <= 1e-12
    x, sigma = points(100.0, 1.0, 0.0)
    assert relative(as_ve(as_flow(ve))(x, sigma), ve(x, sigma)) <= 1e-12
    assert as_flow(ve).flow is True and not getattr(as_ve(flow), "flow", False)


def test_as_flow_of_a_ve_model_of_limited_range():
    """Below the top it is exact; above, the model is asked at σ_max for x_f/τ·σ_max."""
    inner = Counted(eps_model())
    for model, top in (
        (as_flow(inner, sigma_max=2.0), 2.0),
        (as_flow(external.VDenoiser(Exact(cosine, v))), 1e4),
        (as_flow(eps_model()), float(eps_model().sigma_max)),
        (as_flow(LCMDenoiser(eps_model())), float(eps_model().sigma_max)),
    ):
        ve = model.denoiser
        edge = top / (1 + top)
        tau = torch.tensor([0.5 * edge, 1 - 0.5 * (1 - edge), 1.0], dtype=torch.float64)
        x = seeded(BATCH, *SHAPE, seed=43)
        found = model(x, tau)
        sigma = torch.tensor([0.5 * edge / (1 - 0.5 * edge), top, top], dtype=torch.float64)
        factor = torch.stack((1 / (1 - tau[0]), top / tau[1], top / tau[2]))
        expected = ve(column(factor) * x, sigma)
        assert found.isfinite().all() and relative(found, expected) <= 1e-11
    # The sample at τ = 1 was pure noise of the top level.
    torch.testing.assert_close(inner.calls[0].x[2], 2.0 * x[2])
    torch.testing.assert_close(inner.calls[0].sigma[1:], torch.full_like(tau[1:], 2.0))


def test_as_flow_is_continuous_where_the_clamp_begins():
    """A millionth to either side of the edge, no jump."""
    model = as_flow(Gaussian(*data()), sigma_max=3.0)
    x = seeded(1, *SHAPE, seed=44)
    below, above = (
        model(x, torch.tensor([tau], dtype=torch.float64)) for tau in (0.75 - 1e-9, 0.75 + 1e-9)
    )
    assert relative(below, above) < 1e-7
    # Far above, the mean: nothing else is known of pure noise.
    model = as_flow(Gaussian(*data()))
    assert relative(model(x, torch.ones(1, dtype=torch.float64)), data()[0]) < 1e-3


def test_as_flow_leaves_float16_finite():
    """1e4² is no float16; a model that squares its σ, as k-diffusion's do, must not see it."""
    model = as_flow(external.VDenoiser(Exact(cosine, v)))
    x = seeded(BATCH, *SHAPE, seed=45)
    tau = torch.tensor([1.0, 0.995, 0.4], dtype=torch.float64)
    found = model(x.half(), tau.half())
    assert found.dtype == torch.float16
    assert relative(found, model(x, tau)) < 0.02


# -------------------------------------------------------------------- guidance as an input


class Guided(nn.Module):
    """A perfect student of guided distillation, which learnt its unconditional part."""

    def __init__(self, uncond, seed=0, argument="w", offset=1.0):
        super().__init__()
        self.plain = Gaussian(*data(seed))
        self.uncond, self.argument, self.offset = uncond, argument, offset
        self.seen = []

    def forward(self, x, sigma, cond, **weights):
        """Meng et al.: (1 + w) D_c - w D_∅, in one call."""
        (w,) = weights.values()
        assert list(weights) == [self.argument] and w.shape == sigma.shape and w.dtype == x.dtype
        self.seen.append((len(x), *w.tolist()))
        scale = column(w + self.offset)
        return torch.lerp(self.plain(x, sigma, self.uncond), self.plain(x, sigma, cond), scale)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_guidance_as_an_input_is_guidance(side):
    """On either side the run is that of the model under CFG; one call each, no second half."""
    plain = {"student": Gaussian(*data(0)), "teacher": Gaussian(*data(5))}
    expected = Problem(**plain)
    network = Guided(conditions(2)[1], seed={"student": 0, "teacher": 5}[side])
    conditioned = Problem(**(plain | {side: GuidanceConditioned(network)}))
    x = expected.start(SIGMAS)
    for solver in ("euler", "dpmpp_2m", "dpmpp_2s_ancestral"):
        del network.seen[:]
        found, reference = (
            p.sample(named(solver), x, SIGMAS, {"teacher_scale": 0.4, "teacher_steps": 2})
            for p in (conditioned, expected)
        )
        assert relative(found, reference) <= 1e-12
        # cond_scale is 2.5, teacher_cfg_scale 4; their w is one less.
        w = {"student": 1.5, "teacher": 3.0}[side]
        assert set(network.seen) == {(2, w, w)}
        if side == "teacher":
            assert len(network.seen) == 2
        elif solver == "euler":
            assert len(network.seen) == len(SIGMAS) - 1


def test_another_name_and_another_convention():
    """A network that takes the CFG scale itself, and one in flow form."""
    cond, uncond = conditions(BATCH)
    x, sigma = points(0.05, 0.7, 11.0)
    network = Guided(uncond, argument="guidance", offset=0.0)
    model = GuidanceConditioned(network, argument="guidance", offset=0)
    found = model(x, sigma, cond=cond, uncond=uncond, cond_scale=3)
    assert network.seen == [(3, 3.0, 3.0, 3.0)]
    one, none = (Gaussian(*data())(x, sigma, c) for c in (cond, uncond))
    assert relative(found, none + 3 * (one - none)) <= 1e-12

    def velocity_network(x, t, cond=None, w=None):
        return x * column(w)

    flow = GuidanceConditioned(FlowDenoiser(velocity_network))
    assert flow.flow is True and isinstance(flow, kdpp.OwnCFG)
    tau = torch.full((BATCH,), 0.25, dtype=torch.float64)
    assert relative(flow(x, tau, cond_scale=3.0), x * (1 - 0.25 * 2)) <= 1e-15


def test_a_w_conditioned_lcm():
    """The first published LCM: boundary scalings inside, the weight handed through them."""
    cond, uncond = conditions(BATCH)
    seen = []

    class Network(Exact):
        def apply_model(self, x, t, cond=None, w=None):
            seen.append(w.tolist())
            return self(x, t, cond)

    network = Network(discrete(alphas_cumprod()), epsilon)
    network.alphas_cumprod = alphas_cumprod()
    inner = LCMDenoiser(external.CompVisDenoiser(network).double())
    model = GuidanceConditioned(inner)
    x, sigma = points(0.05, 0.7, 11.0)
    found = model(x, sigma, cond=cond, uncond=uncond, cond_scale=8.0)
    assert seen == [[7.0] * 3]
    assert relative(found, LCMDenoiser(eps_model())(x, sigma, cond=cond)) <= 1e-12
    assert model.sigma_max == inner.sigma_max


def test_cfg_pp_refuses_guidance_as_an_input():
    """There is no unconditional estimate to take the direction from."""
    model = GuidanceConditioned(Guided(conditions(2)[1]))
    problem = Problem(student=model)
    x = problem.start(SIGMAS)
    for solver in ("euler_cfg_pp", "dpmpp_2m_cfg_pp"):
        with pytest.raises(ValueError, match=r"unconditional estimate.*uncond_denoised"):
            problem.sample(named(solver), x, SIGMAS, {})


def test_guidance_must_be_told():
    """Which scale was wanted cannot be guessed."""
    model = GuidanceConditioned(Guided(None))
    x, sigma = points(1.0)
    with pytest.raises(ValueError, match=r"extra_args\['cond_scale'\].*w = cond_scale \+ -1"):
        model(x, sigma, cond=conditions(1)[0])
    for scale in (None, True, math.nan, "3"):
        with pytest.raises(ValueError, match=r"cond_scale is .* finite number"):
            model(x, sigma, cond=conditions(1)[0], cond_scale=scale)


# --------------------------------------------------------------------- what all must hold


def weight_network(x, t, w):
    """Says x, a little less of it."""
    return 0.5 * x + 0.0 * column(w).to(x.dtype)


MODELS = {
    "LCM": lambda: LCMDenoiser(eps_model()),
    "x0": lambda: X0Denoiser(Exact(vp, clean)),
    "w": lambda: GuidanceConditioned(weight_network),
    "flow": flow_model,
    "as_ve": lambda: as_ve(flow_model()),
    "as_flow": lambda: as_flow(Gaussian(*data()), sigma_max=100.0),
    "as_flow, discrete": lambda: as_flow(eps_model()),
}
over_models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def given(make):
    """What a model needs beyond x and sigma."""
    return {"cond_scale": 2.0} if make is MODELS["w"] else {}


@over_models
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_kept(make, dtype):
    """In and out in x's dtype, and close to the answer in float64."""
    model, x = make(), seeded(BATCH, *SHAPE, seed=46)
    sigma = torch.tensor([0.75, 0.5, 0.125], dtype=torch.float64)  # exact in every dtype
    x = x.to(dtype).double()
    expected = model(x, sigma, **given(make))
    for levels in (sigma.to(dtype), sigma.float()):
        found = model.to(dtype)(x.to(dtype), levels, **given(make))
        assert found.dtype == dtype
        assert relative(found, expected) < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("wrap", [X0Denoiser, FlowDenoiser, as_flow])
def test_the_network_sees_the_dtype_of_x(wrap):
    """A network in 16 bits takes no float32, whatever the level comes in."""
    network = Counted(lambda x, t: x)
    x, sigma = seeded(BATCH, *SHAPE, seed=49).half(), torch.tensor([0.75, 0.5, 0.125])
    wrap(network)(x, sigma)
    if wrap is FlowDenoiser:
        as_ve(FlowDenoiser(network))(x, sigma)
    assert {call.x.dtype for call in network.calls} == {torch.float16}


def test_float16_does_not_overflow_inside():
    """LCM's 10 t, squared, and σ² of a high level are no float16."""
    x, sigma = points(14.0, 14.0, 14.0)
    model = LCMDenoiser(eps_model())
    assert relative(model(x.half(), sigma.half()), model(x, sigma)) < 0.02


@over_models
def test_no_value_is_read_on_the_host(make):
    """Tensors without values: whatever looked at one would raise."""
    model = make().to("meta")
    x, sigma = torch.empty(BATCH, *SHAPE, device="meta"), torch.empty(BATCH, device="meta")
    denoised = model(x, sigma, **given(make))
    assert denoised.shape == x.shape and denoised.device.type == "meta"


@over_models
def test_samples_do_not_mix(make):
    """A batch is its samples, each at its own level."""
    model, x = make(), seeded(BATCH, *SHAPE, seed=47)
    sigma = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    whole = model(x, sigma, **given(make))
    for i in range(BATCH):
        part = model(x[i : i + 1], sigma[i : i + 1], **given(make))
        torch.testing.assert_close(part[0], whole[i], rtol=1e-13, atol=1e-13)


def test_latents_of_other_shapes():
    """Vectors and videos: (batch, *shape) with any number of dimensions."""
    sigma = torch.tensor([0.9, 0.5], dtype=torch.float64)

    def network(x, t, **extra_args):
        return torch.tanh(x)

    kinds = (X0Denoiser(network), FlowDenoiser(network), as_ve(FlowDenoiser(network)))
    for model in (*kinds, as_flow(network)):
        for shape in ((2, 5), (2, 3, 2, 2, 2)):
            x = seeded(*shape, seed=48)
            found = model(x, sigma)
            one = model(x[1:], sigma[1:])
            assert found.shape == shape
            torch.testing.assert_close(found[1:], one)


# ------------------------------------------------------------------------------ bad input


def test_what_is_no_model_is_refused():
    """Each with its own error, when the model is made."""
    function = eps_model()
    for make in (LCMDenoiser, GuidanceConditioned, as_ve, as_flow, X0Denoiser, FlowDenoiser):
        with pytest.raises(TypeError, match=r"takes a (denoiser|network).* not 3"):
            make(3)
    with pytest.raises(TypeError, match=r"LCMDenoiser asks sigma_to_t .* function does not have"):
        LCMDenoiser(lambda x, sigma: x)
    with pytest.raises(TypeError, match="sigma_to_t is 1; it must be a function"):
        X0Denoiser(function, 1)
    for make in (LCMDenoiser, GuidanceConditioned, as_ve, as_flow):
        with pytest.raises(TypeError, match=r"does its own CFG\. .* inside it"):
            make(kdpp.OwnCFG(function))
    with pytest.raises(TypeError, match="as_ve takes a flow model, and CompVisDenoiser"):
        as_ve(function)
    for make in (as_flow, LCMDenoiser):
        with pytest.raises(TypeError, match="takes a VE denoiser, and FlowDenoiser is a flow"):
            make(flow_model())


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, True, "1", None])
def test_senseless_settings_are_refused(value):
    """By name."""
    function = eps_model()
    with pytest.raises(ValueError, match="sigma_data is"):
        LCMDenoiser(function, sigma_data=value)
    with pytest.raises(ValueError, match="timestep_scaling is"):
        LCMDenoiser(function, timestep_scaling=value)
    with pytest.raises(ValueError, match="time_scale is"):
        FlowDenoiser(function, time_scale=value)
    if value is not None:
        with pytest.raises(ValueError, match="sigma_max is"):
            as_flow(function, sigma_max=value)
    if value not in (0.0, -1.0):
        with pytest.raises(ValueError, match="offset is"):
            GuidanceConditioned(function, offset=value)
    with pytest.raises(ValueError, match="argument is"):
        GuidanceConditioned(function, argument=value if isinstance(value, str) else "two words")


# ----------------------------------------------------------------------------------- docs


def test_the_page_runs():
    """Every example of docs/models.md, one after the other, as a reader would type them."""
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) >= 4
    torch.manual_seed(0)
    variables = {}
    for example in examples:
        exec(compile(example, "docs/models.md", "exec"), variables)
    for name in kdpp.models.__all__:
        assert name in text, name
