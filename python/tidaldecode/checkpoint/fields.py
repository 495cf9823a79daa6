"""One field of a JSON object, its kind and range checked; errors name the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tidaldecode.errors import ConfigError, show

REQUIRED = object()  # as a default: the field must be there


def _missing(raw: Mapping[str, Any], key: str, default: Any, where: str, expected: str) -> bool:
    """True if `key` is absent or null and `default` stands in for it."""
    if raw.get(key) is not None:
        return False
    if default is REQUIRED:
        raise ConfigError(f"{where}: {key} is missing; expected {expected}")
    return True


def read_int(
    raw: Mapping[str, Any], key: str, *, low: int, high: int, where: str, default: Any = REQUIRED
) -> Any:
    """An integer in [low, high], or `default` if the field is absent or null."""
    expected = f"an integer from {low} to {high}"
    if _missing(raw, key, default, where, expected):
        return default
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{where}: {key}: got {show(value)}, expected {expected}")
    return value


def read_float(
    raw: Mapping[str, Any],
    key: str,
    *,
    where: str,
    default: Any = REQUIRED,
    low: float = 0.0,
    high: float = math.inf,
    low_is_allowed: bool = False,
) -> Any:
    """A finite number in (low, high] ([low, high] if low_is_allowed), or `default`."""
    relation = ">=" if low_is_allowed else ">"
    limit = "" if high == math.inf else f" and <= {high:g}"
    expected = f"a finite number {relation} {low:g}{limit}"
    if _missing(raw, key, default, where, expected):
        return default
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where}: {key}: got {show(value)}, expected {expected}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    in_range = (number >= low if low_is_allowed else number > low) and number <= high
    if not (math.isfinite(number) and in_range):
        raise ConfigError(f"{where}: {key}: got {show(value)}, expected {expected}")
    return number


def read_bool(raw: Mapping[str, Any], key: str, *, where: str, default: bool) -> bool:
    """true or false, or `default` if the field is absent or null."""
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {key}: got {show(value)}, expected true or false")
    return value
