"""What `kdpp generate` holds in memory: text encoders that leave, turns, another VAE, a forecast.

No GPU is needed. What moves between devices runs on torch's meta device, or as fake CUDA tensors,
which have no numbers and refuse to mix devices.
"""

import hashlib
import json
import os
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.func import functional_call

import kdpp
from kdpp import memory
from kdpp.checkpoints import drawing, encoding, forecast, pairs, places
from kdpp.checkpoints.encoding import Encoded
from kdpp.checkpoints.files import part_numbers
from kdpp.checkpoints.load import load_pipeline
from kdpp.checkpoints.networks import Network
from kdpp.checkpoints.offload import Turns
from kdpp.checkpoints.pairs import PipelinePair, open_pair
from kdpp.checkpoints.pipelines import denoiser_of, encode, encoders_of
from kdpp.checkpoints.requests import Picture, Request, read_png, read_texts
from kdpp.cli import main
from kdpp.lab import processes
from kdpp.lab.sampling import sample_seeds
from kdpp.solver import solver_of

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
tiny = pytest.importorskip("tiny_pipelines", reason="needs diffusers and transformers")
files = pytest.importorskip("single_files", reason="needs diffusers and transformers")

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
BOAT = (Picture(0, "a red boat"),)


pytestmark = pytest.mark.usefixtures("own_notes")


def folder(path, family="sd", seed=0, **parts):
    """A pipeline's folder, with some parts exchanged."""
    pipe = getattr(tiny, family)(seed=seed)
    pipe.register_modules(**parts)
    pipe.save_pretrained(path)
    return path


def request(student, **settings):
    given = {"prompt": "a red boat", "steps": 2, "width": 16, "height": 16, **settings}
    return Request(student=str(student), **given)


def run(out, *words):
    return main(["generate", "--prompt", "a red boat", "--steps", "2", "--width", "16",
                 "--height", "16", *map(str, words), "--out", str(out)])  # fmt: skip


# Digests ------------------------------------------------------------------------------------------


def test_a_large_files_digest_is_read_once(tmp_path, monkeypatch):
    """While its size and times are the same, and not while it may still be written."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    first = places.file_digest(path)
    assert not (tmp_path / "cache").exists()  # it was written just now
    read = []
    sha256 = places.hashlib.sha256
    monkeypatch.setattr(places.hashlib, "sha256", lambda: read.append(1) or sha256())
    monkeypatch.setattr(places, "SETTLED", -1.0)
    assert [places.file_digest(path) for _ in range(3)] == [first] * 3 and len(read) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 1))
    assert places.file_digest(path) != first
    path.write_bytes(b"one")
    assert places.file_digest(path) == first


def test_files_are_digested_while_the_rest_is_loaded(tmp_path, monkeypatch):
    """In another thread, each once; what has changed since then is read again."""
    path, other = tmp_path / "one.safetensors", tmp_path / "folder"
    path.write_bytes(b"one" * 500_000)
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"two")
    wanted = [places.content_digest(one) for one in (path, other)]
    assert wanted[0] == hashlib.sha256(path.read_bytes()).hexdigest()  # the web UIs' model hash
    threads, digested = [], places.file_digest

    def slowly(file):
        threads.append(threading.current_thread())
        time.sleep(0.1)
        return digested(file)

    monkeypatch.setattr(places, "file_digest", slowly)
    places.read_ahead([path, other, tmp_path / "nowhere"])
    assert [places.content_digest(one) for one in (path, other)] == wanted
    assert len(threads) == 2 and threading.current_thread() not in threads
    places.read_ahead([path])
    path.write_bytes(b"three")
    assert places.content_digest(path) == hashlib.sha256(b"three").hexdigest()
    (other / "model.safetensors").unlink()
    assert places.content_digest(other) != wanted[1]


@pytest.mark.parametrize("note", ["[]", "{}", "no JSON", '{"PATH": 3}', '{"PATH": [3, 1, 1, 7]}'])
def test_notes_that_were_damaged_are_not_believed(note, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    wanted = places.file_digest(path)
    (tmp_path / "cache" / "kdpp").mkdir(parents=True)
    place = tmp_path / "cache" / "kdpp" / "sha256.json"
    place.write_text(note.replace("PATH", str(path)))
    assert places.file_digest(path) == wanted
    place.write_text(json.dumps({str(path): [3, path.stat().st_mtime_ns, 0, "wrong"]}))
    assert places.file_digest(path) == wanted


# Turns --------------------------------------------------------------------------------------------


def devices(module):
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


def test_groups_take_turns_on_the_device():
    """One is there at a time; the CPU's own weights come back, not copies."""
    one, two, three = (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval() for _ in range(3))
    three[0].weight = one[0].weight  # in two places of a group
    held = [id(tensor) for tensor in one.parameters()]
    turns = Turns(META)
    group, _ = turns.group([one, three]), turns.group([two])
    assert one(torch.zeros(3, 2)).device == META  # what it is given comes, too
    assert (devices(one), devices(three), devices(two)) == ({"meta"}, {"meta"}, {"cpu"})
    assert three[0].weight is one[0].weight
    two(torch.zeros(3, 2))
    assert (devices(one), devices(three), devices(two)) == ({"cpu"}, {"cpu"}, {"meta"})
    assert [id(tensor) for tensor in one.parameters()] == held
    turns.take(group)
    turns.take(None)
    assert devices(nn.ModuleList([one, two, three])) == {"cpu"}


