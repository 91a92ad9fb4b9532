"""Checkpoints of the lab: one safetensors file with the weights and all that is known of them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdpp.checks import check_count
from kdpp.kinds import Denoiser
from kdpp.lab.diffusion import cfg
from kdpp.lab.files import digest
from kdpp.lab.networks import CFG_MINUS_ONE, Classifier, Network, VEDenoiser, VNetwork, build
from kdpp.lab.schedules import schedule
from kdpp.lab.settings import from_json
from kdpp.lab.weights import fill_network, read_weights, write_weights
from kdpp.models import GuidanceConditioned
from kdpp.solver import unknown

__all__ = [
    "FILE",
    "DataOrigin",
    "GenerativeModel",
    "Model",
    "ModelCard",
    "TeacherOrigin",
    "Usage",
    "load_classifier",
    "load_model",
    "read_checkpoint",
    "save_model",
]

FILE = "model.safetensors"
"""The name of the finished model in a run's folder."""
KEY = "kdpp.lab"
WHAT = "checkpoint of kdpp's lab"
WEIGHTS = Path(__file__).parents[1] / "digits" / "weights"
SHIPPED = ("digits:teacher", "digits:student", "digits:classifier")
"""The models that ship with kdpp; the files' names are what stands behind the colon."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How a network is sampled.

    Attributes:
        sampler: the solver that it was made for, by its name in `kdpp.SOLVERS`; "encode" for an
            encoder, which goes from images to noise (`kdpp.encode`), "classify" for a classifier.
        levels: the sigmas that it was trained on, the last one 0 as a rule; None: any.
        conditions: its further scalar inputs (`kdpp.lab.networks`), and the least and most of each
            that it was trained for.
        guidance: the CFG scale that it has built in; None: none.
    """

    sampler: str
    levels: tuple[float, ...] | None = None
    conditions: dict[str, tuple[float, float]] = field(default_factory=dict)
    guidance: float | None = None


@dataclass(frozen=True, kw_only=True)
class DataOrigin:
    """The data that a network was trained on.

    Attributes:
        source: as it was given.
        shape: of one image.
        classes: how many there are.
        bounded: whether all values lie in [-1, 1].
        digest: of images and labels.
    """

    source: str
    shape: tuple[int, ...]
    classes: int
    bounded: bool
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherOrigin:
    """The teacher that a network was distilled from: its name, as it was given, and its weights'
    digest."""

    name: str | None
    digest: str


@dataclass(frozen=True, kw_only=True)
class ModelCard(Usage):
    """What is known of a network: how it is sampled, and how it was made. A checkpoint has it as
    JSON in its metadata.

    Attributes:
        network: its configuration, see `kdpp.lab.networks`.
        method: by which it was trained.
        settings: the method's.
        evaluations: images that networks evaluated in training, those of its teacher too.
        iterations: optimisation steps.
        kdpp: the version that trained it.
    """

    network: dict[str, Any]
    data: DataOrigin
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    teacher: TeacherOrigin | None = None
    evaluations: int | None = None
    iterations: int | None = None
    kdpp: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a table that JSON can hold."""
        return dataclasses.asdict(self)


class GenerativeModel(Protocol):
    """What the lab asks of a model: of its own (`Model`), or of a pipeline
    (`kdpp.checkpoints.models.PipelineModel`).

    Attributes:
        network: whose calls are its evaluations.
        shape: of one sample, an image or a latent.
        classes: how many classes or prompts there are to draw; a label is the number of one.
        bounds: (low, high) of the samples that are images; None for latents.
        sampler: the solver that it was made for, by its name in `kdpp.SOLVERS`.
        levels: the sigmas that it was made for; None: any.
        cond_scale: the CFG scale to sample it with.
        guidance: the teacher's CFG scale that it is meant to reach without one; None: unknown.
        guidance_range: the least and most CFG scale, where that is an input; None: it is none.
        method: how it was made, in a word.
        parameters: how many numbers the network has.
        device: where it is.
    """

    @property
    def network(self) -> nn.Module: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def classes(self) -> int: ...
    @property
    def bounds(self) -> tuple[float, float] | None: ...
    @property
    def sampler(self) -> str: ...
    @property
    def levels(self) -> tuple[float, ...] | None: ...
    @property
    def cond_scale(self) -> float: ...
    @property
    def guidance(self) -> float | None: ...
    @property
    def guidance_range(self) -> tuple[float, float] | None: ...
    @property
    def method(self) -> str: ...
    @property
    def parameters(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def levels_for(self, steps: int | None = None) -> tuple[float, ...]:
        """The levels to sample it on in so many steps; None: those it was made for."""

    def denoiser_for(self, steps: int) -> nn.Module:
        """Its denoiser for a run of so many steps."""

    def conditions(self, labels: Tensor) -> dict[str, Any]:
        """``{"cond": …, "uncond": …}`` for int64 labels (B,), on its device."""

    def digest(self) -> str:
        """A digest of the weights, of what is known of them, and of the device's type."""


