"""What a solver is: a plan with a name, its options, and what is claimed of it.

`SOLVERS` holds them all, by name. Every one can be asked: `Solver.plan` gives its steps for any
levels, in numbers, and the rest of it says what it takes and what it costs. Nothing here knows
tensors, networks or teachers.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import Any, Literal, TypeVar

from kdpp.plan import VE, Space, Step, check_falling, merge_close, rises

__all__ = [
    "ANCESTRAL",
    "CHURN",
    "SOLVERS",
    "VARIABLE",
    "Option",
    "Solver",
    "solver",
    "solver_of",
]

Plan = Callable[..., Iterable[Step]]
"""``(sigmas, **options) -> steps``: σ as float64 numbers, falling, the last one often 0."""
Levels = Callable[[float, float, int], Sequence[float]]
"""``(sigma_min, sigma_max, n) -> levels`` of a solver that makes its own."""
Noise = Literal["none", "plain", "brownian"]
NOISE: dict[Noise, str] = {
    "none": "no noise",
    "plain": "plain noise",
    "brownian": "noise along a Brownian path",
}
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """A number or a word that a solver takes: its default, and what it may be.

    A number lies in [low, high], or in (low, high] where it must be ``above`` low; it is a whole
    one where the default is. It is finite, unless the default is not. A word is one of ``choices``.
    """

    default: float | str
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    choices: tuple[str, ...] = ()

    def read(self, name: str, value: Any) -> float | str:
        """The value, a number as the float or int that the default is.

        Raises ValueError, which says what is allowed, for another one.
        """
        if isinstance(self.default, str):
            if value in self.choices:
                return str(value)
        elif self._has(value):
            return type(self.default)(value)
        raise ValueError(f"{name} is {value!r}; it must be {self}")

    def _has(self, value: Any) -> bool:
        """Whether it is a number of the right kind in the range."""
        if type(value) is not type(self.default):  # asking for an abstract kind takes longer
            kind = numbers.Integral if isinstance(self.default, int) else numbers.Real
            if not isinstance(value, kind) or isinstance(value, bool):
                return False
        if isinstance(value, numbers.Integral) and abs(int(value)) > LARGEST:
            return False
        number: Any = value
        above = self.low < number if self.above else self.low <= number
        return above and number <= self.high and (number < math.inf or self.default == math.inf)

    def __str__(self) -> str:
        if self.choices:
            return " or ".join(f'"{choice}"' for choice in self.choices)
        what = "a whole number" if isinstance(self.default, int) else "a number"
        if math.isfinite(self.high) and isinstance(self.default, int):
            return f"{what} from {self.low:g} to {self.high:g}"
        if math.isfinite(self.high):
            return f"{what} in {'(' if self.above else '['}{self.low:g}, {self.high:g}]"
        return f"{what} {'>' if self.above else '≥'} {self.low:g}"


LARGEST = 2**1023
"""No larger whole number is a float."""
ANCESTRAL = {"eta": Option(1.0, low=0.0), "s_noise": Option(1.0, low=0.0)}
"""The options of solvers that add noise: η, 0 for the ODE, and the factor of the noise."""
CHURN = {
    "s_churn": Option(0.0, low=0.0),
    "s_tmin": Option(0.0, low=0.0),
    "s_tmax": Option(math.inf, low=0.0),
    "s_noise": Option(1.0, low=0.0),
}
"""The options of solvers that churn (Karras et al. 2022, Algorithm 2)."""
VARIABLE = {"variable": Option("sigma", choices=("sigma", "tau"))}
"""The option of solvers whose rule may take ``τ = σ/(1+σ)`` in σ's place."""


