"""A path to a pipeline: folders, single files and networks alone, and what is refused."""

import importlib.util
import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdpp.checkpoints import configs, load
from kdpp.checkpoints.configs import CONFIGS
from kdpp.checkpoints.load import load_pipeline
from kdpp.cli import main

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
transformers = pytest.importorskip("transformers", reason="needs transformers (extra: diffusers)")
tiny = pytest.importorskip("tiny_pipelines", reason="needs diffusers and transformers")
files = pytest.importorskip("single_files", reason="needs diffusers and transformers")
TINY = files.TINY

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return files.tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module", params=["SD 1.x", "SDXL"])
def original(request, tokenizers, tmp_path_factory):
    """A pipeline, and its single file."""
    pipe = files.pipeline(request.param, tokenizers)
    file = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file(files.single_file(pipe), file)
    return pipe, file


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whoever asks the network fails."""

    def refuse(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def weights(pipe):
    """All weights by their component and name."""
    return {
        f"{part}.{key}": tensor
        for part in PARTS
        if getattr(pipe, part, None) is not None
        for key, tensor in getattr(pipe, part).state_dict().items()
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def rewritten(file, folder, remove=(), metadata=None, **tensors):
    """A copy of a single file, with other tensors or without some."""
    held = {key: value for key, value in load_file(file).items() if key not in remove}
    save_file({**held, **tensors}, folder / "other.safetensors", metadata)
    return folder / "other.safetensors"


def picture(pipe):
    generator = torch.Generator().manual_seed(3)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a lighthouse", negative_prompt="dark", height=16, width=16, output_type="pt",
                num_inference_steps=2, generator=generator, return_dict=False)[0]  # fmt: skip


# What is loaded -----------------------------------------------------------------------------------


def test_a_single_file_is_its_pipeline(original):
    """Every weight, and the picture, to the bit."""
    pipe, file = original
    made = load_pipeline(file, configs=TINY)
    assert type(made) is type(pipe)
    assert equal(weights(pipe), weights(made)) and len(weights(pipe)) > 150
    assert torch.equal(picture(made), picture(pipe))


def test_a_single_file_in_half_precision(original, tmp_path):
    """And with what published files hold besides: averages of training, tables, positions."""
    pipe, file = original
    names = (
        "model_ema.decay", "alphas_cumprod", "first_stage_model.loss.logvar",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
    )  # fmt: skip
    more = {name: torch.zeros(1) for name in names if hasattr(pipe, "text_encoder_2")
            or not name.startswith("conditioner")}  # fmt: skip
    made = weights(load_pipeline(rewritten(file, tmp_path, **more), "float16", configs=TINY))
    assert equal({key: tensor.half() for key, tensor in weights(pipe).items()}, made)


def test_a_folder_is_its_pipeline(original, tmp_path):
    """Parts that are not wanted are not loaded, from a folder and from a file."""
    pipe, file = original
    pipe.save_pretrained(tmp_path)
    assert equal(weights(pipe), weights(load_pipeline(tmp_path)))
    without = ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder"]
    for path in (tmp_path, file):
        made = load_pipeline(path, without=without, configs=TINY)
        assert equal({f"unet.{k}": v for k, v in pipe.unet.state_dict().items()}, weights(made))
        assert made.vae is None and made.tokenizer is None


LAYOUTS = {
    "diffusers": lambda unet: unet.state_dict(),
    "original": lambda unet: files.under("", files.unet(unet)),
    "prefixed": lambda unet: files.under("model.diffusion_model.", files.unet(unet)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_unet_alone_takes_the_rest_from_elsewhere(layout, original, tokenizers, tmp_path):
    """From a folder or a file; as a teacher it needs nothing else."""
    pipe, file = original
    name = "SDXL" if hasattr(pipe, "text_encoder_2") else "SD 1.x"
    other = files.pipeline(name, tokenizers, seed=9)
    save_file(LAYOUTS[layout](other.unet), tmp_path / "unet.safetensors")
    pipe.save_pretrained(tmp_path / "rest")
    wanted = weights(other)
    for rest in (tmp_path / "rest", file):
        made = load_pipeline(tmp_path / "unet.safetensors", components=rest, configs=TINY)
        assert equal(weights(made), wanted) and not equal(wanted, weights(pipe))
        assert torch.equal(picture(made), picture(other))
    without = ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]
    alone = load_pipeline(tmp_path / "unet.safetensors", without=without, configs=TINY)
    assert equal(alone.unet.state_dict(), other.unet.state_dict()) and alone.vae is None


@pytest.mark.parametrize(
    "family", ["sd3", "flux", "flux2", "krea2", "z_image", "qwen_image", "wan"]
)
def test_a_transformer_alone_takes_the_rest_from_a_folder(family, tmp_path):
    made = [getattr(tiny, family)(seed=seed) for seed in (0, 9)]
    made[0].save_pretrained(tmp_path / "rest")
    file = tmp_path / "transformer.safetensors"
    save_file(made[1].transformer.state_dict(), file)
    with pytest.raises(ValueError, match="without VAE and text encoders"):
        load_pipeline(file)
    pipe = load_pipeline(file, components=tmp_path / "rest")
    assert equal(pipe.transformer.state_dict(), made[1].transformer.state_dict())
    assert equal(pipe.vae.state_dict(), made[0].vae.state_dict())


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_file_is_the_expert_that_its_name_says(layout, tmp_path, capsys):
    """Of Wan 2.2's two, of which ComfyUI's users have a file each; never silently the other."""
    rest, other = tiny.wan(boundary=0.9), tiny.wan(seed=9).transformer
    rest.save_pretrained(tmp_path / "rest")
    tensors = other.state_dict() if layout == "diffusers" else files.wan(other)
    for name, place in (("wan2.2_t2v_high_noise_14B", "transformer"),
                        ("Wan2.2-T2V-LowNoise", "transformer_2"),
                        ("WAN-flow-LOW_fp16", "transformer_2")):  # fmt: skip
        save_file(tensors, tmp_path / f"{name}.safetensors")
        pipe = load_pipeline(tmp_path / f"{name}.safetensors", components=tmp_path / "rest")
        for one in ("transformer", "transformer_2"):
            wanted = other if one == place else getattr(rest, one)
            assert equal(getattr(pipe, one).state_dict(), wanted.state_dict())
        replaced, kept = ("high", "low") if place == "transformer" else ("low", "high")
        said = capsys.readouterr().err
        assert f"is the expert for {replaced} noise; the one for {kept} noise is that of" in said
    for name in ("model", "slow", "highres", "high-low"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match="put high or low into it"):
            load_pipeline(tmp_path / f"{name}.safetensors", components=tmp_path / "rest")


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_unet_with_the_guidance_as_an_input(layout, original, tokenizers, tmp_path):
    """The first LCM: an LCMScheduler, and a layer that diffusers' conversion leaves out."""
    pipe, file = original
    name = "SDXL" if hasattr(pipe, "text_encoder_2") else "SD 1.x"
    other = files.pipeline(name, tokenizers, seed=9, time_cond_proj_dim=12)
    save_file(LAYOUTS[layout](other.unet), tmp_path / "unet.safetensors")
    pipe.save_pretrained(tmp_path / "rest")
    for rest in (file, tmp_path / "rest"):
        made = load_pipeline(tmp_path / "unet.safetensors", components=rest, configs=TINY)
        assert equal(made.unet.state_dict(), other.unet.state_dict())
        assert made.unet.config.time_cond_proj_dim == 12
        assert isinstance(made.scheduler, diffusers.LCMScheduler)


