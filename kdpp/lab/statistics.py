"""What images are compared with, and ``kdpp statistics``, which keeps it as a file.

A file of statistics holds features, not images: whoever has it needs no data, and everyone who has
it compares with the same numbers. It says which network made them and what that was given of an
image, and features that are made in another way are refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import kdpp
from kdpp.lab.console import say
from kdpp.lab.data import Data, load_data, load_pictures
from kdpp.lab.features import Features, Floats, load_features, load_picture_features
from kdpp.lab.files import make_folder, write_atomically
from kdpp.lab.metrics import Points, compared, describe

__all__ = [
    "Against",
    "about",
    "add_arguments",
    "load_both",
    "of_data",
    "of_pictures",
    "read",
    "run",
    "write",
]

KEY = "kdpp.statistics"


@dataclass(frozen=True)
class Against:
    """Features of real images, and what is to be known of them.

    Attributes:
        points: what samples are compared with.
        training: as many training images, where the points are of unseen ones; else None.
        labels: the classes of the points.
        part: "test", "training" or "given": whether networks were trained on them is not known.
        source: where they come from.
        shape, classes: of the images; () and 0 for pictures of any size.
    """

    points: Points
    training: Points | None
    labels: torch.Tensor
    part: str
    source: str
    shape: tuple[int, ...] = ()
    classes: int = 0

    def real(self, space: Features, images: int) -> tuple[dict[str, float], int]:
        """The metrics of real images themselves, and how many they are.

        Unseen images are compared with the training images, ``images`` of these or as many as there
        are: what a sampler that draws perfectly would have.
        """
        figures = describe(self.points, self.labels, space)
        if self.training is None:
            return figures, len(self.points.rows)
        rows = self.training.rows[:images]
        return compared(Points(rows), self.points) | figures, len(rows)

    @property
    def about(self) -> dict[str, Any]:
        """For a report."""
        return {"source": self.source, "part": self.part, "images": len(self.points.rows)}


def load_both(source: str, test: str = "") -> Data:
    """The data of `load_data`, with the images of another source as their test images.

    Raises as `load_data`, and ValueError where the two are not of one kind.
    """
    data = load_data(source)
    if not test:
        return data
    unseen = load_data(test)
    ours, theirs = ((list(one.shape), one.bounded) for one in (data, unseen))
    if ours != theirs or unseen.classes > data.classes:
        raise ValueError(
            f"{test} holds images of shape {theirs[0]} and {unseen.classes} classes, {source} of "
            f"{ours[0]} and {data.classes}; test images must be like the others"
        )
    return replace(data, test=replace(unseen, classes=data.classes))


def of_data(data: Data, space: Features) -> Against:
    """The test images of the data if there are any, else all of them."""
    seen = data.test or data
    points = Points(space(seen.images))
    training = None
    if data.test is not None:
        order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
        training = Points(space(data.images[order[: len(points.rows)]]))
    return Against(
        points, training, seen.labels, "test" if data.test else "training", data.source,
        data.shape, data.classes,
    )  # fmt: skip


def of_pictures(folder: str, space: Features) -> Against:
    """All pictures in a folder, see `load_pictures`."""
    rows = [torch.from_numpy(space(picture)) for picture in load_pictures(folder)]
    points = Points(torch.cat(rows).numpy())
    return Against(points, None, torch.arange(len(points.rows)), "given", folder)


# Files --------------------------------------------------------------------------------------------


def write(path: Path, against: Against, space: Features) -> None:
    """Keep it, whole or not at all; OSError where it cannot be written."""
    rows = {"features": against.points.rows, "labels": against.labels.numpy()}
    if against.training is not None:
        rows["training"] = against.training.rows
    about = {
        **space.about, "limits": space.limits, "source": against.source, "part": against.part,
        "shape": against.shape, "classes": against.classes, "kdpp": kdpp.__version__,
    }  # fmt: skip
    tensors = {name: torch.from_numpy(value).contiguous() for name, value in rows.items()}
    write_atomically(path, save(tensors, {KEY: json.dumps(about)}))


def about(path: Path) -> dict[str, Any]:
    """What a file of statistics says of itself; ValueError where it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no statistics at {path}; kdpp statistics makes them")
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})[KEY])
        found["shape"], found["limits"] = tuple(found["shape"]), tuple(found["limits"])
        return found
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of kdpp statistics ({error})") from error


def read(path: Path, space: Features) -> Against:
    """What the file holds; ValueError for features that were made in another way than ours."""
    said = about(path)
    for name, ours in space.about.items():
        if said.get(name) != ours:
            raise ValueError(
                f"{path} was made with {name} {said.get(name)!r}, and here they are {ours!r}; take "
                "the same, or make the statistics anew (kdpp statistics)"
            )
    with safe_open(path, "pt") as file:
        rows: dict[str, Floats] = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
    wide = space(torch.zeros(1, *(said["shape"] or (3, 8, 8)))).shape[1]
    if rows["features"].shape[1:] != (wide,):
        raise ValueError(
            f"{path} holds features of shape {list(rows['features'].shape)}; those of {space.name} "
            f"are {wide} wide"
        )
    training = Points(rows["training"]) if "training" in rows else None
    return Against(
        Points(rows["features"]), training, torch.from_numpy(rows["labels"]),
        said["part"], said["source"], said["shape"], said["classes"],
    )  # fmt: skip


# The command --------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Keep the features of real images as a file, for `statistics` of a spec and `--statistics` "
        "of kdpp evaluate: then everyone compares with the same numbers, and needs no data."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="digits, a folder of images, or an array file")
    what.add_argument("--pictures", help="a folder of pictures of any sizes, for pipelines")
    parser.add_argument("--test", default="", help="images like --data that no network was trained "
                        "on (default: the data's own, if there are any)")  # fmt: skip
    parser.add_argument("--features", required=True, help="digits, classifier:RUN, pixels, "
                        "inception:FILE, clip:FOLDER or timm:FOLDER")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="the file, NAME.safetensors")


def run(arguments: argparse.Namespace) -> None:
    """Write the file; raises as `load_data` and `load_features`, before any work."""
    if arguments.pictures:
        space = load_picture_features(arguments.features)
        found = of_pictures(arguments.pictures, space)
    else:
        data = load_both(arguments.data, arguments.test)
        space = load_features(arguments.features, data.images, data.classes)
        found = of_data(data, space)
    make_folder(arguments.out.parent)
    write(arguments.out, found, space)
    count, width = found.points.rows.shape
    say(f"wrote {arguments.out}: {count:,} {found.part} images, {width} features each")


def images_of(shape: Sequence[int], limits: Sequence[float]) -> torch.Tensor:
    """Two images of this shape, all low and all high: what features need to know of the data."""
    return torch.tensor(limits).view(2, *[1] * len(shape)).expand(2, *shape)
