"""A transformer alone in the names that its authors gave: read to the bit, or refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdpp.checkpoints import load
from kdpp.checkpoints.files import inspect
from kdpp.checkpoints.load import load_pipeline

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
tiny = pytest.importorskip("tiny_pipelines", reason="needs diffusers and transformers")
files = pytest.importorskip("single_files", reason="needs diffusers and transformers")


def sd35(seed=0):
    """With what Stable Diffusion 3.5 medium has more than 3: normed attention, and a second one."""
    pipe = tiny.sd3()
    return changed(pipe, seed, qk_norm="rms_norm", dual_attention_layers=(0,))


def changed(pipe, seed, **settings):
    """A pipeline with another transformer."""
    own = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    pipe.transformer = tiny.tiny(type(pipe.transformer)(**{**own, **settings}), seed)
    return pipe


def deep(family, layers="num_layers", **settings):
    """The family with a second block."""
    return lambda seed=0: changed(getattr(tiny, family)(), seed, **{layers: 2}, **settings)


PIPES = {
    "sd3": (tiny.sd3, files.sd3, "SD3"),
    "sd3.5": (sd35, files.sd3, "SD3"),
    "sd3.5 normed": (
        lambda seed=0: changed(tiny.sd3(), seed, qk_norm="rms_norm"),
        files.sd3,
        "SD3",
    ),
    "flux": (tiny.flux, files.flux, "FLUX.1"),
    "flux dev": (lambda seed=0: tiny.flux(seed=seed, guidance=True), files.flux, "FLUX.1"),
    "flux2": (deep("flux2"), files.flux2, "FLUX.2"),
    "flux2 dev": (deep("flux2", guidance_embeds=True), files.flux2, "FLUX.2"),
    "krea2": (deep("krea2"), files.krea2, "Krea 2"),
    "z_image": (deep("z_image", "n_layers"), files.z_image, "Z-Image"),
    "qwen_image": (tiny.qwen_image, files.qwen_image, "Qwen-Image"),
    "wan": (deep("wan"), files.wan, "Wan"),
}
"""A tiny pipeline of each, the original names of its transformer, and its architecture."""


@pytest.fixture
def narrow(monkeypatch):
    """diffusers' conversion of FLUX.1 divides a layer at its published width, 3072; here at 32."""
    split = torch.split

    def scaled(tensor, sizes, dim=0):
        own = [size * 32 // 3072 for size in sizes] if 3072 in sizes else sizes
        return split(tensor, own, dim)

    monkeypatch.setattr(torch, "split", scaled)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines of diffusers in folders, made once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("rest")
            PIPES[name][0]().save_pretrained(made[name])
        return made[name]

    return folder


def write(name, path, prefix="", seed=9, other=()):
    """The transformer's file; ``other`` are tensors by the original name, None to leave out."""
    make, original, _ = PIPES[name]
    transformer = make(seed=seed).transformer
    tensors = {**files.under(prefix, original(transformer)), **dict(other)}
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path)
    return transformer


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("name", PIPES)
def test_a_transformer_in_original_names(name, prefix, folders, narrow, tmp_path):
    """Every weight to the bit; the rest is the folder's."""
    file = tmp_path / "transformer.safetensors"
    wanted = write(name, file, prefix).state_dict()
    layout = "diffusers names" if name == "qwen_image" else "original names"
    assert (inspect(file).architecture, inspect(file).layout) == (PIPES[name][2], layout)
    made = load_pipeline(file, components=folders(name)).transformer.state_dict()
    assert made.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(made[key], wanted[key])] == []
    assert made.keys() != load_file(file).keys() or (not prefix and name == "qwen_image")


# What is refused, before a weight is read ---------------------------------------------------------

