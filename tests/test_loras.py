"""LoRAs with a role: one network as student and teacher, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import kdpp
from kdpp.checkpoints.loras import Lora, load_loras
from kdpp.checkpoints.pipelines import (
    denoiser_of,
    encode,
    encode_wan,
    family_of,
    latent_shape,
    network_of,
)

pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
pytest.importorskip("peft", reason="needs peft (extra: diffusers)")
tiny = pytest.importorskip("tiny_pipelines", reason="needs diffusers and transformers")

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


def lora(path, seed, layers=(f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_v"), width=(8, 16), size=2,
         rows=8):  # fmt: skip
    """A LoRA of rank 2 in diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, inputs in zip(layers, width):
        tensors[f"{layer}.lora_A.weight"] = torch.randn(size, inputs, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(rows, size, generator=generator)
    save_file(tensors, path)
    return path


def kohya(path, seed):
    """The same layers in kohya's names, with an alpha."""
    tensors = {}
    for key, tensor in load_file(lora(path, seed)).items():
        layer, part = key.rsplit(".lora_", 1)
        name = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
        tensors[f"{name}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = tensor
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


@pytest.fixture
def files(tmp_path):
    """In two layouts."""
    names = ("speed", "style", "other")
    paths = [tmp_path / f"{name}.safetensors" for name in names]
    return [write(path, i) for i, (path, write) in enumerate(zip(paths, (lora, kohya, lora)))]


def guided(student, teacher):
    """Latents of two steps, with seeded noise."""
    pipe = tiny.sd()
    extra_args = encode(pipe, "a red boat", "dark")
    model = kdpp.TeacherGuidedDenoiser(student, teacher, teacher_scale=0.5, teacher_cfg_scale=2.0)
    sigmas = torch.tensor([14.6, 2.0, 0.0])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * sigmas[0]
    torch.manual_seed(0)
    with torch.no_grad():
        return kdpp.sample("euler", model, x, sigmas, extra_args, disable=True)


def separate(*loras):
    """A model of its own with these LoRAs, loaded by diffusers alone."""
    pipe = tiny.sd()
    names = [f"own{i}" for i in range(len(loras))]
    for name, (path, _) in zip(names, loras):
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    if loras:
        pipe.set_adapters(names, [weight for _, weight in loras])
    return denoiser_of(pipe)


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
def test_one_network_is_two_separate_models(files):
    """Bit for bit: a speed LoRA for the student, a style on both, another for the teacher."""
    speed, style, other = files
    pipe = tiny.sd()
    before = sum(p.numel() for p in pipe.unet.parameters())
    student, teacher = load_loras(
        pipe, [(speed, 1.0, "student"), (style, 0.8), (other, -0.5, "teacher")]
    )
    apart = separate((speed, 1.0), (style, 0.8)), separate((style, 0.8), (other, -0.5))
    assert torch.equal(guided(student, teacher), guided(*apart))
    for wrong in ((apart[0], apart[0]), (apart[1], apart[1]), (separate(), apart[1])):
        assert not torch.equal(guided(student, teacher), guided(*wrong))
    assert {id(p) for p in teacher.parameters()} == {id(p) for p in student.parameters()}
    own = sum(p.numel() for n, p in pipe.unet.named_parameters() if "lora" not in n)
    assert own == before


def test_a_student_with_a_speed_lora_and_its_base(files):
    student, teacher = load_loras(tiny.sd(), [Lora(files[0], role="student")], lcm=True)
    assert torch.equal(guided(teacher, teacher), guided(separate(), separate()))
    assert isinstance(student, kdpp.models.LCMDenoiser)
    student, teacher = load_loras(tiny.sd(), [Lora(files[0])])
    assert student is teacher
    student, teacher = load_loras(tiny.sd(), [])
    assert torch.equal(guided(student, teacher), guided(separate(), separate()))


def test_names_of_adapters_that_stay(files):
    pipe = tiny.sd()
    student, _ = load_loras(pipe, [Lora(file) for file in files])
    with pytest.raises(ValueError, match=r"no adapter 'speed'; there are \['lora0', 'lora1'"):
        kdpp.without_adapters(student, ["speed"])
    with pytest.raises(TypeError, match="names is 'lora0'; give a list"):
        kdpp.without_adapters(student, "lora0")
    every = kdpp.without_adapters(student, ["lora0", "lora1", "lora2"])
    assert torch.equal(guided(every, every), guided(separate(), separate()))
    layer = next(m for m in pipe.unet.modules() if hasattr(m, "lora_A"))
    assert layer.active_adapters == ["lora0", "lora1", "lora2"] and not layer.disable_adapters


def test_a_lora_that_does_not_fit_is_refused_and_leaves_nothing(files, tmp_path):
    """And the pipeline is as it was."""
    pipe = tiny.sd()
    other = tmp_path / "x.safetensors"

    def refused(sentence, role="both"):
        with pytest.raises(ValueError, match=sentence) as caught:
            load_loras(pipe, [Lora(files[0]), Lora(other, 1.0, role)])
        assert "\n" not in str(caught.value)
        assert not any(hasattr(module, "lora_A") for module in pipe.unet.modules())
        assert not getattr(pipe.unet, "peft_config", None)

    lora(other, 0, ["unet.up_blocks.9.attentions.0.to_q"])
    refused("x.safetensors does not fit .*up_blocks.9")
    lora(other, 0, ["transformer.transformer_blocks.0.attn.to_q"])
    refused("x.safetensors matches no layer of .*such as 'transformer.transformer_blocks")
    lora(other, 0, ["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"], [1024])
    refused("x.safetensors is a LoRA for SD 2.x, and the model is SD 1.x")
    lora(other, 0, width=(9, 16))
    refused("x.safetensors does not fit the StableDiffusionPipeline: .*size mismatch")
    lora(other, 0, ["unet.double_blocks.0.img_attn.qkv", "transformer.single_blocks.0.linear1"])
    refused("x.safetensors does not fit .*double_blocks.0")
    save_file(tiny.sd().unet.state_dict(), other)
    refused("x.safetensors is a model, not a LoRA")
    save_file({"emb_params": torch.zeros(2, 16)}, other)
    refused("x.safetensors is a textual inversion embedding, which kdpp does not read, not a LoRA")
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    lora(other, 0, [text])
    refused("x.safetensors changes the text encoder, which student and teacher share", "student")
    lora(other, 0, [text], width=(16,))
    refused("x.safetensors does not fit")
    lora(other, 0)
    refused("role is 'pupil'; it must be one of both, student, teacher", "pupil")
    other.unlink()
    with pytest.raises(FileNotFoundError, match=r"x.safetensors"):
        load_loras(pipe, [Lora(other)])
    load_loras(pipe, [Lora(files[0])])
    with pytest.raises(ValueError, match="holds LoRAs already"):
        load_loras(pipe, [Lora(files[0])])


def test_a_lora_of_the_text_encoder_is_for_both(files, tmp_path):
    pipe = tiny.sd()
    bare = encode(pipe, "a red boat")["cond"]["encoder_hidden_states"]
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(4)
    save_file({f"{layer}.lora_{end}.weight": torch.randn(shape, generator=generator)
               for end, shape in (("A", (2, 16)), ("B", (16, 2)))}, files[0])  # fmt: skip
    student, teacher = load_loras(pipe, [Lora(files[0])])
    assert student is teacher
    assert not torch.equal(encode(pipe, "a red boat")["cond"]["encoder_hidden_states"], bare)


# Every architecture -------------------------------------------------------------------------------

LAYERS = {
    "sd": f"{BLOCK}.attn1.to_q",
    "sdxl": f"{BLOCK}.attn1.to_q",
    "sd3": "transformer.transformer_blocks.0.attn.to_q",
    "flux": "transformer.transformer_blocks.0.attn.to_q",
    "flux2": "transformer.transformer_blocks.0.attn.to_q",
    "krea2": "transformer.transformer_blocks.0.attn.to_q",
    "z_image": "transformer.layers.0.attention.to_q",
    "qwen_image": "transformer.transformer_blocks.0.attn.to_q",
    "wan": "transformer.blocks.0.attn1.to_q",
    "wan_experts": "transformer.blocks.0.attn1.to_q",
}
"""A layer of each, by diffusers' names."""


def make(family):
    return tiny.wan(boundary=0.9) if family == "wan_experts" else getattr(tiny, family)()


def lora_for(pipe, layer, path, seed):
    """A LoRA of rank 2 for one layer."""
    shape = network_of(pipe).get_submodule(layer.partition(".")[2]).weight.shape
    generator = torch.Generator().manual_seed(seed)
    save_file({
        f"{layer}.lora_A.weight": torch.randn(2, shape[1], generator=generator),
        f"{layer}.lora_B.weight": torch.randn(shape[0], 2, generator=generator),
    }, path)  # fmt: skip
    return path


def asked(denoiser, pipe, level):
    """What a denoiser says of the same noise and prompt at a level."""
    frames = {"frames": 5} if family_of(pipe).encode is encode_wan else {}
    shape = latent_shape(pipe, 32, 32, **frames)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    cond = encode(pipe, "a red boat")["cond"]
    with torch.no_grad():
        return denoiser(x, torch.tensor([level]), cond=cond)


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
@pytest.mark.parametrize("family", LAYERS)
def test_every_architecture_has_its_loras_roles(family, tmp_path):
    """The student has both, the teacher the style alone: as separate models, bit for bit."""
    pipe, layer = make(family), LAYERS[family]
    files = [lora_for(pipe, layer, tmp_path / f"{i}.safetensors", i) for i in range(2)]
    student, teacher = load_loras(pipe, [Lora(files[0], 1.0, "student"), Lora(files[1], 0.8)])
    own = make(family)
    bare = asked(denoiser_of(own), own, 0.95)
    apart = []
    for loras in ([Lora(files[1], 0.8)], [Lora(files[0]), Lora(files[1], 0.8)]):
        own = make(family)
        apart.append(asked(load_loras(own, loras)[0], own, 0.95))
    assert torch.equal(asked(teacher, pipe, 0.95), apart[0])
    assert torch.equal(asked(student, pipe, 0.95), apart[1])
    assert not torch.equal(apart[0], bare) and not torch.equal(apart[0], apart[1])


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
def test_the_experts_of_wan_have_loras_of_their_own(tmp_path):
    """By the word in the file's name: as one speed LoRA has two files."""
    names = ("speed_HIGH_noise", "LowNoise-model")
    pipe = tiny.wan(boundary=0.9)
    high, low = (
        lora_for(pipe, LAYERS["wan"], tmp_path / f"{name}.safetensors", i)
        for i, name in enumerate(names)
    )
    student, teacher = load_loras(pipe, [Lora(high, role="student"), Lora(low, role="student")])
    own = {}
    for level, file in ((0.95, high), (0.5, low)):
        one = tiny.wan(boundary=0.9)
        file = file.rename(tmp_path / f"both{level}.safetensors")  # no word: for both experts
        bare = asked(denoiser_of(one), one, level)
        wanted = asked(load_loras(one, [Lora(file)])[0], one, level)
        assert torch.equal(asked(student, pipe, level), wanted)
        assert torch.equal(asked(teacher, pipe, level), bare)
        assert not torch.equal(wanted, bare)
        own[level] = wanted
    with pytest.raises(ValueError, match="holds LoRAs already"):
        load_loras(pipe, [Lora(file)])


# Original names -----------------------------------------------------------------------------------

WAN = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}  # fmt: skip
ORIGINAL = {
    "wan": {f"blocks.0.{layer}": [f"blocks.0.{name}"] for layer, name in WAN.items()},
    "flux": {
        "double_blocks.0.img_attn.qkv": [
            f"transformer_blocks.0.attn.to_{one}" for one in "qkv"],
        "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    },
    "flux2": {
        "double_blocks.0.txt_attn.qkv": [
            f"transformer_blocks.0.attn.add_{one}_proj" for one in "qkv"],
        "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.linear_in"],
        "single_blocks.0.linear1": ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"],
    },
    "qwen_image": {
        "transformer_blocks.0.attn.to_q": ["transformer_blocks.0.attn.to_q"],
        "transformer_blocks.1.attn.add_k_proj": ["transformer_blocks.1.attn.add_k_proj"],
        "transformer_blocks.0.img_mlp.net.2": ["transformer_blocks.0.img_mlp.net.2"],
    },
    "z_image": {
        "layers.0.attention.to_q": ["layers.0.attention.to_q"],
        "layers.0.feed_forward.w1": ["layers.0.feed_forward.w1"],
        "layers.0.adaLN_modulation.0": ["layers.0.adaLN_modulation.0"],
    },
    "krea2": {
        "blocks.0.attn.wq": ["transformer_blocks.0.attn.to_q"],
        "blocks.0.mlp.down": ["transformer_blocks.0.ff.down"],
        "txtfusion.projector": ["text_fusion.projector"],
    },
    "sd3": {
        "joint_blocks.0.x_block.attn.qkv": [f"transformer_blocks.0.attn.to_{one}" for one in "qkv"],
        "joint_blocks.0.x_block.mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
    },
}  # fmt: skip
"""Layers by their original names, and diffusers' for the same; qkv is three of these."""
STYLES = {
    "ComfyUI": lambda layer: f"diffusion_model.{layer}",
    "kohya": lambda layer: "lora_unet_" + layer.replace(".", "_"),
    "plain": lambda layer: layer,
}


DOWN, A = ("down", "up"), ("A", "B")


def both(pipe, family, style, alpha, parts, folder):
    """One LoRA of rank 2 as two files: in original names, and in diffusers'."""
    theirs, own = {}, {}
    generator = torch.Generator().manual_seed(3)
    for layer, names in ORIGINAL[family].items():
        shapes = [network_of(pipe).get_submodule(name).weight.shape for name in names]
        down = torch.randn(2, shapes[0][1], generator=generator)
        ups = [torch.randn(shape[0], 2, generator=generator) for shape in shapes]
        name = STYLES[style](layer)
        theirs[f"{name}.lora_{parts[0]}.weight"] = down
        theirs[f"{name}.lora_{parts[1]}.weight"] = torch.cat(ups)
        if alpha is not None:
            theirs[f"{name}.alpha"] = torch.tensor(alpha)
        for one, up in zip(names, ups):
            own[f"transformer.{one}.lora_A.weight"] = down * (1 if alpha is None else alpha / 2)
            own[f"transformer.{one}.lora_B.weight"] = up
    save_file(theirs, folder / "original.safetensors")
    save_file({k: v.contiguous() for k, v in own.items()}, folder / "diffusers.safetensors")
    return folder / "original.safetensors", folder / "diffusers.safetensors"


@pytest.mark.parametrize(
    ("family", "style", "alpha", "parts"),
    [
        ("wan", "ComfyUI", None, DOWN),  # as Lightning's
        ("wan", "ComfyUI", 1.0, DOWN),
        ("wan", "ComfyUI", 1.0, A),
        ("wan", "kohya", 1.0, DOWN),
        ("flux", "kohya", 1.0, DOWN),
        ("flux", "ComfyUI", None, DOWN),
        ("flux2", "kohya", 1.0, DOWN),
        ("flux2", "ComfyUI", None, A),
        ("qwen_image", "plain", 1.0, DOWN),  # as Lightning's
        ("qwen_image", "kohya", 1.0, DOWN),
        ("qwen_image", "ComfyUI", 1.0, DOWN),
        ("z_image", "ComfyUI", 1.0, DOWN),
        ("z_image", "kohya", 1.0, DOWN),
        ("krea2", "ComfyUI", None, A),
    ],
)
def test_a_lora_in_original_names_is_the_same(family, style, alpha, parts, tmp_path, capsys):
    """Bit for bit the denoiser of its layers in diffusers' names; none is said to be lost."""
    pipe = make(family)
    bare = asked(denoiser_of(pipe), pipe, 0.95)
    theirs, own = both(pipe, family, style, alpha, parts, tmp_path)
    made = asked(load_loras(pipe, [Lora(theirs)])[0], pipe, 0.95)
    pipe = make(family)
    wanted = asked(load_loras(pipe, [Lora(own)])[0], pipe, 0.95)
    assert torch.equal(made, wanted) and not torch.equal(made, bare)
    assert "change nothing" not in capsys.readouterr().err


def change(layer, rows, columns, alpha=True):
    """A LoRA of one layer, in kohya's names."""
    tensors = {f"{layer}.lora_down.weight": torch.randn(2, columns),
               f"{layer}.lora_up.weight": torch.randn(rows, 2)}  # fmt: skip
    return {**tensors, f"{layer}.alpha": torch.tensor(1.0)} if alpha else tensors


IMG_IN = change("lora_unet_img_in", 32, 16)
QUERY = "lora_unet_" + BLOCK.removeprefix("unet.").replace(".", "_") + "_attn1_to_q"
ENCODER = "lora_te_text_model_encoder_layers_{}_self_attn_{}_proj"
TEXTS = [change(ENCODER.format(0, one), 16, 16) for one in ("q", "k", "v", "out")]
NORM = {"diffusion_model.blocks.0.norm3.diff": torch.randn(24)}


@pytest.mark.parametrize(
    ("family", "style", "more", "lost"),
    [
        ("flux", "kohya", IMG_IN, ["lora_unet_img_in.lora_down.weight"] * 2),
        ("wan", "ComfyUI", NORM, ["diffusion_model.blocks.0.norm3.diff"]),
        ("sd", None, {f"{QUERY}.dora_scale": torch.ones(8, 1)}, [f"{QUERY}.dora_scale"]),
        ("sd", None, change(ENCODER.format(7, "q"), 16, 16),
         [ENCODER.format(7, "q") + ".lora_down.weight"] * 2),
        ("sd", None, {}, []),
    ],
)  # fmt: skip
def test_what_has_no_place_is_said_by_name(family, style, more, lost, tmp_path, capsys):
    """diffusers leaves it out without a word; the text encoder's names are its own, and arrive."""
    pipe = make(family)
    if style is None:
        kohya(tmp_path / "own.safetensors", 0)
        held = load_file(tmp_path / "own.safetensors") | {k: v for t in TEXTS for k, v in t.items()}
    else:
        held = load_file(both(pipe, family, style, None, DOWN, tmp_path)[0])
    file = tmp_path / "mine.safetensors"
    save_file(held | more, file)
    load_loras(pipe, [Lora(file)])
    said = [line for line in capsys.readouterr().err.splitlines() if "mine.safetensors" in line]
    wanted = f"{file}: {len(lost)} of its tensors change nothing, such as"
    assert [line.startswith(f"{wanted} {lost[0]!r}; ") for line in said] == ([True] if lost else [])
    if lost:
        assert said[0].endswith(f"no place for them in the {type(pipe).__name__}")


@pytest.mark.parametrize(
    ("family", "style", "alpha", "parts"),
    [
        ("sd3", "ComfyUI", None, A),
        ("sd3", "kohya", 1.0, DOWN),
        ("wan", "kohya", None, DOWN),
        ("wan", "plain", None, A),
        ("flux", "ComfyUI", None, A),
        ("flux2", "ComfyUI", 1.0, A),
        ("krea2", "kohya", 1.0, DOWN),
        ("krea2", "ComfyUI", 1.0, DOWN),
        ("z_image", "kohya", None, A),
    ],
)
def test_a_lora_that_diffusers_does_not_convert_is_refused(family, style, alpha, parts, tmp_path):
    pipe = make(family)
    theirs, _ = both(pipe, family, style, alpha, parts, tmp_path)
    with pytest.raises(ValueError, match=r"original.safetensors (matches|does not fit)") as caught:
        load_loras(pipe, [Lora(theirs)])
    assert "\n" not in str(caught.value) and not getattr(pipe.transformer, "peft_config", None)
