"""What the chosen sets hold of the dense attention, layer by layer, and how alike layers choose.

Called by command.py. Looks at decode steps of the dense model (reference.py), so it needs no plan
to have been run: of every layer the attention weights over all tokens, and the set that the layer
would choose. A share of mass says how good a set is at one place; it does not say whether an answer
is found, which is what the tasks are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tidaldecode import _core
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.config import PLAN_SETTINGS
from tidaldecode.engine_config import core_plan
from tidaldecode.evaluation.example import Example
from tidaldecode.evaluation.reference import ReferenceModel
from tidaldecode.evaluation.settings import Setting
from tidaldecode.plans import plan_letters

_STEPS = 4  # of the dense answer: where what was asked for is looked up


@dataclass(frozen=True, kw_only=True)
class LayerMass:
    """One setting: the share of each layer's dense attention that lies on the set it would use."""

    setting: str
    plan: str
    mass: tuple[float | None, ...]  # by layer, mean over heads, steps and prompts; None: dense


@dataclass(frozen=True, kw_only=True)
class AttentionReport:
    """What command.py puts into the report and plots.py draws."""

    context: int
    num_prompts: int
    token_budget: int  # of the overlap
    masses: tuple[LayerMass, ...]
    # [layer][other]: share of a layer's best token_budget positions that are the other's too, per
    # KV head, mean.
    overlap: tuple[tuple[float, ...], ...]


def measure_attention(
    folder: ModelFolder,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    on_done: Callable[[int, int], None],
) -> AttentionReport:
    """Looks at the dense attention of the first steps behind each prompt.

    Raises: UnsupportedError for a model that the numpy reference does not do.
    """
    model = ReferenceModel(folder)
    known = {setting.name: _plan_of(setting, folder) for setting in settings}
    plans = {name: plan for name, plan in known.items() if plan is not None}
    budget = min((plan["token_budget"] for plan in plans.values()), default=64)
    masses: dict[str, list[np.ndarray]] = {name: [] for name in plans}
    overlaps = []
    on_done(0, len(examples))
    for count, example in enumerate(examples, start=1):
        for weights in _dense_steps(model, example.prompt_ids):
            for name, plan in plans.items():
                masses[name].append(_masses(weights, plan, folder.model.num_kv_heads))
            overlaps.append(_overlap(weights, budget, folder.model.num_kv_heads))
        on_done(count, len(examples))
    return AttentionReport(
        context=max(len(example.prompt_ids) for example in examples),
        num_prompts=len(examples),
        token_budget=budget,
        masses=tuple(
            LayerMass(
                setting=name, plan=plans[name]["letters"], mass=_rounded(np.mean(rows, axis=0))
            )
            for name, rows in masses.items()
        ),
        overlap=tuple(tuple(row) for row in np.mean(overlaps, axis=0).round(4).tolist()),
    )


def _plan_of(setting: Setting, folder: ModelFolder) -> dict[str, Any] | None:
    """All settings of a plan and its letters; None for dense."""
    plan = setting.plan(folder)
    if plan is None:
        return None
    core = core_plan(plan)
    values = {name: getattr(core, name) for name in PLAN_SETTINGS}
    if values["token_budget"] == _core.AUTOMATIC:
        values["token_budget"] = _core.AUTOMATIC_BUDGET
        if values["top_p_mass"] == 1:
            values["top_p_mass"] = _core.AUTOMATIC_MASS
    values["min_token_budget"] = min(
        values["min_token_budget"] or _core.AUTOMATIC_MIN_BUDGET, values["token_budget"]
    )
    if values["recent_tokens"] == _core.AUTOMATIC:
        is_adaptive = values["top_p_mass"] < 1
        least = values["min_token_budget"] if is_adaptive else values["token_budget"]
        values["recent_tokens"] = max(1, min(least // 4, least - values["sink_tokens"]))
    return values | {"letters": plan_letters(folder.model.windows, core)}


def _dense_steps(model: ReferenceModel, prompt_ids: Sequence[int]) -> list[np.ndarray]:
    """Attention weights of each step: [num_layers, num_q_heads, n] each."""
    cache, logits = model.read(prompt_ids, _STEPS)
    steps = []
    for _ in range(_STEPS):
        weights: list[np.ndarray] = []

        def attend(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
            weights.append(model.weights_of(q, k))  # noqa: B023, called in this round only
            grouped = weights[-1].reshape(model.config.num_kv_heads, model.config.group_size, -1)  # noqa: B023
            return np.einsum("gqn,ngd->gqd", grouped, v).reshape(q.shape)

        logits = model.step(int(np.argmax(logits)), cache, attend)
        steps.append(np.stack(weights))
    return steps


def _masses(weights: np.ndarray, plan: dict[str, Any], num_kv_heads: int) -> np.ndarray:
    """Share of each layer's attention on the set that it attends to; NaN where dense."""
    result = np.full(len(weights), np.nan)
    chosen = None
    for layer, letter in enumerate(plan["letters"]):
        if letter in "SP":
            chosen = chosen_positions(weights[layer], num_kv_heads, plan)
        if letter in "Ps":
            result[layer] = (weights[layer] * chosen).sum(axis=-1).mean()
    return result


def chosen_positions(weights: np.ndarray, num_kv_heads: int, plan: dict[str, Any]) -> np.ndarray:
    """The set of each query head, as docs/algorithm.md has it: [num_q_heads, n] bool.

    Args:
        weights: [num_q_heads, n], dense attention of a layer that chooses.
        num_kv_heads: of the model.
        plan: its settings; those that do not make a set are not looked at.
    """
    num_q_heads, n = weights.shape
    num_sets = {"head": num_q_heads, "kv_head": num_kv_heads, "layer": 1}[plan["granularity"]]
    grouped = weights.reshape(num_sets, -1, n)
    ranked = grouped.max(axis=1) if plan["pooling"] == "max" else grouped.sum(axis=1)
    ranked[:, : plan["sink_tokens"]] = np.inf
    ranked[:, n - plan["recent_tokens"] :] = np.inf
    best = np.argsort(-ranked, axis=1, kind="stable")
    sizes = np.full(num_sets, plan["token_budget"])
    if plan["top_p_mass"] < 1:
        mass = np.take_along_axis(grouped.sum(axis=1), best, axis=1).cumsum(axis=1)
        reached = 1 + (mass < plan["top_p_mass"] * grouped.shape[1]).sum(axis=1)
        sizes = np.clip(reached, plan["min_token_budget"], plan["token_budget"])
    chosen = np.zeros(ranked.shape, bool)
    np.put_along_axis(chosen, best, np.arange(n) < sizes[:, None], axis=1)
    return np.repeat(chosen, num_q_heads // num_sets, axis=0)


def _overlap(weights: np.ndarray, budget: int, num_kv_heads: int) -> np.ndarray:
    """Share of common positions of the layers' own sets: [num_layers, num_layers]."""
    num_layers, _, n = weights.shape
    ranked = weights.reshape(num_layers, num_kv_heads, -1, n).sum(axis=2)
    best = np.argsort(-ranked, axis=-1, kind="stable")[..., :budget]
    chosen = np.zeros(ranked.shape, np.float32)
    np.put_along_axis(chosen, best, 1.0, axis=-1)
    return np.einsum("ahn,bhn->ab", chosen, chosen) / (num_kv_heads * min(budget, n))


def _rounded(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else round(float(value), 4) for value in values)
