"""What networks are trained on: the digits, a folder of images, an array of images or latents."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpp.lab.idx import read_pair
from kdpp.solver import unknown

__all__ = ["Data", "load_data"]

MOST_CLASSES = 100_000
GREY, COLOUR = frozenset({"1", "L"}), frozenset({"RGB", "RGBA", "LA", "P", "PA", "CMYK", "YCbCr"})


@dataclass(frozen=True)
class Data:
    """Images or latents with their labels, all in memory.

    Attributes:
        images: float32 ``(N, *shape)``.
        labels: int64 ``(N,)``, 0 … classes - 1.
        classes: how many classes there are; as a label, "no label".
        source: where they came from, as it was given.
        test: others of the same kind, that nothing was trained on; None: the source has none.
    """

    images: Tensor
    labels: Tensor
    classes: int
    source: str = "digits"
    test: Data | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(self.images.shape[1:])

    @property
    def bounded(self) -> bool:
        """Whether all lies in [-1, 1], as pixels do; latents as a rule do not."""
        return bool(self.images.abs().max() <= 1)

    def to(self, device: torch.device) -> Data:
        """The same on another device."""
        return replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            test=self.test and self.test.to(device),
        )


def load_data(source: str | Path) -> Data:
    """Load "digits", a folder of images, an array file, or MNIST's four files.

    - ``digits``: UCI's handwritten digits, ``(1, 8, 8)``: the 3,823 of the training part, and as
      ``test`` the 1,797 of the other, by other writers.
    - A folder: every image in it that Pillow reads, all of one size; sub-folders, by name, are
      the classes, with whatever folders they hold. Images are turned as their EXIF data say. Grey
      ones give one channel, others three (transparency is dropped); pixels 0..255 become -1..1.
      Hidden files are passed over.
    - ``idx:FOLDER``: the four files of MNIST, or of a set in its form such as Fashion-MNIST
      (`kdpp.lab.idx`); ``(1, H, W)``, the 10,000 of the test part as ``test``.
    - ``.npy``: one array ``(N, …)``; ``NAME.labels.npy`` beside ``NAME.npy`` holds its labels.
    - ``.safetensors``: a tensor ``images`` or ``latents``, and ``labels`` if there are any.

    Arrays ``(N, H, W)`` get a channel; uint8 is read as pixels, floats are taken as they are.
    Without labels there is one class.

    Raises:
        ImportError: Pillow is missing.
        OSError: there is nothing at ``source``, or it cannot be read.
        ValueError: an unknown name; an empty folder or class; a file that is no whole image, has
            several frames or more pixels than Pillow takes for an image (89 million), or is of
            another size or depth; an array of another kind, or with values that are not finite.
            It names the file and says what to do.
    """
    if source == "digits":
        from kdpp.digits.data import CLASSES
        from kdpp.digits.data import load_data as load_digits

        return Data(*load_digits(), CLASSES, test=Data(*load_digits("test"), CLASSES))
    if str(source).startswith("idx:"):
        return _idx(str(source))
    path = Path(source)
    if path.is_dir():
        return _folder(path, str(source))
    if not path.exists():
        if "/" not in str(source) and not path.suffix:
            known = ["digits"]
            raise ValueError(f"{unknown('data', str(source), known)}, a folder, or an array file")
        raise FileNotFoundError(f"no data at {path}")
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder")
    if path.suffix == ".npy":
        images = _npy(path)
        beside = path.with_suffix(".labels.npy")
        return _array(path, images, _npy(beside) if beside.exists() else None)
    if path.suffix == ".safetensors":
        return _array(path, *_tensors(path))
    raise ValueError(f"{path} is no data; give a folder of images, a .npy or a .safetensors file")


def _folder(folder: Path, source: str) -> Data:
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    loose = [p for p in _files(folder) if p.parent == folder]
    if classes and loose:
        raise ValueError(
            f"{folder} holds both sub-folders and images such as {loose[0].name}; a class is a "
            "sub-folder: move the images into one, or leave the sub-folders out"
        )
    groups = [_files(place) for place in classes] if classes else [loose]
    for place, files in zip(classes or [folder], groups):
        if not files:
            raise ValueError(f"{place} holds no images; add some, or remove the folder")
    paths = [path for files in groups for path in files]
    pixels = [_pixels(path) for path in paths]
    for path, image in zip(paths, pixels):
        if image.shape[:2] != pixels[0].shape[:2]:
            raise ValueError(
                f"{path} is {_size(image)}, and {paths[0]} is {_size(pixels[0])}; resize all "
                "images to one size"
            )
    if any(image.ndim == 3 for image in pixels):
        pixels = [i if i.ndim == 3 else np.repeat(i[..., None], 3, axis=2) for i in pixels]
    images = torch.from_numpy(np.stack(pixels))
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    sizes = torch.tensor([len(files) for files in groups])
    labels = torch.arange(len(groups)).repeat_interleave(sizes)
    return Data(_unit(images), labels, len(groups), source)


def _idx(source: str) -> Data:
    folder = Path(source.removeprefix("idx:"))
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; idx:FOLDER holds MNIST's four files")
    (images, labels), (others, beside) = (read_pair(folder, part) for part in ("train", "test"))
    classes = int(labels.max()) + 1
    if others.shape[1:] != images.shape[1:] or int(beside.max()) >= classes:
        raise ValueError(
            f"the two parts in {folder} differ: images "
            f"{list(images.shape[1:])} of {classes} classes "
            f"and {list(others.shape[1:])} of {int(beside.max()) + 1}; take both from one set"
        )
    test = Data(_tensor(others), torch.from_numpy(beside).long(), classes, source)
    return Data(_tensor(images), torch.from_numpy(labels).long(), classes, source, test)


def _tensor(images: NDArray[np.uint8]) -> Tensor:
    """Grey pixels (N, H, W), 0..255, as (N, 1, H, W), -1..1."""
    return _unit(torch.from_numpy(images).unsqueeze(1))


def load_pictures(folder: str | Path) -> Iterator[Tensor]:
    """The pictures in a folder and in those inside it, by name, one at a time: (1, 3, h, w).

    They may be of many sizes; pixels 0..255 become -1..1. Raises OSError where the folder cannot be
    read, ValueError where it holds none, and as `load_data` of a file.
    """
    paths = _files(Path(folder))
    if not paths:
        raise ValueError(f"{folder} holds no images; add some")
    for path in paths:
        pixels = _pixels(path)
        coloured = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
        yield _unit(torch.from_numpy(coloured).permute(2, 0, 1).unsqueeze(0))


def _files(folder: Path) -> list[Path]:
    """What is in the folder and in those inside it, by name."""
    found = []
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("."):
            found += _files(path) if path.is_dir() else [path]
    return found


def _pixels(path: Path) -> NDArray[np.uint8]:
    """The image's pixels, ``(H, W)`` or ``(H, W, 3)``."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError('image folders need Pillow: pip install "kdpp[lab]"') from error
    if not path.is_file():
        raise ValueError(f"{path} is not a file; take it out of the folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Any = Image.open(path)
        with image:
            mode, frames = image.mode, getattr(image, "n_frames", 1)
            still = frames == 1 or image.format == "MPO"  # a photograph and its preview
            if still and mode in GREY | COLOUR:
                upright = ImageOps.exif_transpose(image)
                return np.array(upright.convert("L" if mode in GREY else "RGB"))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; resize it"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole image ({error}); replace it, or take it out of the folder"
        ) from error
    if not still:
        raise ValueError(f"{path} has {frames} frames; put each into a file of its own")
    raise ValueError(f"{path} has pixels of mode {mode!r}; convert it to 8 bits grey or colour")


