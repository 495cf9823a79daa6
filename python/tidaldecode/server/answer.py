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
from tidaldecode.text.detokenizer import push_all

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
            deliver: takes what comes, in the thread that calls hear() and read().
        """
        self.request = request
        self.generation = request._generation
        self.index = index
        self.key = -1  # that the feed has it by
        self.submitted_at = time.monotonic()
        self.prompt_ids = request._stream._prompt_ids
        self.has_begun = False  # its prompt is being read, as far as was heard
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.token_ids: list[int] = []
        self.wants_logprobs = False
        self.has_ended = False
        self.is_matched = False  # a stop string has come
        self.is_ending = False  # the engine is being told to end it
        self.is_held = False  # what comes stays in the engine until the exchange has taken the rest
        self.assembler = request._stream._assembler  # of its text; None: token ids only
        self._stream = request._stream
        self._deliver = deliver

    @property
    def status(self) -> str:
        """As Request.status."""
        return "finished" if self.has_ended else self.generation.status(0)

    def hear(self, tokens: list[int], text: str | None = None) -> None:
        """Delivers tokens that the engine has given, or without any how far the prompt is.

        Args:
            tokens: the new ones.
            text: that the assembler has made of them; None: it has not been asked yet.
        """
        try:
            if tokens:
                self._take(tokens, text)
            elif not self.token_ids:
                self._deliver(Delta(self.index, progress=self.generation.prefill_progress))
        except Exception as error:
            self._fail(error)

    def read(self) -> None:
        """Asks the engine, and delivers all that has come, an end or a failure too."""
        if self.has_ended:
            return
        generation = self.generation
        tokens: list[int] = []
        try:
            while generation.has_news and not generation.done:
                tokens += [token_id for _, token_id in generation.advance(0.0)]
            if generation.done:
                self._end(tokens)
            else:
                self.hear(tokens)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.has_ended = True
        self._deliver(Delta(self.index, error=error))

    def _take(self, tokens: list[int], text: str | None) -> None:
        delta = Delta(self.index)
        if self.assembler is not None:
            delta.text = push_all([(self.assembler, tokens)])[0] if text is None else text
            if self.assembler.may_match:
                self.is_matched = self.assembler.matched_stop(0) is not None
        self._add_tokens(delta, tokens)
        self._deliver(delta)

    def _end(self, tokens: list[int]) -> None:
        """The engine has ended it."""
        self.has_ended = True
        delta = Delta(self.index)
        text = ""
        if self.assembler is not None:
            delta.text = self.assembler.finish({0: tokens}).get(0, "")
            text = self.assembler.text(0)
        delta.result = self._stream._result_of(self.generation.results()[0], [text])
        self._add_tokens(delta, tokens)
        self._deliver(delta)

    def _add_tokens(self, delta: Delta, tokens: list[int]) -> None:
        """Adds new tokens and what is told of them, but for those behind a stop string."""
        most = None if self.assembler is None else self.assembler.tokens_to_stop(0)
        if most is not None:
            tokens = tokens[: max(0, most - len(self.token_ids))]
        self.token_ids += tokens
        delta.token_ids = tokens
        if self.wants_logprobs:
            self._add_logprobs(delta, tokens)

    def _add_logprobs(self, delta: Delta, tokens: list[int]) -> None:
        """Those of the newest tokens, and of the prompt's with the first."""
        first = len(self.token_ids) - len(tokens)
        delta.logprobs = token_logprobs(tokens, self.generation.logprobs(0, first))
        if first == 0:
            core = self.generation.results()[0]
            delta.scored = token_logprobs(self.prompt_ids[1:], core.prompt_logprobs)
