"""Networks of diffusers as denoisers: whatever diffusers loads, in one call (`as_denoiser`).

The latent x is an ordinary one: (batch, channels, height, width), and for Wan (batch, channels,
frames, height, width); packing and position ids are made inside. The network is called in its own
dtype, and the answer comes back in x's. ``cond`` is a dict of the network's arguments, batch-first
tensors (for a text alone also a tensor):

- ``encoder_hidden_states``: the text, (batch, tokens, width), for all of them
- ``encoder_hidden_states_mask``: (batch, tokens), 1 for a token and 0 for padding; Z-Image,
  Qwen-Image and Krea 2, whose texts differ in length
- ``encoder_attention_mask``: the same for UNets, if texts differ in length
- ``pooled_projections``: SD3 and FLUX
- ``added_cond_kwargs``: SDXL, a dict of ``text_embeds`` and ``time_ids``

Networks are recognised by the name of their class; this file does not import diffusers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdpp.checks import check_count, check_number
from kdpp.denoisers import Call, conditioning_of, pick_rows
from kdpp.kinds import Denoiser, OwnCFG, check_inner, is_flow
from kdpp.models import FlowDenoiser, GuidanceConditioned, LCMDenoiser
from kdpp.standin import (
    DiscreteEpsDDPMDenoiser,
    DiscreteSchedule,
    DiscreteVDDPMDenoiser,
    append_dims,
    append_zero,
    vp_sigmas,
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "CompVisModel",
    "Experts",
    "NormKeepingCFG",
    "architecture_of",
    "as_denoiser",
    "flow_sigmas",
    "latent_channels",
    "scheduler_sigmas",
    "trailing_sigmas",
]

SMALLEST_ALPHA = 2.0**-24  # stands for an ᾱ of 0: σ = 4096, as diffusers' Euler scheduler has it


# How each network is called -----------------------------------------------------------------------


def call_unet(
    network: Any, x: Tensor, t: Tensor, cond: dict[str, Any], w: Tensor | None = None
) -> Tensor:
    if w is not None:
        size = network.config.time_cond_proj_dim
        cond["timestep_cond"] = guidance_embedding(w, size).to(x.dtype)
    answer: Tensor = network(x, t, **cond, return_dict=False)[0]
    return answer


def call_plain(network: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    answer: Tensor = network(hidden_states=x, timestep=t, **cond, return_dict=False)[0]
    return answer


def call_flux(
    network: Any, x: Tensor, t: Tensor, cond: dict[str, Any], guidance: Tensor | None = None
) -> Tensor:
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    answer = network(
        hidden_states=packed(x),
        timestep=t,
        guidance=guidance,
        img_ids=grid(x.device, 1, rows, columns),
        txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=x.device),
        **cond,
        return_dict=False,
    )[0]
    return unpacked(answer, rows, columns)


def call_qwen_image(network: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    shapes = [[(1, rows, columns)]] * len(x)
    answer = call_plain(network, packed(x), t, {**cond, "img_shapes": shapes})
    return unpacked(answer, rows, columns)


def call_flux2(
    network: Any, x: Tensor, t: Tensor, cond: dict[str, Any], guidance: Tensor | None = None
) -> Tensor:
    """Its latent is made of patches already: every place of it is a token."""
    rows, columns, tokens = x.shape[2], x.shape[3], cond["encoder_hidden_states"].shape[1]
    answer = network(
        hidden_states=packed(x, 1),
        timestep=t,
        guidance=guidance,
        img_ids=grid(x.device, 1, rows, columns, 1),
        txt_ids=grid(x.device, 1, 1, 1, tokens),
        **cond,
        return_dict=False,
    )[0]
    return unpacked(answer, rows, columns, 1)


def call_krea2(network: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    rows, columns, tokens = x.shape[2] // 2, x.shape[3] // 2, cond["encoder_hidden_states"].shape[1]
    mask = cond.pop("encoder_hidden_states_mask", None)
    answer = network(
        hidden_states=packed(x),
        timestep=t,
        position_ids=torch.cat([x.new_zeros(tokens, 3), grid(x.device, 1, rows, columns)]),
        encoder_attention_mask=None if mask is None else mask.bool(),
        **cond,
        return_dict=False,
    )[0]
    return unpacked(answer, rows, columns)


def grid(device: torch.device, *sides: int) -> Tensor:
    """The positions in a grid with these sides, one after the other: (places, sides)."""
    return torch.cartesian_prod(*(torch.arange(float(n), device=device) for n in sides))


def call_z_image(network: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    """Its time is that of the signal, 1 - τ, and its answer x0 - n."""
    texts = list(cond["encoder_hidden_states"].unbind())
    mask = cond.get("encoder_hidden_states_mask")
    if mask is not None:
        texts = [text[kept] for text, kept in zip(texts, mask.bool())]
    answers = network(list(x.unsqueeze(2).unbind()), 1.0 - t, texts, return_dict=False)[0]
    return -torch.stack(answers).squeeze(2)


class Architecture(NamedTuple):
    """What kdpp knows of a class of networks."""

    call: Callable[..., Tensor]
    """``(network, x, time, cond, **guidance) -> prediction``, in the shape of x."""
    text_width: str
    """The entry of its config with the width of the text that it takes."""
    flow: bool = True
    """Whether it predicts the velocity n - x0."""
    time_scale: float = 1.0
    """The network's time for a flow model's τ = 1."""
    packs: tuple[int, int] = (1, 1)
    """How many of its input's and its output's channels, as the config counts them, are one of the
    latent's."""
    guidance: tuple[str, str, float] | None = None
    """Of a network that takes the guidance as an input: the entry of its config that says so, the
    argument, and the offset of `kdpp.models.GuidanceConditioned`."""


