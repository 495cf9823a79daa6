"""The official OpenAI client's own helpers: parsed answers, typed errors, retries, timeouts."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")
pytest.importorskip("llguidance", reason="needs tidaldecode[structured]")
openai = pytest.importorskip("openai", reason="needs the openai client")

from pydantic import BaseModel, Field  # noqa: E402

from serving import Served, serving, until  # noqa: E402
from tidaldecode import Guide  # noqa: E402
from tiny_models import write_nan_model  # noqa: E402

MESSAGES: list[Any] = [{"role": "user", "content": "Tell me about the harbour."}]
NAMED = {"model": "tidal-demo", "messages": MESSAGES}
# An answer that nobody waits for: some ten seconds long.
ENDLESS: dict[str, Any] = NAMED | {"max_tokens": 16_000, "extra_body": {"ignore_eos": True}}
MOST = 600  # tokens of a guided answer, which may hold many spaces
ENGINE = {"max_seq_len": 16384 + 256, "max_batch_size": 1}


class Boat(BaseModel):
    """A boat of the harbour."""

    kind: Literal["tug", "ferry", "yacht"]
    is_out: bool


class Harbour(BaseModel):
    """What there is to be known of a harbour."""

    sky: Literal["grey", "blue"]
    flag: Boat
    other: Boat | None
    boats: list[Boat] = Field(min_length=1, max_length=2)


def client_of(served: Served, **options: Any) -> openai.OpenAI:
    options = {"api_key": "none", "max_retries": 0} | options
    return openai.OpenAI(base_url=served.url + "/v1", **options)


@pytest.fixture(scope="module")
def served(demo_model: Path) -> Iterator[Served]:
    """A server whose chats may be long, one row wide."""
    with serving(demo_model, engine=ENGINE, tool_call_parser="json", max_body_mb=1) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return client_of(served)


@pytest.fixture(scope="module")
def of_nans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose model's numbers are none."""
    folder = write_nan_model(tmp_path_factory.mktemp("nans"))
    with serving(folder, served_model_names=("tidal-demo",)) as served:
        yield served


# Answers that are parsed


def test_a_parsed_answer(client: openai.OpenAI, served: Served):
    """The schema is what the client makes of a class: references, unions, lists, no more fields."""
    seen: list[dict[str, Any]] = []
    with client_of(served, http_client=listening(seen)) as heard:
        answer = heard.chat.completions.parse(
            **NAMED, response_format=Harbour, max_tokens=MOST, temperature=0
        )
    (choice,) = answer.choices
    assert isinstance(choice.message.parsed, Harbour) and choice.finish_reason == "stop"
    assert choice.message.parsed == Harbour.model_validate_json(choice.message.content)
    guide = Guide.json_schema(seen[0]["response_format"]["json_schema"]["schema"])
    alone = served.decoder.chat(MESSAGES, max_new_tokens=MOST, temperature=0, guide=guide)
    assert choice.message.content == alone.text
    response = client.responses.parse(
        model="tidal-demo", input="Tell me.", text_format=Harbour, max_output_tokens=MOST
    )
    assert isinstance(response.output_parsed, Harbour)


def test_a_parsed_answer_that_was_cut_off(client: openai.OpenAI):
    with pytest.raises(openai.LengthFinishReasonError) as cut:
        client.chat.completions.parse(**NAMED, response_format=Harbour, max_tokens=4)
    assert cut.value.completion.usage.completion_tokens == 4


def test_a_parsed_call(client: openai.OpenAI):
    tools = [openai.pydantic_function_tool(Harbour, name="tell")]
    answer = client.chat.completions.parse(
        **NAMED, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=MOST
    )
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "tell"
    assert isinstance(call.function.parsed_arguments, Harbour)
    # What was called, and what came of it, may be sent back as the client has it.
    told = {"role": "tool", "tool_call_id": call.id, "content": "It is so."}
    again = client.chat.completions.create(
        model="tidal-demo", messages=[*MESSAGES, said(choice.message), told], max_tokens=3
    )
    assert again.usage.completion_tokens == 3


