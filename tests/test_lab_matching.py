"""Distribution matching: its gradient on Gaussians, its two time scales, what it makes.

And the adversarial student: its discriminator, its two losses.
"""

import copy
from dataclasses import replace

import pytest
import torch

from kdpp.digits import schedule
from kdpp.lab import processes
from kdpp.lab.methods import load_methods
from kdpp.lab.methods.adversarial import Discriminator, features
from kdpp.lab.methods.matching import matching_gradient
from kdpp.lab.methods.sfd import trajectory
from kdpp.lab.models import Model
from kdpp.lab.networks import VEDenoiser, build, waves
from kdpp.lab.settings import fill
from problems import seeded
from trainings import check_samples, draws, losses_of, method_of, spots, teacher, trained

SMALL = {"batch": 16, "iterations": 12, "steps": 2, "ratio": 3}


@pytest.fixture(autouse=True)
def one_thread():
    with processes.single_thread():
        yield


def gaussian(mean, deviation):
    """The exact denoiser of N(mean, deviation²)."""

    def denoise(x, sigma):
        level = sigma.view(-1, 1) ** 2
        return (deviation**2 * x + level * mean) / (deviation**2 + level)

    return denoise


# The gradient.


def test_it_is_the_difference_of_the_scores():
    """(D_fake - D_real)·|x0 - D_real| = σ²·(score_fake - score_real), written with densities."""
    made, sigma = seeded(5, 4, seed=1), torch.tensor([0.1, 0.5, 1.0, 3.0, 10.0]).double()
    x = (made + sigma[:, None] * seeded(5, 4, seed=2)).requires_grad_()

    def score(mean, deviation):
        density = torch.distributions.Normal(mean, (deviation**2 + sigma[:, None] ** 2).sqrt())
        return torch.autograd.grad(density.log_prob(x).sum(), x)[0]

    real = gaussian(0.3, 0.7)
    found = matching_gradient(real, gaussian(-0.5, 1.1), made, x, sigma)
    weight = sigma[:, None] ** 2 / (made - real(x, sigma)).abs().mean(1, keepdim=True)
    torch.testing.assert_close(found, weight * (score(-0.5, 1.1) - score(0.3, 0.7)))


def test_it_is_zero_where_student_and_teacher_are_one():
    made, sigma = seeded(64, 4, seed=1), torch.full((64,), 0.8).double()
    x = made + 0.8 * seeded(64, 4, seed=2)
    one = gaussian(0.3, 0.7)
    assert (matching_gradient(one, gaussian(0.3, 0.7), made, x, sigma) == 0).all()
    assert matching_gradient(one, gaussian(0.3, 0.8), made, x, sigma).abs().mean() > 0.01


@pytest.mark.parametrize("start", [(-1.0, 0.2), (2.0, 1.5)])
def test_down_the_gradient_a_gaussian_student_becomes_the_teacher(start):
    """x0 = a + b z with its exact denoiser, as a fake one that never lags would be."""
    parameters = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([parameters], lr=0.05)
    for i in range(400):
        adam.param_groups[0]["lr"] = 0.05 * (1 - i / 400)
        z, n = seeded(32, 16, seed=2 * i), seeded(32, 16, seed=2 * i + 1)
        sigma = (3 * seeded(32, seed=10_000 + i).abs()).clamp(min=0.05)
        a, b = parameters
        made = a + b * z
        with torch.no_grad():
            x = made + sigma[:, None] * n
            gradient = matching_gradient(gaussian(0.3, 0.7), gaussian(a, b), made, x, sigma)
        adam.zero_grad()
        made.backward(gradient)
        adam.step()
    assert parameters[0].item() == pytest.approx(0.3, abs=0.03)
    assert abs(parameters[1].item()) == pytest.approx(0.7, abs=0.03)


# The method.


def weights(network):
    return [p.detach().clone() for p in network.parameters()]


def same(network, before):
    return all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))


def test_the_student_steps_once_for_ratio_steps_of_the_fake():
    method = method_of("matching", SMALL)
    for i in range(7):
        student, average, fake = map(weights, (method.network, method.average, method.fake))
        names = method.step(i, draws(i)).keys()
        assert same(method.network, student) == same(method.average, average) == (i % 3 != 0)
        assert ("matching" in names) == (i % 3 == 0)
        assert "fake" in names and not same(method.fake, fake)


