"""Where this machine's checkpoints lie, by the digests of their contents, and those digests.

A picture's file names its models and holds their digests, and no path. `kdpp generate` notes here
where it has read them from, so that ``--like`` finds them, and the digests of large files, which
take seconds. The notes are two JSON files in the user's folder for caches; without them,
``--student`` and ``--teacher`` say the places, and every file is read.

A file's digest is its SHA-256, whose first ten digits are what web UIs and model sites call its
hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdpp.lab.files import digest, make_folder, write_atomically

__all__ = ["content_digest", "file_digest", "place_of", "read_ahead", "remember"]

SETTLED = 2.0
"""For how many seconds a file must have been left alone before its digest is noted: it might be
written again with the same size and, by the file system's clock, at the same time."""


def remember(places: Mapping[str, str]) -> None:
    """Note where checkpoints lie, by digest; where no note can be kept, nothing is said."""
    _note("places.json", {found: str(Path(place).resolve()) for found, place in places.items()})


def place_of(content: str) -> str | None:
    """Where the checkpoint of this digest was last read, if it is still there."""
    place = _read("places.json").get(content)
    return place if isinstance(place, str) and Path(place).exists() else None


def file_digest(path: Path) -> str:
    """A digest of a file's content: read, or noted for a file of this size and these times."""
    key, *facts = _facts(path)
    match _read("sha256.json").get(key):
        case [*noted, str(known)] if noted == facts:
            return known
    found, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            found.update(block[:size])
    if time.time() - max(facts[1:]) / 1e9 > SETTLED:
        _note("sha256.json", {key: [*facts, found.hexdigest()]})
    return found.hexdigest()


def content_digest(path: Path) -> str:
    """A digest of a file's content, or of a folder's weights and settings."""
    ahead = _AHEAD.pop(_facts(path), None)
    return _content_digest(path) if ahead is None else ahead.result()


def read_ahead(paths: Iterable[Path]) -> None:
    """Begin to make the digests that `content_digest` will be asked for, beside what goes on."""
    asked: dict[Path, Future[str]] = {path: Future() for path in paths if path.exists()}
    _AHEAD.update({_facts(path): future for path, future in asked.items()})

    def read() -> None:
        for path, future in asked.items():
            try:
                future.set_result(_content_digest(path))
            except Exception as error:
                future.set_exception(error)

    threading.Thread(target=read, daemon=True).start()


_AHEAD: dict[tuple[Any, ...], Future[str]] = {}


def _content_digest(path: Path) -> str:
    if path.is_file():
        return file_digest(path)
    wanted = (".safetensors", ".json", ".txt")
    files = sorted(file for file in path.rglob("*") if file.suffix in wanted)
    return digest([(str(file.relative_to(path)), file_digest(file)) for file in files])


def _facts(path: Path) -> tuple[Any, ...]:
    """Its place, size and times."""
    state = path.stat()
    return str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdpp"


def _read(name: str) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads((_folder() / name).read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def _note(name: str, new: Mapping[str, Any]) -> None:
    known = _read(name)
    if new.items() <= known.items():
        return
    with suppress(OSError):
        make_folder(_folder())
        write_atomically(_folder() / name, json.dumps({**known, **new}, indent=1).encode())
