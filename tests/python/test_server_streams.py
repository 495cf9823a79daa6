"""How streams are written: at once where the engine's news is read, or by the stream's own task."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")

import httpx  # noqa: E402

from serving import Served, events_of, serving  # noqa: E402
from text_folders import write_tokenizer  # noqa: E402
from tidaldecode.errors import ConfigError  # noqa: E402
from tidaldecode.server.http_protocol import OpenBody  # noqa: E402
from tidaldecode.text.tokenizer import Tokenizer  # noqa: E402
from tiny_models import TinyModel, write_checkpoint  # noqa: E402

ASK: dict[str, Any] = {"prompt": "The key is", "max_tokens": 400, "ignore_eos": True}
ASK |= {"temperature": 0, "seed": 3}


@pytest.fixture(scope="module")
def served(demo_model: Path) -> Iterator[Served]:
    with serving(demo_model) as served:
        yield served


def texts_of(events: list[str]) -> dict[int, str]:
    """The text of each choice; there is one end of each, and one of the stream, at the end."""
    assert events[-1] == "[DONE]" and events.count("[DONE]") == 1
    texts: dict[int, str] = {}
    ended = []
    for event in map(json.loads, events[:-1]):
        (choice,) = event["choices"]
        assert choice["index"] not in ended
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        ended += [choice["index"]] * (choice["finish_reason"] is not None)
    assert sorted(ended) == sorted(texts)
    return texts


def stream(served: Served, **more: Any) -> dict[int, str]:
    answer = served.post("/v1/completions", ASK | more | {"stream": True})
    assert answer.status_code == 200, answer.text
    return texts_of(events_of(answer.text))


def whole(served: Served, **more: Any) -> dict[int, str]:
    answer = served.post("/v1/completions", ASK | more).json()
    return {choice["index"]: choice["text"] for choice in answer["choices"]}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What has been written at once."""
    pieces: list[bytes] = []
    write = OpenBody.write

    def noting(body: OpenBody, piece: bytes) -> None:
        pieces.append(piece)
        write(body, piece)

    monkeypatch.setattr(OpenBody, "write", noting)
    return pieces


def test_nearly_all_events_are_written_at_once(served: Served, written: list[bytes]):
    answer = served.post("/v1/completions", ASK | {"stream": True})
    events = events_of(answer.text)
    at_once = events_of(b"".join(written).decode())
    assert set(at_once) < set(events)
    # The task has written the first tokens, perhaps, the last ones with the end, and what follows.
    assert len(at_once) >= 2 and len(events) - len(at_once) <= 5


MORE: list[dict[str, Any]] = [
    {"n": 3, "temperature": 1},
    {"stop": ["session"]},
    {"logprobs": 2},
    {"echo": True},
]


