"""Of which tensors of a file others were made, by conversions that are diffusers' own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Origins", "named", "origins_of"]


class Origins(TorchFunctionMode):
    """Inside, every tensor that is made tells of which `named` ones it was made."""

    last = ""
    """The name of the tensor that was used last."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        names = tuple(dict.fromkeys(name for one in _tensors(args) for name in origins_of(one)))
        self.last = names[0] if names else self.last
        made = func(*args, **(kwargs or {}))
        if names:
            written = args[:1] if func.__name__ == "__setitem__" else ()
            for one in _tensors((made, *written)):
                one.__dict__["origins"] = names
        return made


def named(tensor: Tensor, name: str) -> Tensor:
    """The tensor, as one of this name."""
    tensor.__dict__["origins"] = (name,)
    return tensor


def origins_of(tensor: Any) -> tuple[str, ...]:
    """The names of the tensors of which this one was made; of others ()."""
    names: tuple[str, ...] = tensor.__dict__.get("origins", ()) if _is(tensor) else ()
    return names


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among values, and in lists of them."""
    for one in values:
        if _is(one):
            yield one
        elif isinstance(one, (list, tuple)):
            yield from (tensor for tensor in one if _is(tensor))


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)
