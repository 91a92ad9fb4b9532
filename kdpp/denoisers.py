"""Calling a denoiser: its classifier-free guidance as one batched call, its output checked.

A denoiser is what k-diffusion calls one: ``(x, sigma, **extra_args) -> denoised``, an estimate of
x0. Guidance is ``D^w = D_∅ + w (D_c - D_∅)`` with w the CFG scale (1: no guidance).
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdpp.checks import check_number

__all__ = [
    "Denoise",
    "Denoiser",
    "OwnCFG",
    "bind",
    "refuse_unmarked_cfg",
    "shaped",
    "trained_range",
]

Denoiser = Callable[..., Tensor]
Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""``(x, sigma of shape (batch,)) -> (denoised, unconditional estimate or None)``."""


class OwnCFG(nn.Module):
    """Marks a denoiser that does its own classifier-free guidance, to be taken as it is.

    Args:
        model: ``forward(x, sigma, uncond, cond, cond_scale)``, like the CFGDenoiser of k-diffusion
            scripts and web UIs. It gets every one of the sampler's ``extra_args``; as a teacher,
            with the wrapper's ``teacher_cfg_scale`` for ``cond_scale``.
        uncond_denoised: for CFG++ samplers, a function without arguments that returns the
            unconditional estimate of the model's latest call, of the latent's shape.
    """

    def __init__(
        self, model: Denoiser, uncond_denoised: Callable[[], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.uncond_denoised = uncond_denoised

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        denoised: Tensor = self.model(x, sigma, **extra_args)
        return denoised

    @property
    def flow(self) -> bool:
        """Whether the model is a flow model, as it says itself."""
        return bool(getattr(self.model, "flow", False))


def trained_range(model: Any) -> tuple[float, float] | None:
    """(sigma_min, sigma_max) of the first denoiser inside ``model`` that tells them, else None."""
    while model is not None:
        bounds = getattr(model, "sigma_min", None), getattr(model, "sigma_max", None)
        if all(isinstance(bound, numbers.Real | Tensor) for bound in bounds):
            return float(bounds[0]), float(bounds[1])  # type: ignore[arg-type]
        inner = getattr(model, "model", None)
        model = getattr(model, "inner_model", None) if inner is None else inner
    return None


def refuse_unmarked_cfg(model: Any, name: str) -> None:
    """TypeError for what is no denoiser, or does its own CFG and is not marked by `OwnCFG`."""
    if not callable(model):
        raise TypeError(f"{name} is {model!r}; it must be a denoiser, (x, sigma, **extra_args)")
    if isinstance(model, OwnCFG):
        return
    try:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return
    if {"uncond", "cond_scale"} <= set(parameters):
        raise TypeError(
            f"{name} ({type(model).__name__}) takes uncond and cond_scale, so it seems to do its "
            f"own CFG; say so: {name}=kdpp.OwnCFG(model)"
        )


def bind(
    model: Denoiser,
    name: str,
    x: Tensor,
    extra_args: Mapping[str, Any],
    cfg_scale: float | None = None,
    needs_uncond: bool = False,
) -> Denoise:
    """Fix everything about the calls that a run makes but x and sigma.

    Args:
        name: "student" or "teacher", for messages.
        cfg_scale: w; None takes ``extra_args["cond_scale"]``, 1 if there is none.
        needs_uncond: the unconditional estimate is wanted even at w = 1 (CFG++).

    Raises:
        ValueError: ``uncond`` is missing where CFG needs it, does not fit ``cond``, or the scale is
            no finite number. The returned function raises it for an output of another shape than x.
    """
    if isinstance(model, OwnCFG):
        return _bind_own(model, name, x, extra_args, cfg_scale, needs_uncond)
    rest = dict(extra_args)
    cond, uncond = rest.pop("cond", None), rest.pop("uncond", None)
    own_scale = rest.pop("cond_scale", 1.0)
    argument = "cond_scale" if cfg_scale is None else f"{name}_cfg_scale"
    scale = check_number(argument, own_scale if cfg_scale is None else cfg_scale)
    if scale == 1.0 and not needs_uncond:
        if "cond" in extra_args:
            rest["cond"] = cond
        return _single(model, name, rest)
    if cond is None or uncond is None:
        raise ValueError(
            f"the {name} needs extra_args['cond'] and extra_args['uncond'] for "
            + (f"CFG ({argument}={scale!r})" if scale != 1.0 else "CFG++")
            + f"; given: {sorted(extra_args) or 'nothing'}. Give both"
            + ("" if needs_uncond else f", or set {argument}=1 for no guidance")
        )
    batch = x.shape[0]
    rest = {key: _twice(value, batch) for key, value in rest.items()}
    rest["cond"] = _paired(uncond, cond, "cond", batch)
    return _guided(model, name, rest, scale)


def _single(model: Denoiser, name: str, kwargs: dict[str, Any]) -> Denoise:
    def denoise(x: Tensor, sigma: Tensor) -> tuple[Tensor, None]:
        return shaped(model(x, sigma, **kwargs), name, x), None

    return denoise


def _guided(model: Denoiser, name: str, kwargs: dict[str, Any], scale: float) -> Denoise:
    def denoise(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        both_x = torch.cat((x, x))
        both = shaped(model(both_x, torch.cat((sigma, sigma)), **kwargs), name, both_x)
        uncond, cond = both.chunk(2)
        return torch.lerp(uncond, cond, scale), uncond

    return denoise


def _bind_own(
    model: OwnCFG,
    name: str,
    x: Tensor,
    extra_args: Mapping[str, Any],
    cfg_scale: float | None,
    needs_uncond: bool,
) -> Denoise:
    kwargs = dict(extra_args)
    if cfg_scale is not None:
        kwargs["cond_scale"] = check_number(f"{name}_cfg_scale", cfg_scale)
    if not needs_uncond:
        return _single(model, name, kwargs)
    latest_uncond = model.uncond_denoised
    if latest_uncond is None:
        raise ValueError(
            f"CFG++ needs the {name}'s unconditional estimate, and kdpp.OwnCFG was given none: "
            "pass uncond_denoised=, a function that returns that of the latest call"
        )

    def denoise(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        denoised = shaped(model(x, sigma, **kwargs), name, x)
        return denoised, shaped(latest_uncond(), f"{name}'s uncond_denoised", x)

    return denoise


def shaped(output: Any, name: str, x: Tensor) -> Tensor:
    """``output`` in x's dtype, if it is a tensor of x's shape."""
    if not isinstance(output, Tensor):
        raise TypeError(f"the {name} returned {type(output).__name__}; a denoiser returns a tensor")
    if output.shape != x.shape:
        raise ValueError(
            f"the {name} returned shape {tuple(output.shape)} for an input of shape "
            f"{tuple(x.shape)}; a denoiser returns the shape it is given"
        )
    return output if output.dtype == x.dtype else output.to(x.dtype)


def _paired(uncond: Any, cond: Any, path: str, batch: int) -> Any:
    """Concatenate two equal structures of batch-first tensors, ``(2·batch, …)``, uncond first."""
    if isinstance(cond, Mapping) and isinstance(uncond, Mapping) and cond.keys() == uncond.keys():
        return {k: _paired(uncond[k], v, f"{path}[{k!r}]", batch) for k, v in cond.items()}
    if isinstance(cond, list | tuple) and isinstance(uncond, list | tuple):
        if len(cond) == len(uncond):
            items = enumerate(zip(uncond, cond))
            return _like(cond, [_paired(u, c, f"{path}[{i}]", batch) for i, (u, c) in items])
    elif isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        if cond.ndim and cond.shape == uncond.shape and cond.shape[0] == batch:
            return torch.cat((uncond, cond))
    elif type(cond) is type(uncond) and not isinstance(cond, Mapping) and cond == uncond:
        return cond
    raise ValueError(
        f"extra_args: {path} and its uncond do not fit into one batch of {batch} + {batch}: "
        f"{_describe(cond)} and {_describe(uncond)}; both must be batch-first and alike"
    )


def _twice(value: Any, batch: int) -> Any:
    """Repeat every batch-first tensor in a nested structure; leave anything else as it is."""
    if isinstance(value, Mapping):
        return {key: _twice(item, batch) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return _like(value, [_twice(item, batch) for item in value])
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
        return torch.cat((value, value))
    return value


def _like(value: Any, items: list[Any]) -> Any:
    """``items`` in a list, tuple or named tuple of ``value``'s type."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))}"
    return f"{type(value).__name__} {value!r}"
