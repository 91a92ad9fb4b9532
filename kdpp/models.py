"""Denoisers that k-diffusion has no wrapper for: few-step and flow models, and a host's own.

A denoiser is ``(x, sigma, **extra_args) -> denoised``: x of shape ``(batch, *shape)``, sigma of
shape ``(batch,)``, the answer D an estimate of x0 in x's shape and dtype. sigma is the standard
deviation of the noise, ``x = x0 + σ n`` (variance exploding, VE), unless the denoiser has
``flow = True``: then it is τ in [0, 1], ``x = (1-τ) x0 + τ n``. ``extra_args`` go to the network.
One that says ``takes_sigma_next = True`` is also told the level that the update goes to, as the
keyword ``sigma_next`` ``(batch,)``.

For networks that predict ε or v take k-diffusion's own: CompVisDenoiser, CompVisVDenoiser, ….
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from kdpp.checks import check_number
from kdpp.kinds import (
    Denoiser,
    OwnCFG,
    Transparent,
    check_inner,
    is_flow,
    takes_sigma_next,
)

__all__ = [
    "FlowDenoiser",
    "FlowMapDenoiser",
    "GuidanceConditioned",
    "HostModel",
    "LCMDenoiser",
    "TrigFlowDenoiser",
    "X0Denoiser",
    "as_flow",
    "as_ve",
]

HIGHEST_SIGMA = 1e4  # for a denoiser that does not tell its range


class LCMDenoiser(Transparent):
    """A latent consistency model: its boundary scalings around an ε or v denoiser.

    With ``s = timestep_scaling · t``, t the discrete timestep of σ, and D_ε the inner denoiser::

        D = c_out · D_ε(x, σ) + c_skip · x / sqrt(1 + σ²)
        c_out = s / sqrt(s² + sigma_data²),   c_skip = sigma_data² / (s² + sigma_data²)

    At t = 0 that is the (VP) latent itself; from the first timesteps on it is nearly D_ε.

    Args:
        denoiser: the network as a VE denoiser that has ``sigma_to_t``: k-diffusion's
            CompVisDenoiser, or CompVisVDenoiser for a v network. Its schedule (``sigmas``,
            ``sigma_min``, ``sigma_max``, ``get_sigmas``, …) is this model's too.
        sigma_data: the data's standard deviation, as the model was trained with.
        timestep_scaling: how fast the boundary is left, per timestep.

    Raises:
        TypeError: ``denoiser`` cannot be called, is a flow model, has no ``sigma_to_t``, or is
            marked by `kdpp.OwnCFG` (put the mark around this).
        ValueError: ``sigma_data`` or ``timestep_scaling`` is not a positive number.

    Source: Luo et al. 2023, "Latent Consistency Models", section 4.1; the numbers are those of
    the published models.
    """

    _inner = "denoiser"

    def __init__(
        self, denoiser: Denoiser, sigma_data: float = 0.5, timestep_scaling: float = 10.0
    ) -> None:
        super().__init__()
        self.denoiser = _ve(denoiser, "LCMDenoiser")
        if not callable(getattr(denoiser, "sigma_to_t", None)):
            raise TypeError(
                f"LCMDenoiser asks sigma_to_t of its denoiser for the timestep, and "
                f"{type(denoiser).__name__} does not have it: wrap the network in "
                "kdpp.kdiffusion.external.CompVisDenoiser"
            )
        self.sigma_data = _positive("sigma_data", sigma_data)
        self.timestep_scaling = _positive("timestep_scaling", timestep_scaling)

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        level = _precise(sigma)
        scaled = self.timestep_scaling * self.sigma_to_t(level).to(level.dtype)
        per_norm = (scaled.square() + self.sigma_data**2).rsqrt()
        skip = (self.sigma_data * per_norm).square() * _vp_scale(level)
        estimate = self.denoiser(x, sigma, **extra_args)
        return (_times(estimate, scaled * per_norm) + _times(x, skip)).to(x.dtype)


class X0Denoiser(nn.Module):
    """A network that predicts x0 from a VP latent: ``D = network(x / sqrt(1 + σ²), t(σ))``.

    Args:
        network: ``(x_vp, t, **extra_args) -> x0``, x_vp of unit variance for data of unit variance,
            t of shape ``(batch,)``.
        sigma_to_t: makes t from a tensor of σ; by default t is σ. For a discrete schedule take the
            method of that name of k-diffusion's ``DiscreteSchedule``, on x's device.

    Raises:
        TypeError: ``network`` or ``sigma_to_t`` is not callable.

    Source: Salimans & Ho 2022, "Progressive Distillation", section 4, with x / sqrt(1 + σ²) = z_t.
    """

    def __init__(
        self, network: Denoiser, sigma_to_t: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.network = _network(network, "X0Denoiser")
        if sigma_to_t is not None and not callable(sigma_to_t):
            raise TypeError(f"sigma_to_t is {sigma_to_t!r}; it must be a function of sigma")
        self.sigma_to_t = sigma_to_t

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        t = sigma if self.sigma_to_t is None else self.sigma_to_t(sigma)
        return self.network(_times(x, _vp_scale(_precise(sigma))), t, **extra_args).to(x.dtype)


class GuidanceConditioned(OwnCFG):
    """A guidance-distilled model: its network takes the guidance weight w as an input.

    ``D = denoiser(x, σ, **extra_args, argument=w)``, ``w = cond_scale + offset`` for every sample,
    of shape ``(batch,)`` and x's dtype. One call gives the guided estimate; ``uncond`` and
    ``cond_scale`` do not reach the network. As a teacher, its ``cond_scale`` is the wrapper's
    ``teacher_cfg_scale``.

    It is a `kdpp.OwnCFG` without an unconditional estimate, so CFG++ samplers refuse it.

    Args:
        denoiser: ``(x, sigma, argument=w, **extra_args) -> denoised``, in VE or flow form.
            k-diffusion's CompVisDenoiser and DiscreteVDDPMDenoiser hand w on to the network; its
            CompVisVDenoiser hands on ``cond`` alone.
        argument: the name under which the network takes w.
        offset: the network's w less the CFG scale. -1 for Meng et al. and LCM, whose guided
            estimate is ``(1 + w) D_c - w D_∅``; 0 for a network that takes the CFG scale itself
            (FLUX-dev).

    Raises:
        TypeError: ``denoiser`` cannot be called, or is marked by `kdpp.OwnCFG` already.
        ValueError: ``argument`` is not the name of an argument, or ``offset`` not a finite number;
            and, when called, ``cond_scale`` is missing or not a finite number.

    Source: Meng et al. 2023, "On Distillation of Guided Diffusion Models", eq. (3), Algorithm 1.
    """

    divisible = True

    def __init__(self, denoiser: Denoiser, argument: str = "w", offset: float = -1.0) -> None:
        super().__init__(check_inner(denoiser, "GuidanceConditioned"))
        if not (isinstance(argument, str) and argument.isidentifier()):
            raise ValueError(f"argument is {argument!r}; it must be the name of an argument")
        self.argument = argument
        self.offset = check_number("offset", offset)

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        if "cond_scale" not in extra_args:
            raise ValueError(
                "this model takes its guidance as an input: give extra_args['cond_scale'], the CFG "
                f"scale (1 is no guidance); its {self.argument} = cond_scale + {self.offset:g}"
            )
        weight = check_number("cond_scale", extra_args.pop("cond_scale")) + self.offset
        extra_args.pop("uncond", None)
        weights = {self.argument: x.new_full(x.shape[:1], weight)}
        return self.model(x, sigma, **extra_args, **weights).to(x.dtype)


class HostModel(OwnCFG):
    """A host's own model as a denoiser, whatever it looks like and however its CFG scale is set.

    For ComfyUI, web UIs and others that run a network inside conditioning, CFG and hooks of their
    own: one function of the host's calls the model, and kdpp calls that function::

        def ask(x, sigma, cfg_scale, **extra_args):
            guider.set_cfg(cfg_scale)
            return model(x, sigma, **extra_args)

        teacher = kdpp.HostModel(ask, flow=False, sigma_min=0.03, sigma_max=14.6)

    kdpp keeps no list of the modules in it: ``.to()`` and ``.half()`` of a
    `TeacherGuidedDenoiser` leave the host's model where it is.

    Args:
        ask: ``(x, sigma, cfg_scale, **extra_args) -> denoised``, or a pair ``(denoised, uncond)``:
            the host's estimates of x0, under its CFG, and without the condition, which CFG++ needs
            (None where the host has not computed it; zeros in its place would spoil the picture).
            x has the shape ``(batch, *shape)``, sigma ``(batch,)``. ``cfg_scale`` is the teacher's
            ``teacher_cfg_scale``; for a student ``extra_args["cond_scale"]``, and None where that
            is not given, so that the host's own setting stays. ``extra_args`` are the sampler's.
        flow: whether sigma is a flow model's τ in [0, 1] and x is ``(1-τ) x0 + τ n``. It must be
            said: a flow model that is taken for another one makes wrong pictures without an error.
        sigma_min, sigma_max: the levels that the model was trained on, in its own terms (τ for a
            flow model). None: unknown, and the teacher is asked at any level.

    Raises:
        TypeError: ``ask`` is not callable, or ``flow`` is neither True nor False; in a call, an
            answer that is neither a tensor nor a pair.
        ValueError: the levels are not two numbers, ``0 ≤ sigma_min < sigma_max`` (≤ 1 for a flow
            model), or one is given alone; in a run of a CFG++ sampler, no unconditional estimate.
    """

    halves = 2

    def __init__(
        self,
        ask: Callable[..., Tensor | tuple[Tensor, Tensor | None]],
        *,
        flow: bool,
        sigma_min: float | Tensor | None = None,
        sigma_max: float | Tensor | None = None,
    ) -> None:
        if not callable(ask):
            raise TypeError(
                f"HostModel takes a function that calls the host's model, (x, sigma, cfg_scale, "
                f"**extra_args) -> denoised or (denoised, uncond), not {ask!r}"
            )
        if not isinstance(flow, bool):
            raise TypeError(f"flow is {flow!r}; it must be True for a flow model, else False")
        asked = _Asked(ask)
        super().__init__(asked, asked.uncond)
        self.flow = flow
        if sigma_min is not None or sigma_max is not None:
            self.sigma_min, self.sigma_max = _trained_levels(sigma_min, sigma_max, flow)

    def forward(
        self, x: Tensor, sigma: Tensor, cond_scale: float | None = None, **extra_args: Any
    ) -> Tensor:
        return self.model(x, sigma, cond_scale, **extra_args)


class _Asked:
    """A host's model, and the unconditional estimate of its latest call until it is fetched."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self.ask = ask
        self.latest: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor, cfg_scale: float | None, **extra: Any) -> Any:
        self.latest = None
        answer = self.ask(x, sigma, cfg_scale, **extra)
        if isinstance(answer, Tensor):
            return answer
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise TypeError(
                f"the host's model returned {type(answer).__name__}; the function given to "
                "HostModel returns denoised, or (denoised, uncond)"
            )
        denoised, self.latest = answer
        return denoised

    def uncond(self) -> Tensor:
        latest, self.latest = self.latest, None
        if latest is None:
            raise ValueError(
                "CFG++ needs the unconditional estimate, and the host gave none: give a negative "
                "prompt, and see that the host computes it at every CFG scale, 1 included (hosts "
                "skip it there)"
            )
        return latest


