"""What was measured: as one self-contained page, and as comma-separated values.

Both are functions of the report alone: the same one gives the same bytes. The page asks nothing of
any network; its styles, its script and its pictures are inside it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from kdpp.lab.metrics import METRICS

if TYPE_CHECKING:
    from kdpp.lab.bench import Report

__all__ = ["page", "table"]

CellResults = Mapping[str, Any]
Results = Mapping[str, Any]


class About(NamedTuple):
    """A column's header, and what it means."""

    title: str
    hint: str


SETTINGS = {
    "student": About("student", "the network that samples"),
    "sampler": About("sampler", "a name of kdpp.SOLVERS"),
    "steps": About("steps", "of the sampler"),
    "schedule": About("schedule", "the name of the levels; without one they are the student's own"),
    "levels": About("levels", "the noise levels σ"),
    "options": About("options", "of the sampler, where they are not its defaults"),
    "cond_scale": About("CFG", "the student's CFG scale"),
    "guide": About("guide", "whose estimate revises the student's"),
    "teacher_scale": About("λ", "the share of the guide's estimate"),
    "teacher_steps": About("k", "the first k steps are guided, or the steps in brackets"),
    "renoise": About("σₛ", "the level that the guide's input is noised to"),
    "renoise_eta": About("ρ", "the share of fresh noise in that: 1 random, 0 deterministic"),
    "teacher_cfg_scale": About("guide's CFG", "the guide's CFG scale"),
}
GUIDANCE = ("teacher_scale", "teacher_steps", "renoise", "renoise_eta", "teacher_cfg_scale")
COSTS = {
    "student_evaluations": About("student", "evaluations of the student; both halves of CFG count"),
    "teacher_evaluations": About("teacher", "evaluations of the teacher; both halves of CFG count"),
    "compute": About("compute", "parameters × evaluations for one image, in millions"),
    "milliseconds": About("ms", "sampling time of one image, in milliseconds"),
}
AXES = {
    "evaluations": About("evaluations", "network evaluations for one image"),
    "compute": About("compute", "parameters × evaluations for one image, in millions"),
    "milliseconds": About("time", "sampling time of one image, in milliseconds"),
}
GUIDES = {"none": "", "teacher": "teacher", "self": "itself"}
CHANGES = {
    "change": About("change", "paired: against the same student without a guide, seed by seed"),
    "self_change": About("self control", "the change with the student in the teacher's place"),
    "own_share": About("teacher's own", "paired: against the student in the teacher's place"),
    "over_steps": About("over own steps", "paired: against as many evaluations as own steps"),
}
SHOWN = ("fd", "fd_teacher", "inception_score", "accuracy")
"""The figures that the page begins with, beside metrics of the user's own; buttons show the
others."""


# Comma-separated values ---------------------------------------------------------------------------


