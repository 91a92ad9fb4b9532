"""The embedded lab: data, networks, metrics and the shipped weights."""

import dataclasses
import hashlib
import json
import os
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open

import digits_data
import digits_weights
from kdpp.digits import checkpoints, metrics
from kdpp.digits import data as digits
from kdpp.kdiffusion import external
from kdpp.lab.diffusion import cfg
from kdpp.lab.metrics import frechet_distance, inception_score
from kdpp.lab.models import (
    WEIGHTS,
    load_classifier,
    load_model,
    read_checkpoint,
    save_model,
)
from kdpp.lab.networks import SMALL, TEACHER, Classifier, ResMLP
from kdpp.lab.sampling import Recipe, draw
from kdpp.lab.schedules import SCHEDULE, alphas_cumprod, log_sigmas, schedule, trailing

SHAPE = digits.IMAGE_SHAPE


def small_net(seed: int = 0) -> ResMLP:
    """A ResMLP whose zero-initialised layers are filled, so that every input matters."""
    torch.manual_seed(seed)
    net = ResMLP(SHAPE, 10, width=16, hidden=24, blocks=2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.requires_grad_(False)


def batch(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 11


# Data


@pytest.mark.parametrize(("part", "count"), [("train", 3823), ("test", 1797)])
def test_data_are_the_digits_in_range(part, count):
    images, labels = digits.load_data(part)
    assert images.shape == (count, 1, 8, 8) and images.dtype == torch.float32
    assert labels.dtype == torch.int64 and labels.unique().tolist() == list(range(10))
    assert images.min() == -1 and images.max() == 1


def test_the_test_part_is_scikit_learns():
    """Image by image, and no image of the training part is among them; by default one trains."""
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = digits.load_data("test")
    assert torch.equal(images[:, 0], torch.from_numpy(theirs.images / 8 - 1).float())
    assert torch.equal(labels, torch.from_numpy(theirs.target).long())
    train = {image.numpy().tobytes() for image in digits.load_data("train")[0]}
    assert len(train) == 3823 and not train & {image.numpy().tobytes() for image in images}
    assert torch.equal(digits.load_data()[0], digits.load_data("train")[0])


def test_the_training_part_has_ucis_classes():
    """As UCI's own description counts them (optdigits.names)."""
    counts = digits.load_data("train")[1].bincount().tolist()
    assert counts == [376, 389, 380, 389, 387, 376, 377, 387, 380, 382]


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match=r"part must be .*'held_out'"):
        digits.load_data("held_out")


def test_the_data_s_card_says_what_the_file_is():
    """Its digest, its size; the file itself says its source and licence."""
    card = (digits.FILE.parent / "DATA_CARD.md").read_text(encoding="utf-8")
    content = digits.FILE.read_bytes()
    assert hashlib.sha256(content).hexdigest() in card and f"{len(content):,}" in card
    with safe_open(digits.FILE, framework="pt") as file:
        about = json.loads(file.metadata()["kdpp.digits.data"])
    assert about["licence"] == "CC BY 4.0" and about["source"].split(";")[0] in card


def test_the_file_of_digits_can_be_made_again(tmp_path, monkeypatch):
    """From one table with all rows in any order, byte for byte but for the order of the rows."""
    pytest.importorskip("sklearn")
    parts = [digits.load_data(part) for part in ("test", "train")]
    rows = [torch.cat([(i.flatten(1) + 1) * 8, n[:, None]], 1).long().numpy() for i, n in parts]
    np.savetxt(tmp_path / "table", np.concatenate(rows), fmt="%d", delimiter=",")
    out = tmp_path / "again.safetensors"
    monkeypatch.setattr("sys.argv", ["digits_data", str(tmp_path / "table"), str(out)])
    digits_data.main()
    assert out.read_bytes() == digits.FILE.read_bytes()
    with pytest.raises(ValueError, match="3822 of 5619 rows are new; they must be 3823 of 5620"):
        digits_data.split(np.concatenate(rows)[:-1])


# Schedules


def test_the_schedule_is_stable_diffusions():
    sigmas = log_sigmas().exp()
    assert len(alphas_cumprod()) == 1000
    assert sigmas[0] == pytest.approx(0.0292, abs=1e-4)
    assert sigmas[-1] == pytest.approx(14.6146, abs=1e-4)


def test_four_steps_are_the_student_s():
    assert schedule(4) == SCHEDULE
    assert schedule(4) == pytest.approx((14.6146, 1.6327, 0.6452, 0.2773, 0), abs=1e-4)
    assert trailing(4) == pytest.approx((14.6146, 4.0817, 1.6129, 0.6932, 0), abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 50, 999, 1000])
