"""The guided step in its own words: x_s, x̂_new, what is heard, what is told."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kdpp
import problems
from kdpp import Teacher, TeacherGuidedDenoiser
from kdpp.guided_step import mix, renoise_row
from kdpp.plan import FLOW, VE, Row
from kdpp.update import Update
from problems import Counted, Problem, Tape, karras, mixture, relative, run, seeded

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
SIGMAS = karras(4)
PROBLEM = Problem()
MASK = torch.tensor([[0.0, 0.5], [1.0, 0.25]], dtype=torch.float64)
weights = st.floats(-2.0, 2.0)


def sample(teacher, solver="dpmpp_2m", callback=None, **settings):
    """A guided run of the problem's student with fixed noise."""
    x = PROBLEM.start(SIGMAS)
    settings.setdefault("renoise_noise_sampler", Tape(x, 6))
    model = TeacherGuidedDenoiser(PROBLEM.student, teacher, **settings)
    solver = kdpp.SOLVERS.get(solver, solver)
    options = {"extra_args": PROBLEM.extra_args, "noise_sampler": Tape(x, 5)}
    return run(solver, model, x, SIGMAS, callback=callback, **options)


# ------------------------------------------------------------------------- the two lines


@given(rho=st.floats(0.0, 1.0), sigma_s=st.floats(0.01, 20.0), sigma=st.floats(0.01, 20.0))
def test_x_s_is_the_papers_line(rho, sigma_s, sigma):
    """x_s = x̂ + σ_s ε, ε = sqrt(1-ρ²)·(x - d)/σ + ρ n, in plain arithmetic, under CFG++ too."""
    x, denoised, uncond, noise = (seeded(2, 3, seed=seed) for seed in range(4))
    row = renoise_row(sigma, sigma_s, rho)
    for cfg_pp, direction in ((False, denoised), (True, uncond)):
        made = Update.of(row, sigma, sigma_s, VE, cfg_pp)
        drawn = None if made.noise is None else noise
        epsilon = (1 - rho**2) ** 0.5 * (x - direction) / sigma + rho * noise
        found = made(((x, denoised), (), (direction,)), drawn)
        assert relative(found, denoised + sigma_s * epsilon) <= 1e-11


@given(
    row=st.tuples(weights, weights, weights),
    scales=st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=3),
    space=st.sampled_from([VE, FLOW]),
    cfg_pp=st.booleans(),
)
def test_an_update_of_shares_is_the_update_of_the_mix(row, scales, space, cfg_pp):
    """Σ w x̂_new with the teachers' terms folded in is the same row of x̂_new as `mix` makes it."""
    denoised, first, second = row
    sigma, reached = 2.0, 0.7
    target = sigma * (1.0 - denoised - first - second)
    given_row = Row(target, denoised, (first, second))
    x, student, uncond, earlier, *taught = (seeded(2, 3, seed=s) for s in range(4 + len(scales)))
    directions = (uncond if cfg_pp else student, earlier)
    folded = Update.of(given_row, sigma, reached, space, cfg_pp, scales)
    plain = Update.of(given_row, sigma, reached, space, cfg_pp, (1.0,))
    new = mix(student, taught, scales)
    found = folded(((x, student), tuple(taught), directions), None)
    expected = plain(((x, student), (new,), directions), None)
    assert float((found - expected).abs().max()) <= 1e-10


def test_x_new_is_the_papers_line():
    """(1 - Σλ) x̂ + Σ λ_j x̂_ψj."""
    student, one, two = (seeded(2, 3, seed=seed) for seed in range(3))
    expected = 0.5 * student + 0.2 * one + 0.3 * two
    assert relative(mix(student, [one, two], [0.2, 0.3]), expected) <= 1e-14


# ------------------------------------------------------------------------- a mix of one's own


@over_solvers
def test_the_linear_mix_as_a_function_changes_nothing(solver):
    """combine=mix: x̂_new is made before the update instead of in it; two teachers, a mask."""
    teachers = [Teacher(mixture(1), 0.3, 2, 3.0), Teacher(mixture(2), 0.2, 3, 1.0, 0.4, 0.5)]
    expected = sample(teachers, solver, teacher_mask=MASK)
    found = sample(teachers, solver, teacher_mask=MASK, combine=mix)
    assert relative(found, expected) <= 1e-12


def test_a_mix_is_given_estimates_and_scales_and_comes_before_the_mask():
    """combine(x̂, estimates, λs) -> x̂_new; where the mask is 0 the student's estimate stays."""
    asked, told = [], []

    def loudest(denoised, estimates, scales):
        asked.append((denoised, estimates, scales))
        return torch.maximum(denoised, estimates[0])

    teacher = Teacher(mixture(1), 0.3, 1, 3.0)
    sample(teacher, callback=told.append, combine=loudest, teacher_mask=MASK)
    student, says = told[0]["denoised_student"], told[0]["denoised_teacher"]
    assert asked[0][2] == [0.3]
    assert torch.equal(asked[0][0], student) and torch.equal(asked[0][1][0], says)
    expected = torch.lerp(student, torch.maximum(student, says), MASK)
    assert torch.equal(told[0]["denoised_revised"], expected)
    after = told[0]["denoised_revised"] + (told[0]["x"] - student) / SIGMAS[0] * SIGMAS[1]
    assert relative(told[1]["x"], after) <= 1e-12


