"""From loaded pipelines of diffusers and a prompt to a student, a teacher and their conditions.

`from_pipelines` does it in one call. It is made of `denoiser_of`, for the network, and `encode`,
for the prompt. `latent_shape` says what noise to start from, `pipeline_sigmas` at which levels the
pipeline itself would sample, `decode` makes pictures of latents, and `latents_of` is its reverse.
Pipelines stay as they are.

Latents are those that the network is asked about: scaled, not packed, (batch, channels, height,
width), and for Wan (batch, channels, frames, height, width).
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdpp.checkpoints.networks import (
    Experts,
    NormKeepingCFG,
    architecture_of,
    as_denoiser,
    latent_channels,
    resolution_mu,
    scheduler_sigmas,
)
from kdpp.checkpoints.presets import flux2_shift
from kdpp.checkpoints.prompts import Clip, encode_text
from kdpp.checks import check_count
from kdpp.denoisers import map_tensors
from kdpp.memory import without_adapters

__all__ = [
    "FAMILIES",
    "Family",
    "decode",
    "denoiser_of",
    "encode",
    "encoders_of",
    "family_of",
    "from_pipelines",
    "latent_shape",
    "latents_of",
    "network_of",
    "pipeline_sigmas",
    "size_unit",
]

Cond = dict[str, Any]
Texts = list[str] | None
NO_CLIP_SKIP = "clip_skip is for the prompts of SD and SDXL; leave it out"


# How each family encodes its prompts: (cond, uncond), the network's arguments ---------------------


def encode_sd(pipe: Any, prompts: Texts, negatives: Texts, **options: Any) -> tuple[Cond, Cond]:
    if prompts is not None:
        return encode_clip(pipe, prompts, negatives, **options)
    texts = pipe.encode_prompt(
        None, num_images_per_prompt=1, do_classifier_free_guidance=True,
        negative_prompt=negatives, **options,
    )  # fmt: skip
    return {"encoder_hidden_states": texts[0]}, {"encoder_hidden_states": texts[1]}


def encode_sdxl(pipe: Any, prompts: Texts, negatives: Texts, **options: Any) -> tuple[Cond, Cond]:
    """Without the time ids, which `encode` adds."""
    if prompts is not None:
        return encode_clip(pipe, prompts, negatives, **options)
    cond, uncond, pooled, pooled_uncond = pipe.encode_prompt(
        None, negative_prompt=negatives, **options
    )
    return (
        {"encoder_hidden_states": cond, "added_cond_kwargs": {"text_embeds": pooled}},
        {"encoder_hidden_states": uncond, "added_cond_kwargs": {"text_embeds": pooled_uncond}},
    )


def encode_clip(
    pipe: Any, prompts: list[str], negatives: Texts, *, clips: Sequence[Clip], device: Any,
    **second: Any,
) -> tuple[Cond, Cond]:  # fmt: skip
    """Prompts as the web UIs read them (`kdpp.checkpoints.prompts`), each by itself.

    ``second``: SDXL's ``prompt_2`` and ``negative_prompt_2``, the second encoder's texts.
    """
    others = second.keys() - ({"prompt_2", "negative_prompt_2"} if len(clips) > 1 else set())
    if others:
        raise TypeError(f"encode takes no {', '.join(sorted(others))} beside a prompt")

    def half(texts: list[str], texts_2: str | Sequence[str] | None) -> list[Any]:
        rows = [texts_2] * len(texts) if isinstance(texts_2, str) else texts_2 or texts
        if len(rows) != len(texts):
            raise ValueError(f"{len(rows)} second prompts for {len(texts)} prompts; give as many")
        pairs = list(zip(texts, rows))
        known = {
            pair: encode_text(clips, [pipe.maybe_convert_prompt(text, clip.tokenizer)
                                      for text, clip in zip(pair, clips)], device)
            for pair in dict.fromkeys(pairs)
        }  # fmt: skip
        return [known[pair] for pair in pairs]

    with read_to_the_end(pipe):
        cond = half(prompts, second.get("prompt_2"))
        if negatives is None and pipe.config.get("force_zeros_for_empty_prompt"):
            uncond = [tuple(map(torch.zeros_like, one)) for one in cond]
        else:
            uncond = half(negatives or [""] * len(prompts), second.get("negative_prompt_2"))
    halves = [[states for states, _ in half] for half in (cond, uncond)]
    made = padded(*halves, mask="encoder_attention_mask")
    if cond[0][1] is not None:
        for one, texts in zip(made, (cond, uncond)):
            one["added_cond_kwargs"] = {"text_embeds": torch.stack([pooled for _, pooled in texts])}
    return made


@contextmanager
def read_to_the_end(pipe: Any) -> Iterator[None]:
    """Inside, nobody warns of more than CLIP's 77 tokens: in chunks, or by T5, all are read.

    (That T5 takes no more than ``max_sequence_length`` is still warned of.)
    """

    def keep(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return "CLIP can only handle" not in said and "Token indices sequence length" not in said

    names = (type(pipe).__module__, "transformers.tokenization_utils_base")
    loggers = [logging.getLogger(name) for name in names]
    try:
        for logger in loggers:
            logger.addFilter(keep)
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


def clips_of(pipe: Any, clip_skip: int | None) -> list[Clip]:
    """The CLIP text encoders of a pipeline, read at the layer that is asked for, or at its own.

    Raises ValueError where there is no such layer, TypeError where there are no encoders.
    """
    own = family_of(pipe).clip_layer
    if own is None:
        raise ValueError(NO_CLIP_SKIP)
    parts = [
        (getattr(pipe, f"tokenizer{i}"), encoder)
        for i in ("", "_2")
        if (encoder := getattr(pipe, f"text_encoder{i}", None)) is not None
    ]
    if not parts:
        raise TypeError(f"this {type(pipe).__name__} was loaded without its text encoders")
    last = min(encoder.config.num_hidden_layers for _, encoder in parts)
    layer = own if clip_skip is None else check_count("clip_skip", clip_skip, own)
    if layer > last:
        raise ValueError(f"clip_skip is {layer}; it must be in {own} … {last}")
    # SDXL is trained on the layer before the last as it comes, the others with the last norm.
    return [Clip(*part, layer, normed=own == 1) for part in parts]


def encode_sd3(pipe: Any, prompts: Texts, negatives: Texts, **options: Any) -> tuple[Cond, Cond]:
    others = {"prompt_2": None, "prompt_3": None, **options}
    with nullcontext() if pipe.text_encoder_3 is None else read_to_the_end(pipe):
        cond, uncond, pooled, pooled_uncond = pipe.encode_prompt(
            prompts, negative_prompt=negatives, **others
        )
    return (
        {"encoder_hidden_states": cond, "pooled_projections": pooled},
        {"encoder_hidden_states": uncond, "pooled_projections": pooled_uncond},
    )


def encode_flux(pipe: Any, prompts: Texts, negatives: Texts, **options: Any) -> tuple[Cond, Cond]:
    def half(prompts: Texts, options: Cond) -> Cond:
        text, pooled, _ = pipe.encode_prompt(prompts, **{"prompt_2": None, **options})
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    with read_to_the_end(pipe):
        return in_turn(half, prompts, negatives, options)


def encode_z_image(
    pipe: Any, prompts: Texts, negatives: Texts, **options: Any
) -> tuple[Cond, Cond]:
    def half(prompts: Texts, options: Cond) -> list[Tensor]:
        texts, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **options)
        return list(texts)

    return padded(*in_turn(half, prompts, negatives, options))


def encode_qwen_image(
    pipe: Any, prompts: Texts, negatives: Texts, **options: Any
) -> tuple[Cond, Cond]:
    def half(prompts: Texts, options: Cond) -> list[Tensor]:
        options = {"max_sequence_length": 512, **options}  # what the pipeline itself asks for
        texts, mask = pipe.encode_prompt(prompts, **options)
        rows = list(texts)
        return rows if mask is None else [row[kept] for row, kept in zip(rows, mask.bool())]

    return padded(*in_turn(half, prompts, negatives, options))


def encode_flux2(pipe: Any, prompts: Texts, negatives: Texts, **options: Any) -> tuple[Cond, Cond]:
    def half(prompts: Texts, options: Cond) -> Cond:
        text, _ = pipe.encode_prompt(prompts, **options)
        return {"encoder_hidden_states": text}

    return in_turn(half, prompts, negatives, options)


def encode_krea2(pipe: Any, prompts: Texts, negatives: Texts, **options: Any) -> tuple[Cond, Cond]:
    def half(prompts: Texts, options: Cond) -> Cond:
        text, mask = pipe.encode_prompt(prompts, **options)
        return {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}

    return in_turn(half, prompts, negatives, options)


def encode_wan(pipe: Any, prompts: Texts, negatives: Texts, **options: Any) -> tuple[Cond, Cond]:
    options = {"max_sequence_length": 512, **options}  # what the pipeline itself asks for
    texts = pipe.encode_prompt(prompts, negative_prompt=negatives, **options)
    return {"encoder_hidden_states": texts[0]}, {"encoder_hidden_states": texts[1]}


def in_turn(
    half: Callable[[Texts, Cond], Any], prompts: Texts, negatives: Texts, options: Cond
) -> tuple[Any, Any]:
    """Both halves by one function; of the options about prompts, each has its own."""
    shared = {key: value for key, value in options.items() if "prompt" not in key}
    own = {key: value for key, value in options.items() if key not in shared}
    other = {key: own.pop(key) for key in list(own) if key.startswith("negative_")}
    cond = half(prompts, shared | own)
    if negatives is None and not other:
        negatives = [""] * len(prompts or options["prompt_embeds"])
    renamed = {key.removeprefix("negative_"): value for key, value in other.items()}
    return cond, half(negatives, shared | renamed)


def padded(*halves: list[Tensor], mask: str = "encoder_hidden_states_mask") -> tuple[Cond, Cond]:
    """Texts of many lengths as one tensor each, with zeros behind, and a mask if any has some."""
    longest = max(len(text) for half in halves for text in half)
    made = []
    for texts in halves:
        rows = [nn.functional.pad(text, (0, 0, 0, longest - len(text))) for text in texts]
        made.append({"encoder_hidden_states": torch.stack(rows)})
    if any(len(text) < longest for half in halves for text in half):
        for one, texts in zip(made, halves):
            lengths = torch.tensor([[len(text)] for text in texts])
            one[mask] = (torch.arange(longest) < lengths).to(texts[0].device)
    return made[0], made[1]


def flux2_mu(pipe: Any, tokens: int, steps: int) -> float:
    return math.log(flux2_shift(tokens, steps))


def krea2_mu(pipe: Any, tokens: int, steps: int) -> float:
    """That of Krea 2 Turbo is the same at every size."""
    return 1.15 if pipe.config.is_distilled else resolution_mu(pipe.scheduler.config, tokens, 6400)


class Family(NamedTuple):
    """What kdpp knows of a class of pipelines."""

    encode: Callable[..., tuple[Cond, Cond]]
    """``(pipe, prompts, negatives, **options) -> (cond, uncond)``."""
    network: str = "transformer"
    """The pipeline's network."""
    even: bool = False
    """Whether it spaces levels evenly before the shift (`scheduler_sigmas`)."""
    video: bool = False
    """Whether its VAE is one for videos."""
    clip_layer: int | None = None
    """The layer of its CLIP text encoders that it reads, counted from the last, which is 1. None:
    larger encoders read its texts, which are taken as they are."""
    cfg: Callable[[nn.Module], nn.Module] | None = None
    """Its own kind of CFG, if that is not the usual one."""
    patches: int = 1
    """How many of the VAE's places, in both directions, one of its latent's places is made of."""
    mu: Callable[[Any, int, int], float] | None = None
    """``(pipe, tokens, steps) -> mu``, where it is not the scheduler's."""