def said(message: Any) -> dict[str, Any]:
    """A message as the next request has it; tidal-demo's template wants a text."""
    return message.model_dump(exclude_none=True) | {"content": message.content or ""}


def test_a_stream_of_parsed_pieces(client: openai.OpenAI):
    options = NAMED | {"response_format": Harbour, "max_tokens": MOST, "temperature": 0}
    whole = client.chat.completions.parse(**options)
    with client.chat.completions.stream(**options, logprobs=True, top_logprobs=2) as stream:
        events = list(stream)
    final = stream.get_final_completion()
    kinds = [event.type for event in events]
    pieces = [event.delta for event in events if event.type == "content.delta"]
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed
    assert "".join(pieces) == whole.choices[0].message.content
    assert kinds.count("content.done") == 1 and kinds.count("logprobs.content.done") == 1
    logprobs = final.choices[0].logprobs.content
    # The token that ends the answer has its own, and no text.
    assert "".join(each.token for each in logprobs[:-1]) == whole.choices[0].message.content
    assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in logprobs)


def test_a_stream_of_a_parsed_call(client: openai.OpenAI):
    tools = [openai.pydantic_function_tool(Harbour, name="tell")]
    with client.chat.completions.stream(
        **NAMED, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=MOST
    ) as stream:
        events = list(stream)
    (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Harbour)
    pieces = [e.arguments_delta for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert "".join(pieces) == call.function.arguments and len(pieces) > 1
    assert [e.name for e in events if e.type == "tool_calls.function.arguments.done"] == ["tell"]


def test_logprobs_are_the_decoders(client: openai.OpenAI, served: Served):
    answer = client.chat.completions.create(
        **NAMED, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    ids = served.decoder.render_chat(MESSAGES)
    alone = served.decoder.generate(
        ids, max_new_tokens=6, temperature=0, logprobs=3, ignore_eos=True
    )
    content = answer.choices[0].logprobs.content
    written = served.decoder.decode(alone.token_ids, skip_special_tokens=False)
    assert b"".join(bytes(each.bytes) for each in content).decode() == written
    for found, expected in zip(content, alone.logprobs, strict=True):
        assert found.logprob == pytest.approx(expected.logprob)
        tops = [top.logprob for top in found.top_logprobs]
        assert tops == pytest.approx([logprob for _, logprob in expected.top])


# Errors that are typed


def fails(client: openai.OpenAI, kind: type, **changes: Any) -> Any:
    """The error that a chat ends with."""
    with pytest.raises(openai.APIError) as error:
        client.chat.completions.create(**NAMED | {"max_tokens": 4} | changes)
    assert type(error.value) is kind
    return error.value


TYPED: dict[str, tuple[dict[str, Any], str, int, str]] = {
    "a field": ({"temperature": -1}, "BadRequestError", 400, "invalid_value"),
    "the context": ({"max_tokens": 10**6}, "BadRequestError", 400, "context_length_exceeded"),
    "a model": ({"model": "other"}, "NotFoundError", 404, "model_not_found"),
    "a body": ({"user": "x" * 2**21}, "APIStatusError", 413, "body_too_large"),
}


@pytest.mark.parametrize("name", TYPED)
def test_an_error_is_of_the_clients_own_type(client: openai.OpenAI, name: str):
    changes, kind, status, code = TYPED[name]
    error = fails(client, getattr(openai, kind), **changes)
    assert (error.status_code, error.code) == (status, code)
    assert error.message and error.type


def test_a_key_a_timeout_and_a_line_that_is_full(demo_model: Path):
    limits = {"api_keys": ("right",), "request_timeout_s": 0.5, "max_queued_requests": 1}
    with serving(demo_model, engine=ENGINE, **limits) as served:
        error = fails(client_of(served, api_key="wrong"), openai.AuthenticationError)
        assert (error.status_code, error.code) == (401, "invalid_api_key")
        client = client_of(served, api_key="right")
        error = fails(client, openai.APIStatusError, **ENDLESS)
        assert (error.status_code, error.code) == (408, "request_timeout")
        assert error.response.headers["x-should-retry"] == "false"  # it would take as long again
        with pytest.raises(openai.APIError) as ended:
            list(client.chat.completions.create(**ENDLESS, stream=True))
        assert ended.value.code == "request_timeout"
    with serving(demo_model, engine=ENGINE, max_queued_requests=1) as served, ExitStack() as stack:
        client = client_of(served)
        fill(served, client, stack)
        error = fails(client, openai.InternalServerError)
        assert (error.status_code, error.code) == (503, "queue_full")
        assert error.response.headers["retry-after"] == "1"


def test_a_model_of_nans_is_not_asked_again(of_nans: Served):
    sent: list[dict[str, Any]] = []
    with client_of(of_nans, max_retries=3, http_client=listening(sent)) as client:
        ask: dict[str, Any] = {"model": "tidal-demo", "prompt": [5, 6], "max_tokens": 4}
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(**ask)
        assert (error.value.status_code, error.value.code) == (500, "numeric_error")
        assert len(sent) == 1
        with pytest.raises(openai.APIError) as error:
            list(client.completions.create(**ask, stream=True))
        assert error.value.code == "numeric_error" and len(sent) == 2


# Asking again


def listening(sent: list[dict[str, Any]]) -> Any:
    """The client's transport, which notes the body of everything that is sent."""

    def note(request: Any) -> None:
        sent.append(json.loads(request.read()))

    return openai.DefaultHttpxClient(event_hooks={"request": [note]})


def fill(served: Served, client: openai.OpenAI, stack: ExitStack) -> None:
    """Takes the only row, and the only place in line, until the stack is left."""
    for name in ("num_decoding", "num_waiting"):
        stream = client.chat.completions.create(**ENDLESS, stream=True)
        stack.callback(stream.close)
        until(lambda name=name: served.decoder.stats()[name] == 1)


def test_a_full_line_is_asked_again_when_it_says(demo_model: Path):
    with serving(demo_model, engine=ENGINE, max_queued_requests=1) as served:
        sent: list[dict[str, Any]] = []
        answers: list[Any] = []
        client = client_of(served, max_retries=2, http_client=listening(sent))

        def ask() -> None:
            raw = client.chat.completions.with_raw_response.create(
                **NAMED, max_tokens=3, extra_body={"ignore_eos": True}
            )
            answers.append((raw.retries_taken, raw.parse()))

        with ExitStack() as stack:
            fill(served, client_of(served), stack)
            thread = threading.Thread(target=ask)
            thread.start()
            until(lambda: served.service.metrics._rejected["queue_full"] == 1)
        thread.join(20)
        ((retries, answer),) = answers
        assert retries == 1 and len(sent) == 2 and sent[0] == sent[1]
        assert answer.usage.completion_tokens == 3


# Leaving


def check_ended(served: Served, num_gone: int, leave: Callable[[], None]) -> None:
    """An endless answer that is left ends at once: nothing is held, and most is never made."""
    before, gone = served.decoder.stats(), served.service.metrics._num_gone
    leave()
    until(served.is_idle)
    after = served.decoder.stats()
    assert served.service.metrics._num_gone - gone == num_gone
    assert after["num_finished"] - before["num_finished"] == num_gone
    assert after["generated_tokens"] - before["generated_tokens"] < ENDLESS["max_tokens"] / 2
    assert after["pages_held"] == 0


@pytest.mark.parametrize("retries", [0, 1])
def test_a_timeout_ends_the_request(served: Served, retries: int):
    client = client_of(served, max_retries=retries, timeout=0.3)

    def leave() -> None:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**ENDLESS)

    check_ended(served, 1 + retries, leave)


def test_a_stream_that_is_closed_ends_the_request(served: Served, client: openai.OpenAI):
    def leave() -> None:
        with client.chat.completions.create(**ENDLESS, stream=True) as stream:
            next(iter(stream))

    check_ended(served, 1, leave)


def test_a_task_that_is_cancelled_ends_the_request(served: Served):
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as client:
            await asyncio.wait_for(client.chat.completions.create(**ENDLESS), 0.3)

    def leave() -> None:
        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(ask())

    check_ended(served, 1, leave)
