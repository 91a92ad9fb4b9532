"""A guided run inside ComfyUI: its guiders are student and teacher, kdpp's loop is its sampler.

The teacher is sampled by its own guider, with a sampler whose body is the whole run. So its
conditions, hooks and wrappers are prepared and cleaned up by the host, as the student's are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, TypeVar

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

import kdpp
from kdpp.hosts.comfyui.forms import Form, form_of
from kdpp.noise import NoiseSampler

__all__ = ["GuidedSampler", "TeacherGuider", "compare"]

Made = TypeVar("Made")
RENOISE = 1  # the stream of a row's seed that the teacher's renoising takes; the solver's is 0


class TeacherGuider(comfy.samplers.CFGGuider):  # type: ignore[misc]
    """The student's guider, which holds the teacher's as well.

    Raises ValueError unless both are models of the same latents, and both flow models or both not.
    """

    def __init__(self, student: Any, teacher: Any, teacher_cfg: float) -> None:
        check_pair(student, teacher)
        super().__init__(student)
        # A clone, since hooks on the student's conditions are registered on its own patcher.
        self.teacher = comfy.samplers.CFGGuider(teacher.clone())
        self.teacher_cfg = teacher_cfg

    def self_control(self) -> TeacherGuider:
        """The same student with itself in the teacher's place: own prompts, own CFG scale."""
        made = TeacherGuider(self.model_patcher, self.model_patcher, self.cfg)
        made.set_cfg(self.cfg)
        made.original_conds = made.teacher.original_conds = self.original_conds
        return made


def check_pair(student: Any, teacher: Any) -> None:
    """ValueError unless the two models can guide each other."""
    formats = [one.model.latent_format for one in (student, teacher)]
    latents = [f"{type(one).__name__} ({one.latent_channels} channels)" for one in formats]
    if latents[0] != latents[1]:
        raise ValueError(
            f"the student's latents are {latents[0]} and the teacher's {latents[1]}; take a "
            "teacher of the student's family"
        )
    flow = [is_flow(one.get_model_object("model_sampling")) for one in (student, teacher)]
    if flow[0] != flow[1]:
        kinds = ["a flow model" if one else "not a flow model" for one in flow]
        raise ValueError(
            f"the student is {kinds[0]} and the teacher is {kinds[1]}; both must be of one kind"
        )


def is_flow(model_sampling: Any) -> bool:
    """Whether levels are τ in [0, 1]."""
    return isinstance(model_sampling, comfy.model_sampling.CONST)


class GuidedSampler(comfy.samplers.Sampler):  # type: ignore[misc]
    """A solver of kdpp's as a sampler of ComfyUI's. The guider's teacher helps, if it has one."""

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        comfyui: bool,
        by_row: bool,
        **guidance: Any,
    ) -> None:
        self.name, self.comfyui, self.by_row = name, comfyui, by_row
        self.options = options  # a solver takes those that it has
        self.guidance = guidance  # keywords of kdpp.TeacherGuidedDenoiser
        self.evaluations: dict[str, int] = {}  # of student and teacher in the last run, a picture

    def form(self, model_sampling: Any, sigmas: Tensor) -> Form:
        """What is run on a model: ComfyUI's form of the solver, or kdpp's, with all its options."""
        form = form_of(self.name, sigmas, model_sampling, is_flow(model_sampling), self.comfyui)
        known = form.solver.options
        given = {name: value for name, value in self.options.items() if name in known}
        if not form.solver.stochastic:  # one that adds noise where eta is asked for
            given.pop("eta", None)
        return form._replace(options={**given, **form.options})

    def alone(self) -> GuidedSampler:
        """The same sampler without the teacher's help."""
        made = copy(self)
        made.guidance = {**self.guidance, "teacher_steps": 0}
        return made

    def sample(
        self,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., Any] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """What the guider calls, inside its own preparations."""
        shown = (sigmas, noise, latent_image, denoise_mask)
        scaling = guider.inner_model.model_sampling
        form = self.form(scaling, sigmas)
        student = Asked(guider, extra_args, shown, needs_uncond=form.solver.cfg_pp)
        x = scaling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(guider, sigmas))
        seed = extra_args["seed"]
        seeds = kdpp.row_seeds(seed, noise if noise.count_nonzero() else latent_image)
        loudness = getattr(scaling, "noise_scale", 1.0)  # of some models' noise
        source = scaled(self.noise(form.solver, x, sigmas, seeds, seed), loudness)

        def run(teacher: torch.nn.Module, **guidance: Any) -> Tensor:
            renoise = scaled(kdpp.SeededNoise(x, seeds, RENOISE), loudness)
            model = kdpp.TeacherGuidedDenoiser(
                student.denoiser(), teacher, renoise_noise_sampler=renoise, **guidance
            )
            return sampled(form, model, x, callback, disable_pbar, source)

        helped = self.guidance["teacher_steps"] and self.guidance["teacher_scale"]
        if helped and not hasattr(guider, "teacher"):
            logging.warning("KDPP Sampler: the guider holds no teacher; the student samples alone")
        if helped and hasattr(guider, "teacher"):
            guidance = {**self.guidance, "teacher_cfg_scale": guider.teacher_cfg}
            image, asked = beside_teacher(student, lambda teacher: run(teacher, **guidance))
        else:
            image, asked = run(student.denoiser(), teacher_steps=0), 0
        self.evaluations = {"student": student.evaluations, "teacher": asked}
        made: Tensor = scaling.inverse_noise_scaling(sigmas[-1], image)
        return made

    def noise(
        self, solver: kdpp.Solver, x: Tensor, sigmas: Tensor, seeds: list[int], seed: int
    ) -> NoiseSampler | None:
        """The solver's source of noise: by rows, or the one that ComfyUI's own samplers take."""
        if solver.noise == "none":
            return None
        low, high = sigmas[sigmas > 0].min(), sigmas.max()
        brownian = solver.noise == "brownian"
        if self.by_row:
            if brownian:
                return kdpp.BrownianNoise(x, low, high, seed=seeds)
            return kdpp.SeededNoise(x, seeds)
        host = comfy.k_diffusion.sampling  # looked up here: other packs load it anew
        sampler: NoiseSampler = (
            host.BrownianTreeNoiseSampler(x, low, high, seed=seed, cpu=True)
            if brownian
            else host.default_noise_sampler(x, seed=seed)
        )
        return sampler


