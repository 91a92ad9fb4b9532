"""DPM-Solver with steps of its own choosing: k-diffusion's run, and a teacher in steps taken."""

import math

import pytest
import torch

import golden
import kdpp
import needs
from kdpp import NoiseRange, Teacher, TeacherGuidedDenoiser
from problems import (
    SHAPE,
    CFGDenoiser,
    Counted,
    NeverCalled,
    Problem,
    Tape,
    gaussian,
    mixture,
    relative,
    seeded,
)
from test_dpm_fast import float64 as float64

LOW, HIGH = 0.05, 12.0
PROBLEM = Problem()
X = HIGH * seeded(2, *SHAPE, seed=9)
OFF = {"teacher_scale": 0.0}


def sample(model, low=LOW, high=HIGH, extra_args=PROBLEM.extra_args, x=X, **options):
    """One run from the same latent, with noise by the number of the call."""
    options.setdefault("noise_sampler", Tape(x, 5))
    return kdpp.sample_dpm_adaptive_tg(model, x, low, high, extra_args, disable=True, **options)


def guided(**settings):
    """The problem's pair; the renoise noise is by the number of the call."""
    return PROBLEM.guided(renoise_noise_sampler=Tape(X, 6), **settings)


def k_diffusions(**options):
    """Its own sampler over a script's CFGDenoiser."""
    model, extra_args = CFGDenoiser(PROBLEM.student), PROBLEM.extra_args
    options = {"noise_sampler": Tape(X, 5), "return_info": True, **options}
    return needs.k_sampling.sample_dpm_adaptive(
        model, X, LOW, HIGH, extra_args, disable=True, **options
    )


SETTINGS = [
    {},
    {"order": 2},
    {"rtol": 0.005, "atol": 0.001},
    {"h_init": 3.0, "accept_safety": 0.95},
    {"pcoeff": 0.2, "icoeff": 0.6, "dcoeff": 0.1},
    {"order": 2, "pcoeff": 0.2, "dcoeff": 0.1, "rtol": 0.01, "h_init": 2.0},
    {"eta": 1.0},
    {"eta": 0.4, "s_noise": 0.9, "order": 2},
]


@needs.k_diffusion
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_it_is_k_diffusions(options, float64):
    """λ = 0: the same steps, taken and not, and the same picture to 1e-12.

    With noise to 1e-8: a rounding of a step's length moves all noise after it.
    """
    expected, steps = k_diffusions(**options)
    found, info = sample(guided(**OFF), return_info=True, **options)
    assert relative(found, expected) <= (1e-8 if "eta" in options else 1e-12)
    spared = info["n_reject"]  # the estimate at x is kept when a step is not taken
    assert info == {**steps, "nfe": steps["nfe"] - spared}


def test_steps_are_thrown_away_somewhere():
    """Else the counts above would say nothing of it."""
    assert sample(guided(**OFF), h_init=3.0, return_info=True)[1]["n_reject"] > 0


@needs.k_diffusion
@pytest.mark.parametrize("options", SETTINGS[3:5], ids=str)
def test_the_callback_is_k_diffusions(options, float64):
    """The same keys for every step that was tried, the same numbers under them."""
    told, its = [], []
    sample(guided(**OFF), callback=told.append, **options)
    k_diffusions(callback=its.append, **options)
    assert len(told) == len(its)
    for info, expected in zip(told, its):
        assert set(info) == set(expected)
        for name in set(info) - {"nfe"}:
            found, wanted = torch.as_tensor(info[name]), torch.as_tensor(expected[name])
            assert torch.allclose(found.double(), wanted.double(), rtol=1e-11, atol=1e-11), name


@pytest.mark.parametrize("order", [2, 3])
def test_the_error_follows_the_tolerance(order):
    """On a Gaussian, whose solution is known."""
    data = gaussian(0)
    model = TeacherGuidedDenoiser(data, data, **OFF)
    exact = data.solution(X, HIGH, LOW)
    loose, tight = (
        relative(sample(model, extra_args=None, order=order, rtol=r, atol=r / 10), exact)
        for r in (0.05, 0.0005)
    )
    assert tight < loose / 10 and loose < 0.05


