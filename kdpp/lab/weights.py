"""Weights to and from safetensors files: no pickle, nothing executed on loading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from kdpp.lab.files import write_atomically

__all__ = ["fill_network", "read_weights", "write_weights"]


def write_weights(
    path: str | Path, network: nn.Module, dtype: torch.dtype, key: str, about: Mapping[str, Any]
) -> None:
    """Write the network's weights in this dtype, and `about` as JSON under `key`: whole or not.

    Raises ValueError for weights that are not finite in this dtype, OSError where the file cannot
    be written; what was there stays as it was.
    """
    state = network.state_dict()
    tensors = {name: value.to(dtype).contiguous() for name, value in state.items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{path} was not written: {name} is not finite in {kind}")
    write_atomically(path, to_bytes(tensors, {key: json.dumps(dict(about))}))


def read_weights(path: Path, key: str, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_weights` wrote: `about`, and the weights by their names.

    Args:
        what: what the file should be, for messages: "checkpoint of kdpp's lab".

    Raises FileNotFoundError where there is no file, and ValueError, in one sentence, for a damaged
    file, one of something else, and weights that are no finite floating-point numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata[key])
    except KeyError as error:
        raise ValueError(f"{path} is not a {what}: its metadata have no {error}") from error
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a {what}: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} is not a {what}: its metadata {key!r} are not a table")
    for name, value in tensors.items():
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"{path} is not a {what}: {name} is {kind}; weights must be floats")
        if not value.float().isfinite().all():
            raise ValueError(f"{path} is damaged: {name} holds values that are not finite")
    return about, tensors


def fill_network(path: Path, what: str, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the weights that were read from the file into the network; ValueError unless they fit."""
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a {what}: {error}") from error
