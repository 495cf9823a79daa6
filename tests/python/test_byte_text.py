"""Texts put together from bytes of tokens, beside what the tokenizer itself makes of the ids."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

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
