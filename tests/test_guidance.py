"""Every way to guide: how much, at which steps, from which level, by whom, and where."""

import dataclasses
import inspect
import math
import re
import warnings
from pathlib import Path

import pytest
import torch

import kdpp
import needs
import problems
import reference
from kdpp import NoiseRange, Teacher, TeacherGuidedDenoiser, sds_scale
from problems import (
    SHAPE,
    CFGDenoiser,
    Constant,
    Counted,
    NeverCalled,
    Problem,
    accepts,
    conditions,
    karras,
    mixture,
    relative,
    run,
    seeded,
)

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
SIGMAS = torch.tensor([10.0, 4.0, 1.5, 0.6, 0.2, 0.0], dtype=torch.float64)
ONE_STEP = torch.tensor([5.0, 2.0], dtype=torch.float64)
STEPS = len(SIGMAS) - 1
CFG = 4.0
PROBLEM = Problem()
STUDENT, TEACHER, OTHER = PROBLEM.student, PROBLEM.teacher, mixture(2)
EULER = kdpp.SOLVERS["euler"]


class Noise:
    """A noise sampler whose answer depends on the step's level alone, not on earlier calls."""

    def __init__(self, shape, seed=6, change=lambda noise: noise):
        self.shape, self.seed, self.change = shape, seed, change
        self.asked = []

    def __call__(self, sigma, sigma_next):
        self.asked.append((float(sigma), float(sigma_next)))
        seed = 10**9 * self.seed + round(1e6 * float(sigma))
        return self.change(seeded(*self.shape, seed=seed))


def start(sigmas=SIGMAS):
    """The latent that every run here starts from."""
    return PROBLEM.start(sigmas)


def guided(teacher=TEACHER, **settings):
    """A wrapper of the problem's pair whose renoise noise depends on the step alone."""
    settings.setdefault("renoise_noise_sampler", Noise(start().shape))
    if not isinstance(teacher, Teacher | list | tuple):
        settings.setdefault("teacher_cfg_scale", CFG)
    return TeacherGuidedDenoiser(STUDENT, teacher, **settings)


def sample(solver, model, sigmas=SIGMAS, **options):
    """One run with the problem's conditions and noise that depends on the step alone."""
    x = start(sigmas)
    options = {"noise_sampler": Noise(x.shape, seed=5), **options}
    return run(solver, model, x, sigmas, **{"extra_args": PROBLEM.extra_args, **options})


def guided_steps(model, sigmas=SIGMAS, solver=EULER):
    """The indices of the steps whose callback tells of a teacher."""
    told = []
    sample(solver, model, sigmas, callback=told.append)
    return [info["i"] for info in told if "denoised_teacher" in info]


def renoise_levels(sigmas=SIGMAS, solver=EULER, **settings):
    """The levels that the teacher is asked at."""
    counted = Counted(TEACHER)
    sample(solver, guided(counted, **settings), sigmas)
    return [float(call.sigma[0]) for call in counted.calls]


def same(found, expected):
    """Whether two images agree but for some roundings."""
    return relative(found, expected) <= 1e-12


# ------------------------------------------------------------------------- λ

SCALES = [0.3, 0.0, 0.7, 0.2, 0.9]
MIDDLE = {"teacher_steps": STEPS, "renoise": 0.7}


@over_solvers
def test_a_list_gives_every_step_its_own_scale(solver):
    """A list is, at every step, the number that stands there; so is a function of the step."""
    listed = sample(solver, guided(teacher_scale=SCALES, **MIDDLE))
    called = sample(solver, guided(teacher_scale=lambda i, sigma_s: SCALES[i], **MIDDLE))
    apart = [
        Teacher(TEACHER, scale=scale, steps={i}, cfg_scale=CFG, renoise=0.7)
        for i, scale in enumerate(SCALES)
    ]
    assert same(listed, sample(solver, guided(apart)))
    assert torch.equal(called, listed)
    assert not same(listed, sample(solver, guided(teacher_scale=0.3, **MIDDLE)))


@over_solvers
def test_a_list_of_one_number_is_the_number(solver):
    """[λ, λ, …], a tuple of them and a function that answers λ are λ."""
    expected = sample(solver, guided(teacher_scale=0.4, **MIDDLE))
    for scale in ([0.4] * STEPS, (0.4,) * STEPS, lambda i, sigma_s: 0.4):
        assert torch.equal(sample(solver, guided(teacher_scale=scale, **MIDDLE)), expected)


@pytest.mark.parametrize("renoise", ["next", "current", 0.7])
def test_a_function_is_told_the_step_and_its_renoise_level(renoise):
    """λ(step, σ_s): σ_s is the level that the teacher is asked at."""
    told = []

    def scale(step, sigma_s):
        told.append((step, sigma_s))
        return 0.5

    settings = {"teacher_scale": scale, "teacher_steps": 4, "renoise": renoise}
    asked = renoise_levels(**settings)
    assert told == [(i, sigma_s) for i, sigma_s in enumerate(asked)]
    assert len(told) == 4


@pytest.mark.parametrize("scale", [[0.1] * (STEPS - 1), [0.1] * (STEPS + 1), (), [0.1]])
def test_a_list_of_another_length(scale):
    """One λ per step, no more and no less; nothing is called before that is seen."""
    model = TeacherGuidedDenoiser(NeverCalled(), NeverCalled(), teacher_scale=scale)
    with pytest.raises(ValueError, match=rf"teacher_scale holds {len(scale)} .* {STEPS} steps"):
        sample(EULER, model)


@pytest.mark.parametrize("bad", [1.5, -0.1, math.nan, math.inf, None, "much", True])
@pytest.mark.parametrize("form", ["number", "list", "function"])
def test_a_scale_outside_0_to_1(form, bad):
    """Refused in every form, before any call, in words that name the setting."""
    scale = {"number": bad, "list": [bad] * STEPS, "function": lambda i, sigma_s: bad}[form]
    with pytest.raises(ValueError, match="teacher_scale"):
        sample(EULER, TeacherGuidedDenoiser(NeverCalled(), NeverCalled(), teacher_scale=scale))


