"""Tiny checkpoints in every quantised format, written and decoded by numpy alone.

A `Kind` is a format with its settings. `quantize` turns a matrix into the tensors a file of this
kind holds, `dequantize` turns those back into numbers: both follow the formats' descriptions
(compressed-tensors, AutoAWQ, AutoGPTQ) and share nothing with the engine.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tiny_models import TinyModel, config_json, encode, random_weights, round_to, write_checkpoint

# A tensor of a file: safetensors' name of its type, and its bits in an array of its shape.
Tensors = dict[str, tuple[str, np.ndarray]]

# Rows 0 to 7 of a word of AWQ, from the lowest bits on.
AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)


def float8_values() -> np.ndarray:
    """[256] float32: what the codes of float8 e4m3fn stand for."""
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        if exponent == 15 and mantissa == 7:
            value = np.nan
        values.append(-value if code & 128 else value)
    return np.array(values, np.float32)


FLOAT8 = float8_values()


def to_float8(values: np.ndarray) -> np.ndarray:
    """The nearest codes; numbers beyond 448 become 448."""
    codes = [code for code in range(256) if not np.isnan(FLOAT8[code]) and code != 128]
    codes.sort(key=lambda code: FLOAT8[code])
    known = FLOAT8[codes]
    place = np.clip(np.searchsorted(known, values), 1, len(known) - 1)
    lower = values - known[place - 1] <= known[place] - values
    return np.array(codes, np.uint8)[np.where(lower, place - 1, place)]


def pack(codes: np.ndarray, order: Iterable[int] = range(8), bits: int = 4) -> np.ndarray:
    """[..., n] numbers -> [..., ceil(n / numbers in a word)] words; order[k]: what lies k-th."""
    in_word = 32 // bits
    spare = -codes.shape[-1] % in_word
    padded = np.pad(codes.astype(np.uint32), [(0, 0)] * (codes.ndim - 1) + [(0, spare)])
    parts = padded.reshape(*codes.shape[:-1], -1, in_word)
    words = np.zeros(parts.shape[:-1], np.uint32)
    for place, index in zip(range(in_word), order, strict=False):
        words |= parts[..., index] << np.uint32(bits * place)
    return words


def unpack(
    words: np.ndarray, count: int, order: Iterable[int] = range(8), bits: int = 4
) -> np.ndarray:
    """The first `count` numbers along the last axis that pack() has put into words."""
    numbers = np.zeros((*words.shape, 32 // bits), np.int64)
    for place, index in zip(range(32 // bits), order, strict=False):
        numbers[..., index] = words >> np.uint32(bits * place) & (2**bits - 1)
    return numbers.reshape(*words.shape[:-1], -1)[..., :count]


def spread(blocks: np.ndarray, shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The value of its block for every element of a matrix."""
    wide = np.repeat(np.repeat(blocks, size[0], axis=0), size[1], axis=1)
    return wide[: shape[0], : shape[1]]


@dataclass(frozen=True)
class Kind:
    """A quantised format with its settings."""

    name: str
    config: dict[str, Any]  # quantization_config
    codes: str  # "float8", "int8", "packed", "awq" or "gptq"
    block: tuple[int, int] = (0, 0)  # rows and columns that share a scale; 0: all
    zeros: bool = False  # whether zero points are stored
    bits: int = 4  # of what is packed
    scale_name: str = "weight_scale"
    scale_dtype: str = "BF16"
    scale_shape: Callable[[np.ndarray], np.ndarray] = lambda scales: scales
    extra: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)

    def block_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self.block[0] or shape[0], self.block[1] or shape[1]

    @property
    def is_transposed(self) -> bool:
        return self.codes in ("awq", "gptq")

    @property
    def stores_zero_less_one(self) -> bool:
        return self.codes == "gptq" and self.config.get("checkpoint_format") != "gptq_v2"


