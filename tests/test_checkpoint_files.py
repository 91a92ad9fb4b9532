"""What a file is: recognised from headers with the keys of real checkpoints; the rest refused."""

import json
import pickle
import struct
import warnings
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kdpp.checkpoints import files
from kdpp.checkpoints.files import CheckpointFacts, inspect
from kdpp.checkpoints.presets import fitting, named
from kdpp.cli import main

HALF = torch.float16


def write(path, shapes, metadata=None, dtype=HALF, **tensors):
    """A safetensors file with zeros of these shapes."""
    zeros = {key: torch.zeros(shape, dtype=dtype) for key, shape in shapes.items()}
    save_file({**zeros, **tensors}, path, metadata)
    return path


def raw(path, header, data=b"", length=None):
    """A file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def under(prefix, keys):
    return {prefix + key: shape for key, shape in keys.items()}


# Keys and the widths that matter, as the published files have them; other sizes are small.
LDM = "model.diffusion_model."
UNET = {
    "input_blocks.0.0.weight": (8, 4, 3, 3),
    "output_blocks.0.0.in_layers.0.weight": (8,),
    "time_embed.0.weight": (8, 8),
}
SD1 = {
    **UNET,
    "input_blocks.1.1.proj_in.weight": (8, 8, 1, 1),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 768),
    "output_blocks.11.0.skip_connection.weight": (8, 8, 1, 1),
}
SD2 = {
    **UNET,
    "input_blocks.1.1.proj_in.weight": (8, 8),
    "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (8, 1024),
}
SDXL = {
    **UNET,
    "label_emb.0.0.weight": (8, 2816),
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (8, 2048),
}
REFINER = {
    **UNET,
    "label_emb.0.0.weight": (8, 2560),
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (8, 1280),
}
MMDIT = {
    "joint_blocks.0.context_block.attn.qkv.weight": (24, 8),
    "joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
    "x_embedder.proj.weight": (8, 16, 2, 2),
}
SD3 = {**MMDIT, "pos_embed": (1, 36864, 1)}
SD35_MEDIUM = {
    **MMDIT,
    "pos_embed": (1, 147456, 1),
    "joint_blocks.0.x_block.attn2.qkv.weight": (24, 8),
    "joint_blocks.0.x_block.attn.ln_q.weight": (8,),
}
SD35_LARGE = {
    **MMDIT,
    "joint_blocks.0.context_block.adaLN_modulation.1.bias": (14592,),
    "joint_blocks.0.x_block.attn.ln_q.weight": (8,),
    "joint_blocks.37.x_block.mlp.fc1.weight": (8, 8),
}
SCHNELL = {
    "double_blocks.0.img_attn.qkv.weight": (24, 8),
    "double_blocks.0.img_attn.norm.key_norm.scale": (8,),
    "single_blocks.0.linear1.weight": (56, 8),
    "vector_in.in_layer.weight": (8, 8),
    "img_in.weight": (8, 64),
}
DEV = {
    **SCHNELL,
    "guidance_in.in_layer.weight": (8, 8),
    "guidance_in.in_layer.bias": (8,),
}
FLUX2 = {
    "double_stream_modulation_img.lin.weight": (8, 8),
    "single_stream_modulation.lin.weight": (8, 8),
    "double_blocks.0.img_attn.qkv.weight": (24, 8),
    "img_in.weight": (8, 128),
}
Z_IMAGE = {
    "layers.0.adaLN_modulation.0.weight": (8, 8),
    "cap_embedder.0.weight": (8,),
    "x_embedder.weight": (8, 64),
    "layers.0.attention.qkv.weight": (24, 8),
}
WAN = {"head.modulation": (1, 2, 8), "blocks.0.self_attn.q.weight": (8, 8)}
KREA = {"txtfusion.projector.weight": (8, 8), "blocks.0.attn.wq.weight": (8, 8)}


def patches(dim, channels):
    return {**WAN, "patch_embedding.weight": (dim, channels, 1, 2, 2)}


ORIGINAL = {
    "sd1": (under(LDM, SD1), "SD 1.x", "", "v1"),
    "sd1-inpainting": (
        under(LDM, {**SD1, "input_blocks.0.0.weight": (8, 9, 3, 3)}),
        "SD 1.x", "inpainting, 9 input channels", "inpainting",
    ),
    "sd2": (under(LDM, SD2), "SD 2.x", "", "v2"),
    "sdxl": (
        {**under(LDM, SDXL),
         "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (8,)},
        "SDXL", "", "xl_base",
    ),
    "refiner": (
        {**under(LDM, REFINER),
         "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (8,)},
        "SDXL refiner", "", "xl_refiner",
    ),
    "sd3": (under(LDM, SD3), "SD3", "3 medium", "sd3"),
    "sd3.5-medium": (under(LDM, SD35_MEDIUM), "SD3", "3.5 medium", "sd35_medium"),
    "sd3.5-large": (under(LDM, SD35_LARGE), "SD3", "3.5 large", "sd35_large"),
    "flux-schnell": (SCHNELL, "FLUX.1", "schnell", "flux-schnell"),
    "flux-dev": (under(LDM, DEV), "FLUX.1", "dev", "flux-dev"),
    "flux-fill": ({**DEV, "img_in.weight": (8, 384)}, "FLUX.1", "dev fill", "flux-fill"),
    "flux2": (FLUX2, "FLUX.2", "klein", "flux-2-dev"),
    "z-image": (Z_IMAGE, "Z-Image", "", "z-image-turbo"),
    "wan-1.3b": (patches(1536, 16), "Wan", "T2V 1.3B", "wan-t2v-1.3B"),
    "wan-14b": (patches(5120, 16), "Wan", "T2V 14B", "wan-t2v-14B"),
    "wan-i2v": (under(LDM, patches(5120, 36)), "Wan", "I2V 14B", "wan-i2v-14B"),
    "krea2": (KREA, "Krea 2", "", "krea2"),
}  # fmt: skip


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_files(name, tmp_path):
    """By their keys; diffusers' own detection says the same of them."""
    shapes, architecture, variant, theirs = ORIGINAL[name]
    facts = inspect(write(tmp_path / "model.safetensors", shapes))
    assert (facts.kind, facts.architecture, facts.variant) == ("model", architecture, variant)
    assert facts.layout == "original names" and facts.precision == (("float16", 1.0),)
    flow = not architecture.startswith("SD ") and not architecture.startswith("SDXL")
    assert facts.prediction == ("flow" if flow else None)
    utils = pytest.importorskip(
        "diffusers.loaders.single_file_utils", reason="compared with diffusers"
    )
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert utils.infer_diffusers_model_type(tensors) == theirs


SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
MMDIT_SMALL = {**SMALL, "joint_attention_dim": 8, "pooled_projection_dim": 8}
UNET_SMALL = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 16,
}
Z_SMALL = {"n_layers": 1, "n_refiner_layers": 1, "dim": 32, "n_heads": 2, "n_kv_heads": 2,
           "axes_dims": [4, 4, 8], "axes_lens": [8, 8, 8], "cap_feat_dim": 8}  # fmt: skip
DIFFUSERS = {
    "sd1": ("UNet2DConditionModel", {**UNET_SMALL, "cross_attention_dim": 768}, "SD 1.x", ""),
    "sd2": (
        "UNet2DConditionModel",
        {**UNET_SMALL, "cross_attention_dim": 1024, "use_linear_projection": True},
        "SD 2.x", "",
    ),
    "sdxl": (
        "UNet2DConditionModel", {**UNET_SMALL, **TEXT_TIME, "cross_attention_dim": 2048},
        "SDXL", "",
    ),
    "tiny sd1": ("UNet2DConditionModel", {**UNET_SMALL, "cross_attention_dim": 8}, "SD 1.x", ""),
    "tiny sd2": (
        "UNet2DConditionModel",
        {**UNET_SMALL, "cross_attention_dim": 8, "use_linear_projection": True},
        "SD 2.x", "",
    ),
    "tiny sdxl": (
        "UNet2DConditionModel", {**UNET_SMALL, **TEXT_TIME, "cross_attention_dim": 8}, "SDXL", ""
    ),
    "sd3": ("SD3Transformer2DModel", MMDIT_SMALL, "SD3", "3 medium"),
    "sd3.5": (
        "SD3Transformer2DModel", {**MMDIT_SMALL, "qk_norm": "rms_norm"}, "SD3", "3.5 large"
    ),
    "schnell": (
        "FluxTransformer2DModel",
        {**MMDIT_SMALL, "num_single_layers": 1, "axes_dims_rope": (4, 4, 8)}, "FLUX.1", "schnell",
    ),
    "dev": (
        "FluxTransformer2DModel",
        {**MMDIT_SMALL, "num_single_layers": 1, "axes_dims_rope": (4, 4, 8),
         "guidance_embeds": True},
        "FLUX.1", "dev",
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {**SMALL, "num_single_layers": 1, "joint_attention_dim": 8, "axes_dims_rope": (4, 4, 4, 4)},
        "FLUX.2", "dev",
    ),
    "qwen": (
        "QwenImageTransformer2DModel",
        {**SMALL, "joint_attention_dim": 8, "axes_dims_rope": (4, 4, 8)}, "Qwen-Image", "",
    ),
    "z-image": ("ZImageTransformer2DModel", Z_SMALL, "Z-Image", ""),
    "wan": (
        "WanTransformer3DModel", {**SMALL, "attention_head_dim": 12, "ffn_dim": 8}, "Wan", "T2V"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    """The shapes of diffusers' networks, small ones, by the names above."""
    diffusers = pytest.importorskip("diffusers", reason="networks of diffusers")
    made = {}
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        for name, (cls, config, *_) in DIFFUSERS.items():
            state = getattr(diffusers, cls)(**config).state_dict()
            made[name] = {key: tuple(value.shape) for key, value in state.items()}
    return made


@pytest.mark.parametrize("name", DIFFUSERS)
def test_files_of_diffusers_networks(name, tiny, tmp_path):
    """As diffusers makes them, alone in a file."""
    *_, architecture, variant = DIFFUSERS[name]
    facts = inspect(write(tmp_path / "model.safetensors", tiny[name], dtype=torch.bfloat16))
    assert (facts.kind, facts.architecture, facts.variant) == ("model", architecture, variant)
    assert facts.layout == "diffusers names" and facts.precision == (("bfloat16", 1.0),)
    assert facts.parts == () and facts.parameters == sum(
        torch.Size(shape).numel() for shape in tiny[name].values()
    )


def test_parts_of_a_single_file(tmp_path):
    """VAE and text encoders are named, and the network's numbers are its own."""
    shapes = {
        **under(LDM, SD1),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (8, 8),
    }
    facts = inspect(write(tmp_path / "sd.safetensors", shapes))
    assert facts.parts == ("VAE", "text encoders")
    assert facts.parameters == sum(torch.Size(shape).numel() for shape in SD1.values())
    assert facts.bytes == (tmp_path / "sd.safetensors").stat().st_size
    assert inspect(write(tmp_path / "unet.safetensors", under(LDM, SD1))).parts == ()


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("decoder.conv_in.weight", "VAE"),
        ("controlnet_cond_embedding.conv_in.weight", "ControlNet"),
        ("text_model.embeddings.token_embedding.weight", "text encoder"),
        ("emb_params", "embedding"),
        ("something.else", "unknown"),
    ],
)
def test_other_kinds(key, kind, tmp_path):
    """Named, and of no architecture; an unknown one shows a key."""
    facts = inspect(write(tmp_path / "a.safetensors", {key: (2, 2)}))
    assert facts.kind == kind and facts.architecture is None
    assert (kind == "unknown") == (repr(key) in str(facts))


