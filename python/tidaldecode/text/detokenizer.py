"""From a stream of token ids to a stream of text that can be shown as it comes.

IncrementalDetokenizer never gives out part of a character; StopStringFilter never gives out text
that may turn out to be the beginning of a stop string. Used by stream.py and batch.py. The window
scheme is that of vLLM's and text-generation-inference's detokenizers: the text of a few tokens
before the new ones is decoded with them, because what a token reads as depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are not (yet) a character
_CONTEXT_TOKENS = 5
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
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._window = 0  # first id that is decoded
        self._read = len(self._ids)  # ids before it have been given out completely
        self._known = decode(self._ids) if self._ids else ""  # text of ids[window:read]
        self._given = 0  # characters behind `known` already given out

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


class StopStringFilter:
    """Passes text on until a stop string is complete; its own text never gets through.

    What comes out does not depend on how the text was cut into pieces: the stop string that is
    complete first wins, of those that end together the longest.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""  # given in, not given out: may be the beginning of a stop string
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Adds text; returns what is safe to show. A complete stop string sets `matched`."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return piece
        text = self._held + piece
        ends = [
            (start + len(string), -len(string), string)
            for string in self._stop
            if (start := text.find(string)) >= 0
        ]
        if ends:
            end, _, self.matched = min(ends)
            self._held = ""
            return text[: end - len(self.matched)]
        keep = self._longest_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(len(string) for string in self._stop) - 1)
        for length in range(longest, 0, -1):
            tail = text[len(text) - length :]
            if any(string.startswith(tail) for string in self._stop):
                return length
        return 0


class TextAssembler:
    """The two filters in a row: token ids of one sequence in, text that may be shown out."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt_ids: Sequence[int],
        stop: Sequence[str],
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(decode, prompt_ids)
        self._filter = StopStringFilter(stop)

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._filter.matched

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that may be shown now."""
        return self._filter.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The rest of the text once the sequence has ended."""
        if self.matched_stop is not None:
            return ""
        piece = self._filter.push(self._detokenizer.finish())
        return piece if self.matched_stop is not None else piece + self._filter.finish()
