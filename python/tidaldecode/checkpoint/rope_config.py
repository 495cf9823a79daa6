"""Rotary position embedding: from the forms Hugging Face configs use to one checked value.

Called by model_config.py. The old form is `rope_theta` + `rope_scaling {type or rope_type, ...}`,
the new one `rope_parameters {rope_type, rope_theta, ...}`, possibly nested per layer type. Which
value wins where both are given follows transformers 5 (modeling_rope_utils.py). What the numbers
mean is in cpp/src/model/rope.cc.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tidaldecode.checkpoint.families import Family
from tidaldecode.checkpoint.fields import read_bool, read_float, read_int
from tidaldecode.errors import ConfigError, show

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
_MAX_POSITIONS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Fields and meaning of C++ RopeConfig (cpp/include/tidal/config.h)."""

    type: str = "default"
    theta: float = 10000.0
    rotary_dim: int = 0
    interleaved: bool = False
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    query_scale_beta: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def read_rope(
    raw: Mapping[str, Any],
    *,
    family: Family,
    head_dim: int,
    max_position_embeddings: int,
    where: str,
) -> RopeConfig:
    """The rotary embedding a config.json asks for.

    Args:
        raw: the whole config.json.
        family: says what absent fields mean, and whether heads may be rotated in part.
        head_dim: of which partial_rotary_factor is a share.
        max_position_embeddings: stands in for an absent original length, as in transformers.
        where: the file, for messages.

    Raises: ConfigError for an unknown type, a missing key or a value out of range.
    """
    parameters, name = _find_parameters(raw, family, where)
    inside = f"{where}: {name}"
    theta_source = parameters if parameters.get("rope_theta") is not None else raw
    theta = read_float(theta_source, "rope_theta", where=where, default=family.rope_theta)
    return _Config(raw, family, head_dim, max_position_embeddings, where).read(
        parameters, theta, inside
    )


def read_window_rope(
    raw: Mapping[str, Any],
    *,
    family: Family,
    head_dim: int,
    max_position_embeddings: int,
    where: str,
) -> RopeConfig | None:
    """The rotary embedding of layers with a window; None if the model has one for all.

    Args and raises as read_rope().
    """
    if family.window_rope_theta is None:
        return None
    parameters: Mapping[str, Any] = {}
    given = raw.get("rope_parameters")
    if isinstance(given, Mapping) and not raw.get("rope_scaling"):
        parameters = _of_layer_type(given, "sliding_attention", where)
    source: tuple[Mapping[str, Any], str] = (parameters, "rope_theta")
    if parameters.get("rope_theta") is None and family.window_rope_field is not None:
        source = (raw, family.window_rope_field)
    theta = read_float(*source, where=where, default=family.window_rope_theta)
    inside = f"{where}: rope_parameters.sliding_attention"
    config = _Config(raw, family, head_dim, max_position_embeddings, where)
    rope = config.read(parameters, theta, inside)
    if rope.type in ("dynamic", "longrope"):
        raise ConfigError(
            f"{inside}: rope_type: got {show(rope.type)}, expected one that does not depend on the "
            "length: default, linear, llama3 or yarn"
        )
    return rope


@dataclass(frozen=True)
class _Config:
    """A config.json, and what is known of it when its rotations are read."""

    raw: Mapping[str, Any]
    family: Family
    head_dim: int
    max_position_embeddings: int
    where: str

    def read(self, parameters: Mapping[str, Any], theta: float, inside: str) -> RopeConfig:
        """A rotation by its parameters, which are `inside` the file."""
        family = self.family
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if isinstance(rope_type, str):
            rope_type = family.rope_types.get(rope_type, rope_type)
        if rope_type not in ROPE_TYPES:
            raise ConfigError(
                f"{inside}: rope_type: got {show(rope_type)}, expected one of "
                f"{', '.join(ROPE_TYPES)}"
            )
        rotary_dim = _read_rotary_dim(self.raw, parameters, family, self.head_dim, self.where)
        whole = RopeConfig(
            theta=theta,
            rotary_dim=0 if rotary_dim == self.head_dim else rotary_dim,
            interleaved=family.has_interleaved_rotation,
        )
        if family.has_query_scale:
            whole = _with_query_scale(parameters, whole, inside)
        if rope_type == "default":
            return whole
        if rope_type in ("linear", "dynamic"):
            factor = read_float(parameters, "factor", where=inside, low=1.0, low_is_allowed=True)
            return replace(whole, type=rope_type, factor=factor)
        original = _original_length(
            self.raw, parameters, family, self.max_position_embeddings, self.where, inside
        )
        whole = replace(whole, type=rope_type, original_max_position_embeddings=original)
        if rope_type == "llama3":
            return _read_llama3(parameters, whole, inside)
        ratio = max(1.0, self.max_position_embeddings / original)
        if rope_type == "yarn":
            return _read_yarn(parameters, whole, ratio, inside)
        return _read_longrope(parameters, whole, ratio, rotary_dim, inside)


