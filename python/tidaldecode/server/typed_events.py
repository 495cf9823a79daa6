"""Streams of events that have names, as /v1/messages and /v1/responses write them.

Each is one answer's: what comes opens the stream, adds text to it, and closes it.
"""

from __future__ import annotations

from typing import Any

import orjson

from tidaldecode.results import GenerationResult
from tidaldecode.server.answer import Delta
from tidaldecode.server.answering import Answering
from tidaldecode.server.errors import ApiError
from tidaldecode.server.event_stream import check_delta


def named_event(fields: dict[str, Any]) -> bytes:
    """An event that is called as its type."""
    return b"event: " + fields["type"].encode() + b"\ndata: " + orjson.dumps(fields) + b"\n\n"


class TypedEvents:
    """The events of one answer. Subclasses say what opens, what adds text, and what closes."""

    def __init__(self, answering: Answering) -> None:
        """Takes what is answered."""
        self.of = answering
        self._interval = answering.service.settings.stream_interval
        self._held = ""  # text that waits for more tokens
        self._num_held = 0  # tokens of it
        self._has_begun = False
        self._result: GenerationResult | None = None

    def opening(self) -> bytes:
        """Events in front of all text."""
        raise NotImplementedError

    def piece(self, text: str) -> bytes:
        """The event of a piece of text."""
        raise NotImplementedError

    def closing(self, result: GenerationResult, usage: dict[str, Any]) -> bytes:
        """Events behind all text."""
        raise NotImplementedError

    def fail(self, error: ApiError) -> bytes:
        """Events that end a stream which has failed."""
        raise NotImplementedError

    def write(self, deltas: list[Delta]) -> bytes:
        """Events of what has come.

        Raises: ApiError for an answer that has failed.
        """
        events = b"" if self._has_begun else self.opening()
        self._has_begun = True
        for delta in deltas:
            check_delta(delta, self.of.service)
            self._held += delta.text
            self._num_held += len(delta.token_ids or ())
            self._result = delta.result or self._result
        if self._held and (self._result is not None or self._num_held >= self._interval):
            events += self.piece(self._held)
            self._held, self._num_held = "", 0
        return events

    def end(self) -> bytes:
        """Events behind the answer's end."""
        assert self._result is not None
        return self.closing(self._result, self.of.account([self._result]))