def test_the_student_learns_at_the_states_of_its_own_sampling():
    method = method_of("matching", SMALL | {"steps": 3, "batch": 60})
    calls = []
    method.student.register_forward_hook(
        lambda _, given, made: calls.append((given[0], given[1], made.detach()))
    )
    made, labels = method.make(draws(3))
    *rollout, (states, sigmas, ends) = calls
    levels = torch.tensor(schedule(3)[:-1])
    assert made.requires_grad and torch.equal(made, ends) and len(rollout) == 2
    assert torch.equal(labels, draws(3).batch(60)[1])
    places = (sigmas[:, None] == levels).int().argmax(1)
    assert places.bincount().min() > 8
    for k, (x, level, denoised) in enumerate(rollout):
        assert (level == levels[k]).all()
        assert torch.equal(states[places == k], x[places == k])
        following = rollout[k + 1][0] if k + 1 < len(rollout) else states
        rows = torch.arange(60) if k + 1 < len(rollout) else places == k + 1
        noise = (following - denoised)[rows] / levels[k + 1]
        assert abs(noise.std() - 1) < 0.1 and abs(noise.mean()) < 0.1
    assert abs(rollout[0][0].std() / levels[0] - 1) < 0.1


def test_the_student_follows_the_gradient_and_the_fake_learns_the_student():
    """A student's step from autograd, written out; its fake one's loss by the definition of v."""
    settings = SMALL | {"steps": 1, "guidance": 1.0}
    method = method_of("matching", settings)
    with torch.no_grad():
        for p in method.fake.parameters():
            p += 0.1 * seeded(*p.shape, seed=p.numel(), dtype=torch.float32)
    twin = copy.deepcopy(method.network)
    fake, real = VEDenoiser(copy.deepcopy(method.fake)), teacher().denoiser
    losses = method.step(0, draws(0))

    known = draws(0)
    images, labels = known.batch(16)
    known.integers(1, 16)
    start = torch.full((16,), schedule(1)[0])
    made = VEDenoiser(twin)(start[0] * known.noise(images), start, labels)
    sigma = twin.sigma(20 + 960 * known.uniform(16))
    x = made.detach() + sigma.view(-1, 1, 1, 1) * known.noise(images)
    with torch.no_grad():
        wanted = real(x, sigma, labels)
        distance = (made - wanted).abs().mean((1, 2, 3), keepdim=True)
        gradient = (fake(x, sigma, labels) - wanted) / distance
    made.backward(gradient / made.numel())
    assert losses["matching"].item() == pytest.approx(gradient.square().mean().item(), rel=1e-4)
    adam = torch.optim.Adam(twin.parameters(), lr=2e-4, betas=(0.0, 0.99))
    adam.step()
    for found, expected in zip(method.network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_the_fake_learns_what_the_student_makes():
    """The student is another than the teacher, and idle: the fake's loss falls to what it can."""
    method = method_of("matching", SMALL | {"batch": 64, "iterations": 60, "rate": 0.0, "ratio": 60,
                                        "fake_rate": 3e-3})  # fmt: skip
    with torch.no_grad():
        method.network.label.weight.copy_(method.network.label.weight.roll(1, 0))
    found = [row["fake"] for row in losses_of(method)]
    assert sum(found[-10:]) < 0.7 * sum(found[:10])


def test_training_brings_the_images_nearer_to_the_teachers(tmp_path):
    """A step of the teacher gives a mean; the student is to spread as the teacher's many do."""
    settings = {"steps": 1, "batch": 64, "iterations": 300, "ratio": 2, "guidance": 1.0}
    rates = {"rate": 5e-3, "fake_rate": 5e-3, "average": 0.9}
    student = trained(tmp_path, "matching", settings | rates)
    labels, levels = torch.arange(600) % 3, schedule(1)
    x = levels[0] * seeded(600, 1, 4, 4, seed=3, dtype=torch.float32)

    def statistics(images):
        groups = [images.flatten(1)[labels == c] for c in range(3)]
        return torch.stack([torch.stack((group.mean(0), group.std(0))) for group in groups])

    def once(model):
        return statistics(model.denoiser(x, torch.full((600,), levels[0]), cond=labels))

    with torch.no_grad():
        path = trajectory("heun", teacher().denoiser, x, levels, 30, {"cond": labels})
        first, last = ((once(model) - statistics(path[-1])).abs() for model in (teacher(), student))
    assert last.mean() < 0.85 * first.mean()
    assert check_samples(student) > 0.95


def test_the_result_says_what_it_is_for(tmp_path):
    student = trained(tmp_path, "matching", SMALL)
    assert student.sampler == "lcm" and student.levels == schedule(2)
    assert student.card.guidance == 1.5 and student.card.conditions == {}
    assert check_samples(student) > 0.9


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="ratio is 0"):
        method_of("matching", SMALL | {"ratio": 0})
    card = replace(teacher().card, guidance=2.0)
    with pytest.raises(ValueError, match="guided already"):
        method_of("matching", {}, teacher=replace(teacher(), card=card))


