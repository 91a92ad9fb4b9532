"""What holds for every solver, whatever the schedule, the guidance and the dtype."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kdpp
import problems
import references
from problems import (
    SHAPE,
    Constant,
    Gaussian,
    Problem,
    Shifted,
    Tape,
    accepts,
    gaussian,
    karras,
    mixture,
    relative,
    run,
    seeded,
)

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
EPS = torch.finfo(torch.float64).eps
# Room for some hundred roundings of numbers up to ten times the result.
TOLERANCE = 1000 * EPS
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
# A solver is deterministic if it takes no noise, or if eta = 0 switches it off.
DETERMINISTIC = [s for s in SOLVERS if accepts(s, "eta") or not accepts(s, "noise_sampler")]
over_deterministic = pytest.mark.parametrize("solver", DETERMINISTIC, ids=lambda s: s.name)

scales = st.floats(0.0, 1.0)
factors = st.floats(0.05, 0.95)


@st.composite
def schedules(draw, finished=None, max_steps=5):
    """A decreasing schedule; with a last 0 if `finished`, without if not, either if None."""
    # From exactly 1 to 0 runs a flow model's schedule, which is refused here.
    levels = [draw(st.floats(0.5, 80.0).filter(lambda level: level != 1.0))]
    for factor in draw(st.lists(factors, min_size=1, max_size=max_steps)):
        levels.append(levels[-1] * factor)
    if draw(st.booleans()) if finished is None else finished:
        levels.append(0.0)
    return torch.tensor(levels, dtype=torch.float64)


@st.composite
def guidances(draw):
    """Any setting of the wrapper."""
    return {
        "teacher_scale": draw(scales),
        "teacher_steps": draw(st.integers(0, 7)),
        "renoise": draw(st.sampled_from(["next", "current"]) | st.floats(0.01, 20.0)),
        "renoise_eta": draw(st.sampled_from([0.0, 0.6, 1.0]) | scales),
    }


@st.composite
def solver_options(draw):
    """Any setting of the solvers' own parameters; each solver takes those that it has."""
    return {
        # Below 1e-6 an SDE's 1 - e^{-2ηh} is rounding, in the solvers as in k-diffusion.
        "eta": draw(st.sampled_from([0.0, 1.0]) | st.floats(1e-6, 1.0)),
        "s_noise": draw(st.floats(0.0, 1.2)),
        "s_churn": draw(st.sampled_from([0.0, 1.0, 30.0])),
        "s_tmin": draw(st.floats(0.0, 1.0)),
        "s_tmax": draw(st.floats(1.0, 40.0)),
    }


def sample(solver, problem, sigmas, guidance, x=None, **options):
    """A run that starts from the problem's own latent and a fixed global seed."""
    torch.manual_seed(21)
    x = problem.start(sigmas) if x is None else x
    return problem.sample(solver, x, sigmas, guidance, **options)


# ------------------------------------------------------------------------- against references


@over_solvers
@given(
    sigmas=schedules(),
    guidance=guidances(),
    options=solver_options(),
    cond_scale=st.sampled_from([0.0, 0.4, 1.0, 3.0]),
    teacher_cfg_scale=st.sampled_from([1.0, 2.0, 7.5]),
)
def test_any_setting_agrees_with_the_reference(
    solver, sigmas, guidance, options, cond_scale, teacher_cfg_scale
):
    """Random schedules, guidance and solver settings give what the literal formulas give."""
    if solver.name not in references.REFERENCES:
        pytest.skip("no reference is written for this solver")
    problem = Problem(cond_scale=cond_scale, teacher_cfg_scale=teacher_cfg_scale)
    found = sample(solver, problem, sigmas, guidance, **options)
    torch.manual_seed(21)
    x = problem.start(sigmas)
    expected = references.expected(solver, problem, x, sigmas, guidance, **options)
    assert relative(found, expected) <= 1e-11


# ------------------------------------------------------------------------- in λ