def _float_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    names = {
        "BF16": ("bfloat16", np.uint16),
        "F16": ("float16", np.uint16),
        "F32": ("float32", np.uint32),
    }
    name, bits = names[dtype]
    return np.frombuffer(encode(values, name), bits).reshape(values.shape)


def _float_values(tensor: tuple[str, np.ndarray]) -> np.ndarray:
    dtype, bits = tensor
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def quantize(weight: np.ndarray, kind: Kind) -> Tensors:
    """The tensors a file of this kind holds for a matrix [out, in], by the ends of their names."""
    rows, columns = kind.block_of(weight.shape)
    starts = (range(0, weight.shape[0], rows), range(0, weight.shape[1], columns))
    low, high = (
        np.array([[f(weight[r : r + rows, c : c + columns]) for c in starts[1]] for r in starts[0]])
        for f in (np.min, np.max)
    )
    most = np.maximum(np.abs(low), np.abs(high)) + 1e-6
    largest, middle = 2**kind.bits - 1, 2 ** (kind.bits - 1)  # codes of packed kinds
    steps = {"float8": 448.0, "int8": 127.0}.get(kind.codes, middle - 1.0)
    scales = (high - low + 1e-6) / largest if kind.zeros else most / steps
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    scales = round_to(scales, names[kind.scale_dtype])
    zeros = np.clip(np.rint(-low / scales), 0, largest).astype(np.int64)
    scaled = weight / spread(scales, weight.shape, (rows, columns))
    if kind.codes in ("float8", "int8"):
        codes = to_float8(scaled) if kind.codes == "float8" else np.rint(scaled).astype(np.int8)
        tensors = {"weight": ({"float8": "F8_E4M3", "int8": "I8"}[kind.codes], codes)}
        tensors[kind.scale_name] = (
            kind.scale_dtype, kind.scale_shape(_float_bits(scales, kind.scale_dtype))
        )  # fmt: skip
        return tensors | kind.extra
    zero = spread(zeros, weight.shape, (rows, columns)) if kind.zeros else middle
    codes = np.clip(np.rint(scaled) + zero, 0, largest).astype(np.int64)
    bits = _float_bits(scales, kind.scale_dtype)
    if kind.codes == "packed":
        tensors = {
            "weight_packed": ("I32", pack(codes, bits=kind.bits)),
            "weight_scale": (kind.scale_dtype, bits),
            "weight_shape": ("I64", np.array(weight.shape, np.int64)),
        }
        if kind.zeros:
            tensors["weight_zero_point"] = ("I32", pack(zeros.T, bits=kind.bits).T)
        return tensors | kind.extra
    stored = (zeros - 1) % 16 if kind.stores_zero_less_one else zeros
    order = AWQ_ROWS if kind.codes == "awq" else range(8)
    tensors = {
        "qweight": ("I32", pack(codes.T, AWQ_ROWS) if kind.codes == "awq" else pack(codes).T),
        "qzeros": ("I32", pack(stored.T, order)),
        "scales": (kind.scale_dtype, bits.T),
    }
    if kind.codes == "gptq":
        groups = np.arange(weight.shape[1], dtype=np.int32) // columns
        tensors["g_idx"] = ("I32", groups)
    return tensors | kind.extra


