"""Time and memory of the sampler itself as latents, batches and runs grow.

    python benchmarks/size_cost.py [--pairs 20] [--json FILE] [--plot FILE.png]

The network does nothing. Time is the median of a run; memory the most bytes alive at once of what a
run makes, over the latent's own. Where cost is linear, the slope between the largest sizes of the
double-logarithmic plot is 1 (0 for memory over the latent's bytes).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import kdpp
from measure import Count, about, heading, identity, time_pairs, write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_3m_sde")
AXES: dict[str, Sequence[int]] = {
    "side": (8, 16, 32, 64, 128, 256),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "steps": (1, 3, 10, 30, 100, 300, 1000),
}
FIXED = {"side": 64, "batch": 1, "steps": 10}


def measure(name: str, axis: str, value: int, pairs: int) -> dict[str, Any]:
    """One point: a guided run of one sampler."""
    size = {**FIXED, axis: value}
    side = 8 if axis == "steps" else size["side"]
    x = torch.randn(size["batch"], 4, side, side, device=DEVICE) * 14.6
    sigmas = torch.cat([torch.linspace(14.6, 0.03, size["steps"]), torch.zeros(1)])
    model = kdpp.TeacherGuidedDenoiser(identity, identity, teacher_cfg_scale=1.0)
    sample = getattr(kdpp, f"sample_{name}_tg")
    options = {"noise_sampler": lambda *_: torch.randn_like(x)} if "sde" in name else {}
    run = partial(sample, model, x, sigmas, disable=True, **options)
    with Count(x.numel()) as counted:
        run()
    seconds = statistics.median(time_pairs({"run": run}, pairs)["run"])
    memory = counted.peak / (x.numel() * x.element_size())
    return {"solver": name, "axis": axis, "value": value, "seconds": seconds, "latents": memory}


def slope(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Of the logarithms, over the last three points."""
    first, last = rows[-3], rows[-1]
    cost = (last[key] / first[key]) if first[key] else 1.0
    amount = (last["value"] / first["value"]) ** (2 if last["axis"] == "side" else 1)
    return math.log(cost) / math.log(amount)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time against size, batch and steps, and the memory of each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, len(AXES), sharex="col")
    labels = {"side": "side of the latent", "batch": "batch", "steps": "steps"}
    for column, axis in enumerate(AXES):
        for name in SAMPLERS:
            points = [row for row in rows if row["axis"] == axis and row["solver"] == name]
            values = [row["value"] for row in points]
            base = points[0]["seconds"]
            relative = [row["seconds"] / base for row in points]
            axes[0, column].plot(values, relative, marker="o", markersize=3, label=name)
            latents = [row["latents"] for row in points]
            axes[1, column].plot(values, latents, marker="o", markersize=3, label=name)
        power = 2 if axis == "side" else 1
        last = max(row["value"] for row in rows if row["axis"] == axis)
        top = axes[0, column].get_ylim()[1] / 2
        line = [top * (value / last) ** power for value in AXES[axis][-4:]]
        axes[0, column].plot(AXES[axis][-4:], line, color="0.6", linestyle="--", label="linear")
        axes[0, column].set(xscale="log", yscale="log")
        axes[1, column].set(xscale="log", xlabel=labels[axis], ylim=(0, 12))
        for row in range(2):
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].set_ylabel("time of a run, over the smallest's")
    axes[1, 0].set_ylabel("memory, in latents")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(n, axis, v) for axis, values in AXES.items() for n in SAMPLERS for v in values]
    rows = [measure(*cell, settings.pairs) for cell in tqdm(cells, desc="measuring")]
    print(heading(about()))
    print("slopes of the logarithms over the three largest sizes: time 1 and memory 0 are linear")
    print(f"{'solver':18} {'against':>8} {'time':>6} {'memory / latent':>16} {'latents alive':>14}")
    for name in SAMPLERS:
        for axis in AXES:
            points = [row for row in rows if row["axis"] == axis and row["solver"] == name]
            print(f"{name:18} {axis:>8} {slope(points, 'seconds'):>6.2f}"
                  f" {slope(points, 'latents'):>16.2f} {points[-1]['latents']:>14.1f}")  # fmt: skip
    write(settings.json, rows)
    if settings.plot:
        plot(rows, settings.plot)


if __name__ == "__main__":
    main()