# The adversarial student.

DUEL = {"batch": 16, "iterations": 12, "steps": 2}


def test_features_are_the_blocks_answers():
    x, sigma = seeded(5, 1, 4, 4, seed=1, dtype=torch.float32), torch.full((5,), 0.7)
    labels, network = torch.arange(5) % 3, teacher().network
    (found,) = features(teacher(), x, sigma, labels)
    t = teacher().denoiser.sigma_to_t(sigma)
    condition = network.time(waves(t, 16)) + network.label(labels)
    h = network.enter((x / 1.49**0.5).flatten(1))
    torch.testing.assert_close(found, network.blocks[0](h, torch.nn.functional.silu(condition)))
    assert not network.blocks[0]._forward_hooks


def test_features_of_a_unet_are_averaged_over_places():
    pytest.importorskip("diffusers")
    sizes = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "add_attention": False,
    }
    config = {"kind": "unet", "shape": [1, 8, 8], "classes": 3, "conditions": []}
    network = build(config | sizes | blocks)
    model = Model(VEDenoiser(network), network, teacher().card)
    example = seeded(1, 1, 8, 8, seed=1, dtype=torch.float32)
    discriminator = Discriminator(model, example, 8)
    x, sigma = seeded(3, 1, 8, 8, seed=2, dtype=torch.float32), torch.full((3,), 0.7)
    assert discriminator(x, sigma, torch.arange(3)).shape == (3, 3)
    assert [f.shape[1] for f in features(model, x, sigma, torch.arange(3))] == [8, 16, 16]


def test_the_heads_alone_are_the_discriminator():
    discriminator = method_of("adversarial", DUEL).discriminator
    assert len(discriminator.heads) == 1
    assert all(name.startswith("heads.") for name in discriminator.state_dict())


def test_an_adversarial_step_is_hinge_loss_and_distillation():
    """Both steps from autograd, written out for a student of one level."""
    method = method_of("adversarial", DUEL | {"steps": 1, "weight": 0.7, "rate": 1e-4})
    twin, heads = copy.deepcopy(method.network), copy.deepcopy(method.discriminator)
    reported = method.step(0, draws(0))

    known = draws(0)
    images, labels = known.batch(16)
    known.integers(1, 16)
    top = schedule(1)[0]
    made = VEDenoiser(twin)(images + top * known.noise(images), torch.full((16,), top), labels)
    sigma = twin.sigma(100 + 700 * known.uniform(16))

    def noised(images, sigma):
        return images + sigma.view(-1, 1, 1, 1) * known.noise(images)

    def judge(x):
        (found,) = features(teacher(), x, sigma, labels)
        return heads.heads[0](found)

    real, fake = judge(noised(images, sigma)), judge(noised(made.detach(), sigma))
    hinge = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    adam = torch.optim.Adam(heads.parameters(), lr=2e-3, betas=(0.0, 0.99))
    hinge.backward()
    adam.step()
    passes = -judge(noised(made, sigma)).mean()
    level = twin.sigma(known.uniform(16) * 999)
    with torch.no_grad():
        x, null = noised(made, level), torch.full_like(labels, 3)
        of_label, of_none = (teacher().denoiser(x, level, cond=c) for c in (labels, null))
    error = (made - (2 * of_label - of_none)).square().mean((1, 2, 3))
    distilled = (error / (1 + level**2).sqrt()).mean()
    (passes + 0.7 * distilled).backward()
    torch.optim.Adam(twin.parameters(), lr=1e-4, betas=(0.0, 0.99)).step()

    expected = {"discriminator": hinge, "adversarial": passes, "distillation": distilled}
    for name, value in expected.items():
        assert reported[name].item() == pytest.approx(value.item(), rel=1e-4)
    pairs = [(method.network, twin, 2e-6), (method.discriminator, heads, 2e-5)]
    for found, wanted, atol in pairs:
        for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


