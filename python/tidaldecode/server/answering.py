"""What the routes that generate have in common: a request on its way, and its answers' events.

chat.py and completions.py say how their answers look; other routes may do the same.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tidaldecode.requests import Request
from tidaldecode.results import GenerationResult, TokenLogprobs
from tidaldecode.server.answer import Delta
from tidaldecode.server.answer_parts import AnswerForm
from tidaldecode.server.asking import Asked
from tidaldecode.server.bodies import SamplingBody
from tidaldecode.server.errors import ApiError
from tidaldecode.server.event_stream import EventStream, EventWriter, check_delta, event, hearing
from tidaldecode.server.exchange import Exchange
from tidaldecode.server.logprobs import TokenNames
from tidaldecode.server.selection import PromptBins, SelectionWatch
from tidaldecode.server.service import Model, Service
from tidaldecode.server.usage import Accounts, counts

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks."""

    number: str  # of the request, in the ids of its answer
    salt: str  # of the prefix cache


class Answering(ABC):
    """One request for answers. Subclasses have `submit`, `whole` and `events`."""

    kind = ""  # what the answer calls itself, whole
    piece_kind = ""  # and in a stream
    prefix = ""  # of its id
    form = AnswerForm()  # of its answers, once it is submitted

    def __init__(self, service: Service, body: SamplingBody, asked: Asked, caller: Caller) -> None:
        """Takes a request that has been checked.

        Raises: ApiError unless the service is ready.
        """
        self.service = service
        self.body = body
        self.asked = asked
        self.model: Model = service.model
        self.id = f"{self.prefix}-{body.request_id or caller.number}"
        self.created = int(time.time())
        self.name = body.model or service.names[0]
        self.names = TokenNames(self.model.decoder._frontend._tokenizer)
        self.accounts = Accounts(self.model.decoder, asked)
        self.prompt_ids: list[list[int]] = []  # token ids of each prompt, once it is submitted
        self.bins: PromptBins | None = None  # of the prompt, if the stream tells what is read of it

    @property
    def num_choices(self) -> int:
        """Answers to all prompts."""
        return self.asked.n

    @property
    def likeness(self) -> int:
        """A number that requests share whose prompts begin alike."""
        return 0

    @property
    def wants_logprobs(self) -> bool:
        """Whether new tokens come with theirs."""
        return self.asked.logprobs is not None

    def prompt_of(self, index: int) -> list[int]:
        """The token ids that a choice answers to."""
        return self.prompt_ids[index // self.asked.n]

    @abstractmethod
    def submit(self) -> list[Request]:
        """Makes token ids and submits them; runs in a text worker."""

    @abstractmethod
    def whole(self, results: list[GenerationResult]) -> dict[str, Any]:
        """The answer, but for what all have in common."""

    @abstractmethod
    def events(self) -> EventWriter:
        """Writes the answer as a stream."""

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and every piece of it begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    async def respond(self, receive: Any) -> bytes | EventStream:
        """Answers: with the bytes of JSON, or with a stream of events.

        Raises: ApiError.
        """
        exchange = Exchange(self.service)
        is_stream = bool(self.body.stream)
        try:
            self.service.check_room(self.num_choices)
            requests = await self.service.prepare(self.submit, self.likeness)
            if self.bins is not None:
                exchange.tell(Delta(0, extras={"selection_map": self._map(self.bins)}))
                if self.accounts.may_choose:  # a look holds up everybody for a moment
                    exchange.watch = SelectionWatch(self.service, exchange, self.bins)
            exchange.ask(requests, wants_logprobs=is_stream and self.wants_logprobs)
        except BaseException:
            exchange.close()
            raise
        if is_stream:
            return EventStream(exchange, self.events())
        async with hearing(receive, exchange):
            return orjson.dumps(await self._hear(exchange))

    def account(self, results: list[GenerationResult]) -> dict[str, Any]:
        """The usage of answers that have ended; counts it, too."""
        usage = self.accounts.usage(results)
        self.service.metrics.read_bytes(usage["tidaldecode"]["kv_bytes_read"])
        return usage

    def _map(self, bins: PromptBins) -> dict[str, Any]:
        return bins.fields() | {"kv_bytes_per_token": self.accounts.bytes_per_token}

    async def _hear(self, exchange: Exchange) -> dict[str, Any]:
        results: dict[int, GenerationResult] = {}
        while not (exchange.has_ended and not exchange.has_news):
            for delta in await exchange.news():
                check_delta(delta, self.service)
                if delta.result is not None:
                    results[delta.index] = delta.result
        ordered = [results[index] for index in range(len(results))]
        usage = {"usage": self.account(ordered)}
        return self.head(self.kind) | self.whole(ordered) | usage


class AnswerEvents(ABC):
    """The events of the answers to one request. Subclasses say how a choice looks."""

    def __init__(self, answering: Answering, opening: bytes, tail: bytes) -> None:
        """Takes what is answered.

        Args:
            answering: of which route.
            opening: JSON of a choice between its index and its text.
            tail: and behind its text.
        """
        body, count = answering.body, answering.num_choices
        options = body.stream_options
        self.of = answering
        self._head = b"data: " + orjson.dumps(answering.head(answering.piece_kind))[:-1]  # open
        self._wants_usage = bool(options and options.include_usage)
        self._counts_usage = bool(options and options.continuous_usage_stats)
        self._interval = answering.service.settings.stream_interval
        self._has_more = bool(
            self._counts_usage or body.return_token_ids or answering.wants_logprobs
        )
        self._is_plain = answering.form.is_plain and not self._has_more and self._interval == 1
        self._num_tokens = [0] * count
        self._has_begun = [False] * count
        self._held: list[list[Delta]] = [[] for _ in range(count)]
        self._results: list[GenerationResult | None] = [None] * count
        start = b',"choices":[{"index":%d'
        self._openings = [self._head + start % index + opening for index in range(count)]
        self._tail = tail + b"}]}\n\n"

    # What a route says

    @abstractmethod
    def choice(self, index: int, text: str | None) -> dict[str, Any]:
        """A choice with a piece of text, or with none behind the last."""

    def shown(self, index: int, text: str, *, is_last: bool) -> dict[str, Any] | None:
        """A choice with what a piece of text adds; None if that is nothing yet."""
        return self.choice(index, text) if text else None

    def finish_reason(self, index: int, result: GenerationResult) -> str:
        """Why a choice has ended."""
        return result.finish_reason

    @abstractmethod
    def logprobs(self, index: int, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Those of a choice's next tokens."""

    @abstractmethod
    def begin(self, delta: Delta) -> list[bytes]:
        """Events in front of a choice's first piece."""

    # What the stream asks

    def write(self, deltas: list[Delta]) -> bytes:
        """Events of what has come.

        Raises: ApiError for an answer that has failed.
        """
        events: list[bytes] = []
        for delta in deltas:
            if delta.token_ids is None:
                check_delta(delta, self.of.service)
                self._tell_progress(delta, events)
                if delta.extras is not None:
                    events.append(self.event({"choices": [], "tidaldecode": delta.extras}))
                continue
            index = delta.index
            if not self._has_begun[index]:
                self._has_begun[index] = True
                events += self.begin(delta)
            self._num_tokens[index] += len(delta.token_ids)
            if not self._is_plain:
                self._hold(delta, events)
            elif delta.text:
                # Nearly all events are such: a piece of text and nothing else.
                events.append(self._openings[index] + orjson.dumps(delta.text) + self._tail)
            if delta.result is not None:
                check_delta(delta, self.of.service)
                self._finish(index, delta.result, events)
        return b"".join(events)

    def end(self) -> bytes:
        """Events behind the last answer's end."""
        usage = self.of.account([result for result in self._results if result is not None])
        if not self._wants_usage:
            return DONE
        return self.event({"choices": [], "usage": usage}) + DONE

    def fail(self, error: ApiError) -> bytes:
        """The event that ends a stream which has failed."""
        return event({"error": error.fields()})

    # Events

    def event(self, fields: dict[str, Any]) -> bytes:
        """An event with fields of its own."""
        return self._head + b"," + orjson.dumps(fields)[1:] + b"\n\n"

    def chunk(self, index: int, text: str | None, **more: Any) -> bytes:
        """The event of one choice."""
        return self._chunk_of(self.choice(index, text), more)

    def _chunk_of(self, choice: dict[str, Any], more: dict[str, Any]) -> bytes:
        choice = choice | {"logprobs": None, "finish_reason": None} | more
        return self.event({"choices": [choice]} | self.usage_so_far(choice["index"]))

    def usage_so_far(self, index: int) -> dict[str, Any]:
        """The field of an event that says it, if it is wanted."""
        if not self._counts_usage:
            return {}
        return {"usage": counts(len(self.of.prompt_of(index)), self._num_tokens[index])}

    def _hold(self, delta: Delta, events: list[bytes]) -> None:
        """Gathers pieces until there are enough tokens for an event, and text to show."""
        held = self._held[delta.index]
        held.append(delta)
        count = sum(len(each.token_ids or ()) for each in held)
        text = "".join(each.text for each in held)
        is_last = delta.result is not None
        if count < self._interval and not is_last:
            return
        choice = self.shown(delta.index, text, is_last=is_last)
        if choice is None and not is_last:
            for each in held:  # their text is held elsewhere
                each.text = ""
            return
        self._held[delta.index] = []
        if choice is None and not (count and self._has_more):
            return
        more: dict[str, Any] = {}
        if self.of.wants_logprobs:
            logprobs = [each for part in held for each in part.logprobs or ()]
            more["logprobs"] = self.logprobs(delta.index, logprobs)
        if self.of.body.return_token_ids:
            more["token_ids"] = [token for part in held for token in part.token_ids or ()]
        events.append(self._chunk_of(choice or self.choice(delta.index, ""), more))

    def _finish(self, index: int, result: GenerationResult, events: list[bytes]) -> None:
        self._results[index] = result
        reason = self.finish_reason(index, result)
        reasons = {"finish_reason": reason, "stop_reason": result.stop_reason}
        if self.of.asked.max_tokens == 0:  # the token that it ended with was not asked for
            reasons = {"finish_reason": "length", "stop_reason": None}
        events.append(self.chunk(index, None, **reasons))

    def _tell_progress(self, delta: Delta, events: list[bytes]) -> None:
        """How much of the prompt has been read, as llama.cpp says it."""
        if delta.progress is not None and self.of.body.return_progress:
            done, to_read = delta.progress
            total = len(self.of.prompt_of(delta.index))
            cached = max(0, total - to_read)
            progress = {"total": total, "cache": cached, "processed": cached + done}
            events.append(self.event({"choices": [], "prompt_progress": progress}))
