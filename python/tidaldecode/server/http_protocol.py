"""The HTTP connection: uvicorn's, with limits on the head of a request that it lacks.

A head may be so large, and take so long, and no more: without limits one client could fill the
memory, and many could hold all descriptors, a byte a minute.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from typing import Any

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from tidaldecode.server.errors import ApiError

MAX_HEAD_BYTES = 64 * 1024


class OpenBody:
    """The body of a response that has begun, for pieces that are written without waiting."""

    __slots__ = ("_cycle", "_flow", "_write")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        """Takes uvicorn's request with its response."""
        self._cycle = cycle
        self._flow = cycle.flow
        self._write = cycle.transport.write

    def is_free(self) -> bool:
        """Whether the client takes pieces as they come, each a chunk."""
        cycle = self._cycle
        return bool(
            not self._flow.write_paused and cycle.chunked_encoding and not cycle.disconnected
        )

    def write(self, piece: bytes) -> None:
        """Adds a piece, which must not be empty, while the body is free."""
        self._write(b"%x\r\n%b\r\n" % (len(piece), piece))


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    header_timeout_s = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what uvicorn gives."""
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._is_in_head = True
        self._head_timer: asyncio.TimerHandle | None = None
        self._is_lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._is_lost = True
        super().connection_lost(exc)

    def unsent_bytes(self) -> int:
        """Bytes of answers that the client's system has not taken.

        With TLS those that wait in this process are not known, but the system's queue in front of
        them is.
        """
        if self._is_lost:
            return 0
        try:
            link = self.transport.get_extra_info("socket")
            queued = fcntl.ioctl(link, termios.TIOCOUTQ, bytes(4))
        except (OSError, ValueError):  # it is being closed
            return 0
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            self._start_timer()  # the first byte of a later request on the same connection
            self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES:
            size = f"over {MAX_HEAD_BYTES} bytes"
            self._refuse(ApiError(431, "head_too_large", f"the head of the request has {size}"))

    def on_message_begin(self) -> None:
        self._is_in_head = True
        super().on_message_begin()
        self.scope["tidaldecode.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
        self.scope["tidaldecode.unsent"] = self.unsent_bytes  # type: ignore[typeddict-unknown-key]

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_HEAD_BYTES:
            raise ValueError("the path is too long")

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._is_in_head = False
        self._head_bytes = 0
        super().on_headers_complete()
        # The request has no task of its own before this returns to the loop.
        self.cycle.scope["tidaldecode.open_body"] = OpenBody(self.cycle)  # type: ignore

    def on_message_complete(self) -> None:
        self._is_in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "invalid_value", "this is no HTTP request"))

    def _refuse(self, error: ApiError) -> None:
        """Answers without the application, and closes."""
        if self.transport.is_closing():
            return
        body = error.body()
        self.transport.write(
            STATUS_LINE[error.status]
            + b"content-type: application/json\r\nconnection: close\r\n"
            + b"content-length: %d\r\n\r\n" % len(body)
            + body
        )
        self.transport.close()

    def _start_timer(self) -> None:
        if self._head_timer is None and self.header_timeout_s:
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_timeout(self) -> None:
        limit = f"the head of the request did not come within {self.header_timeout_s:g} s"
        self._refuse(ApiError(408, "request_timeout", limit))


def protocol_with(header_timeout_s: float) -> type[BoundedProtocol]:
    """The protocol with a limit of its own."""
    return type("Protocol", (BoundedProtocol,), {"header_timeout_s": header_timeout_s})