def test_a_flow_models_run_over_tau_is_that_of_its_own_state():
    """From τ = 1, with -log τ for the time and z for the state: the low solution, too."""
    student = golden.Flow(mixture(0))
    model = TeacherGuidedDenoiser(student, student, **OFF)
    z = seeded(2, *SHAPE, seed=9)
    found = sample(model, 0.05, 1.0, {"cond": None}, z, variable="tau", rtol=0.01)
    own = TeacherGuidedDenoiser(student, student, flow=False, **OFF)
    expected = sample(own, 0.05, 1.0, {"cond": None}, z, rtol=0.01)
    assert relative(found, expected) <= 1e-12


def test_a_flow_model_over_sigma_is_its_ve_form():
    """To the tolerance: the error is weighed in the model's own state."""
    flow = TeacherGuidedDenoiser(golden.Flow(mixture(0)), golden.Flow(mixture(0)), **OFF)
    ve = TeacherGuidedDenoiser(mixture(0), mixture(0), **OFF)
    low, high = (level / (1 + level) for level in (LOW, HIGH))
    tight = {"rtol": 1e-5, "atol": 1e-6}
    found = sample(flow, low, high, {"cond": None}, X / (1 + HIGH), **tight)
    expected = sample(ve, LOW, HIGH, {"cond": None}, **tight) / (1 + LOW)
    assert relative(found, expected) <= 1e-4
    with pytest.raises(ValueError, match=r'sigma_max is τ = 1.*variable="tau"'):
        sample(flow, low, 1.0, {"cond": None}, X)


# ------------------------------------------------------------------------- guided


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("k", [0, 1, 3, 999])
def test_the_teacher_is_asked_in_the_first_steps_taken(order, k):
    """Once each, at the level that the step has reached; in a step that was tried, never."""
    problem, told = Problem(teacher=Counted(mixture(1))), []
    model = problem.guided(teacher_scale=0.2, teacher_steps=k)
    _, info = sample(
        model, order=order, h_init=3.0, callback=told.append, return_info=True, rtol=0.02
    )
    assert info["n_reject"] > 0
    calls = problem.teacher.calls
    assert len(calls) == min(k, info["n_accept"])
    guided_steps = [i for i, one in enumerate(told) if "denoised_teacher" in one]
    assert len(guided_steps) == len(calls)
    for place, call in zip(guided_steps, calls):
        assert float(call.sigma[0]) == pytest.approx(float(told[place]["sigma"]))


def test_the_controller_sees_the_student_alone():
    """A first step has the same error and length whatever λ is; its end moves by λ (x̂_ψ - x̂)."""
    heard = {}
    for scale in (0.0, 0.5, 1.0):
        heard[scale] = []
        model = guided(teacher_scale=scale, teacher_steps=1)
        sample(model, callback=heard[scale].append)
    first = {scale: told[0] for scale, told in heard.items()}
    assert first[0.0]["h"] == first[1.0]["h"] and first[0.0]["error"] == first[1.0]["error"]
    moved = first[1.0]["denoised_teacher"] - first[1.0]["denoised_student"]
    for scale in (0.5, 1.0):
        assert relative(first[scale]["x"], first[0.0]["x"] + scale * moved) <= 1e-12
    assert relative(heard[1.0][-1]["x"], heard[0.0][-1]["x"]) > 1e-3


def test_steps_may_be_chosen_by_number_or_by_level():
    """Counted as they are taken; a number beyond the last one is no step."""
    for steps, expected in (({0, 2}, [0, 2]), ({2, 10**6}, [2]), (NoiseRange(1.0, 4.0), None)):
        told = []
        sample(guided(teacher_steps=steps), callback=told.append)
        taken = [one for one, before in zip(told, [None, *told]) if is_taken(one, before)]
        starts = [HIGH, *(float(one["sigma"]) for one in taken)]
        if expected is None:
            expected = [i for i, level in enumerate(starts[:-1]) if 1.0 <= level <= 4.0]
            assert expected
        assert [i for i, one in enumerate(taken) if "denoised_teacher" in one] == expected


def is_taken(info, before):
    """Whether a step that was tried was taken."""
    return info["n_accept"] > (before["n_accept"] if before else 0)


def test_several_teachers_a_mask_and_a_function_of_the_step():
    """As in every other sampler; the function is told the step's number."""
    numbers = []

    def scale(i, sigma):
        numbers.append(i)
        return 0.1

    teachers = [Teacher(mixture(1), scale, 3, 2.0, draws=2), Teacher(mixture(2), 0.2, 1, 1.0)]
    mask = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    model = TeacherGuidedDenoiser(PROBLEM.student, teachers, teacher_mask=mask)
    told = []
    sample(model, callback=told.append)
    assert {*numbers} == {0, 1, 2}
    assert len(told[0]["denoised_teacher"]) == 3 and len(told[1]["denoised_teacher"]) == 2
    plain = []
    sample(guided(**OFF), callback=plain.append)
    moved = (told[0]["x"] - plain[0]["x"]).abs()
    assert moved[..., 0, :].max() < 1e-12 and moved[..., 1, :].min() > 1e-6


