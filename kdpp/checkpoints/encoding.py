"""A run's prompts, encoded before it samples, so that the text encoders can leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["WINDOW", "Encoded"]

WINDOW = 64
"""How many batches' prompts are encoded ahead. A prompt takes up to 8 MB then (FLUX)."""
Prompts = tuple[str, ...]
"""Of one batch."""


class Encoded:
    """The conditions of a batch's prompts, by the prompts.

    Args:
        encode: makes them.
        leave: is called when every batch that is expected has been encoded; nothing is encoded
            afterwards.
    """

    def __init__(self, encode: Callable[[Prompts], Any], leave: Callable[[], None]) -> None:
        self._encode, self._leave = encode, leave
        self._expected = False
        self._waiting: deque[Prompts] = deque()
        self._held: dict[Prompts, Any] = {}

    def expect(self, batches: Iterable[Prompts]) -> None:
        """Say which batches will be asked for, in which order, and no others."""
        self._waiting = deque(batches)
        self._held.clear()
        self._expected = True

    def __getitem__(self, prompts: Prompts) -> Any:
        if prompts not in self._held:
            ahead = dict.fromkeys([prompts])
            while self._waiting and (self._waiting[0] in ahead or len(ahead) < WINDOW):
                ahead[self._waiting.popleft()] = None
            self._held.clear()
            self._held |= {one: self._encode(one) for one in ahead}
            if self._expected and not self._waiting:
                self._leave()
        return self._held[prompts]
