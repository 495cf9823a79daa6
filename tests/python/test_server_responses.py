"""/v1/responses as the official OpenAI client sees it, on the packaged demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")
openai = pytest.importorskip("openai", reason="needs the openai client")

from serving import Served, serving  # noqa: E402
from tidaldecode.server.completions import Completion  # noqa: E402
from tidaldecode.server.messages import MessageAnswer  # noqa: E402
from tidaldecode.server.responses import ResponseAnswer  # noqa: E402

ROUTE = "/v1/responses"
QUESTION = "Tell me about the harbour."
USER = {"role": "user", "content": QUESTION}


@pytest.fixture(scope="module")
def served(demo_model: Path) -> Iterator[Served]:
    with serving(demo_model) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    fields = {"model": "tidal-demo", "input": QUESTION, "max_output_tokens": 12, "temperature": 0}
    return client.responses.create(**fields | {"extra_body": {"ignore_eos": True}} | more)


def alone(served: Served, *messages: dict[str, Any]) -> Any:
    options = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    return served.decoder.chat(list(messages), **options)


def test_a_response_is_what_the_decoder_says(client: openai.OpenAI, served: Served):
    answer, expected = ask(client, metadata={"a": "b"}), alone(served, USER)
    assert answer.output_text == expected.text
    assert [item.type for item in answer.output] == ["message"]
    assert answer.object == "response" and answer.store is False and answer.metadata == {"a": "b"}
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens) == (expected.prompt_tokens, 12)
    assert usage.total_tokens == expected.prompt_tokens + 12


def test_a_response_that_ends_by_itself_is_completed(client: openai.OpenAI, served: Served):
    token = alone(served, USER).token_ids[3]
    answer = ask(client, extra_body={"ignore_eos": True, "stop_token_ids": [token]})
    assert answer.status == "completed" and answer.incomplete_details is None


def test_instructions_and_items(client: openai.OpenAI, served: Served):
    turns = [USER, {"role": "assistant", "content": "It is old."}, {"role": "user", "content": "?"}]
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {"type": "message", "role": "assistant", "status": "completed", "id": "msg_1",
         "content": [{"type": "output_text", "text": "It is old.", "annotations": []}]},
        {"role": "user", "content": "?"},
    ]  # fmt: skip
    expected = alone(served, {"role": "system", "content": "Be brief."}, *turns)
    assert ask(client, input=items, instructions="Be brief.").output_text == expected.text
    developer = {"role": "developer", "content": "Be brief."}
    assert ask(client, input=[developer, *items]).output_text == expected.text


def test_a_stream_has_typed_events(client: openai.OpenAI, served: Served):
    events = list(ask(client, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas >= 1  # a busy loop hears several tokens at once
    assert kinds == (
        ["created", "in_progress", "output_item.added", "content_part.added"]
        + ["output_text.delta"] * deltas
        + ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    expected = alone(served, USER)
    text = "".join(event.delta for event in events if event.type.endswith("text.delta"))
    assert text == expected.text == events[-1].response.output_text
    assert events[-1].response.usage.input_tokens == expected.prompt_tokens


def test_the_clients_own_stream_helper(client: openai.OpenAI, served: Served):
    tokens = alone(served, USER).token_ids
    token = tokens[3]
    with client.responses.stream(
        model="tidal-demo", input=QUESTION, temperature=0,
        extra_body={"ignore_eos": True, "stop_token_ids": [token]},
    ) as stream:  # fmt: skip
        final = stream.get_final_response()
    assert final.status == "completed" and final.output_text
    assert final.usage.output_tokens == tokens.index(token) + 1


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"store": True}, "store", "unsupported_parameter"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
    ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
    ({"background": True}, "background", "unsupported_parameter"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "unsupported_parameter"),
    ({"tools": [{"type": "function", "name": "f"}]}, "tools", "unsupported_parameter"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]", "invalid_value"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0]", "invalid_value"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "unsupported_parameter"),
    ({"include": ["message.output_text.logprobs"]}, "include", "unsupported_parameter"),
    ({"top_logprobs": 2}, "top_logprobs", "unsupported_parameter"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
    ({"text": {"format": {"type": "json_schema", "schema": 3}}}, "text.format.schema",
     "invalid_value"),
    ({"truncation": "auto"}, "truncation", "invalid_value"),
    ({"input": []}, "input", "invalid_value"),
    ({"input": 5}, "input", "invalid_value"),
    ({"input": None}, "input", "invalid_value"),
    ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role", "invalid_value"),
    ({"input": [{"role": "user"}]}, "input[0].content", "invalid_value"),
    ({"input": [{"type": "item_reference"}]}, "input[0]", "unsupported_parameter"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
     "input[0].content[0]", "unsupported_parameter"),
    ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ({"max_output_tokens": 10**6}, "max_output_tokens", "context_length_exceeded"),
    ({"top_p": 7}, "top_p", "invalid_value"),
    ({"token_budget": 2**40}, "token_budget", "unsupported_parameter"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "param", "code"), REFUSED, ids=[f"{next(iter(c[0]))}-{c[1]}" for c in REFUSED]
)
def test_what_is_refused_is_named(served: Served, change: dict[str, Any], param: str, code: str):
    response = served.post(ROUTE, {"input": "Hello", "max_output_tokens": 2} | change)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)


def test_what_asks_for_nothing_is_taken(served: Served):
    body = {"input": "Hello", "max_output_tokens": 1, "store": False, "tools": [], "include": []}
    body |= {"tool_choice": "auto", "text": {"format": {"type": "text"}}, "truncation": "disabled"}
    body |= {"previous_response_id": None, "background": False, "unknown": 1}
    assert served.post(ROUTE, body).status_code == 200
    body["include"] = ["reasoning.encrypted_content"]  # as Codex says it
    assert served.post(ROUTE, body).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_integers_of_any_size_come_back(served: Served, stream: bool):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 2**70}}}
    body = {"input": "Hello", "max_output_tokens": 1, "stream": stream, "tool_choice": "none"}
    body["tools"] = [{"type": "function", "name": "now", "parameters": schema}]
    answer = served.post(ROUTE, body)
    assert answer.status_code == 200 and str(2**70) in answer.text
    assert not stream or "response.incomplete" in answer.text


def test_a_stream_that_fails_before_its_first_token(demo_model: Path):
    engine = {"max_batch_size": 1, "max_seq_len": 16384}
    with serving(demo_model, engine=engine, request_timeout_s=0.5) as served:
        client = openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)
        with served.decoder.stream([5, 6, 7], max_new_tokens=16000, ignore_eos=True) as holds:
            next(holds)
            with client.responses.stream(model="tidal-demo", input="Hello") as stream:
                events = list(stream)
        kinds = [event.type.removeprefix("response.") for event in events]
        assert kinds == ["created", "in_progress", "failed"]
        assert events[-1].response.error.message.startswith("the answer took over")


@pytest.mark.parametrize(
    ("route", "asked"),
    [(ROUTE, {"input": "Hello"}), ("/v1/messages", {"messages": [USER]}),
     ("/v1/completions", {"prompt": "Hello"})],
)  # fmt: skip
def test_a_mistake_in_a_stream_is_an_event(
    served: Served, monkeypatch: pytest.MonkeyPatch, route: str, asked: dict[str, Any]
):
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(ResponseAnswer, "account", fail)
    monkeypatch.setattr(MessageAnswer, "account", fail)
    monkeypatch.setattr(Completion, "account", fail)
    text = served.post(route, asked | {"max_tokens": 2, "stream": True}).text
    last = json.loads(text.strip().rpartition("data: ")[2])
    error = last["response"]["error"] if route == ROUTE else last["error"]
    assert error["message"].startswith("the server has made a mistake") and "secret" not in text


def test_errors_are_the_clients_own(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError):
        ask(client, model="other")
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, store=True)
    assert refused.value.param == "store"