def test_on_the_cpu_nothing_takes_turns():
    network = nn.Linear(2, 2)
    turns = Turns(CPU)
    turns.take(turns.group([network]))
    assert turns.there is None and not network._forward_pre_hooks


# Prompts are encoded first ------------------------------------------------------------------------


def test_prompts_are_encoded_ahead_in_windows(monkeypatch):
    """Each once while they fit; whoever encodes leaves after the last that is expected."""
    monkeypatch.setattr(encoding, "WINDOW", 2)
    made = []

    def make():
        made.clear()
        encoded = Encoded(lambda one: made.append(one[0]) or one[0], lambda: made.append("leave"))
        return encoded

    encoded = make()
    encoded.expect((letter,) for letter in "aabcab")
    assert encoded["a",] == "a" and made == ["a", "b"]
    assert encoded["b",] == "b" and len(made) == 2
    assert encoded["c",] == "c" and made == ["a", "b", "c", "a"]
    assert encoded["a",] == "a" and encoded["b",] == "b"
    assert made == ["a", "b", "c", "a", "b", "leave"]
    encoded = make()
    assert [encoded["a",], encoded["a",], encoded["b",]] == ["a", "a", "b"]
    assert made == ["a", "b"]  # nobody said that these are all


def test_text_encoders_are_gone_before_the_first_step(tmp_path):
    """From memory, not only from the device; without word of what comes they stay."""
    pair = open_pair(request(folder(tmp_path / "sd", "sdxl")), CPU)
    assert len(encoders_of(pair.pipe)) == 2
    pair.extra_args(BOAT)
    gone = [weakref.ref(encoder) for encoder in encoders_of(pair.pipe).values()]
    assert len(gone) == 2
    pair.expect([BOAT, (Picture(0, "a hill"),)])
    seen = []
    pair.student.register_forward_pre_hook(lambda *_: seen.append([one() for one in gone]))
    (alone,) = drawing.draw(pair, BOAT, "none")
    assert seen == [[None, None]] * 2 and encoders_of(pair.pipe) == {}
    (hill,) = drawing.draw(pair, [Picture(0, "a hill")], "none")
    assert not torch.equal(alone.pixels, hill.pixels)


# A teacher's own text encoders --------------------------------------------------------------------


