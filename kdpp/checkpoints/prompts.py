r"""Prompts as the web UIs read them, for pipelines whose texts CLIP alone encodes (SD, LCM, SDXL).

- ``(a)`` weighs a by 1.1, ``[a]`` by 1/1.1, ``(a:1.3)`` by 1.3; inside one another they multiply.
  ``\(``, ``\)``, ``\[`` and ``\]`` are brackets as text. A token's hidden state is multiplied by
  its weight; then all of its chunk are scaled so that their mean is what it was.
- CLIP takes 77 tokens, of which the first and the last are its own. A longer prompt is cut into
  chunks of 75, which are encoded each by itself and joined along the tokens. ``BREAK`` starts a
  new chunk. Where a cut falls into a phrase, the phrase moves to the next chunk as a whole, if the
  comma before it is one of the chunk's last 20 tokens. The pooled vector is the first chunk's.

This follows AUTOMATIC1111's web UI, version 1.10 (modules/prompt_parser.py, sd_hijack_clip.py and
sd_emphasis.py, "Original"), as it is set when installed, but for two things: a backslash before
anything but a bracket is text, where the web UI drops it, and BREAK inside brackets starts a chunk,
where the web UI takes it for a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["READERS", "Clip", "chunks", "encode_text", "sections"]

READERS = ("SD 1.x", "SD 2.x", "SDXL")
"""The architectures whose prompts are read so."""
ROUND, SQUARE = 1.1, 1 / 1.1  # what a pair of brackets multiplies by
BACKTRACK = 20  # tokens: the longest phrase, with its comma, that a cut moves
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
TOKEN = re.compile(
    rf"\\[()[\]]"  # a bracket as text
    rf"|[([]"
    rf"|:\s*(?P<weight>{NUMBER})\s*\)"
    rf"|[)\]]"
    rf"|[^\\()[\]:]+|[\\:]"
)
EDITS = re.compile(rf"\||:\s*{NUMBER}\s*$")  # in square brackets: [a|b], [a:b:0.5], [a::3]
NETWORKS = re.compile(r"<(lora|lyco|hypernet):[^>]*>")
EMBEDDING = re.compile(r"\bembedding:[^\s,()[\]]+")
"""As ComfyUI names one."""


class Piece(NamedTuple):
    """Text of one weight."""

    text: str
    weight: float


def sections(prompt: str) -> list[list[Piece]]:
    """The pieces of a prompt, in a list for each section between its BREAKs.

    Neighbours of the same weight are one piece. A bracket that is never closed reaches to the end,
    and one that was never opened is text.

    Raises:
        ValueError: the prompt holds what the web UIs read and kdpp does not: ``[a:b:0.5]``,
            ``[a|b]``, ``AND`` or ``<lora:…>``; or ComfyUI's ``embedding:…``.
    """
    _check(prompt)
    pieces: list[tuple[str | None, float]] = []  # None: a BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where in the pieces
    starts: list[int] = []  # of square brackets, where in the prompt

    def weigh(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in TOKEN.finditer(prompt):
        token = match[0]
        if token in opened:
            opened[token].append(len(pieces))
            starts += [match.end()] * (token == "[")
        elif len(token) == 2 and token[0] == "\\":
            pieces.append((token[1], 1.0))
        elif token[-1] == ")" and opened["("]:
            weigh(opened["("].pop(), float(match["weight"] or ROUND))
        elif token == "]" and opened["["]:
            inside = prompt[starts.pop() : match.start()]
            if EDITS.search(inside):
                raise ValueError(
                    f"the prompt holds '[{inside}]', by which the web UIs change it from step to "
                    "step; kdpp does not do that: write (text:0.8) for a weight, and \\[ and \\] "
                    "for brackets as text"
                )
            weigh(opened["["].pop(), SQUARE)
        else:
            for i, text in enumerate(re.split(r"\s*\bBREAK\b\s*", token)):
                pieces += [(None, 1.0)] * (i > 0) + [(text, 1.0)]
    for start in opened["("]:
        weigh(start, ROUND)
    for start in opened["["]:
        weigh(start, SQUARE)
    return _joined(pieces)


def _check(prompt: str) -> None:
    """ValueError for what can be seen without reading the brackets."""
    network = NETWORKS.search(prompt)
    if network:
        raise ValueError(
            f"the prompt holds {network[0]!r}, and kdpp loads no files that a prompt names; take "
            "it out and give a LoRA's file with --lora FILE:WEIGHT, or to load_loras"
        )
    embedding = EMBEDDING.search(prompt)
    if embedding:
        raise ValueError(
            f"the prompt holds {embedding[0]!r}, and kdpp reads no embeddings (textual inversion); "
            "take it out"
        )
    if re.search(r"\bAND\b", prompt):
        raise ValueError(
            "the prompt holds AND, of which the web UIs make two prompts; kdpp does not do that: "
            "for the word, write it in small letters"
        )


def _joined(pieces: Sequence[tuple[str | None, float]]) -> list[list[Piece]]:
    """A list for each section, neighbours of the same weight as one."""
    found: list[list[Piece]] = [[]]
    for text, weight in pieces:
        last = found[-1]
        if text is None:
            found.append([])
        elif last and last[-1].weight == weight:
            last[-1] = Piece(last[-1].text + text, weight)
        elif text:
            last.append(Piece(text, weight))
    return found


Chunk = list[tuple[int, float]]
"""Tokens and their weights, without begin, end and padding."""


def chunks(tokenizer: Any, prompt: str) -> list[Chunk]:
    """The prompt's tokens, in lists of at most as many as the encoder takes at once.

    Raises ValueError as `sections`.
    """

    def tokens(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    room, (comma, *_) = tokenizer.model_max_length - 2, tokens(",")
    found: list[Chunk] = []
    for pieces in sections(prompt):
        left = [(token, weight) for text, weight in pieces for token in tokens(text)]
        while len(left) > room:
            end = room
            if left[room][0] != comma:
                last = range(room - 1, max(room - BACKTRACK, 0) - 1, -1)
                end = next((i + 1 for i in last if left[i][0] == comma), room)
            found.append(left[:end])
            left = left[end:]
        found.append(left)
    return found if found[-1] or len(found) == 1 else found[:-1]  # nothing follows the last BREAK


class Clip(NamedTuple):
    """A CLIP text encoder, and which of its layers is read."""

    tokenizer: Any
    encoder: Any
    layer: int
    """Counted from the last, which is 1: the web UIs' "Clip skip"."""
    normed: bool
    """Whether the encoder's last layer norm is applied to it."""

    def encode(self, chunk: Chunk, device: Any) -> tuple[Tensor, Tensor | None]:
        """Hidden states (tokens, width) and, of an encoder with a projection, the pooled vector."""
        begin, end, pad = (getattr(self.tokenizer, f"{name}_token_id") for name in ENDS)
        rest = self.tokenizer.model_max_length - 2 - len(chunk)
        ids = [begin, *(token for token, _ in chunk), end, *[pad] * rest]
        out = self.encoder(torch.tensor([ids], device=device), output_hidden_states=True)
        if self.layer == 1 and self.normed:
            states = out.last_hidden_state[0]
        else:
            states = out.hidden_states[-self.layer][0]
            if self.normed:
                states = getattr(self.encoder, "text_model", self.encoder).final_layer_norm(states)
        weights = [1.0, *(weight for _, weight in chunk), 1.0, *[1.0] * rest]
        pooled = getattr(out, "text_embeds", None)
        return weighted(states, weights), None if pooled is None else pooled[0]


ENDS = ("bos", "eos", "pad")


def weighted(states: Tensor, weights: Sequence[float]) -> Tensor:
    """``w z · mean(z)/mean(w z)`` for hidden states z (tokens, width); z itself if all w are 1."""
    if all(weight == 1.0 for weight in weights):
        return states
    before = states.float()
    after = before * before.new_tensor(weights)[:, None]
    return (after * (before.mean() / after.mean())).to(states.dtype)


def encode_text(
    clips: Sequence[Clip], texts: Sequence[str], device: Any
) -> tuple[Tensor, Tensor | None]:
    """A text's hidden states (tokens, width of all encoders), and the last one's pooled vector.

    ``texts`` are one for each encoder. Where they differ in their number of chunks, the shorter one
    gets empty chunks.

    Raises ValueError as `sections`.
    """
    cut = [chunks(clip.tokenizer, text) for clip, text in zip(clips, texts)]
    count = max(map(len, cut))
    columns, pooled = [], None
    for clip, own in zip(clips, cut):
        encoded = [clip.encode(chunk, device) for chunk in own + [[]] * (count - len(own))]
        columns.append(torch.cat([states for states, _ in encoded]))
        pooled = encoded[0][1]
    return torch.cat(columns, dim=-1), pooled