def _with_query_scale(parameters: Mapping[str, Any], rope: RopeConfig, inside: str) -> RopeConfig:
    beta: float = read_float(
        parameters, "llama_4_scaling_beta", where=inside, default=0.0, low_is_allowed=True
    )
    original = read_int(
        parameters, "original_max_position_embeddings", low=1, high=_MAX_POSITIONS, where=inside,
        default=0,
    )  # fmt: skip
    if beta and not original:
        raise ConfigError(
            f"{inside}: llama_4_scaling_beta: got {beta:g} without "
            "original_max_position_embeddings, expected both"
        )
    return replace(rope, query_scale_beta=beta, original_max_position_embeddings=original)


def _find_parameters(
    raw: Mapping[str, Any], family: Family, where: str
) -> tuple[Mapping[str, Any], str]:
    """The flat RoPE dictionary and the name of the field it came from."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    parameters = raw.get(name)
    if parameters is None:
        return family.rope_parameters, name
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"{where}: {name}: got {show(parameters)}, expected an object")
    nested = [key for key in parameters if key in _LAYER_TYPES]
    if family.window_rope_theta is not None and name == "rope_parameters":
        return _of_layer_type(parameters, "full_attention", where), f"{name}.full_attention"
    if not nested:
        return parameters, name
    full = parameters.get("full_attention")
    if not isinstance(full, Mapping):
        raise ConfigError(
            f"{where}: {name}: given per layer type ({', '.join(nested)}) without an object for "
            "full_attention; expected one set of parameters for all layers"
        )
    other = parameters.get("sliding_attention")
    if other is not None and other != full:
        raise ConfigError(
            f"{where}: {name}: got other parameters for sliding_attention than for full_attention, "
            "expected the same: models of this type rotate all layers alike"
        )
    return full, f"{name}.full_attention"


def _of_layer_type(parameters: Mapping[str, Any], layer_type: str, where: str) -> Mapping[str, Any]:
    """Those of one type of layers; none: its defaults."""
    flat = [key for key in parameters if key not in _LAYER_TYPES]
    own = parameters.get(layer_type, {})
    if flat or not isinstance(own, Mapping):
        got = f"the key {show(flat[0])}" if flat else f"{layer_type} {show(own)}"
        raise ConfigError(
            f"{where}: rope_parameters: got {got}, expected an object each for full_attention and "
            "sliding_attention, which models of this type rotate otherwise"
        )
    return own


def _read_rotary_dim(
    raw: Mapping[str, Any],
    parameters: Mapping[str, Any],
    family: Family,
    head_dim: int,
    where: str,
) -> int:
    """How many dims of a head turn; rope_parameters' share wins over the top-level one."""
    rotary_dim = int(head_dim * (family.partial_rotary_factor or 1.0))
    if family.rotary_dim_field is not None:
        rotary_dim = read_int(
            raw, family.rotary_dim_field, low=2, high=head_dim, where=where, default=rotary_dim
        )
    for source in (raw, parameters):
        share = read_float(source, "partial_rotary_factor", where=where, default=None, high=1.0)
        if share is None:
            continue
        rotary_dim = int(head_dim * share)
        if share != 1.0 and family.partial_rotary_factor is None:
            raise ConfigError(
                f"{where}: partial_rotary_factor: got {share:g}, expected 1: models of this type "
                "rotate all of a head"
            )
    if rotary_dim < 2 or rotary_dim % 2 != 0:
        key = family.rotary_dim_field or "partial_rotary_factor"
        raise ConfigError(
            f"{where}: {key}: {rotary_dim} of {head_dim} dims turn, expected an even number of them"
        )
    return rotary_dim


