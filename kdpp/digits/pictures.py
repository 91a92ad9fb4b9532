"""The demo's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdpp.digits.data import CLASSES
from kdpp.digits.metrics import as_viewed

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("the pictures need matplotlib: pip install 'kdpp[lab]'") from error

if TYPE_CHECKING:
    from kdpp.digits.demo import Row

LINES = 5
"""Images of each digit in a grid."""


def draw_grids(rows: Sequence[Row], seed: int, path: Path) -> Path:
    """The rows' samples side by side, three grids to a line, from the same noise."""
    lines = -(-len(rows) // 3)
    figure = Figure(figsize=(11, 2.1 * lines), layout="constrained")
    for axes, row in zip(figure.subplots(lines, 3).flat, rows):
        images, _ = row.run(seed, LINES * CLASSES)
        _show(axes, _mosaic(images, LINES), row.name.replace("  +", "student, 4 steps +"))
    figure.savefig(path, dpi=150)
    return path


def draw_guided_step(row: Row, seed: int, path: Path) -> Path:
    """The first guided step from the inside: the four images that the callback is given."""
    seen: dict[str, Any] = {}

    def keep(info: dict[str, Any]) -> None:
        if "renoised" in info:
            seen.update(info)

    row.run(seed, CLASSES, keep)
    sigma = row.sigmas[1]
    scale = row.model.teachers[0].scale
    assert isinstance(scale, float)
    shown = {
        f"the student's estimate x̂ (σ = {row.sigmas[0]:.1f})": seen["denoised_student"],
        # Scaled to unit variance, or the noise would leave the range of the picture.
        f"noised again, x̂ + {sigma:.2f} ε": seen["renoised"] / (1 + sigma**2) ** 0.5,
        "the teacher's estimate from that": seen["denoised_teacher"],
        f"revised: {1 - scale:g} student + {scale:g} teacher": seen["denoised_revised"],
    }
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(len(shown), 1), shown.items()):
        _show(axes, _mosaic(images, 1), title)
    figure.savefig(path, dpi=150)
    return path


def _mosaic(images: Tensor, lines: int) -> Tensor:
    """Images (N, 1, 8, 8) as one, ``lines`` of N / lines, a dark pixel between them."""
    tiles = as_viewed(images).view(lines, -1, *images.shape[-2:])
    tiles = torch.nn.functional.pad(tiles, (0, 1, 0, 1), value=-1)
    return tiles.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)


def _show(axes: Any, image: Tensor, title: str) -> None:
    axes.imshow(image.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