class _StepConditioned(nn.Module):
    """A denoiser that is told how many steps there are."""

    def __init__(self, denoiser: nn.Module, steps: int) -> None:
        super().__init__()
        self.inner_model = denoiser
        self.steps = float(steps)

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        steps = x.new_full(x.shape[:1], self.steps)
        denoised: Tensor = self.inner_model(x, sigma, steps=steps, **extra_args)
        return denoised


@dataclass(frozen=True)
class Model:
    """A trained network, ready to sample with, and what is known of it.

    Attributes:
        denoiser: VE, ``(x (B, *shape), sigma (B,), cond=labels int64 (B,), **conditions) -> D``;
            a label equal to ``classes`` stands for none. It has ``sigma_min``, ``sigma_max`` and
            ``sigma_to_t``.
        network: the network inside it; it predicts v. Frozen, in evaluation mode.
        card: how it is sampled, and how it was made.
    """

    denoiser: nn.Module
    network: VNetwork
    card: ModelCard

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return self.card.data.shape

    @property
    def classes(self) -> int:
        """How many classes there are; as a label, "no label"."""
        return self.card.data.classes

    @property
    def sampler(self) -> str:
        """The solver that it was made for, by its name in `kdpp.SOLVERS`.

        Raises ValueError for an encoder, which samples nothing.
        """
        if self.card.sampler == "encode":
            raise ValueError(
                "the model is an encoder, from images to noise (kdpp.encode); give one that samples"
            )
        return self.card.sampler

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The sigmas that it was trained on, the last one 0; None: any."""
        return self.card.levels

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The least and most CFG scale, where the network takes its guidance as an input.

        Such a network takes the scale minus one: sample it through
        ``kdpp.GuidanceConditioned(model.denoiser)``. None: it takes none.
        """
        if CFG_MINUS_ONE not in self.card.conditions:
            return None
        low, high = self.card.conditions[CFG_MINUS_ONE]
        return low + 1.0, high + 1.0

    @property
    def cond_scale(self) -> float:
        """1: no CFG."""
        return 1.0

    @property
    def method(self) -> str:
        """By which it was trained."""
        return self.card.method

    @property
    def guidance(self) -> float | None:
        """The CFG scale that it has built in; None: none."""
        return self.card.guidance

    @property
    def bounds(self) -> tuple[float, float] | None:
        """(-1, 1) for pictures; None for latents that leave this range."""
        return (-1.0, 1.0) if self.card.data.bounded else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def levels_for(self, steps: int | None = None) -> tuple[float, ...]:
        """The levels that it was trained on if they make ``steps`` steps, else the schedule's.

        Without ``steps``: its own, or for a model of any levels 4 steps, 50 for a teacher. The
        schedule is `kdpp.lab.schedules.schedule`.
        """
        own = self.levels
        if own is not None and steps in (None, len(own) - 1):
            return own
        if steps is None:
            steps = 50 if self.card.method == "teacher" else 4
        return schedule(check_count("steps", steps, 1))

    def denoiser_for(self, steps: int) -> nn.Module:
        """Its denoiser for a run of so many steps.

        A network that takes their number gets it, one that takes w gets the CFG scale minus 1
        (`kdpp.GuidanceConditioned`). Raises ValueError where it takes something else.
        """
        conditions, denoiser = set(self.card.conditions), self.denoiser
        if conditions - {CFG_MINUS_ONE, "steps"}:
            raise ValueError(
                f"the network of method {self.card.method!r} takes {sorted(conditions)}; samplers "
                "know w and steps only"
            )
        if "steps" in conditions:
            denoiser = _StepConditioned(denoiser, steps)
        return GuidanceConditioned(denoiser) if self.guidance_range else denoiser

    def conditions(self, labels: Tensor) -> dict[str, Any]:
        """``cond``: the labels; ``uncond``: "no label"."""
        cond = labels.to(self.device)
        return {"cond": cond, "uncond": torch.full_like(cond, self.classes)}

    def digest(self) -> str:
        """Of the weights, of what is known of them, and of the device that they are on."""
        tensors = self.network.state_dict()
        contents = (value.cpu().contiguous().flatten() for value in tensors.values())
        return digest([
            json.dumps(self.card.to_json(), sort_keys=True),
            self.device.type,
            list(tensors), *(content.view(torch.uint8).numpy().tobytes() for content in contents),
        ])  # fmt: skip

    def with_cfg(self, labels: Tensor, scale: Tensor | float) -> Denoiser:
        """``(x, σ) -> D_∅ + scale·(D_c - D_∅)`` for these labels, see `kdpp.lab.diffusion.cfg`."""
        return cfg(self.denoiser, labels, self.classes, scale)

    @property
    def parameters(self) -> int:
        """How many numbers the network has."""
        return sum(p.numel() for p in self.network.parameters())


