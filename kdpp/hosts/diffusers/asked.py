"""What a pipeline asks its network in a step: the conditions, and how its latents lie."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdpp.checkpoints.networks import latent_channels, packed, unpacked
from kdpp.checkpoints.pipelines import padded
from kdpp.denoisers import map_tensors

__all__ = ["Layout", "Recorder", "halves", "layout_of", "with_negative"]

Asked = Mapping[str, Any]
"""The arguments of one call of the network, by name."""
Cond = dict[str, Any]
TEXT, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
TAKEN = (TEXT, MASK, "encoder_attention_mask", "pooled_projections", "added_cond_kwargs")
"""The arguments that are conditions (`kdpp.checkpoints.networks`)."""


class Recorder:
    """A removable hook of a pipeline's networks: keeps what they are asked in the current step.

    ``run()`` gives an object of the current run. Calls of another one, which broke off in a step,
    are forgotten.
    """

    def __init__(self, networks: Sequence[nn.Module], run: Callable[[], object]) -> None:
        self.calls: list[Asked] = []
        self.run = run
        self.of: object = None
        self.handles = [
            one.register_forward_pre_hook(self.hear, with_kwargs=True) for one in networks
        ]

    def hear(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook."""
        if self.of is not self.run():
            self.of, self.calls = self.run(), []
        self.calls.append(inspect.signature(network.forward).bind(*args, **kwargs).arguments)

    def remove(self) -> None:
        """Take the hooks out."""
        self.calls = []
        for handle in self.handles:
            handle.remove()


def halves(calls: Sequence[Asked], batch: int) -> tuple[Cond, Cond | None]:
    """``cond`` and ``uncond`` of a step's calls, as `encode` has them; None where CFG is off.

    CFG is one call with twice the batch, or two calls, of which the first has the prompt.
    """
    first = calls[0]
    if "cap_feats" in first:  # Z-Image: lists, the prompts first
        texts, others = list(first["cap_feats"][:batch]), list(first["cap_feats"][batch:])
        cond, uncond = padded(texts, others or texts)
        return cond, uncond if others else None
    given = taken(first)
    if len(given[TEXT]) == 2 * batch:
        return pick(given, 2 * batch, batch), pick(given, 2 * batch, 0)
    return given, taken(calls[1]) if len(calls) > 1 else None


def taken(asked: Asked) -> Cond:
    """The conditions among the arguments of a call."""
    given = {name: asked[name] for name in TAKEN if asked.get(name) is not None}
    if not given.get("added_cond_kwargs", True):
        del given["added_cond_kwargs"]
    if "position_ids" in asked and "encoder_attention_mask" in given:  # Krea 2
        given[MASK] = given.pop("encoder_attention_mask")
    return given


def pick(given: Cond, rows: int, start: int) -> Cond:
    """Half of the rows, from ``start``."""

    def half(one: Tensor) -> Tensor:
        return one[start : start + rows // 2] if len(one) == rows else one

    return map_tensors(given, half)  # type: ignore[no-any-return]


def with_negative(cond: Cond, negative: Cond, mask: str | None) -> tuple[Cond, Cond]:
    """Both halves in one form: what the negative does not say is as beside the prompt.

    Texts of two lengths are padded, with the mask of that name. ValueError where there is none.
    """
    batch = len(cond[TEXT])
    uncond = map_tensors(negative, lambda one: one.expand(batch, *one.shape[1:]))
    more = cond.get("added_cond_kwargs")
    if more is not None:
        said = uncond.get("added_cond_kwargs", {})
        uncond["added_cond_kwargs"] = {**more, **said}
    lengths = [half[TEXT].shape[1] for half in (cond, uncond)]
    masked = {name for half in (cond, uncond) for name in half} & {mask}
    if lengths[0] == lengths[1] and not masked:
        return cond, uncond
    if mask is None:
        raise ValueError(
            f"the run's prompt has {lengths[0]} tokens and the teacher's negative {lengths[1]}; "
            f'give attach encoding={{"max_sequence_length": {lengths[0]}}}, or what else makes '
            "them alike"
        )
    return lengthened(cond, mask, max(lengths)), lengthened(uncond, mask, max(lengths))


def lengthened(half: Cond, mask: str, length: int) -> Cond:
    """A half with texts of that length, zeros behind, and its mask."""
    text = half[TEXT]
    kept = half.get(mask)
    kept = torch.ones(text.shape[:2], device=text.device) if kept is None else kept
    short = length - text.shape[1]
    return {
        **half,
        TEXT: nn.functional.pad(text, (0, 0, 0, short)),
        mask: nn.functional.pad(kept.float(), (0, short)) > 0.5,
    }


class Layout(NamedTuple):
    """A latent as a row of tokens: its rows and columns of patches, and a patch's side."""

    rows: int
    columns: int
    side: int

    def unpacked(self, tokens: Tensor) -> Tensor:
        return unpacked(tokens, *self)

    def packed(self, x: Tensor) -> Tensor:
        return packed(x, self.side)


def layout_of(network: Any, calls: Sequence[Asked], sample: Tensor) -> Layout | None:
    """How the pipeline packs its latents, by the positions that the network is told; None: not.

    Raises ValueError where the network is shown more than the latent.
    """
    if sample.ndim != 3:
        return None
    asked = calls[0]
    if "img_shapes" in asked:
        _, rows, columns = asked["img_shapes"][0][0]
    else:
        ids = asked["img_ids"] if "img_ids" in asked else asked["position_ids"]
        rows, columns = (int(last) + 1 for last in ids.flatten(0, -2)[:, 1:3].amax(0))
    if rows * columns != sample.shape[1] or asked["hidden_states"].shape[1] != sample.shape[1]:
        raise ValueError(
            "the network is shown pictures beside the latent, which the teacher is not: run without"
            " reference pictures, or detach"
        )
    side = 1 if sample.shape[2] == latent_channels(network) else 2
    return Layout(rows, columns, side)
