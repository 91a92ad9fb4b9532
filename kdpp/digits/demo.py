"""The demo: what a teacher does for a real few-step student, measured and drawn.

Every run of one seed starts from the same noise and the same labels and draws the same solver
noise, so that ways compare in pairs; the images are measured clamped, as a viewer sees them,
against digits that no network has seen. As many real digits of those that were seen stand beside
them: nearer than these a distance says nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from tqdm.auto import tqdm

from kdpp.digits.checkpoints import load_classifier, load_student, load_teacher
from kdpp.digits.data import load_data
from kdpp.digits.metrics import Scores, features_of, measure
from kdpp.digits.ways import LATE, STRONG, WEAK, Counted, Way, build_ways
from kdpp.lab.console import say
from kdpp.lab.features import Floats
from kdpp.lab.files import make_folder, write_atomically
from kdpp.lab.intervals import estimate
from kdpp.lab.intervals import verdict as verdict_of
from kdpp.lab.networks import Classifier

SEEDS = 5
IMAGES = 1000
DRAWN = ("student", "weak", "strong", "late", "self_strong", "teacher", "many")


def run_demo(seed: int, out: Path, seeds: int = SEEDS, images: int = IMAGES) -> dict[str, Way]:
    """Measure every way to sample over ``seeds`` seeds of ``images`` images.

    Writes ``table.txt``, ``grids.png`` and ``guided_step.png`` into ``out``.

    Raises ImportError where matplotlib is missing, OSError where ``out`` cannot be written: both
    before any sampling.
    """
    say(
        f"{seeds} seeds of {images} digits each, sampled with and without a teacher; takes about a "
        f"minute.\nThe table and two pictures go to {out}: table.txt, grids.png, guided_step.png."
    )
    from kdpp.digits import pictures

    student, teacher = Counted(load_student()), Counted(load_teacher())
    classifier = load_classifier()
    real, labels = load_data("test")
    reference = features_of(real, classifier)
    others = real_scores(range(seed, seed + seeds), images, classifier, reference)
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
                    start = time.process_time()  # on one thread, whatever else runs
                    samples, asked = way.run(run, images)
                    way.seconds.append(time.process_time() - start)
                    way.scores.append(measure(samples, asked, classifier, reference))
                    way.evaluations = (student.images / images, teacher.images / images)
                    bar.update()
    finally:
        torch.set_num_threads(threads)
    text = table(ways, others, images) + "\n\n" + verdict(ways)
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


def real_scores(
    seeds: Iterable[int], images: int, classifier: Classifier, reference: Floats
) -> list[Scores]:
    """Of as many real digits, drawn anew for each seed from those that networks were trained on."""
    real, labels = load_data("train")
    found = []
    for seed in seeds:
        drawn = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:images]
        found.append(measure(real[drawn], labels[drawn], classifier, reference))
    return found


def changes(way: Way, base: Way) -> list[float]:
    """The paired change of the Fréchet distance, seed by seed."""
    pairs = zip(way.scores, base.scores)
    return [a.frechet_distance - b.frechet_distance for a, b in pairs]


def spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """``mean ± half of its 95 % interval``."""
    found = estimate(values)
    assert found.low is not None and found.high is not None  # there are two seeds or more
    return f"{found.mean:{sign}.{digits}f} ± {(found.high - found.low) / 2:.{digits}f}"


def table(ways: Mapping[str, Way], others: Sequence[Scores], images: int) -> str:
    """What was measured, a line for each way and one for real digits, as text."""
    base = ways["student"]
    head = (
        f"{len(base.scores)} seeds of {images} images; ± is half of the 95 % interval over seeds\n"
        "evaluations: of each network for one image, both halves of CFG counted\n"
        "time: CPU time, that of the plain student's 4 steps being 1, median of the paired ratios\n"
        "FD: Fréchet distance to 1,797 digits by other writers than those trained on, in the "
        "classifier's features,\nlower is better; change: paired, against the plain student"
    )
    lines: list[tuple[str, ...]]
    lines = [("", "evaluations", "", "", "", "", "inception", "asked digit")]
    lines += [("", "student", "teacher", "time", "FD", "change of FD", "score", "recognised, %")]
    for way in ways.values():
        ratios = sorted(a / b for a, b in zip(way.seconds, base.seconds))
        distance, *rest = figures(way.scores)
        lines.append(
            (
                way.name,
                f"{way.evaluations[0]:g}",
                f"{way.evaluations[1]:g}",
                f"{ratios[len(ratios) // 2]:.1f}",
                distance,
                "" if way is base else spread(changes(way, base), sign="+"),
                *rest,
            )
        )
    distance, *rest = figures(others)
    lines.append(("real digits, trained on", "", "", "", distance, "", *rest))
    widths = [max(map(len, column)) for column in zip(*lines)]
    body = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    return "\n".join([head, "", *body])


def figures(scores: Sequence[Scores]) -> tuple[str, str, str]:
    """FD, inception score and accuracy in per cent, each with its spread."""
    return (
        spread([score.frechet_distance for score in scores]),
        spread([score.inception_score for score in scores]),
        spread([100 * score.accuracy for score in scores], digits=1),
    )


def verdict(ways: Mapping[str, Way]) -> str:
    """What the table means, said from its figures; an effect whose interval holds 0 is not seen."""

    def change(name: str, base: str = "student") -> str:
        return effect(ways[name], ways[base])

    lines = [
        f"The teacher at the first of 4 steps: {change('weak')} at λ = {WEAK}, "
        f"{change('strong')} at λ = {STRONG}.",
        f"Of that the teacher's own share, against the student's second look in its place: "
        f"{change('weak', 'self_weak')}, {change('strong', 'self_strong')}.",
        f"The teacher at the last step, as `kdpp tune` advises: {change('late')} at λ = {LATE}; "
        f"the student in its place: {change('self_late')}.",
        f"A fifth step of the student instead: {change('five')}.",
    ]
    if fmean(changes(ways["teacher"], ways["late"])) < 0:
        lines.append("The teacher alone in 4 steps is better still, at the price in its line.")
    return "\n".join(lines)


def effect(way: Way, base: Way) -> str:
    """The change of FD in words."""
    values = changes(way, base)
    seen = verdict_of(estimate(values)) != "none seen"
    return f"FD {spread(values, sign='+')}" if seen else "no effect seen"
