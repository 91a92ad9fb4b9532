"""Maps from images to vectors, in which sets of images are compared (`kdpp.lab.metrics`).

Images are clamped to the data's range first, as a viewer sees them: pixels outside it move the
Fréchet distance more than most samplers do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpp.lab.files import digest
from kdpp.lab.models import load_classifier
from kdpp.lab.plugins import load_function

__all__ = [
    "NETWORKS",
    "PLACED",
    "Features",
    "Floats",
    "data_range",
    "load_features",
    "load_picture_features",
]

Floats = NDArray[np.float64]
BATCH = 100  # images that a feature network is given at a time


@dataclass(frozen=True)
class Features:
    """A map from images to vectors in which sets of images are compared.

    ``extract`` maps ``images [n, *shape]``, clamped to ``limits``, to [n, D]; ``classify``, where
    there are classes, such vectors to logits [n, C]. ``labelled``: those classes are the data's
    labels. ``weights`` is a digest of the network, ``preparation`` what it is given of an image.
    """

    name: str
    extract: Callable[[Tensor], Tensor]
    limits: tuple[float, float]
    classify: Callable[[Tensor], Tensor] | None = None
    labelled: bool = False
    weights: str = ""
    preparation: str = "as it is"

    @property
    def about(self) -> dict[str, str]:
        """All that the vectors of an image depend on, wherever the network's files lie."""
        low, high = self.limits
        kind = self.name.partition(":")[0]
        return {
            "features": kind if kind in PLACED else Path(self.name).name,
            "weights": self.weights,
            "preparation": f"clamped to [{low:g}, {high:g}], {self.preparation}",
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Floats:
        """The images' features, float64 [N, D]; ValueError where an image is not finite."""
        if not bool(images.isfinite().all()):
            raise ValueError("images must be finite, got NaN or infinite pixels")
        parts = [self.extract(part) for part in torch.split(images.clamp(*self.limits), BATCH)]
        return torch.cat(parts).double().numpy(force=True)

    @torch.no_grad()
    def probabilities(self, features: Floats) -> Floats | None:
        """Class probabilities, float64 [N, C]; None for features without classes."""
        if self.classify is None:
            return None
        logits = self.classify(torch.from_numpy(features).float())
        return logits.double().softmax(1).numpy(force=True)


def data_range(images: Tensor) -> tuple[float, float]:
    """What images are clamped to: [-1, 1] for pixels, the extremes of latents that leave it."""
    low, high = float(images.min()), float(images.max())
    return (-1.0, 1.0) if low >= -1.0 and high <= 1.0 else (low, high)


def load_features(name: str, images: Tensor, classes: int) -> Features:
    """The features of this name, for data ``images [N, *shape]`` of so many classes.

    - "digits": the last hidden layer of the classifier that ships with kdpp, 64 wide.
    - "classifier:RUN": the same of another one, which `kdpp train classifier` has made of the data.
    - "pixels": the pixels themselves, or latents.
    - "inception:FILE": FID's Inception-v3, 2048 wide, as torch-fidelity has it. FILE holds
      torch-fidelity's weights as safetensors.
    - "clip:FOLDER": the image embedding of a CLIP model, as transformers has it. FOLDER holds
      config.json and model.safetensors.
    - "timm:FOLDER": what the last layer of a network of timm is given: of one for ImageNet, DINOv2
      …. FOLDER holds config.json and model.safetensors, as timm publishes them.

    Nothing is downloaded. Raises ValueError for another name, for data that the features are not
    made for and for files that hold something else, FileNotFoundError where there is no file,
    ImportError where a package is missing.
    """
    limits, shape = data_range(images), tuple(images.shape[1:])
    kind, _, place = name.partition(":")
    if name == "pixels":
        return Features(name, lambda images: images.flatten(1), limits)
    if name == "digits" or (kind == "classifier" and place):
        network = load_classifier(place or "digits:classifier")
        if (shape, classes) != (network.shape, network.classes) or limits != (-1.0, 1.0):
            raise ValueError(
                f"features {name!r} are made for images {list(network.shape)} in [-1, 1] of "
                f"{network.classes} classes; the data have shape {list(shape)} in "
                f"[{limits[0]:g}, {limits[1]:g}] and {classes} classes: take 'pixels' …"
            )
        weights = digest(value.numpy().tobytes() for value in network.state_dict().values())
        return Features(
            name, network.features, limits, network.head, labelled=True, weights=weights
        )
    if kind in NETWORKS and place:
        if limits != (-1.0, 1.0) or len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(
                f"features {name!r} take pictures, [1 or 3, height, width] in [-1, 1]; the data "
                f"have shape {list(shape)} in [{limits[0]:g}, {limits[1]:g}]: take 'pixels'"
            )
        return NETWORKS[kind](name, Path(place))
    allowed = (
        "'digits', 'classifier:RUN', 'pixels', 'inception:FILE.safetensors', 'clip:FOLDER' or "
        "'timm:FOLDER'"
    )
    raise ValueError(f"features is {name!r}; it must be {allowed}")


def load_picture_features(name: str) -> Features:
    """Features of pictures (n, 3, h, w) in [-1, 1]: a network of `load_features`, or one's own.

    "module:function" or "FILE.py:function" names a function of pictures in [0, 1] that gives
    vectors, (n, D). Raises as `load_features` and `kdpp.lab.plugins.load_function`.
    """
    kind, _, place = name.partition(":")
    if kind in NETWORKS and place:
        return NETWORKS[kind](name, Path(place))
    function = load_function(name)

    def extract(images: Tensor) -> Tensor:
        return torch.as_tensor(function(images.add(1.0).div(2.0)))

    weights = digest([Path(kind).read_bytes()]) if kind.endswith(".py") else ""
    return Features(name, extract, (-1.0, 1.0), weights=weights)


def _content(path: Path) -> str:
    """A digest of the files that a network is read from."""
    paths = sorted(path.iterdir()) if path.is_dir() else [path]
    return digest(path.read_bytes() for path in paths if path.is_file())


def _inception(name: str, path: Path) -> Features:
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as source
    except ImportError as error:
        raise ImportError(
            "Inception features need torch-fidelity: pip install torch-fidelity"
        ) from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"no Inception weights at {path}")
    try:
        tensors = load_file(path)
        # Its constructor would download weights or unpickle them; it gets these in their place.
        with patch.object(source, "load_state_dict_from_url", lambda *_, **__: tensors):
            network = source.FeatureExtractorInceptionV3("inception", ["2048"])
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not hold torch-fidelity's Inception-v3 as safetensors: {error}"
        ) from error

    def extract(images: Tensor) -> Tensor:
        pixels = ((images + 1.0) * 127.5).round().to(torch.uint8)
        features: Tensor = network(pixels.expand(-1, 3, -1, -1))[0]
        return features

    def classify(features: Tensor) -> Tensor:  # without the bias, as for every inception score
        return torch.nn.functional.linear(features, network.fc.weight)

    prepared = "8 bits, resized to 299 as TensorFlow 1 does"
    return Features(
        name, extract, (-1.0, 1.0), classify, weights=_content(path), preparation=prepared
    )


