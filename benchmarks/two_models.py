"""The table and the picture of the page on two models: every way in which a teacher can help.

    python benchmarks/two_models.py                # measures anew: some minutes
    python benchmarks/two_models.py --seeds 2 --images 300 --out FOLDER

The shipped student and teacher of the digits. Every way starts from the same noise and labels and
draws the same solver noise, so that changes are paired; images are measured clamped, against the
digits that no network was trained on. *Itself* is the control: the student in the teacher's place.
CPU seconds are medians of paired ratios.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from tqdm import tqdm

import kdpp
from kdpp.digits import load_classifier, load_data, load_student, load_teacher, schedule
from kdpp.digits.metrics import features_of, measure
from kdpp.digits.pictures import draw_grids
from kdpp.digits.ways import TEACHER_CFG, Counted, Way
from kdpp.lab.metrics import Points, compared, diversity
from measure import about, heading

DOCS = Path(__file__).parents[1] / "docs"
DRAWN = (
    "student, 4 steps", "handover, first step", "handover, last step", "autoguidance, all steps",
    "reflection, first step", "revision, last step", "teacher, 4 steps",
)  # fmt: skip
PLAIN, FIVE = "student, 4 steps", "student, 5 steps"


def ways_of(student: Counted, teacher: Counted) -> list[Way]:
    """The ways, the plain student first."""

    def way(name: str, denoiser: Any, steps: int = 4, **guidance: Any) -> Way:
        model = kdpp.TeacherGuidedDenoiser(denoiser, **guidance)
        return Way(name, kdpp.sample_lcm_tg, model, schedule(steps))

    def revision(name: str, helper: Counted, scale: float, cfg_scale: float, **look: Any) -> Way:
        settings = {"teacher_scale": scale, "teacher_cfg_scale": cfg_scale, **look}
        return way(name, student, teacher=helper, **settings)

    late: dict[str, Any] = {"teacher_steps": [3], "renoise": 0.2, "renoise_eta": 0.0}
    handover, reflection = kdpp.handover, kdpp.Reflection
    return [
        way(PLAIN, student),
        way(FIVE, student, 5),
        way("student, 6 steps", student, 6),
        way("handover, first step", handover(student, teacher)),
        way("handover, last step", handover(student, teacher, {-1})),
        way("handover, last two", handover(student, teacher, {-1, -2})),
        way("autoguidance, all steps", kdpp.autoguidance(teacher, student, 1.5)),
        way("autoguidance, last step", kdpp.handover(
            student, kdpp.autoguidance(teacher, student, 1.5), {-1})),
        way("reflection, first step", student, reflection=reflection(student, strong=teacher)),
        way("reflection by itself, first step", student, reflection=reflection(student)),
        way("reflection, all steps", student,
            reflection=reflection(student, strong=teacher, steps=9)),
        way("reflection by itself, all steps", student, reflection=reflection(student, steps=9)),
        revision("revision, first step", teacher, 0.5, TEACHER_CFG),
        revision("revision by itself, first step", student, 0.5, 1.0),
        revision("revision, last step", teacher, 1.0, 1.0, **late),
        revision("revision by itself, last step", student, 1.0, 1.0, **late),
        way("handover first, revision last", handover(student, teacher), teacher=teacher,
            teacher_scale=1.0, teacher_cfg_scale=1.0, **late),
        Way("teacher, 4 steps", kdpp.sample_unipc_tg,
            kdpp.TeacherGuidedDenoiser(teacher), schedule(4), TEACHER_CFG),
    ]  # fmt: skip


def measured(seeds: int, images: int) -> tuple[list[Way], dict[str, dict[str, list[float]]]]:
    """Every way's figures, an entry for each seed."""
    student, teacher = Counted(load_student()), Counted(load_teacher())
    classifier = load_classifier()
    unseen, _ = load_data("test")
    reference = features_of(unseen, classifier)
    data = Points(reference)
    ways = ways_of(student, teacher)
    found: dict[str, dict[str, list[float]]] = {way.name: {} for way in ways}
    for seed, way in tqdm([(seed, way) for seed in range(seeds) for way in ways]):
        student.images = teacher.images = 0
        start = time.process_time()
        samples, labels = way.run(seed, images)
        seconds = time.process_time() - start
        scores = measure(samples, labels, classifier, reference)
        features = features_of(samples, classifier)
        against = compared(Points(features), data)
        way.evaluations = (student.images / images, teacher.images / images)
        figures = {
            "FD": against["fd"], "recognised": 100 * scores.accuracy,
            "recall": against["recall"],
            "diversity": diversity(features, labels), "seconds": seconds,
        }  # fmt: skip
        for name, value in figures.items():
            found[way.name].setdefault(name, []).append(value)
    return ways, found


def table(ways: list[Way], found: dict[str, dict[str, list[float]]]) -> str:
    """As Markdown."""

    def spread(values: list[float], digits: int = 2, sign: str = "") -> str:
        deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{fmean(values):{sign}.{digits}f}{deviation}"

    def change(name: str, base: str) -> str:
        if name == base:
            return ""
        pairs = zip(found[name]["FD"], found[base]["FD"])
        return spread([a - b for a, b in pairs], sign="+")

    heads = ("", "evaluations: student", "teacher", "CPU time", "FD", "change",
             "against 5 steps", "recall", "diversity", "recognised, %")  # fmt: skip
    lines = [heads, ("---",) * len(heads)]
    for way in ways:
        own, plain = found[way.name], found[PLAIN]
        ratio = median(a / b for a, b in zip(own["seconds"], plain["seconds"]))
        lines.append((
            way.name, *(f"{count:g}" for count in way.evaluations), f"{ratio:.1f}",
            spread(own["FD"]), change(way.name, PLAIN), change(way.name, FIVE),
            spread(own["recall"], 3), spread(own["diversity"]), spread(own["recognised"], 1),
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=DOCS, help="has results/ and images/")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    ways, found = measured(settings.seeds, settings.images)
    for folder in ("results", "images"):
        (settings.out / folder).mkdir(parents=True, exist_ok=True)
    said = f"{settings.seeds} seeds of {settings.images} images; {heading(about())}"
    text = f"{table(ways, found)}\n\n({said})\n"
    (settings.out / "results" / "two_models.md").write_text(text, encoding="utf-8")
    drawn = [way for name in DRAWN for way in ways if way.name == name]
    picture = settings.out / "images" / "two_models.png"
    draw_grids(drawn, *load_data("test"), 0, picture)
    print(text)


if __name__ == "__main__":
    main()
