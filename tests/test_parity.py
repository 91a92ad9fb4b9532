"""Every solver against k-diffusion, the DPM-Solver++ paper and method-by-method references."""

import inspect

import pytest
import torch

import kdpp
import needs
import problems
import reference
import references
from problems import (
    SCHEDULES,
    Echo,
    Problem,
    Tape,
    accepts,
    cancels,
    gaussian,
    growth,
    karras,
    relative,
    run,
)

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
GUIDANCE_OFF = {
    "scale 0": {"teacher_scale": 0.0, "teacher_steps": 3},
    "no steps": {"teacher_scale": 0.7, "teacher_steps": 0},
}
CHURN = [
    {"s_churn": 2.0},
    {"s_churn": 40.0, "s_noise": 1.007},
    {"s_churn": 4.0, "s_tmin": 0.3, "s_tmax": 8.0},
    {"s_churn": 4.0, "s_tmin": 20.0},
    {"s_churn": 4.0, "s_tmin": float(SCHEDULES["karras"][2]), "s_tmax": 14.6146},
]
ANCESTRAL = [
    {"eta": 0.0},
    {"eta": 0.5},
    {"eta": 1.0},
    {"eta": 1.0, "s_noise": 0.9},
    {"eta": 1.7},
]


def variants(solver):
    """The settings of a solver's own parameters that the tests run through."""
    churn = CHURN if accepts(solver, "s_churn") else []
    ancestral = ANCESTRAL if accepts(solver, "eta") else []
    if solver.name == "dpm_2_ancestral":  # where σ_down = 0 k-diffusion adds no noise
        ancestral = ANCESTRAL[:-1]
    own = []
    for name, option in solver.options.items():
        if name not in {**ANCESTRAL[-1], **CHURN[2], **CHURN[1]}:
            words = option.choices and accepts(solver, "eta")
            etas = [{"eta": eta} for eta in (0.0, 0.5, 1.0)] if words else [{}]
            own += [{name: value, **eta} for value in other_values(option) for eta in etas]
    return [{}, *churn, *ancestral, *own]


def other_values(option):
    """Words or whole numbers beside the default, or one number inside the range."""
    if option.choices:
        return [choice for choice in option.choices if choice != option.default]
    if isinstance(option.default, int):
        whole = range(int(option.low), int(option.high) + 1)
        return [number for number in whole if number != option.default]
    return [option.low + 0.6 * (option.high - option.low)]


def name_of(parameter):
    """A readable test id."""
    return getattr(parameter, "name", None) or (str(parameter) if parameter != {} else "default")


IN_K_DIFFUSION = [s for s in SOLVERS if needs.namesake(s) is not None]
EVERY_VARIANT = [(solver, options) for solver in SOLVERS for options in variants(solver)]
K_DIFFUSIONS = [
    (solver, options)
    for solver, options in EVERY_VARIANT
    if solver in IN_K_DIFFUSION
    and set(options) <= set(inspect.signature(needs.namesake(solver)).parameters)
]
over_k_diffusion = pytest.mark.parametrize(("solver", "options"), K_DIFFUSIONS, ids=name_of)
over_everything = pytest.mark.parametrize(("solver", "options"), EVERY_VARIANT, ids=name_of)
over_schedules = pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)


def k_diffusion(solver, problem, x, sigmas, **options):
    """k-diffusion's sampler of the same name on the student alone."""
    scale = problem.extra_args["cond_scale"]

    def model(x, sigma, cond, uncond, cond_scale):
        free = problem.student(x, sigma, cond=uncond)
        return free + scale * (problem.student(x, sigma, cond=cond) - free)

    sample = needs.namesake(solver)
    try:
        return sample(model, x, sigmas, extra_args=problem.extra_args, disable=True, **options)
    except UnboundLocalError:
        return pytest.skip("k-diffusion's own sampler fails on a single step to 0")


