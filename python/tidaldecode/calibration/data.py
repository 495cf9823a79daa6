"""What a calibration is judged on: windows of a text and questions hidden in it.

Called by command.py. Nothing here is shared with the evaluation's prompts (evaluation/tasks.py):
other words, other sentences, other filler, so that a plan is not measured on what it was fitted to.
Questions are endless, and those held out for the figure that is shown have words of their own.
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

WORDS = (
    "acorn", "badger", "bramble", "cactus", "cellar", "cinder", "clover", "coral", "cricket",
    "dapple", "fable", "ferry", "garnet", "ginger", "hazel", "heron", "island", "ivory", "jasper",
    "ladder", "lemon", "linden", "magnet", "mango", "mimosa", "mirror", "oasis", "olive", "paddle",
    "pepper", "pigeon", "plum", "poppy", "rocket", "salmon", "shadow", "teapot", "tulip", "violet",
    "whisper",
)  # fmt: skip
HELD_OUT_WORDS = (
    "almond", "anvil", "apricot", "aspen", "barley", "bison", "bobbin", "brook", "candle",
    "cherry", "cobble", "cotton", "dolphin", "drummer", "easel", "elder", "feather", "fiddle",
    "gravel", "hammer", "hornet", "kettle", "lagoon", "lilac", "lizard", "mallet", "mustard",
    "needle", "oyster", "parcel", "peach", "puddle", "rabbit", "ribbon", "saddle", "sparrow",
    "thimble", "trumpet", "turnip", "wagon",
)  # fmt: skip
# What is asked for; the forms below differ in how.
_ATTRIBUTES = ("access code", "door code", "invoice number", "serial number", "ticket number")
_SEVERAL = 6
_TABLE_ROWS = 16
_CHAIN = 3
_CHAINS = 2
_LONGEST_NUMBER = "999999"
_PASSAGE_WORDS = 60
_GIVEN_WORDS = 20
_CONTINUED_WORDS = 8  # of the passage, to be given back, or fewer where they are many tokens
_PASSAGE_TOKENS = 24
_PREFACE_TOKENS = 24  # room for what a model says before it comes to the answer


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt in which the answer is hidden."""

    context: int  # tokens of prompt and room together
    index: int  # among those of its context; index % num_forms is its form
    prompt_ids: tuple[int, ...]
    answer: str
    room: int  # tokens for the answer, in the tokens it takes, and a few words in front of it


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


@dataclass(frozen=True, kw_only=True)
class QuestionSource:
    """Questions without end, each the same for its number.

    Attributes:
        text: what the model is used for, or something like it; the filler.
        encode: token ids of a whole prompt, through the chat template where there is one.
        contexts: tokens of prompt and room; the questions have them in turn.
        seed: another seed gives other questions.
        words: names are made of them.
    """

    text: str
    encode: Encode
    contexts: tuple[int, ...]
    seed: int
    words: tuple[str, ...] = WORDS

    @property
    def num_forms(self) -> int:
        """How many ways of asking there are."""
        return len(_FORMS)

    def question(self, context: int, index: int) -> Question:
        """The index-th question of a context, all forms in turn.

        Raises: InvalidArgument for a text or context that is too short.
        """
        sentences = re.findall(r"\S[^.!?]*[.!?]+", self.text)
        if len(sentences) < 2:
            raise InvalidArgument("text: got no two sentences, expected prose to hide questions in")
        rng = random.Random(f"calibration {self.seed} {context} {index} {self.words[0]}")
        needles, asked, answer = _FORMS[index % len(_FORMS)](rng, sentences, self.words)
        start = rng.randrange(len(sentences))
        while self._length(answer) > _PASSAGE_TOKENS and " " in answer:
            answer = answer.rpartition(" ")[0]
        # The same for all, so that any of them can be read together.
        room = _PREFACE_TOKENS + max(_PASSAGE_TOKENS, self._length(_LONGEST_NUMBER))
        prompt_ids = fill_prompt(
            self.encode, context - room, needles, asked, _filler(sentences, start), rng
        )
        return Question(
            context=context, index=index, prompt_ids=prompt_ids, answer=answer, room=room
        )

    def _length(self, answer: str) -> int:
        """Tokens of an answer."""
        return len(self.encode(answer)) - len(self.encode(""))

    def digest(self) -> str:
        """Changes with every token of every question.

        Raises: InvalidArgument for a text or context that is too short for one of the forms.
        """
        first = [
            self.question(context, index).prompt_ids
            for context in self.contexts
            for index in range(self.num_forms)
        ]
        content = (self.text, self.contexts, self.seed, self.words, first)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _filler(sentences: Sequence[str], start: int) -> Callable[[int], str]:
    """The text itself from one of its sentences on, from the front again at its end."""
    return lambda index: " " + sentences[(start + index) % len(sentences)]


