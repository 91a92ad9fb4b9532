"""Reversed DDIM and mixed rollouts: against exact solutions, plain DDIM and loops written out."""

import math
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

import kdpp
from kdpp import rollouts
from kdpp.editing import inpaint
from kdpp.models import FlowDenoiser, as_flow
from kdpp.rollouts import encode, mixed_rollout
from problems import (
    SHAPE,
    CFGDenoiser,
    Counted,
    NeverCalled,
    conditions,
    gaussian,
    log_uniform,
    mixture,
    per_sample,
    relative,
    seeded,
)

LOW, HIGH = 0.0292, 14.6146
COARSE = torch.tensor([14.61, 1.63, 0.645, 0.277, 0.0], dtype=torch.float64)
STEPS = len(COARSE) - 1
BATCH = 6


def rising(steps):
    """Levels that go up, evenly in log sigma."""
    return log_uniform(steps, LOW, HIGH).flip(0)


def euler(model, x, sigmas, extra_args=None):
    """kdpp's own Euler, without a teacher: what every stateless DDIM must agree with."""
    alone = kdpp.TeacherGuidedDenoiser(model, NeverCalled(), teacher_steps=0)
    return kdpp.sample_euler_tg(alone, x, sigmas, extra_args, disable=True)


def slope(steps, errors):
    """The order of convergence: minus the slope of log error over log steps."""
    logs = torch.tensor([[math.log(n), math.log(e)] for n, e in zip(steps, errors)])
    centred = logs - logs.mean(0)
    return -float((centred[:, 0] @ centred[:, 1]) / centred[:, 0].square().sum())


def start(batch=BATCH, seed=9):
    return seeded(batch, *SHAPE, seed=seed) * COARSE[0]


# ---------------------------------------------------------------------------------- encode


def test_the_encoding_converges_to_the_exact_one_with_order_1():
    """The Gaussian's ODE is solved in closed form: upwards, and up and down again."""
    model = gaussian()
    x = seeded(3, *SHAPE, seed=1)
    exact = model.solution(x, LOW, HIGH)
    steps = [50, 100, 200, 400]
    up, round_trip = [], []
    for n in steps:
        z = encode(model, x, rising(n), disable=True)
        up.append(relative(z, exact))
        round_trip.append(relative(euler(model, z, rising(n).flip(0)), x))
    assert slope(steps, up) == pytest.approx(1.0, abs=0.05)
    assert slope(steps, round_trip) == pytest.approx(1.0, abs=0.05)
    assert up[-1] < 0.02 and round_trip[-1] < 0.02


def test_one_step_is_the_formula_with_guidance():
    """x' = D + (x - D)/s * s', D guided: Algorithm 5's line in VE."""
    model, (cond, uncond) = mixture(), conditions(3)
    x = seeded(3, *SHAPE, seed=1)
    s = x.new_full((3,), 0.5)
    d_c, d_u = model(x, s, cond=cond), model(x, s, cond=uncond)
    for scale in (0.0, 1.0, 3.0):
        denoised = d_u + scale * (d_c - d_u)
        expected = denoised + (x - denoised) / 0.5 * 2.0
        extra = {"cond": cond, "uncond": uncond, "cond_scale": scale}
        levels = torch.tensor([0.5, 2.0], dtype=torch.float64)
        torch.testing.assert_close(encode(model, x, levels, extra, disable=True), expected)
        own = kdpp.OwnCFG(CFGDenoiser(model))
        torch.testing.assert_close(encode(own, x, levels, extra, disable=True), expected)


def test_a_wrapper_encodes_with_its_student():
    cond, uncond = conditions(2)
    extra = {"cond": cond, "uncond": uncond, "cond_scale": 2.0}
    for student in (mixture(), kdpp.OwnCFG(CFGDenoiser(mixture()))):
        model = kdpp.TeacherGuidedDenoiser(student, NeverCalled())
        found, expected = (
            encode(m, seeded(2, *SHAPE, seed=1), rising(4), extra, disable=True)
            for m in (model, student)
        )
        torch.testing.assert_close(found, expected)


