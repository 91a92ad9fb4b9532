"""A whole run as one piece, against the same run step by step.

    python benchmarks/capture_cost.py [--pairs 30] [--json FILE]

A small convolutional student and teacher, 4 steps, one guided. "compile" is torch.compile of the
whole loop with its networks; "graph" one CUDA graph, left out without CUDA. Times are medians of
paired ratios, recording and compiling left out; below 1 is faster than step by step.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import kdpp
from four_plus_one import DEVICE, Network
from measure import about, heading, median_ratio, time_pairs, write

SHAPES = ((1, 4, 8, 8), (2, 4, 64, 64))
SAMPLERS = ("euler", "lcm", "dpmpp_2m")


def measure(name: str, shape: tuple[int, ...], pairs: int) -> dict[str, Any]:
    """One row: each way of capturing over the plain run."""
    student, teacher = (Network().to(DEVICE).eval().requires_grad_(False) for _ in range(2))
    model = kdpp.TeacherGuidedDenoiser(student, teacher, teacher_cfg_scale=1.0)
    sample = getattr(kdpp, f"sample_{name}_tg")
    x = torch.randn(shape, device=DEVICE) * 14.6
    sigmas = torch.tensor([14.6, 4.0, 1.5, 0.5, 0.0])
    modes = ["compile", "graph"] if DEVICE == "cuda" else ["compile"]
    runs = {"plain": partial(sample, model, x, sigmas, disable=True)}
    for mode in modes:
        runs[mode] = partial(kdpp.capture(sample, model, x, sigmas, mode=mode), x)
    seconds = time_pairs(runs, pairs)
    ratios = {mode: median_ratio(seconds[mode], seconds["plain"]) for mode in modes}
    return {"solver": name, "shape": shape, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(name, shape) for shape in SHAPES for name in SAMPLERS]
    rows = [measure(*cell, settings.pairs) for cell in tqdm(cells, desc="measuring")]
    print(heading(about()))
    print("time over the plain run's" + ("" if DEVICE == "cuda" else "; graph: no CUDA device"))
    print(f"{'solver':18} {'latent':>14} {'compile':>8} {'graph':>8}")
    for row in rows:
        shape = "×".join(map(str, row["shape"]))
        graph = f"{row['graph']:.2f}" if "graph" in row else "-"
        print(f"{row['solver']:18} {shape:>14} {row['compile']:>8.2f} {graph:>8}")
    write(settings.json, rows)


if __name__ == "__main__":
    main()