def test_every_schedule_falls_strictly_from_the_top_to_zero(n):
    for sigmas in (schedule(n), trailing(n)):
        assert len(sigmas) == n + 1
        assert sigmas[0] == pytest.approx(14.6146, abs=1e-4) and sigmas[-1] == 0
        assert all(a > b for a, b in pairwise(sigmas))


@pytest.mark.parametrize("n", [0, -1, 1001, 2.0, True])
def test_a_senseless_number_of_steps_is_refused(n):
    with pytest.raises(ValueError, match="n must be a whole number from 1 to 1000"):
        schedule(n)


# Networks


def test_eps_and_denoised_are_those_of_the_predicted_v():
    """x0 = a x_vp - b v and eps = b x_vp + a v, a^2 = abar, b^2 = 1 - abar, in VP."""
    net, (x, cond) = small_net().double(), batch()
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    a = alphas_cumprod().double()[t].sqrt().view(-1, 1, 1, 1)
    b = (1 - a**2).sqrt()
    x_vp = x.double()
    v = net(x_vp, t, cond)
    assert v.shape == x.shape
    torch.testing.assert_close(net.apply_model(x_vp, t, cond), b * x_vp + a * v, rtol=0, atol=1e-6)
    denoised = net.denoise(x_vp / a, t.double(), cond)
    torch.testing.assert_close(denoised, a * x_vp - b * v, rtol=0, atol=1e-5)


def test_sigma_between_timesteps_is_k_diffusions():
    denoiser = external.CompVisDenoiser(small_net())
    t = torch.tensor([0.0, 0.3, 17.5, 500.25, 998.9, 999.0])
    torch.testing.assert_close(denoiser.inner_model.sigma(t), denoiser.t_to_sigma(t))


def test_compvis_denoiser_gives_the_consistency_function():
    """Also at the smallest sigma, where D must be x itself but for sigma times something."""
    net, (x, cond) = small_net(), batch()
    denoiser = external.CompVisDenoiser(net)
    sigma = torch.tensor([0.0292, 0.05, 0.277, 1.63, 5.0, 14.6])
    out = denoiser(x, sigma, cond=cond)
    torch.testing.assert_close(out, net.denoise(x, denoiser.sigma_to_t(sigma), cond))
    exact = external.CompVisDenoiser(net.double())(x.double(), sigma.double(), cond=cond)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
    assert (out[0] - x[0]).abs().max() < 0.2


def test_labels_and_timesteps_matter_and_batches_do_not():
    net, (x, cond) = small_net(), batch()
    t = torch.full((len(x),), 400.0)
    out = net(x, t, cond)
    assert (net(x, t, torch.full_like(cond, digits.NULL_CLASS)) - out)[:-1].abs().min() > 0
    assert not torch.allclose(net(x, t + 0.5, cond), out, rtol=0, atol=1e-6)
    torch.testing.assert_close(net(x[2:3], t[2:3], cond[2:3]), out[2:3])


@pytest.mark.parametrize("as_written", [False, True])
def test_guidance_is_the_line_through_both_estimates(as_written):
    net, (x, cond) = small_net(), batch()
    t = torch.full((len(x),), 400.0)
    null = net.denoise(x, t, torch.full_like(cond, digits.NULL_CLASS))

    def guided(scale):
        return cfg(net.denoise, cond, digits.NULL_CLASS, scale, as_written)(x, t)

    torch.testing.assert_close(guided(0.0), null)
    torch.testing.assert_close(guided(1.0), net.denoise(x, t, cond))
    expected = null + 2.5 * (net.denoise(x, t, cond) - null)
    torch.testing.assert_close(guided(2.5), expected)
    torch.testing.assert_close(guided(torch.full((len(x),), 2.5)), expected)


