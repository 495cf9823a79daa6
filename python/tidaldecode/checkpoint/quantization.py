"""quantization_config in config.json: how the matrices of a quantised model are stored.

Called by model_config.py. What would change a value and is not known here is refused by name.
Source: transformers 5.24 (utils/quantization_config.py, quantizers/quantizers_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidaldecode.checkpoint.compressed_tensors import read_compressed_tensors
from tidaldecode.checkpoint.fields import read_bool
from tidaldecode.checkpoint.module_names import PartialNames
from tidaldecode.checkpoint.quant_scheme import (
    MXFP4_GROUP,
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

SUPPORTED = (
    "compressed-tensors (float-quantized and int-quantized in 8 bits, pack-quantized in 4 and 8), "
    "fp8, awq (4 bits, gemm), gptq (4 bits) and mxfp4"
)


def read_quantization(raw: Mapping[str, Any], where: str) -> Quantization | None:
    """quantization_config of a config.json (compression_config in older files); None without one.

    Args:
        raw: all of config.json.
        where: the file, for messages.

    Raises: ConfigError for what is not supported, naming it and what is.
    """
    key = "quantization_config"
    if raw.get(key) is None:
        key = "compression_config"
    config = raw.get(key)
    if config is None:
        return None
    where = f"{where}: {key}"
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: got {show(config)}, expected an object")
    method = config.get("quant_method")
    readers = {
        "compressed-tensors": read_compressed_tensors,
        "fp8": _read_fp8,
        "awq": _read_awq,
        "gptq": _read_gptq,
        "mxfp4": _read_mxfp4,
    }
    if not isinstance(method, str) or method not in readers:
        raise ConfigError(
            f"{where}: quant_method: got {show(method)}, supported are {SUPPORTED}; "
            f"{OTHER_CHECKPOINT}"
        )
    return readers[method](config, where)


_FP8_KEYS = frozenset(
    "quant_method activation_scheme weight_block_size modules_to_not_convert ignored_layers "
    "modules_to_convert dequantize fmt scale_fmt expert_dtype is_checkpoint_fp8_serialized".split()
)


def _read_fp8(config: Mapping[str, Any], where: str) -> Quantization:
    expect(config, "activation_scheme", ("dynamic", "static"), where)
    expect(config, "fmt", ("e4m3", "float8_e4m3fn"), where)
    block: tuple[int | None, int | None] = (128, 128)
    if config.get("weight_block_size") is not None:
        block = read_block(config["weight_block_size"], "weight_block_size", where)
    elif "weight_block_size" in config:
        block = (None, None)
    scheme = QuantScheme(
        format="float8",
        block=block,
        may_have_one_scale="weight_block_size" not in config,
        activations=config.get("activation_scheme") or "dynamic",
    )
    ignored = read_names(config, "modules_to_not_convert", where)
    ignored += read_names(config, "ignored_layers", where)
    return Quantization(
        method="fp8",
        groups=(QuantGroup(targets=(), scheme=scheme),),
        ignored=PartialNames.read(ignored, f"{where}: modules_to_not_convert"),
        notes=notes_on_unknown(config, _FP8_KEYS, where),
    )


_AWQ_KEYS = frozenset(
    "quant_method bits group_size zero_point version format backend modules_to_not_convert do_fuse "
    "fuse_max_seq_len modules_to_fuse exllama_config".split()
)


def _read_awq(config: Mapping[str, Any], where: str) -> Quantization:
    expect(config, "bits", (4,), where)
    expect(config, "zero_point", (True,), where)
    for key in ("version", "format"):
        value = config.get(key)
        expect({key: value.lower()} if isinstance(value, str) else config, key, ("gemm",), where)
    if config.get("backend") == "llm-awq":
        raise ConfigError(f"{where}: backend: got 'llm-awq', whose layout is not supported")
    scheme = QuantScheme(
        format="int4_awq", block=(1, read_group_size(config, where, 128)), has_zeros=True
    )
    ignored = read_names(config, "modules_to_not_convert", where)
    return Quantization(
        method="awq",
        groups=(QuantGroup(targets=(), scheme=scheme),),
        ignored=PartialNames.read(ignored, f"{where}: modules_to_not_convert"),
        notes=notes_on_unknown(config, _AWQ_KEYS, where),
    )


# What is known of GPTQ's settings: those that say how it was made count for nothing here.
_GPTQ_KEYS = frozenset(
    "quant_method bits group_size desc_act sym checkpoint_format format pack_dtype dynamic lm_head "
    "rotation adapter is_marlin_format tokenizer dataset damp_percent damp_auto_increment "
    "act_group_aware true_sequential static_groups meta quantizer backend model_seqlen "
    "block_name_to_quantize module_name_preceding_first_block batch_size pad_token_id "
    "max_input_length cache_block_outputs modules_in_block_to_quantize use_exllama use_cuda_fp16 "
    "disable_exllama exllama_config model_name_or_path model_file_base_name mse".split()
)


def _read_gptq(config: Mapping[str, Any], where: str) -> Quantization:
    if config.get("bits") is None:
        raise ConfigError(f"{where}: bits is missing; supported is 4")
    expect(config, "bits", (4,), where)
    expect(config, "pack_dtype", ("int32",), where)
    refuse_unless_empty(config, ("rotation", "adapter", "is_marlin_format"), where)
    _check_rules(config, where)
    read_bool(config, "sym", where=where, default=True)
    key = "checkpoint_format" if config.get("checkpoint_format") is not None else "format"
    expect(config, key, ("gptq", "gptq_v2"), where)
    scheme = QuantScheme(
        format="int4_gptq",
        block=(1, read_group_size(config, where, 128)),
        has_zeros=True,
        # The first format stores a zero point less one.
        zero_offset=0 if config.get(key) == "gptq_v2" else 1,
        has_order=read_bool(config, "desc_act", where=where, default=False),
    )
    return Quantization(
        method="gptq",
        groups=(QuantGroup(targets=(), scheme=scheme),),
        notes=notes_on_unknown(config, _GPTQ_KEYS, where),
    )


def _check_rules(config: Mapping[str, Any], where: str) -> None:
    """Refuses rules that store some modules otherwise ({pattern: settings}).

    Those that leave modules as they are ("-:pattern") change nothing: their tensors show it.
    """
    rules = config.get("dynamic")
    if not isinstance(rules, dict):
        refuse_unless_empty(config, ("dynamic",), where)
        return
    for pattern, settings in rules.items():
        if not pattern.startswith("-:") and settings not in (None, True, {}):
            raise ConfigError(
                f"{where}: dynamic: {show(pattern)}: got {show(settings)}, supported is one way to "
                f"store all modules that are quantised; {OTHER_CHECKPOINT}"
            )


_MXFP4_KEYS = frozenset("quant_method modules_to_not_convert dequantize".split())


def _read_mxfp4(config: Mapping[str, Any], where: str) -> Quantization:
    ignored = read_names(config, "modules_to_not_convert", where)
    scheme = QuantScheme(format="mxfp4", block=(1, MXFP4_GROUP))
    return Quantization(
        method="mxfp4",
        groups=(QuantGroup(targets=(), scheme=scheme),),
        ignored=PartialNames.read(ignored, f"{where}: modules_to_not_convert"),
        notes=notes_on_unknown(config, _MXFP4_KEYS, where),
    )
