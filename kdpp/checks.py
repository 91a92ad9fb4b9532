"""What is given, checked before any work: numbers, latents, sigmas, and where a run starts."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from kdpp.plan import check_falling

__all__ = [
    "check_count",
    "check_flow_levels",
    "check_latent",
    "check_number",
    "check_sigmas",
    "check_start",
    "is_compiling",
    "read_levels",
]

is_compiling = getattr(torch.compiler, "is_compiling", lambda: False)
"""Whether torch is tracing this call. torch before 2.3 does not tell, and `kdpp.capture` asks for
more."""


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a float; ValueError unless it is a finite number in [low, high]."""
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with suppress(OverflowError):  # an int of more than 308 digits
            number = float(value)
    if math.isfinite(number) and low <= number <= high:
        return number
    allowed = f"a number in [{low:g}, {high:g}]" if math.isfinite(low) else "a finite number"
    raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def check_count(name: str, value: Any, low: int) -> int:
    """``value`` as an int; ValueError unless it is a whole number ≥ low."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} is {value!r}; it must be a whole number ≥ {low}")
    return int(value)


def check_latent(x: Any, name: str = "x") -> None:
    """Check that x is a floating-point batch, ``(batch, *shape)``.

    Raises TypeError for another type or dtype, ValueError for a tensor without dimensions.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor (batch, *shape)")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; a latent must be floating point")
    if x.ndim == 0:
        raise ValueError(f"{name} has shape (); it must be a batch, (batch, *shape)")


def read_levels(sigmas: Any) -> tuple[list[float], Tensor]:
    """The levels as float64 numbers, read once, and as the tensor that callbacks see.

    Raises TypeError unless they are real numbers, ValueError unless they are 1-D, finite and ≥ 0.
    """
    try:
        tensor = torch.as_tensor(sigmas)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"sigmas is {sigmas!r}; it must be a 1-D tensor of levels") from error
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


def check_sigmas(sigmas: Any, or_rising: bool = False) -> tuple[list[float], Tensor]:
    """`read_levels` of a sampler's schedule; ValueError where it increases, see `check_falling`."""
    levels, tensor = read_levels(sigmas)
    check_falling(levels, or_rising)
    return levels, tensor


def check_flow_levels(levels: Sequence[float]) -> None:
    """ValueError where a flow model's levels, τ in [0, 1], hold a σ above 1."""
    if max(levels, default=0.0) > 1.0:
        raise ValueError(
            f"sigmas holds {max(levels):g}; the model is a flow model, whose levels lie in [0, 1] "
            "(for levels of σ = τ/(1-τ), bring it over with kdpp.as_ve)"
        )


def check_start(
    x: Tensor, levels: Sequence[float], trained: tuple[float, float] | None = None
) -> None:
    """Three slips that give garbage without an error, looked for before a VE run.

    - Timesteps in the place of sigmas: ValueError for whole numbers up to more than ten times the
      highest level that the student was ``trained`` on.
    - Other levels above that one, by more than a tenth: a warning.
    - A latent that was not scaled: ``x = x0 + σ n`` has a root mean square of σ or more, so less
      than half of that is a warning. Only for σ > 2 and samples of 64 numbers or more, where chance
      makes no such latent; not for zeros, which stand for no latent; and only on the CPU, because
      the host would have to wait for another device.
    """
    if not levels:
        return
    highest = max(levels[0], levels[-1])
    if trained is not None and highest > 1.1 * trained[1] > 0.0:
        known = f"the student was trained on levels from {trained[0]:g} to {trained[1]:g}"
        if highest > 10.0 * trained[1] and all(level.is_integer() for level in levels):
            raise ValueError(
                f"sigmas holds {highest:g} and whole numbers only, and {known}, so these seem to "
                "be timesteps. Give the noise levels of those timesteps; k-diffusion's denoisers "
                "have t_to_sigma(timesteps) and get_sigmas(steps)"
            )
        warnings.warn(f"sigmas holds {highest:g}, and {known}", stacklevel=2)
    if levels[0] > 2.0 and x.is_cpu and not is_compiling():
        count = x.numel()
        if count < 64 * x.shape[0] or count == 0:
            return
        size = torch.linalg.vector_norm(x).item() / math.sqrt(count)
        if 0.0 < size < 0.5 * levels[0]:
            warnings.warn(
                f"x has a root mean square of {size:.2g}, and sigmas starts at {levels[0]:.3g}: a "
                "latent at that level holds noise of that standard deviation. Start from "
                "noise * sigmas[0], or image + noise * sigmas[0]",
                stacklevel=2,
            )
