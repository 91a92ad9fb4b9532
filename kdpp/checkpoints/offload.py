"""Modules that take turns on a device, so that it need not hold all of them at once.

A group is on the device while one of its modules is called, and until another group's turn comes.
Nothing is copied back: the CPU keeps the weights, which for a mapped file are the file itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kdpp.denoisers import map_tensors

__all__ = ["Turns"]

Place = tuple[dict[str, Any], str, Tensor]
"""A weight of a module: the table that holds it, its name there, and the weight on the CPU."""


class Turns:
    """Groups of modules on the CPU, of which one at a time is on the device.

    Args:
        device: where they compute. On the CPU nothing is moved.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.there: nn.ModuleList | None = None
        """The group whose turn it is."""
        self._home: list[Place] = []

    def group(self, modules: Iterable[nn.Module]) -> nn.ModuleList:
        """A group whose turn comes whenever one of its modules is called, with what it is given."""
        group = nn.ModuleList(modules)

        def come(module: nn.Module, *given: Any) -> Any:
            self.take(group)
            return map_tensors(given, lambda tensor: tensor.to(self.device))

        for module in group if self.device.type != "cpu" else ():
            module.register_forward_pre_hook(come, with_kwargs=True)
        return group

    def take(self, group: nn.ModuleList | None) -> None:
        """Let the group that is there leave, and bring this one in; None: bring none in.

        A change that was made to weights on the device leaves with them.
        """
        if group is self.there or self.device.type == "cpu":
            return
        for table, name, weight in self._home:
            table[name] = weight
        self._home.clear()
        self.there = group
        if group is not None:
            self._bring(group)

    def _bring(self, group: nn.ModuleList) -> None:
        copies: dict[int, Tensor] = {}  # a weight may be in two places
        for module in group.modules():
            for table in (module._parameters, module._buffers):
                for name, weight in table.items():
                    if weight is not None:
                        if id(weight) not in copies:
                            copies[id(weight)] = _copy(weight, self.device)
                        self._home.append((table, name, weight))
                        table[name] = copies[id(weight)]  # type: ignore[assignment]


def _copy(weight: Tensor, device: torch.device) -> Tensor:
    copy = weight.detach().to(device)
    return nn.Parameter(copy, requires_grad=False) if isinstance(weight, nn.Parameter) else copy