@over_solvers
@pytest.mark.parametrize("scale", [1.5, -0.5])
def test_extrapolation_goes_on_along_the_line(solver, scale):
    """With extrapolate=True a λ outside [0, 1] lies on the line through λ = 0 and λ = 1."""
    none, full = (sample(solver, guided(teacher_scale=s), ONE_STEP) for s in (0.0, 1.0))
    for form in (scale, [scale], lambda i, sigma_s: scale):
        found = sample(solver, guided(teacher_scale=form, extrapolate=True), ONE_STEP)
        assert same(found, none + scale * (full - none))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, True])
def test_extrapolation_still_needs_a_finite_number(bad):
    """No range, but a number."""
    with pytest.raises(ValueError, match=r"teacher_scale.*finite"):
        guided(teacher_scale=bad, extrapolate=True)


def test_sds_scale():
    """λ = min(largest, step size/σ_s²), and as a wrapper's scale it is evaluated at σ_s."""
    scale = sds_scale(0.5, largest=0.3)
    levels = [8.0, 2.0, 1.5, 1.0, 0.1]
    assert [scale(3, sigma) for sigma in levels] == [0.5 / 64, 0.125, 0.5 / 2.25, 0.3, 0.3]
    assert sds_scale(2.0)(0, 0.5) == 1.0
    assert sds_scale(1e-3)(0, 1e-200) == sds_scale(1e-3)(0, 0.0) == 1.0
    assert sds_scale(0.0)(0, 1e-200) == sds_scale(0.0)(0, 0.0) == 0.0
    settings = {"teacher_steps": 4}
    numbers = [scale(0, float(sigma)) for sigma in SIGMAS[1:-1]] + [0.0]
    found = sample(EULER, guided(teacher_scale=scale, **settings))
    assert same(found, sample(EULER, guided(teacher_scale=numbers, **settings)))


# ------------------------------------------------------------------------- which steps


@over_solvers
@pytest.mark.parametrize(
    ("steps", "alike"),
    [
        ({0, 1}, 2),
        ([1, 0, 1], 2),
        (range(STEPS - 1), STEPS - 1),
        ({-STEPS}, 1),
        ({-2, 0}, {3, 0}),
        ((-1, 4), {4}),
        ((), 0),
    ],
    ids=str,
)
def test_a_set_of_steps(solver, steps, alike):
    """Any collection of indices; negative ones count from the end, twice is once."""
    settings = {"teacher_scale": 0.5, "renoise": 0.7}
    found = sample(solver, guided(teacher_steps=steps, **settings))
    assert torch.equal(found, sample(solver, guided(teacher_steps=alike, **settings)))


@over_solvers
def test_only_the_chosen_steps_are_guided(solver):
    """The callback tells of a teacher at those steps and at no other."""
    assert guided_steps(guided(teacher_steps={1, -2}, renoise=0.7), solver=solver) == [1, 3]
    assert guided_steps(guided(teacher_steps=3), solver=solver) == [0, 1, 2]


@over_solvers
@pytest.mark.parametrize("step", [STEPS, -STEPS - 1, 99])
def test_a_step_outside_the_schedule(solver, step):
    """An index that no step has: refused before any call, naming it and the steps there are."""
    model = TeacherGuidedDenoiser(NeverCalled(), NeverCalled(), teacher_steps={0, step})
    with pytest.raises(ValueError, match=rf"teacher_steps holds {step}.* {STEPS} steps"):
        sample(solver, model)


@pytest.mark.parametrize("bad", [{0.5}, {True}, ["0"], "01", -1, 1.0, True, None, {None}])
def test_steps_are_whole_numbers(bad):
    """Refused when the wrapper, or the Teacher, is made."""
    for make in (lambda: guided(teacher_steps=bad), lambda: Teacher(TEACHER, steps=bad)):
        with pytest.raises(ValueError, match="teacher_steps"):
            make()


@over_solvers
def test_the_last_step_with_a_level_of_its_own(solver):
    """Step -1 and renoise=σ_s: the image moves by λ (x̂_ψ - x̂), x̂_ψ the estimate at σ_s.

    (By as many times that as the solver weighs its newest estimate: once, but for UD10 AB.)
    """
    told, counted = [], Counted(TEACHER)
    model = guided(counted, teacher_steps={-1}, teacher_scale=0.6, renoise=0.3)
    found = sample(solver, model, callback=told.append)
    assert [set(call.sigma.tolist()) for call in counted.calls] == [{0.3}]
    uncond, cond = counted.calls[0].output.chunk(2)
    taught = uncond + CFG * (cond - uncond)
    none = sample(solver, guided(teacher_scale=0.0))
    gain = solver.plan(SIGMAS.tolist())[-1].gain
    assert same(found, none + 0.6 * gain * (taught - told[-1]["denoised_student"]))
    assert not same(found, none)


@over_solvers
@pytest.mark.parametrize("renoise", ["next", lambda i, sigma, sigma_next: sigma_next])
def test_the_last_step_with_nowhere_to_renoise_to(solver, renoise):
    """Step -1 asked for by name where σ_s would be 0: refused, before any call."""
    model = TeacherGuidedDenoiser(NeverCalled(), NeverCalled(), teacher_steps={-1}, renoise=renoise)
    with pytest.raises(ValueError, match=rf"teacher_steps holds step {STEPS - 1}.*renoise="):
        sample(solver, model)


@over_solvers
def test_the_last_step_of_a_schedule_that_ends_above_0(solver):
    """Step -1 with renoise="next" is a step like another where the next level is not 0."""
    sigmas = SIGMAS[:-1]
    found = sample(solver, guided(teacher_scale=0.5, teacher_steps={-1}), sigmas)
    assert same(found, sample(solver, guided(teacher_scale=0.5, teacher_steps={3}), sigmas))
    assert not same(found, sample(solver, guided(teacher_scale=0.0), sigmas))


@over_solvers
def test_counting_leaves_the_step_to_0_alone(solver):
    """As one of the first k the step to 0 is silently not revised by renoise="next"."""
    settings = {"teacher_scale": 0.5}
    found = sample(solver, guided(teacher_steps=STEPS, **settings))
    assert torch.equal(found, sample(solver, guided(teacher_steps=STEPS - 1, **settings)))


