"""Several teachers of one architecture as one network: weights stacked, their calls one call."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Mapping
from functools import partial
from threading import Lock, RLock
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdpp.denoisers import map_rows
from kdpp.kinds import OwnCFG, is_flow, leaves_of, trained_range
from kdpp.memory import borrowed_in

__all__ = ["Stack", "Stacked", "stack_teachers"]

BOOKKEEPING = frozenset(vars(nn.Module()))  # torch's own attributes: hooks, the training flag, …
INTERCHANGEABLE = (numbers.Number, Mapping, (list, tuple))  # 1 and 1.0; what was read from JSON
LABELS = ("name_or_path", "commit_hash", "transformers_version")
HARMLESS = (type(Lock()), type(RLock()), torch.Generator)
ACTIVE_IN_TRAINING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


class Stack(nn.Module):
    """Networks of one architecture, called together (`torch.func.vmap`); see `stack_teachers`.

    ``forward(x, sigma, **joined)``: the first of ``len(stack)`` equal shares of x, of sigma and of
    all that goes by sample (`kdpp.denoisers.Rows`) goes to the first network, and so on.
    """

    takes_rows = True

    def __init__(self, *denoisers: nn.Module) -> None:
        super().__init__()
        states = [{**dict(d.named_parameters()), **dict(d.named_buffers())} for d in denoisers]
        self.names = list(states[0])
        for j, name in enumerate(self.names):
            weights = torch.stack([state[name].detach() for state in states])
            self.register_buffer(str(j), weights, persistent=False)
        self.skeleton = (copy.deepcopy(denoisers[0]).to("meta"),)  # a tuple: no child, no weights
        self.count = len(denoisers)

    def __len__(self) -> int:
        return self.count

    def forward(self, x: Tensor, sigma: Tensor, **joined: Any) -> Tensor:
        tensors = [x, sigma]
        map_rows(joined, lambda rows: tensors.append(rows.value))

        def one(values: dict[str, Tensor], x: Tensor, sigma: Tensor, *others: Tensor) -> Tensor:
            rest = iter(others)
            return self.call(values, x, sigma, map_rows(joined, lambda _: next(rest)))

        shares = [t.reshape(len(self), -1, *t.shape[1:]) for t in tensors]
        answers: Tensor = torch.vmap(one)(self.values(), *shares)
        return answers.flatten(0, 1)

    def values(self) -> dict[str, Tensor]:
        """The stacked parameters and buffers, by their names in one network."""
        return {name: getattr(self, str(j)) for j, name in enumerate(self.names)}

    def call(
        self, values: dict[str, Tensor], x: Tensor, sigma: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """One network's answer, with these parameters and buffers."""
        answer: Tensor = functional_call(self.skeleton[0], values, (x, sigma), kwargs)
        return answer


class Stacked(nn.Module):
    """One network of a `Stack`, a denoiser like the one it was made of."""

    def __init__(self, stack: Stack, index: int, denoiser: nn.Module) -> None:
        super().__init__()
        self.stack, self.index = stack, index
        self.flow = is_flow(denoiser)
        trained = trained_range(denoiser)
        if trained is not None:
            self.sigma_min, self.sigma_max = trained

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        values = {name: value[self.index] for name, value in self.stack.values().items()}
        return self.stack.call(values, x, sigma, extra_args)


def stack_teachers(*denoisers: nn.Module) -> tuple[Stacked, ...]:
    """The same denoisers, whose calls in a guided step become one call of batched kernels.

    Give each to a `kdpp.Teacher` of its own. Where all of them are asked at a step, with as many
    rows each, the sampler asks them in one call; otherwise one after the other. Faster where a
    single network leaves the device idle.

    A stack is one network with several sets of weights, so the denoisers may differ in their
    parameters and buffers alone. Hooks, training flags (but those of dropout and batch norm) and
    labels such as an attribute ``name`` are not compared; the first denoiser's are kept.
    The weights are copied into the stack; drop the originals to hold them once.

    Raises:
        TypeError: a denoiser is not an ``nn.Module``, is a `kdpp.Borrowed`, a `kdpp.WeightedSum` or
            marked by `kdpp.OwnCFG`, or they are not all of one class.
        ValueError: fewer than two, or they differ in more than weights: in the class of a
            submodule, in an attribute, or in a weight's name, shape, dtype or device. The message
            says where.
    """
    if len(denoisers) < 2:
        raise ValueError(f"stack_teachers was given {len(denoisers)} denoisers; give two or more")
    for one in denoisers:
        if not isinstance(one, nn.Module) or type(one) is not type(denoisers[0]):
            raise TypeError(
                f"stack_teachers was given a {type(one).__name__} beside a "
                f"{type(denoisers[0]).__name__}; all must be nn.Modules of one class"
            )
        if borrowed_in(one):
            raise TypeError(
                "stack_teachers was given a kdpp.Borrowed, which holds no weights; stack the "
                "denoisers that are borrowed"
            )
        if leaves_of(one) is not None:
            raise TypeError("stack_teachers was given a kdpp.WeightedSum; stack its networks")
        if isinstance(one, OwnCFG):
            raise TypeError(
                f"stack_teachers was given a {type(one).__name__}, which does its own CFG; a "
                "stack's CFG is kdpp's"
            )
    for j, one in enumerate(denoisers[1:], start=2):
        where = difference(denoisers[0], one)
        if where is not None:
            raise ValueError(
                f"stack_teachers: the denoisers 1 and {j} are not of one architecture: {where}. A "
                "stack is one network with several sets of weights; all else must be equal"
            )
    stack = Stack(*denoisers)
    return tuple(Stacked(stack, j, one) for j, one in enumerate(denoisers))