@over_solvers
@given(sigmas=schedules(max_steps=1), guidance=guidances(), options=solver_options())
def test_one_step_is_affine_in_lambda(solver, sigmas, guidance, options):
    """x' = x'(0) + λ (x'(1) - x'(0)) for fixed noise and a denoiser that is not linear."""
    problem = Problem()
    found, none, full = (
        sample(solver, problem, sigmas[:2], {**guidance, "teacher_scale": scale}, **options)
        for scale in (guidance["teacher_scale"], 0.0, 1.0)
    )
    expected = none + guidance["teacher_scale"] * (full - none)
    assert relative(found, expected) <= TOLERANCE


@over_solvers
@given(sigmas=schedules(), scale=scales, options=solver_options())
def test_a_run_of_an_affine_student_is_affine_in_lambda(solver, sigmas, scale, options):
    """With a Gaussian's denoiser the whole run stays affine when one step is guided."""
    problem = Problem(student=gaussian())
    found, none, full = (
        sample(solver, problem, sigmas, {"teacher_scale": each}, **options)
        for each in (scale, 0.0, 1.0)
    )
    assert relative(found, none + scale * (full - none)) <= TOLERANCE


@over_solvers
def test_lambda_moves_the_result(solver):
    """λ = 0.1 does change the image: the affine map is not constant."""
    problem, sigmas = Problem(), karras(4)
    none, some = (sample(solver, problem, sigmas, {"teacher_scale": s}) for s in (0.0, 0.1))
    assert relative(some, none) > 1e-4


@over_solvers
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_lambda_1_at_the_last_step_is_the_teachers_estimate(solver, eta):
    """One step to 0 with a chosen renoise level: the image is what the teacher says."""
    problem, sigmas = Problem(), torch.tensor([5.0, 0.0], dtype=torch.float64)
    x = problem.start(sigmas)
    guidance = {"teacher_scale": 1.0, "renoise": 0.7, "renoise_eta": eta}
    estimate = problem.estimate(x, 5.0)
    direction = problem.unconditional(x, 5.0) if solver.cfg_pp else estimate
    noise = Tape(x, problem.noise_seed + 1)() if eta else (x - direction) / 5.0
    expected = problem.teacher_estimate(estimate + 0.7 * noise, 0.7)
    assert relative(sample(solver, problem, sigmas, guidance, x), expected) <= TOLERANCE


@over_solvers
def test_next_revises_nothing_where_the_next_level_is_0(solver):
    """A guided last step with renoise="next" calls no teacher and gives the student's image."""
    problem, sigmas = Problem(), torch.tensor([5.0, 0.0], dtype=torch.float64)
    x = problem.start(sigmas)
    found = sample(solver, problem, sigmas, {"teacher_scale": 1.0}, x)
    assert relative(found, problem.estimate(x, 5.0)) <= TOLERANCE


# ------------------------------------------------------------------------- over the batch


@over_solvers
@given(
    sigmas=schedules(),
    guidance=guidances(),
    options=solver_options(),
    order=st.permutations(range(4)),
)
def test_the_batchs_order_changes_nothing(solver, sigmas, guidance, options, order):
    """Permuting latents, conditions and per-sample noise permutes the images."""
    whole = per_sample_run(solver, sigmas, guidance, options, list(range(4)))
    assert relative(per_sample_run(solver, sigmas, guidance, options, order), whole[order]) <= 1e-12


@over_solvers
@given(
    sigmas=schedules(),
    guidance=guidances(),
    options=solver_options(),
    cut=st.integers(1, 3),
)
def test_splitting_the_batch_changes_nothing(solver, sigmas, guidance, options, cut):
    """Two runs over parts of a batch give what one run over all of it gives."""
    parts = [
        per_sample_run(solver, sigmas, guidance, options, keys)
        for keys in ([0, 1, 2, 3][:cut], [0, 1, 2, 3][cut:])
    ]
    whole = per_sample_run(solver, sigmas, guidance, options, list(range(4)))
    assert relative(torch.cat(parts), whole) <= 1e-12


