"""What is to be measured: a TOML file of `kdpp compare`, or the flags of `kdpp evaluate`.

At the top of a file are the keys of `Spec`, in ``[students]`` names and their checkpoints (of
pipelines also tables of settings, and in ``[pipelines]`` those of all), in
``[reference]`` how the teacher's own samples are drawn (`Reference`), and in one or more
``[[grid]]`` a value, or a list of values, for each of the settings of `Combination`: a grid stands
for all their combinations. All of it is read and turned into cells (`cells_of`) before any work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kdpp.checks import check_count
from kdpp.kinds import is_flow, trained_range
from kdpp.lab.features import NETWORKS, PLACED
from kdpp.lab.metrics import LEAST
from kdpp.lab.models import GenerativeModel
from kdpp.lab.sampling import image_seeds, solver_for
from kdpp.lab.schedules import lengthened, levels_on
from kdpp.lab.settings import fill, read_toml, setting
from kdpp.solver import unknown

__all__ = [
    "REFERENCE_SEED",
    "BestTeacher",
    "Cell",
    "Combination",
    "Grid",
    "Guidance",
    "Reference",
    "Spec",
    "calls_of",
    "cells_of",
    "check_spec",
    "read_spec",
]

RENOISE = ("next", "current", "random")
REFERENCE_SEED = 10**9
"""The seed of the teacher's own samples. Those of a spec are lower: no cell is measured against
samples from its own noise."""
PLACES = {"model", "components", "lora", "student_lora", "teacher_lora"}
"""The settings of a student that are files."""
MOST = 100_000
"""Results of a spec, cells × seeds, and combinations of a grid."""


@dataclass(frozen=True)
class Spec:
    """The keys at the top of a spec."""

    title: str = setting("A comparison", "the page's headline")
    data: str = setting(
        "", "what images are compared with, see `load_data`; default: the first student's data"
    )
    test: str = setting("", "images that no network was trained on; default: the data's own")
    statistics: str = setting("", "a file of `kdpp statistics`, in place of data")
    features: str = setting(
        "", "in what, see `load_features`; default: digits for the digits, else pixels"
    )
    metrics: tuple[str, ...] = setting((), "functions of pictures and prompts, module:function")
    prompts: str = setting("", "what pipelines draw: a text file, a prompt in each line")
    batch: int = setting(4, "pictures of pipelines in a run")
    images: int = setting(1000, "how many, of each cell and seed")
    seeds: int | tuple[int, ...] = setting(3, "so many, from 0; or a list of them")
    teacher: str | None = setting(None, "the checkpoint that guides")
    self_control: bool = setting(True, "also put each guided student in the teacher's place")
    more_steps: bool = setting(True, "also give each guided student its evaluations as own steps")
    best_teacher: bool = setting(
        True, "also sample the teacher alone with as many evaluations, by the best solver"
    )
    pipelines: dict[str, Any] = field(default_factory=dict)  # settings of all students' requests
    students: dict[str, Any] = field(default_factory=dict)  # names and their checkpoints; lists of
    # checkpoints that differ in their training seed alone
    reference: dict[str, Any] = field(default_factory=dict)  # the settings of `Reference`
    grid: tuple[dict[str, Any], ...] = setting((), "tables of settings of `Combination`")

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds, one by one."""
        return self.seeds if isinstance(self.seeds, tuple) else tuple(range(self.seeds))

    @property
    def own_samples(self) -> Reference | None:
        """How the teacher's own samples are drawn, if distances to them are wanted."""
        return fill(Reference, self.reference, "of reference") if self.reference else None


@dataclass(frozen=True)
class Reference:
    """The teacher's own many-step samples, as many as a cell has of one seed."""

    cond_scale: float = setting(math.nan, "the teacher's guidance scale; it must be given")
    steps: int = setting(50, "of the sampler")
    sampler: str = setting("euler", "a name of kdpp.SOLVERS")


