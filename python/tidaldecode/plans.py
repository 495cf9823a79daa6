"""Which layers select positions: a plan stored for the model, known for it, or given.

Called by decoder.py. TidalDecode (arXiv 2410.05076, section 3) stands and falls with this choice,
so nothing is guessed: a model without a plan is decoded densely and one line says what to do. The
plan itself, one letter per layer, is built and validated by the engine (cpp/include/tidal/plan.h).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tidaldecode.checkpoint.fingerprint import model_fingerprint
from tidaldecode.checkpoint.json_file import read_json_object
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.config import PLAN_SETTINGS, DecodeConfig, check_select_layers, check_setting
from tidaldecode.errors import ConfigError, show
from tidaldecode.user_cache import cached_plan_file, is_kept

PLAN_FILE = "tidal_plan.json"
HOW_TO_CHOOSE = (
    f"run `tidaldecode calibrate`, which measures plans and keeps the best as {PLAN_FILE}, or give "
    "select_layers=(2, N)"
)
# What a calibration adds to a plan: which model it was measured on, on which data, and how it did.
CALIBRATION_KEYS = ("version", "fingerprint", "data", "context", "scores")

_logger = logging.getLogger("tidaldecode")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Layers that select, and settings that were chosen together with them."""

    select_layers: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)  # by field name, see PLAN_SETTINGS
    source: str  # where it comes from, for people


@dataclass(frozen=True, kw_only=True)
class _KnownModel:
    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    vocab_size: int
    select_layers: tuple[int, ...]
    title: str
    name_parts: tuple[str, ...] = ()  # one of them must be in the name, if there are any


# Selection layers by model, from the paper's evaluation (Llama) and the LessIsMore release
# (others); all with layers 0 and 1 dense. Where shapes are shared, the more specific name comes
# first.
_KNOWN_MODELS = (
    _KnownModel(
        family="llama", num_layers=32, hidden_size=4096, intermediate_size=14336, num_q_heads=32,
        num_kv_heads=8, vocab_size=128256, select_layers=(2, 12),
        title="R1-Distill-Llama-8B", name_parts=("r1-distill", "deepseek"),
    ),
    _KnownModel(
        family="llama", num_layers=32, hidden_size=4096, intermediate_size=14336, num_q_heads=32,
        num_kv_heads=8, vocab_size=128256, select_layers=(2, 13), title="Llama-3-8B / 3.1-8B",
    ),
    _KnownModel(
        family="llama", num_layers=32, hidden_size=4096, intermediate_size=11008, num_q_heads=32,
        num_kv_heads=32, vocab_size=32000, select_layers=(2, 7),
        title="Llama-2-7B", name_parts=("llama-2", "llama2", "longchat", "vicuna"),
    ),
    _KnownModel(
        family="qwen3", num_layers=36, hidden_size=4096, intermediate_size=12288, num_q_heads=32,
        num_kv_heads=8, vocab_size=151936, select_layers=(2, 12), title="Qwen3-8B",
    ),
    _KnownModel(
        family="qwen3", num_layers=40, hidden_size=5120, intermediate_size=17408, num_q_heads=40,
        num_kv_heads=8, vocab_size=151936, select_layers=(2, 12), title="Qwen3-14B",
    ),
    _KnownModel(
        family="qwen3", num_layers=36, hidden_size=2560, intermediate_size=9728, num_q_heads=32,
        num_kv_heads=8, vocab_size=151936, select_layers=(2, 20), title="Qwen3-4B",
    ),
)  # fmt: skip
_SHAPE_FIELDS = (
    "num_layers", "hidden_size", "intermediate_size", "num_q_heads", "num_kv_heads", "vocab_size",
)  # fmt: skip


def read_plan_file(path: Path, num_layers: int) -> Plan:
    """Reads a tidal_plan.json: select_layers and, each optional, the fields of PLAN_SETTINGS.

    What a calibration has noted besides (CALIBRATION_KEYS) is not looked at.

    Raises: ConfigError naming the file and the field.
    """
    return _parse_plan(read_json_object(path), path, num_layers)


