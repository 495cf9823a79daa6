"""A stream of server-sent events: what an exchange hears, written as it comes.

Nearly all events are written right where the engine's news is read, without a turn of the loop for
each (http_protocol.py). A client that is gone is noticed at once, for somebody waits for just that;
one that takes nothing gets its events later and in larger pieces, until it is dropped (guard.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import orjson
from starlette.responses import Response

from tidaldecode.server.answer import Delta
from tidaldecode.server.errors import ApiError, broken_off
from tidaldecode.server.exchange import Exchange
from tidaldecode.server.http_protocol import OpenBody
from tidaldecode.server.service import Service

KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies pass events on as they come
]


class EventWriter(Protocol):
    """Turns what comes into events."""

    def write(self, deltas: list[Delta]) -> bytes:
        """Events of what has come.

        Raises: ApiError for an answer that has failed.
        """

    def end(self) -> bytes:
        """Events behind the last answer's end."""

    def fail(self, error: ApiError) -> bytes:
        """Events that end a stream which has failed."""


def event(data: Any) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def check_delta(delta: Delta, service: Service) -> None:
    """Raises: ApiError if the answer has failed."""
    if delta.error is not None:
        raise service.to_api_error(delta.error)
    if delta.result is not None and delta.result.error is not None:
        raise broken_off(delta.result.error)


@asynccontextmanager
async def hearing(receive: Any, exchange: Exchange) -> AsyncIterator[None]:
    """Ends the exchange when its client goes, and at the end of the block whatever happens."""
    watch = asyncio.create_task(_watch(receive, exchange))
    try:
        yield
    finally:
        watch.cancel()
        exchange.close()


async def _watch(receive: Any, exchange: Exchange) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.leave()


class EventStream(Response):
    """A response of events."""

    def __init__(self, exchange: Exchange, writer: EventWriter) -> None:
        """Streams what the exchange hears, as the writer puts it."""
        super().__init__()
        self._exchange = exchange
        self._writer = writer
        self._body: OpenBody | None = None  # as far as there is one that can be written at once

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        exchange, writer = self._exchange, self._writer
        async with hearing(receive, exchange):
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            # The framework's layers have seen the beginning; each would cost every event a call.
            write = scope.get("tidaldecode.send", send)
            self._body = scope.get("tidaldecode.open_body")
            exchange.take_at_once = self._write_at_once
            body: dict[str, Any] = {"type": "http.response.body", "more_body": True}
            try:
                while not (exchange.has_ended and not exchange.has_news):
                    deltas = await exchange.news()
                    silent = b"" if exchange.has_ended else KEEP_ALIVE
                    body["body"] = writer.write(deltas) if deltas else silent
                    if body["body"]:
                        await write(body)
                last = writer.end()
            except Exception as error:  # a mistake of the server's, too: no stream just breaks off
                last = writer.fail(exchange.service.to_api_error(error))
            await send({"type": "http.response.body", "body": last})

    def _write_at_once(self, delta: Delta) -> bool:
        """Writes what has come, unless it ends an answer or the client is behind."""
        body = self._body
        if delta.result is not None or delta.error is not None:
            return False
        if body is None or not body.is_free():
            return False
        if events := self._writer.write([delta]):
            body.write(events)
        return True
