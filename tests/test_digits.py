"""The embedded lab: data, networks, checkpoints, metrics, training and the shipped weights."""

import os
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from kdpp.digits import checkpoints, metrics, training
from kdpp.digits import data as digits
from kdpp.digits.networks import Classifier, digits_mlp
from kdpp.kdiffusion import external
from kdpp.lab.diffusion import cfg
from kdpp.lab.metrics import frechet_distance, inception_score
from kdpp.lab.networks import ResMLP
from kdpp.lab.schedules import SCHEDULE, alphas_cumprod, log_sigmas, schedule, trailing


def small_net(seed: int = 0) -> ResMLP:
    """A ResMLP whose zero-initialised layers are filled, so that every input matters."""
    torch.manual_seed(seed)
    net = digits_mlp(width=16, hidden=24, blocks=2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.requires_grad_(False)


def batch(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 1, 8, 8), torch.arange(n) % 11


# Data


def test_data_are_the_digits_in_range():
    images, labels = digits.load_data()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert labels.dtype == torch.int64 and labels.unique().tolist() == list(range(10))
    assert images.min() == -1 and images.max() == 1


def test_the_split_is_fixed_stratified_and_complete():
    everything, labels = digits.load_data()
    (train, train_labels), (held, held_labels) = map(digits.load_data, ("train", "held_out"))
    assert len(train) + len(held) == len(everything) and len(held) == 445
    assert torch.equal(digits.load_data("held_out")[0], held)
    rows = {image.numpy().tobytes() for image in held}
    assert len(rows & {image.numpy().tobytes() for image in train}) == 0
    assert torch.equal(held_labels.bincount(), labels.bincount() // 4)
    assert torch.equal(held_labels.bincount() + train_labels.bincount(), labels.bincount())


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split must be .*'test'"):
        digits.load_data("test")


def test_without_scikit_learn_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'^the digits need .*pip install "kdpp\[lab\]"$'):
        digits.load_data()


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
        digits_mlp(width=10**9, hidden=8, blocks=1)
    with pytest.raises(ValueError, match="features must be a whole number"):
        Classifier(channels=4, features=0)


# Checkpoints


@pytest.mark.parametrize("kind", [ResMLP, Classifier])
def test_a_checkpoint_comes_back_as_saved(tmp_path, kind):
    torch.manual_seed(0)
    net = digits_mlp(16, 24, 2) if kind is ResMLP else Classifier(4, 8)
    checkpoints.save(tmp_path / "net.safetensors", net)
    state = torch.get_rng_state()
    loaded = checkpoints.load(tmp_path / "net.safetensors", kind)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.config == net.config and not loaded.training
    assert os.listdir(tmp_path) == ["net.safetensors"]
    for a, b in zip(loaded.parameters(), net.parameters(), strict=True):
        assert a.dtype == torch.float32 and not a.requires_grad
        assert torch.equal(a, b.half().float())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    checkpoints.save(path, small_net(0))
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(path, small_net(1))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_weights_that_float16_cannot_hold_are_not_saved(tmp_path, value):
    net = small_net()
    net.leave.bias[3] = value
    with pytest.raises(ValueError, match=r"leave\.bias is not finite in float16"):
        checkpoints.save(tmp_path / "net.safetensors", net)
    assert os.listdir(tmp_path) == []


def test_damaged_and_foreign_files_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoints.load_teacher(path)
    checkpoints.save(path, small_net())
    whole = path.read_bytes()
    refused = r"net\.safetensors is not a checkpoint of a ResMLP"
    for damaged in (whole[:-10], whole[:4], b"", b"\x80\x04" + whole, whole.replace(b"24", b"25")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=refused):
            checkpoints.load_teacher(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=refused):
        checkpoints.load_teacher(path)
    checkpoints.save(path, Classifier(4, 8))
    with pytest.raises(ValueError, match=refused + ": it holds a Classifier"):
        checkpoints.load_teacher(path)


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
    images, labels = digits.load_data("held_out")
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


# Training


def tiny_run(iterations: int = 25):
    torch.set_num_threads(1)
    classifier, classifier_losses = training.train_classifier(3, iterations)
    teacher, teacher_losses = training.train_teacher(3, iterations)
    student, student_losses = training.train_student(checkpoints.load_teacher(), 3, iterations)
    return (classifier, teacher, student), (classifier_losses, teacher_losses, student_losses)


def test_a_short_run_learns_is_reproducible_and_leaves_the_global_stream_alone():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        networks, losses = tiny_run()
        again, losses_again = tiny_run()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    assert losses == losses_again
    for curve in losses:
        assert sum(curve[-3:]) < 0.9 * sum(curve[:3])
    for a, b in zip(networks, again, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q) and not p.requires_grad


def test_another_seed_is_another_network():
    a, b = (training.train_teacher(seed, 1)[0] for seed in (0, 1))
    assert not torch.equal(a.enter.weight, b.enter.weight)


def test_label_dropout_drops_its_share_to_the_null_label():
    draws = training.Batches(*digits.load_data(), seed=0)
    labels = torch.arange(20_000) % 10
    dropped = draws.dropped(labels)
    share = (dropped == digits.NULL_CLASS).double().mean().item()
    assert share == pytest.approx(training.LABEL_DROPOUT, abs=0.01)
    assert torch.equal(dropped[dropped != digits.NULL_CLASS], labels[dropped != digits.NULL_CLASS])


def test_the_classifier_is_trained_without_the_held_out_images(monkeypatch):
    asked = []
    monkeypatch.setattr(
        training, "load_data", lambda *split: asked.append(split) or digits.load_data(*split)
    )
    training.train_classifier(iterations=1)
    assert asked == [("train",)]


def test_a_loss_that_is_not_finite_stops_training():
    net = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="teacher: the loss of iteration 0 is nan"):
        training._fit("teacher", net, lambda: net.weight.sum() * torch.nan, 5, 1e-3, False)