def test_a_flow_model_encodes_to_the_same_latent():
    """The step has one form in VE and in flow coordinates."""
    model, x, sigmas = mixture(), seeded(3, *SHAPE, seed=1), rising(9)
    z = encode(model, x, sigmas, disable=True)
    taus = sigmas / (1 + sigmas)
    flow = encode(as_flow(model), x * (1 - taus[0]), taus, disable=True)
    torch.testing.assert_close(flow, z * (1 - taus[-1]), rtol=1e-10, atol=1e-10)


def test_encode_leaves_x_and_the_random_stream_alone_and_reports():
    model, x = Counted(mixture()), seeded(2, *SHAPE, seed=1)
    before, state, said = x.clone(), torch.get_rng_state(), []
    sigmas = rising(5).float()
    z = encode(model, x, sigmas, callback=said.append, disable=True)
    assert torch.equal(x, before) and torch.equal(state, torch.get_rng_state())
    assert z.dtype == x.dtype and len(model.calls) == 5
    assert [info["i"] for info in said] == list(range(5))
    for i, (info, call) in enumerate(zip(said, model.calls)):
        assert info["sigma"] == info["sigma_hat"] == sigmas[i]
        assert torch.equal(info["x"], call.x) and torch.equal(info["denoised"], call.output)
        assert torch.equal(call.sigma, x.new_full((2,), float(sigmas[i])))


def test_encode_steps_of_no_length_and_schedules_of_one_level():
    model, x = mixture(), seeded(2, *SHAPE, seed=1)
    levels = torch.tensor([0.5, 0.5, 2.0, 2.0], dtype=torch.float64)
    once = encode(model, x, levels[1:3], disable=True)
    assert torch.equal(encode(model, x, levels, disable=True), once)
    assert encode(NeverCalled(), x, levels[:1], disable=True) is x


BAD_RISING = {
    "two dimensions": (torch.ones(2, 2), "1-D"),
    "falling": (torch.tensor([1.0, 2.0, 0.5]), "falls from 2.0 to 0.5"),
    "zero": (torch.tensor([0.0, 1.0]), "0.0"),
    "negative": (torch.tensor([-1.0, 1.0]), "-1.0"),
    "infinite": (torch.tensor([1.0, math.inf]), "inf"),
    "nan": (torch.tensor([1.0, math.nan]), "nan"),
}


@pytest.mark.parametrize(("sigmas", "given"), BAD_RISING.values(), ids=BAD_RISING)
def test_encode_refuses_bad_sigmas(sigmas, given):
    with pytest.raises(ValueError, match="sigmas") as error:
        encode(NeverCalled(), seeded(2, *SHAPE, seed=1), sigmas)
    assert given in str(error.value)


def test_encode_refuses_other_bad_input():
    x, cond = seeded(2, *SHAPE, seed=1), seeded(2, 3, seed=1)
    with pytest.raises(TypeError, match="int64"):
        encode(NeverCalled(), torch.ones(2, *SHAPE, dtype=torch.int64), rising(2))
    with pytest.raises(TypeError, match=r"model=kdpp\.OwnCFG"):
        encode(CFGDenoiser(mixture()), x, rising(2))
    with pytest.raises(TypeError, match="model"):
        encode(None, x, rising(2))
    with pytest.raises(ValueError, match="flow model, whose levels lie in"):
        encode(FlowDenoiser(NeverCalled()), x, rising(2))
    with pytest.raises(ValueError, match="uncond"):
        encode(NeverCalled(), x, rising(2), {"cond": cond, "cond_scale": 2.0})


# ---------------------------------------------------------------------------------- the digits


@cache
def digits():
    """The embedded teacher as a denoiser, 40 images new to it, their labels, the classifier."""
    from kdpp.digits import load_classifier, load_data, load_teacher

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compvis = kdpp.kdiffusion.external.CompVisDenoiser
    images, labels = load_data("test")
    return compvis(load_teacher()), images[:40], labels[:40], load_classifier()


def digit_args(labels, scale):
    from kdpp.digits import NULL_CLASS

    return {"cond": labels, "uncond": torch.full_like(labels, NULL_CLASS), "cond_scale": scale}