ARCHITECTURES = {
    "UNet2DConditionModel": Architecture(
        call_unet, "cross_attention_dim", flow=False, guidance=("time_cond_proj_dim", "w", -1.0)
    ),
    "SD3Transformer2DModel": Architecture(call_plain, "joint_attention_dim", time_scale=1000.0),
    "FluxTransformer2DModel": Architecture(
        call_flux,
        "joint_attention_dim",
        packs=(4, 4),
        guidance=("guidance_embeds", "guidance", 0.0),
    ),
    "Flux2Transformer2DModel": Architecture(
        call_flux2, "joint_attention_dim", guidance=("guidance_embeds", "guidance", 0.0)
    ),
    "Krea2Transformer2DModel": Architecture(call_krea2, "text_hidden_dim", packs=(4, 4)),
    "ZImageTransformer2DModel": Architecture(call_z_image, "cap_feat_dim"),
    "QwenImageTransformer2DModel": Architecture(
        call_qwen_image, "joint_attention_dim", packs=(4, 1)
    ),
    "WanTransformer3DModel": Architecture(call_plain, "text_dim", time_scale=1000.0),
}
"""Every network that kdpp knows, by the name of its class in diffusers."""


def architecture_of(network: Any) -> Architecture:
    """The network's entry in `ARCHITECTURES`; TypeError for a class that is not there."""
    for kind in type(getattr(network, "_orig_mod", network)).__mro__:  # inside torch.compile's
        if kind.__name__ in ARCHITECTURES:
            return ARCHITECTURES[kind.__name__]
    raise TypeError(
        f"{type(network).__name__} is not a network that kdpp knows; it knows diffusers' "
        f"{', '.join(ARCHITECTURES)} (of a pipeline, that is pipe.unet or pipe.transformer)"
    )


def latent_channels(network: Any) -> int:
    """The channels of the network's latent.

    Raises:
        TypeError: the network is not one of `ARCHITECTURES`, or takes more than the latent, as
            those made for inpainting and for image to video do.
    """
    per_input, per_output = architecture_of(network).packs
    given = network.config.in_channels
    answered = getattr(network.config, "out_channels", None)
    channels = int(given) // per_input
    if answered is not None and answered // per_output != channels:
        raise TypeError(
            f"this {type(network).__name__} takes {channels} channels and answers "
            f"{answered // per_output}: it wants a picture or a mask beside the latent, which kdpp "
            "does not give it; take the model for text to image (or text to video)"
        )
    return channels


