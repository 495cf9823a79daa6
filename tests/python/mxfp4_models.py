"""Tiny gpt-oss checkpoints with their experts in MXFP4, written and decoded by numpy alone.

A block of 32 numbers has one scale, a power of 2; a number is 4 bits. Source: OCP Microscaling
Formats 1.0, sections 5.3.3, 5.4 and 6.3.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from quantized_models import Kind, Tensors, write_quantized
from tiny_models import TinyModel, encode, random_weights, round_to, write_checkpoint

LEFT_OUT = [
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
]
MXFP4 = Kind("MXFP4", {"quant_method": "mxfp4", "modules_to_not_convert": LEFT_OUT}, "mxfp4")
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([MAGNITUDES, -MAGNITUDES])


def to_mxfp4(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., n] numbers -> blocks [..., n / 32, 16], scales [..., n / 32]."""
    groups = matrices.reshape(*matrices.shape[:-1], -1, 32)
    exponents = np.floor(np.log2(np.abs(groups).max(axis=-1))) - 2
    scaled = groups / np.exp2(exponents)[..., None]
    codes = np.abs(scaled[..., None] - VALUES).argmin(axis=-1).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).astype(np.uint8)


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What to_mxfp4() wrote."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = VALUES[codes] * np.exp2(scales.astype(np.float32) - 127)[..., None]
    return values.reshape(*scales.shape[:-1], -1)


def stored_and_meant(model: TinyModel) -> tuple[Tensors, dict[str, np.ndarray]]:
    """A checkpoint with its experts in MXFP4, and the same in its dtype, in which it is exact."""
    stored: Tensors = {}
    meant: dict[str, np.ndarray] = {}
    name_of, bits = {
        "bfloat16": ("BF16", np.uint16),
        "float16": ("F16", np.uint16),
        "float32": ("F32", np.uint32),
    }[model.dtype]
    for name, value in random_weights(model).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed = np.frombuffer(encode(value, model.dtype), bits).reshape(value.shape)
            stored[name], meant[name] = (name_of, packed), value
            continue
        blocks, scales = to_mxfp4(value.swapaxes(1, 2))
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = ("U8", blocks), ("U8", scales)
        meant[name] = from_mxfp4(blocks, scales).swapaxes(1, 2)
        assert np.array_equal(round_to(meant[name], model.dtype), meant[name])
    return stored, meant


def write_both_mxfp4(folder: Path, model: TinyModel) -> tuple[Path, Path]:
    """A folder with the experts in MXFP4, and the same model without."""
    stored, meant = stored_and_meant(model)
    return (
        write_quantized(folder / "mxfp4", model, MXFP4, stored),
        write_checkpoint(folder / "plain", model, meant),
    )
