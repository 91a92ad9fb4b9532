"""What a denoiser says of itself: whether it is a flow model, its range, whether it does its CFG.

A denoiser is often wrapped in others. The wrappers here pass on what the denoiser inside them says.
"""

from __future__ import annotations

import copy
import inspect
import numbers
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = [
    "Denoiser",
    "Leaf",
    "OwnCFG",
    "Transparent",
    "check_denoiser",
    "check_inner",
    "check_scale_is_taken",
    "holds_samples",
    "inside",
    "is_flow",
    "leaves_of",
    "takes_sigma_next",
    "trained_range",
]

Denoiser = Callable[..., Tensor]
"""``(x, sigma, **extra_args) -> denoised``, as k-diffusion calls it."""

ANSWERED_INSIDE = frozenset(
    {"flow", "get_sigmas", "sigma_max", "sigma_min", "sigma_to_t", "sigmas", "t_to_sigma"}
)
DEEPEST = 32  # wrappers around wrappers that are looked into


class Transparent(nn.Module):
    """A wrapper that says of its schedule and kind what the denoiser inside it says.

    A subclass names the attribute that holds that denoiser, ``_inner``.
    """

    _inner = "model"

    def __getattr__(self, name: str) -> Any:
        if name in ANSWERED_INSIDE:
            return getattr(getattr(self, self._inner), name)
        return super().__getattr__(name)


class OwnCFG(Transparent):
    """Marks a denoiser that does its own classifier-free guidance: kdpp calls it as it is.

    Args:
        model: ``forward(x, sigma, uncond, cond, cond_scale)``, like the CFGDenoiser of k-diffusion
            scripts and web UIs. It gets every one of the sampler's ``extra_args``; as a teacher,
            with the wrapper's ``teacher_cfg_scale`` for ``cond_scale``.
        uncond_denoised: for CFG++ samplers, a function without arguments that returns the
            unconditional estimate of the model's latest call, of the latent's shape. A method of
            the model is copied with it by ``copy.deepcopy``; a plain function is not, and a deep
            copy is refused.

    Raises:
        TypeError: ``model`` or ``uncond_denoised`` cannot be called.
    """

    divisible = False
    """Whether a batch may be split over several calls: it sees to the size of its own halves."""
    halves = 1
    """How often a call evaluates the network where the CFG scale is not 1."""

    def __init__(
        self, model: Denoiser, uncond_denoised: Callable[[], Tensor] | None = None
    ) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(f"OwnCFG takes a denoiser, (x, sigma, **extra_args), not {model!r}")
        if uncond_denoised is not None and not callable(uncond_denoised):
            raise TypeError(
                f"uncond_denoised is {uncond_denoised!r}; it must be a function without arguments"
            )
        self.model = model
        self.uncond_denoised = uncond_denoised

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        try:
            denoised: Tensor = self.model(x, sigma, **extra_args)
        except TypeError as error:
            if "cond_scale" in extra_args and "argument 'cond_scale'" in str(error):
                raise TypeError(f"{takes_no_scale('the model', self.model)} ({error})") from error
            raise
        return denoised

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCFG:
        if isinstance(self.uncond_denoised, FunctionType):
            raise TypeError(
                "a deep copy of this kdpp.OwnCFG would read the unconditional estimate of the "
                "original: uncond_denoised is a plain function, which is not copied with the "
                "model. Give a method of the model instead, or mark the copied model anew"
            )
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


def inside(model: Any) -> Iterator[Any]:
    """The denoiser and those inside it, from the outside in: its ``model`` or ``inner_model``."""
    met: list[Any] = []
    while model is not None and len(met) < DEEPEST and not any(model is one for one in met):
        yield model
        met.append(model)
        inner = getattr(model, "model", None)
        model = getattr(model, "inner_model", None) if inner is None else inner


def is_flow(denoiser: Any) -> bool:
    """Whether it is a flow model: whether its attribute ``flow`` is true."""
    return bool(getattr(denoiser, "flow", False))


def trained_range(model: Any) -> tuple[float, float] | None:
    """(sigma_min, sigma_max) of the first denoiser inside ``model`` that tells them, else None."""
    for part in inside(model):
        low, high = getattr(part, "sigma_min", None), getattr(part, "sigma_max", None)
        if isinstance(low, numbers.Real | Tensor) and isinstance(high, numbers.Real | Tensor):
            return float(low), float(high)
    return None