FAMILIES = {
    "StableDiffusionPipeline": Family(encode_sd, "unet", clip_layer=1),
    "LatentConsistencyModelPipeline": Family(encode_sd, "unet", clip_layer=1),
    "StableDiffusionXLPipeline": Family(encode_sdxl, "unet", clip_layer=2),
    "StableDiffusion3Pipeline": Family(encode_sd3),
    "FluxPipeline": Family(encode_flux, even=True),
    "Flux2KleinPipeline": Family(encode_flux2, even=True, patches=2, mu=flux2_mu),
    "Krea2Pipeline": Family(encode_krea2, even=True, video=True, mu=krea2_mu),
    "ZImagePipeline": Family(encode_z_image, even=True),
    "QwenImagePipeline": Family(encode_qwen_image, even=True, video=True, cfg=NormKeepingCFG),
    "WanPipeline": Family(encode_wan, video=True),
}
"""Every pipeline that kdpp knows, by the name of its class in diffusers."""


def family_of(pipe: Any) -> Family:
    """The pipeline's entry in `FAMILIES`, also of its forms: for image to image, modular, ….

    Raises TypeError for a class that is not there.
    """
    return FAMILIES[family_name(pipe)]


def family_name(pipe: Any) -> str:
    """The name of that entry."""
    for kind in type(pipe).__mro__:
        name = re.sub("Img2Img|Inpaint|Modular", "", kind.__name__)
        if name in FAMILIES:
            return name
    raise TypeError(
        f"{type(pipe).__name__} is not a pipeline that kdpp knows; it knows diffusers' "
        f"{', '.join(FAMILIES)}, and their Img2Img, Inpaint and Modular"
    )