class FlowDenoiser(nn.Module):
    """A flow-matching or rectified-flow model in its own coordinates: sigma is τ, x is x_f.

    With ``x_f = (1-τ) x0 + τ n`` and a network that predicts the velocity ``v = n - x0``::

        D = x_f - τ · network(x_f, time_scale · τ)

    which is finite for every τ in [0, 1], τ = 1 (pure noise) included.

    Args:
        network: ``(x_f, time, **extra_args) -> v``, time of shape ``(batch,)`` and sigma's dtype.
        time_scale: 1 for a network that takes τ, 1000 for one that takes 0 … 1000.

    Raises:
        TypeError: ``network`` is not callable.
        ValueError: ``time_scale`` is not a positive number.

    Source: Liu et al. 2022, "Flow Straight and Fast"; the direction of time and the sign of v are
    those of Esser et al. 2024, "Scaling Rectified Flow Transformers" (SD3).
    """

    flow = True

    def __init__(self, network: Denoiser, time_scale: float = 1.0) -> None:
        super().__init__()
        self.network = _network(network, "FlowDenoiser")
        self.time_scale = _positive("time_scale", time_scale)

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        velocity = self.network(x, self.time_scale * sigma, **extra_args)
        return (x - _times(velocity, sigma)).to(x.dtype)