def test_a_teacher_with_other_text_encoders_is_told_by_them(tmp_path, capsys):
    """As `kdpp.Teacher` with its own conditions is; equal ones are held once."""
    student = folder(tmp_path / "student")
    same = folder(tmp_path / "same", seed=3)
    own = tiny.tiny(tiny.clip(), seed=5)
    other = folder(tmp_path / "other", seed=3, text_encoder=own)
    words = ("--student", student, "--teacher-scale", "0.5", "--teacher-cfg-scale", "2")
    for name, teacher in (("same", same), ("other", other)):
        assert run(tmp_path / name / "out", *words, "--teacher", teacher) == 0
        said = f"{teacher} has text encoders of its own" in capsys.readouterr().err
        assert said == (name == "other")
    pair = open_pair(request(student, teacher=str(same)), CPU)
    assert len(pair._encoding) == 1 and pair.teacher_args(BOAT) == {}

    pair = open_pair(request(student, teacher=str(other), teacher_scale=0.5,
                             teacher_cfg_scale=2.0), CPU)  # fmt: skip
    pipes = [load_pipeline(path) for path in (student, other)]
    texts = [encode(pipe, ["a red boat"], height=16, width=16) for pipe in pipes]
    assert not torch.equal(*(one["cond"]["encoder_hidden_states"] for one in texts))
    student_model, teacher_model = map(denoiser_of, pipes)
    teacher = kdpp.Teacher(teacher_model, scale=0.5, cfg_scale=2.0, extra_args=texts[1])
    like = torch.empty(1, *pair.shape)

    def guided(noise):
        return kdpp.TeacherGuidedDenoiser(student_model, teacher, renoise_noise_sampler=noise)

    with torch.no_grad():
        solver, _ = solver_of("euler")
        seeds = torch.tensor([0])
        latents = sample_seeds(guided, like, seeds, pair.request.sigmas, texts[0], solver, {})
    (drawn,) = drawing.draw(pair, BOAT, "teacher")
    assert torch.equal(drawn.pixels[None], pair.pixels(latents))
    pictures = [(tmp_path / name / "out" / "00000.png").read_bytes() for name in ("same", "other")]
    assert pictures[0] != pictures[1]


# Offload ------------------------------------------------------------------------------------------


class Copy:
    """`kdpp.Borrowed`'s copy of a model on a fake device, without streams."""

    made = 0

    def __init__(self, module, device):
        Copy.made += 1
        tensors = (*module.named_parameters(), *module.named_buffers())
        self.module, self.weights = module, {name: t.detach().to(device) for name, t in tensors}

    def __call__(self, *args, **kwargs):
        return functional_call(self.module, self.weights, args, kwargs)


