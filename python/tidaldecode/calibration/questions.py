"""Which questions the dense model answers: only on those can a plan be judged.

Called by run.py. Questions are drawn until enough count: for the search those that the dense model
is sure of, to report how the choice does all that it answers rightly. Whole answers count: all
tokens in which the dense model's output has what the text says, however many its tokenizer makes of
it, and those alone: how a model leads up to an answer may be anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tidaldecode.batch import PrefillProgress
from tidaldecode.calibration.data import Question, QuestionSource
from tidaldecode.calibration.score_file import ScoreFile
from tidaldecode.decoder import Decoder
from tidaldecode.evaluation.distributions import token_losses

BATCH_SIZE = 4  # prompts that are read and step together
LEAST_COUNTED = 24
MOST_ASKED = 96
# A form of which so many were asked at a context, and none counted, is not asked there any more.
_TRIED = 4
# The dense model is sure of an answer whose every token is at least this likely; another plan's
# other answer to a question that it is not sure of says nothing.
_SURE = 0.5
DENSE = {"attention": "full"}
# Token ids up to the end of an answer, and how many of them, at the end, are the answer.
Output = tuple[list[int], int]


class Reporter(Protocol):
    """Where a calibration shows how far it is."""

    def reading(self, title: str) -> AbstractContextManager[PrefillProgress]:
        """A bar for tokens of prompts."""

    def counting(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A bar for plans."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question that counts, and the dense model's answer."""

    context: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]  # up to the end of the answer
    num_answer: int  # of them, at the end, are the answer itself


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The questions of one source that count."""

    answered: tuple[Answered, ...]
    num_asked: int

    @property
    def is_enough(self) -> bool:
        """True if plans can be judged by them."""
        return len(self.answered) >= LEAST_COUNTED


class _Paper:
    """What has been asked at one context, form by form."""

    def __init__(self, context: int, num_forms: int) -> None:
        self.context = context
        self._asked = [0] * num_forms
        self._counted = [0] * num_forms

    @property
    def num_asked(self) -> int:
        """Questions of all forms together."""
        return sum(self._asked)

    def open_forms(self) -> list[int]:
        """The forms that are worth asking."""
        pairs = enumerate(zip(self._asked, self._counted, strict=True))
        return [form for form, (asked, counted) in pairs if asked < _TRIED or counted]

    def draw(self) -> list[int]:
        """The indices of the next BATCH_SIZE questions: the open forms in turn."""
        asked, drawn = list(self._asked), []
        for _ in range(BATCH_SIZE):
            form = min(self.open_forms(), key=lambda form: asked[form])
            drawn.append(asked[form] * len(asked) + form)
            asked[form] += 1
        return drawn

    def note(self, index: int, *, counts: bool) -> None:
        """Marks a question that was asked."""
        form = index % len(self._asked)
        self._asked[form] += 1
        self._counted[form] += counts


class Examiner:
    """Asks the dense model, and keeps its answers in the score file."""

    def __init__(self, decoder: Decoder, scores: ScoreFile, reporter: Reporter) -> None:
        self._decoder, self._scores, self._reporter = decoder, scores, reporter

    def ask(self, source: QuestionSource, name: str, *, is_sure: bool = True) -> Exam:
        """Draws questions, the contexts in turn, until LEAST_COUNTED count or MOST_ASKED are asked.

        Args:
            source: where they come from.
            name: of the source, in the score file and in what is shown.
            is_sure: only answers that the dense model is sure of count; else all that are right.
        """
        answered: list[Answered] = []
        num_asked = 0
        papers = [_Paper(context, source.num_forms) for context in source.contexts]
        while len(answered) < LEAST_COUNTED and num_asked < MOST_ASKED:
            papers = [paper for paper in papers if paper.open_forms()]
            if not papers:
                break
            paper = min(papers, key=lambda paper: paper.num_asked)
            questions = [source.question(paper.context, index) for index in paper.draw()]
            title = f"Reading {name}, {len(answered)} of {LEAST_COUNTED} count"
            kept = self._kept_answers(questions, name, title, is_sure)
            for question, (token_ids, num_answer) in zip(questions, kept, strict=True):
                paper.note(question.index, counts=num_answer > 0)
                if num_answer > 0:
                    answered.append(
                        Answered(
                            context=question.context,
                            prompt_ids=question.prompt_ids,
                            token_ids=tuple(token_ids),
                            num_answer=num_answer,
                        )
                    )
            num_asked += len(questions)
        return Exam(answered=tuple(answered), num_asked=num_asked)

    def _kept_answers(
        self, questions: Sequence[Question], name: str, title: str, is_sure: bool
    ) -> list[Output]:
        """The dense model's answers, from the score file if they are there."""
        key = json.dumps([name, questions[0].context, [q.index for q in questions]])
        kept = self._scores.get(key)
        if not _are_answers(kept, len(questions)):
            kept = self._answers(questions, title, is_sure)
            self._scores.put(key, kept)
        return [(ids, count) for ids, count in kept]

    def _answers(self, questions: Sequence[Question], title: str, is_sure: bool) -> list[Output]:
        """The dense model's right answers, and if asked for sure ones; an empty one for another."""
        room = max(question.room for question in questions)
        prompts = [question.prompt_ids for question in questions]
        with (
            self._reporter.reading(title) as on_prefill,
            self._decoder.replay(prompts, max_new_tokens=room, on_prefill=on_prefill) as replay,
        ):
            outputs = [
                answer_tokens(self._decoder.decode, output[: question.room], question.answer)
                for output, question in zip(replay.greedy(room, **DENSE), questions, strict=True)
            ]
            logits = replay.step_logits([ids[:-1] for ids, _ in outputs], **DENSE)
        return [
            (ids, count) if count and (not is_sure or _is_sure(rows, ids, count)) else ([], 0)
            for (ids, count), rows in zip(outputs, logits, strict=True)
        ]


def answer_tokens(
    decode: Callable[[Sequence[int]], str], output: Sequence[int], answer: str
) -> Output:
    """The tokens of an output up to the end of the answer, and how many of them are the answer.

    None and 0 if the answer is not in there, or goes on.
    """

    def holds(token_ids: Sequence[int]) -> bool:
        return answer in _spaced(decode(token_ids))

    pattern = re.compile(r"(?<!\w)" + re.escape(answer) + r"(?!\w)")
    if not pattern.search(_spaced(decode(output))):
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
