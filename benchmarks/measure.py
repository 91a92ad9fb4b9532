"""What the benchmarks share: counting kernels, timing in pairs, saying where a figure was taken."""

from __future__ import annotations

import json
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = (
    "view", "expand", "select", "unbind", "detach", "alias", "unsqueeze", "slice", "split", "chunk",
    "reshape", "permute", "transpose", "t",
)  # fmt: skip


class Count(TorchDispatchMode):
    """Counts kernels that write a latent, other kernels, draws, and reads back to the host.

    ``peak`` is the most bytes that were alive at once of all that was made inside.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.latent = self.small = self.draws = self.reads = 0
        self.alive = self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.reads += 1
        elif name.startswith(("randn", "normal")):
            self.draws += 1
            self._made(result)
        elif name not in VIEWS:
            large = isinstance(result, torch.Tensor) and result.numel() >= self.size
            self.latent += large
            self.small += not large
            self._made(result)
        return result

    def _made(self, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            size = result.numel() * result.element_size()
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(result, self._gone, size)

    def _gone(self, size: int) -> None:
        self.alive -= size


def identity(x: torch.Tensor, sigma: torch.Tensor, **extra_args: Any) -> torch.Tensor:
    """A network that does nothing, so that what is measured is the sampler's own."""
    return x


def time_pairs(
    runs: Mapping[str, Callable[[], object]], pairs: int, number: int = 1
) -> dict[str, list[float]]:
    """Seconds of every run, all of them in turn in every round, after a round to warm up.

    Each is run ``number`` times at a stretch: short ones would measure the caches' warming up.
    On a CPU its own time, of one thread: what else runs on the machine is left out.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(pairs + 1):
        for name, run in runs.items():
            start = clock()
            for _ in range(number):
                run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                seconds[name].append((clock() - start) / number)
    return seconds


def median_ratio(seconds: list[float], base: list[float]) -> float:
    """The median over rounds of one time over another of the same round."""
    return statistics.median(a / b for a, b in zip(seconds, base))


def about() -> dict[str, Any]:
    """Where and with what a figure was taken."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "date": date.today().isoformat(),
        "device": f"{device} {'GPU' if torch.cuda.is_available() else 'CPU'}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def heading(about: Mapping[str, Any]) -> str:
    """One line that says the same."""
    return (
        f"{about['date']}; torch {about['torch']}, Python {about['python']}, {about['device']}, "
        f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    )


def write(path: Path | None, rows: Any) -> None:
    """The figures as JSON, with where they were taken, if a path is given."""
    if path is not None:
        path.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n", "utf-8")