@dataclass(frozen=True)
class Guidance:
    """How a cell is guided: keywords of `kdpp.TeacherGuidedDenoiser`."""

    teacher_scale: float = setting(0.0, "λ, the share of the teacher's estimate")
    teacher_steps: int | tuple[int, ...] = setting(1, "k: the first k steps; or a list of steps")
    renoise: str | float = setting("next", "σ_s: next, current, random, or a level")
    renoise_eta: float = setting(1.0, "ρ, the share of fresh noise")
    teacher_cfg_scale: float | None = setting(
        None, "the teacher's CFG scale; default: the reference's cond_scale, or 1"
    )
    extrapolate: bool = setting(False, "allow λ outside [0, 1]")


@dataclass(frozen=True)
class Combination(Guidance):
    """One combination of a grid's settings, as it is written."""

    student: str = setting("", "a name of [students]; it must be given")
    sampler: str | None = setting(None, "a name of kdpp.SOLVERS; default: the student's own")
    steps: int | None = setting(None, "default: the student's own")
    options: dict[str, Any] = setting({}, "the sampler's own, such as {eta = 0.5}")
    schedule: str | None = setting(
        None,
        "a name of kdpp.lab.schedules.LEVELS, such as karras; default: the student's own levels",
    )
    levels: tuple[float, ...] | None = setting(
        None, "the levels themselves, falling to 0, in place of steps; τ for flow models"
    )
    cond_scale: float | None = setting(None, "the student's CFG scale; default: its own, or 1")


@dataclass(frozen=True)
class Cell:
    """One way to sample, with nothing left open; those that sample alike are equal.

    ``options`` holds those of the sampler that are not its defaults.
    """

    student: str
    sampler: str
    levels: tuple[float, ...]
    cond_scale: float
    options: tuple[tuple[str, float | str], ...] = ()
    guide: Literal["none", "teacher", "self"] = "none"
    guidance: Guidance | None = None
    schedule: str = field(default="", compare=False)  # the name of the levels, where they have one

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    @property
    def plain(self) -> Cell:
        """The same student without a guide: what changes are measured against."""
        return replace(self, guide="none", guidance=None)

    @property
    def control(self) -> Cell | None:
        """The self control of a cell that the teacher guides: the student in its place."""
        if self.guidance is None or self.guide != "teacher":
            return None
        return replace(
            self, guide="self", guidance=replace(self.guidance, teacher_cfg_scale=self.cond_scale)
        )

    @property
    def keywords(self) -> dict[str, Any]:
        """The guidance as keywords; none where there is none."""
        return asdict(self.guidance) if self.guidance else {}

    @property
    def looks(self) -> int:
        """How many steps are guided."""
        steps = self.guidance.teacher_steps if self.guidance else 0
        return steps if isinstance(steps, int) else len(steps)

    def __str__(self) -> str:
        words = [self.student, self.sampler, f"steps {self.steps}", f"cond_scale {self.cond_scale}"]
        words += [f"{name} {value}" for name, value in self.options]
        if self.guidance is not None:
            words.append(f"guided by {'the teacher' if self.guide == 'teacher' else 'itself'}")
            words += [f"{n} {value}" for n, value in self.keywords.items() if n != "extrapolate"]
        return ", ".join(words)


def read_spec(path: str | Path) -> Spec:
    """The spec in the file; its places are taken from the file's own folder.

    Raises OSError where the file cannot be read, ValueError for what is no TOML, an unknown name
    (the nearest known one is said), a missing one and a value that cannot be. What the grids hold
    is checked by `cells_of`.
    """
    path = Path(path)
    spec = fill(Spec, read_toml(path), f"in {path}")
    check_spec(spec)
    return replace(
        spec,
        data=_placed(spec.data, path),
        test=_placed(spec.test, path),
        statistics=spec.statistics and str(path.parent / spec.statistics),
        features=(_of_pictures if spec.prompts else _placed)(spec.features, path),
        metrics=tuple(_of_pictures(name, path) for name in spec.metrics),
        prompts=spec.prompts and str(path.parent / spec.prompts),
        teacher=spec.teacher and _placed(spec.teacher, path),
        pipelines=_placed_all(spec.pipelines, path),
        students={name: _placed_student(about, path) for name, about in spec.students.items()},
    )


