"""What networks are asked at one point of a run, in as few calls as can be.

A denoiser is one network, or a weighted sum of several (`kdpp.WeightedSum`). Either way it is asked
for its `Term`s: each is one network with its conditions, and weighs something in the estimate. All
that one network is asked at a step becomes one call (`Asker`), whichever term it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdpp.denoisers import (
    Call,
    Conditioning,
    Unlike,
    check_unwritten,
    conditioning_of,
    counted,
    shaped,
    writes,
)
from kdpp.kinds import Denoiser, Leaf, OwnCFG, leaves_of, takes_sigma_next
from kdpp.stacking import Stacked
from kdpp.update import folded

__all__ = [
    "Answer",
    "Asker",
    "Denoise",
    "Evaluation",
    "Group",
    "Term",
    "ask_all",
    "asks_where",
    "bind",
    "bind_all",
    "networks_of",
    "terms_of",
    "weighing",
]

Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""``(x, sigma of shape (batch,)) -> (denoised, unconditional estimate or None)``."""
Answer = tuple[Tensor, Tensor | None]
"""An estimate, and the unconditional one or None."""


class Evaluation(NamedTuple):
    """One question to a denoiser, in numbers: made before the loop."""

    level: float
    """σ, as the model writes levels."""
    end: float | None = None
    """The level that the update goes to before noise, if no other estimate has a part in it."""
    shares: tuple[float, ...] = ()
    """Of a weighted sum: what each of its networks weighs; 0 is not asked."""


class Term(NamedTuple):
    """What one network is asked, and what its answer weighs in an estimate."""

    network: Any
    given: Conditioning
    share: float = 1.0
    uncond: Callable[[], Tensor] | None = None
    """Of a network with its own CFG: tells the unconditional estimate of its latest call."""
    apart: Hashable = None
    """Terms that differ in it are never asked in one call."""


def terms_of(
    model: Denoiser,
    name: str,
    x: Tensor,
    extra_args: Mapping[str, Any],
    cfg_scale: float | None = None,
    needs_uncond: bool = False,
    at: Evaluation | None = None,
    apart: Hashable = None,
) -> tuple[Term, ...]:
    """What a denoiser asks its networks, those of weight 0 left out; arguments as in `bind`.

    ``apart``: as in `Term`. Raises ValueError for conditions that do not fit, as `bind` does.
    """
    leaves, shares = leaves_of(model), () if at is None else at.shares
    if leaves is None:
        leaves, shares = (Leaf(model, None, {}),), (1.0,)
    terms = []
    for (network, own_scale, own_args), share in zip(leaves, shares):
        if share == 0.0:
            continue
        args = {**extra_args, **own_args}
        end = None if at is None or at.end is None or at.end > at.level else at.end
        if end is not None and takes_sigma_next(network):
            args["sigma_next"] = x.new_full(x.shape[:1], end)
        scale = cfg_scale if own_scale is None else own_scale
        given = conditioning_of(network, name, args, scale, needs_uncond)
        uncond = tells_uncond(network, name) if needs_uncond else None
        terms.append(Term(network, given, share, uncond, apart))
    return tuple(terms)


def tells_uncond(network: Denoiser, name: str) -> Callable[[], Tensor] | None:
    """What tells the unconditional estimate of the latest call, of a network with its own CFG.

    Raises ValueError where nothing does.
    """
    if not isinstance(network, OwnCFG):
        return None
    if network.uncond_denoised is None:
        raise ValueError(
            f"CFG++ needs the {name}'s unconditional estimate, and kdpp.OwnCFG was given none: "
            "pass uncond_denoised=, a function that returns that of the latest call"
        )
    return network.uncond_denoised


