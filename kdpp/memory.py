"""Two models in the memory of one: a teacher on the student's weights, or one that comes and goes.

`without_adapters` makes the teacher of a LoRA student out of the student itself; `Borrowed` is a
second model that takes up device memory in the guided steps only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kdpp.denoisers import Denoiser, OwnCFG, refuse_unmarked_cfg, trained_range
from kdpp.models import _Transparent

__all__ = ["Borrowed", "borrowed_in", "without_adapters"]


def without_adapters(denoiser: nn.Module) -> nn.Module:
    """The same denoiser with its LoRA adapters switched off: the student's base model, as teacher.

    Where an adapted layer of the student computes ``(W + s·BA) x``, the teacher computes ``W x``
    with the same W in memory::

        model = TeacherGuidedDenoiser(student, without_adapters(student))

    The adapters are off during the teacher's calls alone. After each one, and after an exception in
    it, every layer is as it was: adapters that were off stay off, several active ones stay active,
    and ``requires_grad`` is not touched. Not for calls of both at once, from several threads.

    The adapters are those of peft's layers anywhere inside ``denoiser`` (a PeftModel, diffusers'
    ``load_lora_weights`` or ``add_adapter``, peft's ``inject_adapter_in_model``; LoRA or another
    kind). They are looked up once: make the teacher after they are loaded, and a new one after
    others are. A student marked by `kdpp.OwnCFG` gives a teacher that is marked too.

    Raises:
        TypeError: ``denoiser`` is no module, or does its own CFG unmarked.
        ValueError: it has no adapters; they are merged into the weights (when called, too); or they
            were trained together with the base model's biases. Such cannot be switched off.

    Source: Hu et al. 2021, "LoRA", eq. (3).
    """
    if not isinstance(denoiser, nn.Module):
        raise TypeError(
            f"without_adapters takes a denoiser that holds its network, an nn.Module, not "
            f"{denoiser!r}: adapters are looked for in its layers"
        )
    refuse_unmarked_cfg(denoiser, "denoiser")
    teacher = _WithoutAdapters(denoiser)
    if isinstance(denoiser, OwnCFG):
        return OwnCFG(teacher, denoiser.uncond_denoised)
    return teacher


class _WithoutAdapters(_Transparent):
    """See `without_adapters`."""

    _inner = "model"

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.model = denoiser
        self._layers = _adapter_layers(denoiser)

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        _refuse_merged(self._layers)
        before = [layer._disable_adapters for layer in self._layers]
        try:
            self._switch([True] * len(before))
            denoised: Tensor = self.model(x, sigma, **extra_args)
        finally:
            self._switch(before)
        return denoised

    def _switch(self, off: Sequence[Any]) -> None:
        # The flag that peft's layers read. Their enable_adapters() also resets requires_grad, and
        # nn.Module's way to set an attribute is ten times slower; there may be 800 layers.
        for layer, flag in zip(self._layers, off):
            object.__setattr__(layer, "_disable_adapters", flag)


def _adapter_layers(denoiser: nn.Module) -> list[nn.Module]:
    """peft's layers inside ``denoiser``; ValueError where there are none that can be switched."""
    layers = []
    for module in denoiser.modules():
        if hasattr(module, "enable_adapters") and hasattr(module, "_disable_adapters"):
            layers.append(module)
        configs = getattr(module, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, dict) else ():
            bias = getattr(config, "bias", "none")
            if bias != "none":
                raise ValueError(
                    f"adapter {name!r} was trained with bias={bias!r}: its biases lie in the base "
                    "model and cannot be switched off; load the base model as the teacher "
                    "(kdpp.Borrowed)"
                )
    if not layers:
        raise ValueError(
            f"{type(denoiser).__name__} holds no adapters, layers of peft: load the LoRA before "
            "the teacher is made, and do not merge it into the weights for good"
        )
    _refuse_merged(layers)
    return layers