def per_sample_run(solver, sigmas, guidance, options, keys):
    """A run over those samples of a batch of four whose numbers are in `keys`."""
    problem = Problem(batch=4)
    x = problem.start(sigmas)[keys]
    extra = {
        name: value[keys] if isinstance(value, torch.Tensor) else value
        for name, value in problem.extra_args.items()
    }
    model = problem.guided(renoise_noise_sampler=Tape(x, 6, keys), **guidance)
    options = {**options, "s_churn": 0.0, "noise_sampler": Tape(x, 5, keys)}
    return run(solver, model, x, sigmas, extra_args=extra, **options)


# ------------------------------------------------------------------------- weights that sum to 1


@over_solvers
@given(sigmas=schedules(finished=True), guidance=guidances(), options=solver_options())
def test_a_constant_denoiser_is_reached(solver, sigmas, guidance, options):
    """Data that is one image: every solver ends on it, with a teacher that agrees."""
    model = Constant(seeded(*SHAPE, seed=8))
    problem = Problem(student=model, teacher=model)
    found = sample(solver, problem, sigmas, guidance, **options)
    bound = TOLERANCE if problems.cancels(solver) else 10 * EPS
    assert relative(found, model.value.expand_as(found)) <= bound


@over_solvers
@given(
    sigmas=schedules(),
    guidance=guidances(),
    options=solver_options(),
    offset=st.floats(-50.0, 50.0),
)
def test_moving_the_data_moves_the_images(solver, sigmas, guidance, options, offset):
    """Latent, student and teacher moved by c: the result moves by c (weights sum to 1)."""
    problem = Problem()
    moved = Problem(
        student=Shifted(problem.student, offset), teacher=Shifted(problem.teacher, offset)
    )
    x = problem.start(sigmas)
    still = sample(solver, problem, sigmas, guidance, x, **options)
    found = sample(solver, moved, sigmas, guidance, x + offset, **options)
    assert float((found - offset - still).abs().max()) <= TOLERANCE * (100.0 + still.abs().max())


@pytest.mark.parametrize(
    "solver", [s for s in DETERMINISTIC if problems.has_no_unit(s)], ids=lambda s: s.name
)
@given(sigmas=schedules(), guidance=guidances(), factor=st.floats(0.1, 10.0))
def test_scaling_the_data_scales_the_images(solver, sigmas, guidance, factor):
    """Data, levels and latent times s give s times the result: no level is absolute."""
    # A schedule from exactly 1 to 0 is refused: it may be meant for a flow model.
    assume(float(factor * sigmas[0]) != 1.0)
    if isinstance(guidance["renoise"], float):
        guidance = {**guidance, "renoise": "next"}
    problem = Problem(cond_scale=1.0, teacher_cfg_scale=1.0)
    scaled = Problem(cond_scale=1.0, teacher_cfg_scale=1.0)
    cond, uncond = problem.extra_args["cond"], problem.extra_args["uncond"]

    def solve(this, by):
        this.student = scaled_gaussian(1, by)
        this.teacher = scaled_gaussian(2, by)
        extra = {"cond": by * cond, "uncond": by * uncond}
        x = by * this.start(sigmas)
        tape = Tape(x, 6)
        model = this.guided(renoise_noise_sampler=tape, **guidance)
        return run(solver, model, x, by * sigmas, extra_args=extra, eta=0.0)

    # Slopes at close levels, weighed with both signs, carry rounding far: 3e-12 was seen.
    assert relative(solve(scaled, factor), factor * solve(problem, 1.0)) <= 1e-10


def scaled_gaussian(seed, by):
    """The denoiser of Gaussian data times `by`."""
    model = gaussian(seed)
    return Gaussian(by * model.mean, by**2 * model.variance)


# ------------------------------------------------------------------------- steps of no length