def _parse_plan(raw: Mapping[str, Any], path: Path, num_layers: int) -> Plan:
    where = str(path)
    allowed = ("description", "select_layers", *PLAN_SETTINGS, *CALIBRATION_KEYS)
    unknown = [key for key in raw if key not in allowed]
    if unknown:
        raise ConfigError(
            f"{where}: got the key {show(unknown[0])}, expected only {', '.join(allowed)}"
        )
    select_layers = check_select_layers(raw.get("select_layers"), where)
    settings = {name: raw[name] for name in PLAN_SETTINGS if name in raw}
    for name, value in settings.items():
        check_setting(name, value, where)
    source = f"{PLAN_FILE}, calibrated" if "fingerprint" in raw else PLAN_FILE
    plan = Plan(select_layers=select_layers, settings=settings, source=source)
    check_layers(plan.select_layers, settings.get("full_layers"), num_layers, where)
    return plan


def find_plan(folder: ModelFolder) -> Plan | None:
    """The plan stored beside the model or in the user's cache, else the one known for it, or None.

    A plan that was calibrated on other weights is passed over, with a warning.
    """
    stored = _stored_plan(folder)
    if stored is not None:
        return stored
    names = f"{folder.name} {folder.title}".lower()
    for known in _KNOWN_MODELS:
        same_shape = known.family == folder.family and all(
            getattr(known, name) == getattr(folder.model, name) for name in _SHAPE_FIELDS
        )
        if same_shape and (not known.name_parts or any(part in names for part in known.name_parts)):
            return Plan(
                select_layers=known.select_layers,
                settings={"full_layers": 2},
                source=f"known for {known.title}",
            )
    return None


def _stored_plan(folder: ModelFolder) -> Plan | None:
    path = folder.path / PLAN_FILE
    if os.path.lexists(path):
        raw = read_json_object(path)
        plan = _parse_plan(raw, path, folder.model.num_layers)
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
        plan = read_plan_file(path, folder.model.num_layers)
    except ConfigError as error:
        _logger.warning("%s; the plan in the user's cache is not used: calibrate again", error)
        return None
    return replace(plan, source=f"{plan.source}, in the user's cache")


def choose_plan(config: DecodeConfig, folder: ModelFolder) -> Plan | None:
    """The plan a decoder runs with; None is dense decoding.

    Explicit settings win over the plan's, the plan's over the engine's defaults (which are filled
    in by decoder.py).

    Raises: ConfigError if attention="tidal" and there is no plan, or the layers do not fit.
    """
    if config.attention == "full":
        return None
    plan = find_plan(folder)
    if config.select_layers is not None:
        settings = dict(plan.settings) if plan else {}
        # A plan's own full_layers belongs to its own layers; what is given decides.
        settings.pop("full_layers", None)
        plan = Plan(
            select_layers=config.select_layers, settings=settings, source="select_layers as given"
        )
    if plan is None:
        message = f"{folder.title}: there is no plan of select layers for this model"
        if config.attention == "tidal":
            raise ConfigError(f"attention: got 'tidal', but {message}; {HOW_TO_CHOOSE}")
        _logger.warning(
            "%s, so it is decoded densely; to decode sparsely, %s", message, HOW_TO_CHOOSE
        )
        return None
    explicit = {name: getattr(config, name) for name in PLAN_SETTINGS}
    settings = {**plan.settings, **{k: v for k, v in explicit.items() if v is not None}}
    check_layers(plan.select_layers, settings.get("full_layers"), folder.model.num_layers)
    return Plan(select_layers=plan.select_layers, settings=settings, source=plan.source)


def check_layers(
    select_layers: tuple[int, ...], full_layers: int | None, num_layers: int, where: str = ""
) -> None:
    """Checks the layers of a plan against the model's number of layers."""
    prefix = f"{where}: " if where else ""
    if select_layers[-1] >= num_layers:
        raise ConfigError(
            f"{prefix}select_layers: got {list(select_layers)}, expected layers up to "
            f"{num_layers - 1} (the model has {num_layers})"
        )
    if full_layers is not None and full_layers > select_layers[0]:
        raise ConfigError(
            f"{prefix}full_layers: got {full_layers}, expected at most the first of select_layers "
            f"{list(select_layers)}"
        )


def plan_letters(num_layers: int, select_layers: tuple[int, ...]) -> str:
    """The plan as the engine prints it (DecodePlan::ToString), without needing an engine."""
    first = select_layers[0] if select_layers else num_layers
    letters = ("F" if layer < first else "s" for layer in range(num_layers))
    return "".join(
        "S" if layer in select_layers else letter for layer, letter in enumerate(letters)
    )