def bind(
    model: Denoiser,
    name: str,
    x: Tensor,
    extra_args: Mapping[str, Any],
    cfg_scale: float | None = None,
    needs_uncond: bool = False,
    *,
    at: Evaluation | None = None,
    dtype: torch.dtype | None = None,
    max_batch: int | None = None,
) -> Denoise:
    """Fix everything about the calls that a run makes but x and sigma.

    Args:
        name: "student" or "teacher", for messages.
        cfg_scale: the CFG scale; None takes ``extra_args["cond_scale"]``, 1 if that is left out.
        needs_uncond: the unconditional estimate is wanted even at a scale of 1 (CFG++).
        at: which evaluation of a run it is. None: not known; a weighted sum whose weights depend on
            σ then reads it at every call.
        dtype, max_batch: as in `kdpp.denoisers.Call`.

    Raises:
        ValueError: ``uncond`` is missing where CFG needs it or does not fit ``cond``, or the scale
            is not a finite number. The returned function raises it for an output of another shape
            than x.
    """
    if at is None and leaves_of(model) is not None:
        summed: Any = model
        if not summed.constant:
            return lambda x, sigma: bind(
                model, name, x, extra_args, cfg_scale, needs_uncond,
                at=summed.evaluation(sigma), dtype=dtype, max_batch=max_batch,
            )(x, sigma)  # fmt: skip
        at = summed.evaluation()
    terms = terms_of(model, name, x, extra_args, cfg_scale, needs_uncond, at)
    groups = Asker(name, len(x), dtype, max_batch).groups(terms)
    if len(terms) == 1:
        return groups[0].alone()
    weigh = weighing([term.share for term in terms], needs_uncond)

    def denoise(x: Tensor, sigma: Tensor) -> Answer:
        return weigh(ask_all(groups, lambda place: (x, sigma), (), name))

    return denoise


def bind_all(
    model: Denoiser,
    name: str,
    x: Tensor,
    extra_args: Mapping[str, Any],
    evaluations: Sequence[Evaluation],
    cfg_scale: float | None = None,
    needs_uncond: bool = False,
    *,
    dtype: torch.dtype | None = None,
    max_batch: int | None = None,
) -> list[Denoise]:
    """`bind` for every evaluation of a run: one function wherever the same is asked."""
    settings: dict[str, Any] = {"dtype": dtype, "max_batch": max_batch}
    where = asks_where(model)
    if leaves_of(model) is None and not where:
        one = bind(model, name, x, extra_args, cfg_scale, needs_uncond, **settings)
        return [one] * len(evaluations)
    made: dict[Any, Denoise] = {}
    bound = []
    for at in evaluations:
        key = (at.shares, (at.level, at.end) if where else None)
        if key not in made:
            made[key] = bind(model, name, x, extra_args, cfg_scale, needs_uncond, at=at, **settings)
        bound.append(made[key])
    return bound


def asks_where(model: Denoiser) -> bool:
    """Whether a denoiser, or a network of a weighted sum, takes ``sigma_next``."""
    leaves = leaves_of(model)
    inside = [model] if leaves is None else [leaf.denoiser for leaf in leaves]
    return any(map(takes_sigma_next, inside))


def networks_of(model: Denoiser, at: Evaluation) -> list[Denoiser]:
    """The networks that an evaluation of a denoiser asks."""
    leaves = leaves_of(model)
    if leaves is None:
        return [model]
    return [leaf.denoiser for leaf, share in zip(leaves, at.shares) if share != 0.0]


def weighing(
    shares: Sequence[float], needs_uncond: bool = False
) -> Callable[[Sequence[Answer]], Answer]:
    """The weighted sum of answers: one interpolation for each after the first."""
    if len(shares) == 1:
        return lambda answers: answers[0]
    first, lerps, _ = folded(dict(enumerate(shares)))

    def sum_of(parts: Sequence[Any]) -> Tensor:
        result: Tensor = parts[first]
        for place, weight in lerps:
            result = torch.lerp(result, parts[place], weight)
        return result

    def weigh(answers: Sequence[Answer]) -> Answer:
        estimates, unconds = zip(*answers)
        return sum_of(estimates), sum_of(unconds) if needs_uncond else None

    return weigh


# In as few calls as can be ------------------------------------------------------------------------


class Group(NamedTuple):
    """Terms that are asked in one call."""

    places: tuple[int, ...]
    """Which of all terms."""
    terms: tuple[Term, ...]
    call: Call

    def ask(self, points: Sequence[tuple[Tensor, Tensor]]) -> list[Answer]:
        """The answers, each at its own x and sigma ``(batch,)``."""
        xs: list[Tensor] = []
        sigmas: list[Tensor] = []
        for term, (x, sigma) in zip(self.terms, points):
            count = len(term.given.parts)
            xs += [x] * count
            sigmas += [sigma] * count
        said = iter(self.call.parts(xs, sigmas))
        answers = [term.given.join([next(said) for _ in term.given.parts]) for term in self.terms]
        latest = self.terms[0].uncond
        if latest is not None:  # of one that does its own CFG, which is asked alone
            uncond = shaped(latest(), f"{self.call.name}'s uncond_denoised", points[0][0])
            return [(answers[0][0], uncond)]
        return answers

    def alone(self) -> Denoise:
        """`ask` for a group of one term, as a function of x and sigma: nothing but the call."""
        (term,), call = self.terms, self.call
        if term.uncond is not None:
            return lambda x, sigma: self.ask(((x, sigma),))[0]
        join, halves = term.given.join, len(term.given.parts)
        if halves == 1 and term.given.scale != 0.0:
            return lambda x, sigma: (call(x, sigma), None)
        return lambda x, sigma: join(call.parts((x,) * halves, (sigma,) * halves))