def _clip(name: str, path: Path) -> Features:
    try:
        from transformers import CLIPVisionModelWithProjection
        from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    except ImportError as error:
        raise ImportError("CLIP features need transformers: pip install transformers") from error
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no CLIP model in {path}: it must hold config.json")
    try:
        network: Any = CLIPVisionModelWithProjection.from_pretrained(
            path, local_files_only=True, use_safetensors=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold a CLIP image model: {error}") from error
    network.eval().requires_grad_(False)
    side = network.config.image_size
    prepare, prepared = _prepared((side, side), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

    def extract(images: Tensor) -> Tensor:
        features: Tensor = network(prepare(images)).image_embeds
        return features

    return Features(name, extract, (-1.0, 1.0), weights=_content(path), preparation=prepared)


def _timm(name: str, path: Path) -> Features:
    try:
        import timm
    except ImportError as error:
        raise ImportError("features of timm need it: pip install timm") from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no network of timm in {path}: it must hold config.json")
    try:
        config = json.loads((path / "config.json").read_bytes())
        network: Any = timm.create_model(config["architecture"])
        network.load_state_dict(load_file(path / "model.safetensors"))
        given = {**network.pretrained_cfg, **config.get("pretrained_cfg", {})}
        size, mean, deviation = (given[key] for key in ("input_size", "mean", "std"))
    except (OSError, RuntimeError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold a network of timm: {error}") from error
    network.eval().requires_grad_(False)
    prepare, prepared = _prepared(size[1:], mean, deviation)

    def extract(images: Tensor) -> Tensor:
        states = network.forward_features(prepare(images))
        features: Tensor = network.forward_head(states, pre_logits=True)
        return features

    head = network.get_classifier()
    classify = head if isinstance(head, nn.Linear) else None
    return Features(
        name, extract, (-1.0, 1.0), classify, weights=_content(path), preparation=prepared
    )


def _prepared(
    size: Sequence[int], mean: Sequence[float], deviation: Sequence[float]
) -> tuple[Callable[[Tensor], Tensor], str]:
    """What makes a network's input of images in [-1, 1], and what it does, in words.

    The whole image is resized, nothing is cropped.
    """
    means, deviations = (torch.tensor(values).view(3, 1, 1) for values in (mean, deviation))

    def prepare(images: Tensor) -> Tensor:
        pixels = (images.float().expand(-1, 3, -1, -1) + 1.0) / 2.0
        resized = torch.nn.functional.interpolate(
            pixels, size=tuple(size), mode="bicubic", antialias=True
        )
        return (resized.clamp(0.0, 1.0) - means.to(images)) / deviations.to(images)

    numbers = [", ".join(f"{value:.6g}" for value in values) for values in (mean, deviation)]
    said = (
        f"resized to {size[0]} × {size[1]} (bicubic, antialiased), mean {numbers[0]}, "
        f"deviation {numbers[1]}"
    )
    return prepare, said


NETWORKS: dict[str, Callable[[str, Path], Features]] = {
    "inception": _inception,
    "clip": _clip,
    "timm": _timm,
}
PLACED = frozenset({*NETWORKS, "classifier"})
"""Kinds of features that are read from a place, ``KIND:PLACE``."""
