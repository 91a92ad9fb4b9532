"""``kdpp generate --student MODEL --out DIR``: pictures, alone or with a teacher's help.

A picture depends on its seed and the request alone, whoever draws it beside which others: every
seed has streams of its own for the initial noise, the solver's and the renoise noise, and each
picture is a run of its own unless ``--batch`` says otherwise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from kdpp.checkpoints.flags import (
    add_settings,
    has_teacher,
    read_prompts,
    request_of,
    settings_of,
)
from kdpp.checkpoints.places import place_of, read_ahead
from kdpp.checkpoints.requests import GUIDES, Guide, Offload, Picture, Request, read_png

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments: the settings of a `Request`, and which pictures."""
    parser.description = (
        "Draw pictures of a student, with a teacher's help if one is named. The student is a "
        "safetensors file, a folder as diffusers saves it, or a checkpoint of the lab. A run that "
        "was stopped goes on where it was; under `accelerate launch` the processes share the "
        "pictures."
    )
    add_settings(parser)
    add = parser.add_argument_group("which pictures").add_argument
    add("--prompts", type=Path, metavar="FILE", help="a text file, a prompt in each line")
    add("--seed", metavar="SEEDS", help="7, 0-99 or [3, 5] (default: 0)")
    add("--like", type=Path, metavar="FILE.png", help="draw a picture of kdpp generate once more")
    add("--compare", action="store_true",
        help="draw each alone, with the teacher and with itself, and a sheet of them")  # fmt: skip
    add("--preview", action="store_true",
        help="beside each picture NAME-steps.png, what each step made of it")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FOLDER", help="for the pictures")
    add = parser.add_argument_group("this run").add_argument
    add("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    add("--batch", type=int, default=1, metavar="N",
        help="pictures in a run; more than 1 may change their last bits (default: 1)")  # fmt: skip
    add("--offload", choices=get_args(Offload), default="teacher",
        help="what leaves the device while it is not needed: nothing, the teacher, every model, "
        "every layer (sequential); on the CPU nothing is moved (default: teacher)")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Draw the pictures; with ``--compare`` a sheet, ``sheet.png``, too.

    Raises, before any picture is drawn, ImportError where a package is missing, OSError where a
    file cannot be read or the folder be made, ValueError for what does not fit together.
    """
    request, pictures, guide = wanted(arguments)
    if arguments.compare and not has_teacher(request):
        raise ValueError("--compare needs a teacher: --teacher MODEL, or --student-lora FILE")
    read_ahead(map(Path, request.places.values()))  # while torch and the models are loaded
    from kdpp.checkpoints.drawing import draw_folder  # torch, for which --help need not wait

    guides = tuple(GUIDES) if arguments.compare else (guide,)
    draw_folder(
        request, pictures, guides, arguments.out, arguments.device, arguments.batch,
        arguments.preview, arguments.offload,
    )  # fmt: skip


def wanted(arguments: argparse.Namespace) -> tuple[Request, list[Picture], Guide]:
    """The request, the pictures that are to be drawn, and by whose help."""
    given = settings_of(arguments)
    if arguments.like is not None:
        request, seed, guide = read_png(arguments.like)
        request = again(request, given)
        seeds = [seed] if arguments.seed is None else read_seeds(arguments.seed)
    else:
        request = request_of(given)
        guide = "teacher" if has_teacher(request) else "none"
        if guide == "none" and request.teacher_scale is not None:
            guide = "self"
        seeds = read_seeds(arguments.seed or "0")
    if not request.student:
        raise ValueError("which model? --student MODEL")
    prompts: dict[int | None, str | None] = {None: request.prompt}
    if arguments.prompts is not None:
        prompts = dict(enumerate(read_prompts(arguments.prompts)))
        request = replace(request, prompt=prompts[0])
    pictures = [
        Picture(seed, prompt, request.label, line)
        for line, prompt in prompts.items()
        for seed in seeds
    ]
    return request, pictures, guide


def again(request: Request, given: Mapping[str, Any]) -> Request:
    """A picture's request with other settings, and with the places of its models.

    They are those that are given, or where they were last read. With other settings than places
    it is another picture, which may have other models.
    """
    places = {
        role: place_of(request.digests.get(role, "")) or name
        for role, name in request.places.items()
    }
    request, changed = request.moved(places), dict(given)
    if given.keys() - {"student", "teacher", "components", "vae"}:
        changed["digests"] = {}
    if given.keys() & {"steps", "sigmas", "preset"}:  # they say the levels anew
        changed = {"steps": None, "sigmas": None, **changed}
    return replace(request, **changed)


def read_seeds(text: str) -> list[int]:
    """The seeds of ``7``, ``0-99`` or ``[3, 5]``; ValueError for anything else."""
    first, dash, last = text.partition("-")
    try:
        if dash:
            seeds = list(range(int(first), int(last) + 1))
        elif text.strip().startswith("["):
            seeds = [int(seed) for seed in json.loads(text)]
        else:
            seeds = [int(text)]
    except (ValueError, TypeError):
        seeds = []
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**63:
        raise ValueError(f"--seed is {text!r}; give 7, 0-99 or [3, 5], each below 2^63")
    return seeds
