"""Token ids, texts and rendered templates are those of transformers."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any, Literal

import pytest

from reference_transformers import TRANSFORMERS
from test_chat import CONVERSATIONS, TEMPLATES
from text_folders import CORPUS, KINDS, TEXTS, write_tokenizer
from tidaldecode.errors import ConfigError
from tidaldecode.text.tokenizer import Tokenizer
from tidaldecode.text.tool_schema import function_schema

transformers = pytest.importorskip("transformers", minversion=TRANSFORMERS)

VOCAB_SIZE = 10_000


def both(folder: Path) -> tuple[Tokenizer, Any]:
    """Ours, and transformers' with its class for any tokenizer.json."""
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return Tokenizer(folder, VOCAB_SIZE), theirs


def assert_same(ours: Tokenizer, theirs: Any) -> None:
    assert ours.num_tokens == len(theirs)
    for text in TEXTS:
        for special in (True, False):
            expected = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == expected, text
            for skip in (True, False):
                text_of = theirs.decode(expected, skip_special_tokens=skip)
                assert ours.decode(expected, skip_special_tokens=skip) == text_of
    unknown = [0, len(theirs) + 5, 3, 9999, 1]
    for skip in (True, False):
        expected = theirs.decode(unknown, skip_special_tokens=skip)
        assert ours.decode(unknown, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_of_every_kind(tmp_path: Path, kind: str):
    assert_same(*both(write_tokenizer(tmp_path, kind)))


ADDED = {"content": "<new>", "lstrip": True, "rstrip": False, "normalized": False,
         "single_word": False, "special": True}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {"bos_token": ..., "tokenizer_class": ...},
    "flags": {"add_bos_token": True, "add_eos_token": True, "eos_token": "</s>"},
    "no_bos": {"add_bos_token": False, "legacy": True},
    "dict": {"bos_token": {"__type": "AddedToken"} | ADDED, "eos_token": "</s>"},
    "new_eos": {"eos_token": "<eos-of-its-own>", "pad_token": "<pad>"},
    "named_extra": {"eos_token": "<extra>"},
    "null": {"bos_token": None, "eos_token": None},
    "decoder": {"added_tokens_decoder": {"1": ADDED | {"content": "<s>"}, "700": ADDED}},
    "additional": {"additional_special_tokens": ["<extra>", "<more>"]},
    "extra": {"extra_special_tokens": ["<more>"]},
    "named_and_listed": {
        "extra_special_tokens": {"image_token": "<image>"},
        "additional_special_tokens": ["<more>"],
    },
    "model_specific": {"extra_special_tokens": {"image_token": "<image>"}, "audio_token": "<a>"},
    "clean_up": {"clean_up_tokenization_spaces": True},
    "split": {"split_special_tokens": True, "eos_token": "</s>"},
}


@pytest.mark.parametrize("kind", ["byte_level", "llama3", "llama2", "word_level", "word_piece"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_side_files_fields_mean_the_same(tmp_path: Path, kind: str, name: str):
    assert_same(*both(write_tokenizer(tmp_path, kind, **CONFIGS[name])))


@pytest.mark.parametrize("kind", ["byte_level", "llama2"])
def test_older_side_files_mean_the_same(tmp_path: Path, kind: str):
    write_tokenizer(tmp_path, kind, eos_token="</s>")
    names = {"eos_token": "<|im_end|>", "pad_token": {k: v for k, v in ADDED.items()},
             "additional_special_tokens": ["<tool>"]}  # fmt: skip
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<late>": 900, "<extra>": 901}))
    assert_same(*both(tmp_path))


def test_padding_and_truncation_of_the_file_are_off(tmp_path: Path):
    write_tokenizer(tmp_path, "llama3")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst",
                             "stride": 0}  # fmt: skip
    content["padding"] = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_token": "<unk>",
                          "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}  # fmt: skip
    path.write_text(json.dumps(content))
    assert_same(*both(tmp_path))


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer", "GemmaTokenizer", "None"])
@pytest.mark.parametrize("kind", ["byte_level", "gemma", "unigram"])
def test_a_file_keeps_its_own_ids_whatever_class_is_named(tmp_path: Path, kind: str, name: str):
    write_tokenizer(tmp_path, kind, tokenizer_class=name)
    assert_same(*both(tmp_path))


def test_a_sentencepiece_class_gives_the_same_where_it_fits(tmp_path: Path):
    """transformers' own class of this name differs for texts that begin with a space."""
    write_tokenizer(tmp_path, "llama2", tokenizer_class="LlamaTokenizerFast", legacy=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = Tokenizer(tmp_path, VOCAB_SIZE)
    for text in CORPUS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)[1:])


# Templates


