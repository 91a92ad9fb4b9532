"""The lab's metrics, against well-kept libraries and against their definitions, word for word."""

import json
import math
import sys
from unittest.mock import patch

import numpy as np
import pytest
import scipy.spatial
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
from kdpp.lab import features as spaces
from kdpp.lab import metrics
from kdpp.lab.features import Features
from kdpp.lab.metrics import Points
from kdpp.lab.models import load_classifier as load_classifier_of
from kdpp.lab.trainer import train
from trainings import spots, training_of


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
    ours = metrics.overlap(Points(clouds[0]), Points(clouds[1]))
    theirs = prc_features_to_metric(
        *as_tensors(*clouds), prc_neighborhood=3, prc_batch_size=100, verbose=False
    )
    assert ours[:2] == pytest.approx((theirs["precision"], theirs["recall"]))
    assert min(ours[:2]) > 0.5 and max(ours[:2]) < 1.0  # neither is decided by all or by none


def test_overlap_is_its_definition(clouds):
    """By sklearn's neighbours, point by point: all four figures."""
    images, data = clouds

    def within(points, others, k):
        """Whether each point [N, M] lies in each other's ball."""
        nearest = sklearn.neighbors.NearestNeighbors(n_neighbors=k).fit(others)
        radii = nearest.kneighbors()[0][:, -1]  # without arguments: not counting itself
        return scipy.spatial.distance.cdist(points, others) <= radii

    dense = within(images, data, 5)
    expected = (
        within(images, data, 3).any(1).mean(),
        within(data, images, 3).any(1).mean(),
        dense.sum(1).mean() / 5,
        dense.any(0).mean(),
    )
    found = metrics.overlap(Points(images), Points(data))
    assert found == pytest.approx(expected) and len(set(found)) == 4


def test_overlap_at_its_ends(clouds):
    """A set lies inside itself, duplicates and all; two far apart not at all."""
    a, _ = clouds
    twice = np.concatenate([a, a[:5]])
    same = metrics.overlap(Points(twice), Points(twice))
    # Every ball holds its own point and five neighbours, the last but for rounding.
    assert same[:2] == (1.0, 1.0) and same.coverage == 1.0 and 1.0 < same.density < 1.3
    assert metrics.overlap(Points(a), Points(a + 1e3)) == (0.0, 0.0, 0.0, 0.0)
    # One image of the data, again and again: precise, and nothing of the rest is recalled.
    one = metrics.overlap(Points(np.repeat(a[:1], 10, axis=0)), Points(a))
    assert one.precision == 1.0 and one.recall == pytest.approx(1 / len(a))
    assert one.coverage < 0.2 < one.density


def test_what_is_memorised():
    """Copies of training images: all. New ones: half. Equally far from both counts half."""
    draw = np.random.default_rng(0)
    training, unseen, new = (Points(draw.normal(size=(400, 3))) for _ in range(3))
    assert metrics.memorised(training, training, unseen) == 1.0
    assert metrics.memorised(unseen, training, unseen) == 0.0
    assert metrics.memorised(new, training, training) == 0.5
    near = scipy.spatial.cKDTree(training.rows).query(new.rows)[0]
    far = scipy.spatial.cKDTree(unseen.rows).query(new.rows)[0]
    found = metrics.memorised(new, training, unseen)
    assert found == pytest.approx((near < far).mean()) and 0.43 < found < 0.57
    with pytest.raises(ValueError, match="as many of both"):
        metrics.memorised(new, Points(training.rows[:50]), unseen)


def test_the_distance_of_infinitely_many():
    """Of few images FD is far too large; extrapolated it lies at the true distance, within a
    fifth of that excess, and scatters little more."""
    draw = np.random.default_rng(0)
    root = draw.normal(size=(16, 16)) / 4
    data = draw.normal(size=(20_000, 16)) @ root
    truth = 16 * 0.1**2  # a shift by 0.1 in every dimension
    found = []
    for _ in range(40):
        images = draw.normal(size=(200, 16)) @ root + 0.1
        plain = metrics.frechet_distance(images, data)
        found.append((plain, metrics.extrapolated(plain, images, data)))
    (plain, better), (scatter, wider) = np.mean(found, 0), np.std(found, 0)
    assert plain > truth + 0.3
    assert abs(better - truth) < 0.2 * (plain - truth) and wider < 2 * scatter


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
        (np.full((7, 2), np.nan), "finite"),
    ],
)
def test_points_that_cannot_be_compared(rows, said):
    with pytest.raises(ValueError, match=said):
        Points(rows)