def dequantize(tensors: Tensors, kind: Kind) -> np.ndarray:
    """[out, in] float32: what the tensors of a matrix mean, by the description of their format."""
    scales = _float_values(tensors[{True: "scales"}.get(kind.is_transposed, kind.scale_name)])
    if kind.codes == "float8":
        codes, zero = FLOAT8[tensors["weight"][1]], 0
    elif kind.codes == "int8":
        codes, zero = tensors["weight"][1].astype(np.float32), 0
    elif kind.codes == "packed":
        shape = tensors["weight_shape"][1]
        codes = unpack(tensors["weight_packed"][1], shape[1], bits=kind.bits)
        zero = 2 ** (kind.bits - 1)
        if kind.zeros:
            zero = unpack(tensors["weight_zero_point"][1].T, shape[0], bits=kind.bits).T
    else:
        words, zeros = tensors["qweight"][1], tensors["qzeros"][1]
        if kind.codes == "awq":
            codes = unpack(words, 8 * words.shape[1], AWQ_ROWS).T
            zero = unpack(zeros, 8 * words.shape[1], AWQ_ROWS).T
        else:
            codes = unpack(words.T, 8 * words.shape[0])
            zero = unpack(zeros, words.shape[1]).T
            zero = (zero + 1) % 16 if kind.stores_zero_less_one else zero
        scales = scales.T
    block = kind.block_of(codes.shape)
    sizes = (-(-codes.shape[0] // block[0]), -(-codes.shape[1] // block[1]))
    if kind.zeros:
        zero = spread(zero, codes.shape, block)
    difference = (codes - zero).astype(np.float32)
    return difference * spread(scales.reshape(sizes), codes.shape, block)


def write_safetensors(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {}
    blobs, offset = [], 0
    for name, (dtype, bits) in tensors.items():
        blob = np.ascontiguousarray(bits).tobytes()
        header[name] = {
            "dtype": dtype, "shape": list(bits.shape), "data_offsets": [offset, offset + len(blob)]
        }  # fmt: skip
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def is_projection(name: str) -> bool:
    return name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))


def quantized_tensors(
    model: TinyModel, kind: Kind, chosen: Callable[[str], bool] = is_projection
) -> tuple[Tensors, dict[str, np.ndarray]]:
    """The tensors of a checkpoint whose `chosen` matrices are quantised, and what they all mean."""
    stored: Tensors = {}
    meant = {}
    plain = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[model.dtype]
    for name, value in random_weights(model).items():
        if not chosen(name):
            stored[name] = (plain, _float_bits(value, plain))
            meant[name] = value
            continue
        parts = quantize(value, kind)
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        meant[name] = round_to(dequantize(parts, kind), model.dtype)
    return stored, meant


def write_quantized(
    folder: Path,
    model: TinyModel,
    kind: Kind,
    tensors: Tensors | None = None,
    **config: Any,
) -> Path:
    """A quantised folder. `tensors` replaces its own; `config` replaces fields of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = config_json(model) | {"quantization_config": kind.config} | config
    (folder / "config.json").write_text(json.dumps(settings))
    if tensors is None:
        tensors, _ = quantized_tensors(model, kind)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def write_both(
    folder: Path, model: TinyModel, kind: Kind, chosen: Callable[[str], bool] = is_projection
) -> tuple[Path, Path]:
    """A quantised folder, and the same model as plain weights of `model.dtype`."""
    stored, meant = quantized_tensors(model, kind, chosen)
    return (
        write_quantized(folder / "quantised", model, kind, stored),
        write_checkpoint(folder / "plain", model, meant),
    )


def compressed(
    weights: dict[str, Any], form: str, inputs: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    """quantization_config as compressed-tensors writes it, of one group."""
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "global_compression_ratio": None, "version": "0.20.1", "sparsity_config": {},
        "transform_config": {},
    } | fields  # fmt: skip


def _weights(bits: int, number: str, strategy: str, **fields: Any) -> dict[str, Any]:
    return {
        "num_bits": bits, "type": number, "strategy": strategy, "symmetric": True, "dynamic": False,
        "group_size": None, "block_structure": None, "actorder": None, "observer": "minmax",
        "observer_kwargs": {},
    } | fields  # fmt: skip


PER_TOKEN = _weights(8, "float", "token", dynamic=True)
PER_TENSOR = _weights(8, "float", "tensor")
SCALAR = ("F32", np.float32(0.5).reshape(()).view(np.uint32))


def packed_group(size: int, symmetric: bool, bits: int = 4) -> Kind:
    weights = _weights(bits, "int", "group", group_size=size, symmetric=symmetric)
    return Kind(
        f"int{bits} in groups of {size}{'' if symmetric else ', with zero points'}",
        compressed(weights, "pack-quantized"), "packed", (1, size), not symmetric, bits,
    )  # fmt: skip


def awq(group_size: int) -> Kind:
    config = {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True,
        "version": "gemm", "backend": "autoawq", "modules_to_not_convert": None,
    }  # fmt: skip
    size = max(group_size, 0)
    return Kind(f"AWQ in groups of {group_size}", config, "awq", (1, size), True, scale_dtype="F16")


def gptq(group_size: int, form: str | None, **fields: Any) -> Kind:
    config = {
        "quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False, "sym": True,
        "damp_percent": 0.1, "true_sequential": True, "model_name_or_path": "x", "lm_head": False,
    } | ({} if form is None else {"checkpoint_format": form}) | fields  # fmt: skip
    size = max(group_size, 0)
    return Kind(
        f"GPTQ {form} in groups of {group_size}", config, "gptq", (1, size), True, scale_dtype="F16"
    )


def fp8_blocks(rows: int, columns: int) -> Kind:
    config = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
        "weight_block_size": [rows, columns], "modules_to_not_convert": ["lm_head", "model.norm"],
    }  # fmt: skip
    name = f"fp8 in blocks of {rows} x {columns}"
    return Kind(
        name, config, "float8", (rows, columns), scale_name="weight_scale_inv", scale_dtype="F32"
    )


def _first(scales: np.ndarray) -> np.ndarray:
    return scales.reshape(1)


KINDS = [
    Kind("FP8 dynamic", compressed(_weights(8, "float", "channel"), "float-quantized", PER_TOKEN),
         "float8", (1, 0)),
    Kind("FP8 static", compressed(PER_TENSOR, "float-quantized", PER_TENSOR), "float8",
         scale_dtype="F32", scale_shape=_first, extra={"input_scale": SCALAR}),
    Kind("FP8 in blocks", compressed(
        _weights(8, "float", "block", block_structure=[128, 128]), "float-quantized", PER_TOKEN),
        "float8", (128, 128)),
    Kind("FP8, older name", compressed(PER_TENSOR, "naive-quantized"), "float8",
         scale_shape=_first),
    fp8_blocks(128, 128),
    Kind("fp8 per tensor", {"quant_method": "fp8", "activation_scheme": "static",
                            "weight_block_size": None, "modules_to_not_convert": ["lm_head"]},
         "float8", scale_name="weight_scale_inv", scale_shape=lambda scales: scales.reshape(()),
         extra={"activation_scale": SCALAR}),
    Kind("fp8 of AutoFP8", {"quant_method": "fp8", "activation_scheme": "static",
                            "ignored_layers": ["lm_head"]},
         "float8", scale_dtype="F32", scale_shape=_first, extra={"input_scale": SCALAR}),
    Kind("int8 per channel", compressed(_weights(8, "int", "channel"), "int-quantized", PER_TOKEN),
         "int8", (1, 0)),
    Kind("int8 per tensor", compressed(_weights(8, "int", "tensor"), "int-quantized"), "int8",
         scale_shape=_first, scale_dtype="F16"),
    *[packed_group(size, symmetric) for size in (32, 64, 128) for symmetric in (True, False)],
    packed_group(32, False, bits=8),
    Kind("int8 per channel, packed", compressed(_weights(8, "int", "channel"), "pack-quantized"),
         "packed", (1, 0), bits=8),
    Kind("int4 per channel", compressed(_weights(4, "int", "channel"), "pack-quantized"), "packed",
         (1, 0)),
    Kind("int4 per channel, with zero points",
         compressed(_weights(4, "int", "channel", symmetric=False), "pack-quantized"), "packed",
         (1, 0), zeros=True),
    awq(128), awq(32), awq(-1),
    gptq(128, "gptq"), gptq(32, None), gptq(64, "gptq_v2"), gptq(-1, "gptq", desc_act=True),
]  # fmt: skip