@over_solvers
@pytest.mark.parametrize(
    ("low", "high", "steps"),
    [(0.5, 5.0, {1, 2, 3}), (0.0, math.inf, {0, 1, 2, 3, 4}), (1.5, 4.0, {1, 2}), (20, 30, ())],
)
def test_a_noise_range(solver, low, high, steps):
    """The steps that start inside it, its bounds included."""
    settings = {"teacher_scale": 0.5, "renoise": 0.7}
    found = sample(solver, guided(teacher_steps=NoiseRange(low, high), **settings))
    assert torch.equal(found, sample(solver, guided(teacher_steps=set(steps), **settings)))


def test_a_noise_range_passes_over_a_step_to_0():
    """It asks for no step by name: with renoise="next" the last one is left alone, no error."""
    assert guided_steps(guided(teacher_steps=NoiseRange(0.0, 1.0))) == [3]


def test_a_noise_range_holds_levels_that_float32_has_rounded():
    """A bound that is one of the levels holds it in a float32 schedule too."""
    sigmas = torch.tensor([14.61, 1.63, 0.645, 0.277, 0.0])
    for step, sigma in enumerate((14.61, 1.63, 0.645, 0.277)):
        model = guided(teacher_steps=NoiseRange(sigma, sigma), renoise=0.7)
        assert guided_steps(model, sigmas) == [step]


