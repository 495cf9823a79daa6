"""Conversations: what may be passed, what a template sees, and what is refused by name."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripted_model import BOS, SCRIPT, write_byte_tokenizer, write_scripted_model
from tidaldecode import Decoder
from tidaldecode.errors import ConfigError, InvalidArgument
from tidaldecode.text.tokenizer import Tokenizer

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}\n{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
        "'<|im_end|>' + '\n' }}\n{% endfor %}\n"
        "{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\n' }}"
        "\n{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = "
        "messages[0]['content'] %}{% else %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system | default('')) + "
        "m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "parts": (
        "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}\n{% endfor %}"
    ),
    "tools": (
        "{% if tools %}{{ tools | tojson }}{% for t in tools %}{{ t | tojson(indent=2) }}"
        "{% endfor %}{% endif %}{% if documents %}{{ documents | tojson }}{% endif %}"
        "{% for m in messages %}{{ m | tojson }}{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endif %}"
        "{% endfor %}"
    ),
    "control": (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}"
        "{{ ns.n }}{{ dict(a=1) | tojson }}{{ messages | map(attribute='role') | join(',') }}"
    ),
    "blocks": "  {% if true %}\n    a\n  {% endif %}\n\tb {#- comment -#}  c\n"
    "{%- if x is defined %}y{% endif %}\n",
    "time": "{{ strftime_now('%Y') }} {{ messages[-1].reasoning_content }}"
    "{{ messages[-1].thinking }}",
    "tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ image_token }}",
    "none": "{% for m in messages %}{{ m.content is none }}{{ m.content is defined }}{% endfor %}",
    "unsafe": "{{ ''.__class__ }}{{ messages.append(1) }}",
    "unfinished": "{% for m in messages %}",
    "undefined": "{{ nothing.at.all }}",
}
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Größe <|im_end|> 世界"}],
    "system": [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " hi "}],
    "turns": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning": "thought"},
        {"role": "user", "content": "three"},
    ],
    "calls": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ],
    "unknown_role": [{"role": "wizard", "content": "abra"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("scripted"))


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return Decoder(
        folder, device="cpu", attention="full", max_seq_len=256, max_batch_size=2, num_threads=1
    )


def shown(decoder: Decoder, messages: Any, **options: Any) -> str:
    return decoder.decode(decoder.render_chat(messages, **options), skip_special_tokens=False)


USER = [{"role": "user", "content": "é"}]


def test_the_answer_may_be_begun_or_not(decoder: Decoder):
    assert shown(decoder, USER) == "<s>[user]é>"
    assert shown(decoder, USER, add_generation_prompt=False) == "<s>[user]é"


def test_a_message_may_be_continued(decoder: Decoder):
    messages = [*USER, {"role": "assistant", "content": "So"}]
    assert shown(decoder, messages, continue_final_message=True) == "<s>[user]é[assistant]So"
    with pytest.raises(InvalidArgument, match="add_generation_prompt: got True with continue"):
        decoder.render_chat(messages, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(InvalidArgument, match="continue_final_message"):
        decoder.render_chat(messages, continue_final_message="reasoning_content")


def test_a_template_and_its_variables_may_be_given(decoder: Decoder):
    template = "{{ word }}{% if loud %}!{% endif %}{{ bos_token }}"
    assert shown(decoder, USER, chat_template=template, word="x", loud=True) == "x!<s>"
    assert shown(decoder, USER, chat_template=template, bos_token="B", word=np.int64(3)) == "3B"


def surrogate_tool(word: str) -> None: ...


# Python 3.13 compiles no such docstring.
surrogate_tool.__doc__ = "Says \ud800.\n\nArgs:\n    word: what.\n"


def unreadable_tool(word: "1 +") -> None:  # noqa: F722
    """Says it.

    Args:
        word: what.
    """


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temprature": 0.5}, "temprature: is neither a setting nor a variable"),
        ({"chat_template": "defualt"}, "chat_template: got 'defualt'.*default"),
        ({"chat_template": 5}, "chat_template: got 5"),
        ({"chat_template": "{% if %}"}, "chat template"),
        ({"chat_template": "{{ raise_exception('no') }}"}, "no"),
        ({"tools": "f"}, "tools: got 'f'"),
        ({"tools": [5]}, r"tools\[0\]: got 5"),
        ({"tools": [lambda x: x]}, "docstring"),
        ({"documents": 5}, "documents: got 5"),
        ({"documents": ["x"]}, r"documents\[0\]"),
        ({"add_generation_prompt": 1}, "add_generation_prompt: got 1"),
        ({"continue_final_message": 1}, "continue_final_message: got 1"),
        ({"chat_template": "{{ x }}", "x": object()}, "x: got a object"),
        ({"chat_template": "{{ x }}", "x": {(1,): 2}}, "x: got the key"),
        ({"chat_template": "{{ x }}", "x": "\ud800"}, "x: got the lone surrogate"),
        ({"chat_template": "a\udfffb"}, "chat_template: got the lone surrogate"),
        ({"continue_final_message": "\ud800"}, "continue_final_message: got the lone surrogate"),
        ({"tools": [surrogate_tool]}, r"tools\[0\]: got the lone surrogate"),
        ({"tools": [unreadable_tool]}, "type hints cannot be read"),
        ({"documents": [{"text": "\ud800"}]}, "documents: got the lone surrogate"),
        ({"stop": ["\ud800"]}, "stop: got the lone surrogate"),
        ({"chat_template": "{{ x }}", "x": 10**5000}, "x: got an integer of"),
    ],
)
def test_a_wrong_option_is_named(decoder: Decoder, options, expected: str):
    with pytest.raises(InvalidArgument, match=expected):
        decoder.chat(USER, **options)


def test_a_variable_without_end_is_refused(decoder: Decoder):
    endless: list = []
    endless.append(endless)
    with pytest.raises(InvalidArgument, match="x: is nested too deep"):
        decoder.render_chat(USER, chat_template="{{ x }}", x=endless)


def test_sampling_settings_and_chat_options_go_together(decoder: Decoder):
    result = decoder.chat(USER, max_new_tokens=1, add_generation_prompt=True)
    assert (result.text, result.finish_reason) == ("a", "length")
    with decoder.session() as session:
        assert session.chat(USER, chat_template="{{ w }}>", w="so", stop="世").text == "aé"
        assert "".join(session.chat_stream(USER, add_generation_prompt=True)) == SCRIPT


def test_several_conversations_are_one_call(decoder: Decoder):
    batch = [USER, [*USER, *USER], ({"role": "user", "content": "x"},)]
    ids = decoder.render_chat(batch)
    assert ids == [decoder.render_chat(conversation) for conversation in batch]
    results = decoder.chat(batch)
    assert [result.text for result in results] == [SCRIPT] * 3
    assert len(decoder.chat([USER])) == 1
    for call in (decoder.chat_stream, decoder.session().chat):
        with pytest.raises(InvalidArgument, match="got 3 conversations, expected one"):
            call(batch)


def test_text_parts_are_text(decoder: Decoder):
    parts = [{"type": "text", "text": "one"}, {"text": "two"}, "three"]
    assert shown(decoder, [{"role": "user", "content": parts}]) == "<s>[user]one\ntwo\nthree>"
    template = "{% macro show(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}"
    template += "{{ show(messages[0].content) }}"
    messages = [{"role": "user", "content": parts[:2]}]
    assert shown(decoder, messages, chat_template=template) == "onetwo"
    with pytest.raises(InvalidArgument, match="type 'image_url', expected text parts only"):
        decoder.render_chat([{"role": "user", "content": [{"type": "image_url"}]}])


def test_content_may_be_null_beside_calls(decoder: Decoder):
    call = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
    assert shown(decoder, [*USER, call]) == "<s>[user]é[assistant]>"
    with pytest.raises(InvalidArgument, match="got no content"):
        decoder.render_chat([{"role": "assistant", "content": None}])


class Role(str, enum.Enum):
    USER = "user"


@dataclasses.dataclass
class Message:
    role: Role
    content: str


class Model:
    def model_dump(self) -> dict[str, Any]:
        return {"role": "user", "content": "é", "name": None}


class Conversation:
    messages = USER


@pytest.mark.parametrize(
    "messages", [[Message(Role.USER, "é")], [Model()], Conversation(), tuple(USER)]
)
def test_messages_may_be_objects(decoder: Decoder, messages):
    assert decoder.render_chat(messages) == decoder.render_chat(USER)


@pytest.mark.parametrize(
    "messages",
    [
        "hi", b"hi", 5, None, [], {}, [[]], [USER, []], [USER, "x"], [None], ["hi"],
        [{"role": "user"}], [{"content": "x"}], [{"role": 5, "content": "x"}],
        [{"role": "user", "content": 5}], [{"role": "user", "content": [5]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "x", 5: object()}], [object()], [Message],
    ],
)  # fmt: skip
def test_messages_of_another_shape_are_named(decoder: Decoder, messages):
    with pytest.raises(InvalidArgument, match="messages"):
        decoder.chat(messages)


def test_unknown_roles_are_the_templates_business(decoder: Decoder):
    assert shown(decoder, CONVERSATIONS["unknown_role"]) == "<s>[wizard]abra>"


def test_a_template_that_cannot_be_read_spoils_only_chats(folder: Path, tmp_path: Path):
    write_byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff{{ x }}")
    tokenizer = Tokenizer(tmp_path, 320)
    assert tokenizer.encode("a") == [BOS, 97]
    with pytest.raises(ConfigError, match="chat template: .*is not UTF-8"):
        tokenizer.render_chat(USER)


def test_a_folder_with_named_templates_and_no_default_says_so(tmp_path: Path):
    write_byte_tokenizer(tmp_path, chat_template=None)
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "rag", "template": "{{ 1 }}"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    tokenizer = Tokenizer(tmp_path, 320)
    assert tokenizer.render_chat(USER, chat_template="rag") == [49]
    with pytest.raises(InvalidArgument, match="expected the name of one.*rag"):
        tokenizer.render_chat(USER)


def test_a_folder_may_have_any_name(tmp_path: Path):
    folder = tmp_path / os.fsdecode(b"\xff\xfe model")
    folder.mkdir()
    with Decoder(
        write_scripted_model(folder), device="cpu", attention="full", max_seq_len=64, num_threads=1
    ) as decoder:
        assert decoder.chat(USER, max_new_tokens=1).text == SCRIPT[0]