@pytest.mark.parametrize(("scale", "bound"), [(1.0, 0.016), (2.0, 0.05)])
def test_a_round_trip_of_digits_returns_the_image(scale, bound):
    """docs/rollouts.md states the errors; they fall with the steps, at 100 below the bound."""
    teacher, images, labels, _ = digits()
    extra = digit_args(labels, scale)
    errors = []
    for steps in (25, 50, 100):
        sigmas = rising(steps)
        z = encode(teacher, images, sigmas, extra, disable=True)
        back = euler(teacher, z, sigmas.flip(0), extra)
        errors.append(float((back - images).norm() / images.norm()))
    assert errors[0] > 1.6 * errors[1] > 1.6 * 1.6 * errors[2]
    assert errors[2] < bound


def test_style_transfer_between_digits():
    """Encoded as what it is, decoded as another digit: the new one, by the old one's hand."""
    teacher, images, labels, classifier = digits()
    up = rising(25)
    down = torch.cat([up.flip(0), up.new_zeros(1)])
    z = encode(teacher, images, up, {"cond": labels}, disable=True)
    new = (labels + 1 + torch.arange(len(labels)) % 9) % 10
    transferred = euler(teacher, z, down, {"cond": new})
    others = euler(teacher, z.roll(7, 0), down, {"cond": new})
    read = classifier(transferred.clamp(-1, 1)).argmax(1)
    assert (read == new).double().mean() >= 0.95
    assert (transferred - images).norm() < 0.95 * (others - images).norm()


# ---------------------------------------------------------------------------------- mixed rollouts


def fine(substeps=8):
    """The coarse levels with the documented sub-levels between them, written out."""
    levels = []
    for low, high in zip(COARSE[1:].tolist(), COARSE[:-1].tolist()):
        for j in range(substeps):
            f = j / substeps
            levels.append(high * (1 - f) if low == 0 else high ** (1 - f) * low**f)
    return torch.tensor([*levels, 0.0], dtype=torch.float64)


ALL_STUDENT = [{"teacher_probability": 0.0}, {"switch": 0}, {"switch": STEPS, "first": "student"}]
ALL_TEACHER = [{"teacher_probability": 1.0}, {"switch": STEPS}, {"switch": 0, "first": "student"}]


@pytest.mark.parametrize("options", ALL_STUDENT, ids=str)
def test_the_student_alone_is_plain_ddim(options):
    cond, uncond = conditions(BATCH)
    extra = {"cond": cond, "uncond": uncond, "cond_scale": 2.5}
    student = Counted(mixture(0))
    found = mixed_rollout(student, NeverCalled(), start(), COARSE, extra_args=extra, **options)
    torch.testing.assert_close(found.x, euler(mixture(0), start(), COARSE, extra))
    assert len(student.calls) == STEPS and not found.by_teacher.any()


@pytest.mark.parametrize("options", ALL_TEACHER, ids=str)
@pytest.mark.parametrize("substeps", [1, 3, 8])
def test_the_teacher_alone_is_plain_ddim_over_all_sub_levels(options, substeps):
    cond, uncond = conditions(BATCH)
    extra = {"cond": cond, "uncond": uncond, "cond_scale": 2.5}
    teacher = Counted(mixture(1))
    options = {**options, "teacher_substeps": substeps, "teacher_cfg_scale": 4.0}
    found = mixed_rollout(NeverCalled(), teacher, start(), COARSE, extra_args=extra, **options)
    expected = euler(mixture(1), start(), fine(substeps), {**extra, "cond_scale": 4.0})
    torch.testing.assert_close(found.x, expected)
    assert len(teacher.calls) == STEPS * substeps and found.by_teacher.all()


@pytest.mark.parametrize("first", ["teacher", "student"])
@pytest.mark.parametrize("switch", range(1, STEPS))
def test_a_switch(first, switch):
    """Before it one network, from it on the other, each over its own levels."""
    networks = {"teacher": mixture(1), "student": mixture(0)}
    second = {"teacher": "student", "student": "teacher"}[first]
    levels = {"student": (COARSE[: switch + 1], COARSE[switch:])}
    levels["teacher"] = (fine()[: 8 * switch + 1], fine()[8 * switch :])
    middle = euler(networks[first], start(), levels[first][0])
    expected = euler(networks[second], middle, levels[second][1])
    found = mixed_rollout(**networks, x=start(), sigmas=COARSE, switch=switch, first=first)
    torch.testing.assert_close(found.x, expected)
    torch.testing.assert_close(found.states[switch], middle)
    taken = [(i < switch) == (first == "teacher") for i in range(STEPS)]
    assert found.by_teacher.tolist() == [[t] * BATCH for t in taken]