def scaled(noise: Any, factor: float) -> Any:
    """The noise times the factor."""
    if noise is None or factor == 1.0:
        return noise
    return lambda sigma, sigma_next: noise(sigma, sigma_next) * factor


def sampled(
    form: Form,
    model: kdpp.TeacherGuidedDenoiser,
    x: Tensor,
    callback: Callable[..., Any] | None,
    disable: bool,
    source: NoiseSampler | None,
) -> Tensor:
    """A run of the form's solver, also of one that makes its own levels between the two ends."""
    solver, options, sigmas = form
    steps = len(sigmas) - 1
    if solver.own_levels is None:
        report = None if callback is None else reporting(callback, steps)
        return kdpp.sample(solver, model, x, sigmas, None, report, disable, source, **options)
    low, high = (float(level) for level in (sigmas[sigmas > 0.0][-1], sigmas[0]))
    assert solver.sample is not None
    report = (
        None if callback is None else reporting(callback, len(solver.levels(0.1, 1.0, steps)) - 1)
    )
    made: Tensor = solver.sample(
        model, x, low, high, steps, None, report, disable, noise_sampler=source, **options
    )
    return made


def reporting(callback: Callable[..., Any], steps: int) -> Callable[[dict[str, Any]], Any]:
    """A callback of k-diffusion's form for ComfyUI's: previews, progress and interrupts."""
    return lambda info: callback(info["i"], info["denoised"], info["x"], steps)


Shown = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""What a sampler is shown: sigmas, noise, latent_image, denoise_mask."""


class Asked:
    """A guider as it is asked in a run: inside its mask, with its options and seed."""

    def __init__(
        self, guider: Any, extra_args: Mapping[str, Any], shown: Shown, needs_uncond: bool = False
    ) -> None:
        self.guider, self.shown = guider, shown
        self.patcher = guider.model_patcher
        self.model_sampling = guider.inner_model.model_sampling
        sigmas, noise, latent_image, denoise_mask = shown
        self.model = comfy.samplers.KSamplerX0Inpaint(guider, sigmas)
        self.model.noise, self.model.latent_image = noise, latent_image
        self.uncond: Tensor | None = None
        self.needs_uncond, self.evaluations = needs_uncond, 0
        self.turns: Turns | None = None  # None: its weights are in place
        options = extra_args["model_options"]
        if needs_uncond:
            options = comfy.model_patcher.set_model_options_post_cfg_function(
                comfy.model_patcher.create_model_options_clone(options),
                self.hear,
                disable_cfg1_optimization=True,
            )
        self.extra_args = {
            "model_options": options, "seed": extra_args["seed"], "denoise_mask": denoise_mask
        }  # fmt: skip

    def hear(self, args: Mapping[str, Any]) -> Tensor:
        """Keeps the unconditional estimate; without a negative the host hands over zeros."""
        self.uncond = None if args["uncond"] is None else args["uncond_denoised"]
        denoised: Tensor = args["denoised"]
        return denoised

    def __call__(
        self, x: Tensor, sigma: Tensor, cfg_scale: float | None
    ) -> tuple[Tensor, Tensor | None]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.turns is not None:
            self.turns.give(self.patcher)
        if cfg_scale is not None:
            self.guider.set_cfg(cfg_scale)
        # At a scale of 1 the host leaves the negative out.
        self.evaluations += 2 if self.needs_uncond or not math.isclose(self.guider.cfg, 1) else 1
        return self.model(x, sigma, **self.extra_args), self.uncond

    def denoiser(self) -> kdpp.HostModel:
        """The guider as kdpp's student or teacher."""
        levels = self.model_sampling
        return kdpp.HostModel(
            self, flow=is_flow(levels), sigma_min=levels.sigma_min, sigma_max=levels.sigma_max
        )


