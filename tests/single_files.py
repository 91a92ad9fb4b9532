"""Tiny pipelines of Stable Diffusion as single files, and transformers alone, in the names that
their authors gave.

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


# Transformers alone -------------------------------------------------------------------------------

SD3 = (
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^transformer_blocks", "joint_blocks"),
    (r"norm1\.linear", "x_block.adaLN_modulation.1"),
    (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
    (r"\.ff\.net\.0\.proj", ".x_block.mlp.fc1"),
    (r"\.ff\.net\.2", ".x_block.mlp.fc2"),
    (r"\.ff_context\.net\.0\.proj", ".context_block.mlp.fc1"),
    (r"\.ff_context\.net\.2", ".context_block.mlp.fc2"),
    (r"attn\.add_(.)_proj", r"context_block.attn.\1"),
    (r"attn\.norm_added_(.)", r"context_block.attn.ln_\1"),
    (r"attn\.to_add_out", "context_block.attn.proj"),
    (r"\.(attn2?)\.norm_(.)", r".x_block.\1.ln_\2"),
    (r"\.(attn2?)\.to_out\.0", r".x_block.\1.proj"),
    (r"\.(attn2?)\.to_(.)\.", r".x_block.\1.\2."),
)
FLUX = (
    (r"^time_text_embed\.timestep_embedder", "time_in"),
    (r"^time_text_embed\.text_embedder", "vector_in"),
    (r"^time_text_embed\.guidance_embedder", "guidance_in"),
    (r"^time_guidance_embed\.timestep_embedder", "time_in"),
    (r"^time_guidance_embed\.guidance_embedder", "guidance_in"),
    (r"_in\.linear_1", "_in.in_layer"),
    (r"_in\.linear_2", "_in.out_layer"),
    (r"^x_embedder", "img_in"),
    (r"^context_embedder", "txt_in"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^(double|single)_stream_modulation(\w*)\.linear", r"\1_stream_modulation\2.lin"),
    (r"^single_transformer_blocks", "single_blocks"),
    (r"^transformer_blocks", "double_blocks"),
    (r"^(single_blocks\.\d+)\.attn\.(to_qkv_mlp_proj)", r"\1.linear1"),
    (r"^(single_blocks\.\d+)\.(attn\.to_out|proj_out)", r"\1.linear2"),
    (r"^(single_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"^(single_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"^(single_blocks\.\d+)\.norm\.linear", r"\1.modulation.lin"),
    (r"^(single_blocks\.\d+)\.attn\.to_", r"\1."),
    (r"\.norm1\.linear", ".img_mod.lin"),
    (r"\.norm1_context\.linear", ".txt_mod.lin"),
    (r"\.ff\.(net\.0\.proj|linear_in)", ".img_mlp.0"),
    (r"\.ff\.(net\.2|linear_out)", ".img_mlp.2"),
    (r"\.ff_context\.(net\.0\.proj|linear_in)", ".txt_mlp.0"),
    (r"\.ff_context\.(net\.2|linear_out)", ".txt_mlp.2"),
    (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
    (r"\.attn\.to_out\.0", ".img_attn.proj"),
    (r"\.attn\.to_add_out", ".txt_attn.proj"),
    (r"\.attn\.add_(.)_proj", r".txt_attn.\1"),
    (r"\.attn\.to_", ".img_attn."),
)
"""FLUX.1 and FLUX.2."""
WAN = (
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"scale_shift_table", "modulation"),
    (r"\.norm2", ".norm3"),
    (r"\.attn1", ".self_attn"),
    (r"\.attn2", ".cross_attn"),
    (r"\.to_out\.0", ".o"),
    (r"\.to_([qkv])", r".\1"),
    (r"\.ffn\.net\.0\.proj", ".ffn.0"),
    (r"\.ffn\.net\.2", ".ffn.2"),
)
Z_IMAGE = (
    (r"^all_x_embedder\.2-1", "x_embedder"),
    (r"^all_final_layer\.2-1", "final_layer"),
    (r"\.norm_([qk])", r".\1_norm"),
    (r"\.to_out\.0", ".out"),
    (r"\.to_([qkv])", r".\1"),
)
KREA_2 = (
    (r"^img_in", "first"),
    (r"^time_embed\.linear_1", "tmlp.0"),
    (r"^time_embed\.linear_2", "tmlp.2"),
    (r"^time_mod_proj", "tproj.1"),
    (r"^txt_in\.norm\.weight", "txtmlp.0.scale"),
    (r"^txt_in\.linear_1", "txtmlp.1"),
    (r"^txt_in\.linear_2", "txtmlp.3"),
    (r"^text_fusion", "txtfusion"),
    (r"^transformer_blocks", "blocks"),
    (r"^final_layer\.scale_shift_table", "last.modulation.lin"),
    (r"^final_layer\.norm\.weight", "last.norm.scale"),
    (r"^final_layer", "last"),
    (r"scale_shift_table", "mod.lin"),
    (r"norm1\.weight", "prenorm.scale"),
    (r"norm2\.weight", "postnorm.scale"),
    (r"attn\.norm_([qk])\.weight", r"attn.qknorm.\1norm.scale"),
    (r"attn\.to_out\.0", "attn.wo"),
    (r"attn\.to_gate", "attn.gate"),
    (r"attn\.to_([qkv])", r"attn.w\1"),
    (r"\.ff\.", ".mlp."),
)


def sd3(network):
    """The last block changes the text no more, and has scale and shift the other way round."""
    made = fused(renamed(network, SD3), "attn", "attn2")
    last = network.config.num_layers - 1
    return swapped(made, "final_layer.ada", f"joint_blocks.{last}.context_block.ada")


def flux(network):
    made = fused(renamed(network, FLUX), "img_attn", "txt_attn")
    parts = ("q", "k", "v", "proj_mlp")
    return swapped(joined(made, "single_blocks", parts, "linear1"), "final_layer.ada")


def flux2(network):
    return swapped(fused(renamed(network, FLUX), "img_attn", "txt_attn"), "final_layer.ada")


def krea2(network):
    """With the six modulations of a block in a row."""
    made = renamed(network, KREA_2)
    return {k: v.flatten() if k.endswith(".mod.lin") else v for k, v in made.items()}


def z_image(network):
    """As ComfyUI has it, with a norm that nothing uses."""
    return {**fused(renamed(network, Z_IMAGE), "attention"), "norm_final.weight": torch.ones(32)}


def qwen_image(network):
    """diffusers' names are the original ones."""
    return network.state_dict()


def wan(network):
    return renamed(network, WAN)


def renamed(network, table):
    """A network's tensors, each name changed by the patterns one after another."""
    made = {}
    for key, tensor in network.state_dict().items():
        for pattern, name in table:
            key = re.sub(pattern, name, key)
        made[key] = tensor
    return made


def joined(tensors, place, parts, whole):
    """The layers ``parts`` that lie beside each other at the place, as one after another."""
    made = dict(tensors)
    for key in tensors:
        if place in key and f".{parts[0]}." in key:
            keys = [key.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            name = key.replace(f".{parts[0]}.", f".{whole}.")
            made[name] = torch.cat([made.pop(k) for k in keys])
    return made


def fused(tensors, *layers):
    """With the three projections of attention as one."""
    for layer in layers:
        tensors = joined(tensors, f".{layer}.", "qkv", "qkv")
    return tensors


def swapped(tensors, *starts):
    """Scale and shift as shift and scale."""
    return {
        key: torch.cat(tensor.chunk(2)[::-1]) if key.startswith(starts) else tensor
        for key, tensor in tensors.items()
    }


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
