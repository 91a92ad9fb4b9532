"""Reflection: a strong step down, a weak one up, then the solver's own; in every solver."""

import math

import pytest
import torch

import kdpp
import problems
from kdpp import NoiseRange, Reflection, TeacherGuidedDenoiser, Weighted, WeightedSum
from problems import (
    SHAPE,
    Constant,
    Counted,
    NeverCalled,
    Problem,
    conditions,
    gaussian,
    karras,
    mixture,
    relative,
    run,
    seeded,
)
from test_algebra import Flow, Lent, guided_estimate, noting
from test_cost import Ledger
from test_guidance import Noise

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
EULER = kdpp.SOLVERS["euler"]
SIGMAS = torch.tensor([10.0, 4.0, 1.5, 0.6, 0.2, 0.0], dtype=torch.float64)
TAUS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64)
STUDENT, WEAK, TEACHER = mixture(0), mixture(1), mixture(2)
PROBLEM = Problem()
NEVER = NeverCalled()


def start(sigmas=SIGMAS):
    return PROBLEM.start(sigmas)


def sample(solver, reflection, x=None, sigmas=SIGMAS, student=STUDENT, **options):
    """One run of the student with that reflection, with noise that depends on the step alone."""
    x = start(sigmas) if x is None else x
    settings = {"renoise_noise_sampler": Noise(x.shape), "reflection": reflection}
    model = TeacherGuidedDenoiser(student, options.pop("teacher", None),
                                  **settings, **options.pop("settings", {}))  # fmt: skip
    options = {"noise_sampler": Noise(x.shape, seed=5), **options}
    return run(solver, model, x, sigmas, **{"extra_args": PROBLEM.extra_args, **options})


def estimate(model, x, sigma, scale):
    cond, uncond = conditions(2)
    return guided_estimate(model, x, x.new_full((2,), sigma), cond, uncond, scale)[0]


def reflected(x, sigma, sigma_next, strong=STUDENT, weak=WEAK, scales=(2.5, 2.5)):
    """Down and up, written out."""
    d = estimate(strong, x, sigma, scales[0])
    x = d + (x - d) / sigma * sigma_next
    d = estimate(weak, x, sigma_next, scales[1])
    return d + (x - d) / sigma_next * sigma


def same(found, expected):
    return relative(found, expected) <= 1e-11


@over_solvers
def test_the_first_step_starts_from_the_reflected_point(solver):
    """The run with it is the run without from there, in every solver; and is another picture."""
    found = sample(solver, Reflection(WEAK))
    moved = reflected(start(), 10.0, 4.0)
    assert same(found, sample(solver, None, moved))
    assert not relative(found, sample(solver, None)) < 1e-5


@pytest.mark.parametrize("flow", [False, True])
def test_every_step_written_out(flow):
    """Euler with each step reflected, from τ = 1 too; the weak model with its CFG and condition."""
    kind = Flow if flow else (lambda model: model)
    sigmas = TAUS if flow else SIGMAS
    strong, weak = kind(STUDENT), kind(WEAK)
    expected = start(sigmas)
    for sigma, sigma_next in problems.pairs(sigmas):
        if sigma_next:
            expected = reflected(expected, sigma, sigma_next, strong, weak, (2.5, 0.7))
        d = estimate(strong, expected, sigma, 2.5)
        expected = d + (expected - d) / sigma * sigma_next
    reflection = Reflection(weak, steps=9, cfg_scale=0.7)
    assert same(sample(EULER, reflection, sigmas=sigmas, student=strong), expected)


def test_models_that_agree_on_a_straight_line_reflect_to_the_same_point():
    """Down and up along one line: data of one image; another weak image moves x as the formula."""
    image, other = Constant(seeded(*SHAPE, seed=1)), Constant(seeded(*SHAPE, seed=2))

    def begun(weak):
        """Where the first step starts."""
        seen = []
        listen = {"callback": lambda info: seen.append(info["x"])}
        sample(EULER, Reflection(weak), student=image, **listen)
        return seen[0]

    assert same(begun(image), start())
    moved = (10.0 - 4.0) / 4.0 * (image.value - other.value)
    assert same(begun(other) - start(), moved.expand_as(start()))


def test_the_step_upwards_is_encodes():
    """DDIM's step down by Euler, and up by `kdpp.encode`."""
    levels = SIGMAS[:2]
    extra = PROBLEM.extra_args
    down = kdpp.sample_euler_tg(
        TeacherGuidedDenoiser(STUDENT), start(), levels, extra, disable=True
    )
    up = kdpp.encode(WEAK, down, levels.flip(0), extra, disable=True)
    seen = []
    sample(EULER, Reflection(WEAK), callback=lambda info: seen.append(info["x"]))
    assert same(seen[0], up)


