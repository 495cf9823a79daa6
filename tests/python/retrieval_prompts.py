"""Long texts with a key hidden in them, and the question for it: words of this file only, seeded.

For test_real_model.py and test_gpu.py. The sentence form is one that the test models know.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

ADJECTIVES = (
    "active default empty internal local missing nested optional partial previous remote shared "
    "static temporary unused valid verbose writable"
).split()
NOUNS = (
    "archive buffer cache channel command connection daemon directory entry field filter handler "
    "header index interface kernel library list manifest message module option package pattern "
    "pipeline process queue record repository request schema script server session signal socket "
    "stream table template thread token variable volume wrapper"
).split()
VERBS = (
    "accepts allocates checks closes copies creates deletes describes ignores loads locks maps "
    "opens parses prints reads replaces reports resets returns sends sorts updates writes"
).split()
OPENINGS = (
    "By default,", "In most cases,", "If the option is given,", "Since version 2,", "Note that",
    "For historical reasons,", "On some systems,", "When this is not set,", "", "", "", "",
)  # fmt: skip
ENDINGS = (
    "before it exits", "at startup", "in the order given", "unless told otherwise",
    "for each user", "after the first error", "as described above", "without a warning",
)  # fmt: skip


@dataclass(frozen=True)
class RetrievalPrompt:
    text: str
    answer: str


def sentence(rng: random.Random) -> str:
    """One sentence in the manner of a manual."""
    parts = [
        rng.choice(OPENINGS), "the", rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(VERBS),
        "the", rng.choice(NOUNS), "of the", rng.choice(ADJECTIVES), rng.choice(NOUNS),
        rng.choice(ENDINGS),
    ]  # fmt: skip
    text = " ".join(part for part in parts if part)
    return text[0].upper() + text[1:] + "."


def manual_text(num_words: int, seed: int) -> list[str]:
    """Paragraphs of at least `num_words` words together."""
    rng = random.Random(seed)
    paragraphs, words = [], 0
    while words < num_words:
        paragraph = " ".join(sentence(rng) for _ in range(rng.randint(3, 7)))
        paragraphs.append(paragraph)
        words += len(paragraph.split())
    return paragraphs


def retrieval_prompt(
    encode: Callable[[str], list[int]], num_tokens: int, depth: float, seed: int
) -> RetrievalPrompt:
    """A text of about `num_tokens` tokens with one number hidden at `depth` (0 start, 1 end)."""
    rng = random.Random(seed)
    key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    answer = str(rng.randint(1_000_000, 9_999_999))
    needle = f"The special magic number for {key} is {answer}."
    question = f"Question: What is the special magic number for {key}?\nAnswer:"
    paragraphs = manual_text(num_tokens, seed)  # a word is at least a token, so this is enough
    sizes = [len(encode(paragraph + "\n\n")) for paragraph in paragraphs]
    room = num_tokens - len(encode(needle + "\n\n" + question))
    kept = 0
    while kept < len(sizes) and sizes[kept] <= room:
        room -= sizes[kept]
        kept += 1
    place = round(depth * kept)
    body = [*paragraphs[:place], needle, *paragraphs[place:kept]]
    return RetrievalPrompt("\n\n".join(body) + "\n\n" + question, answer)
