"""A server for the tests: in a thread of this process, or as the command; on loopback only."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tidaldecode import Decoder, Guide
from tidaldecode.server.run import Run
from tidaldecode.server.service import Service
from tidaldecode.server.settings import ServeConfig

START_S = 60.0
ENGINE: dict[str, Any] = {"device": "cpu", "num_threads": 1, "max_seq_len": 512}
ENGINE |= {"max_batch_size": 4, "page_size": 16}


class Served:
    """A server in a thread."""

    def __init__(self, folder: Path, settings: dict[str, Any], engine: dict[str, Any]) -> None:
        self.make: Callable[..., Decoder] = lambda progress: Decoder(
            folder, **(ENGINE | engine), progress=progress
        )
        self.run = Run(lambda progress: self.make(progress), ServeConfig(port=0, **settings))
        self.exit_code: int | None = None
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        self.exit_code = self.run.run()

    @property
    def url(self) -> str:
        return self.run.address

    @property
    def service(self) -> Service:
        return self.run.service

    @property
    def decoder(self) -> Decoder:
        assert self.service.loaded is not None
        return self.service.loaded.decoder

    def start(self) -> None:
        self._thread.start()
        until(lambda: self.service.state == "ready", START_S)

    def end(self) -> None:
        """As SIGTERM would."""
        self.service.loop.call_soon_threadsafe(self.run.end)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def is_idle(self) -> bool:
        """Whether nothing is held for any request."""
        stats = self.decoder.stats()
        ways = ("num_waiting", "num_reading", "num_decoding", "num_paused", "pages_held")
        is_empty = not (self.service.exchanges or len(self.service.feed))
        return is_empty and not any(stats[name] for name in ways)

    def post(self, route: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(self.url + route, json=body, timeout=60, **more)


def until(is_so: Callable[[], Any], seconds: float = 20.0) -> None:
    """Waits for something."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it does not become so"
        time.sleep(0.01)


def stream_in_thread(url: str, body: dict[str, Any]) -> tuple[threading.Thread, list[str]]:
    """Reads a stream to its end; gives the data of its events, once there are some."""
    events: list[str] = []

    def read() -> None:
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line:
                    events.append(line.removeprefix("data: "))

    thread = threading.Thread(target=read)
    thread.start()
    until(lambda: events)
    return thread, events


@contextmanager
def serving(folder: Path, *, engine: dict[str, Any] | None = None, **settings: Any) -> Iterator:
    """A server for the length of a block; it must be idle in the end."""
    served = Served(folder, settings, engine or {})
    served.start()
    try:
        yield served
        until(served.is_idle)
    finally:
        served.end()


def tls_files(folder: Path) -> dict[str, str]:
    """Settings for TLS with a certificate of one's own; skips where none can be made."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here, to make a certificate with")
    certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out",
         certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return {"ssl_certfile": certificate, "ssl_keyfile": key}


class Command:
    """`tidaldecode serve` as a process."""

    def __init__(self, *arguments: str, program: str = "") -> None:
        runs = ["-c", program] if program else ["-m", "tidaldecode"]
        command = [sys.executable, *runs, "serve", *arguments, "--device", "cpu"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += iter(self.process.stderr.readline, "")

    def _line(self) -> str | None:
        return next((line for line in list(self.lines) if line.startswith("Serving ")), None)

    def url(self) -> str:
        """Where it serves, once it does."""
        until(lambda: self._line() or self.process.poll() is not None, START_S)
        line = self._line()
        assert line is not None, "".join(self.lines)
        found = re.search(r" at (\S+)$", line.strip())
        assert found is not None, line
        return found.group(1)

    def tell(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def code(self, seconds: float = 30.0) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(seconds)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


def let_write(served: Served, monkeypatch: pytest.MonkeyPatch, guide: Guide) -> None:
    """Lets a model write what a guide says, whatever it is asked."""
    submit = type(served.decoder).submit
    monkeypatch.setattr(
        served.decoder,
        "submit",
        lambda ids, **options: submit(served.decoder, ids, **options | {"guide": guide}),
    )


def events_of(text: str) -> list[str]:
    """The data of each event of a stream."""
    return [part.removeprefix("data: ") for part in text.split("\n\n") if part.startswith("data: ")]
