"""The sampling loop on a pipeline of diffusers, against the pipeline's own, at equal evaluations.

    python benchmarks/pipeline_cost.py [--pairs 20] [--json FILE]

The pipelines are the tests' (tests/tiny_pipelines.py): networks of a few milliseconds a call, so
that a loop's own work shows. Both get the prompt's embeddings and give latents after 8 Euler steps
of the student alone, without CFG. Times are medians of ratios over pairs run in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kdpp
from kdpp.checkpoints import pipelines
from measure import about, heading, median_ratio, time_pairs, write

sys.path.append(str(Path(__file__).parents[1] / "tests"))
FAMILIES = ("sd", "sdxl", "sd3", "flux")
STEPS, SIDE = 8, 32


def runs(pipe: Any) -> dict[str, Callable[[], object]]:
    """The pipeline's loop and kdpp's, from the same noise and embeddings."""
    noise = torch.randn(1, *pipelines.latent_shape(pipe, SIDE, SIDE))
    student, _, extra_args = pipelines.from_pipelines(pipe, None, "a boat", height=SIDE, width=SIDE)
    model = kdpp.TeacherGuidedDenoiser(student, student, teacher_steps=0)
    sigmas = pipelines.pipeline_sigmas(pipe, STEPS, SIDE, SIDE)
    cond = extra_args["cond"]
    pooled = cond.get("pooled_projections", cond.get("added_cond_kwargs", {}).get("text_embeds"))
    given = {"prompt_embeds": cond["encoder_hidden_states"], "guidance_scale": 1.0}
    if pooled is not None:
        given["pooled_prompt_embeds"] = pooled
    start = pipe._pack_latents(noise, *noise.shape) if hasattr(pipe, "_pack_latents") else noise

    def theirs() -> object:
        return pipe(
            height=SIDE, width=SIDE, num_inference_steps=STEPS, latents=start.clone(),
            output_type="latent", **given,
        )  # fmt: skip

    @torch.no_grad()
    def ours() -> object:
        return kdpp.sample_euler_tg(model, noise * sigmas[0], sigmas, extra_args, disable=True)

    return {"diffusers": theirs, "kdpp": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import tiny_pipelines

    print(heading(about()))
    print(f"{'pipeline':10}{'ms, diffusers':>15}{'ms, kdpp':>10}{'kdpp / diffusers':>18}")
    rows = []
    for family in FAMILIES:
        pipe = getattr(tiny_pipelines, family)()
        pipe.set_progress_bar_config(disable=True)
        seconds = time_pairs(runs(pipe), arguments.pairs)
        ratio = median_ratio(seconds["kdpp"], seconds["diffusers"])
        middle = [1e3 * statistics.median(seconds[name]) for name in ("diffusers", "kdpp")]
        print(f"{family:10}{middle[0]:15.1f}{middle[1]:10.1f}{ratio:18.2f}")
        rows.append({"pipeline": family, "milliseconds": middle, "ratio": ratio})
    write(arguments.json, rows)


if __name__ == "__main__":
    main()
