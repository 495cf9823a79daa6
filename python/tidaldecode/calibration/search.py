"""From plan to plan: layers that choose are taken away, then everything else is settled, in stages.

Called by command.py. It begins with a plan in which every layer scores the shadows of all keys and
chooses for itself, which loses next to nothing, and takes away what costs least: a layer that does
not choose reads the set in front of it. (The pattern of IndexCache, arXiv 2603.12201, the other way
round: adding layers to a plan of few finds what is less bad, not what is good.) In each round all
layers are ranked, and as many as are nearly free go together, so that there is a plan for every
number of bytes. Plans are ranked on a few questions and texts; of those that come out best, the
ones that may be near the loss that is allowed are measured on everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tidaldecode.calibration.objective import Scores
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.config import PlanConfig
from tidaldecode.errors import UnsupportedError
from tidaldecode.plan_bytes import kv_bytes_per_step
from tidaldecode.plans import plan_letters

_LEAST_LAYERS = 2
# Layers in front that are dense in the first plan; the others all choose.
_DENSE_LAYERS = 1
# Shares of the attention that adaptive budgets hold, and the positions they hold at least.
MASSES = (0.9, 0.95, 0.97, 0.98, 0.99)
_LEAST_POSITIONS = 64
# What is settled for each plan, in this order; recents are shares of the budget.
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "granularity": ("layer", "kv_head"),
    "recent_share": (0.25, 0.0, 0.125, 0.5),
    "sink_tokens": (1, 4),
}
# The share of the choosing layers that a round takes away.
_TAKEN_SHARE = 0.25
# Plans are kept whose loss is within a factor of the least among those that read less: first while
# their settings are open, which may halve it, and then where ranking is no better than that. Plans
# within the last factor of the loss that is allowed may turn out on either side of it.
_UNSETTLED_ALIKE = 2.0
_RANKED_ALIKE = 1.15
_NEAR = 2.5
# Plans that read so many times the bytes of another read as good as the same.
_BYTES_ALIKE = 1.02
# A budget whose loss is this much on the safe side of the one allowed, in ranking, is the last that
# is tried on the way there.
_SAFE = 1.5
# A plan that loses so many times what is allowed at one budget will not do at four times that.
_HOPELESS = 30.0
# With so few layers that choose, they may as well be dense, which repairs errors.
_MOST_SELECT_LAYERS = 6


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan in the terms of the search."""

    token_budget: int  # of an adaptive one the most
    top_p_mass: float | None = None  # of an adaptive budget
    select_layers: tuple[int, ...] = ()
    scored_layers: tuple[int, ...] = ()
    recent_share: float = 0.25
    sink_tokens: int = 1
    granularity: str = "layer"
    shadow: str = "int4"  # what scored layers choose from

    @property
    def choosing_layers(self) -> tuple[int, ...]:
        """The layers that choose, of both kinds, ascending."""
        return tuple(sorted((*self.select_layers, *self.scored_layers)))

    def options(self) -> dict[str, Any]:
        """Options of Decoder, and what a plan file holds."""
        adaptive: dict[str, Any] = {}
        least = self.token_budget
        if self.top_p_mass is not None:
            least = min(least, _LEAST_POSITIONS)
            adaptive = {"top_p_mass": self.top_p_mass, "min_token_budget": least}
        recent = max(1, min(least - self.sink_tokens, round(self.recent_share * least)))
        kinds = {"select_layers": self.select_layers, "scored_layers": self.scored_layers}
        return {
            **{name: list(layers) for name, layers in kinds.items() if layers},
            **self._shadow(),
            "full_layers": self.choosing_layers[0],
            "token_budget": self.token_budget,
            **adaptive,
            "sink_tokens": self.sink_tokens,
            "recent_tokens": recent,
            "granularity": self.granularity,
            "pooling": "sum",
        }

    def config(self) -> PlanConfig:
        """The plan; without layers that choose it is dense."""
        return PlanConfig(
            select_layers=self.select_layers or None,
            scored_layers=self.scored_layers or None,
            token_budget=self.token_budget,
            granularity=self.granularity,
            **self._shadow(),
        )

    def _shadow(self) -> dict[str, Any]:
        return {"shadow": self.shadow} if self.scored_layers else {}

    def letters(self, windows: Sequence[int]) -> str:
        """The plan as the engine prints it, on layers with these windows (ModelConfig)."""
        return plan_letters(windows, self.config())