@pytest.mark.parametrize("bad", [(2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_a_noise_range_that_is_none(bad):
    """Bounds the wrong way round, negative or NaN."""
    with pytest.raises(ValueError, match=r"teacher_steps.*low.*high"):
        guided(teacher_steps=NoiseRange(*bad))


@over_solvers
def test_steps_of_no_length_are_not_counted(solver):
    """[10, 10, 4, …]: the first guided step is the one that moves; an index on it does nothing."""
    repeated = torch.cat([SIGMAS[:1], SIGMAS])
    assert guided_steps(guided(teacher_steps=1), repeated, solver) == [1]
    assert guided_steps(guided(teacher_steps={0}), repeated, solver) == []


# ------------------------------------------------------------------------- the renoise level


@over_solvers
@pytest.mark.parametrize(
    ("renoise", "levels"),
    [
        ("next", SIGMAS[1:3].tolist()),
        ("current", SIGMAS[:2].tolist()),
        (0.7, [0.7, 0.7]),
        (3, [3.0, 3.0]),
        (lambda i, sigma, sigma_next: math.sqrt(sigma * sigma_next), [40**0.5, 6**0.5]),
    ],
    ids=["next", "current", "number", "integer", "function"],
)
def test_the_teacher_is_asked_at_the_renoise_level(solver, renoise, levels):
    """σ_s for every solver: of the step, not of a stage inside it or of σ_down."""
    counted = Counted(TEACHER)
    sample(solver, guided(counted, teacher_steps=2, renoise=renoise))
    assert all(len(set(call.sigma.tolist())) == 1 for call in counted.calls)
    asked = [float(call.sigma[0]) for call in counted.calls]
    assert asked == pytest.approx(levels, rel=1e-12)


@over_solvers
def test_its_input_is_the_students_estimate_noised_to_that_level(solver):
    """x_s = x̂ + σ_s n, with n the renoise sampler's, asked with the step's level and σ_s."""
    told, noise = [], Noise(start().shape)
    model = guided(teacher_steps=2, renoise=0.7, renoise_noise_sampler=noise)
    sample(solver, model, callback=told.append)
    assert [level for pair in noise.asked for level in pair] == pytest.approx([10, 0.7, 4, 0.7])
    for info, sigma in zip(told[:2], (10.0, 4.0)):
        expected = info["denoised_student"] + 0.7 * noise(sigma, 0.7)
        assert same(info["renoised"], expected)


def test_a_function_of_the_level_is_told_the_step():
    """(step, sigma, sigma_next), at every guided step."""
    told = []

    def level(*arguments):
        told.append(arguments)
        return 1.0

    sample(EULER, guided(teacher_steps={1, -1}, renoise=level))
    assert told == [(1, 4.0, 1.5), (4, pytest.approx(0.2), 0.0)]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, None, "high"])
def test_a_function_that_answers_no_level(bad):
    """Refused before any call."""
    settings = {"renoise": lambda i, sigma, sigma_next: bad}
    with pytest.raises(ValueError, match="renoise"):
        sample(EULER, TeacherGuidedDenoiser(NeverCalled(), NeverCalled(), **settings))


def random_levels(seed, steps):
    """The levels of one run with renoise="random" at every step."""
    counted = Counted(Constant(torch.zeros(1)))
    model = TeacherGuidedDenoiser(
        counted.model, counted, teacher_cfg_scale=1.0, teacher_steps=steps, renoise="random"
    )
    torch.manual_seed(seed)
    sigmas = karras(steps)
    before = torch.get_rng_state()
    kdpp.sample_euler_tg(model, torch.zeros(1, 1, dtype=torch.float64), sigmas, disable=True)
    assert torch.equal(torch.get_rng_state(), before)
    levels = torch.tensor([float(call.sigma[0]) for call in counted.calls], dtype=torch.float64)
    return levels, (levels.log() - sigmas[-2].log()) / (sigmas[0] / sigmas[-2]).log()


def test_random_levels_follow_the_seed_and_leave_the_stream():
    """Reproducible under torch.manual_seed, other ones under another seed, nothing drawn."""
    (first, _), (again, _), (other, _) = (random_levels(seed, 4) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert len(set(first.tolist())) == 4
    assert not set(first.tolist()) & set(other.tolist())


def test_random_levels_are_log_uniform_in_the_schedule():
    """Kolmogorov-Smirnov against the uniform distribution of log σ, at the 0.1 % level."""
    _, place = random_levels(3, 1500)
    place = place.sort().values
    steps = torch.arange(len(place) + 1, dtype=torch.float64) / len(place)
    distance = max(float((steps[1:] - place).max()), float((place - steps[:-1]).max()))
    assert distance < 1.95 / math.sqrt(len(place))
    assert float(place[0]) >= -1e-12 and float(place[-1]) <= 1 + 1e-12


def test_random_levels_reach_down_to_a_last_level_above_0():
    """A schedule that ends at σ > 0 holds that level too."""
    levels = []
    for seed in range(20):
        torch.manual_seed(seed)
        levels += renoise_levels(ONE_STEP, renoise="random")
    assert 2.0 < min(levels) < 2.5 and 4.0 < max(levels) < 5.0


def test_random_levels_of_two_teachers_are_two():
    """Two teachers with renoise="random" are not asked at one and the same level."""
    counted = [Counted(TEACHER), Counted(TEACHER)]
    model = guided([Teacher(one, cfg_scale=1.0, renoise="random") for one in counted])
    sample(EULER, model)
    first, second = (float(one.calls[0].sigma[0]) for one in counted)
    assert first != second


# ------------------------------------------------------------------------- several teachers


def test_two_teachers_by_hand():
    """Euler: x̂_new = (1 - λ_1 - λ_2) x̂ + λ_1 x̂_1 + λ_2 x̂_2, each with its own settings."""
    cond, uncond = conditions(2)
    own = seeded(2, SHAPE[0], seed=90)
    teachers = [
        Teacher(TEACHER, scale=0.2, cfg_scale=3.0, renoise=0.7),
        Teacher(OTHER, scale=0.5, cfg_scale=1.5, renoise="current", extra_args={"cond": own}),
    ]
    found = sample(EULER, guided(teachers), ONE_STEP)

    x = start(ONE_STEP)
    estimate = PROBLEM.estimate(x, 5.0)
    noise = Noise(x.shape)(5.0, 0.7)

    def says(network, scale, cond, sigma_s):
        given, levels = estimate + sigma_s * noise, x.new_full((2,), sigma_s)
        free = network(given, levels, cond=uncond)
        return free + scale * (network(given, levels, cond=cond) - free)

    first, second = says(TEACHER, 3.0, cond, 0.7), says(OTHER, 1.5, own, 5.0)
    revised = 0.3 * estimate + 0.2 * first + 0.5 * second
    assert same(found, revised + (x - estimate) / 5.0 * 2.0)


@over_solvers
def test_teachers_add_up(solver):
    """One step of every solver: x' = x'(none) + Σ λ_j (x'(teacher j alone at λ = 1) - x'(none))."""
    one = Teacher(TEACHER, scale=1.0, cfg_scale=2.0, renoise="current")
    two = Teacher(OTHER, scale=1.0, cfg_scale=1.0, renoise=0.4)
    none = sample(solver, guided(teacher_scale=0.0), ONE_STEP)
    alone = [sample(solver, guided(teacher), ONE_STEP) for teacher in (one, two)]
    scales = (0.25, 0.75)
    both = [dataclasses.replace(teacher, scale=s) for teacher, s in zip((one, two), scales)]
    found = sample(solver, guided(both), ONE_STEP)
    assert same(found, none + sum(s * (each - none) for s, each in zip(scales, alone)))


@over_solvers
def test_one_teacher_is_the_keywords(solver):
    """A Teacher, a list of it and a tuple of it: what the wrapper's keywords say."""
    settings = {"scale": 0.6, "steps": {0, 2}, "cfg_scale": 2.0, "renoise": "current"}
    keywords = {key if key == "renoise" else f"teacher_{key}": v for key, v in settings.items()}
    expected = sample(solver, guided(renoise_eta=0.5, **keywords))
    teacher = Teacher(TEACHER, renoise_eta=0.5, **settings)
    for given in (teacher, [teacher], (teacher,)):
        assert torch.equal(sample(solver, guided(given)), expected)


def test_defaults_of_a_teacher_are_the_keywords():
    """The same name, the same default: λ 0.1, one step, CFG 7.5, "next", fresh noise."""
    keywords = inspect.signature(TeacherGuidedDenoiser).parameters
    for field in dataclasses.fields(Teacher):
        name = field.name if field.name in keywords else f"teacher_{field.name}"
        if name in keywords:
            assert field.default == keywords[name].default, name


def test_two_equal_teachers_are_one_of_both_scales():
    """λ_1 + λ_2 for teachers that say the same from the same noise; Σλ = 1 is allowed."""
    parts = [Teacher(TEACHER, scale=s, cfg_scale=CFG, steps=3) for s in (0.1, 0.2, 0.7)]
    whole = guided(teacher_scale=1.0, teacher_steps=3)
    assert same(sample(EULER, guided(parts)), sample(EULER, whole))


def test_more_than_everything():
    """Σλ > 1 at any one step is refused before any call, and allowed where asked for by name."""

    def teachers(first, second, network=TEACHER):
        return [
            Teacher(network, scale=0.6, cfg_scale=CFG, steps=first),
            Teacher(network, scale=0.7, cfg_scale=CFG, steps=second),
        ]

    for steps in (({0}, {0}), (3, {2}), ({1}, {-4})):
        model = TeacherGuidedDenoiser(NeverCalled(), teachers(*steps, NeverCalled()))
        with pytest.raises(ValueError, match=r"sum to 1\.3 at step \d.*Σλ"):
            sample(EULER, model)
    sample(EULER, guided(teachers({0}, {1})))
    found = sample(EULER, guided(teachers({0}, {0}), extrapolate=True), ONE_STEP)
    expected = sample(EULER, guided(teacher_scale=1.3, extrapolate=True), ONE_STEP)
    assert same(found, expected)


def test_scales_that_sum_to_1_but_for_a_rounding():
    """Ten times 0.1 is 1."""
    sample(EULER, guided([Teacher(TEACHER, cfg_scale=CFG)] * 10))


@pytest.mark.parametrize(
    ("teacher", "settings", "error", "match"),
    [
        ([], {}, ValueError, "empty"),
        ((), {}, ValueError, "empty"),
        ([TEACHER], {}, TypeError, "Mixture.*kdpp.Teacher"),
        ([Teacher(TEACHER), None], {}, TypeError, "NoneType.*kdpp.Teacher"),
        (Teacher(TEACHER), {"teacher_scale": 0.2}, ValueError, "kdpp.Teacher"),
        ([Teacher(TEACHER)], {"teacher_steps": 2}, ValueError, "kdpp.Teacher"),
        ([Teacher(TEACHER)], {"teacher_cfg_scale": 1.0}, ValueError, "kdpp.Teacher"),
        ([Teacher(TEACHER)], {"renoise": "random"}, ValueError, "kdpp.Teacher"),
        ([Teacher(TEACHER)], {"renoise_eta": 0.0}, ValueError, "kdpp.Teacher"),
        ([Teacher(TEACHER), Teacher(TEACHER, scale=2.0)], {}, ValueError, "teacher_scale"),
        ("teacher.safetensors", {}, TypeError, "teacher"),
    ],
    ids=str,
)
def test_teachers_that_are_none(teacher, settings, error, match):
    """No teacher, a bare denoiser in a list, settings in two places: each its own error."""
    with pytest.raises(error, match=match):
        TeacherGuidedDenoiser(STUDENT, teacher, **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"cfg_scale": math.nan}, "teacher_cfg_scale"),
        ({"cfg_scale": None}, "teacher_cfg_scale"),
        ({"renoise": 0.0}, "renoise"),
        ({"renoise_eta": 1.2}, "renoise_eta"),
        ({"draws": 0}, "draws"),
        ({"draws": 1.5}, "draws"),
        ({"maps": (torch.clone, torch.clone), "renoise_eta": 0.5}, "renoise_eta=1"),
        ({"draws": 2, "renoise_eta": 0.0}, "one and the same draw"),
    ],
    ids=lambda parameter: "-".join(parameter),
)
def test_bad_settings_of_a_teacher(settings, match):
    """Refused when the Teacher is made."""
    with pytest.raises(ValueError, match=match):
        Teacher(TEACHER, **settings)


