"""Rows of coefficients, made ready to be carried out on tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kdpp.plan import VE, Row, Space, level_ratio

__all__ = ["Update", "ddim", "folded"]

# The places of a row's tensors are (group, index); the groups:
STATE, TEACHERS, DIRECTIONS, PAST, GUIDED = range(5)
X, DENOISED = (STATE, 0), (STATE, 1)


class Update(NamedTuple):
    """A row made ready: one interpolation for each tensor after the first, a factor, the noise.

    It is called with the groups: (x, x̂), what the teachers said, directions, past states and guided
    estimates, these three newest first; and with the noise, where it takes any.
    """

    first: tuple[int, int]
    lerps: tuple[tuple[tuple[int, int], float], ...]
    factor: float
    noise: float | None

    @classmethod
    def of(
        cls,
        row: Row,
        sigma: float,
        reached: float,
        space: Space,
        cfg_pp: bool,
        scales: Sequence[float] = (),
    ) -> Update:
        """The weights of a row from x at ``sigma`` to a state at ``reached``, `folded` into lerps.

        ``scales`` are the teachers' λ: the row's weight of x̂_new is shared out to its terms,
        ``x̂_new = (1 - Σλ_j) x̂ + Σ λ_j x̂_ψj``, which saves the kernel that would make it.
        """
        alpha = space.alpha(reached)
        weights = {
            X: state_weight(row.target, sigma, reached, space),
            DENOISED: alpha * row.denoised * (1.0 - sum(scales)),
        }
        weights |= {(TEACHERS, j): alpha * row.denoised * scale for j, scale in enumerate(scales)}
        weights |= {(DIRECTIONS, j): alpha * weight for j, weight in enumerate(row.direction)}
        weights |= {(PAST, j): alpha * w / space.level(s) for j, (w, s) in enumerate(row.past)}
        for j, weight in enumerate(row.guided):
            place = (GUIDED if cfg_pp else DIRECTIONS, j)
            weights[place] = weights.get(place, 0.0) + alpha * weight
        newest = (GUIDED if cfg_pp else DIRECTIONS, 0)  # which is the estimate itself
        weights[DENOISED] += weights.pop(newest, 0.0)
        first, lerps, total = folded(weights)
        factor = 1.0 if space is VE else total
        return cls(first, lerps, factor, row.noise and alpha * row.noise)

    def __call__(self, groups: Sequence[Sequence[Any]], noise: Tensor | None) -> Tensor:
        (group, index), lerps, factor, scale = self
        result: Tensor = groups[group][index]
        for (other, place), weight in lerps:
            result = torch.lerp(result, groups[other][place], weight)
        if factor != 1.0:
            result = result * factor
        if scale:
            assert noise is not None
            return torch.add(result, noise, alpha=scale)
        # A network may use its output buffer again: never hand out that very tensor.
        fresh = lerps or factor != 1.0 or (group, index) == X
        return result if fresh else result.clone()


Place = TypeVar("Place", int, tuple[int, int])


def folded(
    weights: Mapping[Place, float],
) -> tuple[Place, tuple[tuple[Place, float], ...], float]:
    """A weighted sum as interpolations: its first tensor, the others with their lerps' weights, W.

    ``Σ w_j p_j = W lerp(… lerp(p_0, p_1, w_1/(w_0+w_1)) …, p_n, w_n/W)``, the largest weight first,
    so that no partial sum vanishes. Weights of 0 are left out.
    """
    terms = sorted(((w, place) for place, w in weights.items() if w), reverse=True)
    total = 0.0
    lerps = []
    for weight, place in terms:
        total += weight
        lerps.append((place, weight / total))
    return lerps[0][0], tuple(lerps[1:]), total


def ddim(denoised: Tensor, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """DDIM's step ``D + (x - D)/σ·σ'``, up or down; of a flow model with τ for σ."""
    return torch.lerp(denoised, x, level_ratio(sigma, sigma_next))


def state_weight(target: float, sigma: float, reached: float, space: Space) -> float:
    """The weight of a model's state at ``sigma`` in one at ``reached`` that keeps ``target``/σ."""
    if target == sigma:
        return 1.0 if reached == sigma else space.alpha(reached) / space.alpha(sigma)
    return space.alpha(reached) * target / space.level(sigma)
