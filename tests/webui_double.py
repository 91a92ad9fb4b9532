"""A double of the web UIs: what their scripts, samplers and models do to an extension, no more.

Written from what was measured in a running A1111 v1.10.1. `Host` holds what a process has one of;
`Host.modules` is what it offers for import. What the hosts share is in `Host`, what is A1111's own
in `A1111`. A network's layers obey the host's one list of LoRAs whenever they are called; one that
was thrown away is on the device "meta" and fails.
"""

import functools
import importlib
import inspect
import re
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import save_file

CHANNELS, TOKENS = 4, 2


class InterruptedException(BaseException):
    """What ends a run that was interrupted."""


class Network:
    """A latent diffusion model that predicts ε, its text encoder and its VAE."""

    parameterization, cond_stage_key = "eps", "txt"

    def __init__(self, host, info, shift, **facts):
        self.host, self.sd_checkpoint_info, self.shift = host, info, shift
        self.device, self.first_stage_model, self.asked = "cpu", object(), 0
        self.cond_stage_model = object()
        self.latent_channels, self.scale_factor, self.is_sd3 = CHANNELS, 0.18215, False
        self.model = SimpleNamespace(conditioning_key="crossattn")
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas_cumprod = (1 - betas).cumprod(0)
        self.interrupt = None
        for name, value in facts.items():
            setattr(self, name, value)

    def to(self, device):
        self.device = device
        return self

    def patched(self, part):
        if self.device == "meta":
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        loras = self.host.loras.loaded_networks
        return self.shift + sum(getattr(one, f"{part}_multiplier") * one.shift for one in loras)

    def apply_model(self, x, t, cond):
        self.asked += 1
        if self.interrupt is not None:
            raise self.interrupt
        (text,), (image,) = cond["c_crossattn"], cond["c_concat"]
        assert len(text) == len(x) == len(image) == len(t)
        text = text.mean(1)[:, :, None, None]
        return torch.tanh(x + text + self.patched("unet")) + t.reshape(-1, 1, 1, 1) / 1000

    def get_learned_conditioning(self, texts):
        made = [torch.Generator().manual_seed(sum(map(ord, text)) + 1) for text in texts]
        shape = (TOKENS, CHANNELS)
        rows = [torch.randn(shape, generator=one, dtype=torch.float64) for one in made]
        return torch.stack(rows) + self.patched("te")


class Prompts(list):
    """SdConditioning."""

    def __init__(self, prompts, width=None, height=None, is_negative_prompt=False):
        super().__init__(prompts)
        self.width, self.height = width, height


