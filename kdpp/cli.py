"""The command line: ``kdpp demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what a user can mend is said in one sentence, with exit status 1."""
    parser = argparse.ArgumentParser(
        prog="kdpp", description="k-diffusion samplers in which a teacher helps a few-step student"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="sample embedded digits, with and without a teacher")
    demo.add_argument("--seed", type=_seed, default=0, help="the first of the seeds (default: 0)")
    demo.add_argument(
        "--out", type=Path, default=Path("kdpp-demo"), help="folder for table and pictures"
    )
    settings = parser.parse_args(arguments)
    try:
        from kdpp.digits.demo import run_demo

        run_demo(settings.seed, settings.out)
    except (ImportError, OSError, ValueError) as error:
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
