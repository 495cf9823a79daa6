"""What a calibration is judged on: windows of a text and questions hidden in it.

Called by command.py. Nothing here is shared with the evaluation's prompts (evaluation/tasks.py):
other words, other sentences, other filler, so that a plan is not measured on what it was fitted to.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tidaldecode.errors import InvalidArgument
from tidaldecode.evaluation.example import Encode
from tidaldecode.evaluation.filling import Needle, fill_prompt
from tidaldecode.evaluation.perplexity import Window, make_windows

WORDS = (
    "acorn", "badger", "bramble", "cactus", "cellar", "cinder", "clover", "coral", "cricket",
    "dapple", "fable", "ferry", "garnet", "ginger", "hazel", "heron", "island", "ivory", "jasper",
    "ladder", "lemon", "linden", "magnet", "mango", "mimosa", "mirror", "oasis", "olive", "paddle",
    "pepper", "pigeon", "plum", "poppy", "rocket", "salmon", "shadow", "teapot", "tulip", "violet",
    "whisper",
)  # fmt: skip
# What is asked for; the forms below differ in how.
_ATTRIBUTES = ("access code", "door code", "invoice number", "serial number", "ticket number")
_SEVERAL = 6
_TABLE_ROWS = 16
_CHAIN = 3
_CHAINS = 2
_PASSAGE_WORDS = 60
_GIVEN_WORDS = 20
_MAX_NEW_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """Token ids, and what they come from in one line."""

    windows: tuple[Window, ...]
    questions: tuple[tuple[int, ...], ...]  # prompts
    description: str

    @property
    def digest(self) -> str:
        """Changes with every token."""
        content = ([(w.prompt_ids, w.scored_ids) for w in self.windows], self.questions)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    @property
    def context(self) -> int:
        """Tokens of the longest window."""
        return max(window.context for window in self.windows)


def builtin_text() -> str:
    """English prose that every complete Python brings: its language reference.

    Raises: InvalidArgument for a Python without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InvalidArgument(
            "builtin: this Python has no pydoc_data, whose text it is; give --text FILE"
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))


def make_data(
    text: str,
    encode: Encode,
    *,
    description: str,
    context: int,
    num_windows: int,
    scored_tokens: int,
    num_questions: int,
    seed: int,
) -> CalibrationData:
    """Windows of the text and questions hidden in it.

    Args:
        text: what the model is used for, or something like it.
        encode: token ids of a prompt.
        description: of the text, for people.
        context: tokens of every window and question.
        num_windows: how many windows; fewer where the text ends.
        scored_tokens: of every window.
        num_questions: how many questions, all forms in turn.
        seed: of the questions.

    Raises: InvalidArgument for a text or context that is too short.
    """
    windows = make_windows(text, encode, [context], count=num_windows, scored_tokens=scored_tokens)
    sentences = re.findall(r"\S[^.!?]*[.!?]+", text)
    if len(sentences) < 2:
        raise InvalidArgument("text: got no two sentences, expected prose to hide questions in")
    questions = []
    for index in range(num_questions):
        rng = random.Random(f"calibration {seed} {index}")
        needles, asked = _FORMS[index % len(_FORMS)](rng, sentences)
        start = rng.randrange(len(sentences))
        prompt_ids = fill_prompt(
            encode, context - _MAX_NEW_TOKENS, needles, asked, _filler(sentences, start), rng
        )
        questions.append(prompt_ids)
    return CalibrationData(
        windows=tuple(windows), questions=tuple(questions), description=description
    )


def _filler(sentences: Sequence[str], start: int) -> Callable[[int], str]:
    """The text itself from one of its sentences on, from the front again at its end."""
    return lambda index: " " + sentences[(start + index) % len(sentences)]


def _names(rng: random.Random, count: int) -> list[str]:
    pairs = [f"{first} {second}" for first, second in _pairs(rng, count)]
    return [name.title() for name in pairs]


def _pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    words = rng.sample(WORDS, 2 * count)
    return list(zip(words[::2], words[1::2], strict=True))


def _number(rng: random.Random) -> str:
    return str(rng.randrange(100_000, 1_000_000))


def _fact(rng: random.Random, sentences: Sequence[str]) -> tuple[list[Needle], str]:
    """One attribute of one name."""
    (name,), attribute = _names(rng, 1), rng.choice(_ATTRIBUTES)
    text = f" Please note that the {attribute} of {name} is {_number(rng)}."
    asked = f"\n\nWhat is the {attribute} of {name}? The {attribute} of {name} is"
    return [Needle(text=text, depth=rng.random())], asked


def _facts(rng: random.Random, sentences: Sequence[str]) -> tuple[list[Needle], str]:
    """The same attribute of several names, one of them asked for."""
    names, attribute = _names(rng, _SEVERAL), rng.choice(_ATTRIBUTES)
    needles = [
        Needle(text=f" The {attribute} for {name} is {_number(rng)}.", depth=rng.random())
        for name in names
    ]
    return needles, f"\n\nQuestion: What is the {attribute} for {names[0]}?\nAnswer:"


def _table(rng: random.Random, sentences: Sequence[str]) -> tuple[list[Needle], str]:
    """One row of a table."""
    names = ["_".join(pair) for pair in _pairs(rng, _TABLE_ROWS)]
    rows = "\n".join(f"{name} = {_number(rng)}" for name in names)
    needle = Needle(text=f"\n\n{rows}\n\n", depth=rng.random())
    return [needle], f"\n\n{rng.choice(names)} ="


def _chain(rng: random.Random, sentences: Sequence[str]) -> tuple[list[Needle], str]:
    """Values handed from name to name; the end of the first chain is asked for."""
    names = rng.sample(WORDS, _CHAINS * _CHAIN)
    needles = []
    for begin in range(0, len(names), _CHAIN):
        own = names[begin : begin + _CHAIN]
        depths = sorted(rng.random() for _ in own)
        for name, source, depth in zip(own, [_number(rng), *own], depths, strict=False):
            needles.append(Needle(text=f"\nLET {name} = {source}\n", depth=depth))
    last, before = names[_CHAIN - 1], names[_CHAIN - 2]
    return needles, f"\n\nWhat is the value of {last}? {last} = {before} ="


def _passage(rng: random.Random, sentences: Sequence[str]) -> tuple[list[Needle], str]:
    """A passage of the text, begun again."""
    start = rng.randrange(len(sentences))
    words: list[str] = []
    while len(words) < _PASSAGE_WORDS:
        words += sentences[start % len(sentences)].split()
        start += 1
    passage = " ".join(words[:_PASSAGE_WORDS])
    given = " ".join(words[:_GIVEN_WORDS])
    return [Needle(text=f"\n\n{passage}\n\n", depth=rng.random())], f"\n\n{given}"


_FORMS = (_fact, _facts, _table, _chain, _passage)
