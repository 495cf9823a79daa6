"""What a plan loses against dense decoding, measured in decode steps: the calibration's yardstick.

Called by search.py. Similarity of sets or attention would be cheaper, and misleads: the plan whose
sets are most alike is not the one that answers. So the yardstick is what comes out: the loss on
windows of text, and whether questions are answered as the dense model answers them. The prompts are
read once; every plan then decodes behind them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tidaldecode.calibration.data import CalibrationData
from tidaldecode.decoder import Decoder
from tidaldecode.evaluation.distributions import divergences, token_losses
from tidaldecode.replay import Replay

BATCH_SIZE = 4  # prompts that step together
ANSWER_TOKENS = 4  # of the dense answer to a question; six digits are two or three tokens
# The dense model is sure of an answer whose every token is at least this likely; another plan's
# other answer to a question that it is not sure of says nothing.
_SURE = 0.5
_DENSE = {"attention": "full"}


@dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """One plan on the questions alone, a fifth of the work."""

    answer_kl: float
    agreement: float

    @property
    def loss(self) -> float:
        """What Scores.loss is at least."""
        return self.answer_kl + (1.0 - self.agreement)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One plan on the calibration data; losses in nats a token, over the dense ones."""

    text_loss: float  # of the tokens that came
    text_kl: float  # KL from the dense distributions: the same in expectation, less noisy
    answer_kl: float  # along the dense answers
    agreement: float  # share of the dense model's sure answers that are the same, token for token

    @property
    def loss(self) -> float:
        """What the search makes small: an answer lost weighs as much as a nat on every token."""
        return self.text_kl + self.answer_kl + (1.0 - self.agreement)


class Objective:
    """Scores plans, each once: what has been scored is kept in a file and not decoded again."""

    def __init__(self, decoder: Decoder, data: CalibrationData, cache: Path | None) -> None:
        """Prompts are read when the first plan comes that is not in the cache.

        Args:
            decoder: room for decoder_options(data).
            data: what plans are judged on.
            cache: a file of earlier scores of this model and data; None keeps nothing.
        """
        self._decoder, self._data, self._cache = decoder, data, cache
        self._answers: dict[str, AnswerScores] = {}
        self._scores: dict[str, Scores] = {}
        if cache is not None:
            self._load(cache)
        self._texts: list[_Batch] = []
        self._questions: list[_Batch] = []

    def scores(self, **plan: Any) -> Scores:
        """What a plan loses.

        Args:
            plan: options of Decoder; steps are sparse at every length.
        """
        key = _key(plan)
        if key not in self._scores:
            answers = self.answers(**plan)
            rows = self._compare(self._texts, plan)
            self._scores[key] = Scores(
                text_loss=_mean([row.loss for row in rows]),
                text_kl=_mean([row.kl for row in rows]),
                answer_kl=answers.answer_kl,
                agreement=answers.agreement,
            )
            self._keep(key, self._scores[key])
        return self._scores[key]

    def answers(self, **plan: Any) -> AnswerScores:
        """The part of scores() that the questions give."""
        key = _key(plan)
        if key not in self._answers:
            rows = self._compare(self._questions, plan)
            self._answers[key] = AnswerScores(
                answer_kl=_mean([row.kl for row in rows]),
                agreement=round(_share([row.is_same for row in rows if row.is_sure]), 6),
            )
            self._keep(key, self._answers[key])
        return self._answers[key]

    def _compare(self, batches: Sequence[_Batch], plan: dict[str, Any]) -> list[_Row]:
        if not self._texts:
            self._read()
        sparse = {**plan, "sparse_min_context": 0}
        return [row for batch in batches for row in batch.compare(sparse)]

    def _keep(self, key: str, scores: AnswerScores | Scores) -> None:
        if self._cache is not None:
            with open(self._cache, "a", encoding="utf-8") as file:
                file.write(json.dumps([key, asdict(scores)]) + "\n")

    def _load(self, cache: Path) -> None:
        """Earlier scores, but for lines that are none (the last one, if a run was cut off)."""
        for line in cache.read_bytes().splitlines() if cache.exists() else []:
            try:
                key, values = json.loads(line)
                if "text_kl" in values:
                    self._scores[key] = Scores(**values)
                own = {field.name: values[field.name] for field in fields(AnswerScores)}
                self._answers[key] = AnswerScores(**own)
            except (ValueError, TypeError, KeyError):
                continue

    def _read(self) -> None:
        """Reads all prompts, and what the dense model makes of them."""
        windows = self._data.windows
        for i in range(0, len(windows), BATCH_SIZE):
            part = windows[i : i + BATCH_SIZE]
            prompts = [window.prompt_ids for window in part]
            replay = self._decoder.replay(prompts, max_new_tokens=len(part[0].scored_ids))
            self._texts.append(_Batch(replay, [window.scored_ids for window in part]))
        questions = self._data.questions
        for i in range(0, len(questions), BATCH_SIZE):
            part = questions[i : i + BATCH_SIZE]
            replay = self._decoder.replay(part, max_new_tokens=ANSWER_TOKENS)
            answers = replay.greedy(ANSWER_TOKENS, **_DENSE)
            self._questions.append(_Batch(replay, answers))


def _key(plan: dict[str, Any]) -> str:
    return json.dumps(plan, sort_keys=True)


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 6)


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 1.0


@dataclass(frozen=True, kw_only=True)
class _Row:
    loss: float
    kl: float
    is_sure: bool  # of the dense model
    is_same: bool


class _Batch:
    """Prompts in the cache, the tokens that follow each, and what the dense model says of them."""

    def __init__(self, replay: Replay, tokens: Sequence[Sequence[int]]) -> None:
        self._replay, self._tokens = replay, [list(ids) for ids in tokens]
        self._dense = self._logits(_DENSE)

    def _logits(self, plan: dict[str, Any]) -> list[np.ndarray]:
        return self._replay.step_logits([ids[:-1] for ids in self._tokens], **plan)

    def compare(self, plan: dict[str, Any]) -> list[_Row]:
        """Each prompt through a plan, against dense."""
        rows = []
        triples = zip(self._tokens, self._dense, self._logits(plan), strict=True)
        for ids, dense, logits in triples:
            dense_loss = token_losses(dense, ids)
            is_same = logits.argmax(axis=-1) == dense.argmax(axis=-1)
            rows.append(
                _Row(
                    loss=float((token_losses(logits, ids) - dense_loss).mean()),
                    kl=float(divergences(dense, logits).mean()),
                    is_sure=bool(dense_loss.max() <= -np.log(_SURE)),
                    is_same=bool(is_same.all()),
                )
            )
        return rows


def decoder_options(data: CalibrationData, page_size: int) -> dict[str, Any]:
    """Options of Decoder for a cache that holds all prompts at once."""
    prompts = [(len(window.prompt_ids), len(window.scored_ids)) for window in data.windows]
    prompts += [(len(ids), ANSWER_TOKENS) for ids in data.questions]
    lengths = [read + decoded for read, decoded in prompts]
    return {
        "attention": "full",
        "max_seq_len": max(lengths),
        "max_batch_size": BATCH_SIZE,
        "num_pages": sum(-(-length // page_size) for length in lengths),
        "page_size": page_size,
        "cuda_graphs": False,
    }
