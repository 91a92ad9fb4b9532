"""Figures in prose are those of a result file, and every page says of which.

A comment ``<!-- figures: results/demo.txt -->`` before a paragraph, list or table of a page names
the files (in docs/) that its figures stand in. Figures are numbers with a decimal point; those with
a ± must stand there as they are, others as they are or with more places. A comment is for the one
block after it; ``<!-- figures: FILE; of: 0.1 2.5 -->`` names those that are settings.
"""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
CARD = DOCS.parent / "kdpp" / "digits" / "weights" / "MODEL_CARD.md"
PAGES = [DOCS.parent / "README.md", CARD, *sorted(DOCS.glob("*.md"))]
MARK = re.compile(r"<!-- figures: ([^;]*?)(?:; of: (.*?))? -->\s*")
CODE = re.compile(r"```.*?```", re.S)
FIGURE = re.compile(r"(?<![\w.])\d+\.\d+(?: ± \d+\.\d+)?(?!\.?\w)")
SPREAD = re.compile(r"\d ± \d")


def figures(text):
    """The figures of a text, signs left out."""
    return FIGURE.findall(text.replace("\u00a0", " "))


def stands(figure, known):
    """Whether a figure is one of those known, or a rounded one."""
    if figure in known or "±" in figure:
        return figure in known
    half = 0.5 * 10.0 ** -len(figure.partition(".")[2]) + 1e-9
    return any(abs(float(figure) - float(other.split()[0])) <= half for other in known)


def wrong(text):
    """What is wrong with a page: figures that are not in the files that are named for them, spreads
    for which none is named."""
    found = []
    named = None
    for block in re.split(r"\n\s*\n", CODE.sub("", text)):
        if mark := MARK.match(block):
            named, block = mark, block[mark.end() :]
            if not block:
                continue
        if named:
            files, settings = named[1].split(","), (named[2] or "").split()
            known = [
                one for name in files for one in figures((DOCS / name.strip()).read_text("utf-8"))
            ]
            found += [f for f in figures(block) if f not in settings and not stands(f, known)]
        else:
            found += SPREAD.findall(block)
        named = None
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_are_those_of_the_result_files(page):
    assert wrong(page.read_text("utf-8")) == []


def test_a_figure_that_is_changed_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("test_figures.DOCS", tmp_path)
    (tmp_path / "a.txt").write_text("FD 1.234 -0.50 ± 0.02 | 7.5")
    mark = "<!-- figures: a.txt; of: 0.1 -->\n\n"
    right = "FD 1.23, change -0.50 ± 0.02 at λ = 0.1.\n\nOf 9.9 nothing is said."
    assert wrong(mark + right) == []
    for other in ("1.24", "1.2349", "0.50 ± 0.03", "-0.49 ± 0.02", "7.50 ± 0.02"):
        assert wrong(f"{mark}FD {other}") == [other.removeprefix("-")]
    assert wrong("A spread, 0.50 ± 0.02, of no file.") == ["0 ± 0"]