def assert_same_chat(ours: Tokenizer, theirs: Any, messages: Any, **options: Any) -> None:
    """Equal ids, or both refuse."""
    try:
        expected = theirs.apply_chat_template(
            messages, **{"add_generation_prompt": True} | options, return_dict=False
        )
    except Exception:
        with pytest.raises(ConfigError):
            ours.render_chat(messages, **options)
        return
    assert ours.render_chat(messages, **options) == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_the_same(tmp_path: Path, template: str):
    write_tokenizer(tmp_path, "llama3", chat_template=TEMPLATES[template], eos_token="</s>")
    ours, theirs = both(tmp_path)
    for messages in CONVERSATIONS.values():
        assert_same_chat(ours, theirs, messages)
        assert_same_chat(ours, theirs, messages, add_generation_prompt=False)


def test_parts_reach_a_template_that_reads_them(tmp_path: Path):
    write_tokenizer(tmp_path, "llama3", chat_template=TEMPLATES["parts"])
    ours, theirs = both(tmp_path)
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    assert_same_chat(ours, theirs, messages)
    continued = [*messages, {"role": "assistant", "content": parts}]
    assert_same_chat(
        ours, theirs, continued, continue_final_message=True, add_generation_prompt=False
    )


def test_a_message_is_continued_the_same(tmp_path: Path):
    write_tokenizer(tmp_path, "llama3", chat_template=TEMPLATES["chatml"])
    ours, theirs = both(tmp_path)
    for text in ("The answer", "ends in a space ", "  begins", "lines\n"):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
        options = {"continue_final_message": True, "add_generation_prompt": False}
        assert_same_chat(ours, theirs, messages, **options)
        trimmed = TEMPLATES["chatml"].replace("m['content']", "m['content'] | trim")
        assert_same_chat(ours, theirs, messages, chat_template=trimmed, **options)


def search(query: str, limit: int = 5, kinds: list[str] | None = None) -> list[dict[str, int]]:
    """Searches the archive.

    Looks everywhere.

    Args:
        query: what to look for, which may
            go on in a second line
        limit (int): how many: at most
        kinds: of what kind (choices: ["book", "map"])

    Returns:
        What was found.

    Raises:
        ValueError: never
    """
    raise NotImplementedError


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


def paint(
    colour: Colour,
    mode: Literal["wet", "dry", 3],
    size: tuple[int, float],
    names: dict[str, list[float]],
    either: int | str,
    several: int | list[int] | None,
    anything: Any,
) -> None:
    """Paints.

    Args:
        colour: one
        mode: two
        size: three
        names: four
        either: five
        several: six
        anything: seven
    """
    raise NotImplementedError


class Shop:
    def buy(self, item: str = "tea") -> str:
        """Buys.

        Args:
            item: what
        """
        raise NotImplementedError


def ping() -> Colour:
    """Pings."""
    raise NotImplementedError


@pytest.mark.parametrize("tool", [search, paint, Shop().buy, ping])
def test_a_function_has_the_same_schema(tool):
    assert function_schema(tool) == transformers.utils.get_json_schema(tool)


def test_tools_and_documents_reach_the_template_alike(tmp_path: Path):
    write_tokenizer(tmp_path, "llama3", chat_template=TEMPLATES["tools"])
    ours, theirs = both(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    schema = {"type": "function", "function": {"name": "f", "parameters": {"é": [1, None, 2.5]}}}
    documents = [{"title": '<a> & "b"', "text": "c"}]
    for tools in (None, [search], [schema, paint, Shop().buy], []):
        assert_same_chat(ours, theirs, messages, tools=tools, documents=documents)


NAMED = [{"name": "default", "template": "D{{ messages[0].content }}"},
         {"name": "tool_use", "template": "T{{ messages[0].content }}{{ tools | length }}"},
         {"name": "rag", "template": "R{{ messages[0].content }}"}]  # fmt: skip


@pytest.mark.parametrize("place", ["field", "files", "field_and_file"])
def test_named_templates_are_chosen_alike(tmp_path: Path, place: str):
    write_tokenizer(
        tmp_path, "byte_level", **({} if place == "files" else {"chat_template": NAMED})
    )
    if place != "field":
        (tmp_path / "chat_template.jinja").write_text("F{{ messages[0].content }}")
    if place == "files":
        more = tmp_path / "additional_chat_templates"
        more.mkdir()
        for entry in NAMED[1:]:
            (more / f"{entry['name']}.jinja").write_text(entry["template"])
    ours, theirs = both(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    assert_same_chat(ours, theirs, messages)
    assert_same_chat(ours, theirs, messages, tools=[search])
    if place != "field_and_file":
        assert_same_chat(ours, theirs, messages, chat_template="rag")
    assert_same_chat(ours, theirs, messages, chat_template="own {{ messages[0].role }}")


def test_a_processors_template_file_is_read_too(tmp_path: Path):
    write_tokenizer(tmp_path, "byte_level")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "P{{ bos_token }}"}))
    ours = Tokenizer(tmp_path, VOCAB_SIZE)
    assert ours.decode(ours.render_chat([{"role": "user", "content": ""}])) == "P"