def _original_length(
    raw: Mapping[str, Any],
    parameters: Mapping[str, Any],
    family: Family,
    max_positions: int,
    where: str,
    inside: str,
) -> int:
    """The length trained before scaling: the top-level value wins, a family's default of that too,
    then the dictionary's."""
    key = "original_max_position_embeddings"
    inner: int = read_int(
        parameters, key, low=1, high=_MAX_POSITIONS, where=inside, default=max_positions
    )
    own = family.original_max_position_embeddings
    original: int = read_int(
        raw, key, low=1, high=_MAX_POSITIONS, where=where, default=own or inner
    )
    return original


def _read_llama3(parameters: Mapping[str, Any], rope: RopeConfig, inside: str) -> RopeConfig:
    low = read_float(parameters, "low_freq_factor", where=inside)
    high = read_float(parameters, "high_freq_factor", where=inside)
    if high <= low:
        raise ConfigError(
            f"{inside}: high_freq_factor: got {high:g}, expected more than low_freq_factor {low:g}"
        )
    return replace(
        rope,
        factor=read_float(parameters, "factor", where=inside, low=1.0, low_is_allowed=True),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _read_yarn(
    parameters: Mapping[str, Any], rope: RopeConfig, ratio: float, inside: str
) -> RopeConfig:
    if rope.theta <= 1.0:
        raise ConfigError(
            f"{inside}: rope_theta: got {rope.theta:g}, expected more than 1 for yarn"
        )
    fast = read_float(parameters, "beta_fast", where=inside, default=32.0)
    slow = read_float(parameters, "beta_slow", where=inside, default=1.0)
    if fast < slow:
        raise ConfigError(
            f"{inside}: beta_fast: got {fast:g}, expected at least beta_slow {slow:g}"
        )

    def scale(key: str) -> float:
        value: float = read_float(parameters, key, where=inside, default=0.0, low_is_allowed=True)
        return value

    return replace(
        rope,
        factor=read_float(
            parameters, "factor", where=inside, low=1.0, low_is_allowed=True, default=ratio
        ),
        attention_factor=read_float(parameters, "attention_factor", where=inside, default=None),
        beta_fast=fast,
        beta_slow=slow,
        mscale=scale("mscale"),
        mscale_all_dim=scale("mscale_all_dim"),
        truncate=read_bool(parameters, "truncate", where=inside, default=True),
    )


def _read_longrope(
    parameters: Mapping[str, Any], rope: RopeConfig, ratio: float, rotary_dim: int, inside: str
) -> RopeConfig:
    original = rope.original_max_position_embeddings
    if original < 2:  # the attention factor divides by its logarithm
        raise ConfigError(
            f"{inside}: original_max_position_embeddings: got {original}, expected at least 2"
        )
    return replace(
        rope,
        factor=read_float(
            parameters, "factor", where=inside, low=1.0, low_is_allowed=True, default=ratio
        ),
        attention_factor=read_float(parameters, "attention_factor", where=inside, default=None),
        short_factor=_factor_list(parameters, "short_factor", rotary_dim, inside),
        long_factor=_factor_list(parameters, "long_factor", rotary_dim, inside),
    )


def _factor_list(
    parameters: Mapping[str, Any], key: str, rotary_dim: int, inside: str
) -> tuple[float, ...]:
    values = parameters.get(key)
    expected = f"a list of {rotary_dim // 2} numbers > 0 (half of the {rotary_dim} dims that turn)"
    if not isinstance(values, list):
        raise ConfigError(f"{inside}: {key}: got {show(values)}, expected {expected}")
    if len(values) != rotary_dim // 2:
        raise ConfigError(f"{inside}: {key}: got {len(values)} numbers, expected {expected}")
    for value in values:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # The upper bound keeps an integer of a thousand digits out of float().
        if not is_number or not 0 < value < 1e30 or not math.isfinite(value):
            raise ConfigError(f"{inside}: {key}: got {show(value)} in it, expected {expected}")
    return tuple(float(value) for value in values)