def test_what_a_mix_must_be():
    """A function, that returns a tensor of the latent's shape."""
    with pytest.raises(TypeError, match=r"combine is 'sum'; it must be a function"):
        TeacherGuidedDenoiser(mixture(0), mixture(1), combine="sum")
    with pytest.raises(ValueError, match=r"combine function returned shape \(2,\)"):
        sample(mixture(1), combine=lambda x, estimates, scales: x[:, 0, 0, 0])


# ------------------------------------------------------------------------- one that watches


@over_solvers
def test_a_teacher_that_observes_leaves_every_bit(solver):
    """It is asked at its steps and reported, and weighs nothing, whatever its scale."""
    counted, told = Counted(mixture(1)), []
    watching = Teacher(counted, 0.9, 3, 3.0, observe=True)
    found = sample(watching, solver, told.append)
    assert torch.equal(found, sample(mixture(1), solver, teacher_steps=0))
    assert len(counted.calls) == 3
    (first, *_) = told
    assert relative(first["denoised_teacher"], said_by_hand(first)) <= 1e-12
    assert torch.equal(first["denoised_revised"], first["denoised_student"])


def said_by_hand(info):
    """The observer's estimate, written out: CFG 3 at σ_s, the level after the first step."""
    free, cond = (
        mixture(1)(info["renoised"], info["renoised"].new_full((2,), float(SIGMAS[1])), cond=c)
        for c in (PROBLEM.extra_args["uncond"], PROBLEM.extra_args["cond"])
    )
    return free + 3.0 * (cond - free)


def test_an_observer_beside_a_teacher():
    """Both are told, in their order; the images are those of the one that is heard."""
    told, noise = [], lambda *_: torch.ones_like(PROBLEM.start(SIGMAS))
    heard, watching = Teacher(mixture(1), 0.3), Teacher(mixture(2), 0.9, observe=True)
    found = sample([watching, heard], callback=told.append, renoise_noise_sampler=noise)
    assert torch.equal(found, sample([heard], renoise_noise_sampler=noise))
    student, (_, says) = told[0]["denoised_student"], told[0]["denoised_teacher"]
    assert relative(told[0]["denoised_revised"], student + 0.3 * (says - student)) <= 1e-12
    asked = []

    def counting(denoised, estimates, scales):
        asked.append((len(estimates), list(scales)))
        return mix(denoised, estimates, scales)

    found = sample([watching, heard], combine=counting, renoise_noise_sampler=noise)
    assert relative(found, sample([heard], renoise_noise_sampler=noise)) <= 1e-12
    assert set(map(str, asked)) == {"(1, [0.3])"}


# ------------------------------------------------------------------------- what is told


@pytest.mark.parametrize("several", [False, True])
def test_under_a_mask_callbacks_are_told_the_teachers_own_estimate(several):
    """denoised_teacher is what the teacher said everywhere; the images hear it under the mask."""
    told = []
    ones = problems.Constant(torch.ones(problems.SHAPE, dtype=torch.float64))
    teachers = [Teacher(ones, 0.4)] * 2 if several else [Teacher(ones, 0.4)]
    sample(teachers, callback=told.append, teacher_mask=MASK)
    says = told[0]["denoised_teacher"]
    for one in says if several else [says]:
        assert torch.equal(one, torch.ones_like(one))
    student, share = told[0]["denoised_student"], 0.4 * len(teachers) * MASK
    expected = student + share * (1.0 - student)
    assert relative(told[0]["denoised_revised"], expected) <= 1e-12


def test_one_network_in_two_latent_spaces():
    """Two teachers of one denoiser, each with maps of its own, are asked each in its own space."""

    def scaled(by):
        return (lambda x: by * x), (lambda x: x / by)

    def settings(network):
        return [Teacher(network, 0.3, 1, 1.0, maps=scaled(by)) for by in (1.0, 3.0)]

    shared, apart = mixture(1), [mixture(1), mixture(1)]
    others = [one for network in apart for one in settings(network)][::3]
    assert torch.equal(sample(settings(shared)), sample(others))
    assert relative(sample(settings(shared)), sample([settings(shared)[0]] * 2)) > 1e-3


# ------------------------------------------------------------------------- settings that are held


def test_a_list_of_scales_is_copied():
    """Changed after construction, it changes nothing; nor does a list of steps."""
    scales, steps = [0.1, 0.2, 0.3, 0.4], [0, 1]
    model = TeacherGuidedDenoiser(
        PROBLEM.student, mixture(1), teacher_scale=scales, teacher_steps=steps
    )
    scales[0] = float("nan")
    steps[0] = 99
    x = PROBLEM.start(SIGMAS)
    found = kdpp.sample_euler_tg(model, x, SIGMAS, PROBLEM.extra_args, disable=True)
    assert found.isfinite().all()


