"""`serve --ray`: replicas on a local Ray cluster behind one address."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")

import httpx  # noqa: E402

from serving import Command, events_of, until  # noqa: E402
from tidaldecode import Decoder  # noqa: E402

pytestmark = [
    pytest.mark.conformance,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs tidaldecode[ray]"),
]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPTS = ["The sky over the harbour was", "Configuration files are", [5, 6, 7, 8], "A", "The tide"]
GREEDY = {"temperature": 0, "ignore_eos": True}


def processes_of(parent: int) -> dict[int, str]:
    """The command lines of a process' children, and theirs."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text()
            names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        state, its_parent = status.rpartition(") ")[2].split()[:2]
        if state != "Z":
            parents[int(folder.name)] = int(its_parent)
    found, last = {parent}, set()
    while found != last:
        last = set(found)
        found |= {number for number, its in parents.items() if its in found}
    return {number: names[number] for number in found - {parent}}


class Served:
    """The command, and a client of it."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.client = httpx.Client(base_url=command.url(), timeout=60)

    def complete(self, prompt: Any, tokens: int = 8, **more: Any) -> httpx.Response:
        return self.client.post(
            COMPLETIONS, json={"prompt": prompt, "max_tokens": tokens} | GREEDY | more
        )

    def chat(self, messages: list[dict[str, str]], **more: Any) -> httpx.Response:
        body = {"messages": messages, "max_tokens": 6} | GREEDY | more
        answer = self.client.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
        return answer

    def metric(self, name: str) -> dict[str, float]:
        """A metric of each replica."""
        text = self.client.get("/metrics").raise_for_status().text
        lines = re.findall(rf'^tidaldecode:{name}{{.*replica="(\w+)".*}} (\S+)$', text, re.M)
        return {replica: float(value) for replica, value in lines}

    def running(self) -> dict[str, float]:
        return self.metric("num_requests_running")

    def replica_processes(self) -> list[int]:
        found = processes_of(self.command.process.pid)
        return [number for number, name in found.items() if name.startswith("ray::ServeReplica")]


@contextmanager
def replicas(
    folder: Path, count: int, *, end_by: int, options: tuple[str, ...] = (), code: int = 0
) -> Iterator:
    """Serves for the length of a block; nothing of it must be left over."""
    small = ("--port", "0", "--max-seq-len", "1024", "--max-batch-size", "8", "--num-threads", "1")
    with Command(str(folder), "--ray", str(count), *small, *options) as command:
        served = Served(command)
        started = processes_of(command.process.pid)
        raylet = next(number for number, name in started.items() if "raylet/raylet " in name)
        assert b"RAY_AUTH_MODE=token\0" in Path(f"/proc/{raylet}/environ").read_bytes()
        folders = set(re.findall(r"/\S+/tidal-ray-\w+", " ".join(started.values())))
        assert len(folders) == 1
        try:
            yield served
            started |= processes_of(command.process.pid)
        finally:
            command.tell(end_by)
            ended_with = command.code()
            served.client.close()
        assert ended_with == code, "".join(command.lines)
        until(lambda: all(is_zombie(number) for number in started), 60)
        assert not Path(folders.pop()).exists()


def is_zombie(number: int) -> bool:
    """Whether a process has ended, and perhaps nobody has taken note of it."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def text_of_stream(text: str) -> str:
    events = events_of(text)
    assert events[-1] == "[DONE]", text[-500:]
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    return "".join(choice["text"] for choice in choices)


def test_answers_prefixes_errors_and_clients_that_go(demo_model: Path):
    with Decoder(demo_model, device="cpu", num_threads=1, max_seq_len=1024) as decoder:
        expected = [
            decoder.generate(prompt, max_new_tokens=8, temperature=0, ignore_eos=True)
            for prompt in PROMPTS
        ]
    options = ("--api-key", "k", "--max-body-mb", "1", "--served-model-name", "demo")
    with replicas(demo_model, 2, end_by=signal.SIGTERM, options=options) as served:
        assert served.client.get("/health").json() == {"status": "ready"}
        assert served.client.get("/live").json() == {"status": "live"}
        refused = served.complete("a")
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        served.client.headers["authorization"] = "Bearer k"

        # The answers are those of a decoder, whole and streamed, from whichever replica.
        used = set()
        for prompt, result in zip(PROMPTS, expected, strict=True):
            for _ in range(2):
                answer = served.complete(prompt)
                assert answer.json()["choices"][0]["text"] == result.text
                used.add(answer.headers["x-replica"])
            streamed = served.complete(prompt, stream=True)
            assert streamed.headers["content-type"].startswith("text/event-stream")
            assert text_of_stream(streamed.text) == result.text
        assert used == served.running().keys() and len(used) == 2

        check_conversations(served)
        check_refusals(served)
        check_pieces(served)
        check_clients_that_go(served)


