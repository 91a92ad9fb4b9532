"""Progressive and guided distillation: their targets against the papers', their training."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kdpp
from kdpp.lab.data import Data
from kdpp.lab.diffusion import jump_target, weighted_error
from kdpp.lab.methods import Draws, frozen, guided_distillation, load_methods, progressive
from kdpp.lab.methods.guided_distillation import rising, stochastic_jumps
from kdpp.lab.methods.progressive import halved, pairs
from kdpp.lab.schedules import grid
from trainings import model_of, trained, training_of

METHODS = load_methods()
MEAN, VARIANCE = 0.3, 0.5

levels_apart = st.lists(st.floats(0.02, 20), min_size=3, max_size=3, unique=True).filter(
    lambda levels: min(b / a for a, b in pairwise(sorted(levels))) > 1.05
)


def gaussian(x, sigma):
    """The exact denoiser of Gaussian data."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
    return (VARIANCE * x + sigma**2 * MEAN) / (VARIANCE + sigma**2)


def curved(x, sigma):
    """A denoiser that is linear in nothing."""
    return torch.tanh(gaussian(x, sigma)) + 0.1 * torch.sin(3 * x)


def noise(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


# The targets, against the papers' own formulas.


def alpha_sigma(level):
    """VP's α and σ of a VE level."""
    return 1 / math.sqrt(1 + level**2), level / math.sqrt(1 + level**2)


def printed_target(denoise, x, sigma, middle, end):
    """x̃ as Algorithm 3 prints it, in VP."""

    def estimate(z, level):
        return denoise(z / alpha_sigma(level)[0], torch.full((len(z),), level, dtype=z.dtype))

    (a, s), (a1, s1), (a2, s2) = map(alpha_sigma, (sigma, middle, end))
    z = a * x
    d = estimate(z, sigma)
    z1 = a1 * d + s1 / s * (z - a * d)
    d1 = estimate(z1, middle)
    z2 = a2 * d1 + s2 / s1 * (z1 - a1 * d1)
    return (z2 - s2 / s * z) / (a2 - s2 / s * a)


def walk(denoise, x, levels):
    """DDIM over the levels, a sample's step at a time."""
    for sigma, sigma_next in pairwise(levels):
        d = denoise(x, torch.full((len(x),), sigma, dtype=x.dtype))
        x = d + (x - d) * sigma_next / sigma
    return x


def target_of(denoise, x, levels):
    per_sample = (torch.full((len(x),), level, dtype=x.dtype) for level in levels)
    return jump_target(denoise, x, *per_sample)


@given(levels_apart, st.booleans(), st.booleans())
def test_one_step_with_the_target_lands_where_two_steps_land(levels, up, to_zero):
    levels = sorted(levels, reverse=not up)
    if to_zero and not up:
        levels[-1] = 0.0
    x = noise(4, 3, scale=levels[0])
    target = target_of(curved, x, levels)
    sigma, _, end = levels
    assert torch.allclose(
        target + (x - target) * end / sigma, walk(curved, x, levels), rtol=1e-11, atol=1e-11
    )
    assert torch.allclose(target, printed_target(curved, x, *levels), rtol=1e-9, atol=1e-9)
    if to_zero and not up:
        second = curved(walk(curved, x, levels[:2]), levels[1])
        assert torch.allclose(target, second, rtol=0, atol=1e-12)


def test_samples_of_a_batch_may_jump_between_different_levels():
    x, jumps = noise(3, 2), torch.tensor([(4.0, 2.0, 1.0), (1.0, 0.5, 0.0), (0.1, 0.1, 0.0)])
    together = jump_target(curved, x, *jumps.double().unbind(1))
    apart = [target_of(curved, x[i : i + 1], row.tolist()) for i, row in enumerate(jumps)]
    assert torch.allclose(together, torch.cat(apart), rtol=1e-6)


def test_the_target_loses_no_digits_where_steps_are_small():
    levels = [1.0, 0.999, 0.998]
    x = noise(50, 3)
    exact = target_of(curved, x, levels)
    single = target_of(curved, x.float(), levels)
    assert (single - exact).abs().max() < 1e-6


def student_of(teacher, jumps):
    """The student that outputs its target exactly, at the levels where it has one."""

    def denoise(x, sigma, **_):
        (row,) = {int((jumps[:, 0] - level).abs().argmin()) for level in sigma.tolist()}
        assert math.isclose(float(sigma[0]), float(jumps[row, 0]), rel_tol=1e-6)
        return target_of(teacher, x, jumps[row].double().tolist())

    return denoise


def sampled(sampler, denoise, x, levels, **options):
    model = kdpp.TeacherGuidedDenoiser(denoise, denoise, teacher_steps=0)
    return sampler(model, x, torch.tensor(levels), disable=True, **options)


@pytest.mark.parametrize("kind", ["divided", "trailing"])
def test_three_perfect_phases_sample_as_the_first_teacher_does(kind):
    x = noise(5, 2, scale=grid(kind, 16)[0])
    student = curved
    for steps in halved(16, 2)[1:]:
        student = student_of(student, pairs(grid(kind, 2 * steps)))
        images = sampled(kdpp.sample_euler_tg, student, x, grid(kind, steps))
        assert torch.allclose(images, walk(curved, x, grid(kind, 16)), atol=1e-5)


def vp_stochastic(denoise, x, levels, draws):
    """Meng et al., eqs. (4) to (7), as printed, each long step by two of the teacher's."""
    z = alpha_sigma(levels[0])[0] * x

    def ddim_step(z, level, to):
        (a, s), (b, r) = alpha_sigma(level), alpha_sigma(to)
        d = denoise(z / a, torch.full((len(z),), level, dtype=z.dtype))
        return b * d + r * (z - a * d) / s

    for (t, s, k), n in zip(zip(levels, levels[1:], levels[2:]), draws):
        z = ddim_step(ddim_step(z, t, s), s, k)
        (a_s, s_s), (a_k, s_k) = alpha_sigma(s), alpha_sigma(k)
        # σ_{s|k}² = (1 - e^{λ_s - λ_k}) σ_s², λ = log α²/σ²; λ_k is infinite at σ_k = 0
        ratio = (a_s * s_k / (s_s * a_k)) ** 2
        z = a_s / a_k * z + math.sqrt((1 - ratio) * s_s**2) * n
    z = ddim_step(z, levels[-2], levels[-1])
    return z / alpha_sigma(levels[-1])[0]


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_a_perfect_stochastic_student_samples_as_printed(steps):
    levels = grid("trailing", steps)
    x, draws = noise(5, 2, scale=levels[0]), list(noise(steps, 5, 2, seed=1))
    student = student_of(curved, stochastic_jumps(levels))
    supply = iter(draws)
    images = sampled(
        kdpp.sample_ddim_stochastic_tg, student, x, levels, noise_sampler=lambda *_: next(supply)
    )
    assert torch.allclose(images, vp_stochastic(curved, x, levels, draws), atol=1e-5)
    assert len(list(supply)) == 1  # the last step draws nothing


def test_a_stochastic_student_teaches_the_next_at_steps_that_it_knows():
    for steps in (8, 4, 2):
        theirs = {tuple(row) for row in stochastic_jumps(grid("divided", steps))[:, ::2].tolist()}
        ours = stochastic_jumps(grid("divided", steps // 2))
        asked = {tuple(row) for row in ours[:, :2].tolist() + ours[:, 1:].tolist()}
        assert {(a, b) for a, b in asked if a != b} <= theirs


def test_a_perfect_encoder_encodes_as_its_teacher_and_decodes_to_the_image():
    lowest, fine, coarse = 0.03, 64, 8
    x = MEAN + math.sqrt(VARIANCE) * noise(6, 2)
    encoder = gaussian
    for steps in halved(fine, coarse)[1:]:
        encoder = student_of(encoder, pairs(rising("divided", 2 * steps, lowest)))
    levels = torch.tensor(rising("divided", coarse, lowest))
    latent = kdpp.encode(encoder, x, levels, disable=True)
    assert torch.allclose(latent, walk(gaussian, x, rising("divided", fine, lowest)), atol=1e-4)
    top, data = grid("divided", fine)[0], VARIANCE + lowest**2
    exact = MEAN + (x - MEAN) * math.sqrt((VARIANCE + top**2) / data)
    error = (latent - exact).abs().max() / top
    plain = (kdpp.encode(gaussian, x, levels, disable=True) - exact).abs().max() / top
    assert error < 0.25 * plain
    image = walk(gaussian, latent, grid("divided", 256))
    assert (image - x).abs().max() < 0.2


@given(st.floats(0.03, 14.0))
def test_the_weights_are_the_errors_of_x0_noise_and_v(level):
    x, x0 = noise(4, 3, scale=level), noise(4, 3, seed=1)
    estimate, target = x0, curved(x, level)
    sigma = torch.full((4,), level, dtype=torch.float64)
    root = math.sqrt(1 + level**2)

    def eps(d):
        return (x - d) / level

    def v(d):
        return (eps(d) - level * d) / root

    def error(of):
        return float((of(estimate) - of(target)).square().mean())

    expected = {
        "constant": error(lambda d: d),
        "snr": error(eps),
        "snr+1": error(v),
        "truncated": max(error(lambda d: d), error(eps)),
    }
    for name, value in expected.items():
        found = float(weighted_error(estimate, target, sigma, name))
        assert math.isclose(found, value, rel_tol=1e-9), name


@pytest.mark.parametrize("start, steps", [(8, 3), (4, 8), (12, 5), (0, 1), (6, 4)])
def test_halving_that_leads_nowhere_is_refused(start, steps):
    with pytest.raises(ValueError, match="start_steps"):
        halved(start, steps)


# The methods, on a tiny network.

TINY = {"kind": "resmlp", "width": 32, "hidden": 64, "blocks": 1}
CLASSES = 3
PHASES = {"start_steps": 8, "steps": 2, "iterations": 12, "batch": 64, "rate": 2e-3}
STAGE_ONE = {"iterations": 30, "batch": 64, "rate": 2e-3, "average": 0.9}
CASES = {
    "progressive": ("progressive", PHASES),
    "stage one": ("guided-stage-one", STAGE_ONE),
    "deterministic": ("guided-stage-two", PHASES),
    "stochastic": ("guided-stage-two", {**PHASES, "kind": "stochastic"}),
    "one scale": ("guided-stage-two", {**PHASES, "guidance": 2.0}),
    "encoder": ("encoder", PHASES),
    "encoder of a plain teacher": ("encoder", {**PHASES, "guidance": 1.0}),
    "naive": ("naive-guided", PHASES),
    "naive, apart": ("naive-guided", {**PHASES, "guidance": None}),
}
OWN_TARGETS = ("stage one", "naive", "naive, apart")
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def data():
    """Three clouds in four dimensions."""
    labels = torch.arange(300) % CLASSES
    centres = torch.tensor([[0.8, 0.0, 0.0, -0.5], [-0.4, 0.7, 0.0, 0.5], [-0.4, -0.7, 0.6, 0.0]])
    images = centres[labels] + noise(300, 4, scale=0.15).float()
    return Data(images.view(300, 1, 2, 2), labels, CLASSES, "clouds")


def finished(task, data):
    """The model of a method as it stands, and as it stays."""
    model = model_of(task, data)
    network = frozen(model.network)
    return replace(model, network=network, denoiser=type(model.denoiser)(network))


def job_of(name, data, teacher, values, seed=0):
    return training_of(name, values, seed, data=data, teacher=teacher)


def run(name, data, teacher, values):
    """The method, all its steps taken, and its losses."""
    it = job_of(name, data, teacher, values)
    task = it.method(it)
    steps = range(task.iterations)
    return task, [float(task.step(i, Draws(data, 0, i))["loss"]) for i in steps]


@pytest.fixture(scope="module")
def plain(data):
    values = {"network": TINY, "iterations": 400, "batch": 128, "average": 0.95}
    return finished(run("teacher", data, None, values)[0], data)


@pytest.fixture(scope="module")
def with_w(data, plain):
    return finished(
        run("guided-stage-one", data, plain, {**STAGE_ONE, "guidance_range": [1.0, 3.0]})[0], data
    )


@pytest.fixture
def given_teacher(plain, with_w):
    def choose(case):
        takes_w = CASES[case][0] == "guided-stage-two" or case == "encoder"
        return with_w if takes_w else plain

    return choose


class Recorder(torch.nn.Module):
    """A denoiser that keeps what it was asked."""

    def __init__(self, denoiser):
        super().__init__()
        self.inner_model, self.calls = denoiser, []

    def forward(self, x, sigma, cond, **conditions):
        self.calls.append(SimpleNamespace(x=x, sigma=sigma, cond=cond, conditions=conditions))
        return self.inner_model(x, sigma, cond, **conditions)


@pytest.fixture
def compared(monkeypatch):
    """Every (estimate, target) of which an error was taken, as (target, sigma)."""
    seen = []

    def watch(estimate, target, sigma, weighting):
        seen.append(SimpleNamespace(estimate=estimate, target=target, sigma=sigma))
        return weighted_error(estimate, target, sigma, weighting)

    monkeypatch.setattr(progressive, "weighted_error", watch)
    monkeypatch.setattr(guided_distillation, "weighted_error", watch)
    return seen


def noise_of(asked, data, i, batch):
    """The noise in what was asked at iteration i, whose images and labels are drawn first."""
    images, labels = Draws(data, 0, i).batch(batch)
    assert torch.equal(asked.cond, labels)
    return (asked.x - images) / asked.sigma.view(-1, 1, 1, 1)


def by_hand(model, asked, w, conditions=None):
    """(1+w)·D_c - w·D_∅ of a model, from its two halves, for the labels that were asked for."""
    conditions = conditions or {}

    def denoise(x, sigma):
        of_label = model.denoiser(x, sigma, cond=asked.cond, **conditions)
        uncond = model.denoiser(x, sigma, cond=torch.full_like(asked.cond, CLASSES), **conditions)
        w_of = torch.as_tensor(w).view(-1, 1, 1, 1)
        return (1 + w_of) * of_label - w_of * uncond

    return denoise


def test_stage_one_is_trained_on_the_guided_estimate_at_w(data, plain, compared):
    job = job_of("guided-stage-one", data, plain, {**STAGE_ONE, "guidance_range": [1.5, 4.0]})
    task = METHODS["guided-stage-one"](job)
    task.student = Recorder(task.student)
    task.step(0, Draws(data, 0, 0))
    (asked,), (compared,) = task.student.calls, compared
    assert 0.9 < noise_of(asked, data, 0, 64).std() < 1.1
    w = asked.conditions["w"]
    assert 0.5 <= w.min() < 0.8 and 2.7 < w.max() <= 3.0
    target = by_hand(plain, asked, w)(asked.x, asked.sigma)
    assert torch.allclose(compared.target, target, atol=2e-5)
    # The embedding of w starts without effect: the student is the conditional half.
    half = plain.denoiser(asked.x, asked.sigma, cond=asked.cond)
    assert torch.allclose(compared.estimate, half, atol=1e-6)


def adam_of(task):
    """The learning rate, and how many steps the optimiser has taken."""
    (optimiser,) = task.optimisers.values()
    (group,) = optimiser.param_groups
    return group["lr"], int(optimiser.state[group["params"][0]]["step"])


def jump_of(sigma, jumps):
    """Each sample's whole jump, found by the level it starts at."""
    found = (sigma[:, None] == jumps[None, :, 0]).nonzero()
    assert len(found) == len(sigma)
    return jumps[found[:, 1]]


@pytest.mark.parametrize("case", [case for case in CASES if case not in OWN_TARGETS])
def test_every_phase_is_trained_on_two_steps_of_its_teacher(case, data, given_teacher, compared):
    name, values = CASES[case]
    teacher = given_teacher(case)
    job = job_of(name, data, teacher, values)
    task = METHODS[name](job)
    task.student = Recorder(task.student)
    teachers, phase_length = [], values["iterations"]
    for i in range(task.iterations):
        if i % phase_length == 0:
            teachers.append(finished(task, data))
        task.step(i, Draws(data, 0, i))
        rate, taken = adam_of(task)
        assert math.isclose(rate, values["rate"] * (1 - i % phase_length / phase_length))
        assert taken == i % phase_length + 1  # a new optimiser for every phase
    counts = {"stochastic": [8, 4, 2]}.get(case, [4, 2])
    assert task.iterations == len(counts) * phase_length
    first_steps = range(0, task.iterations, phase_length)
    for phase, (i, steps) in enumerate(zip(first_steps, counts)):
        if name == "encoder":
            jumps = pairs(rising("divided", 2 * steps, task.lowest))
        elif case == "stochastic":
            jumps = stochastic_jumps(grid("divided", steps))
        else:
            jumps = pairs(grid("divided", 2 * steps))
        for j in (i, i + phase_length - 1):
            asked, seen = task.student.calls[j], compared[j]
            assert 0.8 < noise_of(asked, data, j, 64).std() < 1.2
            jump = jump_of(asked.sigma, jumps)
            assert len(jump.unique(dim=0)) == steps  # every step of the student occurs
            if takes_w := case not in ("progressive", "encoder of a plain teacher"):
                w = asked.conditions["w"]
                low, high = (1.0, 1.0) if case == "one scale" else (0.0, 2.0)
                assert low <= w.min() <= low + 0.3 and high - 0.3 <= w.max() <= high
            assert takes_w or not asked.conditions
            if phase == 0 and case == "progressive":
                denoise = by_hand(teacher, asked, 1.0)
            else:
                denoise = by_hand(teachers[phase], asked, 0.0, asked.conditions)
            expected = jump_target(denoise, asked.x, *jump.unbind(1))
            assert torch.allclose(seen.target, expected, atol=2e-5)


@pytest.mark.parametrize("w", [1.5, None])
def test_the_naive_halves_are_the_guided_target_when_guided(w, data, plain, compared):
    guidance = None if w is None else 1 + w
    job = job_of("naive-guided", data, plain, {**PHASES, "guidance": guidance})
    task = METHODS["naive-guided"](job)
    task.student = Recorder(task.student)
    task.step(0, Draws(data, 0, 0))
    (asked,), (seen,) = task.student.calls, compared
    batch = len(asked.x) // 2
    assert torch.equal(asked.x[:batch], asked.x[batch:])
    assert asked.cond[:batch].eq(CLASSES).all() and asked.cond[batch:].ne(CLASSES).all()
    asked = SimpleNamespace(x=asked.x[batch:], sigma=asked.sigma[batch:], cond=asked.cond[batch:])
    assert 0.8 < noise_of(asked, data, 0, batch).std() < 1.2
    jump = jump_of(asked.sigma, pairs(grid("divided", 8))).unbind(1)
    uncond, of_label = seen.target.chunk(2)
    if w is None:
        expected = jump_target(by_hand(plain, asked, 0.0), asked.x, *jump)
        assert torch.allclose(of_label, expected, atol=1e-5)
        expected = jump_target(by_hand(plain, asked, -1.0), asked.x, *jump)
        assert torch.allclose(uncond, expected, atol=1e-5)
    else:
        expected = jump_target(by_hand(plain, asked, w), asked.x, *jump)
        assert torch.allclose((1 + w) * of_label - w * uncond, expected, atol=2e-5)


@every_case
def test_training_lowers_the_loss_of_every_phase(case, data, given_teacher):
    name, values = CASES[case]
    teacher = given_teacher(case)
    values = {**values, "start_steps": 4, "iterations": 60} if "steps" in values else values
    job = job_of(name, data, teacher, values)
    task = METHODS[name](job)
    losses = [float(task.step(i, Draws(data, 0, i))["loss"]) for i in range(task.iterations)]
    phase = values["iterations"]
    for start in range(0, task.iterations, phase):
        part = losses[start : start + phase]
        assert sum(part[-10:]) < 0.9 * sum(part[:10]), (start, part)


RANGE = {"w": (0.0, 2.0)}
USAGE = {
    "progressive": ("euler", {}, 2.0),
    "stage one": ("euler", {"w": (0.0, 4.0)}, None),
    "deterministic": ("euler", RANGE, None),
    "stochastic": ("ddim_stochastic", RANGE, None),
    "one scale": ("euler", {"w": (1.0, 1.0)}, None),
    "encoder": ("encode", RANGE, None),
    "encoder of a plain teacher": ("encode", {}, 1.0),
    "naive": ("euler", {}, None),
    "naive, apart": ("euler", {}, None),
}


@every_case
def test_the_result_says_how_it_is_sampled(case, data, given_teacher, tmp_path):
    name, values = CASES[case]
    model = trained(tmp_path, name, values, data=data, teacher=given_teacher(case))
    sampler = model.card.sampler
    assert (sampler, model.card.conditions, model.card.guidance) == USAGE[case]
    levels = grid("divided", 2)
    if sampler == "encode":
        levels = tuple(rising("divided", 2, float(model.denoiser.sigma_min)))
        with pytest.raises(ValueError, match="is an encoder, from images to noise"):
            _ = model.sampler
    assert model.levels == (None if case == "stage one" else levels)


def test_the_result_of_stage_one_is_the_average(data, plain):
    task, _ = run("guided-stage-one", data, plain, STAGE_ONE)
    network, _ = task.result()
    assert network is task.modules["average"]
    pairs_of = zip(network.parameters(), task.modules["network"].parameters())
    assert not all(torch.equal(a, b) for a, b in pairs_of)


def distance(a, b):
    return float((a - b).square().mean().sqrt())


def images_of(denoise, steps):
    x = noise(200, 1, 2, 2, seed=7).float() * grid("divided", 1)[0]
    with torch.no_grad():
        return walk(denoise, x, grid("divided", steps))


def test_a_distilled_student_comes_closer_to_its_teacher_than_fewer_steps(data, plain, with_w):
    values = {**PHASES, "iterations": 100, "rate": 4e-3}
    asked = SimpleNamespace(cond=torch.arange(200) % CLASSES)
    teacher, task = by_hand(plain, asked, 1.0), run("progressive", data, plain, values)[0]
    student = by_hand(finished(task, data), asked, 0.0)
    gap = distance(images_of(teacher, 2), images_of(teacher, 8))
    assert distance(images_of(student, 2), images_of(teacher, 8)) < 0.5 * gap
    task = run("guided-stage-two", data, with_w, values)[0]
    for w in (0.0, 1.0, 2.0):
        given = {"w": torch.full((200,), w)}
        teacher = by_hand(with_w, asked, 0.0, given)
        student = by_hand(finished(task, data), asked, 0.0, given)
        gap = distance(images_of(teacher, 2), images_of(teacher, 8))
        assert distance(images_of(student, 2), images_of(teacher, 8)) < 0.5 * gap


# What is refused.


@pytest.mark.parametrize(
    "name, values, takes_guidance, said",
    [
        ("guided-stage-two", PHASES, False, "guided-stage-one"),
        ("guided-stage-two", {**PHASES, "guidance": 4.0}, True, r"for CFG scales in \[1, 3\]"),
        ("encoder", PHASES, False, "or one CFG scale"),
        ("encoder", {**PHASES, "start_steps": 256}, True, "fewer start_steps"),
        ("guided-stage-one", STAGE_ONE, True, "guided already"),
        ("guided-stage-one", {"guidance_range": [3.0, 2.0]}, False, "the least and the most"),
        ("naive-guided", PHASES, True, "guided already"),
        ("progressive", {**PHASES, "start_steps": 2}, False, "must take more steps"),
        ("progressive", {**PHASES, "start_steps": 6}, False, "power of 2"),
        ("progressive", {**PHASES, "steps": 0}, False, "steps is 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(name, values, takes_guidance, said, data, plain, with_w):
    with pytest.raises(ValueError, match=said):
        METHODS[name](job_of(name, data, with_w if takes_guidance else plain, values))


def test_guidance_is_not_built_in_twice(data, plain):
    student = replace(plain, card=replace(plain.card, guidance=2.0))
    with pytest.raises(ValueError, match="built in"):
        METHODS["progressive"](job_of("progressive", data, student, PHASES))
    job = job_of("progressive", data, student, {**PHASES, "guidance": 1.0})
    assert METHODS["progressive"](job).result()[1].guidance == 2.0


def test_a_teacher_that_takes_something_else_is_refused(data, plain):
    teacher = replace(plain, card=replace(plain.card, conditions={"steps": (2, 8)}))
    with pytest.raises(ValueError, match="takes steps"):
        METHODS["progressive"](job_of("progressive", data, teacher, PHASES))
