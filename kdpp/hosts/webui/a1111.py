"""A1111's convention, as read in and run with v1.10.1."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from modules import (
    prompt_parser,
    script_callbacks,
    sd_hijack,
    sd_models,
    sd_samplers_common,
    sd_unet,
    sd_vae,
    shared,
)
from torch import Tensor

import kdpp
from kdpp.hosts.webui.common import Common, checkpoint, conditions_of, inside_mask, parsed
from kdpp.hosts.webui.files import check_files
from kdpp.hosts.webui.settings import Settings
from kdpp.kinds import Denoiser

__all__ = ["A1111"]


class A1111(Common):
    """Its teacher is a model of its own beside the active one; LoRAs are a list that both obey."""

    title = "A1111"
    cannot = (
        "ControlNet and other extensions that hook into the network act on the student, and on a "
        "teacher of another checkpoint not at all.",
        "Without a guided form: SD3; the samplers DDIM, PLMS and UniPC (timesteps), DPM adaptive "
        "and Restart.",
    )

    def __init__(self) -> None:
        super().__init__()
        self.held: Any = None

    # Samplers -------------------------------------------------------------------------------------

    def solver(self, p: Any) -> tuple[kdpp.Solver, Mapping[str, Any]] | None:
        refuse_flow(p.sd_model)
        return super().solver(p)

    # A run ----------------------------------------------------------------------------------------

    def student(self, model: Any, needs_uncond: bool) -> kdpp.HostModel:
        refuse_flow(shared.sd_model)
        if needs_uncond and (shared.opts.skip_early_cond or model.sampler.s_min_uncond):
            raise ValueError(
                "kdpp: CFG++ needs the negative prompt's estimate at every step; set Negative "
                "Guidance minimum sigma and Ignore negative prompt during early sampling to 0"
            )
        model.need_last_noise_uncond = needs_uncond

        def ask(x: Tensor, sigma: Tensor, cfg_scale: float, **extra_args: Any) -> Any:
            denoised = model(x, sigma, cond_scale=cfg_scale, **extra_args)
            # x0, whatever its name says
            uncond = inside_mask(model, model.last_noise_uncond, sigma) if needs_uncond else None
            return denoised, uncond

        return host_model(ask, model.inner_model)

    def teacher(self, p: Any, settings: Settings) -> Callable[[Any], Denoiser]:
        network = p.sd_model
        try:
            wanted = find_loras(settings.teacher_lora)
            info = checkpoint(settings.teacher)
            if info is not None and info.filename != network.sd_checkpoint_info.filename:
                check_files(network.sd_checkpoint_info.filename, info.filename)
                network = self.load(info)
            else:
                self.release()
            check_pair(p.sd_model, network)
            with active(network):
                loras = Loras(wanted)
                with loras:
                    conditions = conditions_of(p, network, settings.teacher_negative)
        except BaseException:
            self.release()
            raise

        def made(model: Any) -> Denoiser:
            asked = Asked(model, network, *conditions)
            return kdpp.swapped(host_model(asked, asked.denoiser), loras.enter, loras.leave)

        return made

    def load(self, info: Any) -> Any:
        """The model of a checkpoint, beside the active one; the one that is held, if it is that."""
        if self.held is None or self.held.sd_checkpoint_info.filename != info.filename:
            self.release()
            with active_model_kept(), sd_models.SkipWritingToConfig(), torch.random.fork_rng():
                self.held = sd_models.load_model(info)
            self.held.first_stage_model = None  # a teacher decodes nothing
        return self.held

    def release(self) -> None:
        held, self.held = self.held, None
        if held is not None:
            sd_models.send_model_to_trash(held)


def host_model(ask: Callable[..., Any], denoiser: Any) -> kdpp.HostModel:
    """A host's way to ask, with what its denoiser says of its levels."""
    levels = denoiser.sigmas
    return kdpp.HostModel(ask, flow=False, sigma_min=levels[0], sigma_max=levels[-1])


def is_flow(network: Any) -> bool:
    """Whether levels are τ in [0, 1]."""
    return bool(getattr(network, "is_sd3", False))


def refuse_flow(student: Any) -> None:
    """ValueError for a student whose levels are τ: the host runs σ's formulas on them."""
    if is_flow(student):
        raise ValueError("kdpp: in A1111 SD3 has no guided form; take Forge or ComfyUI for it")


