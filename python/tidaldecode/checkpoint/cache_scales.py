"""Scales of a quantised KV cache that a checkpoint holds: one for the keys of a layer, one for its
values.

Found by tensor_names.py; read when a Decoder with an fp8 cache is made, and only then.
Source: vLLM (maybe_remap_kv_scale_name): compressed-tensors writes self_attn.k_scale, before 0.8
k_proj.output_scale; ModelOpt k_proj.k_scale; and the oldest one kv_scale for both.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tidaldecode.checkpoint.layer_kinds import LayerConfig
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.checkpoint.quantized_tensors import WEIGHT_DTYPES, read_tensor
from tidaldecode.checkpoint.safetensors_header import TensorEntry
from tidaldecode.errors import WeightsError, show

_NAME = re.compile(
    r"model\.layers\.(?P<layer>\d{1,9})\.self_attn\."
    r"((attn\.|[kv]_proj\.)?(?P<half>[kv]|kv)_scale|(?P<output>[kv])_proj\.output_scale)"
)


def scaled_model(model: ModelConfig, scales: Iterable[TensorEntry]) -> ModelConfig:
    """The model with the scales of its layers' fp8 caches.

    Args:
        model: with layers that have scales of 1.
        scales: tensors that is_cache_scale() names.

    Raises: WeightsError for a scale that is not one finite number above 0.
    """
    layers = list(model.layers or (LayerConfig(),) * model.num_layers)
    for entry in scales:
        found = _NAME.fullmatch(entry.name)
        layer = int(found["layer"]) if found else model.num_layers
        if found is None or layer >= model.num_layers:
            continue
        scale = _read_scale(entry)
        halves: Iterable[str] = found["half"] or found["output"]
        changed: dict[str, Any] = {f"{half}_scale": scale for half in halves}
        layers[layer] = replace(layers[layer], **changed)
    return replace(model, layers=tuple(layers))


def is_cache_scale(name: str) -> bool:
    """Whether a tensor, by the engine's name, is a scale that scaled_model() takes."""
    return _NAME.fullmatch(name) is not None


def _read_scale(entry: TensorEntry) -> float:
    problem = f"{entry.path}: tensor {show(entry.name, 120)}: "
    remedy = 'or set kv_dtype to "auto", which does not use it'
    if entry.dtype not in WEIGHT_DTYPES or math.prod(entry.shape) != 1:
        raise WeightsError(
            f"{problem}{entry.dtype} {show(list(entry.shape))}, expected one number for the keys "
            f"or values of a layer ({', '.join(WEIGHT_DTYPES)}); {remedy}"
        )
    data = read_tensor(entry)
    if entry.dtype == "BF16":
        data = b"\0\0" + data  # the upper half of a float32
    scale: float = struct.unpack("<e" if entry.dtype == "F16" else "<f", data)[0]
    if not math.isfinite(scale) or scale <= 0:
        raise WeightsError(f"{problem}got {scale}, expected a finite number > 0; {remedy}")
    return scale
