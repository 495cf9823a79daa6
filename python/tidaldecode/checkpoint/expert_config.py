"""config.json of models with experts: how many and of which size, how they are chosen, and which
layers have them.

Called by model_config.py and layer_kinds.py. Fields and defaults are transformers' (families.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidaldecode.checkpoint.families import Experts, Family
from tidaldecode.checkpoint.fields import read_bool, read_float, read_int
from tidaldecode.errors import ConfigError, show

# Names of one field.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_COUNTS = ("num_experts_per_tok", "moe_k")
_MAX_EXPERTS = 4096
_MAX_SHARED = 64
_MAX_INTERMEDIATE = 2**20
_MAX_LAYERS = 1024


def read_experts(raw: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The fields of ModelConfig that are about experts; {} for a family without.

    Args:
        raw: the whole config.json.
        family: says what absent fields mean, and which there are.
        where: the file, for messages.

    Raises: ConfigError for a field that is wrong, and for experts in groups.
    """
    experts = family.experts
    if experts is None:
        return {}

    def size(key: str, high: int, default: int | None) -> int:
        value: int = read_int(raw, key, low=1, high=high, where=where, default=default)
        return value

    count_field = _named(raw, EXPERT_COUNTS)
    num_experts = size(count_field, _MAX_EXPERTS, experts.num_experts)
    chosen_field = _named(raw, _CHOSEN_COUNTS)
    chosen = size(chosen_field, _MAX_EXPERTS, experts.per_token)
    if chosen > num_experts:
        raise ConfigError(
            f"{where}: {chosen_field}: got {chosen}, expected at most {count_field} {num_experts}"
        )
    if experts.has_groups:
        _refuse_groups(raw, where)
    normalized, scale = experts.is_normalized, 1.0
    if experts.normalized_field is not None:
        normalized = read_bool(raw, experts.normalized_field, where=where, default=normalized)
    if experts.scale_field is not None:
        scale = read_float(raw, experts.scale_field, where=where, default=scale)
    own_size = size(experts.size[0], _MAX_INTERMEDIATE, experts.size[1])
    shared_size = _shared_size(raw, experts, own_size, where)
    return {
        "num_experts": num_experts,
        "experts_per_token": chosen,
        "expert_intermediate_size": own_size,
        "router_score": experts.router_score,
        "router_correction": experts.has_correction,
        "normalized_routing": normalized,
        "routing_scale": scale,
        "shared_expert_size": shared_size,
        "shared_expert_gate": experts.has_shared_gate and shared_size > 0,
    }


def layers_with_experts(
    raw: Mapping[str, Any], experts: Experts | None, num_layers: int, where: str
) -> list[bool]:
    """Layer by layer, whether its MLP is one of experts. Raises: ConfigError."""
    if experts is None:
        return [False] * num_layers

    def layer(key: str | None, low: int, default: int) -> int:
        if key is None:
            return default
        value: int = read_int(raw, key, low=low, high=_MAX_LAYERS, where=where, default=default)
        return value

    first = layer(experts.first_layer[0], 0, experts.first_layer[1]) if experts.first_layer else 0
    last = layer(experts.last_layer_field, -1, -1)
    step = layer(experts.step_field, 1, 1)
    behind = num_layers if last == -1 else last + 1
    others = raw.get(experts.other_layers_field or "") or []
    if not isinstance(others, list) or any(
        isinstance(each, bool) or not isinstance(each, int) for each in others
    ):
        raise ConfigError(
            f"{where}: {experts.other_layers_field}: got {show(others)}, expected a list of layers "
            "without experts"
        )
    return [
        first <= each < behind and (each + 1) % step == 0 and each not in others
        for each in range(num_layers)
    ]


def _named(raw: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The name that a field has in this config.json, of several that it may have."""
    return next((key for key in names if raw.get(key) is not None), names[0])


def _refuse_groups(raw: Mapping[str, Any], where: str) -> None:
    """Refuses experts that are chosen in some of several groups only."""
    groups, chosen = (
        read_int(raw, key, low=1, high=_MAX_EXPERTS, where=where, default=1)
        for key in ("n_group", "topk_group")
    )
    if chosen < groups:
        raise ConfigError(
            f"{where}: topk_group: got {chosen} of n_group {groups}, expected all of them: experts "
            "that are chosen in groups are not supported"
        )


def _shared_size(raw: Mapping[str, Any], experts: Experts, own_size: int, where: str) -> int:
    """The size of the MLP that all tokens have; 0: there is none."""
    if experts.shared_size is not None:
        key, default = experts.shared_size
        value: int = read_int(raw, key, low=0, high=_MAX_INTERMEDIATE, where=where, default=default)
        return value
    if experts.shared_count is None:
        return 0
    key, default = experts.shared_count
    count: int = read_int(raw, key, low=0, high=_MAX_SHARED, where=where, default=default)
    return count * own_size
