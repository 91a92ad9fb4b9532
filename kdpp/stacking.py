"""Several teachers of one architecture as one network: weights stacked, their calls one call."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from kdpp.denoisers import map_rows
from kdpp.kinds import trained_range
from kdpp.memory import borrowed_in

__all__ = ["Stack", "Stacked", "stack_teachers"]


class Stack(nn.Module):
    """Networks of one architecture, called together (`torch.func.vmap`); see `stack_teachers`.

    ``forward(x, sigma, **joined)``: the first of ``len(stack)`` equal shares of x, of sigma and of
    all that goes by sample (`kdpp.denoisers.Rows`) goes to the first network, and so on.
    """

    takes_rows = True

    def __init__(self, *denoisers: nn.Module) -> None:
        super().__init__()
        parameters, buffers = stack_module_state(list(denoisers))
        self.names = [*parameters, *buffers]
        for j, value in enumerate([*parameters.values(), *buffers.values()]):
            self.register_buffer(str(j), value.detach(), persistent=False)
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
        self.flow = bool(getattr(denoiser, "flow", False))
        trained = trained_range(denoiser)
        if trained is not None:
            self.sigma_min, self.sigma_max = trained

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        values = {name: value[self.index] for name, value in self.stack.values().items()}
        return self.stack.call(values, x, sigma, extra_args)


def stack_teachers(*denoisers: nn.Module) -> tuple[Stacked, ...]:
    """The same denoisers, whose calls in a guided step become one call of batched kernels.

    Give each to a `kdpp.Teacher` of its own. Where every one of them speaks at a step, with as many
    rows each, the sampler asks all at once; otherwise one after the other. Faster where a single
    network leaves the device idle.

    The weights are copied into one stack; drop the originals to hold them once.

    Raises:
        TypeError: a denoiser is no ``nn.Module``, or `kdpp.Borrowed`, or not all are of one class.
        ValueError: fewer than two, or their weights differ in name, shape or kind.
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
            raise TypeError("a borrowed teacher holds no weights to stack; stack what it borrows")
    try:
        stack = Stack(*denoisers)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"these denoisers are not of one architecture: {error}") from error
    return tuple(Stacked(stack, j, one) for j, one in enumerate(denoisers))