@pytest.mark.parametrize(
    "maps",
    [5, (torch.clone,), (1, 2), (torch.clone, None), "there"],
    ids=["number", "one function", "numbers", "no way back", "string"],
)
def test_maps_that_are_no_pair_of_functions(maps):
    """Refused when the Teacher is made, by name."""
    with pytest.raises((TypeError, ValueError), match="maps"):
        Teacher(TEACHER, maps=maps)


def test_a_teacher_with_cfg_of_its_own_must_be_marked():
    """In a Teacher as in the keyword."""
    with pytest.raises(TypeError, match="OwnCFG"):
        Teacher(CFGDenoiser(TEACHER))
    marked = Teacher(kdpp.OwnCFG(CFGDenoiser(TEACHER)), cfg_scale=CFG)
    assert same(sample(EULER, guided(marked)), sample(EULER, guided()))


def test_every_teacher_hears_its_own_arguments():
    """extra_args of a Teacher take the place of the sampler's, for that teacher alone."""
    heard = {}

    def network(name, model):
        def denoise(x, sigma, cond=None, **rest):
            heard.setdefault(name, (cond, rest))
            return model(x, sigma, cond=cond)

        return denoise

    own = seeded(2, SHAPE[0], seed=91)
    cond, uncond = conditions(2)
    teachers = [
        Teacher(network("plain", TEACHER), cfg_scale=1.0),
        Teacher(network("own", OTHER), cfg_scale=1.0, extra_args={"cond": own, "size": 7}),
        Teacher(network("both", OTHER), cfg_scale=2.0, extra_args={"uncond": own}),
    ]
    model = TeacherGuidedDenoiser(network("student", STUDENT), teachers)
    extra = {"cond": cond, "uncond": uncond, "cond_scale": 1.0, "size": 3}
    sample(EULER, model, extra_args=extra)
    assert torch.equal(heard["student"][0], cond) and heard["student"][1] == {"size": 3}
    assert torch.equal(heard["plain"][0], cond) and heard["plain"][1] == {"size": 3}
    assert torch.equal(heard["own"][0], own) and heard["own"][1] == {"size": 7}
    assert torch.equal(heard["both"][0], torch.cat([own, cond]))
    assert set(extra) == {"cond", "uncond", "cond_scale", "size"}


def test_a_teacher_alone_may_have_the_condition():
    """A student without conditions, a teacher with CFG between its own two."""
    cond, uncond = conditions(2)
    both = {"cond": cond, "uncond": uncond}
    own = Teacher(TEACHER, cfg_scale=CFG, extra_args=both)
    found = sample(EULER, guided(own), ONE_STEP, extra_args={})
    x = start(ONE_STEP)
    estimate = STUDENT(x, x.new_full((2,), 5.0))
    taught = PROBLEM.teacher_estimate(estimate + 2.0 * Noise(x.shape)(5.0, 2.0), 2.0)
    revised = 0.9 * estimate + 0.1 * taught
    assert same(found, revised + (x - estimate) / 5.0 * 2.0)
    with pytest.raises(ValueError, match=r"teacher.*uncond"):
        sample(EULER, guided(), extra_args={})


# ------------------------------------------------------------------------- several draws


class Numbered:
    """A noise sampler whose n-th answer is the n-th of a fixed sequence, from `first` on."""

    def __init__(self, first=0):
        self.next = first

    def __call__(self, sigma, sigma_next):
        self.next += 1
        return seeded(*start().shape, seed=500 + self.next)


@over_solvers
def test_draws_are_averaged(solver):
    """Three draws of ε from one teacher: the mean of three runs with those draws."""

    def one_run(draws, first=0):
        teacher = Teacher(TEACHER, scale=0.6, cfg_scale=CFG, draws=draws, renoise="current")
        return sample(solver, guided(teacher, renoise_noise_sampler=Numbered(first)), ONE_STEP)

    singles = [one_run(1, first) for first in range(3)]
    assert same(one_run(3), sum(singles) / 3)
    assert not same(one_run(3), singles[0])


def test_every_draw_has_noise_of_its_own():
    """draws=3 at two steps: two calls, six inputs; the default noise is not repeated either."""
    counted = Counted(TEACHER)
    teacher = Teacher(counted, cfg_scale=1.0, draws=3, steps=2)
    sample(EULER, guided(teacher, renoise_noise_sampler=None))
    assert len(counted.calls) == 2
    inputs = [x for call in counted.calls for x in call.x.chunk(3)]
    assert not any(torch.equal(a, b) for i, a in enumerate(inputs) for b in inputs[:i])