def test_networks_refuse_what_they_cannot_take():
    net, (x, cond) = small_net(), batch()
    with pytest.raises(ValueError, match=r"x must be \[B, 1, 8, 8\], got \[6, 64\]"):
        net.apply_model(x.flatten(1), torch.zeros(6), cond)
    with pytest.raises(ValueError, match="from 11 to 16; the network knows 0 to 9, and 10 for no"):
        net.apply_model(x, torch.zeros(6), cond + 11)
    with pytest.raises(ValueError, match="width must be a whole number"):
        ResMLP(SHAPE, 10, width=10**9, hidden=8, blocks=1)
    with pytest.raises(ValueError, match="features must be a whole number"):
        Classifier(SHAPE, 10, channels=4, features=0)
    with pytest.raises(ValueError, match=r"images \(channels, height, width\), not \(8,\)"):
        Classifier((8,), 10, channels=4, features=4)


# Checkpoints


def test_a_checkpoint_in_float16_comes_back_rounded(tmp_path):
    """In float32, and torch's global stream stays where it was."""
    torch.manual_seed(0)
    net = Classifier((3, 4, 6), 5, channels=4, features=8)
    card = read_checkpoint("digits:classifier")[1]
    save_model(tmp_path / "net.safetensors", net, card_of(net, card), torch.float16)
    state = torch.get_rng_state()
    loaded = load_classifier(tmp_path / "net.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.config == net.config and not loaded.training
    assert loaded(torch.zeros(2, 3, 4, 6)).shape == (2, 5)
    assert os.listdir(tmp_path) == ["net.safetensors"]
    for a, b in zip(loaded.parameters(), net.parameters(), strict=True):
        assert a.dtype == torch.float32 and not a.requires_grad
        assert torch.equal(a, b.half().float())


def card_of(network, card):
    """The card, of this network."""
    data = dataclasses.replace(card.data, shape=network.shape, classes=network.classes)
    return dataclasses.replace(card, network=network.config, data=data)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_weights_that_float16_cannot_hold_are_not_saved(tmp_path, value):
    net = small_net()
    net.leave.bias[3] = value
    card = card_of(net, load_model("digits:teacher").card)
    with pytest.raises(ValueError, match=r"leave\.bias is not finite in float16"):
        save_model(tmp_path / "net.safetensors", net, card, torch.float16)
    assert os.listdir(tmp_path) == []


def test_a_classifier_makes_no_images_and_a_teacher_classifies_nothing(tmp_path):
    with pytest.raises(ValueError, match="digits:classifier is a classifier, which makes no image"):
        load_model("digits:classifier")
    with pytest.raises(ValueError, match="digits:teacher is no classifier: its method is 'tea"):
        load_classifier("digits:teacher")
    network, card = read_checkpoint("digits:classifier")
    del card.network["features"]
    save_model(tmp_path / "m.safetensors", network, card)
    with pytest.raises(ValueError, match=r"m\.safetensors is not a checkpoint of .*features"):
        load_classifier(tmp_path / "m.safetensors")


# Metrics


def with_moments(mean: np.ndarray, cov: np.ndarray, n: int = 500) -> np.ndarray:
    """Rows whose sample mean and unbiased covariance are exactly these."""
    raw = np.random.default_rng(0).standard_normal((n, len(mean)))
    raw -= raw.mean(0)
    raw = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T
    return mean + raw @ np.linalg.cholesky(cov).T


def test_frechet_distance_of_commuting_gaussians():
    """Diagonal covariances: |mu_a - mu_b|^2 + sum (s_a - s_b)^2."""
    mu_a, mu_b = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.25])
    s_a, s_b = np.array([1.0, 2.0, 0.5]), np.array([0.3, 2.5, 4.0])
    a, b = with_moments(mu_a, np.diag(s_a**2)), with_moments(mu_b, np.diag(s_b**2), 700)
    expected = ((mu_a - mu_b) ** 2).sum() + ((s_a - s_b) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    """Two dimensions: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for M = C_a C_b."""
    cov_a, cov_b = np.array([[2.0, 1.2], [1.2, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])
    a, b = with_moments(np.zeros(2), cov_a), with_moments(np.ones(2), cov_b)
    product = cov_a @ cov_b
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = 2 + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_where_singular():
    a = np.random.default_rng(0).standard_normal((5, 12))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, a + 2) == pytest.approx(48, abs=1e-4)


def test_inception_score_between_one_and_the_number_of_classes():
    assert inception_score(np.full((7, 10), 0.1)) == pytest.approx(1)
    assert inception_score(np.eye(10)) == pytest.approx(10)
    assert inception_score(np.eye(10)[[0, 0, 1, 1]]) == pytest.approx(2)
    p = np.array([[0.9, 0.1], [0.1, 0.9]])
    by_hand = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert inception_score(p) == pytest.approx(np.exp(by_hand))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: frechet_distance(np.zeros((1, 3)), np.zeros((4, 3))), "a must be .N, D."),
        (lambda: frechet_distance(np.eye(3), np.eye(4)), "equally wide, got 3 and 4"),
        (lambda: frechet_distance(np.eye(3), np.eye(3) * np.nan), "b must be finite"),
        (lambda: inception_score(np.ones((3, 4))), "sum to 1"),
        (lambda: inception_score(np.array([[1.5, -0.5]] * 2)), "negative"),
    ],
)
def test_metrics_refuse_what_has_no_figure(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_images_are_measured_as_a_viewer_sees_them():
    classifier = checkpoints.load_classifier()
    images, labels = digits.load_data("test")
    reference = metrics.features_of(images, classifier)
    loud = images + 3 * (images == 1) - 3 * (images == -1)
    assert loud.abs().max() == 4
    scores = metrics.measure(loud, labels, classifier, reference)
    assert scores.frechet_distance == pytest.approx(0, abs=1e-5)
    assert scores.accuracy == (classifier(images).argmax(1) == labels).double().mean()
    assert 1 < scores.inception_score < 10
    off = metrics.measure(images, (labels + 1) % 10, classifier, reference)
    assert off.accuracy == pytest.approx(1 - scores.accuracy, abs=0.02)
    loud[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="images must be finite"):
        metrics.features_of(loud, classifier)


# The shipped weights


def test_the_shipped_weights_are_small_and_described():
    files = {file.name: file.stat().st_size for file in WEIGHTS.iterdir()}
    names = {f"{name}.safetensors" for name in ("teacher", "student", "classifier")}
    assert set(files) == {*names, "MODEL_CARD.md"}
    assert sum(files.values()) < 2.5e6
    card = (WEIGHTS / "MODEL_CARD.md").read_text(encoding="utf-8")
    for name in names:
        assert f"{files[name]:,}" in card
        assert hashlib.sha256((WEIGHTS / name).read_bytes()).hexdigest()[:16] in card


def test_the_shipped_weights_are_what_kdpp_train_made():
    """By the settings of digits_weights.toml, seed 0, on the training part, from each other."""
    from kdpp.lab.data import load_data
    from kdpp.lab.methods import Training, load_methods
    from kdpp.lab.settings import fill, read_toml

    spec = read_toml(digits_weights.SPEC)
    assert list(spec) == ["classifier", "teacher", "student"]
    for name, settings in spec.items():
        network, card = read_checkpoint(f"digits:{name}")
        method, teacher = load_methods()[settings.pop("method")], settings.pop("teacher", None)
        filled = fill(method.Settings, settings)
        model = load_model(f"digits:{teacher}") if teacher else None
        training = Training(method, filled, load_data("digits"), model, teacher)
        assert (card.method, card.seed) == (method.name, 0)
        assert fill(method.Settings, card.settings) == filled  # later settings at their defaults
        assert (card.data.source, card.data.digest) == ("digits", training.data_digest)
        assert (card.teacher and card.teacher.digest) == training.teacher_digest
        assert card.evaluations and card.network == network.config
    assert read_checkpoint("digits:teacher")[1].network["width"] == TEACHER["width"]
    assert read_checkpoint("digits:student")[1].network["width"] == SMALL["width"]


def test_the_command_that_makes_the_weights(tmp_path, monkeypatch, capsys):
    """In small: three runs, three files in float16; the student names its teacher as it ships."""
    spec = tmp_path / "spec.toml"
    small = "iterations = 1\nbatch = 8\n"
    text = digits_weights.SPEC.read_text(encoding="utf-8").replace("iterations = 800\n", "")
    spec.write_text("".join(f"{line}\n{small * line.startswith('method')}"
                            for line in text.splitlines()))  # fmt: skip
    monkeypatch.setattr(digits_weights, "SPEC", spec)
    out, weights = str(tmp_path / "runs"), str(tmp_path / "weights")
    monkeypatch.setattr("sys.argv", ["digits_weights", "--out", out, "--weights", weights])
    digits_weights.main()
    assert "student: 0 CPU s" in capsys.readouterr().out
    load_classifier(tmp_path / "weights" / "classifier.safetensors")
    student = load_model(tmp_path / "weights" / "student.safetensors").card
    assert student.teacher.name == "digits:teacher" and student.iterations == 1
    half = (tmp_path / "weights" / "teacher.safetensors").stat().st_size
    assert half < 0.6 * (tmp_path / "runs" / "teacher" / "model.safetensors").stat().st_size


def test_the_shipped_classifier_knows_digits_it_has_not_seen():
    images, labels = digits.load_data("test")
    guesses = checkpoints.load_classifier()(images).argmax(1)
    assert (guesses == labels).double().mean() >= 0.98


def sampled(name: str, sampler: str, cfg_scale: float = 1.0) -> torch.Tensor:
    """1,000 digits in turn, 4 steps."""
    return draw(
        Recipe(load_model(name), None, sampler, SCHEDULE, cond_scale=cfg_scale), range(1000)
    ).x


def test_the_shipped_student_leaves_a_gap_to_the_shipped_teacher():
    """And both are further from digits that neither has seen than real ones are."""
    classifier = checkpoints.load_classifier()
    reference = metrics.features_of(digits.load_data("test")[0], classifier)
    labels = torch.arange(1000) % 10
    made = {
        "student": (sampled("digits:student", "lcm"), labels),
        "teacher": (sampled("digits:teacher", "unipc", 2.0), labels),
        "real": tuple(part[:1000] for part in digits.load_data("train")),
    }
    scores = {
        name: metrics.measure(images, asked, classifier, reference)
        for name, (images, asked) in made.items()
    }
    assert scores["teacher"].accuracy > 0.99
    assert 0.9 < scores["student"].accuracy < 0.985
    student, teacher, real = (scores[name].frechet_distance for name in made)
    assert student > 2 * teacher and teacher > real


def test_the_teacher_with_guidance_works_behind_compvis_denoiser():
    """Euler by hand through k-diffusion's denoiser draws the digits that are asked for."""
    teacher, labels = checkpoints.load_teacher(), torch.arange(10)
    denoiser = external.CompVisDenoiser(teacher)
    x = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(4)) * SCHEDULE[0]
    for sigma, below in pairwise(SCHEDULE):
        levels = torch.full((10,), sigma)
        null = denoiser(x, levels, cond=torch.full_like(labels, digits.NULL_CLASS))
        denoised = null + 2.0 * (denoiser(x, levels, cond=labels) - null)
        x = denoised + (x - denoised) / sigma * below
    guesses = checkpoints.load_classifier()(metrics.as_viewed(x)).argmax(1)
    assert (guesses == labels).sum() >= 9
