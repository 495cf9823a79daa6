"""How quantised matrices are stored, as plain data, and the fields that all methods read.

Filled by quantization.py and compressed_tensors.py from config.json; quantized_tensors.py finds the
stored parts that a scheme names. What the codes mean is one function per format in
cpp/src/model/weight_format.cc.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tidaldecode.checkpoint.fields import read_int
from tidaldecode.checkpoint.module_names import (
    PartialNames,
    TargetNames,
    is_class_of,
    is_name,
    is_pattern_of,
)
from tidaldecode.errors import ConfigError, show

OTHER_CHECKPOINT = "or use the float32, bfloat16 or float16 checkpoint"
MXFP4_GROUP = 32  # columns that share a scale

_MAX_GROUP = 2**20


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """How a matrix [out, in] is stored."""

    # The engine's name: "float8", "int8", "int8_packed", "int4_packed", "int4_gptq", "int4_awq" or
    # "mxfp4".
    format: str
    block: tuple[int | None, int | None]  # rows and columns that share a scale; None: all
    has_zeros: bool = False  # whether zero points are stored
    zero_offset: int = 0  # added to a stored zero point, modulo 16 or 256
    # Whether a matrix may have one scale instead: of configs that do not name the blocks.
    may_have_one_scale: bool = False
    has_order: bool = False  # whether g_idx must be there, as it may permute the columns
    # How products are meant to take their inputs: "dynamic" or "static", under scales of their own
    # or the checkpoint's, in the weights' format; in "other" ways; None: as they are.
    activations: str | None = None

    @property
    def quantizes_activations(self) -> bool:
        """Whether the inputs of its products are meant to be rounded to FP8 too."""
        return self.format == "float8" and self.activations in ("dynamic", "static")

    @property
    def text(self) -> str:
        """What a user reads: "FP8, a scale per block of 128 x 128"."""
        rows, columns = self.block
        if self.may_have_one_scale:
            scales = f"a scale per tensor or block of {rows} x {columns}"
        elif rows is None and columns is None:
            scales = "a scale per tensor"
        elif rows == 1:
            scales = "a scale per row" if columns is None else f"groups of {columns}"
        else:
            scales = f"a scale per block of {rows} x {columns}"
        names = {"float8": "FP8", "int8": "int8", "int8_packed": "int8", "mxfp4": "MXFP4"}
        bits = names.get(self.format, "int4")
        return f"{bits}, {scales}"


@dataclass(frozen=True, kw_only=True)
class QuantGroup:
    """The modules of one scheme."""

    targets: tuple[str, ...]  # names, "re:" patterns and classes ("Linear"); none: every module
    scheme: QuantScheme | None  # None: weights as they are


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What quantization_config says, checked."""

    method: str  # "compressed-tensors", "fp8", "awq", "gptq" or "mxfp4"
    groups: tuple[QuantGroup, ...]
    ignored: TargetNames | PartialNames = TargetNames()
    notes: tuple[str, ...] = ()  # for the user: what was not taken as it stands

    def scheme_of(self, names: Iterable[str]) -> QuantScheme | None:
        """The scheme of a module, by any of the names it goes by; None if it has none."""
        names = tuple(dict.fromkeys(names))
        if any(self.ignored.has(name) for name in names):
            return None
        # As compressed-tensors: a name counts before a pattern, a pattern before a class.
        for rank in (is_name, is_pattern_of, is_class_of):
            for group in self.groups:
                if any(rank(target, name) for target in group.targets for name in names):
                    return group.scheme
        return next((group.scheme for group in self.groups if not group.targets), None)

    @property
    def text(self) -> str:
        """What a user reads: the method and what the schemes are."""
        schemes = dict.fromkeys(group.scheme.text for group in self.groups if group.scheme)
        return f"{self.method}: {'; '.join(schemes) or 'no quantised weights'}"

    @property
    def quantizes_activations(self) -> bool:
        """Whether some products are meant to round their inputs to FP8 too."""
        return any(group.scheme.quantizes_activations for group in self.groups if group.scheme)

    @property
    def has_activations(self) -> bool:
        """Whether some products are meant to round their inputs in any way."""
        return any(group.scheme.activations for group in self.groups if group.scheme)


def read_names(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A field that is a list of names or absent."""
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{where}: {key}: got {show(value)}, expected a list of module names")
    return tuple(value)


def expect(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], where: str) -> None:
    """Refuses a field that is there with another value than those allowed."""
    value = config.get(key)
    if value is None or any(value == one and type(value) is type(one) for one in allowed):
        return
    names = " or ".join(show(one) for one in allowed) or "none"
    raise ConfigError(
        f"{where}: {key}: got {show(value)}, supported is {names}; {OTHER_CHECKPOINT}"
    )


def refuse_unless_empty(config: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    """Refuses fields that change what a model computes, unless they say nothing."""
    for key in keys:
        if config.get(key) not in (None, False, {}, [], ""):
            raise ConfigError(
                f"{where}: {key}: got {show(config[key])}, which is not supported; expected none"
            )


def notes_on_unknown(
    config: Mapping[str, Any], known: frozenset[str], where: str
) -> tuple[str, ...]:
    """Names the fields that are set and not known, for the user."""
    unknown = sorted(
        key
        for key, value in config.items()
        if key not in known and value not in (None, False, {}, [], "")
    )
    if not unknown:
        return ()
    return (f"{where}: {', '.join(show(key) for key in unknown[:5])}: not known here, not applied",)


def read_group_size(config: Mapping[str, Any], where: str, default: int) -> int | None:
    """Columns that share a scale; None (-1 in the file) is all of them."""
    size: int = read_int(
        config, "group_size", low=-1, high=_MAX_GROUP, where=where, default=default
    )
    if size == 0:
        raise ConfigError(f"{where}: group_size: got 0, expected -1 or a positive number")
    return None if size == -1 else size


def read_block(value: Any, key: str, where: str) -> tuple[int, int]:
    """Rows and columns of a block: [128, 128] or "128x128"."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", value):
        value = [int(part) for part in value.split("x")]
    is_pair = isinstance(value, list) and len(value) == 2
    if not is_pair or not all(
        isinstance(size, int) and not isinstance(size, bool) and 0 < size <= _MAX_GROUP
        for size in value
    ):
        raise ConfigError(f"{where}: {key}: got {show(value)}, expected [rows, columns]")
    return value[0], value[1]
