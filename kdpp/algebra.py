"""The algebra of denoisers: several as one, ``D(x, σ) = Σ_i w_i D_i(x, σ)`` with ``Σ w_i = 1``.

`WeightedSum` is that one, and serves wherever a denoiser does: as student, as teacher, in
k-diffusion's samplers. `autoguidance`, `two_model_cfg` and `handover` make it for the uses that
have a name. What each network weighs at every evaluation of a run is known before the run, in
numbers (`Weigher`); which of them are asked in which calls says `kdpp.asking`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from kdpp.asking import Evaluation, bind
from kdpp.checks import check_number
from kdpp.kinds import Denoiser, Leaf, check_denoiser, is_flow, leaves_of, trained_range
from kdpp.plan import VE, Space, Step
from kdpp.steps import NoiseRange, Steps, chosen, read_steps

__all__ = [
    "Weigher",
    "Weighted",
    "WeightedSum",
    "autoguidance",
    "evaluation_at",
    "handover",
    "shares_of",
    "two_model_cfg",
    "wrapped",
]

Weight = float | Sequence[float] | Callable[[float], float]
"""A number, one for each step of a run, or a function of σ."""


@dataclass(frozen=True)
class Weighted:
    """A denoiser in a `WeightedSum`, with its weight there and conditions of its own.

    - ``weight``: w, any finite number; one for each step; or a function of σ, as the model writes
      levels. None: what the others leave of 1; one part at most.
    - ``steps``: where it has that weight: the first k, indices (negative ones from the end), or a
      `NoiseRange`. Elsewhere it weighs 0 and is not asked. None: at all steps. Steps of no length
      are not counted.
    - ``cfg_scale``: its own CFG scale; 0 asks for the unconditional estimate alone. None: the one
      that the whole sum is asked with.
    - ``extra_args``: entries that take the place of the sampler's, such as its own ``cond``.

    Raises TypeError or ValueError for a setting outside its range.
    """

    denoiser: Denoiser
    weight: Weight | None = None
    steps: Steps | None = None
    cfg_scale: float | None = None
    extra_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_denoiser(self.denoiser, "denoiser")
        if isinstance(self.weight, Sequence) and not isinstance(self.weight, str):
            numbers = tuple(check_number("weight", one) for one in self.weight)
            object.__setattr__(self, "weight", numbers)
        elif self.weight is not None and not callable(self.weight):
            object.__setattr__(self, "weight", check_number("weight", self.weight))
        if self.steps is not None:
            if self.weight is None:
                raise ValueError(
                    "weight=None is what the other parts leave, at every step; leave steps out, or "
                    "give a weight"
                )
            object.__setattr__(self, "steps", read_steps("steps", self.steps))
        if self.cfg_scale is not None:
            check_number("cfg_scale", self.cfg_scale)
        if not isinstance(self.extra_args, Mapping):
            raise TypeError(f"extra_args is {self.extra_args!r}; it must be a dict")
        if "cond_scale" in self.extra_args:
            raise ValueError(
                "a part's CFG scale is its cfg_scale; take cond_scale out of extra_args"
            )
        object.__setattr__(self, "extra_args", dict(self.extra_args))

    @property
    def constant(self) -> bool:
        """Whether it weighs the same everywhere."""
        own = self.steps is None and (self.weight is None or isinstance(self.weight, float))
        inner = self.denoiser
        return own and (not isinstance(inner, WeightedSum) or inner.constant)

    def at(self, place: Place, inside: Collection[int]) -> float | None:
        """w at a place, None where it is what the others leave; ``inside``: its steps."""
        if isinstance(self.steps, NoiseRange):
            if not self.steps.holds(place.start):
                return 0.0
        elif self.steps is not None and place.in_run("steps").step not in inside:
            return 0.0
        if isinstance(self.weight, Sequence):
            return float(self.weight[place.in_run("weight").step or 0])
        if callable(self.weight):
            return check_number("the weight", self.weight(place.level))
        return self.weight


@dataclass(frozen=True)
class Place:
    """Where a denoiser is asked, in numbers: the level, where the step starts, the step's index."""

    level: float
    start: float
    step: int | None = None

    def in_run(self, setting: str) -> Place:
        """Itself; ValueError outside of a run, where steps have no numbers."""
        if self.step is None:
            raise ValueError(
                f"a WeightedSum was called outside of kdpp's samplers, where its {setting} by step "
                "cannot be known; give a number, a kdpp.NoiseRange or a function of σ"
            )
        return self


