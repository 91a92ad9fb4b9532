"""Architectures by the names and shapes of their tensors: whole networks, and LoRAs for them.

One table, `FAMILIES`. To add an architecture, give it a line: keys that its networks alone have, in
each layout, and a pattern for the layers that its LoRAs change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kdpp.checkpoints.headers import Entry

Network = Mapping[str, Entry]
"""A network's tensors by their names, without the prefix that a single file gives them."""
Layers = Mapping[str, Mapping[str, Entry]]
"""A LoRA's parts, "lora_down.weight", by the layer that they change."""


@dataclass(frozen=True)
class Family:
    """An architecture, and how it is recognised.

    Attributes:
        name: of the architecture; "" for Stable Diffusion's UNets, which `_stable_diffusion` names.
        original, diffusers: keys that a network has in this layout, all of them.
        lora: a pattern found in the names of layers that its LoRAs change, "." written as "_".
        variant: what tells one such network from another.
        flow: whether it is a flow model.
    """

    name: str
    original: tuple[str, ...]
    diffusers: tuple[str, ...]
    lora: str = ""
    variant: Callable[[Network], str] = lambda network: ""
    flow: bool = True


def _sd_variant(network: Network) -> str:
    entry = network.get("input_blocks.0.0.weight") or network.get("conv_in.weight")
    channels = entry.shape[1] if entry and len(entry.shape) == 4 else 4
    names = {9: "inpainting, 9 input channels", 8: "instruct-pix2pix, 8 input channels", 4: ""}
    return names.get(channels, f"{channels} input channels")


def _sd3_variant(network: Network) -> str:
    if any(".x_block.attn2." in key or ".attn2.to_q." in key for key in network):
        return "3.5 medium"
    normed = any(".attn.ln_q." in key or ".attn.norm_q." in key for key in network)
    return "3.5 large" if normed else "3 medium"


def _flux_variant(network: Network) -> str:
    entry = network.get("img_in.weight") or network.get("x_embedder.weight")
    width = entry.shape[-1] if entry and entry.shape else 64
    extra = {384: " fill", 128: " with a picture beside the noise"}.get(width, "")
    return ("dev" if takes_guidance(network) else "schnell") + extra


def _flux2_variant(network: Network) -> str:
    return "dev" if takes_guidance(network) else "klein"


def _wan_variant(network: Network) -> str:
    patches = network.get("patch_embedding.weight", Entry("F16", ())).shape
    if any(key.startswith("vace_blocks.") for key in network):
        task = "VACE"
    elif len(patches) < 2:
        return ""
    else:
        task = {16: "T2V", 36: "I2V", 48: "TI2V"}.get(patches[1], f"{patches[1]} input channels")
    size = {1536: " 1.3B", 3072: " 5B", 5120: " 14B"}.get(patches[0], "") if patches else ""
    return task + size


FAMILIES = (
    Family(
        "FLUX.2",
        ("double_stream_modulation_img.lin.weight",),
        ("double_stream_modulation_img.linear.weight",),
        r"attn_to_qkv_mlp_proj|^(double|single)_stream_modulation",
        _flux2_variant,
    ),
    Family(
        "FLUX.1",
        ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"),
        (
            "single_transformer_blocks.0.proj_mlp.weight",
            "time_text_embed.text_embedder.linear_1.weight",
        ),
        r"^(double|single)_blocks_\d|^single_transformer_blocks_\d",
        _flux_variant,
    ),
    Family(
        "Qwen-Image",
        ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
        ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
        r"^transformer_blocks_\d+_(img|txt)_(mlp|mod)",
    ),
    Family(
        "Krea 2",
        ("txtfusion.projector.weight",),
        ("text_fusion.projector.weight",),
        r"^(txtfusion|text_fusion)_|^transformer_blocks_\d+_attn_to_gate",
    ),
    Family(
        "SD3",
        ("joint_blocks.0.context_block.attn.qkv.weight",),
        ("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"),
        r"^joint_blocks_\d|^transformer_blocks_\d+_(attn2_to|ff_context|norm1_context)",
        _sd3_variant,
    ),
    Family(
        "Z-Image",
        ("layers.0.adaLN_modulation.0.weight", "cap_embedder.0.weight", "x_embedder.weight"),
        ("layers.0.adaLN_modulation.0.weight", "all_x_embedder.2-1.weight"),
        r"^layers_\d+_(attention_(to_[qkv]|to_out|qkv|out)|feed_forward_w\d|adaLN_modulation_0)",
    ),
    Family(
        "Wan",
        ("head.modulation", "patch_embedding.weight"),
        ("condition_embedder.time_proj.weight", "patch_embedding.weight"),
        r"^blocks_\d+_((self|cross)_attn_[qkvo]|ffn_[02]|ffn_net|attn[12]_(to|add))",
        _wan_variant,
    ),
    Family(
        "Stable Video Diffusion",
        ("input_blocks.1.1.time_stack.0.attn1.to_q.weight",),
        ("down_blocks.0.resnets.0.spatial_res_block.conv1.weight",),
        flow=False,
    ),
    Family(
        "",
        ("input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"),
        ("conv_in.weight", "up_blocks.0.resnets.0.conv1.weight"),
        r"^((input|output)_blocks_\d|middle_block_\d|(down|up)_blocks_\d+_|mid_block_)",
        _sd_variant,
        flow=False,
    ),
)
"""Of several that match, the first."""
FLOWS = {family.name for family in FAMILIES if family.flow}
"""The architectures of flow models."""
CONTEXT = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "SDXL refiner"}
"""Stable Diffusion's UNets by the width of the text that their cross-attention reads."""
GUIDANCE_INPUTS = (
    "time_embed.cond_proj.weight",
    "time_embedding.cond_proj.weight",
    "guidance_in.in_layer.weight",
    "time_text_embed.guidance_embedder.linear_1.weight",
    "time_guidance_embed.guidance_embedder.linear_1.weight",
)
NETWORK_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "net.")


