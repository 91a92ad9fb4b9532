"""What `kdpp tune` answers, in words, as a table and as a picture."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

from kdpp.lab.looks import EXPLAINED, SURE, Change, Longer, Look, Price, Trial

__all__ = ["Helper", "Tuning", "draw", "in_words", "need_matplotlib"]


Helper = Literal["teacher", "student", "steps"]


@dataclass(frozen=True)
class Tuning:
    """The answer of `tune`.

    Attributes:
        by: what is worth its price: a look of the "teacher"; of the "student", where a second look
            of its own gains as much; "steps", where more steps of its own do; or None.
        reason: why, in a sentence.
        settings: keywords for `kdpp.TeacherGuidedDenoiser`; without guidance ``teacher_steps=0``.
        looks: all that were measured, on the first half of the samples.
        trials: the best looks of each step, in whole runs of the same samples.
        check: the chosen trial again, on the other half; None where no trial was made.
        longer: the student alone in more steps, as many evaluations as the chosen look takes, there
            too.
        distance: mean squared distance of the unguided pictures to the teacher's run, on the other
            half, as a share of their variance.
        cost: of what is advised; None without guidance.
        sampler, levels, teacher_cfg_scale, samples, seed: what it was asked for.
        evaluations: what the tuning itself took, of student and teacher, for all samples.
    """

    by: Helper | None
    reason: str
    settings: dict[str, Any]
    looks: tuple[Look, ...]
    trials: tuple[Trial, ...]
    check: Trial | None
    longer: Longer | None
    distance: float
    cost: Price | None
    sampler: str
    levels: tuple[float, ...]
    teacher_cfg_scale: float
    samples: int
    seed: int
    evaluations: tuple[int, int]

    @property
    def guide(self) -> bool:
        """Whether the teacher should guide."""
        return self.by == "teacher"

    @property
    def code(self) -> str:
        """The verdict as Python."""
        if self.by == "steps" and self.longer is not None:
            return f"sigmas = torch.tensor([{', '.join(f'{s:.6g}' for s in self.longer.levels)}])"
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        helper = self.by or "teacher"
        return f"model = kdpp.TeacherGuidedDenoiser(student, {helper}, {settings})"

    @property
    def advice(self) -> str:
        """The verdict in words, and its price."""
        return "\n".join(_advice(self))

    @property
    def verdict(self) -> str:
        """The verdict in words, its price, and the code."""
        return self.advice if self.by is None else f"{self.advice}\n\n{self.code}"

    @property
    def table(self) -> str:
        """The looks, the best of each step and level, and the trials, as text."""
        return "\n".join(_table(self))


def in_words(change: Change) -> str:
    """A change in words, with its interval."""
    low, high = 100 * change.low, 100 * change.high
    return (
        f"changes by {100 * change.mean:+.1f} % ({low:+.1f} to {high:+.1f}), "
        f"{100 * change.of_variance:+.2g} % of the pictures' variance"
    )


def _described(look: Look) -> str:
    scale = f"CFG scale {look.cfg_scale:g}"
    return f"σ_s = {look.renoise:.3g}, {scale}, {_noise(look.renoise_eta)}"


def _noise(eta: float) -> str:
    return "fresh noise" if eta else "the student's noise"


def _advice(tuning: Tuning) -> list[str]:
    check, cost, longer = tuning.check, tuning.cost, tuning.longer
    if tuning.by == "steps" and longer is not None:
        count = len(longer.levels) - 1
        return [
            f"Do not ask the teacher: {count} steps of the student's own, as many evaluations, "
            f"gain as much or more: {tuning.reason}.",
            "That is its distance to the run in which the teacher takes every one of these steps.",
        ]
    if check is None or cost is None:
        return [
            f"Do not guide, no gain expected: {tuning.reason}.",
            f"Unguided that distance is {100 * tuning.distance:.2g} % of the pictures' variance.",
        ]
    look = check.look if tuning.guide else check.itself
    where = (
        f"step {look.step} of 0 to {len(tuning.levels) - 2} (σ = {look.sigma:.3g}) with "
        f"λ = {look.scale:.2f} ({look.low:.2f} to {look.high:.2f}), {_described(look)}"
    )
    if tuning.guide:
        lines = [
            f"Guide {where}: {tuning.reason}.",
            "With the student itself in the teacher's place, by its own best look at this step, it "
            f"{in_words(check.itself_change)}.",
        ]
        if check.own.high >= 0.0:
            lines.append("It is not sure that the teacher's look gains more than that.")
        if longer is not None:
            lines.append(
                f"Of {len(longer.levels) - 1} steps of the student alone, as many evaluations, it "
                f"{in_words(longer.change)}."
            )
            if longer.over.high >= 0.0:
                lines.append("It is not sure that the teacher's look gains more than that.")
    else:
        lines = [
            "Do not ask the teacher: the student's own second look gains as much or more. Guide "
            f"{where}, with the student as its own teacher: {tuning.reason}."
        ]
    price = f"{cost.student} evaluations of the student and {cost.teacher} of the teacher"
    compute = f", {cost.compute:.2f} times the student's compute alone" if cost.compute else ""
    return [*lines, f"An image takes {price}{compute}."]


def _table(tuning: Tuning) -> list[str]:
    own = {look.place: look.explained for look in tuning.looks if look.by == "student"}
    best: dict[tuple[int, float], Look] = {}
    for look in tuning.looks:
        place = look.step, look.renoise
        if look.by == "teacher" and (place not in best or look.explained > best[place].explained):
            best[place] = look
    lines = [("step", "σ", "σ_s", "CFG", "ρ", "λ*", "interval", "R²", "student's")]
    lines += [
        (
            f"{look.step}",
            f"{look.sigma:.3f}",
            f"{look.renoise:.3f}",
            f"{look.cfg_scale:g}",
            f"{look.renoise_eta:g}",
            f"{look.scale:+.3f}",
            f"{look.low:+.3f} to {look.high:+.3f}",
            f"{look.explained:.3f}",
            f"{own[look.place]:.3f}",
        )
        for look in best.values()
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    half = tuning.samples // 2
    return [
        f"The teacher's best look at each step and level, on {half} samples, with the student's R² "
        f"in its place; intervals at {100 * SURE:g} % for all {len(tuning.looks)} looks together",
        *("  ".join(map(str.rjust, line, widths)) for line in lines),
        "",
        "Whole runs of these samples with the best look of each step; the squared distance to the "
        "teacher's run",
        *(
            f"step {trial.look.step}, λ = {trial.look.scale:.2f}, {_described(trial.look)}: "
            f"{in_words(trial.change)}; the student instead {100 * trial.itself_change.mean:+.1f} %"
            for trial in tuning.trials
        ),
    ]


def draw(tuning: Tuning) -> bytes:
    """The looks' R² and λ*, and what the trials changed, as a PNG file.

    Raises ImportError where matplotlib is missing.
    """
    figure = need_matplotlib()
    left, middle, right = figure.subplots(1, 3)
    kinds = dict.fromkeys((look.by, look.cfg_scale, look.renoise_eta) for look in tuning.looks)
    for k, (by, scale, eta) in enumerate(kinds):
        kind = (by, scale, eta)
        here = [o for o in tuning.looks if (o.by, o.cfg_scale, o.renoise_eta) == kind]
        left.plot(
            [look.step + 0.12 * (k - (len(kinds) - 1) / 2) for look in here],
            [look.explained for look in here],
            "o" if by == "teacher" else "x",
            color=f"C{k}" if by == "teacher" else ("grey", "black")[eta == 0.0],
            ms=4,
            label=f"{by}, CFG {scale:g}, {_noise(eta)}",
        )
    left.axhline(EXPLAINED, color="grey", lw=0.8, ls=":")
    left.set_title("R²: share of the miss that a look explains", fontsize=9)
    for trial in tuning.trials:
        look = trial.look
        ends = [[look.scale - look.low], [look.high - look.scale]]
        middle.errorbar(look.step, look.scale, ends, fmt="o", color="C0", capsize=3)
        middle.annotate(
            f"σ_s = {look.renoise:.3g}", (look.step, look.low), (0, -12),
            textcoords="offset points", ha="center", fontsize=7,
        )  # fmt: skip
        _bar(right, look.step - 0.1, trial.change, "C0", "teacher")
        _bar(right, look.step, trial.itself_change, "grey", "student itself")
    middle.axhline(0.0, color="grey", lw=0.8)
    middle.set_title("λ* of the best look of each step", fontsize=9)
    if tuning.check is not None:
        step = tuning.check.look.step
        _bar(right, step + 0.1, tuning.check.change, "C3", "teacher, fresh samples")
        _bar(right, step + 0.2, tuning.check.itself_change, "black", "student, fresh samples")
        if tuning.longer is not None:
            _bar(right, step + 0.3, tuning.longer.change, "C2", "more own steps, fresh samples")
    right.axhline(0.0, color="grey", lw=0.8)
    right.set_title("change of the distance to the teacher, %", fontsize=9)
    for axes in (left, middle, right):
        axes.set_xticks(range(len(tuning.levels) - 1))
        axes.set_xlim(-0.5, len(tuning.levels) - 1.5)
        axes.set_xlabel("step")
        handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
        if handles:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
            axes.legend(handles.values(), handles.keys(), ncols=2, fontsize=7, **below)
    titles = {
        "teacher": "guide", "student": "the student's own second look",
        "steps": "more steps of its own", None: "do not guide",
    }  # fmt: skip
    figure.suptitle(f"{tuning.sampler}: {titles[tuning.by]}", fontsize=11)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _bar(axes: Any, place: float, change: Change, colour: str, label: str) -> None:
    mean, low, high = (100 * number for number in (change.mean, change.low, change.high))
    errors = [[mean - low], [high - mean]]
    axes.errorbar(place, mean, errors, fmt="o", color=colour, capsize=3, label=label)


def need_matplotlib() -> Any:
    """A new figure; ImportError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'kdpp[lab]'") from error
    return Figure(figsize=(11, 4.2), layout="constrained")
