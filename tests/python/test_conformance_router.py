"""vllm-router in front of two servers: prefixes stay where they are, and one may be killed."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
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
        answers = [httpx.get(server.url() + "/server_info").json() for server in self.servers]
        return [answer["stats"]["num_finished"] for answer in answers]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_up(url: str) -> bool:
    try:
        return httpx.get(url + "/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def routed(demo_model: Path, tmp_path: Path) -> Iterator[Routed]:
    with ExitStack() as stack:
        arguments = (str(demo_model), "--port", "0", "--max-seq-len", "1024")
        servers = [stack.enter_context(Command(*arguments)) for _ in range(2)]
        urls = [server.url() for server in servers]
        port = free_port()
        assert PROGRAM is not None
        command = [PROGRAM, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls]
        command += ["--policy", "cache_aware", "--prometheus-port", str(free_port())]
        command += ["--health-check-interval-secs", "1", "--balance-abs-threshold", "64"]
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
