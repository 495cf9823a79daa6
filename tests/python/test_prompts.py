"""Prompts of every kind that callers have at hand, and texts that follow others."""

from __future__ import annotations

import array
import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripted_model import BOS, EOS, SCRIPT, write_scripted_model
from text_folders import CORPUS, KINDS, write_tokenizer
from tidaldecode import Decoder
from tidaldecode.errors import InvalidArgument
from tidaldecode.text.prompts import encode_prompts
from tidaldecode.text.tokenizer import Tokenizer

OPTIONS = {"device": "cpu", "attention": "full", "max_seq_len": 64, "num_threads": 1}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = write_scripted_model(tmp_path_factory.mktemp("scripted"))
    return Decoder(folder, **OPTIONS, max_batch_size=2)


def read(prompt: Any) -> tuple[list[list[int]], bool]:
    return encode_prompts(prompt, lambda texts: [[*text.encode()] for text in texts], 320)


class Foreign:
    """An array of a library that knows numpy's protocol only."""

    def __init__(self, values: Any) -> None:
        self._values = np.asarray(values)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._values


INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


@pytest.mark.parametrize(
    "prompt",
    [
        [1, 2, 3], (1, 2, 3), range(1, 4), array.array("l", [1, 2, 3]),
        collections.deque([1, 2, 3]),
        [np.int32(1), 2, np.uint64(3)], Foreign([1, 2, 3]), {"input_ids": [1, 2, 3]},
        {"input_ids": np.array([1, 2, 3])}, collections.UserDict(input_ids=(1, 2, 3)),
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]},
        {"input_ids": [9, 9, 1, 2, 3], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": np.array([1, 2, 3, 9]), "attention_mask": np.array([1, 1, 1, 0])},
        *(np.array([1, 2, 3], kind) for kind in INTEGERS),
    ],
)  # fmt: skip
def test_one_prompt(prompt):
    assert read(prompt) == ([[1, 2, 3]], False)


@pytest.mark.parametrize(
    "prompt",
    [
        [[1, 2], [3, 4]], ((1, 2), range(3, 5)), np.array([[1, 2], [3, 4]]),
        Foreign([[1, 2], [3, 4]]), [np.array([1, 2]), "\x03\x04"],
        {"input_ids": [[1, 2], [3, 4]]},
        {"input_ids": np.array([[1, 2, 9], [9, 3, 4]]),
         "attention_mask": np.array([[1, 1, 0], [0, 1, 1]])},
        [{"input_ids": [1, 2]}, {"input_ids": [3, 4], "attention_mask": [1, 1]}],
    ],
)  # fmt: skip
def test_several_prompts(prompt):
    assert read(prompt) == ([[1, 2], [3, 4]], True)


def test_tensors_are_prompts():
    torch = pytest.importorskip("torch")
    assert read(torch.tensor([1, 2])) == ([[1, 2]], False)
    assert read(torch.tensor([[1, 2]], dtype=torch.int32)) == ([[1, 2]], True)
    assert read([torch.tensor([1, 2]), "a"]) == ([[1, 2], [97]], True)
    for wrong in (torch.tensor([1.0]), torch.tensor(5), torch.tensor([True])):
        with pytest.raises(InvalidArgument, match="prompt"):
            read(wrong)


def test_what_a_transformers_tokenizer_gives_is_a_prompt(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, "llama2", pad_token="<unk>", padding_side="left")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = tokenizer("hi").input_ids
    longer = tokenizer("hi there").input_ids
    assert encode_prompts(tokenizer("hi"), str, 10_000) == ([ids], False)
    batch = tokenizer(["hi", "hi there"], padding=True, return_tensors="np")
    assert encode_prompts(batch, str, 10_000) == ([ids, longer], True)


@pytest.mark.parametrize(
    "prompt",
    [
        5, None, b"bytes", bytearray(b"x"), {1, 2}, {"a": 1}, {}, [], [[]], [[1], []], "",
        np.array(5), np.array([1.5]), np.array([True]), np.array([]), np.zeros((2, 0), int),
        np.array([[[1]]]), [1, "a"], ["a", 1], [1.0], [True], [None], [-1], [320], [2**31],
        [2**63], [b"a"], [[1], b"a"], [[[1]]], object(), lambda: 1, int, iter([1]),
        {"input_ids": 5}, {"input_ids": []}, {"input_ids": [1, 2], "attention_mask": [1]},
        {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]},
        {"input_ids": [1, 2], "attention_mask": [0, 0]}, {"input_ids": [1], "attention_mask": 1},
        "\ud800", ["a", "\ud800"], memoryview(b""), np.array(["2026-01-01"], "datetime64[D]"),
    ],
)  # fmt: skip
def test_anything_else_is_named(prompt):
    with pytest.raises(InvalidArgument, match="prompt"):
        read(prompt)


@pytest.mark.parametrize("text", [5, None, b"x", ["a"], [1], True, "\udfff", {"a": 1}, object()])
def test_only_text_is_encoded(decoder: Decoder, text):
    with pytest.raises(InvalidArgument, match="prompt: got"):
        decoder.encode(text)


@pytest.mark.parametrize(
    "ids", [5, None, "abc", b"abc", [-1], [2**32], [1.5], [True], ["a"], [None], {1}, object(),
            [[1]], np.array(5), np.array([1.5]), np.array([[1]])]
)  # fmt: skip
def test_only_ids_are_decoded(decoder: Decoder, ids):
    with pytest.raises(InvalidArgument, match="token_ids"):
        decoder.decode(ids)