def _names(rng: random.Random, words: Sequence[str], count: int) -> list[str]:
    pairs = [f"{first} {second}" for first, second in _pairs(rng, words, count)]
    return [name.title() for name in pairs]


def _pairs(rng: random.Random, words: Sequence[str], count: int) -> list[tuple[str, str]]:
    drawn = rng.sample(words, 2 * count)
    return list(zip(drawn[::2], drawn[1::2], strict=True))


def _number(rng: random.Random) -> str:
    return str(rng.randrange(100_000, int(_LONGEST_NUMBER) + 1))


# What is hidden, what is asked, and the answer.
_Asked = tuple[list[Needle], str, str]


def _fact(rng: random.Random, sentences: Sequence[str], words: Sequence[str]) -> _Asked:
    """One attribute of one name."""
    (name,), attribute = _names(rng, words, 1), rng.choice(_ATTRIBUTES)
    number = _number(rng)
    text = f" Please note that the {attribute} of {name} is {number}."
    asked = f"\n\nWhat is the {attribute} of {name}? The {attribute} of {name} is"
    return [Needle(text=text, depth=rng.random())], asked, number


def _facts(rng: random.Random, sentences: Sequence[str], words: Sequence[str]) -> _Asked:
    """The same attribute of several names, one of them asked for."""
    names, attribute = _names(rng, words, _SEVERAL), rng.choice(_ATTRIBUTES)
    numbers = [_number(rng) for _ in names]
    needles = [
        Needle(text=f" The {attribute} for {name} is {number}.", depth=rng.random())
        for name, number in zip(names, numbers, strict=True)
    ]
    asked = f"\n\nQuestion: What is the {attribute} for {names[0]}?\nAnswer:"
    return needles, asked, numbers[0]


def _table(rng: random.Random, sentences: Sequence[str], words: Sequence[str]) -> _Asked:
    """One row of a table."""
    rows = {"_".join(pair): _number(rng) for pair in _pairs(rng, words, _TABLE_ROWS)}
    listed = "\n".join(f"{name} = {number}" for name, number in rows.items())
    name = rng.choice(list(rows))
    return [Needle(text=f"\n\n{listed}\n\n", depth=rng.random())], f"\n\n{name} =", rows[name]


def _chain(rng: random.Random, sentences: Sequence[str], words: Sequence[str]) -> _Asked:
    """Values handed from name to name; the end of the first chain is asked for."""
    names = rng.sample(words, _CHAINS * _CHAIN)
    numbers = [_number(rng) for _ in range(_CHAINS)]
    needles = []
    for number, begin in zip(numbers, range(0, len(names), _CHAIN), strict=True):
        own = names[begin : begin + _CHAIN]
        depths = sorted(rng.random() for _ in own)
        for name, source, depth in zip(own, [number, *own], depths, strict=False):
            needles.append(Needle(text=f"\nLET {name} = {source}\n", depth=depth))
    last, before = names[_CHAIN - 1], names[_CHAIN - 2]
    return needles, f"\n\nWhat is the value of {last}? {last} = {before} =", numbers[0]


def _passage(rng: random.Random, sentences: Sequence[str], words: Sequence[str]) -> _Asked:
    """A passage of the text, begun again."""
    start = rng.randrange(len(sentences))
    taken: list[str] = []
    while len(taken) < _PASSAGE_WORDS:
        taken += sentences[start % len(sentences)].split()
        start += 1
    passage = " ".join(taken[:_PASSAGE_WORDS])
    given = " ".join(taken[:_GIVEN_WORDS])
    following = " ".join(taken[_GIVEN_WORDS : _GIVEN_WORDS + _CONTINUED_WORDS])
    return [Needle(text=f"\n\n{passage}\n\n", depth=rng.random())], f"\n\n{given}", following


_FORMS = (_fact, _facts, _table, _chain, _passage)
