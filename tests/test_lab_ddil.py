"""DDIL: what it collects is what was visited, what it learns there is the base's."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kdpp
from kdpp.digits import schedule
from kdpp.lab import processes
from kdpp.lab.methods.consistency import Consistency
from kdpp.lab.methods.ddil import Collected, Reflected, States
from kdpp.lab.methods.progressive import Progressive
from kdpp.lab.networks import VEDenoiser
from problems import seeded
from trainings import check_samples, draws, losses_of, method_of, spots, teacher, trained

SMALL = {
    "batch": 16, "iterations": 12, "start_steps": 8, "steps": 2, "every": 2, "fresh": 12,
    "capacity": 40, "rate": 2e-3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    with processes.single_thread():
        yield


# The parts.


def test_reflected_estimates_are_clipped_and_their_gradient_is_not():
    x = torch.linspace(-3, 3, 13).view(1, 13).requires_grad_()
    reflected = Reflected(lambda x, sigma, cond: 2 * x + sigma + cond, -1.0, 0.5)
    given_args = torch.zeros(1), torch.zeros(1)
    made = reflected(x, given_args[0], cond=given_args[1])
    expected = torch.tensor([max(-1.0, min(2 * value, 0.5)) for value in x[0].tolist()])
    torch.testing.assert_close(made[0].detach(), expected)
    made.sum().backward()
    assert (x.grad == 2).all()
    with torch.no_grad():
        assert torch.equal(reflected(x, given_args[0], cond=given_args[1])[0], expected)


@given(
    capacity=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
)
def test_the_ring_holds_the_newest_states(capacity, sizes, uniform):
    ring, everything = Collected(capacity, (2,)), 0
    for size in sizes:
        number = torch.arange(everything, everything + size)
        ring.add(number[:, None].repeat(1, 2).float(), number, 10 * number)
        everything += size
    held = len(ring)
    assert held == min(capacity, everything)
    newest = range(everything - held, everything)
    picks = torch.linspace(0, 1, 10 * held + 1)[:-1].clamp(max=1 - 1e-6)
    x, labels, places = ring.pick(torch.cat((picks, torch.tensor([uniform]))))
    assert set(labels.tolist()) == set(newest)
    assert torch.equal(x, labels[:, None].repeat(1, 2).float())
    assert torch.equal(places, 10 * labels)

    copy = Collected(capacity, (2,))
    copy.load_state_dict(ring.state_dict())
    assert torch.equal(copy.pick(picks)[1], ring.pick(picks)[1])
    ring.clear()
    assert len(ring) == 0 and len(copy) == held


def test_it_holds_its_base():
    task = method_of("ddil", SMALL)
    assert isinstance(task.base.method, Progressive)
    assert task.optimisers is task.base.method.optimisers
    assert isinstance(method_of("ddil", SMALL | {"base": "consistency"}).base.method, Consistency)


# What is collected.


def collected(task, levels):
    """The dataset as trajectories: labels (n,), and states (steps, n, …)."""
    n, steps = len(task.collected), len(levels) - 1
    places = task.collected.places[:n]
    assert torch.equal(places, torch.arange(steps).repeat_interleave(n // steps))
    labels = task.collected.labels[:n].view(steps, -1)
    assert (labels == labels[0]).all()
    return labels[0], task.collected.x[:n].unflatten(0, (steps, -1))


def walk(denoise, x, levels):
    """DDIM, written with the direction (x - D)/σ."""
    for sigma, sigma_next in pairwise(levels):
        d = denoise(x, x.new_full((len(x),), sigma))
        x = x + (x - d) / sigma * (sigma_next - sigma)
    return x


def wild(task):
    """Make the student's network another one than the teacher's."""
    with torch.no_grad():
        for p in task.base.method.network.parameters():
            p += 0.1 * seeded(*p.shape, seed=p.numel(), dtype=torch.float32)


@pytest.mark.parametrize("reflected", [False, True])
@pytest.mark.parametrize("turns", [0.0, 1.0])
@pytest.mark.parametrize("phase", [0, 1])
def test_progressive_rollouts_are_the_students_or_the_teachers(turns, phase, reflected):
    """Early in a phase, after its first iteration, with an idle optimiser."""
    settings = SMALL | {"turns": [turns, turns], "rate": 0.0, "reflected": reflected}
    task = method_of("ddil", settings)
    if phase == 1:
        wild(task)  # it is the teacher then
    task.step(phase * 6, draws(phase * 6))
    if turns == 1.0:
        wild(task)
        task.step(phase * 6 + 2, draws(phase * 6 + 2))
        task.collected.x, task.collected.labels, task.collected.places = (
            held.roll(-12, 0)
            for held in (task.collected.x, task.collected.labels, task.collected.places)
        )
        task.collected.added.sub_(12)
    levels = schedule((4, 2)[phase])
    labels, states = collected(task, levels)

    def denoise(x, sigma):
        if turns == 1.0:
            d = VEDenoiser(task.base.method.network)(x, sigma, labels)
        elif phase == 0:
            d = teacher().with_cfg(labels, 2.0)(x, sigma)
        else:
            d = VEDenoiser(task.base.method.previous)(x, sigma, labels)
        low, high = spots().images.min(), spots().images.max()
        return d.clamp(low, high) if reflected else d

    fine = schedule((8, 4)[phase])
    for k, (state, following) in enumerate(pairwise(states)):
        on_the_way = levels[k : k + 2] if turns == 1.0 else fine[2 * k : 2 * k + 3]
        with torch.no_grad():
            expected = walk(denoise, state, on_the_way)
        torch.testing.assert_close(following, expected, rtol=1e-4, atol=1e-4)
    assert 0.5 < float(states[0].std()) / levels[0] < 1.5


@pytest.mark.parametrize("reflected", [False, True])
@pytest.mark.parametrize("turns", [0.0, 1.0])
def test_consistency_rollouts_are_the_averages_or_the_teachers(turns, reflected):
    settings = SMALL | {"base": "consistency", "steps": 3, "substeps": 4, "rate": 0.0}
    task = method_of("ddil", settings | {"turns": [turns, turns], "reflected": reflected})
    wild(task)
    low, high = float(spots().images.min()), float(spots().images.max())

    def clipped(denoise):
        return Reflected(denoise, low, high) if reflected else denoise

    task.step(0, draws(0))
    levels = schedule(3)
    labels, states = collected(task, levels)
    rollout = kdpp.mixed_rollout(
        clipped(VEDenoiser(task.base.method.average)),
        clipped(lambda x, sigma, cond: teacher().with_cfg(cond, 2.0)(x, sigma)), states[0],
        torch.tensor(levels, dtype=torch.float64), teacher_substeps=4,
        teacher_probability=1 - turns, disable=True, extra_args={"cond": labels},
    )  # fmt: skip
    torch.testing.assert_close(states, torch.stack(rollout.states[:-1]), rtol=1e-4, atol=1e-4)


def test_late_in_a_phase_the_student_has_more_turns():
    """change = 0.5 of 6 iterations: collecting up to 2 is the teacher's, from 3 the student's."""
    task = method_of("ddil", SMALL | {"turns": [0.0, 1.0], "change": 0.5, "rate": 0.0, "every": 1})
    calls = []
    task.base.student.register_forward_hook(lambda *_: calls.append(len(calls)))
    seen = []
    for i in range(6):
        before = len(calls)
        task.step(i, draws(i))
        seen.append(len(calls) - before - 1)  # one is the loss's
    assert seen == [0, 0, 0, 4, 4, 4]


# What is learnt.


@pytest.mark.parametrize(
    "base, first, late, steps",
    [("progressive", 0, 9, 4), ("progressive", 10, 19, 2), ("consistency", 0, 11, 2)],
)
def test_a_share_of_the_batch_is_of_collected_states(base, first, late, steps):
    """From the second iteration of a phase on, half of the batch; late in it, all."""
    settings = SMALL | {"base": base, "shares": [0.5, 1.0], "change": 0.5, "rate": 0.0}
    task = method_of("ddil", settings | {"batch": 64, "every": 100, "iterations": 20})
    student = task.base.student if base == "progressive" else task.base.learner
    levels, shares = schedule(steps), []
    for i in (first, first + 1, late):
        asked = []
        handle = student.register_forward_hook(
            lambda _, given, kwargs, __, asked=asked: asked.append((*given, kwargs["cond"])),
            with_kwargs=True,
        )
        task.step(i, draws(i))
        handle.remove()
        x, sigma, labels = asked[0]
        n = len(task.collected)
        same = (x[:, None] == task.collected.x[None, :n]).flatten(2).all(2)
        shares.append(float(same.any(1).double().mean()))
        for row, column in same.nonzero().tolist():
            place = int(task.collected.places[column])
            assert float(sigma[row]) == pytest.approx(levels[place])
            assert labels[row] == task.collected.labels[column]
    assert shares[0] == 0 and 0.3 < shares[1] < 0.7 and shares[2] == 1


def test_without_collected_states_it_is_progressive_distillation():
    plain = {key: SMALL[key] for key in ("batch", "start_steps", "steps", "rate")}
    base = method_of("progressive", plain | {"iterations": 6})
    task = method_of("ddil", SMALL | {"shares": [0.0, 0.0], "reflected": False})
    assert task.iterations == base.iterations == 12
    assert losses_of(task) == losses_of(base)
    for found, expected in zip(
        task.base.method.network.parameters(), base.network.parameters(), strict=True
    ):
        assert torch.equal(found, expected)


def test_without_collected_states_it_is_consistency_distillation():
    base = method_of("consistency", {"network": None, "batch": 16, "iterations": 12, "rate": 2e-3})
    settings = {"base": "consistency", "shares": [0.0, 0.0], "reflected": False}
    task = method_of("ddil", SMALL | settings)
    for found, expected in zip(losses_of(task), losses_of(base), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def walls(task):
    low, high = float(spots().images.min()), float(spots().images.max())
    assert task.bounds == (low, high)
    return lambda estimate: estimate.clip(low, high)


def test_the_progressive_loss_has_reflected_estimates_alone():
    """With CFG 4 the first teacher's are far outside, and x is such that the student's are."""
    task = method_of("ddil", SMALL | {"guidance": 4.0})
    clip, labels = walls(task), torch.arange(64) % 3
    jump = task.base.method.jumps[0][torch.arange(64) % 4]
    sigma, middle, end = jump.unbind(1)
    x = (2 + sigma).view(-1, 1, 1, 1) * seeded(64, 1, 4, 4, seed=3, dtype=torch.float32)
    ratio = [(b / a).view(-1, 1, 1, 1) for a, b in ((sigma, middle), (middle, end), (sigma, end))]
    with torch.no_grad():
        first = clip(teacher().with_cfg(labels, 4.0)(x, sigma))
        halfway = first + (x - first) * ratio[0]
        second = clip(teacher().with_cfg(labels, 4.0)(halfway, middle))
        ended = second + (halfway - second) * ratio[1]
        target = (ended - ratio[2] * x) / (1 - ratio[2])
        plain = VEDenoiser(task.base.method.network)(x, sigma, labels)
        error = (clip(plain) - target) ** 2
    expected = (error * sigma.view(-1, 1, 1, 1).pow(-2).clamp(min=1)).mean()
    assert (clip(plain) != plain).double().mean() > 0.1
    found = task.base.learn(0, 0, States(x, labels, jump))
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_consistency_target_has_reflected_estimates_alone():
    task = method_of("ddil", SMALL | {"guidance": 4.0, "base": "consistency"})
    wild(task)
    clip, labels = walls(task), torch.arange(64) % 3
    t = torch.linspace(5, 995, 64)  # below 20 the teacher's step ends at 0
    network = task.base.method.network
    sigma, end = network.sigma(t), network.sigma((t - 20).clamp(min=0))
    x = (2 + sigma).view(-1, 1, 1, 1) * seeded(64, 1, 4, 4, seed=3, dtype=torch.float32)
    with torch.no_grad():
        plain = teacher().with_cfg(labels, 4.0)(x, sigma)
        first = clip(plain)
        x_s = first + (x - first) * (end / sigma).view(-1, 1, 1, 1)
        reached = clip(VEDenoiser(task.base.method.average)(x_s, end, labels))
        found = task.base.target(x, sigma, labels)
    assert (first != plain)[0].any() and (first != plain).double().mean() > 0.1
    torch.testing.assert_close(found[0], first[0])
    torch.testing.assert_close(found[1:], reached[1:], rtol=1e-3, atol=1e-3)


# The run.


def distance_to_the_end(denoise, levels) -> float:
    """How far DDIM over the levels ends from the guided teacher's path from the same states."""
    labels = torch.arange(120) % 3
    x = spots(120).images + levels[0] * seeded(120, 1, 4, 4, seed=7, dtype=torch.float32)
    fine = torch.linspace(0, levels[0], 41).flip(0).tolist()
    with torch.no_grad():
        found = walk(lambda x, sigma: denoise(x, sigma, labels), x, levels)
        end = walk(lambda x, sigma: of_teacher(x, sigma, labels), x, fine)
    return float((found - end).abs().mean())


