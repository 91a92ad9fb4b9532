"""Tiny pipelines of Stable Diffusion as single files, in the names that its authors gave.

The inverse of diffusers' conversion, for networks of any number of blocks.
"""

import re

import diffusers
import torch
import transformers

import tiny_pipelines as tiny
from kdpp.checkpoints import configs
from kdpp.checkpoints.configs import Config, TextEncoder

SIZE = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ONE = {**SIZE, "hidden_size": 16, "projection_dim": 16, "hidden_act": "quick_gelu"}
TWO = {**SIZE, "hidden_size": 24, "projection_dim": 24, "hidden_act": "gelu"}
UNET = {
    "sample_size": 8, "block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 4,
    "layers_per_block": 1,
}  # fmt: skip
VAE = {
    "block_out_channels": [4, 4], "norm_num_groups": 2, "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "scaling_factor": 0.4,
}  # fmt: skip
TINY = {
    "SD 1.x": Config(
        "StableDiffusionPipeline",
        unet={
            **UNET, "cross_attention_dim": 16,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
        vae=VAE,
        texts=(TextEncoder("CLIPTextModel", "cond_stage_model.transformer.", configs.END, ONE),),
    ),
    "SDXL": Config(
        "StableDiffusionXLPipeline",
        unet={
            **UNET, "cross_attention_dim": 40, "use_linear_projection": True,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 24 + 6 * 4,
        },
        vae=VAE,
        texts=(
            TextEncoder("CLIPTextModel", "conditioner.embedders.0.transformer.", configs.END, ONE),
            TextEncoder("CLIPTextModelWithProjection", "conditioner.embedders.1.model.", "!", TWO),
        ),
    ),
}  # fmt: skip

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
          "norm2": "out_layers.0", "conv2": "out_layers.3",
          "conv_shortcut": "skip_connection"}  # fmt: skip
ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embed.cond_proj",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
VAE = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "upsamplers.0": "upsample",
       "downsamplers.0": "downsample", "mid_block.attentions.0": "mid.attn_1",
       "group_norm": "norm", "to_out.0": "proj_out", "to_q": "q", "to_k": "k",
       "to_v": "v"}  # fmt: skip
OPEN_CLIP = {"encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1",
             "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj", "final_layer_norm": "ln_final",
             "embeddings.token_embedding": "token_embedding",
             "embeddings.position_embedding.weight": "positional_embedding"}  # fmt: skip


def single_file(pipe):
    """All tensors of a pipeline as one file has them."""
    xl = hasattr(pipe, "text_encoder_2")
    prefix = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    text = {f"text_model.{k.removeprefix('text_model.')}": v
            for k, v in pipe.text_encoder.state_dict().items()}  # fmt: skip
    return {
        **under("model.diffusion_model.", unet(pipe.unet)),
        **under("first_stage_model.", vae(pipe.vae)),
        **under(prefix, text),
        **(under("conditioner.embedders.1.model.", open_clip(pipe.text_encoder_2)) if xl else {}),
    }


def under(prefix, tensors):
    return {prefix + key: tensor.contiguous() for key, tensor in tensors.items()}


def unet(network):
    every = network.config.layers_per_block + 1
    attention = ["CrossAttn" in kind for kind in network.config.up_block_types]

    def name(key):
        for old, new in ENDS.items():
            if key.startswith(old + "."):
                return new + key.removeprefix(old)
        side, rest = key.split(".", 1)
        found = re.match(r"(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)",
                         rest)  # fmt: skip
        block, kind, layer, rest = int(found[1] or 0), found[2], int(found[3]), found[4]
        if kind == "resnets":
            part = rest.split(".")[0]
            rest = RESNET[part] + rest.removeprefix(part)
        if side == "mid_block":
            return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{rest}"
        place = every * block + layer
        within = {"resnets": 0, "attentions": 1}.get(kind)
        if side == "down_blocks":
            if within is None:
                return f"input_blocks.{every * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
            return f"input_blocks.{place + 1}.{within}.{rest}"
        if within is None:
            return f"output_blocks.{every * (block + 1) - 1}.{1 + attention[block]}.{rest}"
        return f"output_blocks.{place}.{within}.{rest}"

    return {name(key): tensor for key, tensor in network.state_dict().items()}


def vae(network):
    last = len(network.config.up_block_types) - 1

    def name(key):
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{last - int(m[1])}", key)
        key = re.sub(r"down_blocks\.(\d)", r"down.\1", key).replace("resnets", "block")
        for old, new in VAE.items():
            key = key.replace(old, new)
        return key

    def weight(key, tensor):
        return tensor[:, :, None, None] if ".attn_1." in key and tensor.ndim == 2 else tensor

    named = {name(key): tensor for key, tensor in network.state_dict().items()}
    return {key: weight(key, tensor) for key, tensor in named.items()}


def open_clip(encoder):
    """With the three projections of attention as one, and the last transposed."""
    tensors = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    made = {"text_projection": tensors.pop("text_projection.weight").T}
    for key in [key for key in tensors if ".q_proj." in key]:
        three = [tensors.pop(key.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        layer, kind = key.split(".self_attn.q_proj.")
        made[f"{layer}.attn.in_proj_{kind}"] = torch.cat(three)
    made |= tensors
    for old, new in OPEN_CLIP.items():
        made = {key.replace(old, new): tensor for key, tensor in made.items()}
    return made


# Pipelines with a tiny single file ----------------------------------------------------------------


def tokenizers(folder):
    """CLIP's, for the first and the second text encoder."""
    made = []
    for number, text in enumerate(TINY["SDXL"].texts):
        own = folder / str(number)
        own.mkdir()
        configs.write_tokenizer(own, text.padding)
        made.append(transformers.CLIPTokenizer.from_pretrained(own))
    return made


def pipeline(name, tokenizers, seed=0, **settings):
    """The pipeline of which a tiny single file holds the weights."""
    config = TINY[name]
    unet = diffusers.UNet2DConditionModel(**{**config.unet, **settings})
    encoders = [
        tiny.tiny(getattr(transformers, t.kind)(transformers.CLIPTextConfig(**t.settings)), 5)
        for t in config.texts
    ]
    vae = tiny.tiny(diffusers.AutoencoderKL(**config.vae), 6)
    parts = {"vae": vae, "unet": tiny.tiny(unet, seed), "scheduler": tiny.euler()}
    if name == "SDXL":
        return diffusers.StableDiffusionXLPipeline(
            text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1], add_watermarker=False, **parts,
        )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        text_encoder=encoders[0], tokenizer=tokenizers[0], safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **parts,
    )  # fmt: skip