def scheduled(model, text, steps):
    """``red|blue``: the first text in the first half of the calls, then the other."""
    first, _, then = text.partition("|")
    texts = [first, then or first]
    ends = [steps // 2 - 1, steps]
    return [*zip(ends, model.get_learned_conditioning(texts))]


def at_step(schedule, step):
    return next(cond for end, cond in schedule if step <= end)


def get_learned_conditioning(model, prompts, steps, hires_steps=None, old=False):
    return [scheduled(model, text, steps) for text in prompts]


def get_multicond_learned_conditioning(model, prompts, steps, hires_steps=None, old=False):
    """``one AND other:0.5``."""
    parts = [[part.partition(":") for part in text.split(" AND ")] for text in prompts]
    return [
        [(float(weight or 1), scheduled(model, text, steps)) for text, _, weight in row]
        for row in parts
    ]


def reconstruct_cond_batch(conds, step):
    return torch.stack([at_step(schedule, step) for schedule in conds])


def reconstruct_multicond_batch(conds, step):
    flat = [at_step(schedule, step) for row in conds for _, schedule in row]
    numbers = iter(range(len(flat)))
    return [[(next(numbers), weight) for weight, _ in row] for row in conds], torch.stack(flat)


def parse_prompt(text):
    found = {}
    for name, items in re.findall(r"<(\w+):([^>]+)>", text):
        found.setdefault(name, []).append(SimpleNamespace(positional=items.split(":")))
    return re.sub(r"<(\w+):([^>]+)>", "", text), found


class CFGDenoiser(torch.nn.Module):
    """What a sampler is given: counts its calls, does CFG, keeps what the mask keeps."""

    def __init__(self, host, sampler):
        super().__init__()
        self.host, self.sampler, self.step, self.p = host, sampler, 0, None
        self.mask = self.nmask = self.init_latent = None
        self.need_last_noise_uncond, self.last_noise_uncond = False, None

    @property
    def inner_model(self):
        return self.host.k_diffusion.external.CompVisDenoiser(self.host.shared.sd_model)

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        if self.host.shared.state.interrupted:
            raise InterruptedException
        composed, text = reconstruct_multicond_batch(cond, self.step)
        owners = [i for i, row in enumerate(composed) for _ in row]
        other = reconstruct_cond_batch(uncond, self.step)

        def ask(rows, text):
            cond = {"c_crossattn": [text], "c_concat": [image_cond[rows]]}
            return self.inner_model(x[rows], sigma[rows], cond=cond)

        answers, rest = ask(owners, text), ask(list(range(len(x))), other)
        denoised = rest.clone()
        for i, row in enumerate(composed):
            for part, weight in row:
                denoised[i] += (answers[part] - rest[i]) * weight * cond_scale
        if self.need_last_noise_uncond:
            self.last_noise_uncond = rest.clone()
        if self.mask is not None:
            denoised = denoised * self.nmask + self.init_latent * self.mask
        self.sampler.last_latent = denoised
        self.step += 1
        return denoised


class SamplerData(namedtuple("SamplerData", ["name", "constructor", "aliases", "options"])):
    def total_steps(self, steps):
        return steps * 2 if self.options.get("second_order") else steps


class KDiffusionSampler:
    """Gives its function what the names of its parameters ask for."""

    host = None  # set by `Host`

    def __init__(self, function, sd_model):
        named = self.host.k_diffusion.sampling
        self.func = function if callable(function) else getattr(named, function)
        self.extra_params = {"sample_euler": ["s_noise"]}.get(function, [])
        self.config, self.s_min_uncond, self.last_latent = None, 0.0, None
        self.model_wrap_cfg = CFGDenoiser(self.host, self)

    def sample(self, p, x):
        model = self.model_wrap_cfg
        model.p, model.step = p, 0
        model.mask, model.nmask, model.init_latent = p.mask, p.nmask, p.init_latent
        self.host.k_diffusion.sampling.rng = p.rng
        parameters = inspect.signature(self.func).parameters
        wanted = [name for name in self.extra_params if name in parameters and hasattr(p, name)]
        given = {name: getattr(p, name) for name in wanted}
        given.update({"eta": 1.0} if "eta" in parameters else {})
        if self.config.options.get("brownian_noise"):
            given["noise_sampler"] = lambda sigma, sigma_next: p.rng()
        extra_args = {
            "cond": p.c, "image_cond": x.new_zeros(len(x), 5, 1, 1), "uncond": p.uc,
            "cond_scale": p.cfg_scale, "s_min_uncond": self.s_min_uncond,
        }  # fmt: skip
        self.last_latent = x
        try:
            return self.func(
                model, x, sigmas=p.sigmas, extra_args=extra_args, disable=False,
                callback=p.callback, **given,
            )  # fmt: skip
        except InterruptedException:
            return self.last_latent


class Generators:
    """ImageRNG: the next noise of each picture from its own seed."""

    def __init__(self, seeds, shape):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape = shape

    def __call__(self):
        drawn = [
            torch.randn(self.shape, generator=one, dtype=torch.float64) for one in self.generators
        ]
        return torch.stack(drawn)


def k_diffusion():
    """k-diffusion whose noise is each picture's own, and two of its samplers."""
    sampling = ModuleType("k_diffusion.sampling")
    external = ModuleType("k_diffusion.external")
    external.__getattr__ = lambda name: getattr(importlib.import_module("kdpp.standin"), name)
    sampling.rng = None
    sampling.default_noise_sampler = lambda x: lambda sigma, sigma_next: sampling.rng()

    def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None, s_noise=1.0):
        for sigma, after in pairwise(sigmas):
            denoised = model(x, sigma * x.new_ones(len(x)), **extra_args)
            x = denoised + (x - denoised) * after / sigma
        return x

    def sample_euler_ancestral(
        model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0,
        noise_sampler=None,
    ):  # fmt: skip
        for sigma, after in pairwise(sigmas):
            denoised = model(x, sigma * x.new_ones(len(x)), **extra_args)
            up = min(after, eta * (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5)
            x = denoised + (x - denoised) * (after**2 - up**2) ** 0.5 / sigma
            if after > 0:
                x = x + sampling.default_noise_sampler(x)(sigma, after) * s_noise * up
        return x

    sampling.sample_euler = sample_euler
    sampling.sample_euler_ancestral = torch.no_grad()(sample_euler_ancestral)
    made = ModuleType("k_diffusion")
    made.__path__, made.sampling, made.external = [], sampling, external
    return made


def ddim(model, x, timesteps, extra_args=None, callback=None, disable=None):
    """A sampler over timesteps, which none of kdpp's is."""
    return x


def sample_restart(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """A sampler that kdpp has not."""
    return x


class Component:
    """A widget of Gradio's."""

    def __init__(self, **settings):
        self.settings, self.value = settings, settings.get("value")


class Accordion(Component):
    """InputAccordion: a checkbox that is an accordion."""

    def __init__(self, value, **settings):
        super().__init__(value=value, **settings)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Script:
    """The class of scripts."""

    is_img2img = False
    infotext_fields = paste_field_names = None

    def elem_id(self, name):
        return f"script_kdpp_{name}"


def module(name, **content):
    made = ModuleType(name)
    vars(made).update(content)
    return made


class Shared(ModuleType):
    """modules.shared, which looks the active model up."""

    sd_model = property(lambda self: self.host.active())


class Host:
    """What a process of any web UI has; its files lie in ``folder``."""

    def __init__(self, folder):
        self.folder = folder
        self.reported, self.callbacks, self.loaded_callbacks = [], {}, []
        self.k_diffusion = k_diffusion()
        self.opts = SimpleNamespace(
            batch_cond_uncond=True, use_old_scheduling=False, enable_quantization=False,
            skip_early_cond=0.0, data={},
        )  # fmt: skip
        self.loras = module(
            "networks", loaded_networks=[], available_network_aliases={},
            list_available_networks=lambda: None, load_network=self.load_lora,
        )  # fmt: skip
        self.sampler_class = type("KDiffusionSampler", (KDiffusionSampler,), {"host": self})
        self.sd_samplers = self.samplers()
        self.shared = Shared("modules.shared")
        self.shared.host, self.shared.opts, self.shared.loaded_hypernetworks = self, self.opts, []
        self.shared.state = SimpleNamespace(interrupted=False, skipped=False)

    def lora(self, name, shift):
        """A LoRA's file."""
        file = self.folder / f"{name}.safetensors"
        file.write_bytes(b"")
        entry = SimpleNamespace(filename=str(file), shift=shift)
        self.loras.available_network_aliases[name] = entry

    def load_lora(self, name, on_disk):
        return SimpleNamespace(name=name, shift=on_disk.shift)

    def prompt_lora(self, name, weight="1"):
        """One that a prompt names, as the host keeps it."""
        made = self.load_lora(name, self.loras.available_network_aliases[name])
        made.te_multiplier = made.unet_multiplier = float(weight)
        return made

    def samplers(self):
        """The host's lists of samplers, and how it finds one by name."""
        rows = [
            ("Euler", "sample_euler", {}),
            ("Euler a", "sample_euler_ancestral", {}),
            ("Restart", sample_restart, {"second_order": True}),
        ]
        data = [
            SamplerData(name, functools.partial(self.sampler_class, function), [], options)
            for name, function, options in rows
        ]
        data.append(SamplerData("DDIM", lambda model: SimpleNamespace(func=ddim), [], {}))
        made = module("modules.sd_samplers", all_samplers=data, samplers_map={})
        made.all_samplers_map = {one.name: one for one in data}
        made.rows, made.schedulers = rows, ["Automatic", "Karras", "Simple", "Turbo"]

        def set_samplers():
            made.samplers_map.clear()
            made.samplers_map.update({one.name.lower(): one.name for one in made.all_samplers})

        @functools.cache
        def get_sampler_and_scheduler(name, scheduler):
            for label in made.schedulers:
                if name.endswith(" " + label):
                    name, scheduler = name[: -len(label) - 1], label
            known = name in made.all_samplers_map
            return (name if known else made.all_samplers[0].name), scheduler

        made.set_samplers, made.get_sampler_and_scheduler = set_samplers, get_sampler_and_scheduler
        set_samplers()
        return made

    def modules(self):
        """What can be imported in it, by name."""
        registered = self.callbacks

        def hook(name):
            return lambda function: registered.setdefault(name, []).append(function)

        plain = [
            module("modules", __path__=[]),
            module("modules.devices", autocast=nullcontext),
            module("modules.extra_networks", parse_prompt=parse_prompt),
            module(
                "modules.prompt_parser", SdConditioning=Prompts,
                get_learned_conditioning=get_learned_conditioning,
                get_multicond_learned_conditioning=get_multicond_learned_conditioning,
                reconstruct_cond_batch=reconstruct_cond_batch,
                reconstruct_multicond_batch=reconstruct_multicond_batch,
            ),
            module(
                "modules.script_callbacks", on_before_ui=hook("before_ui"),
                on_script_unloaded=hook("unloaded"),
                model_loaded_callback=self.loaded_callbacks.append,
            ),
            module("modules.errors", report=lambda text, **_: self.reported.append(text)),
            module(
                "modules.scripts", Script=Script, AlwaysVisible=object(), scripts_data=[],
                MaskBlendArgs=None,
            ),
            module("modules.ui_common", create_refresh_button=lambda *_: Component()),
            module("modules.ui_components", InputAccordion=Accordion),
            module(
                "modules.sd_samplers_common", SamplerData=SamplerData,
                InterruptedException=InterruptedException,
            ),
            module(
                "modules.sd_samplers_kdiffusion", KDiffusionSampler=self.sampler_class,
                samplers_k_diffusion=self.sd_samplers.rows,
            ),
            module(
                "gradio", Row=nullcontext, Markdown=lambda text: Component(value=text),
                update=lambda **given: given,
                **dict.fromkeys(["Dropdown", "Radio", "Slider", "Checkbox", "Textbox"], Component),
            ),
            self.shared, self.sd_samplers, self.loras, self.k_diffusion,
            self.k_diffusion.sampling, self.k_diffusion.external,
        ]  # fmt: skip
        found = {one.__name__: one for one in plain}
        for name, one in found.items():
            parent, _, last = name.rpartition(".")
            if parent == "modules":
                setattr(found["modules"], last, one)
        return found


def checkpoint_file(folder, name, context):
    """A file with a header as Stable Diffusion's, as hosts list it."""
    file = folder / name
    keys = {"input_blocks.0.0.weight": 1, "output_blocks.0.0.in_layers.0.weight": 1,
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": context}  # fmt: skip
    save_file(
        {f"model.diffusion_model.{key}": torch.zeros(1, width) for key, width in keys.items()},
        file,
    )
    return SimpleNamespace(name=name, filename=str(file), is_safetensors=True)


class A1111(Host):
    """One active model; loading another throws it away, unless the host has forgotten it."""

    def __init__(self, folder):
        super().__init__(folder)
        self.checkpoints = {}
        self.data = SimpleNamespace(sd_model=None, loaded_sd_models=[])
        database = SimpleNamespace(load_textual_inversion_embeddings=lambda force_reload: None)
        self.hijack = SimpleNamespace(
            clip=None, layers=None, optimization_method=None, embedding_db=database
        )
        self.sd_vae = module(
            "modules.sd_vae", base_vae=None, loaded_vae_file=None, checkpoint_info=None
        )
        self.sd_unet = module("modules.sd_unet", current_unet=None, original_forward=None)

    def active(self):
        return self.data.sd_model

    def checkpoint(self, name, shift, context=768, **facts):
        """A file of the host's, with a header as Stable Diffusion's; the active model if the first.

        ``context`` is the width of its text: 768 for SD 1, 2048 for SDXL.
        """
        info = checkpoint_file(self.folder, name, context)
        self.checkpoints[name] = info, shift, facts
        if self.active() is None:
            self.load_model(info)

    def load_model(self, info):
        if self.data.sd_model is not None:
            self.data.sd_model.to("meta")
        torch.rand(1)  # as random initialisation does
        _, shift, facts = self.checkpoints[info.name]
        self.opts.data["sd_checkpoint_hash"] = info.name
        self.sd_vae.checkpoint_info = info
        if facts.get("broken"):
            raise RuntimeError("size mismatch for the weights")
        model = Network(self, info, shift, **facts)
        self.hijack.clip, self.hijack.layers = model.cond_stage_model, [model]
        self.data.sd_model = model
        self.data.loaded_sd_models.insert(0, model)
        self.loras.loaded_networks.clear()  # by the empty prompt's conditions
        self.loaded_callbacks.append(model)
        return model

    def modules(self):
        @contextmanager
        def skip_writing():
            yield

        found = super().modules()
        own = [
            module(
                "modules.sd_models", model_data=self.data, load_model=self.load_model,
                SkipWritingToConfig=skip_writing, list_models=lambda: None,
                send_model_to_trash=lambda model: model.to("meta"),
                checkpoints_list={name: info for name, (info, *_) in self.checkpoints.items()},
                checkpoint_aliases={name: info for name, (info, *_) in self.checkpoints.items()},
            ),
            module("modules.sd_hijack", model_hijack=self.hijack),
            self.sd_vae, self.sd_unet,
        ]  # fmt: skip
        for one in own:
            found[one.__name__] = one
            setattr(found["modules"], one.__name__.rpartition(".")[2], one)
        return found


class Runner:
    """A processing object's ``scripts``: no script of another extension blends the mask."""

    on_mask_blend = None


class Processing:
    """A request for pictures, and the hooks around their drawing."""

    is_hr_pass, cfg_scale, s_noise = False, 2.0, 1.0
    mask = nmask = init_latent = scripts = callback = None

    def __init__(
        self, host, sampler="Euler", prompts=("a cat",), seeds=(1,), shape=(CHANNELS, 4, 4)
    ):
        self.host, self.sampler_name = host, sampler
        self.texts, self.seeds, self.shape = list(prompts), list(seeds), shape
        self.negative_prompts, self.width, self.height, self.steps = ["bad"] * len(seeds), 32, 32, 4
        self.sigmas = torch.tensor([14.6, 5.0, 1.5, 0.4, 0.0], dtype=torch.float64)
        self.extra_generation_params = {}

    @property
    def sd_model(self):
        return self.host.shared.sd_model

    def draw(self, script=None, args=()):
        """The latents; a script's errors in its hooks are reported and forgotten."""
        host = self.host
        if script is not None:
            self.hook(script.process, args)
        found = [parse_prompt(text) for text in self.texts]
        self.prompts = [text for text, _ in found]
        tags = found[0][1].get("lora", [])
        host.loras.loaded_networks[:] = [host.prompt_lora(*one.positional) for one in tags]
        config = host.sd_samplers.all_samplers_map[self.sampler_name]
        self.sampler = config.constructor(self.sd_model)
        self.sampler.config = config
        steps = config.total_steps(self.steps)
        model = self.sd_model
        self.c = get_multicond_learned_conditioning(model, self.prompts, steps)
        self.uc = get_learned_conditioning(model, self.negative_prompts, steps)
        self.rng = Generators(self.seeds, self.shape)
        noise = self.rng() * self.sigmas[0]
        x = noise if self.init_latent is None else self.init_latent + noise
        if script is not None:
            self.hook(script.process_before_every_sampling, args, x=x)
        return self.sampler.sample(self, x)

    def hook(self, function, args, **given):
        try:
            function(self, *args, **given)
        except Exception as error:
            self.host.reported.append(str(error))