def check_conversations(served: Served) -> None:
    """Each stays with the replica that has its beginning; new ones are spread."""
    places = []
    for number in range(4):
        messages = [{"role": "user", "content": f"{number} " + "The harbour was grey. " * 12}]
        first = served.chat(messages)
        said = first.json()["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And?"}]
        second = served.chat(messages)
        assert second.headers["x-replica"] == first.headers["x-replica"]
        assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64
        places.append(first.headers["x-replica"])
    assert sorted(places.count(place) for place in set(places)) == [2, 2]


def check_refusals(served: Served) -> None:
    """The single server's, in its words."""
    cases = [
        (served.complete("a", attention="sparse"), 400, "invalid_value"),
        (served.complete("a", model="other"), 404, "model_not_found"),
        (served.complete("a" * 2**20), 413, "body_too_large"),
        (served.client.get("/nothing?a=b%20c"), 404, "route_not_found"),
        (served.client.post("/live"), 405, "method_not_allowed"),
    ]
    for answer, status, code in cases:
        assert answer.status_code == status and answer.json()["error"]["code"] == code
    message = {"model": "demo", "max_tokens": 2, "messages": "x"}
    refused = served.client.post("/v1/messages", json=message)
    assert refused.status_code == 400 and refused.json()["type"] == "error"
    asked = {"prompt": "a", "model": "demo", "max_tokens": 2, "attention": "full"}
    usage = served.client.post(COMPLETIONS, json=asked).json()["usage"]
    assert usage["tidaldecode"]["attention"] == "full"


def check_pieces(served: Served) -> None:
    """A stream comes as it is made, not at its end."""
    body = {"prompt": "a", "max_tokens": 400, "stream": True} | GREEDY
    began, times = time.monotonic(), []
    with served.client.stream("POST", COMPLETIONS, json=body) as answer:
        for _ in answer.iter_bytes():
            times.append(time.monotonic() - began)
    assert len(times) > 20
    assert times[0] < times[-1] / 4


def check_clients_that_go(served: Served) -> None:
    """Their work ends, whole answers' as well as streams'."""
    gone = served.metric("clients_gone_total")
    for is_stream in (True, False):
        body = {"prompt": "a", "max_tokens": 1000, "stream": is_stream} | GREEDY
        with (
            httpx.Client(base_url=served.client.base_url, headers=served.client.headers) as leaver,
            pytest.raises(httpx.ReadTimeout),
            leaver.stream("POST", COMPLETIONS, json=body, timeout=0.2) as answer,
        ):
            for _ in answer.iter_bytes():
                time.sleep(0.3)  # slower than the answer
                raise httpx.ReadTimeout("enough")
        until(lambda: sum(served.running().values()) == 0)
    assert sum(served.metric("clients_gone_total").values()) == sum(gone.values()) + 2


class Asking(threading.Thread):
    """Asks without end, and notes whatever is not a whole answer."""

    def __init__(self, url: str, number: int) -> None:
        super().__init__()
        self.failures: list[str] = []
        self.places: list[str] = []
        self._url = url
        self._number = number
        self._ends = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._ends.is_set():
                is_stream = len(self.places) % 2 == 0
                prompt = f"{self._number} {len(self.places)}"
                body = {"prompt": prompt, "max_tokens": 40, "stream": is_stream} | GREEDY
                try:
                    answer = client.post(COMPLETIONS, json=body)
                    is_whole = answer.status_code == 200 and (
                        answer.text.endswith("data: [DONE]\n\n")
                        if is_stream
                        else answer.json()["usage"]["completion_tokens"] == 40
                    )
                    if not is_whole:
                        self.failures.append(answer.text[-300:])
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                self.places.append(answer.headers.get("x-replica", ""))

    def end(self) -> None:
        self._ends.set()
        self.join(60)


