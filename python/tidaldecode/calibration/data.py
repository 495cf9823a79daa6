"""What a calibration is judged on: windows of a text and questions hidden in it.

Called by command.py. Nothing here is shared with the evaluation's prompts (evaluation/tasks.py):
other words, other sentences, other filler, so that a plan is not measured on what it was fitted to.
Several questions are asked about each document, which is read once for all of them. Documents are
endless, and those held out for the figure that is shown have words of their own.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tidaldecode.errors import InvalidArgument
from tidaldecode.evaluation.example import Encode
from tidaldecode.evaluation.filling import Needle, fill_text

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
_ATTRIBUTES = (
    "access code", "door code", "flight number", "invoice number", "locker number",
    "meter reading", "serial number", "ticket number",
)  # fmt: skip
_FACTS = 4
_SEVERAL = 6
_ASKED_OF_SEVERAL = 4
_VALUES = 3
_TABLE_ROWS = 16
_CHAIN = 3
_CHAINS = 2
_LONGEST_NUMBER = "999999"
_PASSAGE_WORDS = 40
_GIVEN_WORDS = 16
_CONTINUED_WORDS = 8  # of the passage, to be given back, or fewer where they are many tokens
_PASSAGE_TOKENS = 24
_PREFACE_TOKENS = 24  # room for what a model says before it comes to the answer
_JOINT_TOKENS = 2  # between one number and the next
# The share of a document that may be needles, if they are of more than one form.
_HIDDEN_SHARE = 0.5
MOST_QUESTIONS = 12  # of a document


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt in which the answer is hidden."""

    prompt_ids: tuple[int, ...]
    answers: tuple[str, ...]  # all of them are wanted


