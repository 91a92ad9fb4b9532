"""Two models in the memory of one: a teacher on the student's weights, or one that comes and goes.

`without_adapters` makes the teacher of a LoRA student out of the student itself. `swapped` lets a
host put the teacher's weights in the student's place for the length of each call. `Borrowed` is a
second model that takes up device memory in the guided steps only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kdpp.kinds import (
    Denoiser,
    OwnCFG,
    Transparent,
    check_denoiser,
    check_inner,
    is_flow,
    trained_range,
)

__all__ = ["Borrowed", "Loans", "borrowed_in", "is_moved", "swapped", "without_adapters"]


def without_adapters(denoiser: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """The same denoiser with its LoRA adapters switched off: the student's base model, as teacher.

    Where an adapted layer of the student computes ``(W + s·BA) x``, the teacher computes ``W x``
    with the same W in memory::

        model = TeacherGuidedDenoiser(student, without_adapters(student))

    With ``names`` the other adapters stay: a speed LoRA is the student's alone, and a style LoRA is
    on both, if the teacher is ``without_adapters(student, ["speed"])``. It computes what a model
    does that never had the named ones.

    The adapters are off during the teacher's calls alone. After each call, also one that ends by an
    exception, every layer is as it was: adapters that were off stay off, several active ones stay
    active, and ``requires_grad`` is not touched. Student and teacher must not be called at the same
    time from two threads.

    The adapters are those of peft's layers anywhere inside ``denoiser`` (a PeftModel, diffusers'
    ``load_lora_weights`` or ``add_adapter``, peft's ``inject_adapter_in_model``; LoRA or another
    kind). They are looked up once: make the teacher after the adapters are loaded, and make it anew
    after others are. A student marked by `kdpp.OwnCFG` gives a teacher that is marked too.

    Args:
        denoiser: holds the adapters.
        names: of the adapters that are switched off. None: all.

    Raises:
        TypeError: ``denoiser`` is not an ``nn.Module``, or does its own CFG unmarked; ``names`` is
            one text.
        ValueError: it has no adapters, or none of a name; or they cannot be switched off, because
            they are merged into the weights (checked at every call, too) or were trained together
            with the base model's biases.

    Source: Hu et al. 2021, "LoRA", eq. (3).
    """
    if not isinstance(denoiser, nn.Module):
        raise TypeError(
            f"without_adapters takes an nn.Module, in whose layers the adapters are, not "
            f"{denoiser!r}"
        )
    check_denoiser(denoiser, "denoiser")
    if isinstance(names, str):
        raise TypeError(f"names is {names!r}; give a list of adapters' names")
    return _marked_as(denoiser, _WithoutAdapters(denoiser, names))


def swapped(denoiser: Denoiser, enter: Callable[[], Any], leave: Callable[[], Any]) -> nn.Module:
    """The same denoiser, whose weights a host puts in the student's place for each call.

    For hosts that hold one network for the student and the teacher (a LoRA on the one and not on
    the other, or one file loaded twice) and patch its weights for whoever is loaded. Every call is
    ``enter()``, the denoiser's call, ``leave()``::

        teacher = kdpp.swapped(teacher, enter=load_teacher, leave=load_student)

    ``leave`` follows every call, also one that ends by an exception or an interrupt, in ``enter``
    or in the network, so that the student finds its weights as they were.

    Args:
        denoiser: the teacher. One marked by `kdpp.OwnCFG`, as a `kdpp.HostModel` is, gives a
            teacher that is marked too.
        enter: a function without arguments that puts the teacher's weights in place.
        leave: one that puts the student's back, whether ``enter`` came to its end or not.

    Raises:
        TypeError: one of them is not callable, or ``denoiser`` does its own CFG unmarked.
    """
    check_denoiser(denoiser, "denoiser")
    for name, function in (("enter", enter), ("leave", leave)):
        if not callable(function):
            raise TypeError(f"{name} is {function!r}; it must be a function without arguments")
    return _marked_as(denoiser, _Swapped(denoiser, enter, leave))


class _Swapped(Transparent):
    """See `swapped`."""

    def __init__(
        self, denoiser: Denoiser, enter: Callable[[], Any], leave: Callable[[], Any]
    ) -> None:
        super().__init__()
        self.model, self.enter, self.leave = denoiser, enter, leave

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        try:
            self.enter()
            denoised: Tensor = self.model(x, sigma, **extra_args)
        finally:
            self.leave()
        return denoised


def _marked_as(denoiser: Any, wrapper: nn.Module) -> nn.Module:
    """The wrapper, marked by `OwnCFG` where the denoiser that it is around is."""
    if not isinstance(denoiser, OwnCFG):
        return wrapper
    marked = OwnCFG(wrapper, denoiser.uncond_denoised)
    marked.divisible = denoiser.divisible
    return marked


class _WithoutAdapters(Transparent):
    """See `without_adapters`."""

    def __init__(self, denoiser: nn.Module, names: Collection[str] | None) -> None:
        super().__init__()
        self.model = denoiser
        self._layers = _adapter_layers(denoiser)
        self._names = None if names is None else frozenset(names)
        if names is not None:
            _check_names(denoiser, names)

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        _refuse_merged(self._layers)
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self._layers]
        try:
            self._switch([self._reduced(*state) for state in before])
            denoised: Tensor = self.model(x, sigma, **extra_args)
        finally:
            self._switch(before)
        return denoised

    def _reduced(self, off: Any, active: Any) -> tuple[Any, Any]:
        """A layer's state without the named adapters."""
        if self._names is None:
            return True, active
        names = [active] if isinstance(active, str) else active
        left = [name for name in names if name not in self._names]
        return (off, left) if left else (True, active)

    def _switch(self, states: Sequence[tuple[Any, Any]]) -> None:
        # What peft's layers read. Their own methods also reset requires_grad, and nn.Module's way
        # to set an attribute is ten times slower; there may be 800 layers.
        for layer, (off, active) in zip(self._layers, states):
            object.__setattr__(layer, "_disable_adapters", off)
            object.__setattr__(layer, "_active_adapter", active)


