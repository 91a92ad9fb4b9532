"""Pipelines of diffusers as student and teacher: without the teacher a run is the pipeline's own.

Every pipeline is a tiny one with random weights (tests/tiny_pipelines.py).
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import kdpp

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
pytest.importorskip("transformers", reason="needs transformers, for the text encoders")
from diffusers.models.modeling_outputs import AutoencoderKLOutput  # noqa: E402

import single_files  # noqa: E402
import tiny_pipelines as tiny  # noqa: E402
from kdpp.checkpoints import configs, pipelines  # noqa: E402

PROMPTS = ["a lighthouse", "a red boat on the green hill"]  # of two lengths
NEGATIVE = "blurry dark"


def zero_snr():
    return tiny.euler(prediction_type="v_prediction", rescale_betas_zero_snr=True)


FAMILIES = {
    "sd": tiny.sd,
    "sd_v": lambda: tiny.sd(tiny.euler(prediction_type="v_prediction")),
    "sd_zero_snr": lambda: tiny.sd(zero_snr()),
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3,
    "flux": tiny.flux,
    "flux2": tiny.flux2,
    "krea2": tiny.krea2,
    "krea2_turbo": lambda: tiny.krea2(distilled=True),
    "z_image": tiny.z_image,
    "qwen_image": tiny.qwen_image,
    "wan": tiny.wan,
    "wan_experts": lambda: tiny.wan(boundary=0.9),
}
"""One of each kind of network and prediction. FLUX's without its guidance as an input."""


def sizes(pipe):
    """A size in pixels that is not square, and for Wan the frames."""
    if isinstance(pipe, diffusers.WanPipeline):
        return {"height": 32, "width": 48}, {"frames": 5}
    large = isinstance(pipe, diffusers.QwenImagePipeline | diffusers.Krea2Pipeline)
    return {"height": 32, "width": 48} if large else {"height": 16, "width": 24}, {}


def noise_for(pipe, batch=2, seed=0):
    size, frames = sizes(pipe)
    shape = pipelines.latent_shape(pipe, **size, **frames)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


TOKENS = (
    diffusers.FluxPipeline | diffusers.Flux2KleinPipeline | diffusers.Krea2Pipeline
    | diffusers.QwenImagePipeline
)  # fmt: skip
"""They make a row of tokens of their latents."""


def packed(pipe, latents):
    """Latents as the pipeline's loop has them."""
    if not isinstance(pipe, TOKENS):
        return latents
    if isinstance(pipe, diffusers.Flux2KleinPipeline):
        return pipe._pack_latents(latents)
    return pipe._pack_latents(latents, *latents.shape)


def unpacked(pipe, out, size):
    """The reverse, of what the pipeline gives as latents; FLUX.2's gives those of the VAE."""
    if isinstance(pipe, diffusers.Flux2KleinPipeline):
        norm, patches = pipe.vae.bn, pipe._patchify_latents(out)
        std = (norm.running_var + norm.eps).sqrt()
        return (patches - norm.running_mean[:, None, None]) / std[:, None, None]
    if isinstance(pipe, diffusers.Krea2Pipeline):
        out = pipe._unpack_latents(out, *size.values())
    elif isinstance(pipe, TOKENS):
        out = pipe._unpack_latents(out, *size.values(), pipe.vae_scale_factor)
    return out.squeeze(2) if out.ndim == 5 and out.shape[2] == 1 else out