# The teacher --------------------------------------------------------------------------------------


def check_pair(student: Any, teacher: Any) -> None:
    """ValueError unless the teacher can be asked where the student is."""
    formats = [latents(one) for one in (student, teacher)]
    if formats[0] != formats[1]:
        words = ["{} channels, scaled by {}".format(*one) for one in formats]
        raise ValueError(
            f"kdpp: the student's latents are of {words[0]}, and the teacher's of {words[1]}; take "
            "a teacher of the student's family"
        )
    if is_flow(student) != is_flow(teacher):
        words = [
            "a flow model" if is_flow(one) else "not a flow model" for one in (student, teacher)
        ]
        raise ValueError(
            f"kdpp: the student is {words[0]} and the teacher is {words[1]}; both must be of one "
            "kind"
        )
    if student is teacher:
        return
    wants = needs(teacher)
    if wants not in ("a prompt", needs(student)):
        raise ValueError(
            f"kdpp: the teacher needs {wants}, which the student has not; take another teacher"
        )
    if sd_unet.current_unet is not None:
        raise ValueError(
            "kdpp: SD Unet (Settings) would answer for the teacher, too; set it to None"
        )


def latents(model: Any) -> tuple[int, float]:
    """What a model's latents are: channels, and their factor."""
    return getattr(model, "latent_channels", 4), round(
        float(getattr(model, "scale_factor", 1.0)), 5
    )


def needs(model: Any) -> str:
    """What a model is given besides the latent."""
    if getattr(model, "cond_stage_key", "") == "edit":
        return "the picture that it edits"
    key = getattr(model.model, "conditioning_key", "crossattn")
    if key in ("hybrid", "concat") or getattr(model, "is_sdxl_inpaint", False):
        return "the masked picture (an inpainting model)"
    return "an embedding of a picture (unCLIP)" if key == "crossattn-adm" else "a prompt"


class Asked:
    """A network as the teacher: its own prompts and CFG, the student's mask and step."""

    def __init__(self, model: Any, network: Any, cond: Any, uncond: Any) -> None:
        self.model, self.cond, self.uncond = model, cond, uncond
        self.adm = getattr(network.model, "conditioning_key", "") == "crossattn-adm"
        self.denoiser = denoiser_of(network)

    def __call__(
        self, x: Tensor, sigma: Tensor, cfg_scale: float, image_cond: Tensor, **_: Any
    ) -> Tensor:
        if shared.state.interrupted or shared.state.skipped:
            raise sd_samplers_common.InterruptedException
        # The student has been asked at this step, and has counted it.
        step = max(self.model.step - 1, 0)
        composed, cond = prompt_parser.reconstruct_multicond_batch(self.cond, step)
        uncond = prompt_parser.reconstruct_cond_batch(self.uncond, step)
        owners = [i for i, parts in enumerate(composed) for _ in parts]
        answers, rest = self.halves(x, sigma, image_cond, cond, uncond, owners)
        # AND: the sum of the parts' guidance. At a CFG scale of 1 this is the condition's alone.
        denoised = rest.clone()
        for i, parts in enumerate(composed):
            for row, weight in parts:
                denoised[i] += cfg_scale * weight * (answers[row] - rest[i])
        return inside_mask(self.model, denoised, sigma)

    def halves(
        self, x: Tensor, sigma: Tensor, image: Tensor, cond: Any, uncond: Any, owners: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Estimates with each prompt and with the negative ones, in one call if that is allowed."""
        rows = [*owners, *range(len(x))]
        if cond.shape[1] == uncond.shape[1] and shared.opts.batch_cond_uncond:
            both = self.ask(x[rows], sigma[rows], image[rows], joined(cond, uncond))
            return both[: len(owners)], both[len(owners) :]
        answers = self.ask(x[owners], sigma[owners], image[owners], cond)
        return answers, self.ask(x, sigma, image, uncond)

    def ask(self, x: Tensor, sigma: Tensor, image: Tensor, text: Any) -> Tensor:
        """The network's estimate of x0."""
        given = dict(text) if isinstance(text, dict) else {"c_crossattn": [text]}
        image_key = {"c_adm": image} if self.adm else {"c_concat": [image]}
        denoised: Tensor = self.denoiser(x, sigma, cond={**given, **image_key})
        return denoised


def denoiser_of(network: Any) -> Any:
    """k-diffusion's denoiser around a network of the host's."""
    make = getattr(network, "create_denoiser", None)
    if make is not None:
        return make()
    of = kdpp.kdiffusion.external
    kind = of.CompVisVDenoiser if network.parameterization == "v" else of.CompVisDenoiser
    return kind(network, quantize=shared.opts.enable_quantization)


def joined(one: Any, other: Any) -> Any:
    """Two batches of texts as one."""
    if isinstance(one, dict):
        return {key: torch.cat([one[key], other[key]]) for key in one}
    return torch.cat([one, other])


# What the host holds one of -----------------------------------------------------------------------


class Loras:
    """The teacher's LoRAs. The host has one list, which every layer obeys when it is called next;
    between ``enter`` and ``leave`` it holds these, and none of the prompt's."""

    def __init__(self, wanted: Sequence[tuple[Any, str, float]]) -> None:
        self.list = getattr(extension(), "loaded_networks", None)
        self.before: list[Any] = []
        self.own = [read_lora(*one) for one in wanted]

    def enter(self) -> None:
        """Put them in the place of the prompt's."""
        if self.list is not None:
            self.before, self.list[:] = [*self.list], self.own

    def leave(self) -> None:
        """Put the prompt's back."""
        if self.list is not None:
            self.list[:] = self.before

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *_: object) -> None:
        self.leave()


