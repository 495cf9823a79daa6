"""What goes wrong around a server: no room for its log, clocks that jump, texts that are none,
clients that do not read."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")

import httpx  # noqa: E402

from serving import Served, serving, stream_in_thread, tls_files, until  # noqa: E402

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = {"prompt": [5, 6, 7], "max_tokens": 2500, "ignore_eos": True, "temperature": 0}
SIZES = ("--num-threads", "1", "--max-seq-len", "16384", "--max-batch-size", "2")
YEAR_S = 366 * 24 * 3600


@contextmanager
def command(
    model: Path, *options: str, stderr: Any, program: str = "", **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The command as a process whose stderr says nothing to us, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    runs = ["-c", program] if program else ["-m", "tidaldecode"]
    arguments = [sys.executable, *runs, "serve", str(model), "--device", "cpu", "--port", port]
    process = subprocess.Popen(
        [*arguments, *SIZES, *options], stderr=stderr, env=os.environ | environment
    )
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: process.poll() is not None or is_ready(url), 60)
        yield process, url
    finally:
        process.kill()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.HTTPError:
        return False


def stream(url: str, **body: Any) -> tuple[threading.Thread, list[str]]:
    return stream_in_thread(url + COMPLETIONS, LONG | {"stream": True} | body)


# A log that nothing can be written to

FAILING = """
import sys
from tidaldecode import BackendError
from tidaldecode.server.answer import Answer
from tidaldecode.__main__ import main
take = Answer._take
def fails(self, tokens, text):
    if len(self.token_ids) > 20: raise BackendError('cuda: an illegal access')
    take(self, tokens, text)