def theirs(pipe, noise, steps, scale, **settings):
    """What the pipeline makes of that noise, as latents; ``scale`` is kdpp's ``cond_scale``."""
    size, frames = sizes(pipe)
    settings |= {f"num_{key}": value for key, value in frames.items()}
    if isinstance(pipe, diffusers.FluxPipeline | diffusers.QwenImagePipeline):
        settings["true_cfg_scale"] = scale
    else:
        # Z-Image and Krea 2 count from 0: v_c + s (v_c - v_∅).
        from_0 = isinstance(pipe, diffusers.ZImagePipeline | diffusers.Krea2Pipeline)
        settings["guidance_scale"] = scale - from_0
    given = noise if isinstance(pipe, diffusers.Flux2KleinPipeline) else packed(pipe, noise)
    negative = [NEGATIVE] * len(PROMPTS) if scale != 1.0 else None
    if isinstance(pipe, diffusers.Flux2KleinPipeline):
        embeds = pipe.encode_prompt([NEGATIVE] * len(PROMPTS))[0]
        settings["negative_prompt_embeds"] = embeds
    elif not isinstance(pipe, diffusers.LatentConsistencyModelPipeline):
        settings["negative_prompt"] = negative
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        prompt=list(PROMPTS), num_inference_steps=steps, latents=given.clone(),
        output_type="latent", return_dict=False, **size, **settings,
    )[0]  # fmt: skip
    return unpacked(pipe, out, size)


def ours(pipe, noise, steps, scale, sample=kdpp.sample_euler_tg, **options):
    """kdpp's run without the teacher, at the pipeline's levels."""
    size, _ = sizes(pipe)
    student, teacher, extra_args = pipelines.from_pipelines(pipe, None, PROMPTS, NEGATIVE, **size)
    model = kdpp.TeacherGuidedDenoiser(student, teacher, teacher_scale=0.0)
    sigmas = pipelines.pipeline_sigmas(pipe, steps, **size)
    extra_args["cond_scale"] = scale
    return sample(model, noise * sigmas[0], sigmas, extra_args, disable=True, **options)


def apart(found, wanted):
    """The distance, relative to what is wanted."""
    assert found.shape == wanted.shape and wanted.isfinite().all()
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_teacher_a_run_is_the_pipelines(family, scale):
    """The same latents from the same noise, with CFG and without."""
    pipe = FAMILIES[family]()
    noise = noise_for(pipe)
    assert apart(ours(pipe, noise, 3, scale), theirs(pipe, noise, 3, scale)) < 1e-4


@pytest.mark.parametrize("steps", [1, 4])
def test_an_lcm_with_its_guidance_as_an_input(steps):
    """LCMScheduler's steps, its noise from the same generator; the start is a VP latent."""
    pipe, draw = tiny.lcm(), torch.Generator().manual_seed(3)
    noise = noise_for(pipe)
    wanted = theirs(pipe, noise, steps, 6.0, generator=draw)
    student, teacher, extra_args = pipelines.from_pipelines(pipe, None, PROMPTS)
    model = kdpp.TeacherGuidedDenoiser(student, teacher, teacher_scale=0.0)
    sigmas = pipelines.pipeline_sigmas(pipe, steps, 16, 24)
    x = noise * (1.0 + sigmas[0] ** 2).sqrt()
    draw.manual_seed(3)
    found = kdpp.sample_lcm_tg(
        model, x, sigmas, extra_args | {"cond_scale": 6.0}, disable=True,
        noise_sampler=lambda *_: torch.randn(noise.shape, generator=draw),
    )  # fmt: skip
    assert apart(found, wanted) < 1e-4
    other = theirs(pipe, noise, steps, 2.0, generator=draw.manual_seed(3))
    assert apart(other, wanted) > 1e-3  # the guidance is felt


def test_flux_with_its_guidance_as_an_input():
    """FLUX-dev's: the CFG scale itself, in one call."""
    pipe = tiny.flux(guidance=True)
    noise = noise_for(pipe)
    size, _ = sizes(pipe)
    packed = pipe._pack_latents(noise, *noise.shape)
    runs = {
        scale: pipe(list(PROMPTS), num_inference_steps=2, latents=packed, guidance_scale=scale,
                    output_type="latent", return_dict=False, **size)[0]
        for scale in (1.5, 3.5)
    }  # fmt: skip
    wanted = {s: pipe._unpack_latents(run, *size.values(), 2) for s, run in runs.items()}
    assert apart(ours(pipe, noise, 2, 3.5), wanted[3.5]) < 1e-4
    assert apart(wanted[1.5], wanted[3.5]) > 1e-3