def test_generate_draws_from_single_files(original, tmp_path, monkeypatch, capsys):
    """Student and teacher; the picture's file knows both by their content."""
    pipe, file = original
    for name, config in TINY.items():
        monkeypatch.setitem(CONFIGS, name, config)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny.tiny(pipe.unet, seed=7)
    try:
        save_file(files.single_file(pipe), tmp_path / "teacher.safetensors")
    finally:
        tiny.tiny(pipe.unet, seed=0)
    words = ["generate", "--student", file, "--teacher", tmp_path / "teacher.safetensors",
             "--prompt", "a red boat", "--width", 16, "--height", 16, "--steps", 2,
             "--teacher-scale", 0.5]  # fmt: skip

    def run(name, *more):
        return main([*map(str, more), "--out", str(tmp_path / name)])

    assert run("a", *words) == 0
    drawn = tmp_path / "a" / "00000.png"
    assert run("b", "generate", "--like", drawn) == 0
    assert (tmp_path / "b" / "00000.png").read_bytes() == drawn.read_bytes()
    capsys.readouterr()
    assert run("c", "generate", "--like", drawn, "--student", tmp_path / "teacher.safetensors") == 1
    assert "is not the student that the picture was made with" in capsys.readouterr().err


# CLIP's tokenizer and the table -------------------------------------------------------------------


