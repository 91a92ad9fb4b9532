"""Four guided steps against five plain ones: the cost of the teacher's one look.

    python benchmarks/four_plus_one.py [--network sd15] [--pairs 30] [--json FILE]

Student and teacher are networks of one architecture with weights of their own: four convolutions,
or diffusers' UNet of Stable Diffusion 1.5's size (860 million random weights each, 16 bits). The
ratio of network evaluations (both halves of CFG counted) is what the time would be if the sampler
cost nothing; the paper measured 1.987 s against 1.996 s. Times are medians of paired ratios.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import kdpp
from measure import about, heading, median_ratio, time_pairs, write

SHAPE = (1, 4, 64, 64)
CHANNELS = 48
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLERS = ("lcm", "euler")
# (student's CFG scale, teacher's): without, the teacher's alone, both.
GUIDED = ((1.0, 1.0), (1.0, 7.5), (2.0, 7.5))


class Network(nn.Module):
    """A stack of convolutions as a denoiser."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [4, CHANNELS, CHANNELS, CHANNELS, 4]
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes)]
        self.body = nn.Sequential(*[part for one in layers for part in (one, nn.SiLU())])

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """An estimate of no meaning, at the cost of one."""
        denoised: Tensor = self.body(x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt())
        return denoised


class StableDiffusion(nn.Module):
    """The same with a UNet of Stable Diffusion 1.5's sizes; cond is its text (B, 77, 768)."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.body = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        """An estimate of no meaning, at the cost of one."""
        x = x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
        denoised: Tensor = self.body(x, sigma, cond, return_dict=False)[0]
        return denoised


class Counted(nn.Module):
    """Counts the rows that a network is called with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.rows = network, 0

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        self.rows += len(x)
        denoised: Tensor = self.network(x, sigma, cond)
        return denoised


def pair(network: str) -> tuple[Counted, Counted, Tensor]:
    """Student, teacher and a condition of theirs."""
    with torch.device(DEVICE):
        if network == "sd15":
            nets: list[nn.Module] = [StableDiffusion().bfloat16() for _ in range(2)]
            cond = torch.randn(SHAPE[0], 77, 768, dtype=torch.bfloat16)
        else:
            nets, cond = [Network() for _ in range(2)], torch.zeros(SHAPE[0], 1)
    student, teacher = (Counted(net.eval().requires_grad_(False)) for net in nets)
    return student, teacher, cond


def measure(
    networks: tuple[Counted, Counted, Tensor], name: str, scales: tuple[float, float], pairs: int
) -> dict[str, Any]:
    """One row: 4 + 1 against 5 of one sampler."""
    student, teacher, cond = networks
    sample = getattr(kdpp, f"sample_{name}_tg")
    x = torch.randn(SHAPE, device=DEVICE, dtype=cond.dtype)
    extra_args = {"cond": cond, "uncond": cond, "cond_scale": scales[0]}

    def run(steps: int, k: int) -> int:
        """The rows that both networks were called with."""
        student.rows = teacher.rows = 0
        sigmas = torch.cat([torch.linspace(14.6, 0.5, steps), torch.zeros(1)])
        model = kdpp.TeacherGuidedDenoiser(
            student, teacher, teacher_steps=k, teacher_cfg_scale=scales[1]
        )
        sample(model, x * 14.6, sigmas, extra_args, disable=True)
        return student.rows + teacher.rows

    runs = {"4 + 1": partial(run, 4, 1), "5": partial(run, 5, 0)}
    evaluations = run(4, 1) / run(5, 0)
    seconds = time_pairs(runs, pairs)
    ratio = median_ratio(seconds["4 + 1"], seconds["5"])
    return {
        "solver": name, "student CFG": scales[0] != 1.0, "teacher CFG": scales[1] != 1.0,
        "evaluations": evaluations, "time": ratio, "time / evaluations": ratio / evaluations,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=("convolutions", "sd15"), default="convolutions")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(name, scales) for scales in GUIDED for name in SAMPLERS]
    networks = pair(settings.network)
    rows = [measure(networks, *cell, settings.pairs) for cell in tqdm(cells, desc="measuring")]
    print(heading(about()))
    print(f"network: {settings.network}; latent {'×'.join(map(str, SHAPE))}")
    print("4 steps with one guided, over 5 steps")
    print(f"{'solver':18} {'CFG of':>18} {'evaluations':>12} {'time':>7}"
          f" {'time / evaluations':>19}")  # fmt: skip
    for row in rows:
        who = [name for name in ("student", "teacher") if row[f"{name} CFG"]]
        print(f"{row['solver']:18} {' + '.join(who) or 'none':>18} {row['evaluations']:>12.2f}"
              f" {row['time']:>7.3f} {row['time / evaluations']:>19.3f}")  # fmt: skip
    write(settings.json, rows)


if __name__ == "__main__":
    main()
