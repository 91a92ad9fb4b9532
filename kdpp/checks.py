"""What is given, checked before any work: numbers, latents, sigmas."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from kdpp.plan import check_falling

__all__ = ["check_count", "check_latent", "check_number", "check_sigmas", "read_levels"]


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a float; ValueError for no finite number in [low, high]."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and low <= value <= high and math.isfinite(value)):
        allowed = f"a number in [{low:g}, {high:g}]" if math.isfinite(low) else "a finite number"
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
    return float(value)


def check_count(name: str, value: Any, low: int) -> int:
    """``value`` as an int; ValueError for no whole number ≥ low."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} is {value!r}; it must be a whole number ≥ {low}")
    return int(value)


def check_latent(x: Any) -> None:
    """TypeError or ValueError for what is no floating-point batch, ``(batch, *shape)``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it must be a tensor (batch, *shape)")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; a latent must be floating point")
    if x.ndim == 0:
        raise ValueError("x has no dimensions; it must be a batch, (batch, *shape)")


def read_levels(sigmas: Any) -> tuple[list[float], Tensor]:
    """The levels as float64 numbers, read once, and as the tensor that callbacks see.

    Raises TypeError for complex ones, ValueError unless they are 1-D, finite and not negative.
    """
    tensor = torch.as_tensor(sigmas)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        tensor = tensor.to(torch.get_default_dtype())  # between whole levels lie others
    if tensor.is_complex():
        raise TypeError(f"sigmas has dtype {tensor.dtype}; levels must be real numbers")
    if tensor.ndim != 1:
        raise ValueError(f"sigmas has shape {tuple(tensor.shape)}; it must be 1-D")
    levels: list[float] = tensor.detach().to("cpu", torch.float64).tolist()
    for sigma in levels:
        if not 0.0 <= sigma < math.inf:
            raise ValueError(f"sigmas holds {sigma!r}; every level must be a finite number ≥ 0")
    return levels, tensor


def check_sigmas(sigmas: Any) -> tuple[list[float], Tensor]:
    """`read_levels` of a sampler's schedule; ValueError where it increases."""
    levels, tensor = read_levels(sigmas)
    check_falling(levels)
    return levels, tensor
