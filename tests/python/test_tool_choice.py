"""Calls that a model is made to write, in every format, and read again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from json_schemas import is_valid
from scripted_model import BOS, EOS, name_special_tokens, write_byte_tokenizer
from test_guides import MODEL, OPTIONS
from tidaldecode import Decoder, Guide
from tidaldecode.errors import InvalidArgument
from tidaldecode.text.reasoning import BRACKETS, THINK, Parts, split_reasoning
from tidaldecode.text.tool_calls import TOOL_FORMATS, parse_tool_calls
from tidaldecode.text.tool_choice import chosen_tool, marker_ids, tool_guide, tool_names
from tiny_models import write_checkpoint

pytest.importorskip("llguidance")

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"$ref": "#/$defs/unit"},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["°C", "°F"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "name": "now", "parameters": {"additionalProperties": False}},
    {"type": "function", "function": {"name": 'odd "name"', "parameters": None}},
]
NAMES = ["weather", "now", 'odd "name"']
SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory):
    """A random model whose tokenizer has special tokens for markers."""
    folder = write_checkpoint(tmp_path_factory.mktemp("tools"), MODEL)
    write_byte_tokenizer(folder, vocab_size=258 + len(SPECIAL))
    name_special_tokens(folder, SPECIAL)
    with Decoder(folder, attention="full", **OPTIONS) as decoder:
        yield decoder


def markers_of(decoder: Decoder) -> dict[str, int]:
    return marker_ids(SPECIAL, lambda text: decoder.encode(text, add_special_tokens=False))


def written(decoder: Decoder, guide: Guide, **options: Any) -> str:
    result = decoder.generate("Call: ", guide=guide, temperature=1.0, max_new_tokens=480,
                              skip_special_tokens=False, **options)  # fmt: skip
    assert result.finish_reason == "stop", result.text
    return result.text.removesuffix("</s>").removesuffix("<s>")


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
@pytest.mark.parametrize("has_markers", [False, True])
def test_a_named_tool_is_called(decoder: Decoder, tool_format: str, has_markers: bool):
    markers = markers_of(decoder) if has_markers else None
    for choice in (named("weather"), {"type": "function", "name": "weather"}):
        guide = tool_guide(tool_format, TOOLS, choice, markers=markers)
        for seed in range(3):
            found = parse_tool_calls(written(decoder, guide, seed=seed), tool_format, NAMES)
            (call,) = found.calls
            assert (found.content, call.name) == ("", "weather")
            assert is_valid(json.loads(call.arguments), WEATHER), call.arguments


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
def test_some_tool_is_called(decoder: Decoder, tool_format: str):
    tools = TOOLS[:2]
    one = tool_guide(tool_format, tools, "required", parallel=False)
    called = set()
    for seed in range(8):
        found = parse_tool_calls(written(decoder, one, seed=seed), tool_format, NAMES)
        (call,) = found.calls
        called.add(call.name)
        assert found.content == "" and isinstance(json.loads(call.arguments), dict)
    assert called <= {"weather", "now"}
    several = tool_guide(tool_format, [TOOLS[1]], "required")
    counts = set()
    for seed in range(6):
        text = decoder.generate("Call: ", guide=several, temperature=1.0, seed=seed,
                                max_new_tokens=400, logit_bias={EOS: -9, BOS: -9},
                                ).text  # fmt: skip
        found = parse_tool_calls(text, tool_format, NAMES)
        assert {call.name for call in found.calls} == {"now"}
        counts.add(len(found.calls))
    assert max(counts) > 1 or tool_format == "harmony"  # whose answer ends with a call


def test_special_tokens_are_drawn_as_such(decoder: Decoder):
    markers = markers_of(decoder)
    assert markers == {"[TOOL_CALLS]": 258, "[ARGS]": 259}
    result = decoder.generate(
        "x", guide=tool_guide("mistral", TOOLS, named("now"), markers=markers)
    )
    assert result.token_ids[0] == 258 and 259 in result.token_ids
    assert result.text.startswith("now{")  # they are not shown
    old = {"[TOOL_CALLS]": 258}
    result = decoder.generate("x", guide=tool_guide("mistral", TOOLS, named("now"), markers=old))
    assert result.text.startswith('[{"name": "now", "arguments": {') and result.token_ids[0] == 258


def test_choices_that_leave_the_model_free():
    for choice in (None, "auto", "none"):
        assert tool_guide("hermes", TOOLS, choice) is None
    assert chosen_tool(None, []) == "none" and chosen_tool(None, ["f"]) == "auto"
    assert tool_names(TOOLS) == NAMES


@pytest.mark.parametrize(
    ("tools", "choice", "expected"),
    [
        (TOOLS, "always", "tool_choice: got 'always', expected 'none', 'auto', 'required' or"),
        (TOOLS, named("rain"), "tool_choice: got 'rain', expected one of tools: now, odd"),
        (TOOLS, {"type": "function"}, "tool_choice: got"),
        (TOOLS, 3, "tool_choice: got 3"),
        ([], "required", "tool_choice: got 'required' without tools"),
        ("x", "auto", "tools: got 'x', expected a list"),
        ([{}], "auto", r"tools\[0\]: got {}, expected"),
        ([TOOLS[0], TOOLS[0]], "auto", r"tools\[1\]: got the name 'weather' twice"),
        ([{"name": "f", "parameters": [1]}], "auto", r"tools\[0\].parameters: got \[1\]"),
        ([{"name": "f"}] * 200, "auto", "tools: got .*expected a list of at most 128"),
    ],
)
def test_wrong_tools_and_choices_are_named(tools, choice, expected):
    with pytest.raises(InvalidArgument, match=expected):
        tool_guide("hermes", tools, choice)


def test_a_schema_of_arguments_that_cannot_be_kept_to(decoder: Decoder):
    tools = [{"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}]
    with pytest.raises(InvalidArgument, match="guide: grammar: .*not"):
        decoder.generate("x", guide=tool_guide("hermes", tools, "required"))


# Behind reasoning


@pytest.mark.parametrize("tags", [THINK, BRACKETS])
@pytest.mark.parametrize("begins_inside", [False, True])
@pytest.mark.parametrize(
    "guide",
    [
        Guide.regex("yes|n/o"),
        Guide.json_schema({"enum": [1, 2]}),
        Guide.grammar('start: "a" b\nb: "b"'),
    ],
)
def test_reasoning_may_come_first(decoder: Decoder, tags, begins_inside: bool, guide: Guide):
    behind = guide.after_reasoning(tags, begins_inside=begins_inside)
    reasoned = 0
    for seed in range(6):
        # A random model would hardly ever close its reasoning.
        likely = [token for token in (261, *b"</think>") if tags == BRACKETS or token != 261]
        result = decoder.generate("x", guide=behind, temperature=1.0, seed=seed,
                                  max_new_tokens=450, skip_special_tokens=False,
                                  logit_bias={261: 6.0} if tags == BRACKETS else dict.fromkeys(
                                      likely, 9.0))  # fmt: skip
        if result.finish_reason == "length":
            continue
        text = result.text.removesuffix("</s>").removesuffix("<s>")
        parts = split_reasoning(text, tags, begins_inside=begins_inside)
        reasoned += parts.content != text
        assert parts.content.strip(" \n") in ("yes", "n/o", "1", "2", "ab"), result.text
    assert tags == THINK or reasoned > 0
    # Without any, the answer comes at once.
    if not begins_inside:
        result = decoder.generate("x", guide=behind, suppress_tokens=[ord("<"), 260])
        assert split_reasoning(result.text) == Parts(content=result.text)
        assert result.text in ("yes", "n/o", "1", "2", "ab")
