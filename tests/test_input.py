"""Bad input is refused before any network is called, in words that name what was wrong."""

import math
import re

import pytest
import torch

import kdpp
import problems
from problems import (
    SHAPE,
    CFGDenoiser,
    Constant,
    Counted,
    NeverCalled,
    Problem,
    Tape,
    accepts,
    karras,
    mixture,
    run,
    seeded,
)

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
REFUSED = (TypeError, ValueError)
SIGMAS = karras(4)


def untouchable(**options):
    """A wrapper whose networks fail the test when they are called."""
    options.setdefault("teacher_cfg_scale", 1.0)
    return kdpp.TeacherGuidedDenoiser(NeverCalled(), NeverCalled(), **options)


def says(error, *words):
    """Asserts that an error's message holds all of the words, in any case."""
    message = str(error.value).lower()
    missing = [word for word in words if word.lower() not in message]
    assert not missing, f"{missing} not in {error.value}"


def conditions():
    """Tensors for cond and uncond, so that nothing but the input under test is wrong."""
    return {"cond": seeded(2, 3, seed=1), "uncond": seeded(2, 3, seed=2)}


BAD_SIGMAS = {
    "two dimensions": (torch.tensor([[3.0, 1.0, 0.0]]), "1-d"),
    "a scalar": (torch.tensor(3.0), "1-d"),
    "increasing": (torch.tensor([1.0, 3.0, 0.0]), "increas"),
    "increasing at the end": (torch.tensor([3.0, 1.0, 1.5]), "increas"),
    "nan": (torch.tensor([3.0, math.nan, 0.0]), "nan"),
    "nan first": (torch.tensor([math.nan, 1.0, 0.0]), "nan"),
    "nan last": (torch.tensor([3.0, 1.0, math.nan]), "nan"),
    "infinite": (torch.tensor([math.inf, 1.0, 0.0]), "inf"),
    "negative": (torch.tensor([3.0, 1.0, -1.0]), "-1"),
    "a single nan": (torch.tensor([math.nan]), "nan"),
    "a single negative": (torch.tensor([-2.0]), "-2"),
}


@pytest.mark.parametrize(("sigmas", "given"), BAD_SIGMAS.values(), ids=BAD_SIGMAS)
@over_solvers
def test_bad_sigmas(solver, sigmas, given):
    """Sigmas that are not 1-D, increase, or hold NaN, inf or negatives."""
    x = seeded(2, *SHAPE, seed=1)
    with pytest.raises(REFUSED) as error:
        run(solver, untouchable(), x, sigmas, extra_args=conditions())
    says(error, "sigmas")
    assert given in str(error.value).lower().replace("1d", "1-d").replace("one-d", "1-d")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
@over_solvers
def test_an_integer_latent(solver, dtype):
    """A latent that cannot hold an image."""
    with pytest.raises(REFUSED) as error:
        run(solver, untouchable(), torch.ones(2, *SHAPE, dtype=dtype), SIGMAS)
    says(error, "x", str(dtype).removeprefix("torch."), "float")


BAD_SETTINGS = {
    "scale above 1": ("teacher_scale", 1.1),
    "scale below 0": ("teacher_scale", -0.1),
    "scale nan": ("teacher_scale", math.nan),
    "scale inf": ("teacher_scale", math.inf),
    "steps negative": ("teacher_steps", -1),
    "eta above 1": ("renoise_eta", 1.5),
    "eta below 0": ("renoise_eta", -0.5),
    "eta nan": ("renoise_eta", math.nan),
    "unknown renoise": ("renoise", "previous"),
    "renoise negative": ("renoise", -1.0),
    "renoise zero": ("renoise", 0.0),
    "renoise nan": ("renoise", math.nan),
    "renoise inf": ("renoise", math.inf),
    "renoise none": ("renoise", None),
}


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_of_the_wrapper(name, value):
    """λ, k, the share of fresh noise and the renoise level, at construction."""
    with pytest.raises(REFUSED) as error:
        untouchable(**{name: value})
    says(error, name, str(value))


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("teacher_scale", ["0", "1"]), ("renoise_eta", ["0", "1"]), ("renoise", ["next", "current"])],
)
def test_what_is_allowed_is_said(name, allowed):
    """The message tells the range or the choices."""
    with pytest.raises(REFUSED) as error:
        untouchable(**{name: "sideways" if name == "renoise" else -7.25})
    says(error, *allowed)


@pytest.mark.parametrize("settings", [{"teacher_scale": 0}, {"teacher_scale": 1}, {}], ids=str)
def test_the_ends_of_the_ranges_are_allowed(settings):
    """0 and 1 are inside, as floats or as integers."""
    untouchable(**settings, teacher_steps=0, renoise_eta=0)
    untouchable(**settings, teacher_steps=99, renoise_eta=1, renoise="current")
    untouchable(**settings, renoise=2)


# ------------------------------------------------------------------------- the model


