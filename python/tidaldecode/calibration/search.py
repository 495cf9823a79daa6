"""From plan to plan: greedy over the layers that select, then over everything else.

Called by command.py. The pattern of IndexCache (arXiv 2603.12201): layers are added one at a time,
each the one that lowers the loss most, and exchanged while that helps. Where the first select layer
stands decides how many layers in front of it are dense, so each place is a search of its own; what
they find is compared at equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tidaldecode.calibration.objective import Scores
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.errors import UnsupportedError
from tidaldecode.plans import plan_letters

# First select layers that are tried: those in front are dense.
FIRST_LAYERS = (1, 2, 3)
_LEAST_LAYERS = 3
RECENT_SHARES = (0.0, 0.125, 0.25, 0.5)  # of the budget
SINKS = (1, 4)
GRANULARITIES = ("kv_head", "layer")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan in the terms of the search."""

    select_layers: tuple[int, ...]
    token_budget: int
    recent_share: float = 0.25
    sink_tokens: int = 1
    granularity: str = "layer"

    def options(self) -> dict[str, Any]:
        """Options of Decoder, and what a plan file holds."""
        room = self.token_budget - self.sink_tokens
        recent = max(1, min(room, round(self.recent_share * self.token_budget)))
        return {
            "select_layers": list(self.select_layers),
            "full_layers": self.select_layers[0],
            "token_budget": self.token_budget,
            "sink_tokens": self.sink_tokens,
            "recent_tokens": recent,
            "granularity": self.granularity,
            "pooling": "sum",
        }


@dataclass(frozen=True, kw_only=True)
class Point:
    """A plan with what it costs and what it loses."""

    candidate: Candidate
    bytes_per_step: int  # of keys and values
    scores: Scores


def kv_bytes_per_step(
    model: ModelConfig, candidate: Candidate, seq_len: int, value_bytes: int
) -> int:
    """Bytes of keys and values that a step reads for one sequence.

    Args:
        model: its shape.
        candidate: a plan; one without select layers is dense.
        seq_len: tokens in the cache.
        value_bytes: of one number in the cache.
    """
    letters = plan_letters(model.num_layers, candidate.select_layers)
    sparse_rows = min(candidate.token_budget, seq_len)
    rows = sum(sparse_rows if letter == "s" else seq_len for letter in letters)
    return rows * 2 * model.num_kv_heads * model.head_dim * value_bytes


class Search:
    """Finds the plans worth having for one model."""

    def __init__(
        self,
        model: ModelConfig,
        score: Callable[[Candidate], Scores],
        *,
        seq_len: int,
        value_bytes: int,
        bound: Callable[[Candidate], float] = lambda candidate: 0.0,
        on_scored: Callable[[int], None] = lambda count: None,
    ) -> None:
        """
        Args:
            model: its shape.
            score: what a plan loses.
            seq_len: the length at which bytes count.
            value_bytes: of one number in the cache.
            bound: what a plan loses at least; cheaper than `score`, which is not asked for plans
                that this rules out.
            on_scored: called with the number of plans scored.
        """
        self._model, self._score, self._on_scored = model, score, on_scored
        self._bound = bound
        self._seq_len, self._value_bytes = seq_len, value_bytes
        self._points: dict[Candidate, Point] = {}

    def run(self, budgets: Sequence[int], max_select_layers: int) -> list[Point]:
        """All plans that were scored: the best ones, and those that might have been.

        Args:
            budgets: token budgets, ascending; layers are searched at the smallest, which is the
                hardest, and all else at each.
            max_select_layers: most layers that select.

        Raises: UnsupportedError for a model without room for a dense, a select and a sparse layer.
        """
        if self._model.num_layers < _LEAST_LAYERS:
            raise UnsupportedError(
                f"calibrate: got a model of {self._model.num_layers} layers, expected at least "
                f"{_LEAST_LAYERS}: one dense, one that selects, one sparse"
            )
        chains = [
            chain
            for first in FIRST_LAYERS
            if first < self._model.num_layers - 1
            for chain in self._grow(first, budgets[0], max_select_layers)
        ]
        best: dict[int, Candidate] = {}  # by bytes
        for candidate in chains:
            best[self._cost(candidate)] = min(
                best.get(self._cost(candidate), candidate), candidate, key=self._loss
            )
        for candidate in best.values():
            settled = self._settle(candidate)
            # The settings have changed: are the layers still the best?
            settled = self._exchange(settled)
            for budget in budgets[1:]:
                self._settle(replace(settled, token_budget=budget))
        return list(self._points.values())

    def _cost(self, candidate: Candidate) -> int:
        return kv_bytes_per_step(self._model, candidate, self._seq_len, self._value_bytes)

    def _loss(self, candidate: Candidate) -> float:
        if candidate not in self._points:
            self._points[candidate] = Point(
                candidate=candidate,
                bytes_per_step=self._cost(candidate),
                scores=self._score(candidate),
            )
            self._on_scored(len(self._points))
        return self._points[candidate].scores.loss

    def _best(self, candidates: Sequence[Candidate]) -> Candidate:
        """The one that loses least, of equals the first."""
        order = sorted(range(len(candidates)), key=lambda index: self._bound(candidates[index]))
        best = order[0]
        for index in order[1:]:
            least = self._loss(candidates[best])
            if self._bound(candidates[index]) > least:
                break
            best = min(best, index, key=lambda i: (self._loss(candidates[i]), i))
        return candidates[best]

    def _grow(self, first: int, budget: int, max_select_layers: int) -> Iterator[Candidate]:
        """One layer, two layers and so on, each the best that the last can be made by adding."""
        candidate = Candidate(select_layers=(first,), token_budget=budget)
        self._loss(candidate)
        yield candidate
        while len(candidate.select_layers) < max_select_layers:
            added = [
                replace(candidate, select_layers=tuple(sorted({*candidate.select_layers, layer})))
                for layer in range(first + 1, self._model.num_layers)
                if layer not in candidate.select_layers
            ]
            if not added:
                return
            candidate = self._exchange(self._best(added))
            yield candidate

    def _exchange(self, candidate: Candidate) -> Candidate:
        """Moves select layers, but the first, to their neighbours while that helps."""
        while True:
            moved = [
                replace(candidate, select_layers=tuple(sorted({*others, layer + step})))
                for layer in candidate.select_layers[1:]
                for others in [set(candidate.select_layers) - {layer}]
                for step in (-1, 1)
                if candidate.select_layers[0] < layer + step < self._model.num_layers
                and layer + step not in others
            ]
            best = self._best([candidate, *moved])
            if best == candidate:
                return candidate
            candidate = best

    def _settle(self, candidate: Candidate) -> Candidate:
        """The best settings besides layers and budget, one after the other."""
        for name, values in (
            ("recent_share", RECENT_SHARES),
            ("granularity", GRANULARITIES),
            ("sink_tokens", SINKS),
        ):
            candidate = self._best(
                [candidate, *(replace(candidate, **{name: value}) for value in values)]
            )
        return candidate


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both bytes and loss, by ascending bytes."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes_per_step, p.scores.loss)):
        if not kept or point.scores.loss < kept[-1].scores.loss:
            kept.append(point)
    return kept


def choose(points: Sequence[Point], max_loss: float) -> Point:
    """The cheapest point of the frontier within `max_loss`, or the one that loses least."""
    ascending = frontier(points)
    return next((p for p in ascending if p.scores.loss <= max_loss), ascending[-1])
