"""Texts that begin as earlier ones have the ids they would have had alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

import text_folders
from tidaldecode.text.worker import known_texts
from tidaldecode.text.worker.backend import Backend

PIECES = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_end", "|>", "<extra>", "<unk>", "<far>",
    " <far> ", "\n", " ", "  ", "user", "The sky over", " the harbour", "it's", "Größe é",
    "世界🎉", "1234", "e\u0301", "<|im_end|><|more|>",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@pytest.fixture(params=text_folders.KINDS, scope="module")
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backend:
    folder = text_folders.write_tokenizer(tmp_path_factory.mktemp("known"), request.param)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    # One that takes space in, one that holds another, one that is looked for in other spellings.
    tokenizer.add_special_tokens([AddedToken("<far>", lstrip=True, rstrip=True)])
    tokenizer.add_special_tokens([AddedToken("<|im_end|><|more|>")])
    tokenizer.add_tokens([AddedToken("sky over", normalized=True)])
    tokenizer.save(str(path))
    return Backend(str(folder), False)


@pytest.fixture(autouse=True)
def any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_texts, "LEAST_CHARS", 0)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXTS, min_size=2, max_size=6), grow=st.booleans())
def test_ids_are_those_of_the_text_alone(backend: Backend, texts: list[str], grow: bool):
    before = ""
    for text in texts:
        text = before + text if grow else text
        before = text
        assert backend._known_texts.ids_of(text) == backend._encode(text, False)


def test_only_what_is_new_is_tokenised(tmp_path: Path):
    folder = text_folders.write_tokenizer(tmp_path, "llama3")
    backend = Backend(str(folder), False)
    seen: list[str] = []

    def encode(text: str) -> list[int]:
        seen.append(text)
        return backend._encode(text, False)

    known = known_texts.KnownTexts(backend._added, encode)
    sky = "The sky over the harbour. " * 40
    turns = [f"<|im_start|>user\n{i} {sky}<|im_end|>" for i in range(4)]
    for count in range(1, 5):
        known.ids_of("".join(turns[:count]) + "<|im_start|>")
    assert seen[1:] == ["user" + turn[16:] + "<|im_start|>" for turn in turns[1:]]
    known.ids_of(turns[0] + "<|im_end|>")  # as one of them, up to where it differs
    assert seen[-1] == "<|im_end|>"
    known.ids_of(turns[0].replace("harbour", "market", 1))
    assert seen[-1].startswith("user\n0 The sky over the market")


def test_they_are_not_kept_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    backend = Backend(str(text_folders.write_tokenizer(tmp_path, "llama3")), False)
    monkeypatch.setattr(known_texts, "_MOST_CHARS", 1000)
    known = backend._known_texts
    for i in range(100):
        known.ids_of(f"<|im_start|>{i}" + "a" * 90)
    assert sum(map(len, known._texts)) <= 1000
    known.ids_of("<|im_start|>" + "a" * 5000)
    assert not known._texts


def test_a_long_conversation_goes_on_at_once(tmp_path: Path):
    backend = Backend(str(text_folders.write_tokenizer(tmp_path, "llama3")), False)
    text = "<|im_start|>user\n" + " ".join(text_folders.CORPUS) * 150 + "<|im_end|>"
    began = time.perf_counter()
    backend._known_texts.ids_of(text)
    first = time.perf_counter() - began
    began = time.perf_counter()
    ids = backend._known_texts.ids_of(text + "<|im_start|>assistant\n")
    again = time.perf_counter() - began
    assert ids == backend._encode(text + "<|im_start|>assistant\n", False)
    assert again < first / 2