def test_the_command_writes_three_checkpoints_and_prints_its_figures(tmp_path, monkeypatch, capsys):
    for name in ("classifier", "teacher", "student"):
        train = getattr(training, f"train_{name}")
        monkeypatch.setattr(
            training, f"train_{name}", lambda *a, train=train, **k: train(*a, iterations=1)
        )
    monkeypatch.setattr(training, "REPORTED", 20)
    threads = torch.get_num_threads()
    try:
        training.main(["--out", str(tmp_path / "new"), "--seed", "5"])
    finally:
        torch.set_num_threads(threads)
    checkpoints.load_teacher(tmp_path / "new" / "teacher.safetensors")
    checkpoints.load_student(tmp_path / "new" / "student.safetensors")
    checkpoints.load_classifier(tmp_path / "new" / "classifier.safetensors")
    printed = capsys.readouterr().out
    assert "trained in" in printed and "teacher, 50 steps: Frechet distance" in printed


# The shipped weights


def test_the_shipped_weights_are_small_and_described():
    files = {file.name: file.stat().st_size for file in checkpoints.WEIGHTS.iterdir()}
    names = {f"{name}.safetensors" for name in ("teacher", "student", "classifier")}
    assert set(files) == {*names, "MODEL_CARD.md"}
    assert sum(files.values()) < 5e6


def test_the_shipped_classifier_knows_digits_it_has_not_seen():
    images, labels = digits.load_data("held_out")
    guesses = checkpoints.load_classifier()(images).argmax(1)
    assert (guesses == labels).double().mean() >= 0.985


def test_the_shipped_student_leaves_a_gap_to_the_shipped_teacher():
    classifier = checkpoints.load_classifier()
    reference = metrics.features_of(digits.load_data()[0], classifier)
    labels = torch.arange(1000) % 10
    made = {
        "student": training.sample(checkpoints.load_student(), labels, SCHEDULE, renew=True),
        "teacher": training.sample(checkpoints.load_teacher(), labels, SCHEDULE, guidance=2.0),
    }
    scores = {
        name: metrics.measure(images, labels, classifier, reference)
        for name, images in made.items()
    }
    assert scores["teacher"].accuracy > 0.99
    assert 0.9 < scores["student"].accuracy < 0.985
    student, teacher = (scores[name].frechet_distance for name in ("student", "teacher"))
    assert student > 2 * teacher


def test_the_teacher_with_guidance_works_behind_compvis_denoiser():
    """Euler by hand through k-diffusion's denoiser gives what `training.sample` gives."""
    teacher, labels = checkpoints.load_teacher(), torch.arange(10)
    denoiser = external.CompVisDenoiser(teacher)
    x = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(4)) * SCHEDULE[0]
    for sigma, below in pairwise(SCHEDULE):
        levels = torch.full((10,), sigma)
        null = denoiser(x, levels, cond=torch.full_like(labels, digits.NULL_CLASS))
        denoised = null + 2.0 * (denoiser(x, levels, cond=labels) - null)
        x = denoised + (x - denoised) / sigma * below
    made = training.sample(teacher, labels, SCHEDULE, guidance=2.0, seed=4)
    torch.testing.assert_close(x, made, rtol=0, atol=2e-3)
    guesses = checkpoints.load_classifier()(metrics.as_viewed(x)).argmax(1)
    assert (guesses == labels).sum() >= 9
