"""The demo's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdpp.digits.data import CLASSES
from kdpp.digits.metrics import as_viewed
from kdpp.digits.ways import Way

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("the pictures need matplotlib: pip install 'kdpp[lab]'") from error

LINES = 5
"""Images of each digit in a grid."""
ACROSS = 2
"""Grids in a line."""


def draw_grids(ways: Sequence[Way], real: Tensor, labels: Tensor, seed: int, path: Path) -> None:
    """Real images, and the ways' samples from the same noise, side by side."""
    first = torch.stack([real[labels == digit][:LINES] for digit in range(CLASSES)], 1)
    grids = {"the data": first.flatten(0, 1)}
    for way in ways:
        name = way.name.replace("  +", "student, 4 steps +")
        grids[name], _ = way.run(seed, LINES * CLASSES)
    lines = -(-len(grids) // ACROSS)
    figure = Figure(figsize=(3.7 * ACROSS, 2.1 * lines), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(lines, ACROSS).flat, grids.items()):
        _show(axes, _mosaic(images, LINES), name)
    figure.savefig(path, dpi=150)


def draw_guided_step(way: Way, seed: int, path: Path) -> None:
    """The first guided step from the inside: the four images that the callback is given."""
    seen: dict[str, Any] = {}

    def keep(info: dict[str, Any]) -> None:
        if "renoised" in info:
            seen.update(info)

    way.run(seed, CLASSES, keep)
    sigma = way.sigmas[1]
    scale = way.model.teachers[0].scale
    assert isinstance(scale, float)
    shown = {
        f"the student's estimate x̂ (σ = {way.sigmas[0]:.1f})": seen["denoised_student"],
        # Scaled to unit variance, or the noise would leave the range of the picture.
        f"noised again, x̂ + {sigma:.2f} ε": seen["renoised"] / (1 + sigma**2) ** 0.5,
        "the teacher's estimate from that": seen["denoised_teacher"],
        f"revised: {1 - scale:g} student + {scale:g} teacher": seen["denoised_revised"],
    }
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(len(shown), 1), shown.items()):
        _show(axes, _mosaic(images, 1), title)
    figure.savefig(path, dpi=150)


def _mosaic(images: Tensor, lines: int) -> Tensor:
    """Images (N, 1, 8, 8) as one, ``lines`` of N / lines, a dark pixel between them."""
    tiles = as_viewed(images).view(lines, -1, *images.shape[-2:])
    tiles = torch.nn.functional.pad(tiles, (0, 1, 0, 1), value=-1)
    return tiles.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)


def _show(axes: Any, image: Tensor, title: str) -> None:
    axes.imshow(image.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
