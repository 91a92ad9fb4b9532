"""The flags that a `Request` has, for the commands that take models."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from kdpp.checkpoints.requests import Request, Role
from kdpp.lab.settings import fill, read_option, read_value

__all__ = ["add_settings", "has_teacher", "read_prompts", "request_of", "settings_of"]

OWN = ("options", "digests", "loras")
"""The settings that have no flag of their name."""
ROLES: dict[str, tuple[Role, str]] = {
    "": ("both", "for student and teacher"),
    "student-": ("student", "for the student alone: its network without it is the teacher"),
    "teacher-": ("teacher", "for the teacher alone"),
}
"""Of the flags for LoRAs."""


GROUPS = {
    "the models": {
        "student": "MODEL", "teacher": "MODEL", "components": "MODEL", "vae": "MODEL",
        "prediction": "WHAT", "dtype": "TYPE",
    },
    "what to draw": {
        "prompt": "TEXT", "negative": "TEXT", "clip_skip": "N", "label": "N",
        "width": "PIXELS", "height": "PIXELS", "image": "FILE", "mask": "FILE",
        "strength": "SHARE", "frames": "N", "fps": "RATE", "tiling": "true",
    },
    "how the student samples": {
        "preset": "NAME", "sampler": "NAME", "steps": "N", "sigmas": "LEVELS",
        "cond_scale": "SCALE",
    },
    "how the teacher helps": {
        "teacher_scale": "SHARE", "teacher_steps": "STEPS", "teacher_cfg_scale": "SCALE",
        "renoise": "LEVEL", "renoise_eta": "SHARE", "extrapolate": "true",
    },
}  # fmt: skip
"""The settings that have a flag, as ``--help`` shows them."""


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str] | None = None) -> None:
    """Flags for these settings of a `Request`, or for all, for the sampler's and for LoRAs."""
    about = {entry.name: _help(entry) for entry in fields(Request) if entry.name not in OWN}
    for title, shown in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, metavar in shown.items():
            if names is None or name in names:
                flag = f"--{name.replace('_', '-')}"
                group.add_argument(flag, metavar=metavar, help=about[name])
        if title == "the models":
            for role in ROLES:
                group.add_argument(
                    f"--{role}lora", dest=f"{role}loras", action="append", default=[],
                    metavar="FILE[:WEIGHT]", help=f"a LoRA, {ROLES[role][1]}; may be repeated",
                )  # fmt: skip
        elif "sampler" in shown:
            group.add_argument(
                "--option", action="append", default=[], metavar="NAME=VALUE",
                help="of the sampler, such as eta=0.5; `kdpp solvers NAME` names them",
            )  # fmt: skip
        elif "width" in shown and (names is None or "width" in names):
            group.add_argument("--size", metavar="WxH", help="both at once: 832x480, or 512")


def _help(entry: Any) -> str:
    about = entry.metadata["help"]
    return about if entry.default is None or entry.default == "" else (
        f"{about} (default: {str(entry.default).lower()})"
    )  # fmt: skip


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the arguments name; ValueError for one that cannot be read."""
    given = {
        entry.name: read_value(Request, entry.name, text)
        for entry in fields(Request)
        if entry.name not in OWN and (text := getattr(arguments, entry.name, None)) is not None
    }
    loras = tuple(
        (*read_lora(text), role)
        for kind, (role, _) in ROLES.items()
        for text in getattr(arguments, f"{kind}loras")
    )
    if loras:
        given["loras"] = loras
    if (size := getattr(arguments, "size", None)) is not None:
        if given.keys() & {"width", "height"}:
            raise ValueError("--size says width and height; give one or the other")
        given |= read_size(size)
    if arguments.option:
        given["options"] = dict(map(read_option, arguments.option))
    if given.keys() >= {"steps", "sigmas"}:
        raise ValueError("--steps and --sigmas say the same; give one of them")
    return given


def request_of(given: dict[str, Any]) -> Request:
    """The request of these settings; ValueError for an unknown one, or a value that cannot be."""
    return replace(fill(Request, {**given, "loras": ()}), loras=given.get("loras", ()))


def has_teacher(request: Request) -> bool:
    """Whether somebody else than the student helps: a model, or its network with other LoRAs."""
    return request.teacher is not None or any(role != "both" for _, _, role in request.loras)


def read_size(text: str) -> dict[str, int]:
    """Width and height of ``832x480`` or ``512``."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise ValueError(f"--size is {text!r}; give 832x480, or 512 for a square")
    return {"width": int(sides[0]), "height": int(sides[-1])}


def read_lora(text: str) -> tuple[str, float | None]:
    """File and weight of ``FILE:0.8``; of ``FILE`` without a weight."""
    path, colon, weight = text.rpartition(":")
    with suppress(ValueError):
        if colon:
            return path, float(weight)
    return text, None


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one in each line; ValueError where it holds none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts
