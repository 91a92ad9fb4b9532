"""Networks to and from safetensors files: no pickle, nothing executed on loading."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from kdpp.digits.networks import Classifier, ResMLP

WEIGHTS = Path(__file__).parent / "weights"
KEY = "kdpp.digits"
Network = TypeVar("Network", ResMLP, Classifier)


def save(path: str | Path, network: ResMLP | Classifier) -> None:
    """Write the network to `path`: float16 weights, and its configuration as JSON metadata.

    The file is there whole or not at all: it is written beside `path` and then moved there.

    Raises ValueError for weights that float16 cannot hold (NaN, infinite, beyond 65504), and
    OSError where the folder cannot be written.
    """
    path = Path(path)
    tensors = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"not saved: {broken[0]} is not finite in float16")
    about = json.dumps({"network": type(network).__name__, "config": network.config})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(to_bytes(tensors, {KEY: about}))
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: str | Path, kind: type[Network]) -> Network:
    """Return the network of this kind in the file, float32, frozen, in evaluation mode.

    torch's global random stream is left as it was.

    Raises FileNotFoundError where there is no file, and ValueError, in one sentence, for a file
    that is damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["network"] != kind.__name__:
            raise ValueError(f"it holds a {about['network']}")
        with torch.random.fork_rng(devices=[]):
            network = kind(**about["config"])
        network.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a checkpoint of a {kind.__name__}: {error}") from error
    return network.eval().requires_grad_(False)


def load_teacher(path: str | Path | None = None) -> ResMLP:
    """Return the teacher, of `path` or as shipped; errors as in `load`."""
    return load(path or WEIGHTS / "teacher.safetensors", ResMLP)


def load_student(path: str | Path | None = None) -> ResMLP:
    """Return the few-step student, of `path` or as shipped; errors as in `load`."""
    return load(path or WEIGHTS / "student.safetensors", ResMLP)


def load_classifier(path: str | Path | None = None) -> Classifier:
    """Return the digit classifier, of `path` or as shipped; errors as in `load`."""
    return load(path or WEIGHTS / "classifier.safetensors", Classifier)
