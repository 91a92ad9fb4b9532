"""Several processes as one: started by `accelerate launch` or `torchrun`, joined by torch."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

__all__ = ["average", "device", "join", "joined", "rank", "single_thread", "size"]


def rank() -> int:
    """Which process this is; 0 is the main one, which alone writes."""
    return distributed.get_rank() if _running() else 0


def size() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if _running() else 1


def average(tensors: Iterable[Tensor]) -> None:
    """Put the mean over all processes into every tensor, in one exchange."""
    tensors = list(tensors)
    if size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    parts = torch.split(flat.div_(size()), [tensor.numel() for tensor in tensors])
    with torch.no_grad():
        for tensor, part in zip(tensors, parts):
            tensor.copy_(part.view_as(tensor))


def device(name: str) -> torch.device:
    """The device "cpu", or this process's own of "cuda"; ValueError for others, or without CUDA."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"the device is {name!r}; it must be 'cpu' or 'cuda'")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("the device is 'cuda', and torch finds none here; take --device cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def join(device: torch.device) -> bool:
    """Join the other processes, if the environment (RANK, WORLD_SIZE, …) says there are some.

    Says whether it joined now. For good, until the process ends: torch finds the addresses of the
    last group where it looks for the next, so that a group for each call would not do.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _running():
        return False
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(_leave)
    return True


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """`join` for the block."""
    now = join(device)
    try:
        yield
    finally:
        if now:
            _leave()


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for torch: its bits depend on how many there are, and small networks gain none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _leave() -> None:
    if _running():
        distributed.destroy_process_group()


def _running() -> bool:
    return distributed.is_available() and distributed.is_initialized()