@dataclass(eq=False, repr=False)
class Solver:
    """A solver: how it turns levels into steps, what it takes, and what is claimed of it.

    Attributes:
        name: its short name, ``"euler"`` for ``kdpp.sample_euler_tg``.
        steps: the plan, a function of ``(sigmas, **options)`` that gives each `kdpp.plan.Step`.
        order: the order of convergence of a run to the ODE's solution (at η = 0); None for one
            that does not follow the ODE. Tests measure it.
        order_from: the number of steps from which the order is seen.
        evaluations: the student's evaluations in a step; the last step, to σ = 0, takes one.
        extra: evaluations that a run of two steps or more makes besides, once; below 0, leaves out.
        options: what it takes, by name.
        noise: what the run draws for it, "none", "plain" or "brownian"; churn is drawn besides.
        cfg_pp: whether its direction comes from the unconditional estimate (CFG++).
        own_levels: the levels of a solver that makes its own, from (sigma_min, sigma_max, n).
        sample: its public function, with k-diffusion's signature; None for one without.
    """

    name: str
    steps: Plan
    order: int | None
    order_from: int = 64
    evaluations: int = 1
    extra: int = 0
    options: Mapping[str, Option] = field(default_factory=dict)
    noise: Noise = "none"
    cfg_pp: bool = False
    own_levels: Levels | None = None
    sample: Callable[..., Any] | None = None

    def plan(
        self, sigmas: Iterable[float], *, space: Space = VE, **options: Any
    ) -> tuple[Step, ...]:
        """The steps over these levels, in numbers.

        Args:
            sigmas: falling levels, ≥ 0; σ, or with ``space=FLOW`` a flow model's τ in [0, 1].
                Levels within a float32 rounding of each other count as one. A solver that
                `inverts` takes rising ones, too, from above 0.
            options: of `options`; the defaults where they are left out.

        The steps of the last schedules are kept, so a second call costs nothing.

        Raises ValueError for other levels, for an unknown option or one out of its range, and where
        the solver's own plan is no plan over these levels.
        """
        return _planned(self, tuple(map(float, sigmas)), space, **self.settings(options))

    def settings(self, options: Mapping[str, Any]) -> dict[str, float | str]:
        """All options: those given, checked, and the others' defaults."""
        for name in options:
            if name not in self.options:
                raise ValueError(unknown(f"option of {self.name}", name, self.options))
        return {
            name: option.read(name, options.get(name, option.default))
            for name, option in self.options.items()
        }

    def levels(self, sigma_min: float, sigma_max: float, n: int) -> list[float]:
        """The levels that it makes itself, for n evaluations.

        Raises ValueError where sigma_min and sigma_max are not 0 < sigma_min ≤ sigma_max < ∞ or n
        is no whole number ≥ 1, and for a solver that takes any levels.
        """
        if self.own_levels is None:
            raise ValueError(f"{self.name} takes any levels; it makes none of its own")
        numeric = all(isinstance(level, numbers.Real) for level in (sigma_min, sigma_max))
        if not (numeric and 0.0 < sigma_min <= sigma_max < math.inf):
            raise ValueError(
                f"sigma_min is {sigma_min!r} and sigma_max {sigma_max!r}; "
                "they must be 0 < sigma_min ≤ sigma_max < inf"
            )
        if not isinstance(n, numbers.Integral) or n < 1:
            raise ValueError(f"n is {n!r}; it must be a whole number of evaluations ≥ 1")
        return list(self.own_levels(float(sigma_min), float(sigma_max), int(n)))

    @cached_property
    def multistep(self) -> bool:
        """Whether a step weighs what earlier steps have found."""
        return any(step.history for step in self.probe)

    @cached_property
    def keeps(self) -> bool:
        """Whether an estimate is used again after a later one was made."""
        return any(step.memory for step in self.probe)

    @property
    def stochastic(self) -> bool:
        """Whether it adds noise unless told otherwise."""
        eta = self.options.get("eta")
        return self.noise != "none" and (eta is None or float(eta.default) > 0.0)

    @property
    def inverts(self) -> bool:
        """Whether it also goes up, from an image to the noise: on the ODE, without noise."""
        return self.noise == "none" and self.own_levels is None and self.order is not None

    @property
    def probe(self) -> tuple[Step, ...]:
        """Its plan for a few levels, of which its nature can be read."""
        if self.own_levels is not None:
            return self.plan(self.levels(0.1, 10.0, 8), n=8)
        return self.plan([10.0, 7.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.0])

    def public(self, function: Function) -> Function:
        """Make this its public function; a decorator."""
        self.sample = function
        return function

    def in_cfg_pp(self) -> Solver:
        """The same plan as a solver of its own, its direction from the unconditional estimate."""
        return enter(replace(self, name=f"{self.name}_cfg_pp", cfg_pp=True, sample=None))

    @property
    def traits(self) -> str:
        """What it is, in a line."""
        evaluations = f"{self.evaluations} evaluation{'s' * (self.evaluations > 1)} a step"
        parts = [
            "off the ODE" if self.order is None else f"order {self.order}",
            evaluations + f" ({self.extra:+d} once)" * bool(self.extra),
            "multistep" if self.multistep else "",
            NOISE[self.noise],
            "CFG++" if self.cfg_pp else "",
            "makes its own levels" if self.own_levels else "",
        ]
        return ", ".join(filter(None, parts))

    def __repr__(self) -> str:
        return f"<Solver {self.name}: {self.traits}>"

    def __str__(self) -> str:
        options = (f"    {n} = {o.default!r} ({o})" for n, o in self.options.items())
        return "\n".join([f"{self.name}: {self.traits}", *options])