def _refuse_merged(layers: Sequence[nn.Module]) -> None:
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(
            "the adapters are merged into the weights and cannot be switched off; unmerge them "
            "first (peft's unmerge_adapter, diffusers' unfuse_lora)"
        )


class Borrowed(_Transparent):
    """A teacher that is in device memory from the first guided step to the last, and not after.

    kdpp's samplers call `fetch` before the student's call of a run's first guided step and
    `release` after the teacher's last, or when the run ends by an exception. A call without
    `fetch` fetches, and the teacher then stays until `release`. The weights are no part of
    whatever holds this object: ``.to(device)`` of a `TeacherGuidedDenoiser` leaves them alone.

    A denoiser that does its own CFG is marked outside: ``kdpp.OwnCFG(Borrowed(model))``.

    Args:
        source: a denoiser on the CPU, an nn.Module. Its weights are copied to the device, on CUDA
            from pinned memory and on a stream of their own, while the student computes. The CPU
            keeps them, so nothing is copied back. Weights in pinned memory take the place of the
            module's own; torch rounds each up to a power of two bytes. Quantised weights, where
            they are tensors of a kind of their own as torchao's are, are copied without overlap.
            Or a function without arguments that loads the denoiser, to where it is used, and is
            called again in every run with guided steps: for a host without room for both. Loading
            draws nothing from the random stream that the sampler sees.
        like: with a function, an object that says what the denoiser will say of itself and is asked
            before it is there (``flow``, ``sigma_min``, ``sigma_max``, …); the student, as a rule.
        device: with a module, where it is to compute; by default CUDA where there is one.

    Raises:
        TypeError: ``source`` is neither; ``like`` is missing, or an argument belongs to the other
            kind; and, when fetched, the function returned no denoiser, or one that is marked by
            `kdpp.OwnCFG`.
        ValueError: the module is not on the CPU, has weights that cannot be copied (those of
            bitsandbytes), or there is no such device; and, when fetched, the loaded denoiser is of
            another kind or trained range than ``like``.
    """

    _inner = "like"

    def __init__(
        self,
        source: nn.Module | Callable[[], Denoiser],
        *,
        like: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self._here: list[Denoiser] = []  # or one; in a list, no part of this module
        if isinstance(source, nn.Module):
            if like is not None:
                raise TypeError("like goes with a function that loads; a module speaks for itself")
            like = source
            self._bring = _mover(_unmarked(source), _device(device))
        elif callable(source):
            if like is None or device is not None:
                raise TypeError(
                    "a function that loads the denoiser needs like=, an object of the same kind "
                    "and trained range (the student, as a rule), and takes no device: it loads the "
                    "denoiser to where it is used"
                )
            self._bring = partial(_load, source, like)
        else:
            raise TypeError(
                f"Borrowed takes a denoiser on the CPU or a function that loads one, not {source!r}"
            )
        # Past nn.Module's bookkeeping: a module would become a part of this one.
        self.__dict__["like"] = like
        trained = trained_range(like)
        if trained is not None:
            self.sigma_min, self.sigma_max = trained

    def fetch(self) -> None:
        """Start to bring the denoiser in, unless it is here."""
        if not self._here:
            self._here.append(self._bring())

    def release(self) -> None:
        """Give the memory back. Does nothing if the denoiser is not here."""
        self._here.clear()

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        self.fetch()
        return self._here[0](x, sigma, **extra_args)


def borrowed_in(denoiser: Any) -> list[Borrowed]:
    """Every `Borrowed` inside a denoiser, itself included: what a run fetches and releases."""
    modules = denoiser.modules() if isinstance(denoiser, nn.Module) else ()
    return [module for module in modules if isinstance(module, Borrowed)]


class _Copy:
    """A module's call with copies of its weights on another device; the module is not touched."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self.weights: dict[str, Tensor] = {}
        self.arrived: torch.cuda.Event | None = None
        pairs = []
        for name, weight in chain(module.named_parameters(), module.named_buffers()):
            if _is_plain(weight):
                self.weights[name] = torch.empty_like(weight, device=device, requires_grad=False)
                pairs.append((self.weights[name], weight.detach()))
            else:
                self.weights[name] = weight.detach().to(device)
        if device.type != "cuda":
            for copy, weight in pairs:
                copy.copy_(weight)
            return
        # The room comes from the stream that computes and goes back to it. Work queued there may
        # still be using it, so the copies wait for that; what is queued from now on overlaps.
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for copy, weight in pairs:
                copy.copy_(weight, non_blocking=True)
                copy.record_stream(side)  # released before it has arrived, it is not used again yet
            self.arrived = side.record_event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        return functional_call(self.module, self.weights, args, kwargs)


def _mover(module: nn.Module, device: torch.device) -> Callable[[], Denoiser]:
    """What brings a module to the device: nothing to do for the CPU; for CUDA it is pinned here."""
    weights = list(chain(module.parameters(), module.buffers()))
    for weight in weights:
        if weight.device.type != "cpu":
            raise ValueError(
                f"the denoiser lies on {weight.device}; Borrowed takes one on the CPU (call "
                ".cpu() first) and brings it to the device when it is needed"
            )
        if not (_is_plain(weight) or is_traceable_wrapper_subclass(weight)):
            raise ValueError(
                f"the denoiser holds weights of the kind {type(weight).__name__}, which Borrowed "
                "cannot copy; leave it on the device, or give a function that loads it"
            )
    if device.type == "cpu":
        return lambda: module
    if device.type == "cuda":
        for weight in filter(_is_plain, weights):
            weight.data = weight.data.pin_memory()
    return partial(_Copy, module, device)


def _load(load: Callable[[], Denoiser], like: Any) -> Denoiser:
    """A loaded denoiser, checked. A new network's first weights are random: not from our stream."""
    there = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = torch.cuda.device_count() if there else 0
    with torch.random.fork_rng(range(devices)):
        denoiser = load()
    if not callable(denoiser):
        raise TypeError(
            f"the function given to Borrowed returned {denoiser!r}; it must return a denoiser, "
            "(x, sigma, **extra_args)"
        )
    made, told = _kind(_unmarked(denoiser)), _kind(like)
    if not _alike(made, told):
        raise ValueError(
            f"the loaded denoiser is {_described(made)}, and like= said {_described(told)}: give "
            "an object with the loaded one's flow, sigma_min and sigma_max"
        )
    return denoiser


_Kind = tuple[bool, tuple[float, float] | None]


def _kind(denoiser: Any) -> _Kind:
    return bool(getattr(denoiser, "flow", False)), trained_range(denoiser)


def _alike(one: _Kind, other: _Kind) -> bool:
    """The same, but for a schedule rounded to 16 bits."""
    if one[0] != other[0] or one[1] is None or other[1] is None:
        return one == other
    return all(math.isclose(a, b, rel_tol=0.01) for a, b in zip(one[1], other[1]))


def _described(kind: _Kind) -> str:
    flow, trained = kind
    levels = "an unknown range" if trained is None else f"[{trained[0]:g}, {trained[1]:g}]"
    return f"a {'flow' if flow else 'VE'} model trained on {levels}"


def _unmarked(denoiser: Any) -> Any:
    if isinstance(denoiser, OwnCFG):
        raise TypeError(
            f"Borrowed was given a {type(denoiser).__name__}, which does its own CFG; only the "
            "outermost wrapper is asked about that: kdpp.OwnCFG(Borrowed(model))"
        )
    return denoiser


def _device(device: torch.device | str | None) -> torch.device:
    there = torch.cuda.is_available()
    wanted = torch.device(device if device is not None else "cuda" if there else "cpu")
    if wanted.type == "cuda" and not there:
        raise ValueError(f"device is {str(wanted)!r}, and torch finds no CUDA; give another")
    return wanted


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter)