def test_a_teachers_own_arguments_are_copied():
    """What is put into the dict later is not there."""
    arguments = {"cond": torch.zeros(2)}
    teacher = kdpp.Teacher(mixture(1), extra_args=arguments, cfg_scale=1.0)
    arguments["cond_scale"] = 9.0
    assert "cond_scale" not in teacher.extra_args


def test_a_teachers_cfg_scale_has_one_name():
    """cond_scale in a Teacher's extra_args would be passed over: it is refused."""
    with pytest.raises(ValueError, match=r"cfg_scale; take cond_scale out"):
        Teacher(mixture(1), extra_args={"cond_scale": 9.0})


def test_steps_may_be_a_tensor():
    """A number or a list of them, as torch gives it."""
    for steps, expected in ((torch.tensor(1), 1), (torch.tensor([0, 2]), [0, 2])):
        found = sample(mixture(1), teacher_steps=steps)
        assert torch.equal(found, sample(mixture(1), teacher_steps=expected))


def test_scales_that_sum_to_little_more_than_1_are_refused():
    """Σλ = 1.04 leaves the student a negative share."""
    teachers = [Teacher(mixture(1), 0.54), Teacher(mixture(2), 0.5)]
    with pytest.raises(ValueError, match=r"sum to 1\.04 at step 0"):
        sample(teachers)


def test_other_denoisers_keep_every_setting():
    """`with_denoisers` changes the networks and no more."""
    settings = {
        "teacher_mask": MASK, "combine": mix, "extrapolate": True, "float32_state": False,
        "max_batch": 3, "flow": False, "renoise_noise_sampler": lambda *_: None,
    }  # fmt: skip
    model = TeacherGuidedDenoiser(mixture(0), Teacher(mixture(1), 0.2, draws=2), **settings)
    twin = model.with_denoisers(lambda denoiser: denoiser)
    assert {name: getattr(twin, name) for name in settings} == settings
    assert twin.teachers == model.teachers


# ------------------------------------------------------------------------- memory used again


class Reusing(torch.nn.Module):
    """A denoiser that writes every answer of one shape into the same tensor."""

    def __init__(self, model):
        super().__init__()
        self.model, self.answers = model, {}

    def forward(self, x, sigma, cond=None):
        buffer = self.answers.setdefault(x.shape, torch.empty_like(x))
        return buffer.copy_(self.model(x, sigma, cond=cond))


@pytest.mark.parametrize("cond_scale", [1.0, 2.5])
@over_solvers
def test_an_output_buffer_that_is_used_again_spoils_nothing_in_inference_mode(solver, cond_scale):
    """Where torch does not count writes, answers that are kept are copied: the right image."""
    problem = Problem(cond_scale=cond_scale)
    x, guidance = problem.start(SIGMAS), {"teacher_steps": 2, "teacher_scale": 0.4}
    expected = problem.sample(solver, x, SIGMAS, guidance)
    problem.student = Reusing(mixture(0))
    problem.teacher = Reusing(mixture(1))
    with torch.inference_mode():
        found = problem.sample(solver, x, SIGMAS, guidance)
    assert relative(found, expected) <= 1e-12


@pytest.mark.parametrize("inference", [False, True])
@over_solvers
def test_a_student_that_is_its_own_teacher_in_one_buffer(solver, inference):
    """Its second look must not be taken over its first: a refusal, or the right image."""
    problem = Problem(student=mixture(0), teacher=mixture(0), teacher_cfg_scale=2.5)
    x, guidance = problem.start(SIGMAS), {"teacher_scale": 0.4, "renoise_eta": 0.5}
    expected = problem.sample(solver, x, SIGMAS, guidance)
    problem.student = problem.teacher = Reusing(mixture(0))
    try:
        with torch.inference_mode(inference):
            found = problem.sample(solver, x, SIGMAS, guidance)
    except ValueError as error:
        assert not inference and "wrote its answer into memory" in str(error)
    else:
        assert relative(found, expected) <= 1e-12


def test_two_teachers_in_one_buffer_are_refused():
    """The second teacher's answer over the first one's: an error where torch counts the writes."""

    def teachers():
        buffer = torch.empty_like(PROBLEM.start(SIGMAS))

        def speaking(model):
            return lambda x, sigma, cond=None: buffer.copy_(model(x, sigma, cond=cond))

        return [Teacher(speaking(mixture(seed)), 0.2, 1, 1.0) for seed in (1, 2)]

    with pytest.raises(ValueError, match="the teacher wrote its answer into memory"):
        sample(teachers())
    with torch.inference_mode():
        found = sample(teachers())
    apart = [Teacher(mixture(seed), 0.2, 1, 1.0) for seed in (1, 2)]
    assert relative(found, sample(apart)) <= 1e-12
