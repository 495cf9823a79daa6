"""What a plan loses against dense decoding, measured in decode steps: the calibration's yardstick.

Called by search.py. Similarity of sets or attention would be cheaper, and misleads: the plan whose
sets are most alike is not the one that answers. So the yardstick is what comes out: the loss on
windows of text, and whether questions are answered as the dense model answers them. Prompts are
read once, in groups, and stay in the cache as long as there is room; every plan then decodes behind
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from tidaldecode.calibration.questions import BATCH_SIZE, DENSE, Answered, Reporter
from tidaldecode.calibration.score_file import ScoreFile
from tidaldecode.decoder import Decoder
from tidaldecode.evaluation.distributions import log_probabilities, unusable_logits
from tidaldecode.evaluation.perplexity import Window
from tidaldecode.replay import Replay


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One plan on the calibration data, the mean of its contexts; losses in nats a token."""

    text_loss: float  # of the tokens that came, over the dense one
    text_kl: float  # KL from the dense distributions: the same in expectation, less noisy
    answer_kl: float  # along the dense answers; 0 where the model cannot judge by questions
    agreement: float  # share of the questions answered as the dense model, token for token

    @property
    def loss(self) -> float:
        """What the search makes small: an answer lost weighs as much as a nat on every token."""
        return self.text_kl + self.answer_kl + (1.0 - self.agreement)


@dataclass(frozen=True)
class _Row:
    """A prompt and the tokens that follow it."""

    context: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    num_judged: int  # of token_ids, at the end, must be chosen as the dense model chooses