@lru_cache(maxsize=64)
def _planned(
    solver: Solver, levels: tuple[float, ...], space: Space, **settings: Any
) -> tuple[Step, ...]:
    check_falling(levels, or_rising=solver.inverts)
    if len(levels) < 2:
        return ()
    if rises(levels) and math.isinf(space.sigma(levels[-1])):
        raise ValueError(
            "sigmas rises to τ = 1, which is all noise; end at a level below, as 0.999"
        )
    sigmas = merge_close(map(space.sigma, levels))
    steps = tuple(solver.steps(sigmas, **settings))
    _check(solver, sigmas, steps)
    return steps


def _check(solver: Solver, sigmas: tuple[float, ...], steps: tuple[Step, ...]) -> None:
    """ValueError for a plan that cannot be its solver's: it would give wrong images in silence."""
    if [(step.sigma, step.sigma_next) for step in steps] != [*pairwise(sigmas)]:
        levels = ", ".join(f"{step.sigma:g} to {step.sigma_next:g}" for step in steps)
        raise ValueError(
            f"the plan of {solver.name!r} must give one step for each pair of levels; over "
            f"{', '.join(f'{sigma:g}' for sigma in sigmas)} it gave {levels or 'no step'}"
        )
    for i, step in enumerate(steps):
        where = f"step {i} of the plan of {solver.name!r}"
        if step.history > i:
            raise ValueError(f"{where} weighs {step.history} earlier estimates; there are {i}")
        if solver.noise == "none":
            row = step.stages[-1].row
            if any(stage.row.noise is not None for stage in step.stages):
                raise ValueError(f'{where} draws noise, and the solver says noise="none"')
            if not (
                row.end == step.sigma_next or abs(row.end - step.sigma_next) <= 1e-6 * step.sigma
            ):
                raise ValueError(f"{where} ends at σ = {row.end:g} and not at {step.sigma_next:g}")


SOLVERS: dict[str, Solver] = {}
"""Every solver, by its short name."""


def solver(
    *,
    order: int | None,
    name: str = "",
    order_from: int = 64,
    evaluations: int = 1,
    extra: int = 0,
    options: Mapping[str, Option] | None = None,
    noise: Noise = "none",
    levels: Levels | None = None,
    cfg_pp: bool = False,
) -> Callable[[Plan], Solver]:
    """Make a plan a `Solver` and enter it into `SOLVERS`; a decorator of the plan.

    The arguments are the fields of `Solver`; its name is the plan's. Raises ValueError for a name
    that is taken.
    """

    def make(plan: Plan) -> Solver:
        return enter(
            Solver(
                name or plan.__name__, plan, order, order_from, evaluations, extra,
                dict(options or {}), noise, cfg_pp, levels,
            )
        )  # fmt: skip

    return make


def enter(made: Solver) -> Solver:
    """Enter a solver into `SOLVERS`; ValueError where its name is taken."""
    if made.name in SOLVERS:
        raise ValueError(f"there is a solver named {made.name!r} already; name it otherwise")
    SOLVERS[made.name] = made
    return made


def solver_of(sampler: Any) -> tuple[Solver, dict[str, Any]]:
    """The solver behind a sampler, and the options that are fixed in it.

    Args:
        sampler: a `Solver`; its name, ``"euler"`` or ``"sample_euler_tg"``; its public function; or
            a `functools.partial` of one.

    Raises ValueError for anything else; of an unknown name it says the nearest known one.
    """
    if isinstance(sampler, partial):
        found, fixed = solver_of(sampler.func)
        if sampler.args:
            raise ValueError(f"{sampler!r} fixes arguments by position; fix options by name")
        return found, {**fixed, **sampler.keywords}
    if isinstance(sampler, Solver):
        return sampler, {}
    if isinstance(sampler, str):
        name = sampler.removeprefix("sample_").removesuffix("_tg")
        if name not in SOLVERS:
            raise ValueError(unknown("solver", name, SOLVERS))
        return SOLVERS[name], {}
    for one in SOLVERS.values():
        if one.sample is not None and one.sample is sampler:
            return one, {}
    raise ValueError(
        f"{getattr(sampler, '__name__', sampler)!r} is no sampler of kdpp; give one of its "
        'sample_…_tg functions, or a name of kdpp.SOLVERS such as "euler"'
    )


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """A sentence about an unknown name: the nearest known one, and all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name).lower(), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}; {hint}known: {', '.join(names) or 'none'}"