class WeightedSum(nn.Module):
    """Several denoisers as one: ``D(x, σ) = Σ_i w_i D_i(x, σ)``, the weights of which sum to 1.

    It is a student or a teacher like any other; in kdpp's samplers weights by step or by σ are
    numbers before the loop. All that one network is asked at one (x, σ), the halves of its CFG and
    other parts' included, is one call; n networks are joined by n - 1 interpolations. Under CFG++
    the unconditional estimate is ``Σ_i w_i D_i,∅``. A multistep solver starts anew at a step that
    asks none of the networks of the step before: the difference of two models is not a slope.

    Calling it, as k-diffusion's samplers do, asks the networks with the CFG that ``extra_args``
    say. Where weights depend on σ, σ is then read at every call (one level for the whole batch);
    weights by step are not known there.

    Args:
        parts: two or more `Weighted`; a bare denoiser is ``Weighted(denoiser)``, the rest. A part
            may be a sum itself.

    Raises:
        TypeError: a part is not a denoiser.
        ValueError: fewer than two parts, more than one without a weight, weights that do not sum to
            1 where none is left open, flow models beside others, or networks whose trained ranges
            have no level in common; in a run, before any call, a list of another length than the
            schedule's steps, a step that it does not have, or a `NoiseRange` without any step.
    """

    def __init__(self, *parts: Weighted | Denoiser) -> None:
        super().__init__()
        self.parts = tuple(p if isinstance(p, Weighted) else Weighted(p) for p in parts)
        if len(self.parts) < 2:
            raise ValueError(f"WeightedSum was given {len(self.parts)} denoisers; give two or more")
        if sum(part.weight is None for part in self.parts) > 1:
            raise ValueError(
                "several parts have no weight; one at most takes what the others leave of 1"
            )
        kinds = {is_flow(part.denoiser) for part in self.parts}
        if len(kinds) > 1:
            raise ValueError(
                "the denoisers of a WeightedSum must all be flow models or all not: bring one over "
                "with kdpp.as_flow or kdpp.as_ve"
            )
        self.flow = kinds.pop()
        self.weighted_leaves = tuple(leaf for part in self.parts for leaf in _leaves(part))
        self.constant = all(part.constant for part in self.parts)
        if self.constant:
            self.evaluation()
        ranges = [trained_range(part.denoiser) for part in self.parts if part.steps is None]
        known = [trained for trained in ranges if trained is not None]
        if known:
            low, high = max(one[0] for one in known), min(one[1] for one in known)
            if not low < high:
                raise ValueError(
                    "the denoisers of this WeightedSum were trained on levels that they do not "
                    "share: " + ", ".join(f"[{one[0]:g}, {one[1]:g}]" for one in known)
                )
            self.sigma_min, self.sigma_max = low, high
        self._networks = nn.ModuleList(
            part.denoiser for part in self.parts if isinstance(part.denoiser, nn.Module)
        )

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """The estimate of x0, each network guided by its own scale or ``cond_scale``."""
        return bind(self, "model", x, extra_args)(x, sigma)[0]

    def evaluation(self, sigma: Tensor | None = None) -> Evaluation:
        """What each network weighs outside of a run; reads sigma, which None leaves open."""
        levels = set() if sigma is None else set(sigma.tolist())
        if len(levels) > 1:
            raise ValueError(
                f"the weights of this WeightedSum depend on σ, and a batch at {sorted(levels)} was "
                "given; call it with one level"
            )
        level = levels.pop() if levels else 0.0
        return evaluation_at(self, level, level)._replace(end=None)


