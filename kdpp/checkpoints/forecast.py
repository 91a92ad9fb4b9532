"""What a run needs of its device's memory, known from headers before any weight is read.

Weights alone are counted. What the networks compute with (activations) comes on top: it grows with
the size of the pictures and the batch, and depends on how torch's kernels work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import get_args

import torch

from kdpp.checkpoints.files import part_numbers
from kdpp.checkpoints.requests import Offload, Request

__all__ = ["forecast", "free_memory", "needed"]

GIB = 2**30


def forecast(request: Request, device: torch.device, offload: Offload) -> str:
    """A line: the weights that are in the device's memory at once, and what is free there.

    Raises ValueError if they do not fit, with the flags that would make them, and what `inspect`
    raises.
    """
    sizes = weight_bytes(request)
    need, free = needed(sizes, device, offload), free_memory(device)
    parts = ", ".join(f"{part} {_gib(size)}" for part, size in sizes.items())
    said = f"{_gib(need)} GiB of weights at once on {device} ({parts})"
    if free is None:
        return f"{said}, plus activations"
    if need <= free:
        return f"{said}, plus activations; {_gib(free)} GiB are free"
    for words, other, way in _smaller(request, device, offload):
        less = needed(weight_bytes(other), device, way)
        if less <= free:
            raise ValueError(
                f"{said} do not fit into the {_gib(free)} GiB that are free; {words} needs "
                f"{_gib(less)} GiB"
            )
    raise ValueError(
        f"{said} do not fit into the {_gib(free)} GiB that are free, and no flag makes them"
    )


def weight_bytes(request: Request) -> dict[str, int]:
    """The bytes of the weights of student, teacher, LoRAs, text encoders and VAE, in its dtype."""
    numbers = {"text encoders": 0, "VAE": 0}
    for path in (request.components, request.student):
        for part, count in (part_numbers(path) if path else {}).items():
            numbers[part] = max(count, numbers.get(part, 0))  # a file holds one of two experts
    found = {"student": numbers.pop("network", 0)}
    if request.teacher:
        found["teacher"] = part_numbers(request.teacher).get("network", 0)
    if request.loras:
        found["LoRAs"] = sum(part_numbers(path)["network"] for path, _, _ in request.loras)
    if request.vae:
        numbers["VAE"] = sum(part_numbers(request.vae).values())
    size = torch.empty(0, dtype=getattr(torch, request.dtype)).element_size()
    return {part: size * count for part, count in {**found, **numbers}.items()}


def needed(sizes: dict[str, int], device: torch.device, offload: Offload) -> int:
    """The most bytes of weights at once on the device, or, for the CPU, in memory.

    On another device the text encoders are gone before the networks come. ``sequential`` has one
    layer there, which is taken for a twentieth of the largest part.
    """
    if device.type == "cpu":
        return sum(sizes.values())
    student = sizes["student"] + sizes.get("LoRAs", 0)
    apart = [student, sizes.get("teacher", 0), sizes["VAE"], sizes["text encoders"]]
    if offload in ("none", "teacher"):
        return max(sum(apart[:3]), apart[3])
    return max(apart) if offload == "model" else max(apart) // 20


def _smaller(
    request: Request, device: torch.device, offload: Offload
) -> Iterator[tuple[str, Request, Offload]]:
    """Flags that need less, those that cost the least time first: words, request, offload."""
    half = replace(request, dtype="float16")
    ways: tuple[Offload, ...] = get_args(Offload)
    for way in (offload, *(ways[ways.index(offload) + 1 :] if device.type != "cpu" else ())):
        flag = f"--offload {way}" if way != offload else ""
        if flag:
            yield flag, request, way
        if request.dtype == "float32":
            yield f"--dtype float16 {flag}".strip(), half, way


def free_memory(device: torch.device) -> int | None:
    """The bytes that are free on the device; None where nothing tells.

    On the CPU, and on Apple's devices, which share its memory: what can be had without swapping,
    and the free swap space.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(ImportError):
        import psutil

        return int(psutil.virtual_memory().available + psutil.swap_memory().free)
    return None


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
