"""Which questions the dense model answers: only on those can a plan be judged.

Called by run.py. Documents are read until enough questions about them count: for the search those
that the dense model is sure of, to report how the choice does all that it answers rightly. Whole
answers count: all tokens in which the dense model's output has what the text says, however many its
tokenizer makes of it, and those alone: how a model leads up to an answer may be anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tidaldecode.calibration.data import Document, QuestionSource
from tidaldecode.calibration.open_prompts import OpenPrompts
from tidaldecode.calibration.score_file import ScoreFile
from tidaldecode.evaluation.distributions import token_losses

LEAST_COUNTED = 24
_MOST_ASKED = 192
# A context at which so many were asked, and none counted, is given up.
_TRIED = 16
# The dense model is sure of an answer whose every token is at least this likely; another plan's
# other answer to a question that it is not sure of says nothing.
_SURE = 0.5
DENSE = {"attention": "full"}
# Token ids up to the end of an answer, and how many of them, at the end, are the answer.
Output = tuple[list[int], int]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A document, and the dense model's answers to those of its questions that count."""

    name: str
    document: Document
    outputs: tuple[Output, ...]  # of each question; without tokens where it does not count

    @property
    def num_counted(self) -> int:
        """How many questions count."""
        return sum(num_answer > 0 for _, num_answer in self.outputs)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The documents of one source that have questions that count."""

    answered: tuple[Answered, ...]
    num_asked: int

    @property
    def num_counted(self) -> int:
        """How many questions count."""
        return sum(answered.num_counted for answered in self.answered)

    @property
    def is_enough(self) -> bool:
        """True if plans can be judged by them."""
        return self.num_counted >= LEAST_COUNTED


class Examiner:
    """Asks the dense model, and keeps its answers in the score file."""

    def __init__(self, prompts: OpenPrompts, scores: ScoreFile) -> None:
        self._prompts, self._scores = prompts, scores

    def ask(self, source: QuestionSource, name: str, *, is_sure: bool = True) -> Exam:
        """Asks about documents, the contexts in turn, until enough questions count.

        That is LEAST_COUNTED; or there is an end to asking.

        Args:
            source: where they come from.
            name: of the source, in the score file and in what is shown.
            is_sure: only answers that the dense model is sure of count; else all that are right.
        """
        found: list[Answered] = []
        num_asked, num_counted = 0, 0
        while num_counted < LEAST_COUNTED and num_asked < _MOST_ASKED:
            place = self._next_place(source.contexts, found)
            if place is None:
                break
            document, title = source.document(*place), " ".join(map(str, (name, *place)))
            outputs = self._kept_answers(title, document, is_sure)
            answered = Answered(name=title, document=document, outputs=outputs)
            found.append(answered)
            num_asked += len(document.questions)
            num_counted += answered.num_counted
        return Exam(answered=tuple(a for a in found if a.num_counted), num_asked=num_asked)

    def _next_place(
        self, contexts: Sequence[int], found: Sequence[Answered]
    ) -> tuple[int, int] | None:
        """Context and index of the next document: where fewest questions were asked."""
        asked = dict.fromkeys(contexts, 0)
        counted, documents = dict(asked), dict(asked)
        for answered in found:
            context = answered.document.context
            asked[context] += len(answered.document.questions)
            counted[context] += answered.num_counted
            documents[context] += 1
        worth = [context for context in contexts if asked[context] < _TRIED or counted[context]]
        if not worth:
            return None
        context = min(worth, key=lambda context: asked[context])
        return context, documents[context]

    def _kept_answers(self, name: str, document: Document, is_sure: bool) -> tuple[Output, ...]:
        """The dense model's answers, from the score file if they are there."""
        kept = self._scores.get(name)
        if not _are_answers(kept, len(document.questions)):
            kept = self._answers(name, document, is_sure)
            self._scores.put(name, kept)
        return tuple((list(ids), count) for ids, count in kept)

    def _answers(self, name: str, document: Document, is_sure: bool) -> list[Output]:
        """The dense model's right answers, and if asked for sure ones; an empty one for another."""
        replay = self._prompts.open(name, [q.prompt_ids for q in document.questions], document.room)
        decode = self._prompts.decoder.decode
        outputs = [
            answer_tokens(decode, output, question.answers)
            for output, question in zip(
                replay.greedy(document.room, **DENSE), document.questions, strict=True
            )
        ]
        logits = replay.step_logits([ids[:-1] for ids, _ in outputs], **DENSE)
        return [
            (ids, count) if count and (not is_sure or _is_sure(rows, ids, count)) else ([], 0)
            for (ids, count), rows in zip(outputs, logits, strict=True)
        ]


def answer_tokens(
    decode: Callable[[Sequence[int]], str], output: Sequence[int], answers: Sequence[str]
) -> Output:
    """The tokens of an output up to the end of the answers, and how many of them the answers take.

    They are counted from the first token of one on. None and 0 if an answer is not in there, or
    goes on.
    """

    def holds(token_ids: Sequence[int]) -> bool:
        text = _spaced(decode(token_ids))
        return all(answer in text for answer in answers)

    whole = _spaced(decode(output))
    if not all(re.search(r"(?<!\w)" + re.escape(a) + r"(?!\w)", whole) for a in answers):
        return [], 0
    # A longer output can only add to what is found, a shorter end only lose.
    end = next(n for n in range(1, len(output) + 1) if holds(output[:n]))
    start = next(n for n in range(end - 1, -1, -1) if holds(output[n:end]))
    return list(output[:end]), end - start


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _is_sure(logits: np.ndarray, token_ids: Sequence[int], num_answer: int) -> bool:
    """Whether every token of the answer is likely; how it is led up to may be anything."""
    losses = token_losses(logits, token_ids)[-num_answer:]
    return bool(losses.max() <= -np.log(_SURE))


def _are_answers(value: Any, count: int) -> bool:
    """Whether the score file has answers that can be used."""

    def is_answer(entry: Any) -> bool:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], list):
            return False
        ids, num_answer = entry
        are_ids = all(type(token) is int and token >= 0 for token in ids)
        return are_ids and type(num_answer) is int and 0 <= num_answer <= len(ids)

    return isinstance(value, list) and len(value) == count and all(map(is_answer, value))