class Within(comfy.samplers.Sampler):  # type: ignore[misc]
    """A sampler for the teacher's guider whose body is a whole run; what it returns is not used."""

    def __init__(self, body: Callable[[Any, dict[str, Any]], None]) -> None:
        self.body = body

    def sample(
        self, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any,
        noise: Tensor, *rest: Any, **more: Any,
    ) -> Tensor:  # fmt: skip
        """Runs the body, with the guider ready to be asked."""
        self.body(guider, extra_args)
        return torch.zeros_like(noise)


def beside_teacher(student: Asked, run: Callable[[torch.nn.Module], Made]) -> tuple[Made, int]:
    """``run(teacher)`` with the guider's teacher prepared, and the teacher's evaluations.

    The weights of whoever is asked are in place; before and after the run the student's are.
    """
    guider = student.guider
    sigmas, noise, latent_image, denoise_mask = student.shown
    made: list[tuple[Made, int]] = []

    def body(inner: Any, extra_args: dict[str, Any]) -> None:
        teacher = Asked(inner, extra_args, student.shown)
        student.turns = teacher.turns = turns = Turns(noise.shape)
        try:
            turns.give(student.patcher)
            made.append((run(teacher.denoiser()), teacher.evaluations))
        finally:
            turns.give(student.patcher)

    # The teacher's guider maps the latent into model space once more.
    outside = latent_image
    if latent_image.count_nonzero():
        outside = guider.inner_model.process_latent_out(latent_image)
    seed = student.extra_args["seed"]
    guider.teacher.sample(noise, outside, Within(body), sigmas, denoise_mask, None, True, seed)
    return made[0]


class Turns:
    """Whose weights are in place, where one network may hold both models', patched for one of them,
    or there may be room for one at a time."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = [2 * shape[0], *shape[1:]]  # both halves of CFG
        self.there: Any = None

    def give(self, patcher: Any) -> None:
        """Put a model's weights in place, if they are not."""
        if patcher is not self.there:
            self.there = None
            room = patcher.memory_required(self.shape)  # for the call, beside the weights
            comfy.model_management.load_models_gpu([patcher], memory_required=room)
            patcher.pre_run()
            self.there = patcher


def sample(
    noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent_image: dict[str, Any]
) -> Tensor:
    """What the host's SamplerCustomAdvanced makes of them."""
    # Here, as the host's nodes are not there yet when packs are imported.
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    run = getattr(SamplerCustomAdvanced(), SamplerCustomAdvanced.FUNCTION)
    output = run(
        noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent_image
    )
    made: Tensor = output[0]["samples"]
    return made


def compare(
    noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent_image: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Three runs from one noise, in one batch: the student alone, with its teacher, and with itself
    in the teacher's place. And what each row is, with its evaluations.

    Raises ValueError for a guider without a teacher, or another pack's sampler.
    """
    if not isinstance(guider, TeacherGuider) or not isinstance(sampler, GuidedSampler):
        raise ValueError(
            "Compare takes the guider of Teacher Guider and the sampler of KDPP Sampler"
        )
    runs = (
        ("student alone", guider, sampler.alone()),
        ("with its teacher", guider, sampler),
        ("with itself in the teacher's place", guider.self_control(), copy(sampler)),
    )
    pictures: list[Tensor] = []
    told: list[str] = []
    for what, asked, how in runs:
        made = sample(noise, asked, how, sigmas, latent_image)
        above = len(pictures) * len(made)
        rows = f"{above + 1}" if len(made) == 1 else f"{above + 1} to {above + len(made)}"
        counts = f"{how.evaluations['student']} evaluations of the student"
        if how.evaluations["teacher"]:
            place = "of the teacher" if asked is guider else "more in the teacher's place"
            counts += f", {how.evaluations['teacher']} {place}"
        pictures.append(made)
        told.append(f"{rows}: {what}; {counts}")
    return {"samples": torch.cat(pictures)}, "\n".join(told)
