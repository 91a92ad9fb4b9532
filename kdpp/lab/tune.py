"""``kdpp tune STUDENT TEACHER``: is guidance worth it for this pair, where, and how much?

The command. Which models are meant is `kdpp.lab.asked`'s, what it asks of them `kdpp.lab.tuning`'s.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from kdpp._version import __version__
from kdpp.checkpoints.flags import add_settings
from kdpp.lab.affordable import LAB, PIPELINES
from kdpp.lab.console import say
from kdpp.lab.files import locked, make_folder, write_atomically

__all__ = ["add_arguments", "run"]

SETTINGS = (
    "components", "prediction", "preset", "dtype", "negative", "width", "height", "frames",
    "sampler", "steps", "sigmas", "cond_scale", "teacher_cfg_scale",
)  # fmt: skip
"""Those of a `Request` that have a flag here, beside student, teacher and LoRAs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Say whether a teacher's guidance is worth it for a student, at which step, with which λ, "
        "σ_s and CFG scale; write tuning.json and tuning.png. The price is said first. A run that "
        "was stopped goes on where it was; under `accelerate launch` the processes share the work."
    )
    add = parser.add_argument
    for role in ("student", "teacher"):
        about = f"a safetensors file, a folder of diffusers, a lab checkpoint, or digits:{role}"
        place = parser.add_mutually_exclusive_group()
        place.add_argument(
            role, metavar=role.upper(), nargs="?", default=argparse.SUPPRESS, help=about
        )
        place.add_argument(f"--{role}", metavar="MODEL", help="the same, by name")
    add("--prompts", type=Path, metavar="FILE",
        help="what pipelines draw: a text file, a prompt in each line, one a sample")  # fmt: skip
    add_settings(parser, SETTINGS)
    add("--out", type=Path, required=True, help="folder for the two files")
    usual = "(default: {}; pipelines {})".format
    add("--samples", type=int, help=f"50 to 200 suffice {usual(LAB.samples, PIPELINES.samples)}")
    add("--detail", type=int,
        help=f"steps of the teacher's own run {usual(LAB.detail, PIPELINES.detail)}")  # fmt: skip
    add("--batch", type=int,
        help=f"samples that are worked on at a time {usual('half', PIPELINES.batch)}")  # fmt: skip
    add("--max-batch", type=int,
        help=f"rows of a network's call {usual('any', PIPELINES.max_batch)}")  # fmt: skip
    add("--seed", type=int, default=0, help="of all noise (default: 0)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")


RENAMED = {"--guidance": "--teacher-cfg-scale"}
"""Flags of earlier versions, and what they are now."""


def run(arguments: argparse.Namespace) -> None:
    """Tune, write ``tuning.json`` and ``tuning.png`` at the end, and then print the answer.

    Raises, before any work, ImportError where a package is missing, OSError where a file cannot be
    read or the folder be made, or another run writes to it, ValueError for what does not fit
    together.
    """
    import torch  # for which --help need not wait

    from kdpp.lab import processes
    from kdpp.lab.answer import draw, need_matplotlib
    from kdpp.lab.asked import Asked
    from kdpp.lab.pieces import Pieces

    need_matplotlib()
    rank, size = processes.share()
    with processes.single_thread():
        asked = Asked.by(arguments)
        make_folder(arguments.out)
        with locked(arguments.out) if rank == 0 else nullcontext():
            work = asked.work()
            if rank == 0:
                say(work.price(work.seconds(), size))
            folder = arguments.out / "parts" / asked.name
            tuning = work.run(Pieces(folder, rank, size), progress=rank == 0)
            if tuning is None:
                return
            command = asked.command(tuning)
            about = {
                "student": asked.request.student,
                "teacher": asked.request.teacher,
                "prompts": asked.prompts and str(asked.prompts),
                "kdpp": __version__,
                "torch": torch.__version__,
                "verdict": tuning.verdict,
                "code": tuning.code,
                "command": command,
                **asdict(tuning),
            }
            text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
            files = {"tuning.json": text.encode(), "tuning.png": draw(tuning)}
            for name, content in files.items():
                write_atomically(arguments.out / name, content)
    say(f"{tuning.table}\n\n{tuning.verdict}")
    if asked.flow:
        say("\nAll levels here are of the VE form, σ = τ/(1-τ), for kdpp.as_ve of both models.")
    if command is not None:
        say(f"\n{command}\n")
    for name in files:
        say(f"wrote {arguments.out / name}")