@pytest.mark.parametrize("more", MORE, ids=lambda more: next(iter(more)))
def test_a_stream_that_changes_hands_loses_nothing(
    served: Served, written: list[bytes], more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    expected = whole(served, **more)
    assert stream(served, **more) == expected and written
    # A client that is behind now and then: its events wait for the task.
    draw = random.Random(5)
    monkeypatch.setattr(OpenBody, "is_free", lambda _: draw.random() < 0.5)
    assert stream(served, **more) == expected


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_is_made_behind_a_stop_string_is_nobodys(
    served: Served, monkeypatch: pytest.MonkeyPatch, is_stream: bool
):
    """An event loop with much to do hears of many tokens at once."""
    feed = served.service.feed
    inbox = feed._inbox

    def take() -> Any:
        time.sleep(0.2)
        return inbox.take()

    slow = SimpleNamespace(take=take, add=inbox.add, remove=inbox.remove, close=inbox.close)
    stop = served.decoder.generate(ASK["prompt"], max_new_tokens=40, temperature=0).text[20:24]
    expected = served.decoder.generate(
        ASK["prompt"], max_new_tokens=400, temperature=0, stop=stop, logprobs=0
    )
    more = {"logprobs": 0, "return_token_ids": True, "stop": stop}
    more |= {"stream_options": {"include_usage": True}}
    monkeypatch.setattr(feed, "_inbox", slow)
    answer = served.post("/v1/completions", ASK | more | {"stream": is_stream})
    monkeypatch.undo()
    events = [*map(json.loads, events_of(answer.text)[:-1])] if is_stream else [answer.json()]
    choices = [choice for event in events for choice in event["choices"]]
    assert "".join(choice["text"] for choice in choices) == expected.text
    ids = [token_id for choice in choices for token_id in choice.get("token_ids", [])]
    assert ids == list(expected.token_ids)
    names = [name for c in choices for name in (c["logprobs"] or {"tokens": []})["tokens"]]
    assert len(names) == len(ids) == events[-1]["usage"]["completion_tokens"]


def test_a_client_of_http_1_0_gets_its_stream(served: Served):
    body = json.dumps(ASK | {"stream": True}).encode()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as link:
        head = "POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\n"
        link.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = b"".join(iter(lambda: link.recv(65536), b""))
    text = answer.decode()
    assert text.count("data: [DONE]") == 1
    pieces = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole(served)[0]


def test_requests_in_one_connection_follow_each_other(served: Served):
    with httpx.Client(base_url=served.url, timeout=60) as client:
        for _ in range(3):
            answer = client.post("/v1/completions", json=ASK | {"stream": True})
            assert texts_of(events_of(answer.text)) == whole(served)


def test_requests_that_are_sent_before_the_answers_come(served: Served):
    body = json.dumps(ASK | {"stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as link:
        link.sendall(request * 3)
        answer = b""
        while answer.count(b"data: [DONE]\n\n\r\n0\r\n\r\n") < 3:
            answer += link.recv(65536)
    texts = []
    for part in answer.decode().split("data: [DONE]")[:3]:
        pieces = [json.loads(line[6:]) for line in part.split("\n") if line.startswith("data: {")]
        texts.append("".join(piece["choices"][0]["text"] for piece in pieces))
    assert texts == [whole(served)[0]] * 3


# A tokenizer whose tokens are no bytes: its process is asked


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("asking")
    write_checkpoint(folder, TinyModel(family="llama", vocab_size=1200))
    write_tokenizer(folder, "llama2")
    with serving(folder, engine={"attention": "full"}) as served:
        yield served


def ids_of(row: int) -> list[int]:
    return [3 + row, 40 + row, 50]


def test_the_tokenizer_is_asked_once_for_the_streams_of_a_step(
    asking: Served, monkeypatch: pytest.MonkeyPatch
):
    body = ASK | {"prompt": [ids_of(row) for row in range(4)], "ignore_eos": True}
    expected = whole(asking, **body)
    calls = []
    ask = Tokenizer.detokenize

    def noting(tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        calls.append(len(rows))
        return ask(tokenizer, rows)

    monkeypatch.setattr(Tokenizer, "detokenize", noting)
    assert stream(asking, **body) == expected and len(expected) == 4
    assert max(calls) == 4


def test_a_token_that_breaks_the_tokenizer_ends_one_stream(
    asking: Served, monkeypatch: pytest.MonkeyPatch
):
    prompts = [ids_of(row) for row in range(4)]
    expected = [whole(asking, prompt=prompt)[0] for prompt in prompts]
    ask = Tokenizer.detokenize

    def breaks(tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if any(row["prompt"][:1] == prompts[1][:1] for row in rows):
            raise ConfigError("tokenizer: it has crashed")
        return ask(tokenizer, rows)

    monkeypatch.setattr(Tokenizer, "detokenize", breaks)
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(asking.post, "/v1/completions", ASK | {"prompt": each, "stream": True})
            for each in prompts
        ]
        events = [events_of(each.result().text) for each in asked]
    assert "it has crashed" in json.loads(events[1][-1])["error"]["message"]
    for row in (0, 2, 3):
        assert texts_of(events[row]) == {0: expected[row]}
