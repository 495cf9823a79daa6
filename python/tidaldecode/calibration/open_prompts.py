"""Prompts that have been read and stay in the cache: what a calibration would else read twice.

Used by questions.py and objective.py. Prompts of a name begin alike as a rule, and what they begin
with is read once (Decoder.replay).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from tidaldecode.batch import PrefillProgress
from tidaldecode.decoder import Decoder
from tidaldecode.errors import CapacityError
from tidaldecode.replay import Replay


class Reporter(Protocol):
    """Where a calibration shows how far it is."""

    def reading(self, title: str) -> AbstractContextManager[PrefillProgress]:
        """A bar for tokens of prompts."""

    def counting(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A bar for plans."""


class OpenPrompts:
    """Replays by name, as many as the cache has room for.

    Names are gone through again and again in the same order, so the one used last makes room: it is
    the one not needed for longest.
    """

    def __init__(self, decoder: Decoder, reporter: Reporter) -> None:
        self.decoder = decoder
        self._reporter = reporter
        self._open: dict[str, Replay] = {}

    def open(self, name: str, prompts: Sequence[Sequence[int]], room: int) -> Replay:
        """The replay of a name, read if it is not in the cache.

        Args:
            name: the prompts' own; whoever asks for it again gives the same prompts.
            prompts: token ids of each.
            room: tokens that may follow each, as many as anybody asks for.

        Raises: CapacityError for prompts that the whole cache has no room for.
        """
        replay = self._open.pop(name, None)
        while replay is None:
            try:
                with self._reporter.reading(f"Reading {name}") as on_prefill:
                    replay = self.decoder.replay(
                        prompts, max_new_tokens=room, on_prefill=on_prefill
                    )
            except CapacityError:
                if not self._open:
                    raise
                self._open.popitem()[1].close()
        self._open[name] = replay
        return replay

    def close(self) -> None:
        """Frees the pages of all of them."""
        while self._open:
            self._open.popitem()[1].close()
