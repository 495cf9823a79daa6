"""Texts put together from bytes of tokens, beside what the tokenizer itself makes of the ids."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from text_folders import KINDS, write_tokenizer
from tidaldecode.checkpoint.generation_defaults import GenerationDefaults
from tidaldecode.errors import ConfigError
from tidaldecode.sampling import SamplingSettings, check_sampling
from tidaldecode.text.detokenizer import TextAssembler, push_all
from tidaldecode.text.tokenizer import Tokenizer

VOCAB = 8192


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path):
    tokenizer = Tokenizer(demo_model, VOCAB)
    yield tokenizer
    tokenizer.close()


def slow_pieces(tokenizer: Tokenizer, row: dict) -> str:
    """As the text process makes them."""
    rows = [row | {"state": None, "ends": True}]
    answer = tokenizer._call("detokenize", {"rows": rows}, tokenizer._id_limits(10_000))
    return "".join(answer[0]["pieces"])


def test_the_demo_model_is_one_of_those(tokenizer: Tokenizer):
    assert tokenizer.joins_bytes


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_any_tokens_give_the_text_that_the_tokenizer_gives(
    tokenizer: Tokenizer, seed: int, skips: bool
):
    draw = random.Random(seed)
    # Half of the draws are single bytes and special tokens: characters that never become whole.
    ids = [draw.randrange(VOCAB if draw.random() < 0.5 else 300) for _ in range(200)]
    prompt = ids[:5] if seed % 2 else []
    new = ids[len(prompt) :]
    row = {"prompt": prompt, "ids": new, "skips": skips}
    fast, text = tokenizer.byte_text(prompt, skips=skips), ""
    for start in range(0, len(new), 7):
        text += fast.push(new[start : start + 7], ends=start + 7 >= len(new))
    assert text == slow_pieces(tokenizer, row)
    if not prompt:
        assert text == tokenizer.decode(new, skip_special_tokens=skips)


@pytest.mark.parametrize(
    "text", ["é世界🎉", "a\u0301 déjà", "\U0001f469\u200d\U0001f52c", "\ufffd"]
)
@pytest.mark.parametrize("cut", range(1, 8))
def test_a_character_that_the_prompt_begins_and_the_answer_ends(
    tokenizer: Tokenizer, text: str, cut: int
):
    ids = tokenizer.encode(text, add_special_tokens=False)
    row = {"prompt": ids[:cut][-5:], "ids": ids[cut:], "skips": True}
    text = tokenizer.byte_text(row["prompt"], skips=True).push(row["ids"], ends=True)
    assert text == slow_pieces(tokenizer, row)


def test_a_piece_never_holds_part_of_a_character(tokenizer: Tokenizer):
    ids = tokenizer.encode("🎉🎉 and 世界", add_special_tokens=False)
    pieces = tokenizer.byte_text([], skips=True).pieces(ids, ends=True)
    assert "".join(pieces) == "🎉🎉 and 世界"
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_of_tokens_are_asked_for_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    ids = [5000, 5001, 5002]
    first = tokenizer.token_bytes(ids)
    monkeypatch.setattr(tokenizer, "_call", None)
    assert tokenizer.token_bytes(ids) == first


class Asked:
    """A tokenizer that counts how often its process is asked, and that one token breaks."""

    def __init__(self, tokenizer: Tokenizer, breaks: int = -1) -> None:
        self.joins_bytes, self.special_tokens = tokenizer.joins_bytes, tokenizer.special_tokens
        self.byte_text = tokenizer.byte_text
        self.num_calls = 0
        self._tokenizer, self._breaks = tokenizer, breaks

    def detokenize(self, rows: list[dict]) -> list[dict]:
        self.num_calls += 1
        if any(self._breaks in row["ids"] for row in rows):
            raise ConfigError("tokenizer: it has crashed")
        return self._tokenizer.detokenize(rows)


def settings(**sampling: object) -> SamplingSettings:
    return check_sampling(
        defaults=GenerationDefaults(), eos_token_ids=(), vocab_size=1000,
        encode_word=lambda _: [], **sampling,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_many_calls_are_those_of_each_alone(tmp_path: Path, kind: str):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, kind), 10**6)
    source, draw = Asked(tokenizer), random.Random(3)
    ids = [[draw.randrange(tokenizer.num_tokens) for _ in range(12)] for _ in range(5)]
    ids[2] = []
    asked = [settings(), settings(stop="a"), settings(skip_special_tokens=False)] * 2
    together = [TextAssembler(source, [[3, 4]], each) for each in asked[:5]]
    shown = [""] * 5
    for start in range(0, 12, 4):
        news = [each[start : start + 4] for each in ids]
        for row, text in enumerate(push_all(list(zip(together, news, strict=True)))):
            shown[row] += text
    assert source.num_calls == (0 if tokenizer.joins_bytes else 3)
    for row in range(5):
        alone = TextAssembler(tokenizer, [[3, 4]], asked[row])
        pieces = [alone.push((0, each) for each in ids[row]).get(0, "")]
        pieces.append(alone.finish({0: []}).get(0, ""))
        last = together[row].finish({0: []}).get(0, "")
        assert shown[row] + last == "".join(pieces) == together[row].text(0)
        assert together[row].matched_stop(0) == alone.matched_stop(0)
    assert push_all([]) == []
    tokenizer.close()


def test_a_token_that_breaks_the_tokenizer_takes_no_other_call_along(tmp_path: Path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, "llama2"), 10**6)
    source = Asked(tokenizer, breaks=9)
    calls = [TextAssembler(source, [[3]], settings()) for _ in range(3)]
    with pytest.raises(ConfigError, match="crashed"):
        push_all([(calls[0], [7]), (calls[1], [9]), (calls[2], [8])])
    # Nothing of it has been taken.
    assert push_all([(calls[0], [7]), (calls[2], [8])]) == push_all(
        [(TextAssembler(source, [[3]], settings()), [each]) for each in (7, 8)]
    )
    tokenizer.close()
