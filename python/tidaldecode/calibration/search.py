"""From plan to plan: greedy over the layers that select, then over everything else, in stages.

Called by command.py. The pattern of IndexCache (arXiv 2603.12201): layers are added one at a time,
each the one that lowers the loss most, and moved while that helps. Where the first select layer
stands decides how many layers in front of it are dense, so each place is a chain of its own; what
they find is compared at equal bytes. Of many candidates each stage ranks all on a few questions and
measures the best of them on everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tidaldecode import plan_bytes
from tidaldecode.calibration.objective import Scores
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.config import PlanConfig
from tidaldecode.errors import UnsupportedError

# First select layers that are tried: those in front are dense.
FIRST_LAYERS = (1, 2, 3)
_LEAST_LAYERS = 3
RECENT_SHARES = (0.0, 0.125, 0.25, 0.5)  # of the budget
SINKS = (1, 4)
GRANULARITIES = ("kv_head", "layer")
# Of the candidates of a chain in a stage, how many are measured on everything.
_KEPT = 6
_MOVES = (-2, -1, 1, 2)  # of a select layer


def canonical(select_layers: Sequence[int]) -> tuple[int, ...]:
    """The fewest select layers with the same steps.

    A first set that the next layer replaces is read by nobody: its layer is as good as dense, so
    (1, 2, 17) is (2, 17).
    """
    layers = sorted(set(select_layers))
    while len(layers) > 1 and layers[0] + 1 == layers[1]:
        del layers[0]
    return tuple(layers)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan in the terms of the search."""

    select_layers: tuple[int, ...]
    token_budget: int
    recent_share: float = 0.25
    sink_tokens: int = 1
    granularity: str = "layer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "select_layers", canonical(self.select_layers))

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
    """Bytes of keys and values that a step of a candidate reads, as plan_bytes.py counts them."""
    config = PlanConfig(
        select_layers=candidate.select_layers or None,
        token_budget=candidate.token_budget,
        granularity=candidate.granularity,
    )
    return plan_bytes.kv_bytes_per_step(model, config, seq_len, value_bytes)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the search, for people."""

    number: int  # from 1
    count: int
    title: str

    def __str__(self) -> str:
        return f"Stage {self.number} of {self.count}, {self.title}"


# Losses of candidates: on everything, or quickly; (candidates, is_quick, stage) -> scores.
Measure = Callable[[Sequence[Candidate], bool, Stage], Sequence[Scores]]


class Search:
    """Finds the plans worth having for one model."""

    def __init__(
        self, model: ModelConfig, measure: Measure, *, seq_len: int, value_bytes: int
    ) -> None:
        """
        Args:
            model: its shape.
            measure: what plans lose; never asked twice for the same.
            seq_len: the length at which bytes count.
            value_bytes: of one number in the cache.
        """
        self._model, self._measure = model, measure
        self._seq_len, self._value_bytes = seq_len, value_bytes
        self._points: dict[Candidate, Point] = {}
        self._quick: dict[Candidate, float] = {}
        self._stage = Stage(number=0, count=0, title="")

    def run(self, budgets: Sequence[int], max_select_layers: int) -> list[Point]:
        """All plans that were measured on everything.

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
        count = max_select_layers + (max_select_layers > 1) + len(budgets)
        self._stage = Stage(number=0, count=count, title="")
        chains = self._chains(budgets[0], max_select_layers)
        ends = self._cheapest([candidate for chain in chains for candidate in chain])
        for budget in budgets:
            self._next_stage(f"budget {budget}")
            ends = self._settled([replace(end, token_budget=budget) for end in ends])
        return list(self._points.values())

    def dense_bytes(self) -> int:
        """Bytes of keys and values that a dense step reads."""
        return self._cost(Candidate(select_layers=(), token_budget=1))

    def _next_stage(self, title: str) -> None:
        stage = self._stage
        self._stage = Stage(number=stage.number + 1, count=stage.count, title=title)

    def _chains(self, budget: int, max_select_layers: int) -> list[list[Candidate]]:
        """A chain for each first layer: one select layer, two, and so on."""
        firsts = [first for first in FIRST_LAYERS if first < self._model.num_layers - 1]
        chains = [[Candidate(select_layers=(first,), token_budget=budget)] for first in firsts]
        self._next_stage("1 select layer")
        self._score([chain[0] for chain in chains])
        for count in range(2, max_select_layers + 1):
            self._next_stage(f"{count} select layers")
            longer = [self._with_one_more(chain[-1]) for chain in chains]
            for chain, best in zip(chains, self._best_of(longer), strict=True):
                chain += best
        if max_select_layers > 1:
            self._next_stage("layers moved")
            moved = [self._moved(chain[-1]) for chain in chains]
            for chain, best in zip(chains, self._best_of(moved), strict=True):
                chain += best
        return chains

    def _with_one_more(self, candidate: Candidate) -> list[Candidate]:
        layers = candidate.select_layers
        return [
            replace(candidate, select_layers=(*layers, layer))
            # What the next layer replaces belongs to the chain that begins there.
            for layer in range(layers[0] + 2, self._model.num_layers)
            if layer not in layers
        ]

    def _moved(self, candidate: Candidate) -> list[Candidate]:
        """One select layer, but the first, elsewhere."""
        first, *others = candidate.select_layers
        moved = []
        for index, layer in enumerate(others):
            for step in _MOVES:
                if first + 1 < layer + step < self._model.num_layers:
                    layers = (first, *others[:index], layer + step, *others[index + 1 :])
                    moved.append(replace(candidate, select_layers=layers))
        return [c for c in dict.fromkeys(moved) if len(c.select_layers) == 1 + len(others)]

    def _best_of(self, lists: Sequence[Sequence[Candidate]]) -> list[list[Candidate]]:
        """The best candidate of each list, in a list; an empty one for an empty one."""
        self._rank([candidate for candidates in lists for candidate in candidates])
        kept = [sorted(own, key=lambda c: self._quick[c])[:_KEPT] for own in lists]
        self._score([candidate for candidates in kept for candidate in candidates])
        return [[min(own, key=self._loss)] if own else [] for own in kept]

    def _settled(self, ends: Sequence[Candidate]) -> list[Candidate]:
        """The best settings besides layers and budget, found at the end that loses least."""
        ends = list(ends)
        self._score(ends)
        best = min(ends, key=self._loss)
        for name, values in (
            ("recent_share", RECENT_SHARES),
            ("granularity", GRANULARITIES),
            ("sink_tokens", SINKS),
        ):
            tried = [best, *(replace(best, **{name: value}) for value in values)]
            self._score(tried)
            best = min(tried, key=self._loss)
        settings = {
            "recent_share": best.recent_share,
            "granularity": best.granularity,
            "sink_tokens": best.sink_tokens,
        }
        settled = [replace(end, **settings) for end in ends]
        self._score(settled)
        return settled

    def _cheapest(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The best at each number of bytes that loses less than all that read less."""
        ordered = sorted(candidates, key=lambda c: (self._cost(c), self._loss(c)))
        kept: list[Candidate] = []
        for candidate in ordered:
            if not kept or self._loss(candidate) < self._loss(kept[-1]):
                kept.append(candidate)
        return kept

    def _cost(self, candidate: Candidate) -> int:
        return kv_bytes_per_step(self._model, candidate, self._seq_len, self._value_bytes)

    def _loss(self, candidate: Candidate) -> float:
        return self._points[candidate].scores.loss

    def _rank(self, candidates: Sequence[Candidate]) -> None:
        new = [c for c in dict.fromkeys(candidates) if c not in self._quick]
        if new:
            found = self._measure(new, True, self._stage)
            self._quick |= {c: scores.loss for c, scores in zip(new, found, strict=True)}

    def _score(self, candidates: Sequence[Candidate]) -> None:
        new = [c for c in dict.fromkeys(candidates) if c not in self._points]
        if new:
            found = self._measure(new, False, self._stage)
            for candidate, scores in zip(new, found, strict=True):
                self._points[candidate] = Point(
                    candidate=candidate, bytes_per_step=self._cost(candidate), scores=scores
                )


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
