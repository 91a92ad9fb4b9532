"""The lab's metrics, against well-kept libraries and against their definitions, word for word."""

import math
import sys
from dataclasses import asdict
from unittest.mock import patch

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import sklearn.metrics.pairwise
import sklearn.neighbors
import threadpoolctl
import torch
from safetensors.torch import save_file
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from kdpp.digits import load_classifier, load_data
from kdpp.digits.metrics import features_of
from kdpp.lab import metrics
from kdpp.lab.metrics import Features, Points


@pytest.fixture
def clouds(monkeypatch):
    """Two unlike sets of 90 and 70 points, in blocks of which none is whole."""
    monkeypatch.setattr(metrics, "BLOCK", 32)
    draw = np.random.default_rng(0)
    return draw.normal(size=(90, 5)), draw.normal(size=(70, 5)) * 1.3 + 0.4


@pytest.fixture(scope="module")
def digits():
    return load_data()


def as_tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


# Distances ----------------------------------------------------------------------------------------


def test_kernel_distance_is_torch_fidelitys(clouds):
    """On as many points on both sides, one subset of all of them."""
    a, b = clouds[0][:70], clouds[1]
    theirs = kid_features_to_metric(
        *as_tensors(a, b), kid_subsets=1, kid_subset_size=70, verbose=False
    )
    ours = metrics.kernel_distance(Points(a), Points(b))
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)


def test_kernel_distance_is_its_definition(clouds):
    """On unequally many points, by sklearn's kernel and by the sums of the definition."""
    a, b = clouds
    across = sklearn.metrics.pairwise.polynomial_kernel(a, b, degree=3, coef0=1).mean()
    within = []
    for points in (a, b):
        kernel = sklearn.metrics.pairwise.polynomial_kernel(points, degree=3, coef0=1)
        pairs = [kernel[i, j] for i in range(len(points)) for j in range(len(points)) if i != j]
        within.append(np.mean(pairs))
    ours = metrics.kernel_distance(Points(a), Points(b))
    assert ours == pytest.approx(sum(within) - 2 * across, rel=1e-10)


def test_kernel_distance_is_unbiased():
    """For pairs of samples of one distribution its mean is 0, within three standard errors."""
    draw = np.random.default_rng(1)
    sample = [Points(draw.normal(size=(20, 2))) for _ in range(400)]
    values = [metrics.kernel_distance(a, b) for a, b in zip(sample[::2], sample[1::2])]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))
    assert min(values) < 0 < max(values)


def test_precision_and_recall_are_torch_fidelitys(clouds):
    ours = metrics.precision_recall(Points(clouds[0]), Points(clouds[1]))
    theirs = prc_features_to_metric(
        *as_tensors(*clouds), prc_neighborhood=3, prc_batch_size=100, verbose=False
    )
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]))
    assert min(ours) > 0.5 and max(ours) < 1.0  # neither is decided by all or by none


def test_precision_and_recall_are_their_definition(clouds):
    """By sklearn's neighbours, point by point."""
    images, data = clouds

    def share_inside(points, others):
        nearest = sklearn.neighbors.NearestNeighbors(n_neighbors=3).fit(others)
        radii = nearest.kneighbors()[0][:, -1]  # without arguments: not counting itself
        inside = [
            any(np.linalg.norm(point - other) <= radius for other, radius in zip(others, radii))
            for point in points
        ]
        return np.mean(inside)

    ours = metrics.precision_recall(Points(images), Points(data))
    assert ours == pytest.approx((share_inside(images, data), share_inside(data, images)))


def test_precision_and_recall_at_their_ends(clouds):
    """A set lies inside itself, duplicates and all; two far apart not at all."""
    a, _ = clouds
    twice = np.concatenate([a, a[:5]])
    assert metrics.precision_recall(Points(twice), Points(twice)) == (1.0, 1.0)
    assert metrics.precision_recall(Points(a), Points(a + 1e3)) == (0.0, 0.0)
    # One image of the data, again and again: precise, and nothing of the rest is recalled.
    one = np.repeat(a[:1], 10, axis=0)
    precision, recall = metrics.precision_recall(Points(one), Points(a))
    assert precision == 1.0 and recall == pytest.approx(1 / len(a))


def test_diversity_is_scipys_pairwise_distance(clouds):
    """Within classes of unequal size; a class of one image says nothing."""
    rows, _ = clouds
    labels = np.repeat([0, 1, 7, 9], [40, 47, 2, 1])
    within = [scipy.spatial.distance.pdist(rows[labels == label]).mean() for label in (0, 1, 7)]
    assert metrics.diversity(rows, labels) == pytest.approx(np.mean(within), rel=1e-9)
    assert math.isnan(metrics.diversity(rows[:3], [0, 1, 2]))


def test_frechet_distance_and_inception_score_are_torch_fidelitys(clouds):
    a, b = as_tensors(*clouds)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(a), fid_features_to_statistics(b), False
    )["frechet_inception_distance"]
    assert metrics.frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)
    theirs = isc_features_to_metric(a, splits=1)["inception_score_mean"]
    assert metrics.inception_score(a.softmax(1)) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (np.zeros((3, 2)), "N ≥ 4"),
        (np.zeros(8), r"shape \[8\]"),
        (np.full((5, 2), np.nan), "finite"),
    ],
)
def test_points_that_cannot_be_compared(rows, said):
    with pytest.raises(ValueError, match=said):
        Points(rows)


