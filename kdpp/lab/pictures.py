"""Grids of images as PNG files, for people to look at. They need Pillow.

A column of a grid shows one class, where there are ten classes or fewer. The grids of one set of
data are all alike: image k is of class k mod classes, whether it is a sample or a real one.
"""

from __future__ import annotations

import io
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from kdpp.lab.data import Data

__all__ = ["drawable", "grid", "real_images", "square", "together"]

COLUMNS, LINES = 10, 5
"""The most of a grid."""
SMALL, LARGE, HEIGHT = 24, 96, 200
"""Pixels: smaller images are enlarged, larger ones shrunk; a grid is about so high at most."""
GAP, GREY = 2, 40
"""Between two images: how many pixels, and their colour."""
WIDTH, MARGIN, TITLE = 1200, 16, 24
"""Of a picture of several grids: its width at most, and what is around each grid and above it."""


def drawable(data: Data) -> bool:
    """Whether the data are pictures: [1 or 3, height, width] in [-1, 1]."""
    return data.bounded and len(data.shape) == 3 and data.shape[0] in (1, 3)


def real_images(data: Data) -> Tensor:
    """As many of the data as a grid shows, of the classes that the samples of a grid have."""
    members = [(data.labels == label).nonzero()[:, 0] for label in range(data.classes)]
    members = [places for places in members if len(places)]
    count = min(COLUMNS * LINES, len(data.images))
    chosen = [members[k % len(members)] for k in range(count)]
    places = [own[k // len(members) % len(own)] for k, own in enumerate(chosen)]
    return data.images[torch.stack(places)]


def grid(images: Tensor, classes: int) -> str:
    """The first images (N, 1 or 3, h, w) in [-1, 1] as a PNG file, in base64.

    The columns are as many classes as there are, or a multiple of that, ten at most.
    """
    tiles = images[: COLUMNS * LINES].float().clamp(-1, 1)
    longest = max(tiles.shape[2:])
    if longest > LARGE:
        size = [max(round(side * LARGE / longest), 1) for side in tiles.shape[2:]]
        tiles = interpolate(tiles, size, mode="bilinear", antialias=True).clamp(-1, 1)
    zoom = max(SMALL // tiles.shape[2], 1)
    pixels = tiles.add(1).mul(127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    columns = min(COLUMNS // classes * classes or COLUMNS, len(pixels))
    lines = min(LINES, max(HEIGHT // pixels.shape[2], 1), len(pixels) // columns)
    pixels = pad(pixels[: lines * columns], (0, GAP, 0, GAP), value=GREY)
    pixels = pixels.view(lines, columns, *pixels.shape[1:]).permute(0, 3, 1, 4, 2)
    whole = pixels.flatten(2, 3).flatten(0, 1)[:-GAP, :-GAP].squeeze(-1)
    return b64encode(_png(_pillow().fromarray(whole.numpy()))).decode()


def square(images: Tensor) -> Tensor:
    """The middle of each image (N, C, h, w), as squares of the size of a grid's."""
    side = min(images.shape[2:])
    top, left = ((length - side) // 2 for length in images.shape[2:])
    middle = images[:, :, top : top + side, left : left + side].float().cpu()
    return interpolate(middle, LARGE, mode="bilinear", antialias=True)


def together(grids: Mapping[str, str]) -> bytes:
    """Grids of one size, as `grid` makes them, under their titles, as a PNG file."""
    pillow = _pillow()
    from PIL import ImageDraw, ImageFont

    opened = [pillow.open(io.BytesIO(b64decode(content))) for content in grids.values()]
    zoom = max(WIDTH // 2 // opened[0].width, 1)
    width, height = zoom * opened[0].width, zoom * opened[0].height
    columns = min(max(WIDTH // width, 1), len(opened))
    lines = -(-len(opened) // columns)
    across, down = width + MARGIN, height + TITLE + MARGIN
    whole = pillow.new("RGB", (columns * across + MARGIN, lines * down + MARGIN), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(TITLE - 6)
    for k, (title, picture) in enumerate(zip(grids, opened)):
        left, top = MARGIN + k % columns * across, MARGIN + k // columns * down
        pen.text((left, top - 4), title, "black", font)
        whole.paste(picture.resize((width, height), 0), (left, top + TITLE))
    return _png(whole)


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def _pillow() -> Any:
    """Pillow's Image; ImportError says what to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('pictures need Pillow: pip install "kdpp[lab]"') from error
    return Image
