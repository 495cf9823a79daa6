"""From the package's values to the engine's: device, model, settings, plan and weights.

Called by decoder.py once per Decoder and by replay.py for every plan. Here "auto" gets its meaning.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from tidaldecode import _core
from tidaldecode.checkpoint.cache_scales import scaled_model
from tidaldecode.checkpoint.families import FAMILIES
from tidaldecode.checkpoint.layer_kinds import LayerConfig
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.checkpoint.quantized_tensors import WEIGHT_DTYPES, QuantizedTensor
from tidaldecode.checkpoint.rope_config import RopeConfig
from tidaldecode.checkpoint.safetensors_header import TensorEntry
from tidaldecode.config import LAYER_FIELDS, PLAN_FIELDS, DecodeConfig, PlanConfig
from tidaldecode.plans import Plan

_logger = logging.getLogger("tidaldecode")

# Integers whose 0 means "chosen by the engine"; None in DecodeConfig.
_ZERO_IS_AUTO = ("draft_tokens", "max_seq_len", "num_pages", "prefill_chunk", "num_threads")
# Fields whose value here is not simply the engine's.
_TRANSLATED = ("device", "dtype", "kv_dtype", "load_format", "attention", "verify")
# Types of tensors in files, and the engine's own; codes of 8 bits are bytes, whatever they mean.
_STORED_DTYPES = WEIGHT_DTYPES | {
    "I32": "int32",
    "I8": "uint8",
    "U8": "uint8",
    "F8_E4M3": "uint8",
}


def resolve_device(device: str) -> str:
    """Makes "auto" definite: the first CUDA device that works, else the CPU.

    A device asked for by name stays as it is; the engine says why if it cannot be used.
    """
    if device != "auto":
        return device
    usable = [entry["name"] for entry in _core.list_devices() if entry["available"]]
    return next((name for name in usable if name.startswith("cuda")), "cpu")


def model_in_use(folder: ModelFolder, config: _core.DecodeConfig) -> ModelConfig:
    """The folder's model; of an fp8 cache with the scales that the folder has for it.

    Gemma's embeddings are multiplied by a number of the weights' type, as in transformers and vLLM:
    sqrt(2560) is 50.5 in bfloat16.

    Raises: WeightsError for scales that cannot be used.
    """
    model = folder.model
    if FAMILIES[folder.family].has_gemma_scales:
        model = replace(model, embedding_scale=_rounded(model.embedding_scale, config.dtype))
    if config.kv_dtype != "fp8":
        return model
    return scaled_model(model, folder.cache_scales)


def _rounded(value: float, dtype: str) -> float:
    """The nearest number of a type."""
    if dtype == "bfloat16":  # the upper half of a float32
        bits = int.from_bytes(struct.pack("<f", value), "little")
        bits += 0x7FFF + (bits >> 16 & 1)
        value = struct.unpack("<f", (bits & 0xFFFF0000).to_bytes(4, "little"))[0]
    form = "<e" if dtype == "float16" else "<f"
    nearest: float = struct.unpack(form, struct.pack(form, value))[0]
    return nearest


def core_model(model: ModelConfig) -> _core.ModelConfig:
    """The same values in the engine's type."""
    result = _core.ModelConfig()
    for field in fields(model):
        if field.name not in ("rope", "window_rope", "layers"):
            setattr(result, field.name, getattr(model, field.name))
    result.rope = _core_rope(model.rope)
    result.window_rope = None if model.window_rope is None else _core_rope(model.window_rope)
    result.layers = [_core_layer(layer) for layer in model.layers]
    return result


def _core_rope(rope: RopeConfig) -> _core.RopeConfig:
    result = _core.RopeConfig()
    for field in fields(rope):
        value = getattr(rope, field.name)
        setattr(result, field.name, list(value) if isinstance(value, tuple) else value)
    return result


def _core_layer(layer: LayerConfig) -> _core.LayerConfig:
    result = _core.LayerConfig()
    for field in fields(layer):
        setattr(result, field.name, getattr(layer, field.name))
    return result