@dataclass(frozen=True, kw_only=True)
class Group:
    """Prompts of one context that are read and step together."""

    name: str
    context: int
    rows: tuple[_Row, ...]
    is_text: bool

    @property
    def room(self) -> int:
        """Tokens behind the prompts."""
        return max(len(row.token_ids) for row in self.rows)

    def num_pages(self, page_size: int) -> int:
        """Pages that its rows take."""
        return sum(-(-(len(row.prompt_ids) + self.room) // page_size) for row in self.rows)


def text_groups(windows: Sequence[Window]) -> list[Group]:
    """Windows of each context, BATCH_SIZE together."""
    rows = [
        _Row(w.context, w.prompt_ids, w.scored_ids, num_judged=len(w.scored_ids)) for w in windows
    ]
    return _groups("text", rows, is_text=True)


def question_groups(answered: Sequence[Answered], name: str) -> list[Group]:
    """Questions of each context, BATCH_SIZE together, under the name of their source."""
    rows = [_Row(a.context, a.prompt_ids, a.token_ids, num_judged=a.num_answer) for a in answered]
    return _groups(name, sorted(rows, key=lambda row: row.context), is_text=False)


def _groups(name: str, rows: Sequence[_Row], *, is_text: bool) -> list[Group]:
    groups = []
    for context, same in groupby(rows, key=lambda row: row.context):
        own = list(same)
        for i in range(0, len(own), BATCH_SIZE):
            groups.append(
                Group(
                    name=f"{name} {context} {i // BATCH_SIZE}",
                    context=context,
                    rows=tuple(own[i : i + BATCH_SIZE]),
                    is_text=is_text,
                )
            )
    return groups


@dataclass(frozen=True, kw_only=True)
class GroupScore:
    """One plan on one group; means over its rows."""

    loss: float
    kl: float
    num_same: int  # rows whose every judged token is chosen as the dense model chooses
    num_rows: int


class Objective:
    """Scores plans on groups, each once: what has been scored is in the score file."""

    def __init__(
        self, decoder: Decoder, groups: Sequence[Group], scores: ScoreFile, reporter: Reporter
    ) -> None:
        """
        Args:
            decoder: room for the largest group; the more, the fewer prompts are read again.
            groups: what plans are judged on: texts and, if the model can judge by them, questions.
            scores: of this model, engine and data.
            reporter: where reading is shown.
        """
        self._decoder, self._groups, self._scores = decoder, list(groups), scores
        self._open = OpenGroups(decoder, reporter)

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
            is_quick: the first questions of each context alone; of a model that cannot judge by
                questions the texts of the longest context.
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

    def close(self) -> None:
        """Frees the pages of all groups."""
        self._open.close()

    def num_groups(self, *, is_quick: bool) -> int:
        """How many groups a measurement of one plan takes."""
        return len(self.quick_groups() if is_quick else self._groups)

    def quick_groups(self) -> list[Group]:
        """The groups that tell good plans from bad ones at a fraction of the work."""
        first = {group.context: group for group in reversed(self._groups) if not group.is_text}
        longest = max(group.context for group in self._groups)
        texts = [group for group in self._groups if group.context == longest and group.is_text]
        return list(first.values()) or texts

    def _score(self, group: Group, plan: dict[str, Any]) -> GroupScore:
        key = json.dumps([group.name, plan], sort_keys=True)
        kept = _read_score(self._scores.get(key))
        if kept is None:
            kept = self._open.get(group).compare(plan)
            self._scores.put(key, [kept.loss, kept.kl, kept.num_same, kept.num_rows])
        return kept


class OpenGroups:
    """The groups whose prompts are in the cache.

    Groups are gone through again and again in the same order, so the one used last makes room: it
    is the one not needed for longest.
    """

    def __init__(self, decoder: Decoder, reporter: Reporter) -> None:
        self._decoder, self._reporter = decoder, reporter
        self._open: dict[str, OpenGroup] = {}

    def get(self, group: Group) -> OpenGroup:
        """The group, read if it is not in the cache."""
        found = self._open.pop(group.name, None)
        if found is None:
            needed = group.num_pages(self._decoder.config.page_size)
            while self._open and self._decoder.num_free_pages < needed:
                self._open.popitem()[1].close()
            with self._reporter.reading(f"Reading {group.name}") as on_prefill:
                found = OpenGroup(self._decoder, group, on_prefill)
        self._open[group.name] = found
        return found

    def close(self) -> None:
        """Frees the pages of all of them."""
        while self._open:
            self._open.popitem()[1].close()


class OpenGroup:
    """A group in the cache, and what the dense model says of the tokens that follow."""

    def __init__(
        self, decoder: Decoder, group: Group, on_prefill: Callable[[int, int], None]
    ) -> None:
        self._group = group
        prompts = [list(row.prompt_ids) for row in group.rows]
        self._replay: Replay = decoder.replay(
            prompts, max_new_tokens=group.room, on_prefill=on_prefill
        )
        # [tokens, vocab_size] float32 a row.
        self._dense = [log_probabilities(x).astype(np.float32) for x in self._logits(DENSE)]

    def _logits(self, plan: dict[str, Any]) -> list[np.ndarray]:
        continuations = [row.token_ids[:-1] for row in self._group.rows]
        logits = self._replay.step_logits(continuations, **plan)
        if not all(np.isfinite(rows).all() for rows in logits):
            raise unusable_logits("calibrate")
        return logits

    def compare(self, plan: dict[str, Any]) -> GroupScore:
        """A plan, its steps sparse at every length, against dense."""
        losses, divergences, same = [], [], []
        logits = self._logits({**plan, "sparse_min_context": 0})
        for row, dense, own in zip(self._group.rows, self._dense, logits, strict=True):
            got = log_probabilities(own)
            places = np.arange(len(row.token_ids)), list(row.token_ids)
            losses.append(float((dense[places] - got[places]).mean()))
            divergences.append(float((np.exp(dense) * (dense - got)).sum(axis=-1).mean()))
            is_same = got.argmax(axis=-1) == dense.argmax(axis=-1)
            same.append(bool(is_same[-row.num_judged :].all()))
        return GroupScore(
            loss=round(float(np.mean(losses)), 6),
            # Of a plan that is dense, rounding to float32 would leave a trace.
            kl=max(0.0, round(float(np.mean(divergences)), 6)),
            num_same=sum(same),
            num_rows=len(same),
        )

    def close(self) -> None:
        """Frees its pages."""
        self._replay.close()


def _summed(groups: Sequence[Group], scores: Sequence[GroupScore]) -> Scores:
    """The mean of the contexts, each the mean of its rows."""
    pairs = list(zip(groups, scores, strict=True))
    texts = [(group, score) for group, score in pairs if group.is_text]
    questions = [(group, score) for group, score in pairs if not group.is_text]

    def mean(
        own: Sequence[tuple[Group, GroupScore]], value: Callable[[GroupScore], float]
    ) -> float:
        rows: dict[int, list[tuple[float, int]]] = {}
        for group, score in own:
            rows.setdefault(group.context, []).append((value(score), score.num_rows))
        means = [sum(v * n for v, n in part) / sum(n for _, n in part) for part in rows.values()]
        return round(float(np.mean(means)), 6)

    return Scores(
        text_loss=mean(texts, lambda score: score.loss) if texts else 0.0,
        text_kl=mean(texts, lambda score: score.kl) if texts else 0.0,
        answer_kl=mean(questions, lambda score: score.kl) if questions else 0.0,
        agreement=(
            mean(questions, lambda score: score.num_same / score.num_rows) if questions else 1.0
        ),
    )


def _read_score(value: Any) -> GroupScore | None:
    """A score out of the file, if it is one."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    loss, kl, num_same, num_rows = value
    is_number = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    if not is_number or type(num_same) is not int or type(num_rows) is not int or num_rows < 1:
        return None
    return GroupScore(loss=float(loss), kl=float(kl), num_same=num_same, num_rows=num_rows)
