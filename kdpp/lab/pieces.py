"""Work in pieces that are kept: a run that was stopped goes on, and several processes share it.

A piece is a file of tensors, there whole or not at all. Processes wait for each other's files, as
in `kdpp.lab.bench`; a launcher that loses one process ends the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from kdpp.lab.files import make_folder, write_atomically

__all__ = ["Pieces"]

PAUSE = 0.1
"""Seconds between two looks for what another process is to finish."""

Tensors = dict[str, Tensor]


class Pieces:
    """Pieces of work in a folder, of which this process makes every ``size``-th.

    The folder must belong to this work alone, so name it by all that the work depends on. Without
    a folder nothing is kept.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0, size: int = 1) -> None:
        if folder is None and size > 1:
            raise ValueError("several processes share their work through a folder; name one")
        self.folder, self.rank, self.size = folder, rank, size

    def make(self, name: str, count: int, made: Callable[[int], Tensors]) -> dict[int, Tensors]:
        """This process's share of ``count`` pieces, each made by ``made(i)`` or read."""
        return {i: self._one(name, i, made) for i in range(self.rank, count, self.size)}

    def all(self, name: str, count: int, mine: dict[int, Tensors]) -> list[Tensors]:
        """All pieces: those of ``mine``, and the others' once they are there."""
        return [mine[i] if i in mine else self._wait(name, i) for i in range(count)]

    def _one(self, name: str, i: int, made: Callable[[int], Tensors]) -> Tensors:
        found = self._read(name, i)
        if found is None:
            found = made(i)
            if self.folder is not None:
                make_folder(self.folder)
                write_atomically(self._path(self.folder, name, i), to_bytes(found))
        return found

    def _wait(self, name: str, i: int) -> Tensors:
        while (found := self._read(name, i)) is None:
            time.sleep(PAUSE)
        return found

    def _read(self, name: str, i: int) -> Tensors | None:
        """The piece; None where it is not there, or damaged."""
        if self.folder is not None:
            with suppress(OSError, SafetensorError):
                return load_file(self._path(self.folder, name, i))
        return None

    @staticmethod
    def _path(folder: Path, name: str, i: int) -> Path:
        return folder / f"{name}-{i:04}.safetensors"
