"""Where this machine's checkpoints lie, by the digests of their contents, and those digests.

A picture's file names its models and holds their digests, and no path. `kdpp generate` notes here
where it has read them from, so that ``--like`` finds them, and the digests of large files, which
take seconds. The notes are two JSON files in the user's folder for caches; without them,
``--student`` and ``--teacher`` say the places, and every file is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdpp.lab.files import make_folder, write_atomically

__all__ = ["file_digest", "place_of", "remember"]

SETTLED = 2.0
"""For how many seconds a file must have been left alone before its digest is noted: it might be
written again with the same size and, by the file system's clock, at the same time."""


def remember(places: Mapping[str, str]) -> None:
    """Note where checkpoints lie, by digest; where no note can be kept, nothing is said."""
    _note("places.json", {digest: str(Path(place).resolve()) for digest, place in places.items()})


def place_of(digest: str) -> str | None:
    """Where the checkpoint of this digest was last read, if it is still there."""
    place = _read("places.json").get(digest)
    return place if isinstance(place, str) and Path(place).exists() else None


def file_digest(path: Path) -> str:
    """A digest of a file's content: read, or noted for a file of this size and these times."""
    state = path.stat()
    key = str(path.resolve())
    facts = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    match _read("digests.json").get(key):
        case [*noted, str(digest)] if noted == facts:
            return digest
    blake = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            blake.update(block)
    digest = blake.hexdigest()
    if time.time() - max(state.st_mtime, state.st_ctime) > SETTLED:
        _note("digests.json", {key: [*facts, digest]})
    return digest


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