def ask_all(
    groups: Sequence[Group],
    point: Callable[[int], tuple[Tensor, Tensor]],
    kept: Sequence[Tensor],
    name: str,
) -> list[Answer]:
    """Every term's answer, in the terms' order; ``point`` gives a term's x and sigma.

    Raises ValueError where a network writes its answer over one of those before it, or over what is
    ``kept``.
    """
    held = list(kept)
    said: dict[int, Answer] = {}
    for group in groups:
        before = writes(held)
        answers = group.ask([point(place) for place in group.places])
        check_unwritten(held, before, name)
        if len(groups) > 1:  # the next network may use the same memory
            answers = [
                (counted(one), None if uncond is None else counted(uncond))
                for one, uncond in answers
            ]
        held += [one for one, _ in answers]
        said |= dict(zip(group.places, answers))
    return [said[place] for place in range(len(said))]


class Asker:
    """Puts terms into as few calls as can be.

    All that one network is asked is one call; so is what all members of a stack are asked, if each
    has as many rows. Apart stay what a denoiser with its own CFG is asked (its keywords cannot be
    joined), what is kept apart, and terms whose keywords do not fit into one batch.
    """

    def __init__(
        self, name: str, batch: int, dtype: torch.dtype | None, max_batch: int | None
    ) -> None:
        self.name, self.batch, self.dtype, self.max_batch = name, batch, dtype, max_batch
        self.calls: dict[tuple[int, ...], Call] = {}  # by what is given, for later steps too

    def groups(self, terms: Sequence[Term]) -> tuple[Group, ...]:
        """The calls that ask them all."""
        made: list[Group] = []
        for places in grouped(range(len(terms)), lambda place: network_of(place, terms[place])):
            for together in self.together(places, terms):
                try:
                    made.append(self.group(together, terms))
                except Unlike:
                    apart = grouped(together, lambda place: id(terms[place].given))
                    made += [self.group(places, terms) for places in apart]
        return tuple(made)

    def together(self, places: Sequence[int], terms: Sequence[Term]) -> list[list[int]]:
        """One network's terms as they are called: a stack as a whole, or member by member."""
        stack = getattr(terms[places[0]].network, "stack", None)
        if stack is None:
            return [list(places)]
        members = grouped(places, lambda place: terms[place].network.index)
        members.sort(key=lambda member: terms[member[0]].network.index)
        rows = [self.batch * sum(len(terms[p].given.parts) for p in member) for member in members]
        fits = self.max_batch is None or sum(rows) <= self.max_batch
        if fits and rows == [rows[0]] * len(stack):
            return [[place for member in members for place in member]]
        return members

    def group(self, places: Sequence[int], terms: Sequence[Term]) -> Group:
        """These terms as one call; `Unlike` where their keywords do not fit into one batch."""
        asked = tuple(terms[place] for place in places)
        key = tuple(id(term.given) for term in asked)
        if key not in self.calls:
            network = asked[0].network
            if any(term.network is not network for term in asked):
                network = network.stack
            parts = [part for term in asked for part in term.given.parts]
            self.calls[key] = Call(
                network, self.name, parts, self.batch, dtype=self.dtype, max_batch=self.max_batch
            )
        return Group(tuple(places), asked, self.calls[key])


def network_of(place: int, term: Term) -> Hashable:
    """Equal for terms that one network can hear together."""
    if isinstance(term.network, OwnCFG):
        return ("own CFG", place)
    network = term.network.stack if isinstance(term.network, Stacked) else term.network
    return (id(network), term.apart)


def grouped(items: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """The items by their key, in the order in which the keys occur."""
    groups: dict[Hashable, list[int]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