GUIDED = {name: FAMILIES[name] for name in FAMILIES.keys() - {"sd_v", "sd_zero_snr"}}


@pytest.mark.parametrize("family", sorted(GUIDED))
def test_a_guided_batch_is_two_single_runs(family):
    """With prompts of two lengths, each padded with the other in the batch; the teacher is felt."""
    pipe, teacher_pipe = GUIDED[family](), GUIDED[family]()
    tiny.tiny(pipelines.network_of(teacher_pipe), seed=7)
    size, _ = sizes(pipe)
    sigmas = pipelines.pipeline_sigmas(pipe, 3, **size)
    noise, renoise = noise_for(pipe), noise_for(pipe, seed=1)

    def run(rows, **settings):
        prompts = PROMPTS[rows]
        *models, extra_args = pipelines.from_pipelines(
            pipe, teacher_pipe, prompts, NEGATIVE, **size
        )
        model = kdpp.TeacherGuidedDenoiser(
            *models, **settings, renoise_noise_sampler=lambda *_: renoise[rows]
        )
        x = noise[rows] * sigmas[0]
        return kdpp.sample_euler_tg(model, x, sigmas, extra_args, disable=True)

    guided = {"teacher_scale": 0.5, "teacher_steps": 2, "teacher_cfg_scale": 3.0}
    batch = run(slice(0, 2), **guided)
    single = torch.cat([run(slice(0, 1), **guided), run(slice(1, 2), **guided)])
    assert apart(single, batch) < 1e-4
    assert apart(run(slice(0, 2), teacher_scale=0.0), batch) > 1e-2


def test_one_pipeline_is_a_lora_student_and_its_base():
    """The teacher is the network without the adapters, bit for bit, and no consistency model."""
    peft = pytest.importorskip("peft", reason="needs peft, for adapters")
    base = tiny.sd(diffusers.LCMScheduler(**tiny.TABLE))
    pipe = tiny.sd(diffusers.LCMScheduler(**tiny.TABLE))
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    student, teacher, extra_args = pipelines.from_pipelines(pipe, pipe, PROMPTS, NEGATIVE)
    x, cond = noise_for(pipe), {"cond": extra_args["cond"]}
    for sigma in (torch.full((2,), 0.1), torch.full((2,), 3.0)):
        wanted = pipelines.denoiser_of(base, lcm=False)(x, sigma, **cond)
        assert torch.equal(teacher(x, sigma, **cond), wanted)
        assert not torch.equal(student(x, sigma, **cond), wanted)
    lcm = pipelines.denoiser_of(base)
    assert isinstance(lcm, kdpp.LCMDenoiser) and isinstance(student, kdpp.LCMDenoiser)


def test_one_pipeline_without_adapters_is_its_own_teacher():
    student, teacher, _ = pipelines.from_pipelines(pipe := tiny.sd3(), None, PROMPTS)
    assert teacher is student
    assert pipelines.from_pipelines(pipe, pipe, PROMPTS)[1] is not None