def test_points_of_other_width():
    a, b = Points(np.zeros((5, 2))), Points(np.zeros((5, 3)))
    for distance in (metrics.kernel_distance, metrics.precision_recall):
        with pytest.raises(ValueError, match="equally wide, got 2 and 3"):
            distance(a, b)


# A set of images ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(digits):
    """Noisy digits, their metrics in the classifier's features, and what went into them."""
    images, labels = digits
    features = metrics.load_features("digits", images, 10)
    data, teacher = Points(features(images)), Points(features(images[::2]))
    noisy = images[:300] + 0.5 * torch.randn(
        300, 1, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    return noisy, labels[:300], features, data, teacher


def test_measure_is_its_parts(measured):
    """Each figure is the single metric's, of features and logits of the clamped images."""
    images, labels, features, data, teacher = measured
    found = metrics.measure(images, labels, features, data, teacher)
    classifier = load_classifier()
    rows = features_of(images, classifier)
    with torch.no_grad():
        logits = classifier(images.clamp(-1, 1))
    assert list(found) == list(metrics.METRICS)
    expected = {
        "fd": metrics.frechet_distance(rows, data.rows),
        "fd_teacher": metrics.frechet_distance(rows, teacher.rows),
        "kid": metrics.kernel_distance(Points(rows), data),
        "kid_teacher": metrics.kernel_distance(Points(rows), teacher),
        "precision": metrics.precision_recall(Points(rows), data)[0],
        "recall": metrics.precision_recall(Points(rows), data)[1],
        "inception_score": metrics.inception_score(logits.double().softmax(1)),
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
        "diversity": metrics.diversity(rows, labels),
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0.5 < found["accuracy"] < 1.0 and found["fd"] != found["fd_teacher"]


def test_images_are_measured_as_they_are_viewed(measured):
    """Pixels outside the data's range make no difference, but must be numbers."""
    images, labels, features, data, _ = measured
    assert images.abs().max() > 1.5
    seen = metrics.measure(images.clamp(-1, 1), labels, features, data)
    assert metrics.measure(images, labels, features, data) == seen
    broken = images.clone()
    broken[7, 0, 3, 3] = math.inf
    with pytest.raises(ValueError, match="must be finite"):
        metrics.measure(broken, labels, features, data)


def test_metrics_do_not_depend_on_the_number_of_threads(measured, digits):
    """To the last bit: an evaluation may be resumed on another machine."""
    _, _, features, data, _ = measured
    found = set()
    for threads in (1, 2, 4):
        with threadpoolctl.threadpool_limits(threads):
            scores = metrics.measure(digits[0] / 2, digits[1], features, Points(data.rows))
        found.add(tuple(scores.values()))
    assert len(found) == 1


def test_metrics_that_features_cannot_give(digits):
    """Pixels have no classes; a class of one image has no diversity; no teacher, no distance."""
    images, labels = digits
    pixels = metrics.load_features("pixels", images, 10)
    data = Points(pixels(images))
    found = metrics.measure(images[:50], labels[:50], pixels, data)
    assert list(found) == ["fd", "kid", "precision", "recall", "diversity"]
    found = metrics.measure(images[:50], torch.arange(50), pixels, data)
    assert list(found) == ["fd", "kid", "precision", "recall"]


def test_latents_are_clamped_to_their_own_range():
    latents = torch.tensor([[-3.0, 0.5], [2.0, 4.0]])
    assert metrics.data_range(latents) == (-3.0, 4.0)
    assert metrics.data_range(latents / 4) == (-1.0, 1.0)
    pixels = metrics.load_features("pixels", latents, 1)
    assert pixels(torch.tensor([[-9.0, 9.0]])).tolist() == [[-3.0, 4.0]]


def test_features_are_made_in_parts(monkeypatch):
    """Image networks get a few at a time, the rest as well."""
    monkeypatch.setattr(metrics, "BATCH", 8)
    given = []
    features = Features("own", lambda x: given.append(len(x)) or x.flatten(1), (-1.0, 1.0))
    assert features(torch.zeros(20, 1, 2, 2)).shape == (20, 4) and given == [8, 8, 4]
    assert features.probabilities(np.zeros((2, 4))) is None


# Features of networks -----------------------------------------------------------------------------


def test_inception_features_are_torch_fidelitys(tmp_path, digits):
    """Random weights, kept as safetensors: the features and logits of torch-fidelity's network."""
    from torch_fidelity import feature_extractor_inceptionv3 as source

    kind = source.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with (
        patch.object(source, "load_state_dict_from_url"),
        patch.object(kind, "load_state_dict"),
    ):
        network = kind("inception", ["2048", "logits_unbiased"])
    path = tmp_path / "inception.safetensors"
    save_file(network.state_dict(), path)
    images = digits[0][:2]
    features = metrics.load_features(f"inception:{path}", digits[0], 10)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).repeat(1, 3, 1, 1)
    rows, logits = network(pixels)
    found = features(images)
    assert found.shape == (2, 2048) and found.std() > 0
    np.testing.assert_allclose(found, rows, rtol=1e-5)
    np.testing.assert_allclose(features.probabilities(found), logits.softmax(1), rtol=1e-4)
    assert not features.labelled
    del network
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="does not hold torch-fidelity's Inception-v3"):
        metrics.load_features(f"inception:{path}", digits[0], 10)