@pytest.mark.parametrize("model", [NeverCalled(), lambda x, sigma: x], ids=["module", "function"])
@over_solvers
def test_a_plain_model(solver, model):
    """A model that is no kdpp wrapper: a TypeError that says how to make one."""
    with pytest.raises(TypeError) as error:
        run(solver, model, seeded(2, *SHAPE, seed=1), SIGMAS)
    says(error, "TeacherGuidedDenoiser", "student", "teacher")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_own_cfg_must_be_marked(role):
    """A denoiser with `uncond` and `cond_scale` of its own is not guessed about."""
    networks = {"student": NeverCalled(), "teacher": NeverCalled()}
    networks[role] = CFGDenoiser(NeverCalled())
    with pytest.raises(TypeError) as error:
        kdpp.TeacherGuidedDenoiser(**networks)
    says(error, role, "kdpp.OwnCFG")


def test_an_own_cfg_function_must_be_marked_too():
    """The same for a function with such parameters."""
    with pytest.raises(TypeError, match="OwnCFG"):
        kdpp.TeacherGuidedDenoiser(lambda x, sigma, uncond, cond, cond_scale: x, NeverCalled())


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_what_cannot_be_called(role):
    """A denoiser that is no callable."""
    networks = {
        "student": NeverCalled(),
        "teacher": NeverCalled(),
        role: "a checkpoint.safetensors",
    }
    with pytest.raises(TypeError) as error:
        kdpp.TeacherGuidedDenoiser(**networks)
    says(error, role)


# ------------------------------------------------------------------------- uncond


@over_solvers
def test_the_students_cfg_needs_uncond(solver):
    """cond_scale other than 1 without uncond: never zeros in its place."""
    extra = {"cond": seeded(2, 3, seed=1), "cond_scale": 3.0}
    with pytest.raises(ValueError) as error:
        run(solver, untouchable(), seeded(2, *SHAPE, seed=1), SIGMAS, extra_args=extra)
    says(error, "uncond", "3")


@over_solvers
def test_the_teachers_cfg_needs_uncond(solver):
    """A teacher that will be called with a CFG scale other than 1 needs it too."""
    model = untouchable(teacher_cfg_scale=7.5)
    extra = {"cond": seeded(2, 3, seed=1)}
    with pytest.raises(ValueError) as error:
        run(solver, model, seeded(2, *SHAPE, seed=1), SIGMAS, extra_args=extra)
    says(error, "uncond")


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s.cfg_pp], ids=lambda s: s.name)
def test_cfg_plus_plus_needs_uncond(solver):
    """CFG++ follows the unconditional estimate: no uncond, no run, even at cond_scale 1."""
    extra = {"cond": seeded(2, 3, seed=1)}
    model = untouchable(teacher_scale=0.0)
    with pytest.raises(ValueError) as error:
        run(solver, model, seeded(2, *SHAPE, seed=1), SIGMAS, extra_args=extra)
    says(error, "uncond", "CFG++")


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s.cfg_pp], ids=lambda s: s.name)
def test_cfg_plus_plus_needs_an_own_cfgs_unconditional_estimate(solver):
    """A student with its own CFG must hand that estimate over, or is refused."""
    student = kdpp.OwnCFG(CFGDenoiser(NeverCalled()))
    model = kdpp.TeacherGuidedDenoiser(student, NeverCalled(), teacher_cfg_scale=1.0)
    extra = {**conditions(), "cond_scale": 2.0}
    with pytest.raises(ValueError) as error:
        run(solver, model, seeded(2, *SHAPE, seed=1), SIGMAS, extra_args=extra)
    says(error, "uncond_denoised", "CFG++")


@pytest.mark.parametrize("solver", [s for s in SOLVERS if not s.cfg_pp], ids=lambda s: s.name)
@pytest.mark.parametrize("off", [{"teacher_scale": 0.0}, {"teacher_steps": 0}], ids=str)
def test_nothing_is_missed_where_nothing_needs_it(solver, off):
    """No CFG and no teacher call: no uncond is asked for, nor any condition."""
    problem = Problem()
    model = kdpp.TeacherGuidedDenoiser(problem.student, NeverCalled(), **off)
    x = problem.start(SIGMAS)
    assert run(solver, model, x, SIGMAS).isfinite().all()
    assert run(solver, model, x, SIGMAS, extra_args={"cond": seeded(2, 3, seed=1)}).isfinite().all()


def test_calling_the_wrapper_needs_uncond_as_sampling_does():
    """The wrapper called directly, as stock samplers call it."""
    x, sigma = seeded(2, *SHAPE, seed=1), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="uncond"):
        untouchable()(x, sigma, cond=seeded(2, 3, seed=1), cond_scale=2.0)


@over_solvers
def test_uncond_is_handed_over_as_it_is(solver):
    """What the networks see as uncond is what was given, not zeros."""
    problem = Problem()
    problem.student, problem.teacher = Counted(mixture(0)), Counted(mixture(1))
    run(solver, problem.guided(), problem.start(SIGMAS), SIGMAS, extra_args=problem.extra_args)
    for network in (problem.student, problem.teacher):
        assert network.calls
        for call in network.calls:
            halves = call.extra["cond"].chunk(2)
            assert any(torch.equal(half, problem.extra_args["uncond"]) for half in halves)
            assert any(torch.equal(half, problem.extra_args["cond"]) for half in halves)


