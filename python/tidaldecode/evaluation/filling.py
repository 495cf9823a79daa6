"""Prompts of an exact number of tokens: what matters, spread over as much filler as fits.

Called by tasks.py. Lengths are those of the whole text in the model's own tokenizer, so the filler
is cut to fit and the last gap closed with single words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tidaldecode.cli.demo_text import filler_sentence, sentence_joint
from tidaldecode.errors import InvalidArgument
from tidaldecode.evaluation.example import Encode

# Short common words, in most vocabularies one token each; marks where a word is too much.
_GAP_WORDS = (
    " and", " so", " it", " was", " with", " the", " on", " for", " then", " by", " or", " but",
)  # fmt: skip
_GAP_MARKS = (".", ";", "!")
_GAP_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class Needle:
    """A text to put into the filler."""

    text: str  # with what stands in front of it, a space or a line break
    depth: float  # 0 in front of the filler, 1 behind it


def sentence_filler(rng: random.Random) -> Callable[[int], str]:
    """Makes the filler's i-th piece: a sentence with what stands in front of it."""
    return lambda index: sentence_joint(rng, index + 1) + filler_sentence(rng)


def fill_prompt(
    encode: Encode,
    num_tokens: int,
    needles: Sequence[Needle],
    question: str,
    piece: Callable[[int], str],
    rng: random.Random,
) -> tuple[int, ...]:
    """Token ids of a prompt of exactly `num_tokens` tokens: as fill_text(), then the question."""
    return tuple(encode(fill_text(encode, num_tokens, needles, question, piece, rng) + question))


def fill_text(
    encode: Encode,
    num_tokens: int,
    needles: Sequence[Needle],
    question: str,
    piece: Callable[[int], str],
    rng: random.Random,
) -> str:
    """A text that makes exactly `num_tokens` tokens with a question behind it.

    A vocabulary that has no token as short as the last gap makes it a little shorter.

    Args:
        encode: token ids of a prompt.
        num_tokens: wanted length of text and question.
        needles: what must be in it; those of equal depth keep their order.
        question: what is to stand behind it.
        piece: the filler's i-th piece.
        rng: draws the words of the last gap.

    Raises: InvalidArgument if the needles and the question alone are longer.
    """
    ordered = sorted(needles, key=lambda needle: needle.depth)

    def write(pieces: Sequence[str], gap: str = "") -> str:
        parts, done = [gap], 0
        for needle in ordered:
            place = round(needle.depth * len(pieces))
            parts += [*pieces[done:place], needle.text]
            done = place
        return "".join([*parts, *pieces[done:]]).lstrip()

    def count(text: str) -> int:
        return len(encode(text + question))

    least = count(write([]))
    if least > num_tokens:
        raise InvalidArgument(
            f"context: got room for a prompt of {num_tokens} tokens, expected at least {least} "
            "(what is hidden and the question); ask for a longer context"
        )
    pieces: list[str] = []
    overhead = len(encode(""))
    length = least
    while length < num_tokens:
        pieces.append(piece(len(pieces)))
        length += max(1, len(encode(pieces[-1])) - overhead)
    while pieces and count(write(pieces)) > num_tokens:
        pieces.pop()
    return write(pieces, _gap(num_tokens, lambda gap: count(write(pieces, gap)), rng))


def _gap(num_tokens: int, count: Callable[[str], int], rng: random.Random) -> str:
    """Words, then marks, that lengthen a text until its tokens are as many as wanted."""
    gap, length = "", count("")
    for units in (_GAP_WORDS, _GAP_MARKS):
        draw = rng.choices(units, k=_GAP_LENGTH)
        wanted = num_tokens - length
        while wanted > 0 and length < num_tokens:
            longer = gap + "".join(draw[:wanted])
            found = count(longer)
            if length < found <= num_tokens:
                gap, length = longer, found
                wanted = num_tokens - length
            else:
                wanted = wanted // 2 if found > num_tokens + wanted // 2 else wanted - 1
    return gap
