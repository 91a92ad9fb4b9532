"""The demo: what a teacher does for a real few-step student, measured and drawn.

Every run of one seed starts from the same noise and the same labels and draws the same solver
noise, so that rows compare in pairs; the images are measured clamped, as a viewer sees them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import kdpp
from kdpp import kdiffusion
from kdpp.digits.checkpoints import load_classifier, load_student, load_teacher
from kdpp.digits.data import CLASSES, NULL_CLASS, load_data
from kdpp.digits.metrics import Scores, features_of, measure
from kdpp.digits.networks import ResMLP
from kdpp.digits.schedules import schedule

SEEDS = 5
IMAGES = 1000
TEACHER_CFG = 2.0
"""This data's CFG scale; the paper's 7.5 is Stable Diffusion's and overshoots here."""
WEAK, STRONG = 0.1, 0.5
"""λ of the paper for students that follow a trajectory, and a stronger one."""


class Counted(torch.nn.Module):
    """A network's denoiser that counts how many images it has evaluated."""

    def __init__(self, network: ResMLP) -> None:
        super().__init__()
        self.denoiser = kdiffusion.external.CompVisDenoiser(network)
        self.images = 0

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        self.images += len(x)
        denoised: Tensor = self.denoiser(x, sigma, **extra_args)
        return denoised


@dataclass
class Row:
    """One way to sample, and what was measured of it: an entry for each seed."""

    name: str
    sample: Callable[..., Tensor]
    model: kdpp.TeacherGuidedDenoiser
    sigmas: Sequence[float]
    cond_scale: float = 1.0
    scores: list[Scores] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: tuple[float, float] = (0.0, 0.0)
    """Network evaluations an image takes, of the student and the teacher, CFG's halves counted."""

    def run(self, seed: int, count: int, callback: Any = None) -> tuple[Tensor, Tensor]:
        """(images, labels) of one seed: the digits 0-9 in turn."""
        torch.manual_seed(seed)
        labels = torch.arange(count) % CLASSES
        x = torch.randn(count, 1, 8, 8) * self.sigmas[0]
        extra_args = {
            "cond": labels,
            "uncond": torch.full_like(labels, NULL_CLASS),
            "cond_scale": self.cond_scale,
        }
        sigmas = torch.tensor(self.sigmas)
        images = self.sample(self.model, x, sigmas, extra_args, callback, disable=True)
        return images, labels


def build_rows(student: Counted, teacher: Counted) -> list[Row]:
    """The demo's rows; the first is what every other is compared with."""

    def plain(steps: int) -> Row:
        model = kdpp.TeacherGuidedDenoiser(student, teacher, teacher_steps=0)
        return Row(f"student, {steps} steps", kdpp.sample_lcm_tg, model, schedule(steps))

    def guided(name: str, helper: Counted, scale: float, cfg_scale: float) -> Row:
        model = kdpp.TeacherGuidedDenoiser(
            student, helper, teacher_scale=scale, teacher_cfg_scale=cfg_scale
        )
        return Row(f"  + {name}, λ = {scale}", kdpp.sample_lcm_tg, model, schedule(4))

    def alone(steps: int) -> Row:
        model = kdpp.TeacherGuidedDenoiser(teacher, teacher, teacher_steps=0)
        name = f"teacher, {steps} steps"
        return Row(name, kdpp.sample_euler_tg, model, schedule(steps), TEACHER_CFG)

    return [
        plain(4),
        guided("teacher", teacher, WEAK, TEACHER_CFG),
        guided("teacher", teacher, STRONG, TEACHER_CFG),
        guided("itself", student, WEAK, 1.0),
        guided("itself", student, STRONG, 1.0),
        plain(5),
        plain(6),
        alone(4),
        alone(50),
    ]


