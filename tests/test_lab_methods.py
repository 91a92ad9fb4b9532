"""Every method of the registry, unasked: it resumes, it is counted, it learns, its model samples.

A method that is entered in any way (a file of this package, an entry point, KDPP_IMPORT=FILE.py)
is tested here without a line.
"""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import kdpp
from kdpp.lab import processes
from kdpp.lab.methods import load_methods
from kdpp.lab.models import FILE, load_model, read_checkpoint
from kdpp.lab.networks import Network
from kdpp.lab.settings import fill, read_value, to_flag
from kdpp.lab.trainer import train
from trainings import draws, guidable_teacher, small, training_of

METHODS = load_methods()
COLLECT = {"every": 4, "fresh": 12, "capacity": 40}
CASES = {name: (name, {}) for name in METHODS} | {
    "teacher, eps": ("teacher", {"loss": "eps"}),
    "consistency, huber": ("consistency", {"loss": "huber", "network": None}),
    "consistency, a range": ("consistency", {"skip": 300.0, "guidance_range": (1.0, 3.0)}),
    "guided-stage-two, stochastic": ("guided-stage-two", {"kind": "stochastic"}),
    "guided-stage-two, one scale": ("guided-stage-two", {"guidance": 2.0}),
    "encoder, of a plain teacher": ("encoder", {"guidance": 1.0}),
    "naive-guided, apart": ("naive-guided", {"guidance": None}),
    "sfd, several": ("sfd", {"steps": [2, 3], "solver": "heun"}),
    "sfd, plain": ("sfd", {"steps": [2], "guidance": 1.0, "t_min": 0.1, "solver": "euler"}),
    "ddil, the teacher's turns": ("ddil", {**COLLECT, "turns": [0.0, 0.0]}),
    "ddil, the student's turns": ("ddil", {**COLLECT, "turns": [1.0, 1.0]}),
    "ddil, consistency": ("ddil", {**COLLECT, "base": "consistency", "turns": [0.0, 0.0]}),
}
every_case = pytest.mark.parametrize("case", CASES)
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(autouse=True)
def one_thread():
    with processes.single_thread():
        yield


def training(case, **settings):
    """The case in small, of the first teacher that it takes."""
    name, more = CASES[case]
    if name == "lora-consistency":
        pytest.importorskip("peft")
    values = small(METHODS[name]) | more | settings
    if case == "guided-stage-two, one scale":  # it would take the plain one, too
        return training_of(name, values, teacher=guidable_teacher())
    try:
        found = training_of(name, values)
        found.method(found)
    except ValueError:
        found = training_of(name, values, teacher=guidable_teacher())
    return found


class Evaluated:
    """What networks were asked: calls, and images in all of them."""

    def __init__(self):
        self.calls = self.images = 0


@contextmanager
def evaluated():
    """Seen from outside, whoever asks them."""
    seen = Evaluated()

    def look(module, given):
        if isinstance(module, Network):
            seen.calls += 1
            seen.images += len(given[0])

    hook = register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a case's training that nothing stopped, and how many images it evaluated."""
    done = {}

    def find(case):
        if case not in done:
            folder, it = tmp_path_factory.mktemp("whole"), training(case)
            with evaluated() as made:  # some look at an image to learn its size
                it.method(it)
            with evaluated() as seen:
                train(it, folder, disable=True)
            done[case] = folder, seen.images - made.images
        return done[case]

    return find


class Killed(Exception):
    pass