class FlowMapDenoiser(nn.Module):
    """A flow map: a network that is told the level it goes to, and knows the way there.

    With the average velocity u from τ = t to r ≤ t on the ODE's trajectory::

        x_r = x_t + (r - t) u,   u = network(x_t, time_scale · t, time_scale · r)
        D   = x_t - t · u

    so that Euler's step from t to r, ``D + (x_t - D)/t·r``, is x_r, however long the step. kdpp's
    samplers give r as ``sigma_next``, the level that the update goes to before noise (0 for
    `kdpp.sample_lcm_tg`); that takes a solver of first order without a memory. Called without it,
    as in k-diffusion's samplers and on the way up, r is t, and D the estimate of an ordinary flow
    model. As a teacher it is asked for the whole way, r = 0.

    Args:
        network: ``(x_f, time, time_next, **extra_args) -> u``, both times of shape ``(batch,)``;
            the state is ``(1-τ) x0 + τ n`` and u points to the noise, as in MeanFlow. A shortcut
            model s(x, t, d), whose time runs from noise to data, is
            ``lambda x, t, r, **extra_args: -s(x, 1 - t, t - r, **extra_args)``.
        time_scale: 1 for a network that takes τ, 1000 for one that takes 0 … 1000.

    Raises:
        TypeError: ``network`` is not callable.
        ValueError: ``time_scale`` is not a positive number.

    Source: Geng et al. 2025, "Mean Flows for One-step Generative Modeling", eq. (12); Frans et al.
    2024, "One Step Diffusion via Shortcut Models".
    """

    flow = True
    takes_sigma_next = True

    def __init__(self, network: Denoiser, time_scale: float = 1.0) -> None:
        super().__init__()
        self.network = _network(network, "FlowMapDenoiser")
        self.time_scale = _positive("time_scale", time_scale)

    def forward(
        self, x: Tensor, sigma: Tensor, *, sigma_next: Tensor | None = None, **extra_args: Any
    ) -> Tensor:
        end = sigma if sigma_next is None else sigma_next
        velocity = self.network(x, self.time_scale * sigma, self.time_scale * end, **extra_args)
        return (x - _times(velocity, sigma)).to(x.dtype)


