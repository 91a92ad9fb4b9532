"""Sheets: pictures side by side, each with a title, as one PNG file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Tile", "sheet"]

LEAST, MARGIN, LINE = 200, 16, 20
"""Pixels: a tile's side at least, what is around it, and the height of a line of its title."""


class Tile(NamedTuple):
    """A picture or some frames of a video, and two lines over it.

    Each is a file, or uint8 (height, width, 1 or 3).
    """

    pictures: Sequence[Path | Tensor]
    title: str
    note: str


def sheet(tiles: Sequence[Tile], columns: int) -> bytes:
    """The pictures, all of one size, line by line; small ones enlarged by whole factors."""
    from PIL import Image, ImageDraw, ImageFont

    pictures = [_joined([_image(one) for one in tile.pictures]) for tile in tiles]
    width, height = pictures[0].size
    zoom = max(-(-LEAST // width), 1)
    width, height = zoom * width, zoom * height
    across, down = width + MARGIN, height + 2 * LINE + MARGIN
    lines = -(-len(tiles) // columns)
    whole = Image.new("RGB", (columns * across + MARGIN, lines * down + MARGIN), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(14)
    for k, (tile, picture) in enumerate(zip(tiles, pictures)):
        left, top = MARGIN + k % columns * across, MARGIN + k // columns * down
        pen.text((left, top), tile.title, "black", font)
        pen.text((left, top + LINE - 2), tile.note, "dimgrey", font)
        small = picture.resize((width, height), Image.Resampling.NEAREST)
        whole.paste(small, (left, top + 2 * LINE))
    file = io.BytesIO()
    whole.save(file, "png")
    return file.getvalue()


def _joined(images: Sequence[Any]) -> Any:
    """Images of one size side by side."""
    from PIL import Image

    width, height = images[0].size
    whole = Image.new("RGB", (width * len(images), height))
    for k, image in enumerate(images):
        whole.paste(image, (k * width, 0))
    return whole


def _image(picture: Path | Tensor) -> Any:
    from PIL import Image

    if isinstance(picture, Tensor):
        return Image.fromarray(picture.squeeze(-1).numpy()).convert("RGB")
    with Image.open(picture) as image:
        return image.convert("RGB")