def table(found: Report) -> str:
    """The cells as comma-separated values: a line each, with every setting, cost and figure.

    A figure's columns are its mean over the seeds, ``_sd``, the standard deviation, and ``_low``
    and ``_high``, the 95 % confidence interval. ``_change…`` is the same of the paired change
    against the plain student, with its ``_verdict``; ``_self_change…`` what the self control
    changes, ``_own_share…`` the paired change against the self control, and ``_over_steps…`` that
    against as many evaluations as steps of the student's own. What does not apply is empty. Texts
    that a spreadsheet would take for a formula begin with an apostrophe.
    """
    lines = [_record(cell) for cell in found.results["cells"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _record(cell: CellResults) -> dict[str, Any]:
    """One line of the comma-separated values."""
    record: dict[str, Any] = {}
    for name, value in cell.items():
        if name == "costs":
            record |= value
        elif name == "metrics":
            for metric, found in value.items():
                record |= _estimate(metric, found)
                for kind in CHANGES:
                    change = found[kind] or {}
                    record |= _estimate(f"{metric}_{kind}", change)
                    record[f"{metric}_{kind}_verdict"] = change.get("verdict")
        else:
            record[name] = _safe(value)
    return record


def _safe(value: Any) -> Any:
    """A setting as an entry; a text that a spreadsheet would run is marked as text."""
    if isinstance(value, list):
        return " ".join(map(repr, value))
    if isinstance(value, Mapping):
        return " ".join(f"{name}={one}" for name, one in value.items()) or None
    risky = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if risky else value


def _estimate(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    ends = {"": "mean", "_sd": "deviation", "_low": "low", "_high": "high"}
    return {name + end: found.get(key) for end, key in ends.items()}


# The page -----------------------------------------------------------------------------------------


def page(found: Report) -> str:
    """The page; every string of the results is escaped."""
    results = found.results
    parts = files("kdpp.lab") / "templates"
    content = {
        "title": escape(results["title"]),
        "summary": _summary(results),
        "table_note": _table_note(results),
        "table": _table(results),
        "samples": _samples(found),
        "settings": _settings(results),
        "data": _plot_data(results),
    }
    for name in ("css", "js"):
        content[name] = (parts / f"report.{name}").read_text(encoding="utf-8").strip()
    template = (parts / "report.html").read_text(encoding="utf-8")
    # In one pass: what is filled in is not searched for markers.
    return re.sub(r"\{\{(\w+)\}\}", lambda marker: content[marker[1]], template)


def _summary(results: Results) -> str:
    settings = results["settings"]
    text = (
        f"{_count(len(results['cells']), 'cell')}, each of "
        f"{_count(len(settings['seeds']), 'seed')} with {_count(settings['images'], 'image')}; "
        f"last measured {results['finished']}, kdpp {results['versions']['kdpp']}."
    )
    against = settings["compared_with"]
    if against is not None:
        compared = _count(against["images"], f"{against['part']} image")
        text += f" Compared with {compared} of {against['source']} in {settings['features']}."
    own, titles = results["data"], {one["name"]: one["title"] for one in results["metrics"]}
    if own:
        figures = [f"{title} {own[name]:.3g}" for name, title in titles.items() if name in own]
        real = _count(results["data_images"], "real image")
        text += f" The same of {real}: {', '.join(figures)}."
    remarks = "".join(f'<p class="remark">{escape(one)}.</p>' for one in results["remarks"])
    return f"<p>{escape(text)}</p>{remarks}"


def _table_note(results: Results) -> str:
    guides = {cell["guide"] for cell in results["cells"]}
    text = (
        f"A click on a header sorts. ± is the standard deviation over the {_units(results)}. "
        "The settings are in the last columns."
    )
    if len(guides) > 1:
        text += (
            " A change is paired: the same student, sampler and steps without a guide, from the "
            "same noise, seed by seed. Where its 95 % interval holds 0 it is “none seen”. The "
            "intervals of a metric are read together (Holm): the 5 % are for all of them."
        )
    if "self" in guides:
        text += (
            " The self control has the student in the teacher's place: what that changes comes of "
            "looking twice. Only what is the teacher's own needs the teacher."
        )
    if any(cell["longer"] for cell in results["cells"]):
        text += (
            " Over own steps is the change against the student alone, with as many evaluations as "
            "steps of its own. These may cost far less compute than a large teacher's."
        )
    usual = _usual(results)
    fixed = [_said(name, value) for name, value in usual.items()]
    if fixed:
        text += f" Where a cell says nothing else: {', '.join(fixed)}."
    return f'<p class="note">{escape(text)}</p>'


def _units(results: Results) -> str:
    """Over what means are taken."""
    several = [c for c in results["cells"] for f in c["metrics"].values() if f["trainings"]]
    return "trainings, or seeds where a student has one" if several else "seeds"


def sizes(results: Results, metric: Mapping[str, Any]) -> str:
    """How many images a figure is of, and how many they are compared with: ``N = 500 : 1,797``."""
    count, against = results["settings"]["images"], results["settings"]["compared_with"]
    others = {"data": against and against["images"], "teacher": count, None: None}[metric["to"]]
    return f"N = {count:,}" + (f" : {others:,}" if others else "")


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


# Its table ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of the table.

    ``entry`` gives what a cell shows, as HTML, and what it is sorted by (None: nothing).
    """

    name: str
    about: About
    group: About
    entry: Callable[[CellResults], tuple[str, Any]]
    metric: str = ""
    numeric: bool = True


def _columns(results: Results) -> list[Column]:
    """The cells' numbers, the settings that differ, the costs and the figures."""
    cells, nothing = results["cells"], About("", "")
    names = _names(results)
    columns = [Column("cell", About("cell", "leads to the cell's samples"), nothing, _named(names))]
    for metric in results["metrics"]:
        name = metric["name"]
        group = About(f"{metric['title']} ({sizes(results, metric)})", _meaning(metric))
        found = [cell["metrics"][name] for cell in cells]
        figure = About("mean", "over the seeds ± standard deviation")
        columns.append(Column(name, figure, group, _figure(name, _digits(found)), name))
        for kind, about in CHANGES.items():
            changes = [one[kind] for one in found if one[kind]]
            if changes:
                entry = _change(metric, kind, _digits(changes))
                columns.append(Column(f"{name}_{kind}", about, group, entry, name))
    for name, about in COSTS.items():
        counts = name.endswith("evaluations")
        group = About("evaluations" if counts else "cost", "of one image")
        columns.append(Column(name, about, group, _cost(name)))
    for name in _varied(results):
        numeric = all(isinstance(cell[name], int | float | None) for cell in cells)
        group = About("settings", "those that differ between cells")
        columns.append(Column(name, SETTINGS[name], group, _setting(name), numeric=numeric))
    return columns


def _varied(results: Results) -> list[str]:
    """The settings that the table shows: the student, and those that differ between cells."""
    cells = results["cells"]
    seen = {name: {_plain(cell[name]) for cell in cells} - {""} for name in SETTINGS}
    runs = {(cell["student"], cell["steps"], _plain(cell["levels"])) for cell in cells}
    if len(runs) == len({run[:2] for run in runs}):  # the number of steps says which levels
        seen.pop("levels")
    return [name for name, values in seen.items() if len(values) > 1 or name == "student"]


def _plain(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {_plain(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _named(names: Mapping[int, str]) -> Callable[[CellResults], tuple[str, Any]]:
    def entry(cell: CellResults) -> tuple[str, Any]:
        number = cell["cell"]
        return f'<a href="#cell-{number}">{number}</a> {escape(names[number])}', number

    return entry


def _setting(name: str) -> Callable[[CellResults], tuple[str, Any]]:
    def entry(cell: CellResults) -> tuple[str, Any]:
        value = GUIDES[cell[name]] if name == "guide" else cell[name]
        words = _plain(value)
        return escape(words), value if isinstance(value, int | float) else words or None

    return entry


def _cost(name: str) -> Callable[[CellResults], tuple[str, Any]]:
    def entry(cell: CellResults) -> tuple[str, Any]:
        value = _in_unit(name, cell["costs"][name])
        return _rounded(value), value

    return entry


def _in_unit(name: str, value: float) -> float:
    """A cost in the unit that the page gives it in."""
    return value / 1e6 if name == "compute" else value


def _rounded(value: float) -> str:
    """Three digits, without an exponent."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(digits, 0)}f}" if value % 1 else f"{value:,.0f}"


def _figure(name: str, digits: int) -> Callable[[CellResults], tuple[str, Any]]:
    def entry(cell: CellResults) -> tuple[str, Any]:
        found = cell["metrics"][name]
        mean, spread = _spread(found, digits)
        return f'{mean}<span class="spread">{spread}</span>', found["mean"]

    return entry


def _change(
    metric: Mapping[str, Any], kind: str, digits: int
) -> Callable[[CellResults], tuple[str, Any]]:
    def entry(cell: CellResults) -> tuple[str, Any]:
        found = cell["metrics"][metric["name"]][kind]
        if found is None:
            return "", None
        mean, spread = _spread(found, digits, "+")
        if found["deviation"] is None:  # of one seed
            return f'<span class="none">{mean}</span>', found["mean"]
        if found["verdict"] == "none seen":
            return f'<span class="none" title="{mean}{spread}">none seen</span>', found["mean"]
        good = {"lower": found["mean"] < 0, "higher": found["mean"] > 0, None: None}
        colour = {True: "better", False: "worse", None: ""}[good[metric["better"]]]
        text = f'<span class="{colour}">{mean}</span><span class="spread">{spread}</span>'
        return text, found["mean"]

    return entry


def _spread(found: Mapping[str, Any], digits: int, sign: str = "") -> tuple[str, str]:
    """The mean, and `` ± standard deviation`` where it is known."""
    mean = f"{found['mean']:{sign}.{digits}f}".replace("-", "−")
    deviation = found["deviation"]
    return mean, "" if deviation is None else f" ± {deviation:.{digits}f}"


def _digits(found: Sequence[Mapping[str, Any]]) -> int:
    """So many after the point that the middle one of the spreads has two that count."""
    spreads = [one["deviation"] for one in found if one["deviation"]]
    size = median(spreads) if spreads else median(abs(one["mean"]) for one in found) / 10
    return min(max(1 - math.floor(math.log10(size)), 0), 6) if size else 2


def _meaning(metric: Mapping[str, Any]) -> str:
    better = f"; {metric['better']} is better" if metric["better"] else ""
    return f"{metric['what']}{better}"


def _table(results: Results) -> str:
    """A line of groups, a line of headers that sort, and a line for every cell."""
    columns = _columns(results)
    groups = [list(members) for _, members in groupby(columns, lambda column: column.group)]
    firsts = {members[0].name for members in groups[1:]}

    def attributes(column: Column, value: Any = None) -> str:
        classes = ["n"] * column.numeric + ["first"] * (column.name in firsts)
        text = f' class="{" ".join(classes)}"' if classes else ""
        text += f' data-metric="{escape(column.metric)}"' if column.metric else ""
        return text + ("" if value is None else f' data-value="{escape(str(value))}"')

    over = "".join(
        f'<th scope="colgroup" colspan="{len(members)}"{attributes(members[0])} '
        f'title="{escape(members[0].group.hint)}">{escape(members[0].group.title)}</th>'
        for members in groups
    )
    heads = "".join(
        f'<th scope="col" data-column="{escape(column.name)}"{attributes(column)} '
        f'title="{escape(column.about.hint)}">'
        f'<button type="button">{escape(column.about.title)}</button></th>'
        for column in columns
    )
    lines = []
    for cell in results["cells"]:
        entries = [(column, *column.entry(cell)) for column in columns]
        tds = (f"<td{attributes(column, value)}>{text}</td>" for column, text, value in entries)
        lines.append(f"<tr>{''.join(tds)}</tr>")
    return "\n".join([
        '<table id="table">', "<thead>", f'<tr class="groups">{over}</tr>', f"<tr>{heads}</tr>",
        "</thead>", "<tbody>", *lines, "</tbody>", "</table>",
    ])  # fmt: skip


# Its samples, plots and settings ------------------------------------------------------------------


def _families(results: Results) -> dict[str, list[CellResults]]:
    """The cells of each student, sampler and CFG scale: what is drawn in one colour."""
    cells = results["cells"]
    students = {cell["student"] for cell in cells}
    names = [  # of which a student has several
        name
        for name in ("sampler", "schedule", "cond_scale")
        if len({(cell["student"], cell[name]) for cell in cells}) > len(students)
    ]
    families: dict[str, list[CellResults]] = {}
    for cell in cells:
        words = [f"CFG {cell[n]:g}" if n == "cond_scale" else cell[n] for n in names]
        families.setdefault(", ".join(filter(None, [cell["student"], *words])), []).append(cell)
    return families


def _usual(results: Results) -> dict[str, Any]:
    """What most guided cells have in common, by setting: a cell's label says where it differs."""
    usual = {}
    for name in GUIDANCE[1:]:
        values = [cell[name] for cell in results["cells"] if cell["guide"] == "teacher"]
        if values:
            usual[name] = max(values, key=values.count)
    return usual


def _guidance(cell: CellResults, usual: Mapping[str, Any]) -> list[str]:
    """λ, and what is not the usual."""
    if cell["guide"] == "none":
        return []
    names = [n for n in GUIDANCE if n not in usual or cell[n] != usual[n]]
    if cell["guide"] == "self":  # its CFG scale is the student's own
        names = [name for name in names if name != "teacher_cfg_scale"]
    return [_said(name, cell[name]) for name in names]


def _said(name: str, value: Any) -> str:
    """A setting in a label."""
    if name == "teacher_steps" and isinstance(value, list | tuple):
        return f"step{'s' * (len(value) > 1)} {', '.join(map(str, value))}"
    return f"{SETTINGS[name].title}\u00a0{_plain(value)}"


def _labels(results: Results) -> dict[int, str]:
    """What tells each cell from the others of its family, by its number."""
    usual, varied = _usual(results), _varied(results)
    labels = {}
    for cell in results["cells"]:
        words = [_count(cell["steps"], "step")]
        words += [_plain(cell[name]) for name in ("levels", "options") if name in varied]
        if cell["guide"] != "none":
            words[0] += f" + {GUIDES[cell['guide']]}"
        labels[cell["cell"]] = ", ".join(filter(None, words + _guidance(cell, usual)))
    return labels


def _names(results: Results) -> dict[int, str]:
    """What tells each cell from all others, by its number."""
    labels = _labels(results)
    return {
        cell["cell"]: f"{family}: {labels[cell['cell']]}"
        for family, members in _families(results).items()
        for cell in members
    }


def _samples(found: Report) -> str:
    """The cells' pictures, family by family, each family beside real images."""
    results = found.results
    if not found.pictures:
        return '<p class="note">None are shown: the data are no pictures.</p>'
    labels, seed = _labels(results), results["settings"]["seeds"][0]
    shown = dict(zip(reversed(labels), reversed(found.pictures)))  # of the cells, without the first
    beside = ""
    if len(found.pictures) > len(shown):
        real = _picture(found.pictures[0], "Images of the data", "real images")
        beside = f"<figure>{real}</figure>"
    parts = [f'<p class="note">The first images of seed {seed}, all from the same noise.</p>']
    for family, members in _families(results).items():
        parts += [f"<h3>{escape(family)}</h3>", '<div class="tiles">', beside]
        for cell in members:
            number, label = cell["cell"], escape(labels[cell["cell"]])
            about = f"Samples of cell {number}: {escape(family)}, {label}"
            picture = _picture(shown[number], about, f"<b>{number}</b> {label}")
            parts.append(f'<figure id="cell-{number}">{picture}</figure>')
        parts.append("</div>")
    return "\n".join(parts)


def _picture(png: str, about: str, caption: str) -> str:
    image = f'<img src="data:image/png;base64,{png}" alt="{about}">'
    return f"{image}<figcaption>{caption}</figcaption>"


def _plot_data(results: Results) -> str:
    """What the script draws, as JSON that cannot be taken for markup."""
    families, usual, told = _families(results), _usual(results), _names(results)
    names = [metric["name"] for metric in results["metrics"]]
    digits = {n: _digits([cell["metrics"][n] for cell in results["cells"]]) for n in names}
    points = [
        {
            "cell": cell["cell"],
            "plain": cell["plain"],
            "family": index,
            "guide": cell["guide"],
            "label": f"{cell['cell']}. {told[cell['cell']]}",
            "tags": [", ".join(words), *words[:1]] if words else [],
            "costs": {axis: _in_unit(axis, cell["costs"][axis]) for axis in AXES},
            "figures": {
                name: (
                    found["mean"],
                    found["deviation"] or 0,
                    "".join(_spread(found, digits[name])),
                )
                for name, found in cell["metrics"].items()
            },
        }
        for index, members in enumerate(families.values())
        for cell in members
        for words in [_guidance(cell, usual)]
    ]
    data = {
        "families": list(families),
        "fronts": results["fronts"],
        "axes": [{"name": name, **about._asdict()} for name, about in AXES.items()],
        "metrics": [
            {
                "name": metric["name"],
                "title": metric["title"],
                "hint": _meaning(metric),
                "shown": metric["name"] in SHOWN or metric["name"] not in METRICS,
            }
            for metric in results["metrics"]
        ],
        "points": points,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _settings(results: Results) -> str:
    """Settings, models, versions, notes, and the spec as it was written."""
    notes = "".join(f"<li>{escape(note)}</li>" for note in results["notes"])
    return "\n".join([
        _pairs(results["settings"]),
        f"<h3>Models</h3>\n{_pairs(results['models'])}",
        f"<h3>Versions</h3>\n{_pairs(results['versions'])}",
        f"<h3>Combinations</h3>\n<ul>{notes}</ul>" if notes else "",
        f"<h3>The spec</h3>\n<pre>{escape(results['spec'])}</pre>",
    ])  # fmt: skip


def _pairs(values: Mapping[str, Any]) -> str:
    lines = (
        f'<tr><th scope="row">{escape(key.replace("_", " "))}</th>'
        f"<td>{escape(_plain(value)) or 'none'}</td></tr>"
        for key, value in values.items()
    )
    return f"<table>\n{''.join(lines)}\n</table>"