def ordinary(pipe: Any) -> Any:
    """A modular pipeline's parts as an ordinary one, which encodes prompts; others as they are."""
    if "Modular" not in type(pipe).__name__:
        return pipe
    kind = getattr(importlib.import_module("diffusers"), family_name(pipe))
    known = {**pipe.config, **pipe.components}
    parts = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in known or parameter.default is parameter.empty:
            parts[name] = known.get(name)
    return kind(**parts)


def network_of(pipe: Any) -> Any:
    """Its UNet or transformer; TypeError for a pipeline that is not known or was loaded without."""
    name = family_of(pipe).network
    network = getattr(pipe, name, None)
    if network is None:
        raise TypeError(f"this {type(pipe).__name__} was loaded without its {name}")
    return network


def encoders_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's text encoders, by name."""
    return {
        name: part
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and part is not None
    }


def denoiser_of(pipe: Any, *, lcm: bool | None = None, device: Any = None) -> nn.Module:
    """The pipeline's network as a denoiser, by its scheduler (`as_denoiser`).

    Two networks, as Wan 2.2 has them, are one denoiser (`Experts`). CFG is as the pipeline does it,
    which for Qwen-Image is `NormKeepingCFG`. ``lcm`` is that of `as_denoiser`; ``device`` is where
    the levels lie, by default where the pipeline computes.

    Raises TypeError or ValueError for a pipeline that is not in `FAMILIES`, without a network, or
    whose scheduler does not fit it.
    """
    family, network = family_of(pipe), network_of(pipe)
    settings = {"device": pipe._execution_device if device is None else device, "lcm": lcm}
    denoiser = as_denoiser(network, pipe.scheduler, **settings)
    second, boundary = getattr(pipe, "transformer_2", None), pipe.config.get("boundary_ratio")
    if second is not None and boundary is not None:
        denoiser = Experts(denoiser, as_denoiser(second, pipe.scheduler, **settings), boundary)
    return denoiser if family.cfg is None else family.cfg(denoiser)


