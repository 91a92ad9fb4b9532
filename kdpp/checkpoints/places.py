"""Where this machine's checkpoints lie, by the digests of their contents.

A picture's file names its models and holds their digests, and no path. `kdpp generate` notes here
where it has read them from, so that ``--like`` finds them. The notes are a JSON file in the user's
folder for caches; without it, ``--student`` and ``--teacher`` say the places.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from kdpp.lab.files import make_folder, write_atomically

__all__ = ["place_of", "remember"]


def _notes() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "kdpp" / "places.json"


def _read() -> dict[str, str]:
    with suppress(OSError, ValueError):
        found = json.loads(_notes().read_bytes())
        if isinstance(found, dict):
            return {str(digest): str(place) for digest, place in found.items()}
    return {}


def remember(places: Mapping[str, str]) -> None:
    """Note where checkpoints lie, by digest; where no note can be kept, nothing is said."""
    known = _read()
    new = {digest: str(Path(place).resolve()) for digest, place in places.items()}
    if new.items() <= known.items():
        return
    with suppress(OSError):
        make_folder(_notes().parent)
        write_atomically(_notes(), json.dumps(known | new, indent=1).encode())


def place_of(digest: str) -> str | None:
    """Where the checkpoint of this digest was last read, if it is still there."""
    place = _read().get(digest)
    return place if place is not None and Path(place).exists() else None
