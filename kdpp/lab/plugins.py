"""Methods and solvers of one's own: from a Python file, or from an installed package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["import_file", "load_entry_points", "load_function", "place_of"]


_IMPORTED: set[str] = set()
"""The files that were imported."""


def import_file(path: str | Path) -> ModuleType:
    """Run a Python file, once in a process, so that what it enters is there by its name.

    Methods are entered by `kdpp.lab.methods.method`, solvers by `kdpp.solver`.

    Raises FileNotFoundError where there is no file, ImportError, with the line, where it fails.
    """
    return _import(Path(path).resolve())


@cache
def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no Python file at {path}")
    name = str(path)  # as a module's name: no two are the same
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file; its name must end in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    _IMPORTED.add(name)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        syntax = f"{path}, line {error.lineno}" if isinstance(error, SyntaxError) else None
        place = syntax or place_of(error) or path
        raise ImportError(f"{place}: {type(error).__name__}: {error}", path=name) from error
    return module


def load_function(name: str) -> Callable[..., Any]:
    """The function of ``module:function`` or ``FILE.py:function``.

    Raises ValueError for another text, and where the module has no such function; FileNotFoundError
    and ImportError as `import_file`.
    """
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function.isidentifier():
        raise ValueError(
            f"{name!r} names no function; it must be module:function, or FILE.py:function"
        )
    module = import_file(place) if place.endswith(".py") else import_module(place)
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{place} has no function {function!r}")
    made: Callable[..., Any] = found
    return made


def place_of(error: Exception) -> str | None:
    """The last line of an imported file that the error came by; None where it came by none."""
    place, trace = None, error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file in _IMPORTED:
            place = f"{file}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return place


@cache
def load_entry_points(group: str) -> None:
    """Import what installed packages name under this group of entry points, once in a process.

    Raises ImportError, with the package, where one cannot be imported.
    """
    for entry in entry_points(group=group):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else "a package"
            raise ImportError(
                f"{package}, installed here, offers {group} {entry.name!r} ({entry.value}), which "
                f"cannot be imported: {error}; mend or uninstall it"
            ) from error
