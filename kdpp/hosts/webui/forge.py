"""Forge's convention, as read in and run with commit dfdcbab6."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from backend import memory_management
from backend.loader import forge_loader
from backend.modules.k_prediction import PredictionFlux
from backend.patcher.base import set_model_options_post_cfg_function
from backend.sampling.condition import Condition, compile_conditions, compile_weighted_conditions
from backend.sampling.sampling_function import sampling_function_inner
from backend.text_processing import classic_engine
from modules import prompt_parser, sd_models, sd_samplers_common, shared
from torch import Tensor

import kdpp
from kdpp.hosts.webui.common import Common, checkpoint, conditions_of, inside_mask, parsed
from kdpp.hosts.webui.files import check_files
from kdpp.hosts.webui.settings import Settings
from kdpp.kinds import Denoiser

__all__ = ["Forge"]


class Forge(Common):
    """Its teacher is an engine of its own beside the active one, or the active one's networks with
    other LoRAs; the host's memory management puts either in place for a call."""

    title = "Forge"
    cannot = (
        "ControlNet, FreeU and others that patch the network act on the student alone.",
        "Without a guided form: DDIM, PLMS and UniPC (timesteps), DPM adaptive, Restart, IPNDM and "
        "DDPM (other formulas and noise than kdpp's).",
    )

    other_formulas: ClassVar[Mapping[str, str]] = {"sample_ipndm": "", "sample_ipndm_v": ""}
    """The host's own forms of what kdpp has by that name, and kdpp's name of them, if it has them.

    The host's IPNDM goes on with Adams-Bashforth to σ = 0, its IPNDM_V takes four slopes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: Any = None

    # Samplers -------------------------------------------------------------------------------------

    def solver(self, p: Any) -> tuple[kdpp.Solver, Mapping[str, Any]] | None:
        name = getattr(p.sampler.func, "__name__", "")
        if not self.is_guidable(p.sampler):
            return None
        predictor = p.sd_model.forge_objects.unet.model.predictor
        if is_flow(p.sd_model.forge_objects.unet):
            found = self.over_tau(name, predictor)
            return None if found is None else (kdpp.SOLVERS[found[0]], found[1])
        if name in self.other_formulas:
            other = kdpp.SOLVERS.get(self.other_formulas[name])
            return None if other is None else (other, {})
        return super().solver(p)

    def over_tau(self, name: str, predictor: Any) -> tuple[str, Mapping[str, Any]] | None:
        """The solver behind a host's sampler for a flow model, and its options."""
        if name in RF:
            # Other flow models get the formula for σ, which leaves their noise level.
            return (RF[name], {}) if isinstance(predictor, PredictionFlux) else None
        solver = name.removeprefix("sample_")
        return (solver, OVER_TAU[solver]) if solver in OVER_TAU else None

    def stock(self) -> set[str]:
        return super().stock() - self.other_formulas.keys()

    # A run ----------------------------------------------------------------------------------------

    def student(self, model: Any, needs_uncond: bool) -> kdpp.HostModel:
        def ask(x: Tensor, sigma: Tensor, cfg_scale: float, **extra_args: Any) -> Any:
            if not needs_uncond:
                return model(x, sigma, cond_scale=cfg_scale, **extra_args)
            with hearing(unet_of(model)) as heard:
                denoised = model(x, sigma, cond_scale=cfg_scale, **extra_args)
            uncond = heard.get("uncond")
            return denoised, None if uncond is None else inside_mask(model, uncond, sigma)

        return host_model(ask, unet_of(model))

    def teacher(self, p: Any, settings: Settings) -> Callable[[Any], Denoiser]:
        student = engine = p.sd_model
        try:
            info, loras = checkpoint(settings.teacher), lora_files(settings.teacher_lora)
            if info is None or info.filename == student.sd_checkpoint_info.filename:
                self.release()
            else:
                check_files(student.sd_checkpoint_info.filename, info.filename)
                engine = self.load(info)
            check_pair(student, engine)
            engine = with_loras(engine, loras)
            conditions = self.conditions(p, engine, settings.teacher_negative)
        except BaseException:
            self.release()
            raise
        unet = engine.forge_objects.unet

        def made(model: Any) -> Denoiser:
            asked = Asked(model, unet, *conditions)
            return kdpp.swapped(
                host_model(asked, unet), lambda: load(unet), lambda: load(unet_of(model))
            )

        return made

    def conditions(self, p: Any, engine: Any, negative: str) -> tuple[Any, Any]:
        """`conditions_of`, of which the host's infotext learns nothing."""
        told = classic_engine.last_extra_generation_params
        classic_engine.last_extra_generation_params = {}
        try:
            return conditions_with_clip_skip(p, engine, negative)
        finally:
            classic_engine.last_extra_generation_params = told

    def load(self, info: Any) -> Any:
        """The engine of a checkpoint, beside the active one; that which is held, if it is it."""
        if self.held is None or self.held.filename != info.filename:
            self.release()
            modules = sd_models.model_data.forge_loading_parameters.get("additional_modules", [])
            with torch.random.fork_rng():
                self.held = self.engine_of(info.filename, modules)
            self.held.filename = info.filename
            self.held.forge_objects_original.vae = None  # a teacher decodes nothing
            for name in ("forge_objects", "forge_objects_after_applying_lora"):
                setattr(self.held, name, self.held.forge_objects_original)
        return self.held

    def engine_of(self, filename: str, modules: list[str]) -> Any:
        """What the host makes of a file."""
        return forge_loader(filename, additional_state_dicts=modules)

    def release(self) -> None:
        held, self.held = self.held, None
        if held is not None:
            unload(held.forge_objects.unet)
            unload(held.forge_objects.clip.patcher)
            memory_management.soft_empty_cache()