def holds_samples(model: Any) -> bool:
    """Whether the denoiser, or one inside it, holds something for each sample of a batch.

    Such a one has the attribute ``holds_samples``. Where it is not called with the whole batch in
    order (or copies of it, as by CFG), it gets the samples' numbers as the keyword ``sample_rows``,
    of shape ``(len(x),)``.
    """
    return any(getattr(part, "holds_samples", False) is True for part in inside(model))


def takes_sigma_next(model: Any) -> bool:
    """Whether the denoiser, or one inside it, asks for the level that the update goes to.

    Such a one has the attribute ``takes_sigma_next`` and is called with the keyword ``sigma_next``,
    of shape ``(batch,)``, where that level is known: a flow map.
    """
    return any(getattr(part, "takes_sigma_next", False) is True for part in inside(model))


class Leaf(NamedTuple):
    """A network in a weighted sum, with conditions of its own; see `kdpp.WeightedSum`."""

    denoiser: Denoiser
    cfg_scale: float | None
    """None: what the sum is asked with."""
    extra_args: Mapping[str, Any]
    """Entries that take the place of those that the sum is asked with."""


def leaves_of(model: Any) -> tuple[Leaf, ...] | None:
    """The networks that a weighted sum weighs; None for any other denoiser."""
    leaves: tuple[Leaf, ...] | None = getattr(model, "weighted_leaves", None)
    return leaves


def check_denoiser(model: Any, name: str) -> None:
    """TypeError unless ``model`` is a denoiser that kdpp's CFG can call, or marked by `OwnCFG`."""
    if not callable(model):
        raise TypeError(f"{name} is {model!r}; it must be a denoiser, (x, sigma, **extra_args)")
    refuse_network(model, name)
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


def takes_no_scale(name: str, model: Any) -> str:
    """The message where kdpp cannot set the CFG scale of a model marked by `OwnCFG`."""
    return (
        f"{name} ({type(model).__name__}) is marked by kdpp.OwnCFG and takes no cond_scale, so its "
        "CFG scale cannot be set. If it is a host's model, say how: kdpp.HostModel(ask, flow=...), "
        "with ask(x, sigma, cfg_scale, **extra_args)"
    )


def check_scale_is_taken(model: Any, name: str) -> None:
    """TypeError where a model marked by `OwnCFG` shows that it takes no ``cond_scale``."""
    if type(model) is not OwnCFG:
        return
    try:
        taken = inspect.signature(getattr(model.model, "forward", model.model)).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return
    if "cond_scale" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise TypeError(takes_no_scale(name, model.model))


def check_inner(denoiser: Denoiser, owner: str) -> Denoiser:
    """The denoiser; TypeError unless a wrapper, ``owner``, can be put around it.

    `OwnCFG` is refused: only the outermost wrapper is asked whether it does its own CFG. So is a
    weighted sum, which is asked for its networks.
    """
    if not callable(denoiser):
        raise TypeError(f"{owner} takes a denoiser, (x, sigma, **extra_args), not {denoiser!r}")
    refuse_network(denoiser, f"the denoiser given to {owner}")
    if leaves_of(denoiser) is not None:
        raise TypeError(
            f"{owner} was given a kdpp.WeightedSum; wrap the denoisers that it is made of, so that "
            "each is asked with conditions and weights of its own"
        )
    if isinstance(denoiser, OwnCFG):
        raise TypeError(
            f"{owner} was given a {type(denoiser).__name__}, which does its own CFG. Only the "
            f"outermost wrapper is asked about that, so put {owner} inside it"
        )
    return denoiser


def refuse_network(model: Any, name: str) -> None:
    """TypeError for latent diffusion's model class, which predicts noise or v at a timestep.

    It has ``apply_model`` and ``alphas_cumprod``, and a run with it would be noise. A model that
    has ``sigma_to_t`` too knows σ, and passes.
    """
    while isinstance(model, Transparent):
        model = getattr(model, model._inner)
    has = [hasattr(model, part) for part in ("apply_model", "alphas_cumprod", "sigma_to_t")]
    if has == [True, True, False]:
        v = getattr(model, "parameterization", "eps") == "v"
        raise TypeError(
            f"{name} ({type(model).__name__}) has apply_model and alphas_cumprod, so it seems to "
            f"predict {'v' if v else 'noise'} at a timestep; a denoiser predicts x0 at a noise "
            f"level. Wrap it: kdpp.kdiffusion.external.CompVis{'V' * v}Denoiser(model)"
            + ("" if v else " (CompVisVDenoiser, if it predicts v)")
        )