def by_hand(coins, x, extra, scale):
    """Every sample on its own, transition by transition."""
    samples = []
    for b in range(len(x)):
        one, part = x[b : b + 1], {k: v[b : b + 1] for k, v in extra.items()}
        states = [one]
        for i in range(STEPS):
            if coins[i, b]:
                levels = fine()[8 * i : 8 * i + 9]
                one = euler(mixture(1), one, levels, {**part, "cond_scale": scale})
            else:
                one = euler(mixture(0), one, COARSE[i : i + 2], {**part, "cond_scale": 2.5})
            states.append(one)
        samples.append(torch.cat(states))
    return torch.stack(samples, 1)


def test_coins_of_each_sample():
    """Each sample takes its own way, with its own condition; each network sees its own samples."""
    cond, uncond = conditions(BATCH)
    student, teacher = Counted(mixture(0)), Counted(mixture(1))
    found = mixed_rollout(
        student, teacher, start(), COARSE, teacher_probability=0.5, teacher_cfg_scale=4.0,
        extra_args={"cond": cond, "uncond": uncond, "cond_scale": 2.5},
        generator=torch.Generator().manual_seed(3), disable=True,
    )  # fmt: skip
    coins = found.by_teacher
    assert (
        coins.shape == (STEPS, BATCH) and coins.dtype == torch.bool and coins.device.type == "cpu"
    )
    assert any(0 < row.sum() < BATCH for row in coins)
    expected = by_hand(coins, start(), {"cond": cond, "uncond": uncond}, 4.0)
    torch.testing.assert_close(torch.stack(found.states), expected)
    assert torch.equal(found.x, found.states[-1])
    # Both halves of CFG count: 2 evaluations for a student's transition, 16 for a teacher's.
    assert sum(len(call.x) for call in student.calls) == 2 * int((~coins).sum())
    assert sum(len(call.x) for call in teacher.calls) == 2 * 8 * int(coins.sum())
    assert len(student.calls) == sum(bool((~row).any()) for row in coins)
    assert len(teacher.calls) == 8 * sum(bool(row.any()) for row in coins)


def nested(x, sigma, style, fixed):
    """A network with a nested condition, and an argument that has no batch."""
    return mixture()(x, sigma, cond=style["mean"][0]) * fixed.sum()


def test_permuting_and_splitting_the_batch_with_given_coins(monkeypatch):
    """Neither the order of the samples nor their company changes a sample."""
    x, mean, fixed = start(), seeded(BATCH, 3, seed=5), torch.tensor([0.25, 0.75])
    coins = torch.rand(STEPS, BATCH, generator=torch.Generator().manual_seed(1)) < 0.5
    monkeypatch.setattr(rollouts, "toss", lambda *_: table)

    def run(order):
        return mixed_rollout(
            nested, nested, x[order], COARSE, teacher_probability=0.5,
            extra_args={"style": {"mean": [mean[order]]}, "fixed": fixed},
        ).x  # fmt: skip

    table = coins
    whole = run(torch.arange(BATCH))
    for order in (torch.tensor([3, 1, 0, 5, 4, 2]), torch.tensor([4]), torch.tensor([1, 2, 5])):
        table = coins[:, order]
        torch.testing.assert_close(run(order), whole[order])