RF = {
    "sample_euler_ancestral": "euler_ancestral_rf",
    "sample_dpm_2_ancestral": "dpm_2_ancestral_rf",
}
"""What the host's functions compute for FLUX."""
TAU = {"variable": "tau"}
OVER_TAU: Mapping[str, Mapping[str, Any]] = {
    "euler": {}, "heun": TAU, "dpm_2": TAU, "dpmpp_2m": TAU, "lms": TAU, "deis": TAU,
}  # fmt: skip
"""Solvers whose formula over τ is the host's for any flow model."""


def unet_of(model: Any) -> Any:
    """The student's patcher, as it is now: a refiner may have changed it."""
    return model.inner_model.inner_model.forge_objects.unet


def is_flow(unet: Any) -> bool:
    """Whether levels are τ in [0, 1]."""
    return bool(unet.model.predictor.prediction_type == "const")


def host_model(ask: Callable[..., Any], unet: Any) -> kdpp.HostModel:
    """A host's way to ask, with what its predictor says of its levels."""
    levels = unet.model.predictor.sigmas
    return kdpp.HostModel(ask, flow=is_flow(unet), sigma_min=levels[0], sigma_max=levels[-1])


@contextmanager
def hearing(unet: Any) -> Iterator[dict[str, Tensor]]:
    """Inside, the host works out the unconditional estimate, where there is a negative prompt, and
    puts it here."""
    heard: dict[str, Tensor] = {}

    def hear(args: Mapping[str, Any]) -> Tensor:
        if args["uncond"] is not None:
            heard["uncond"] = args["uncond_denoised"]
        denoised: Tensor = args["denoised"]
        return denoised

    before = unet.model_options
    unet.model_options = set_model_options_post_cfg_function(dict(before), hear, True)
    try:
        yield heard
    finally:
        unet.model_options = before


# The teacher --------------------------------------------------------------------------------------


def load(unet: Any) -> None:
    """Put a network's weights in place, where the other's may have been: one network may hold both,
    patched for one of them, or there may be room for one at a time."""
    memory_management.load_models_gpu([unet, *unet.extra_model_patchers_during_sampling])


def unload(patcher: Any) -> None:
    """Take a network out of the host's list of those in place."""
    there = memory_management.current_loaded_models
    for loaded in [one for one in there if patcher.is_clone(one.model)]:
        there.remove(loaded)
        loaded.model_unload()


