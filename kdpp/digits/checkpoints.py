"""The digits' networks to and from safetensors files; those that ship with kdpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from kdpp.digits.networks import Classifier, digits_mlp
from kdpp.lab.networks import ResMLP
from kdpp.lab.weights import fill_network, read_weights, write_weights

WEIGHTS = Path(__file__).parent / "weights"
KEY = "kdpp.digits"
Network = TypeVar("Network", ResMLP, Classifier)
MAKERS: dict[type, Callable[..., Any]] = {ResMLP: digits_mlp, Classifier: Classifier}
SIZES = {ResMLP: ("width", "hidden", "blocks"), Classifier: ("channels", "features")}
"""What a file says of a network of each kind."""


def save(path: str | Path, network: ResMLP | Classifier) -> None:
    """Write the network to `path`: float16 weights, and its sizes as JSON metadata.

    The file is there whole or not at all.

    Raises ValueError for weights that float16 cannot hold (NaN, infinite, beyond 65504), and
    OSError where the folder cannot be written.
    """
    kind = type(network)
    sizes = {name: network.config[name] for name in SIZES[kind]}
    about = {"network": kind.__name__, "config": sizes}
    write_weights(path, network, torch.float16, KEY, about)


def load(path: str | Path, kind: type[Network]) -> Network:
    """Return the network of this kind in the file, float32, frozen, in evaluation mode.

    torch's global random stream is left as it was.

    Raises FileNotFoundError where there is no file, and ValueError, in one sentence, for a file
    that is damaged or holds something else.
    """
    path, what = Path(path), f"checkpoint of a {kind.__name__}"
    about, tensors = read_weights(path, KEY, what)
    try:
        if about["network"] != kind.__name__:
            raise ValueError(f"it holds a {about['network']}")
        with torch.random.fork_rng(devices=[]):
            network: Network = MAKERS[kind](**about["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a {what}: {error}") from error
    fill_network(path, what, network, tensors)
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
