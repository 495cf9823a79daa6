"""The server as the official OpenAI client sees it, on the packaged demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")
openai = pytest.importorskip("openai", reason="needs the openai client")

from serving import Served, events_of, serving  # noqa: E402

MESSAGES = [{"role": "user", "content": "Tell me about the harbour."}]
GREEDY = {"temperature": 0, "seed": 1, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def served(demo_model: Path) -> Iterator[Served]:
    with serving(demo_model) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


def alone(served: Served, tokens: int, **more) -> object:
    return served.decoder.chat(
        MESSAGES, max_new_tokens=tokens, temperature=0, ignore_eos=True, **more
    )


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tidal-demo"]
    assert client.models.retrieve("tidal-demo").owned_by == "tidaldecode"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat_is_what_the_decoder_says(client: openai.OpenAI, served: Served):
    answer = client.chat.completions.create(
        model="tidal-demo", messages=MESSAGES, max_tokens=12, **GREEDY
    )
    expected = alone(served, 12)
    choice = answer.choices[0]
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.total_tokens == 12 + expected.prompt_tokens


def test_chat_stream(client: openai.OpenAI, served: Served):
    chunks = list(
        client.chat.completions.create(
            model="tidal-demo", messages=MESSAGES, max_completion_tokens=12, stream=True, n=2,
            stream_options={"include_usage": True}, **GREEDY,
        )
    )  # fmt: skip
    expected = alone(served, 12)
    for index in (0, 1):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert own[0].delta.role == "assistant" and own[0].delta.content == ""
        assert "".join(choice.delta.content or "" for choice in own) == expected.text
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["length"]
        assert own[-1].finish_reason == "length" and own[-1].delta.content is None
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert chunks[-1].usage.prompt_tokens == expected.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_ends_with_done(served: Served):
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": True}
    events = events_of(served.post("/v1/chat/completions", body).text)
    assert events[-1] == "[DONE]"
    assert len({json.loads(event)["id"] for event in events[:-1]}) == 1


def test_completions(client: openai.OpenAI, served: Served):
    prompts = ["The sky over the harbour was", "A"]
    answer = client.completions.create(
        model="tidal-demo", prompt=prompts, max_tokens=6, n=2, **GREEDY
    )
    expected = [
        served.decoder.generate(p, max_new_tokens=6, temperature=0, ignore_eos=True).text
        for p in prompts
    ]
    texts = [choice.text for choice in answer.choices]
    assert texts == [expected[0], expected[0], expected[1], expected[1]]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 24


def test_completions_of_token_ids(client: openai.OpenAI, served: Served):
    ids = served.decoder.encode("The sky over the harbour was")
    one = client.completions.create(model="tidal-demo", prompt=ids, max_tokens=5, **GREEDY)
    two = client.completions.create(model="tidal-demo", prompt=[ids, ids], max_tokens=5, **GREEDY)
    expected = served.decoder.generate(ids, max_new_tokens=5, temperature=0, ignore_eos=True).text
    assert [c.text for c in (*one.choices, *two.choices)] == [expected] * 3


def test_completion_stream(client: openai.OpenAI, served: Served):
    chunks = list(
        client.completions.create(
            model="tidal-demo", prompt="The sky", max_tokens=9, stream=True, echo=True, **GREEDY
        )
    )
    expected = served.decoder.generate(
        "The sky", max_new_tokens=9, temperature=0, ignore_eos=True
    ).text
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The sky" + expected
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]


def test_errors_are_the_clients_own(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="tidal-demo", messages=MESSAGES, top_p=7)
    assert wrong.value.param == "top_p" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tidal-demo", messages=MESSAGES, max_tokens=10**6)
    assert long.value.code == "context_length_exceeded"
