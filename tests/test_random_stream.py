"""Teacher guidance and the host's random numbers: neither touches the other."""

import sys
from types import SimpleNamespace

import pytest
import torch

import kdpp
import needs
import problems
from problems import (
    SHAPE,
    Counted,
    NeverCalled,
    Problem,
    Tape,
    accepts,
    karras,
    run,
)

SOLVERS = problems.on_schedules(kdpp.SOLVERS)
over_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
SIGMAS = karras(5)
OPTIONS = {"s_churn": 3.0}


def record(solver, problem, x, guidance, **options):
    """A run with kdpp's own renoise draws: the result and what the callback saw."""
    seen = []
    found = run(
        solver,
        problem.guided(**guidance),
        x,
        SIGMAS,
        extra_args=problem.extra_args,
        callback=lambda info: seen.append({k: clone(v) for k, v in info.items()}),
        **options,
    )
    return found, seen


def clone(value):
    """A copy that later writes do not reach."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def renoise_draws(seen):
    """The ε of each guided step, from the callback: (renoised - student's estimate) / sigma_s."""
    levels = SIGMAS.tolist()
    return [
        (info["renoised"] - info["denoised_student"]) / levels[info["i"] + 1]
        for info in seen
        if "renoised" in info
    ]


@pytest.mark.parametrize("guidance", [{"teacher_steps": 1}, {"teacher_steps": 99}], ids=str)
@over_solvers
def test_lambda_leaves_the_hosts_stream_alone(solver, guidance):
    """λ from 0 to 0.1: same state of the global generator afterwards, Python's and numpy's too."""
    import random

    import numpy as np

    problem = Problem()
    x, states = problem.start(SIGMAS), []
    for scale in (0.0, 0.1):
        torch.manual_seed(51)
        random.seed(51)
        np.random.seed(51)
        record(solver, problem, x, {"teacher_scale": scale, **guidance}, **OPTIONS)
        states.append((torch.get_rng_state(), random.random(), np.random.random()))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1:] == states[1][1:]


@over_solvers
def test_lambda_leaves_the_solvers_draws_alone(solver, monkeypatch):
    """λ from 0 to 0.1: the solver draws the same numbers at the same steps."""
    drawn = []
    original = torch.randn_like

    def spy(*args, **kwargs):
        drawn.append(original(*args, **kwargs))
        return drawn[-1].clone()

    monkeypatch.setattr(torch, "randn_like", spy)
    problem, runs = Problem(), []
    for scale in (0.0, 0.1):
        drawn.clear()
        torch.manual_seed(52)
        record(solver, problem, problem.start(SIGMAS), {"teacher_scale": scale}, **OPTIONS)
        runs.append([d.clone() for d in drawn if torch.is_tensor(d)])
    assert len(runs[0]) == len(runs[1])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("off", [{"teacher_scale": 0.0}, {"teacher_steps": 0}], ids=str)
@over_solvers
def test_switched_off_it_draws_nothing_and_calls_no_teacher(solver, off):
    """λ = 0 or k = 0: the teacher and the renoise noise sampler are never called."""
    problem = Problem()
    problem.teacher = NeverCalled()
    x = problem.start(SIGMAS)
    tape = Tape(x, 1)
    record(solver, problem, x, {"renoise_noise_sampler": tape, **off}, **OPTIONS)
    assert not tape.asked


@over_solvers
def test_the_renoise_draws_follow_the_seed(solver):
    """Same torch.manual_seed, same ε, bit for bit; another seed, another ε."""
    problem, draws = Problem(), []
    x = problem.start(SIGMAS)
    for seed in (53, 53, 54):
        torch.manual_seed(seed)
        draws.append(renoise_draws(record(solver, problem, x, {"teacher_steps": 2})[1]))
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(draws[0], draws[2], strict=True))


@over_solvers
def test_the_renoise_draws_differ_between_batches_steps_and_samples(solver):
    """A host that draws its latents batch by batch gets fresh ε for every one of them."""
    problem, draws = Problem(), []
    torch.manual_seed(55)
    for _ in range(3):
        x = torch.randn(2, *SHAPE, dtype=torch.float64) * SIGMAS[0]
        for drawn in renoise_draws(record(solver, problem, x, {"teacher_steps": 2})[1]):
            draws.extend(drawn)
    assert len(draws) == 3 * 2 * 2
    flat = torch.stack(draws).flatten(1)
    distances = torch.cdist(flat, flat) + 9 * torch.eye(len(flat), dtype=flat.dtype)
    assert float(distances.min()) > 0.1


@over_solvers
def test_the_renoise_draws_are_not_the_latents_own(solver):
    """ε is a standard Gaussian that has nothing to do with the noise that the host drew."""
    problem = Problem(batch=4)
    shape = (4, 3, 40, 40)
    problem.student = problem.teacher = SumOfShape()
    torch.manual_seed(56)
    first = torch.randn(shape, dtype=torch.float64)
    (epsilon,) = renoise_draws(record(solver, problem, first * SIGMAS[0], {})[1])
    torch.manual_seed(56)
    count = first.numel()
    bound = 5 / count**0.5
    for noise in (first, torch.randn(shape, dtype=torch.float64)):
        assert abs(float((noise * epsilon).mean())) < bound
    assert abs(float(epsilon.mean())) < bound
    assert abs(float(epsilon.var()) - 1) < bound * 2**0.5


