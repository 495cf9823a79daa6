"""From a stream of token ids to a stream of text that never holds part of a character.

The window scheme is that of vLLM's and text-generation-inference's detokenizers: the text of a few
tokens before the new ones is decoded with them, because what a token reads as depends on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are not (yet) a character
CONTEXT_TOKENS = 5
# A UTF-8 character has at most 4 bytes and a token at least 1, so more undecodable tokens than that
# contain bytes that will never be a character; the last 3 may still be the start of one.
_MAX_BYTES_PER_CHARACTER = 4
_MAX_HELD_TOKENS = 64


class IncrementalDetokenizer:
    """Text of a growing sequence, piece by piece; the pieces join to the whole text."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = ()
    ) -> None:
        """`decode` gives the text of token ids; `prompt_ids` are what the new tokens follow."""
        self._decode = decode
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._window = 0  # first id that is decoded
        self._read = len(self._ids)  # ids before it have been given out completely
        self._known = decode(self._ids) if self._ids else ""  # text of ids[window:read]
        self._given = 0  # characters behind `known` already given out

    @property
    def state(self) -> list[Any]:
        """All that the tokens so far have left behind, as JSON can hold it."""
        return [self._ids, self._window, self._read, self._known, self._given]

    @state.setter
    def state(self, value: list[Any]) -> None:
        self._ids, self._window, self._read, self._known, self._given = value

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that is now certain, often that of this token."""
        self._ids.append(token_id)
        text = self._decode(self._ids[self._window :])
        pending = len(self._ids) - self._read
        if not text.endswith(_REPLACEMENT):
            # Tokens without text (special ones) stay in the window: they are no context.
            is_new = len(text) > len(self._known) + self._given
            return self._advance(text) if is_new or pending >= _MAX_HELD_TOKENS else ""
        if pending >= _MAX_HELD_TOKENS:
            return self._advance(text)
        if pending <= _MAX_BYTES_PER_CHARACTER:
            return ""
        doubtful = min(_MAX_BYTES_PER_CHARACTER - 1, len(text) - len(text.rstrip(_REPLACEMENT)))
        return self._give(text[: len(text) - doubtful])

    def finish(self) -> str:
        """The rest, incomplete characters as U+FFFD."""
        return self._give(self._decode(self._ids[self._window :]))

    def _give(self, text: str) -> str:
        piece = text[len(self._known) + self._given :]
        self._given += len(piece)
        return piece

    def _advance(self, text: str) -> str:
        """Gives out everything and moves the window: the tokens just read are the new context."""
        piece = self._give(text)
        self._window, self._read = self._read, len(self._ids)
        # Ids before the window are never needed again.
        del self._ids[: self._window]
        self._read -= self._window
        self._window = 0
        self._known = self._decode(self._ids)
        self._given = 0
        return piece
