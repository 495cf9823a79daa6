"""A server in front of several: what is passed on, and what is said of their ends.

Ray is not needed here: the servers are threads of this process (test_conformance_ray.py has it).
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")
pytest.importorskip("aiohttp", reason="needs aiohttp, as tidaldecode[ray] does")

import httpx  # noqa: E402

from serving import Served, events_of, serving, until  # noqa: E402
from tidaldecode import _core  # noqa: E402
from tidaldecode.cli import app  # noqa: E402
from tidaldecode.errors import ConfigError  # noqa: E402
from tidaldecode.server import command  # noqa: E402
from tidaldecode.server.prefix_choice import Chosen  # noqa: E402
from tidaldecode.server.ray_front import RayFront  # noqa: E402
from tidaldecode.server.run import ServerProcess  # noqa: E402
from tidaldecode.server.settings import ServeConfig  # noqa: E402

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
ASKS = [{"role": "user", "content": "Hello"}]
GREEDY = {"max_tokens": 4, "temperature": 0}


# Replicas without Ray


class Threads:
    """What RayReplicas is to the front, over servers that are there already."""

    def __init__(self, addresses: dict[str, str]) -> None:
        self.addresses = addresses
        self.count = len(addresses)
        self.most = 3
        self.problem: Exception | None = None
        self.may_start = threading.Event()
        self.may_start.set()
        self.scaled: list[int] = []
        self.is_closed = False

    def failure(self) -> None:
        return None

    def start_ray(self) -> None:
        self.may_start.wait(20)

    def start(self) -> None:
        if self.problem is not None:
            raise self.problem

    @asynccontextmanager
    async def choose(self, rank: Callable[[list[str]], list[str]]) -> Any:
        while not self.addresses:
            await asyncio.sleep(0.01)
        name = rank(list(self.addresses))[0]
        yield Chosen(name=name, address=self.addresses[name])

    async def all(self) -> list[dict[str, str]]:
        return [{"name": n, "address": a, "what": "demo"} for n, a in self.addresses.items()]

    def scale(self, count: int) -> None:
        self.scaled.append(count)

    def close(self) -> None:
        self.is_closed = True


class Front(Served):
    """A front in a thread."""

    def __init__(self, replicas: Threads, **settings: Any) -> None:
        config = ServeConfig(port=0, **settings)
        self.front = RayFront(replicas, config, rows=4)  # type: ignore[arg-type]
        self.run = ServerProcess(self.front, self.front.app, config)  # type: ignore[assignment]
        self.loop: asyncio.AbstractEventLoop
        self.exit_code: int | None = None
        self._thread = threading.Thread(target=self._serve)
        self.run.on_ready = lambda: None

    def start(self) -> None:
        self._thread.start()
        until(lambda: self.front.state != "loading", 20)

    def in_loop(self, work: Callable[[], Any]) -> None:
        self.front.client._loop.call_soon_threadsafe(work)

    def end(self) -> None:
        self.in_loop(self.run.end)
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextmanager
def fronting(addresses: dict[str, str], **settings: Any) -> Iterator[Front]:
    front = Front(Threads(addresses), **settings)
    front.start()
    try:
        yield front
        until(lambda: not front.front.exchanges)
    finally:
        front.end()
    assert front.front.replicas.is_closed


@contextmanager
def answering(*pieces: bytes | float, hold: bool = False) -> Iterator[str]:
    """A server that answers each connection with these bytes, with pauses of so many seconds
    between them, and then closes it, or not."""
    listener = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        for piece in pieces:
            if isinstance(piece, float):
                time.sleep(piece)
                continue
            try:
                connection.sendall(piece)
            except OSError:
                return
        held.append(connection)
        if not hold:
            connection.close()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in held:
            connection.close()


def nowhere() -> str:
    """An address that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[Served]:
    with serving(demo_model, cors_origins=("https://page.example",)) as served:
        yield served


# What is passed on


CALLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "models": ("GET", "/v1/models", {}),
    "a name": ("GET", "/v1/models/no%2Fsuch?x=%20y", {}),
    "head": ("HEAD", "/metrics", {}),
    "schema": ("GET", "/openapi.json", {}),
    "no route": ("GET", "/%C3%A4/b", {}),
    "method": ("PUT", "/health", {}),
    "page of another origin": ("OPTIONS", CHAT, {"headers": {
        "origin": "https://page.example", "access-control-request-method": "POST"}}),
    "tokens": ("POST", "/tokenize", {"json": {"prompt": "Grüße"}}),
    "empty": ("POST", CHAT, {"content": b""}),
    "broken": ("POST", CHAT, {"content": b"\xff{"}),
    "no object": ("POST", CHAT, {"json": [1]}),
    "a field": ("POST", CHAT, {"json": {"messages": ASKS, "n": "two"}}),
    "media": ("POST", CHAT, {"content": b"{}", "headers": {"content-type": "text/plain"}}),
    "Anthropic's": ("POST", MESSAGES, {"json": {"messages": "x", "max_tokens": 1}}),
    "too large": ("POST", CHAT, {"content": b"x" * (33 * 2**20)}),
}  # fmt: skip
OWN_HEADERS = {"date", "x-replica", "connection"}


@pytest.mark.parametrize("name", CALLS)
def test_says_what_the_server_says(name: str, server: Served):
    method, path, more = CALLS[name]
    with fronting({"a": server.url}) as front:
        alone, passed = (
            httpx.request(method, url + path, timeout=30, **more) for url in (server.url, front.url)
        )
    assert passed.status_code == alone.status_code
    if name != "head":  # metrics have one label more
        assert passed.content == alone.content
        kept = [
            {k: v for k, v in a.headers.items() if k not in OWN_HEADERS} for a in (passed, alone)
        ]
        assert kept[0] == kept[1]


def test_answers_and_streams_come_through(server: Served):
    bodies = {
        CHAT: {"messages": ASKS} | GREEDY,
        COMPLETIONS: {"prompt": ["One", "Two"], "n": 2, "seed": 1} | GREEDY,
        MESSAGES: {"messages": ASKS} | GREEDY,
        "/v1/responses": {"input": "Hello", "max_output_tokens": 4, "temperature": 0},
    }
    with fronting({"a": server.url, "b": server.url}) as front:
        for route, body in bodies.items():
            whole = front.post(route, body)
            assert whole.status_code == 200 and whole.headers["x-replica"] in "ab"
            stream = front.post(route, body | {"stream": True})
            assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert stream.headers["cache-control"] == "no-cache"
            last = stream.text.rstrip().rpartition("\n\n")[2]
            assert "[DONE]" in last or "message_stop" in last or "response.incomplete" in last


def test_metrics_of_all_are_told_apart(server: Served):
    with fronting({"a": server.url, "b": server.url}) as front:
        text = httpx.get(front.url + "/metrics").text
    lines = text.splitlines()
    assert sum(line.startswith("# TYPE tidaldecode:num_requests_running ") for line in lines) == 1
    running = [line for line in lines if line.startswith("tidaldecode:num_requests_running{")]
    assert [f'replica="{name}"' in line for name, line in zip("ab", running, strict=True)] == [
        True
    ] * 2
    assert any(line.startswith("tidaldecode:clients_gone_total{") for line in lines)


def test_metrics_while_a_replica_ends(server: Served):
    with fronting({"a": server.url, "b": nowhere()}) as front:
        answer = httpx.get(front.url + "/metrics")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "replica_gone"


def test_keys_and_sizes_are_looked_at_before_a_body_is_passed_on():
    with fronting({"a": nowhere()}, api_keys=("k",), max_body_mb=1) as front:
        for headers in ({}, {"x-api-key": "other"}):
            refused = front.post(CHAT, {"messages": ASKS}, headers=headers)
            assert refused.status_code == 401
        key = {"authorization": "Bearer k"}
        chunks = iter([b"x" * 2**20] * 2)
        refused = httpx.post(front.url + CHAT, content=chunks, headers=key)
        assert refused.status_code == 413 and refused.json()["error"]["code"] == "body_too_large"
        assert httpx.get(front.url + "/live").json() == {"status": "live"}