def check_spec(spec: Spec) -> None:
    """ValueError for values that cannot be; what the grids hold is checked by `cells_of`."""
    check_count("images", spec.images, LEAST)
    if isinstance(spec.seeds, int):
        if check_count("seeds", spec.seeds, 1) > MOST:
            raise ValueError(f"seeds is {spec.seeds}; give at most {MOST:,}")
    elif not spec.seeds or len(set(spec.seeds)) < len(spec.seeds) or min(spec.seeds) < 0:
        raise ValueError(f"seeds is {list(spec.seeds)}; give one or more ≥ 0, each once")
    elif max(spec.seeds) >= REFERENCE_SEED:
        raise ValueError(f"seeds holds {max(spec.seeds)}; they must be below {REFERENCE_SEED:,}")
    image_seeds(0, spec.images)
    if spec.statistics and (spec.data or spec.test):
        raise ValueError("statistics stands in place of data and test; give the one or the others")
    if not spec.students:
        raise ValueError('no student is named; add [students] with lines name = "checkpoint"')
    for name, place in spec.students.items():
        if isinstance(place, list) and not spec.prompts:
            several = bool(place) and all(isinstance(one, str) for one in place)
            if several and len(set(place)) == len(place):
                continue
        elif isinstance(place, str) or (spec.prompts and isinstance(place, Mapping)):
            continue
        raise ValueError(
            f"student {name!r} is {place!r}; it must be text, a checkpoint, or a list of "
            "checkpoints that differ in their training seed alone"
        )
    for name in ("pipelines", "metrics"):
        if getattr(spec, name) and not spec.prompts:
            raise ValueError(f"{name} is for pipelines, which draw prompts; give prompts, a file")
    check_count("batch", spec.batch, 1)
    if not spec.grid:
        raise ValueError("there is no [[grid]]; add one that names a student")
    reference = spec.own_samples
    if reference is None:
        return
    if spec.teacher is None:
        raise ValueError("reference is the teacher's own samples; name the teacher")
    if math.isnan(reference.cond_scale):
        raise ValueError("reference has no cond_scale; give the teacher's CFG scale")
    solver_for(reference.sampler)
    check_count("steps of reference", reference.steps, 1)


def _placed(name: str, spec: Path) -> str:
    """A path from the spec's folder; names of what ships with kdpp as they are."""
    kind, colon, place = name.partition(":")
    if kind in PLACED and colon:
        return f"{kind}:{spec.parent / place}"
    return name if kind in ("", "digits", "pixels") else str(spec.parent / name)


def _of_pictures(name: str, spec: Path) -> str:
    """The same of features and metrics of pictures: functions of modules as they are."""
    kind = name.partition(":")[0]
    return _placed(name, spec) if kind in NETWORKS or kind.endswith(".py") else name


def _placed_student(about: Any, spec: Path) -> Any:
    if isinstance(about, list):
        return [_placed(one, spec) if isinstance(one, str) else one for one in about]
    return _placed(about, spec) if isinstance(about, str) else _placed_all(about, spec)


def _placed_all(settings: Mapping[str, Any], spec: Path) -> dict[str, Any]:
    """The settings of a student, with its files from the spec's folder."""
    placed = dict(settings)
    for name in PLACES & settings.keys():
        value = settings[name]
        places = value if isinstance(value, list) else [value]
        found = [str(spec.parent / place) for place in places]
        placed[name] = found if isinstance(value, list) else found[0]
    return placed


class BestTeacher(NamedTuple):
    """The teacher alone with so many evaluations: which solver and levels is to be searched."""

    evaluations: int
    cond_scale: float


class Grid(NamedTuple):
    """What a spec's grids stand for.

    ``longer`` holds for a guided cell the plain one of as many evaluations; ``teachers`` what else
    is to be compared with; ``notes`` say what was added, left out or run once.
    """

    cells: list[Cell]
    longer: dict[Cell, Cell]
    teachers: list[BestTeacher]
    notes: list[str]


