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
    """Token ids of a prompt of exactly `num_tokens` tokens.

    A vocabulary that has no token as short as the last gap gives a prompt a little shorter.

    Args:
        encode: token ids of a prompt.
        num_tokens: wanted length.
        needles: what must be in it; those of equal depth keep their order.
        question: what stands at the end.
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
        return "".join([*parts, *pieces[done:]]).lstrip() + question

    least = len(encode(write([])))
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
    while pieces and len(encode(write(pieces))) > num_tokens:
        pieces.pop()
    return _close_gap(encode, num_tokens, lambda gap: write(pieces, gap), rng)


def _close_gap(
    encode: Encode, num_tokens: int, write: Callable[[str], str], rng: random.Random
) -> tuple[int, ...]:
    """Lengthens a text by words, then by marks, until its tokens are as many as wanted."""
    gap, best = "", encode(write(""))
    for units in (_GAP_WORDS, _GAP_MARKS):
        draw = rng.choices(units, k=_GAP_LENGTH)
        count = num_tokens - len(best)
        while count > 0 and len(best) < num_tokens:
            longer = gap + "".join(draw[:count])
            ids = encode(write(longer))
            if len(best) < len(ids) <= num_tokens:
                gap, best = longer, ids
                count = num_tokens - len(best)
            else:
                count = count // 2 if len(ids) > num_tokens + count // 2 else count - 1
    return tuple(best)
