"""The generated tasks, in the manner of RULER (arXiv 2404.06654): every fact is in the prompt.

Called by command.py. Texts are made of the demo's word lists (demo_text.py), so nothing is
downloaded. An example depends on (task, seed, context, index) and the tokenizer alone. The sentence
forms are common ones that base models answer too; a chat template goes around them by `encode`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from tidaldecode.cli.demo_text import KEY_WORDS
from tidaldecode.errors import InvalidArgument, show
from tidaldecode.evaluation.example import Encode, Example, Series
from tidaldecode.evaluation.filling import Needle, fill_prompt, sentence_filler

_DEPTHS = 10  # the single needle takes them in turn
_FIRST_DEPTH, _LAST_DEPTH = 0.02, 0.98
_MULTI_KEYS = 8
_MULTI_VALUES = 3
_QUERIES = 3
_CHAIN = 4
_OTHER_CHAINS = 2
_RECORDS = 32
_COMMON_WORDS = 5
_COMMON_SHARE = 0.5  # of the list's entries
_GIVEN_WORDS = 12  # of the passage, in front of what is to be copied
_COPIED_WORDS = 24


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """What a task wants to be asked; the filler is added to it."""

    needles: Sequence[Needle]
    question: str
    answers: Sequence[str]
    depth: float | None = None
    piece: Callable[[int], str] | None = None  # filler of its own


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of question."""

    name: str
    title: str  # for people
    draft: Callable[[random.Random, int], _Draft]  # of a seeded generator and the index
    rule: str
    max_new_tokens: int

    def example(self, encode: Encode, context: int, seed: int, index: int) -> Example:
        """The index-th example whose prompt and output have room in `context` tokens.

        Raises: InvalidArgument for a context too short for what is asked.
        """
        rng = random.Random(f"{self.name} {seed} {context} {index}")
        draft = self.draft(rng, index)
        try:
            prompt_ids = fill_prompt(
                encode,
                context - self.max_new_tokens,
                draft.needles,
                draft.question,
                draft.piece or sentence_filler(rng),
                rng,
            )
        except InvalidArgument as cause:
            raise InvalidArgument(f"{self.name}: {cause}") from None
        return Example(
            task=self.name,
            index=index,
            context=context,
            prompt_ids=prompt_ids,
            answers=tuple(draft.answers),
            rule=self.rule,
            max_new_tokens=self.max_new_tokens,
            depth=draft.depth,
        )


def _keys(rng: random.Random, count: int) -> list[str]:
    """Different names of two words."""
    keys: set[str] = set()
    ordered: list[str] = []
    while len(ordered) < count:
        key = "-".join(rng.sample(KEY_WORDS, 2))
        if key not in keys:
            keys.add(key)
            ordered.append(key)
    return ordered


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _depth(rng: random.Random) -> float:
    return rng.uniform(_FIRST_DEPTH, _LAST_DEPTH)


def _fact(key: str, number: str) -> str:
    return f" The special magic number for {key} is {number}."


def _asked(key: str) -> str:
    return f"\nQuestion: What is the special magic number for {key}?\nAnswer:"


def _one_of(rng: random.Random, count: int, depth: float) -> _Draft:
    """One key of `count`, the one asked for at `depth`."""
    keys, numbers = _keys(rng, count), _numbers(rng, count)
    depths = [depth, *(_depth(rng) for _ in keys[1:])]
    needles = [
        Needle(text=_fact(key, number), depth=place)
        for key, number, place in zip(keys, numbers, depths, strict=True)
    ]
    return _Draft(needles=needles, question=_asked(keys[0]), answers=numbers[:1], depth=depth)


def _single(rng: random.Random, index: int) -> _Draft:
    step = (_LAST_DEPTH - _FIRST_DEPTH) / (_DEPTHS - 1)
    return _one_of(rng, 1, round(_FIRST_DEPTH + step * (index % _DEPTHS), 4))


def _multi_key(rng: random.Random, index: int) -> _Draft:
    return _one_of(rng, _MULTI_KEYS, _depth(rng))


def _multi_value(rng: random.Random, index: int) -> _Draft:
    (key,), numbers = _keys(rng, 1), _numbers(rng, _MULTI_VALUES)
    return _Draft(
        needles=[Needle(text=_fact(key, number), depth=_depth(rng)) for number in numbers],
        question=f"\nQuestion: What are all the special magic numbers for {key}?\nAnswer:",
        answers=numbers,
    )


def _multi_query(rng: random.Random, index: int) -> _Draft:
    keys, numbers = _keys(rng, _QUERIES), _numbers(rng, _QUERIES)
    needles = [
        Needle(text=_fact(key, number), depth=_depth(rng))
        for key, number in zip(keys, numbers, strict=True)
    ]
    listed = ", ".join(keys[:-1]) + " and " + keys[-1]
    return _Draft(
        needles=needles,
        question=f"\nQuestion: What are the special magic numbers for {listed}?\nAnswer:",
        answers=numbers,
    )