@pytest.fixture
def fake_cuda(monkeypatch):
    """A mode in which CUDA's tensors can be made, without numbers; files are read as ever."""

    def really(function):
        def call(*args, **kwargs):
            with unset_fake_temporarily():
                return function(*args, **kwargs)

        return call

    def fake_denoiser(pipe, *, lcm=None, device=None):
        denoiser = really(denoiser_of)(pipe, lcm=lcm, device="cpu")
        networks = [one for one in denoiser.modules() if isinstance(one, Network)]
        inside = {id(part) for network in networks for part in network.modules()}
        for module in denoiser.modules():
            for name, table in module._buffers.items():
                if id(module) not in inside and torch.device(device) != CPU:
                    module._buffers[name] = table.to(device)
        return denoiser

    monkeypatch.setattr(pairs, "denoiser_of", fake_denoiser)
    for name in ("load_pipeline", "pipeline_sigmas", "same_weights", "Borrowed"):
        monkeypatch.setattr(pairs, name, really(getattr(pairs, name)))
    monkeypatch.setattr(memory, "_device", torch.device)
    monkeypatch.setattr(memory.Borrowed, "_pin", lambda self: None)
    monkeypatch.setattr(memory, "_Copy", Copy)
    monkeypatch.setattr(Copy, "made", 0)
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("offload", ["none", "teacher", "model"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_parts_are_on_the_device_when_they_compute(family, offload, fake_cuda, tmp_path):
    """And not otherwise. Fake tensors of CUDA refuse to be mixed with the CPU's."""
    one, two = (folder(tmp_path / str(seed), family, seed) for seed in range(2))
    with fake_cuda:
        pair = PipelinePair(request(one, teacher=str(two)), CUDA, None, offload)
        student, teacher = (network.network for network in pair.networks)
        encoders = nn.ModuleDict(encoders_of(pair.pipe))
        parts = {"texts": encoders, "student": student, "teacher": teacher, "VAE": pair.pipe.vae}

        def there():
            return [name for name, part in parts.items() if CUDA.type in devices(part)]

        assert there() == []
        extra_args = pair.extra_args(BOAT)
        assert there() == ["texts"] and len(encoders) - len(gone(encoders)) == 1
        given = {"cond": extra_args["cond"]}
        x, sigma = torch.zeros(1, *pair.shape, device=CUDA), torch.ones(1, device=CUDA) / 2
        assert pair.student(x, sigma, **given).device == CUDA
        stay = ["student", "teacher", "VAE"]
        together = {"none": stay, "teacher": ["student", "VAE"], "model": ["student"]}
        assert there() == together[offload]
        for borrowed in memory.borrowed_in(pair.teacher):
            borrowed.fetch()
        assert pair.teacher(x, sigma, **given).device == CUDA
        assert Copy.made == (offload == "teacher")
        assert there() == (["teacher"] if offload == "model" else together[offload])
        assert pair.pixels(x).shape == (1, 16, 16, 3)
        assert there() == (["VAE"] if offload == "model" else together[offload])
        held = [weakref.ref(encoder) for encoder in encoders.values()]
        del encoders, parts["texts"]
        pair.expect([(Picture(0, "another"),)])
        pair.extra_args([Picture(0, "another")])
        assert there() == [] and encoders_of(pair.pipe) == {}
        assert all(encoder() is None for encoder in held)


def test_a_borrowed_teacher_does_its_own_cfg():
    """Qwen-Image's, whose CFG keeps the norm."""
    teacher = denoiser_of(tiny.qwen_image())
    lent = pairs.borrowed_by(teacher, CPU)
    assert type(lent) is type(teacher) and len(memory.borrowed_in(lent)) == 1
    x, sigma = torch.ones(1, 4, 4, 4), torch.ones(1) / 2
    text = {"encoder_hidden_states": torch.ones(1, 3, 16)}
    given = {"cond": text, "uncond": {"encoder_hidden_states": -torch.ones(1, 3, 16)}}
    with torch.no_grad():
        answers = [one(x, sigma, **given, cond_scale=3.0) for one in (teacher, lent)]
    assert torch.equal(*answers)


def gone(modules):
    """Of a table's modules those that are not on the device."""
    return [module for module in modules.values() if CUDA.type not in devices(module)]


@pytest.mark.parametrize(("family", "dtype"), [("sd", "float32"), ("sdxl", "float16")])
def test_layers_that_come_one_by_one_compute_the_same(family, dtype, tmp_path):
    """diffusers' hooks around every layer: of text encoders, both networks, and a VAE in float32
    for decoding."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate (extra: lab)")
    own = tiny.tiny(tiny.clip(), seed=5)
    paths = folder(tmp_path / "one", family), folder(tmp_path / "two", family, 1, text_encoder=own)
    settings = {"teacher": str(paths[1]), "dtype": dtype}
    wanted, pair = (open_pair(request(paths[0], **settings), CPU) for _ in range(2))
    assert len(pair._encoding) == 2
    for pipe in pair._encoding:  # as enable_sequential_cpu_offload does, which refuses the CPU
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                accelerate.cpu_offload(part, "cpu", offload_buffers=bool(part._parameters))
    assert devices(pair.pipe.unet) == devices(pair.pipe.vae) == {"meta"}
    for guide in ("none", "teacher"):
        made = [drawing.draw(one, BOAT, guide)[0].pixels for one in (pair, wanted)]
        assert torch.equal(*made)


def test_layers_come_one_by_one_by_diffusers_own_hooks():
    """On the device that is asked for; nothing else is moved then."""
    asked = []

    def record(device):
        asked.append(device)

    pipe = SimpleNamespace(components={}, vae=nn.Linear(2, 2), unet=nn.Linear(2, 2),
                           enable_sequential_cpu_offload=record)  # fmt: skip
    turns, _ = pairs.place([pipe, pipe], META, "sequential")
    assert asked == [META, META] and turns.device == CPU
    pairs.place([pipe], CPU, "sequential")
    assert len(asked) == 2


def test_a_lora_student_and_its_base_are_one_network(tmp_path):
    """On the device once, too; nothing is borrowed."""
    pytest.importorskip("peft", reason="needs peft (extra: diffusers)")
    import test_loras

    speed = test_loras.lora(tmp_path / "speed.safetensors", 0)
    base = folder(tmp_path / "base")
    loras = ((str(speed), 1.0, "student"),)
    pair = PipelinePair(request(base, loras=loras), META, None, "teacher")
    student, teacher = (network.network for network in pair.networks)
    assert student is teacher and memory.borrowed_in(pair.teacher) == []
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in student.parameters()}
    added = sum(tensor.nbytes for tensor in load_file(speed).values())
    assert sum(held.values()) == part_numbers(base)["network"] * 4 + added


@pytest.mark.parametrize(("name", "found"), [("cuda", "cuda:0"), ("mps", "mps"), ("cpu", "cpu")])
def test_devices_are_those_that_torch_finds(name, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert str(processes.device(name)) == found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    if name != "cpu":
        with pytest.raises(ValueError, match=f"the device is '{name}', and torch finds none here"):
            processes.device(name)
    with pytest.raises(ValueError, match="the device is 'tpu'; it must be one of cpu, cuda, mps"):
        processes.device("tpu")


# Another VAE --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["original", "in a model", "diffusers", "folder", "pipeline"])
def test_another_vae(form, tmp_path):
    """Its pictures are those of a model that holds it; the PNG names it, and `--like` finds it."""
    student = folder(tmp_path / "student")
    vae = tiny.tiny(tiny.vae(), seed=9)
    holding = folder(tmp_path / "holding", vae=vae)
    place = tmp_path / "vae.safetensors"
    if form == "pipeline":
        place = holding
    elif form == "folder":
        vae.save_pretrained(place := tmp_path / "vae")
    elif form == "diffusers":
        save_file(vae.state_dict(), place)
    else:
        save_file(files.under("first_stage_model." * (form == "in a model"), files.vae(vae)), place)
    assert run(tmp_path / "a", "--student", student, "--vae", place) == 0
    assert run(tmp_path / "b", "--student", holding) == 0
    assert run(tmp_path / "c", "--student", student) == 0
    pixels = [open_image(tmp_path / name / "00000.png") for name in "abc"]
    assert pixels[0] == pixels[1] != pixels[2]
    picture = tmp_path / "a" / "00000.png"
    assert f"VAE: {place.name}" in read_texts(picture)["parameters"]
    assert read_png(picture)[0].digests.keys() == {"student", "vae"}
    assert main(["generate", "--like", str(picture), "--out", str(tmp_path / "d")]) == 0
    assert (tmp_path / "d" / "00000.png").read_bytes() == picture.read_bytes()


def open_image(path):
    from PIL import Image

    with Image.open(path) as image:
        return image.tobytes()


def test_a_vae_for_a_single_file(tmp_path):
    """Also for one that holds none; its settings are those of the architecture."""
    tokenizers = files.tokenizers(tmp_path)
    pipe = files.pipeline("SD 1.x", tokenizers)
    tensors = files.single_file(pipe)
    bare = {k: v for k, v in tensors.items() if not k.startswith("first_stage_model.")}
    other = tiny.tiny(diffusers.AutoencoderKL(**files.TINY["SD 1.x"].vae), seed=9)
    save_file(tensors, tmp_path / "whole.safetensors")
    save_file(bare, tmp_path / "bare.safetensors")
    save_file(other.state_dict(), tmp_path / "vae.safetensors")
    for name in ("whole", "bare"):
        made = load_pipeline(
            tmp_path / f"{name}.safetensors", vae=tmp_path / "vae.safetensors", configs=files.TINY
        )
        assert made.vae.config.scaling_factor == pipe.vae.config.scaling_factor
        weights = made.vae.state_dict()
        assert all(torch.equal(weights[k], v) for k, v in other.state_dict().items())
        assert made.vae_scale_factor == pipe.vae_scale_factor


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: tiny.vae(channels=8), "its latent_channels is 8, and that of the model's own VAE"),
        (
            lambda: tiny.vae(shift=0.3),
            "its shift_factor is 0.3, and that of the model's own VAE No",
        ),
        (lambda: tiny.video_vae("AutoencoderKLWan"), "is a AutoencoderKLWan, and the model's VAE"),
        (lambda: tiny.unet(), "is a UNet2DConditionModel, and the model's VAE a AutoencoderKL"),
    ],
)
def test_a_vae_of_other_latents_is_refused(make, sentence, tmp_path, capsys):
    """As a folder by its settings, as a file by its tensors."""
    network = make()
    network.save_pretrained(tmp_path / "vae")
    words = ("--student", folder(tmp_path / "student"), "--vae")
    assert run(tmp_path / "out", *words, tmp_path / "vae") == 1
    assert sentence in capsys.readouterr().err
    if "shift" not in sentence:  # which a file does not say
        save_file(network.state_dict(), tmp_path / "vae.safetensors")
        assert run(tmp_path / "out", *words, tmp_path / "vae.safetensors") == 1
        assert "of its VAE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_large_picture_in_tiles(tmp_path, monkeypatch):
    """Its VAE sees a tile at a time; a picture says so, and a small one has no tiles."""
    student = folder(tmp_path / "student")
    words = ("--student", student, "--sampler", "euler")
    large = ("--width", "64", "--height", "64")
    sizes = []
    decoder = diffusers.models.autoencoders.vae.Decoder.forward

    def forward(self, z, *more):
        sizes.append(tuple(z.shape[-2:]))
        return decoder(self, z, *more)

    monkeypatch.setattr(diffusers.models.autoencoders.vae.Decoder, "forward", forward)
    assert run(tmp_path / "whole", *words, *large) == 0
    assert sizes == [(32, 32)]
    assert run(tmp_path / "tiles", *words, *large, "--tiling", "true") == 0
    assert len(sizes) > 4 and max(sizes[1:]) < (32, 32)
    assert read_png(tmp_path / "tiles" / "00000.png")[0].tiling


def test_a_batch_is_decoded_picture_by_picture(tmp_path, monkeypatch):
    pair = open_pair(request(folder(tmp_path / "student")), CPU)
    batches = []
    pair.pipe.vae.decoder.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    pair.pixels(torch.zeros(3, *pair.shape))
    assert batches == [1, 1, 1]


# The forecast -------------------------------------------------------------------------------------


def numbers(*modules):
    """Those of weights; one in two places (T5's) is written once."""
    return sum(tensor.numel() for module in modules for tensor in module.parameters())


def test_a_models_parts_are_counted_from_headers(tmp_path):
    """Folder and single file, shards included; a LoRA is one part."""
    pipe = tiny.sd3()
    pipe.save_pretrained(tmp_path / "whole")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards" / "text_encoder").glob("*.safetensors"))) > 1
    texts = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    network = numbers(pipe.transformer) + pipe.transformer.pos_embed.pos_embed.numel()
    wanted = {"network": network, "VAE": numbers(pipe.vae),
              "text encoders": numbers(*texts)}  # fmt: skip
    for name in ("whole", "shards"):
        assert part_numbers(tmp_path / name) == wanted
    pipe = files.pipeline("SDXL", files.tokenizers(tmp_path))
    save_file(files.single_file(pipe), tmp_path / "file.safetensors")
    assert part_numbers(tmp_path / "file.safetensors") == {
        "network": numbers(pipe.unet), "VAE": numbers(pipe.vae),
        "text encoders": numbers(pipe.text_encoder, pipe.text_encoder_2),
    }  # fmt: skip


@pytest.fixture
def sizes(monkeypatch):
    """Weights of 5 GiB and so on, in float32."""
    numbers = {"student": 5, "teacher": 4, "texts": 7, "VAE": 1}

    def weight_bytes(request):
        unit = forecast.GIB * (0.5 if request.dtype == "float16" else 1)
        found = {"student": numbers["student"], "teacher": numbers["teacher"],
                 "text encoders": numbers["texts"], "VAE": numbers["VAE"]}  # fmt: skip
        return {part: int(size * unit) for part, size in found.items()}

    monkeypatch.setattr(forecast, "weight_bytes", weight_bytes)
    return lambda free: monkeypatch.setattr(forecast, "free_memory", lambda device: free * 2**30)


@pytest.mark.parametrize(
    ("device", "offload", "free", "said"),
    [
        (CPU, "teacher", 17, "17.0 GiB of weights at once on cpu (student 5.0, teacher 4.0, text"),
        (CUDA, "teacher", 10, "10.0 GiB of weights at once on cuda:0 (student 5.0, teacher 4.0, t"),
        (CUDA, "none", 10, "10.0 GiB of weights at once on cuda:0"),
        (CUDA, "model", 7, "7.0 GiB of weights at once on cuda:0"),
        (CUDA, "sequential", 1, "0.3 GiB of weights at once on cuda:0"),
    ],
)
def test_the_forecast_says_what_is_needed_and_free(device, offload, free, said, sizes):
    """Text encoders are not there with the networks, but on the CPU."""
    sizes(free)
    line = forecast.forecast(Request(), device, offload)
    assert line.startswith(said) and line.endswith(f"plus activations; {free:.1f} GiB are free")


@pytest.mark.parametrize(
    ("device", "free", "flags"),
    [
        (CPU, 16, "--dtype float16 needs 8.5 GiB"),
        (CUDA, 9, "--dtype float16 needs 5.0 GiB"),
        (CUDA, 4.5, "--dtype float16 --offload model needs 3.5 GiB"),
        (CUDA, 1, "--offload sequential needs 0.3 GiB"),
        (CPU, 1, "and no flag makes them"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_flag_that_would(device, free, flags, sizes):
    sizes(free)
    with pytest.raises(
        ValueError, match=f"do not fit into the {free:.1f} GiB that are free.*"
    ) as e:
        forecast.forecast(Request(), device, "teacher")
    assert flags in str(e.value)
    sizes(7)
    with pytest.raises(ValueError, match=r"; --offload model needs 7\.0 GiB"):
        forecast.forecast(Request(dtype="bfloat16"), CUDA, "teacher")


def test_the_command_forecasts_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    """Student, teacher and LoRAs by their headers; what is not there is said as ever."""
    one, two = (folder(tmp_path / str(seed), seed=seed) for seed in range(2))
    need = 4 * (sum(part_numbers(one).values()) + part_numbers(two)["network"])
    loads = []
    monkeypatch.setattr(pairs, "load_pipeline", lambda *_, **__: loads.append(1))
    monkeypatch.setattr(forecast, "free_memory", lambda device: need - 1)
    assert run(tmp_path / "out", "--student", one, "--teacher", two) == 1
    assert "--dtype float16 needs" in capsys.readouterr().err
    assert not loads and not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(forecast, "free_memory", lambda device: need)
    assert run(tmp_path / "out", "--student", one, "--teacher", two) == 0
    assert "GiB of weights at once on cpu (student 0.0, teacher 0.0," in capsys.readouterr().err


def test_what_is_free_is_what_the_system_says(monkeypatch):
    """On CUDA the device's, elsewhere memory and swap; unknown where nothing tells."""
    psutil = pytest.importorskip("psutil", reason="needs psutil (extra: diffusers)")
    system = psutil.virtual_memory().total + psutil.swap_memory().total
    assert 0 < forecast.free_memory(CPU) <= system
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 8))
    assert forecast.free_memory(CUDA) == 3
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)
    assert forecast.free_memory(torch.device("mps")) is None
