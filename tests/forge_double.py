"""Doubles of Forge and Forge Neo: what their engines, patchers and samplers do to an extension.

Written from what was measured in a running Forge (dfdcbab6) and Forge Neo (2.26). One network in
memory holds the LoRAs of the patcher that was loaded last; asked for another one's sake it fails.
"""

import copy
from types import SimpleNamespace

import torch

import webui_double as webui
from webui_double import module


class SD15:
    """A latent format."""


class SDXL:
    """Another."""


class Predictor:
    """Levels, and what the network predicts."""

    def __init__(self, flow=False):
        self.prediction_type = "const" if flow else "epsilon"
        self.sigmas = torch.linspace(0.001, 1.0, 1000) if flow else torch.tensor([0.0292, 14.6146])


class PredictionFlux(Predictor):
    """FLUX's: ancestral samplers have a form of their own for it."""

    def __init__(self):
        super().__init__(flow=True)


class Network:
    """A network in memory: weights, and the LoRAs that they hold now."""

    def __init__(self, shift, predictor=None):
        self.shift, self.predictor = shift, predictor or Predictor()
        self.loras, self.interrupt, self.asked = (), None, 0

    def patched(self):
        return self.shift + sum(weight * shift for shift, weight in self.loras)

    def apply_model(self, x, sigma, c_crossattn, c_concat=None):
        self.asked += 1
        if self.interrupt is not None:
            raise self.interrupt
        text = c_crossattn.mean(1)[:, :, None, None]
        image = 0 if c_concat is None else c_concat.mean()
        scale = sigma.reshape(-1, 1, 1, 1)
        return x - scale * torch.tanh(x / (1 + scale) + text + image + self.patched())


class Patcher:
    """A network with LoRAs."""

    def __init__(self, model, loras=()):
        self.model, self.lora_patches = model, tuple(loras)
        self.model_options = {"transformer_options": {}}
        self.extra_model_patchers_during_sampling = []

    def is_clone(self, other):
        return self.model is getattr(other, "model", None)

    def with_lora(self, shift, weight):
        return Patcher(self.model, [*self.lora_patches, (shift, weight)])


class ForgeObjects:
    def __init__(self, unet, clip, vae):
        self.unet, self.clip, self.vae = unet, clip, vae

    def shallow_copy(self):
        return copy.copy(self)


class Engine:
    """A checkpoint in memory."""

    def __init__(self, host, info, shift, latents=SD15, flow=False, inpaint=False, flux=False):
        self.host, self.sd_checkpoint_info, self.is_inpaint = host, info, inpaint
        self.model_config = SimpleNamespace(latent_format=latents())
        predictor = PredictionFlux() if flux else Predictor(flow)
        clip = SimpleNamespace(patcher=Patcher(Network(shift)))
        objects = ForgeObjects(Patcher(Network(shift, predictor)), clip, object())
        self.forge_objects_original = objects
        self.forge_objects = objects.shallow_copy()
        self.forge_objects_after_applying_lora = objects.shallow_copy()
        self.clip_skip = None

    def set_clip_skip(self, clip_skip):
        self.clip_skip = clip_skip

    def get_learned_conditioning(self, texts):
        assert self.clip_skip == 2, "the texts are encoded with another clip skip"
        patcher = self.forge_objects.clip.patcher
        self.host.load_models_gpu([patcher])
        self.host.told["Emphasis"] = "Original"
        bare = SimpleNamespace(loras=SimpleNamespace(loaded_networks=[]))
        made = webui.Network(bare, None, 0.0).get_learned_conditioning(texts)
        return made + patcher.model.patched()


class Prompts(webui.Prompts):
    """SdConditioning, which FLUX's guidance rides on."""

    def __init__(self, prompts, distilled_cfg_scale=None, **given):
        super().__init__(prompts, **given)
        assert distilled_cfg_scale == 3.5


