"""The lab's data: the digits, folders of images, arrays; and what is refused in a sentence."""

import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("PIL")

from PIL import Image

from kdpp.digits import load_data as load_digits
from kdpp.lab.data import load_data


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=shape).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Three grey images of 5 x 4 pixels in two classes, and a hidden file."""
    for i, name in enumerate(("b_cats/2.png", "b_cats/1.png", "a_dogs/1.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(i, 4, 5)).save(tmp_path / name)
    (tmp_path / "a_dogs" / ".hidden").write_text("x")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_the_digits_are_the_digits():
    data = load_data("digits")
    images, labels = load_digits()
    assert torch.equal(data.images, images) and torch.equal(data.labels, labels)
    assert (data.classes, data.shape, data.source, data.bounded) == (10, (1, 8, 8), "digits", True)


def test_the_digits_have_a_test_part():
    """Beside them, of the same kind."""
    test = load_data("digits").test
    images, labels = load_digits("test")
    assert torch.equal(test.images, images) and torch.equal(test.labels, labels)
    assert (test.classes, test.source, test.test) == (10, "digits", None)


def test_a_folder_of_grey_images_in_classes(folder):
    data = load_data(folder)
    assert data.images.shape == (3, 1, 4, 5) and data.images.dtype == torch.float32
    assert data.labels.tolist() == [0, 1, 1] and data.labels.dtype == torch.int64
    assert data.classes == 2 and data.source == str(folder) and data.bounded
    # Sorted by class, then by file name.
    for image, seed in zip(data.images, (2, 1, 0), strict=True):
        np.testing.assert_allclose(image[0].numpy(), pixels(seed, 4, 5) / 127.5 - 1, atol=1e-6)


def test_one_colour_image_makes_all_of_three_channels(folder):
    colour = pixels(9, 4, 5, 3)
    Image.fromarray(colour).save(folder / "a_dogs" / "0.png")
    data = load_data(str(folder))
    assert data.images.shape == (4, 3, 4, 5)
    np.testing.assert_allclose(data.images[0].permute(1, 2, 0), colour / 127.5 - 1, atol=1e-6)
    assert torch.equal(data.images[1, 0], data.images[1, 2])


def test_loose_images_are_one_class_in_all_the_usual_modes(tmp_path):
    for i, mode in enumerate(("RGBA", "P", "LA", "1", "CMYK")):
        suffix = "tif" if mode == "CMYK" else "png"
        Image.fromarray(pixels(i, 3, 3)).convert(mode).save(tmp_path / f"{i}.{suffix}")
    data = load_data(tmp_path)
    assert data.images.shape == (5, 3, 3, 3) and data.classes == 1
    assert data.labels.tolist() == [0] * 5


def corrupt(folder):
    path = folder / "a_dogs" / "1.png"
    path.write_bytes(path.read_bytes()[:50])


def deep(folder):
    Image.fromarray(np.full((4, 5), 40_000, np.uint16)).save(folder / "a_dogs" / "0.png")


def larger(folder):
    Image.fromarray(pixels(0, 6, 5)).save(folder / "b_cats" / "9.png")


def animated_nothing(folder):
    (folder / "b_cats" / "notes.txt").write_text("not an image")


def animated(folder):
    frames = [Image.fromarray(pixels(i, 4, 5)) for i in range(3)]
    frames[0].save(folder / "b_cats" / "0.gif", save_all=True, append_images=frames[1:])


def enormous(folder):
    """A picture of 144 megapixels takes 17 KB as PNG."""
    Image.new("1", (12_000, 12_000)).save(folder / "b_cats" / "9.png")


def pipe(folder):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(folder / "b_cats" / "9.png")


def broken_link(folder):
    (folder / "b_cats" / "9.png").symlink_to(folder / "nowhere.png")


def loose(folder):
    Image.fromarray(pixels(0, 4, 5)).save(folder / "0.png")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (corrupt, r"a_dogs.1\.png is not a whole image .*; replace it, or take it out"),
        (animated_nothing, r"notes\.txt is not a whole image .*; replace it, or take it out"),
        (deep, r"a_dogs.0\.png has pixels of mode 'I;16'; convert it to 8 bits"),
        (larger, r"9\.png is 5 x 6 pixels, and .*1\.png is 5 x 4 pixels; resize all"),
        (lambda f: (f / "c_birds").mkdir(), r"c_birds holds no images; add some, or remove"),
        (animated, r"0\.gif has 3 frames; put each into a file of its own"),
        (enormous, r"9\.png has more than 89,478,485 pixels; resize it"),
        (pipe, r"9\.png is not a file; take it out of the folder"),
        (broken_link, r"9\.png is not a file; take it out of the folder"),
        (loose, r"holds both sub-folders and images such as 0\.png; a class is a sub-folder"),
    ],
)
def test_a_folder_that_is_not_in_order_is_refused_by_the_file(folder, spoil, sentence):
    spoil(folder)
    with pytest.raises(ValueError, match=sentence):
        load_data(folder)


def test_images_are_turned_as_their_camera_says(tmp_path):
    """Lying on its side in the file (EXIF orientation 6), 5 x 4 as shown: pixel by pixel."""
    upright = pixels(3, 4, 5)
    Image.fromarray(upright).save(tmp_path / "a.png")
    lying = Image.fromarray(np.rot90(upright))
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "b.png", exif=exif)
    data = load_data(tmp_path)
    assert torch.equal(data.images[0], data.images[1])


def test_folders_inside_a_class_belong_to_it(folder):
    (folder / "a_dogs" / "deep" / "deeper").mkdir(parents=True)
    Image.fromarray(pixels(7, 4, 5)).save(folder / "a_dogs" / "deep" / "deeper" / "9.png")
    data = load_data(folder)
    assert data.labels.tolist() == [0, 0, 1, 1] and data.classes == 2
    np.testing.assert_allclose(data.images[1, 0], pixels(7, 4, 5) / 127.5 - 1, atol=1e-6)


def test_a_photograph_with_its_preview_is_one_image(tmp_path):
    """MPO, as telephones write it: more than one frame, of which the first is the picture."""
    first, preview = (Image.fromarray(pixels(i, 16, 16)) for i in (0, 1))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    assert load_data(tmp_path).images.shape == (1, 1, 16, 16)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        load_data(tmp_path)


def test_without_pillow_one_sentence_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'need Pillow: pip install "kdpp\[lab\]"'):
        load_data(folder)


def test_an_array_of_latents_with_labels_beside_it(tmp_path):
    latents = np.random.default_rng(0).standard_normal((6, 4, 2, 2))
    np.save(tmp_path / "x.npy", latents)
    data = load_data(tmp_path / "x.npy")
    assert data.classes == 1 and not data.bounded and data.images.dtype == torch.float32
    np.testing.assert_array_equal(data.images, latents.astype(np.float32))
    np.save(tmp_path / "x.labels.npy", np.array([2, 0, 1, 1, 0, 0], np.int32))
    data = load_data(str(tmp_path / "x.npy"))
    assert data.labels.tolist() == [2, 0, 1, 1, 0, 0] and data.classes == 3


def test_an_array_of_pixels_gets_a_channel_and_the_range(tmp_path):
    np.save(tmp_path / "x.npy", pixels(0, 6, 4, 5))
    data = load_data(tmp_path / "x.npy")
    assert data.images.shape == (6, 1, 4, 5)
    np.testing.assert_allclose(data.images[:, 0], pixels(0, 6, 4, 5) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("name", ["images", "latents"])
def test_safetensors_with_labels(tmp_path, name):
    path = tmp_path / "x.safetensors"
    images = torch.randn(4, 3, 2, 2, dtype=torch.float16)
    save_file({name: images, "labels": torch.tensor([0, 1, 1, 0])}, path)
    data = load_data(path)
    assert torch.equal(data.images, images.float()) and data.classes == 2


def not_finite():
    images = np.zeros((3, 1, 2, 2), np.float32)
    images[1, 0, 1, 1] = np.nan
    return images


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (not_finite(), r"x\.npy holds a value that is not finite, in row 1"),
        (np.zeros((3, 1, 2, 2), np.int64), r"holds torch\.int64; images must be floats, or uint8"),
        (np.zeros(3, np.float32), r"has shape \[3\]; images must be \(N, …\)"),
        (np.zeros((0, 1, 2, 2), np.float32), r"has shape \[0, 1, 2, 2\]; images must be"),
        (np.array(["a", "b"]), r"x\.npy is no array of numbers"),
        (np.array([{}], dtype=object), r"x\.npy is no array of numbers"),
    ],
)
def test_arrays_that_are_no_data_are_refused(tmp_path, array, sentence):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=sentence):
        load_data(tmp_path / "x.npy")


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64, np.int8])
def test_labels_of_every_whole_kind(tmp_path, kind):
    np.save(tmp_path / "x.npy", np.zeros((3, 1, 2, 2), np.float32))
    np.save(tmp_path / "x.labels.npy", np.array([2, 0, 1], kind))
    data = load_data(tmp_path / "x.npy")
    assert data.labels.tolist() == [2, 0, 1] and data.labels.dtype == torch.int64


def test_a_label_that_is_no_class_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 2, 2), np.float32))
    np.save(tmp_path / "x.labels.npy", np.array([0, 10**11]))
    with pytest.raises(ValueError, match=r"of \S+x\.npy go up to 100000000000; .* 100000 of them"):
        load_data(tmp_path / "x.npy")
    np.save(tmp_path / "x.labels.npy", np.array([0, 2**64 - 1], np.uint64))
    with pytest.raises(ValueError, match="they must be 2 whole numbers ≥ 0"):
        load_data(tmp_path / "x.npy")


def test_an_array_that_is_shorter_than_it_says_is_refused(tmp_path):
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 8)}
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(b"\0" * 64)
    with pytest.raises(
        ValueError, match=r"x\.npy is no array of numbers: .*greater than file size"
    ):
        load_data(tmp_path / "x.npy")


def test_a_pipe_is_not_waited_for(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"x\.npy is neither a file nor a folder"):
        load_data(tmp_path / "x.npy")


@pytest.mark.parametrize("labels", [[0.0, 1.0], [0, 1, 1], [0, -1], [True, False]])
def test_labels_that_do_not_fit_are_refused(tmp_path, labels):
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 2, 2), np.float32))
    np.save(tmp_path / "x.labels.npy", np.array(labels))
    with pytest.raises(ValueError, match="they must be 2 whole numbers ≥ 0, one for each image"):
        load_data(tmp_path / "x.npy")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    save_file({"weights": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="it must hold a tensor named images or latents"):
        load_data(tmp_path / "x.safetensors")
    for name, sentence in (("x.safetensors", "no whole safetensors file"), ("x.npy", "no array")):
        (tmp_path / name).write_bytes(b"\x80\x04 nothing")
        with pytest.raises(ValueError, match=sentence):
            load_data(tmp_path / name)
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="give a folder of images"):
        load_data(tmp_path / "x.zip")


def test_a_name_that_is_not_known_is_told_from_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"unknown data 'digit'; did you mean 'digits'\?"):
        load_data("digit")
    with pytest.raises(FileNotFoundError, match="no data at"):
        load_data(tmp_path / "x.npy")
