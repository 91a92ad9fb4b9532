"""The table of presets in the docs, made from `kdpp.checkpoints.presets`.

python benchmarks/presets_table.py         # writes docs/presets_table.md
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kdpp.checkpoints.presets import PRESETS, Preset

TABLE = Path(__file__).parents[1] / "docs" / "presets_table.md"
COLUMNS = (
    "preset", "student", "steps", "sampler", "λ", "k", "teacher's CFG", "student's CFG",
    "LoRA weight", "tried",
)  # fmt: skip


def row(preset: Preset) -> tuple[str, ...]:
    """A preset's settings."""
    usual, *more = preset.steps
    return (
        f"`{preset.name}`",
        preset.what,
        f"{usual} ({min(preset.steps)} to {max(preset.steps)})" if more else f"{usual}",
        f"`{preset.sampler}`",
        f"{preset.teacher_scale:g}",
        str(preset.teacher_steps),
        f"{preset.teacher_cfg_scale:g}",
        f"{preset.cond_scale:g}" + " (an input)" * preset.guidance_input,
        "–" if preset.lora_weight is None else f"{preset.lora_weight:g}",
        ("here" if preset.run else "in the paper" if preset.paper else "no"),
    )


def levels(preset: Preset) -> str:
    """Each run that it was made for, in full; the usual one first."""
    lines = []
    for steps in preset.steps:
        sigmas = ", ".join(f"{level:.4g}" for level in preset.sigmas(steps))
        if preset.flow:
            lines.append(f"τ {sigmas}" + " at 1024 × 1024" * bool(preset.shift_of_size))
        else:
            times = ", ".join(map(str, preset.timesteps[preset.steps.index(steps)]))
            lines.append(f"timesteps {times}: σ {sigmas}")
    if preset.boundary_scalings:
        lines.append("with LCM's boundary scalings, `kdpp.LCMDenoiser`")
    if preset.expert_boundary:
        lines.append(f"the high-noise expert from τ = {preset.expert_boundary:g} up")
    return "".join(f"\n  - {line}" for line in lines)


def origin(preset: Preset) -> str:
    """Where its levels are from, and what else to know."""
    return f" {preset.source}.{' ' * bool(preset.note)}{preset.note}"


def grouped(told: Callable[[Preset], str]) -> str:
    """What is told of each preset, those of which the same is told together."""
    groups: dict[str, list[str]] = {}
    for preset in PRESETS.values():
        groups.setdefault(told(preset), []).append(f"`{preset.name}`")
    return "\n".join(f"- {', '.join(names)}:{text}" for text, names in groups.items())


def text() -> str:
    """The table, the levels in full, and the sources."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(row, PRESETS.values())]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    return f"{table}\n\n## Levels\n\n{grouped(levels)}\n\n## Sources\n\n{grouped(origin)}\n"


if __name__ == "__main__":
    TABLE.write_text(text(), encoding="utf-8")