def _leaves(part: Weighted) -> list[Leaf]:
    """The networks of a part; what is said of one inside goes before what the part says."""
    inner = leaves_of(part.denoiser)
    if inner is None:
        return [Leaf(part.denoiser, part.cfg_scale, part.extra_args)]
    return [
        Leaf(
            leaf.denoiser,
            part.cfg_scale if leaf.cfg_scale is None else leaf.cfg_scale,
            {**part.extra_args, **leaf.extra_args},
        )
        for leaf in inner
    ]


# In numbers ---------------------------------------------------------------------------------------


class Weigher:
    """What each network of a sum weighs, place by place, over the steps of a run.

    Raises ValueError for settings that do not fit these steps: a list of another length, an index
    that no step has.
    """

    def __init__(self, model: WeightedSum, steps: Sequence[Step] = (), space: Space = VE) -> None:
        self.parts = model.parts
        able = [i for i, step in enumerate(steps) if step.sigma != step.sigma_next]
        self.inside: list[frozenset[int]] = []
        self.met: set[int] = set()
        self.inner = {
            j: Weigher(part.denoiser, steps, space)
            for j, part in enumerate(self.parts)
            if isinstance(part.denoiser, WeightedSum)
        }
        for part in self.parts:
            if steps and isinstance(part.weight, Sequence) and len(part.weight) != len(steps):
                raise ValueError(
                    f"weight holds {len(part.weight)} numbers for {len(steps)} steps; give one for "
                    "each"
                )
            found = []
            if steps and part.steps is not None:
                found = chosen("steps", part.steps, steps, able, space)
            self.inside.append(frozenset(found))

    def shares(self, place: Place) -> tuple[float, ...]:
        """Every network's weight, in the order of the sum's leaves; ValueError if not Σ w = 1."""
        given = [part.at(place, inside) for part, inside in zip(self.parts, self.inside)]
        total = sum(weight for weight in given if weight is not None)
        if None not in given and not abs(total - 1.0) <= 1e-9:
            where = "" if place.step is None else f" at step {place.step}"
            raise ValueError(
                f"the weights of a WeightedSum are {', '.join(f'{w:g}' for w in given if w)}"
                f"{where}, which sum to {total:g}; they must sum to 1 (leave one out: "
                "weight=None is the rest)"
            )
        rest = 0.0 if abs(1.0 - total) <= 1e-12 else 1.0 - total  # a rounding is not asked
        weights = [rest if weight is None else weight for weight in given]
        shares: list[float] = []
        for j, (weight, within) in enumerate(zip(weights, (part.steps for part in self.parts))):
            if isinstance(within, NoiseRange) and within.holds(place.start):
                self.met.add(j)
            inner = self.inner[j].shares(place) if j in self.inner else (1.0,)
            shares += [weight * share for share in inner]
        return tuple(shares)

    def check_met(self) -> None:
        """ValueError for a range of levels in which nothing was asked."""
        for j, part in enumerate(self.parts):
            if isinstance(part.steps, NoiseRange) and j not in self.met:
                raise ValueError(
                    f"steps is {part.steps}, and nothing is asked in that range on these levels; "
                    "give one that holds a step"
                )
        for inner in self.inner.values():
            inner.check_met()


Shares = tuple[tuple[tuple[float, ...], ...], ...]
"""By step and stage: what each network of a sum weighs; of another denoiser ()."""


def shares_of(model: Denoiser, steps: Sequence[Step], space: Space) -> Shares:
    """What each network of a student weighs at every evaluation; errors as in `WeightedSum`."""
    if not isinstance(model, WeightedSum):
        return tuple(((),) * len(step.stages) for step in steps)
    weigher = Weigher(model, steps, space)
    found = tuple(
        tuple(
            weigher.shares(Place(space.level(stage.sigma), space.level(step.sigma), i))
            for stage in step.stages
        )
        for i, step in enumerate(steps)
    )
    if steps:
        weigher.check_met()
    return found


def evaluation_at(model: Denoiser, level: float, end: float) -> Evaluation:
    """What is asked for a step of DDIM's, which has no number: weights by step are refused."""
    if not isinstance(model, WeightedSum):
        return Evaluation(level, end)
    return Evaluation(level, end, Weigher(model).shares(Place(level, level)))