def of_teacher(x, sigma, labels):
    return teacher().with_cfg(labels, 2.0)(x, sigma)


def test_progressive_training_lowers_the_loss(tmp_path):
    settings = SMALL | {"batch": 64, "iterations": 60, "rate": 5e-3}
    idle = losses_of(method_of("ddil", settings | {"rate": 0.0}))
    found = losses_of(method_of("ddil", settings))
    first, last = (sum(row["loss"] for row in rows[20:30]) for rows in (idle, found))
    assert last < 0.8 * first
    student = trained(tmp_path, "ddil", settings)
    assert student.sampler == "euler" and student.levels == schedule(2)
    assert student.card.guidance == 2.0 and student.card.conditions == {}
    assert check_samples(student) > 0.9


def test_consistency_training_brings_the_end_nearer(tmp_path):
    """Its loss compares it with itself; what it is to find is the end of the teacher's path."""
    settings = {"base": "consistency", "batch": 64, "iterations": 150, "rate": 5e-3}
    student = trained(tmp_path, "ddil", SMALL | settings)
    middle = (1.5, 0.0)
    assert distance_to_the_end(student.denoiser, middle) < 0.85 * distance_to_the_end(
        of_teacher, middle
    )
    assert student.sampler == "lcm" and student.levels == schedule(2)
    assert student.card.guidance == 2.0 and student.card.conditions == {}
    assert check_samples(student) > 0.9


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"base": "sfd"}, "'progressive' or 'consistency'"),
        ({"shares": [0.5]}, "shares is .*it must be 2 numbers"),
        ({"turns": [0.5, 1.5]}, r"turns is \(0.5, 1.5\)"),
        ({"change": -1.0}, "change is -1.0"),
        ({"every": 0}, "every is 0"),
        ({"capacity": 0}, "capacity is 0"),
        ({"iterations": 1}, "there are 2 phases"),
        ({"start_steps": 6}, "halving does not lead"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        method_of("ddil", SMALL | settings)


@pytest.mark.parametrize("base", ["progressive", "consistency"])
def test_a_guided_teacher_is_refused(base):
    card = replace(teacher().card, guidance=2.0)
    with pytest.raises(ValueError, match="guid"):
        method_of("ddil", {"base": base}, teacher=replace(teacher(), card=card))