# Prompts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    ["sd", "sdxl", "sd3", "flux", "flux2", "krea2", "z_image", "qwen_image", "wan"],
)
def test_embeddings_in_the_place_of_prompts(family):
    """What encode_prompt takes goes there: embeddings give what their prompts give."""
    pipe = FAMILIES[family]()
    wanted = pipelines.encode(pipe, PROMPTS[0], "")
    if family in ("sd", "wan", "flux2", "krea2", "qwen_image"):
        given = {f"{sign}prompt_embeds": wanted[half]["encoder_hidden_states"]
                 for sign, half in (("", "cond"), ("negative_", "uncond"))}  # fmt: skip
        if family in ("krea2", "qwen_image"):
            given |= {f"{sign}prompt_embeds_mask": wanted[half]["encoder_hidden_states_mask"]
                      for sign, half in (("", "cond"), ("negative_", "uncond"))}  # fmt: skip
    elif family == "z_image":
        texts = [pipe.encode_prompt([text], do_classifier_free_guidance=False)[0]
                 for text in (PROMPTS[0], "")]  # fmt: skip
        given = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    else:
        given = {}
        for sign, half in (("", "cond"), ("negative_", "uncond")):
            cond = wanted[half]
            pooled = cond.get("pooled_projections")
            if pooled is None:
                pooled = cond["added_cond_kwargs"]["text_embeds"]
            given[f"{sign}prompt_embeds"] = cond["encoder_hidden_states"]
            given[f"{sign}pooled_prompt_embeds"] = pooled
    torch.testing.assert_close(pipelines.encode(pipe, None, **given), wanted)


def test_options_reach_encode_prompt():
    """A second prompt is the second encoder's."""
    flux = tiny.flux()
    found = pipelines.encode(flux, PROMPTS[0], NEGATIVE, prompt_2=PROMPTS[1])
    long, short = pipelines.encode(flux, PROMPTS[1], NEGATIVE), pipelines.encode(flux, PROMPTS[0])
    key, pooled = "encoder_hidden_states", "pooled_projections"
    assert torch.equal(found["cond"][key], long["cond"][key])
    assert torch.equal(found["cond"][pooled], short["cond"][pooled])
    assert torch.equal(found["uncond"][key], long["uncond"][key])


def test_prompts_that_do_not_fit():
    pipe = tiny.sd()
    with pytest.raises(ValueError, match=r"^give a prompt, or prompt_embeds$"):
        pipelines.encode(pipe, None)
    with pytest.raises(ValueError, match=r"^3 negative prompts for 2 prompts; give one for all"):
        pipelines.encode(pipe, PROMPTS, [NEGATIVE] * 3)
    prompts = list(PROMPTS)
    pipelines.encode(tiny.z_image(), prompts)  # whose pipeline writes into the list
    assert prompts == PROMPTS


def test_conditions_have_the_networks_dtype():
    """Text encoders in float32 beside a transformer in 16 bits; masks stay masks."""
    pipe = tiny.qwen_image()
    pipe.transformer.to(torch.bfloat16)
    cond = pipelines.encode(pipe, PROMPTS)["cond"]
    assert cond["encoder_hidden_states"].dtype == torch.bfloat16
    assert cond["encoder_hidden_states_mask"].dtype == torch.bool
    same = pipelines.encode(tiny.qwen_image(), PROMPTS[0], PROMPTS[0])
    assert "encoder_hidden_states_mask" not in same["cond"]  # nothing is padded


# Pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    ["sd", "sdxl", "sd3", "flux", "flux2", "krea2", "z_image", "qwen_image", "wan"],
)
def test_decoded_pictures_are_the_pipelines(family, monkeypatch):
    """Scale, shift, or mean and deviation of each channel; a video's VAE, for a picture too."""
    pipe = FAMILIES[family]()
    noise, (size, frames) = noise_for(pipe), sizes(pipe)
    latents = theirs(pipe, noise, 2, 1.0)
    monkeypatch.setattr(pipe.scheduler, "step", lambda *_, **__: (given,))
    given = packed(pipe, latents)
    start = latents if family == "flux2" else given
    wanted = pipe(
        prompt=list(PROMPTS), num_inference_steps=2, latents=start, output_type="pt",
        return_dict=False, guidance_scale=1.0 - (family == "krea2"),
        **size, **{f"num_{key}": value for key, value in frames.items()},
    )[0]  # fmt: skip
    wanted = wanted.movedim(1, 2) if family == "wan" else wanted  # frames behind channels
    found = pipelines.decode(pipe, latents)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert found.std() > 0.01 and found.min() >= 0.0 and found.max() <= 1.0