def _check_names(denoiser: nn.Module, names: Collection[str]) -> None:
    """ValueError for a name that no adapter has."""
    configs = (getattr(module, "peft_config", None) for module in denoiser.modules())
    held = {name for config in configs if isinstance(config, dict) for name in config}
    for name in names:
        if name not in held:
            raise ValueError(f"there is no adapter {name!r}; there are {sorted(held)}")


def _adapter_layers(denoiser: nn.Module) -> list[nn.Module]:
    """peft's layers inside ``denoiser``; ValueError unless there are some that can be switched."""
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
            f"{type(denoiser).__name__} holds no adapters (layers of peft): load the LoRA before "
            "the teacher is made, and keep it apart from the weights"
        )
    _refuse_merged(layers)
    return layers


def _refuse_merged(layers: Sequence[nn.Module]) -> None:
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(
            "the adapters are merged into the weights and cannot be switched off; unmerge them "
            "first (peft's unmerge_adapter, diffusers' unfuse_lora)"
        )


class Borrowed(Transparent):
    """A teacher that is in device memory from the first guided step to the last, and not after.

    kdpp's samplers call `fetch` before the student's call of a run's first guided step and
    `release` after the teacher's last, or when the run ends by an exception. A call without
    `fetch` fetches, and the teacher then stays until `release`. The weights are not part of
    whatever holds this object: ``.to(device)`` of a `TeacherGuidedDenoiser` leaves them alone.

    A denoiser that does its own CFG is marked outside: ``kdpp.OwnCFG(Borrowed(model))``. A deep
    copy, and a pickled one, has weights of its own and starts outside the device's memory.

    Args:
        source: a denoiser on the CPU, an nn.Module. Its weights are copied to the device, on CUDA
            from pinned memory and on a stream of their own, while the student computes. The CPU
            keeps them, so nothing is copied back. On CUDA the module's weights are moved to pinned
            memory, where torch rounds each up to a power of two bytes. Quantised weights that are
            tensors of a class of their own, as torchao's are, are copied without overlap.
            Or a function without arguments that loads the denoiser to where it is used, for a host
            without room for both. It is called once in every run with guided steps. Loading draws
            nothing from the random stream that the sampler sees.
        like: with a function, an object that says what the denoiser will say of itself (``flow``,
            ``sigma_min``, ``sigma_max``, …), for it is asked before it is loaded; usually the
            student.
        device: with a module, where it is to compute; by default CUDA where there is one.

    Raises:
        TypeError: ``source`` is neither a module nor a function; ``like`` is missing, or an
            argument belongs to the other kind of source; and, when fetched, the function did not
            return a denoiser, or returned one that is marked by `kdpp.OwnCFG`.
        ValueError: the module is not on the CPU, or has weights that cannot be copied (those of
            bitsandbytes); there is no such device; and, when fetched, ``flow`` or the trained range
            of the loaded denoiser are not those of ``like``.
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
        if isinstance(source, nn.Module):
            if like is not None:
                raise TypeError(
                    "like goes with a function that loads; a module says itself what it is"
                )
            like = check_inner(source, "Borrowed")
            self._device = _device(device)
            _check_weights(source)
        elif callable(source):
            if like is None or device is not None:
                raise TypeError(
                    "a function that loads the denoiser needs like=, an object with the same flow, "
                    "sigma_min and sigma_max (usually the student), and takes no device: it loads "
                    "the denoiser to where it is used"
                )
        else:
            raise TypeError(
                f"Borrowed takes a denoiser on the CPU or a function that loads one, not {source!r}"
            )
        # Past nn.Module's bookkeeping: modules would become part of this one.
        self.__dict__ |= {"source": source, "like": like, "_here": []}
        self._pin()
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
        denoised: Tensor = self._here[0](x, sigma, **extra_args)
        return denoised

    def _bring(self) -> Denoiser:
        source: Any = self.source
        if not isinstance(source, nn.Module):
            return _load(source, self.like)
        return source if self._device.type == "cpu" else _Copy(source, self._device)

    def _pin(self) -> None:
        if isinstance(self.source, nn.Module) and self._device.type == "cuda":
            for weight in filter(_is_plain, _weights(self.source)):
                weight.data = weight.data.pin_memory()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_here": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pin()  # copied weights are not pinned


def borrowed_in(denoiser: Any) -> list[Borrowed]:
    """Every `Borrowed` inside a denoiser, itself included: what a run fetches and releases."""
    return [module for module in _modules(denoiser) if isinstance(module, Borrowed)]


class Loans:
    """What a run borrows: each `Borrowed` is here from the first step that asks it to the last.

    ``networks``: those that a step asks, by its number.
    """

    def __init__(self, networks: Mapping[int, Iterable[Any]]) -> None:
        self.first: dict[Borrowed, int] = {}
        self.last: dict[Borrowed, int] = {}
        inside: dict[int, list[Borrowed]] = {}  # a network has thousands of modules to look at
        for i, asked in networks.items():
            for network in asked:
                if id(network) not in inside:
                    inside[id(network)] = borrowed_in(network)
                for part in inside[id(network)]:
                    self.first.setdefault(part, i)
                    self.last[part] = i

    def fetch(self, step: int) -> None:
        """To be called before the work of a step, which it may overlap."""
        for part, i in self.first.items():
            if i == step:
                part.fetch()

    def release(self, step: int | None = None) -> None:
        """Let those go that are not needed after the step; None: all, also if a run broke off."""
        for part, i in self.last.items():
            if step is None or i == step:
                part.release()


def is_moved(denoiser: Any) -> bool:
    """Whether weights inside the denoiser come and go: `Borrowed` or `swapped` ones."""
    return any(isinstance(module, Borrowed | _Swapped) for module in _modules(denoiser))


def _modules(denoiser: Any) -> Iterable[nn.Module]:
    return denoiser.modules() if isinstance(denoiser, nn.Module) else ()


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


def _weights(module: nn.Module) -> list[Tensor]:
    return list(chain(module.parameters(), module.buffers()))


def _check_weights(module: nn.Module) -> None:
    """ValueError unless all weights are on the CPU and can be copied from there."""
    for weight in _weights(module):
        if weight.device.type != "cpu":
            raise ValueError(
                f"the denoiser lies on {weight.device}; Borrowed takes one on the CPU (call "
                ".cpu() first) and brings it to the device when it is needed"
            )
        if not (_is_plain(weight) or is_traceable_wrapper_subclass(weight)):
            raise ValueError(
                f"the denoiser holds weights of the class {type(weight).__name__}, which Borrowed "
                "cannot copy; leave it on the device, or give a function that loads it"
            )


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
    made, said = Trained.of(check_inner(denoiser, "Borrowed")), Trained.of(like)
    if not made.agrees(said):
        raise ValueError(
            f"the loaded denoiser is {made}, and like= said {said}: give an object with the loaded "
            "one's flow, sigma_min and sigma_max"
        )
    return denoiser


class Trained(NamedTuple):
    """What a denoiser says that it was trained as: a flow or a VE model, and on which levels."""

    flow: bool
    levels: tuple[float, float] | None

    @classmethod
    def of(cls, denoiser: Any) -> Trained:
        return cls(is_flow(denoiser), trained_range(denoiser))

    def agrees(self, other: Trained) -> bool:
        """Whether they are equal, but for levels rounded to 16 bits."""
        if self.flow != other.flow or self.levels is None or other.levels is None:
            return self == other
        return all(math.isclose(*pair, rel_tol=0.01) for pair in zip(self.levels, other.levels))

    def __str__(self) -> str:
        levels = "an unknown range" if self.levels is None else "[{:g}, {:g}]".format(*self.levels)
        return f"a {'flow' if self.flow else 'VE'} model trained on {levels}"


def _device(device: torch.device | str | None) -> torch.device:
    there = torch.cuda.is_available()
    wanted = torch.device(device if device is not None else "cuda" if there else "cpu")
    if wanted.type == "cuda" and not there:
        raise ValueError(f"device is {str(wanted)!r}, and torch finds no CUDA; give another one")
    return wanted


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter)