def cells_of(spec: Spec, models: Mapping[str, GenerativeModel]) -> Grid:
    """The cells of all grids, each once, and what they are compared with.

    Combinations that sample alike make one cell: λ = 0 or k = 0, whatever else is said of the
    teacher. A guided cell comes after its plain student, and before its controls: itself in the
    teacher's place, and with as many evaluations as steps of its own. ``models`` holds the students
    by name.

    Raises ValueError for an unknown name, a value that cannot be, guidance without a teacher, and
    guided steps that no combination of the grid has.
    """
    several = len(spec.grid) > 1
    asked = [
        cell
        for number, grid in enumerate(spec.grid, 1)
        for cell in _grid_cells(grid, f" of grid {number}" * several, spec, models)
    ]
    kept = [cell for cell in asked if cell is not None]
    cells: dict[Cell, None] = {}
    longer: dict[Cell, Cell] = {}
    teachers: dict[BestTeacher, None] = {}
    for cell in kept:
        cells[cell.plain] = None
        cells[cell] = None
        if cell.guide == "none" or cell.guidance is None:
            continue
        if spec.self_control and cell.control is not None:
            cells[cell.control] = None
        model = models[cell.student]
        if spec.more_steps and not spec.prompts:
            longer[cell] = _lengthened(cell, model)
            cells[longer[cell]] = None
        if spec.best_teacher and spec.teacher is not None and not spec.prompts:
            scale = cell.guidance.teacher_cfg_scale or 1.0
            own = max(spec.own_samples.cond_scale, scale) if spec.own_samples else scale
            teachers[BestTeacher(sum(evaluations_of(cell, model)), own)] = None
    results = len(cells) * len(spec.seed_list)
    if results > MOST:
        raise ValueError(f"{results:,} results are to be had, cells × seeds; at most {MOST:,}")
    controls = {cell.plain for cell in kept} | set(longer.values())
    counts = {
        "combinations left out, whose guided steps do not exist": len(asked) - len(kept),
        "combinations that sample like another one (λ or k is 0, or k reaches the last step)": (
            len(kept) - len(set(kept))
        ),
        "plain students added, against which changes are measured": sum(
            cell in controls and cell not in kept for cell in cells
        ),
    }
    return Grid(
        list(cells), longer, list(teachers), [f"{what}: {n}" for what, n in counts.items() if n]
    )


def evaluations_of(cell: Cell, model: GenerativeModel) -> tuple[int, int]:
    """What an image takes of the student and of its guide; both halves of CFG count."""
    own = 1 if model.guidance_range or cell.cond_scale == 1.0 else 2
    alone = own * calls_of(cell.sampler, cell.levels, **dict(cell.options))
    if cell.guidance is None:
        return alone, 0
    each = own if cell.guide == "self" else 1 if cell.guidance.teacher_cfg_scale == 1.0 else 2
    return alone, each * cell.looks


def calls_of(sampler: str, levels: Sequence[float], **options: Any) -> int:
    """How often a run calls its denoiser."""
    return sum(len(step.stages) for step in solver_for(sampler).plan(levels, **options))


def _lengthened(cell: Cell, model: GenerativeModel) -> Cell:
    """The plain student with about as many evaluations as the guided cell, at least a step more."""
    alone, looks = evaluations_of(cell, model)
    more = max(1, round(looks * cell.steps / alone))
    own = cell.levels == model.levels_for(cell.steps)
    levels = model.levels_for(cell.steps + more) if own else lengthened(cell.levels, more)
    return replace(cell.plain, levels=levels, schedule="")


def _grid_cells(
    grid: Mapping[str, Any], where: str, spec: Spec, models: Mapping[str, GenerativeModel]
) -> list[Cell | None]:
    """The grid's combinations as cells; None for guided steps that a combination does not have."""
    cells: list[Cell | None] = []
    absent: dict[Any, int] = {}
    present = set()
    for combination in _combinations(grid, where):
        base = _unguided(combination, where, spec, models)
        steps = combination.teacher_steps
        if combination.teacher_scale == 0.0 or steps in (0, ()):
            cells.append(base)
        elif _has_steps(base.steps, steps):
            present.add(steps)
            cells.append(_guided(combination, base, where, spec, models))
        else:
            absent[steps] = max(base.steps, absent.get(steps, 0))
            cells.append(None)
    for steps, longest in absent.items():
        if steps not in present:
            raise ValueError(
                f"teacher_steps{where} holds {_listed(steps)}; no combination has these steps, "
                f"the longest has {longest}"
            )
    return cells