def by_words(x, sigma, cond):
    """A network that takes prompts: longer ones make a brighter image."""
    lengths = torch.tensor([float(len(text)) for text in cond["prompts"]], dtype=x.dtype)
    assert len(lengths) == len(x)
    return mixture()(x, sigma) + per_sample(lengths, x)


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_of_prompts_go_with_their_samples(kind):
    """One text for each sample, nested too; a list of another length is everybody's."""
    words = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff"]
    everybody = []

    def network(x, sigma, cond, shared):
        everybody.append(shared)
        return by_words(x, sigma, cond)

    found = mixed_rollout(
        network, network, start(), COARSE, teacher_probability=0.5, disable=True,
        extra_args={"cond": {"prompts": kind(words)}, "shared": ["x", "y"]},
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert any(0 < row.sum() < BATCH for row in found.by_teacher)
    for i in range(BATCH):
        coins, one = found.by_teacher[:, i], start()[i : i + 1]
        for j in range(STEPS):
            levels = fine()[8 * j : 8 * j + 9] if coins[j] else COARSE[j : j + 2]
            one = euler(by_words, one, levels, {"cond": {"prompts": [words[i]]}})
        torch.testing.assert_close(found.x[i : i + 1], one)
    assert all(shared == ["x", "y"] for shared in everybody)


def tossed(batch, probability=0.5, generator=None, steps=STEPS):
    """The coins alone."""
    x = torch.zeros(batch, *SHAPE)
    sigmas = torch.linspace(3, 0, steps + 1)
    options = {"teacher_probability": probability, "generator": generator, "teacher_substeps": 1}
    model = lambda x, sigma: x * 0  # noqa: E731
    return mixed_rollout(model, model, x, sigmas, disable=True, **options).by_teacher


def test_a_generator_carried_on_gives_the_coins_of_the_whole_batch():
    generators = [torch.Generator().manual_seed(8) for _ in range(2)]
    whole = tossed(40, generator=generators[0])
    parts = [tossed(n, generator=generators[1]) for n in (1, 19, 20)]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_private_coins_leave_the_global_stream_and_follow_its_seed():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = tossed(50), tossed(50)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(first, second)
    torch.manual_seed(6)
    assert not torch.equal(first, tossed(50))


@pytest.mark.parametrize("probability", [0.2, 0.7])
@pytest.mark.parametrize("private", [True, False])
def test_coins_are_fair_and_independent(probability, private):
    """4,000 of them within 4 standard deviations, over all and between neighbours."""
    torch.manual_seed(2)
    generator = None if private else torch.Generator().manual_seed(2)
    coins = tossed(500, probability, generator, steps=8).double()
    spread = math.sqrt(probability * (1 - probability))
    bound = 4 / math.sqrt(coins.numel())
    assert abs(coins.mean() - probability) < bound * spread
    centred = (coins - probability) / spread
    assert abs((centred[1:] * centred[:-1]).mean()) < 1.1 * bound
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 1.1 * bound


def test_what_the_callback_is_told():
    """k-diffusion's dict once a transition; denoised is the estimate at its first level."""
    said, x = [], start()
    before = x.clone()
    student, teacher = mixture(0), mixture(1)
    found = mixed_rollout(
        student, teacher, x, COARSE, teacher_probability=0.5, callback=said.append,
        generator=torch.Generator().manual_seed(3), disable=True,
    )  # fmt: skip
    assert torch.equal(x, before) and torch.equal(found.states[0], before)
    assert [info["i"] for info in said] == list(range(STEPS))
    for i, info in enumerate(said):
        assert info["sigma"] == info["sigma_hat"] == COARSE[i]
        assert torch.equal(info["x"], found.states[i])
        sigma = x.new_full((BATCH,), float(COARSE[i]))
        answers = [model(info["x"], sigma) for model in (student, teacher)]
        coins = per_sample(found.by_teacher[i], x).to(x.device)
        torch.testing.assert_close(info["denoised"], torch.where(coins, answers[1], answers[0]))


def test_a_network_that_uses_its_buffer_again():
    """Neither the states nor what a callback keeps change afterwards."""

    class Reused(torch.nn.Module):
        def forward(self, x, sigma):
            if not hasattr(self, "buffer"):
                self.buffer = torch.empty_like(x)
            return self.buffer.copy_(mixture()(x, sigma))

    options = {"switch": STEPS, "disable": True}
    estimates = [[], []]
    found, expected = (
        mixed_rollout(
            model, model, start(), COARSE, **options,
            callback=lambda info, kept=kept: kept.append(info["denoised"].clone()),
        )
        for model, kept in zip((Reused(), mixture()), estimates)
    )  # fmt: skip
    assert all(map(torch.equal, found.states, expected.states))
    assert all(map(torch.equal, *estimates))


def test_the_loops_read_nothing_back():
    """On the meta device every read of a number would raise."""
    x, cond = torch.empty(BATCH, *SHAPE, device="meta"), torch.empty(BATCH, 3, device="meta")
    extra = {"cond": cond, "uncond": cond, "cond_scale": 2.0}

    def model(x, sigma, cond):
        return x * sigma[:, None, None, None]

    assert encode(model, x, rising(3), extra, disable=True).shape == x.shape
    options = {"teacher_probability": 0.5, "generator": torch.Generator().manual_seed(3)}
    found = mixed_rollout(model, model, x, COARSE, extra_args=extra, disable=True, **options)
    assert found.x.shape == x.shape and found.x.device == x.device
    assert any(0 < row.sum() < BATCH for row in found.by_teacher)


@pytest.mark.parametrize("options", [{"teacher_probability": 0.5}, {"switch": 0}])
@pytest.mark.parametrize("sigmas", [torch.tensor([]), torch.tensor([3.0])], ids=["none", "one"])
def test_no_transitions(options, sigmas):
    x = start()
    found = mixed_rollout(NeverCalled(), NeverCalled(), x, sigmas, disable=True, **options)
    assert found.x is x and found.states == (x,) and found.by_teacher.shape == (0, BATCH)


def test_repeated_levels_change_nothing():
    sigmas = torch.tensor([3.0, 3.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    for switch in (0, 4):
        found = mixed_rollout(mixture(0), mixture(1), start(), sigmas, switch=switch)
        plain = mixed_rollout(mixture(0), mixture(1), start(), sigmas[1:4], switch=switch // 2)
        torch.testing.assert_close(found.x, plain.x)


def test_sub_levels():
    """Log-uniform above zero, evenly spaced towards it, the ends as given."""
    assert rollouts.between(8.0, 1.0, 3) == pytest.approx([8.0, 4.0, 2.0, 1.0])
    assert rollouts.between(8.0, 0.0, 4) == [8.0, 6.0, 4.0, 2.0, 0.0]
    assert rollouts.between(8.0, 0.1, 1) == [8.0, 0.1]


BAD_OPTIONS = {
    "neither": ({}, "exactly one"),
    "both": ({"teacher_probability": 0.5, "switch": 1}, "exactly one"),
    "probability above 1": ({"teacher_probability": 1.5}, "teacher_probability is 1.5"),
    "probability below 0": ({"teacher_probability": -0.1}, "teacher_probability is -0.1"),
    "probability nan": ({"teacher_probability": math.nan}, "teacher_probability is nan"),
    "probability a bool": ({"teacher_probability": True}, "teacher_probability is True"),
    "probability a string": ({"teacher_probability": "half"}, "teacher_probability is 'half'"),
    "switch past the end": ({"switch": STEPS + 1}, f"switch is {STEPS + 1}"),
    "switch before the start": ({"switch": -1}, "switch is -1"),
    "switch no whole number": ({"switch": 1.5}, "switch is 1.5"),
    "first": ({"switch": 1, "first": "both"}, "first is 'both'"),
    "no sub-steps": ({"switch": 1, "teacher_substeps": 0}, "teacher_substeps is 0"),
    "half a sub-step": ({"switch": 1, "teacher_substeps": 0.5}, "teacher_substeps is 0.5"),
    "teacher_cfg_scale": ({"switch": 1, "teacher_cfg_scale": math.nan}, "teacher_cfg_scale is nan"),
    "teacher uncond": ({"switch": 1, "teacher_cfg_scale": 2.0}, "uncond"),
    "student uncond": ({"switch": 1, "extra_args": {"cond_scale": 2.0}}, "uncond"),
    "rising": ({"switch": 1, "sigmas": COARSE.flip(0)}, "sigmas rises"),
    "a matrix": ({"switch": 1, "sigmas": COARSE[None]}, "sigmas has shape"),
    "infinite": ({"switch": 1, "sigmas": torch.tensor([math.inf, 0.0])}, "sigmas holds inf"),
}


@pytest.mark.parametrize(("options", "given"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_mixed_rollout_refuses(options, given):
    """Before any network is called."""
    options = {"sigmas": COARSE, **options}
    with pytest.raises(ValueError) as error:
        mixed_rollout(NeverCalled(), NeverCalled(), start(), **options)
    assert given in str(error.value)


def test_mixed_rollout_refuses_other_types():
    with pytest.raises(TypeError, match="int64"):
        mixed_rollout(NeverCalled(), NeverCalled(), start().long(), COARSE, switch=1)
    for role, models in {"student": (None, mixture()), "teacher": (mixture(), None)}.items():
        with pytest.raises(TypeError, match=role):
            mixed_rollout(*models, start(), COARSE, switch=1)
    for role in ("student", "teacher"):
        models = {"student": mixture(), "teacher": mixture(), role: CFGDenoiser(mixture())}
        with pytest.raises(TypeError, match=rf"{role}=kdpp\.OwnCFG"):
            mixed_rollout(**models, x=start(), sigmas=COARSE, switch=1)


def test_mixed_rollout_refuses_flow_models_where_they_do_not_fit():
    flow = FlowDenoiser(NeverCalled())
    with pytest.raises(ValueError, match="both be flow models"):
        mixed_rollout(NeverCalled(), flow, start(), COARSE, switch=1)
    with pytest.raises(ValueError, match="flow model, whose levels lie in"):
        mixed_rollout(flow, flow, start(), COARSE, switch=1)


def marked(model):
    return kdpp.OwnCFG(lambda x, sigma, cond_scale=1.0: model(x, sigma))


@pytest.mark.parametrize("owner", [lambda model: model, marked])
@pytest.mark.parametrize("images", [1, 2, BATCH])
def test_coins_and_inpainting(images, owner):
    """Each sample keeps its own image, whichever samples go together: as on its own."""
    image, noise = seeded(images, *SHAPE, seed=4), seeded(images, *SHAPE, seed=5)
    mask = torch.rand(images, *SHAPE, generator=torch.Generator().manual_seed(1)).round()

    def network(seed, rows=slice(None)):
        return inpaint(owner(mixture(seed)), image[rows], mask[rows], noise[rows])

    found = mixed_rollout(
        network(0), network(1), start(), COARSE, teacher_probability=0.5, disable=True,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert any(0 < row.sum() < BATCH for row in found.by_teacher)
    for i in range(BATCH):
        k, one = i % images, start()[i : i + 1]
        for j in range(STEPS):
            by_teacher = bool(found.by_teacher[j, i])
            levels = fine()[8 * j : 8 * j + 9] if by_teacher else COARSE[j : j + 2]
            one = euler(network(int(by_teacher), slice(k, k + 1)), one, levels)
        torch.testing.assert_close(found.x[i : i + 1], one)
        assert torch.equal(found.x[i][mask[k] == 0], image[k][mask[k] == 0])


def test_coins_inpainting_and_cfg():
    """kdpp's CFG joins two copies of the samples that a coin chose."""
    image, noise = seeded(BATCH, *SHAPE, seed=4), seeded(BATCH, *SHAPE, seed=5)
    mask = torch.tensor([[0.0, 1.0], [1.0, 0.5]])
    cond, uncond = conditions(BATCH)
    extra = {"cond": cond, "uncond": uncond, "cond_scale": 2.0}
    model = inpaint(mixture(), image, mask, noise)
    found, expected = (
        mixed_rollout(
            model, model, start(), COARSE, teacher_substeps=1, teacher_cfg_scale=2.0,
            extra_args=extra, disable=True, **way,
        ).x
        for way in (
            {"teacher_probability": 0.5, "generator": torch.Generator().manual_seed(3)},
            {"switch": 2},
        )
    )  # fmt: skip
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------- the docs


def test_the_examples_of_the_page_run():
    page = Path(__file__).parents[1] / "docs" / "rollouts.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(examples) == 2
    variables = {}
    for example in examples:
        exec(example, variables)
    images, back = variables["images"], variables["back"]
    assert (back - images).norm() < 0.1 * images.norm()
    for name, asked in (("transferred", "new"), ("digits", "labels")):
        read = variables["classifier"](variables[name].clamp(-1, 1)).argmax(1)
        assert (read == variables[asked]).double().mean() > 0.9, name