class Loaded:
    """A network in place."""

    def __init__(self, host, model):
        self.host, self.model = host, model

    def model_unload(self):
        self.host.unloaded.append(self.model)


class Condition:
    def __init__(self, cond):
        self.cond = cond


def compile_conditions(cond):
    if cond is None:
        return None
    return [{"cross_attn": cond, "model_conds": {"c_crossattn": Condition(cond)}}]


def compile_weighted_conditions(cond, weights):
    made = []
    for parts in zip(*weights):
        (one,) = compile_conditions(cond[[i for i, _ in parts]])
        made.append({**one, "strength": parts[-1][1]})
    return made


def set_model_options_post_cfg_function(options, function, disable_cfg1_optimization=False):
    hooks = [*options.get("sampler_post_cfg_function", []), function]
    options["sampler_post_cfg_function"] = hooks
    if disable_cfg1_optimization:
        options["disable_cfg1_optimization"] = True
    return options


def sampling_function_inner(model, x, timestep, uncond, cond, cond_scale, model_options):
    def ask(one):
        given = {name: value.cond for name, value in one["model_conds"].items()}
        return model.apply_model(x, timestep, **given)

    needed = cond_scale != 1.0 or model_options.get("disable_cfg1_optimization", False)
    answers = sum(ask(one) * one["strength"] for one in cond)
    answers = answers / sum(one["strength"] for one in cond)
    rest = ask(uncond[0]) if uncond is not None and needed else torch.zeros_like(x)
    strength = sum(one["strength"] for one in cond)
    denoised = rest + (answers - rest) * cond_scale * strength
    for hook in model_options.get("sampler_post_cfg_function", []):
        denoised = hook({"denoised": denoised, "uncond": uncond, "uncond_denoised": rest})
    return denoised


class CFGDenoiser(torch.nn.Module):
    """What a sampler is given; at a CFG scale of 1 there is no negative, and inside a mask each
    call draws noise from torch's own stream."""

    def __init__(self, host, sampler):
        super().__init__()
        self.host, self.sampler, self.step, self.p = host, sampler, 0, None
        self.mask = self.nmask = self.init_latent = None

    @property
    def inner_model(self):
        active = self.host.shared.sd_model
        predictor = active.forge_objects.unet.model.predictor
        return SimpleNamespace(inner_model=active, predictor=predictor)

    def forward(
        self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond, model_options=None
    ):
        if self.host.shared.state.interrupted:
            raise webui.InterruptedException
        composed, text = webui.reconstruct_multicond_batch(cond, self.step)
        other = None if uncond is None else webui.reconstruct_cond_batch(uncond, self.step)
        if self.mask is not None:
            noised = self.init_latent + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(x)
            x = x * self.nmask + noised * self.mask
        scale = self.p.hr_cfg if self.p.is_hr_pass else cond_scale
        unet = self.inner_model.inner_model.forge_objects.unet
        assert unet.model.loras == unet.lora_patches, "another one's LoRAs are in the weights"
        denoised = sampling_function_inner(
            unet.model, x, sigma, compile_conditions(other),
            compile_weighted_conditions(text, composed), scale,
            {**unet.model_options, **(model_options or {})},
        )  # fmt: skip
        if self.mask is not None:
            denoised = denoised * self.nmask + self.init_latent * self.mask
        self.sampler.last_latent = denoised
        self.step += 1
        return denoised


class KDiffusionSampler(webui.KDiffusionSampler):
    """With the network put in place before."""

    def __init__(self, function, sd_model):
        super().__init__(function, sd_model)
        self.model_wrap_cfg = CFGDenoiser(self.host, self)

    def sample(self, p, x):
        assert torch.is_inference_mode_enabled()
        self.host.load_models_gpu([p.sd_model.forge_objects.unet])
        return super().sample(p, x)


def sample_ipndm(model, x, sigmas, extra_args=None, callback=None, disable=None, max_order=4):
    """Another formula than kdpp's."""
    return x