@needs.k_diffusion
def test_every_solver_has_something_to_be_compared_with():
    """A solver that is added needs a namesake in k-diffusion or a reference of its own."""
    lonely = [
        s.name for s in SOLVERS if needs.namesake(s) is None and s.name not in references.REFERENCES
    ]
    assert not lonely, f"write a reference for {lonely} in tests/reference_more.py"


@needs.k_diffusion
@pytest.mark.parametrize("off", GUIDANCE_OFF.values(), ids=GUIDANCE_OFF)
@over_schedules
@over_k_diffusion
def test_without_guidance_it_is_k_diffusions_sampler(solver, options, sigmas, off):
    """λ = 0 or k = 0, float64: same seed, same draws, the same image to 1e-12."""
    problem = Problem()
    x = problem.start(sigmas)
    torch.manual_seed(11)
    expected = k_diffusion(solver, problem, x, sigmas, **options)
    torch.manual_seed(11)
    found = run(solver, problem.guided(**off), x, sigmas, extra_args=problem.extra_args, **options)
    assert relative(found, expected) <= TOLERANCE[torch.float64]


@needs.k_diffusion
@over_schedules
@over_k_diffusion
def test_without_guidance_it_is_k_diffusions_sampler_in_float32(solver, options, sigmas):
    """λ = 0, float32 latent and sigmas: the same image to 1e-5."""
    problem = Problem(dtype=torch.float32)
    x, sigmas = problem.start(sigmas), sigmas.float()
    sde = solver.noise == "brownian"
    # The tree answers levels a rounding away with other noise: plain noise for those. The noise of
    # their last steps takes this mixture's rounding far: k-diffusion's own float32 is as far off.
    # LMS weighs slopes with alternating signs: 2.1e-5 was seen on another processor.
    bound = 1e-3 if sde else 3e-5 if cancels(solver) else TOLERANCE[torch.float32]
    torch.manual_seed(12)
    noise = noise_for(solver, x) if sde else {}
    expected = k_diffusion(solver, problem, x, sigmas, **options, **noise)
    torch.manual_seed(12)
    model = problem.guided(teacher_scale=0.0)
    options = {**options, **(noise_for(solver, x) if sde else {})}
    found = run(solver, model, x, sigmas, extra_args=problem.extra_args, **options)
    assert found.dtype == torch.float32
    assert relative(found, expected) <= bound


@needs.k_diffusion
@pytest.mark.parametrize("solver", IN_K_DIFFUSION, ids=name_of)
def test_many_steps_in_float32(solver):
    """Rounding does not pile up: 200 float32 steps still agree to 1e-5."""
    problem, sigmas = Problem(dtype=torch.float32), karras(200)
    x = problem.start(sigmas)
    torch.manual_seed(13)
    expected = k_diffusion(solver, problem, x.double(), sigmas, **noise_for(solver, x.double()))
    torch.manual_seed(13)
    model, options = problem.guided(teacher_scale=0.0), noise_for(solver, x)
    found = run(solver, model, x, sigmas, extra_args=problem.extra_args, **options)
    # LMS (4) weighs slopes with alternating signs: k-diffusion's own float32 is 2.4e-4 off here.
    bound = max(TOLERANCE[torch.float32], growth(solver, sigmas) * torch.finfo(torch.float32).eps)
    assert relative(found, expected) <= bound


def noise_for(solver, x, seed=3):
    """A noise sampler of the test's own, for the solvers that take one."""
    return {"noise_sampler": Tape(x, seed)} if accepts(solver, "noise_sampler") else {}


