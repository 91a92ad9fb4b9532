"""How far a run with 16-bit networks is from the same run in float64.

    python benchmarks/precision.py [--steps 100] [--json FILE]

The network is the exact denoiser of a mixture of Gaussians, computed in float64; what it is given
and what it answers is rounded to 16 bits. The error is the rms difference of the images over the
images' own rms, with the same start and the same noise: kdpp with its state in float32, kdpp with
its state in 16 bits, and k-diffusion with 16-bit latents and sigmas.
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import kdpp
from measure import about, heading, write

SAMPLES, SIZE, MODES = 256, 12, 4
DTYPES = (torch.bfloat16, torch.float16)


def denoiser(dtype: torch.dtype) -> Callable[..., Tensor]:
    """E[x0 | x] for unit-variance data in four clusters, spoken to in ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(MODES, SIZE, generator=generator, dtype=torch.float64)
    means *= 0.9**0.5 / means.square().mean().sqrt()
    variance = 0.1

    def denoise(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        given, level = x.double(), sigma.double()[:, None] ** 2
        distance = (given[:, None] - means).square().sum(-1)
        weights = (-distance / (2 * (variance + level))).softmax(1)
        answer = (variance * given + level * weights @ means) / (variance + level)
        return answer.to(dtype)

    return denoise


def errors(name: str, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """One row: relative rms errors of one sampler."""
    sampling = kdpp.kdiffusion.sampling
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2 * steps + 1, SAMPLES, SIZE, generator=generator, dtype=torch.float64)
    sigmas = sampling.get_sigmas_karras(steps, 0.0292, 14.6146).double()
    x = (noise[0] * sigmas[0]).to(dtype)
    ours, theirs = getattr(kdpp, f"sample_{name}_tg"), getattr(sampling, f"sample_{name}", None)

    def options(sample: Callable[..., Tensor], kind: torch.dtype) -> dict[str, Any]:
        drawn = iter(noise[1:])
        takes = "noise_sampler" in inspect.signature(sample).parameters
        return {"noise_sampler": lambda *_: next(drawn).to(kind)} if takes else {}

    def kdpp_run(kind: torch.dtype, state: bool, start: Tensor) -> Tensor:
        network = denoiser(kind)
        model = kdpp.TeacherGuidedDenoiser(network, network, teacher_steps=0, float32_state=state)
        noise_kind = torch.float32 if state and kind in DTYPES else kind
        return ours(model, start, sigmas, disable=True, **options(ours, noise_kind))

    exact = kdpp_run(torch.float64, True, x.double())
    scale = exact.square().mean().sqrt()

    def error(image: Tensor) -> float:
        return float((image.double() - exact).square().mean().sqrt() / scale)

    row = {
        "solver": name,
        "dtype": str(dtype).removeprefix("torch."),
        "float32 state": error(kdpp_run(dtype, True, x)),
        "16-bit state": error(kdpp_run(dtype, False, x)),
    }
    if theirs is not None:
        given = sigmas.to(dtype)
        try:
            image = theirs(denoiser(dtype), x, given, disable=True, **options(theirs, dtype))
        except TypeError:  # its LMS reads the sigmas into numpy, which has no bfloat16
            return row
        row["k-diffusion"] = error(image)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")  # k-diffusion's dependencies, at import
    torch.set_num_threads(1)
    names = list(kdpp.SOLVERS)
    names = [n for n in names if not n.endswith("cfg_pp") and n != "dpm_fast"]
    cells = [(name, dtype) for dtype in DTYPES for name in names]
    rows = [errors(*cell, settings.steps) for cell in tqdm(cells, desc="measuring")]
    print(heading(about()))
    print(f"relative rms error at {settings.steps} steps")
    print(f"{'solver':20} {'dtype':>9} {'float32 state':>14} {'16-bit state':>13}"
          f" {'k-diffusion':>12}")  # fmt: skip
    for row in rows:
        theirs = f"{row['k-diffusion']:.1e}" if "k-diffusion" in row else "-"
        print(f"{row['solver']:20} {row['dtype']:>9} {row['float32 state']:>14.1e}"
              f" {row['16-bit state']:>13.1e} {theirs:>12}")  # fmt: skip
    write(settings.json, rows)


if __name__ == "__main__":
    main()
