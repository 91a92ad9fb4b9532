"""The demo: what a teacher does for a real few-step student, measured and drawn.

Every run of one seed starts from the same noise and the same labels and draws the same solver
noise, so that ways compare in pairs; the images are measured clamped, as a viewer sees them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from tqdm.auto import tqdm

from kdpp.digits.checkpoints import load_classifier, load_student, load_teacher
from kdpp.digits.data import load_data
from kdpp.digits.metrics import features_of, measure
from kdpp.digits.ways import LATE, STRONG, WEAK, Counted, Way, build_ways
from kdpp.lab.console import say
from kdpp.lab.files import make_folder, write_atomically

SEEDS = 5
IMAGES = 1000
DRAWN = ("student", "weak", "strong", "late", "self_strong", "teacher", "many")


def run_demo(seed: int, out: Path, seeds: int = SEEDS, images: int = IMAGES) -> dict[str, Way]:
    """Measure every way to sample over ``seeds`` seeds of ``images`` images.

    Writes ``table.txt``, ``grids.png`` and ``guided_step.png`` into ``out``.

    Raises ImportError where scikit-learn or matplotlib is missing, OSError where ``out`` cannot be
    written: both before any sampling.
    """
    say(
        f"{seeds} seeds of {images} digits each, sampled with and without a teacher; takes about a "
        f"minute.\nThe table and two pictures go to {out}: table.txt, grids.png, guided_step.png."
    )
    from kdpp.digits import pictures

    student, teacher = Counted(load_student()), Counted(load_teacher())
    classifier = load_classifier()
    real, labels = load_data()
    reference = features_of(real, classifier)
    ways = build_ways(student, teacher)
    _make_writable(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small only wait for a second thread
    try:
        with tqdm(total=seeds * len(ways), desc="sampling", unit="run") as bar:
            for run in range(seed, seed + seeds):
                for way in ways.values():
                    bar.set_postfix_str(way.name.strip())
                    student.images = teacher.images = 0
                    start = time.perf_counter()
                    samples, asked = way.run(run, images)
                    way.seconds.append(time.perf_counter() - start)
                    way.scores.append(measure(samples, asked, classifier, reference))
                    way.evaluations = (student.images / images, teacher.images / images)
                    bar.update()
    finally:
        torch.set_num_threads(threads)
    text = table(ways, images) + "\n\n" + verdict(ways)
    write_atomically(out / "table.txt", f"{text}\n".encode())
    drawn = [ways[name] for name in DRAWN]
    pictures.draw_grids(drawn, real, labels, seed, out / "grids.png")
    pictures.draw_guided_step(ways["strong"], seed, out / "guided_step.png")
    say(text)
    say(f"\nwrote table.txt, grids.png and guided_step.png into {out}")
    return ways


def _make_writable(folder: Path) -> None:
    """Make the folder; OSError, in a sentence, where no file can be written there."""
    make_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            f"the folder {folder} cannot be written to ({error.strerror}); name another: --out"
        ) from error


def changes(way: Way, base: Way) -> list[float]:
    """The paired change of the Fréchet distance, seed by seed."""
    pairs = zip(way.scores, base.scores)
    return [a.frechet_distance - b.frechet_distance for a, b in pairs]


def spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """``mean ± standard deviation``."""
    deviation = stdev(values) if len(values) > 1 else float("nan")
    return f"{fmean(values):{sign}.{digits}f} ± {deviation:.{digits}f}"


def table(ways: Mapping[str, Way], images: int) -> str:
    """What was measured, a line for each way, as text."""
    base = ways["student"]
    head = (
        f"{len(base.scores)} seeds of {images} images; ± is the standard deviation over seeds\n"
        "evaluations: of each network for one image, both halves of CFG counted\n"
        "time: of the plain student's 4 steps, median of the paired ratios\n"
        "FD: Fréchet distance to the data in the classifier's features, lower is better; change: "
        "paired, against the plain student"
    )
    lines = [("", "evaluations", "", "", "", "", "inception", "asked digit")]
    lines += [("", "student", "teacher", "time", "FD", "change of FD", "score", "recognised, %")]
    for way in ways.values():
        ratios = sorted(a / b for a, b in zip(way.seconds, base.seconds))
        lines.append(
            (
                way.name,
                f"{way.evaluations[0]:g}",
                f"{way.evaluations[1]:g}",
                f"{ratios[len(ratios) // 2]:.1f}",
                spread([score.frechet_distance for score in way.scores]),
                "" if way is base else spread(changes(way, base), sign="+"),
                spread([score.inception_score for score in way.scores]),
                spread([100 * score.accuracy for score in way.scores], digits=1),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    body = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    return "\n".join([head, "", *body])


def verdict(ways: Mapping[str, Way]) -> str:
    """What the table means, said from its figures; within its own spread an effect is not seen."""

    def change(name: str, base: str = "student") -> str:
        return effect(ways[name], ways[base])

    lines = [
        f"The teacher at the first of 4 steps: {change('weak')} at λ = {WEAK}, "
        f"{change('strong')} at λ = {STRONG}.",
        f"Of that the teacher's own share, against the student's second look in its place: "
        f"{change('weak', 'self_weak')}, {change('strong', 'self_strong')}.",
        f"The teacher at the last step, as `kdpp tune` advises: {change('late')} at λ = {LATE}.",
        f"A fifth step of the student instead: {change('five')}.",
    ]
    if fmean(changes(ways["teacher"], ways["late"])) < 0:
        lines.append("The teacher alone in 4 steps is better still, at the price in its line.")
    return "\n".join(lines)


def effect(way: Way, base: Way) -> str:
    """The change of FD in words."""
    values = changes(way, base)
    if len(values) < 2 or abs(fmean(values)) <= stdev(values):
        return "no effect seen"
    return f"FD {spread(values, sign='+')}"
