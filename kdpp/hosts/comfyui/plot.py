"""The Tune node's picture, drawn with Pillow, which ComfyUI has (matplotlib it does not have)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdpp.lab.answer import Tuning
from kdpp.lab.looks import Change, Look

__all__ = ["Plot"]

WIDTH, HEIGHT = 1100, 420
FINE = 2  # drawn so many times larger, for smooth edges
TEACHER, STUDENT, TEACHER_FRESH, STUDENT_FRESH = "#1f77b4", "#8a8a8a", "#d62728", "#000000"
TITLES = {
    "teacher": "let the teacher help",
    "student": "not the teacher: the student's own second look",
    "steps": "not the teacher: more steps of the student's own",
    None: "no help: no gain is sure",
}


class Mark(NamedTuple):
    """A point of a panel: at a step, with an interval or without."""

    step: float
    value: float
    low: float
    high: float
    colour: str


class Plot:
    """Draws a `Tuning` as an IMAGE, (1, height, width, 3) in [0, 1].

    Its parts are there once it is made: ImportError where Pillow is older than 10.1.
    """

    def __init__(self) -> None:
        from PIL import Image, ImageDraw, ImageFont

        try:
            self.fonts = [ImageFont.load_default(size * FINE) for size in (14, 17, 21)]
        except (TypeError, ImportError) as error:
            raise ImportError("Tune's picture needs Pillow 10.1 or newer, with FreeType") from error
        self.image = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), "white")
        self.pen: Any = ImageDraw.Draw(self.image)

    def draw(self, tuning: Tuning) -> Tensor:
        """The picture."""
        steps = len(tuning.levels) - 1
        self.text((WIDTH / 2, 22), f"{tuning.sampler}: {TITLES[tuning.by]}", 2)
        looks = [
            Mark(best.step + aside, best.explained, best.explained, best.explained, colour)
            for by, aside, colour in (("teacher", -0.08, TEACHER), ("student", 0.08, STUDENT))
            for best in best_looks(tuning.looks, by)
        ]
        self.panel((70, 90, 510, 330), steps, looks, (0.0, 1.0), "share of the miss that the best "
                   "look of a step explains")  # fmt: skip
        marks = list(trials(tuning))
        ends = [0.0, *(end for mark in marks for end in (mark.low, mark.high))]
        self.panel((620, 90, 1060, 330), steps, marks, (min(ends), max(ends)),
                   "change of the distance to the teacher's run, %")  # fmt: skip
        for trial in tuning.trials:
            where = self.across((620, 90, 1060, 330), steps, trial.look.step)
            self.text((where, 374), f"scale {trial.look.scale:.2f}", 0)
        kinds = (
            (TEACHER, "teacher"),
            (STUDENT, "student itself"),
            (TEACHER_FRESH, "teacher, fresh samples"),
            (STUDENT_FRESH, "student, fresh samples"),
        )
        for k, (colour, what) in enumerate(kinds):
            self.dot(90 + 245 * k, 402, colour)
            self.text((102 + 245 * k, 402), what, 0, "lm")
        made = self.image.resize((WIDTH, HEIGHT), 1)  # Lanczos
        return torch.from_numpy(np.asarray(made, dtype=np.float32) / 255.0)[None]

    def panel(
        self,
        box: tuple[int, int, int, int],
        steps: int,
        marks: Sequence[Mark],
        ends: tuple[float, float],
        title: str,
    ) -> None:
        """Axes, and the marks on them."""
        left, top, right, bottom = box
        ticks = round_numbers(*ends)
        low, high = min(ticks[0], ends[0]), max(ticks[-1], ends[1])

        def down(value: float) -> float:
            return bottom - (bottom - top) * (value - low) / (high - low)

        self.text(((left + right) / 2, top - 24), title, 1)
        for tick in ticks:
            self.line((left, down(tick), right, down(tick)), "#777777" if tick == 0 else "#dddddd")
            self.text((left - 8, down(tick)), f"{tick:g}", 0, "rm")
        self.line((left, top, right, top, right, bottom, left, bottom, left, top), "black")
        for step in range(steps):
            self.text((self.across(box, steps, step), bottom + 16), f"step {step}", 0)
        for mark in marks:
            x = self.across(box, steps, mark.step)
            self.line((x, down(mark.low), x, down(mark.high)), mark.colour, 2)
            if mark.high > mark.low:
                for end in (mark.low, mark.high):
                    self.line((x - 5, down(end), x + 5, down(end)), mark.colour, 2)
            self.dot(x, down(mark.value), mark.colour)

    @staticmethod
    def across(box: tuple[int, int, int, int], steps: int, step: float) -> float:
        """Where a step lies."""
        return box[0] + (box[2] - box[0]) * (step + 0.5) / steps

    def line(self, points: Iterable[float], colour: str, width: float = 1.0) -> None:
        self.pen.line([FINE * one for one in points], colour, round(width * FINE))

    def dot(self, x: float, y: float, colour: str) -> None:
        around = (x - 5, y - 5, x + 5, y + 5)
        self.pen.ellipse([FINE * one for one in around], colour)

    def text(self, at: tuple[float, float], said: str, size: int, anchor: str = "mm") -> None:
        where = (at[0] * FINE, at[1] * FINE)
        self.pen.text(where, said, "black", self.fonts[size], anchor=anchor)


def best_looks(looks: Sequence[Look], by: str) -> list[Look]:
    """Of each step the look that explains most."""
    best: dict[int, Look] = {}
    for look in looks:
        if look.by == by and (look.step not in best or look.explained > best[look.step].explained):
            best[look.step] = look
    return list(best.values())


def trials(tuning: Tuning) -> Iterable[Mark]:
    """What whole runs changed, in %."""

    def mark(step: float, change: Change, colour: str) -> Mark:
        mean, low, high = (100 * one for one in (change.mean, change.low, change.high))
        return Mark(step, mean, low, high, colour)

    for trial in tuning.trials:
        yield mark(trial.look.step - 0.15, trial.change, TEACHER)
        yield mark(trial.look.step - 0.05, trial.itself_change, STUDENT)
    if tuning.check is not None:
        yield mark(tuning.check.look.step + 0.05, tuning.check.change, TEACHER_FRESH)
        yield mark(tuning.check.look.step + 0.15, tuning.check.itself_change, STUDENT_FRESH)


def round_numbers(low: float, high: float) -> list[float]:
    """Some four to eight round numbers that lie in [low, high] or next to it, 0 among them."""
    reach = (high - low) or 1.0
    unit = 10.0 ** math.floor(math.log10(reach / 4.0))
    step = next(unit * many for many in (1, 2, 5, 10) if reach / (unit * many) <= 6.0)
    return [step * k for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