def save_model(
    path: str | Path, network: nn.Module, card: ModelCard, dtype: torch.dtype = torch.float32
) -> None:
    """Write the network's weights and its card as JSON metadata: whole or not at all.

    Raises ValueError for weights that are not finite in ``dtype``, OSError where they cannot be
    written.
    """
    write_weights(path, network, dtype, KEY, card.to_json())


def load_model(name: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model of a checkpoint file, of a run's folder, or one that ships with kdpp.

    Args:
        name: a file, a folder with a ``model.safetensors``, "digits:teacher" or "digits:student".

    Torch's global random stream is left as it was.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown shipped model; a damaged file, or one of something else: the message
            names the entry or the tensor that is wrong.
    """
    network, card = read_checkpoint(name)
    if not isinstance(network, VNetwork):
        raise ValueError(f"{name} is a classifier, which makes no images; give a model that does")
    network = network.to(device).eval().requires_grad_(False)
    return Model(VEDenoiser(network).to(device), network, card)


def load_classifier(name: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """The classifier of a checkpoint file, of a run's folder, or "digits:classifier".

    It is frozen, in evaluation mode. Raises as `load_model`.
    """
    network, card = read_checkpoint(name)
    if not isinstance(network, Classifier):
        raise ValueError(f"{name} is no classifier: its method is {card.method!r}")
    return network.to(device).eval().requires_grad_(False)


def read_checkpoint(name: str | Path) -> tuple[Network, ModelCard]:
    """The network of a checkpoint and what is known of it; names and errors as in `load_model`."""
    if str(name).startswith("digits:"):
        if name not in SHIPPED:
            raise ValueError(unknown("model", name, SHIPPED))
        path = WEIGHTS / f"{str(name).removeprefix('digits:')}.safetensors"
    else:
        path = Path(name)
    if path.is_dir():
        if not (path / FILE).is_file():
            raise FileNotFoundError(f"no {FILE} in {path}; is its training finished?")
        path = path / FILE
    about, tensors = read_weights(path, KEY, WHAT)
    try:
        for entry in dataclasses.fields(Usage):
            if entry.name not in about:
                raise ValueError(f"{entry.name} is missing")
        card = from_json(ModelCard, about)
        with torch.random.fork_rng(devices=[]):
            network = _build(card)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a {WHAT}: {error}") from error
    fill_network(path, WHAT, network, tensors)
    return network, card


def _build(card: ModelCard) -> Network:
    # Earlier files leave out what the digits' networks have.
    sizes = {"shape": list(card.data.shape), "classes": card.data.classes, **card.network}
    if sizes.get("kind") == "classifier":
        return Classifier(**{name: size for name, size in sizes.items() if name != "kind"})
    return build({"conditions": list(card.conditions), **sizes})