@every_case
def test_a_training_that_is_killed_ends_as_one_that_is_not(case, whole, tmp_path, monkeypatch):
    """Killed within a phase, right after a state, and just behind one."""
    it = training(case)
    step, total = it.method.step, it.method(it).iterations
    kills = [total // 4 + 1, total // 2, total // 2 + 1]

    def killed(self, i, draws):
        if kills and i == kills[0]:
            kills.pop(0)
            raise Killed
        return step(self, i, draws)

    monkeypatch.setattr(it.method, "step", killed)
    while kills:
        with pytest.raises(Killed):
            train(it, tmp_path, save_every=3, disable=True)
        assert not (tmp_path / FILE).exists()
    train(it, tmp_path, save_every=3, disable=True)
    folder, _ = whole(case)
    for name in (FILE, "log.csv", "settings.toml"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@every_method
def test_another_seed_is_another_model(name, whole, tmp_path):
    train(dataclasses.replace(training(name), seed=1), tmp_path, disable=True)
    networks = (read_checkpoint(folder)[0] for folder in (tmp_path, whole(name)[0]))
    pairs = zip(*(network.parameters() for network in networks), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def sfd_by_hand(s):
    """Every step of the teacher's solver, CFG's halves counted, and every one of the student's."""
    order = {"dpmpp_3m": 1, "heun": 2, "euler": 1}[s.solver]
    last = 1 if s.solver == "heun" and s.t_min == 0 else 0  # Heun's step to 0 is Euler's
    counts = [s.steps[i % len(s.steps)] for i in range(s.iterations)]
    halves = 1 if s.guidance == 1 else 2
    return sum(halves * (order * s.substeps * n - last) + n for n in counts)


def ddil_by_hand(s):
    """Its base's, and transitions that are all the teacher's or all the student's."""
    if s.turns[0] != s.turns[1]:
        return None
    halves = [2] if s.base == "consistency" else [2, 1]  # of a phase's teacher
    phase, total = s.iterations // len(halves), 0
    for n in halves:
        base = 4 if s.base == "consistency" else 2 * n + 1
        teachers = n * (s.substeps if s.base == "consistency" else 2)
        transitions = s.fresh * -(-phase // s.every) / s.batch
        total += base * phase + transitions * (1 if s.turns[0] else teachers)
    return total


BY_HAND = {
    "classifier": lambda s: s.iterations,
    "teacher": lambda s: s.iterations,
    "consistency": lambda s: (2 + 1 + 1) * s.iterations,  # CFG, the average, the student
    "lora-consistency": lambda s: (2 + 1 + 1) * s.iterations,
    "progressive": lambda s: (2 * 2 + 1) * s.iterations + (2 + 1) * s.iterations,  # two phases
    "guided-stage-one": lambda s: (2 + 1) * s.iterations,
    "guided-stage-two": lambda s: (3 if s.kind == "stochastic" else 2) * (2 + 1) * s.iterations,
    "encoder": lambda s: 2 * (2 + 1) * s.iterations,
    "naive-guided": lambda s: 2 * 2 * (2 + 1) * s.iterations,
    "sfd": sfd_by_hand,
    "ddil": ddil_by_hand,
    "matching": lambda s: (
        (s.steps + 3) * -(-s.iterations // s.ratio) + (s.steps + 1) * s.iterations
    ),
    "adversarial": lambda s: (1 + 3 + 2) * s.iterations,
}
"""Evaluations of a whole training, for each image of a batch; None: they are drawn."""
CALLS = {
    "classifier": 1, "teacher": 1, "consistency": 3, "lora-consistency": 3, "progressive": 3,
    "guided-stage-one": 2, "guided-stage-two": 3, "encoder": 3, "naive-guided": 3,
    "sfd": 4 * (4 + 1), "ddil": 3, "matching": (4 + 1 + 1) + (4 + 1), "adversarial": 1 + 3 + 1,
}  # fmt: skip
"""Calls of networks in a step that does all there is to do."""


@every_case
def test_evaluations_are_counted(case, whole):
    """In the file stands what was seen from outside, and what a count by hand gives."""
    folder, seen = whole(case)
    it, found = training(case), read_checkpoint(folder)[1].evaluations
    assert found == seen > 0
    hand = BY_HAND.get(it.method.name, lambda settings: None)(it.settings)
    assert hand is None or found == hand * it.settings.batch


@every_method
def test_network_calls_of_a_step(name):
    more = {"every": 2} if name == "ddil" else {}  # its second step makes no rollouts
    it = training(name, **more)
    method, first = it.method(it), int(name == "ddil")
    for i in range(first):
        method.step(i, draws(i))
    with evaluated() as seen:
        method.step(first, draws(first))
    assert 0 < seen.calls == CALLS.get(name, seen.calls)


def mean_losses(it, idle):
    """The mean of each loss over the last third, of a method that learns or of an idle one."""
    method, found = it.method(it), {}
    if idle:
        for optimiser in method.optimisers.values():
            optimiser.step = lambda: None
    for i in range(method.iterations):
        for name, value in method.step(i, draws(i)).items():
            if i >= 2 * method.iterations // 3:
                found.setdefault(name, []).append(value.item())
    return {name: sum(values) / len(values) for name, values in found.items()}


SOONER = {
    "adversarial": {"judged": [0.0, 100.0], "head_rate": 1e-2},
    "matching": {"rate": 2e-3, "fake_rate": 5e-3},
}
"""Settings with which so short a training shows."""


@every_case
def test_it_learns(case):
    """Some loss comes out lower than on the same draws where the optimisers do nothing."""
    single_phase = {"start_steps": 4} if "start_steps" in training(case).identity else {}
    more = SOONER.get(CASES[case][0], {}) | single_phase
    it = training(case, batch=64, iterations=40, **more)
    learnt, idle = mean_losses(it, idle=False), mean_losses(it, idle=True)
    falls = {name: (idle[name] - learnt[name]) / abs(idle[name]) for name in idle}
    assert max(falls.values()) > 0.02, falls


@pytest.mark.parametrize("case", [case for case in CASES if case != "classifier"])
def test_the_model_samples_as_its_card_says(case, whole):
    model = load_model(whole(case)[0])
    card, labels = model.card, torch.arange(9) % 3
    assert card.method == CASES[case][0] and set(card.conditions) == set(card.network["conditions"])
    levels = card.levels or kdpp.digits.schedule(3)
    sigmas, scale = torch.tensor(levels), (model.guidance_range or (0.0, 1.0))[1]
    extra_args = {"cond": labels, "uncond": torch.full_like(labels, 3), "cond_scale": scale}
    denoiser = model.denoiser_for(len(levels) - 1)
    x = levels[0] * torch.randn(9, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    if card.sampler == "encode":
        images = kdpp.encode(denoiser, x, sigmas, extra_args, disable=True)
    else:
        sample = kdpp.SOLVERS[model.sampler].sample
        alone = kdpp.TeacherGuidedDenoiser(denoiser, denoiser, teacher_steps=0)
        images = sample(alone, x, sigmas, extra_args, disable=True)
    assert images.shape == x.shape and images.isfinite().all()


@every_method
def test_its_settings_are_explained_and_can_be_pasted_back(name):
    kind = METHODS[name]
    assert kind.name == name and kind.summary and kind.source
    for field in dataclasses.fields(kind.Settings):
        assert field.metadata.get("help")
        default = getattr(kind.Settings(), field.name)
        pasted = read_value(kind.Settings, field.name, to_flag(default))
        assert getattr(fill(kind.Settings, {field.name: pasted}), field.name) == default
