"""Headers of safetensors files: the names, dtypes and shapes of all tensors, and nothing else.

What is not a safetensors file is refused here, before anything large is read: a pickle, whatever
its name, GGUF, a web page, a file that was cut short.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

__all__ = ["CONVERT", "PICKLES", "Entry", "Header", "read_header"]

HEADER_CAP = 100_000_000
"""The longest header that the format allows, in bytes."""
BLAME_CAP = 10_000_000
"""The longest header that is searched for the tensor that is wrong, in bytes."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a header: its dtype as safetensors names it ("BF16"), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.numbers * dtype_bits(self.dtype) // 8


@dataclass(frozen=True)
class Header:
    """A safetensors file's header.

    Attributes:
        entries: its tensors by name.
        metadata: its own words, by key.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file, checked against the file's size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a pickle, GGUF or another format; a damaged or cut-short file. One sentence with
            the file, the tensor where there is one, and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file at {path}")
    _refuse_other_formats(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            entries = {k: Entry(s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
            header = Header(entries, file.metadata() or {})
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(
            f"{path} is damaged{_blame(path)} ({reason}); get it again from where it came"
        ) from error
    if not header.entries:
        raise ValueError(f"{path} holds no tensors; get it again from where it came")
    return header


# Refusals --------------------------------------------------------------------------------------

PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"}
CONVERT = (
    "kdpp reads safetensors alone, since opening a pickle can run code; look for the model's "
    ".safetensors file, or convert it once: read it in torch with weights_only=True, which runs no "
    "code, take its table of tensors (often under 'state_dict') and write that with "
    "safetensors.torch.save_file"
)


def _refuse_other_formats(path: Path) -> None:
    """ValueError for a file that does not begin as a safetensors file of its size can."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(64)
    length = int.from_bytes(start[:8], "little")
    begins = start[8:9] == b"{"
    if path.suffix.lower() in PICKLES:
        if begins and length <= size - 8:
            raise ValueError(
                f"{path} has a pickle's name and the content of a safetensors file; rename it to "
                f"{path.stem}.safetensors"
            )
        raise ValueError(f"{path} is a pickle by its name; {CONVERT}")
    if size == 0:
        raise ValueError(f"{path} is empty; get it again from where it came")
    if not begins:
        _refuse_by_magic(path, start)
    if size < 8 or not begins:
        raise ValueError(f"{path} is not a safetensors file: it does not begin with a header")
    if length > HEADER_CAP:
        raise ValueError(
            f"{path} claims a header of {length:,} bytes, above the format's {HEADER_CAP:,}; it is "
            "damaged or not a safetensors file"
        )
    if length > size - 8:
        raise ValueError(
            f"{path} is cut short: its header has {length:,} bytes and the file {size:,}; get it "
            "again from where it came"
        )


def _refuse_by_magic(path: Path, start: bytes) -> None:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", start):
        raise ValueError(f"{path} is a pickle by its content; {CONVERT}")
    if start.startswith(b"GGUF"):
        raise ValueError(
            f"{path} is a GGUF file, whose weights are quantised; give the model's safetensors file"
        )
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
        )
    if text.startswith(b"<"):
        raise ValueError(
            f"{path} is a web page, not weights: the download gave an error or asked to log in; "
            "download it again"
        )


def _blame(path: Path) -> str:
    """The first tensor whose entry cannot be right, for a message; the library names few."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, BLAME_CAP))
        size = file.seek(0, 2) - 8 - length
    try:
        entries = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
        for key, entry in entries.items():
            first, last = entry["data_offsets"]
            if last > size:
                return f" or cut short: {key!r} ends {last - size:,} bytes beyond it"
            if last - first != math.prod(entry["shape"]) * dtype_bits(entry["dtype"]) // 8:
                return f": {key!r} does not have the size of its shape"
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError):
        pass
    return ""


def dtype_bits(dtype: str) -> int:
    """The bits of a number: the digits of its name; BOOL and F8_… have 8."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8