@torch.no_grad()
def encode(
    pipe: Any,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    clip_skip: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """``{"cond": …, "uncond": …}`` of prompts, by the pipeline's own text encoders.

    What `as_denoiser` describes, in the network's dtype, with one row for each prompt. SD, LCM and
    SDXL take prompts as the web UIs read them, of any length and with weights in brackets
    (`kdpp.checkpoints.prompts`); where texts differ in length, shorter ones are padded and masked,
    so that a row is the same beside any others. The other pipelines take texts as they are.

    Args:
        prompt: one text, or one for each picture. None: its embeddings are among the options.
        negative_prompt: one for all, or one for each. None: what the pipeline takes then, the empty
            text or (SDXL) zeros.
        height, width: the size of the pictures in pixels, which SDXL is told; None: the size that
            its UNet was trained at.
        clip_skip: the layer of CLIP that is read, as the web UIs count: 1 is the last, 2 the one
            before. (diffusers' own option counts otherwise.) None: 1, for SDXL 2, which is its
            least.
        options: what else ``pipe.encode_prompt`` takes, such as ``prompt_2``, or ``prompt_embeds``
            with ``negative_prompt_embeds``.

    Raises:
        TypeError: the pipeline is not one of `FAMILIES`, has no text encoders, or an option does
            not go with a prompt.
        ValueError: there is no prompt, or the number of negative prompts is not that of prompts; a
            prompt holds what the web UIs read and kdpp does not (`kdpp.checkpoints.prompts`); or
            there is no such layer.
    """
    pipe = ordinary(pipe)
    family, network = family_of(pipe), network_of(pipe)
    if prompt is None and options.get("prompt_embeds") is None:
        raise ValueError("give a prompt, or prompt_embeds")
    # Copies: Z-Image's pipeline writes into its list.
    prompts = [prompt] if isinstance(prompt, str) else prompt and list(prompt)
    negatives = negative_prompt
    if isinstance(negatives, str):
        negatives = [negatives] * len(prompts or options["prompt_embeds"])
    if prompts and negatives is not None and len(negatives) != len(prompts):
        raise ValueError(
            f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one for all, or "
            "one for each"
        )
    negatives = negatives and list(negatives)
    if prompts and family.clip_layer:
        options["clips"] = clips_of(pipe, clip_skip)
    elif clip_skip is not None:
        raise ValueError(NO_CLIP_SKIP)
    options = {"device": pipe._execution_device, **options}
    halves = family.encode(pipe, prompts, negatives, **options)
    if family.encode is encode_sdxl:
        side = network.config.sample_size * pipe.vae_scale_factor
        size = (side if height is None else height, side if width is None else width)
        for half in halves:
            ids = half["encoder_hidden_states"].new_tensor([*size, 0, 0, *size])
            rows = ids.expand(len(half["encoder_hidden_states"]), -1)
            half["added_cond_kwargs"]["time_ids"] = rows.contiguous()
    cond, uncond = map_tensors(
        halves, lambda text: text.to(network.dtype) if text.is_floating_point() else text
    )
    return {"cond": cond, "uncond": uncond}


def from_pipelines(
    pipe: Any,
    teacher_pipe: Any = None,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    **options: Any,
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Student, teacher and ``extra_args`` of two loaded pipelines and a prompt::

        student, teacher, extra_args = from_pipelines(pipe, teacher_pipe, "a lighthouse", "blurry")
        model = kdpp.TeacherGuidedDenoiser(student, teacher, teacher_scale=0.1)
        latents = kdpp.sample_euler_tg(model, noise * sigmas[0], sigmas, extra_args)
        pictures = decode(pipe, latents)

    Args:
        pipe: the student's pipeline, whose text encoders encode the prompt for both.
        teacher_pipe: the teacher's. None, or ``pipe`` itself: the student without its LoRAs
            (`kdpp.without_adapters`), or, where it has none, the student once more.
        prompt, negative_prompt, height, width, options: as in `encode`, clip_skip too.

    Raises:
        TypeError: a pipeline is not one of `FAMILIES`, lacks its network, or has a scheduler
            without the levels that its network needs.
        ValueError: student and teacher do not share latents or texts, or a prompt is missing.
    """
    student = denoiser_of(pipe)
    teacher = teacher_of(pipe, teacher_pipe, student)
    sizes = {"height": height, "width": width}
    return student, teacher, encode(pipe, prompt, negative_prompt, **sizes, **options)


def teacher_of(pipe: Any, teacher_pipe: Any, student: nn.Module) -> nn.Module:
    """The teacher's denoiser; see `from_pipelines`."""
    if teacher_pipe is not None and teacher_pipe is not pipe:
        check_alike(pipe, teacher_pipe)
        return denoiser_of(teacher_pipe)
    if getattr(network_of(pipe), "peft_config", None):
        return without_adapters(denoiser_of(pipe, lcm=False))
    return student


def check_alike(pipe: Any, teacher_pipe: Any) -> None:
    """ValueError where one prompt and one latent do not serve both."""
    student, teacher = network_of(pipe), network_of(teacher_pipe)
    names = f"the student ({type(pipe).__name__}) and the teacher ({type(teacher_pipe).__name__})"
    flow = [one for one in (student, teacher) if architecture_of(one).flow]
    if len(flow) == 1:
        raise ValueError(f"of {names}, only one is a flow model; they must both be, or neither")
    channels = latent_channels(student), latent_channels(teacher)
    if channels[0] != channels[1]:
        raise ValueError(
            f"{names} have latents of {channels[0]} and {channels[1]} channels; they must share "
            "one latent space (a kdpp.Teacher with maps= can lie in another)"
        )
    widths = [one.config.get(architecture_of(one).text_width) for one in (student, teacher)]
    if family_of(pipe).encode is not family_of(teacher_pipe).encode or widths[0] != widths[1]:
        raise ValueError(
            f"{names} take different texts (of width {widths[0]} and {widths[1]}): make the "
            "teacher by hand, kdpp.Teacher(denoiser_of(teacher_pipe), "
            "extra_args=encode(teacher_pipe, prompt))"
        )


# Latents ------------------------------------------------------------------------------------------


def latent_shape(pipe: Any, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
    """The shape of one picture's latent: (channels, height, width); Wan's has frames, too.

    Raises:
        ValueError: a size in pixels, or a number of frames, that the network cannot be asked for.
    """
    wan, unit, scale = makes_videos(pipe), size_unit(pipe), pixels_per_latent(pipe)
    for name, size in (("height", height), ("width", width)):
        if check_count(name, size, unit) % unit:
            raise ValueError(f"{name} is {size}; it must be a multiple of {unit}")
    every = pipe.vae_scale_factor_temporal if wan else 1
    if (check_count("frames", frames, 1) - 1) % every or (frames > 1 and not wan):
        allowed = f"1 more than a multiple of {every}" if wan else "1: this is a model of pictures"
        raise ValueError(f"frames is {frames}; it must be {allowed}")
    between = ((frames - 1) // every + 1,) if wan else ()
    return (latent_channels(network_of(pipe)), *between, height // scale, width // scale)


def makes_videos(pipe: Any) -> bool:
    """Whether its latents have frames."""
    return family_of(pipe).encode is encode_wan


def pixels_per_latent(pipe: Any) -> int:
    """How many pixels wide and high one place of the latent is."""
    if makes_videos(pipe):
        return int(pipe.vae_scale_factor_spatial)
    return int(pipe.vae_scale_factor * family_of(pipe).patches)


def size_unit(pipe: Any) -> int:
    """What the height and the width of its pictures are multiples of, in pixels."""
    family = family_of(pipe)
    one = family.network == "unet" or family.patches > 1  # a transformer's patch is 2 places wide
    return pixels_per_latent(pipe) * (1 if one else 2)


def pipeline_sigmas(pipe: Any, steps: int, height: int, width: int) -> Tensor:
    """The levels at which the pipeline samples a picture of that size in n steps, and 0.

    They are the pipeline's own, whatever its student was trained at; see `trailing_sigmas` and
    `flow_sigmas`.
    """
    family, (rows, columns) = family_of(pipe), latent_shape(pipe, height, width)[-2:]
    side = 2 // family.patches
    tokens = (rows // side) * (columns // side)
    mu = None if family.mu is None else family.mu(pipe, tokens, steps)
    return scheduler_sigmas(pipe.scheduler, steps, tokens=tokens, even=family.even, mu=mu)


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """The pictures of latents: numbers in [0, 1], (batch, 3, height, width), Wan's with frames.

    The VAE decodes ``latents / scaling_factor + shift_factor``, or, where it knows the mean and the
    deviation of each channel, ``latents · std / scaling_factor + mean``. One that overflows in
    float16, as SDXL's does (``force_upcast``), decodes in float32.
    """
    pictures_only = family_of(pipe).video and latents.ndim == 4
    z = latents.to(vae_device(pipe), torch.float32)
    z = z.unsqueeze(2) if pictures_only else z
    factor, std, mean = scaling(pipe, z)
    z, patches = z / factor * std + mean, family_of(pipe).patches
    z = nn.functional.pixel_shuffle(z, patches) if patches > 1 else z
    pictures = in_range(pipe, lambda vae: vae.decode(z.to(vae.dtype), return_dict=False)[0])
    pictures = pictures[:, :, 0] if pictures_only else pictures
    return (pictures.float() / 2.0 + 0.5).clamp(0.0, 1.0)


@torch.no_grad()
def latents_of(pipe: Any, pictures: Tensor) -> Tensor:
    """The latents of pictures in [0, 1]: the reverse of `decode`, in float32.

    They are the mode of the VAE's distribution, (z - shift_factor) · scaling_factor, or
    (z - mean)/std · scaling_factor. So they depend on the pictures alone: diffusers' pipelines draw
    from the distribution instead, whose deviation is small beside the noise that follows.
    """
    pictures_only = family_of(pipe).video and pictures.ndim == 4
    x = pictures.to(vae_device(pipe), torch.float32) * 2.0 - 1.0
    x = x.unsqueeze(2) if pictures_only else x

    def encoded(vae: Any) -> Tensor:
        found = vae.encode(x.to(vae.dtype))
        # A tiny autoencoder (TAESD) has no distribution.
        z: Tensor = found.latent_dist.mode() if "latent_dist" in found else found.latents
        return z

    z, patches = in_range(pipe, encoded).float(), family_of(pipe).patches
    z = nn.functional.pixel_unshuffle(z, patches) if patches > 1 else z
    factor, std, mean = scaling(pipe, z)
    latents: Tensor = (z - mean) / std * factor
    return latents[:, :, 0] if pictures_only else latents


def vae_device(pipe: Any) -> torch.device:
    """Where the VAE computes: where it lies, or, offloaded by diffusers, where it will come to."""
    here: torch.device = pipe.vae.device
    there: torch.device = pipe._execution_device
    return there if here.type in ("cpu", "meta") else here


def scaling(pipe: Any, z: Tensor) -> tuple[float, Any, Any]:
    """factor, std and mean of ``z = latents / factor · std + mean``, by the VAE's settings."""
    config = pipe.vae.config
    factor, std, mean, shift = (
        config.get(name)
        for name in ("scaling_factor", "latents_std", "latents_mean", "shift_factor")
    )
    over_channels = (1, -1, *[1] * (z.ndim - 2))
    if family_of(pipe).patches > 1:
        norm = pipe.vae.bn
        std, mean = (norm.running_var + config.batch_norm_eps).sqrt(), norm.running_mean
    elif mean is None or std is None:
        return factor or 1.0, 1.0, shift or 0.0
    else:
        std, mean = z.new_tensor(std), z.new_tensor(mean)
    return factor or 1.0, std.view(over_channels), mean.view(over_channels)


def in_range(pipe: Any, compute: Callable[[Any], Tensor]) -> Tensor:
    """What the VAE computes: in its own dtype; in float32 where float16 overflows.

    Of diffusers' pipelines SDXL's alone heeds ``force_upcast``, which other VAEs have by default.
    """
    vae = pipe.vae
    if vae.dtype != torch.float16:
        return compute(vae)
    if not (family_of(pipe).encode is encode_sdxl and vae.config.get("force_upcast", False)):
        found = compute(vae)
        if found.isfinite().all():
            return found
    try:
        return compute(vae.to(torch.float32))
    finally:
        vae.to(torch.float16)
