"""quantization_config as compressed-tensors writes it: groups of modules, each with its scheme.

Called by quantization.py.
Source: compressed-tensors 0.20 (quantization/quant_config.py, quant_args.py, utils/match.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidaldecode.checkpoint.fields import read_bool, read_int
from tidaldecode.checkpoint.module_names import TargetNames
from tidaldecode.checkpoint.quant_scheme import (
    OTHER_CHECKPOINT,
    QuantGroup,
    Quantization,
    QuantScheme,
    expect,
    notes_on_unknown,
    read_block,
    read_group_size,
    read_names,
    refuse_unless_empty,
)
from tidaldecode.errors import ConfigError, show

_KEYS = frozenset(
    "quant_method config_groups format quantization_status kv_cache_scheme ignore "
    "global_compression_ratio sparsity_config transform_config moe_sparsity_config version "
    "run_compressed dequantize use_optimized_inference".split()
)
_GROUP_KEYS = frozenset("targets weights input_activations output_activations format".split())
_WEIGHTS_KEYS = frozenset(
    "num_bits type symmetric group_size strategy block_structure dynamic actorder scale_dtype "
    "zp_dtype observer observer_kwargs".split()
)

# {format: {(number type, bits): the format of the engine}}.
_FORMATS = {
    "float-quantized": {("float", 8): "float8"},
    "int-quantized": {("int", 8): "int8"},
    "naive-quantized": {("float", 8): "float8", ("int", 8): "int8"},
    "pack-quantized": {("int", 4): "int4_packed", ("int", 8): "int8_packed"},
}


def read_compressed_tensors(config: Mapping[str, Any], where: str) -> Quantization:
    """quantization_config of the method "compressed-tensors".

    Raises: ConfigError naming what is not supported.
    """
    # Older writers call what they have compressed "frozen".
    expect(config, "quantization_status", ("compressed", "frozen"), where)
    refuse_unless_empty(config, ("moe_sparsity_config",), where)
    _refuse_sparsity(config.get("sparsity_config"), where)
    transforms = config.get("transform_config")
    if isinstance(transforms, dict):
        transforms = transforms.get("config_groups")
    if transforms:
        raise ConfigError(f"{where}: transform_config: transforms of a model are not supported")
    groups = config.get("config_groups")
    if groups is not None and not isinstance(groups, dict):
        raise ConfigError(f"{where}: config_groups: got {show(groups)}, expected an object")
    ignored = read_names(config, "ignore", where)
    notes = notes_on_unknown(config, _KEYS, where)
    if config.get("kv_cache_scheme") is not None:
        notes += (f"{where}: kv_cache_scheme: the KV cache is quantised only by kv_dtype 'fp8'",)
    return Quantization(
        method="compressed-tensors",
        groups=tuple(
            _read_group(group, config.get("format"), f"{where}: config_groups.{show(name)}")
            for name, group in (groups or {}).items()
        ),
        ignored=TargetNames.read(ignored, f"{where}: ignore"),
        notes=notes,
    )


def _refuse_sparsity(config: Any, where: str) -> None:
    """Refuses weights without their zeros ("2:4"); those with them are as any."""
    if config in (None, {}):
        return
    kind = config.get("format") if isinstance(config, dict) else config
    if kind != "dense":
        raise ConfigError(
            f"{where}: sparsity_config: got the format {show(kind)}, expected 'dense': weights "
            "stored without their zeros are not supported"
        )


def _read_group(group: Any, default_format: Any, where: str) -> QuantGroup:
    if not isinstance(group, dict):
        raise ConfigError(f"{where}: got {show(group)}, expected an object with its targets")
    unknown = [key for key in group if key not in _GROUP_KEYS and group[key] is not None]
    if unknown:
        raise ConfigError(f"{where}: {show(unknown[0])}: not known here, not supported")
    targets = read_names(group, "targets", where)
    if not targets:
        raise ConfigError(f"{where}: targets: got none, expected a list of module names")
    TargetNames.read(targets, f"{where}: targets")
    refuse_unless_empty(group, ("output_activations",), where)
    scheme = None
    stored = group.get("format") if group.get("format") is not None else default_format
    if group.get("weights") is not None and stored != "dense":
        activations = _read_activations(group.get("input_activations"), where)
        scheme = _read_weights(group["weights"], stored, activations, where)
    return QuantGroup(targets=targets, scheme=scheme)


def _read_activations(inputs: Any, where: str) -> str | None:
    """What QuantScheme.activations says of input_activations."""
    if inputs is None:
        return None
    if not isinstance(inputs, dict):
        raise ConfigError(f"{where}: input_activations: got {show(inputs)}, expected an object")
    if inputs.get("type") != "float" or inputs.get("num_bits") != 8:
        return "other"
    return "dynamic" if inputs.get("dynamic") else "static"


def _read_weights(weights: Any, stored: Any, activations: str | None, where: str) -> QuantScheme:
    if not isinstance(stored, str) or stored not in _FORMATS:
        raise ConfigError(
            f"{where}: format: got {show(stored)}, supported are "
            f"{', '.join(map(repr, _FORMATS))}; {OTHER_CHECKPOINT}"
        )
    where = f"{where}: weights"
    if not isinstance(weights, dict):
        raise ConfigError(f"{where}: got {show(weights)}, expected an object")
    unknown = [key for key in weights if key not in _WEIGHTS_KEYS and weights[key] is not None]
    if unknown:
        raise ConfigError(f"{where}: {show(unknown[0])}: not known here, not supported")
    bits = read_int(weights, "num_bits", low=1, high=16, where=where, default=8)
    number = weights.get("type") or "int"
    number = number.lower() if isinstance(number, str) else number
    kinds = _FORMATS[stored]
    if not isinstance(number, str) or (number, bits) not in kinds:
        expected = " or ".join(f"{kind} of {size} bits" for kind, size in kinds)
        raise ConfigError(
            f"{where}: got {show(number)} of {bits} bits in the format {show(stored)}, supported "
            f"is {expected}"
        )
    expect(weights, "dynamic", (False,), where)
    expect(weights, "actorder", (False, "weight", "static"), where)
    symmetric = read_bool(weights, "symmetric", where=where, default=True)
    block = _read_strategy(weights, where)
    if not symmetric and (stored != "pack-quantized" or block[0] != 1):
        raise ConfigError(
            f"{where}: symmetric: got false, supported is true (false in the format "
            "'pack-quantized', per group or channel)"
        )
    return QuantScheme(
        format=kinds[number, bits],
        block=block,
        has_zeros=not symmetric,
        activations=activations,
    )


def _read_strategy(weights: Mapping[str, Any], where: str) -> tuple[int | None, int | None]:
    """Rows and columns that share a scale, as QuantScheme.block."""
    strategy = weights.get("strategy")
    has_group_size = weights.get("group_size") is not None
    group_size = read_group_size(weights, where, -1)
    if strategy is None:
        if has_group_size:
            strategy = "channel" if group_size is None else "group"
        else:
            strategy = "tensor"
    if strategy == "tensor":
        return (None, None)
    if strategy == "channel":
        return (1, None)
    if strategy == "group":
        if group_size is None:
            raise ConfigError(f"{where}: group_size is missing; expected the size of a group")
        return (1, group_size)
    if strategy == "block":
        return read_block(weights.get("block_structure"), "block_structure", where)
    raise ConfigError(
        f"{where}: strategy: got {show(strategy)}, supported are tensor, channel, group and block"
    )