def test_ids_without_text_are_decoded(decoder: Decoder):
    assert decoder.decode([]) == ""
    assert decoder.decode([97, 319, 2**32 - 1, 98]) == "ab"
    assert decoder.decode(np.array([97, 98], np.uint8)) == decoder.decode(range(97, 99)) == "ab"


def test_special_tokens_are_added_and_shown_as_asked(decoder: Decoder):
    assert decoder.encode("a", add_special_tokens=False) == [97]
    assert decoder.decode([BOS, 97], skip_special_tokens=False) == "<s>a"
    assert decoder.generate(">", add_special_tokens=False).prompt_tokens == 1
    assert decoder.generate([">", ">"], add_special_tokens=False)[1].prompt_tokens == 1
    stream = decoder.stream(">", add_special_tokens=False, include_stop_str_in_output=True)
    assert "".join(stream) == SCRIPT and stream.result.prompt_tokens == 1
    options = {"skip_special_tokens": False}
    assert decoder.generate(">", **options).text == SCRIPT
    options["include_stop_str_in_output"] = True
    assert decoder.generate(">", **options).text == SCRIPT + "</s>"
    assert "".join(decoder.stream(">", **options)) == SCRIPT + "</s>"
    assert decoder.generate(">", stop="世", include_stop_str_in_output=True).text == "aé世"
    with decoder.session() as session:
        session.append("x", add_special_tokens=False)
        assert session.token_ids == [120]
        branch = decoder.session()
        branch.generate(">", add_special_tokens=False, max_new_tokens=1)
        assert branch.token_ids[0] == 62
        branch.close()
        assert session.generate(">", **options).text == SCRIPT + "</s>"
    for name in ("add_special_tokens", "skip_special_tokens", "include_stop_str_in_output"):
        with pytest.raises(InvalidArgument, match=f"{name}: got 1, expected True or False"):
            decoder.generate(">", **{name: 1})
    with pytest.raises(InvalidArgument, match="add_special_tokens: got None"):
        decoder.encode("x", add_special_tokens=None)


def test_a_special_token_stops_where_it_does_not_end_texts(decoder: Decoder):
    for stop in ("</s>", "P</s>", ["zzz", "STOP</s>"]):
        result = decoder.generate(">", stop=stop, ignore_eos=True, max_new_tokens=40)
        expected = SCRIPT[: SCRIPT.rfind((stop if isinstance(stop, str) else stop[1])[:-4])]
        assert (result.text, result.finish_reason) == (expected or SCRIPT, "stop")
        assert result.token_ids[-1] == EOS
        stream = decoder.stream(">", stop=stop, ignore_eos=True, max_new_tokens=40)
        assert "".join(stream) == result.text
        assert stream.result.stop_reason == result.stop_reason


def test_an_empty_answer_to_a_plain_text_is_explained_once(tmp_path: Path, caplog):
    folder = write_scripted_model(tmp_path, script="ab")
    with Decoder(folder, **OPTIONS, max_batch_size=1) as own:
        assert own.generate([98]).text == "" and not caplog.text  # ids: the caller knows
        own.chat([{"role": "user", "content": "b"}], chat_template="{{ messages[0].content }}")
        assert own.generate("a").text == "b" and not caplog.text
        assert own.generate("b").text == ""
        assert "".join(own.stream("b")) == ""
        assert caplog.text.count("--chat") == 1


# Texts that follow others


CUTS = [("the har", "bour"), ("The sky", " over"), ("1", "234"), ("a\n", "b"), ("é世", "界 x")]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("word")])
@pytest.mark.parametrize(("first", "later"), CUTS)
def test_a_later_text_goes_on_where_the_first_ended(tmp_path: Path, kind: str, first, later):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, kind), 10_000)
    ids = tokenizer.encode(first) + tokenizer.encode_following(later)
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(first + later))


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_text_is_read_as_the_whole_is_at_a_special_token(tmp_path: Path, kind: str):
    """After a special token inside of it a text is as it is in one piece."""
    tokenizer = Tokenizer(write_tokenizer(tmp_path, kind), 10_000)
    for text in ("<|im_start|>user\nhi there<|im_end|>\nyes", "</s><s> a", "<extra>b"):
        assert tokenizer.encode_following(text) == tokenizer.encode(text, add_special_tokens=False)
    mixed = CORPUS[0] + "</s>" + CORPUS[1]
    tail = tokenizer.encode("</s>" + CORPUS[1], add_special_tokens=False)
    assert tokenizer.encode_following(mixed)[-len(tail) :] == tail
    assert tokenizer.encode_following("") == []


@pytest.mark.parametrize("kind", ["byte_level", "llama3", "gemma", "word_level", "word_piece"])
def test_a_tokenizer_that_puts_nothing_in_front_reads_all_texts_alike(tmp_path: Path, kind: str):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, kind), 10_000)
    for text in CORPUS:
        assert tokenizer.encode_following(text) == tokenizer.encode(text, add_special_tokens=False)


def test_ids_of_a_long_prompt_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch):
    ids = list(range(256)) * 512
    monkeypatch.setattr("tidaldecode.text.prompts.as_index", None)
    monkeypatch.setattr("tidaldecode.text.prompts.show", None)  # a long list takes long
    assert read(ids) == ([ids], False)
    assert read([ids, ids]) == ([ids, ids], True)
    assert read(ids)[0][0] is not ids  # the caller's list may change


@pytest.mark.parametrize("wrong", [-1, 320, True, 1.5, "a", None])
def test_a_wrong_id_among_many_is_named(wrong: Any):
    ids = [5] * 300
    ids[200] = wrong
    with pytest.raises(InvalidArgument):
        read(ids)
    if not isinstance(wrong, (bool, str)):
        with pytest.raises(InvalidArgument, match=r"token_ids\[200\]"):
            read(ids)
