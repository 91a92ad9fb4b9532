"""The handwritten digits as tensors: a training part, and a test part by other writers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from safetensors.torch import load_file
from torch import Tensor

CLASSES = 10
NULL_CLASS = CLASSES
"""The label that stands for "no label": the unconditional half of classifier-free guidance."""

IMAGE_SHAPE = (1, 8, 8)
FILE = Path(__file__).parent / "uci" / "optdigits.safetensors"
Part = Literal["train", "test"]


def load_data(part: Part = "train") -> tuple[Tensor, Tensor]:
    """Return ``(images, labels)``: float32 [N, 1, 8, 8] in [-1, 1] and int64 [N].

    "train" holds 3,823 digits by 30 writers, "test" 1,797 digits by 13 others. Every network that
    ships with kdpp was trained on the first and is measured against the second, which it has not
    seen. The pixels are 0..16 in the source; here they are ``p / 8 - 1``.

    Source: the UCI data set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998;
    CC BY 4.0), both of its parts whole; the test part is scikit-learn's `load_digits`.

    Raises ValueError for another part.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part must be 'train' or 'test', got {part!r}")
    arrays = load_file(FILE)
    images = arrays[f"{part}.images"].float().div(8).sub(1).unsqueeze(1)
    return images, arrays[f"{part}.labels"].long()
