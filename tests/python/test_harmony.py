"""Answers in channels, as gpt-oss gives them: told apart, in pieces of any size, and over HTTP."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripted_model import name_special_tokens, write_byte_tokenizer
from test_guides import MODEL
from test_reasoning import chunked_texts
from tidaldecode import Guide
from tidaldecode.cli.app import main
from tidaldecode.session import Session
from tidaldecode.text.harmony import CHANNEL, CONSTRAIN, MESSAGE, START, HarmonyReader
from tidaldecode.text.reasoning import ANALYSIS, find_reasoning_tags
from tidaldecode.text.tool_calls import find_tool_format
from tiny_models import write_checkpoint

SPECIAL = (START, "<|end|>", MESSAGE, CHANNEL, CONSTRAIN, "<|call|>", "<|return|>")
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|start|>{{ m['role'] }}"
    "<|channel|>final<|message|>{{ m['content'] or '' }}<|end|>{% endfor %}<|start|>assistant"
)
ANALYSED = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>Hello."
CALL = '<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": 1}'
ASK = [{"role": "user", "content": "Go."}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
TOOLS = [
    {"type": "function", "function": {"name": "now", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "then"}},
]


def read(pieces: list[str], names: tuple[str, ...] | None = ("now",), **options: Any):
    """What a reader tells of an answer: neighbours of a kind as one."""
    reader = HarmonyReader(names, **options)
    for piece in pieces:
        reader.push(piece)
    reader.finish()
    told: list[list[str]] = []
    for event in reader.take_events():
        if told and told[-1][0] == event.kind:
            told[-1][1] += event.text
        else:
            told.append([event.kind, event.text])
    return [tuple(each) for each in told]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (FINAL, [("content", "Hello.")]),
        (FINAL + "<|return|>", [("content", "Hello.")]),
        (ANALYSED + FINAL, [("reasoning", "Hm."), ("content", "Hello.")]),
        (ANALYSED + ANALYSED + FINAL, [("reasoning", "Hm.\n\nHm."), ("content", "Hello.")]),
        (ANALYSED + CALL, [("reasoning", "Hm."), ("name", "now"), ("arguments", '{"a": 1}')]),
        (CALL + "<|call|>", [("name", "now"), ("arguments", '{"a": 1}')]),
        # As the model writes it too: the tool before the channel.
        ("<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}",
         [("name", "now"), ("arguments", "{}")]),
        ("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + CALL,
         [("content", "I look."), ("name", "now"), ("arguments", '{"a": 1}')]),
        ("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + FINAL,
         [("content", "I look.\n\nHello.")]),
        (CALL.replace("now", "other"), [("content", '{"a": 1}')]),
        (CALL[:-1], [("name", "now"), ("arguments", '{"a": 1'), ("broken", '{"a": 1')]),
        ("No head.", [("content", "No head.")]),
        ("<|channel|>analysis", [("content", "<|channel|>analysis")]),
        ("<|channel|>analysis<|message|>Never closed <|en",
         [("reasoning", "Never closed <|en")]),
        ("", []),
        ("a < b <| c", [("content", "a < b <| c")]),
    ],
)  # fmt: skip
def test_what_an_answer_says(text: str, told: list[tuple[str, str]]):
    assert read([text]) == told
    assert read(list(text)) == told


def test_a_prompt_may_have_opened_the_reasoning():
    assert read(["Hm.<|end|><|start|>assistant" + FINAL], begins_inside=True) == [
        ("reasoning", "Hm."), ("content", "Hello.")
    ]  # fmt: skip


def test_text_is_given_out_as_soon_as_it_is_certain():
    reader = HarmonyReader(None)
    given = []
    for piece in ("<|channel|>fi", "nal<|message|>Hel", "lo <|", "end", "|>"):
        reader.push(piece)
        given.append("".join(event.text for event in reader.take_events()))
    assert given == ["", "Hel", "lo ", "", ""]


@settings(max_examples=400, deadline=None)
@given(
    chunked_texts([*SPECIAL, "final", "analysis", "commentary", " to=functions.now", "{}", "json"]),
    st.sampled_from([None, (), ("now",)]),
)
def test_pieces_give_what_the_whole_gives(pieces: list[str], names: tuple[str, ...] | None):
    text = "".join(pieces)
    told = read(pieces, names)
    assert told == read([text], names)
    said = "".join(each for kind, each in told if kind != "broken").replace("\n\n", "")
    left = iter(text)
    assert all(character in left for character in said)  # nothing is made up, or out of order
    if not any(marker in text for marker in SPECIAL):
        assert told == ([("content", text)] if text else [])


def test_the_form_comes_from_the_template():
    assert find_reasoning_tags(TEMPLATE) == ANALYSIS
    assert find_tool_format(TEMPLATE, ()) == "harmony"


@pytest.fixture(scope="module", params=[True, False], ids=["special tokens", "text"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")
    pytest.importorskip("llguidance", reason="needs tidaldecode[structured]")
    from serving import serving

    folder = write_checkpoint(tmp_path_factory.mktemp("channels"), MODEL)
    write_byte_tokenizer(folder, TEMPLATE, vocab_size=258 + len(SPECIAL) * request.param)
    if request.param:
        name_special_tokens(folder, SPECIAL)
    with serving(folder, engine={"max_seq_len": 1024, "attention": "full"}) as served:
        served.has_special_tokens = request.param
        yield served


def guide_of(text: str, has_special_tokens: bool) -> Guide:
    """What lets a model write a text and nothing else."""
    pieces = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
    rule = (
        f"<[{258 + SPECIAL.index(piece)}]>"
        if has_special_tokens and piece in SPECIAL
        else json.dumps(piece)
        for piece in pieces
        if piece
    )
    return Guide.grammar("start: " + " ".join(rule))


@pytest.mark.parametrize(
    ("text", "more", "reasoning", "content", "calls"),
    [
        (ANALYSED + FINAL, {}, "Hm.", "Hello.", []),
        (FINAL, {}, None, "Hello.", []),
        (ANALYSED + CALL, {"tools": TOOLS}, "Hm.", None, [("now", '{"a": 1}')]),
        (ANALYSED + CALL, {}, "Hm.", '{"a": 1}', []),
        (ANALYSED + FINAL, {"separate_reasoning": False}, None, "Hm.\n\nHello.", []),
    ],
)
def test_answers_over_http(
    served: Any, monkeypatch: pytest.MonkeyPatch, text: str, more: dict[str, Any],
    reasoning: str | None, content: str | None, calls: list[tuple[str, str]],
):  # fmt: skip
    from serving import events_of, let_write

    let_write(served, monkeypatch, guide_of(text, served.has_special_tokens))
    body = {"messages": ASK, **more}
    choice = served.post("/v1/chat/completions", body).json()["choices"][0]
    message = choice["message"]
    assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)
    found = [call["function"] for call in message.get("tool_calls") or ()]
    assert [(each["name"], each["arguments"]) for each in found] == calls
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
    said = {"content": "", "reasoning_content": "", "arguments": ""}
    events = events_of(served.post("/v1/chat/completions", body | {"stream": True}).text)
    for event in events[:-1]:
        for each in json.loads(event)["choices"]:
            for key in ("content", "reasoning_content"):
                said[key] += each["delta"].get(key) or ""
            for call in each["delta"].get("tool_calls") or ():
                said["arguments"] += call["function"].get("arguments") or ""
    arguments = "".join(each for _, each in calls)
    assert said == {
        "content": content or "", "reasoning_content": reasoning or "", "arguments": arguments
    }  # fmt: skip


def test_the_chat_command_shows_reasoning_and_keeps_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("llguidance", reason="needs tidaldecode[structured]")
    folder = write_checkpoint(tmp_path, MODEL)
    write_byte_tokenizer(folder, TEMPLATE, vocab_size=258 + len(SPECIAL))
    name_special_tokens(folder, SPECIAL)
    guide, stream = guide_of(ANALYSED + FINAL, True), Session.chat_stream
    monkeypatch.setattr(
        Session, "chat_stream",
        lambda session, messages, **options: stream(session, messages, guide=guide, **options),
    )  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Go.\n/save said.json\n")))
    monkeypatch.chdir(tmp_path)
    assert main(["chat", str(folder), "--attention", "full", "--max-seq-len", "1024"]) == 0
    assert capsys.readouterr().out == "Hm.\n\nHello.\n"
    assert json.loads((tmp_path / "said.json").read_text()) == [
        *ASK, {"role": "assistant", "content": "Hello."}
    ]  # fmt: skip


def test_calls_and_formats_can_be_demanded(served: Any):
    body = {"messages": ASK, "max_tokens": 400, "temperature": 1.0, "logit_bias": {"60": 8}}
    if served.has_special_tokens:  # a random model would hardly ever close its reasoning
        body["logit_bias"] = {"259": 8}
    whole = 0
    for seed in range(4):
        more = {"tools": TOOLS, "tool_choice": "required", "seed": seed}
        choice = served.post("/v1/chat/completions", body | more).json()["choices"][0]
        if choice["finish_reason"] == "length":
            continue
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] in ("now", "then") and not choice["message"]["content"]
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        more = {"response_format": schema, "seed": seed}
        choice = served.post("/v1/chat/completions", body | more).json()["choices"][0]
        if choice["finish_reason"] == "length":
            continue
        assert json.loads(choice["message"]["content"])["a"] in (1, 2)
        whole += 1
    assert whole > 0 or not served.has_special_tokens
