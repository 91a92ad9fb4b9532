"""Checkpoints of the lab: one safetensors file with the weights and all that was known of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from kdpp import _version
from kdpp.digits import checkpoints
from kdpp.digits.networks import VNetwork
from kdpp.lab.files import write_atomically
from kdpp.lab.networks import VEDenoiser, build
from kdpp.lab.settings import unknown

__all__ = ["FILE", "Model", "load_model", "save_model"]

FILE = "model.safetensors"
"""The name of the finished model in a run's folder."""
KEY = "kdpp.lab"


@dataclass(frozen=True)
class Model:
    """A trained network, ready to sample with, and what is known of it.

    Attributes:
        denoiser: VE, ``(x (B, *shape), sigma (B,), cond=labels int64 (B,), **conditions) -> D``;
            a label equal to ``classes`` stands for none. It has ``sigma_min``, ``sigma_max`` and
            ``sigma_to_t``.
        network: the network inside it; it predicts v. Frozen, in evaluation mode.
        about: what `save_model` was given, see there.
    """

    denoiser: nn.Module
    network: VNetwork
    about: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(self.about["data"]["shape"])

    @property
    def classes(self) -> int:
        """How many classes there are; as a label, "no label"."""
        return int(self.about["data"]["classes"])

    @property
    def sampler(self) -> str:
        """The kdpp solver that it was made for, without ``sample_`` and ``_tg``.

        Raises ValueError for an encoder, which samples nothing.
        """
        if self.about["sampler"] == "encode":
            raise ValueError(
                "the model is an encoder, from images to noise (kdpp.encode); give one that samples"
            )
        return str(self.about["sampler"])

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The sigmas that it was trained on, the last one 0; None: any."""
        levels = self.about["levels"]
        return None if levels is None else tuple(levels)

    @property
    def needs_w(self) -> bool:
        """Whether the network takes its guidance w as an input: the CFG scale minus 1."""
        return "w" in self.about["conditions"]

    @property
    def parameters(self) -> int:
        """How many numbers the network has."""
        return sum(p.numel() for p in self.network.parameters())


def save_model(path: str | Path, network: nn.Module, about: Mapping[str, Any]) -> None:
    """Write the network's weights, float32, and `about` as JSON metadata: whole or not at all.

    Args:
        about: ``network`` (its configuration), ``method``, ``settings``, ``seed``, ``data``
            (``source``, ``shape``, ``classes``, ``bounded``: whether its values lie in [-1, 1]),
            ``sampler`` and ``levels`` it is made for, ``conditions`` (further scalar inputs with
            their trained ranges), ``guidance`` (the CFG scale baked in, or None), ``evaluations``
            (of a network for one image, in training), ``iterations``, ``kdpp`` (its version).

    Raises ValueError for weights that are not finite, OSError where they cannot be written.
    """
    tensors = {name: value.float().contiguous() for name, value in network.state_dict().items()}
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{path} was not written: {broken[0]} is not finite")
    write_atomically(path, to_bytes(tensors, {KEY: json.dumps(dict(about))}))


def load_model(name: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model of a checkpoint file, of a run's folder, or one that ships with kdpp.

    Args:
        name: a file, a folder with a ``model.safetensors``, "digits:teacher" or "digits:student".

    Torch's global random stream is left as it was.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown shipped model; a damaged file, or one of something else.
    """
    if str(name).startswith("digits:"):
        if name not in SHIPPED:
            raise ValueError(unknown("model", name, SHIPPED))
        network, about = SHIPPED[str(name)]()
    else:
        network, about = _read(Path(name))
    network = network.to(device).eval().requires_grad_(False)
    return Model(VEDenoiser(network).to(device), network, about)


def _read(path: Path) -> tuple[VNetwork, dict[str, Any]]:
    if path.is_dir():
        if not (path / FILE).is_file():
            raise FileNotFoundError(f"no {FILE} in {path}; is its training finished?")
        path = path / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with torch.random.fork_rng(devices=[]):
            network = build(about["network"])
        network.load_state_dict(tensors)
        Model(network, network, about).levels  # noqa: B018
    except KeyError as error:
        raise ValueError(f"{path} is no checkpoint of kdpp's lab: it has no {error}") from error
    except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no checkpoint of kdpp's lab: {error}") from error
    return network, about


def _shipped(method: str, **rest: Any) -> dict[str, Any]:
    digits = {"source": "digits", "shape": [1, 8, 8], "classes": 10, "bounded": True}
    about = {"method": method, "settings": {}, "seed": 0, "data": digits, "conditions": {}}
    return about | {"kdpp": _version.__version__} | rest


def _teacher() -> tuple[VNetwork, dict[str, Any]]:
    network = checkpoints.load_teacher()
    about = _shipped(
        "teacher",
        network={"kind": "resmlp", **network.config},
        sampler="euler",
        levels=None,
        guidance=None,
        evaluations=3000 * 512,
        iterations=3000,
    )
    return network, about


def _student() -> tuple[VNetwork, dict[str, Any]]:
    network = checkpoints.load_student()
    about = _shipped(
        "consistency",
        network={"kind": "resmlp", **network.config},
        sampler="lcm",
        levels=None,
        guidance=2.0,
        evaluations=4 * 800 * 512,
        iterations=800,
    )
    return network, about


SHIPPED: dict[str, Callable[[], tuple[VNetwork, dict[str, Any]]]] = {
    "digits:teacher": _teacher,
    "digits:student": _student,
}