def _combinations(grid: Mapping[str, Any], where: str) -> Iterator[Combination]:
    """All combinations of the values; the last setting changes fastest."""
    axes = {name: value if isinstance(value, list) else [value] for name, value in grid.items()}
    for name, values in axes.items():
        if not values:
            raise ValueError(f"{name}{where} is an empty list; give a value, or leave it out")
    if math.prod(map(len, axes.values())) > MOST:
        raise ValueError(
            f"the lists{where} have more than {MOST:,} combinations; make them shorter"
        )
    for chosen in product(*axes.values()):
        yield fill(Combination, dict(zip(axes, chosen)), where.strip())


def _unguided(
    combination: Combination, where: str, spec: Spec, models: Mapping[str, GenerativeModel]
) -> Cell:
    """The combination without its guidance."""
    if not combination.student:
        raise ValueError(f"student{where} is missing; name one of {', '.join(spec.students)}")
    if combination.student not in models:
        raise ValueError(unknown(f"student{where}", combination.student, models))
    model = models[combination.student]
    try:
        solver = solver_for(combination.sampler or model.sampler)
        settings = solver.settings(combination.options)
    except ValueError as error:
        raise ValueError(f"{error}{where and f' (sampler{where})'}") from error
    options = tuple((n, v) for n, v in settings.items() if v != solver.options[n].default)
    levels = _levels(combination, where, model)
    own = model.cond_scale if combination.cond_scale is None else combination.cond_scale
    named = combination.schedule or ""
    return Cell(combination.student, solver.name, levels, own, options, schedule=named)


def _levels(combination: Combination, where: str, model: GenerativeModel) -> tuple[float, ...]:
    """The levels that it names, those of the schedule that it names, or the model's own."""
    if combination.levels is not None:
        if combination.steps is not None or combination.schedule is not None:
            raise ValueError(f"steps and levels{where} say the same; give one of them")
        return combination.levels
    own = model.levels_for(combination.steps)
    if combination.schedule is None:
        return own
    denoiser = model.denoiser_for(len(own) - 1)
    reach = trained_range(denoiser)
    if is_flow(denoiser) or reach is None:
        raise ValueError(f"schedule{where} is of σ, for models that say theirs; give levels")
    try:
        return levels_on(combination.schedule, len(own) - 1, *reach)
    except ValueError as error:
        raise ValueError(f"{error}{where and f' (schedule{where})'}") from error


def _guided(
    combination: Combination,
    base: Cell,
    where: str,
    spec: Spec,
    models: Mapping[str, GenerativeModel],
) -> Cell:
    """The cell with the combination's guidance; without, where no step is left to guide."""
    if spec.teacher is None and not spec.prompts:
        raise ValueError(f"teacher_scale{where} is not 0, and no teacher is named; name one")
    if isinstance(combination.renoise, str) and combination.renoise not in RENOISE:
        raise ValueError(f"{unknown(f'renoise{where}', combination.renoise, RENOISE)}, or a level")
    outside = not 0.0 <= combination.teacher_scale <= 1.0
    if outside and not combination.extrapolate:
        raise ValueError(
            f"teacher_scale{where} is {combination.teacher_scale!r}; it must be a number in "
            "[0, 1], or any number with extrapolate = true"
        )
    steps: Any = combination.teacher_steps
    if isinstance(steps, tuple):
        steps = tuple(sorted({i % base.steps for i in steps}))
    elif combination.renoise == "next" and base.levels[-1] == 0.0:
        steps = min(steps, base.steps - 1)  # the last step has no next level to noise to
    if steps == 0:
        return base
    scale = combination.teacher_cfg_scale
    if scale is None and spec.prompts:
        scale = models[base.student].guidance
    if scale is None:
        scale = spec.own_samples.cond_scale if spec.own_samples else 1.0
    given = {field.name: getattr(combination, field.name) for field in fields(Guidance)}
    given |= {"teacher_steps": steps, "teacher_cfg_scale": scale, "extrapolate": outside}
    return replace(base, guide="teacher", guidance=Guidance(**given))


def _has_steps(steps: int, wanted: int | tuple[int, ...]) -> bool:
    if isinstance(wanted, tuple):
        return all(-steps <= i < steps for i in wanted)
    return check_count("teacher_steps", wanted, 0) <= steps


def _listed(steps: int | tuple[int, ...]) -> str:
    return str(list(steps) if isinstance(steps, tuple) else steps)
