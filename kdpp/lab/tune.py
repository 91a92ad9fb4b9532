"""``kdpp tune STUDENT TEACHER``: is guidance worth it for this pair, where, and how much?

The command: which models are meant, what it costs, where it is kept. What it asks is
`kdpp.lab.tuning`'s.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kdpp
from kdpp.checkpoints.flags import (
    add_settings,
    has_teacher,
    read_prompts,
    request_of,
    settings_of,
)
from kdpp.checkpoints.models import PipelineModel, open_models
from kdpp.checkpoints.requests import Request
from kdpp.kinds import is_flow
from kdpp.lab import processes
from kdpp.lab.answer import Tuning, draw, need_matplotlib
from kdpp.lab.console import say
from kdpp.lab.files import digest, locked, make_folder, write_atomically
from kdpp.lab.looks import Pair, Sampler
from kdpp.lab.pieces import Pieces
from kdpp.lab.sampling import IMAGES, INITIAL, Recipe, attempt, fingerprint, image_seeds
from kdpp.lab.tuning import (
    LAB,
    LEAST,
    LEVELS,
    PIPELINES,
    Affordable,
    Work,
    in_ve,
    levels_in_ve,
    tune,
)
from kdpp.noise import SeededNoise

__all__ = ["add_arguments", "run", "tune"]

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
                "kdpp": kdpp.__version__,
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


@dataclass(frozen=True)
class Asked:
    """What the command is asked for, with its models loaded.

    Attributes:
        request: student, teacher and their settings, as they were given.
        recipe: how the student samples with its teacher.
        scale: the teacher's CFG scale.
        prompts: the file that they are in; None for models of the lab.
        each: how many samples, and how each is worked on.
    """

    request: Request
    recipe: Recipe
    scale: float
    prompts: Path | None
    each: Affordable
    seed: int

    @classmethod
    def by(cls, arguments: argparse.Namespace) -> Asked:
        """Load and check all that the arguments name."""
        request, prompts = request_of(settings_of(arguments)), arguments.prompts
        if not request.student:
            raise ValueError("which model? kdpp tune --student MODEL --teacher MODEL")
        if not has_teacher(request):
            raise ValueError("whose help? --teacher MODEL, or a LoRA of the student's alone: "
                             "--student-lora FILE")  # fmt: skip
        usual = LAB if prompts is None else PIPELINES
        given = {name: getattr(arguments, name) for name in Affordable._fields}
        each = usual._replace(**{name: n for name, n in given.items() if n is not None})
        if not LEAST <= each.samples <= IMAGES:
            raise ValueError(f"--samples is {each.samples}; give {LEAST} or more, say 100")
        image_seeds(arguments.seed, each.samples)
        device = processes.device(arguments.device)
        student, teacher = open_models(request, device, prompts and read_prompts(prompts))
        assert teacher is not None
        if isinstance(student, PipelineModel) and processes.share()[0] == 0:
            for remark in student.pair.remarks:
                print(f"kdpp: {remark}", file=sys.stderr)
        reach, scale = student.guidance, request.teacher_cfg_scale
        if scale is None:
            if reach is None:
                raise ValueError(
                    "the student's checkpoint names no CFG scale that it was distilled with; name "
                    "the one that it is to reach: --teacher-cfg-scale SCALE"
                )
            scale = float(reach)
        own = scale if reach is None else student.cond_scale
        recipe = Recipe(
            student, teacher, request.sampler or student.sampler,
            request.sigmas or student.levels_for(request.steps),
            cond_scale=own if request.cond_scale is None else request.cond_scale,
            options=request.options,
        )  # fmt: skip
        attempt(recipe, "the student")
        attempt(Recipe(teacher, None, "euler", recipe.levels, scale), "the teacher")
        return cls(request, recipe, scale, prompts, each, arguments.seed)

    @property
    def name(self) -> str:
        """A digest of all that the answer depends on."""
        return digest([fingerprint(self.recipe), self.scale, self.each, self.seed])

    @property
    def flow(self) -> bool:
        return is_flow(self.recipe.student.denoiser_for(self.recipe.steps))

    def work(self) -> Work:
        """What is to be done, from the noise of the seeds."""
        recipe, student, model = self.recipe, self.recipe.student, self.recipe.guided()
        sampler: Sampler = recipe.solver
        if recipe.options and recipe.solver.sample:
            sampler = partial(recipe.solver.sample, **recipe.options)
        seeds = torch.tensor(image_seeds(self.seed, self.each.samples))
        levels = levels_in_ve(recipe.levels) if self.flow else recipe.levels
        like = torch.empty(len(seeds), *student.shape, device=student.device)
        pair = Pair(
            in_ve(model.student),
            in_ve(model.teachers[0].denoiser),
            sampler,
            levels,
            {**student.conditions(seeds % student.classes), "cond_scale": recipe.cond_scale},
            self.scale,
            self.each.detail,
            self.each.max_batch,
        )
        x = SeededNoise(like, seeds, INITIAL)() * levels[0]
        longer = None if self.flow else student.levels_for
        return Work.of(pair, x, LEVELS, student.bounds, self.each.batch, self.seed, longer)

    def command(self, tuning: Tuning) -> str | None:
        """What tries the advice: `kdpp generate`, or for models of the lab `kdpp evaluate`."""
        if tuning.by is None:
            return None
        request, settings = self.request, dict(tuning.settings)
        longer = tuning.longer.levels if tuning.by == "steps" and tuning.longer else None
        if longer is not None:
            settings = {}
        elif self.flow:
            settings["renoise"] = float(f"{settings['renoise'] / (1.0 + settings['renoise']):.6g}")
        settings = {
            "sampler": self.recipe.solver.name,
            "steps": len(longer) - 1 if longer else self.recipe.steps,
            "cond_scale": self.recipe.cond_scale,
            **settings,
        }
        if self.prompts is None:
            words = ["kdpp", "evaluate", request.student]
            if longer is None:
                words += ["--teacher", str(request.teacher if tuning.guide else request.student)]
            return shlex.join([*words, *_flags(settings), "--out", "DIR"])
        if longer is not None:
            taus = [float(f"{s / (1.0 + s) if self.flow else s:.6g}") for s in longer]
            request = replace(request, sigmas=tuple(taus), steps=None, preset=None)
        if request.preset is not None or request.sigmas is not None:
            del settings["steps"]
        names = ("student", "teacher", *SETTINGS)
        given = {n: v for n in names if (v := getattr(request, n)) != getattr(Request(), n)}
        words = ["kdpp", "generate", *_flags(given | settings)]
        for path, weight, role in request.loras:
            file = path if weight is None else f"{path}:{weight:g}"
            words += [f"--{role}-lora".replace("both-", ""), file]
        for name, value in request.options.items():
            words += ["--option", f"{name}={value}"]
        return shlex.join([*words, "--prompts", str(self.prompts), "--compare", "--out", "DIR"])


def _flags(settings: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value)
        words += [f"--{name.replace('_', '-')}", text]
    return words