def test_scales_and_is_killed_without_a_failed_request(demo_model: Path):
    with replicas(demo_model, 1, end_by=signal.SIGINT) as served:
        asking = [Asking(str(served.client.base_url), number) for number in range(3)]
        for each in asking:
            each.start()
        try:
            check_scaling(served)
        finally:
            for each in asking:
                each.end()
        assert [each.failures for each in asking] == [[], [], []]
        assert sum(len(each.places) for each in asking) > 30
        assert len({place for each in asking for place in each.places}) == 2
        check_killing(served)


def check_scaling(served: Served) -> None:
    """From one replica to two and back; answers that are under way then are finished."""
    command = served.command
    command.tell(signal.SIGTTIN)
    until(lambda: len(served.running()) == 2, 60)
    time.sleep(3)
    long = [Long(served, number) for number in range(6)]  # three others are asked for all the time
    for each in long:
        each.start()
    until(lambda: all(each.has_begun for each in long))
    command.tell(signal.SIGTTOU)
    until(lambda: len(served.running()) == 1, 60)
    for each in long:
        each.join(120)
        assert each.text.endswith("data: [DONE]\n\n"), each.text[-300:]
        assert each.text.count('"finish_reason":"length"') == 1
    assert len({each.place for each in long}) == 2, "none was under way on the one that ended"
    until(lambda: len(served.replica_processes()) == 1, 60)
    command.tell(signal.SIGTTOU)  # there is always one
    until(lambda: "note: server: replicas stay: 1\n" in command.lines)
    time.sleep(1)


class Long(threading.Thread):
    """A stream that takes a while."""

    def __init__(self, served: Served, number: int) -> None:
        super().__init__()
        self.has_begun = False
        self.text = ""
        self.place = ""
        self._url = str(served.client.base_url)
        self._number = number

    def run(self) -> None:
        body = {"prompt": f"long {self._number}", "max_tokens": 900, "stream": True} | GREEDY
        with httpx.stream("POST", self._url + COMPLETIONS, json=body, timeout=60) as answer:
            self.place = answer.headers["x-replica"]
            for piece in answer.iter_text():
                self.text += piece
                self.has_begun = True


def check_killing(served: Served) -> None:
    """A replica that is killed is missed by nobody but its streams, which are told."""
    served.command.tell(signal.SIGTTIN)
    until(lambda: len(served.running()) == 2, 60)
    long = [Long(served, number) for number in (10, 11)]  # new ones: one for each replica
    for each in long:
        each.start()
    whole: list[httpx.Response] = []
    waits = [
        threading.Thread(target=lambda n=number: whole.append(served.complete(f"w {n}", 900)))
        for number in range(2)
    ]
    for thread in waits:
        thread.start()
    until(lambda: list(served.running().values()) == [2, 2] and all(e.has_begun for e in long))
    before = served.replica_processes()
    os.kill(before[0], signal.SIGKILL)
    for number in range(10):
        answer = served.complete(f"after {number}")
        assert answer.status_code == 200, answer.text
    for thread in [*long, *waits]:
        thread.join(120)
    # What had not begun to be answered is answered by the other one.
    assert [each.status_code for each in whole] == [200, 200]
    assert all(each.json()["usage"]["completion_tokens"] == 900 for each in whole)
    ends = sorted(events_of(each.text)[-1] for each in long)
    assert ends[0] == "[DONE]" and '"code":"replica_gone"' in ends[1]
    # Ray starts another one in its place.
    until(lambda: len(set(served.replica_processes()) - set(before)) == 1, 60)
    until(lambda: len(served.running()) == 2, 60)


def test_the_end_of_ray_is_the_end(demo_model: Path):
    with replicas(demo_model, 1, end_by=0, code=70) as served:
        found = processes_of(served.command.process.pid)
        stream = Long(served, 0)
        stream.start()
        until(lambda: stream.has_begun)
        os.kill(
            next(number for number, name in found.items() if "raylet/raylet " in name),
            signal.SIGKILL,
        )
        stream.join(20)
        assert '"error"' in events_of(stream.text)[-1]
        served.command.code(30)
    assert "note: server: ray: raylet has ended\n" in served.command.lines