def test_gaussians_move_towards_the_strong_mean():
    """Exact denoisers of Gaussians: x moves from the weak mean to the strong one's side."""
    strong, weak = gaussian(0), gaussian(0)
    weak.mean = weak.mean - 1.0
    x = strong.mean.expand(2, *SHAPE) + 0.0
    seen = []
    sample(EULER, Reflection(weak), x, student=strong, extra_args={},
           callback=lambda info: seen.append(info["x"]))  # fmt: skip
    # From the mean D = x, so the step down stays; up it leaves the weak mean by W = σ'²/(c+σ'²).
    weight = 16.0 / (strong.variance + 16.0)
    expected = x + (10.0 - 4.0) / 4.0 * weight * 1.0
    assert same(seen[0], expected)


@over_solvers
def test_it_costs_two_evaluations_a_step(solver):
    """One more of the student, at the step's level, and one of the weak model, at the next."""
    plain, student, weak = Counted(STUDENT), Counted(STUDENT), Counted(WEAK)
    sample(solver, None, student=plain)
    sample(solver, Reflection(weak, steps=2), student=student)
    assert len(student.calls) == len(plain.calls) + 2
    assert [float(call.sigma[0]) for call in weak.calls] == [4.0, 1.5]
    assert float(student.calls[0].sigma[0]) == 10.0
    assert {len(call.x) for call in weak.calls} == {4}


def test_it_costs_two_kernels_a_step():
    """The two steps, and nothing read."""
    counts = []
    for steps in (0, 3):
        ledger = Ledger()
        nets = [ledger.outside(lambda x, sigma, cond=None, f=f: f * x) for f in (0.3, 0.2)]
        x = seeded(2, 3, 5, 7, seed=1, dtype=torch.float32) * 14.6
        model = TeacherGuidedDenoiser(nets[0], reflection=Reflection(nets[1], steps=steps))
        with ledger:
            run(EULER, model, x, karras(6), extra_args={})
        counts.append(len(ledger.kernels))
    assert counts[1] - counts[0] == 3 * 2


WHERE = {
    "the first two": (2, {0, 1}),
    "by index": ({-2, 1}, {1, 3}),
    "a range": (NoiseRange(0.5, 5.0), {1, 2, 3}),
    "all that can be": (99, {0, 1, 2, 3}),
}


@pytest.mark.parametrize(("steps", "taken"), WHERE.values(), ids=WHERE)
def test_which_steps(steps, taken):
    """As a teacher's; the step to 0 is passed over where it is not asked for."""
    weak = Counted(WEAK)
    sample(EULER, Reflection(weak, steps=steps))
    levels = SIGMAS.tolist()
    assert [float(c.sigma[0]) for c in weak.calls] == [levels[i + 1] for i in sorted(taken)]


def test_own_conditions_and_another_strong_model():
    """The weak model's extra_args take the sampler's place; the strong one may be the teacher."""
    own = seeded(2, SHAPE[0], seed=73)
    weak, strong = Counted(WEAK), Counted(TEACHER)
    reflection = Reflection(weak, cfg_scale=1.0, extra_args={"cond": own}, strong=strong)
    sample(EULER, reflection)
    assert torch.equal(weak.calls[0].extra["cond"], own)
    assert [float(c.sigma[0]) for c in strong.calls] == [10.0]
    x = start()
    d = estimate(TEACHER, x, 10.0, 2.5)
    x = d + (x - d) / 10.0 * 4.0
    d = WEAK(x, x.new_full((2,), 4.0), cond=own)
    x = d + (x - d) / 4.0 * 10.0
    assert same(sample(EULER, reflection), sample(EULER, None, x))


def test_after_churn_and_before_the_teacher():
    """From the level that churn lifts to; a guided step revises from the reflected point."""
    options = {"s_churn": 2.0, "settings": {"teacher_scale": 0.5, "teacher_cfg_scale": 2.0}}
    seen, plain = [], []
    for told, reflection in ((seen, Reflection(WEAK)), (plain, None)):
        torch.manual_seed(3)  # churn draws from torch's stream
        sample(EULER, reflection, teacher=TEACHER, callback=told.append, **options)
    hat = float(seen[0]["sigma_hat"])
    assert hat > 10.0
    assert same(seen[0]["x"], reflected(plain[0]["x"], hat, 4.0))
    expected = estimate(STUDENT, seen[0]["x"], hat, 2.5)
    assert same(seen[0]["denoised_student"], expected)
    noise = Noise(start().shape)(10.0, 4.0)
    assert same(seen[0]["denoised_teacher"], estimate(TEACHER, expected + 4.0 * noise, 4.0, 2.0))


