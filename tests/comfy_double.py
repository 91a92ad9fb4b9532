"""A double of ComfyUI: what its samplers, guiders and patchers do to a sampler, no more.

Written from what was measured in a running ComfyUI 0.3.64. One `Base` is one network in memory;
patchers on the same one (a LoRA and its base) patch its weights for whichever was loaded last. A
network that is called without a patcher fails, as there.
"""

import math
from types import ModuleType, SimpleNamespace

import torch


class VE:
    """model_sampling of a model that predicts ε."""

    sigma_min, sigma_max = torch.tensor(0.0292), torch.tensor(14.6146)

    def percent_to_sigma(self, percent):
        return float(self.sigma_max) ** (1 - percent) * float(self.sigma_min) ** percent

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return noise * ((1 + sigma**2).sqrt() if max_denoise else sigma) + latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class CONST:
    """model_sampling of a flow model."""

    sigma_min, sigma_max = torch.tensor(0.003), torch.tensor(1.0)

    def percent_to_sigma(self, percent):
        return 1.0 - percent

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return sigma * noise + (1 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - sigma)


class SD15:
    """A latent format."""

    latent_channels = 4


class Flux:
    """Another."""

    latent_channels = 16


class Wide(SD15):
    """One of the same name and other channels."""

    latent_channels = 9


Wide.__name__ = "SD15"


class Base:
    """A network in memory, and the patch that its weights hold."""

    def __init__(self, network, levels=VE, latents=SD15):
        self.network = network
        self.model_sampling, self.latent_format = levels(), latents()
        self.patch, self.current_patcher, self.loaded = None, None, None
        self.interrupt = None

    def __call__(self, x, sigma, cond):
        if self.current_patcher is None:
            raise AttributeError("'NoneType' object has no attribute 'apply_hooks'")
        if self.current_patcher.name != self.loaded:
            raise AssertionError("hooks of a patcher whose weights are not in place")
        if self.interrupt is not None and self.current_patcher.name == "teacher":
            raise self.interrupt
        return self.network(x, sigma, cond=cond) + self.patch

    def process_latent_in(self, latent):
        return latent * 0.5

    def process_latent_out(self, latent):
        return latent / 0.5

    def scale_latent_inpaint(self, sigma, noise, latent_image, **_):
        return self.model_sampling.noise_scaling(sigma.reshape(-1, 1, 1, 1), noise, latent_image)


class Patcher:
    """ComfyUI's MODEL."""

    def __init__(self, model, patch=0.0, name="student"):
        self.model, self.patch, self.name = model, patch, name
        self.model_options = {"transformer_options": {}}

    def clone(self):
        return Patcher(self.model, self.patch, self.name)

    def is_clone(self, other):
        return self.model is other.model

    def get_model_object(self, name):
        return getattr(self.model, name)

    def memory_required(self, input_shape):
        return math.prod(input_shape)

    def pre_run(self):
        self.model.current_patcher = self

    def cleanup(self):
        self.model.current_patcher = None


class Sampler:
    def max_denoise(self, model_wrap, sigmas):
        highest = float(model_wrap.inner_model.model_sampling.sigma_max)
        return float(sigmas[0]) >= highest * (1 - 1e-5)


class CFGGuider:
    """Conditions and a CFG scale on a model."""

    def __init__(self, model_patcher):
        self.model_patcher, self.cfg = model_patcher, 1.0
        self.model_options = model_patcher.model_options

    def set_conds(self, positive, negative):
        self.original_conds = {"positive": positive, "negative": negative}

    def set_cfg(self, cfg):
        self.cfg = cfg

    def __call__(self, *args, **kwargs):
        return self.predict_noise(*args, **kwargs)

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        options = model_options or {}
        positive, negative = (self.conds[name] for name in ("positive", "negative"))
        needed = self.cfg != 1.0 or options.get("disable_cfg1_optimization", False)
        negative = negative if needed else None
        cond = self.inner_model(x, timestep, positive[: len(x)])
        uncond = torch.zeros_like(x)
        if negative is not None:
            uncond = self.inner_model(x, timestep, negative[: len(x)])
        guided = uncond + (cond - uncond) * self.cfg
        for hook in options.get("sampler_post_cfg_function", []):
            guided = hook({"denoised": guided, "uncond": negative, "uncond_denoised": uncond})
        return guided

    def sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None,
        disable_pbar=False, seed=None,
    ):  # fmt: skip
        self.conds = dict(self.original_conds)
        load_models_gpu([self.model_patcher])
        self.inner_model = self.model_patcher.model
        try:
            self.model_patcher.pre_run()
            if latent_image.count_nonzero():
                latent_image = self.inner_model.process_latent_in(latent_image)
            self.mapped = latent_image  # what conditions are prepared for
            extra_args = {"model_options": dict(self.model_options), "seed": seed}
            samples = sampler.sample(
                self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
            )
        finally:
            self.model_patcher.cleanup()
        made = self.inner_model.process_latent_out(samples)
        del self.inner_model, self.conds
        return made