def test_points_of_other_width():
    a, b = Points(np.zeros((6, 2))), Points(np.zeros((6, 3)))
    for distance in (metrics.kernel_distance, metrics.overlap):
        with pytest.raises(ValueError, match="equally wide, got 2 and 3"):
            distance(a, b)


# A set of images ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(digits):
    """Noisy digits, their metrics in the classifier's features, and what went into them."""
    images, labels = digits
    features = spaces.load_features("digits", images, 10)
    data, training = Points(features(images[:1800:2])), Points(features(images[1:1800:2]))
    teacher = Points(features(images[::3]))
    noisy = images[:300] + 0.5 * torch.randn(
        300, 1, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    return noisy, labels[:300], features, data, teacher, training


def test_measure_is_its_parts(measured):
    """Each figure is the single metric's, of features and logits of the clamped images."""
    images, labels, features, data, teacher, training = measured
    found = metrics.measure(images, labels, features, data, teacher, training)
    classifier = load_classifier()
    rows = features_of(images, classifier)
    with torch.no_grad():
        logits = classifier(images.clamp(-1, 1))
    assert list(found) == list(metrics.METRICS)
    expected = {
        "fd": metrics.frechet_distance(rows, data.rows),
        "fd_infinity": 2 * metrics.frechet_distance(rows, data.rows)
        - metrics.frechet_distance(rows[:150], data.rows) / 2
        - metrics.frechet_distance(rows[150:], data.rows) / 2,
        "fd_teacher": metrics.frechet_distance(rows, teacher.rows),
        "kid": metrics.kernel_distance(Points(rows), data),
        "kid_teacher": metrics.kernel_distance(Points(rows), teacher),
        **metrics.overlap(Points(rows), data)._asdict(),
        "memorised": metrics.memorised(Points(rows), training, data),
        "inception_score": metrics.inception_score(logits.double().softmax(1)),
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
        "diversity": metrics.diversity(rows, labels),
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0.5 < found["accuracy"] < 1.0 and found["fd"] != found["fd_teacher"]


def test_images_are_measured_as_they_are_viewed(measured):
    """Pixels outside the data's range make no difference, but must be numbers."""
    images, labels, features, data, *_ = measured
    assert images.abs().max() > 1.5
    seen = metrics.measure(images.clamp(-1, 1), labels, features, data)
    assert metrics.measure(images, labels, features, data) == seen
    broken = images.clone()
    broken[7, 0, 3, 3] = math.inf
    with pytest.raises(ValueError, match="must be finite"):
        metrics.measure(broken, labels, features, data)


def test_metrics_do_not_depend_on_the_number_of_threads(measured, digits):
    """To the last bit: an evaluation may be resumed on another machine."""
    _, _, features, data, *_ = measured
    found = set()
    for threads in (1, 2, 4):
        with threadpoolctl.threadpool_limits(threads):
            scores = metrics.measure(digits[0] / 2, digits[1], features, Points(data.rows))
        found.add(tuple(scores.values()))
    assert len(found) == 1


NEARNESS = ["fd", "fd_infinity", "kid", "precision", "recall", "density", "coverage"]


def test_metrics_that_features_cannot_give(digits):
    """Pixels have no classes; a class of one image has no diversity; no teacher, no distance."""
    images, labels = digits
    pixels = spaces.load_features("pixels", images, 10)
    data = Points(pixels(images))
    found = metrics.measure(images[:50], labels[:50], pixels, data)
    assert list(found) == [*NEARNESS, "diversity"]
    found = metrics.measure(images[:50], torch.arange(50), pixels, data)
    assert list(found) == NEARNESS


def test_latents_are_clamped_to_their_own_range():
    latents = torch.tensor([[-3.0, 0.5], [2.0, 4.0]])
    assert spaces.data_range(latents) == (-3.0, 4.0)
    assert spaces.data_range(latents / 4) == (-1.0, 1.0)
    pixels = spaces.load_features("pixels", latents, 1)
    assert pixels(torch.tensor([[-9.0, 9.0]])).tolist() == [[-3.0, 4.0]]


def test_features_are_made_in_parts(monkeypatch):
    """Image networks get a few at a time, the rest as well."""
    monkeypatch.setattr(spaces, "BATCH", 8)
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
    features = spaces.load_features(f"inception:{path}", digits[0], 10)
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
        spaces.load_features(f"inception:{path}", digits[0], 10)


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
    found = spaces.load_features(f"clip:{tmp_path}", digits[0], 10)(images)
    pixels = ((images.expand(-1, 3, -1, -1) + 1) / 2).numpy()
    processor = transformers.CLIPImageProcessor(
        do_resize=False, do_center_crop=False, do_rescale=False
    )
    given = processor(list(pixels), input_data_format="channels_first", return_tensors="pt")
    with torch.no_grad():
        expected = network(**given).image_embeds
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    weights = spaces.load_features(f"clip:{tmp_path}", digits[0], 10).weights
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + "\n")
    assert spaces.load_features(f"clip:{tmp_path}", digits[0], 10).weights != weights != ""
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="does not hold a CLIP image model"):
        spaces.load_features(f"clip:{tmp_path}", digits[0], 10)


