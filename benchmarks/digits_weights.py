"""Train the networks that ship with kdpp, and round them to float16.

    python benchmarks/digits_weights.py --out RUNS [--weights kdpp/digits/weights]

`kdpp train` as `digits_weights.toml` says, each into a folder of RUNS; what is finished is kept.
The student is distilled from the teacher as it ships, rounded. CPU seconds of each are printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from kdpp.cli import main as kdpp_command
from kdpp.lab.models import WEIGHTS, read_checkpoint, save_model
from kdpp.lab.settings import read_toml, to_flag

SPEC = Path(__file__).with_suffix(".toml")


def train(name: str, runs: Path, weights: Path) -> None:
    """One network, by `kdpp train`; then its weights in float16."""
    settings = read_toml(SPEC)[name]
    method, teacher = settings.pop("method"), settings.get("teacher")
    if teacher:
        settings["teacher"] = str(weights / f"{teacher}.safetensors")
    flags = [part for key, value in settings.items() for part in (f"--{key}", to_flag(value))]
    start = time.process_time()
    if kdpp_command(["train", method, "--out", str(runs / name), "--seed", "0", *flags]):
        sys.exit(f"training the {name} failed")
    network, card = read_checkpoint(runs / name)
    if card.teacher:
        card = replace(card, teacher=replace(card.teacher, name=f"digits:{teacher}"))
    save_model(weights / f"{name}.safetensors", network, card, torch.float16)
    print(f"{name}: {time.process_time() - start:.0f} CPU s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the files made")
    given = parser.parse_args()
    given.weights.mkdir(parents=True, exist_ok=True)
    for name in read_toml(SPEC):
        train(name, given.out, given.weights)


if __name__ == "__main__":
    main()
