"""Pipelines of diffusers with tiny random weights, one of every family that kdpp knows.

Their text encoders are real ones, of transformers, with a vocabulary of a few words.
"""

import diffusers
import tokenizers
import torch
import transformers

WORDS = ["a", "boat", "blurry", "dark", "green", "hill", "lighthouse", "on", "red", "the"]
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
         "steps_offset": 1}  # fmt: skip
LENGTH = 16  # tokens that CLIP and T5 pad to


def tokenizer():
    """Words by number, one for all that it does not know; with a chat template, for Z-Image."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("<s>", 1), ("</s>", 2)]
    fast.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, model_max_length=LENGTH,
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template="user {{ messages[0]['content'] }} assistant",
    )  # fmt: skip


def tiny(model, seed=0):
    """Every weight drawn from the seed: as made, networks of this kind have many zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            tensor.data = noise / tensor[0].numel() ** 0.5
        else:
            tensor.data = 0.2 * noise + name.endswith("weight")
    return model.eval().requires_grad_(False)


def clip(kind="CLIPTextModel", width=16):
    """CLIP's text encoder, without or with its projection."""
    config = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=width, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=width,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return tiny(getattr(transformers, kind)(config))


def t5(kind="T5", width=16):
    """T5's or UMT5's encoder."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return tiny(getattr(transformers, f"{kind}EncoderModel")(config))


def qwen(width=16, kind="Qwen3Model", layers=2):
    """A small Qwen3, also in the place of Qwen-Image's Qwen2.5-VL."""
    config = transformers.Qwen3Config(
        vocab_size=40, hidden_size=width, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return tiny(getattr(transformers, kind)(config))


def qwen_vl():
    """A small Qwen3-VL, of which only texts are asked here."""
    text = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1],
                            "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 16, "num_position_embeddings": 4, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    return tiny(transformers.Qwen3VLModel(config))


def vae(channels=4, shift=None):
    """A picture's VAE that halves the sides once."""
    return tiny(diffusers.AutoencoderKL(
        latent_channels=channels, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        scaling_factor=0.4, shift_factor=shift,
    ))  # fmt: skip


def video_vae(kind, channels=4):
    """Qwen-Image's or Wan's VAE, with a mean and a deviation for each channel."""
    return tiny(getattr(diffusers, kind)(
        base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1 * i for i in range(channels)],
        latents_std=[1.0 + 0.2 * i for i in range(channels)],
    ))  # fmt: skip


def unet(seed=0, **settings):
    """A UNet for texts of width 16."""
    return tiny(diffusers.UNet2DConditionModel(**{
        "sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4,
        "cross_attention_dim": 16, "attention_head_dim": 4, "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **settings,
    }), seed)  # fmt: skip


def euler(**settings):
    """diffusers' Euler scheduler with Stable Diffusion's table, at trailing timesteps."""
    return diffusers.EulerDiscreteScheduler(**TABLE, **{"timestep_spacing": "trailing", **settings})


def sd(scheduler=None, seed=0, **settings):
    return diffusers.StableDiffusionPipeline(
        vae(), clip(), tokenizer(), unet(seed, **settings), scheduler or euler(), None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def lcm(seed=0):
    """With the guidance as an input."""
    return diffusers.LatentConsistencyModelPipeline(
        vae(), clip(), tokenizer(), unet(seed, time_cond_proj_dim=8),
        diffusers.LCMScheduler(**TABLE), None, None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(scheduler=None, seed=0, **settings):
    network = unet(
        seed, cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4, **settings,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae(), clip(), clip("CLIPTextModelWithProjection"), tokenizer(), tokenizer(), network,
        scheduler or euler(), add_watermarker=False,
    )  # fmt: skip


def flow(**settings):
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def sd3(scheduler=None, seed=0):
    network = tiny(diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
        pooled_projection_dim=32, pos_embed_max_size=8,
    ), seed)  # fmt: skip
    one, other = clip("CLIPTextModelWithProjection"), clip("CLIPTextModelWithProjection")
    return diffusers.StableDiffusion3Pipeline(
        network, scheduler or flow(shift=3.0), vae(shift=0.2), one, tokenizer(), other, tokenizer(),
        t5(width=32), tokenizer(),
    )  # fmt: skip


def flux(scheduler=None, seed=0, guidance=False):
    network = tiny(diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    ), seed)  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler or flow(use_dynamic_shifting=True), vae(shift=0.2), clip(), tokenizer(), t5(),
        tokenizer(), network,
    )  # fmt: skip


def flux2(scheduler=None, seed=0, guidance=False):
    """FLUX.2 klein's, whose VAE normalises patches of its latents."""
    network = tiny(diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=3 * 16, timestep_guidance_channels=16,
        guidance_embeds=guidance, axes_dims_rope=(4, 4, 4, 4),
    ), seed)  # fmt: skip
    autoencoder = tiny(diffusers.AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ))  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    autoencoder.bn.running_mean.copy_(torch.randn(16, generator=generator))
    autoencoder.bn.running_var.copy_(0.5 + torch.rand(16, generator=generator))
    return diffusers.Flux2KleinPipeline(
        scheduler or flow(use_dynamic_shifting=True), autoencoder,
        qwen(kind="Qwen3ForCausalLM", layers=27), tokenizer(), network,
    )  # fmt: skip


def krea2(scheduler=None, seed=0, distilled=False):
    network = tiny(diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=16, timestep_embed_dim=16, text_hidden_dim=16,
        num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    ), seed)  # fmt: skip
    return diffusers.Krea2Pipeline(
        scheduler or flow(use_dynamic_shifting=True), video_vae("AutoencoderKLQwenImage"),
        qwen_vl(), tokenizer(), network, text_encoder_select_layers=(1, 2), is_distilled=distilled,
    )  # fmt: skip


def z_image(scheduler=None, seed=0):
    network = tiny(diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[128, 32, 32],
    ), seed)  # fmt: skip
    return diffusers.ZImagePipeline(
        scheduler or flow(shift=3.0), vae(shift=0.2), qwen(), tokenizer(), network
    )


def qwen_image(scheduler=None, seed=0):
    network = tiny(diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    ), seed)  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler or flow(use_dynamic_shifting=True, shift_terminal=0.02),
        video_vae("AutoencoderKLQwenImage"), qwen(), tokenizer(), network,
    )  # fmt: skip


def wan(scheduler=None, seed=0, boundary=None):
    """With a boundary, of two experts."""
    networks = [
        tiny(diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=16, num_layers=1,
        ), seed + i)
        for i in range(1 if boundary is None else 2)
    ]  # fmt: skip
    return diffusers.WanPipeline(
        tokenizer(), t5("UMT5"), video_vae("AutoencoderKLWan"), scheduler or flow(shift=5.0),
        *networks, boundary_ratio=boundary,
    )  # fmt: skip
