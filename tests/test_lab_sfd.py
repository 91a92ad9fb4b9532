"""SFD: its targets are the teacher's own trajectory, its student walks its own and learns there."""

import copy
from functools import lru_cache
from itertools import pairwise

import pytest
import torch

import kdpp
from kdpp.digits import schedule
from kdpp.lab import processes
from kdpp.lab.data import Data
from kdpp.lab.methods import Draws, Job, Task, load_methods
from kdpp.lab.methods.sfd import SFD, schedule_to, trajectory
from kdpp.lab.models import FILE, Model, load_model
from kdpp.lab.networks import VEDenoiser
from kdpp.lab.sampling import Recipe, draw, levels_for
from kdpp.lab.settings import fill
from kdpp.lab.trainer import Run, train
from problems import gaussian, relative, seeded

CPU = torch.device("cpu")
TINY = {"kind": "resmlp", "width": 16, "hidden": 32, "blocks": 1}
ABOUT = {"conditions": {}, "guidance": None, "sampler": "euler", "levels": None}
LEVELS = (14.61, 1.63, 0.645, 0.277, 0.05)


@pytest.fixture(autouse=True)
def one_thread():
    with processes.single_thread():
        yield


# Shared by the tests of the other students: data, a teacher, a run.


def spots(count: int = 60) -> Data:
    """Three classes of 4 × 4 images, each with a bright spot somewhere else."""
    labels = torch.arange(count) % 3
    images = torch.full((count, 1, 4, 4), -0.8)
    images.flatten(1)[torch.arange(count), labels * 3] = 0.8
    images += 0.1 * seeded(*images.shape, seed=0, dtype=torch.float32)
    return Data(images.clamp(-1, 1), labels, 3, "spots")


@lru_cache(maxsize=1)
@torch.enable_grad()
def teacher() -> Model:
    """A teacher of the spots, good enough to be distilled."""
    settings = {"iterations": 200, "batch": 64, "rate": 5e-3, "average": 0.9, "network": TINY}
    task = task_of("teacher", settings)
    for i in range(task.iterations):
        task.step(i, draws(i))
    network = task.result()[0].eval()
    data = {"source": "spots", "shape": [1, 4, 4], "classes": 3, "bounded": True}
    return Model(VEDenoiser(network), network, ABOUT | {"method": "teacher", "data": data})


def task_of(name: str, settings: dict, seed: int = 0) -> Task:
    method = load_methods()[name]
    model = teacher() if method.teacher else None
    return method.make(Job(spots(), model, fill(method.settings, settings), seed, CPU))


def draws(i: int, seed: int = 0) -> Draws:
    return Draws(spots(), seed, i, CPU)


def losses_of(task: Task) -> list[dict[str, float]]:
    found = []
    for i in range(task.iterations):
        found.append({name: value.item() for name, value in task.step(i, draws(i)).items()})
    return found


def trained(folder, name: str, settings: dict, save_every: int = 200) -> Model:
    method = load_methods()[name]
    run = Run(method, fill(method.settings, settings), spots(), teacher(), "spots", 0)
    train(run, folder, save_every=save_every, disable=True)
    return load_model(folder)


