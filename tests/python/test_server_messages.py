"""/v1/messages as the official Anthropic client sees it, on the packaged demo model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")
anthropic = pytest.importorskip("anthropic", reason="needs the anthropic client")

import httpx  # noqa: E402

from serving import Served, serving, until  # noqa: E402

ROUTE = "/v1/messages"
USER = {"role": "user", "content": "What is the harbour like?"}
# The client has no argument for the temperature any more; servers still have the field.
GREEDY: dict[str, Any] = {"extra_body": {"ignore_eos": True, "temperature": 0}}


@pytest.fixture(scope="module")
def served(demo_model: Path) -> Iterator[Served]:
    with serving(demo_model) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


def ask(client: anthropic.Anthropic, *messages: dict[str, Any], **more: Any) -> Any:
    fields = {"model": "tidal-demo", "max_tokens": 12, "messages": list(messages)}
    return client.messages.create(**fields | GREEDY | more)


def alone(served: Served, *messages: dict[str, Any], **more: Any) -> Any:
    options = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    return served.decoder.chat(list(messages), **options | more)


def test_a_message_is_what_the_decoder_says(client: anthropic.Anthropic, served: Served):
    answer = ask(client, USER)
    expected = alone(served, USER)
    assert [(block.type, block.text) for block in answer.content] == [("text", expected.text)]
    assert (answer.role, answer.type, answer.model) == ("assistant", "message", "tidal-demo")
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == expected.prompt_tokens
    assert usage.output_tokens == 12


@pytest.mark.parametrize("system", ["Be brief.", [{"type": "text", "text": "Be brief."}]])
def test_system_comes_first(client: anthropic.Anthropic, served: Served, system: Any):
    counted = client.messages.count_tokens(model="tidal-demo", system=system, messages=[USER])
    answer = ask(client, USER, system=system)
    expected = alone(served, {"role": "system", "content": "Be brief."}, USER)
    assert answer.content[0].text == expected.text
    assert counted.input_tokens == expected.prompt_tokens


def test_blocks_of_text_are_one_text(client: anthropic.Anthropic, served: Served):
    parts = ["What is the", " harbour like?"]
    blocks = [
        {"type": "text", "text": part, "cache_control": {"type": "ephemeral"}} for part in parts
    ]
    assert (
        ask(client, {"role": "user", "content": blocks}).content[0].text == alone(served, USER).text
    )


def test_an_answer_goes_on_with_its_beginning(client: anthropic.Anthropic, served: Served):
    begun = {"role": "assistant", "content": "The harbour"}
    expected = alone(served, USER, begun, continue_final_message=True, add_generation_prompt=False)
    assert ask(client, USER, begun).content[0].text == expected.text


def test_a_stop_sequence_is_named(client: anthropic.Anthropic, served: Served):
    text = alone(served, USER).text
    stop = text[-8:-2]
    assert text.index(stop) > 0
    answer = ask(client, USER, stop_sequences=["never to be seen", stop])
    assert answer.content[0].text == text[: text.index(stop)]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)


def test_an_end_of_the_models_own(client: anthropic.Anthropic, served: Served):
    token = alone(served, USER).token_ids[3]
    answer = ask(client, USER, extra_body=GREEDY["extra_body"] | {"stop_token_ids": [token]})
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)


def test_a_stream_is_the_message(client: anthropic.Anthropic, served: Served):
    events = list(ask(client, USER, stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[1] == "content_block_start"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) <= {"ping", "content_block_delta"}
    assert kinds.count("content_block_delta") >= 1
    fields = {"model": "tidal-demo", "max_tokens": 12, "messages": [USER]}
    with client.messages.stream(**fields, **GREEDY) as stream:
        final = stream.get_final_message()
    expected = alone(served, USER)
    assert final.content[0].text == expected.text and final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 12
    read = final.usage.input_tokens + final.usage.cache_read_input_tokens
    assert read == expected.prompt_tokens


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no max_tokens", {"max_tokens": None}, "max_tokens"),
    ("none to make", {"max_tokens": 0}, "max_tokens"),
    ("calls at the end", {"messages": [USER, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]}, "messages[1].content: got"),
    ("too many", {"max_tokens": 10**6}, "max_tokens: got 1000000, expected at most "),
    ("no messages", {"messages": []}, "messages"),
    ("a role", {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ("an image", {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
     "messages[0].content[0]: got a block of type 'image'"),
    ("no text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "messages[0].content[0]"),
    ("system", {"system": 5}, "system"),
    ("many stops", {"stop_sequences": ["x"] * 17}, "stop_sequences: got 17"),
    ("an empty stop", {"stop_sequences": [""]}, "stop_sequences"),
    ("a stop", {"stop_sequences": "x"}, "stop_sequences"),
    ("top_p", {"top_p": 7}, "top_p"),
    ("tools", {"tools": [{"name": "f", "input_schema": {}}]}, "tools: this model's chat"),
    ("a tool of theirs", {"tools": [{"name": "f", "type": "bash_20250124"}]},
     "tools[0]: got a tool of type 'bash_20250124'"),
    ("tool_choice", {"tool_choice": {"type": "any"}}, "tool_choice: got 'required'"),
    ("thinking", {"thinking": {"type": "enabled", "budget_tokens": 1024}},
     "thinking: this model's chat template"),
    ("output_config", {"output_config": {"format": {"type": "xml"}}},
     "output_config.format: got type 'xml'"),
    ("a schema", {"output_config": {"format": {"type": "json_schema", "schema": 3}}},
     "output_config.format.schema: "),
    ("a call without its name", {"messages": [{"role": "assistant", "content": [
        {"type": "tool_use", "id": "1"}]}]}, "messages[0].content[0]: got"),
    ("a result of nothing", {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "a"}, {"type": "tool_result"}]}]}, "messages[0].content[1]: got"),
    ("attention", {"attention": "sparse"}, "attention"),
    ("token_budget", {"token_budget": 2**40}, "token_budget: got"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_is_refused_is_named(served: Served, change: dict[str, Any], said: str):
    body = {"model": "tidal-demo", "max_tokens": 2, "messages": [USER]} | change
    response = served.post(ROUTE, {name: v for name, v in body.items() if v is not None})
    assert response.status_code == 400, response.text
    answer = response.json()
    assert answer.keys() == {"type", "error"} and answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"].startswith(said)


def test_what_asks_for_nothing_is_taken(served: Served):
    body = {"max_tokens": 1, "messages": [USER], "tools": [], "tool_choice": {"type": "auto"}}
    body |= {"thinking": {"type": "disabled"}, "metadata": {"user_id": "a"}, "unknown": 1}
    body |= {"mcp_servers": [], "container": None}
    assert served.post(ROUTE, body).status_code == 200


def test_integers_of_any_size_are_taken(served: Served):
    call = {"type": "tool_use", "id": "1", "name": "now", "input": {"n": 2**70}}
    turns = [USER, {"role": "assistant", "content": [{"type": "text", "text": "A"}, call]}, USER]
    assert served.post(ROUTE, {"messages": turns, "max_tokens": 1}).status_code == 200


def test_errors_are_the_clients_own(client: anthropic.Anthropic, served: Served):
    with pytest.raises(anthropic.NotFoundError) as missing:
        ask(client, USER, model="other")
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError):
        ask(client, USER, extra_body={"top_p": 7})
    for route in (ROUTE, ROUTE + "/nothing"):
        wrong = served.post(route, [1]).json()
        assert wrong["type"] == "error"


def test_keys(demo_model: Path):
    with serving(demo_model, api_keys=("sesame",)) as served:
        for key in ("wrong", "sesame"):
            client = anthropic.Anthropic(base_url=served.url, api_key=key, max_retries=0)
            if key == "sesame":
                assert ask(client, USER).usage.output_tokens == 12
                continue
            with pytest.raises(anthropic.AuthenticationError) as refused:
                ask(client, USER)
            assert refused.value.body["error"]["type"] == "authentication_error"


def test_a_full_queue_is_529(demo_model: Path):
    long = {"prompt": [5, 6, 7], "max_tokens": 16000, "ignore_eos": True, "stream": True}
    engine = {"max_batch_size": 1, "max_seq_len": 16384}
    with serving(demo_model, engine=engine, max_queued_requests=1) as served:
        url = served.url + "/v1/completions"
        client = anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)
        with httpx.stream("POST", url, json=long):
            until(lambda: served.decoder.stats()["num_decoding"] == 1)
            with httpx.stream("POST", url, json=long):
                until(lambda: served.decoder.stats()["num_waiting"] == 1)
                with pytest.raises(anthropic.APIStatusError) as refused:
                    ask(client, USER)
        assert refused.value.status_code == 529
        assert refused.value.body["error"]["type"] == "overloaded_error"
        assert int(refused.value.response.headers["retry-after"]) >= 1
