"""How long the default teacher and one student of each kind take to train.

    python benchmarks/training_time.py [--iterations N] [--json FILE]

`kdpp train` with every method at its defaults, seed 0, one after the other, on one thread: the
teacher first, then the students of the teacher that ships with kdpp (those of guided distillation's
second stage, of the student of its first). CPU seconds of each, and the clock's for all. LCM from
the teacher's weights (`consistency --network none`) and both kinds of DDIL are kinds of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from kdpp.cli import main as kdpp_command
from kdpp.lab.methods import load_methods
from measure import about, heading, write

STAGE_TWO = ("guided-stage-two", "encoder")
MORE = {
    "consistency, the teacher's network": ("consistency", "--network", "none"),
    "guided-stage-two, stochastic": ("guided-stage-two", "--kind", "stochastic"),
    "guided-stage-two, one CFG scale": ("guided-stage-two", "--guidance", "2.0"),
    "ddil, of consistency": ("ddil", "--base", "consistency"),
}


def seconds(words: tuple[str, ...], name: str, folder: Path, cut: list[str]) -> float:
    """The CPU time of one training."""
    teacher = ["--teacher", str(folder / "guided-stage-one")] if words[0] in STAGE_TWO else []
    start, said = time.process_time(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        failed = kdpp_command(["train", *words, "--out", str(folder / name), *teacher, *cut])
    if failed:
        sys.exit(f"{name}: {said.getvalue()}")
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, help="of each, to see whether it runs")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    settings = parser.parse_args()
    cut = [] if settings.iterations is None else ["--iterations", str(settings.iterations)]
    ways = {name: (name,) for name in load_methods()} | MORE
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"method": name, "cpu": seconds(words, name, Path(folder), cut)}
            for name, words in tqdm(ways.items(), desc="training")
        ]
    clock = time.perf_counter() - start
    print(heading(about()))
    for row in rows:
        print(f"{row['method']:36} {row['cpu']:7.0f} s")
    total = sum(row["cpu"] for row in rows)
    print(f"{'all':36} {total:7.0f} s = {total / 60:.1f} min (by the clock {clock / 60:.1f} min)")
    write(settings.json, {"methods": rows, "clock": clock})


if __name__ == "__main__":
    main()
