"""From the token ids of running sequences to text that can be shown as it comes.

Used by stream.py and batch.py. IncrementalDetokenizer (worker/detokenizer.py, in the text process)
never gives out part of a character; StopStringFilter never gives out text that may turn out to be
the beginning of a stop string. TextAssembler asks once for all sequences and all their new tokens,
or asks nobody where tokens are bytes (byte_text.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

from tidaldecode.sampling import SamplingSettings
from tidaldecode.text.byte_text import ByteText
from tidaldecode.text.worker.detokenizer import CONTEXT_TOKENS, IncrementalDetokenizer

__all__ = ["IncrementalDetokenizer", "StopStringFilter", "TextAssembler"]


class TextSource(Protocol):
    """What a Tokenizer knows of texts."""

    special_tokens: frozenset[str]
    joins_bytes: bool

    def detokenize(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What new tokens of several sequences add to their texts."""

    def byte_text(self, prompt_ids: Sequence[int], *, skips: bool) -> ByteText:
        """The text that follows a prompt, if it joins bytes."""


class StopStringFilter:
    """Passes text on until a stop string is complete; its own text gets through only if wanted.

    What comes out does not depend on how the text was cut into pieces: the stop string that is
    complete first wins, of those that end together the longest.
    """

    def __init__(self, stop: Sequence[str], *, keeps_stop: bool = False) -> None:
        """Takes the stop strings, and whether the one that ends the text belongs to it."""
        self._stop = tuple(stop)
        self._keeps_stop = keeps_stop
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
            return text[: end if self._keeps_stop else end - len(self.matched)]
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


class _HidingFilter:
    """A filter that looks for stop strings in the text with special tokens, and shows it without.

    Takes pairs of pieces, with and without special tokens. A pair whose halves differ is shown
    when all of its first half may be.
    """

    def __init__(self, stop: Sequence[str], *, keeps_stop: bool) -> None:
        self._filter = StopStringFilter(stop)
        self._keeps_stop = keeps_stop
        self._pairs: deque[tuple[str, str]] = deque()
        self._ahead = 0  # characters of the first pair that could be shown if all of it could

    @property
    def matched(self) -> str | None:
        return self._filter.matched

    def push(self, whole: str, shown: str) -> str:
        if self.matched is not None:
            return ""
        self._pairs.append((whole, shown))
        text = self._show(len(self._filter.push(whole)))
        return text + self.matched if self.matched and self._keeps_stop else text

    def finish(self) -> str:
        return self._show(len(self._filter.finish())) + "".join(shown for _, shown in self._pairs)

    def _show(self, num_chars: int) -> str:
        """What the next characters of the whole text are without special tokens."""
        text = ""
        num_chars += self._ahead
        self._ahead = 0
        while self._pairs and len(self._pairs[0][0]) <= num_chars and self.matched is None:
            whole, shown = self._pairs.popleft()
            num_chars -= len(whole)
            text += shown
        while self._pairs and num_chars > 0:
            whole, shown = self._pairs.popleft()
            part = whole[:num_chars]
            num_chars -= len(part)
            if whole == shown:
                text += part
                if part != whole:
                    self._pairs.appendleft((whole[len(part) :], shown[len(part) :]))
            elif part == whole:
                text += shown
            elif self.matched is None:
                self._pairs.appendleft((whole, shown))
                self._ahead = len(part)
                break
            elif part.startswith(shown) or shown.startswith(part):
                text += shown[: len(part)]
        return text