def run_demo(seed: int, out: Path, seeds: int = SEEDS, images: int = IMAGES) -> list[Row]:
    """Measure every row over ``seeds`` seeds of ``images`` images; write the table and pictures.

    Raises ImportError where scikit-learn or matplotlib is missing, OSError where ``out`` cannot be
    written: both before any sampling.
    """
    student, teacher = Counted(load_student()), Counted(load_teacher())
    classifier = load_classifier()
    reference = features_of(load_data()[0], classifier)
    from kdpp.digits import pictures

    out.mkdir(parents=True, exist_ok=True)
    rows = build_rows(student, teacher)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small only wait for a second thread
    try:
        with tqdm(total=seeds * len(rows), desc="sampling", unit="run") as bar:
            for run in range(seeds):
                for row in rows:
                    bar.set_postfix_str(row.name.strip())
                    student.images = teacher.images = 0
                    start = time.perf_counter()
                    samples, labels = row.run(seed + run, images)
                    row.seconds.append(time.perf_counter() - start)
                    row.scores.append(measure(samples, labels, classifier, reference))
                    row.evaluations = (student.images / images, teacher.images / images)
                    bar.update()
    finally:
        torch.set_num_threads(threads)
    text = table(rows, images) + "\n\n" + verdict(rows)
    print(text)
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    for path in (
        pictures.draw_grids([rows[i] for i in (0, 1, 2, 4, 7, 8)], seed, out / "grids.png"),
        pictures.draw_guided_step(rows[2], seed, out / "guided_step.png"),
    ):
        print(f"wrote {path}")
    return rows


def changes(row: Row, base: Row) -> list[float]:
    """The paired change of the Fréchet distance, seed by seed."""
    pairs = zip(row.scores, base.scores)
    return [a.frechet_distance - b.frechet_distance for a, b in pairs]


def spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """``mean ± standard deviation``."""
    deviation = stdev(values) if len(values) > 1 else float("nan")
    return f"{fmean(values):{sign}.{digits}f} ± {deviation:.{digits}f}"


def table(rows: Sequence[Row], images: int) -> str:
    """What was measured, a line for each row, as text."""
    base = rows[0]
    head = (
        f"{len(base.scores)} seeds of {images} images; ± is the standard deviation over seeds\n"
        "evaluations: of each network for one image, both halves of CFG counted\n"
        "time: of the plain student's 4 steps, median of the paired ratios\n"
        "FD: Fréchet distance to the data in the classifier's features, lower is better; change: "
        "paired, against the plain student"
    )
    lines = [("", "evaluations", "", "", "", "", "inception", "asked digit")]
    lines += [("", "student", "teacher", "time", "FD", "change of FD", "score", "recognised, %")]
    for row in rows:
        ratios = sorted(a / b for a, b in zip(row.seconds, base.seconds))
        lines.append(
            (
                row.name,
                f"{row.evaluations[0]:g}",
                f"{row.evaluations[1]:g}",
                f"{ratios[len(ratios) // 2]:.1f}",
                spread([score.frechet_distance for score in row.scores]),
                "" if row is base else spread(changes(row, base), sign="+"),
                spread([score.inception_score for score in row.scores]),
                spread([100 * score.accuracy for score in row.scores], digits=1),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    body = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    return "\n".join([head, "", *body])


def verdict(rows: Sequence[Row]) -> str:
    """What the table means, said from its figures; within its own spread an effect is not seen."""
    base, weak, strong, self_weak, self_strong, five, _, few, _ = rows
    lines = [
        f"The teacher at the first of 4 steps: {effect(weak, base)} at λ = {WEAK}, "
        f"{effect(strong, base)} at λ = {STRONG}.",
        f"Of that the teacher's own share, against the student's second look in its place: "
        f"{effect(weak, self_weak)}, {effect(strong, self_strong)}.",
        f"A fifth step of the student instead: {effect(five, base)}.",
    ]
    if fmean(changes(few, strong)) < 0:
        lines.append("The teacher alone in 4 steps is better still, at the price in its line.")
    return "\n".join(lines)


def effect(row: Row, base: Row) -> str:
    """The change of FD in words."""
    values = changes(row, base)
    if len(values) < 2 or abs(fmean(values)) <= stdev(values):
        return "no effect seen"
    return f"FD {spread(values, sign='+')}"