class Network(nn.Module):
    """A network of diffusers behind one call, ``(x, t, cond) -> prediction``."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.architecture = architecture_of(network)
        latent_channels(network)
        self.network = network
        self._known: tuple[Any, Any] = (None, None)

    @property
    def dtype(self) -> Any:
        """In which the network is called. diffusers walks over all modules to find it, so keep it.

        It is found anew when the first weight's has changed.
        """
        first = next(self.network.parameters()).dtype
        if self._known[0] != first:
            self._known = (first, self.network.dtype)
        return self._known[1]

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **guidance: Tensor) -> Tensor:
        given = {"encoder_hidden_states": cond} if isinstance(cond, Tensor) else cond
        if not (isinstance(given, Mapping) and "encoder_hidden_states" in given):
            raise TypeError(
                f"cond is {type(cond).__name__}; {type(self.network).__name__} takes a dict of its "
                "arguments, with encoder_hidden_states, the text "
                "(kdpp.checkpoints.pipelines.encode makes it from a prompt)"
            )
        inside = x.to(self.dtype)
        answer = self.architecture.call(self.network, inside, t, dict(given), **guidance)
        return answer.to(x.dtype)


class CompVisModel(Network):
    """A UNet with what latent diffusion's model class has: ``apply_model``, ``alphas_cumprod``.

    k-diffusion's CompVisDenoiser wraps it; CompVisVDenoiser, where ``parameterization`` is "v" and
    not "eps". Arguments and errors are those of `as_denoiser`; a UNet that predicts x0 is a
    ValueError.
    """

    alphas_cumprod: Tensor

    def __init__(
        self, unet: Any, schedule: Any, *, prediction: str | None = None, device: Any = None
    ) -> None:
        super().__init__(unet)
        self.register_buffer("alphas_cumprod", table_of(unet, schedule, device))
        said = prediction_of(unet, schedule, prediction)
        if said == "sample":
            raise ValueError("a UNet that predicts x0 has no CompVis form; take as_denoiser")
        self.parameterization = "v" if said == "v_prediction" else "eps"

    def apply_model(self, x: Tensor, t: Tensor, cond: Any = None, **guidance: Tensor) -> Tensor:
        """The prediction for ``x = x_σ/sqrt(1+σ²)`` at the timestep t, of shape (batch,)."""
        answer: Tensor = self(x, t, cond, **guidance)
        return answer


class DiscreteX0Denoiser(DiscreteSchedule):
    """A network that predicts x0 at discrete timesteps, with their ᾱ: ``D = x0(x/sqrt(1+σ²), t)``.

    `kdpp.models.X0Denoiser` with a schedule of its own.
    """

    def __init__(self, model: Any, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(vp_sigmas(alphas_cumprod), quantize)
        self.inner_model = model

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        scale = append_dims((1.0 + sigma.square()).rsqrt(), x.ndim)
        answer: Tensor = self.inner_model(x * scale, self.sigma_to_t(sigma), **extra_args)
        return answer


DENOISERS: dict[str, Callable[..., nn.Module]] = {
    "epsilon": DiscreteEpsDDPMDenoiser,
    "v_prediction": DiscreteVDDPMDenoiser,
    "sample": DiscreteX0Denoiser,
}
"""By the ``prediction_type`` of diffusers' schedulers."""


def as_denoiser(
    network: Any,
    schedule: Any = None,
    *,
    prediction: str | None = None,
    lcm: bool | None = None,
    device: Any = None,
) -> nn.Module:
    """A network of diffusers as a denoiser in k-diffusion's sense, ``(x, sigma, cond=…) -> D``.

    A UNet becomes a VE denoiser with its schedule (``sigmas``, ``t_to_sigma``, ``get_sigmas``, …);
    a transformer a flow model (`kdpp.models.FlowDenoiser`), whose sigma is τ in [0, 1]. One that
    takes the guidance as an input (the first LCM, FLUX-dev) gets it from ``cond_scale``
    (`kdpp.models.GuidanceConditioned`).

    Args:
        network: one of `ARCHITECTURES`.
        schedule: of a UNet, the scheduler of its pipeline or its ``alphas_cumprod``, a tensor. A
            last ᾱ of 0 (zero terminal SNR), which would be σ = ∞, counts as 2⁻²⁴, σ = 4096, as in
            diffusers' Euler scheduler. A flow model needs none; a scheduler for another kind of
            model is refused.
        prediction: of a UNet, "epsilon", "v_prediction" or "sample" (x0). None: what the scheduler
            says; needed beside a tensor.
        lcm: of a UNet, whether it is a consistency model (`kdpp.models.LCMDenoiser`). None: whether
            the scheduler is an LCMScheduler.
        device: where the table of the levels lies. None: where the network lies. (With diffusers'
            offloading that is not where it runs: give the latter.)

    Raises:
        TypeError: the class of the network is not known, it takes more than the latent, or a
            UNet's schedule is missing or has no table.
        ValueError: a prediction that is not known, a tensor that is no table of ᾱ, or settings of
            a UNet for a flow model.
    """
    denoiser = estimator(Network(network), network, schedule, prediction, lcm, device)
    kind = architecture_of(network)
    if kind.guidance is not None:
        entry, argument, offset = kind.guidance
        if config_of(network).get(entry):
            return GuidanceConditioned(denoiser, argument, offset)
    return denoiser