def test_an_sdxl_vae_in_float16_decodes_in_float32():
    """And is in float16 again afterwards; its mean and deviation of each channel are used."""
    pipe, latents = tiny.sdxl(), noise_for(tiny.sdxl())
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 0.5, 2.0, 1.5]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
    pipe.vae.half()
    found = pipelines.decode(pipe, latents)
    assert pipe.vae.dtype == torch.float16
    z = latents / 0.4 * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    wanted = pipe.vae.float().decode(z).sample / 2 + 0.5
    torch.testing.assert_close(found, wanted.clamp(0, 1), rtol=0, atol=1e-6)


def test_a_vae_in_float16_decodes_in_it_unless_it_overflows():
    """As diffusers' own pipelines of SD and FLUX do; one that overflows decodes in float32."""
    pipe, latents = tiny.sd(), noise_for(tiny.sd())
    pipe.vae.half()
    assert pipe.vae.config.force_upcast  # diffusers' default, which only SDXL's pipeline heeds
    wanted = pipe.vae.decode((latents / 0.4).half()).sample.float() / 2 + 0.5
    assert torch.equal(pipelines.decode(pipe, latents), wanted.clamp(0, 1))
    with torch.no_grad():
        pipe.vae.decoder.conv_norm_out.weight.mul_(6e4)
        pipe.vae.decoder.conv_out.weight.mul_(1e-4)
    assert not pipe.vae.decode((latents / 0.4).half()).sample.isfinite().all()
    found = pipelines.decode(pipe, latents)
    assert pipe.vae.dtype == torch.float16
    wanted = pipe.vae.float().decode(latents / 0.4).sample / 2 + 0.5
    torch.testing.assert_close(found, wanted.clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "family", ["sd", "sdxl", "sd3", "flux", "flux2", "krea2", "z_image", "qwen_image", "wan"]
)
def test_latents_of_pictures_are_the_reverse_of_decoding(family, monkeypatch):
    """Scale, shift, or mean and deviation of each channel, undone: the VAE itself does nothing."""
    pipe = FAMILIES[family]()
    latents = 0.01 * noise_for(pipe)  # whose pictures are within [0, 1]
    frames = pipelines.family_of(pipe).video
    if family == "flux2":
        pipe.vae.bn.running_mean.mul_(0.1)

    def encode(x):
        assert x.ndim == (5 if frames else 4)
        return AutoencoderKLOutput(SimpleNamespace(mode=lambda: x))

    monkeypatch.setattr(pipe.vae, "decode", lambda z, return_dict: (z,))
    monkeypatch.setattr(pipe.vae, "encode", encode)
    pictures = pipelines.decode(pipe, latents)
    assert pictures.min() > 0.0 and pictures.max() < 1.0
    assert apart(pipelines.latents_of(pipe, pictures), latents) < 1e-4


def test_latents_are_those_of_the_vaes_mode():
    """Whatever the random stream; one in float16 encodes in float32, a tiny one has no choice."""
    pipe = tiny.sdxl()
    pictures = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    found = pipelines.latents_of(pipe, pictures)
    wanted = pipe.vae.encode(pictures * 2 - 1).latent_dist.mode() * 0.4
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    pipe.vae.half()
    halved = pipe.vae.float().encode(pictures * 2 - 1).latent_dist.mode() * 0.4
    pipe.vae.half()
    assert torch.equal(pipelines.latents_of(pipe, pictures), halved)
    assert pipe.vae.dtype == torch.float16
    small = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    pipe.vae = tiny.tiny(small)
    encoded = pipe.vae.encode(pictures * 2 - 1).latents
    assert torch.equal(pipelines.latents_of(pipe, pictures), encoded)


# Refusals -----------------------------------------------------------------------------------------