def check_pair(student: Any, teacher: Any) -> None:
    """ValueError unless the teacher can be asked where the student is."""
    formats = [type(one.model_config.latent_format).__name__ for one in (student, teacher)]
    if formats[0] != formats[1]:
        raise ValueError(
            f"kdpp: the student's latents are {formats[0]} and the teacher's {formats[1]}; take a "
            "teacher of the student's family"
        )
    flow = [is_flow(one.forge_objects.unet) for one in (student, teacher)]
    if flow[0] != flow[1]:
        words = ["a flow model" if one else "not a flow model" for one in flow]
        raise ValueError(
            f"kdpp: the student is {words[0]} and the teacher is {words[1]}; both must be of one "
            "kind"
        )
    if teacher.is_inpaint and not student.is_inpaint:
        raise ValueError(
            "kdpp: the teacher is an inpainting model, which needs the masked picture; the student "
            "has not got it; take another teacher"
        )


def lora_files(text: str) -> list[tuple[str, float]]:
    """Files and weights of ``<lora:name:weight>`` tags; ValueError where one is not to be had."""
    wanted = parsed(text)
    extension: Any = sys.modules.get("networks")
    if wanted and extension is None:
        raise ValueError("kdpp: the teacher's LoRAs need the host's extension Lora, which is off")
    found = []
    for name, weight in wanted:
        if name not in extension.available_network_aliases:
            extension.list_available_networks()
        entry = extension.available_network_aliases.get(name)
        if entry is None or not os.path.isfile(entry.filename):
            raise ValueError(f"kdpp: there is no LoRA {name!r} for the teacher")
        if not entry.filename.endswith(".safetensors"):
            raise ValueError(f"kdpp: the teacher's LoRA {name!r} is not a safetensors file")
        found.append((entry.filename, weight))
    return found


def with_loras(engine: Any, loras: Sequence[tuple[str, float]]) -> Any:
    """An engine's networks with these LoRAs, and none of the prompt's; nothing is moved."""
    made = copy.copy(engine)
    made.forge_objects = objects = engine.forge_objects_original.shallow_copy()
    extension: Any = sys.modules.get("networks")
    for file, weight in loras:
        objects.unet, objects.clip = extension.load_lora_for_models(
            objects.unet, objects.clip, extension.load_lora_state_dict(file), weight, weight,
            filename=file,
        )  # fmt: skip
    return made


def conditions_with_clip_skip(p: Any, engine: Any, negative: str) -> tuple[Any, Any]:
    """The prompts of this pass as the engine's own conditions."""
    engine.set_clip_skip(int(shared.opts.CLIP_stop_at_last_layers))
    hires = getattr(p, "is_hr_pass", False)
    scale = p.hr_distilled_cfg if hires else p.distilled_cfg_scale
    return conditions_of(p, engine, negative, distilled_cfg_scale=scale)


class Asked:
    """A network as the teacher: its own prompts and CFG, the student's mask and step."""

    def __init__(self, model: Any, unet: Any, cond: Any, uncond: Any) -> None:
        self.model, self.unet, self.cond, self.uncond = model, unet, cond, uncond

    def __call__(
        self, x: Tensor, sigma: Tensor, cfg_scale: float, image_cond: Any = None, **_: Any
    ) -> Tensor:
        if shared.state.interrupted or shared.state.skipped:
            raise sd_samplers_common.InterruptedException
        # The student has been asked at this step, and has counted it.
        step = max(self.model.step - 1, 0)
        composed, text = prompt_parser.reconstruct_multicond_batch(self.cond, step)
        cond = compile_weighted_conditions(text, composed)
        uncond = compile_conditions(prompt_parser.reconstruct_cond_batch(self.uncond, step))
        if isinstance(image_cond, Tensor) and image_cond.shape[2:] == x.shape[2:]:
            for one in [*cond, *uncond]:  # of an inpainting model
                one["model_conds"]["c_concat"] = Condition(image_cond)
        denoised = sampling_function_inner(
            self.unet.model, x, sigma, uncond, cond, cfg_scale, self.unet.model_options
        )
        return inside_mask(self.model, denoised, sigma)
