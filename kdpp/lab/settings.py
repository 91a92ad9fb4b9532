"""Settings: dataclasses that are filled from TOML files and from flags, name by name.

A setting's type is its annotation: bool, int, float, str, a Literal of strings, tuple[…, ...],
dict (a table), or one of these or None. `setting` gives it a default and a word of help.

What is stored as JSON is read back into dataclasses by the same rules (`from_json`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kdpp.solver import unknown

__all__ = [
    "as_dict",
    "fill",
    "from_json",
    "read_option",
    "read_toml",
    "read_value",
    "setting",
    "to_flag",
    "to_toml",
]

S = TypeVar("S")


def setting(default: Any, help: str, *, low: float = -math.inf, high: float = math.inf) -> Any:
    """A field of a settings dataclass; a number must lie in [low, high]."""
    about = {"help": help, "low": low, "high": high}
    if isinstance(default, dict):  # each instance has its own
        return dataclasses.field(default_factory=lambda: dict(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def fill(kind: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """An instance of the settings dataclass: its defaults, and the values that are given.

    Args:
        where: whose settings they are, for messages: "of consistency".

    Raises:
        ValueError: a name is unknown (the nearest known one is said), or a value is not of the
            setting's type or range. Whole numbers pass as floats, lists as tuples.
    """
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ValueError(unknown(f"setting{where and ' ' + where}", name, fields))
    checked = {name: _checked(name, value, hints[name]) for name, value in values.items()}
    for name, value in checked.items():
        _check_range(name, value, fields[name].metadata)
    return kind(**checked)


def from_json(kind: type[S], values: Mapping[str, Any], path: str = "") -> S:
    """The dataclass that was stored as JSON, dataclasses inside it too.

    Names that it does not have are passed over: a later version may say more.

    Args:
        path: where it is inside the whole, for messages: "data.".

    Raises ValueError where an entry without a default is missing, or is not of its field's type.
    """
    hints, found = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            found[field.name] = _checked(path + field.name, values[field.name], hints[field.name])
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path}{field.name} is missing")
    return kind(**found)


def read_value(kind: type, name: str, text: str) -> Any:
    """The value that a flag's text stands for: TOML (``2e-3``, ``[1, 2]``, ``{width = 64}``).

    A string needs no quotes, and ``none`` is None where the setting may be None. Where it may be a
    number or a string, what reads as a number is one.
    """
    hint = get_type_hints(kind)[name]
    options = _options(hint)
    if type(None) in options and text.lower() == "none":
        return None
    texts = [option is str or get_origin(option) is Literal for option in options]
    if any(texts) and all(text or option is type(None) for text, option in zip(texts, options)):
        return text
    return _toml_value(text)


def read_option(text: str) -> tuple[str, Any]:
    """Name and value of a flag ``--option NAME=VALUE``; ValueError for another text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option is {text!r}; it must be NAME=VALUE, such as eta=0.5")
    return name.strip(), _toml_value(value)


def _toml_value(text: str) -> Any:
    """What the text is as TOML; the text itself where it is none."""
    try:
        return _toml().loads(f"value = {text}")["value"]
    except ValueError:
        return text


def read_toml(path: str | Path) -> dict[str, Any]:
    """The table of a TOML file.

    Raises OSError where it cannot be read, ValueError where it is no TOML: both name the file.
    """
    path = Path(path)
    try:
        return _toml().loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except OSError as error:
        raise type(error)(f"{path} could not be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path} is no TOML file: {error}") from error


def to_toml(values: Mapping[str, Any]) -> str:
    """The values as TOML, a line for each; None is left out, tables are written inline.

    `fill` reads the text "none" as None, for a setting whose default is another.
    """
    return "".join(f"{name} = {_written(v)}\n" for name, v in values.items() if v is not None)


def to_flag(value: Any) -> str:
    """A setting as a flag's text, which `read_value` reads back: TOML, strings without quotes."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else _written(value)


def as_dict(settings: Any) -> dict[str, Any]:
    """The settings as JSON has them: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return plain


def _toml() -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[no-redef]
        except ModuleNotFoundError as error:
            raise ImportError('TOML needs tomli: pip install "kdpp[lab]"') from error
    return tomllib


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        there = {name: item for name, item in value.items() if item is not None}
        return "{" + ", ".join(f"{name} = {_written(v)}" for name, v in there.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_written, value)) + "]"
    # JSON's strings, numbers, true and false are TOML's.
    return json.dumps(value, ensure_ascii=False)


def _options(hint: Any) -> tuple[Any, ...]:
    """The types that an annotation allows."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _checked(name: str, value: Any, hint: Any) -> Any:
    if value == "none" and type(None) in _options(hint):  # as TOML, which has no null, writes it
        return None
    for option in _options(hint):
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return from_json(option, value, f"{name}.")  # type: ignore[arg-type]
        fits, converted = _fit(value, option)
        if fits:
            return converted
    allowed = " or ".join(map(_said, _options(hint)))
    raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _check_range(name: str, value: Any, about: Mapping[str, Any]) -> None:
    low, high = about.get("low", -math.inf), about.get("high", math.inf)
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if isinstance(number, int | float) and not low <= number <= high:
            allowed = (
                f"in [{low:.12g}, {high:.12g}]" if math.isfinite(high) else f"at least {low:g}"
            )
            raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether the value is of the type, and the value in that type."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return next((fit for one in get_args(hint) if (fit := _fit(value, one))[0]), (False, None))
    if hint is type(None):
        return value is None, None
    if origin is Literal:
        return value in get_args(hint), value
    if origin is tuple:
        kinds = get_args(hint)
        if not isinstance(value, list | tuple):
            return False, None
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        parts = [_fit(item, kind) for item, kind in zip(value, kinds)]
        fits = len(value) == len(kinds) and all(fits for fits, _ in parts)
        return fits, tuple(item for _, item in parts)
    if origin is dict and isinstance(value, Mapping) and get_args(hint)[1] is not Any:
        items = {name: _fit(item, get_args(hint)[1]) for name, item in value.items()}
        fits = all(fits for fits, _ in items.values())
        return fits, {name: item for name, (_, item) in items.items()}
    if hint is float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False, None
        with suppress(OverflowError):  # a whole number that no float can be
            value = float(value)
        return isinstance(value, float) and math.isfinite(value), value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, origin or hint), value


def _said(hint: Any) -> str:
    if hint is type(None):
        return "none"
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_said, get_args(hint)))
    if get_origin(hint) is tuple:
        first, *rest = get_args(hint)
        return f"a list ({_said(first)}, …)" if rest == [...] else f"{1 + len(rest)} numbers"
    if get_origin(hint) is dict and get_args(hint)[1] is not Any:
        return f"a table, each entry {_said(get_args(hint)[1])}"
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    return names.get(hint, "a table")