def _size(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[1]} x {image.shape[0]} pixels"


def _unit(images: Tensor) -> Tensor:
    """Pixels 0..255 as -1..1, float32."""
    return images.float().div(127.5).sub(1).contiguous()


def _npy(path: Path) -> Tensor:
    try:
        # Mapped first: that fails where the file is shorter than it says.
        return torch.from_numpy(np.array(np.load(path, mmap_mode="r", allow_pickle=False)))
    except OSError as error:
        raise type(error)(f"{path} could not be read ({error.strerror})") from error
    except (EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no array of numbers: {error}") from error


def _tensors(path: Path) -> tuple[Tensor, Tensor | None]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Any] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    for name in ("images", "latents"):
        if name in tensors:
            return tensors[name], tensors.get("labels")
    raise ValueError(
        f"{path} holds {', '.join(sorted(tensors)) or 'nothing'}; it must hold a tensor named "
        "images or latents, and may hold labels"
    )


def _array(path: Path, images: Tensor, labels: Tensor | None) -> Data:
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"{path} holds {images.dtype}; images must be floats, or uint8 pixels")
    if images.ndim < 2 or images.numel() == 0:
        raise ValueError(f"{path} has shape {list(images.shape)}; images must be (N, …), N ≥ 1")
    images = _unit(images) if images.dtype == torch.uint8 else images.float().contiguous()
    if not images.isfinite().all():
        row = int((~images.flatten(1).isfinite().all(1)).nonzero()[0])
        raise ValueError(f"{path} holds a value that is not finite, in row {row}; take it out")
    if images.ndim == 3:
        images = images.unsqueeze(1)
    if labels is None:
        labels = torch.zeros(len(images), dtype=torch.int64)
    labels = _labels(path, labels, len(images))
    return Data(images, labels, int(labels.max()) + 1, str(path))


def _labels(path: Path, labels: Tensor, count: int) -> Tensor:
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    numbers = labels.long()  # what int64 cannot hold becomes negative
    if not whole or list(labels.shape) != [count] or numbers.min() < 0:
        raise ValueError(
            f"the labels of {path} are {labels.dtype} of shape {list(labels.shape)}; they must be "
            f"{count} whole numbers ≥ 0, one for each image"
        )
    if numbers.max() >= MOST_CLASSES:
        raise ValueError(
            f"the labels of {path} go up to {int(numbers.max())}; they number the classes from 0, "
            f"and there may be {MOST_CLASSES} of them at most"
        )
    return numbers