# ------------------------------------------------------------------------- the callback


@over_solvers
def test_the_callback_hears_every_lesson(solver):
    """With several lessons in a step the teachers' entries are lists, in the teachers' order."""
    told = []
    counted = [Counted(TEACHER), Counted(OTHER)]
    teachers = [
        Teacher(counted[0], scale=0.2, cfg_scale=1.0, steps=2),
        Teacher(counted[1], scale=0.3, cfg_scale=1.0, draws=2),
    ]
    sample(solver, guided(teachers), callback=told.append)
    info = told[0]
    (both,) = counted[1].calls  # its two draws are one call
    assert isinstance(info["denoised_teacher"], list) and isinstance(info["renoised"], list)
    outputs = [counted[0].calls[0].output, *both.output.chunk(2)]
    inputs = [counted[0].calls[0].x, *both.x.chunk(2)]
    assert len(info["denoised_teacher"]) == len(info["renoised"]) == 3
    assert all(map(torch.equal, info["denoised_teacher"], outputs))
    assert all(map(torch.equal, info["renoised"], inputs))
    student = info["denoised_student"]
    shares = zip((0.2, 0.15, 0.15), info["denoised_teacher"])
    expected = 0.5 * student + sum(share * taught for share, taught in shares)
    assert same(info["denoised_revised"], expected)
    # One lesson alone is told as tensors; without one, nothing is told.
    assert isinstance(told[1]["denoised_teacher"], torch.Tensor)
    assert torch.equal(told[1]["renoised"], counted[0].calls[1].x)
    assert "denoised_teacher" not in told[2]


# ------------------------------------------------------------------------- the mask


def chequered(*shape):
    """A mask of zeros and ones."""
    return (seeded(*shape, seed=17) > 0).double()


@over_solvers
def test_a_mask_restricts_the_teacher(solver):
    """One step: where it is 0 the result is the unguided one, where it is 1 the guided one."""
    mask = chequered(*SHAPE[1:])
    assert 0 < mask.sum() < mask.numel()
    none, full = (sample(solver, guided(teacher_scale=s), ONE_STEP) for s in (0.0, 0.7))
    found = sample(solver, guided(teacher_scale=0.7, teacher_mask=mask), ONE_STEP)
    outside, inside = (mask == value for value in (0, 1))
    assert same(found[..., outside], none[..., outside])
    assert same(found[..., inside], full[..., inside])
    assert not same(full, none)


@over_solvers
@pytest.mark.parametrize(
    "shape", [(), (2, 2), (3, 1, 1), (2, 1, 1, 1), (2, 3, 2, 2), (1, 3, 2, 2)], ids=str
)
def test_masks_broadcast(solver, shape):
    """Between 0 and 1 the mask weighs λ, and any shape that broadcasts stands for its copies."""
    mask = seeded(*shape, seed=18).sigmoid()
    none, full = (sample(solver, guided(teacher_scale=s), ONE_STEP) for s in (0.0, 0.7))
    found = sample(solver, guided(teacher_scale=0.7, teacher_mask=mask), ONE_STEP)
    assert same(found, none + mask * (full - none))


@pytest.mark.parametrize("value", [0.0, 1.0])
@over_solvers
def test_masks_of_one_value(solver, value):
    """A mask of zeros is no teacher, a mask of ones is no mask, over a whole run."""
    settings = {"teacher_steps": 3, "teacher_scale": 0.7}
    found = sample(solver, guided(teacher_mask=torch.full((2, 2), value), **settings))
    settings["teacher_scale"] *= value
    assert same(found, sample(solver, guided(**settings)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float32])
def test_masks_of_any_dtype(dtype):
    """Zeros and ones in any dtype, and the mask given is not written to."""
    mask = chequered(2, 2)
    other = mask.to(dtype)
    expected = sample(EULER, guided(teacher_mask=mask))
    assert torch.equal(sample(EULER, guided(teacher_mask=other)), expected)
    assert other.dtype == dtype and torch.equal(other.double(), mask)


def test_a_mask_serves_every_teacher():
    """Two teachers under one mask."""
    mask = chequered(2, 2)
    teachers = [Teacher(TEACHER, cfg_scale=CFG), Teacher(OTHER, scale=0.3, draws=2)]
    none, full = (sample(EULER, model, ONE_STEP) for model in (guided(teacher_scale=0.0),
                                                               guided(teachers)))  # fmt: skip
    found = sample(EULER, guided(teachers, teacher_mask=mask), ONE_STEP)
    assert same(found, none + mask * (full - none))


@pytest.mark.parametrize("shape", [(3,), (5, 5), (2, 2, 2), (3, 3, 2, 2), (1, 2, 3, 2, 2)])
@over_solvers
def test_a_mask_of_another_shape(solver, shape):
    """Refused before any call, naming both shapes."""
    model = TeacherGuidedDenoiser(NeverCalled(), NeverCalled(), teacher_mask=torch.ones(shape))
    message = f"teacher_mask.*{re.escape(str(tuple(shape)))}.*{re.escape(str((2, *SHAPE)))}"
    with pytest.raises(ValueError, match=message):
        sample(solver, model)


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (torch.tensor([0.0, 1.1]), ValueError, r"teacher_mask.*\[0, 1\]"),
        (torch.tensor([-0.1, 1.0]), ValueError, r"teacher_mask.*\[0, 1\]"),
        (torch.tensor([math.nan, 1.0]), ValueError, r"teacher_mask.*\[0, 1\]"),
        ([[0, 1], [1, 0]], TypeError, "teacher_mask.*list.*tensor"),
        (1.0, TypeError, "teacher_mask.*float.*tensor"),
        ("mask.png", TypeError, "teacher_mask.*str.*tensor"),
    ],
    ids=str,
)
def test_masks_that_are_none(mask, error, match):
    """Refused when the wrapper is made."""
    with pytest.raises(error, match=match):
        guided(teacher_mask=mask)


# ------------------------------------------------------------------------- another latent space