LDM = "model.diffusion_model."
LOST = {
    "sd3": "joint_blocks.0.x_block.mlp.fc1.bias",
    "flux": "single_blocks.0.modulation.lin.weight",
    "flux2": "double_blocks.1.txt_attn.qkv.weight",
    "krea2": "blocks.1.attn.qknorm.qnorm.scale",
    "z_image": "layers.0.feed_forward.w2.weight",
    "qwen_image": "transformer_blocks.1.txt_mlp.net.2.weight",
    "wan": "time_embedding.0.weight",
}
BENT = {
    "sd3": "joint_blocks.1.context_block.attn.qkv.weight",
    "flux": "double_blocks.0.txt_attn.qkv.bias",
    "flux2": "final_layer.adaLN_modulation.1.weight",
    "krea2": "blocks.1.mod.lin",
    "z_image": "layers.1.attention.qkv.weight",
    "qwen_image": "txt_in.weight",
    "wan": "blocks.1.self_attn.o.weight",
}
UNKNOWN = {
    "sd3": "joint_blocks.1.x_block.extra.weight",
    "flux": "single_blocks.0.extra.weight",
    "flux2": "double_blocks.0.img_attn.extra.weight",
    "krea2": "blocks.0.extra.weight",
    "z_image": "layers.2.attention.out.weight",
    "qwen_image": "__index_timestep_zero__",
    "wan": "img_emb.proj.1.weight",
}
"""Of each a tensor in the file's own names."""


@pytest.fixture
def unread(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("read weights")

    monkeypatch.setattr(load, "load_file", refuse)


@pytest.mark.usefixtures("narrow", "unread")
@pytest.mark.parametrize("prefix", ["", LDM])
@pytest.mark.parametrize("name", LOST)
def test_a_tensor_that_does_not_fit_is_named_as_in_the_file(name, prefix, folders, tmp_path):
    """One that is missing, one of another shape, one that the architecture does not have."""
    file = tmp_path / "transformer.safetensors"
    _, original, architecture = PIPES[name]

    def refused(key, tensor, sentence):
        write(name, file, prefix, other={prefix + key: tensor})
        with pytest.raises(ValueError) as caught:
            load_pipeline(file, components=folders(name))
        said = str(caught.value)
        assert said.startswith(str(file)) and "\n" not in said
        assert f"'{prefix}{key}'" in said and sentence in said

    assert LOST[name] in original(PIPES[name][0]().transformer)
    refused(LOST[name], None, "has no tensor" if name in ("sd3", "flux") else "lacks")
    shape = list(original(PIPES[name][0]().transformer)[BENT[name]].shape)
    shape[0] += 6
    refused(BENT[name], torch.zeros(shape), "shape")
    refused(UNKNOWN[name], torch.zeros(4), f"which the {architecture} of this configuration does")


@pytest.mark.usefixtures("narrow", "unread")
@pytest.mark.parametrize(
    ("name", "other", "key"),
    [
        ("flux dev", "flux", "guidance_in.in_layer.bias"),
        ("flux2 dev", "flux2", "guidance_in.in_layer.weight"),
        ("sd3.5 normed", "sd3", "joint_blocks.0.context_block.attn.ln_k.weight"),
    ],
)
def test_a_folder_of_another_variant_is_refused(name, other, key, folders, tmp_path):
    """What the file has and the folder's network has not would be lost."""
    file = tmp_path / "transformer.safetensors"
    write(name, file)
    with pytest.raises(ValueError, match=f"holds '{key}', .*give components of the same variant"):
        load_pipeline(file, components=folders(other))
    write(other, file)
    with pytest.raises(ValueError, match=r"lacks .* of its transformer; it is not a whole"):
        load_pipeline(file, components=folders(name))


@pytest.mark.usefixtures("unread")
def test_flux_of_another_width(folders, tmp_path):
    """diffusers' conversion knows the published width alone; its own names go at any."""
    file = tmp_path / "transformer.safetensors"
    write("flux", file)
    sentence = r"'single_blocks.0.linear1.weight' does not have the shape .* in diffusers' names"
    with pytest.raises(ValueError, match=sentence):
        load_pipeline(file, components=folders("flux"))