class TrigFlowDenoiser(nn.Module):
    """A TrigFlow network (sCM, rCM): its state is ``cos(t) x0 + sin(t) z``, z of deviation σ_d.

    σ_d is the data's standard deviation. In VE form, ``σ = σ_d tan(t)`` and ``x = x_t / cos(t)``::

        D = cos(t) x_t - sin(t) σ_d F(x_t / σ_d, t),   t = arctan(σ / σ_d)

    At t = 0 that is the image. A consistency model and a diffusion model have this form alike.

    Not for SANA-Sprint: its transformer takes a flow model's state and time and answers its
    velocity, and the paper's transformation of both to TrigFlow is undone by going back. It is a
    `FlowDenoiser`, over latents that its pipeline multiplies by σ_d before and divides by after.

    Args:
        network: ``(x_t / σ_d, time, **extra_args) -> F``, time of shape ``(batch,)``.
        sigma_data: σ_d, as the network was trained with.
        time_scale: what t in [0, π/2] is multiplied by for the network (c_noise).

    Raises:
        TypeError: ``network`` is not callable.
        ValueError: ``sigma_data`` or ``time_scale`` is not a positive number.

    Source: Lu & Song 2024, "Simplifying, Stabilizing and Scaling Continuous-time Consistency
    Models", section 3.1 and eq. (4); Chen et al. 2025, "SANA-Sprint", section 3.1.
    """

    def __init__(self, network: Denoiser, sigma_data: float = 0.5, time_scale: float = 1.0) -> None:
        super().__init__()
        self.network = _network(network, "TrigFlowDenoiser")
        self.sigma_data = _positive("sigma_data", sigma_data)
        self.time_scale = _positive("time_scale", time_scale)

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        level = _precise(sigma)
        t = torch.atan(level / self.sigma_data)
        cos, sin = torch.cos(t), torch.sin(t)
        time = (self.time_scale * t).to(sigma.dtype)
        answer = self.network(_times(x, cos / self.sigma_data), time, **extra_args)
        return (_times(x, cos.square()) - _times(answer, sin * self.sigma_data)).to(x.dtype)


