"""The panel's settings: what they are called, what they may be, how infotext writes them.

A setting is described once, as a `Field`; the accordion, infotext, the XYZ plot and the API's list
of arguments follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["FIELDS", "SAME", "Field", "Settings", "read", "to_infotext"]

SAME = "The student's own checkpoint"
"""The teacher's checkpoint where it is the one that is loaded, without the prompt's LoRAs."""
OVERRIDES = "kdpp_settings"
"""The attribute of a processing object that holds the XYZ plot's values, by a field's name."""


class Settings(NamedTuple):
    """What the panel, or the API's ``args`` in this order, ask for."""

    enabled: bool = False
    teacher: str = SAME
    teacher_lora: str = ""
    teacher_steps: int = 1
    teacher_scale: float = 0.1
    teacher_cfg: float = 7.5
    teacher_negative: str = ""
    renoise: str = "next"
    hires: bool = False

    def apply_to(self, p: Any) -> bool:
        """Whether the pass that is about to run is a guided one."""
        return self.enabled and (self.hires or not getattr(p, "is_hr_pass", False))

    @property
    def helped(self) -> bool:
        """Whether there is anything for a teacher to do."""
        return bool(self.teacher_steps and self.teacher_scale)


class Field(NamedTuple):
    """A setting as it is shown."""

    name: str
    label: str
    infotext: str
    """Its key in the infotext; "" for the one that is told by the others being there."""
    info: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def default(self) -> Any:
        return Settings._field_defaults[self.name]


FIELDS = (
    Field("enabled", "Teacher (kdpp)", "",
          "a teacher helps the few-step model at its first steps"),
    Field("teacher", "Teacher checkpoint", "KDPP teacher",
          "the many-step model, over the same latents; its base, for a LoRA in the prompt"),
    Field("teacher_lora", "Teacher LoRAs", "KDPP teacher LoRA",
          "<lora:name:weight>, as in a prompt; the prompt's own are the student's alone"),
    Field("teacher_steps", "Guided steps", "KDPP guided steps",
          "how many of the first steps are guided; 0 is the student alone", 0, 20, 1),
    Field("teacher_scale", "λ", "KDPP scale",
          "the teacher's share of the mix; 0 is the student alone", 0.0, 1.0, 0.01),
    Field("teacher_cfg", "Teacher CFG", "KDPP teacher CFG",
          "the teacher's CFG scale", 1.0, 30.0, 0.5),
    Field("teacher_negative", "Teacher negative prompt", "KDPP teacher negative",
          "empty: the picture's own"),
    Field("renoise", "Renoise", "KDPP renoise",
          "the noise level at which the teacher is asked", choices=("next", "current", "random")),
    Field("hires", "Apply to hires", "KDPP hires", "guide the second pass of hires. fix, too"),
)  # fmt: skip


def read(p: Any, args: Sequence[Any]) -> Settings:
    """The settings of this run: the panel's, then the XYZ plot's.

    Raises ValueError for one that is none of those allowed.
    """
    given = dict(zip(Settings._fields, args))
    given.update(getattr(p, OVERRIDES, {}))
    for field in FIELDS:
        value = given.get(field.name, field.default)
        kind = type(field.default)
        try:
            given[field.name] = kind(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"kdpp: {field.label} is {value!r}; it must be {WORDS[kind]}"
            ) from None
        if field.choices and value not in field.choices:
            raise ValueError(
                f"kdpp: {field.label} is {value!r}; it must be one of {', '.join(field.choices)}"
            )
    return Settings(**given)


WORDS = {bool: "true or false", float: "a number", int: "a whole number", str: "text"}


def override(p: Any, name: str, value: Any) -> None:
    """Set one setting for this run in the panel's place."""
    setattr(p, OVERRIDES, {**getattr(p, OVERRIDES, {}), name: value})


def to_infotext(settings: Settings) -> Mapping[str, Any]:
    """The settings as infotext has them; none where the panel is off."""
    if not settings.enabled:
        return {}
    shown = {field.infotext: getattr(settings, field.name) for field in FIELDS if field.infotext}
    return {key: value for key, value in shown.items() if value is not False and value != ""}