def difference(
    one: Any, other: Any, path: str = "", met: set[tuple[int, int]] | None = None
) -> str | None:
    """Where two networks, or parts of them, differ in more than weights; None where they do not."""
    met = set() if met is None else met
    if one is other or (id(one), id(other)) in met:
        return None
    here = path.removeprefix(".") or "the denoiser"
    alike = any(isinstance(one, kind) and isinstance(other, kind) for kind in INTERCHANGEABLE)
    if type(one) is not type(other) and not alike:
        return f"{here} is a {type(one).__name__} and a {type(other).__name__}"
    inside, across = parts(one), parts(other)
    if inside is None or across is None:
        return None if equal(one, other) else f"{here} is {brief(one)} and {brief(other)}"
    met.add((id(one), id(other)))
    for name in {**inside, **across}:
        if name not in inside or name not in across:
            return f"{here} has {name.removeprefix('.')} in one of them only"
        found = difference(inside[name], across[name], path + name, met)
        if found is not None:
            return found
    return None


def parts(value: Any) -> dict[str, Any] | None:
    """What a value is made of, by the text that leads there from it; None if it is one piece.

    Of weights their form alone; of a module not what `torch.nn.Module` keeps, such as hooks.
    """
    if isinstance(value, Mapping):
        return {f"[{k!r}]": part for k, part in value.items() if not (is_label(k) or is_private(k))}
    if isinstance(value, list | tuple):
        return {f"[{i}]": part for i, part in enumerate(value)}
    inside: dict[str, Any]
    if isinstance(value, nn.Module):
        inside = {k: part for k, part in vars(value).items() if k not in BOOKKEEPING}
        inside |= {k: w if w is None else form(w) for k, w in value._parameters.items()}
        inside |= {k: w if w is None else form(w) for k, w in value._buffers.items()}
        inside |= value._modules
        inside["shared weights"] = shared(value)
        if isinstance(value, ACTIVE_IN_TRAINING) and getattr(value, "p", None) != 0.0:
            inside["training"] = value.training
    elif isinstance(value, partial):
        inside = {"func": value.func, "args": value.args, "keywords": value.keywords}
    elif isinstance(value, MethodType):
        inside = {"__func__": value.__func__, "__self__": value.__self__}
    elif isinstance(value, FunctionType):
        inside = {"__code__": value.__code__, "__defaults__": value.__defaults__}
        inside["__kwdefaults__"] = value.__kwdefaults__
        inside |= {f"__closure__[{i}]": c for i, c in enumerate(value.__closure__ or ())}
    elif isinstance(value, CellType):
        inside = {} if value == CellType() else {"cell_contents": value.cell_contents}
    elif isinstance(value, Tensor | str | numbers.Number | type | ModuleType):
        return None
    elif hasattr(value, "__dict__"):
        inside = vars(value)
    else:
        return None
    return {f".{name}": part for name, part in inside.items() if not is_label(name)}


def shared(module: nn.Module) -> dict[str, str]:
    """Of weights that are in a module more than once: every name's first one."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    names = {name: first.setdefault(id(weight), name) for name, weight in named}
    return {name: origin for name, origin in names.items() if name != origin}


def form(weight: Tensor) -> str:
    """What weights that are stacked have in common."""
    return f"a {weight.dtype} tensor of shape {tuple(weight.shape)} on {weight.device}"


def equal(one: Any, other: Any) -> bool:
    """Whether two pieces say the same.

    Those that can be told apart by identity alone do only if they are one; locks and random
    generators always do.
    """
    if isinstance(one, Tensor):
        return form(one) == form(other) and torch.equal(one, other)
    if isinstance(one, HARMLESS):
        return True
    if isinstance(one, type | ModuleType):
        return False
    if isinstance(one, numbers.Number) and one != one:  # NaN
        return bool(other != other)
    same = one == other
    return bool(same.all()) if hasattr(same, "all") else bool(same)


def is_label(name: Any) -> bool:
    """Whether an attribute's name says that it tells where a network comes from."""
    return isinstance(name, str) and name.strip("_") in LABELS


def is_private(key: Any) -> bool:
    """Whether a key is a library's own: what diffusers keeps of a config, beside its settings."""
    return isinstance(key, str) and key.startswith("_")


def brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