def test_a_pipeline_that_is_not_known():
    with pytest.raises(
        TypeError, match=r"^Dance is not a pipeline that kdpp knows; .*FluxPipeline"
    ):
        pipelines.from_pipelines(type("Dance", (), {})(), None, PROMPTS)
    pipe = tiny.sd()
    pipe.unet = None
    with pytest.raises(
        TypeError, match=r"^this StableDiffusionPipeline was loaded without its unet"
    ):
        pipelines.denoiser_of(pipe)


def test_a_scheduler_without_a_table():
    pipe = tiny.sd()
    pipe.scheduler = tiny.flow()
    with pytest.raises(TypeError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        pipelines.denoiser_of(pipe)


def test_students_and_teachers_that_do_not_fit():
    """Other latents, other texts: refused before anything is encoded."""
    five = tiny.sd(in_channels=5, out_channels=5)
    with pytest.raises(ValueError, match="latents of 4 and 5 channels; they must share one latent"):
        pipelines.from_pipelines(tiny.sd(), five)
    message = r"take different texts \(of width 16 and 32\): make the teacher by hand"
    with pytest.raises(ValueError, match=message):
        pipelines.from_pipelines(tiny.sd(), tiny.sdxl())
    with pytest.raises(ValueError, match=r"width 16 and 16\): make the teacher by hand"):
        pipelines.from_pipelines(tiny.z_image(), tiny.qwen_image())
    pipelines.from_pipelines(tiny.sd(), tiny.lcm(), PROMPTS)


@pytest.mark.parametrize(
    "make, size, message",
    [
        (tiny.sd, (17, 16), "height is 17; it must be a multiple of 2$"),
        (tiny.flux, (16, 18), "width is 18; it must be a multiple of 4$"),
        (tiny.flux2, (16, 18), "width is 18; it must be a multiple of 4$"),
        (tiny.flux, (16, 16, 5), "frames is 5; it must be 1: this is a model of pictures"),
        (tiny.wan, (32, 32, 4), "frames is 4; it must be 1 more than a multiple of 4"),
        (tiny.wan, (0, 32), "height is 0; it must be a whole number ≥ 16"),
    ],
)
def test_sizes_that_a_network_cannot_be_asked_for(make, size, message):
    with pytest.raises(ValueError, match=message):
        pipelines.latent_shape(make(), *size)


# The page -----------------------------------------------------------------------------------------


def test_the_page_runs(tmp_path, monkeypatch):
    """docs/pipelines.md, in a folder that holds its pipelines and files, at a small size."""
    page = Path(__file__).parents[1] / "docs" / "pipelines.md"
    text = page.read_text(encoding="utf-8")
    tiny.sdxl(seed=0).save_pretrained(tmp_path / "sdxl-lightning")
    tiny.sdxl(seed=1).save_pretrained(tmp_path / "sdxl")
    for name, config in single_files.TINY.items():
        monkeypatch.setitem(configs.CONFIGS, name, config)
    pipe = single_files.pipeline("SDXL", single_files.tokenizers(tmp_path))
    save_file(single_files.single_file(pipe), tmp_path / "sd_xl_base_1.0.safetensors")
    unet = tmp_path / "sdxl_lightning_4step_unet.safetensors"
    save_file(pipe.unet.state_dict(), unet)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for name in ("sdxl_lightning_4step_lora", "watercolour"):
        lora = {
            f"{layer}.lora_A.weight": torch.ones(2, 8),
            f"{layer}.lora_B.weight": torch.ones(8, 2),
        }
        save_file(lora, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    text = text.replace('"cuda"', '"cpu"')
    variables = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(code.replace("1024", "16"), "docs/pipelines.md", "exec"), variables)
    assert variables["pictures"].shape == (2, 3, 16, 16)
    for name in pipelines.FAMILIES:
        assert name.removesuffix("Pipeline") in text, name
