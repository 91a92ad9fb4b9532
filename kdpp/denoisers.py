"""Calling a network: its classifier-free guidance as one batched call, its output checked.

A denoiser is what k-diffusion calls one: ``(x, sigma, **extra_args) -> denoised``, an estimate of
x0. Guidance is ``D^w = D_∅ + w (D_c - D_∅)`` with w the CFG scale (1: no guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdpp.checks import check_number, is_compiling
from kdpp.kinds import Denoiser, OwnCFG, check_scale_is_taken, holds_samples

__all__ = [
    "Call",
    "Conditioning",
    "Rows",
    "Unlike",
    "check_unwritten",
    "conditioning_of",
    "counted",
    "map_rows",
    "map_tensors",
    "pick_rows",
    "shaped",
    "writes",
]


class Conditioning(NamedTuple):
    """What a denoiser is called with beside x and sigma, and its CFG scale."""

    parts: tuple[dict[str, Any], ...]
    """Keywords: one dict for a single call, or the unconditional half's and the conditional's."""
    scale: float
    """The CFG scale of the two halves; of a single part 0 where it is the unconditional one."""

    def join(self, answers: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """``(D_∅ + w (D_c - D_∅), D_∅)`` of the two halves; one answer as it is."""
        if len(answers) == 1:
            return answers[0], answers[0] if self.scale == 0.0 else None
        uncond, cond = answers
        return torch.lerp(uncond, cond, self.scale), uncond


def conditioning_of(
    model: Denoiser,
    name: str,
    extra_args: Mapping[str, Any],
    cfg_scale: float | None = None,
    needs_uncond: bool = False,
) -> Conditioning:
    """What ``extra_args`` and the CFG scale ask of a network; arguments as in `kdpp.asking.bind`.

    A half that weighs nothing is not asked: at a scale of 1 the unconditional one (but for CFG++),
    at 0 the conditional one.
    """
    if isinstance(model, OwnCFG):
        kwargs = dict(extra_args)
        if cfg_scale is not None:
            check_scale_is_taken(model, name)
            kwargs["cond_scale"] = check_number(f"{name}_cfg_scale", cfg_scale)
        return Conditioning((kwargs,), 1.0)
    rest = dict(extra_args)
    cond, uncond = rest.pop("cond", None), rest.pop("uncond", None)
    own_scale = rest.pop("cond_scale", 1.0)
    own = "teacher_cfg_scale" if name == "teacher" else "cfg_scale"
    argument = "cond_scale" if cfg_scale is None else own
    scale = check_number(argument, own_scale if cfg_scale is None else cfg_scale)
    if scale == 1.0 and not needs_uncond:
        if "cond" in extra_args:
            rest["cond"] = cond
        return Conditioning((rest,), scale)
    if cond is None or uncond is None:
        raise ValueError(
            f"the {name} needs extra_args['cond'] and extra_args['uncond'] for "
            + (f"CFG ({argument}={scale!r})" if scale != 1.0 else "CFG++")
            + f"; given: {sorted(extra_args) or 'nothing'}. Give both"
            + ("" if needs_uncond else f", or set {argument}=1 for no guidance")
            + ". A host's model, which holds its conditions itself, is wrapped by kdpp.HostModel"
        )
    halves = ({**rest, "cond": uncond}, {**rest, "cond": cond})
    return Conditioning(halves[:1] if scale == 0.0 else halves, scale)


class Call:
    """A network's call for one or several parts of a batch, each with keywords of its own.

    The parts are concatenated, batch-first tensors in their keywords too. The network is given
    ``dtype`` (None: what x has), and its answer comes back in x's dtype. ``max_batch`` caps the
    rows of a call; more are split evenly over ``ceil(rows / max_batch)`` calls. What does its own
    CFG (`OwnCFG`) sees to that itself and is never split. A network that ``takes_rows`` (a stack)
    gets what goes by sample marked as such, `Rows`, and is not split either.

    Raises:
        ValueError: keywords that do not fit into one batch (`Unlike`); in a call, an output of
            another shape.
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
        rows = batch * len(conditions)
        capped = max_batch is not None and getattr(model, "divisible", True)
        count = max(1, -(-rows // max_batch)) if capped and max_batch else 1
        if count > 1 and holds_samples(model):
            conditions = [{"sample_rows": torch.arange(batch), **one} for one in conditions]
        self.chunks = [dict(conditions[0])]
        if len(conditions) > 1 or count > 1:
            joined = _joined(conditions, "", batch)
            cuts = [partial(Rows.cut, count=count, j=j) for j in range(count)]
            if getattr(model, "takes_rows", False):
                map_rows(joined, _check_tensor)
                self.chunks = [joined]
            else:
                self.chunks = [map_rows(joined, cut) for cut in cuts]

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


class Unlike(ValueError):
    """Keywords of several parts that do not fit into one batch."""


PLAIN = (str, bytes, int, float, bool, type(None))
"""Types whose equal values may stand for each other."""


class Rows(NamedTuple):
    """What goes by sample: a tensor's rows, or a list's entries."""

    value: Any

    def cut(self, count: int, j: int) -> Any:
        """The j-th of ``count`` nearly equal parts, as ``torch.tensor_split`` has them."""
        if isinstance(self.value, Tensor):
            return self.value.tensor_split(count)[j] if count > 1 else self.value
        share, more = divmod(len(self.value), count)
        start = j * share + min(j, more)
        return self.value[start : start + share + (j < more)]


def _joined(parts: Sequence[Any], path: str, batch: int) -> Any:
    """Equal structures joined: what goes by sample is concatenated, as `Rows`; the rest is shared.

    Raises `Unlike` where the parts differ in anything else.
    """
    first = parts[0]
    if all(isinstance(p, Mapping) and p.keys() == first.keys() for p in parts):
        return {key: _joined([p[key] for p in parts], _inside(path, key), batch) for key in first}
    if all(by_sample(p, batch) for p in parts):
        if all(isinstance(p, Tensor) and p.shape == first.shape for p in parts):
            return Rows(first if len(parts) == 1 else torch.cat(tuple(parts)))
        if all(type(p) is type(first) for p in parts) and not isinstance(first, Tensor):
            return Rows([entry for p in parts for entry in p])
    if all(isinstance(p, list | tuple) and len(p) == len(first) for p in parts):
        columns = enumerate(zip(*parts))
        return _like(first, [_joined(column, _inside(path, i), batch) for i, column in columns])
    if all(p is first or _equal(p, first) for p in parts):
        return first
    other = next((p for p in parts if p is not first), first)
    raise Unlike(
        f"extra_args: {path} does not fit into one batch of {' + '.join([str(batch)] * len(parts))}"
        f": {_describe(other)} and {_describe(first)}; both must be alike, with {batch} rows each"
    )


def map_rows(joined: Any, change: Callable[[Rows], Any]) -> Any:
    """Change every `Rows` in a joined structure; what is shared stays as it is."""
    if isinstance(joined, Rows):
        return change(joined)
    if isinstance(joined, Mapping):
        return {key: map_rows(value, change) for key, value in joined.items()}
    if isinstance(joined, list | tuple):
        return _like(joined, [map_rows(value, change) for value in joined])
    return joined


def _check_tensor(rows: Rows) -> None:
    if not isinstance(rows.value, Tensor):
        raise Unlike("extra_args: a list of texts cannot be shared out to stacked networks")


def by_sample(value: Any, batch: int) -> bool:
    """Whether a value has an entry for each sample: a tensor's rows, or a list's texts.

    Lists of anything else go to every call: (height, width) is one. ValueError for texts beside
    something else, such as None for an empty one.
    """
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == batch
    if not isinstance(value, list | tuple) or len(value) != batch:
        return False
    texts = [isinstance(one, str) for one in value]
    if any(texts) and not all(texts):
        raise ValueError(f"extra_args holds {value!r}; texts beside anything else cannot be shared")
    return all(texts)


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, PLAIN) and type(a) is type(b) and a == b


def _inside(path: str, key: Any) -> str:
    return f"{path}[{key!r}]" if path else str(key)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Change every tensor in a nested structure; anything else is left as it is."""
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return _like(value, [map_tensors(item, change) for item in value])
    return change(value) if isinstance(value, Tensor) else value


def pick_rows(value: Any, batch: int, rows: Tensor) -> Any:
    """Those rows (int64, on the CPU) of what goes by sample; anything else is left as it is."""
    if isinstance(value, Mapping):
        return {key: pick_rows(item, batch, rows) for key, item in value.items()}
    if by_sample(value, batch):
        if isinstance(value, Tensor):
            return value[rows.to(value.device)]
        return type(value)(value[i] for i in rows.tolist())
    if isinstance(value, list | tuple):
        return _like(value, [pick_rows(item, batch, rows) for item in value])
    return value


def _like(value: Any, items: list[Any]) -> Any:
    """``items`` in a list, tuple or named tuple of ``value``'s type."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if hasattr(value, "shape"):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))}"
    return f"{type(value).__name__} {value!r}"


# The memory of an answer --------------------------------------------------------------------------


def writes(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written to, by torch's count, which inference mode does not keep."""
    if is_compiling():
        return []
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def check_unwritten(tensors: Sequence[Tensor], before: list[int], name: str) -> None:
    """ValueError where a network wrote its answer over ``tensors``, earlier ones still in use."""
    if writes(tensors) != before:
        raise ValueError(
            f"the {name} wrote its answer into memory that holds an earlier one, still in "
            "use; return a new tensor from every call (clone the output)"
        )


def counted(answer: Tensor) -> Tensor:
    """The answer, in memory of its own where torch does not count the writes to it.

    For one that is kept while a network is called again, which may use its output buffer anew.
    """
    if is_compiling() or not answer.is_inference():
        return answer
    return answer.clone()