WIDTH = math.prod(SHAPE)
TURN = torch.linalg.qr(seeded(WIDTH, WIDTH, seed=19)).Q


def flat(x):
    """To the other space: flattened and turned."""
    return x.flatten(1) @ TURN.T


def unflat(y):
    """Back from it."""
    return (y @ TURN).reshape(-1, *SHAPE)


def turned(x):
    """To another space of the same shape."""
    return flat(x).reshape(x.shape)


def unturned(y):
    """Back from it."""
    return unflat(y.flatten(1))


SPACES = {"same shape": (turned, unturned), "flat": (flat, unflat)}
over_spaces = pytest.mark.parametrize(("there", "back"), SPACES.values(), ids=SPACES)


def elsewhere(model, there, back):
    """The teacher of the data in the other space."""
    return Counted(lambda y, sigma, cond=None: there(model(back(y), sigma, cond=cond)))


@over_spaces
@over_solvers
def test_a_teacher_in_another_latent_space(solver, there, back):
    """Through an orthogonal map it gives what a teacher in the student's own space gives."""
    settings = {"scale": 0.6, "steps": 2, "cfg_scale": CFG}
    expected = sample(solver, guided(Teacher(TEACHER, **settings)))
    teacher = elsewhere(TEACHER, there, back)
    shape = there(start()).shape
    # The renoise noise is the teacher's; orthogonal, the map takes the same noise there.
    noise = Noise(start().shape, change=there)
    model = guided(Teacher(teacher, maps=(there, back), **settings), renoise_noise_sampler=noise)
    assert same(sample(solver, model), expected)
    assert [call.x.shape for call in teacher.calls] == [(2 * shape[0], *shape[1:])] * 2


@over_spaces
def test_maps_with_everything_else(there, back):
    """A mask in the student's space, another teacher beside it, draws, the noise of its own."""
    mask = chequered(2, 2)
    teachers = [
        Teacher(elsewhere(TEACHER, there, back), cfg_scale=CFG, maps=(there, back), draws=2),
        Teacher(OTHER, scale=0.3, cfg_scale=1.0),
    ]
    none, full = (sample(EULER, model, ONE_STEP) for model in (
        guided(teacher_scale=0.0),
        guided(teachers, renoise_noise_sampler=None),
    ))  # fmt: skip
    masked = guided(teachers, renoise_noise_sampler=None, teacher_mask=mask)
    assert same(sample(EULER, masked, ONE_STEP), none + mask * (full - none))
    assert not same(full, none)


def test_the_callback_hears_a_teacher_elsewhere_from_here():
    """Its estimate is told in the student's space, its input in its own."""
    told = []
    model = guided(Teacher(elsewhere(TEACHER, flat, unflat), cfg_scale=1.0, maps=(flat, unflat)),
                   renoise_noise_sampler=None)  # fmt: skip
    sample(EULER, model, callback=told.append)
    assert told[0]["denoised_teacher"].shape == start().shape
    assert told[0]["renoised"].shape == (2, WIDTH)


def test_a_map_back_to_another_shape():
    """It must return the student's shape."""
    teacher = Teacher(elsewhere(TEACHER, flat, unflat), cfg_scale=1.0, maps=(flat, lambda y: y))
    with pytest.raises(ValueError, match="map back"):
        sample(EULER, guided(teacher, renoise_noise_sampler=None))


def test_renoise_noise_of_the_students_shape_does_not_fit_elsewhere():
    """A sampler that knows the student's shape only is refused by name."""
    teacher = Teacher(elsewhere(TEACHER, flat, unflat), cfg_scale=1.0, maps=(flat, unflat))
    with pytest.raises(ValueError, match="renoise_noise_sampler"):
        sample(EULER, guided(teacher))


# ------------------------------------------------------------------------- the trained range


class Ranged(torch.nn.Module):
    """A denoiser that says how far it was trained."""

    sigma_min, sigma_max = 0.5, 5.0

    def __init__(self, model=TEACHER):
        super().__init__()
        self.inner = model
        self.levels = []

    def forward(self, x, sigma, cond=None):
        """The model's answer."""
        self.levels.append(float(sigma[0]))
        return self.inner(x, sigma, cond=cond)


class Host(torch.nn.Module):
    """A host's wrapper, which holds the denoiser as inner_model."""

    def __init__(self, model):
        super().__init__()
        self.inner_model = model

    def forward(self, x, sigma, **extra):
        """The model's answer."""
        return self.inner_model(x, sigma, **extra)