class KSamplerX0Inpaint:
    """The model that samplers get: the guider inside the mask."""

    def __init__(self, model, sigmas):
        self.inner_model, self.sigmas = model, sigmas

    def __call__(self, x, sigma, denoise_mask, model_options=None, seed=None):
        if denoise_mask is not None:
            known = self.inner_model.inner_model.scale_latent_inpaint(
                x=x, sigma=sigma, noise=self.noise, latent_image=self.latent_image
            )
            x = x * denoise_mask + known * (1 - denoise_mask)
        out = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        if denoise_mask is not None:
            out = out * denoise_mask + self.latent_image * (1 - denoise_mask)
        return out


ROOM = []  # what was to be left free beside weights
LOADED = []  # the names of what was loaded, in order


def load_models_gpu(patchers, memory_required=0):
    ROOM.append(memory_required)
    for one in patchers:
        LOADED.append(one.name)
        one.model.patch, one.model.loaded = one.patch, one.name


INTERRUPT = []  # what the next look for an interrupt raises


def throw_exception_if_processing_interrupted():
    if INTERRUPT:
        raise INTERRUPT.pop()


SHOWN = []  # of progress bars: (done, of how much)


class ProgressBar:
    """A node's."""

    def __init__(self, total):
        self.total, self.current = total, 0

    def update(self, value):
        self.current += value
        SHOWN.append((self.current, self.total))


class Server:
    """What is told to the browser."""

    last_node_id = "7"

    def __init__(self):
        self.told = []

    def send_progress_text(self, text, node_id):
        self.told.append((text, node_id))


def set_post_cfg(model_options, function, disable_cfg1_optimization=False):
    hooks = [*model_options.get("sampler_post_cfg_function", []), function]
    model_options["sampler_post_cfg_function"] = hooks
    if disable_cfg1_optimization:
        model_options["disable_cfg1_optimization"] = True
    return model_options


def default_noise_sampler(x, seed=None):
    generator = torch.Generator().manual_seed(seed)
    return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def tree(x, low, high, seed=None, cpu=True):
    return default_noise_sampler(x, seed)


class SamplerCustomAdvanced:
    """The host's own node for a run."""

    FUNCTION = "sample"

    def sample(self, noise, guider, sampler, sigmas, latent_image):
        mask = latent_image.get("noise_mask")
        made = guider.sample(
            noise.generate_noise(latent_image), latent_image["samples"], sampler, sigmas, mask,
            None, True, noise.seed,
        )  # fmt: skip
        return {**latent_image, "samples": made}, None


# The V3 schema: types whose inputs remember what they were told.


class Told(SimpleNamespace):
    """An input, an output or a schema, with what was said of it."""


def v3_type(name):
    def put(identifier, **said):
        return Told(type=name, name=identifier, **said)

    return SimpleNamespace(Input=put, Output=lambda **said: Told(type=name, **said))


class Schema(Told):
    __dataclass_fields__ = ("node_id", "search_aliases")


def modules(v3):
    """The modules by their names, for ``sys.modules``."""
    io = SimpleNamespace(
        **{name: v3_type(name) for name in (
            "Combo", "Conditioning", "Float", "Guider", "Image", "Int", "Latent", "Model", "Noise",
            "Sampler", "Sigmas", "String")},
        Schema=Schema, ComfyNode=object, NodeOutput=lambda *made: made,
    )  # fmt: skip
    contents = {
        "comfy": {},
        "comfy.samplers": {"CFGGuider": CFGGuider, "Sampler": Sampler,
                           "KSamplerX0Inpaint": KSamplerX0Inpaint},
        "comfy.model_management": {
            "load_models_gpu": load_models_gpu,
            "throw_exception_if_processing_interrupted": throw_exception_if_processing_interrupted,
        },
        "comfy.utils": {"ProgressBar": ProgressBar},
        "server": {"PromptServer": SimpleNamespace(instance=Server())},
        "comfy.model_patcher": {"create_model_options_clone": dict,
                                "set_model_options_post_cfg_function": set_post_cfg},
        "comfy.model_sampling": {"CONST": CONST},
        "comfy.k_diffusion": {},
        "comfy.k_diffusion.sampling": {"default_noise_sampler": default_noise_sampler,
                                       "BrownianTreeNoiseSampler": tree},
    }  # fmt: skip
    contents |= {
        "comfy_extras": {},
        "comfy_extras.nodes_custom_sampler": {"SamplerCustomAdvanced": SamplerCustomAdvanced},
    }
    if v3:
        contents |= {"comfy_api": {}, "comfy_api.latest": {"ComfyExtension": object, "io": io}}
    made = {}
    for name, content in contents.items():
        module = made[name] = ModuleType(name)
        vars(module).update(content)
        module.__path__, module.__spec__ = [], SimpleNamespace(name=name)
        above, _, last = name.rpartition(".")
        if above:
            setattr(made[above], last, module)
    return made