def core_config(
    settings: DecodeConfig, plan: Plan | None, folder: ModelFolder
) -> _core.DecodeConfig:
    """Explicit settings over the plan's over the engine's defaults, and what "auto" means."""
    config = _core.DecodeConfig()
    _set_plan(config, settings if plan is None else plan.config)
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name not in (*PLAN_FIELDS, *_TRANSLATED) and value is not None:
            setattr(config, field.name, value)
    config.device = resolve_device(settings.device)
    dtype, kv_dtype = settings.dtype, settings.kv_dtype
    if dtype == "auto":
        dtype = folder.dtype if config.device == "cpu" or folder.dtype != "float32" else "bfloat16"
    config.dtype, config.kv_dtype = dtype, dtype if kv_dtype == "auto" else kv_dtype
    config.verify = bool(settings.verify)
    return config


def core_plan(plan: Plan | None) -> _core.PlanConfig:
    """A plan in the engine's type; None is dense decoding."""
    result = _core.PlanConfig()
    _set_plan(result, PlanConfig() if plan is None else plan.config)
    return result


def _set_plan(target: _core.PlanConfig, config: PlanConfig) -> None:
    """Sets what is given; the engine's defaults stay where nothing is."""
    if config.choosing_layers:
        target.select_layers = list(config.select_layers or ())
        target.scored_layers = list(config.scored_layers or ())
        target.full_layers = min(target.full_layers, config.choosing_layers[0])
    for name, value in config.settings().items():
        setattr(target, name, _core.AUTOMATIC if value == "auto" else value)


def core_weights(
    folder: ModelFolder,
) -> list[_core.WeightFileEntry | _core.QuantizedWeight] | None:
    """Where the engine finds each tensor; None is random weights."""
    if folder.load_format == "dummy":
        return None
    return [
        _quantized_weight(weight) if isinstance(weight, QuantizedTensor) else _file_entry(weight)
        for weight in folder.weights
    ]


def _file_entry(entry: TensorEntry) -> _core.WeightFileEntry:
    return _core.WeightFileEntry(
        entry.name,
        _STORED_DTYPES[entry.dtype],
        list(entry.shape),
        os.fsencode(entry.path),
        entry.file_offset,
        entry.identity,
        list(entry.strides),
        entry.stored_name,
    )


def _quantized_weight(weight: QuantizedTensor) -> _core.QuantizedWeight:
    return _core.QuantizedWeight(
        weight.name,
        list(weight.shape),
        weight.scheme.format,
        weight.block,
        _file_entry(weight.codes),
        _file_entry(weight.scales),
        _file_entry(weight.zeros) if weight.zeros else None,
        weight.scheme.zero_offset,
        weight.scheme.quantizes_activations,
        _file_entry(weight.input_scale) if weight.input_scale else None,
        weight.stored_name,
    )


def log_rounding(config: _core.DecodeConfig, errors: Mapping[str, float]) -> None:
    """Logs the root mean square of what rounding to codes changed, over that of the weights.

    Args:
        errors: by the setting that asked for it.
    """
    whose = "experts'" if config.weight_format == "mxfp4" else "layers'"
    parts = {
        "weight_format": f"the {whose} matrices are",
        "lm_head_format": "the output matrix is",
    }
    for setting, error in errors.items():
        _logger.warning(
            "%s %s: %s rounded, by %.1f %% (root mean square)",
            setting,
            getattr(config, setting),
            parts[setting],
            100 * error,
        )


def config_in_use(core: _core.DecodeConfig, settings: DecodeConfig) -> DecodeConfig:
    """The engine's values of the settings, every automatic one filled in."""
    layers: dict[str, Any] = {name: tuple(getattr(core, name)) or None for name in LAYER_FIELDS}
    values = {
        field.name: getattr(core, field.name)
        for field in fields(DecodeConfig)
        if field.name not in ("load_format", "attention", "verify", *LAYER_FIELDS)
    }
    for name in _ZERO_IS_AUTO:
        values[name] = values[name] or None
    return DecodeConfig(
        load_format=settings.load_format,
        attention="tidal" if any(layers.values()) else "full",
        verify=settings.verify or False,
        **layers,
        **values,
    )