CHAINS = {
    "itself": lambda ranged: ranged,
    "OwnCFG": lambda ranged: kdpp.OwnCFG(CFGDenoiser(ranged)),
    "inner_model": Host,
    "model": Counted,
    "a long chain": lambda ranged: kdpp.OwnCFG(CFGDenoiser(Counted(Host(ranged)))),
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize(
    ("renoise", "expected"),
    [(9.0, [5.0] * 5), (0.1, [0.5] * 5), ("current", [5.0, 4.0, 1.5, 0.6, 0.5])],
)
def test_levels_outside_the_teachers_range_are_clamped(chain, renoise, expected):
    """To the nearer end, for the input as for the level; one warning in the wrapper's life."""
    ranged = Ranged()
    settings = {"teacher_steps": STEPS, "teacher_scale": 0.5}
    model = guided(chain(ranged), renoise=renoise, **settings)
    with pytest.warns(UserWarning, match=r"σ_s = .*\[0\.5, 5\].*clamped") as caught:
        found = sample(EULER, model)
        sample(EULER, model)
    assert len(caught) == 1
    assert ranged.levels == expected * 2
    levels = iter(expected)
    unlimited = guided(renoise=lambda i, sigma, sigma_next: next(levels), **settings)
    assert same(found, sample(EULER, unlimited))


def test_the_scale_is_evaluated_at_the_clamped_level():
    """λ(step, σ_s) sees the level that the teacher sees."""
    told = []

    def scale(step, sigma_s):
        told.append(sigma_s)
        return 0.5

    with pytest.warns(UserWarning, match="clamped"):
        sample(EULER, guided(Ranged(), renoise=9.0, teacher_scale=scale))
    assert told == [5.0]


@pytest.mark.parametrize("excess", [1.0, 1.0 + 1e-5])
def test_a_rounding_above_the_range_is_clamped_in_silence(excess):
    """Schedules start some float32 roundings above sigma_max: no warning for that."""
    ranged = Ranged()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(EULER, guided(ranged, renoise=5.0 * excess))
        sample(EULER, guided(ranged, renoise=0.5 / excess))
    assert ranged.levels == [5.0, 0.5]


def test_inside_the_range_nothing_is_clamped():
    """Nor is anything warned of; nor for a step to 0, which is not revised."""
    ranged = Ranged()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(EULER, guided(ranged, teacher_steps={1, 2}))
        sample(EULER, guided(ranged), torch.tensor([5.0, 0.0]))
    assert ranged.levels == pytest.approx([1.5, 0.6])


def test_each_teacher_has_its_own_range():
    """Only the teacher that was trained so far is clamped."""
    ranged, free = Ranged(), Counted(OTHER)
    teachers = [Teacher(one, cfg_scale=1.0, renoise=9.0) for one in (ranged, free)]
    with pytest.warns(UserWarning, match="clamped"):
        sample(EULER, guided(teachers))
    assert ranged.levels == [5.0]
    assert [float(call.sigma[0]) for call in free.calls] == [9.0]


# ------------------------------------------------------------------------- with_denoisers


@over_solvers
def test_other_denoisers_under_the_same_guidance(solver):
    """with_denoisers wraps every network and keeps every setting: the same image."""
    teachers = [
        Teacher(TEACHER, scale=[0.1, 0.2, 0.3, 0.4, 0.5], steps={0, -1}, cfg_scale=2.0,
                renoise="current", renoise_eta=0.3, draws=2),
        Teacher(elsewhere(OTHER, turned, unturned), scale=1.0, steps=NoiseRange(0.5, 9.0),
                maps=(turned, unturned), extra_args={"cond": seeded(2, SHAPE[0], seed=93)}),
    ]  # fmt: skip
    mask = chequered(2, 2)
    model = guided(teachers, teacher_mask=mask, extrapolate=True)
    wrapped = []

    def wrap(denoiser):
        wrapped.append(Counted(denoiser))
        return wrapped[-1]

    other = model.with_denoisers(wrap)
    assert torch.equal(sample(solver, other), sample(solver, model))
    assert [one.model for one in wrapped] == [STUDENT, *(t.denoiser for t in teachers)]
    assert all(one.calls for one in wrapped)
    assert [other.student, *(t.denoiser for t in other.teachers)] == wrapped
    assert model.student is STUDENT
    for old, new in zip(model.teachers, other.teachers):
        assert dataclasses.replace(new, denoiser=old.denoiser) == old
    for name in ("renoise_noise_sampler", "teacher_mask", "extrapolate", "flow"):
        assert getattr(other, name) is getattr(model, name), name


# ------------------------------------------------------------------------- 2S with a general r

R = pytest.mark.parametrize("r", [0.3, 0.5, 0.8, 1.0])
TWO_S = kdpp.SOLVERS["dpmpp_2s_ancestral"]
TWO_S_PP = kdpp.SOLVERS["dpmpp_2s_ancestral_cfg_pp"]


@R
def test_2s_with_any_middle_point_is_algorithm_1(r):
    """λ = 0, η = 0: DPM-Solver++(2S), Algorithm 1, written in VP with that r."""
    sigmas = SIGMAS[:-1]
    expected = reference.dpmpp_2s_vp(PROBLEM.estimate, start(), sigmas, r)
    found = sample(TWO_S, guided(teacher_scale=0.0), sigmas, eta=0.0, r=r)
    assert relative(found, expected) <= 1e-11


@R
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("solver", [TWO_S, TWO_S_PP], ids=lambda s: s.name)
def test_2s_takes_the_revision_by_its_own_coefficient(solver, eta, r):
    """One guided step adds (1 - e^{-h})/(2r)·λ·(x̂_ψ - x̂_u), h being to σ_down."""
    told = []
    full = guided(teacher_scale=0.6)
    found = sample(solver, full, ONE_STEP, eta=eta, r=r, callback=told.append)
    none = sample(solver, guided(teacher_scale=0.0), ONE_STEP, eta=eta, r=r)
    variance = eta**2 * 2.0**2 * (1 - (2.0 / 5.0) ** 2)
    decay = math.sqrt(4.0 - variance) / 5.0
    change = told[0]["denoised_teacher"] - told[0]["denoised_student"]
    assert same(found, none + (1 - decay) / (2 * r) * 0.6 * change)


@pytest.mark.parametrize("r", [0.0, -0.5, 1.01, math.nan, math.inf])
@pytest.mark.parametrize("solver", [s for s in SOLVERS if accepts(s, "r")], ids=lambda s: s.name)
def test_a_middle_point_outside_the_step(solver, r):
    """r lies in (0, 1]; refused before any call."""
    model = TeacherGuidedDenoiser(NeverCalled(), NeverCalled())
    with pytest.raises(ValueError, match=r"^r is"):
        sample(solver, model, r=r)


# ------------------------------------------------------------------------- the docs

PAGE = Path(__file__).parents[1] / "docs" / "guidance.md"


def test_the_examples_of_the_page_run(capsys):
    """Every example of docs/guidance.md, one after the other, as a reader would type them."""
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) >= 8
    variables = {"__name__": "guidance"}
    for example in examples:
        if needs.k_sampling is not None or "kdiffusion.sampling.sample_" not in example:
            exec(compile(example, str(PAGE), "exec"), variables)
    assert capsys.readouterr().out == ""


def test_the_page_names_every_way_to_guide():
    """Every setting of the wrapper and of a Teacher is on the page."""
    page = PAGE.read_text()
    names = set(inspect.signature(TeacherGuidedDenoiser).parameters) - {"student", "teacher"}
    names |= {field.name for field in dataclasses.fields(Teacher)} - {"denoiser"}
    names |= {"NoiseRange", "sds_scale", "sample_dpm_adaptive_tg", "kdpp.Teacher"}
    assert {name for name in names if name not in page} == set()