class Recognised(NamedTuple):
    """What a network is: see `kdpp.checkpoints.files.CheckpointFacts`."""

    architecture: str
    variant: str
    layout: str


def network_of(entries: Network) -> Network:
    """The network's own tensors, without the prefix that a single file gives them."""
    for prefix in NETWORK_PREFIXES:
        found = {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
        if found:
            return found
    return entries


def recognise(network: Network) -> Recognised | None:
    """What a network is; None: none that is in `FAMILIES`."""
    for family in FAMILIES:
        for layout, keys in (("diffusers", family.diffusers), ("original", family.original)):
            if all(key in network for key in keys):
                name = family.name or _stable_diffusion(network)
                return Recognised(name, family.variant(network), layout)
    return None


def takes_guidance(network: Network) -> bool:
    """Whether the network takes the CFG scale as an input."""
    return any(key in network for key in GUIDANCE_INPUTS)


def _stable_diffusion(network: Network) -> str:
    """Which Stable Diffusion a UNet is: by the width of its text, or else by its structure."""
    for key, entry in network.items():
        if key.endswith("attn2.to_k.weight") and entry.shape[-1:] and entry.shape[-1] in CONTEXT:
            return CONTEXT[entry.shape[-1]]
    if "label_emb.0.0.weight" in network or "add_embedding.linear_1.weight" in network:
        return "SDXL"
    # SD 2 made the layers around its transformers linear; SD 1 has convolutions there.
    shapes = (
        e.shape
        for k, e in network.items()
        if k.endswith((".1.proj_in.weight", "attentions.0.proj_in.weight"))
    )
    return "SD 2.x" if any(len(shape) == 2 for shape in shapes) else "SD 1.x"


# LoRAs -----------------------------------------------------------------------------------------

LORA_KEY = re.compile(
    r"[._](?P<part>lora_(?:down|up|mid|A|B)(?:\.[\w-]+)?\.weight|lora\.(?:down|up)\.weight"
    r"|lora_linear_layer\.(?:down|up)\.weight|hada_[wt]\d(?:_[ab])?|lokr_[wt]\d(?:_[ab])?"
    r"|oft_(?:diag|blocks)|dora_scale|lora_magnitude_vector(?:\.\w+)*|diff|diff_b|alpha)$"
)
LORA_LAYOUTS = (
    ("LyCORIS", r"(hada|lokr|oft)_|\.diff(_b)?$"),
    ("kohya", r"^lora_(unet|te|transformer)"),
    ("peft", r"^base_model\.model\."),
    ("diffusers", r"^(unet|transformer|transformer_2|text_encoder\w*)\."),
    ("ComfyUI", r"^(model\.)?diffusion_model\."),
    ("peft", r"lora_[AB]"),
    ("plain", r"lora"),
)
"""Of several whose pattern is found in a key, the first."""
LORA_TARGETS = (
    ("text encoder 2", r"^lora_te2_|^text_encoder_2\."),
    ("text encoder", r"^lora_te|^text_encoder|^cond_stage_model\.|^text_encoders\."),
)
LORA_PREFIX = re.compile(
    r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|unet\.|transformer(_2)?\."
    r"|lora_unet_|lora_transformer_)+"
)
LORA_BASES = (
    ("SDXL", r"sdxl|stable-diffusion-xl"),
    ("SD 2.x", r"sd_v?2|stable-diffusion-v2"),
    ("SD 1.x", r"sd_v?1|stable-diffusion-v1"),
    ("SD3", r"sd3|stable-diffusion-3"),
    ("FLUX.2", r"flux-?_?2"),
    ("FLUX.1", r"flux"),
    ("Wan", r"wan"),
    ("Qwen-Image", r"qwen"),
    ("Z-Image", r"z-?_?image"),
)
"""Architectures by the words that training programs write into metadata."""


def lora_layers(entries: Network) -> Layers:
    """The layers that a LoRA changes, each with its parts; empty where there is none."""
    layers: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        if found := LORA_KEY.search(key):
            layers.setdefault(key[: found.start()], {})[found["part"]] = entry
    if not any(part != "alpha" for parts in layers.values() for part in parts):
        return {}
    return layers


def lora_layout(layers: Layers) -> str:
    """Whose names its keys have; "plain" for the network's own without a prefix."""
    keys = [f"{layer}.{part}" for layer, parts in layers.items() for part in parts]
    for name, pattern in LORA_LAYOUTS:
        if any(re.search(pattern, key) for key in keys):
            return name
    return "unknown"


def lora_rank(parts: Mapping[str, Entry]) -> int | None:
    """The rank of one layer's change; None where its form has none."""
    shape = _shape(r"down|lora_A|hada_w1_b|lokr_w\d_b", parts)
    return shape[0] if shape else None


def lora_target(layer: str, architecture: str | None) -> str:
    """The network that a layer is in."""
    for target, pattern in LORA_TARGETS:
        if re.search(pattern, layer.removeprefix("base_model.model.")):
            return target
    return "transformer" if architecture in FLOWS else "UNet"


def lora_architecture(layers: Layers, metadata: Mapping[str, str]) -> str | None:
    """What a LoRA was made for: by the layers it changes, else by what its metadata say."""
    names = {LORA_PREFIX.sub("", layer).replace(".", "_"): parts for layer, parts in layers.items()}
    for family in FAMILIES:
        if family.lora and any(re.search(family.lora, name) for name in names):
            found = family.name or _lora_of_unet(names) or _lora_base(metadata)
            return _which_flux(names) if found == "FLUX.1" else found
    return _lora_base(metadata)


def _lora_of_unet(names: Layers) -> str | None:
    """Which Stable Diffusion: by the width of the text that the changed cross-attention reads."""
    for name, parts in names.items():
        if name.endswith(("attn2_to_k", "attn2_processor_to_k")):
            shape = _shape(r"down|lora_A|hada_w1_b", parts)
            if len(shape) > 1:
                return CONTEXT.get(shape[1])
    return "SDXL" if any(name.startswith("lora_te2_") for name in names) else None


def _which_flux(names: Layers) -> str | None:
    """FLUX.1 or FLUX.2, whose original names are the same: by the gated layers' widths, 7 and 9
    times the stream's, or the 19 double blocks of FLUX.1, of which FLUX.2 has at most 8."""
    if any(name.startswith("single_transformer_blocks") for name in names):
        return "FLUX.1"
    for name, parts in names.items():
        if re.search(r"^single_blocks_\d+_linear1$", name):
            down, up = _shape(r"down|lora_A", parts), _shape(r"lora_up|lora_B", parts)
            if len(down) == len(up) == 2 and down[1]:
                return {7: "FLUX.1", 9: "FLUX.2"}.get(up[0] // down[1])
    blocks = (re.search(r"^double_blocks_(\d{1,3})_", name) for name in names)
    last = max((int(found[1]) for found in blocks if found), default=0)
    return "FLUX.1" if last > 8 else None


def _shape(pattern: str, parts: Mapping[str, Entry]) -> tuple[int, ...]:
    """The shape of a layer's part whose name has the pattern; () where there is none."""
    return next((entry.shape for part, entry in parts.items() if re.search(pattern, part)), ())


def _lora_base(metadata: Mapping[str, str]) -> str | None:
    keys = ("modelspec.architecture", "ss_base_model_version")
    said = " ".join(metadata.get(key, "") for key in keys).lower()
    return next((name for name, pattern in LORA_BASES if re.search(pattern, said)), None)
