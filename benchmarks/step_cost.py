"""What a step costs beside the network: kernels, host reads and time, against k-diffusion.

    python benchmarks/step_cost.py [--pairs 30] [--json FILE]

The network is the identity, so that everything counted is the sampler's own. Times are medians of
ratios over pairs run in turn; on a shared machine trust nothing finer than a tenth. diffusers is
measured where it is installed: its scheduler of the same solver runs in the same rounds.
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import kdpp
from measure import Count, about, heading, identity, median_ratio, time_pairs, write

STEPS = {(1, 4, 8, 8): 20, (4, 4, 64, 64): 20, (8, 16, 128, 128): 4}
"""Shapes, and how many steps a timed run on them takes."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIFFUSERS = {
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


def count(run: Callable[[int], object], size: int) -> dict[str, float]:
    """Kernels of one step: the difference of a long and a short run, per step."""
    totals = []
    for steps in (20, 40):
        with Count(size) as counted:
            run(steps)
        totals.append(counted)
    short, long = totals
    kinds = ("latent", "small", "draws", "reads")
    return {kind: (getattr(long, kind) - getattr(short, kind)) / 20 for kind in kinds}


def diffusers_run(name: str, x: torch.Tensor) -> Callable[[int], object] | None:
    """scale_model_input and step of diffusers' scheduler, or None without diffusers."""
    try:
        import diffusers
    except ImportError:
        return None
    if name not in DIFFUSERS:
        return None
    make = getattr(diffusers, DIFFUSERS[name])
    scheduler = make(use_karras_sigmas=True) if "Ancestral" not in make.__name__ else make()

    def run(steps: int) -> object:
        scheduler.set_timesteps(steps)
        sample = x
        for t in scheduler.timesteps:
            model_input = scheduler.scale_model_input(sample, t)
            sample = scheduler.step(model_input, t, sample).prev_sample
        return sample

    return run


def measure(name: str, shape: tuple[int, ...], pairs: int) -> dict[str, Any]:
    """One row: the sampler `name` in kdpp, k-diffusion and, where it has it, diffusers."""
    sampling = kdpp.kdiffusion.sampling
    x = torch.randn(shape, device=DEVICE) * 14.6
    wrapped = kdpp.TeacherGuidedDenoiser(identity, identity, teacher_steps=0)
    ours, theirs = getattr(kdpp, f"sample_{name}_tg"), getattr(sampling, f"sample_{name}")

    @cache
    def sigmas(steps: int) -> torch.Tensor:
        return sampling.get_sigmas_karras(steps, 0.0292, 14.6146, device=DEVICE)

    # Plain noise for the SDE solvers, whose default tree would outweigh everything else.
    tree = "noise_sampler" in inspect.signature(theirs).parameters
    options = {"noise_sampler": lambda *_: torch.randn_like(x)} if tree else {}
    runs = {
        "kdpp": lambda steps: ours(wrapped, x, sigmas(steps), disable=True, **options),
        "k-diffusion": lambda steps: theirs(identity, x, sigmas(steps), disable=True, **options),
    }
    counts = {library: count(run, x.numel()) for library, run in runs.items()}
    diffusers = diffusers_run(name, x)
    if diffusers:
        runs["diffusers"] = diffusers
    steps = STEPS[shape]
    number = 10 if x.numel() < 10_000 else 1
    seconds = time_pairs({key: partial(run, steps) for key, run in runs.items()}, pairs, number)
    others = [key for key in seconds if key != "kdpp"]
    ratios = {key: median_ratio(seconds["kdpp"], seconds[key]) for key in others}
    return {"solver": name, "shape": shape, "steps": steps, "counts": counts, "time_ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")  # k-diffusion's dependencies, at import
    torch.set_num_threads(1)
    names = list(kdpp.SOLVERS)
    names.remove("dpm_fast")  # it makes its own steps
    names = [n for n in names if hasattr(kdpp.kdiffusion.sampling, f"sample_{n}")]
    cells = [(name, shape) for shape in STEPS for name in names]
    rows = [measure(*cell, settings.pairs) for cell in tqdm(cells, desc="measuring")]
    print(heading(about()))
    print("counts are per step, k-diffusion's in brackets; times are medians of paired ratios")
    print(f"{'solver':20} {'latent':>14} {'kernels':>10} {'small':>12} {'host reads':>12}"
          f" {'time / k-diffusion':>20} {'/ diffusers':>12}")  # fmt: skip
    for row in rows:
        a, b = row["counts"]["kdpp"], row["counts"]["k-diffusion"]
        pairs = [f"{a[k]:.1f} ({b[k]:.1f})" for k in ("latent", "small", "reads")]
        ratio = row["time_ratio"]
        other = f"{ratio['diffusers']:.2f}" if "diffusers" in ratio else "-"
        shape = "×".join(map(str, row["shape"]))
        print(f"{row['solver']:20} {shape:>14} {pairs[0]:>10} {pairs[1]:>12} {pairs[2]:>12}"
              f" {ratio['k-diffusion']:>20.2f} {other:>12}")  # fmt: skip
    write(settings.json, rows)


if __name__ == "__main__":
    main()
