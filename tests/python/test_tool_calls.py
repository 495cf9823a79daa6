"""Calls of tools found in what models write: whole, in pieces of any size, and what is none."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripted_model import write_byte_tokenizer
from test_reasoning import PLAIN_TEMPLATE, chunked_texts
from tidaldecode.errors import InvalidArgument
from tidaldecode.text.tokenizer import Tokenizer
from tidaldecode.text.tool_calls import (
    TOOL_FORMATS,
    ToolCall,
    ToolCallDelta,
    ToolCallParser,
    check_tool_format,
    find_tool_format,
    has_special_marker,
    new_call_id,
    parse_tool_calls,
)

FRAGMENTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>",
    '{"name": "f", "arguments": {"a": [1, -2.5e3, true, null, "x\\"}\\u00e9"]}}',
    '{"name": "g", "parameters": {}}', '{"arguments": {"b": {}}, "name": "f"}',
    '{"name": "f", "arguments": {"a": 1}, "oops": 2}', '{"name": "h"}', "f", "f[ARGS]{}",
    'g[CALL_ID]abc[ARGS]{"a": "[TOOL_CALLS]"}', "[", "]", ", ", "; ", "\n", "{", "}", '"', "<tool",
    '{"name": "f", "arguments": {"a": 01}}', '{"name": "f", "arguments": {"a":', "{}", " ",
]  # fmt: skip


def f(arguments: str = "{}") -> ToolCall:
    return ToolCall(name="f", arguments=arguments)


def g(arguments: str = "{}") -> ToolCall:
    return ToolCall(name="g", arguments=arguments)


@dataclass(frozen=True, kw_only=True)
class Said:
    """An answer: all content, and the calls."""

    content: str
    calls: tuple[ToolCall, ...]


def parsed(text: str, tool_format: str, names=None) -> Said:
    found = parse_tool_calls(text, tool_format, names)
    return Said(content=found.content, calls=found.calls)


def order_of(parts: list) -> list[str | None]:
    """Content as it stands between calls, for which None is."""
    order: list[str | None] = [""]
    for part in parts:
        if isinstance(part, str):
            order[-1] += part
        elif not isinstance(part, ToolCallDelta) or part.name is not None:
            order += [None, ""]
    return order


def streamed(pieces: list[str], tool_format: str, names=None) -> tuple[Said, list]:
    """What the pieces of a stream amount to, and the pieces that came out."""
    parser = ToolCallParser(tool_format, names)
    out = [parser.push(piece) for piece in pieces] + [parser.finish()]
    calls: list[ToolCall] = []
    for piece in out:
        for delta in piece.calls:
            if delta.name is not None:  # in the first of a call, and never again
                assert delta.index == len(calls)
                calls.append(ToolCall(name=delta.name, arguments=""))
            assert delta.index == len(calls) - 1
            call = calls[delta.index]
            calls[delta.index] = ToolCall(
                name=call.name, arguments=call.arguments + delta.arguments
            )
    assert parser.num_calls == len(calls)
    return Said(content="".join(p.content for p in out), calls=tuple(calls)), out


CASES = [
    (
        "hermes",
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
        "",
        [f('{"a": 1}')],
    ),
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n'
        '{"name": "g", "arguments": { "x" : "é\\n" }}\n</tool_call>\n',
        "Let me see.",
        [f(), g('{ "x" : "é\\n" }')],
    ),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [f('{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call> Done.', " Done.", [f()]),
    ("hermes", '<tool_call>{"name": "f"}', "", [f()]),  # ended by the end of the text
    ("hermes", '<tool_call>{"name": "f"}<tool_call>{"name": "g"}', "", [f(), g()]),
    ("llama3", '{"name": "f", "parameters": {"a": 1}}', "", [f('{"a": 1}')]),
    ("llama3", '\n{"type": "function", "name": "f", "parameters": {}}', "", [f()]),
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}', "", [f()]),
    ("llama3", 'Well: <|python_tag|>{"name": "f", "parameters": {}}', "Well:", [f()]),
    ("llama3", '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", [f(), g()]),
    (
        "llama3",
        '[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]',
        "",
        [f(), g()],
    ),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "", [f('{"a": 1}')]),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "a1"}, {"name": "g", "arguments": {}}]',
        "",
        [f(), g()],
    ),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}', "", [f('{"a": 1}')]),
    ("mistral", "Hm. [TOOL_CALLS]f{}[TOOL_CALLS]g[CALL_ID]Ab1[ARGS]{}", "Hm.", [f(), g()]),
    ("json", '{"name": "f", "arguments": {"a": {"b": []}}}', "", [f('{"a": {"b": []}}')]),
    ("json", '[{"name": "f", "arguments": {}}]\n', "", [f()]),
    ("json", '{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}', "", [f(), g()]),
]


@pytest.mark.parametrize(("tool_format", "text", "content", "calls"), CASES)
def test_calls_are_found(tool_format, text, content, calls):
    expected = Said(content=content, calls=tuple(calls))
    assert parsed(text, tool_format) == expected
    assert streamed(list(text), tool_format)[0] == expected
    assert streamed([text], tool_format, ["f", "g"])[0] == expected


NO_CALLS = [
    ("hermes", "Just <b>text</b> and <tool_ call>"),
    ("hermes", "<tool_call>oops</tool_call>"),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "x"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "thought": 1}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f\n"}</tool_call>'),
    ("hermes", '{"name": "f", "arguments": {}}'),
    ("hermes", '<tool_call>{"name": "f", "argu'),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", "  \n"),
    ("llama3", '<|python_tag|>brave_search.call(query="weather")'),
    ("llama3", '{"answer": 42}'),
    ("llama3", '{"name": "Ada Lovelace", "born": 1815}'),
    ("llama3", 'The JSON: {"name": "f", "parameters": {}}'),
    ("mistral", "[TOOL_CALLS]hello world"),
    ("mistral", "[TOOL_CALLS][]"),
    ("mistral", "[TOOL_CALLS]f[OTHER]{}"),
    ("mistral", '[{"name": "f", "arguments": {}}]'),
    ("json", "[1, 2]"),
    ("json", '{"name": "Ada"}'),
    ("json", "{"),
    ("json", ""),
    ("json", '```json\n{"name": "f"}'),
]


@pytest.mark.parametrize(("tool_format", "text"), NO_CALLS)
def test_what_is_no_call_stays_content(tool_format, text):
    expected = Said(content=text, calls=())
    names = ["f", "g"]
    assert parsed(text, tool_format, names) == expected
    assert streamed(list(text), tool_format, names)[0] == expected


def test_a_call_behind_a_broken_one_is_found():
    text = 'a <tool_call>oops <tool_call>{"name": "f"}</tool_call> b'
    expected = Said(content="a <tool_call>oops b", calls=(f(),))
    assert parsed(text, "hermes") == expected
    assert streamed(list(text), "hermes")[0] == expected


def test_a_call_that_breaks_off_late():
    text = 'a <tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call> b'
    assert parsed(text, "hermes") == Said(content=text, calls=())
    # What a stream has given out stands: a beginning of valid JSON, the rest being content.
    found, _ = streamed(list(text), "hermes")
    assert found == Said(content="a1}}</tool_call> b", calls=(f('{"a": 0'),))
    cut = '<tool_call>{"name": "f", "arguments": {"a": "b'
    assert parsed(cut, "hermes") == Said(content=cut, calls=())
    assert streamed(list(cut), "hermes")[0] == Said(content="", calls=(f('{"a": "b'),))


def test_arguments_are_given_out_while_they_come():
    parser = ToolCallParser("hermes")
    assert parser.push("Hi <tool_").content == "Hi"
    assert parser.push('call>{"name": "f", "argum') == parser.push("")
    (delta,) = parser.push('ents": {"a": "b').calls
    assert (delta.index, delta.name, delta.arguments) == (0, "f", '{"a": "b')
    (delta,) = parser.push('c"').calls
    assert (delta.index, delta.name, delta.arguments) == (0, None, 'c"')
    (delta,) = parser.push("}}</tool").calls
    assert delta.arguments == "}"
    assert parser.push("_call>") == parser.finish()


@settings(max_examples=600, deadline=None)
@given(
    chunked_texts(FRAGMENTS),
    st.sampled_from(TOOL_FORMATS[:-1]),  # harmony drops what stands around its messages
    st.sampled_from([None, ("f",), ("f", "g")]),
)
def test_pieces_give_what_the_whole_gives(pieces, tool_format, names):
    text = "".join(pieces)
    found, out = streamed(pieces, tool_format, names)
    assert found == streamed([text], tool_format, names)[0]
    whole = parsed(text, tool_format, names)
    for call in whole.calls:
        assert isinstance(json.loads(call.arguments), dict)
        assert names is None or call.name in names
        assert call.arguments in text or call.arguments == "{}"
    if not whole.calls:
        assert whole.content == text
    if len(whole.calls) == len(found.calls):
        assert whole == found
        parts = [part for piece in out for part in piece.parts]
        assert order_of(parts) == order_of(parse_tool_calls(text, tool_format, names).parts)
    left = iter(text)
    assert all(character in left for character in whole.content)  # in the text's order


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=10,
    ),
    st.booleans(),
    st.data(),
)
def test_any_arguments_come_through_unchanged(value, escapes, data):
    arguments = json.dumps({"value": value}, ensure_ascii=escapes)
    text = f'Hm.\n<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found, out = streamed(pieces, "hermes")
    assert found == Said(content="Hm.", calls=(f(arguments),))
    assert all("<" not in piece.content for piece in out)  # no part of a marker leaks


def test_a_long_answer_takes_linear_time():
    arguments = json.dumps({"text": "word " * 40_000})
    text = "x " * 50_000 + f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    pieces = [text[i : i + 5] for i in range(0, len(text), 5)]
    found, _ = streamed(pieces, "hermes")
    assert found.calls == (f(arguments),)
    assert found.content == text[:99_999]


def test_nesting_without_end_is_no_call():
    text = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 100_000
    assert parsed(text, "hermes") == Said(content=text, calls=())


HERMES = "{%- if tools %}{{ '<tool_call>\\n{\"name\": <function-name>' }}{% endif %}"
QWEN_CODER = "{{ '<tool_call>\\n<function=' + name + '>' }}"
LLAMA = '{% if tools %}{{ \'{"name": function name, "parameters": dictionary\' }}{% endif %}'


@pytest.mark.parametrize(
    ("template", "special", "expected"),
    [
        (HERMES, ["<|im_end|>"], "hermes"),
        (QWEN_CODER, ["<|im_end|>"], None),
        (LLAMA, ["<|eot_id|>", "<|python_tag|>"], "llama3"),
        ("{{ '[TOOL_CALLS]' }}", ["[INST]"], "mistral"),
        ("{{ m['content'] }}", ["[TOOL_CALLS]"], "mistral"),
        (LLAMA, ["<|end|>"], "json"),
        (PLAIN_TEMPLATE, ["<|end|>"], None),
        (None, ["[TOOL_CALLS]"], None),
    ],
)
def test_the_format_comes_from_the_folder(template, special, expected):
    assert find_tool_format(template, special) == expected


def test_formats_by_name():
    assert check_tool_format("hermes") == "hermes"
    assert check_tool_format("llama3_json") == "llama3"
    for wrong in ("", "gpt", None, 3, []):
        with pytest.raises(InvalidArgument, match="tool format: got .*, expected one of 'hermes'"):
            check_tool_format(wrong)
    assert has_special_marker("mistral", {"[TOOL_CALLS]", "</s>"})
    assert not has_special_marker("hermes", {"<|im_end|>"})


def test_ids_of_calls():
    ids = {new_call_id("hermes") for _ in range(100)}
    assert len(ids) == 100 and all(re.fullmatch("call_[0-9a-f]{24}", one) for one in ids)
    assert all(re.fullmatch("[A-Za-z0-9]{9}", new_call_id("mistral")) for _ in range(100))


def test_a_tokenizer_shows_the_template_for_tools(tmp_path: Path):
    folder = write_byte_tokenizer(tmp_path, chat_template=HERMES)
    assert Tokenizer(folder, 320).chat_template == HERMES
    named = tmp_path / "additional_chat_templates"
    named.mkdir()
    (named / "tool_use.jinja").write_text("{{ '[TOOL_CALLS]' }}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    shown = Tokenizer(folder, 320).chat_template
    assert shown == "{{ '[TOOL_CALLS]' }}" and find_tool_format(shown, ()) == "mistral"


def test_a_template_that_is_no_text_spoils_only_chats(tmp_path: Path):
    folder = write_byte_tokenizer(tmp_path, chat_template="{{ '\ud800' }}")
    tokenizer = Tokenizer(folder, 320)
    assert tokenizer.encode("a") and tokenizer.chat_template == "{{ '?' }}"
    bare = write_byte_tokenizer(tmp_path, chat_template=None)
    assert Tokenizer(bare, 320).chat_template is None