def estimator(
    predict: nn.Module,
    network: Any,
    schedule: Any,
    prediction: str | None = None,
    lcm: bool | None = None,
    device: Any = None,
) -> nn.Module:
    """What makes estimates of x0 from the predictions of ``predict``, which stands for the network.

    ``predict(x, t, **extra_args)`` is asked as the network is; the rest is as in `as_denoiser`.
    """
    kind = architecture_of(network)
    if kind.flow:
        check_flow(network, schedule, prediction, lcm)
        return FlowDenoiser(predict, kind.time_scale)
    table = table_of(network, schedule, device)
    made = DENOISERS[prediction_of(network, schedule, prediction)](predict, table, quantize=False)
    if type(schedule).__name__ == "LCMScheduler" if lcm is None else lcm:
        return LCMDenoiser(made, timestep_scaling=config_of(schedule).get("timestep_scaling", 10.0))
    return made


class Experts(nn.Module):
    """Two denoisers that share the noise levels: ``high`` from ``boundary`` up, ``low`` below.

    Each sample of a batch goes to the one for its level. Flow or VE is what ``high`` is.

    Args:
        high, low: denoisers over one latent space, both flow models or both not.
        boundary: a level: for Wan 2.2 its pipeline's ``boundary_ratio``.

    Raises:
        ValueError: one is a flow model and the other not, or ``boundary`` is not a number > 0.

    Source: Wan 2.2's mixture of experts, divided by noise level.
    """

    def __init__(self, high: Denoiser, low: Denoiser, boundary: float) -> None:
        super().__init__()
        self.flow = is_flow(check_inner(high, "Experts"))
        if self.flow != is_flow(check_inner(low, "Experts")):
            raise ValueError("Experts takes two flow models or two VE denoisers, not one of each")
        self.high, self.low = high, low
        self.boundary = check_number("boundary", boundary, 0.0, math.inf)

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        above = (sigma >= self.boundary).cpu()
        if above.all():
            return self.high(x, sigma, **extra_args)
        if not above.any():
            return self.low(x, sigma, **extra_args)
        answer = torch.empty_like(x)
        for expert, chosen in ((self.high, above), (self.low, ~above)):
            rows = chosen.nonzero()[:, 0]
            given = pick_rows(extra_args, len(x), rows)
            rows = rows.to(x.device)
            answer[rows] = expert(x[rows], sigma[rows], **given)
        return answer


class NormKeepingCFG(OwnCFG):
    """CFG as Qwen-Image's pipeline does it: the guided velocity keeps the norm of the conditional.

    With ``v = (x - D)/σ``, patch by patch (2×2 pixels of the latent, all channels)::

        v = v_w · ‖v_c‖ / ‖v_w‖,   v_w = v_∅ + w (v_c - v_∅)

    Both halves go in one batched call; at ``cond_scale`` 1 (or without it) there is one half.

    Args:
        model: a denoiser with x of shape (batch, channels, height, width), both sides even.
    """

    divisible = True  # each row's guidance is its own

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        given = conditioning_of(self.model, "model", extra_args)
        count = len(given.parts)
        call = Call(self.model, "model", given.parts, len(x))
        answers = call.parts((x,) * count, (sigma,) * count)
        guided, uncond = given.join(answers)
        if uncond is None:
            return guided
        step, wanted = x - guided, x - answers[-1]
        ratio = patch_norms(wanted) / patch_norms(step).clamp(min=torch.finfo(x.dtype).tiny)
        return x - step * ratio