def test_clip_features_are_transformers(tmp_path, digits):
    """A small random model in a folder: its embedding of images that its own processor prepares."""
    transformers = pytest.importorskip("transformers", reason="CLIP features need transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=6,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.CLIPVisionModelWithProjection(config).eval()
    network.save_pretrained(tmp_path)
    images = digits[0][:3]
    found = metrics.load_features(f"clip:{tmp_path}", digits[0], 10)(images)
    pixels = ((images.expand(-1, 3, -1, -1) + 1) / 2).numpy()
    processor = transformers.CLIPImageProcessor(
        do_resize=False, do_center_crop=False, do_rescale=False
    )
    given = processor(list(pixels), input_data_format="channels_first", return_tensors="pt")
    with torch.no_grad():
        expected = network(**given).image_embeds
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="does not hold a CLIP image model"):
        metrics.load_features(f"clip:{tmp_path}", digits[0], 10)


@pytest.mark.parametrize(
    ("name", "images", "classes", "error", "said"),
    [
        ("digit", (4, 1, 8, 8), 10, ValueError, "it must be 'digits', 'pixels'"),
        ("inception", (4, 1, 8, 8), 10, ValueError, "inception:FILE"),
        ("digits", (4, 1, 8, 8), 9, ValueError, "9 classes"),
        ("digits", (4, 3, 8, 8), 10, ValueError, r"shape \[3, 8, 8\]"),
        ("inception:x", (4, 2, 8, 8), 10, ValueError, "take 'pixels'"),
        ("inception:/nowhere", (4, 1, 8, 8), 10, FileNotFoundError, "/nowhere"),
        ("clip:/nowhere", (4, 3, 8, 8), 10, FileNotFoundError, "/nowhere"),
    ],
)
def test_features_that_cannot_be_had(name, images, classes, error, said):
    with pytest.raises(error, match=said):
        metrics.load_features(name, torch.zeros(images), classes)


@pytest.mark.parametrize(
    ("name", "package"), [("inception:x", "torch_fidelity"), ("clip:x", "transformers")]
)
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    said = package.replace("_", "-")
    with pytest.raises(ImportError, match=f"pip install {said}"):
        metrics.load_features(name, torch.zeros(4, 3, 8, 8), 10)


# What seeds say -----------------------------------------------------------------------------------


def test_estimates_are_scipys():
    values = [3.1, 2.7, 3.6, 2.9, 3.3]
    found = metrics.estimate(values, 0.9)
    interval = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(np.mean(values)) and found.count == 5
    assert found.deviation == pytest.approx(np.std(values, ddof=1))


def test_paired_changes_are_scipys():
    """The interval of the differences, far tighter than what the two means tell."""
    base = [10.0, 12.0, 11.0, 14.0, 9.0]
    values = [9.6, 11.5, 10.7, 13.4, 8.6]
    found = metrics.paired(values, base)
    interval = scipy.stats.ttest_rel(values, base).confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert metrics.verdict(found) == "lower"


def test_a_change_is_seen_where_the_t_test_sees_it():
    """At the level of 5 %: with p just below and above it, in both directions."""
    draw = np.random.default_rng(0)
    verdicts = set()
    for _ in range(200):
        base, values = draw.normal(size=4), draw.normal(size=4) + draw.choice([-1.5, 0.0, 1.5])
        test = scipy.stats.ttest_rel(values, base)
        seen = metrics.verdict(metrics.paired(values, base))
        expected = "none seen"
        if test.pvalue < 0.05:
            expected = "higher" if test.statistic > 0 else "lower"
        assert seen == expected
        verdicts.add(seen)
    assert verdicts == {"higher", "lower", "none seen"}


def test_no_change_and_a_single_seed_show_nothing():
    assert metrics.verdict(metrics.paired([1.0, 2.0], [1.0, 2.0])) == "none seen"
    one = metrics.paired([1.0], [5.0])
    assert asdict(one) == {
        "mean": -4.0, "deviation": None, "low": None, "high": None, "count": 1,
    }  # fmt: skip
    assert metrics.verdict(one) == "none seen"
    assert metrics.verdict(metrics.paired([2.0, 3.0], [1.0, 2.0])) == "higher"  # without any spread


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: metrics.estimate([]), "one or more"),
        (lambda: metrics.estimate([1.0, math.nan]), "finite"),
        (lambda: metrics.estimate([1.0], 95), r"in \(0, 1\)"),
        (lambda: metrics.paired([1.0], [1.0, 2.0]), "give pairs"),
    ],
)
def test_values_that_say_nothing(call, said):
    with pytest.raises(ValueError, match=said):
        call()
