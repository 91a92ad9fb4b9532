"""The command line of kdpp: demo, solvers, checkpoints, hosts, and the lab."""

from __future__ import annotations

import argparse
import gc
import inspect
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

from kdpp._version import __version__
from kdpp.lab.console import say
from kdpp.lab.plugins import import_file, load_entry_points, place_of
from kdpp.solver import SOLVERS, solver_of, unknown

LAB = ("train", "evaluate", "compare", "statistics", "tune")
MODULES = {name: f"kdpp.lab.{name}" for name in LAB}
MODULES["generate"] = "kdpp.checkpoints.generate"
MODULES["install"] = MODULES["uninstall"] = "kdpp.hosts.install"
"""The commands with a module of their own."""
COMMANDS = {
    "solvers": "name the solvers, or say what one does and takes",
    "demo": "sample embedded digits, with and without a teacher",
    "generate": "draw pictures of a model, alone or with a teacher's help",
    "inspect": "say what a checkpoint file is, and which presets fit it",
    "train": "train a teacher or a student, by the methods of the papers",
    "evaluate": "measure a model's images",
    "compare": "run a grid of students, samplers and settings, and report it on one page",
    "statistics": "keep the features of real images, which others' images are compared with",
    "tune": "say whether a teacher is worth its calls for a student, and where",
    "install": "put kdpp into a host as its extension; no package of the host changes",
    "uninstall": "take kdpp out of a host again",
}
TAKES_NO_FILES = {"demo", "inspect", "install", "statistics", "uninstall"}
"""The commands that need no solvers or methods of one's own."""
KEEPS = {"generate", "train", "evaluate", "compare", "tune"}
"""The commands that keep what is finished, so that the same one goes on."""
EXPECTED = (ImportError, OSError, ValueError, ArithmeticError, MemoryError)
"""What a user can mend."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what a user can mend is said in one sentence, with exit status 1."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if arguments is None:  # this process is the command: a full collection, which looks through
        gc.set_threshold(*gc.get_threshold()[:2], 1000)  # all that was imported, is rarely worth it
    with suppress(AttributeError, ValueError):  # a terminal without Greek shows "?" for λ
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        _run(given)
    except KeyboardInterrupt as stop:
        kept = "what is finished is kept; give the same command again, and it goes on"
        left = kept if given[0] in KEEPS else "nothing was written"
        print(f"\nkdpp: {str(stop) or f'stopped; {left}'}", file=sys.stderr)
        return 130
    except Exception as error:
        place = place_of(error)  # a mistake in a file of the user's own
        if place is None and not isinstance(error, EXPECTED):
            raise
        said = f"{place}: {type(error).__name__}: {error}" if place else str(error)
        print(f"kdpp: {said or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _run(given: Sequence[str]) -> None:
    command = given[0] if given else ""
    # The other commands' modules need not be imported.
    module = import_module(MODULES[command]) if command in MODULES else None
    parsers: dict[str, argparse.ArgumentParser] = {}
    settings, others = _parser(parsers, command, module).parse_known_args(given)
    if others:
        parsers[command].error(_unknown(others[0], parsers[command], module))
    if command == "demo":
        from kdpp.digits.demo import run_demo

        run_demo(settings.seed, settings.out)
        return
    if command == "inspect":
        say(_inspected(settings.path))
        return
    if command in TAKES_NO_FILES and module is not None:
        module.run(settings)
        return
    import_module("kdpp.solvers")  # enters kdpp's own; not before, since --help needs no torch
    load_entry_points("kdpp.solvers")
    for path in settings.imports:
        import_file(path)
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # their warnings are for programmers
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if module is None:
        say(_solvers() if settings.name is None else _solver(settings.name))
    else:
        module.run(settings)


def _parser(
    parsers: dict[str, argparse.ArgumentParser], command: str, module: ModuleType | None
) -> argparse.ArgumentParser:
    """The arguments of all commands; ``parsers`` gets theirs. Only one has its module's."""
    parser = argparse.ArgumentParser(
        prog="kdpp", description="k-diffusion samplers in which a teacher helps a few-step student"
    )
    parser.add_argument("--version", action="version", version=f"kdpp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in COMMANDS.items():
        parsers[name] = commands.add_parser(
            name, help=purpose, description=purpose, allow_abbrev=False
        )
        if name not in TAKES_NO_FILES:
            parsers[name].add_argument(
                "--import", dest="imports", action="append", default=[], metavar="FILE.py",
                help="first run a file that makes solvers or methods of your own; may be repeated",
            )  # fmt: skip
    parsers["solvers"].add_argument("name", nargs="?", metavar="SOLVER", help="one of them")
    parsers["inspect"].add_argument(
        "path", type=Path, metavar="FILE", help="a safetensors file, or a folder of diffusers"
    )
    add = parsers["demo"].add_argument
    add("--seed", type=_seed, default=0, help="the first of the seeds (default: 0)")
    add("--out", type=Path, default=Path("kdpp-demo"), help="folder for table and pictures")
    if module is not None:
        module.add_arguments(parsers[command])
    return parser


def _unknown(flag: str, parser: argparse.ArgumentParser, module: ModuleType | None) -> str:
    """What to give instead of an argument that is not known."""
    name = flag.partition("=")[0]
    renamed = getattr(module, "RENAMED", {})
    if name in renamed:
        return f"{name} is {renamed[name]} now"
    flags = [option for action in parser._actions for option in action.option_strings]
    return unknown("argument", name, flags)


def _solvers() -> str:
    """All solvers as a table."""
    lines = [("", "order", "evaluations a step", "", "noise", "options")]
    for solver in SOLVERS.values():
        first = f" ({solver.extra:+d} once)" if solver.extra else ""
        lines.append((
            solver.name,
            "-" if solver.order is None else str(solver.order),
            f"{solver.evaluations}{first}",
            "multistep" if solver.multistep else "",
            "-" if solver.noise == "none" else solver.noise,
            " ".join(solver.options) or "-",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "\n".join([*table, "", "`kdpp solvers SOLVER` says what one does and takes."])


def _solver(name: str) -> str:
    """What a solver does and takes."""
    solver, _ = solver_of(name)
    said = inspect.getdoc(solver.sample or solver.steps) or ""
    call = f"kdpp.{solver.sample.__name__}" if solver.sample else f'kdpp.sample("{solver.name}", …)'
    return f"{solver}\n\n{said.replace('``', '')}\n\nIn Python: {call}"


def _inspected(path: Path) -> str:
    """What a checkpoint is, and the presets that fit it."""
    from kdpp.checkpoints.files import inspect as inspect_file
    from kdpp.checkpoints.presets import fitting, named

    facts = inspect_file(path)
    preset = named(facts)
    others = ", ".join(other.name for other in fitting(facts) if other is not preset)
    lines = [str(facts)]
    if preset is not None:
        lines.append(f"{'preset':14}{preset.name}, by the file's name: {preset.what}")
    if others:
        lines.append(f"{'others':14}{others}" if preset else f"{'presets':14}{others}")
    return "\n".join(lines)


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 2**32)")
    return seed


if __name__ == "__main__":
    sys.exit(main())
