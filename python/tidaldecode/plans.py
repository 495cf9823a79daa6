"""Which layers choose positions: a plan stored for the model, published for it, given, or safe.

Called by decoder.py. TidalDecode (arXiv 2410.05076, section 3) stands and falls with this choice,
so no layer is guessed: a model without a plan is decoded densely, or, where sparse decoding is
asked for, with every layer choosing for itself; one line says so. The plan itself, one letter per
layer, is built and validated by the engine (cpp/include/tidal/plan.h).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from tidaldecode import _core
from tidaldecode.checkpoint.fingerprint import model_fingerprint
from tidaldecode.checkpoint.json_file import read_json_object
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.config import (
    LAYER_FIELDS,
    PLAN_FIELDS,
    PLAN_SETTINGS,
    DecodeConfig,
    PlanConfig,
    check_layer_list,
    check_setting,
)
from tidaldecode.errors import ConfigError, TidalError, show
from tidaldecode.published_plans import find_published
from tidaldecode.user_cache import (
    cached_evaluation_file,
    cached_plan_file,
    is_kept,
    user_cache_dir,
    write_whole,
)

PLAN_FILE = "tidal_plan.json"
HOW_TO_CHOOSE = (
    f"run `tidaldecode calibrate MODEL_DIR`, which measures plans and keeps the best as {PLAN_FILE}"
)
# What a calibration adds to a plan: which model it was measured on, on which data, and how it did.
CALIBRATION_KEYS = (
    "version", "fingerprint", "data", "context", "chat", "max_loss", "scores", "held_out",
)  # fmt: skip

SAFE = "safe: every layer chooses for itself"
# Layers in front that are dense wherever nothing else is said: attention is spread out in them.
FULL_LAYERS = _core.PlanConfig().full_layers

_LARGEST_LOSS = 1e15  # in nats; a plan file may say more

_logger = logging.getLogger("tidaldecode")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Layers that select with the settings chosen together with them, and what is known of them."""

    config: PlanConfig  # has choosing_layers; of the others None is the engine's default
    source: str  # where it comes from, for people
    measured: str = ""  # how it did on this model, for people; empty: not known
    is_published: bool = False
    is_safe: bool = False  # nobody chose its layers

    @property
    def description(self) -> str:
        """Where it comes from; of a published plan also whether it has been measured here."""
        if not self.is_published:
            return self.source
        return f"{self.source}, {self.measured or 'not measured here'}"


def read_plan_file(path: Path, windows: Sequence[int]) -> Plan:
    """Reads a tidal_plan.json: the layers and, each optional, the other fields of PlanConfig.

    A field that is missing has the engine's default, as if the layers were given by hand.

    Args:
        path: the file.
        windows: of the model's layers, as in ModelConfig.

    Raises: ConfigError naming the file and the field.
    """
    return _parse_plan(read_json_object(path), path, windows)


def _parse_plan(raw: Mapping[str, Any], path: Path, windows: Sequence[int]) -> Plan:
    where = str(path)
    allowed = ("description", *PLAN_FIELDS, *CALIBRATION_KEYS)
    unknown = [key for key in raw if key not in allowed]
    if unknown:
        raise ConfigError(
            f"{where}: got the key {show(unknown[0])}, expected only {', '.join(allowed)}"
        )
    given = {name: raw[name] for name in PLAN_SETTINGS if name in raw}
    for name, value in given.items():
        check_setting(name, value, where)
    # A file without layers is refused for its select_layers, which most have.
    names = [name for name in LAYER_FIELDS if name in raw] or LAYER_FIELDS[:1]
    layers: dict[str, Any] = {n: check_layer_list(n, raw.get(n), where) for n in names}
    try:
        config = PlanConfig(**layers, **given)
    except ConfigError as cause:  # a layer in both lists
        raise ConfigError(f"{where}: {cause}") from None
    check_layers(config, windows, where)
    source, measured = PLAN_FILE, ""
    if "fingerprint" in raw:
        source, measured = f"{PLAN_FILE}, calibrated", _describe_calibration(raw)
    return Plan(config=config, source=source, measured=measured)


