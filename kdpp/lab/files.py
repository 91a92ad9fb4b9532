"""Files that are there whole or not at all, and folders that one run at a time writes to."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["digest", "locked", "make_folder", "remove_leftovers", "write_atomically"]

_PART = ".part"


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`: beside it at first, moved there once it is safe on the disk.

    Raises OSError where that fails; what was at `path` is then as it was, and nothing is left.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise type(error)(
                f"{path} could not be written ({error.strerror or error}); it is as it was before"
            ) from error
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed `write_atomically` may have left in the folder."""
    for part in folder.glob(f".*{_PART}"):
        part.unlink()


def make_folder(folder: Path) -> None:
    """Make the folder and its parents; OSError, in a sentence, where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"the folder {folder} could not be made ({error.strerror}); name another"
        ) from error


def digest(parts: Iterable[object]) -> str:
    """A name for what the parts determine: bytes as they are, anything else by its repr."""
    blake = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        blake.update(len(content).to_bytes(8, "big") + content)
    return blake.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine that ask for the lock out of the folder.

    The system frees it when the process ends, however it ends, and it leaves no file. Where there
    is no such lock (Windows, some network file systems) this does nothing.

    Raises BlockingIOError where another process holds it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another run writes to {folder}; wait for it, or name another folder"
            ) from error
        except OSError:  # a file system without locks for folders
            pass
        yield
    finally:
        os.close(handle)
