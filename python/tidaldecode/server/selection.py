"""What the steps of an answer read of its prompt: the selection events of `return_selection`.

The positions that each choosing layer chose in the newest sparse step are counted in at most 512
bins of the prompt. One map a stream says which piece of which message a bin is.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tidaldecode.errors import TidalError
from tidaldecode.server.answer import Answer, Delta

if TYPE_CHECKING:
    import asyncio

    from tidaldecode.server.exchange import Exchange
    from tidaldecode.server.service import Service

MAX_BINS = 512
# The engine copies between two passes, so all watched answers together are looked at so often.
INTERVAL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class PromptBins:
    """A prompt in pieces of about the same number of tokens."""

    edges: np.ndarray  # [num_bins + 1] int64: token positions, from 0 to the prompt's length
    messages: list[int]  # the message that each edge lies in, by its index; -1 if none is known
    offsets: list[int]  # characters of that message in front of the edge

    def fields(self) -> dict[str, Any]:
        """The map, as the stream has it."""
        return {
            "prompt_tokens": int(self.edges[-1]),
            "edges": self.edges.tolist(),
            "messages": self.messages,
            "offsets": self.offsets,
        }

    def count(self, chosen: dict[int, np.ndarray]) -> list[dict[str, Any]]:
        """Chosen positions of each layer by bin.

        Args:
            chosen: {layer: [num_sets, num_selected] int32}; -1 is none.
        """
        return [self._count(layer, sets) for layer, sets in sorted(chosen.items())]

    def _count(self, layer: int, sets: np.ndarray) -> dict[str, Any]:
        positions = sets[sets >= 0]
        inside = positions[positions < self.edges[-1]]
        bins = np.searchsorted(self.edges, inside, side="right") - 1
        return {
            "layer": layer,
            "sets": len(sets),
            "bins": np.bincount(bins, minlength=len(self.edges) - 1).tolist(),
            "answer": len(positions) - len(inside),  # behind the prompt
        }


def bins_of(tokens: Sequence[bytes], contents: Sequence[Any]) -> PromptBins:
    """The bins of a prompt.

    Args:
        tokens: the bytes of each of its tokens.
        contents: the texts of its messages, in their order; anything else than a text is not
            looked for.
    """
    num_bins = min(MAX_BINS, len(tokens))
    edges = np.arange(num_bins + 1) * len(tokens) // max(1, num_bins)
    ends = np.cumsum([0, *map(len, tokens)])
    texts = _find(b"".join(tokens), contents)
    messages, offsets = [], []
    for place in ends[edges].tolist():
        known = [text for text in texts if text.start <= place] or texts[:1]
        messages.append(known[-1].index if known else -1)
        offsets.append(known[-1].offset_of(place) if known else 0)
    return PromptBins(edges=edges, messages=messages, offsets=offsets)


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A message's text where the prompt has it."""

    index: int
    start: int  # byte of the prompt
    characters: np.ndarray  # [bytes + 1] characters of the message in front of each byte of it

    def offset_of(self, place: int) -> int:
        """Characters of the message in front of a byte of the prompt, within the text."""
        at = min(max(0, place - self.start), len(self.characters) - 1)
        return int(self.characters[at])


def _find(prompt: bytes, contents: Sequence[Any]) -> list[_Text]:
    """The messages that are in the prompt, in one of their spellings."""
    found, begin = [], 0
    for index, content in enumerate(contents):
        if not isinstance(content, str) or not content.strip():
            continue
        for spelling, in_front in _spellings(content):
            raw = spelling.encode()
            if (start := prompt.find(raw, begin)) >= 0:
                begin = start + len(raw)
                begins = (np.frombuffer(raw, np.uint8) & 0xC0) != 0x80
                characters = in_front[np.concatenate([[0], np.cumsum(begins)])]
                found.append(_Text(index=index, start=start, characters=characters))
                break
    return found


def _spellings(content: str) -> Iterator[tuple[str, np.ndarray]]:
    """What a prompt may have of a message: all of it, or without the space around it; both also
    composed, as the tokenizers of some models do it.

    Yields: the text; [characters + 1] characters of the message in front of each of its own, which
        within a line that was composed are about so many.
    """
    bare = content.strip()
    texts = [(content, 0)] + [(bare, content.find(bare))] * (bare != content)
    for text, skipped in texts:
        yield text, skipped + np.arange(len(text) + 1)
    for text, skipped in texts:
        lines = text.split("\n")
        composed = [unicodedata.normalize("NFC", line) for line in lines]
        ends = np.cumsum([0] + [len(line) + 1 for line in lines])
        composed_ends = np.cumsum([0] + [len(line) + 1 for line in composed])
        places = np.interp(np.arange(composed_ends[-1]), composed_ends, ends)
        yield "\n".join(composed), skipped + places.astype(np.int64)


class SelectionWatch:
    """Looks at what an exchange's answers read, while they are made; in the event loop's thread."""

    def __init__(self, service: Service, exchange: Exchange, bins: PromptBins) -> None:
        """Tells the exchange what it sees from now on."""
        self._service = service
        self._exchange = exchange
        self._bins = bins
        self._reading: set[int] = set()  # answers that a thread looks at
        self._ended: set[int] = set()  # answers that are looked at once more
        self._next_at: dict[int, float] = {}

    @property
    def is_reading(self) -> bool:
        """Whether there is something to come."""
        return bool(self._reading)

    def hear(self, answer: Answer, delta: Delta) -> None:
        """Looks at an answer that has new tokens or has ended, unless it is too soon."""
        if delta.token_ids is None:
            return
        index, now = answer.index, time.monotonic()
        if delta.result is not None:
            self._ended.add(index)
        elif now < self._next_at.get(index, 0.0):
            return
        if index not in self._reading:
            self._next_at[index] = now + INTERVAL_S * self._num_watched()
            self._read(answer)

    def _num_watched(self) -> int:
        exchanges = self._service.exchanges
        return sum(len(each.answers) for each in exchanges if each.watch is not None)

    def _read(self, answer: Answer) -> None:
        self._ended.discard(answer.index)
        self._reading.add(answer.index)
        num_tokens = len(answer.token_ids)
        future = self._service.loop.run_in_executor(None, self._look, answer, num_tokens)
        future.add_done_callback(lambda done: self._tell(answer, done))

    def _look(self, answer: Answer, num_tokens: int) -> dict[str, Any] | None:
        """The fields of an event; waits for the pass under way."""
        try:
            chosen = answer.generation.selection(0)
        except TidalError:  # the answer itself says what has happened to the engine
            return None
        layers = self._bins.count(chosen)
        return {"index": answer.index, "tokens": num_tokens, "layers": layers} if layers else None

    def _tell(self, answer: Answer, done: asyncio.Future[dict[str, Any] | None]) -> None:
        self._reading.discard(answer.index)
        if answer.index in self._ended:
            self._read(answer)
        if not done.cancelled() and (fields := done.result()) is not None:
            self._exchange.tell(Delta(answer.index, extras={"selection": fields}))
        else:
            self._exchange.poke()