class _FlowAsVE(nn.Module):
    """See `as_ve`."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.takes_sigma_next = takes_sigma_next(denoiser)

    def forward(
        self, x: Tensor, sigma: Tensor, *, sigma_next: Tensor | None = None, **extra_args: Any
    ) -> Tensor:
        level = _precise(sigma)
        alpha = 1.0 / (1.0 + level)
        tau = (level * alpha).to(sigma.dtype)
        if sigma_next is not None:
            end = _precise(sigma_next)
            extra_args["sigma_next"] = (end / (1.0 + end)).to(sigma.dtype)
        return self.denoiser(_times(x, alpha), tau, **extra_args).to(x.dtype)


class _VEAsFlow(nn.Module):
    """See `as_flow`."""

    flow = True

    def __init__(self, denoiser: Denoiser, sigma_max: float | None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.highest = sigma_max
        self.takes_sigma_next = takes_sigma_next(denoiser)

    def forward(
        self, x: Tensor, sigma: Tensor, *, sigma_next: Tensor | None = None, **extra_args: Any
    ) -> Tensor:
        tau, top = _precise(sigma), self._top(x)
        alpha = torch.maximum(1.0 - tau, tau / top)
        level = (tau / alpha).to(sigma.dtype)
        if sigma_next is not None:
            end = _precise(sigma_next)
            extra_args["sigma_next"] = (end / torch.maximum(1.0 - end, end / top)).to(sigma.dtype)
        return self.denoiser(_times(x, 1.0 / alpha), level, **extra_args).to(x.dtype)

    def _top(self, x: Tensor) -> Any:
        """The highest σ that the inner denoiser is asked at: a number, or a tensor of shape ()."""
        if self.highest is not None:
            return self.highest
        largest = math.sqrt(torch.finfo(x.dtype).max) / 2.0
        return getattr(self.denoiser, "sigma_max", min(HIGHEST_SIGMA, largest))


def as_ve(flow_denoiser: Denoiser) -> nn.Module:
    """The VE denoiser of a flow model: ``D(x, σ) = D_flow(x / (1+σ), τ)``, ``τ = σ / (1+σ)``.

    The same estimate in other coordinates: ``σ = τ / (1-τ)``, ``x = x_f / (1-τ)``. It takes any
    finite σ ≥ 0, so a flow model can teach a VE student or run on a VE schedule.

    Raises:
        TypeError: ``flow_denoiser`` does not say ``flow = True``, or is marked by `kdpp.OwnCFG`
            (put the mark around the result).
    """
    check_inner(flow_denoiser, "as_ve")
    if not is_flow(flow_denoiser):
        raise TypeError(
            f"as_ve takes a flow model, and {type(flow_denoiser).__name__} does not say "
            "flow = True: wrap its network in kdpp.FlowDenoiser"
        )
    return _FlowAsVE(flow_denoiser)


def as_flow(ve_denoiser: Denoiser, sigma_max: float | None = None) -> nn.Module:
    """The flow form of a VE denoiser: ``D(x_f, τ) = D_VE(x_f / α, τ / α)``, ``α = 1 - τ``.

    Towards τ = 1, where σ = τ/α goes to infinity, α is clamped to at least ``τ / sigma_max``. Above
    the clamp the denoiser is asked at ``σ = sigma_max`` for ``x_f/τ · sigma_max``, which holds
    noise of exactly that level and ``sigma_max · (1-τ)/τ`` of the signal: all of it where the clamp
    begins, none at τ = 1, where the denoiser sees ``sigma_max · n``, the start of every VE sampler.
    The answer is finite, continuous in τ, and exact below the clamp.

    Args:
        ve_denoiser: any denoiser in k-diffusion's sense; LCM and x0 models too.
        sigma_max: the clamp. By default the denoiser's own ``sigma_max`` (k-diffusion's discrete
            denoisers have it), else 1e4, for float16 at most 128, whose square is still finite.
            Give it for a model of limited range without that attribute, such as an EDM one.

    Raises:
        TypeError: ``ve_denoiser`` cannot be called, is a flow model already, or is marked by
            `kdpp.OwnCFG` (put the mark around the result).
        ValueError: ``sigma_max`` is not a positive number.
    """
    _ve(ve_denoiser, "as_flow")
    return _VEAsFlow(ve_denoiser, None if sigma_max is None else _positive("sigma_max", sigma_max))


def _precise(sigma: Tensor) -> Tensor:
    """sigma in float32 or better: in float16 its square, or ten times t, would overflow."""
    return sigma.to(torch.promote_types(sigma.dtype, torch.float32))


def _vp_scale(sigma: Tensor) -> Tensor:
    """``1 / sqrt(1 + σ²)``, from a VE to a VP latent."""
    return (1.0 + sigma.square()).rsqrt()


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x times one factor per sample, in x's dtype."""
    return x * factor.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _ve(denoiser: Denoiser, owner: str) -> Denoiser:
    if is_flow(check_inner(denoiser, owner)):
        name = type(denoiser).__name__
        raise TypeError(f"{owner} takes a VE denoiser, and {name} is a flow model")
    return denoiser


def _network(network: Denoiser, owner: str) -> Denoiser:
    if not callable(network):
        raise TypeError(f"{owner} takes a network, (x, t, **extra_args), not {network!r}")
    return network


def _trained_levels(low: Any, high: Any, flow: bool) -> tuple[float, float]:
    """sigma_min and sigma_max as numbers; ValueError unless they are levels in their order."""
    numbers = [one.item() if isinstance(one, Tensor) and one.numel() == 1 else one
               for one in (low, high)]  # fmt: skip
    with suppress(ValueError):
        low, high = (check_number("level", one, 0.0) for one in numbers)
        if low < high and (high <= 1.0 or not flow):
            return low, high
    raise ValueError(
        f"sigma_min is {low!r} and sigma_max {high!r}; give both or neither, with "
        f"0 ≤ sigma_min < sigma_max{' ≤ 1, as a flow model has them' if flow else ''}"
    )


def _positive(name: str, value: Any) -> float:
    if not check_number(name, value) > 0.0:
        raise ValueError(f"{name} is {value!r}; it must be greater than 0")
    return float(value)
