"""The command line: ``kdpp demo``, and the lab's commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

LAB = {
    "train": "train a teacher or a student, by the methods of the papers",
    "evaluate": "measure a model's images",
    "compare": "run a grid of students, samplers and settings, and report it on one page",
    "tune": "say whether a teacher is worth its calls for a student, and where",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what a user can mend is said in one sentence, with exit status 1."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="kdpp", description="k-diffusion samplers in which a teacher helps a few-step student"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="sample embedded digits, with and without a teacher")
    demo.add_argument("--seed", type=_seed, default=0, help="the first of the seeds (default: 0)")
    demo.add_argument(
        "--out", type=Path, default=Path("kdpp-demo"), help="folder for table and pictures"
    )
    for name, purpose in LAB.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        if given[:1] == [name]:  # the others need not be imported
            import_module(f"kdpp.lab.{name}").add_arguments(command)
    settings = parser.parse_args(given)
    try:
        if settings.command in LAB:
            import_module(f"kdpp.lab.{settings.command}").run(settings)
        else:
            from kdpp.digits.demo import run_demo

            run_demo(settings.seed, settings.out)
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        print(f"kdpp: {error}", file=sys.stderr)
        return 1
    return 0


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 2**32)")
    return seed


if __name__ == "__main__":
    sys.exit(main())