def patch_norms(x: Tensor) -> Tensor:
    """The norm of each 2×2 patch over its channels, at each of its pixels."""
    squares = x.square().sum(dim=1, keepdim=True)
    sums = 4.0 * nn.functional.avg_pool2d(squares, 2)
    return nn.functional.interpolate(sums.sqrt(), scale_factor=2.0, mode="nearest")


# Packing ------------------------------------------------------------------------------------------


def packed(x: Tensor, side: int = 2) -> Tensor:
    """(batch, channels, height, width) as a row of 2×2 patches: (batch, patches, 4 channels).

    A patch's numbers go by channel, row and column; ValueError where a side is odd. ``side`` 1 has
    a patch for every place.
    """
    if side == 1:
        return x.flatten(2).mT
    if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(
            f"the latent has shape {tuple(x.shape)}; this transformer takes (batch, channels, "
            "height, width) with an even height and width"
        )
    return nn.functional.pixel_unshuffle(x, 2).flatten(2).mT


def unpacked(tokens: Tensor, rows: int, columns: int, side: int = 2) -> Tensor:
    """The reverse of `packed`, for so many rows and columns of patches."""
    patches = tokens.mT.reshape(len(tokens), -1, rows, columns)
    return nn.functional.pixel_shuffle(patches, side) if side > 1 else patches


def guidance_embedding(w: Tensor, size: int) -> Tensor:
    """The embedding of w that diffusers' LCM UNets take: sines and cosines of 1000 w.

    Frequencies fall from 1 to 1/10000 in equal ratios. Shape (batch, size); float32 or better.
    """
    half = size // 2
    angles = w.to(torch.promote_types(w.dtype, torch.float32))[:, None] * 1000.0
    octaves = torch.arange(half, device=w.device, dtype=angles.dtype) / (half - 1)
    angles = angles * 10000.0**-octaves
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, size % 2))


# Schedules ----------------------------------------------------------------------------------------


def config_of(thing: Any) -> Mapping[str, Any]:
    """The ``config`` of a network or scheduler of diffusers; empty for what has none."""
    config = getattr(thing, "config", None)
    return config if isinstance(config, Mapping) else {}


def prediction_of(network: Any, schedule: Any, prediction: str | None) -> str:
    """What a UNet predicts: what is said, else what its scheduler says."""
    said = config_of(schedule).get("prediction_type") if prediction is None else prediction
    if said not in DENOISERS:
        raise ValueError(
            f"the prediction of this {type(network).__name__} is {said!r}; it must be one of "
            f"{', '.join(DENOISERS)}: pass prediction=, or the scheduler of its pipeline"
        )
    return str(said)


def table_of(network: Any, schedule: Any, device: Any = None) -> Tensor:
    """``alphas_cumprod`` of a scheduler, or given; without an ᾱ of 0 at its end."""
    if architecture_of(network).flow:
        raise TypeError(f"{type(network).__name__} is a flow model, which has no alphas_cumprod")
    table = schedule if isinstance(schedule, Tensor) else getattr(schedule, "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        raise TypeError(
            f"a {type(network).__name__} needs its levels: the scheduler of its pipeline, or "
            f"alphas_cumprod as a tensor; {type(schedule).__name__} has no alphas_cumprod"
        )
    falls = table.ndim == 1 and len(table) > 1 and bool((table.diff() < 0).all())
    if not (falls and table[0] < 1.0 and table[-1] >= 0.0):
        raise ValueError(
            f"alphas_cumprod has shape {tuple(table.shape)} and does not fall from below 1 to 0 "
            "or more; give ᾱ of every timestep, from the first to the last"
        )
    table = table.clamp(min=SMALLEST_ALPHA)
    return table.to(network.device if device is None else device)


def check_flow(network: Any, schedule: Any, prediction: str | None, lcm: bool | None) -> None:
    """ValueError where a flow model is given what only a UNet has."""
    said = prediction or config_of(schedule).get("prediction_type", "flow_prediction")
    if said != "flow_prediction" or isinstance(schedule, Tensor) or lcm:
        raise ValueError(
            f"{type(network).__name__} is a flow model: it predicts the velocity and has no "
            "alphas_cumprod. Leave out prediction and lcm, and give no schedule or a flow one "
            "(such as FlowMatchEulerDiscreteScheduler)"
        )


# Levels -------------------------------------------------------------------------------------------