def extension() -> Any:
    """The host's extension Lora; None where it is off."""
    found = sys.modules.get("networks")
    return found if hasattr(found, "loaded_networks") else None


def find_loras(text: str) -> list[tuple[Any, str, float]]:
    """The host's entry of each LoRA that the text names, its name and its weight."""
    found = []
    for name, weight in parsed(text):
        lora = extension()
        if lora is None:
            raise ValueError(
                "kdpp: the teacher's LoRAs need the host's extension Lora, which is off"
            )
        if name not in lora.available_network_aliases:
            lora.list_available_networks()
        entry = lora.available_network_aliases.get(name)
        if entry is None or not os.path.isfile(entry.filename):
            raise ValueError(f"kdpp: there is no LoRA {name!r} for the teacher")
        if not entry.filename.endswith(".safetensors"):
            raise ValueError(f"kdpp: the teacher's LoRA {name!r} is not a safetensors file")
        found.append((entry, name, weight))
    return found


def read_lora(entry: Any, name: str, weight: float) -> Any:
    """A LoRA from its file, as the host's own extension reads it."""
    net = extension().load_network(name, entry)
    net.te_multiplier = net.unet_multiplier = weight
    net.dyn_dim = None
    return net


@contextmanager
def active(model: Any) -> Iterator[None]:
    """Another model in the active one's place; nothing is moved."""
    data = sd_models.model_data
    before = data.sd_model
    data.sd_model = model
    try:
        yield
    finally:
        data.sd_model = before


@contextmanager
def active_model_kept() -> Iterator[None]:
    """Inside, a model can be loaded as if there were none; then the active one is active again.

    Whatever the host keeps of the model that it loaded last is put back.
    """
    data, hijack = sd_models.model_data, sd_hijack.model_hijack
    student = data.sd_model
    lists = [data.loaded_sd_models]
    lists += [getattr(extension(), "loaded_networks", [])]
    lists += [shared.loaded_hypernetworks]
    contents = [[*one] for one in lists]
    attributes: Sequence[tuple[Any, str]] = [
        (data, "sd_model"),
        (hijack, "clip"), (hijack, "layers"), (hijack, "optimization_method"),
        (sd_unet, "original_forward"),
        (sd_vae, "base_vae"), (sd_vae, "loaded_vae_file"), (sd_vae, "checkpoint_info"),
    ]  # fmt: skip
    values = [getattr(*one) for one in attributes]
    options = {name: shared.opts.data.get(name) for name in OPTIONS}
    data.sd_model = None
    try:
        yield
    finally:
        for (owner, name), value in zip(attributes, values):
            setattr(owner, name, value)
        for one, content in zip(lists, contents):
            one[:] = content
        for name, option in options.items():
            shared.opts.data.pop(name, None)
            if option is not None:
                shared.opts.data[name] = option
        hijack.embedding_db.load_textual_inversion_embeddings(force_reload=True)
        script_callbacks.model_loaded_callback(student)


OPTIONS = ("sd_model_checkpoint", "sd_checkpoint_hash")
