"""Text around the engine: the chat template, and folders without a usable tokenizer."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from scripted_model import BOS, EOS, SCRIPT, write_byte_tokenizer, write_scripted_model
from tidaldecode import Decoder
from tidaldecode.errors import ConfigError, InvalidArgument
from tidaldecode.text.tokenizer import Tokenizer
from tiny_models import TinyModel, random_prompt, write_checkpoint

TINY = TinyModel(num_layers=4)
OPTIONS = {"device": "cpu", "attention": "full", "max_seq_len": 64, "num_threads": 1}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = write_scripted_model(tmp_path_factory.mktemp("scripted"))
    return Decoder(folder, **OPTIONS, max_batch_size=1)


@pytest.fixture(scope="module")
def wordless(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A model without a tokenizer."""
    folder = write_checkpoint(tmp_path_factory.mktemp("wordless"), TINY)
    return Decoder(folder, **OPTIONS, max_batch_size=1)


# Chat


def test_chat_goes_through_the_folders_template(decoder: Decoder):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "é"}]
    ids = decoder.render_chat(messages)
    assert bytes(ids[1:]).decode() == "[system]be[user]é>"
    assert ids[0] == BOS and BOS not in ids[1:]
    assert decoder.chat(messages).text == SCRIPT
    assert "".join(decoder.chat_stream(messages)) == SCRIPT


@pytest.mark.parametrize(
    "messages", ["hi", [], ["hi"], [{"role": "user"}], [{"role": "user", "content": 5}], {}, None]
)
def test_bad_messages_are_named(decoder: Decoder, messages):
    with pytest.raises(InvalidArgument, match="messages"):
        decoder.chat(messages)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "chat template"),
        ("{{ missing.attribute }}", "chat template"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "chat template"),
        (
            "{{ ''.__class__.__base__ }}{{ cycler.__init__.__globals__.os.system('true') }}",
            "template",
        ),
    ],
)
def test_a_template_that_fails_is_a_config_error(tmp_path: Path, template, expected):
    folder = write_byte_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(ConfigError, match=expected):
        Tokenizer(folder, 320).render_chat([{"role": "user", "content": "x"}])


def test_a_template_that_never_ends_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tidaldecode.text.tokenizer.TEMPLATE_SECONDS", 0.3)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    folder = write_byte_tokenizer(tmp_path, chat_template=loops)
    before = threading.active_count()
    with pytest.raises(ConfigError, match="still running after"):
        Tokenizer(folder, 320).render_chat([{"role": "user", "content": "x"}])
    assert threading.active_count() == before


def test_a_template_that_floods_is_refused(tmp_path: Path):
    folder = write_byte_tokenizer(tmp_path, chat_template="{{ 'x' * 100000000 }}")
    with pytest.raises(ConfigError, match="gave 100000000 characters"):
        Tokenizer(folder, 320).render_chat([{"role": "user", "content": "x"}])


# Without a tokenizer


def test_ids_work_without_a_tokenizer(wordless: Decoder):
    result = wordless.generate(random_prompt(TINY, 5), max_new_tokens=3)
    assert result.text is None
    assert len(result.token_ids) == 3


def test_text_without_a_tokenizer_is_explained(wordless: Decoder):
    for call in (
        lambda: wordless.generate("text"),
        lambda: wordless.generate([1], stop="x"),
        lambda: wordless.stream([1]),
        lambda: wordless.chat([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(ConfigError, match=r"no tokenizer \(tokenizer.json\)"):
            call()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 5}', b"\xff" * 100])
def test_a_damaged_tokenizer_is_a_config_error(tmp_path: Path, content: bytes):
    write_byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match="tokenizer"):
        Tokenizer(tmp_path, 320)


def test_a_huge_tokenizer_is_refused_unread(tmp_path: Path):
    write_byte_tokenizer(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match="1073741824 bytes, expected at most"):
        Tokenizer(tmp_path, 320)


def test_a_tokenizer_may_be_smaller_or_larger_than_the_model(tmp_path: Path):
    write_byte_tokenizer(tmp_path, vocab_size=300)
    assert Tokenizer(tmp_path, 300).encode("a") == [BOS, 97]
    assert Tokenizer(tmp_path, 320).decode([BOS, 97, EOS]) == "a"
    smaller = Tokenizer(tmp_path, 299)
    assert smaller.encode("a<x298>") == [BOS, 97, 298]
    with pytest.raises(InvalidArgument, match="'<x299>', whose id is 299.*vocab_size 299"):
        smaller.encode("a<x299>")