Answer._take = fails
sys.exit(main())
"""


@contextmanager
def full_disk() -> Iterator[Any]:
    with open("/dev/full", "wb", buffering=0) as disk:
        yield disk


@contextmanager
def gone_reader() -> Iterator[Any]:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


@pytest.mark.parametrize("log", [full_disk, gone_reader])
def test_without_a_log_it_serves_and_ends_as_ever(demo_model: Path, log: Any):
    with log() as stderr, command(demo_model, stderr=stderr) as (process, url):
        thread, events = stream(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        thread.join(10)
        assert events[-1] == "[DONE]"


def test_without_a_log_a_dead_engine_ends_the_process(demo_model: Path):
    with (
        full_disk() as stderr,
        command(demo_model, stderr=stderr, program=FAILING) as (process, url),
    ):
        thread, events = stream(url)
        assert process.wait(30) == 70
        thread.join(10)
        assert json.loads(events[-1])["error"]["code"] == "engine_dead"


def test_without_a_log_a_model_that_cannot_be_loaded_is_an_exit_code(tmp_path: Path):
    with full_disk() as stderr, command(tmp_path, stderr=stderr) as (process, _):
        assert process.wait(30) == 2


# Clocks


@pytest.fixture(scope="module")
def jumping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that moves the wall clock of a process."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here, to make a clock with")
    library = tmp_path_factory.mktemp("clock") / "clock_jumps.so"
    source = Path(__file__).with_name("clock_jumps.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


def test_clocks_that_jump_end_nothing_and_hold_nothing(
    demo_model: Path, jumping: Path, tmp_path: Path
):
    """By the clock that jumps, every limit below is over at once, or never."""
    jump = tmp_path / "jump"
    jump.write_bytes(bytes(8))
    limits = ("--request-timeout-s", "5", "--queue-timeout-s", "3", "--slow-client-timeout-s", "3")
    limits += ("--header-timeout-s", "3", "--step-timeout-s", "3", "--sse-keep-alive-s", "1")
    own = {"LD_PRELOAD": str(jumping), "CLOCK_JUMP": str(jump)}
    with (
        command(demo_model, *limits, stderr=subprocess.DEVNULL, **own) as (process, url),
        jump.open("r+b") as file,
        mmap.mmap(file.fileno(), 8) as clock,
    ):

        def ask(most: int) -> httpx.Response:
            return httpx.post(url + COMPLETIONS, json=LONG | {"max_tokens": most}, timeout=60)

        assert abs(ask(1).json()["created"] - time.time()) < 60
        for years in (10, -20):
            thread, events = stream(url, max_tokens=300)
            clock[:] = struct.pack("=q", years * YEAR_S)
            answer = ask(20).json()
            assert abs(answer["created"] - time.time() - years * YEAR_S) < 60
            assert answer["usage"]["completion_tokens"] == 20
            thread.join(30)
            assert events[-1] == "[DONE]"
        # A limit is as long as it is, whatever the clock says meanwhile.
        began = time.monotonic()
        thread, events = stream(url, max_tokens=16_000)
        clock[:] = struct.pack("=q", -40 * YEAR_S)
        thread.join(30)
        assert 4.9 < time.monotonic() - began < 25
        assert json.loads(events[-1])["error"]["code"] == "request_timeout"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


# Texts that are none


@pytest.fixture(scope="module")
def served(demo_model: Path) -> Iterator[Served]:
    with patient(demo_model) as served:
        yield served


@contextmanager
def patient(model: Path, **settings: Any) -> Iterator[Served]:
    """A server whose system queues little of an answer, and whose clients may be silent for half a
    second."""
    engine = {"max_seq_len": 1024}
    with serving(model, engine=engine, slow_client_timeout_s=0.5, **settings) as served:
        served.run.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        yield served


def send(served: Served, head: bytes, body: bytes = b"") -> bytes:
    """Sends bytes as they are; gives all that is answered."""
    more = b"host: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.create_connection(served.run.socket.getsockname(), timeout=20) as client:
        client.sendall(head + more + body)
        return b"".join(iter(lambda: client.recv(65536), b""))


TEXTS = {
    "no UTF-8": b'"\xff\xfe"', "a surrogate's bytes": b'"\xed\xa0\x80"', "too long": b'"\xc0\xaf"',
    "cut off": b'"\xe4\xb8"', "half a pair": b'"\\ud800"', "the other half": b'"\\udfff x"',
}  # fmt: skip
PLACES: dict[str, tuple[str, bytes]] = {
    "a prompt": (COMPLETIONS, b'{"prompt": %b}'),
    "a stop string": (COMPLETIONS, b'{"prompt": "x", "stop": [%b]}'),
    "a model": (COMPLETIONS, b'{"prompt": "x", "model": %b}'),
    "a field that is ignored": (COMPLETIONS, b'{"prompt": "x", "unknown": %b}'),
    "a name": (COMPLETIONS, b'{"prompt": "x", %b: 1}'),
    "a message": (CHAT, b'{"messages": [{"role": "user", "content": %b}]}'),
    "a role": (CHAT, b'{"messages": [{"role": %b, "content": "x"}]}'),
    "an input": ("/v1/responses", b'{"input": %b}'),
    "Anthropic's message": (
        "/v1/messages", b'{"max_tokens": 1, "messages": [{"role": "user", "content": %b}]}',
    ),
    "a text to count": ("/tokenize", b'{"prompt": %b}'),
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("place", PLACES)
def test_a_text_that_is_none_is_refused(served: Served, place: str, text: str):
    route, body = PLACES[place]
    head = f"POST {route} HTTP/1.1\r\ncontent-type: application/json\r\n".encode()
    answer = send(served, head, body % TEXTS[text])
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["message"].startswith("the body is no JSON: ")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /v1/models/\xff\xfe HTTP/1.1\r\n", 400),
        (b"GET /v1/models/%ff%fe HTTP/1.1\r\n", 404),
        (b"GET /%ed%a0%80 HTTP/1.1\r\n", 404),
        (b"GET /health HTTP/1.1\r\nauthorization: Bearer \xff\xfe\r\nx-api-key: \xff\r\n", 200),
        (b"POST /tokenize HTTP/1.1\r\ncontent-type: \xff\r\n", 415),
    ],
)  # fmt: skip
def test_a_head_that_is_no_text(served: Served, head: bytes, status: int):
    answer = send(served, head)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    json.loads(answer.partition(b"\r\n\r\n")[2])


# Clients that do not read


def ask_and_leave_unread(served: Served) -> socket.socket:
    """Asks for an answer of half a megabyte, whole, and waits until it is made."""
    before = served.decoder.stats()["num_finished"]
    body = json.dumps(LONG | {"max_tokens": 900, "logprobs": 20}).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(served.run.socket.getsockname())
    if served.url.startswith("https:"):
        client = ssl._create_unverified_context().wrap_socket(client)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += "connection: close\r\n"
    client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
    until(lambda: served.decoder.stats()["num_finished"] > before, 60)
    until(lambda: not served.service.exchanges)
    return client


@pytest.mark.parametrize("has_tls", [False, True])
def test_a_whole_answer_that_nobody_takes_is_dropped(
    demo_model: Path, tmp_path: Path, has_tls: bool
):
    with patient(demo_model, **(tls_files(tmp_path) if has_tls else {})) as served:
        connections = served.run._server.server_state.connections
        with ask_and_leave_unread(served):
            assert len(connections) == 1
            until(lambda: not connections)
        assert served.service.metrics._num_slow == 1


def test_a_whole_answer_that_is_taken_slowly_arrives(served: Served):
    num_slow = served.service.metrics._num_slow
    data = b""
    with ask_and_leave_unread(served) as client:
        began = time.monotonic()
        while time.monotonic() - began < 2:  # four times what a client may be silent
            data += client.recv(4096)
            time.sleep(0.05)
        data += b"".join(iter(lambda: client.recv(1 << 20), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    assert len(json.loads(body)["choices"][0]["logprobs"]["tokens"]) == 900
    assert f"content-length: {len(body)}".encode() in head
    assert served.service.metrics._num_slow == num_slow