def test_models_of_the_lab():
    """kdpp's own, by the card in their metadata."""
    from kdpp.lab.models import WEIGHTS

    facts = inspect(WEIGHTS / "teacher.safetensors")
    assert facts.kind == facts.architecture + " model" == "kdpp model" and facts.prediction is None
    assert facts.variant == "teacher" and facts.notes == ("made for the sampler euler",)


# Prediction ---------------------------------------------------------------------------------------

MARK = torch.zeros(0)


@pytest.mark.parametrize(
    ("shapes", "metadata", "tensors", "prediction", "by"),
    [
        (SDXL, None, {}, None, ""),
        (SD2, None, {}, None, ""),
        (SDXL, None, {"v_pred": MARK}, "v", "key 'v_pred'"),
        (SDXL, {"modelspec.prediction_type": "epsilon"}, {}, "epsilon", "prediction_type"),
        (SDXL, {"modelspec.predict_key": "v"}, {}, "v", "predict_key"),
        (SD2, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, {}, "v", "architecture"),
        (SDXL, None, {"edm_mean": MARK}, "edm", "edm_mean"),
        (SDXL, {"modelspec.prediction_type": "epsilon"}, {"v_pred": MARK}, None, ""),
        (SDXL, {"modelspec.prediction_type": "something"}, {}, None, ""),
    ],
)
def test_prediction(shapes, metadata, tensors, prediction, by, tmp_path):
    """As the file says it; not said where it does not, and where it says two things."""
    path = write(tmp_path / "a.safetensors", under(LDM, shapes), metadata, **tensors)
    facts = inspect(path)
    assert facts.prediction == prediction and by in facts.said_by
    assert ("not said by the file" in str(facts)) == (prediction is None)
    assert ("contradicts itself" in str(facts)) == bool(metadata and tensors)
    assert facts.zero_snr is None


