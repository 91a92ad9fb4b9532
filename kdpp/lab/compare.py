"""``kdpp compare SPEC.toml --out DIR``: a grid of ways to sample, as a page and as tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from kdpp.lab.console import say

if TYPE_CHECKING:
    from kdpp.lab.bench import Report
    from kdpp.lab.spec import Spec

__all__ = ["add_arguments", "compare", "compare_solvers", "run"]


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
    what.add_argument("--solvers", metavar="MODEL", help="which solver and levels, at 4 to 20 "
                      "evaluations? A checkpoint, or digits:teacher")  # fmt: skip
    add = parser.add_argument
    add("--cond-scale", type=float, default=1.0, help="the CFG scale, for --solvers (default: 1)")
    add("--images", type=int, default=500, help="of each seed, for --solvers (default: 500)")
    add("--seeds", type=int, default=3, help="how many, for --solvers (default: 3)")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and page")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(arguments: argparse.Namespace) -> None:
    """Run the command; errors as in `compare`."""
    if arguments.solvers:
        compare_solvers(arguments)
        return
    example = files("kdpp.lab") / "examples" / "digits.toml"
    with as_file(example) if arguments.example else nullcontext(arguments.spec) as path:
        compare(path, arguments.out, arguments.device)


def compare_solvers(arguments: argparse.Namespace) -> None:
    """Run the study of a model's solvers (`kdpp.lab.study`); write its plot beside the other files,
    and print the answer. Raises as `kdpp.lab.bench.run` does."""
    from kdpp.lab import study  # torch, for which --help need not wait
    from kdpp.lab.answer import need_matplotlib

    need_matplotlib()
    given = (arguments.solvers, arguments.cond_scale, arguments.images, arguments.seeds)
    more = {"solvers.png": lambda found: study.draw(found.results)}
    found = _run(study.spec_for(*given), arguments.out, arguments.device, more)
    if found is not None:
        say(study.answer(found.results))


def compare(path: Path, out: Path, device: str = "cpu") -> None:
    """Run the spec in the file; write ``report.html``, ``results.csv`` and ``results.json``.

    Raises as `kdpp.lab.bench.run` does, and as `kdpp.lab.spec.read_spec` for the file.
    """
    from kdpp.lab.spec import read_spec

    _run(read_spec(path), out, device, {}, path.read_text(encoding="utf-8"))


def _run(
    spec: Spec,
    out: Path,
    device: str,
    more: Mapping[str, Callable[[Report], bytes]],
    text: str | None = None,
) -> Report | None:
    """Run a spec, write its report and ``more`` files, and say which."""
    from kdpp.lab import bench, report

    written: dict[str, Callable[[Report], bytes]] = {
        "results.csv": lambda found: report.table(found).encode(),
        "report.html": lambda found: report.page(found).encode(),
        **more,
    }
    found = bench.run(
        spec, out, device, lambda found: {n: make(found) for n, make in written.items()}, text
    )
    if found is not None:
        for name in (bench.RESULTS, *written):
            say(f"wrote {out / name}")
    return found