def test_evaluate_leaves_pipelines_to_compare(original, tmp_path, capsys):
    for words in ((str(original[1]),), ("digits:student", "--teacher", str(original[1]))):
        assert main(["evaluate", *words, "--out", str(tmp_path / "out")]) == 1
        assert "model.safetensors draws prompts" in (said := capsys.readouterr().err)
        assert "kdpp compare SPEC.toml measures yours" in said and not (tmp_path / "out").exists()


def test_the_tokens_are_clips(tokenizers):
    """Those of the package that the vocabulary comes from, and the published ones."""
    first = tokenizers[0]
    photo = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert first("a photo of a cat").input_ids == photo
    [place] = importlib.util.find_spec("clip").submodule_search_locations
    spec = importlib.util.spec_from_file_location("clips", Path(place) / "simple_tokenizer.py")
    clip = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(clip)
    theirs = clip.SimpleTokenizer()
    for text in ("A Lighthouse, at NIGHT!", "naïve café — über-größe", "日本の灯台 🌊", "3.14 it's",
                 "supercalifragilistic   (masterpiece:1.2), [bad]"):  # fmt: skip
        assert first(text).input_ids[1:-1] == theirs.encode(text)
    assert len(first) == 49408
    padded = [one("cat", padding="max_length").input_ids for one in tokenizers]
    assert [len(ids) for ids in padded] == [77, 77]
    assert padded[0][3:] == [49407] * 74 and padded[1][3:] == [0] * 74


def test_the_table_has_the_published_sizes():
    """Parameters of UNet, VAE and text encoders, as their authors give them."""
    sizes = {
        "SD 1.x": [859_520_964, 83_653_863, 123_060_480],
        "SDXL": [2_567_463_684, 83_653_863, 123_060_480, 694_659_840],
    }
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            parts = [
                diffusers.UNet2DConditionModel(**config.unet),
                diffusers.AutoencoderKL(**config.vae),
                *(getattr(transformers, text.kind)(transformers.CLIPTextConfig(**text.settings))
                  for text in config.texts),
            ]  # fmt: skip
        assert [sum(p.numel() for p in part.parameters()) for part in parts] == sizes[name]