def test_sums_reflect():
    """Student and weak model may be weighted sums, by step and by level."""
    student = kdpp.handover(STUDENT, TEACHER, steps=1)
    weak = WeightedSum(Weighted(WEAK, [0.5, 0, 0, 0, 0]), Weighted(TEACHER, lambda s: s / 8.0),
                       STUDENT)  # fmt: skip
    found = sample(EULER, Reflection(weak), student=student)
    x = start()
    d = estimate(TEACHER, x, 10.0, 2.5)
    x = d + (x - d) / 10.0 * 4.0
    d = 0.5 * estimate(WEAK, x, 4.0, 2.5) + 0.5 * estimate(TEACHER, x, 4.0, 2.5)
    x = d + (x - d) / 4.0 * 10.0
    assert same(found, sample(EULER, None, x, student=student))


def test_a_borrowed_weak_model_is_here_for_its_steps():
    """From the first reflected step to the last."""
    log = []
    lent = Lent("weak", log, WEAK)
    reflection = Reflection(lent, steps={1, 2}, cfg_scale=1.0)
    sample(EULER, reflection, student=noting("θ", log, STUDENT))
    assert " ".join(log) == "θ weak comes θ weak θ θ weak θ weak goes θ θ"


def test_it_is_a_part_of_the_model():
    """A wrapper of its own keeps it, inpainted too; its networks move with the model."""
    image, noise = seeded(2, *SHAPE, seed=4), seeded(2, *SHAPE, seed=5)
    model = TeacherGuidedDenoiser(STUDENT, reflection=Reflection(WEAK, strong=TEACHER))
    known = kdpp.inpaint(model, image, torch.zeros(SHAPE), noise)
    assert known.reflection.weak.inner_model is WEAK
    assert known.reflection.strong.inner_model is TEACHER
    assert {id(STUDENT), id(WEAK), id(TEACHER)} <= {id(one) for one in model.modules()}
    found = run(EULER, known, start(), SIGMAS, extra_args=PROBLEM.extra_args)
    assert torch.equal(found, image)


def test_a_memory_that_it_writes_over_is_refused():
    """One buffer for a network's answers: a multistep solver's earlier ones would be lost."""
    buffer = torch.empty(2, *SHAPE, dtype=torch.float64)

    def student(x, sigma, cond=None):
        answer = STUDENT(x, sigma, cond)
        return buffer.copy_(answer) if float(sigma[0]) in (4.0, 1.5) else answer

    reflection = Reflection(WEAK, steps={2})
    extra = {"cond": conditions(2)[0]}
    with pytest.raises(ValueError, match="reflection's model wrote its answer into memory"):
        sample(kdpp.SOLVERS["dpmpp_2m"], reflection, student=student, extra_args=extra)


MADE = {
    "no model": (lambda: Reflection(None), TypeError, "weak is None"),
    "no strong": (lambda: Reflection(WEAK, strong=3), TypeError, "strong is 3"),
    "steps": (lambda: Reflection(WEAK, steps=-1), ValueError, "reflection's steps is -1"),
    "a scale": (lambda: Reflection(WEAK, cfg_scale=math.nan), ValueError, "cfg_scale is nan"),
    "extra_args": (lambda: Reflection(WEAK, extra_args=3), TypeError, "must be a dict"),
    "cond_scale": (
        lambda: Reflection(WEAK, extra_args={"cond_scale": 1}), ValueError, "is cfg_scale",
    ),
    "a denoiser": (
        lambda: TeacherGuidedDenoiser(STUDENT, reflection=WEAK), TypeError, "a kdpp.Reflection",
    ),
    "kinds": (
        lambda: TeacherGuidedDenoiser(STUDENT, reflection=Reflection(Flow(WEAK))).space,
        ValueError, "both be flow models or both not",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "says"), MADE.values(), ids=MADE)
def test_what_cannot_be_made(make, error, says):
    with pytest.raises(error, match=says):
        make()


RUN = {
    "the step to 0": ({-1}, "holds step 4, which goes to σ = 0"),
    "no such step": ({5}, "holds 5; the schedule has 5 steps"),
    "a range without a step": (NoiseRange(20, 30), "holds no step down"),
    "a range with the last alone": (NoiseRange(0.1, 0.3), "holds no step down"),
}


@pytest.mark.parametrize(("steps", "says"), RUN.values(), ids=RUN)
def test_what_cannot_be_run(steps, says):
    with pytest.raises(ValueError, match=says):
        sample(EULER, Reflection(NEVER, steps=steps), student=NEVER)


def test_missing_conditions_are_said_before_any_call():
    with pytest.raises(ValueError, match="weak model needs extra_args"):
        sample(EULER, Reflection(NEVER, cfg_scale=2.0), student=NEVER, extra_args={})