def sample_unipc(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Another formula than kdpp's."""
    return x


class Forge(webui.Host):
    """One active engine; others can be loaded beside it, and the memory management knows all."""

    version = "2.0.1v1.10.1"
    other = ("IPNDM", sample_ipndm)

    def __init__(self, folder):
        super().__init__(folder)
        self.current_loaded_models, self.unloaded, self.swaps = [], [], []
        self.engine, self.checkpoints, self.read = None, {}, []
        self.text_engine = module(
            "backend.text_processing.classic_engine", last_extra_generation_params={}
        )
        self.opts.CLIP_stop_at_last_layers = 2
        for name in ("load_network", "loaded_networks"):
            delattr(self.loras, name)
        self.loras.load_lora_state_dict = lambda file: next(
            one.shift
            for one in self.loras.available_network_aliases.values()
            if one.filename == file
        )
        self.loras.load_lora_for_models = self.load_lora_for_models
        self.data = SimpleNamespace(forge_loading_parameters={"additional_modules": ["vae"]})

    @property
    def told(self):
        """What the text encoders have for infotext."""
        return self.text_engine.last_extra_generation_params

    def samplers(self):
        self.sampler_class = type("Sampler", (KDiffusionSampler,), {"host": self})
        made = super().samplers()
        name, function = self.other
        made.rows.append((name, function, {}))
        data = webui.SamplerData(name, lambda model: self.sampler_class(function, model), [], {})
        made.all_samplers.append(data)
        made.all_samplers_map[name] = data
        return made

    def active(self):
        return self.engine

    def load_models_gpu(self, patchers):
        for patcher in patchers:
            self.swaps.append(patcher)
            there = self.current_loaded_models
            there[:] = [one for one in there if not patcher.is_clone(one.model)]
            there.insert(0, Loaded(self, patcher))
            patcher.model.loras = patcher.lora_patches

    def load_lora_for_models(self, unet, clip, lora, strength_model, strength_clip, filename):
        return (
            unet.with_lora(lora, strength_model),
            SimpleNamespace(patcher=clip.patcher.with_lora(lora, strength_clip)),
        )

    def checkpoint(self, name, shift, context=768, broken=False, **facts):
        """A file of the host's; the active engine, if it is the first."""
        info = webui.checkpoint_file(self.folder, name, context)
        self.checkpoints[name] = info, shift, broken, facts
        if self.engine is None:
            self.engine = self.forge_loader(info.filename, ["vae"])

    def forge_loader(self, filename, additional_state_dicts=None):
        assert additional_state_dicts == ["vae"]
        torch.rand(1)  # as random initialisation does
        name = filename.rpartition("/")[2]
        self.read.append(name)
        info, shift, broken, facts = self.checkpoints[name]
        if broken:
            raise ValueError("Failed to recognize model type!")
        return Engine(self, info, shift, **facts)

    def activate(self, tags):
        """The prompt's LoRAs, on clones of the engine's patchers."""
        objects = self.engine.forge_objects_original.shallow_copy()
        for name, *weight in tags:
            file = self.loras.available_network_aliases[name]
            strength = float(weight[0]) if weight else 1.0
            objects.unet, objects.clip = self.load_lora_for_models(
                objects.unet, objects.clip, file.shift, strength, strength, file.filename
            )
        self.engine.forge_objects = objects

    def backend(self):
        """The modules of its engine room."""
        return [
            module("backend", __path__=[]), module("backend.sampling", __path__=[]),
            module("backend.patcher", __path__=[]), module("backend.modules", __path__=[]),
            module("backend.text_processing", __path__=[]),
            module(
                "backend.memory_management", load_models_gpu=self.load_models_gpu,
                current_loaded_models=self.current_loaded_models, soft_empty_cache=lambda: None,
            ),
            module("backend.loader", forge_loader=self.forge_loader),
            module("backend.modules.k_prediction", PredictionFlux=PredictionFlux),
            module(
                "backend.patcher.base",
                set_model_options_post_cfg_function=set_model_options_post_cfg_function,
            ),
            module(
                "backend.sampling.condition", Condition=Condition,
                compile_conditions=compile_conditions,
                compile_weighted_conditions=compile_weighted_conditions,
            ),
            module(
                "backend.sampling.sampling_function",
                sampling_function_inner=sampling_function_inner,
            ),
            self.text_engine,
            module("modules_forge", __path__=[]),
            module("modules_forge.forge_version", version=self.version),
        ]  # fmt: skip

    def modules(self):
        found = super().modules()
        found["modules.prompt_parser"].SdConditioning = Prompts
        own = [
            module(
                "modules.sd_models", model_data=self.data, list_models=lambda: None,
                checkpoints_list={name: info for name, (info, *_) in self.checkpoints.items()},
                checkpoint_aliases={name: info for name, (info, *_) in self.checkpoints.items()},
            ),
            *self.backend(),
        ]  # fmt: skip
        for one in own:
            found[one.__name__] = one
        for one in own:
            above, _, last = one.__name__.rpartition(".")
            if above:
                setattr(found[above], last, one)
        return found


class DynamicArgs:
    """What Neo keeps of the model that it loaded last, and of the run."""

    kontext = edit = nunchaku = klein = wan = pid = krea2 = loading_refiner = False
    ops = None


class Neo(Forge):
    """As Forge; its loader notes what it loaded, and forgets what the run has prepared."""

    version = "neo"
    other = ("UniPC", sample_unipc)

    def __init__(self, folder):
        self.dynamic_args = type("dynamic_args", (DynamicArgs,), {})
        self.dynamic_args.last_extra_generation_params = {}
        super().__init__(folder)
        del self.text_engine.last_extra_generation_params

    def forge_loader(self, filename, additional_state_dicts=None):
        if not self.dynamic_args.loading_refiner:
            self.dynamic_args.ref_latents = []
        self.dynamic_args.kontext = "kontext" in filename
        return super().forge_loader(filename, additional_state_dicts)

    @property
    def told(self):
        return self.dynamic_args.last_extra_generation_params

    def backend(self):
        alter = [webui.SamplerData("Euler CFG++", None, ["euler_cfg_pp"], {})]
        return [
            *super().backend(),
            module("backend.args", dynamic_args=self.dynamic_args),
            module("modules_forge.forge_alter_samplers", samplers_data_alter=alter),
        ]


class Processing(webui.Processing):
    """A request, whose hires pass calls the hook twice."""

    distilled_cfg_scale, hr_cfg = 3.5, 3.0

    def draw(self, script=None, args=()):
        with torch.inference_mode():
            if script is not None:
                self.hook(script.process, args)
            found = [webui.parse_prompt(text) for text in self.texts]
            self.prompts = [text for text, _ in found]
            self.host.activate([one.positional for one in found[0][1].get("lora", [])])
            config = self.host.sd_samplers.all_samplers_map[self.sampler_name]
            self.sampler = config.constructor(self.sd_model)
            self.sampler.config = config
            steps, model = config.total_steps(self.steps), self.sd_model
            model.set_clip_skip(2)
            self.c = webui.get_multicond_learned_conditioning(model, self.prompts, steps)
            self.uc = None
            if self.cfg_scale != 1:
                self.uc = webui.get_learned_conditioning(model, self.negative_prompts, steps)
            self.host.told.clear()
            self.rng = webui.Generators(self.seeds, self.shape)
            noise = self.rng() * self.sigmas[0]
            x = noise if self.init_latent is None else self.init_latent + noise
            if script is not None:
                for _ in range(2 if self.is_hr_pass else 1):
                    self.hook(script.process_before_every_sampling, args, x=x)
            return self.sampler.sample(self, x)
