"""Tools, reasoning and guided answers over HTTP, of models that are made to write a given text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")
pytest.importorskip("llguidance", reason="needs tidaldecode[structured]")
openai = pytest.importorskip("openai", reason="needs the openai client")

from json_schemas import is_valid  # noqa: E402
from scripted_model import name_special_tokens, write_byte_tokenizer  # noqa: E402
from serving import Served, events_of, let_write, serving  # noqa: E402
from test_guides import MODEL  # noqa: E402
from tidaldecode import Guide  # noqa: E402
from tidaldecode.text.reasoning import THINK  # noqa: E402
from tiny_models import write_checkpoint  # noqa: E402

CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call></tool_call>{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] or '' }}"
    "{% for call in m['tool_calls'] or [] %}({{ call['function']['arguments'] | tojson }})"
    "{% endfor %}{% endfor %}>{% if enable_thinking %}<think>\n{% endif %}"
)
ASK = [{"role": "user", "content": "Go."}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
NOW = '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_checkpoint(tmp_path_factory.mktemp("tools"), MODEL)
    write_byte_tokenizer(folder, TEMPLATE)
    engine = {"max_seq_len": 1024, "attention": "full"}
    with serving(folder, engine=engine, served_model_names=("m",)) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def writes(served: Served, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets the model write a text, whatever it is asked."""
    return lambda text: let_write(served, monkeypatch, Guide.regex(re.escape(text)))


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model="m", messages=more.pop("messages", ASK), **more)


def joined(client: openai.OpenAI, **more: Any) -> dict[str, Any]:
    """What the events of a stream amount to."""
    whole: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "reasons": []}
    for chunk in ask(client, stream=True, **more):
        (choice,) = chunk.choices
        delta = choice.delta
        whole["content"] += delta.content or ""
        fields = delta.model_extra or {}
        assert fields.get("reasoning") == fields.get("reasoning_content")
        whole["reasoning"] += fields.get("reasoning") or ""
        for call in delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(whole["calls"]) and call.type == "function"
                whole["calls"].append([call.id, call.function.name, ""])
            whole["calls"][call.index][2] += call.function.arguments or ""
        whole["reasons"] += [choice.finish_reason] if choice.finish_reason else []
    return whole


