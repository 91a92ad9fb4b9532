"""The idx files of MNIST and of the sets made in its form, such as Fashion-MNIST.

A file is a magic number (two zero bytes, the type of its values, how many dimensions), the sizes as
big-endian 32-bit numbers, and the values (LeCun et al. 1998).
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_idx", "read_pair"]

UINT8 = 8
PARTS = {"train": "train", "test": "t10k"}
"""What files of the two parts begin with."""


def read_pair(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (N, H, W) and labels (N,) of the part "train" or "test".

    They are read from ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte`` (of the test part
    ``t10k-…``), each as it is or compressed (``.gz``).

    Raises FileNotFoundError where one is missing, ValueError for files that do not fit each other
    and as `read_idx`.
    """
    images = read_idx(path := _find(folder, f"{PARTS[part]}-images-idx3-ubyte"), 3)
    labels = read_idx(beside := _find(folder, f"{PARTS[part]}-labels-idx1-ubyte"), 1)
    if len(images) != len(labels):
        raise ValueError(
            f"{path} holds {len(images)} images, and {beside} {len(labels)} labels; take both from "
            "one set"
        )
    return images, labels


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The bytes of an idx file, an array of so many dimensions.

    Raises OSError where it cannot be read, ValueError for a file that holds something else, is
    shorter or longer than it says, or is empty.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}); copy it anew") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes((0, 0, UINT8, dimensions)):
        raise ValueError(
            f"{path} begins with {content[:4].hex(' ')}; an idx file of bytes in {dimensions} "
            f"dimensions begins with 00 00 08 0{dimensions}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape) or not math.prod(shape):
        raise ValueError(
            f"{path} says that it holds {' x '.join(map(str, shape))} bytes, and holds "
            f"{len(content) - start}; copy it anew"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()  # writable


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no {name} or {name}.gz in {folder}")
