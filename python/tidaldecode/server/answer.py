"""An answer while it is made: read without ever waiting, by the event loop (feed.py).

What TextStream (stream.py) is for one caller who waits, this is for a loop that has many of them:
a stop string that is found ends the answer in another thread, for that waits for the pass under
way, and everybody else's text with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidaldecode.results import GenerationResult, TokenLogprobs, token_logprobs

if TYPE_CHECKING:
    from tidaldecode.requests import Request


@dataclass(slots=True)
class Delta:
    """What has come of an answer since the last time."""

    index: int  # of the answer among those of its exchange
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None  # of these tokens, if they were asked for
    scored: tuple[TokenLogprobs, ...] | None = None  # of the prompt's, with its first tokens
    progress: tuple[int, int] | None = None  # tokens of the prompt read, of those to read
    extras: dict[str, Any] | None = None  # an event of ours (selection.py)
    result: GenerationResult | None = None  # the answer has ended
    error: Exception | None = None  # the answer has failed


class Answer:
    """One answer to one prompt."""

    def __init__(self, request: Request, index: int, deliver: Callable[[Delta], None]) -> None:
        """Takes over a request of Decoder.submit().

        Args:
            request: one choice; nobody else reads it.
            index: of the answer in its exchange.
            deliver: takes what comes, in the thread that calls read().
        """
        self.request = request
        self.generation = request._generation
        self.index = index
        self.fd = -1  # that the engine writes to, while somebody listens (feed.py)
        self.submitted_at = time.monotonic()
        self.prompt_ids = request._stream._prompt_ids
        self.begun_at = 0.0  # to read its prompt, as far as was heard
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.token_ids: list[int] = []
        self.wants_logprobs = False
        self.has_ended = False
        self.is_stopping = False  # a stop string has come; the engine is being told
        self.is_held = False  # what comes stays in the engine until the exchange has taken the rest
        self._stream = request._stream
        self._assembler = request._stream._assembler
        self._deliver = deliver
        self._pieces: list[str] = []

    @property
    def status(self) -> str:
        """As Request.status."""
        return "finished" if self.has_ended else self.generation.status(0)

    def read(self) -> None:
        """Delivers all that has come."""
        if self.has_ended or self.is_held:
            return
        try:
            self._read()
        except Exception as error:
            self.has_ended = True
            self._deliver(Delta(self.index, error=error))

    def _read(self) -> None:
        generation = self.generation
        if self.is_stopping and not generation.done:
            return
        tokens: list[int] = []
        while generation.has_news and not generation.done:
            tokens += [token_id for _, token_id in generation.advance(0.0)]
        if generation.done:
            self._end(tokens)
        elif tokens:
            self._take(tokens)
        elif not self.token_ids:
            self._deliver(Delta(self.index, progress=generation.prefill_progress))

    def _take(self, tokens: list[int]) -> None:
        self.token_ids += tokens
        delta = Delta(self.index, token_ids=tokens)
        if self._assembler is not None:
            events = [(0, token_id) for token_id in tokens]
            delta.text = self._assembler.push(events).get(0, "")
            self._pieces.append(delta.text)
            self.is_stopping = self._assembler.matched_stop(0) is not None
        if self.wants_logprobs:
            self._add_logprobs(delta, tokens)
        self._deliver(delta)

    def _end(self, tokens: list[int]) -> None:
        """The engine has ended it."""
        self.has_ended = True
        delta = Delta(self.index, token_ids=tokens)
        self.token_ids += tokens
        if self._assembler is not None:
            delta.text = self._assembler.finish({0: tokens}).get(0, "")
            self._pieces.append(delta.text)
        core = self.generation.results()[0]
        delta.result = self._stream._result_of(core, self._pieces)
        if self.wants_logprobs:
            self._add_logprobs(delta, tokens)
        self._deliver(delta)

    def _add_logprobs(self, delta: Delta, tokens: list[int]) -> None:
        """Those of the newest tokens, and of the prompt's with the first."""
        first = len(self.token_ids) - len(tokens)
        delta.logprobs = token_logprobs(tokens, self.generation.logprobs(0, first))
        if first == 0:
            core = self.generation.results()[0]
            delta.scored = token_logprobs(self.prompt_ids[1:], core.prompt_logprobs)