def switches(shares: Shares, steps: Sequence[Step]) -> list[int]:
    """The steps that ask none of the networks that the step before asked: handovers.

    Steps of no length are passed over.
    """
    found = []
    before: set[int] = set()
    for i, (stages, step) in enumerate(zip(shares, steps)):
        if step.sigma == step.sigma_next:
            continue
        asked = {j for j, share in enumerate(stages[0]) if share != 0.0}
        if before and asked.isdisjoint(before):
            found.append(i)
        before = asked
    return found


def wrapped(model: Denoiser, wrap: Callable[[Denoiser], Denoiser]) -> Denoiser:
    """``wrap(model)``; of a weighted sum the same sum of its wrapped denoisers."""
    if not isinstance(model, WeightedSum):
        return wrap(model)
    parts = (replace(part, denoiser=wrapped(part.denoiser, wrap)) for part in model.parts)
    return WeightedSum(*parts)


# The uses that have a name ------------------------------------------------------------------------


def autoguidance(
    model: Denoiser, worse: Denoiser, scale: Weight, steps: Steps | None = None
) -> WeightedSum:
    """A model guided away from a worse version of itself: ``D = D_worse + w (D - D_worse)``.

    The worse one is smaller, trained for shorter, without its LoRA, … One evaluation of it more at
    each of the ``steps``; at the others it is the model alone.

    Args:
        scale: w, 1 for no guidance: a number, one for each step, or a function of σ.
        steps: as in `Weighted`; a `NoiseRange` is the segment of σ in which it is on.

    Raises TypeError and ValueError as `Weighted` and `WeightedSum` do.
    Source: Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", eq. (4).
    """
    return WeightedSum(Weighted(model), Weighted(worse, _rest_of(scale), steps))


def two_model_cfg(
    cond_model: Denoiser, uncond_model: Denoiser, scale: Weight, steps: Steps | None = None
) -> WeightedSum:
    """CFG of two networks: ``D = D_u(∅) + w (D_c(cond) - D_u(∅))``.

    One evaluation of each, D_u's with ``extra_args["uncond"]``; outside of ``steps`` it is D_c's
    alone. A network that takes no condition: ``lambda x, sigma, cond: network(x, sigma)``.

    Raises TypeError and ValueError as `Weighted` and `WeightedSum` do.
    Source: Ho & Salimans 2021, "Classifier-Free Diffusion Guidance", which has two networks first.
    """
    return WeightedSum(
        Weighted(cond_model, cfg_scale=1.0),
        Weighted(uncond_model, _rest_of(scale), steps, cfg_scale=0.0),
    )


def handover(
    student: Denoiser,
    teacher: Denoiser,
    steps: Steps = 1,
    *,
    cfg_scale: float | None = None,
    extra_args: Mapping[str, Any] | None = None,
) -> WeightedSum:
    """The teacher takes the student's place in some steps: ``D = D_ψ`` there, ``D_θ`` elsewhere.

    No evaluation more: in those steps the student is not asked. ``steps=1`` is the first one, which
    decides what the picture shows; ``{-1}`` the last, which decides its detail.

    Args:
        steps: the teacher's: the first k, indices, or a `NoiseRange`.
        cfg_scale: the teacher's CFG scale; None: the student's, ``extra_args["cond_scale"]``.
        extra_args: entries that take the place of the sampler's for the teacher.

    Raises TypeError and ValueError as `Weighted` and `WeightedSum` do.
    Source: Gandikota & Bau 2025, "Distilling Diversity and Control in Diffusion Models" (the first
    step); as for DDIM, Garrepalli et al. 2024 (DDIL), see `kdpp.mixed_rollout`.
    """
    taking = Weighted(teacher, 1.0, steps, cfg_scale, extra_args or {})
    return WeightedSum(Weighted(student), taking)


def _rest_of(weight: Any) -> Weight:
    """1 - w, in w's form."""
    if callable(weight):
        function: Callable[[float], float] = weight
        return lambda sigma: 1.0 - check_number("scale", function(sigma))
    if isinstance(weight, Sequence) and not isinstance(weight, str):
        return [1.0 - check_number("scale", one) for one in weight]
    return 1.0 - check_number("scale", weight)
