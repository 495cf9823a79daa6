"""What the server does not take, and what it says then: keys, sizes, types, room, time."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")

import httpx  # noqa: E402

from serving import Served, events_of, serving, until  # noqa: E402

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
LONG = {"prompt": [5, 6, 7], "max_tokens": 490, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def served(demo_model: Path) -> Iterator[Served]:
    with serving(demo_model, max_body_mb=1, header_timeout_s=1.5) as served:
        yield served


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    return error


WRONG_FIELDS = {
    "model": 5, "n": "two", "stream": "yes", "stream_options": 1, "temperature": "hot",
    "top_p": [], "top_k": 1.5, "min_p": 2, "seed": {}, "stop": 7, "stop_token_ids": ["a"],
    "min_tokens": -1, "ignore_eos": 1, "include_stop_str_in_output": "no",
    "skip_special_tokens": 0, "presence_penalty": 3, "frequency_penalty": "x",
    "repetition_penalty": 0, "no_repeat_ngram_size": -2, "logit_bias": [1], "bad_words": "x",
    "allowed_token_ids": [1.5], "prompt_logprobs": -1, "echo": "x", "priority": 2**40,
    "cache_salt": 1, "user": 1, "request_id": [], "return_token_ids": "x", "return_progress": 2,
    "attention": "sparse", "token_budget": 0, "verify": "maybe", "max_tokens": "x",
}  # fmt: skip
WRONG_CHATS = {
    "messages": "hi", "max_completion_tokens": 0, "logprobs": 3, "top_logprobs": "x",
    "add_generation_prompt": 1, "continue_final_message": "x", "chat_template_kwargs": [],
    "documents": "x",
}  # fmt: skip
WRONG_COMPLETIONS = {"prompt": {"a": 1}, "logprobs": True, "best_of": "x"}
WRONG_COMPLETIONS |= {"add_special_tokens": "x"}
CASES = [(CHAT, *case) for case in (WRONG_FIELDS | WRONG_CHATS).items()]
CASES += [(COMPLETIONS, *case) for case in (WRONG_FIELDS | WRONG_COMPLETIONS).items()]


@pytest.mark.parametrize(("route", "name", "value"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_a_field_of_the_wrong_type_is_named(served: Served, route: str, name: str, value: Any):
    body = {"messages": MESSAGES} if route == CHAT else {"prompt": "Hello"}
    response = served.post(route, body | {"max_tokens": 1} | {name: value})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"].split("[")[0].split(".")[0] == name
    assert error["type"] == "invalid_request_error" and error["code"] == "invalid_value"


TOO_MUCH: list[tuple[str, dict[str, Any], str]] = [
    ("n", {"n": 17}, "n"),
    ("n beyond all", {"n": 2**70}, "n"),
    ("stop", {"stop": ["x"] * 17}, "stop"),
    ("empty stop", {"stop": [""]}, "stop"),
    ("logprobs", {"logprobs": 21}, "logprobs"),
    ("prompt_logprobs", {"prompt_logprobs": 21}, "prompt_logprobs"),
    ("an id that is none", {"prompt": [10**6]}, "prompt"),
    ("a bias of one", {"logit_bias": {"99999": 1.0}}, "logit_bias"),
    ("a bias too large", {"logit_bias": {"5": 1000.0}}, "logit_bias"),
    ("a stop id", {"stop_token_ids": [10**6]}, "stop_token_ids"),
    ("no prompt", {"prompt": ""}, "prompt"),
    ("an empty list", {"prompt": []}, "prompt"),
    ("one of them empty", {"prompt": ["a", ""]}, "prompt[1]"),
    ("infinity", {"temperature": float("inf")}, "temperature"),
    ("a penalty that float32 lacks", {"repetition_penalty": 5e-324}, "repetition_penalty"),
    ("one that leaves no logit", {"repetition_penalty": 1e300}, "repetition_penalty"),
    ("both ways", {"attention": "full", "token_budget": 64}, "token_budget"),
    ("min over max", {"min_tokens": 9, "max_tokens": 2}, "min_tokens"),
]


@pytest.mark.parametrize(
    ("change", "param"), [c[1:] for c in TOO_MUCH], ids=[c[0] for c in TOO_MUCH]
)
def test_a_value_out_of_range_is_named(served: Served, change: dict[str, Any], param: str):
    data = json.dumps({"prompt": "Hello", "max_tokens": 2} | change).replace("Infinity", "1e999")
    headers = {"content-type": "application/json"}
    response = httpx.post(served.url + COMPLETIONS, content=data, headers=headers, timeout=30)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param


@pytest.mark.parametrize("name", ["suffix", "chat_template", "logits_processors", "prompt_embeds"])
def test_what_the_server_does_not_do_is_refused_by_name(served: Served, name: str):
    error = error_of(served.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1, name: "x"}))
    assert error["code"] == "unsupported_parameter" and error["param"] == name


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_a_budget_that_no_cache_has_is_named(served: Served, route: str):
    body = {"messages": MESSAGES, "prompt": "Hello", "max_tokens": 1, "token_budget": 2**40}
    response = served.post(route, body)
    assert response.status_code == 400
    assert error_of(response)["param"] == "token_budget"


@pytest.mark.parametrize("route", ["/server_info", "/v1/models"])
def test_a_mistake_of_the_server_has_the_form_of_errors(
    served: Served, monkeypatch: pytest.MonkeyPatch, route: str
):
    def fail(_: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(type(served.service), "model", property(fail))
    response = httpx.get(served.url + route)
    assert response.status_code == 500
    error = error_of(response)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "secret" not in response.text


def test_unknown_fields_are_ignored(served: Served):
    body = {"prompt": "a", "max_tokens": 1, "no_stop_trim": True, "separate_reasoning": {"a": 1}}
    assert served.post(COMPLETIONS, body).status_code == 200


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b'"x"', b'{"prompt": "\xff\xfe"}', b"\x00", b"[" * 100_000, b"nul"]
)
def test_a_body_that_is_no_json_object(served: Served, data: bytes):
    headers = {"content-type": "application/json"}
    response = httpx.post(served.url + COMPLETIONS, content=data, headers=headers)
    assert response.status_code == 400
    assert error_of(response)["code"] in ("invalid_json", "invalid_value")


def test_routes_methods_media(served: Served):
    assert error_of(httpx.get(served.url + "/v1/nothing"))["code"] == "route_not_found"
    response = httpx.get(served.url + CHAT)
    assert response.status_code == 405 and error_of(response)["code"] == "method_not_allowed"
    response = httpx.post(served.url + CHAT, data={"a": "b"})
    assert response.status_code == 415 and error_of(response)["code"] == "unsupported_media_type"


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large(served: Served, is_chunked: bool):
    size = 5 * 2**20
    pieces = (b"x" * 65536 for _ in range(size // 65536))
    headers = {"content-type": "application/json"}
    content: Any = pieces if is_chunked else b"x" * size
    response = httpx.post(served.url + CHAT, content=content, headers=headers, timeout=30)
    assert response.status_code == 413 and error_of(response)["code"] == "body_too_large"


def test_100_mb_that_nobody_wants(served: Served):
    pieces = (b"x" * 2**20 for _ in range(100))
    try:
        response = httpx.post(served.url + CHAT, content=pieces, timeout=30)
        assert response.status_code in (413, 415)
    except httpx.WriteError:
        pass  # the server closes the connection of who goes on sending
    assert served.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status_code == 200


def connect(served: Served) -> socket.socket:
    host, port = served.run.socket.getsockname()
    return socket.create_connection((host, port), timeout=20)


def test_a_head_of_a_megabyte(served: Served):
    with connect(served) as client:
        try:
            client.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\nx-large: " + b"a" * 2**20)
        except (BrokenPipeError, ConnectionResetError):
            return
        try:
            assert b" 431 " in client.recv(4096)
        except ConnectionResetError:
            pass


def test_heads_that_take_for_ever(served: Served):
    clients = [connect(served) for _ in range(20)]
    for client in clients:
        client.sendall(b"GET /live HTTP/1.1\r\nx-slow: ")
    began = time.monotonic()
    for client in clients:
        client.sendall(b"a")
        assert b" 408 " in client.recv(4096)
        with suppress(ConnectionResetError):  # the last byte came too late to be read
            assert client.recv(10) == b""
        client.close()
    assert time.monotonic() - began < 15


def test_a_body_that_takes_for_ever(served: Served):
    with connect(served) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        client.sendall(head.encode() + b"content-length: 100\r\n\r\n{")
        assert b" 408 " in client.recv(4096)


def test_a_socket_closed_on_one_side_holds_nothing(served: Served):
    body = json.dumps(LONG | {"stream": True}).encode()
    for _ in range(5):
        with connect(served) as client:
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
    until(served.is_idle)


def test_what_is_no_http(served: Served):
    with connect(served) as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64))
        assert b" 400 " in client.recv(4096)


def test_a_client_that_leaves_is_noticed(served: Served):
    gone = served.service.metrics._num_gone
    with httpx.stream("POST", served.url + COMPLETIONS, json=LONG | {"stream": True}) as response:
        next(response.iter_lines())
    until(served.is_idle)
    assert served.service.metrics._num_gone == gone + 1
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(served.url + COMPLETIONS, json=LONG | {"n": 4}, timeout=0.05)
    until(served.is_idle)
    assert served.service.metrics._num_gone == gone + 2


def test_keys(demo_model: Path):
    with serving(demo_model, api_keys=("first", "second")) as served:
        for route in ("/live", "/health"):
            assert httpx.get(served.url + route).status_code == 200
        for route in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing", "/"):
            response = httpx.get(served.url + route)
            assert response.status_code == 401, route
            assert error_of(response)["code"] == "invalid_api_key"
        right = [{"authorization": "Bearer first"}, {"x-api-key": "second"}]
        wrong = [{"authorization": "Bearer third"}, {"authorization": "first"}, {"x-api-key": ""}]
        for headers in right:
            assert httpx.get(served.url + "/v1/models", headers=headers).status_code == 200
        for headers in wrong:
            assert httpx.get(served.url + "/v1/models", headers=headers).status_code == 401


def cached_tokens(served: Served, body: dict[str, Any], key: str) -> int:
    headers = {"authorization": f"Bearer {key}"}
    usage = served.post(COMPLETIONS, body, headers=headers).json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"]


def test_keys_share_no_pages(demo_model: Path):
    body = {"prompt": list(range(10, 110)), "max_tokens": 1}
    with serving(demo_model, api_keys=("first", "second")) as served:
        assert [cached_tokens(served, body, "first") for _ in range(2)] == [0, 96]
        assert cached_tokens(served, body, "second") == 0
        salted = body | {"cache_salt": "own"}
        assert [cached_tokens(served, salted, "first") for _ in range(2)] == [0, 96]
    keys = ("first", "second")
    with serving(demo_model, api_keys=keys, prefix_cache_scope="shared") as served:
        assert [cached_tokens(served, body, key) for key in keys] == [0, 96]


def test_a_full_queue(demo_model: Path):
    engine = {"max_batch_size": 1, "max_seq_len": 16384}
    with serving(demo_model, engine=engine, max_queued_requests=2) as served:
        url, body = served.url + COMPLETIONS, LONG | {"stream": True, "max_tokens": 16000}
        with httpx.stream("POST", url, json=body) as first:
            until(lambda: served.decoder.stats()["num_decoding"] == 1)
            with (
                httpx.stream("POST", url, json=body) as second,
                httpx.stream("POST", url, json=body) as third,
            ):
                until(lambda: served.decoder.stats()["num_waiting"] == 2)
                response = served.post(COMPLETIONS, LONG)
                assert response.status_code == 503
                assert error_of(response)["type"] == "overloaded_error"
                assert 1 <= int(response.headers["retry-after"]) <= 120
                assert {r.status_code for r in (first, second, third)} == {200}
        until(served.is_idle)
        assert b'reason="queue_full"} 1.0' in httpx.get(served.url + "/metrics").content


def test_ten_thousand_in_line(demo_model: Path):
    """A full line slows nobody who is served, and is gone as soon as its clients are."""
    engine = {"max_batch_size": 2, "max_seq_len": 64, "page_size": 16}
    with serving(demo_model, engine=engine, max_queued_requests=10_000) as served:
        prompts = [[5, 6, 7 + i] for i in range(250)]
        body = {"prompt": prompts, "max_tokens": 40, "ignore_eos": True, "stream": True}
        with ExitStack() as stack:
            client = stack.enter_context(httpx.Client(timeout=60, limits=httpx.Limits()))
            for _ in range(40):
                streams = client.stream("POST", served.url + COMPLETIONS, json=body)
                assert stack.enter_context(streams).status_code == 200
            until(lambda: served.decoder.stats()["num_waiting"] > 5_000)
            assert served.decoder.stats()["num_finished"] < 5_000
            began = time.monotonic()
            assert httpx.get(served.url + "/health").status_code == 200
            assert time.monotonic() - began < 5
        until(served.is_idle, 60)
        assert served.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_line_with_too_many_tokens(demo_model: Path):
    engine = {"max_batch_size": 1, "max_seq_len": 16384}
    with serving(demo_model, engine=engine, max_queued_tokens=150) as served:
        url, body = served.url + COMPLETIONS, LONG | {"stream": True, "max_tokens": 16000}
        prompt = list(range(10, 110))
        with httpx.stream("POST", url, json=body):
            until(lambda: served.decoder.stats()["num_decoding"] == 1)
            with httpx.stream("POST", url, json=body | {"prompt": prompt, "max_tokens": 9}):
                until(lambda: served.decoder.stats()["num_waiting"] == 1)
                response = served.post(COMPLETIONS, {"prompt": prompt})
                assert response.status_code == 503
                assert error_of(response)["code"] == "queue_full"


def test_an_answer_that_takes_too_long(demo_model: Path):
    with serving(demo_model, request_timeout_s=0.3, engine={"max_seq_len": 8192}) as served:
        body = LONG | {"max_tokens": 8000}
        response = served.post(COMPLETIONS, body)
        assert response.status_code == 408 and error_of(response)["code"] == "request_timeout"
        events = events_of(served.post(COMPLETIONS, body | {"stream": True}).text)
        assert json.loads(events[-1])["error"]["code"] == "request_timeout"


def test_a_client_that_does_not_read_is_waited_for(demo_model: Path):
    engine = {"max_seq_len": 16384, "max_batch_size": 1}
    with serving(demo_model, engine=engine, sse_keep_alive_s=0, step_timeout_s=1) as served:
        body = LONG | {"max_tokens": 16000, "stream": True, "logprobs": 20}
        data = json.dumps(body).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(served.run.socket.getsockname())
            client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data)
            until(lambda: served.decoder.stats()["num_unread"] == 1, 30)
            time.sleep(1.5)  # longer than a pass may take
            made = served.decoder.stats()["generated_tokens"]
            assert 256 < made < 16000
            # It stands, and gives up the only row to whoever comes.
            other = served.post(COMPLETIONS, {"prompt": "A", "max_tokens": 5, "ignore_eos": True})
            assert other.json()["usage"]["completion_tokens"] == 5
            assert served.decoder.stats()["generated_tokens"] == made + 5
            assert served.service.state == "ready"
            # It goes on when it is read.
            while served.decoder.stats()["generated_tokens"] < made + 1000:
                assert client.recv(1 << 20)
        until(served.is_idle)


def test_a_client_that_never_reads_is_dropped(demo_model: Path):
    settings: dict[str, Any] = {"slow_client_timeout_s": 0.5, "sse_keep_alive_s": 0}
    with serving(demo_model, engine={"max_seq_len": 16384}, **settings) as served:
        body = LONG | {"max_tokens": 16000, "stream": True, "logprobs": 20}
        data = json.dumps(body).encode()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(served.run.socket.getsockname())
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data)
        until(lambda: served.service.metrics._num_slow == 1, 30)
        until(served.is_idle)
        client.close()
