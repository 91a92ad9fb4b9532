"""The figures of the pages on editing and rollouts: the digits' networks on digits new to them.

    python benchmarks/digits_pages.py [--write]

Prints the tables as Markdown; --write puts them into docs/results/digits, which the pages include.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

import kdpp
from kdpp.digits import NULL_CLASS, load_classifier, load_data, load_student, load_teacher, schedule
from kdpp.digits.metrics import as_viewed, features_of, measure
from kdpp.editing import image_to_image, inpaint, truncate
from kdpp.lab.processes import single_thread
from kdpp.rollouts import encode, mixed_rollout

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "digits"
SEEDS = (0, 1, 2)
CFG = 2.0
ROLLOUTS = 2000  # images of a seed

compvis = kdpp.kdiffusion.external.CompVisDenoiser
STUDENT, TEACHER = compvis(load_student()), compvis(load_teacher())
ALONE = kdpp.TeacherGuidedDenoiser(TEACHER, TEACHER, teacher_steps=0)
CLASSIFIER = load_classifier()
IMAGES, LABELS = load_data("test")


def asked(labels: Tensor, scale: float = CFG) -> dict[str, Any]:
    """The arguments of a run for these labels under this guidance."""
    uncond = torch.full_like(labels, NULL_CLASS)
    return {"cond": labels, "uncond": uncond, "cond_scale": scale}


def read(images: Tensor, labels: Tensor) -> float:
    """The share, in per cent, that the classifier reads as these labels."""
    found = CLASSIFIER(as_viewed(images)).argmax(1) == labels
    return 100 * float(found.double().mean())


def distance(images: Tensor, source: Tensor) -> float:
    """||a - b|| / ||b||, of each clamped image, mean."""
    off = (as_viewed(images) - source).flatten(1).norm(dim=1) / source.flatten(1).norm(dim=1)
    return float(off.mean())


def over_seeds(run: Callable[[], Sequence[float]]) -> list[tuple[float, float]]:
    """Mean and standard deviation of each figure of a run, over the seeds."""
    found = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        found.append(run())
    return [(fmean(values), stdev(values)) for values in zip(*found)]


def said(figure: tuple[float, float], digits: int) -> str:
    """``mean ± standard deviation``."""
    return f"{figure[0]:.{digits}f} ± {figure[1]:.{digits}f}"


def strength() -> Iterator[Sequence[str]]:
    """Image to image: the teacher alone, on the way to another digit."""
    new = (LABELS + 1) % 10
    yield (
        "strength", r"$\sigma_0$", "read as the new digit, %", "as the old one, %",
        "distance to the source",
    )  # fmt: skip
    for part in (0.2, 0.3, 0.4, 0.5, 0.7, 1.0):
        sigmas = truncate(torch.tensor(schedule(20)), part)

        def run(sigmas: Tensor = sigmas) -> Sequence[float]:
            made = image_to_image(
                kdpp.sample_dpmpp_2m_tg, ALONE, IMAGES, sigmas, asked(new), disable=True
            )
            return read(made, new), read(made, LABELS), distance(made, IMAGES)

        found = over_seeds(run)
        first = f"{sigmas[0]:.3g}" if sigmas[0] >= 1 else f"{sigmas[0]:.2f}"
        yield f"{part:g}", first, said(found[0], 1), said(found[1], 1), said(found[2], 3)


def inpainting() -> Iterator[Sequence[str]]:
    """The lower half made anew: by the teacher, the student, and the student with the teacher."""
    mask = torch.zeros(8, 8)
    mask[4:] = 1.0
    none = torch.full_like(LABELS, NULL_CLASS)

    def filled(model: Any, sample: Callable[..., Tensor], steps: int, labels: Tensor) -> Tensor:
        sigmas = torch.tensor(schedule(steps))
        x = torch.randn_like(IMAGES) * sigmas[0]
        scale = CFG if model is ALONE and labels is LABELS else 1.0
        known = inpaint(model, IMAGES, mask)
        return sample(known, x, sigmas, asked(labels, scale), disable=True)

    def apart() -> Tensor:
        """The lower half of a digit that was drawn without knowing the upper one."""
        sigmas = torch.tensor(schedule(20))
        x = torch.randn_like(IMAGES) * sigmas[0]
        made = kdpp.sample_dpmpp_2m_tg(ALONE, x, sigmas, asked(LABELS), disable=True)
        return (1 - mask) * IMAGES + mask * made

    def helped(scale: float) -> Any:
        return kdpp.TeacherGuidedDenoiser(
            STUDENT, TEACHER, teacher_scale=scale, teacher_cfg_scale=CFG
        )

    two_m, ancestral, lcm = (
        kdpp.sample_dpmpp_2m_tg, kdpp.sample_euler_ancestral_tg, kdpp.sample_lcm_tg,
    )  # fmt: skip
    ways: dict[str, Callable[[], Tensor]] = {
        "teacher, `sample_dpmpp_2m_tg`": lambda: filled(ALONE, two_m, 20, LABELS),
        "teacher, `sample_euler_ancestral_tg`": lambda: filled(ALONE, ancestral, 20, LABELS),
        "teacher, lower half of a digit that knew nothing of the upper": apart,
        "student, 4 steps": lambda: filled(helped(0.0), lcm, 4, LABELS),
        "+ teacher at the first step, λ = 0.1": lambda: filled(helped(0.1), lcm, 4, LABELS),
        "+ teacher at the first step, λ = 0.5": lambda: filled(helped(0.5), lcm, 4, LABELS),
        "teacher without a label, `sample_dpmpp_2m_tg`": lambda: filled(ALONE, two_m, 20, none),
        "teacher without a label, `sample_euler_ancestral_tg`": lambda: filled(
            ALONE, ancestral, 20, none
        ),
    }
    yield "", "read as the digit, %", "error of the lower half"
    for name, way in ways.items():

        def run(way: Callable[[], Tensor] = way) -> Sequence[float]:
            made = way()
            return read(made, LABELS), distance(made[:, :, 4:], IMAGES[:, :, 4:])

        found = over_seeds(run)
        yield name, said(found[0], 1), said(found[1], 3)


def levels(steps: int) -> Tensor:
    """Evenly spaced in log σ, from 0.03 up to 14.6."""
    return torch.logspace(*torch.tensor([0.03, 14.6]).log10().tolist(), steps + 1)


def round_trip() -> Iterator[Sequence[str]]:
    """The error of encoding and decoding over the same levels, of the first 100 digits."""
    counts = (25, 50, 100, 200, 400)
    images, labels = IMAGES[:100], LABELS[:100]
    yield "steps each way", *map(str, counts)
    for scale, guided in ((1.0, "no guidance"), (CFG, f"guidance {CFG:g} both ways")):
        rows: dict[str, list[str]] = {"Euler": [], "DPM-Solver++(2M)": []}
        for steps in counts:
            up = levels(steps)
            z = encode(TEACHER, images, up, asked(labels, scale), disable=True)
            samplers = (kdpp.sample_euler_tg, kdpp.sample_dpmpp_2m_tg)
            for name, sample in zip(rows, samplers):
                back = sample(ALONE, z, up.flip(0), asked(labels, scale), disable=True)
                rows[name].append(f"{float((back - images).norm() / images.norm()):.2g}")
        for name, row in rows.items():
            yield f"{guided}, decoded by {name}", *row
    for scale in (1.0, CFG):
        z = encode(TEACHER, images, levels(400), asked(labels, scale), disable=True)
        name = f"deviation of the latents at guidance {scale:g}, in units of the highest σ"
        yield name, "", "", "", "", f"{float(z.std()) / 14.6:.2f}"


def style() -> Iterator[Sequence[str]]:
    """Style transfer: what of 400 digits is kept when their latents are decoded as others."""
    images, labels = IMAGES[:400], LABELS[:400]
    new = (labels + 1 + torch.arange(400) % 9) % 10
    up = levels(50)
    down = torch.cat([up.flip(0), up.new_zeros(1)])
    yield (
        "guidance", "its own latent", "another image's latent", "fresh noise",
        "read as the new digit, %", "as the old one, %",
    )  # fmt: skip
    for scale in (1.0, CFG):
        torch.manual_seed(0)
        z = encode(TEACHER, images, up, asked(labels, 1.0), disable=True)
        starts = (z, z.roll(7, 0), torch.randn_like(images) * up[-1])
        made = [
            kdpp.sample_euler_tg(ALONE, start, down, asked(new, scale), disable=True)
            for start in starts
        ]
        kept = [f"{distance(one, images):.2f}" for one in made]
        yield f"{scale:g}", *kept, f"{read(made[0], new):.1f}", f"{read(made[0], labels):.1f}"


def rollouts() -> Iterator[Sequence[str]]:
    """Student and teacher by turns, by a coin or at one switch."""
    reference = features_of(IMAGES, CLASSIFIER)
    labels = torch.arange(ROLLOUTS) % 10
    sigmas = torch.tensor(schedule(4))
    rows: dict[str, dict[str, Any]] = {
        "student alone": {"teacher_probability": 0.0},
        **{f"$p_T$ = {p:g}": {"teacher_probability": p} for p in (0.2, 0.4, 0.6, 0.8)},
        "teacher alone": {"teacher_probability": 1.0},
    }
    for first, other in (("teacher", "student"), ("student", "teacher")):
        for switch in (1, 2, 3):
            name = f"{first}, from transition {switch} the {other}"
            rows[name] = {"first": first, "switch": switch}
    yield "who", "FD", "accuracy, %"
    for name, row in rows.items():

        def run(row: dict[str, Any] = row) -> Sequence[float]:
            x = torch.randn(ROLLOUTS, 1, 8, 8) * sigmas[0]
            generator = torch.Generator().manual_seed(torch.initial_seed())
            rollout = mixed_rollout(
                STUDENT, TEACHER, x, sigmas, teacher_cfg_scale=CFG, extra_args=asked(labels, 1.0),
                generator=generator, disable=True, **row,
            )  # fmt: skip
            scores = measure(rollout.x, labels, CLASSIFIER, reference)
            return scores.frechet_distance, 100 * scores.accuracy

        found = over_seeds(run)
        yield name, said(found[0], 2), said(found[1], 1)


TABLES = {
    "strength": strength, "inpainting": inpainting, "round_trip": round_trip, "style": style,
    "rollouts": rollouts,
}  # fmt: skip


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a table, the first being its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    foot = f"{date.today()}; torch {torch.__version__}, one CPU thread; the shipped weights."
    return "\n".join([*lines, "", foot]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="also write docs/results/digits")
    write = parser.parse_args().write
    for name, table in TABLES.items():
        with single_thread():
            text = markdown(list(table()))
        print(text, flush=True)
        if write:
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
