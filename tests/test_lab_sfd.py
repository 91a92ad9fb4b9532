"""SFD: its targets are the teacher's own trajectory, its student walks its own and learns there."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import kdpp
from kdpp.digits import schedule
from kdpp.lab import processes
from kdpp.lab.methods.sfd import schedule_to, trajectory
from kdpp.lab.networks import VEDenoiser
from problems import gaussian, relative, seeded
from trainings import check_samples, draws, losses_of, method_of, teacher, trained

LEVELS = (14.61, 1.63, 0.645, 0.277, 0.05)


@pytest.fixture(autouse=True)
def one_thread():
    with processes.single_thread():
        yield


# The teacher's trajectory.


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("dpmpp_3m", 2)])
def test_targets_are_the_points_of_the_exact_trajectory(solver, order):
    model, x = gaussian(), LEVELS[0] * seeded(3, 3, 2, 2, seed=1)
    exact = [model.solution(x, LEVELS[0], sigma) for sigma in LEVELS[1:]]

    def errors(substeps):
        found = trajectory(solver, model, x, LEVELS, substeps, {})
        assert len(found) == len(exact)
        return torch.tensor([relative(a, b) for a, b in zip(found, exact)])

    coarse, fine = errors(32), errors(64)
    assert (fine < 0.05).all()
    observed = (coarse / fine).log2()
    assert (observed > order - 0.25).all(), observed


@pytest.mark.parametrize("ending", [0.0, 0.05])
def test_the_euler_teacher_is_that_of_a_rollout(ending):
    model, levels = gaussian(), (*LEVELS[:-1], ending)
    x = levels[0] * seeded(3, 3, 2, 2, seed=2)
    rollout = kdpp.mixed_rollout(
        model, model, x, torch.tensor(levels, dtype=torch.float64), teacher_substeps=5,
        teacher_probability=1.0, disable=True,
    )  # fmt: skip
    for found, expected in zip(
        trajectory("euler", model, x, levels, 5, {}), rollout.states[1:], strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_multistep_teacher_keeps_its_memory_across_the_levels():
    model, x = gaussian(), LEVELS[0] * seeded(3, 3, 2, 2, seed=3)
    whole = trajectory("dpmpp_3m", model, x, LEVELS, 3, {})
    state, restarted = x, []
    for pair in pairwise(LEVELS):
        state = trajectory("dpmpp_3m", model, state, pair, 3, {})[-1]
        restarted.append(state)
    torch.testing.assert_close(whole[0], restarted[0])
    exact = model.solution(x, LEVELS[0], LEVELS[-1])
    assert relative(whole[-1], exact) < 0.5 * relative(restarted[-1], exact)


def test_the_teacher_is_guided_by_its_cfg():
    labels = torch.arange(8) % 3
    x = LEVELS[0] * seeded(8, 1, 4, 4, seed=4, dtype=torch.float32)
    null = torch.full_like(labels, 3)
    given = {"cond": labels, "uncond": null, "cond_scale": 2.0}
    (found, *_) = trajectory("euler", teacher().denoiser, x, LEVELS, 1, given)
    level = x.new_full((8,), LEVELS[0])
    of_label, of_none = (teacher().denoiser(x, level, cond=c) for c in (labels, null))
    guided = of_none + 2.0 * (of_label - of_none)
    torch.testing.assert_close(found, guided + (x - guided) * (LEVELS[1] / LEVELS[0]))


# The student.


def test_an_iteration_is_algorithm_2():
    method = method_of("sfd", {"batch": 8, "steps": [3], "solver": "heun", "iterations": 5})
    network = copy.deepcopy(method.network)
    adam = torch.optim.Adam(network.parameters(), lr=method.settings.rate)
    reported = method.step(0, draws(0))

    known = draws(0)
    images, labels = known.batch(8)
    levels = schedule(3)
    x = levels[0] * known.noise(images)
    given = {"cond": labels, "uncond": torch.full_like(labels, 3), "cond_scale": 2.0}
    targets = trajectory("heun", teacher().denoiser, x, levels, 4, given)
    losses = []
    for (sigma, sigma_next), target in zip(pairwise(levels), targets):
        x = x.detach()
        t = VEDenoiser(network).sigma_to_t(torch.full((8,), sigma))
        eps = network.apply_model(x / (1 + sigma**2) ** 0.5, t, labels)
        x = x + (sigma_next - sigma) * eps
        loss = (x - target).abs().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert reported["loss"].item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert reported["last"].item() == pytest.approx(losses[-1], rel=1e-5)
    for found, expected in zip(method.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_first_loss_is_small_where_the_student_is_the_teacher():
    """With Euler and one substep the teacher's step is the student's."""
    same = {"solver": "euler", "substeps": 1, "guidance": 1.0, "rate": 0.0}
    method = method_of("sfd", same | {"batch": 8})
    assert method.step(0, draws(0))["loss"] < 1e-6


SMALL = {"batch": 32, "iterations": 60, "steps": [4], "rate": 2e-3}


def fall_of_the_loss(settings: dict) -> float:
    """The mean loss of the last six iterations over that of a student that learns nothing."""
    idle = losses_of(method_of("sfd", settings | {"rate": 0.0, "iterations": 12}))
    found = losses_of(method_of("sfd", settings))
    first, last = (sum(row["loss"] for row in rows) / 6 for rows in (idle[:6], found[-6:]))
    return last / first


def test_training_lowers_the_loss_and_the_student_samples(tmp_path):
    assert fall_of_the_loss(SMALL) < 0.6
    student = trained(tmp_path, "sfd", SMALL)
    assert student.sampler == "euler" and student.levels == schedule(4)
    assert student.card.guidance == 2.0 and student.card.conditions == {}
    plain = check_samples(teacher(), 4, "euler")
    assert check_samples(student) > max(0.9, plain - 0.02)


def test_one_model_for_several_numbers_of_steps(tmp_path):
    settings = SMALL | {"steps": [2, 3, 4]}
    assert fall_of_the_loss(settings) < 0.75
    student = trained(tmp_path, "sfd", settings)
    assert student.card.conditions == {"steps": (2, 4)} and student.levels == schedule(4)
    for steps in (2, 3, 4, 5):  # 5 it has not seen
        assert check_samples(student, steps) > 0.9
    x = seeded(4, 1, 4, 4, seed=5, dtype=torch.float32)
    args = x, torch.ones(4), torch.zeros(4, dtype=torch.int64)
    two, four = (student.denoiser(*args, steps=torch.tensor(n)) for n in (2.0, 4.0))
    assert (two - four).abs().max() > 1e-3


def test_every_number_of_steps_has_its_turn_and_is_told():
    method = method_of("sfd", SMALL | {"steps": [2, 3, 4]})
    asked = []
    method.network.register_forward_hook(
        lambda _, given, kwargs, __: asked.append(set(kwargs["steps"].tolist())), with_kwargs=True
    )
    for i in range(4):
        method.step(i, draws(i))
    assert asked == [{2.0}] * 2 + [{3.0}] * 3 + [{4.0}] * 4 + [{2.0}] * 2


def test_without_guidance_the_student_takes_any(tmp_path):
    method = method_of("sfd", SMALL | {"guidance": 1.0, "dropout": 0.5})
    asked = []
    denoise = method.teacher.denoiser
    method.teacher = replace(
        method.teacher,
        denoiser=lambda x, sigma, cond: asked.append(cond) or denoise(x, sigma, cond=cond),
    )
    method.step(0, draws(0))
    assert {len(labels) for labels in asked} == {32}  # one half
    assert 4 < int((asked[0] == 3).sum()) < 28
    assert method.result()[1].guidance is None


def test_the_rate_falls_as_a_cosine():
    method = method_of("sfd", SMALL | {"iterations": 4, "rate": 1e-3})
    rates = []
    for i in range(4):
        method.step(i, draws(i))
        rates.append(method.optimisers["network"].param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 0.853553e-3, 0.5e-3, 0.146447e-3], rel=1e-4)


def test_t_min_ends_the_last_step(tmp_path):
    assert schedule_to("divided", 4, 0.0) == schedule(4)
    assert schedule_to("divided", 4, 0.1) == (*schedule(4)[:-1], 0.1)
    student = trained(tmp_path, "sfd", SMALL | {"t_min": 0.1, "iterations": 5})
    assert student.levels == (*schedule(4)[:-1], 0.1)
    assert check_samples(student) > 0.9


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"steps": []}, "steps is empty"),
        ({"steps": [0]}, "n must be a whole number"),
        ({"substeps": 0}, "substeps is 0"),
        ({"t_min": -0.1}, "t_min is -0.1"),
        ({"t_min": 0.5}, "start their last one at"),
        ({"t_min": schedule(4)[-2]}, "start their last one at"),
        ({"solver": "dpm"}, "'dpmpp_3m' or 'heun' or 'euler'"),
    ],
)
def test_settings_without_a_trajectory_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        method_of("sfd", settings)


def test_a_guided_teacher_is_refused():
    card = replace(teacher().card, guidance=2.0)
    with pytest.raises(ValueError, match="guided already"):
        method_of("sfd", {}, teacher=replace(teacher(), card=card))