# Ends


def test_a_replica_that_is_gone_is_passed_over(server: Served):
    with fronting({"a": nowhere(), "b": server.url}) as front:
        for _ in range(4):
            answer = front.post(COMPLETIONS, {"prompt": "a"} | GREEDY)
            assert answer.status_code == 200 and answer.headers["x-replica"] == "b"


def test_all_replicas_are_gone():
    with fronting({"a": nowhere(), "b": nowhere()}) as front:
        answer = front.post(MESSAGES, {"messages": ASKS} | GREEDY)
        assert answer.status_code == 529 or answer.status_code == 503
        assert answer.json()["type"] == "error" and answer.headers["retry-after"] == "1"


def test_no_replica_is_there():
    with fronting({"a": nowhere()}, queue_timeout_s=0.5) as front:
        front.front.replicas.addresses.clear()
        answer = front.post(COMPLETIONS, {"prompt": "a"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_timeout"
        assert httpx.get(front.url + "/health").status_code == 503


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b"c\r\ndata: {}\n\nda\r\n"  # and the beginning of another one


@pytest.mark.parametrize("route", [CHAT, MESSAGES])
def test_a_stream_that_is_cut_off_ends_with_an_error(route: str):
    with answering(HEAD, EVENT) as address, fronting({"a": address}) as front:
        text = front.post(route, {"messages": ASKS, "stream": True} | GREEDY).text
    last = text.split("\n\n")[-2]
    if route == MESSAGES:
        assert last.startswith('event: error\ndata: {"type":"error","error":{"type":"api_error",')
    else:
        assert last.startswith('data: {"error":{') and '"code":"replica_gone"' in last


def test_a_whole_answer_that_is_cut_off_is_no_answer():
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    with answering(head) as address, fronting({"a": address}) as front:
        with pytest.raises(httpx.RemoteProtocolError):
            front.post(CHAT, {"messages": ASKS})


def test_an_end_that_does_not_wait():
    with answering(HEAD, EVENT, hold=True) as address:
        front = Front(Threads({"a": address}), shutdown_timeout_s=0.5)
        front.start()
        with httpx.stream("POST", front.url + COMPLETIONS, json={"prompt": "a"}) as answer:
            front.in_loop(front.run.end)
            text = "".join(answer.iter_text())
        front._thread.join(20)
    assert front.exit_code == 1 and '"code":"draining"' in events_of(text)[-1]


def test_while_it_ends_nobody_is_let_in_and_asked_again_it_ends_at_once():
    with answering(HEAD, EVENT, hold=True) as address:
        front = Front(Threads({"a": address}))
        front.start()
        with httpx.stream("POST", front.url + COMPLETIONS, json={"prompt": "a"}) as answer:
            front.in_loop(front.run.end)
            until(lambda: front.front.state == "draining")
            refused = front.post(COMPLETIONS, {"prompt": "a"})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            assert httpx.get(front.url + "/health").json()["status"] == "draining"
            front.in_loop(front.run.end)
            text = "".join(answer.iter_text())
        front._thread.join(20)
    assert front.exit_code == 1 and '"code":"draining"' in events_of(text)[-1]


def test_an_end_that_waits():
    with answering(HEAD, EVENT, 0.7, b"6\r\nta: 1\n\r\n0\r\n\r\n", hold=True) as address:
        front = Front(Threads({"a": address}))
        front.start()
        with httpx.stream("POST", front.url + COMPLETIONS, json={"prompt": "a"}) as answer:
            front.in_loop(front.run.end)
            until(lambda: front.front.state == "draining")
            assert "".join(answer.iter_text()) == "data: {}\n\ndata: 1\n"
        front._thread.join(20)
    assert front.exit_code == 0


def test_a_client_that_does_not_read_is_dropped():
    pieces = [HEAD, *[b"10000\r\n" + b"x" * 2**16 + b"\r\n"] * 1024]
    with (
        answering(*pieces, hold=True) as address,
        fronting({"a": address}, slow_client_timeout_s=0.5) as front,
        socket.create_connection(front.run.socket.getsockname()) as client,
    ):
        client.sendall(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
        until(lambda: len(front.front.exchanges) == 1)
        until(lambda: not front.front.exchanges)


# Its beginning, and its size


def test_loading_and_what_keeps_it_from_being_loaded():
    replicas = Threads({})
    replicas.may_start.clear()
    replicas.problem = ConfigError("config.json: is none")
    front = Front(replicas)
    front._thread.start()
    until(lambda: getattr(front.run._server, "started", False))
    health = httpx.get(front.url + "/health")
    assert health.status_code == 503 and health.json()["status"] == "loading"
    assert httpx.get(front.url + "/live").status_code == 200
    assert front.post(COMPLETIONS, {"prompt": "a"}).json()["error"]["code"] == "loading"
    replicas.may_start.set()
    front._thread.join(20)
    assert front.exit_code == 1 and front.front.problem is replicas.problem
    assert replicas.is_closed


def test_replicas_come_and_go_one_by_one(server: Served):
    with fronting({"a": server.url}) as front:
        scaled = front.front.replicas.scaled
        for step in (-1, 1, 1, 1, -1, -1, -1):  # from 1, at most 3
            front.in_loop(lambda step=step: front.front.scale(step))
        until(lambda: len(scaled) == 4)
        assert sorted(scaled) == [1, 2, 2, 3]
        assert front.front.replicas.count == 1


# What the command refuses


@pytest.mark.parametrize("value", [0, -1, 1025, "2", 1.0, True])
def test_a_number_of_replicas(value: Any):
    with pytest.raises(ConfigError, match="^ray: got .* expected an integer from 1 to 1024"):
        ServeConfig(ray=value)


def test_a_socket_with_permissions_is_not_for_replicas():
    with pytest.raises(ConfigError, match="^uds: got '/tmp/x' with ray, expected host and port"):
        ServeConfig(ray=1, uds="/tmp/x")


def gpus(count: int) -> list[dict[str, Any]]:
    names = ["cpu", *(f"cuda:{number}" for number in range(count))]
    return [{"name": name, "available": True} for name in names]


def test_where_replicas_are_placed(monkeypatch: pytest.MonkeyPatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(_core, "list_devices", lambda: gpus(0))
    assert command.placed({"device": "auto"}, 2) == (
        {"device": "auto", "num_threads": max(1, cores // 2)}, 0,
    )  # fmt: skip
    assert command.placed({"num_threads": 3}, 2) == ({"num_threads": 3}, 0)
    with pytest.raises(ConfigError, match="^ray: got 1 replicas, expected at most 0: a GPU each"):
        command.placed({"device": "cuda"}, 1)
    monkeypatch.setattr(_core, "list_devices", lambda: gpus(2))
    assert command.placed({"device": "auto"}, 2) == ({"device": "auto"}, 2)
    assert command.placed({"device": "cuda"}, 1) == ({"device": "cuda"}, 2)
    assert command.placed({"device": "cpu"}, 4)[1] == 0
    with pytest.raises(ConfigError, match="^ray: got 3 replicas, expected at most 2: a GPU each"):
        command.placed({"device": "auto"}, 3)
    with pytest.raises(ConfigError, match="^device: got 'cuda:1' with ray, expected 'auto', 'cpu'"):
        command.placed({"device": "cuda:1"}, 1)


def test_ray_is_missing(demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.delitem(sys.modules, "tidaldecode.server.ray_replicas", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert app.main(["serve", str(demo_model), "--ray", "2", "--port", "0"]) == 2
    assert "pip install 'tidaldecode[ray]'" in capsys.readouterr().err
    assert app.main(["serve", str(demo_model), "--ray", "0"]) == 2
    assert "ray: got 0, expected an integer from 1 to 1024" in capsys.readouterr().err
