"""What kdpp.lab's `draw` costs beside bare sampling: a kdpp call on the same batches.

    python benchmarks/harness_cost.py [--images 5000] [--pairs 15] [--json FILE]

Bare are two loops. "same noise" makes the same images by hand: every image's noise from its own
seed. "torch.randn" samples from torch's own stream, so that no image has a seed: what seeds of
their own cost. Last comes how long all metrics of as many digits take. Times are CPU seconds on one
thread; ratios are medians over pairs run in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import kdpp
from kdpp.lab.data import load_data
from kdpp.lab.features import load_features
from kdpp.lab.metrics import Points, measure
from kdpp.lab.models import load_model
from kdpp.lab.processes import single_thread
from kdpp.lab.sampling import Batches, Recipe, draw, image_seeds
from kdpp.noise import SeededNoise

CHUNK = 500


def recipes() -> dict[str, Recipe]:
    """The shipped student alone and guided, and the shipped teacher."""
    student, teacher = load_model("digits:student"), load_model("digits:teacher")
    levels = student.levels_for(4)
    guidance = {"teacher_scale": 0.5, "teacher_cfg_scale": 2.0}
    return {
        "student, 4 steps": Recipe(student, None, "lcm", levels),
        "student + teacher": Recipe(student, teacher, "lcm", levels, guidance=guidance),
        "teacher, 4 steps": Recipe(teacher, None, "euler", teacher.levels_for(4), cond_scale=2.0),
    }


def bare(recipe: Recipe, count: int, chunk: int, seeded: bool) -> torch.Tensor:
    """The images by plain calls of the sampler."""
    sigmas = torch.tensor(recipe.levels)
    sample, stochastic = recipe.solver.sample, recipe.solver.stochastic
    teacher = recipe.teacher.denoiser if recipe.teacher else None
    images = []
    for start in range(0, count, chunk):
        seeds = torch.arange(start, min(start + chunk, count))
        like = torch.empty(len(seeds), *recipe.student.shape)
        noise, renoise, options = torch.randn_like(like), None, {}
        if seeded:
            noise, renoise = SeededNoise(like, seeds)(), SeededNoise(like, seeds, 2)
            if stochastic:
                options["noise_sampler"] = SeededNoise(like, seeds, 1)
        model = kdpp.TeacherGuidedDenoiser(
            recipe.student.denoiser, teacher or recipe.student.denoiser,
            renoise_noise_sampler=renoise, **(recipe.guidance or {"teacher_steps": 0}),
        )  # fmt: skip
        labels = seeds % recipe.student.classes
        extra_args = {
            "cond": labels,
            "uncond": torch.full_like(labels, recipe.student.classes),
            "cond_scale": recipe.cond_scale,
        }
        images.append(sample(model, sigmas[0] * noise, sigmas, extra_args, disable=True, **options))
    return torch.cat(images)


def harness_cost(recipe: Recipe, count: int, pairs: int) -> dict[str, float]:
    """Extra time of `draw`, as a share of each bare loop's, and seconds of `draw`."""
    with tempfile.TemporaryDirectory() as folder, single_thread():
        numbers = iter(range(pairs + 1))
        seeds = image_seeds(0, count)

        def kept() -> None:
            batches = Batches(recipe, seeds, None, CHUNK, Path(folder) / str(next(numbers)))
            batches.make(range(len(batches)))
            batches.flush()

        runs: dict[str, Callable[[], Any]] = {
            "draw": lambda: draw(recipe, seeds, chunk=CHUNK),
            "draw, kept": kept,
            "same noise": lambda: bare(recipe, count, CHUNK, seeded=True),
            "torch.randn": lambda: bare(recipe, count, CHUNK, seeded=False),
        }
        assert torch.equal(runs["draw"]().x, runs["same noise"]())
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(pairs):
            for name, run in runs.items():
                start = time.process_time()
                run()
                seconds[name].append(time.process_time() - start)

    def extra(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[base])) - 1.0

    return {
        "seconds": statistics.median(seconds["draw"]),
        "over same noise": extra("draw", "same noise"),
        "over torch.randn": extra("draw", "torch.randn"),
        "kept in a folder, over same noise": extra("draw, kept", "same noise"),
    }


def metrics_seconds(recipe: Recipe, count: int) -> float:
    """Of all metrics of so many images, against the digits and a teacher's samples."""
    data = load_data("digits")
    features = load_features("digits", data.images, data.classes)
    points, images = Points(features(data.images)), draw(recipe, image_seeds(0, count))
    seconds = []
    for _ in range(3):
        teacher = Points(features(images.x * 0.9))
        teacher.kernel  # noqa: B018  computed once for many sets of images, as the data's is
        start = time.process_time()
        measure(images.x, images.labels, features, points, teacher)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    settings = parser.parse_args()
    rows = {
        name: harness_cost(recipe, settings.images, settings.pairs)
        for name, recipe in tqdm(recipes().items(), desc="measuring")
    }
    print(f"torch {torch.__version__}, {platform.machine()} CPU, one thread; "
          f"{settings.images} images, {settings.pairs} pairs")  # fmt: skip
    for name, row in rows.items():
        print(name)
        for what, value in row.items():
            print(f"    {what:36} {f'{value:.3f} s' if what == 'seconds' else f'{value:+.1%}'}")
    metrics = metrics_seconds(next(iter(recipes().values())), settings.images)
    print(f"all metrics\n    {'seconds':36} {metrics:.3f} s")
    if settings.json:
        about = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rows": rows,
            "metrics": metrics,
        }
        settings.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
