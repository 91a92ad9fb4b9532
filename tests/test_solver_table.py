"""The docs' table of solvers says what the code says and what a measurement gives."""

import pytest

import solver_table

LINES = {solver_table.facts(*line)[0]: line for line in solver_table.lines()}
STORED = {row[0]: row for row in solver_table.stored()}


def test_it_lists_every_solver_with_its_facts():
    """In the code's order."""
    facts = [solver_table.facts(*line) for line in LINES.values()]
    found = [row[: len(solver_table.FACTS)] for row in STORED.values()]
    assert found == facts, "make the table anew: python benchmarks/solver_table.py"


@pytest.mark.parametrize("name", [name for name in STORED if name in LINES])
def test_the_figures_are_what_is_measured(name):
    """Orders measured again to 0.02, errors to 2 %."""
    again = solver_table.figures(*LINES[name])
    for cell, now in zip(STORED[name][len(solver_table.FACTS) :], again, strict=True):
        if cell == "–":
            assert now == "–"
            continue
        said, found = (float(text.split()[0]) for text in (cell, now))
        assert found == pytest.approx(said, abs=0.02, rel=0.02)
