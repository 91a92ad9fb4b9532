"""What noise costs: draws, kernels and time of kdpp's sources, of plain noise and k-diffusion's.

    python benchmarks/noise_cost.py [--pairs 15] [--json FILE]

First table: the noise of one run of an SDE solver over 20 Karras steps, source made and asked as
the solver asks, without solver and network. Second: 16 draws with a seed for each sample. Times are
CPU times of one thread, medians over pairs run in turn, each over the plain ``torch.randn`` of its
own round; on a shared machine trust nothing finer than a tenth.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import kdpp
from kdpp.noise import BrownianNoise, SeededNoise
from measure import Count, about, heading, identity, median_ratio, write

STEPS = 20
SOLVERS = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
RUN_SHAPES = ((4, 4, 64, 64), (1, 4, 8, 8))
DRAW_SHAPES = ((5000, 1, 8, 8), (4, 4, 64, 64), (1, 4, 8, 8))
PLAIN = "plain randn"
Query = tuple[float, float]


def queries(solver: str, sigmas: torch.Tensor) -> list[Query]:
    """The levels that kdpp's solver asks noise for in a run over ``sigmas``."""
    x = torch.zeros(1, 1, dtype=sigmas.dtype)
    asked: list[Query] = []

    def record(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        asked.append((float(sigma), float(sigma_next)))
        return torch.zeros_like(x)

    model = kdpp.TeacherGuidedDenoiser(identity, identity, teacher_steps=0)
    sample = getattr(kdpp, f"sample_{solver}_tg")
    sample(model, x, sigmas, disable=True, noise_sampler=record)
    return asked


def count(run: Callable[[], object], asked: int) -> dict[str, float]:
    """Draws of one query, and other kernels."""
    with Count(0) as counted:
        run()
    return {"draws": counted.draws / asked, "kernels": counted.latent / asked}


def time_ratios(runs: dict[str, Callable[[], object]], pairs: int) -> dict[str, float]:
    """Median CPU time of each over `PLAIN`'s in the same round, all of them in turn.

    The runs differ a thousandfold in length: by the clock, only the long ones would pay for what
    else the machine does.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(pairs + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if round_:
                seconds[name].append(time.process_time() - start)
    return {name: median_ratio(values, seconds[PLAIN]) for name, values in seconds.items()}


def measure(solver: str, shape: tuple[int, ...], pairs: int) -> dict[str, Any]:
    """One row of the first table."""
    sampling = kdpp.kdiffusion.sampling
    x = torch.zeros(shape)
    sigmas = sampling.get_sigmas_karras(STEPS, 0.0292, 14.6146)
    low, high = float(sigmas[-2]), float(sigmas[0])
    asked = queries(solver, sigmas)
    tensors = [(torch.tensor(a), torch.tensor(b)) for a, b in asked]

    def plain() -> None:
        for _ in asked:
            torch.randn_like(x)

    def path(seed: Any) -> None:
        noise = BrownianNoise(x, low, high, seed)
        for query in asked:
            noise.between(*query)

    def tree(seed: Any) -> None:
        noise = sampling.BrownianTreeNoiseSampler(x, low, high, seed)
        for query in tensors:
            noise(*query)

    seeds = list(range(len(x)))
    runs: dict[str, Callable[[], object]] = {
        PLAIN: plain,
        "BrownianNoise": lambda: path(1),
        "BrownianNoise, seeds": lambda: path(seeds),
        "k-diffusion's tree": lambda: tree(1),
        "k-diffusion's tree, seeds": lambda: tree(seeds),
    }
    counts = {name: count(run, len(asked)) for name, run in runs.items()}
    ratios = time_ratios(runs, pairs)
    return {
        "solver": solver, "shape": shape, "queries": len(asked), "counts": counts,
        "time_ratio": ratios,
    }  # fmt: skip


def measure_seeds(shape: tuple[int, ...], pairs: int) -> dict[str, Any]:
    """One row of the second table."""
    x = torch.zeros(shape)
    noise = SeededNoise(x, range(len(x)))
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(x))]
    draws: dict[str, Callable[[], object]] = {
        PLAIN: lambda: torch.randn_like(x),
        "SeededNoise": noise,
        "a generator each": lambda: torch.stack(
            [torch.randn(shape[1:], generator=one) for one in generators]
        ),
    }
    # SeededNoise makes up to 16 draws at once.
    runs = {name: lambda draw=draw: [draw() for _ in range(16)] for name, draw in draws.items()}
    return {"shape": shape, "time_ratio": time_ratios(runs, pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")  # k-diffusion's dependencies, at import; its tree, at its ends
    torch.set_num_threads(1)
    torch.zeros(2**22)  # as a network would, or glibc hands memory back to the system at every draw
    cells = [(solver, shape) for shape in RUN_SHAPES for solver in SOLVERS]
    runs = [measure(*cell, settings.pairs) for cell in tqdm(cells, desc="runs")]
    draws = [measure_seeds(shape, settings.pairs) for shape in tqdm(DRAW_SHAPES, desc="draws")]
    print(heading(about()))
    print(f"noise of {STEPS} Karras steps; randn and other kernels per query")
    print(f"{'solver':14} {'latent':>10} {'queries':>8}  {'source':26} {'randn':>6} {'kernels':>8}"
          f" {'time / plain':>13}")  # fmt: skip
    for row in runs:
        shape = "×".join(map(str, row["shape"]))
        for name, counts in row["counts"].items():
            print(f"{row['solver']:14} {shape:>10} {row['queries']:>8}  {name:26}"
                  f" {counts['draws']:>6.1f} {counts['kernels']:>8.1f}"
                  f" {row['time_ratio'][name]:>13.2f}")  # fmt: skip
    print("\n16 draws, a seed for each sample")
    print(f"{'latent':>12}  {'source':18} {'time / plain':>13}")
    for row in draws:
        shape = "×".join(map(str, row["shape"]))
        for name, ratio in row["time_ratio"].items():
            print(f"{shape:>12}  {name:18} {ratio:>13.2f}")
    write(settings.json, {"runs": runs, "draws": draws})


if __name__ == "__main__":
    main()
