"""What a plan is compared with, by name: all at one token budget, and all at the same KV bytes.

Called by command.py for --compare presets; docs/architecture.md says what each preset is. At equal
bytes a preset's budget is searched for at every context, so that a step reads what the yardstick
reads: this model's plan, or all-P where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from tidaldecode import _core
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.config import PlanConfig, is_auto
from tidaldecode.errors import InvalidArgument, UnsupportedError, show
from tidaldecode.evaluation.quest import page_bytes_per_step
from tidaldecode.evaluation.reference import missing_in_numpy
from tidaldecode.evaluation.settings import Setting
from tidaldecode.plan_bytes import kv_bytes_per_step, most_positions
from tidaldecode.plans import (
    FULL_LAYERS,
    HOW_TO_CHOOSE,
    Plan,
    find_plan,
    layers_free_to_choose,
    safe_config,
)
from tidaldecode.published_plans import find_published

PRESETS = "presets"
DEFAULT_BUDGET = 256  # of a model without a plan
LEAST_BUDGET = 16  # a page
# Page-wise selection runs in numpy, where longer prompts and larger models take hours.
QUEST_CONTEXT = 4096
QUEST_PARAMETERS = 10**9
_PAGE_SIZE = 16
_SINKS = 4  # as in StreamingLLM and LessIsMore
_CLOSE = 0.01  # bytes are equal within it

# Where bytes count: the context of prompts (None: own prompts), and how long sequences are there.
Lengths = Mapping[int | None, int]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The presets as settings."""

    token_budget: int  # of those at equal K
    yardstick: str  # the preset whose bytes the others have at equal bytes
    settings: Sequence[Setting]
    notes: Sequence[str]  # what a user should know of them

    def as_json(self) -> dict[str, Any]:
        """What report.json says of the presets."""
        return {
            "token_budget": self.token_budget,
            "yardstick": self.yardstick,
            "settings": [
                {"setting": entry.name, "contexts": list(entry.contexts), "options": entry.options}
                for entry in self.settings
            ],
        }


@dataclass(frozen=True, kw_only=True)
class _Preset:
    """A policy: its options at every budget."""

    name: str
    options: Callable[[int], dict[str, Any]]
    base: PlanConfig = field(default_factory=PlanConfig)  # what options do not say
    is_quest: bool = False

    @property
    def step(self) -> int:
        """Budgets are multiples of it."""
        return _PAGE_SIZE if self.is_quest else 1

    def setting(self, kind: str, budget: int, contexts: tuple[int | None, ...]) -> Setting:
        options = self.options(budget)
        if not self.is_quest:
            options = {"attention": "tidal", "sparse_min_context": 0, **options}
        return Setting(
            name=f"{self.name} {kind}", options=options, is_quest=self.is_quest, contexts=contexts
        )


def is_preset(setting_name: str) -> bool:
    """Whether a setting of this name was made here."""
    return setting_name.partition(" ")[2].startswith(("K=", "bytes="))


def make_presets(
    folder: ModelFolder, lengths: Lengths, token_budget: int | None, kv_dtype: str
) -> Comparison:
    """The presets at equal K and at equal bytes.

    Args:
        folder: the model.
        lengths: where they run.
        token_budget: K; None is the plan's, or DEFAULT_BUDGET.
        kv_dtype: of the cache.

    Raises:
        InvalidArgument: a budget below LEAST_BUDGET.
        UnsupportedError: a model without room for a dense, a choosing and a sparse layer.
    """
    if not layers_free_to_choose(folder.model.windows):
        raise UnsupportedError(
            f"compare: got a model of {folder.model.num_layers} layers, expected one with a layer "
            f"behind the first {FULL_LAYERS} that attends to everything and can choose"
        )
    own = find_plan(folder)
    if token_budget is None:
        token_budget = DEFAULT_BUDGET if own is None else most_positions(own.config)
    if token_budget < LEAST_BUDGET:
        raise InvalidArgument(
            f"token_budget: got {show(token_budget)}, expected at least {LEAST_BUDGET}"
        )
    presets = _presets(folder, own)
    notes = [] if own else [f"no preset `plan`: there is no plan for this model; {HOW_TO_CHOOSE}"]
    if own and (is_auto(own.config.token_budget) or (own.config.top_p_mass or 1) < 1):
        notes.append(
            f"the plan's budget is adaptive: K={token_budget} and equal bytes are those of its "
            "largest sets; what its sets read stands in the report"
        )
    why_not = _why_no_quest(folder)
    open_lengths = lengths if why_not is None else {}
    quest_at = tuple(place for place, n in open_lengths.items() if n <= QUEST_CONTEXT)
    if len(quest_at) < len(lengths):
        notes.append(
            why_not or f"quest runs in numpy, so only at contexts up to {QUEST_CONTEXT:,} tokens"
        )
    places = {preset.name: quest_at if preset.is_quest else tuple(lengths) for preset in presets}
    presets = [preset for preset in presets if places[preset.name]]
    kind = f"K={token_budget}"
    settings = [
        preset.setting(kind, token_budget, places[preset.name] if preset.is_quest else ())
        for preset in presets
    ]
    scale = _Scale(folder=folder, kv_dtype=kv_dtype, yardstick=presets[0])
    for preset in presets:
        for place in places[preset.name]:
            budget = scale.budget(preset, lengths[place], token_budget)
            settings.append(preset.setting(f"bytes={presets[0].name}", budget, (place,)))
            notes += scale.notes(preset, lengths[place], token_budget, budget)
    return Comparison(
        token_budget=token_budget, yardstick=presets[0].name, settings=settings, notes=notes
    )


