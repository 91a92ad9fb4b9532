"""MNIST's four files: what is read, and what is refused in a sentence."""

import gzip
import struct

import numpy as np
import pytest
import torch

from kdpp.lab.data import load_data

NAMES = {
    "images": "train-images-idx3-ubyte",
    "labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    sizes = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes((0, 0, kind, values.ndim)) + sizes + values.astype(np.uint8).tobytes()


@pytest.fixture
def parts():
    random = np.random.default_rng(0)
    return {
        "images": random.integers(256, size=(6, 5, 4)),
        "labels": np.array([0, 1, 2, 2, 1, 0]),
        "test_images": random.integers(256, size=(3, 5, 4)),
        "test_labels": np.array([2, 0, 0]),
    }


def write(folder, parts):
    for name, values in parts.items():
        (folder / NAMES[name]).write_bytes(idx(values))
    return f"idx:{folder}"


def test_both_parts_are_read(tmp_path, parts):
    data = load_data(source := write(tmp_path, parts))
    assert (data.shape, data.classes, data.source, data.bounded) == ((1, 5, 4), 3, source, True)
    for found, kind in ((data, ""), (data.test, "test_")):
        pixels = ((found.images[:, 0] + 1) * 127.5).round().numpy()
        np.testing.assert_array_equal(pixels, parts[f"{kind}images"])
        assert found.labels.dtype == torch.int64
        assert found.labels.tolist() == parts[f"{kind}labels"].tolist()
    assert data.test.test is None and data.test.classes == 3


def test_compressed_files_are_the_same(tmp_path, parts):
    plain = load_data(source := write(tmp_path, parts))
    for name in NAMES.values():
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    packed = load_data(source)
    assert torch.equal(plain.images, packed.images)
    assert torch.equal(plain.test.labels, packed.test.labels)


def test_the_test_part_goes_along_to_another_device(tmp_path, parts):
    moved = load_data(write(tmp_path, parts)).to(torch.device("meta"))
    assert moved.images.is_meta and moved.test.images.is_meta and moved.source


@pytest.mark.parametrize(
    ("name", "spoilt", "said"),
    [
        ("images", lambda content: content[:-1], "says that it holds 6 x 5 x 4 bytes.*holds 119"),
        ("images", lambda content: content + b"x", "and holds 121"),
        ("images", lambda content: content[:7], "begins with 00 00 08 03"),
        ("labels", lambda content: idx(np.zeros((6, 1, 1))), "00 00 08 01"),
        ("labels", lambda content: idx(np.zeros(6), kind=13), "begins with 00 00 0d 01"),
        ("labels", lambda content: idx(np.zeros(5)), "6 images.*5 labels"),
        ("test_labels", lambda content: idx(np.full(3, 7)), "3 classes.*of 8"),
        ("test_images", lambda content: idx(np.zeros((3, 4, 4))), r"\[4, 4\]"),
        ("test_images", lambda content: idx(np.zeros((0, 5, 4))), "0 x 5 x 4"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, parts, name, spoilt, said):
    source = write(tmp_path, parts)
    path = tmp_path / NAMES[name]
    path.write_bytes(spoilt(path.read_bytes()))
    with pytest.raises(ValueError, match=said):
        load_data(source)


def test_what_is_missing_or_no_gzip_file_is_named(tmp_path, parts):
    source = write(tmp_path, parts)
    path = tmp_path / NAMES["test_labels"]
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte"):
        load_data(source)
    for content in (packed[:-3], b"no gzip", packed[:12] + b"\xff\xff" + packed[14:]):
        path.with_suffix(".gz").write_bytes(content)
        with pytest.raises(ValueError, match="no whole gzip file"):
            load_data(source)
    with pytest.raises(FileNotFoundError, match="four files"):
        load_data(f"idx:{tmp_path / 'nowhere'}")