@dataclass(frozen=True, kw_only=True)
class Point:
    """A plan with what it costs and what it loses."""

    candidate: Candidate
    bytes_per_step: int  # of keys and values
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the search, for people."""

    number: int  # from 1
    count: int
    title: str

    def __str__(self) -> str:
        return f"Stage {self.number} of {self.count}, {self.title}"


def open_layers(model: ModelConfig) -> tuple[int, ...]:
    """The layers that may choose.

    Raises: UnsupportedError for a model without room for one that chooses and a sparse one.
    """
    layers = tuple(n for n in model.full_attention_layers if n >= _DENSE_LAYERS)
    if len(layers) < _LEAST_LAYERS:
        those = "" if len(layers) == model.num_layers - 1 else " without a window"
        raise UnsupportedError(
            f"calibrate: got a model with {len(layers)} layers{those} behind the first, "
            f"expected at least {_LEAST_LAYERS}: one that chooses, one sparse"
        )
    return layers


# Losses of candidates: on everything, or quickly; (candidates, is_quick, stage) -> scores.
Measure = Callable[[Sequence[Candidate], bool, Stage], Sequence[Scores]]


class Search:
    """Finds the plans worth having for one model."""

    def __init__(
        self, model: ModelConfig, measure: Measure, *, seq_len: int, kv_dtype: str
    ) -> None:
        """
        Args:
            model: its shape.
            measure: what plans lose; never asked twice for the same.
            seq_len: the length at which bytes count.
            kv_dtype: of the cache.
        """
        self._model, self._measure = model, measure
        self._seq_len, self._kv_dtype = seq_len, kv_dtype
        self._points: dict[Candidate, Point] = {}
        self._quick: dict[Candidate, Scores] = {}
        self._stage = Stage(number=0, count=0, title="")

    def run(
        self,
        budgets: Sequence[int],
        max_choosing_layers: int | None = None,
        *,
        max_loss: float = math.inf,
    ) -> list[Point]:
        """All plans that were measured on everything.

        Args:
            budgets: token budgets, ascending; layers and settings are searched at the middle one.
                The largest is the most that an adaptive budget may take.
            max_choosing_layers: most layers that choose in a plan of the result; None: any number.
            max_loss: the cheapest plan that loses no more is wanted, so that only those near it are
                measured; where that shows none, or none that loses more, all that are worth it.

        Raises: UnsupportedError for a model without room for a dense, a scored and a sparse layer.
        """
        layers = open_layers(self._model)
        sizes = _chain_sizes(len(layers))
        self._stage = Stage(number=0, count=len(sizes) + 3, title="")
        middle = budgets[(len(budgets) - 1) // 2]
        chain = self._chain(Candidate(scored_layers=layers, token_budget=middle), sizes)
        most = len(layers) if max_choosing_layers is None else max_choosing_layers
        ends = self._cheapest(
            [c for c in chain if len(c.choosing_layers) <= most], _UNSETTLED_ALIKE
        )
        self._next_stage(f"settings at budget {middle}")
        ends = self._settled(ends)
        # The layer that all others lean on may do better dense.
        dense = [_without(end, end.scored_layers[0]) for end in ends if len(end.scored_layers) > 1]
        self._rank(dense)
        ends = self._cheapest([*ends, *dense], _RANKED_ALIKE)
        self._next_stage("budgets")
        found = self._sized(ends, budgets, max_loss)
        self._next_stage("the best of all")
        self._score_near(self._cheapest(found, _RANKED_ALIKE), max_loss)
        if all(point.scores.loss > max_loss for point in self._points.values()):
            found = self._sized(ends, budgets, math.inf)
            self._score(self._cheapest(found, _RANKED_ALIKE))
        return list(self._points.values())

    def dense_bytes(self) -> int:
        """Bytes of keys and values that a dense step reads."""
        return self._bytes(Candidate(token_budget=1), 0.0)

    def _next_stage(self, title: str) -> None:
        stage = self._stage
        self._stage = Stage(number=stage.number + 1, count=stage.count, title=title)

    def _chain(self, start: Candidate, sizes: Sequence[int]) -> list[Candidate]:
        """Plans of ever fewer layers that choose, from `start` on, and their dense variants."""
        chain = []
        candidate = start
        for size in sizes:
            self._next_stage(f"{size} layers choose" if size > 1 else "1 layer chooses")
            while len(candidate.scored_layers) > size:
                candidate = self._without_cheapest(candidate, size)
            variants = [candidate]
            if size <= _MOST_SELECT_LAYERS:
                layers = canonical(candidate.scored_layers)
                dense = replace(candidate, select_layers=layers, scored_layers=())
                if "s" in dense.letters(self._model.windows):
                    variants.append(dense)
            self._rank(variants)
            chain += variants
        return chain

    def _without_cheapest(self, candidate: Candidate, size: int) -> Candidate:
        """Without the layers whose choice is missed least, down to `size` layers if possible.

        The first layer stays, for those in front of it are dense; so does one whose set would have
        been taken over by another that goes, until the next ranking has seen it.
        """
        layers = candidate.scored_layers
        shorter = {layer: _without(candidate, layer) for layer in layers[1:]}
        self._rank(list(shorter.values()))
        taken: set[int] = set()
        for layer in sorted(shorter, key=lambda layer: self._quick_loss(shorter[layer])):
            place = layers.index(layer)
            neighbours = {*layers[place - 1 : place], *layers[place + 1 : place + 2]}
            if len(layers) - len(taken) > size and not neighbours & taken:
                taken.add(layer)
        kept = tuple(layer for layer in layers if layer not in taken)
        return replace(candidate, scored_layers=kept)

    def _settled(self, ends: Sequence[Candidate]) -> list[Candidate]:
        """Each with the settings besides layers and budget that lose least, one after the other.

        They differ from plan to plan: a set that many layers read serves as a whole best, and one
        that its own layer alone reads may be another for every KV head.
        """
        ends = list(ends)
        for name, values in _SETTINGS.items():
            tried = [[replace(end, **{name: value}) for value in values] for end in ends]
            self._rank([candidate for own in tried for candidate in own])
            ends = [min(own, key=self._quick_loss) for own in tried]
        return ends

    def _sized(
        self, ends: Sequence[Candidate], budgets: Sequence[int], max_loss: float
    ) -> list[Candidate]:
        """Each at the budgets around those where its loss passes the one that is allowed.

        Budgets are fixed or adaptive: a share of the attention, in as many positions as it takes.
        """
        hopeful = [end for end in ends if self._quick_loss(end) <= _HOPELESS * max_loss]
        ladders = []
        for end in hopeful or ends:
            ladders.append([replace(end, token_budget=budget) for budget in budgets])
            most = replace(end, token_budget=budgets[-1])
            ladders.append([replace(most, top_p_mass=mass) for mass in MASSES])
        if not math.isfinite(max_loss):
            found = [candidate for ladder in ladders for candidate in ladder]
            self._rank(found)
            return found
        found, at = [], {index: (len(own) - 1) // 2 for index, own in enumerate(ladders)}
        ways: dict[int, int] = {}
        while at:
            rungs = {index: ladders[index][place] for index, place in at.items()}
            self._rank(list(rungs.values()))
            found += rungs.values()
            following = {}
            for index, candidate in rungs.items():
                loss = self._quick_loss(candidate)
                way = ways.setdefault(index, 1 if loss > max_loss else -1)
                is_past = loss <= max_loss / _SAFE if way > 0 else loss > max_loss * _SAFE
                if not is_past and 0 <= at[index] + way < len(ladders[index]):
                    following[index] = at[index] + way
            at = following
        return found

    def _cheapest(self, candidates: Sequence[Candidate], factor: float) -> list[Candidate]:
        """By ascending bytes, those ranked to lose less than `factor` times all that read less."""
        ordered = sorted(candidates, key=lambda c: (self._cost(c), self._quick_loss(c)))
        kept: list[Candidate] = []
        least = float("inf")
        for candidate in ordered:
            if self._quick_loss(candidate) < factor * least:
                kept.append(candidate)
            least = min(least, self._quick_loss(candidate))
        return kept

    def _score_near(self, ascending: Sequence[Candidate], max_loss: float) -> None:
        """Measures the plans near a loss, or all if that does not show the cheapest within it."""
        near = [c for c in ascending if max_loss / _NEAR <= self._quick_loss(c) <= _NEAR * max_loss]
        self._score(near)
        within = [self._points[candidate].scores.loss <= max_loss for candidate in near]
        if not any(within) or within[0]:
            self._score(ascending)

    def _cost(self, candidate: Candidate) -> int:
        """Bytes of a step; of an adaptive budget with sets as large as they were in ranking."""
        return self._bytes(candidate, self._quick[candidate].set_size)

    def _bytes(self, candidate: Candidate, set_size: float) -> int:
        config = candidate.config()
        if candidate.top_p_mass is not None:
            config = replace(config, token_budget=max(1, round(set_size)))
        return kv_bytes_per_step(self._model, config, self._seq_len, self._kv_dtype)

    def _quick_loss(self, candidate: Candidate) -> float:
        return self._quick[candidate].loss

    def _rank(self, candidates: Sequence[Candidate]) -> None:
        new = [c for c in dict.fromkeys(candidates) if c not in self._quick]
        if new:
            found = self._measure(new, True, self._stage)
            self._quick |= dict(zip(new, found, strict=True))

    def _score(self, candidates: Sequence[Candidate]) -> None:
        new = [c for c in dict.fromkeys(candidates) if c not in self._points]
        if new:
            found = self._measure(new, False, self._stage)
            for candidate, scores in zip(new, found, strict=True):
                self._points[candidate] = Point(
                    candidate=candidate,
                    bytes_per_step=self._bytes(candidate, scores.set_size),
                    scores=scores,
                )


def canonical(select_layers: Sequence[int]) -> tuple[int, ...]:
    """The fewest select layers with the same steps.

    A first set that the next layer replaces is read by nobody: its layer is as good as dense, so
    (1, 2, 17) is (2, 17).
    """
    layers = sorted(set(select_layers))
    while len(layers) > 1 and layers[0] + 1 == layers[1]:
        del layers[0]
    return tuple(layers)


def _without(candidate: Candidate, layer: int) -> Candidate:
    return replace(
        candidate, scored_layers=tuple(own for own in candidate.scored_layers if own != layer)
    )


def _chain_sizes(num_layers: int) -> list[int]:
    """How many layers choose after each round: all at first, in the end one."""
    sizes = [num_layers]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] - max(1, round(_TAKEN_SHARE * sizes[-1])))
    return sizes


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both bytes and loss, by ascending bytes."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes_per_step, p.scores.loss)):
        if not kept or point.scores.loss < kept[-1].scores.loss:
            kept.append(point)
    return kept


def choose(points: Sequence[Point], max_loss: float) -> Point:
    """The cheapest point of the frontier within `max_loss`, or the one that loses least.

    Of those that read hardly more than the cheapest, the one that loses least.
    """
    ascending = frontier(points)
    within = [point for point in ascending if point.scores.loss <= max_loss]
    if not within:
        return ascending[-1]
    most = _BYTES_ALIKE * within[0].bytes_per_step
    return [point for point in within if point.bytes_per_step <= most][-1]