def test_zero_terminal_snr(tmp_path):
    """Said by an empty tensor, beside the prediction."""
    facts = inspect(write(tmp_path / "a.safetensors", under(LDM, SDXL), v_pred=MARK, ztsnr=MARK))
    assert facts.zero_snr is True and "v, zero terminal SNR (key 'v_pred')" in str(facts)


def test_lcm_is_known_by_its_guidance_input(tmp_path):
    """In both layouts; its preset is the one that fits, and without the input it does not."""
    lcm = {**SD1, "time_embed.cond_proj.weight": (8, 256)}
    facts = inspect(write(tmp_path / "a.safetensors", under(LDM, lcm)))
    assert facts.guidance_input and [preset.name for preset in fitting(facts)] == ["lcm-sd15"]
    plain = inspect(write(tmp_path / "b.safetensors", under(LDM, SD1)))
    assert not plain.guidance_input
    assert "lcm-sd15" not in {preset.name for preset in fitting(plain)}


# LoRAs --------------------------------------------------------------------------------------------

ATTN2 = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
DOTTED = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


def pair(layer, down, up, width, rank=4, out=8):
    return {f"{layer}.{down}.weight": (rank, width), f"{layer}.{up}.weight": (out, rank)}


KOHYA, PEFT = ("lora_down", "lora_up"), ("lora_A", "lora_B")
LORAS = {
    "kohya sd1": (pair(f"lora_unet_{ATTN2}", *KOHYA, 768), "SD 1.x", "kohya", ("UNet",)),
    "kohya sdxl": (
        {**pair(f"lora_unet_{ATTN2}", *KOHYA, 2048),
         **pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", *KOHYA, 8),
         **pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", *KOHYA, 8)},
        "SDXL", "kohya", ("text encoder 2", "text encoder", "UNet"),
    ),
    "kohya sdxl, original names": (
        pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", *KOHYA, 2048),
        "SDXL", "kohya", ("UNet",),
    ),
    "peft sd2": (pair(f"unet.{DOTTED}", *PEFT, 1024), "SD 2.x", "diffusers", ("UNet",)),
    "peft of its own": (
        pair(f"base_model.model.{DOTTED}", *PEFT, 768), "SD 1.x", "peft", ("UNet",)
    ),
    "before peft": (
        pair(f"unet.{DOTTED.replace('attn2', 'attn2.processor')}_lora", "down", "up", 768),
        "SD 1.x", "diffusers", ("UNet",),
    ),
    "loha": (
        {f"lora_unet_{ATTN2}.hada_w1_a": (8, 4), f"lora_unet_{ATTN2}.hada_w1_b": (4, 2048),
         f"lora_unet_{ATTN2}.hada_w2_a": (8, 4), f"lora_unet_{ATTN2}.hada_w2_b": (4, 2048)},
        "SDXL", "LyCORIS", ("UNet",),
    ),
    "flux": (
        pair("transformer.single_transformer_blocks.0.attn.to_q", *PEFT, 3072),
        "FLUX.1", "diffusers", ("transformer",),
    ),
    "flux, original names": (
        pair("lora_unet_single_blocks_0_linear1", *KOHYA, 3072, out=21504),
        "FLUX.1", "kohya", ("transformer",),
    ),
    "flux2, original names": (
        pair("diffusion_model.single_blocks.0.linear1", *PEFT, 3072, out=27648),
        "FLUX.2", "ComfyUI", ("transformer",),
    ),
    "flux or flux2": (
        pair("diffusion_model.double_blocks.0.img_attn.proj", *PEFT, 3072),
        None, "ComfyUI", ("UNet",),
    ),
    "qwen": (
        pair("transformer_blocks.0.img_mlp.net.0.proj", *KOHYA, 3072),
        "Qwen-Image", "plain", ("transformer",),
    ),
    "wan": (
        pair("diffusion_model.blocks.0.self_attn.q", *PEFT, 5120),
        "Wan", "ComfyUI", ("transformer",),
    ),
    "z-image": (
        pair("diffusion_model.layers.0.attention.to_q", *PEFT, 3840),
        "Z-Image", "ComfyUI", ("transformer",),
    ),
    "sd3": (
        pair("transformer.transformer_blocks.0.ff_context.net.0.proj", *PEFT, 1536),
        "SD3", "diffusers", ("transformer",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LORAS)
def test_loras(name, tmp_path):
    """What it was made for, whose names it has, what it changes, and its rank."""
    shapes, architecture, layout, targets = LORAS[name]
    facts = inspect(write(tmp_path / "lora.safetensors", shapes))
    assert facts.kind == "LoRA" and facts.architecture == architecture
    assert facts.lora.layout == layout and facts.lora.ranks == (4, 4)
    if architecture is not None:
        assert set(facts.lora.targets) == set(targets)


def test_alpha_is_read(tmp_path):
    """Of all layers, the lowest and the highest; a LoRA without has none."""
    shapes = pair(f"lora_unet_{ATTN2}", *KOHYA, 768)
    alphas = {f"lora_unet_{ATTN2}.alpha": torch.tensor(2.0), "lora_te_x.alpha": torch.tensor(8.0)}
    facts = inspect(write(tmp_path / "a.safetensors", shapes, None, HALF, **alphas))
    assert facts.lora.alphas == (2.0, 8.0) and "alpha         2 to 8" in str(facts)
    assert inspect(write(tmp_path / "b.safetensors", shapes)).lora.alphas is None


def test_a_lora_of_unusual_layers_is_known_by_its_metadata(tmp_path):
    shapes = pair("lora_unet_mid_block_resnets_0_conv1", *KOHYA, 8)
    about = {"ss_base_model_version": "sdxl_base_v1-0"}
    assert inspect(write(tmp_path / "a.safetensors", shapes, about)).architecture == "SDXL"
    assert inspect(write(tmp_path / "b.safetensors", shapes)).architecture is None


@pytest.mark.parametrize(
    ("file", "shapes", "preset"),
    [
        ("sdxl_lightning_4step_lora.safetensors", LORAS["kohya sdxl"][0], "sdxl-lightning-4"),
        ("Hyper-SDXL-8steps-CFG-lora.safetensors", LORAS["kohya sdxl"][0], "hyper-sdxl-8-cfg"),
        ("Hyper-SD15-8steps-lora.safetensors", LORAS["kohya sd1"][0], "hyper-sd15-8"),
        ("dmd2_sdxl_4step_lora_fp16.safetensors", LORAS["kohya sdxl"][0], "dmd2"),
        ("sd_xl_turbo_1.0_fp16.safetensors", under(LDM, SDXL), "sdxl-turbo"),
        ("flux1-schnell.safetensors", SCHNELL, "flux-schnell"),
        ("flux1-dev.safetensors", DEV, None),
        ("sd_xl_base_1.0.safetensors", under(LDM, SDXL), None),
        ("Qwen-Image-Lightning-8steps-V2.0.safetensors", LORAS["qwen"][0],
         "qwen-image-lightning-8"),
    ],
)  # fmt: skip
def test_presets_by_the_usual_names(file, shapes, preset, tmp_path):
    """A preset that the name tells of comes first; flux dev has none."""
    facts = inspect(write(tmp_path / file, shapes))
    found = named(facts)
    assert (found and found.name) == preset
    assert (fitting(facts)[:1] == (found,)) == (found is not None)


@pytest.mark.parametrize(
    ("shapes", "fits"),
    [
        (under(LDM, SD35_LARGE), {"sd35-turbo"}),
        (under(LDM, SD35_MEDIUM), set()),
        (FLUX2, {"flux2-klein"}),
        ({**FLUX2, "guidance_in.in_layer.weight": (8, 8)}, set()),
        (patches(5120, 16), {"wan22-lightning-t2v"}),
        (patches(5120, 36), {"wan22-lightning-i2v"}),
        (patches(1536, 16), set()),
        (LORAS["wan"][0], {"wan22-lightning-t2v", "wan22-lightning-i2v"}),
        (LORAS["flux"][0], set()),
    ],
)
def test_presets_that_fit(shapes, fits, tmp_path):
    """Those of the architecture and its variant; for a LoRA those that come as one."""
    facts = inspect(write(tmp_path / "a.safetensors", shapes))
    assert {preset.name for preset in fitting(facts)} == fits


# Quantised weights --------------------------------------------------------------------------------

LAYER = "double_blocks.0.img_attn.qkv"
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{LAYER}.weight_scale": torch.ones(1)}, f"scaled weights (key '{LAYER}.weight_scale')"),
        ({f"{LAYER}.scale_weight": torch.ones(1)}, "scaled float8 (key"),
        ({"scaled_fp8": torch.zeros(2, dtype=FP8)}, "scaled float8 (key 'scaled_fp8')"),
        ({f"{LAYER}.comfy_quant": torch.tensor(list(b'{"format": "int8_tensorwise"}')).byte()},
         "ComfyUI's quantised layers, int8_tensorwise (key"),
        ({f"{LAYER}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "quantised layers (key"),
        ({f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.zeros(2, dtype=torch.uint8)},
         "bitsandbytes NF4"),
        ({f"{LAYER}.weight.SCB": torch.ones(2)}, "bitsandbytes int8"),
        ({f"{LAYER}.other": torch.zeros(9, 9).to(FP8)}, "float8_e4m3fn without scales (key"),
        ({}, None),
    ],
)  # fmt: skip
def test_quantised(tensors, said, tmp_path):
    """Named with the key that shows it; the architecture is told all the same."""
    facts = inspect(write(tmp_path / "a.safetensors", SCHNELL, None, HALF, **tensors))
    assert facts.architecture == "FLUX.1"
    assert (facts.quantised is None) if said is None else (said in facts.quantised)
    if said:
        assert facts.quantised in str(facts)


@pytest.mark.parametrize(
    ("number", "shown"), [(5, "5 "), (12_345, "12.3 k"), (2_567_000_000, "2.57 B")]
)
def test_numbers_are_shown_short(number, shown):
    assert files._count(number, "B") == shown


def test_precision_by_bytes(tmp_path):
    tensors = {"a": torch.zeros(6, dtype=FP8), "b": torch.zeros(1, dtype=HALF)}
    facts = inspect(write(tmp_path / "a.safetensors", {}, **tensors))
    assert facts.precision == (("float8_e4m3fn", 0.75), ("float16", 0.25))


# Folders ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A pipeline's folder; what is in its scheduler_config.json is its argument."""

    def make(scheduler=None, shapes=SD1, part="unet", shards=0):
        root = tmp_path / "pipe"
        (root / part).mkdir(parents=True)
        (root / "scheduler").mkdir()
        index = {"_class_name": "StableDiffusionPipeline", part: ["diffusers", "X"],
                 "vae": ["diffusers", "AutoencoderKL"], "safety_checker": [None, None],
                 "scheduler": ["diffusers", "Y"]}  # fmt: skip
        (root / "model_index.json").write_text(json.dumps(index))
        if scheduler is not None:
            (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        name = "diffusion_pytorch_model"
        if not shards:
            write(root / part / f"{name}.safetensors", shapes)
            return root
        keys, where = list(shapes), {}
        for i in range(shards):
            file = f"{name}-{i + 1:05}-of-{shards:05}.safetensors"
            write(root / part / file, {key: shapes[key] for key in keys[i::shards]})
            where.update(dict.fromkeys(keys[i::shards], file))
        weights = {"weight_map": where}
        (root / part / f"{name}.safetensors.index.json").write_text(json.dumps(weights))
        return root

    return make


@pytest.mark.parametrize(
    ("scheduler", "prediction", "zero_snr"),
    [
        ({"prediction_type": "epsilon"}, "epsilon", False),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "v", True),
        ({"prediction_type": "sample"}, "x0", False),
        ({}, None, None),
        (None, None, None),
    ],
)
def test_a_folder(folder, scheduler, prediction, zero_snr):
    """Its scheduler's configuration says the prediction; its parts are named."""
    facts = inspect(folder(scheduler))
    assert facts.architecture == "SD 1.x" and facts.layout == "diffusers folder"
    assert facts.parts == ("vae",)
    assert (facts.prediction, facts.zero_snr) == (prediction, zero_snr)
    assert (facts.notes == ()) == (prediction is not None)


def test_a_folder_in_shards(folder, tiny):
    """All files of a network are read as one; one of them alone says that it is."""
    root = folder(None, tiny["z-image"], "transformer", shards=3)
    facts = inspect(root)
    assert facts.architecture == "Z-Image" and facts.prediction == "flow"
    assert facts.parameters == sum(torch.Size(s).numel() for s in tiny["z-image"].values())
    part = root / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    assert "one of the 3 files of a model" in str(inspect(part))
    part.unlink()
    with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors is missing"):
        inspect(root)


def test_a_folder_that_contradicts_itself(folder):
    root = folder({"prediction_type": "epsilon"})
    write(root / "unet" / "diffusion_pytorch_model.safetensors", SD1, v_pred=MARK)
    facts = inspect(root)
    assert facts.prediction is None and "contradicts itself" in str(facts)


def test_folders_that_are_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"has no model_index\.json; give a folder"):
        inspect(tmp_path)
    root = folder()
    (root / "unet" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is one part of a model"):
        inspect(root / "unet")
    weights = root / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"only the pickle diffusion_pytorch_model\.bin; kdpp"):
        inspect(root)
    weights.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match="no safetensors file"):
        inspect(root)
    (root / "model_index.json").write_text("{oops")
    with pytest.raises(ValueError, match=r"model_index\.json is damaged, it is not JSON"):
        inspect(root)
    with monkeypatch.context() as small:
        small.setattr(files, "JSON_CAP", 3)
        with pytest.raises(ValueError, match=r"model_index\.json has more than 3 bytes"):
            inspect(root)
    (root / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold a table"):
        inspect(root)


def test_an_index_may_not_lead_outside(folder):
    root = folder()
    where = {"weight_map": {"a": "../../secret.safetensors"}}
    index = root / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(where))
    with pytest.raises(ValueError, match="which is not a file beside it"):
        inspect(root)


def test_a_run_of_the_lab(tmp_path):
    card = json.dumps({"method": "consistency", "sampler": "lcm"})
    write(tmp_path / "model.safetensors", {"a": (2,)}, {"kdpp.lab": card})
    facts = inspect(tmp_path)
    assert facts.kind == "kdpp model" and facts.variant == "consistency"
    assert "made for the sampler lcm" in str(facts)


# Refusals -----------------------------------------------------------------------------------------


def entry(first, last, shape=(2,), dtype="F16"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


def make_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"")
    return path


REFUSALS = {
    "pickle, by its name": (
        "a.ckpt", lambda p: p.write_bytes(b"anything"), "pickle by its name; kdpp reads safetensors"
    ),
    "torch.save": ("a.safetensors", lambda p: torch.save({"a": 1}, p), "pickle by its content"),
    "pickle": (
        "a.safetensors", lambda p: p.write_bytes(pickle.dumps({"a": [1] * 99})),
        "pickle by its content; kdpp reads safetensors alone",
    ),
    "zip": ("a.safetensors", make_zip, "pickle by its content"),
    "safetensors under a pickle's name": (
        "a.bin", lambda p: raw(p, {"a": entry(0, 4)}, b"1234"), "rename it to a.safetensors"
    ),
    "gguf": ("a.gguf", lambda p: p.write_bytes(b"GGUF\3\0\0\0" + b"\0" * 40), "a GGUF file"),
    "lfs": (
        "a.safetensors", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer",
    ),
    "html": ("a.safetensors", lambda p: p.write_text("\n<!DOCTYPE html><html>"), "a web page"),
    "empty": ("a.safetensors", lambda p: p.write_bytes(b""), "is empty"),
    "short": ("a.safetensors", lambda p: p.write_bytes(b"abc"), "not a safetensors file"),
    "text": ("a.safetensors", lambda p: p.write_text("hello " * 9), "not a safetensors file"),
    "cap": (
        "a.safetensors", lambda p: raw(p, {"a": entry(0, 4)}, b"1234", 100_000_001),
        "claims a header of 100,000,001 bytes, above the format's 100,000,000",
    ),
    "cut in the header": (
        "a.safetensors", lambda p: raw(p, {"a": entry(0, 4)}, b"", 5000),
        "cut short: its header has 5,000 bytes",
    ),
    "cut in the data": (
        "a.safetensors", lambda p: raw(p, {"a": entry(0, 4), "b.x": entry(4, 8)}, b"12345"),
        "is damaged or cut short: 'b.x' ends 3 bytes beyond it",
    ),
    "more data than it names": (
        "a.safetensors", lambda p: raw(p, {"a": entry(0, 4)}, b"12345678"), "not fully covered"
    ),
    "overlap": (
        "a.safetensors",
        lambda p: raw(p, {"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "tensor `b`",
    ),
    "hole": (
        "a.safetensors",
        lambda p: raw(p, {"a": entry(0, 4), "b": entry(6, 10)}, b"1234567890"), "tensor `b`",
    ),
    "shape": (
        "a.safetensors", lambda p: raw(p, {"a.b": entry(0, 8)}, b"12345678"),
        "'a.b' does not have the size of its shape",
    ),
    "size overflow": (
        "a.safetensors", lambda p: raw(p, {"a": entry(0, 4, (2**40, 2**40))}, b"1234"),
        "'a' does not have the size of its shape",
    ),
    "dtype": (
        "a.safetensors", lambda p: raw(p, {"a": entry(0, 4, dtype="X9")}, b"1234"), "X9"
    ),
    "not JSON": ("a.safetensors", lambda p: raw(p, b"{oops"), "invalid JSON in header"),
    "nested": (
        "a.safetensors", lambda p: raw(p, b'{"a":' * 5000), "recursion limit exceeded"
    ),
    "no tensors": ("a.safetensors", lambda p: raw(p, {}), "holds no tensors"),
    "card": (
        "a.safetensors", lambda p: write(p, {"a": (2,)}, {"kdpp.lab": "[" * 9999}),
        "the card in its metadata is not a JSON table",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name, tmp_path, capsys):
    """One sentence that names the file, from Python and from the command."""
    file, make, said = REFUSALS[name]
    path = tmp_path / file
    make(path)
    with pytest.raises(ValueError) as refused:
        inspect(path)
    sentence = str(refused.value)
    assert sentence.startswith(str(path)) and said in sentence and "\n" not in sentence
    assert main(["inspect", str(path)]) == 1
    assert capsys.readouterr().err == f"kdpp: {sentence}\n"


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    """A pickle that would run code does not."""
    ran = tmp_path / "ran"

    class Bad:
        def __reduce__(self):
            return type(ran).touch, (ran,)

    for name in ("a.ckpt", "a.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bad()))
        with pytest.raises(ValueError, match="pickle"):
            inspect(tmp_path / name)
    assert not ran.exists()


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match="there is no file or folder nowhere"):
        inspect("nowhere")


NAMES = st.one_of(
    st.text(max_size=8),
    st.sampled_from(sorted({key for shapes, *_ in ORIGINAL.values() for key in shapes})),
    st.sampled_from(sorted({key for shapes, *_ in LORAS.values() for key in shapes})),
    st.sampled_from(["x.alpha", "a.comfy_quant", "v_pred", "scaled_fp8", "__metadata__"]),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
METADATA = st.dictionaries(
    st.sampled_from(["kdpp.lab", "modelspec.prediction_type", "ss_base_model_version", "a"]),
    st.text(max_size=6) | JSON.map(json.dumps),
    max_size=3,
)
BITS = {"F16": 16, "F32": 32, "BF16": 16, "I64": 64, "U8": 8, "F8_E4M3": 8, "F8_E8M0": 8,
        "BOOL": 8, "C64": 64}  # fmt: skip


def only_facts_or_errors(path):
    """What comes of any file; facts can be shown."""
    try:
        facts = inspect(path)
    except (OSError, ValueError):
        return
    assert isinstance(facts, CheckpointFacts)
    assert str(facts).startswith(str(path)) and isinstance(fitting(facts), tuple)


@settings(max_examples=300, deadline=None)
@given(header=JSON, data=st.binary(max_size=32), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_header(tmp_path_factory, header, data, length):
    """Whatever JSON it holds: facts, or an error in words."""
    only_facts_or_errors(
        raw(tmp_path_factory.getbasetemp() / "a.safetensors", header, data, length)
    )


SHAPES = st.tuples(st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 3), max_size=4))
WHOLE = [sorted(shapes) for shapes, *_ in (*ORIGINAL.values(), *LORAS.values())]


@settings(max_examples=500, deadline=None)
@given(
    shapes=st.dictionaries(NAMES, SHAPES, max_size=4),
    whole=st.sampled_from(WHOLE).flatmap(
        lambda keys: st.fixed_dictionaries(dict.fromkeys([*keys, "x.alpha"], SHAPES))
    ),
    metadata=METADATA,
)
def test_any_tensors(tmp_path_factory, shapes, whole, metadata):
    """Headers that hold together: all keys of a real file, in any shape and dtype, and others."""
    header, end = {}, 0
    for key, (dtype, shape) in {**shapes, **whole}.items():
        size = torch.Size(shape).numel() * BITS[dtype] // 8
        header[key] = entry(end, end + size, shape, dtype)
        end += size
    header["__metadata__"] = metadata
    path = raw(tmp_path_factory.getbasetemp() / "b.safetensors", header, bytes(end))
    only_facts_or_errors(path)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "c.safetensors"
    path.write_bytes(content)
    only_facts_or_errors(path)


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["inspect", "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "FILE" in said and "--import" not in said


def test_the_command(tmp_path, capsys):
    """Facts line by line, the preset that the file's name tells of, and the others."""
    path = write(tmp_path / "sdxl_lightning_4step_unet.safetensors", under(LDM, SDXL))
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{path}\nkind          model\narchitecture  SDXL\n")
    assert "prediction    not said by the file\n" in said
    assert "preset        sdxl-lightning-4, by the file's name" in said
    assert "others        sdxl-lightning-2" in said