def test_without_the_vocabulary_the_package_is_named(original, monkeypatch):
    monkeypatch.setattr(configs, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install clip-anytorch"):
        load_pipeline(original[1], configs=TINY)


# What a UNet predicts -----------------------------------------------------------------------------

V = {"v_pred": torch.zeros(1)}


def test_the_prediction_is_what_the_file_says(original, tmp_path, capsys):
    """ε with a remark where it says nothing; v, zero terminal SNR; the caller's word first."""
    _, file = original
    scheduler = load_pipeline(file, configs=TINY).scheduler.config
    assert scheduler.prediction_type == "epsilon" and not scheduler.rescale_betas_zero_snr
    assert f"{file} does not say what it predicts; it is taken for eps" in capsys.readouterr().err
    said = rewritten(file, tmp_path, **V, ztsnr=torch.zeros(1))
    scheduler = load_pipeline(said, configs=TINY).scheduler.config
    assert scheduler.prediction_type == "v_prediction" and scheduler.rescale_betas_zero_snr
    assert scheduler.timestep_spacing == "trailing"
    scheduler = load_pipeline(said, prediction="epsilon", configs=TINY).scheduler.config
    assert scheduler.prediction_type == "epsilon" and scheduler.rescale_betas_zero_snr
    assert "does not say" not in capsys.readouterr().err
    contradictory = rewritten(file, tmp_path, metadata={"modelspec.prediction_type": "eps"}, **V)
    with pytest.raises(ValueError, match="contradicts itself about what it predicts"):
        load_pipeline(contradictory, configs=TINY)
    scheduler = load_pipeline(contradictory, prediction="v", configs=TINY).scheduler.config
    assert scheduler.prediction_type == "v_prediction"


def test_a_unet_alone_predicts_what_the_folder_says(original, tmp_path, capsys):
    pipe, _ = original
    made = type(pipe)(**pipe.components)
    made.scheduler = diffusers.DDIMScheduler(
        **tiny.TABLE, prediction_type="v_prediction", clip_sample=False
    )
    made.save_pretrained(tmp_path / "rest")
    save_file(pipe.unet.state_dict(), tmp_path / "unet.safetensors")
    given = {"components": tmp_path / "rest", "configs": TINY}
    scheduler = load_pipeline(tmp_path / "unet.safetensors", **given).scheduler
    assert isinstance(scheduler, diffusers.DDIMScheduler)
    assert scheduler.config.prediction_type == "v_prediction"
    assert "is taken for v, as the scheduler of" in capsys.readouterr().err
    scheduler = load_pipeline(tmp_path / "rest", prediction="epsilon").scheduler
    assert scheduler.config.prediction_type == "epsilon"


# What is refused, before a weight is read ---------------------------------------------------------


@pytest.fixture
def unread(monkeypatch):
    """Reading weights fails."""

    def refuse(*_, **__):
        raise AssertionError("read weights")

    monkeypatch.setattr(load, "load_file", refuse)
    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "DiffusionPipeline"):
        kind = getattr(diffusers, name)
        monkeypatch.setattr(kind, "from_pretrained", refuse)
        if name != "DiffusionPipeline":
            monkeypatch.setattr(kind, "from_single_file", refuse)


UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"
VAE_KEY = "first_stage_model.decoder.conv_in.weight"


def test_tensors_that_do_not_fit_are_named(original, tmp_path, unread):
    pipe, file = original
    xl = hasattr(pipe, "text_encoder_2")
    text = "conditioner.embedders.0." if xl else "cond_stage_model."
    text += "transformer.text_model.final_layer_norm.weight"
    for key, shape in ((UNET_KEY, (4, 4, 3, 3)), (VAE_KEY, (2, 4, 3, 3)), (text, (3,))):
        other = rewritten(file, tmp_path, **{key: torch.zeros(shape)})
        with pytest.raises(
            ValueError, match=rf"other.safetensors: '{key}' of its .* has the shape"
        ):
            load_pipeline(other, configs=TINY)
    for key, name in (
        ("model.diffusion_model.middle_block.0.in_layers.2.weight", "block.0.in_layers.2.weight"),
        (VAE_KEY, "decoder.conv_in.weight"),
        (text, "final_layer_norm.weight"),
    ):
        other = rewritten(file, tmp_path, remove=[key])
        with pytest.raises(ValueError, match=f"other.safetensors lacks '.*{name}"):
            load_pipeline(other, configs=TINY)
    if xl:
        key = "model.diffusion_model.label_emb.0.2.weight"
        with pytest.raises(ValueError, match=r"has no tensor 'label_emb.0.2.weight'"):
            load_pipeline(rewritten(file, tmp_path, remove=[key]), configs=TINY)
        key = "conditioner.embedders.1.model.text_projection"
        with pytest.raises(ValueError, match=r"text_projection.weight' .* of its text_encoder_2"):
            load_pipeline(rewritten(file, tmp_path, remove=[key]), configs=TINY)
    key = "model.diffusion_model.middle_block.0.in_layers.3.weight"
    with pytest.raises(ValueError, match=f"other.safetensors holds '{key}', which .* does not"):
        load_pipeline(rewritten(file, tmp_path, **{key: torch.zeros(8)}), configs=TINY)


