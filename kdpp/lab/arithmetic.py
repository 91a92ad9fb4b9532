"""How a training computes, whatever its method: precision, compiled networks, clipped gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kdpp.lab.settings import setting

if TYPE_CHECKING:
    import torch

__all__ = ["PLAIN", "Arithmetic", "clip", "compiled", "products_in"]


@dataclass(frozen=True)
class Arithmetic:
    """Settings that every method has; each can change the last bits of the outcome."""

    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "of the networks' products (autocast); weights and averages stay float32"
    )
    clip: float | None = setting(
        None, "the largest norm of an optimiser's gradients; none: any", low=1e-6
    )
    compile: bool = setting(False, "compile the networks (torch.compile)")

    @property
    def given(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {name: value for name, value in vars(self).items() if value != vars(PLAIN)[name]}


PLAIN = Arithmetic()


def products_in(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Matrix products and convolutions of the block in this precision; sums and losses stay
    float32 (torch.autocast)."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def compiled(networks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Each network's `forward` compiled for the block, its hooks and its state as they are."""
    import torch

    networks = list(networks)
    for network in networks:
        network.forward = torch.compile(network.forward)
    try:
        yield
    finally:
        for network in networks:
            del network.forward


def clip(optimiser: torch.optim.Optimizer, norm: float) -> None:
    """Scale the optimiser's gradients down to this norm, all of them together, where they exceed
    it (Pascanu et al. 2013)."""
    import torch

    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, norm)
