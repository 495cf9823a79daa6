"""In front of several servers: takes requests, has a replica chosen, and passes bytes on.

Everything but /live, /health and /metrics is what a replica says. Keys and sizes are looked at
here, before a body is read (guard.py), and again by the replica.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import Response
from yarl import URL

from tidaldecode.errors import BackendError
from tidaldecode.server.error_forms import form_of
from tidaldecode.server.errors import ApiError, api_error, unavailable
from tidaldecode.server.guard import Guard, read_all, send_error
from tidaldecode.server.metrics import CONTENT_TYPE
from tidaldecode.server.prefix_choice import Chosen, PrefixChoice, pieces_of
from tidaldecode.server.service import SAID
from tidaldecode.server.settings import ServeConfig
from tidaldecode.server.state_routes import health_of, live

if TYPE_CHECKING:
    from tidaldecode.server.ray_replicas import RayReplicas

_logger = logging.getLogger("tidaldecode")

REPLICA_HEADER = b"x-replica"
# Headers of one connection, not of the request; and those that are written anew.
_OF_CONNECTION = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding"}
_OF_CONNECTION |= {b"upgrade", b"expect", b"content-length", b"proxy-connection"}
_ATTEMPTS = 5
_TICK_S = 0.25
_HEALTH_S = 2.0  # that /health waits for a replica
_STEPS = {signal.SIGTTIN: 1, signal.SIGTTOU: -1}


class RayFront:
    """The service of a ServerProcess that has its answers from replicas."""

    def __init__(self, replicas: RayReplicas, settings: ServeConfig, rows: int) -> None:
        """Takes replicas, which are not started yet, and the rows of each one's batch."""
        self.settings = settings
        self.state = "loading"
        self.progress = (0, 0)
        self.problem: BaseException | None = None
        self.exchanges: set[Any] = set()
        self.loaded: str | None = None  # what is served, in words
        self.replicas = replicas
        self.choice = PrefixChoice(rows)
        self.client: aiohttp.ClientSession
        self.app = Guard(self._take, settings)
        self.on_change: Callable[[], None] = lambda: None
        self._tasks: list[asyncio.Task[None]] = []

    # Its life

    async def _live(self, receive: Any, send: Any) -> None:
        """From the application's start to its end, as ASGI has it."""
        await receive()
        loop = asyncio.get_running_loop()
        self.client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
            auto_decompress=False,
        )  # fmt: skip
        handles_signals = threading.current_thread() is threading.main_thread()
        for number, step in _STEPS.items() if handles_signals else ():
            loop.add_signal_handler(number, self.scale, step)
        self._tasks += [loop.create_task(self._load()), loop.create_task(self._tick())]
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for number in _STEPS if handles_signals else ():
            loop.remove_signal_handler(number)
        await self._tasks[0]  # it cannot be interrupted
        self._tasks[1].cancel()
        await self.client.close()
        await asyncio.to_thread(self.replicas.close)
        await send({"type": "lifespan.shutdown.complete"})

    async def _load(self) -> None:
        try:
            await asyncio.to_thread(self.replicas.start_ray)
            self.on_change()  # it takes signals
            await asyncio.to_thread(self.replicas.start)
            self.loaded = (await self.replicas.all())[0]["what"]
        except Exception as problem:
            if self.state != "dead":
                self.state, self.problem = "dead", problem
        if self.state == "loading":
            self.state = "ready"
        self.on_change()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            self.app.drop_slow(now)
            for relay in list(self.exchanges):
                relay.tick(now)
            failure = self.replicas.failure()
            if failure is not None and self.state != "dead":
                self._die(f"ray: {failure} has ended")

    def _die(self, problem: str) -> None:
        """Says that nothing more will come of Ray."""
        _logger.error("server: %s", problem)
        self.state, self.problem = "dead", BackendError(problem)
        self.loaded = self.loaded or ""  # what loads will not end any more
        for relay in list(self.exchanges):
            relay.fail(self.refusal())
        self.on_change()

    def drain(self) -> None:
        """Lets nobody in from now on."""
        if self.state in ("loading", "ready"):
            self.state = "draining"
            self.on_change()

    def abort(self) -> None:
        """Ends whoever is still answered."""
        for relay in list(self.exchanges):
            relay.fail(unavailable("draining", "the server has been ended"))

    def forsake(self) -> None:
        """Ends Ray, which would outlive the process."""
        self.replicas.close()

    def scale(self, step: int) -> None:
        """Has one replica more, or one less."""
        count = min(self.replicas.most, max(1, self.replicas.count + step))
        if self.state != "ready" or count == self.replicas.count:
            _logger.warning("server: replicas stay: %d", self.replicas.count)
            return
        _logger.warning("server: replicas from now on: %d", count)
        self.replicas.count = count
        self._tasks.append(asyncio.get_running_loop().create_task(self._scale_to(count)))

    async def _scale_to(self, count: int) -> None:
        try:
            await asyncio.to_thread(self.replicas.scale, count)
        except Exception as problem:
            _logger.error("server: has other replicas: %s", problem)

    def refusal(self) -> ApiError:
        """What is said to whom the state keeps out."""
        code = "engine_dead" if self.state == "dead" else self.state
        return unavailable(code, SAID[code], retry_after_s=5)

    # Requests

    async def _take(self, scope: Any, receive: Any, send: Any) -> None:
        """The application."""
        if scope["type"] != "http":
            await self._live(receive, send)
            return
        path, reads = scope["path"], scope["method"] in ("GET", "HEAD")
        if reads and path == "/live":
            await (await live())(scope, receive, send)
        elif reads and path == "/health" and self.state != "ready":
            await health_of(self)(scope, receive, send)  # type: ignore[arg-type]
        elif reads and path == "/metrics" and self.loaded is not None:
            try:
                text = await self._metrics(headers_of(scope))
            except Exception as problem:  # of Ray, or a replica that ends
                _logger.warning("server: no metrics: %s", problem)
                await send_error(unavailable("replica_gone", "a replica has ended"), path, send)
                return
            await Response(text, media_type=CONTENT_TYPE)(scope, receive, send)
        else:
            await Relay(self, scope, send).run(receive)

    async def _metrics(self, headers: list[tuple[str, str]]) -> bytes:
        """Those of all replicas, told apart by a label."""
        texts = {}
        for each in await self.replicas.all():
            async with self.client.get(each["address"] + "/metrics", headers=headers) as answer:
                texts[each["name"]] = await answer.text()
        return generate_latest(_Merged(texts))