class _Row:
    """One sequence of a call."""

    __slots__ = (
        "_filter", "_hides", "_left_out", "_prompt", "_skips", "_states", "num_filtered", "pieces",
    )  # fmt: skip

    def __init__(
        self, prompt_ids: Sequence[int], settings: SamplingSettings, special: Collection[str]
    ) -> None:
        self._prompt = list(prompt_ids[-CONTEXT_TOKENS:])
        skips = settings.skip_special_tokens
        keeps = settings.include_stop_str_in_output
        self._hides = skips and any(token in stop for stop in settings.stop for token in special)
        # What is asked for: the text that is shown, and where stop strings hold special tokens that
        # are not shown, the text with them too.
        self._skips = (False, True) if self._hides else (skips,)
        self._states: list[Any] = [None] * len(self._skips)
        self._filter: Any = None
        if settings.stop:
            kind = _HidingFilter if self._hides else StopStringFilter
            self._filter = kind(settings.stop, keeps_stop=keeps)
        self._left_out = () if keeps else settings.stop_token_ids
        self.pieces: list[str] = []
        self.num_filtered = 0  # tokens, and the end, that the filter has had up to a stop string

    @property
    def matched(self) -> str | None:
        return None if self._filter is None else self._filter.matched

    def questions(self, ids: Iterable[int], *, ends: bool) -> list[dict[str, Any]]:
        """What to ask for these new tokens; nothing if they change nothing."""
        new = self._shown(ids)
        if self.matched is not None or not (new or ends):
            return []
        return [
            {
                "state": state,
                "prompt": self._prompt if state is None else [],
                "ids": new,
                "skips": skips,
                "ends": ends,
            }
            for state, skips in zip(self._states, self._skips, strict=True)
        ]

    def take(self, answers: Sequence[dict[str, Any]], *, ends: bool) -> str:
        """Takes the answers to its questions; returns the text that may be shown now."""
        self._states = [answer["state"] for answer in answers]
        pieces = [answer["pieces"] for answer in answers]
        return self._show(zip(*pieces, strict=True) if self._hides else pieces[0], ends)

    def add(self, ids: Iterable[int], source: TextSource, *, ends: bool) -> str:
        """Adds tokens whose text is made here; returns what may be shown now."""
        new = self._shown(ids)
        if self.matched is not None or not (new or ends):
            return ""
        if self._states[0] is None:
            self._states = [source.byte_text(self._prompt, skips=skips) for skips in self._skips]
        if self._filter is None:
            return self._show([self._states[0].push(new, ends)], ends)
        pieces = [text.pieces(new, ends=ends) for text in self._states]
        return self._show(zip(*pieces, strict=True) if self._hides else pieces[0], ends)

    def _shown(self, ids: Iterable[int]) -> list[int]:
        left_out = self._left_out
        return [token_id for token_id in ids if token_id not in left_out]

    def _show(self, new: Iterable[Any], ends: bool) -> str:
        """What may be shown now of the texts of new tokens and of the end, or of pairs of them if
        special tokens are hidden."""
        text = "".join(new) if self._filter is None else self._filtered(new, ends)
        self.pieces.append(text)
        return text

    def _filtered(self, new: Iterable[Any], ends: bool) -> str:
        text: str = ""
        for piece in new:
            text += self._filter.push(*(piece if self._hides else (piece,)))
            self.num_filtered += 1
            if self.matched is not None:
                return text
        if ends:
            text += self._filter.finish()
        return text


class TextAssembler:
    """Token ids of the sequences of a call in, the text of each that may be shown out."""

    def __init__(
        self,
        source: TextSource,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
    ) -> None:
        """Begins texts that follow prompts.

        Args:
            source: the tokenizer.
            prompts: token ids before the new ones, of each sequence.
            settings: of the call: what stops a text, and what of it is shown.
        """
        self.may_match = bool(settings.stop)  # a stop string
        self._source = source
        special = source.special_tokens
        self._rows = [_Row(prompt_ids, settings, special) for prompt_ids in prompts]

    def matched_stop(self, sequence: int) -> str | None:
        """The stop string that ended the text of a sequence, if one did."""
        return self._rows[sequence].matched

    def tokens_to_stop(self, sequence: int) -> int | None:
        """How many tokens it took to complete that stop string; None without one."""
        row = self._rows[sequence]
        return None if row.matched is None else row.num_filtered

    def text(self, sequence: int) -> str:
        """All that may be shown so far."""
        return "".join(self._rows[sequence].pieces)

    def push(self, events: Iterable[tuple[int, int]]) -> dict[int, str]:
        """Adds tokens (sequence, id); returns what may be shown now, of each sequence."""
        tokens: dict[int, list[int]] = {}
        for sequence, token_id in events:
            tokens.setdefault(sequence, []).append(token_id)
        return self._add(tokens, ends=False)

    def finish(self, tokens: dict[int, list[int]]) -> dict[int, str]:
        """Adds the last tokens of sequences that have ended; returns the rest of their texts."""
        return self._add(tokens, ends=True)

    def _add(self, tokens: dict[int, list[int]], *, ends: bool) -> dict[int, str]:
        news = [(self._rows[sequence], ids) for sequence, ids in tokens.items()]
        return dict(zip(tokens, _texts_of(self._source, news, ends=ends), strict=True))


def push_all(news: Sequence[tuple[TextAssembler, list[int]]]) -> list[str]:
    """Adds new tokens to calls of one sequence each; returns what each may show now.

    Args:
        news: calls of one tokenizer, which is asked once for all, with their tokens.
    """
    if not news:
        return []
    rows = [(assembler._rows[0], ids) for assembler, ids in news]
    return _texts_of(news[0][0]._source, rows, ends=False)


def _texts_of(
    source: TextSource, news: Sequence[tuple[_Row, list[int]]], *, ends: bool
) -> list[str]:
    """What rows may show once they have new tokens; if it cannot be made, they are as before."""
    if source.joins_bytes:
        return [row.add(ids, source, ends=ends) for row, ids in news]
    asked = [row.questions(ids, ends=ends) for row, ids in news]
    questions = [question for each in asked for question in each]
    answers = iter(source.detokenize(questions) if questions else ())
    return [
        row.take([next(answers) for _ in each], ends=ends) if each else ""
        for (row, _), each in zip(news, asked, strict=True)
    ]
