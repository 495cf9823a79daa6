"""What a plan loses against dense decoding, measured in decode steps: the calibration's yardstick.

Called by search.py. Similarity of sets or attention would be cheaper, and misleads: the plan whose
sets are most alike is not the one that answers. So the yardstick is what comes out: the loss on
windows of text, and whether questions are answered as the dense model answers them. Prompts are
read once, in groups that begin alike, and stay in the cache as long as there is room; every plan
then decodes behind them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from tidaldecode.calibration.open_prompts import OpenPrompts
from tidaldecode.calibration.questions import DENSE, Answered
from tidaldecode.calibration.score_file import ScoreFile
from tidaldecode.evaluation.distributions import unusable_logits
from tidaldecode.evaluation.perplexity import Window
from tidaldecode.replay import Replay

# Places of a window behind which a few tokens are predicted.
_TEXT_PLACES = 3
_SCORED_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One plan on the data of the context where it loses most; losses in nats a token."""

    text_loss: float  # of the tokens that came, over the dense one
    text_kl: float  # KL from the dense distributions: the same in expectation, less noisy
    answer_kl: float  # along the dense answers; 0 where the model cannot judge by questions
    agreement: float  # share of the questions answered as the dense model, token for token
    set_size: float = 0.0  # positions of a set, at the longest context

    @property
    def loss(self) -> float:
        """What the search makes small: an answer lost weighs as much as a nat on every token."""
        return self.text_kl + self.answer_kl + (1.0 - self.agreement)