TEXTS: list[tuple[str, str, dict[str, Any], str, str, list[tuple[str, str]]]] = [
    # what, text, fields, reasoning, content, calls
    ("a text", "Hello.", {}, "", "Hello.", []),
    ("a call", CALL, {}, "", "", [("weather", '{"city": "Oslo"}')]),
    ("two calls", CALL + NOW, {}, "", "", [("weather", '{"city": "Oslo"}'), ("now", "{}")]),
    ("one call at a time", CALL + NOW, {"parallel_tool_calls": False}, "", "",
     [("weather", '{"city": "Oslo"}')]),
    ("content and a call", "Well." + CALL, {}, "", "Well.", [("weather", '{"city": "Oslo"}')]),
    ("reasoning", "<think>So.</think>Hello.", {}, "So.", "Hello.", []),
    ("reasoning and a call", "<think>So.</think>\n" + CALL, {}, "So.", "",
     [("weather", '{"city": "Oslo"}')]),
    ("a call thought of", f"<think>{NOW}</think>No.", {}, NOW, "No.", []),
    ("opened by the prompt", "So.</think>Hello.",
     {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, "So.", "Hello.", []),
    ("another tool", CALL.replace("weather", "other"), {}, "",
     CALL.replace("weather", "other"), []),
    ("no choice", CALL, {"tool_choice": "none"}, "", CALL, []),
    ("as it is", "<think>So.</think>A", {"extra_body": {"separate_reasoning": False}}, "",
     "<think>So.</think>A", []),
    ("kept to itself", "<think>So.</think>A", {"extra_body": {"include_reasoning": False}}, "",
     "A", []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "fields", "reasoning", "content", "calls"),
    [case[1:] for case in TEXTS], ids=[case[0] for case in TEXTS],
)  # fmt: skip
def test_an_answer_has_its_parts_whole_and_in_a_stream(
    client: openai.OpenAI, writes: Callable[[str], None], text: str, fields: dict[str, Any],
    reasoning: str, content: str, calls: list[tuple[str, str]],
):  # fmt: skip
    writes(text)
    answer = ask(client, tools=TOOLS, **fields)
    (choice,) = answer.choices
    message, found = choice.message, choice.message.tool_calls or []
    assert (message.content or "") == content
    assert message.content is not None or calls
    assert [(call.function.name, call.function.arguments) for call in found] == calls
    assert (message.model_extra.get("reasoning_content") or "") == reasoning
    reason = "tool_calls" if calls else "stop"
    assert choice.finish_reason == reason
    shown = fields.get("extra_body", {})
    if "include_reasoning" not in shown and "separate_reasoning" not in shown:
        count = answer.usage.completion_tokens_details.reasoning_tokens
        tags = len("</think>") + ("<think>" in text) * len("<think>")
        assert count == (len(reasoning) + tags if reasoning else 0)

    streamed = joined(client, tools=TOOLS, **fields)
    assert streamed["content"] == content and streamed["reasoning"] == reasoning
    assert [tuple(call[1:]) for call in streamed["calls"]] == calls
    assert streamed["reasons"] == [reason]
    ids = [call.id for call in found] + [call[0] for call in streamed["calls"]]
    assert len(set(ids)) == len(ids)


def test_tokens_of_a_call_are_told_with_it(served: Served, writes: Callable[[str], None]):
    writes("Well." + CALL)
    body = {"messages": ASK, "tools": TOOLS, "return_token_ids": True, "logprobs": True}
    whole = served.post(CHAT, body).json()["choices"][0]
    events = events_of(served.post(CHAT, body | {"stream": True}).text)[:-1]
    choices = [json.loads(event)["choices"][0] for event in events]
    ids = [token for choice in choices for token in choice.get("token_ids") or ()]
    assert ids == whole["token_ids"]
    logprobs = [each for c in choices if c["logprobs"] for each in c["logprobs"]["content"]]
    assert [each["token"] for each in logprobs] == [
        each["token"] for each in whole["logprobs"]["content"]
    ]


def test_what_was_called_goes_back_to_the_template(served: Served):
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    messages = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "call_1", "content": "rain"})
    body = {"messages": messages, "tools": TOOLS, "max_tokens": 1, "return_token_ids": True}
    answer = served.post(CHAT, body).json()
    text = bytes(i for i in answer["prompt_token_ids"] if i < 256).decode()
    assert text.endswith('[user]Go.[assistant]({"city": "Oslo"})[tool]rain>')
    assert text.startswith('[{"type": "function"')
    counted = served.post("/tokenize", {"messages": messages, "tools": TOOLS}).json()
    assert counted["tokens"] == answer["prompt_token_ids"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["", "weather"])
def test_a_call_can_be_demanded(client: openai.OpenAI, stream: bool, name: str):
    choice: Any = {"type": "function", "function": {"name": name}} if name else "required"
    options = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 400}
    options["logit_bias"] = {str(ord("h")): -100}  # no <think>, which might have no end
    for seed in range(3):
        if stream:
            calls = [call[1:] for call in joined(client, seed=seed, **options)["calls"]]
        else:
            message = ask(client, seed=seed, **options).choices[0].message
            calls = [[c.function.name, c.function.arguments] for c in message.tool_calls]
        assert calls
        for called, arguments in calls:
            assert called in ([name] if name else ["weather", "now"])
            if called == "weather":
                assert is_valid(json.loads(arguments), SCHEMA)


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{"tools": TOOLS, "tool_choice": "required"}, {"response_format": {"type": "json_object"}}],
    ids=["call", "format"],
)  # fmt: skip
def test_a_model_may_think_before_what_is_demanded(
    served: Served, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], thinks: bool
):
    submit, guides = served.decoder.submit, []

    def listen(ids: list[int], **options: Any) -> Any:
        guides.append(options["guide"])
        return submit(ids, **options)

    monkeypatch.setattr(served.decoder, "submit", listen)
    body = {"messages": ASK, "max_tokens": 1, "chat_template_kwargs": {"enable_thinking": thinks}}
    assert served.post(CHAT, body | fields).status_code == 200
    assert [(guide.reasoning, guide.begins_inside) for guide in guides] == [(THINK, thinks)]
    body |= {"separate_reasoning": False}  # of what is shown, not of what is allowed
    assert served.post(CHAT, body | fields).status_code == 200
    assert guides[1] == guides[0]


