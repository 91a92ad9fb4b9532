"""Several processes, started by `accelerate launch` or `torchrun`.

Training joins them with torch (`joined`, `rank`, `size`, `average`). Measuring does not: it shares
its work through files (`share`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, distributed

__all__ = [
    "average",
    "cores",
    "device",
    "joined",
    "rank",
    "share",
    "single_thread",
    "size",
    "threads",
]


def share() -> tuple[int, int]:
    """(this process's number, how many were started), as the launcher says in RANK and WORLD_SIZE.

    Nothing is joined: for work that is shared through files.
    """
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of the joined processes this is; 0 is the main one, which alone writes."""
    return distributed.get_rank() if _running() else 0


def size() -> int:
    """How many processes are joined."""
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
    """The device "cpu", "mps" or this process's own of "cuda", which is AMD's, too.

    ValueError for others, or where torch does not find it.
    """
    found = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name not in found:
        raise ValueError(f"the device is {name!r}; it must be one of {', '.join(found)}")
    if not found[name]:
        raise ValueError(f"the device is {name!r}, and torch finds none here; take --device cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", number) if name == "cuda" else torch.device(name)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that were started together, if there are several, for the block."""
    if share()[1] == 1 or _running():
        yield
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def threads(wanted: int) -> Iterator[None]:
    """So many threads for torch, whose bits on the CPU depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def single_thread() -> AbstractContextManager[None]:
    """One thread for torch, of which small networks gain none, for the same bits everywhere."""
    return threads(1)


def cores() -> int:
    """How many cores the machine has, whatever a launcher says in OMP_NUM_THREADS."""
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _running() -> bool:
    return distributed.is_available() and distributed.is_initialized()