def test_timm_features_are_timms(tmp_path, digits):
    """A small network in a folder, as timm publishes them: what its last layer is given."""
    timm = pytest.importorskip("timm", reason="features of timm need timm")
    torch.manual_seed(0)
    network = timm.create_model("efficientnet_lite0").eval()
    config = {"architecture": "efficientnet_lite0", "pretrained_cfg": {"input_size": [3, 48, 40]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    images = digits[0][:3]
    features = spaces.load_features(f"timm:{tmp_path}", digits[0], 10)
    from torchvision.transforms import v2

    prepare = v2.Compose([
        v2.Resize((48, 40), v2.InterpolationMode.BICUBIC, antialias=True),
        v2.Lambda(lambda x: x.clamp(0, 1)),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    given = prepare((images.expand(-1, 3, -1, -1) + 1) / 2)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(given), pre_logits=True)
        logits = network(given)
    found = features(images)
    assert found.shape == (3, 1280)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features.probabilities(found), logits.softmax(1), rtol=1e-4)
    assert "48 × 40" in features.about["preparation"]
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="does not hold a network of timm"):
        spaces.load_features(f"timm:{tmp_path}", digits[0], 10)


def test_features_of_a_classifier_of_one_s_own(tmp_path):
    """Its last hidden layer and its classes, for the data that it was trained on and no other."""
    data = spots()
    train(training_of("classifier", {"iterations": 60, "batch": 32}), tmp_path, disable=True)
    features = spaces.load_features(f"classifier:{tmp_path}", data.images, 3)
    network = load_classifier_of(tmp_path)
    assert np.array_equal(features(data.images), network.features(data.images).double().numpy())
    found = features.probabilities(features(data.images)).argmax(1)
    assert features.labelled and (found == data.labels.numpy()).mean() > 0.9
    assert features.about["features"] == "classifier" and features.about["weights"]
    with pytest.raises(ValueError, match=r"for images \[1, 4, 4\] in .* of 3 classes; .* 4 cl"):
        spaces.load_features(f"classifier:{tmp_path}", data.images, 4)


@pytest.mark.parametrize(
    ("name", "images", "classes", "error", "said"),
    [
        ("digit", (4, 1, 8, 8), 10, ValueError, "it must be 'digits', 'classifier:RUN', 'pixels'"),
        ("inception", (4, 1, 8, 8), 10, ValueError, "inception:FILE"),
        ("digits", (4, 1, 8, 8), 9, ValueError, "9 classes"),
        ("digits", (4, 3, 8, 8), 10, ValueError, r"shape \[3, 8, 8\]"),
        ("inception:x", (4, 2, 8, 8), 10, ValueError, "take 'pixels'"),
        ("inception:/nowhere", (4, 1, 8, 8), 10, FileNotFoundError, "/nowhere"),
        ("clip:/nowhere", (4, 3, 8, 8), 10, FileNotFoundError, "/nowhere"),
        ("timm:/nowhere", (4, 3, 8, 8), 10, (FileNotFoundError, ImportError), "timm"),
    ],
)
def test_features_that_cannot_be_had(name, images, classes, error, said):
    with pytest.raises(error, match=said):
        spaces.load_features(name, torch.zeros(images), classes)


@pytest.mark.parametrize(
    ("name", "package"),
    [("inception:x", "torch_fidelity"), ("clip:x", "transformers"), ("timm:x", "timm")],
)
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    said = package.replace("_", "-")
    with pytest.raises(ImportError, match=f"pip install {said}"):
        spaces.load_features(name, torch.zeros(4, 3, 8, 8), 10)