@dataclass(frozen=True)
class _Row:
    """A prompt and the tokens that follow it; without any it is there, and not judged."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    num_judged: int  # of token_ids, at the end, must be chosen as the dense model chooses


@dataclass(frozen=True, kw_only=True)
class Group:
    """Prompts of one context that are read and step together."""

    name: str
    context: int
    room: int  # tokens behind the prompts
    rows: tuple[_Row, ...]
    is_text: bool

    @property
    def num_judged(self) -> int:
        """How many of its rows are judged."""
        return sum(bool(row.token_ids) for row in self.rows)


def text_groups(windows: Sequence[Window]) -> list[Group]:
    """A group for each window: what it scores begins at several places, evenly spread."""
    groups = []
    for window in windows:
        count = min(_SCORED_TOKENS, len(window.scored_ids))
        spare = len(window.scored_ids) - count
        starts = sorted({spare * i // (_TEXT_PLACES - 1) for i in range(_TEXT_PLACES)})
        rows = [
            _Row(
                prompt_ids=(*window.prompt_ids, *window.scored_ids[:start]),
                token_ids=window.scored_ids[start : start + count],
                num_judged=count,
            )
            for start in starts
        ]
        groups.append(
            Group(
                name=f"text {window.context} {window.index}",
                context=window.context,
                room=count,
                rows=tuple(rows),
                is_text=True,
            )
        )
    return groups


def question_groups(answered: Sequence[Answered]) -> list[Group]:
    """A group for each document."""
    return [
        Group(
            name=own.name,
            context=own.document.context,
            room=own.document.room,
            rows=tuple(
                _Row(question.prompt_ids, tuple(token_ids), num_answer)
                for question, (token_ids, num_answer) in zip(
                    own.document.questions, own.outputs, strict=True
                )
            ),
            is_text=False,
        )
        for own in answered
    ]


@dataclass(frozen=True, kw_only=True)
class GroupScore:
    """One plan on one group; means over its rows."""

    loss: float
    kl: float
    num_same: int  # rows whose every judged token is chosen as the dense model chooses
    num_rows: int
    set_size: float  # positions of a set


class Objective:
    """Scores plans on groups, each once: what has been scored is in the score file."""

    def __init__(self, prompts: OpenPrompts, groups: Sequence[Group], scores: ScoreFile) -> None:
        """
        Args:
            prompts: where those of the groups are read; room for the largest group, and the more,
                the fewer are read again.
            groups: what plans are judged on: texts and, if the model can judge by them, questions.
            scores: of this model, engine and data.
        """
        self._prompts, self._groups, self._scores = prompts, list(groups), scores
        self._dense: dict[str, list[_Dense]] = {}

    def measure(
        self,
        plans: Sequence[dict[str, Any]],
        on_done: Callable[[int], None],
        *,
        is_quick: bool = False,
    ) -> list[Scores]:
        """What plans lose, on all groups or on the few that are quick.

        Args:
            plans: options of Decoder each; steps are sparse at every length.
            on_done: called with how many (plan, group) pairs are done.
            is_quick: the document of each context that most is asked about, and one text of the
                longest.
        """
        groups = self.quick_groups() if is_quick else self._groups
        found: dict[tuple[int, str], GroupScore] = {}
        for group in groups:
            for index, plan in enumerate(plans):
                found[index, group.name] = self._score(group, plan)
                on_done(len(found))
        return [
            _summed(groups, [found[index, group.name] for group in groups])
            for index in range(len(plans))
        ]

    def num_same(self, plan: dict[str, Any]) -> int:
        """How many questions a plan answers as the dense model does, token for token."""
        return sum(self._score(group, plan).num_same for group in self._groups)

    def num_groups(self, *, is_quick: bool) -> int:
        """How many groups a measurement of one plan takes."""
        return len(self.quick_groups() if is_quick else self._groups)

    def quick_groups(self) -> list[Group]:
        """The groups that tell good plans from bad ones at a fraction of the work."""
        chosen: dict[int, Group] = {}
        for group in self._groups:
            known = chosen.get(group.context)
            if not group.is_text and (known is None or group.num_judged > known.num_judged):
                chosen[group.context] = group
        texts = [group for group in self._groups if group.is_text]
        longest = max((group.context for group in texts), default=0)
        return [*chosen.values(), *(g for g in texts if g.context == longest)][: len(chosen) + 1]

    def _score(self, group: Group, plan: dict[str, Any]) -> GroupScore:
        key = json.dumps([group.name, plan], sort_keys=True)
        kept = _read_score(self._scores.get(key))
        if kept is None:
            kept = self._compare(group, plan)
            self._scores.put(key, list(astuple(kept)))
        return kept

    def _compare(self, group: Group, plan: dict[str, Any]) -> GroupScore:
        """A plan, its steps sparse at every length, against dense."""
        if group.name not in self._dense:
            self._dense[group.name] = [
                _Dense(logits, row) for row, logits in self._logits(group, DENSE)
            ]
        got = self._logits(group, {**plan, "sparse_min_context": 0})
        replay = self._replay(group)
        found = [
            dense.compare(logits)
            for dense, (_, logits) in zip(self._dense[group.name], got, strict=True)
        ]
        losses, divergences, same = zip(*found, strict=True)
        return GroupScore(
            loss=round(float(np.mean(losses)), 6),
            # Rounding to float32 would show, below 0, where a plan is nearly dense.
            kl=max(0.0, round(float(np.mean(divergences)), 6)),
            num_same=sum(same),
            num_rows=len(same),
            set_size=round(replay.mean_set_size, 2),
        )

    def _logits(self, group: Group, plan: dict[str, Any]) -> list[tuple[_Row, np.ndarray]]:
        """The rows that are judged, with the logits of their tokens."""
        replay = self._replay(group)
        logits = replay.step_logits([row.token_ids[:-1] for row in group.rows], **plan)
        return [(row, own) for row, own in zip(group.rows, logits, strict=True) if row.token_ids]

    def _replay(self, group: Group) -> Replay:
        prompts = [row.prompt_ids for row in group.rows]
        return self._prompts.open(group.name, prompts, group.room)


class _Dense:
    """What the dense model says of the tokens of a row, to compare others with.

    In float32: logits have no more digits, and there are many.
    """

    def __init__(self, logits: np.ndarray, row: _Row) -> None:
        """
        Args:
            logits: [tokens, vocab_size], each row predicting the token of its index.
            row: the tokens.
        """
        self._num_judged = row.num_judged
        self._places = np.arange(len(row.token_ids)), list(row.token_ids)
        logs = _log_softmax(logits)
        self._probabilities = np.exp(logs)
        self._own = logs[self._places]
        self._best = logits.argmax(axis=-1)
        self._information = self._expected(logs)

    def compare(self, logits: np.ndarray) -> tuple[float, float, bool]:
        """Another plan's logits: loss over dense and KL, means of its tokens; whether it answers
        alike."""
        logs = _log_softmax(logits)
        loss = (self._own - logs[self._places]).mean()
        divergence = (self._information - self._expected(logs)).mean()
        is_same = logits.argmax(axis=-1) == self._best
        return float(loss), float(divergence), bool(is_same[-self._num_judged :].all())

    def _expected(self, logs: np.ndarray) -> np.ndarray:
        return np.einsum("ij,ij->i", self._probabilities, logs)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """The same as log_probabilities(), in float32.

    Raises: TidalError for logits that are not finite.
    """
    with np.errstate(invalid="ignore"):
        logs = logits - logits.max(axis=-1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(axis=-1, keepdims=True))
    if not np.isfinite(logs).all():
        raise unusable_logits("calibrate")
    return logs


def _summed(groups: Sequence[Group], scores: Sequence[GroupScore]) -> Scores:
    """Those of the context that loses most: a short one must not hide what a long one loses."""
    pairs = list(zip(groups, scores, strict=True))
    contexts = sorted({group.context for group in groups})
    found = [_of_context([pair for pair in pairs if pair[0].context == c]) for c in contexts]
    return replace(max(found, key=lambda own: own.loss), set_size=found[-1].set_size)


def _of_context(pairs: Sequence[tuple[Group, GroupScore]]) -> Scores:
    """The mean of the rows of each kind."""
    texts = [score for group, score in pairs if group.is_text]
    questions = [score for group, score in pairs if not group.is_text]

    def mean(own: Sequence[GroupScore], value: Callable[[GroupScore], float]) -> float:
        total = sum(value(score) * score.num_rows for score in own)
        return round(total / max(1, sum(score.num_rows for score in own)), 6)

    return Scores(
        text_loss=mean(texts, lambda score: score.loss),
        text_kl=mean(texts, lambda score: score.kl),
        answer_kl=mean(questions, lambda score: score.kl),
        agreement=(
            mean(questions, lambda score: score.num_same / score.num_rows) if questions else 1.0
        ),
        set_size=mean([*texts, *questions], lambda score: score.set_size),
    )


def _read_score(value: Any) -> GroupScore | None:
    """A score out of the file, if it is one."""
    if not isinstance(value, list) or len(value) != 5:
        return None
    loss, kl, num_same, num_rows, set_size = value
    is_number = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    if not is_number or type(num_same) is not int or type(num_rows) is not int or num_rows < 1:
        return None
    return GroupScore(
        loss=float(loss),
        kl=float(kl),
        num_same=num_same,
        num_rows=num_rows,
        set_size=float(set_size),
    )
