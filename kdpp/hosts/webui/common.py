"""What the web UIs share: the names of their modules, and what these do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from modules import (
    devices,
    extra_networks,
    prompt_parser,
    scripts,
    sd_models,
    sd_samplers,
    sd_samplers_common,
    sd_samplers_kdiffusion,
    shared,
)
from torch import Tensor

from kdpp.hosts.webui.convention import Convention
from kdpp.hosts.webui.settings import SAME

__all__ = ["Common", "checkpoint", "conditions_of", "inside_mask", "parsed"]


class Common(Convention):
    """Checkpoints and samplers, which the hosts keep in lists of the same names."""

    def __init__(self) -> None:
        self.registered: list[Any] = []

    # The panel ------------------------------------------------------------------------------------

    def checkpoints(self) -> list[str]:
        return [info.name for info in sd_models.checkpoints_list.values() if info.is_safetensors]

    def refresh(self) -> None:
        sd_models.list_models()

    # Samplers -------------------------------------------------------------------------------------

    def is_guidable(self, sampler: Any) -> bool:
        return isinstance(sampler, sd_samplers_kdiffusion.KDiffusionSampler)

    def stock(self) -> set[str]:
        rows = [*sd_samplers_kdiffusion.samplers_k_diffusion]
        lcm = sys.modules.get("modules.sd_samplers_lcm")
        rows += getattr(lcm, "samplers_lcm", [])
        functions = [row[1] for row in rows]
        return {one if isinstance(one, str) else one.__name__ for one in functions}

    def register(self, samplers: Mapping[str, Callable[..., Tensor]]) -> None:
        self.unregister()
        for name, function in samplers.items():
            made = sampler_data(name, function)
            self.registered.append(made)
            sd_samplers.all_samplers.append(made)
            sd_samplers.all_samplers_map[name] = made
        self.samplers_changed()

    def unregister(self) -> None:
        for made in self.registered:
            if made in sd_samplers.all_samplers:
                sd_samplers.all_samplers.remove(made)
            sd_samplers.all_samplers_map.pop(made.name, None)
        self.registered = []
        self.samplers_changed()

    def samplers_changed(self) -> None:
        """Make the host's lists anew, and forget which names it did not know."""
        sd_samplers.set_samplers()
        sd_samplers.get_sampler_and_scheduler.cache_clear()

    def knows(self, name: str) -> bool:
        found, _ = sd_samplers.get_sampler_and_scheduler(name, None)
        return bool(found == name)


def sampler_data(name: str, function: Any) -> Any:
    """One of kdpp's samplers as the host lists it."""
    solver = function.solver
    options = {
        "brownian_noise": solver.noise == "brownian",
        "second_order": solver.evaluations > 1,
        "uses_ensd": solver.noise == "plain",
    }

    def construct(model: Any) -> Any:
        sampler = sd_samplers_kdiffusion.KDiffusionSampler(function, model)
        sampler.extra_params = [one for one in solver.options if one.startswith("s_")]
        return sampler

    return sd_samplers_common.SamplerData(name, construct, [], options)


# A run's prompts and mask -------------------------------------------------------------------------


def checkpoint(name: str) -> Any:
    """The host's entry of a checkpoint; None for the student's own."""
    if name in ("", SAME):
        return None
    if name not in sd_models.checkpoint_aliases:
        sd_models.list_models()
    info = sd_models.checkpoint_aliases.get(name)
    if info is None:
        raise ValueError(f"kdpp: there is no checkpoint {name!r}; choose the teacher anew")
    return info


def parsed(text: str) -> list[tuple[str, float]]:
    """Names and weights of ``<lora:name:weight>`` tags; ValueError for any other text."""
    rest, found = extra_networks.parse_prompt(text)
    others = [name for name in found if name not in ("lora", "lyco")]
    if rest.strip(" ,\n") or others:
        raise ValueError(
            f"kdpp: Teacher LoRAs is {text!r}; it must be tags such as <lora:name:1>, and no other"
        )
    tags = [one.positional for name in ("lora", "lyco") for one in found.get(name, [])]
    try:
        return [(name, float(rest[0]) if rest else 1.0) for name, *rest in tags]
    except ValueError as error:
        raise ValueError(f"kdpp: Teacher LoRAs: a weight must be a number ({error})") from error


def conditions_of(p: Any, network: Any, negative: str, **more: Any) -> tuple[Any, Any]:
    """The prompts of this pass as the network's own conditions: with schedules and AND, and the
    negative ones. ``more``: what a host's prompts have besides their size."""
    hires = getattr(p, "is_hr_pass", False)
    prompts = p.hr_prompts if hires else p.prompts
    negatives = p.hr_negative_prompts if hires else p.negative_prompts
    size = (p.hr_upscale_to_x, p.hr_upscale_to_y) if hires else (p.width, p.height)
    width, height = size
    steps = (p.hr_second_pass_steps or p.steps) if hires else p.steps
    steps = p.sampler.config.total_steps(steps)
    before = p.firstpass_steps if hires else None
    text = prompt_parser.SdConditioning(prompts, width=width, height=height, **more)
    other = prompt_parser.SdConditioning(
        [negative] * len(prompts) if negative else negatives,
        width=width, height=height, is_negative_prompt=True, **more,
    )  # fmt: skip
    old = shared.opts.use_old_scheduling
    with devices.autocast():
        return (
            prompt_parser.get_multicond_learned_conditioning(network, text, steps, before, old),
            prompt_parser.get_learned_conditioning(network, other, steps, before, old),
        )


def inside_mask(model: Any, denoised: Tensor, sigma: Tensor) -> Tensor:
    """The estimate where the mask is, the picture that is kept elsewhere, as CFGDenoiser does."""
    if model.mask is None:
        return denoised
    kept: Tensor = denoised * model.nmask + model.init_latent * model.mask
    if model.p.scripts is None:
        return kept
    blend = scripts.MaskBlendArgs(
        denoised, model.nmask, model.init_latent, model.mask, kept, denoiser=model, sigma=sigma
    )
    model.p.scripts.on_mask_blend(model.p, blend)
    blended: Tensor = blend.blended_latent
    return blended
