"""``kdpp compare SPEC.toml --out DIR``: a grid of ways to sample, as a page and as tables."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from importlib.resources import as_file, files
from pathlib import Path

from kdpp.lab.console import say

__all__ = ["add_arguments", "compare", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Run a grid of students, samplers, steps and kinds of guidance over several seeds, and "
        "write report.html, results.csv and results.json. A run that was stopped goes on where it "
        "was; under `accelerate launch` the processes share the work."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("spec", nargs="?", type=Path, metavar="SPEC.toml", help="what to compare")
    what.add_argument("--example", action="store_true", help="run the spec that ships with kdpp")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and page")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(arguments: argparse.Namespace) -> None:
    """Run the command; errors as in `compare`."""
    example = files("kdpp.lab") / "examples" / "digits.toml"
    with as_file(example) if arguments.example else nullcontext(arguments.spec) as path:
        compare(path, arguments.out, arguments.device)


def compare(path: Path, out: Path, device: str = "cpu") -> None:
    """Run the spec in the file; write ``report.html``, ``results.csv`` and ``results.json``.

    Raises as `kdpp.lab.bench.run` does, and as `kdpp.lab.spec.read_spec` for the file.
    """
    from kdpp.lab import bench, report  # torch, for which --help need not wait
    from kdpp.lab.spec import read_spec

    spec = read_spec(path)
    written = {"results.csv": report.table, "report.html": report.page}
    found = bench.run(
        spec, out, device,
        lambda found: {name: make(found).encode() for name, make in written.items()},
        text=path.read_text(encoding="utf-8"),
    )  # fmt: skip
    if found is not None:
        for name in (bench.RESULTS, *written):
            say(f"wrote {out / name}")