def test_a_file_that_is_not_the_model_is_refused(original, tmp_path, unread):
    """One sentence each: what it is, and what to do."""
    pipe, file = original
    name = "SDXL" if hasattr(pipe, "text_encoder_2") else "SD 1.x"
    other = tmp_path / "other.safetensors"

    def refused(sentence, path=other, **given):
        with pytest.raises((ValueError, OSError), match=sentence) as caught:
            load_pipeline(path, **{"configs": TINY, **given})
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    other.write_bytes(file.read_bytes()[:-100])
    refused("cut short")
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04")
    refused("is a pickle", tmp_path / "model.ckpt")
    refused("there is no file or folder", tmp_path / "nowhere")
    lora = {f"lora_unet_mid_block_attentions_0_proj_in.lora_{end}.weight": torch.zeros(4, 4)
            for end in ("down", "up")}  # fmt: skip
    save_file(lora, other)
    refused("is a LoRA.*, not a model; give the model that it changes")
    save_file({"emb_params": torch.zeros(2, 16)}, other)
    refused("is a textual inversion embedding, which kdpp does not read; give a model that draws")
    save_file({"decoder.conv_in.weight": torch.zeros(4)}, other)
    refused("is a VAE; give a model that draws prompts")
    rewritten(file, tmp_path, **{UNET_KEY.replace("weight", "weight_scale"): torch.zeros(1)})
    refused("is quantised: scaled weights")
    rewritten(file, tmp_path, **{UNET_KEY: torch.zeros(8, 9, 3, 3)})
    refused("inpainting, 9 input channels.*give the model for text to image")
    rewritten(file, tmp_path, **{"edm_vpred.sigma_max": torch.zeros(1)})
    refused("has EDM's levels")
    with pytest.raises(ValueError, match="prediction is 'eps'; it must be one of epsilon, v, x0"):
        load_pipeline(file, prediction="eps", configs=TINY)
    refused(f"is a single file of {name}; kdpp reads those of", file, configs={"Wan": None})
    refused("holds all that is needed; leave components", file, components=file)
    held = load_file(file)
    save_file({k: v for k, v in held.items() if k.startswith("model.")}, other)
    refused("without VAE and text encoders; name a model of the same architecture")
    refused("without VAE and text encoders", other, components=other)
    wrong = "SD 1.x" if name == "SDXL" else "SDXL"
    different = files.pipeline(wrong, [None, None])
    save_file(files.single_file(different), tmp_path / "different.safetensors")
    refused("from a model of the same architecture", other,
            components=tmp_path / "different.safetensors")  # fmt: skip


def test_a_folder_that_is_not_the_model_is_refused(original, tmp_path, unread):
    pipe, _ = original
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())

    def refused(sentence, **changes):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, **changes}))
        with pytest.raises(ValueError, match=sentence):
            load_pipeline(tmp_path)

    refused("a pipeline that kdpp does not know", _class_name=["own_code", "Pipeline"])
    refused("a pipeline that kdpp does not know", _class_name="StableUnCLIPPipeline")
    refused("runs no code but that of diffusers", vae=["own_code", "Model"])
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused("has only a pickle")
