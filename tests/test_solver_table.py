"""The docs' table of solvers says what the code says and what a measurement gives."""

from pathlib import Path

import pytest

import solver_table

LINES = (Path(__file__).parents[1] / "docs" / "solver_table.md").read_text().splitlines()
TABLE = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in LINES]


def test_it_lists_every_solver_with_its_claims():
    """Names, evaluations, orders, noise and needs are the code's, in its order."""
    assert TABLE[0] == solver_table.HEAD
    claims = [solver_table.facts(*line) for line in solver_table.lines()]
    assert [row[:5] for row in TABLE[2:]] == claims


@pytest.mark.parametrize("row", range(2, len(TABLE)), ids=lambda i: TABLE[i][0].strip("`"))
def test_the_figures_are_what_is_measured(row):
    """Orders measured again to 0.02, errors to 2 %."""
    found = solver_table.figures(*solver_table.lines()[row - 2])
    for cell, again in zip(TABLE[row][5:], found, strict=True):
        if cell == "–":
            assert again == "–"
            continue
        said, now = (float(text.split()[0]) for text in (cell, again))
        assert now == pytest.approx(said, abs=0.02, rel=0.02)
