"""The work of the Tune node: `kdpp tune` (`kdpp.lab.tuning`) on a guider's student and teacher."""

from __future__ import annotations

import logging
from copy import copy
from functools import partial
from typing import Any

import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from kdpp.hosts.comfyui.plot import Plot
from kdpp.hosts.comfyui.sampling import (
    Asked,
    GuidedSampler,
    TeacherGuider,
    beside_teacher,
    is_flow,
    sample,
)
from kdpp.lab.affordable import PIPELINES
from kdpp.lab.answer import Tuning
from kdpp.lab.looks import Pair
from kdpp.lab.pieces import Pieces
from kdpp.lab.sampling import SEEDS
from kdpp.lab.tuning import LEVELS, PURE, Work, in_ve, levels_in_ve

__all__ = ["tune"]


def tune(
    noise: Any,
    guider: Any,
    sampler: Any,
    sigmas: Tensor,
    latent_image: dict[str, Any],
    samples: int,
    detail: int,
    rows: int,
) -> tuple[str, Tensor]:
    """The verdict and its settings as text, and a picture, (1, height, width, 3).

    Samples differ in their noise, and share the latent's first row. The price is said before the
    work. Raises ValueError for a guider without a teacher, another pack's sampler, or a mask.
    """
    if not isinstance(guider, TeacherGuider) or not isinstance(sampler, GuidedSampler):
        raise ValueError("Tune takes the guider of Teacher Guider and the sampler of KDPP Sampler")
    if latent_image.get("noise_mask") is not None:
        raise ValueError("Tune takes no mask: what it says of the whole picture holds for a part")
    plot = Plot()  # what it lacks, it says before the work
    few = latent_image["samples"][:1].repeat_interleave(min(rows, samples), 0)
    work = Tuner(sampler, noise, samples, detail, rows)
    # A copy, since the looks have CFG scales of their own.
    sample(noise, copy(guider), work, sigmas, {**latent_image, "samples": few})
    flow = is_flow(guider.model_patcher.get_model_object("model_sampling"))
    return in_words(work.tuning, flow), plot.draw(work.tuning)


class Tuner(comfy.samplers.Sampler):  # type: ignore[misc]
    """A sampler that tunes instead; what it returns is not used."""

    tuning: Tuning

    def __init__(
        self, sampler: GuidedSampler, noise: Any, samples: int, detail: int, rows: int
    ) -> None:
        self.how, self.source = sampler, noise
        self.samples, self.detail, self.rows = samples, detail, rows

    def sample(
        self, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any,
        noise: Tensor, latent_image: Tensor, denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:  # fmt: skip
        """What the guider calls, inside its own preparations."""
        scaling = guider.inner_model.model_sampling
        flow, form = is_flow(scaling), self.how.form(scaling, sigmas)
        solver, options, levels = form.solver, form.options, form.sigmas.tolist()
        if solver.own_levels is not None:
            raise ValueError(f"{solver.name} makes its own levels; Tune takes the other solvers")
        shown = (sigmas, noise, latent_image, None)
        student = Asked(guider, extra_args, shown, solver.cfg_pp)
        latents = latent_image[:1].repeat_interleave(self.samples, 0)
        many = self.source.generate_noise({"samples": latents.cpu()}).to(latents)
        first = sigmas[0].clamp(max=PURE) if flow else sigmas[0]
        x = scaling.noise_scaling(first, many, latents, self.max_denoise(guider, sigmas))
        x = x / (1.0 - first) if flow else x

        def run(teacher: torch.nn.Module) -> Tuning:
            pair = Pair(
                in_ve(divisible(student.denoiser())),
                in_ve(divisible(teacher)),
                partial(solver.sample, **options) if solver.sample else solver,
                levels_in_ve(levels) if flow else levels,
                {"cond_scale": guider.cfg},
                guider.teacher_cfg,
                self.detail,
                self.rows,
            )
            work = Work.of(pair, x, LEVELS, None, PIPELINES.batch, extra_args["seed"] % SEEDS)
            say(work.price(work.seconds()))
            bar = comfy.utils.ProgressBar(sum(work.expense))
            tuning = work.run(Pieces(), report=bar.update)
            assert tuning is not None
            return tuning

        self.tuning, _ = beside_teacher(student, run)
        return torch.zeros_like(noise)


def divisible(denoiser: Any) -> Any:
    """The host's model, which takes any rows of the batch, marked so."""
    denoiser.divisible = True
    return denoiser


def say(price: str) -> None:
    """In the log, and on the node that is at work."""
    from server import PromptServer

    logging.info("Tune (KDPP): %s", price)
    server = PromptServer.instance
    if hasattr(server, "send_progress_text"):
        server.send_progress_text(price, server.last_node_id)


def in_words(tuning: Tuning, flow: bool) -> str:
    """The verdict, what to set in the nodes, and the table."""
    lines = [tuning.advice, ""]
    if tuning.by is None:
        lines.append("KDPP Sampler: teacher_steps 0.")
    elif tuning.by == "steps" and tuning.longer is not None:
        lines.append(f"KDPP Sampler: teacher_steps 0, {len(tuning.longer.levels) - 1} steps.")
    else:
        settings = tuning.settings
        level = settings["renoise"]
        if flow:
            level = level / (1.0 + level)
        (step,) = settings["teacher_steps"]
        if tuning.by == "student":
            lines.append("Teacher Guider: connect the student's MODEL to teacher as well.")
        lines += [
            f"KDPP Sampler: first_step {step}, teacher_steps 1, teacher_scale "
            f"{settings['teacher_scale']:g}, renoise level, level {level:.6g}, "
            f"renoise_eta {settings['renoise_eta']:g}.",
            f"Teacher Guider: teacher_cfg {settings['teacher_cfg_scale']:g}.",
        ]
    if flow:
        lines += ["", "Levels in this text are σ = τ/(1-τ); that of the setting is τ."]
    return "\n".join([*lines, "", tuning.table])