def trailing_sigmas(denoiser: Any, steps: int) -> Tensor:
    """The levels of n trailing timesteps of an ε or v denoiser, and 0.

    ``t = round(T k/n) - 1`` for k = n, …, 1 of T timesteps: 999, 749, 499, 249 for n = 4. What
    SDXL-Lightning, Hyper-SD, Turbo and DMD2 were trained at; Karras' schedule lies between them.

    Args:
        denoiser: with k-diffusion's ``sigmas`` and ``t_to_sigma``, as `as_denoiser` of a UNet.

    Source: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
    Table 2.
    """
    check_count("steps", steps, 1)
    shares = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    timesteps = (shares * len(denoiser.sigmas)).round() - 1.0
    return append_zero(denoiser.t_to_sigma(timesteps.to(denoiser.sigmas.device)))


def flow_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """n levels of a flow model, and 0: ``τ = s u/(1 + (s-1) u)`` for u = 1, (n-1)/n, …, 1/n.

    s is the shift: 1 spaces evenly; 3 gives 1, 0.9, 0.75, 0.5, 0 for n = 4. A shift by a mu, as
    FLUX's, is that of ``s = exp(mu)``.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. (23).
    """
    check_count("steps", steps, 1)
    if not check_number("shift", shift) > 0.0:
        raise ValueError(f"shift is {shift!r}; it must be greater than 0")
    u = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    return (shift * u / (1.0 + (shift - 1.0) * u)).float()


def scheduler_sigmas(
    scheduler: Any,
    steps: int,
    *,
    tokens: int | None = None,
    even: bool = False,
    mu: float | None = None,
) -> Tensor:
    """The levels at which a scheduler of diffusers samples in n steps, and 0.

    Args:
        scheduler: any of diffusers'; a copy is asked. One without levels of its own (DDIM, LCM, …)
            gives its timesteps' levels.
        tokens: of a scheduler whose shift depends on the resolution, how many patches the latent
            has. (mu is linear in it: its ``base_shift`` at ``base_image_seq_len``, ``max_shift``
            at ``max_image_seq_len``.)
        even: start from n even levels before any shift, 1, (n-1)/n, …, 1/n, as the pipelines of
            FLUX, Qwen-Image and Z-Image do. Otherwise the scheduler spaces them, as for SD3 and
            Wan, where diffusers shifts twice: 1, .858, .602, .009 for 4 steps at shift 3.
        mu: where the pipeline has a mu of its own, that one.

    Raises:
        ValueError: the scheduler needs ``tokens``, or its levels are not finite (one that stretches
            them, ``shift_terminal``, asked for one step).
    """
    check_count("steps", steps, 1)
    scheduler, config = copy.deepcopy(scheduler), config_of(scheduler)
    asked: dict[str, Any] = {"num_inference_steps": steps}
    if config.get("use_dynamic_shifting"):
        if tokens is None and mu is None:
            raise ValueError("this scheduler's shift depends on the resolution: give tokens")
        asked["mu"] = resolution_mu(config, tokens or 0) if mu is None else mu
    if even and not config.get("use_flow_sigmas"):
        asked["sigmas"] = [k / steps for k in range(steps, 0, -1)]
    scheduler.set_timesteps(**asked, device="cpu")
    return levels_of(scheduler, steps)


def levels_of(scheduler: Any, steps: int) -> Tensor:
    """The levels that a scheduler is set to, in so many steps, and where it ends.

    One without levels of its own (DDIM, LCM, …) gives its timesteps' levels, and 0. Raises
    ValueError where they are not finite.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, Tensor) and len(sigmas) == steps + 1:
        if not sigmas.isfinite().all():
            raise ValueError(f"{type(scheduler).__name__} has no finite levels for steps={steps}")
        return sigmas.float().cpu()
    timesteps = torch.unique(torch.as_tensor(scheduler.timesteps).cpu()).flip(0)
    table = DiscreteSchedule(vp_sigmas(scheduler.alphas_cumprod.clamp(min=SMALLEST_ALPHA)), False)
    return append_zero(table.t_to_sigma(timesteps))


def resolution_mu(config: Mapping[str, Any], tokens: int, most: int = 4096) -> float:
    """mu of a latent of so many patches, by a scheduler's settings; ``most`` if they say none."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", most)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(first + (last - first) * (tokens - low) / (high - low))