def _presets(folder: ModelFolder, own: Plan | None) -> list[_Preset]:
    """The presets of a model, the yardstick first."""
    chosen = _select_layers(folder, own)
    safe = safe_config(folder.model.windows)
    scored = {"scored_layers": safe.scored_layers, "shadow": safe.shadow}
    select = {"select_layers": chosen}
    first = layers_free_to_choose(folder.model.windows)[:1]
    presets = [
        _Preset(name="all-P", options=lambda k: scored | _sets("layer", k, 1, k // 4)),
        # The sets of query heads are ranked by q.k as it is (docs/algorithm.md).
        _Preset(name="paper", options=lambda k: select | _sets("head", k, 0, 1)),
        _Preset(name="lessismore", options=lambda k: select | _sets("layer", k, _SINKS, k // 4)),
        _Preset(
            name="quest",
            options=lambda k: {"token_budget": k, "page_size": _PAGE_SIZE},
            is_quest=True,
        ),
        # All positions are forced, so what the select layer would choose is not asked.
        _Preset(
            name="streaming",
            options=lambda k: {"select_layers": first} | _sets("layer", k, _SINKS, k - _SINKS),
        ),
    ]
    if own is not None:
        config = own.config
        plan = _Preset(name="plan", options=lambda k: _with_budget(config, k), base=config)
        presets.insert(0, plan)
    return presets


def _sets(granularity: str, budget: int, sinks: int, recents: int) -> dict[str, Any]:
    """Everything that makes a set: nothing is left for the model's own plan to say."""
    return {
        "token_budget": budget,
        "top_p_mass": 1.0,
        "min_token_budget": 1,
        "granularity": granularity,
        "pooling": "sum",
        "sink_tokens": sinks,
        "recent_tokens": max(1, recents),
        "correction_interval": 0,
    }


def _with_budget(config: PlanConfig, budget: int) -> dict[str, Any]:
    """A plan's options at another budget: recents keep their share, everything else stays."""
    own = most_positions(config)
    if budget == own:
        return {}
    options: dict[str, Any] = {"token_budget": budget}
    if is_auto(config.token_budget) and config.top_p_mass is None:
        options["top_p_mass"] = _core.AUTOMATIC_MASS
    if config.min_token_budget is not None:
        options["min_token_budget"] = min(config.min_token_budget, budget)
    sinks = _core.PlanConfig().sink_tokens if config.sink_tokens is None else config.sink_tokens
    options["sink_tokens"] = sinks = min(sinks, budget - 1)
    if isinstance(config.recent_tokens, int):
        share = round(config.recent_tokens * budget / own)
        options["recent_tokens"] = max(1, min(share, budget - sinks))
    return options


def _select_layers(folder: ModelFolder, own: Plan | None) -> tuple[int, ...]:
    """Those of the model's plan, else those published for it, else the first and a middle one."""
    if own is not None and own.config.select_layers:
        return own.config.select_layers
    published = find_published(folder)
    if published is not None and published[0].select_layers:
        return published[0].select_layers
    layers = layers_free_to_choose(folder.model.windows)
    middle = folder.model.num_layers // 2
    return tuple(sorted({layers[0], next((n for n in layers if n >= middle), layers[-1])}))


def _why_no_quest(folder: ModelFolder) -> str | None:
    """Why page-wise selection cannot run with this model; None if it can."""
    missing = missing_in_numpy(folder)
    if missing is not None:
        return f"no preset `quest`: it runs in numpy, which has no {missing}"
    parameters = sum(prod(entry.shape) for entry in folder.weights)
    if parameters > QUEST_PARAMETERS:
        return (
            f"no preset `quest`: it runs in numpy, for models up to {QUEST_PARAMETERS / 1e9:g}e9 "
            f"parameters, and this one has {parameters / 1e9:.1f}e9"
        )
    return None


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Weighs budgets by the bytes that a step reads."""

    folder: ModelFolder
    kv_dtype: str
    yardstick: _Preset

    def bytes(self, preset: _Preset, seq_len: int, budget: int) -> int:
        """KV bytes of a step at a sequence length."""
        options, model = preset.options(budget), self.folder.model
        if preset.is_quest:
            return page_bytes_per_step(model, options, seq_len, self.kv_dtype)
        config = replace(preset.base, **options)
        return kv_bytes_per_step(model, config, seq_len, self.kv_dtype)

    def budget(self, preset: _Preset, seq_len: int, asked: int) -> int:
        """The budget whose bytes are nearest to those of the yardstick at the budget `asked`."""
        if preset is self.yardstick:
            return asked
        target = self.bytes(self.yardstick, seq_len, asked)
        # Bytes grow with the budget as long as that does not cover the sequence.
        low, high = LEAST_BUDGET // preset.step, max(LEAST_BUDGET, seq_len - 1) // preset.step
        while low < high:
            middle = (low + high) // 2
            if self.bytes(preset, seq_len, middle * preset.step) < target:
                low = middle + 1
            else:
                high = middle
        near = [low, max(LEAST_BUDGET // preset.step, low - 1)]
        return min(
            (count * preset.step for count in near),
            key=lambda budget: abs(self.bytes(preset, seq_len, budget) - target),
        )

    def notes(self, preset: _Preset, seq_len: int, asked: int, budget: int) -> Iterator[str]:
        """A line where the bytes of a budget that was found are not equal."""
        got = self.bytes(preset, seq_len, budget)
        target = self.bytes(self.yardstick, seq_len, asked)
        if abs(got - target) > _CLOSE * target:
            yield (
                f"{preset.name} at {seq_len:,} tokens: {got / 1e6:.3g} MB a step with a budget of "
                f"{budget:,} is the nearest to {target / 1e6:.3g} MB of {self.yardstick.name}"
            )
