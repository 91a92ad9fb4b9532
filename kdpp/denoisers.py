"""Calling a denoiser: its classifier-free guidance as one batched call, its output checked.

A denoiser is what k-diffusion calls one: ``(x, sigma, **extra_args) -> denoised``, an estimate of
x0. Guidance is ``D^w = D_∅ + w (D_c - D_∅)`` with w the CFG scale (1: no guidance).
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdpp.checks import check_number

__all__ = [
    "Call",
    "Denoise",
    "Denoiser",
    "Halves",
    "OwnCFG",
    "bind",
    "halves",
    "map_rows",
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


class Halves(NamedTuple):
    """What a denoiser is called with beside x and sigma: once, or for CFG's two halves."""

    conditions: tuple[dict[str, Any], ...]
    """Its keywords: one dict, or those of the unconditional and of the conditional half."""
    scale: float
    """w; of no meaning where there is one dict."""

    def join(self, answers: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """``(D_∅ + w (D_c - D_∅), D_∅)`` of the two halves; one answer as it is."""
        if len(answers) == 1:
            return answers[0], None
        uncond, cond = answers
        return torch.lerp(uncond, cond, self.scale), uncond


def halves(
    model: Denoiser,
    name: str,
    extra_args: Mapping[str, Any],
    cfg_scale: float | None = None,
    needs_uncond: bool = False,
) -> Halves:
    """What ``extra_args`` and the CFG scale ask of this denoiser; arguments as in `bind`."""
    if isinstance(model, OwnCFG):
        kwargs = dict(extra_args)
        if cfg_scale is not None:
            kwargs["cond_scale"] = check_number(f"{name}_cfg_scale", cfg_scale)
        return Halves((kwargs,), 1.0)
    rest = dict(extra_args)
    cond, uncond = rest.pop("cond", None), rest.pop("uncond", None)
    own_scale = rest.pop("cond_scale", 1.0)
    argument = "cond_scale" if cfg_scale is None else f"{name}_cfg_scale"
    scale = check_number(argument, own_scale if cfg_scale is None else cfg_scale)
    if scale == 1.0 and not needs_uncond:
        if "cond" in extra_args:
            rest["cond"] = cond
        return Halves((rest,), scale)
    if cond is None or uncond is None:
        raise ValueError(
            f"the {name} needs extra_args['cond'] and extra_args['uncond'] for "
            + (f"CFG ({argument}={scale!r})" if scale != 1.0 else "CFG++")
            + f"; given: {sorted(extra_args) or 'nothing'}. Give both"
            + ("" if needs_uncond else f", or set {argument}=1 for no guidance")
        )
    return Halves(({**rest, "cond": uncond}, {**rest, "cond": cond}), scale)


def bind(
    model: Denoiser,
    name: str,
    x: Tensor,
    extra_args: Mapping[str, Any],
    cfg_scale: float | None = None,
    needs_uncond: bool = False,
    *,
    dtype: torch.dtype | None = None,
    max_batch: int | None = None,
) -> Denoise:
    """Fix everything about the calls that a run makes but x and sigma.

    Args:
        name: "student" or "teacher", for messages.
        cfg_scale: w; None takes ``extra_args["cond_scale"]``, 1 if there is none.
        needs_uncond: the unconditional estimate is wanted even at w = 1 (CFG++).
        dtype, max_batch: as in `Call`.

    Raises:
        ValueError: ``uncond`` is missing where CFG needs it, does not fit ``cond``, or the scale is
            no finite number. The returned function raises it for an output of another shape than x.
    """
    given = halves(model, name, extra_args, cfg_scale, needs_uncond)
    call = Call(model, name, given.conditions, len(x), dtype=dtype, max_batch=max_batch)
    if isinstance(model, OwnCFG) and needs_uncond:
        return _bind_own(model, name, call)
    if len(given.conditions) == 1:
        return lambda x, sigma: (call(x, sigma), None)

    def denoise(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        return given.join(call.parts((x, x), (sigma, sigma)))

    return denoise


class Call:
    """A network's call for one or several parts of a batch, each with keywords of its own.

    The parts are concatenated, batch-first tensors in their keywords too. The network is given
    ``dtype`` (None: what x has), and its answer comes back in x's dtype. ``max_batch`` caps the
    rows of a call; more are split evenly over ``ceil(rows / max_batch)`` calls. What does its own
    CFG (`OwnCFG`) sees to that itself and is never split.

    Raises:
        ValueError: keywords that do not fit into one batch; in a call, an output of another shape.
    """

    def __init__(
        self,
        model: Denoiser,
        name: str,
        conditions: Sequence[Mapping[str, Any]],
        batch: int,
        *,
        dtype: torch.dtype | None = None,
        max_batch: int | None = None,
    ) -> None:
        self.model, self.name, self.dtype = model, name, dtype
        joined = _joined(conditions, "", batch) if len(conditions) > 1 else dict(conditions[0])
        rows = batch * len(conditions)
        capped = max_batch is not None and not isinstance(model, OwnCFG)
        count = max(1, -(-rows // max_batch)) if capped and max_batch else 1
        cuts = [partial(_chunk, count=count, j=j) for j in range(count)]
        self.chunks = [joined] if count == 1 else [map_rows(joined, rows, cut) for cut in cuts]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if len(self.chunks) > 1:
            return self._in_chunks(x, sigma)
        given = x if self.dtype is None else x.to(self.dtype)
        return shaped(self.model(given, sigma, **self.chunks[0]), self.name, x)

    def parts(self, xs: Sequence[Tensor], sigmas: Sequence[Tensor]) -> Sequence[Tensor]:
        """The answers for the parts, in their order."""
        if len(xs) == 1:
            return (self(xs[0], sigmas[0]),)
        return self(torch.cat(tuple(xs)), torch.cat(tuple(sigmas))).chunk(len(xs))

    def _in_chunks(self, x: Tensor, sigma: Tensor) -> Tensor:
        count = len(self.chunks)
        rows = zip(x.tensor_split(count), sigma.tensor_split(count), self.chunks)
        answers = []
        for part, level, kwargs in rows:
            given = part if self.dtype is None else part.to(self.dtype)
            answers.append(shaped(self.model(given, level, **kwargs), self.name, part))
        return torch.cat(answers)


def _bind_own(model: OwnCFG, name: str, call: Call) -> Denoise:
    latest_uncond = model.uncond_denoised
    if latest_uncond is None:
        raise ValueError(
            f"CFG++ needs the {name}'s unconditional estimate, and kdpp.OwnCFG was given none: "
            "pass uncond_denoised=, a function that returns that of the latest call"
        )

    def denoise(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return call(x, sigma), shaped(latest_uncond(), f"{name}'s uncond_denoised", x)

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


def _joined(parts: Sequence[Any], path: str, batch: int) -> Any:
    """Equal structures joined: batch-first tensors concatenated, anything else the same in all."""
    first = parts[0]
    if all(isinstance(p, Mapping) and p.keys() == first.keys() for p in parts):
        return {key: _joined([p[key] for p in parts], _inside(path, key), batch) for key in first}
    if all(isinstance(p, list | tuple) and len(p) == len(first) for p in parts):
        columns = enumerate(zip(*parts))
        return _like(first, [_joined(column, _inside(path, i), batch) for i, column in columns])
    if all(isinstance(p, Tensor) for p in parts):
        if first.ndim and all(p.shape == first.shape for p in parts) and len(first) == batch:
            return torch.cat(tuple(parts))
        if all(p is first for p in parts):
            return first
    elif all(p is first or (type(p) is type(first) and p == first) for p in parts):
        return first
    other = next((p for p in parts if p is not first), first)
    raise ValueError(
        f"extra_args: {path} does not fit into one batch of {' + '.join([str(batch)] * len(parts))}"
        f": {_describe(other)} and {_describe(first)}; both must be batch-first and alike"
    )


def _inside(path: str, key: Any) -> str:
    return f"{path}[{key!r}]" if path else str(key)


def map_rows(value: Any, rows: int | None, change: Callable[[Tensor], Any]) -> Any:
    """Change every tensor of so many rows (None: every tensor) in a nested structure.

    Anything else is left as it is.
    """
    if isinstance(value, Mapping):
        return {key: map_rows(item, rows, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return _like(value, [map_rows(item, rows, change) for item in value])
    if isinstance(value, Tensor) and (rows is None or (value.ndim and len(value) == rows)):
        return change(value)
    return value


def _chunk(rows: Tensor, count: int, j: int) -> Tensor:
    """The j-th of ``count`` nearly equal parts."""
    return rows.tensor_split(count)[j]


def _like(value: Any, items: list[Any]) -> Any:
    """``items`` in a list, tuple or named tuple of ``value``'s type."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))}"
    return f"{type(value).__name__} {value!r}"
