"""vllm-router in front of two servers: prefixes stay where they are, and one may be killed, also
in the midst of a stream, and come back."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")
openai = pytest.importorskip("openai", reason="needs the openai client")

import httpx  # noqa: E402

from serving import Command, until  # noqa: E402

PROGRAM = shutil.which("vllm-router", path=str(Path(sys.executable).parent))
CHAT = "/v1/chat/completions"
REASON = "needs vllm-router"

pytestmark = pytest.mark.skipif(
    PROGRAM is None or importlib.util.find_spec("vllm_router") is None, reason=REASON
)


class Routed:
    """Two servers behind a router."""

    def __init__(self, servers: list[Command], url: str) -> None:
        self.servers = servers
        self.url = url

    def ask(self, text: str, **more: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        body = {"messages": messages, "model": "tidal-demo", "max_tokens": 4, "temperature": 0}
        return httpx.post(self.url + CHAT, json=body | more, timeout=60)

    def counts(self) -> list[int]:
        """Requests that each server has decoded."""
        return [self.stats(server)["num_finished"] for server in self.servers]

    @staticmethod
    def stats(server: Command) -> dict[str, int]:
        """What a server says of its engine."""
        return httpx.get(server.url() + "/server_info").json()["stats"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_up(url: str) -> bool:
    try:
        return httpx.get(url + "/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def start(model: Path, port: str = "0") -> Command:
    return Command(str(model), "--port", port, "--max-seq-len", "16384", "--num-threads", "1")


@pytest.fixture
def routed(demo_model: Path, tmp_path: Path) -> Iterator[Routed]:
    with ExitStack() as stack:
        servers = [stack.enter_context(start(demo_model)) for _ in range(2)]
        urls = [server.url() for server in servers]
        port = free_port()
        assert PROGRAM is not None
        command = [PROGRAM, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls]
        command += ["--policy", "cache_aware", "--prometheus-port", str(free_port())]
        command += ["--health-check-interval-secs", "1", "--balance-abs-threshold", "64"]
        command += ["--cb-timeout-duration-secs", "2"]  # a server is tried again so soon
        with (tmp_path / "router.log").open("w") as log:
            router = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: is_up(url), 60)
            yield Routed(servers, url)
        finally:
            router.terminate()
            router.wait(20)


def test_prefixes_fields_and_a_killed_server(routed: Routed):
    # Each conversation stays with the server that has its prefix.
    for number in range(4):
        text = f"{number} " + "The harbour was grey and still. " * 8
        before = routed.counts()
        for turn in range(3):
            answer = routed.ask(text + str(turn))
            assert answer.status_code == 200, answer.text
        after = routed.counts()
        gained = Counter({i: after[i] - before[i] for i in range(2)})
        assert sorted(gained.values()) == [0, 3]
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0

    # Fields that only this server has are passed on.
    full = routed.ask("Hello", attention="full").json()
    assert full["usage"]["tidaldecode"]["attention"] == "full"
    refused = routed.ask("Hello", attention="sparse")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "attention"

    # With one of them killed, the other answers. Until the router has seen it, which its checks of
    # health do each second, it may pass an error on; the official client then asks again.
    routed.servers[0].tell(signal.SIGKILL)
    routed.servers[0].code()
    client = openai.OpenAI(base_url=routed.url + "/v1", api_key="none", max_retries=5)
    for number in range(6):
        answer = client.chat.completions.create(
            model="tidal-demo", messages=[{"role": "user", "content": f"after {number}"}],
            max_tokens=4,
        )  # fmt: skip
        assert answer.usage.completion_tokens >= 1
    until(lambda: all(routed.ask(f"later {number}").status_code == 200 for number in range(4)))


def read_stream(url: str, until_text: threading.Event) -> tuple[list[str], Exception | None]:
    """The data of a long stream's events, and the error that it ended with, if with one."""
    messages = [{"role": "user", "content": "A long answer, please."}]
    body = {"messages": messages, "model": "tidal-demo", "max_tokens": 12_000, "stream": True}
    lines: list[str] = []
    try:
        with httpx.stream("POST", url, json=body | {"ignore_eos": True}, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    lines.append(line.removeprefix("data: "))
                    until_text.set()
    except httpx.HTTPError as error:
        return lines, error
    return lines, None


def test_killed_in_the_midst_of_a_stream_and_started_again(routed: Routed, demo_model: Path):
    has_begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_stream, routed.url + CHAT, has_begun)
        assert has_begun.wait(30)
        busy = [routed.stats(server)["num_decoding"] for server in routed.servers].index(1)
        routed.servers[busy].tell(signal.SIGKILL)
        routed.servers[busy].code()
        lines, error = reading.result(60)
    # What came is a beginning, and nobody can take it for an answer.
    finished = [json.loads(line)["choices"][0]["finish_reason"] for line in lines]
    assert 1 < len(lines) < 12_000 and set(finished) == {None}
    assert isinstance(error, httpx.RemoteProtocolError)

    # The other one serves what is asked next.
    other = routed.servers[1 - busy]
    before = routed.stats(other)["num_finished"]
    client = openai.OpenAI(base_url=routed.url + "/v1", api_key="none", max_retries=5)
    for number in range(3):
        answer = client.chat.completions.create(
            model="tidal-demo", messages=[{"role": "user", "content": f"next {number}"}],
            max_tokens=4,
        )  # fmt: skip
        assert answer.usage.completion_tokens >= 1
    assert routed.stats(other)["num_finished"] - before == 3

    # Started again at its old address, the first one serves when the other has gone.
    url = routed.servers[busy].url()
    with start(demo_model, url.rpartition(":")[2]) as again:
        assert again.url() == url
        other.tell(signal.SIGKILL)
        other.code()
        until(lambda: routed.ask("Is it back?").status_code == 200, 60)
        assert routed.stats(again)["num_finished"] >= 1