# ------------------------------------------------------------------------- shapes


def wrong_shape(x, sigma, cond=None):
    """A denoiser with one channel too many."""
    return torch.cat([x, x[:, :1]], 1)


def too_small(x, sigma, cond=None):
    """A denoiser whose output would broadcast without a word."""
    return x[:, :1].clone()


@pytest.mark.parametrize("network", [wrong_shape, too_small])
@pytest.mark.parametrize("role", ["student", "teacher"])
@over_solvers
def test_an_output_of_another_shape(solver, role, network):
    """The first call that shows it says whose output it is, and both shapes."""
    networks = {"student": mixture(0), "teacher": mixture(1), role: network}
    model = kdpp.TeacherGuidedDenoiser(**networks, teacher_cfg_scale=2.0)
    extra = {**conditions(), "cond_scale": 2.0}
    with pytest.raises(REFUSED) as error:
        run(solver, model, seeded(2, *SHAPE, seed=1), SIGMAS, extra_args=extra)
    says(error, role, "shape", *("2, 2",))
    assert ("student" in str(error.value)) == (role == "student")


def test_an_output_of_another_shape_in_a_stock_sampler():
    """Calling the wrapper checks the student's output too."""
    model = kdpp.TeacherGuidedDenoiser(too_small, mixture(1))
    with pytest.raises(REFUSED, match="student"):
        model(seeded(2, *SHAPE, seed=1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(1, *SHAPE), (2, 1, 2, 2), (2, 3, 2, 3), ()], ids=str)
@over_solvers
def test_renoise_noise_of_another_shape(solver, shape):
    """Also where it would broadcast."""
    model = Problem().guided(renoise_noise_sampler=lambda *_: torch.zeros(shape))
    problem = Problem()
    with pytest.raises(REFUSED) as error:
        run(solver, model, problem.start(SIGMAS), SIGMAS, extra_args=problem.extra_args)
    says(error, "renoise_noise_sampler", "shape")


@pytest.mark.parametrize("shape", [(1, *SHAPE), (2, 1, 2, 2), (2, 3, 2, 3), ()], ids=str)
@pytest.mark.parametrize(
    "solver", [s for s in SOLVERS if accepts(s, "noise_sampler")], ids=lambda s: s.name
)
def test_solver_noise_of_another_shape(solver, shape):
    """The same for the solver's own noise sampler."""
    problem = Problem()
    noise = {"noise_sampler": lambda *_: torch.zeros(shape)}
    with pytest.raises(REFUSED) as error:
        run(
            solver,
            problem.guided(),
            problem.start(SIGMAS),
            SIGMAS,
            extra_args=problem.extra_args,
            **noise,
        )
    assert re.search(r"(?<!renoise_)noise_sampler", str(error.value))
    says(error, "shape")


@over_solvers
def test_the_first_call_that_shows_it(solver):
    """A teacher of the wrong shape is found at its first call, not before, not after."""
    student, teacher = Counted(mixture(0)), Counted(wrong_shape)
    model = kdpp.TeacherGuidedDenoiser(student, teacher, teacher_cfg_scale=1.0, teacher_steps=3)
    with pytest.raises(REFUSED):
        run(solver, model, seeded(2, *SHAPE, seed=1), SIGMAS, extra_args=conditions())
    assert len(teacher.calls) == 1
    assert len(student.calls) == problems.counts(solver, SIGMAS)[0]


@over_solvers
@pytest.mark.parametrize("sigmas", [torch.tensor([]), torch.tensor([3.0])], ids=["none", "one"])
def test_one_sigma_or_none(solver, sigmas):
    """Nothing to do: the latent comes back, and the networks rest."""
    x = seeded(2, *SHAPE, seed=1)
    assert torch.equal(run(solver, untouchable(), x, sigmas, extra_args=conditions()), x)


@over_solvers
def test_equal_neighbours_are_allowed(solver):
    """Equal sigmas are steps of no length, not an increase."""
    model = Constant(seeded(*SHAPE, seed=3))
    wrapper = kdpp.TeacherGuidedDenoiser(model, model, teacher_cfg_scale=1.0)
    sigmas, x = torch.tensor([3.0, 3.0, 1.0, 1.0, 0.0]), seeded(2, *SHAPE, seed=1)
    assert run(solver, wrapper, x, sigmas, extra_args=conditions()).isfinite().all()


@over_solvers
def test_a_noise_sampler_that_is_none_is_the_default(solver):
    """noise_sampler=None means the default one, as in k-diffusion."""
    problem = Problem()
    x = problem.start(SIGMAS)
    found = [run_seeded(solver, problem, x, **o) for o in ({}, {"noise_sampler": None})]
    assert torch.equal(*found)


def run_seeded(solver, problem, x, **options):
    """A run from a fixed global seed."""
    torch.manual_seed(61)
    model = problem.guided(renoise_noise_sampler=Tape(x, 1))
    return run(solver, model, x, SIGMAS, extra_args=problem.extra_args, **options)