# At low noise the features of a network of this size tell something.
CLOSE = DUEL | {"steps": 1, "batch": 64, "iterations": 100, "judged": [0.0, 100.0]}


def test_the_adversarial_student_learns_at_all_of_its_levels():
    """Real images noised to a level that is drawn for each."""
    method = method_of("adversarial", DUEL | {"steps": 4, "batch": 64})
    asked = []
    method.student.register_forward_pre_hook(lambda _, given: asked.append(given))
    method.step(0, draws(0))
    ((x, sigma, _),) = asked
    levels = schedule(4)
    assert set(sigma.tolist()) == {torch.tensor(level).item() for level in levels[:-1]}
    for level in levels[:-1]:
        here = x[sigma == torch.tensor(level)]
        assert here.std() == pytest.approx((level**2 + spots().images.var()) ** 0.5, rel=0.25)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("adversarial", {"judged": [5.0]}, "judged is .*it must be 2 numbers"),
        ("adversarial", {"judged": [800.0, 100.0]}, "judged is .*the least and the most"),
        ("adversarial", {"judged": [0.0, 2000.0]}, r"judged is .*in \[0, 999\]"),
        ("matching", {"compared": []}, "compared is .*it must be 2 numbers"),
        ("matching", {"compared": [-1.0, 5.0]}, r"compared is .*in \[0, 999\]"),
        ("adversarial", {"weight": -1.0}, "weight is -1.0; it must be at least 0"),
        ("adversarial", {"width": 0}, "width is 0; it must be at least 1"),
        *(
            (name, {setting: value}, f"{setting} is {value}; it must be ")
            for name in ("adversarial", "matching", "sfd", "ddil")
            for setting, value in (("iterations", 0), ("batch", 0), ("rate", -1.0))
        ),
        *(
            (name, {"average": value}, f"average is {value}; it must be ")
            for name in ("adversarial", "matching")
            for value in (-0.1, 1.1)
        ),
        ("sfd", {"dropout": 3.0}, "dropout is 3.0; it must be "),
    ],
)
def test_settings_outside_their_range_are_refused_before_any_work(name, settings, said):
    with pytest.raises(ValueError, match=said):
        fill(load_methods()[name].Settings, settings)


@pytest.mark.parametrize("name", ["matching", "adversarial"])
def test_the_result_is_the_running_average(name):
    method = method_of(name, {"batch": 16, "iterations": 2, "steps": 2, "rate": 1e-2})
    method.step(0, draws(0))
    assert method.result()[0] is method.average
    weights = zip(method.average.parameters(), method.network.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)


def test_the_discriminator_learns_to_tell_and_the_student_to_pass(tmp_path):
    """First against an idle student, the teacher's one step from noise; then it is idle itself."""
    taught = method_of("adversarial", CLOSE | {"rate": 0.0, "head_rate": 1e-2})
    found = [row["discriminator"] for row in losses_of(taught)]
    assert found[0] == pytest.approx(2, abs=0.3) and sum(found[-10:]) / 10 < 1.7

    method = method_of("adversarial", CLOSE | {"rate": 5e-3, "head_rate": 0.0, "weight": 0.0})
    method.discriminator.load_state_dict(taught.discriminator.state_dict())
    found = losses_of(method)
    ends = found[:10], found[-10:]
    first, last = (sum(row["adversarial"] for row in rows) / 10 for rows in ends)
    assert last < first - 0.5


def test_the_distillation_term_falls_where_it_is_all(tmp_path):
    settings = CLOSE | {"weight": 1e4, "rate": 2e-3}
    found = [row["distillation"] for row in losses_of(method_of("adversarial", settings))]
    assert sum(found[-10:]) < 0.8 * sum(found[:10])


def test_the_adversarial_result_says_what_it_is_for(tmp_path):
    student = trained(tmp_path, "adversarial", DUEL)
    assert student.sampler == "lcm" and student.levels == schedule(2)
    assert student.card.guidance == 2.0 and student.card.conditions == {}
    assert check_samples(student) > 0.9


def test_an_adversarial_student_refuses_a_guided_teacher():
    card = replace(teacher().card, guidance=2.0)
    with pytest.raises(ValueError, match="guided already"):
        method_of("adversarial", {}, teacher=replace(teacher(), card=card))