class SumOfShape(torch.nn.Module):
    """A cheap denoiser for latents of any size."""

    def forward(self, x, sigma, cond=None):
        """A contraction of x."""
        return 0.1 * x


@over_solvers
def test_a_renoise_noise_sampler_replaces_the_draws(solver):
    """It is asked once per guided step, with the step's two levels, and its answer is ε."""
    problem = Problem()
    x = problem.start(SIGMAS)
    tape = Tape(x, 7)
    guidance = {"teacher_steps": 2, "renoise_noise_sampler": tape}
    _, seen = record(solver, problem, x, guidance)
    asked = [(float(sigma), float(sigma_next)) for sigma, sigma_next in tape.asked]
    levels = SIGMAS.tolist()
    assert asked == [pytest.approx((levels[i], levels[i + 1])) for i in range(2)]
    fresh = Tape(x, 7)
    for drawn in renoise_draws(seen):
        assert torch.allclose(drawn, fresh(), rtol=1e-9, atol=1e-9)


@over_solvers
def test_the_students_own_noise_needs_no_draw(solver):
    """renoise_eta = 0: ε is the solver's own direction, nothing is drawn for it."""
    problem = Problem()
    x = problem.start(SIGMAS)
    tape = Tape(x, 7)
    record(solver, problem, x, {"renoise_eta": 0.0, "renoise_noise_sampler": tape})
    assert not tape.asked


def load(monkeypatch, default_noise_sampler):
    """A host's k-diffusion, loaded, with a default noise sampler of the host's own."""
    theirs = SimpleNamespace(
        default_noise_sampler=default_noise_sampler, BrownianTreeNoiseSampler=kdpp.BrownianNoise
    )
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", theirs)


@pytest.mark.parametrize(
    "solver",
    [s for s in SOLVERS if accepts(s, "noise_sampler") and s.noise == "plain"],
    ids=lambda s: s.name,
)
def test_a_loaded_k_diffusion_gives_the_default_noise(solver, monkeypatch):
    """A host that replaces k-diffusion's default_noise_sampler is obeyed, at the call."""
    problem = Problem()
    x = problem.start(SIGMAS)
    asked = []

    def replaced(x):
        asked.append(Tape(x, 8))
        return asked[-1]

    load(monkeypatch, replaced)
    found, _ = record(solver, problem, x, {"teacher_scale": 0.0})
    expected, _ = record(solver, problem, x, {"teacher_scale": 0.0}, noise_sampler=Tape(x, 8))
    assert asked
    assert torch.equal(found, expected)


@over_solvers
def test_the_renoise_draws_do_not_pass_through_the_solvers_sampler(solver, monkeypatch):
    """A replaced default_noise_sampler sees the solver's draws only."""
    counts = []

    def counting(x):
        tape = Tape(x, 8)
        counts.append(tape)
        return tape

    load(monkeypatch, counting)
    totals = []
    for scale in (0.0, 0.5):
        counts.clear()
        problem = Problem()
        x = problem.start(SIGMAS)
        record(solver, problem, x, {"teacher_scale": scale, "teacher_steps": 3})
        totals.append(sum(len(tape.asked) for tape in counts))
    assert totals[0] == totals[1]


@over_solvers
def test_a_guided_run_is_the_unguided_one_until_its_first_revision(solver):
    """The student's first evaluation is the same with and without a teacher."""
    problem, firsts = Problem(), []
    x = problem.start(SIGMAS)
    for scale in (0.0, 0.1):
        torch.manual_seed(57)
        problem.student = Counted(Problem().student)
        record(solver, problem, x, {"teacher_scale": scale}, **OPTIONS)
        firsts.append(problem.student.calls[0].output)
    assert torch.equal(*firsts)


ETAS = [
    (solver, options)
    for solver in filter(needs.namesake, SOLVERS)
    for options in [{}, *([{"eta": 0.0}] if "eta" in solver.options else [])]
]


@needs.k_diffusion
@pytest.mark.parametrize("solver, options", ETAS, ids=str)
def test_only_noise_that_a_step_uses_is_drawn(solver, options):
    """The stream ends where k-diffusion leaves it; where no noise is used, where it began."""

    def ends(sample, model):
        torch.manual_seed(5)
        x = SIGMAS[0] * torch.randn(2, *SHAPE, dtype=torch.float64)
        began = torch.get_rng_state()
        sample(model, x, SIGMAS, disable=True, **options)
        return began, torch.get_rng_state()

    def student(x, sigma):
        return x / 2

    guided = kdpp.TeacherGuidedDenoiser(student, student, teacher_steps=0)
    (began, ours), (_, theirs) = ends(solver.sample, guided), ends(needs.namesake(solver), student)
    used = solver.noise != "none" and not options and "s_churn" not in solver.options
    assert torch.equal(ours, theirs if used else began)