def test_a_borrowed_teacher_leaves_after_its_step():
    """It is there for a step that was taken, and for none that was tried."""
    here = []

    class Watched(kdpp.Borrowed):
        def fetch(self):
            here.append("comes")
            super().fetch()

        def release(self):
            here.append("leaves")
            super().release()

    teacher = Watched(mixture(1), device="cpu")
    model = TeacherGuidedDenoiser(PROBLEM.student, teacher, teacher_steps=2, teacher_cfg_scale=1.0)
    found = sample(model, h_init=3.0)
    plain = TeacherGuidedDenoiser(
        PROBLEM.student, mixture(1), teacher_steps=2, teacher_cfg_scale=1.0
    )
    assert "comes" in here and here[-1] == "leaves"
    assert torch.equal(found, sample(plain, h_init=3.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_latent_keeps_its_dtype(dtype):
    """16-bit latents have a float32 state; no noise is drawn at η = 0."""
    model = TeacherGuidedDenoiser(
        lambda x, sigma: 0.3 * x, lambda x, sigma: 0.2 * x, teacher_cfg_scale=1.0
    )
    before, told = torch.get_rng_state(), []
    found = sample(model, extra_args=None, x=X.to(dtype), callback=told.append, noise_sampler=None)
    assert found.dtype == dtype and found.isfinite().all()
    assert told[0]["x"].dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)


def test_levels_may_be_tensors_and_equal():
    """As hosts take them from a model's schedule; nothing to do is nothing done."""
    levels = torch.tensor([LOW, HIGH], dtype=torch.float64)
    assert torch.equal(sample(guided(), *levels), sample(guided()))
    untouchable = TeacherGuidedDenoiser(NeverCalled(), NeverCalled())
    found, info = sample(untouchable, HIGH, HIGH, return_info=True)
    assert torch.equal(found, X) and info["steps"] == 0


# ------------------------------------------------------------------------- bad input

BAD = {
    "order": [1, 4, 2.5],
    "rtol": [0.0, -1.0, math.nan],
    "atol": [0.0, math.inf],
    "h_init": [0.0, -0.05],
    "accept_safety": [0.0],
    "eta": [-1.0],
    "s_noise": [-0.1],
    "variable": ["t"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs], ids=str)
def test_options_out_of_their_range(name, value):
    """Before any call, with what is allowed."""
    model = TeacherGuidedDenoiser(NeverCalled(), NeverCalled())
    with pytest.raises(ValueError, match=f"^{name} is .*; it must be "):
        sample(model, **{name: value})


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.0, 1.0), (0.1, math.inf), (-1.0, 2.0)])
def test_levels_out_of_order(low, high):
    model = TeacherGuidedDenoiser(NeverCalled(), NeverCalled())
    with pytest.raises(ValueError, match="0 < sigma_min ≤ sigma_max < inf"):
        sample(model, low, high)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_scale": [0.1, 0.2]}, r"teacher_scale is a list of 2 numbers.*function of"),
        ({"teacher_steps": [0, -1]}, r"teacher_steps holds -1.*NoiseRange"),
    ],
)
def test_what_needs_the_number_of_steps_is_refused(settings, message):
    model = TeacherGuidedDenoiser(NeverCalled(), NeverCalled(), **settings)
    with pytest.raises(ValueError, match=message):
        sample(model)
    with pytest.raises(TypeError, match="wrap it"):
        sample(NeverCalled())


def test_a_run_that_would_not_end_ends():
    """Estimates that are not finite, or jump at every call."""

    def jumping(x, sigma):
        jumping.sign = -jumping.sign
        return jumping.sign * 1e9 * torch.ones_like(x)

    jumping.sign = 1.0
    for student, message in ((jumping, "no step is short enough"), (broken, "not finite")):
        model = TeacherGuidedDenoiser(student, student, **OFF)
        with pytest.raises(ValueError, match=f"at σ = .*{message}|{message}"):
            sample(model, extra_args=None)


def broken(x, sigma):
    return x / 0.0