def check_resumed(tmp_path, monkeypatch, name: str, settings: dict, stop: int) -> None:
    """A run that is stopped at iteration ``stop`` and taken up again ends as one that is not."""
    trained(tmp_path / "whole", name, settings)
    kind = type(task_of(name, settings))
    step = kind.step

    def stopped(self, i, draws):
        if i == stop:
            raise KeyboardInterrupt
        return step(self, i, draws)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "parts", name, settings, save_every=3)
    assert not (tmp_path / "parts" / FILE).exists()
    trained(tmp_path / "parts", name, settings, save_every=3)
    whole, parts = (tmp_path / part / FILE for part in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def check_samples(student: Model, steps: int | None = None, sampler: str | None = None) -> float:
    """The share of the student's images whose spot is where it was asked for."""
    levels = levels_for(student, steps)
    made = draw(Recipe(student, None, sampler or student.sampler, levels), range(90))
    assert made.x.isfinite().all() and made.x.shape == (90, 1, 4, 4)
    assert made.evaluations == (len(levels) - 1, 0)
    return float((made.x.flatten(1).argmax(1) == 3 * made.labels).double().mean())


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
    task = task_of("sfd", {"batch": 8, "steps": [3], "solver": "heun", "iterations": 5})
    network = copy.deepcopy(task.network)
    adam = torch.optim.Adam(network.parameters(), lr=task.settings.rate)
    reported = task.step(0, draws(0))

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
    for found, expected in zip(task.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_first_loss_is_small_where_the_student_is_the_teacher():
    """With Euler and one substep the teacher's step is the student's."""
    same = {"solver": "euler", "substeps": 1, "guidance": 1.0, "rate": 0.0}
    task = task_of("sfd", same | {"batch": 8})
    assert task.step(0, draws(0))["loss"] < 1e-6


SMALL = {"batch": 32, "iterations": 60, "steps": [4], "rate": 2e-3}


def fall_of_the_loss(settings: dict) -> float:
    """The mean loss of the last six iterations over that of a student that learns nothing."""
    idle = losses_of(task_of("sfd", settings | {"rate": 0.0, "iterations": 12}))
    found = losses_of(task_of("sfd", settings))
    first, last = (sum(row["loss"] for row in rows) / 6 for rows in (idle[:6], found[-6:]))
    return last / first


def test_training_lowers_the_loss_and_the_student_samples(tmp_path):
    assert fall_of_the_loss(SMALL) < 0.6
    student = trained(tmp_path, "sfd", SMALL)
    assert student.sampler == "euler" and student.levels == schedule(4)
    assert student.about["guidance"] == 2.0 and student.about["conditions"] == {}
    assert student.about["evaluations"] == 60 * 32 * 4 * (4 * 2 + 1)
    plain = check_samples(Model(teacher().denoiser, teacher().network, teacher().about), 4, "euler")
    assert check_samples(student) > max(0.9, plain - 0.02)


def test_one_model_for_several_numbers_of_steps(tmp_path):
    settings = SMALL | {"steps": [2, 3, 4]}
    assert fall_of_the_loss(settings) < 0.75
    student = trained(tmp_path, "sfd", settings)
    assert student.about["conditions"] == {"steps": [2, 4]} and student.levels == schedule(4)
    for steps in (2, 3, 4, 5):  # 5 it has not seen
        assert check_samples(student, steps) > 0.9
    x = seeded(4, 1, 4, 4, seed=5, dtype=torch.float32)
    args = x, torch.ones(4), torch.zeros(4, dtype=torch.int64)
    two, four = (student.denoiser(*args, steps=torch.tensor(n)) for n in (2.0, 4.0))
    assert (two - four).abs().max() > 1e-3


def test_every_number_of_steps_has_its_turn_and_is_told():
    task = task_of("sfd", SMALL | {"steps": [2, 3, 4]})
    asked = []
    task.network.register_forward_hook(
        lambda _, given, kwargs, __: asked.append(set(kwargs["steps"].tolist())), with_kwargs=True
    )
    for i in range(4):
        task.step(i, draws(i))
    assert asked == [{2.0}] * 2 + [{3.0}] * 3 + [{4.0}] * 4 + [{2.0}] * 2


def test_without_guidance_the_student_takes_any(tmp_path):
    task = task_of("sfd", SMALL | {"guidance": 1.0, "dropout": 0.5})
    asked = []
    denoise = task.teacher.denoiser
    task.teacher = Model(
        lambda x, sigma, cond: asked.append(cond) or denoise(x, sigma, cond=cond),
        task.teacher.network,
        task.teacher.about,
    )
    task.step(0, draws(0))
    assert {len(labels) for labels in asked} == {32}  # one half
    assert 4 < int((asked[0] == 3).sum()) < 28
    about = task.result()[1]
    assert about["guidance"] is None
    assert about["evaluations"] == 60 * 32 * 4 * (4 + 1)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("t_min", [0.0, 0.1])
@pytest.mark.parametrize("solver", ["dpmpp_3m", "heun", "euler"])
def test_the_evaluations_are_those_that_were_made(solver, t_min, guidance):
    """Rows that both networks were called with; the rate falls as a cosine meanwhile."""
    settings = {"solver": solver, "guidance": guidance, "substeps": 2, "steps": [2, 3]}
    task = task_of("sfd", SMALL | settings | {"t_min": t_min, "iterations": 4, "rate": 1e-3})
    rows, rates = [], []
    hooks = [
        network.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
        for network in (task.teacher.network, task.network)
    ]
    for i in range(4):
        task.step(i, draws(i))
        rates.append(task.optimisers["network"].param_groups[0]["lr"])
    for hook in hooks:
        hook.remove()
    assert task.result()[1]["evaluations"] == sum(rows)
    assert rates == pytest.approx([1e-3, 0.853553e-3, 0.5e-3, 0.146447e-3], rel=1e-4)


def test_t_min_ends_the_last_step(tmp_path):
    assert schedule_to("divided", 4, 0.0) == schedule(4)
    assert schedule_to("divided", 4, 0.1) == (*schedule(4)[:-1], 0.1)
    student = trained(tmp_path, "sfd", SMALL | {"t_min": 0.1, "iterations": 5})
    assert student.levels == (*schedule(4)[:-1], 0.1)
    assert check_samples(student) > 0.9


def test_it_resumes_bit_for_bit(tmp_path, monkeypatch):
    check_resumed(tmp_path, monkeypatch, "sfd", SMALL | {"steps": [2, 3], "iterations": 8}, 5)


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
        task_of("sfd", settings)


def test_a_guided_teacher_is_refused():
    guided = Model(teacher().denoiser, teacher().network, teacher().about | {"guidance": 2.0})
    with pytest.raises(ValueError, match="guided already"):
        SFD(Job(spots(), guided, SFD.Settings(), 0, CPU))
