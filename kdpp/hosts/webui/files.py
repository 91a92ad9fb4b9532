"""Whether a teacher's file fits the student's, from their headers: before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kdpp.checkpoints.files import CheckpointFacts, inspect

__all__ = ["check_files"]

LATENTS: Mapping[str, str] = {"SD 1.x": "SD", "SD 2.x": "SD", "SDXL refiner": "SDXL"}
"""Architectures over the latents of another's name."""


def check_files(student: str | Path, teacher: str | Path) -> None:
    """ValueError or FileNotFoundError where the teacher cannot be one for this student.

    The student is loaded already: where its file is not one that kdpp reads, nothing is compared.
    """
    theirs = model_in(teacher)
    try:
        own = inspect(student)
    except (OSError, ValueError):
        return
    if own.architecture is None or theirs.architecture is None:
        return
    if latents(own) != latents(theirs):
        raise ValueError(
            f"kdpp: the student is {own.architecture} and the teacher {theirs.architecture}, whose "
            "latents differ; take a teacher of the student's family"
        )


def model_in(path: str | Path) -> CheckpointFacts:
    """What a teacher's file is; an error unless it holds a model."""
    try:
        facts = inspect(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"kdpp: the teacher's checkpoint: {error}") from error
    if facts.kind in ("LoRA", "VAE", "text encoder", "ControlNet", "embedding"):
        raise ValueError(f"kdpp: the teacher's checkpoint, {path}, is a {facts.kind}, not a model")
    return facts


def latents(facts: CheckpointFacts) -> str:
    """Which latents a model is over."""
    name = facts.architecture or ""
    return LATENTS.get(name, name)
