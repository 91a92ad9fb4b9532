"""Sheets: pictures side by side, each with a title, as one PNG file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Tile", "sheet"]

LEAST, MARGIN, LINE = 200, 16, 20
"""Pixels: a tile's side at least, what is around it, and the height of a line of its title."""


class Tile(NamedTuple):
    """A picture's file and two lines over it."""

    path: Path
    title: str
    note: str


def sheet(tiles: Sequence[Tile], columns: int) -> bytes:
    """The pictures, all of one size, line by line; small ones enlarged by whole factors."""
    from PIL import Image, ImageDraw, ImageFont

    pictures = []
    for tile in tiles:
        with Image.open(tile.path) as image:
            pictures.append(image.convert("RGB"))
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