@dataclass(frozen=True, kw_only=True)
class Document:
    """Questions whose prompts begin with the same long text."""

    context: int  # tokens of the longest prompt and its room together
    room: int  # tokens for an answer, in the tokens it takes, and a few words in front of it
    questions: tuple[Question, ...]


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
    """Documents without end, each the same for its number.

    Attributes:
        text: what the model is used for, or something like it; the filler.
        encode: token ids of a whole prompt, through the chat template where there is one.
        contexts: tokens of prompt and room; the documents have them in turn.
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

    def document(self, context: int, index: int) -> Document:
        """The index-th document of a context, with questions of as many forms as have room.

        Raises: InvalidArgument for a text or context that is too short.
        """
        sentences = re.findall(r"\S[^.!?]*[.!?]+", self.text)
        if len(sentences) < 2:
            raise InvalidArgument("text: got no two sentences, expected prose to hide questions in")
        rng = random.Random(f"calibration {self.seed} {context} {index} {self.words[0]}")
        # The same for all, so that any of them can be read together.
        numbers = _VALUES * (self._length(_LONGEST_NUMBER) + _JOINT_TOKENS)
        room = _PREFACE_TOKENS + max(_PASSAGE_TOKENS, numbers)
        needles, asked = self._hidden(_Draw(rng, sentences, self.words), index, context - room)
        longest = max((text for text, _ in asked), key=self._length)
        start = rng.randrange(len(sentences))
        text = fill_text(
            self.encode, context - room, needles, longest, _filler(sentences, start), rng
        )
        questions = [
            Question(
                prompt_ids=tuple(self.encode(text + question)),
                answers=tuple(self._shortened(answer) for answer in answers),
            )
            for question, answers in asked
        ]
        return Document(context=context, room=room, questions=tuple(questions))

    def _hidden(self, draw: _Draw, index: int, num_tokens: int) -> _Asked:
        """What is hidden and asked: one form, and others as long as they have room."""
        needles: list[Needle] = []
        asked: list[tuple[str, tuple[str, ...]]] = []
        hidden = 0
        for place in range(len(_FORMS)):
            more, questions = _FORMS[(index + place) % len(_FORMS)](draw)
            hidden += sum(self._length(needle.text) for needle in more)
            if needles and hidden > _HIDDEN_SHARE * num_tokens:
                break
            needles += more
            asked += questions
        return needles, asked

    def _shortened(self, answer: str) -> str:
        while self._length(answer) > _PASSAGE_TOKENS and " " in answer:
            answer = answer.rpartition(" ")[0]
        return answer

    def _length(self, answer: str) -> int:
        """Tokens of an answer."""
        return len(self.encode(answer)) - len(self.encode(""))

    def digest(self) -> str:
        """Changes with every token of every question.

        Raises: InvalidArgument for a text or context that is too short for one of the forms.
        """
        first = [
            [question.prompt_ids for question in self.document(context, index).questions]
            for context in self.contexts
            for index in range(self.num_forms)
        ]
        content = (self.text, self.contexts, self.seed, self.words, first)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _filler(sentences: Sequence[str], start: int) -> Callable[[int], str]:
    """The text itself from one of its sentences on, from the front again at its end."""
    return lambda index: " " + sentences[(start + index) % len(sentences)]


# What is hidden; and what is asked, with the answers to each.
_Question = tuple[str, tuple[str, ...]]
_Asked = tuple[list[Needle], list[_Question]]


class _Draw:
    """What the forms of one document are made of."""

    def __init__(self, rng: random.Random, sentences: Sequence[str], words: Sequence[str]) -> None:
        self.rng, self.sentences, self.words = rng, sentences, words
        # Each once, so that no two questions are about the same.
        self._attributes = rng.sample(_ATTRIBUTES, len(_ATTRIBUTES))

    def attribute(self) -> str:
        """One that nothing else in the document has."""
        return self._attributes.pop()

    def names(self, count: int) -> list[str]:
        """Different names of two words."""
        return [f"{first} {second}".title() for first, second in self.pairs(count)]

    def pairs(self, count: int) -> list[tuple[str, str]]:
        """Pairs of words, no word twice."""
        drawn = self.rng.sample(self.words, 2 * count)
        return list(zip(drawn[::2], drawn[1::2], strict=True))

    def numbers(self, count: int) -> list[str]:
        """Different numbers of six digits."""
        return [str(n) for n in self.rng.sample(range(100_000, int(_LONGEST_NUMBER) + 1), count)]

    def depth(self) -> float:
        """Where something is hidden."""
        return self.rng.random()


def _fact(draw: _Draw) -> _Asked:
    """One attribute of one name, a few times."""
    needles: list[Needle] = []
    asked: list[_Question] = []
    for name, number in zip(draw.names(_FACTS), draw.numbers(_FACTS), strict=True):
        attribute = draw.attribute()
        text = f" Please note that the {attribute} of {name} is {number}."
        needles.append(Needle(text=text, depth=draw.depth()))
        question = f"\n\nWhat is the {attribute} of {name}? The {attribute} of {name} is"
        asked.append((question, (number,)))
    return needles, asked


def _facts(draw: _Draw) -> _Asked:
    """The same attribute of several names, most of them asked for."""
    names, numbers = draw.names(_SEVERAL), draw.numbers(_SEVERAL)
    attribute = draw.attribute()
    needles = [
        Needle(text=f" The {attribute} for {name} is {number}.", depth=draw.depth())
        for name, number in zip(names, numbers, strict=True)
    ]
    asked: list[_Question] = [
        (f"\n\nQuestion: What is the {attribute} for {name}?\nAnswer:", (number,))
        for name, number in zip(names[:_ASKED_OF_SEVERAL], numbers, strict=False)
    ]
    return needles, asked


def _values(draw: _Draw) -> _Asked:
    """Several values of one name, all of them asked for."""
    (name,), numbers, attribute = draw.names(1), draw.numbers(_VALUES), draw.attribute()
    needles = [
        Needle(text=f" {name} was given the {attribute} {number}.", depth=draw.depth())
        for number in numbers
    ]
    asked = f"\n\nQuestion: Which {attribute}s was {name} given?\nAnswer:"
    return needles, [(asked, tuple(numbers))]


def _table(draw: _Draw) -> _Asked:
    """One row of a table."""
    names = ["_".join(pair) for pair in draw.pairs(_TABLE_ROWS)]
    rows = dict(zip(names, draw.numbers(_TABLE_ROWS), strict=True))
    listed = "\n".join(f"{name} = {number}" for name, number in rows.items())
    name = draw.rng.choice(names)
    needle = Needle(text=f"\n\n{listed}\n\n", depth=draw.depth())
    return [needle], [(f"\n\n{name} =", (rows[name],))]


def _chain(draw: _Draw) -> _Asked:
    """Values handed from name to name; the end of the first chain is asked for."""
    names = draw.rng.sample(draw.words, _CHAINS * _CHAIN)
    numbers = draw.numbers(_CHAINS)
    needles = []
    for number, begin in zip(numbers, range(0, len(names), _CHAIN), strict=True):
        own = names[begin : begin + _CHAIN]
        depths = sorted(draw.depth() for _ in own)
        for name, source, depth in zip(own, [number, *own], depths, strict=False):
            needles.append(Needle(text=f"\nLET {name} = {source}\n", depth=depth))
    last, before = names[_CHAIN - 1], names[_CHAIN - 2]
    return needles, [(f"\n\nWhat is the value of {last}? {last} = {before} =", (numbers[0],))]


def _passage(draw: _Draw) -> _Asked:
    """A passage of the text, begun again."""
    start = draw.rng.randrange(len(draw.sentences))
    taken: list[str] = []
    while len(taken) < _PASSAGE_WORDS:
        taken += draw.sentences[start % len(draw.sentences)].split()
        start += 1
    passage = " ".join(taken[:_PASSAGE_WORDS])
    given = " ".join(taken[:_GIVEN_WORDS])
    following = " ".join(taken[_GIVEN_WORDS : _GIVEN_WORDS + _CONTINUED_WORDS])
    needle = Needle(text=f"\n\n{passage}\n\n", depth=draw.depth())
    return [needle], [(f"\n\n{given}", (following,))]


_FORMS = (_fact, _facts, _values, _table, _chain, _passage)