def _variables(rng: random.Random, index: int) -> _Draft:
    """Chains of assignments, each in order; the end of the first is asked for."""
    num_chains = 1 + _OTHER_CHAINS
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < num_chains * _CHAIN:
        name = "".join(rng.choices(letters, k=3))
        if name not in names:
            names.append(name)
    values = [str(value) for value in rng.sample(range(10_000, 100_000), num_chains)]
    needles = []
    for chain, value in enumerate(values):
        own = names[chain * _CHAIN : (chain + 1) * _CHAIN]
        depths = sorted(_depth(rng) for _ in own)
        for name, source, depth in zip(own, [value, *own], depths, strict=False):
            needles.append(Needle(text=f"\nVAR {name} = {source}\n", depth=depth))
    last = names[_CHAIN - 1]
    return _Draft(
        needles=needles,
        question=f"\nQuestion: Trace the value of {last}.\nAnswer:",
        answers=values[:1],
    )


def _common_words(rng: random.Random, index: int) -> _Draft:
    """A list in which a few words come again and again, as long as the prompt."""
    words = ["".join(rng.sample(KEY_WORDS, 2)) for _ in range(_COMMON_WORDS)]
    while len(set(words)) < len(words):
        words[-1] = "".join(rng.sample(KEY_WORDS, 2))

    def entry(number: int) -> str:
        is_common = rng.random() < _COMMON_SHARE
        word = rng.choice(words) if is_common else "".join(rng.sample(KEY_WORDS, 2))
        return f" {number + 1}. {word}"

    return _Draft(
        needles=[Needle(text=" Below is a numbered list of words.\n", depth=0.0)],
        question=f"\nQuestion: What are the {_COMMON_WORDS} most common words in the list above?"
        "\nAnswer:",
        answers=words,
        piece=entry,
    )


def _key_value(rng: random.Random, index: int) -> _Draft:
    """One record of a table."""
    keys, numbers = _keys(rng, _RECORDS), _numbers(rng, _RECORDS)
    asked = rng.randrange(_RECORDS)
    depth = _depth(rng)
    lines = [f"{key}: {number}" for key, number in zip(keys, numbers, strict=True)]
    return _Draft(
        needles=[Needle(text="\n\n" + "\n".join(lines) + "\n\n", depth=depth)],
        question=f"\nQuestion: What is the value of {keys[asked]}?\nAnswer:",
        answers=[numbers[asked]],
        depth=depth,
    )


def _copy(rng: random.Random, index: int) -> _Draft:
    """A passage begun again at the end, to be gone on with."""
    depth = _depth(rng)
    # No word twice, and none of the filler's: every next word is decided by the passage alone.
    words = rng.sample(KEY_WORDS, _GIVEN_WORDS + _COPIED_WORDS)
    passage = " ".join(words)
    return _Draft(
        needles=[Needle(text=f"\n\n{passage}\n\n", depth=depth)],
        question="\n\n" + " ".join(words[:_GIVEN_WORDS]),
        answers=[" ".join(words[_GIVEN_WORDS:])],
        depth=depth,
    )


def _task(
    name: str, title: str, draft: Callable[[random.Random, int], _Draft], rule: str, new_tokens: int
) -> Task:
    return Task(name=name, title=title, draft=draft, rule=rule, max_new_tokens=new_tokens)


# Room for the output: an answer of 7 digits is up to 7 tokens, and a chat model says more than it.
TASKS = {
    task.name: task
    for task in (
        _task("single", "one needle, at ten depths", _single, "first_number", 32),
        _task("multikey", "one key of 8", _multi_key, "first_number", 32),
        _task("multivalue", "3 values of one key", _multi_value, "share_found", 64),
        _task("multiquery", "3 keys at once", _multi_query, "share_found", 64),
        _task("variables", "a chain of 4 variables", _variables, "share_found", 48),
        _task("common", "the 5 most common words", _common_words, "share_found", 64),
        _task("keyvalue", "one record of 32", _key_value, "first_number", 32),
        _task("copy", "24 words of a passage", _copy, "share_copied", 64),
    )
}


def make_series(
    names: Sequence[str], encode: Encode, contexts: Sequence[int], *, most: int, seed: int
) -> list[Series]:
    """A series of at most `most` examples for each context and task.

    Raises: InvalidArgument for an unknown task; making an example does for a context too short.
    """
    for name in names:
        if name not in TASKS:
            raise InvalidArgument(f"task: got {show(name)}, expected one of {', '.join(TASKS)}")
    return [
        Series(
            context=context,
            most=most,
            room=context,
            length=context,
            make=partial(TASKS[name].example, encode, context, seed),
        )
        for context in contexts
        for name in names
    ]


def make_examples(
    names: Sequence[str], encode: Encode, contexts: Sequence[int], *, per_task: int, seed: int
) -> Iterator[Example]:
    """The examples of these tasks, `per_task` of each at each context.

    Raises: InvalidArgument for an unknown task or a context too short for one.
    """
    for series in make_series(names, encode, contexts, most=per_task, seed=seed):
        yield from map(series.make, range(series.most))