@over_deterministic
@pytest.mark.parametrize("steps", [0, 1, 2, 99])
@given(sigmas=schedules(), doubled=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_steps_of_no_length_change_nothing(solver, steps, sigmas, doubled):
    """[a, a, b, b, c, 0] gives what [a, b, c, 0] gives, CFG++ and guided steps included."""
    problem = Problem()
    guidance = {"teacher_scale": 0.5, "teacher_steps": steps}
    repeated = torch.cat([sigmas, sigmas[[i % len(sigmas) for i in doubled]]])
    repeated = repeated.sort(descending=True).values
    expected = sample(solver, problem, sigmas, guidance, eta=0.0)
    assert relative(sample(solver, problem, repeated, guidance, eta=0.0), expected) <= TOLERANCE


@over_solvers
@pytest.mark.parametrize("levels", [(5.0, 5.0), (5.0, 5.0, 5.0), (5.0, 0.0, 0.0), (0.0, 0.0)])
def test_schedules_of_repeats_stay_finite(solver, levels):
    """Nothing but steps of no length, or a doubled final 0: no NaN in any solver."""
    problem, sigmas = Problem(), torch.tensor(levels, dtype=torch.float64)
    x = problem.start(sigmas)
    assert sample(solver, problem, sigmas, {"teacher_steps": 9}, x).isfinite().all()


@over_deterministic
@pytest.mark.parametrize("levels", [(5.0, 5.0), (5.0, 5.0, 5.0), (0.0, 0.0)])
def test_a_step_of_no_length_leaves_the_latent(solver, levels):
    """A deterministic solver that goes nowhere returns where it is."""
    problem, sigmas = Problem(), torch.tensor(levels, dtype=torch.float64)
    x = problem.start(sigmas) + 1
    assert relative(sample(solver, problem, sigmas, {"teacher_steps": 9}, x, eta=0.0), x) <= EPS


@over_solvers
@given(sigmas=schedules(), doubled=st.integers(0, 6), guidance=guidances())
def test_repeats_stay_finite_with_noise(solver, sigmas, doubled, guidance):
    """A repeated level in a run with noise and guidance: no NaN."""
    repeated = torch.cat([sigmas, sigmas[[doubled % len(sigmas)]]]).sort(descending=True).values
    found = sample(solver, Problem(), repeated, guidance, eta=1.0, s_churn=3.0)
    assert found.isfinite().all()


def test_multistep_random_renoises_at_a_repeated_level():
    """LCM's step of no length is estimate + sigma * noise, once more, without the teacher."""
    solver, problem = kdpp.SOLVERS["lcm"], Problem()
    sigmas = torch.tensor([9.0, 9.0, 3.0, 3.0, 0.0], dtype=torch.float64)
    x, off = problem.start(sigmas), {"teacher_scale": 0.0}
    expected = references.expected(solver, problem, x, sigmas, off)
    assert relative(sample(solver, problem, sigmas, off, x), expected) <= TOLERANCE


@over_solvers
@pytest.mark.parametrize("levels", [(), (3.0,), (0.0,)])
def test_no_step_returns_the_latent(solver, levels):
    """One sigma, or none: the latent comes back, and no network is called."""
    sigmas = torch.tensor(levels, dtype=torch.float64)
    x = seeded(2, *SHAPE, seed=1)
    assert torch.equal(sample(solver, Problem(), sigmas, {}, x), x)


@over_deterministic
def test_levels_a_rounding_apart_are_equal_levels(solver):
    """A float32 rounding is no step: a multistep solver would divide by its length."""
    problem, sigmas = Problem(), torch.tensor([14.0, 3.7, 3.7, 0.5, 0.0], dtype=torch.float64)
    expected = sample(solver, problem, sigmas, {"teacher_steps": 0}, eta=0.0)
    sigmas[2] = float(torch.nextafter(sigmas[2].float(), torch.tensor(0.0)))
    found = sample(solver, problem, sigmas, {"teacher_steps": 0}, eta=0.0)
    assert relative(found, expected) <= 1e-6


@over_solvers
def test_whole_sigmas_are_levels_like_any_others(solver):
    """int64 sigmas give what the same float32 ones give: middle points are not cut to wholes."""
    problem, options = Problem(dtype=torch.float32), {"eta": 0.5}
    whole = torch.tensor([14, 4, 1, 0])
    expected = sample(solver, problem, whole.float(), {"teacher_steps": 2}, **options)
    heard = []

    class Listening(Tape):
        def __call__(self, sigma=None, sigma_next=None):
            heard.append((float(sigma), float(sigma_next)))
            return super().__call__(sigma, sigma_next)

    x = problem.start(whole)
    torch.manual_seed(21)
    found = problem.sample(
        solver, x, whole, {"teacher_steps": 2}, noise_sampler=Listening(x, 5), **options
    )
    assert torch.equal(found, expected)
    middles = {end for _, end in heard if end % 1.0}
    known = {"eta": 0.5} if accepts(solver, "eta") else {}
    plan = solver.plan(whole.tolist(), **known)
    stages = [stage for step in plan for stage in step.stages[:-1]]
    assert bool(middles) == any(stage.row.noise is not None for stage in stages)


# ------------------------------------------------------------------------- dtype and device

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Rounded(torch.nn.Module):
    """A denoiser that computes in float64 and answers in the latent's dtype."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, sigma, cond=None):
        """The exact estimate, rounded once."""
        assert cond is None or cond.dtype == torch.float64
        return self.model(x.double(), sigma.double(), cond=cond).to(x.dtype)


@over_solvers
@pytest.mark.parametrize("sigma_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_latent_keeps_its_dtype(solver, dtype, sigma_dtype):
    """Any float dtype, sigmas in any other: the result has the latent's, to its precision."""
    problem = Problem()
    sigmas = torch.tensor([14.61, 1.63, 0.645, 0.277, 0.0]).to(sigma_dtype)
    x = problem.start(sigmas).to(dtype)
    exact = rounded_run(solver, problem, x.double(), sigmas.double(), dtype)
    problem.student, problem.teacher = Rounded(mixture(0)), Rounded(mixture(1))
    found = rounded_run(solver, problem, x, sigmas, dtype)
    assert found.dtype == dtype
    assert found.device == x.device
    # Four steps, each with two CFG mixtures (scales up to 4) and an update to round; the
    # mixture's estimate moves by at most a few times what its argument moves.
    assert relative(found, exact) <= 100 * torch.finfo(dtype).eps


@over_solvers
@pytest.mark.parametrize("answer", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_networks_may_answer_in_another_dtype(solver, dtype, answer):
    """A half-precision network (autocast, say) or a float64 one leaves the latent's dtype."""
    sigmas = karras(4)
    x = Problem().start(sigmas).to(dtype)
    problem = Problem(student=Answering(answer), teacher=Answering(answer), cond_scale=1.0)
    for eta in (0.0, 0.6):
        guidance = {"teacher_steps": 2, "renoise_eta": eta}
        found = sample(solver, problem, sigmas, guidance, x)
        assert found.dtype == dtype
        assert found.isfinite().all()


class Answering(torch.nn.Module):
    """A denoiser that answers in a dtype of its own."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x, sigma, cond=None):
        """A contraction of x."""
        return (0.2 * x).to(self.dtype)


def rounded_run(solver, problem, x, sigmas, dtype):
    """A run whose noise is rounded to `dtype`, however precise the latent is."""
    solver_noise, renoise = Tape(x.double(), 5), Tape(x.double(), 6)
    model = problem.guided(
        teacher_scale=0.3,
        renoise_noise_sampler=lambda *levels: renoise(*levels).to(dtype).to(x.dtype),
    )
    noise = {"noise_sampler": lambda *levels: solver_noise(*levels).to(dtype).to(x.dtype)}
    return run(solver, model, x, sigmas, extra_args=problem.extra_args, **noise)


@over_solvers
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_latent_on_another_device_than_the_sigmas(solver, dtype):
    """Sigmas on the CPU, the latent elsewhere (the meta device, which refuses to mix with it)."""
    x = torch.empty(2, *SHAPE, device="meta", dtype=dtype)
    cond = torch.empty(2, 3, device="meta", dtype=dtype)
    student = mixture(0).to("meta")

    def noise(sigma, sigma_next):
        return torch.randn_like(x)

    model = kdpp.TeacherGuidedDenoiser(student, student, renoise_noise_sampler=noise)
    extra = {"cond": cond, "uncond": cond, "cond_scale": 3.0}
    options = {"noise_sampler": noise, "s_churn": 2.0}
    found = run(solver, model, x, karras(4), extra_args=extra, **options)
    assert found.device == x.device
    assert found.dtype == dtype
