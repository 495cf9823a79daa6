"""What the layers of a model differ in: which rotate, which see a window only, which have experts.

Called by model_config.py. The fields and their defaults are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tidaldecode.checkpoint.expert_config import layers_with_experts
from tidaldecode.checkpoint.families import Family
from tidaldecode.checkpoint.fields import read_bool, read_int
from tidaldecode.errors import ConfigError, show

_MAX_LAYERS = 1024
_MAX_WINDOW = 2**31 - 1
_SLIDING = "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Fields and meaning of C++ LayerConfig (cpp/include/tidal/config.h)."""

    has_rope: bool = True
    window: int = 0
    has_experts: bool = False
    k_scale: float = 1.0
    v_scale: float = 1.0


def read_layers(
    raw: Mapping[str, Any], family: Family, num_layers: int, longest: int, where: str
) -> tuple[LayerConfig, ...]:
    """Layer by layer; () if all are as by default.

    Args:
        raw: the whole config.json.
        family: says what absent fields mean, and which there are.
        num_layers: of the model.
        longest: tokens of the longest sequence; a window that is as long is none, but where layers
            with one rotate otherwise.
        where: the file, for messages.

    Raises: ConfigError for a field that is wrong, and for layers of other kinds.
    """
    rotates = [True] * num_layers
    if family.has_layers_without_rope:
        rotates = _rotating_layers(raw, num_layers, where)
    elif family.is_hybrid:
        rotates = [raw.get("position_embedding_type") == "rope"] * num_layers
    kinds = _layer_types(raw, family, num_layers, where)
    window = _window(raw, family, kinds, where)
    has_window = [False] * num_layers
    if window is not None:
        by_rule = _windows_by_rule(raw, family, rotates, where)
        has_window = [kind == _SLIDING for kind in kinds] if kinds else by_rule
        if kinds and not family.has_layer_types and has_window != by_rule:
            raise ConfigError(
                f"{where}: layer_types: got layers that differ in kind, expected {_SLIDING!r} for "
                f"all: sliding_window is {window}, and models of this type have it in all layers"
            )
        if window >= longest and family.window_rope_theta is None:  # never reached
            window = 0
    has_experts = layers_with_experts(raw, family.experts, num_layers, where)
    layers = tuple(
        LayerConfig(has_rope=turns, window=window if own and window else 0, has_experts=experts)
        for turns, own, experts in zip(rotates, has_window, has_experts, strict=True)
    )
    return () if all(layer == LayerConfig() for layer in layers) else layers


def _layer_types(
    raw: Mapping[str, Any], family: Family, num_layers: int, where: str
) -> list[str] | None:
    """The kinds of the layers, if config.json has them; each is full or sliding attention."""
    layer_types = raw.get("layer_types")
    if layer_types is None:
        if family.is_hybrid:
            raise ConfigError(
                f"{where}: layer_types is missing, so all layers are state-space layers, which are "
                "not supported"
            )
        return None
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        count = len(layer_types) if isinstance(layer_types, list) else show(layer_types)
        raise ConfigError(
            f"{where}: layer_types: got {count}, expected a list of {num_layers} names "
            "(num_hidden_layers)"
        )
    known = (*family.full_attention, *((_SLIDING,) if family.has_window else ()))
    for index, kind in enumerate(layer_types):
        if kind not in known:
            names = " or ".join(map(repr, known[-2:] if family.has_window else known[-1:]))
            raise ConfigError(
                f"{where}: layer_types: layer {index} is {show(kind)}, expected {names}: other "
                "kinds of layers are not supported"
            )
    return layer_types


def _window(
    raw: Mapping[str, Any], family: Family, kinds: list[str] | None, where: str
) -> int | None:
    """The length of the window; None if it is not in use."""
    if not family.has_window:
        return None
    is_named = kinds is not None and _SLIDING in kinds
    window = raw.get("sliding_window", family.sliding_window)
    if family.window_switch is not None:
        if not read_bool(raw, family.window_switch, where=where, default=False):
            if is_named:
                raise ConfigError(
                    f"{where}: layer_types: got {_SLIDING!r} although {family.window_switch} is "
                    "false, expected one of the two to change"
                )
            return None
    if window is None:
        if is_named:
            raise ConfigError(
                f"{where}: sliding_window: got none, expected its length: layer_types has "
                f"{_SLIDING!r} layers"
            )
        return None
    field = {"sliding_window": window}
    length: int = read_int(field, "sliding_window", low=1, high=_MAX_WINDOW, where=where)
    return length


def _windows_by_rule(
    raw: Mapping[str, Any], family: Family, rotates: list[bool], where: str
) -> list[bool]:
    """Which layers have the window where config.json does not say by layer."""
    count = first = len(rotates)
    if family.windows_without_rope:
        return [not turns for turns in rotates]
    if family.max_window_layers:
        first = read_int(
            raw, "max_window_layers", low=0, high=_MAX_WINDOW, where=where,
            default=family.max_window_layers,
        )  # fmt: skip
        if not family.full_layer_interval:
            return [layer >= first for layer in range(count)]
    interval = family.full_layer_interval
    if family.full_layer_field is not None:
        interval = read_int(
            raw, family.full_layer_field, low=1, high=_MAX_LAYERS, where=where, default=interval
        )
    if not interval:
        return [True] * count
    return [layer < first and (layer + 1) % interval != 0 for layer in range(count)]


def _rotating_layers(raw: Mapping[str, Any], num_layers: int, where: str) -> list[bool]:
    rotates = raw.get("no_rope_layers")
    if rotates is None:
        interval = read_int(
            raw, "no_rope_layer_interval", low=1, high=_MAX_LAYERS, where=where, default=4
        )
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if (
        not isinstance(rotates, list)
        or len(rotates) < num_layers
        or any(value not in (0, 1) for value in rotates)
    ):
        raise ConfigError(
            f"{where}: no_rope_layers: got {show(rotates)}, expected a list of {num_layers} "
            "numbers (num_hidden_layers), 1 for a layer with rotation and 0 for one without"
        )
    return [bool(value) for value in rotates[:num_layers]]