FORMATS: list[tuple[str, dict[str, Any], Callable[[str], bool]]] = [
    ("object", {"response_format": {"type": "json_object"}},
     lambda text: isinstance(json.loads(text), dict)),
    ("schema", {"response_format": {"type": "json_schema", "json_schema": {
        "name": "place", "strict": True, "schema": SCHEMA}}},
     lambda text: is_valid(json.loads(text), SCHEMA)),
    ("schema beside it", {"response_format": {"type": "json_object", "schema": SCHEMA}},
     lambda text: is_valid(json.loads(text), SCHEMA)),
    ("regex", {"response_format": {"type": "regex", "regex": "(ab){3}c"}},
     lambda text: text == "abababc"),
    ("grammar", {"response_format": {"type": "grammar", "grammar": 'start: "x" "y"'}},
     lambda text: text == "xy"),
    ("vllm's json", {"structured_outputs": {"json": SCHEMA}},
     lambda text: is_valid(json.loads(text), SCHEMA)),
    ("vllm's choice", {"structured_outputs": {"choice": ["yes", 'n"o']}},
     lambda text: text in ("yes", 'n"o')),
    ("vllm's regex", {"structured_outputs": {"regex": "[0-9]{4}"}},
     lambda text: re.fullmatch("[0-9]{4}", text) is not None),
    ("text", {"response_format": {"type": "text"}, "max_tokens": 3}, lambda text: True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "is_right"), [case[1:] for case in FORMATS], ids=[case[0] for case in FORMATS]
)
@pytest.mark.parametrize("route", [CHAT, "/v1/completions"])
def test_answers_keep_to_a_format(
    served: Served, route: str, fields: dict[str, Any], is_right: Callable[[str], bool]
):
    prompt = {"messages": ASK} if route == CHAT else {"prompt": "Go."}
    body = prompt | {"max_tokens": 500, "n": 2, "temperature": 1.0, "seed": 5} | fields
    body["logit_bias"] = {str(ord("<")): -100}  # no <think>, which might have no end
    if "json_object" in str(fields) and "city" not in str(fields):
        body["logit_bias"][str(ord("}"))] = 100  # or a random model writes on
    for choice in served.post(route, body).json()["choices"]:
        text = choice["message"]["content"] if route == CHAT else choice["text"]
        assert is_right(text), text


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("a tool that is none", {"tools": [{"type": "function"}]}, "tools[0]", "tools[0]: got"),
    ("two of a name", {"tools": [TOOLS[1], TOOLS[1]]}, "tools[1]", "tools[1]: got the name 'now'"),
    ("too many", {"tools": TOOLS * 65}, "tools", "tools: got 130, expected at most 128"),
    ("parameters", {"tools": [{"function": {"name": "f", "parameters": 3}}]},
     "tools[0].parameters", "tools[0].parameters: got 3"),
    ("parameters that nothing keeps to",
     {"tools": [{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "no"}}}}}],
      "tool_choice": "required"}, "tools", "tools: "),
    ("a choice", {"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice",
     "tool_choice: got 'maybe'"),
    ("another tool", {"tools": TOOLS, "tool_choice": {"function": {"name": "f"}}}, "tool_choice",
     "tool_choice: got 'f', expected one of tools: now, weather"),
    ("nothing to call", {"tool_choice": "required"}, "tool_choice", "tool_choice: got 'required'"),
    ("both", {"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format",
     "response_format: cannot be kept beside tools"),
    ("a format", {"response_format": {"type": "xml"}}, "response_format.type",
     "response_format.type: got 'xml', expected one of 'text', 'json_object'"),
    ("no schema", {"response_format": {"type": "json_schema"}}, "response_format.json_schema",
     "response_format.json_schema: got None"),
    ("a schema", {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
     "response_format.json_schema.schema", "response_format.json_schema.schema: "),
    ("a type of JSON",
     {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
     "response_format", "response_format: "),
    ("a regex", {"response_format": {"type": "regex", "regex": "("}}, "response_format",
     "response_format: "),
    ("an empty one", {"structured_outputs": {"regex": ""}}, "structured_outputs.regex",
     "structured_outputs.regex: got ''"),
    ("choices", {"structured_outputs": {"choice": []}}, "structured_outputs.choice",
     "structured_outputs.choice: got []"),
    ("two at once", {"structured_outputs": {"regex": "a", "json_object": True}},
     "structured_outputs", "structured_outputs: got json_object, regex"),
    ("a grammar", {"structured_outputs": {"grammar": "start: ("}}, "structured_outputs",
     "structured_outputs: "),
    ("both ways", {"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}},
     "structured_outputs", "structured_outputs: got it with response_format"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_cannot_be_is_named(served: Served, fields: dict[str, Any], param: str, said: str):
    response = served.post(CHAT, {"messages": ASK, "max_tokens": 4} | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"].startswith(said) and error["param"] == param, error


@pytest.mark.parametrize("stream", [False, True])
def test_settings_that_leave_a_format_nothing_are_the_clients(served: Served, stream: bool):
    body = {"messages": ASK, "response_format": {"type": "regex", "regex": "ab"}, "stream": stream}
    body |= {"allowed_token_ids": [ord("a"), ord("<")], "logit_bias": {str(ord("<")): -100}}
    answer = served.post(CHAT, body)
    assert answer.status_code == (200 if stream else 400)
    error = json.loads(events_of(answer.text)[-1] if stream else answer.text)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
    assert "allowed_token_ids" in error["message"] and "min_tokens" in error["message"]


MESSAGES = [
    ("a text", "Hello.", [("text", "Hello.")], "end_turn"),
    ("thought", "<think>So.</think>Hello.", [("thinking", "So."), ("text", "Hello.")], "end_turn"),
    ("calls", "Well." + CALL + NOW,
     [("text", "Well."), ("tool_use", {"city": "Oslo"}), ("tool_use", {})], "tool_use"),
    ("text between and behind", CALL + " And" + NOW + " then.",
     [("tool_use", {"city": "Oslo"}), ("text", " And"), ("tool_use", {}), ("text", " then.")],
     "tool_use"),
    ("all", "<think>So.</think>A" + CALL,
     [("thinking", "So."), ("text", "A"), ("tool_use", {"city": "Oslo"})], "tool_use"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "blocks", "reason"), [case[1:] for case in MESSAGES], ids=[c[0] for c in MESSAGES]
)
def test_messages_have_blocks(
    served: Served, writes: Callable[[str], None], text: str, blocks: list[Any], reason: str
):
    anthropic = pytest.importorskip("anthropic", reason="needs the anthropic client")
    client = anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)
    writes(text)
    tools = [
        {"name": "weather", "description": "It rains.", "input_schema": SCHEMA},
        {"name": "now", "input_schema": {"type": "object"}},
    ]
    fields = {"model": "m", "max_tokens": 300, "messages": ASK, "tools": tools}
    with client.messages.stream(**fields) as stream:
        final = stream.get_final_message()
    for answer in (client.messages.create(**fields), final):
        got = []
        for block in answer.content:
            name = {"tool_use": "input"}.get(block.type, block.type)
            got.append((block.type, getattr(block, name)))
        assert got == blocks and answer.stop_reason == reason


def test_messages_take_calls_and_results(served: Served):
    call = {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": "rain"}
    turns = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    chat = [
        *ASK,
        {"role": "assistant", "content": "A", "tool_calls": [
            {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
        {"role": "tool", "content": "rain"},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    tool = {"name": "weather", "input_schema": SCHEMA}
    counted = served.post("/v1/messages/count_tokens", {"messages": turns, "tools": [tool]})
    same = served.post("/tokenize", {"messages": chat, "tools": TOOLS[:1]}).json()
    assert counted.json()["input_tokens"] == same["count"]


@pytest.mark.parametrize("written", [str(2**70), "1e999", '"\\ud83d"', '{"a": 1, "a": [2]}'])
def test_messages_have_arguments_as_they_are_written(
    served: Served, writes: Callable[[str], None], written: str
):
    writes(f'<tool_call>\n{{"name": "now", "arguments": {{"n": {written}}}}}\n</tool_call>')
    body = {"messages": ASK, "max_tokens": 300, "tools": [{"name": "now"}]}
    answer = served.post("/v1/messages", body)
    assert answer.status_code == 200 and f'"input":{{"n": {written}}}' in answer.text
    events = served.post("/v1/messages", body | {"stream": True}).text
    pieces = re.findall(r'"partial_json":("(?:[^"\\]|\\.)*")', events)
    assert "".join(map(json.loads, pieces)) == f'{{"n": {written}}}'


@pytest.mark.parametrize("kind", ["any", "tool"])
def test_messages_demand_calls_and_formats(served: Served, kind: str):
    choice = {"type": kind} | ({"name": "weather"} if kind == "tool" else {})
    tool = {"name": "weather", "input_schema": SCHEMA}
    body = {"messages": ASK, "max_tokens": 400, "tools": [tool], "tool_choice": choice}
    quiet = {"logit_bias": {str(ord("h")): -100}}  # of chats only: messages have no such field
    answer = served.post("/v1/messages", body | {"thinking": {"type": "disabled"}} | quiet).json()
    if answer["stop_reason"] == "tool_use":  # or it has thought to the end
        assert is_valid(answer["content"][-1]["input"], SCHEMA)
    output = {"format": {"type": "json_schema", "schema": SCHEMA}}
    body = {"messages": ASK, "max_tokens": 1, "output_config": output}
    assert served.post("/v1/messages", body).status_code == 200


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("Hello.", [("message", "Hello.")]),
        ("<think>So.</think>Hello.", [("reasoning", "So."), ("message", "Hello.")]),
        ("A" + CALL + NOW, [("message", "A"), ("function_call", '{"city": "Oslo"}'),
                            ("function_call", "{}")]),
    ],
    ids=["a text", "thought", "calls"],
)  # fmt: skip
def test_responses_have_items(
    client: openai.OpenAI, writes: Callable[[str], None], text: str, items: list[tuple[str, str]]
):
    writes(text)
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    fields = {"model": "m", "input": "Go.", "tools": tools}
    with client.responses.stream(**fields) as stream:
        events = list(stream)
        final = stream.get_final_response()
    for answer in (client.responses.create(**fields), final):
        got = [
            (item.type, item.arguments if item.type == "function_call" else item.content[0].text)
            for item in answer.output
        ]
        assert got == items and answer.status == "completed"
        called = [item.call_id for item in answer.output if item.type == "function_call"]
        assert all(called) and len(set(called)) == len(called)
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in done] == [item.id for item in final.output]
    numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
    assert numbers == sorted(set(numbers))


def test_responses_take_calls_and_their_outputs(served: Served):
    call = {"type": "function_call", "call_id": "1", "name": "now", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "1", "output": "noon"}
    given = [{"role": "user", "content": "Go."}, {"type": "reasoning", "summary": []}, call, output]
    answer = served.post("/v1/responses", {"input": given, "max_output_tokens": 1}).json()
    chat = [
        *ASK,
        {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]},
        {"role": "tool", "content": "noon"},
    ]
    same = served.post("/tokenize", {"messages": chat}).json()
    assert answer["usage"]["input_tokens"] == same["count"]
    schema = {"type": "json_schema", "name": "place", "schema": SCHEMA}
    body = {"input": "Go.", "text": {"format": schema}, "max_output_tokens": 1}
    assert served.post("/v1/responses", body).json()["text"]["format"]["name"] == "place"


def test_markers_that_are_special_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_checkpoint(tmp_path, MODEL)
    write_byte_tokenizer(folder, TEMPLATE.replace("<tool_call>", "[TOOL_CALLS]"), vocab_size=259)
    name_special_tokens(folder, ("[TOOL_CALLS]",))
    text = json.dumps('[{"name": "now", "arguments": {}}]')
    with serving(folder, engine={"max_seq_len": 1024, "attention": "full"}) as served:
        let_write(served, monkeypatch, Guide.grammar(f"start: <[258]> {text}"))
        choice = served.post(CHAT, {"messages": ASK, "tools": TOOLS}).json()["choices"][0]
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": "{}"}
        assert re.fullmatch("[a-zA-Z0-9]{9}", call["id"])


def test_a_model_without_tools_says_so(demo_model, served: Served):
    with serving(demo_model) as other:
        answer = other.post(CHAT, {"messages": ASK, "tools": TOOLS})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("tools: this model's chat template")
        none = {"messages": ASK, "tools": TOOLS, "tool_choice": "none", "max_tokens": 2}
        assert other.post(CHAT, none).status_code == 200
    answer = served.post("/v1/completions", {"prompt": "A", "tools": TOOLS})
    assert answer.json()["error"]["message"].startswith("tools: completions have no tools")


def test_parsers_can_be_switched_off(served: Served, monkeypatch: pytest.MonkeyPatch):
    folder = served.decoder.folder.path
    options = {"engine": {"attention": "full"}, "tool_call_parser": "none"}
    with serving(folder, **options, reasoning_parser="none") as plain:
        assert plain.post(CHAT, {"messages": ASK, "tools": TOOLS}).status_code == 400
        let_write(plain, monkeypatch, Guide.regex("<think>So\\.</think>A"))
        message = plain.post(CHAT, {"messages": ASK}).json()["choices"][0]["message"]
        assert message == {
            "role": "assistant", "content": "<think>So.</think>A", "refusal": None
        }  # fmt: skip