@needs.k_diffusion
@over_schedules
@pytest.mark.parametrize(
    "solver", [s for s in IN_K_DIFFUSION if accepts(s, "noise_sampler")], ids=name_of
)
def test_a_custom_noise_sampler_is_asked_as_by_k_diffusion(solver, sigmas):
    """The host's noise sampler sees the same levels in the same order, and the image agrees."""
    problem = Problem()
    x = problem.start(sigmas)
    theirs, ours = Tape(x, 4), Tape(x, 4)
    expected = k_diffusion(solver, problem, x, sigmas, noise_sampler=theirs)
    model = problem.guided(teacher_scale=0.0)
    found = run(solver, model, x, sigmas, extra_args=problem.extra_args, noise_sampler=ours)
    assert relative(found, expected) <= TOLERANCE[torch.float64]
    assert levels(ours.asked) == pytest.approx(levels(theirs.asked), rel=1e-12)


def levels(asked):
    """A tape's record as a flat list of numbers."""
    return [float(level) for pair in asked for level in pair]


@needs.k_diffusion
@pytest.mark.parametrize(
    "solver",
    [s for s in IN_K_DIFFUSION if accepts(s, "s_churn") or accepts(s, "noise_sampler")],
    ids=name_of,
)
def test_the_global_stream_ends_where_k_diffusions_does(solver):
    """A run that uses noise consumes exactly the numbers that k-diffusion's consumes."""
    problem, sigmas = Problem(), karras(5)
    options = {"s_churn": 3.0} if accepts(solver, "s_churn") else {}
    x = problem.start(sigmas)
    torch.manual_seed(14)
    k_diffusion(solver, problem, x, sigmas, **options)
    expected = torch.randn(3)
    torch.manual_seed(14)
    model = problem.guided(teacher_scale=0.5, teacher_steps=2)
    run(solver, model, x, sigmas, extra_args=problem.extra_args, **options)
    assert torch.equal(torch.randn(3), expected)


@over_schedules
@over_everything
def test_a_teacher_that_agrees_changes_nothing(solver, options, sigmas):
    """Teacher ≡ what the student says: any λ, any k, the unguided image."""
    problem = Problem()
    echo, x = Echo(problem.student), problem.start(sigmas)

    def sample(**guidance):
        torch.manual_seed(15)
        guidance.setdefault("teacher_cfg_scale", problem.cond_scale)
        model = kdpp.TeacherGuidedDenoiser(echo.student, echo.teacher, **guidance)
        return run(solver, model, x, sigmas, extra_args=problem.extra_args, **options)

    unguided = sample(teacher_scale=0.0)
    assert relative(sample(teacher_scale=0.6, teacher_steps=99), unguided) <= 1e-12


GUIDANCE = [
    {"teacher_scale": 0.0},
    {"teacher_scale": 0.1},
    {"teacher_scale": 0.5, "teacher_steps": 99},
    {"teacher_scale": 1.0, "teacher_steps": 2},
    {"teacher_scale": 0.5, "teacher_steps": 2, "renoise_eta": 0.0},
    {"teacher_scale": 0.5, "teacher_steps": 99, "renoise_eta": 0.6},
    {"teacher_scale": 0.5, "teacher_steps": 99, "renoise": 0.25},
    {"teacher_scale": 0.5, "teacher_steps": 99, "renoise": 0.25, "renoise_eta": 0.0},
    {"teacher_scale": 0.5, "teacher_steps": 99, "renoise": "current", "renoise_eta": 0.6},
]


@pytest.mark.parametrize("guidance", GUIDANCE, ids=name_of)
@over_everything
def test_with_a_teacher_it_is_the_reference(solver, options, guidance):
    """λ > 0: every solver, setting and renoise agrees with the literal formulas to 1e-12."""
    if solver.name not in references.REFERENCES:
        pytest.skip("no reference is written for this solver")
    problem = Problem()
    for sigmas in SCHEDULES.values():
        x = problem.start(sigmas)
        torch.manual_seed(16)
        expected = references.expected(solver, problem, x, sigmas, guidance, **options)
        torch.manual_seed(16)
        found = problem.sample(solver, x, sigmas, guidance, **options)
        # Slopes that divide by σ and weights of several signs round a little more.
        bound = 1e-12 if solver.name in references.PAPERS_OWN else 1e-11
        assert relative(found, expected) <= bound, sigmas


