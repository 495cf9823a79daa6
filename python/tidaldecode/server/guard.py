"""Who and what is let in, before any route sees it: keys, sizes, and clients that do not read.

Plain ASGI, so that a client's leaving reaches the routes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tidaldecode.server.error_forms import form_of
from tidaldecode.server.errors import ApiError
from tidaldecode.server.page_routes import is_page
from tidaldecode.server.settings import ServeConfig

OPEN_ROUTES = ("/live", "/health")
_DRAINED_BODIES = 8  # bodies of so many times the limit are read, and thrown away, before a refusal

Scope = dict[str, Any]


class Keys:
    """The keys that let requests in, as digests."""

    def __init__(self, keys: Iterable[str]) -> None:
        """Takes the keys; none lets everybody in."""
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, headers: dict[bytes, bytes]) -> str:
        """A salt that is the key's own; "" if there are no keys.

        Raises: ApiError for no key or another one.
        """
        if not self._digests:
            return ""
        authorization = headers.get(b"authorization", b"")
        key = headers.get(b"x-api-key", b"")
        if authorization[:7].lower() == b"bearer ":
            key = authorization[7:].strip()
        elif authorization[:6].lower() == b"basic " and not _is_of_another_site(headers):
            key = _password(authorization[6:])
        if not key:
            raise ApiError(
                401, "invalid_api_key",
                "no API key; send it as Authorization: Bearer KEY or as x-api-key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        digest = hashlib.sha256(key).digest()
        # All are compared, so that time says nothing.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise ApiError(401, "invalid_api_key", "the API key is not one of this server's")
        return hashlib.sha256(b"salt" + digest).hexdigest()


def _is_of_another_site(headers: dict[bytes, bytes]) -> bool:
    """Whether a browser says that a page of somewhere else has sent the request.

    Without TLS, off this machine, it says so by the origin alone.
    """
    if (site := headers.get(b"sec-fetch-site")) is not None:
        return site not in (b"none", b"same-origin")
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host")


def _password(basic: bytes) -> bytes:
    """The password that a browser has asked its user for; b"" for what is none."""
    try:
        return base64.b64decode(basic.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


@dataclass
class _Rest:
    """The end of an answer that is written, as far as its client has not taken it."""

    since: float  # when the client has last taken something
    num_bytes: int  # that were left then
    unsent: Callable[[], int]  # bytes that are left now
    abort: Callable[[], None]  # closes the connection at once


class Guard:
    """The outermost application."""

    def __init__(self, app: Any, settings: ServeConfig) -> None:
        """Stands in front of another one."""
        self._app = app
        self._settings = settings
        self._keys = Keys(settings.api_keys)
        self._shares = settings.prefix_cache_scope == "shared"
        # Clients that are being written to, with what closes their connection at once.
        self._writing: dict[int, tuple[float, Callable[[], None]]] = {}
        self._rests: list[_Rest] = []

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        scope["state"]["request_number"] = uuid.uuid4().hex
        scope["state"]["salt"] = ""
        send = self._timed(scope, send)
        scope["tidaldecode.send"] = send
        try:
            if scope["path"] not in OPEN_ROUTES and scope["method"] != "OPTIONS":
                salt = self._keys.check(headers)
                scope["state"]["salt"] = "" if self._shares else salt
            self._check_length(headers)
        except ApiError as error:
            if error.status == 401 and is_page(scope["path"]):
                # A browser asks its user for the key, and sends it with all that the page does.
                error.headers["www-authenticate"] = 'Basic realm="tidaldecode", charset="UTF-8"'
            await _drain(receive, self._settings.max_body_bytes * _DRAINED_BODIES)
            await send_error(error, scope["path"], send)
            return
        await self._app(scope, receive, send)

    def drop_slow(self, now: float) -> int:
        """Closes the connections of clients that have taken nothing for too long; says how many."""
        limit = self._settings.slow_client_timeout_s
        slow = [abort for since, abort in self._writing.values() if limit and now - since > limit]
        for rest in self._rests:
            # More of them are of the connection's next answer, for which the last was taken.
            if (count := rest.unsent()) != rest.num_bytes:
                rest.num_bytes, rest.since = count, now
            elif limit and now - rest.since > limit:
                rest.num_bytes = 0
                slow.append(rest.abort)
        self._rests = [rest for rest in self._rests if rest.num_bytes]
        for abort in slow:
            abort()
        return len(slow)

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._settings.max_body_bytes:
            raise self.too_large(f"{int(length)} bytes")

    def too_large(self, size: str) -> ApiError:
        """What a body over the limit is refused with."""
        return body_too_large(size, self._settings)

    def _timed(self, scope: Scope, send: Any) -> Any:
        """A send() that is known to be under way while it is."""
        writing, abort = self._writing, scope.get("tidaldecode.abort", lambda: None)
        unsent: Callable[[], int] = scope.get("tidaldecode.unsent", lambda: 0)
        number = id(scope)

        async def timed(message: dict[str, Any]) -> None:
            writing[number] = (time.monotonic(), abort)
            try:
                await send(message)
            finally:
                del writing[number]
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            if is_last and (count := unsent()):
                self._rests.append(_Rest(time.monotonic(), count, unsent, abort))

        return timed


def body_too_large(size: str, settings: ServeConfig) -> ApiError:
    """What a body over the limit is refused with."""
    return ApiError(
        413, "body_too_large",
        f"the body has {size}, expected at most {settings.max_body_mb} MiB (max_body_mb)",
        headers={"connection": "close"},
    )  # fmt: skip


async def read_all(receive: Any, settings: ServeConfig) -> bytes:
    """The body of a request.

    Raises: ApiError for one that is too large, or comes too slowly; ConnectionError if its client
        leaves meanwhile.
    """
    parts: list[bytes] = []
    size = 0
    limit = settings.header_timeout_s or None
    while True:
        try:
            message = await asyncio.wait_for(receive(), limit)
        except asyncio.TimeoutError:
            raise ApiError(
                408, "request_timeout", f"no piece of the body has come for {limit:g} s",
                headers={"connection": "close"},
            ) from None  # fmt: skip
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client has gone")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > settings.max_body_bytes:
            error = body_too_large(f"over {settings.max_body_bytes} bytes", settings)
            await _drain(receive, settings.max_body_bytes * _DRAINED_BODIES)
            raise error
        if not message.get("more_body", False):
            return b"".join(parts)


async def _drain(receive: Any, most_bytes: int) -> None:
    """Reads a body that is on its way: its client would not see what it is refused with."""
    size, ends_at = 0, time.monotonic() + 10
    while size < most_bytes and time.monotonic() < ends_at:
        try:
            message = await asyncio.wait_for(receive(), 2)
        except asyncio.TimeoutError:
            return
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


async def send_error(error: ApiError, path: str, send: Any) -> None:
    """Sends an error as the whole response of a route."""
    form = form_of(path)
    body = form.body(error)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": form.status(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})
