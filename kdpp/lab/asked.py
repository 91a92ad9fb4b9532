"""What `kdpp tune` is asked for, with its models loaded."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdpp.checkpoints.flags import GROUPS, has_teacher, read_prompts, request_of, settings_of
from kdpp.checkpoints.models import PipelineModel, open_models
from kdpp.checkpoints.requests import Request
from kdpp.kinds import is_flow
from kdpp.lab import processes
from kdpp.lab.affordable import LAB, PIPELINES, Affordable
from kdpp.lab.answer import Tuning
from kdpp.lab.files import digest
from kdpp.lab.looks import Pair, Sampler
from kdpp.lab.sampling import IMAGES, INITIAL, Recipe, attempt, fingerprint, image_seeds
from kdpp.lab.tuning import LEAST, LEVELS, Work, in_ve, levels_in_ve
from kdpp.noise import SeededNoise

__all__ = ["Asked"]


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
        names = [name for group in GROUPS.values() for name in group]
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