class _Merged:
    """Metrics of several servers as those of one, with the label `replica`."""

    def __init__(self, texts: dict[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for name, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                samples, family.samples = family.samples, []
                kept = families.setdefault(family.name, family)
                kept.samples += [
                    sample._replace(labels=sample.labels | {"replica": name}) for sample in samples
                ]
        return iter(families.values())


class Relay:
    """One request on its way to a replica, and its answer on the way back."""

    def __init__(self, front: RayFront, scope: Any, send: Any) -> None:
        """Takes a request and where its answer goes."""
        self._front = front
        self._scope = scope
        self._send = send
        self._failure: ApiError | None = None
        self._work: asyncio.Task[None]
        self._came_at = time.monotonic()
        self._is_placed = False  # with a replica
        self._has_begun = False  # the client has the answer's head
        self._is_stream = False

    async def run(self, receive: Any) -> None:
        """Answers; returns at once when the client goes, and so does the replica's work."""
        path, state = self._scope["path"], self._front.state
        try:
            body = await read_all(receive, self._front.settings)
            if state != "ready" and (state != "draining" or self._scope["method"] == "POST"):
                raise self._front.refusal()
        except ApiError as error:
            await send_error(error, path, self._send)
            return
        except ConnectionError:
            return
        loop = asyncio.get_running_loop()
        self._work = loop.create_task(self._pass_on(body))
        leaving = loop.create_task(_until_gone(receive))
        self._front.exchanges.add(self)
        try:
            await asyncio.wait({self._work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._front.exchanges.discard(self)
            leaving.cancel()
            self._work.cancel()
            await asyncio.wait({self._work})
        if not self._work.cancelled():
            problem = self._work.exception()
            self._failure = None if problem is None else api_error(problem)
        if self._failure is not None:
            await self._tell(self._failure)

    def fail(self, error: ApiError) -> None:
        """Ends it for a reason that its client is told."""
        self._failure = error
        self._work.cancel()

    def tick(self, now: float) -> None:
        """Ends it if no replica has been there to take it for too long."""
        is_health = self._scope["path"] == "/health"
        limit = _HEALTH_S if is_health else self._front.settings.queue_timeout_s
        if limit and not self._is_placed and now - self._came_at > limit:
            self.fail(unavailable("queue_timeout", f"no replica was there for {limit:g} s", 5))

    async def _pass_on(self, body: bytes) -> None:
        """Has it answered by one replica; by another one if that ends before it has begun to.

        Raises: ApiError.
        """
        pieces = pieces_of(body, self._scope["state"]["salt"])
        with self._front.choice.asking(pieces) as asking:
            for attempt in range(_ATTEMPTS):
                await asyncio.sleep(attempt * 0.2)
                try:
                    async with self._front.replicas.choose(asking.rank) as chosen:
                        asking.place(chosen.name)
                        self._is_placed = True
                        await self._exchange(chosen, body)
                        return
                except (aiohttp.ClientError, OSError):
                    if self._has_begun:
                        break
                    asking.fail()
                    self._is_placed = False
        raise unavailable("replica_gone", "the replica that answered has ended", retry_after_s=1)

    async def _exchange(self, chosen: Chosen, body: bytes) -> None:
        scope = self._scope
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        target = (scope["raw_path"] + query).decode("ascii", "replace")
        url = URL(chosen.address + target, encoded=True)
        asked = self._front.client.request(
            scope["method"], url, headers=headers_of(scope), data=body or None,
            allow_redirects=False,
        )  # fmt: skip
        async with asked as answer:
            drops = _OF_CONNECTION - {b"content-length"} | {b"date"}
            headers = [(k.lower(), v) for k, v in answer.raw_headers if k.lower() not in drops]
            headers.append((REPLICA_HEADER, chosen.name.encode()))
            self._is_stream = answer.content_type == "text/event-stream"
            self._has_begun = True
            await self._send(
                {"type": "http.response.start", "status": answer.status, "headers": headers}
            )
            piece: dict[str, Any] = {"type": "http.response.body", "more_body": True}
            async for piece["body"] in answer.content.iter_any():
                await self._send(piece)
        await self._send({"type": "http.response.body", "body": b""})

    async def _tell(self, error: ApiError) -> None:
        """Ends the answer with an error, in the form of its route."""
        path = self._scope["path"]
        if not self._has_begun:
            await send_error(error, path, self._send)
        elif self._is_stream:
            fields = form_of(path).fields(error)
            named = b"event: error\n" if "type" in fields else b""
            last = b"\n\n" + named + b"data: " + orjson.dumps(fields) + b"\n\n"
            await self._send({"type": "http.response.body", "body": last})
        else:
            self._scope.get("tidaldecode.abort", lambda: None)()


def headers_of(scope: Any) -> list[tuple[str, str]]:
    """The headers of a request, for another connection."""
    return [
        (name.decode("latin-1"), value.decode("utf-8", "replace"))
        for name, value in scope["headers"]
        if name not in _OF_CONNECTION
    ]


async def _until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