@pytest.mark.parametrize("cond_scale", [0.0, 0.6, 1.0, 7.5])
@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
def test_every_guidance_scale_agrees_with_the_reference(solver, cond_scale):
    """The student's and the teacher's CFG scales enter where the formulas have them."""
    if solver.name not in references.REFERENCES:
        pytest.skip("no reference is written for this solver")
    problem, sigmas = Problem(cond_scale=cond_scale, teacher_cfg_scale=cond_scale), karras(6)
    x, guidance = problem.start(sigmas), {"teacher_scale": 0.3, "teacher_steps": 3}
    expected = references.expected(solver, problem, x, sigmas, guidance)
    assert relative(problem.sample(solver, x, sigmas, guidance), expected) <= 1e-12


PAPERS = {"dpmpp_2s_ancestral": "dpmpp_2s_vp", "dpmpp_2m": "dpmpp_2m_vp"}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", PAPERS)
def test_it_is_the_dpm_solver_papers_algorithm(name, seed):
    """2S and 2M agree with Algorithms 1 and 2, written in VP notation, to 1e-12."""
    solver = next(s for s in SOLVERS if s.name == name)
    problem, sigmas = Problem(student=gaussian(seed)), karras(4 + seed)[:-1]
    if seed % 2:
        problem = Problem()
    x = problem.start(sigmas)
    expected = getattr(reference, PAPERS[name])(problem.estimate, x, sigmas)
    found = problem.sample(solver, x, sigmas, {"teacher_scale": 0.0}, eta=0.0)
    assert relative(found, expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("r", [0.3, 0.8])
@pytest.mark.parametrize("cfg_pp", [False, True])
def test_2s_with_its_middle_point_elsewhere(cfg_pp, r, eta):
    """2S agrees with its formula for any stage position r, not only for 1/2."""
    problem, sigmas, guidance = Problem(), karras(5), {"teacher_scale": 0.4, "teacher_steps": 3}
    x = problem.start(sigmas)
    name = "dpmpp_2s_ancestral_cfg_pp" if cfg_pp else "dpmpp_2s_ancestral"
    solver = kdpp.SOLVERS[name]
    expected = references.expected(solver, problem, x, sigmas, guidance, eta=eta, r=r)
    found = problem.sample(solver, x, sigmas, guidance, eta=eta, r=r)
    assert relative(found, expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    "solver", [s for s in SOLVERS if s.cfg_pp and s.order is not None], ids=name_of
)
def test_plus_plus_at_scale_0_is_the_plain_solver_without_a_condition(solver):
    """CFG++ with cond_scale = 0: estimate and direction are both the unconditional ones."""
    plain = next(s for s in SOLVERS if s.name == solver.name.partition("_cfg_pp")[0])
    problem, sigmas = Problem(cond_scale=0.0), karras(6)
    x = problem.start(sigmas)
    off = {"teacher_scale": 0.0}
    torch.manual_seed(17)
    expected = problem.sample(plain, x, sigmas, off)
    assert relative(problem.sample(solver, x, sigmas, off), expected) <= 1e-12


@pytest.mark.parametrize("s_tmin", [0.0, 0.4])
@pytest.mark.parametrize("name", ["sa_solver", "sa_solver_pece"])
def test_sa_solver_draws_noise_between_two_levels(name, s_tmin):
    """A step that corrects one with noise may draw none itself, and the reverse."""
    problem, sigmas = Problem(), karras(8)
    x, options = problem.start(sigmas), {"s_tmin": s_tmin, "s_tmax": 3.0, "eta": 0.8}
    solver, guidance = kdpp.SOLVERS[name], {"teacher_scale": 0.3, "teacher_steps": 3}
    expected = references.expected(solver, problem, x, sigmas, guidance, **options)
    assert relative(problem.sample(solver, x, sigmas, guidance, **options), expected) <= 1e-11
