"""The process of a server: sockets, signals, how it begins and how it ends.

It listens before the model is loaded, so that health can be asked for. Told to end (SIGTERM,
SIGINT), it lets nobody in, waits for whoever is being answered, and aborts them when it has waited
long enough or is told again. Exit codes: 0 done, 1 requests were aborted or it could not begin,
70 the engine has failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import uvicorn

from tidaldecode.decoder import Decoder
from tidaldecode.errors import BackendError, ConfigError
from tidaldecode.server.app import make_app
from tidaldecode.server.http_protocol import protocol_with
from tidaldecode.server.service import LoadProgress, Service
from tidaldecode.server.settings import ServeConfig

EXIT_ABORTED = 1
EXIT_ENGINE_DEAD = 70
_BACKLOG = 2048
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# How long clients have to read what they are told of an engine that has failed.
_LAST_WORDS_S = 1.0
_FORSAKE_S = 10.0

_logger = logging.getLogger("tidaldecode")


class _Server(uvicorn.Server):
    """uvicorn with what hears signals in place of its own."""

    def __init__(self, config: uvicorn.Config, hear_signals: Callable[[], None]) -> None:
        super().__init__(config)
        self._hear_signals = hear_signals

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        self._hear_signals()
        yield


class Served(Protocol):
    """What a process serves: a model of its own, or those of other processes (ray_front.py)."""

    state: str  # as service.py has them
    problem: BaseException | None  # why it is dead
    exchanges: set[Any]  # with clients, under way
    on_change: Callable[[], None]  # called when the state has changed

    @property
    def loaded(self) -> Any:
        """What is served; None until it is there."""

    def drain(self) -> None:
        """Lets nobody in from now on."""

    def abort(self) -> None:
        """Ends whoever is still answered."""

    def forsake(self) -> None:
        """Ends what would outlive the process, which is about to end at once."""


class ServerProcess:
    """One run of a server, from its sockets to its exit code."""

    def __init__(self, service: Served, app: Any, settings: ServeConfig) -> None:
        """Opens the socket.

        Args:
            service: what is served.
            app: its application.
            settings: of the server.

        Raises: ConfigError if it cannot listen there.
        """
        self.service = service
        self.on_ready: Callable[[], None] = lambda: None
        self.code = 0
        self._settings = settings
        self.socket = listen(settings)
        self._server = _Server(
            uvicorn.Config(
                app,
                http=protocol_with(settings.header_timeout_s),
                ws="none",
                loop="uvloop",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=5,
            ),
            self._hear_signals,
        )
        self._ending: asyncio.Task[None] | None = None
        self._is_hurried = asyncio.Event()

    @property
    def address(self) -> str:
        """Where it can be reached."""
        if self._settings.uds is not None:
            return f"unix:{self._settings.uds}"
        scheme = "https" if self._settings.ssl_certfile else "http"
        host, port = self.socket.getsockname()[:2]
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self) -> int:
        """Serves until it is told to end; returns the exit code."""
        _raise_file_limit()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        try:
            self._server.config.load()
        except OSError as cause:  # certificates
            raise ConfigError(f"ssl_certfile: cannot be used: {cause}") from cause
        self.service.on_change = self._on_change
        with _same_handlers_after():
            self._server.run(sockets=[self.socket])
        if self._settings.uds is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._settings.uds)
        return self.code

    def _hear_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _END_SIGNALS:
                asyncio.get_running_loop().add_signal_handler(number, self.end)

    def _on_change(self) -> None:
        self._hear_signals()  # a library that was loaded meanwhile may have taken them
        if self.service.state == "ready":
            self.on_ready()
        elif self.service.state == "dead" and self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end_dead())

    def end(self) -> None:
        """Ends the server once whoever is being answered is; asked again, at once."""
        if self._ending is not None:
            self._is_hurried.set()
            return
        count = len(self.service.exchanges)
        if count:
            _logger.warning("server: ends when %d requests have ended; again: at once", count)
        self._ending = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        service = self.service
        was_loading = service.loaded is None
        service.drain()
        deadline = time.monotonic() + self._settings.shutdown_timeout_s
        while service.exchanges and not self._is_hurried.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if service.state == "dead":
            self.code = EXIT_ENGINE_DEAD
        elif service.exchanges:
            self.code = EXIT_ABORTED
            service.abort()
            await asyncio.sleep(0.1)
        if was_loading and service.loaded is None:
            service.forsake()
            os._exit(self.code)  # nothing interrupts what reads the weights, and nobody is answered
        self._server.should_exit = True

    async def _end_dead(self) -> None:
        """Lets the last words be read, and ends the process without asking the engine."""
        problem = self.service.problem
        is_load = self.service.loaded is None
        self.code = EXIT_ENGINE_DEAD if isinstance(problem, BackendError) or not is_load else 1
        if is_load and problem is not None:
            self._server.should_exit = True
            return
        await asyncio.sleep(_LAST_WORDS_S)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(self.service.forsake), _FORSAKE_S)
        for output in (sys.stdout, sys.stderr):
            if output is not None:
                with contextlib.suppress(OSError):  # of a full disk
                    output.flush()
        os._exit(self.code)


class Run(ServerProcess):
    """One that serves a model of its own."""

    service: Service

    def __init__(self, load: Callable[[LoadProgress], Decoder], settings: ServeConfig) -> None:
        """Opens the socket.

        Args:
            load: makes the decoder.
            settings: of the server.

        Raises: ConfigError if it cannot listen there.
        """
        service = Service(load, settings)
        super().__init__(service, make_app(service), settings)


@contextlib.contextmanager
def _same_handlers_after() -> Iterator[None]:
    """Puts back what handled signals before: a loop that is closed leaves its own in place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _END_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # one that Python has set
                signal.signal(number, handler)


def listen(settings: ServeConfig) -> socket.socket:
    """The socket that a server listens at.

    Raises: ConfigError if it cannot be had.
    """
    if settings.uds is not None:
        return _listen_at_path(settings.uds)
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as cause:
        raise ConfigError(f"host: got {settings.host!r}: {cause.strerror}") from cause
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as cause:
        listener.close()
        raise ConfigError(
            f"port: cannot listen at {settings.host}:{settings.port}: {cause.strerror}; choose "
            "another one, or 0 for any"
        ) from cause
    listener.setblocking(False)
    return listener


def _listen_at_path(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        # A socket that nobody listens at is left of a process that has been killed.
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            probe = socket.socket(socket.AF_UNIX)
            with contextlib.closing(probe):
                if probe.connect_ex(path) != 0:
                    os.unlink(path)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as cause:
        listener.close()
        raise ConfigError(f"uds: cannot listen at {path}: {cause.strerror}") from cause
    listener.setblocking(False)
    return listener


def _raise_file_limit() -> None:
    """As many descriptors as may be: a connection and an answer take one each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
