"""Penalties, biases and rules of a call's tokens: equal to transformers', and bad ones named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tidaldecode
from tidaldecode.errors import ConfigError, InvalidArgument
from tiny_models import TinyModel, random_prompt, write_checkpoint, write_tokenizer

MODEL = TinyModel(num_layers=5, num_q_heads=8, num_kv_heads=4, vocab_size=300, seed=7)
VOCAB = MODEL.vocab_size
NEW_TOKENS = 24
EOS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("rules"), MODEL)
    return write_tokenizer(folder, VOCAB)


@pytest.fixture(scope="module")
def dense(folder: Path) -> tidaldecode.Decoder:
    return open_decoder(folder, attention="full")


@pytest.fixture(scope="module")
def verified(folder: Path) -> tidaldecode.Decoder:
    return open_decoder(
        folder, attention="tidal", select_layers=(1, 3), full_layers=1, token_budget=12,
        sparse_min_context=0, verify=True,
    )  # fmt: skip


def open_decoder(folder: Path, **options: Any) -> tidaldecode.Decoder:
    return tidaldecode.Decoder(
        folder, device="cpu", dtype="float32", max_seq_len=256, num_threads=1, **options
    )


ids = st.integers(0, VOCAB - 1)
# What the model likes to write is what rules have a say in.
rules = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.8, 1.2, 2.0]),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "no_repeat_ngram_size": st.integers(0, 4),
        "min_new_tokens": st.integers(0, 20),
        "suppress_tokens": st.lists(ids, max_size=40),
        "bad_words": st.lists(st.lists(ids, min_size=1, max_size=3), max_size=20),
        "logit_bias": st.dictionaries(ids, st.floats(-6, 6), max_size=20),
        "allowed_token_ids": st.lists(ids, min_size=40, unique=True),
    },
)


class Generated:
    """A LogitsProcessor with the penalties of the OpenAI API and the tokens a call allows."""

    def __init__(self, options: dict[str, Any], prompt_len: int) -> None:
        self.options, self.prompt_len = options, prompt_len

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        counts = np.bincount(input_ids[0, self.prompt_len :].numpy(), minlength=VOCAB)
        scores = scores.clone()
        for token_id in np.flatnonzero(counts):
            scores[0, token_id] -= self.options.get("frequency_penalty", 0.0) * counts[token_id]
            scores[0, token_id] -= self.options.get("presence_penalty", 0.0)
        allowed = self.options.get("allowed_token_ids")
        if allowed is not None:
            others = np.setdiff1d(np.arange(VOCAB), allowed)
            scores[0, others] = -np.inf
        return scores


@pytest.fixture(scope="module")
def reference(folder: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def generate(prompt: list[int], options: dict[str, Any]) -> list[int]:
        named = {"repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"}
        own = {name: value for name, value in options.items() if name in named}
        if options.get("suppress_tokens"):
            own["suppress_tokens"] = options["suppress_tokens"]
        if words := [word for word in options.get("bad_words", []) if word != [EOS]]:
            own["bad_words_ids"] = words
        if options.get("logit_bias"):
            own["sequence_bias"] = {(t,): float(b) for t, b in options["logit_bias"].items()}
        processors = transformers.LogitsProcessorList([Generated(options, len(prompt))])
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
            eos_token_id=EOS, logits_processor=processors, **own,
        )  # fmt: skip
        return output[0, len(prompt) :].tolist()

    return generate


def written(decoder: tidaldecode.Decoder, prompt: Any, options: dict[str, Any], **more: Any):
    settings = {"max_new_tokens": NEW_TOKENS, "temperature": 0} | options | more
    return list(decoder.generate(prompt, **settings).token_ids)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(options=rules, length=st.integers(4, 60))
def test_the_tokens_are_those_of_transformers(dense, reference, options, length):
    prompt = random_prompt(MODEL, length, seed=length)
    stops = {"stop_token_ids": [EOS]}
    assert written(dense, prompt, options | stops) == reference(prompt, options)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    options=rules,
    length=st.integers(1, 120),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    seed=st.integers(0, 2**64 - 1),
)
def test_verified_tokens_are_those_of_dense_decoding(
    dense, verified, options, length, temperature, seed
):
    prompts = [random_prompt(MODEL, n, seed=n) for n in (length, 50)]
    draws = {
        "temperature": temperature, "seed": seed, "stop_token_ids": [EOS],
        "max_new_tokens": NEW_TOKENS,
    }  # fmt: skip
    expected = dense.generate(prompts, **(options | draws))
    actual = verified.generate(prompts, **(options | draws))
    assert [r.token_ids for r in actual] == [r.token_ids for r in expected]
    assert [r.finish_reason for r in actual] == [r.finish_reason for r in expected]


# Each alone, where it can be seen


PROMPT = random_prompt(MODEL, 40, seed=3)


def test_a_bias_decides_and_a_banned_token_does_not_come(dense):
    assert set(written(dense, PROMPT, {"logit_bias": {77: 100}})) == {77}
    assert set(written(dense, PROMPT, {"logit_bias": {"77": 100.0, "78": -1}})) == {77}
    plain = written(dense, PROMPT, {})
    for name, value in {"suppress_tokens": plain, "bad_words": [[t] for t in plain]}.items():
        assert not set(written(dense, PROMPT, {name: value})) & set(plain), name
    assert set(written(dense, PROMPT, {"allowed_token_ids": np.array([8, 9])})) <= {8, 9}


def test_generated_tokens_count_and_those_of_the_prompt_do_not(dense):
    # After so many of them, 77 is ahead of 78 by 1, and both of all others.
    logits = dense.logits([77] * 31)[0]
    bias = {"logit_bias": {77: 81 + float(logits[78] - logits[77]), 78: 80}}
    assert written(dense, [77] * 30, bias, max_new_tokens=2) == [77, 77]
    for name in ("presence_penalty", "frequency_penalty"):
        assert written(dense, [77] * 30, bias | {name: 2.0}, max_new_tokens=2) == [77, 78], name
    with dense.session() as session:  # what an earlier turn wrote was given to this one
        turns = [
            session.generate([77], max_new_tokens=1, presence_penalty=2.0, **bias).token_ids[0]
            for _ in range(4)
        ]
    assert turns == [77] * 4


def test_text_does_not_end_before_so_many_tokens(dense):
    everything = {"stop_token_ids": list(range(0, VOCAB, 2))}
    for number in (0, 1, 7):
        tokens = written(dense, PROMPT, everything | {"min_new_tokens": number})
        assert all(token % 2 == 1 for token in tokens[:number])
        assert len(tokens) > number or number == 0


def test_no_pair_occurs_twice(dense):
    tokens = PROMPT + written(dense, PROMPT, {"no_repeat_ngram_size": 2, "logit_bias": {9: 8}})
    pairs = list(zip(tokens[len(PROMPT) - 1 :], tokens[len(PROMPT) :], strict=False))
    assert len(set(pairs)) == len(pairs)


def test_bad_words_are_texts_too(dense):
    text = dense.generate(PROMPT, max_new_tokens=NEW_TOKENS, temperature=0).text
    word = next(part for part in text.split() if part.isascii() and part.isprintable())
    other = dense.generate(PROMPT, max_new_tokens=NEW_TOKENS, temperature=0, bad_words=[word]).text
    assert word in text and word not in other


def test_an_end_of_text_is_no_bad_word(tmp_path: Path):
    folder = write_checkpoint(tmp_path, MODEL)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    decoder = open_decoder(folder, attention="full")
    bias = {"logit_bias": {EOS: 100.0}}
    assert written(decoder, PROMPT, bias | {"bad_words": [[EOS]]}) == [EOS]
    assert EOS not in written(decoder, PROMPT, bias | {"suppress_tokens": [EOS]})


def test_nothing_left_to_draw_is_an_error_of_its_sequence(dense):
    options = {"allowed_token_ids": [8, 9], "suppress_tokens": [8, 9]}
    result = dense.generate(PROMPT, max_new_tokens=3, **options)
    assert result.finish_reason == "error" and "nothing above -inf" in result.error
    assert "change settings that forbid tokens (allowed_token_ids, " in result.error
    assert dense.num_free_pages == dense.config.num_pages


def test_text_as_bad_words_needs_a_tokenizer(tmp_path: Path):
    decoder = open_decoder(write_checkpoint(tmp_path, MODEL), attention="full")
    assert written(decoder, [1, 2], {"bad_words": [[1, 2]]})
    with pytest.raises(ConfigError, match="tokenizer"):
        decoder.generate([1, 2], bad_words=["a"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"frequency_penalty": 2.5}, "frequency_penalty: got 2.5, expected a finite number >= -2"),
        ({"presence_penalty": "much"}, "presence_penalty: got 'much'"),
        ({"min_new_tokens": -1}, "min_new_tokens: got -1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens: got 9, expected at most"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size: got 1.5"),
        ({"logit_bias": [5]}, "logit_bias: got .*, expected a dictionary"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias: got 300, expected token ids from 0 to 299"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias: got 'x'"),
        ({"logit_bias": {True: 1.0}}, "logit_bias: got True"),
        ({"logit_bias": {1: 101}}, "logit_bias: got 101, expected a finite number >= -100"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias: got 1025 tokens"),
        ({"suppress_tokens": 5}, "suppress_tokens: got 5, expected a list"),
        ({"suppress_tokens": [-1]}, "suppress_tokens: got -1"),
        ({"suppress_tokens": {5: 1}}, "suppress_tokens: got"),
        ({"allowed_token_ids": []}, "allowed_token_ids: got an empty list"),
        ({"allowed_token_ids": [1.0]}, "allowed_token_ids: got 1.0"),
        ({"bad_words": "word"}, "bad_words: got 'word', expected a list of texts"),
        ({"bad_words": [5]}, "bad_words: got 5"),
        ({"bad_words": [[]]}, "bad_words: got .*, expected a text or at least one"),
        ({"bad_words": [""]}, "bad_words: got a text of 0 characters"),
        ({"bad_words": ["\ud800"]}, "bad_words: got the lone surrogate"),
        ({"bad_words": [[1, VOCAB]]}, "bad_words: got 300"),
        ({"bad_words": [[1]] * 5000}, "bad_words: got 5000 words, expected at most 4096"),
    ],
    ids=str,
)
def test_bad_ones_are_named(dense, options, expected):
    with pytest.raises(InvalidArgument, match=expected):
        dense.generate(PROMPT, **options)
    assert dense.num_free_pages == dense.config.num_pages