def _describe_calibration(raw: Mapping[str, Any]) -> str:
    """How a calibrated plan did, as its file has it; what a file does not say is left out."""
    parts = []
    held_out, contexts = raw.get("held_out"), raw.get("context")
    if not isinstance(held_out, dict):
        held_out = {}
    same, counted = held_out.get("same"), held_out.get("counted")
    if _is_count(same) and _is_count(counted):
        parts.append(f"{same} of {counted} held-out answers as dense")
        if counted == 0:
            parts = ["judged on text alone (the model answers too few questions)"]
    lengths = contexts if isinstance(contexts, list) else [contexts]
    if lengths and all(map(_is_count, lengths)):
        parts.append("at " + " and ".join(f"{length:,}" for length in lengths) + " tokens")
    scores = raw.get("scores")
    loss = scores.get("loss") if isinstance(scores, dict) else None
    text = " ".join(parts)
    if _is_loss(loss):
        text += f", loss {loss:.3g} nats"
        limit = raw.get("max_loss")
        if _is_loss(limit) and loss > limit:
            text += f" (more than the {limit:g} asked for)"
    return "calibrated: " + text.removeprefix(", ") if text else "calibrated"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_loss(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number that a float can be, which JSON's integers need not."""
    return type(value) in (int, float) and abs(value) <= _LARGEST_LOSS


def find_plan(folder: ModelFolder) -> Plan | None:
    """The plan stored beside the model or in the user's cache, else the one published for it.

    A plan that was calibrated on other weights is passed over, with a warning.
    """
    stored = _stored_plan(folder)
    if stored is not None:
        return stored
    published = find_published(folder)
    if published is None:
        return None
    config, title = published
    return Plan(
        config=config,
        source=f"published for {title}",
        measured=_describe_evaluation(folder, config),
        is_published=True,
    )


def _describe_evaluation(folder: ModelFolder, config: PlanConfig) -> str:
    """How the plan did when `tidaldecode eval` last ran it on this model; empty if it has not."""
    if folder.load_format == "dummy" or not is_kept(user_cache_dir() / "evaluated"):
        return ""
    try:
        raw = read_json_object(cached_evaluation_file(model_fingerprint(folder)))
    except TidalError:  # none, or none that can be read
        return ""
    is_same = raw.get("plan") == plan_values(config)
    text = raw.get("measured")
    return f"evaluated here: {text}" if is_same and isinstance(text, str) else ""


def remember_evaluation(folder: ModelFolder, config: PlanConfig, measured: str) -> None:
    """Notes in the user's cache how a plan did on this model, if the cache can be written."""
    path = cached_evaluation_file(model_fingerprint(folder))
    content = json.dumps({"plan": plan_values(config), "measured": measured})
    try:
        write_whole(path, content + "\n")
    except OSError:
        _logger.debug("%s cannot be written", path)


def plan_values(config: PlanConfig) -> dict[str, Any]:
    """The settings that are given, as JSON has them."""
    layers = {name: getattr(config, name) for name in LAYER_FIELDS}
    given = {name: list(value) for name, value in layers.items() if value is not None}
    return {**given, **config.settings()}


def _stored_plan(folder: ModelFolder) -> Plan | None:
    path = folder.path / PLAN_FILE
    if os.path.lexists(path):
        raw = read_json_object(path)
        plan = _parse_plan(raw, path, folder.model.windows)
        # Random weights are nobody's: a plan by hand or by calibration gives their step its shape.
        if "fingerprint" not in raw or folder.load_format == "dummy":
            return plan
        found = model_fingerprint(folder)
        if raw["fingerprint"] == found:
            return plan
        _logger.warning(
            "%s: calibrated for the model %s, but this one is %s, so it is not used; calibrate "
            "again, or delete its fingerprint to keep it",
            path,
            show(raw["fingerprint"]),
            found,
        )
    if folder.load_format == "dummy" or not is_kept(cached_plan_file("").parent):
        return None
    path = cached_plan_file(model_fingerprint(folder))
    if not is_kept(path):
        return None
    try:
        plan = read_plan_file(path, folder.model.windows)
    except ConfigError as error:
        _logger.warning("%s; the plan in the user's cache is not used: calibrate again", error)
        return None
    return replace(plan, source=f"{plan.source}, in the user's cache")


def layers_free_to_choose(windows: Sequence[int]) -> tuple[int, ...]:
    """The layers that attend to everything, behind those that are dense by default.

    Args:
        windows: of the model's layers, as in ModelConfig.
    """
    return tuple(n for n, window in enumerate(windows) if not window and n >= FULL_LAYERS)


def safe_config(windows: Sequence[int]) -> PlanConfig:
    """A plan for any model: every layer but the first two chooses for itself, by shadow keys.

    docs/quality.md has what it keeps of the answers of three models.

    Args:
        windows: of the model's layers, as in ModelConfig. Layers with one choose nothing.

    Raises: ConfigError for a model without such a layer.
    """
    layers = layers_free_to_choose(windows)
    if not layers:
        those = "" if not any(windows) else " that attends to more than a window"
        raise ConfigError(
            f"attention: sparse steps were asked for, but a model of {len(windows)} layers has "
            f"none{those} to choose by itself behind {FULL_LAYERS} dense ones; give select_layers "
            "or scored_layers, or decode it densely (attention='full')"
        )
    return PlanConfig(scored_layers=layers, shadow="int4")


def choose_plan(asked: PlanConfig, attention: str, folder: ModelFolder) -> Plan | None:
    """The plan that a decoder or a replay runs with; None is dense decoding.

    Explicit settings win over the plan's, the plan's over the engine's defaults (which are filled
    in by engine_config.py). A model without a plan gets the safe one where sparse decoding is asked
    for: by attention="tidal" or a token_budget.

    Args:
        asked: explicit settings; a DecodeConfig is one.
        attention: as in DecodeConfig.
        folder: the model.

    Raises: ConfigError if the layers do not fit.
    """
    if attention == "full":
        return None
    plan = find_plan(folder)
    if asked.choosing_layers:
        own = plan.config if plan else PlanConfig()
        # A plan's own full_layers, and a shadow, belong to its own layers; what is given decides.
        layers = {name: getattr(asked, name) for name in LAYER_FIELDS}
        names = " and ".join(name for name, value in layers.items() if value is not None)
        config = replace(own, **layers, full_layers=None, shadow=None)
        plan = Plan(config=config, source=f"{names} as given")
    if plan is None:
        if attention != "tidal" and asked.token_budget is None:
            return None
        config = safe_config(folder.model.windows)
        plan = Plan(config=config, source=SAFE, is_safe=True)
    config = replace(plan.config, **asked.settings())
    check_layers(config, folder.model.windows)
    if config != plan.config:
        plan = replace(plan, config=config, measured="")  # which was of other settings
    return plan


def _no_plan(folder: ModelFolder) -> str:
    return f"{folder.title}: there is no plan for this model"


def plan_notes(settings: DecodeConfig, plan: Plan | None, folder: ModelFolder) -> list[str]:
    """What a user should know at every start: how good the plan is, or why there is none."""
    notes = []
    if plan is None and settings.attention != "full":
        notes.append(
            f"{_no_plan(folder)}, so it is decoded densely; to decode sparsely, {HOW_TO_CHOOSE}, "
            "or give a token_budget: every layer then chooses for itself"
        )
    if plan is None and settings.verify and settings.drafts in (None, "tidal"):
        reason = "attention='full'" if settings.attention == "full" else "there is no plan"
        notes.append(
            f"verify: every step is dense ({reason}), so nothing is drafted and nothing is "
            "checked; drafts='ngram' drafts from the text"
        )
    if plan is None or folder.load_format == "dummy":
        return notes
    letters = plan_letters(folder.model.windows, plan.config)
    if plan.is_safe:
        notes.append(
            f"{_no_plan(folder)}, so every layer chooses for itself ({letters}); to read less, "
            f"{HOW_TO_CHOOSE}"
        )
    if plan.is_published:
        advice = "" if plan.measured else f"; to measure plans, {HOW_TO_CHOOSE}"
        notes.append(f"plan {letters} {plan.description}{advice}")
    elif plan.measured:
        notes.append(f"plan {letters} {plan.measured}")
    return notes


def log_plan_notes(settings: DecodeConfig, plan: Plan | None, folder: ModelFolder) -> None:
    """Says plan_notes() through the package's log."""
    for note in plan_notes(settings, plan, folder):
        _logger.warning("%s", note)


def check_layers(config: PlanConfig, windows: Sequence[int], where: str = "") -> None:
    """Checks the layers of a plan, which selects, against the model's.

    Args:
        config: the plan.
        windows: of the model's layers, as in ModelConfig.
        where: its file, for messages.
    """
    prefix = f"{where}: " if where else ""
    for name in LAYER_FIELDS:
        layers = getattr(config, name)
        if layers and layers[-1] >= len(windows):
            raise ConfigError(
                f"{prefix}{name}: got {list(layers)}, expected layers up to {len(windows) - 1} "
                f"(the model has {len(windows)})"
            )
        bound = [layer for layer in layers or () if windows[layer]]
        if bound:
            free = [layer for layer, window in enumerate(windows) if not window]
            raise ConfigError(
                f"{prefix}{name}: got {list(layers)}, of which {bound} attend to a window "
                f"({windows[bound[0]]} tokens) and have nothing to choose, expected some of {free}"
            )
        if layers and config.full_layers is not None and config.full_layers > layers[0]:
            raise ConfigError(
                f"{prefix}full_layers: got {config.full_layers}, expected at most the first of "
                f"{name} {list(layers)}"
            )


def plan_letters(windows: Sequence[int], config: PlanConfig | _core.PlanConfig) -> str:
    """The plan as the engine prints it (DecodePlan::ToString), without needing an engine.

    Args:
        windows: of the model's layers, as in ModelConfig.
        config: the plan.
    """
    kinds = dict.fromkeys(config.select_layers or (), "S")
    kinds |= dict.fromkeys(config.scored_layers or (), "P")
    first = min(kinds, default=len(windows))
    letters = ["w" if window else "F" if i < first else "s" for i, window in enumerate(windows)]
    return "".join(kinds.get(i, letter) for i, letter in enumerate(letters))
