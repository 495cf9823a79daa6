"""Blocks of quantised GGUF weights, and the float32 values they stand for.

Used by gguf_file.py. Each type is a numpy record of one block and a function from blocks to values;
layouts are those of ggml (ggml-common.h, ggml-quants.c: dequantize_row_*).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Quant:
    """One way to store weights."""

    name: str
    num_values: int  # values a block stands for; a row is whole blocks
    block: np.dtype  # layout of a block, little endian
    values: Callable[[np.ndarray], np.ndarray]  # [n] blocks -> [n, num_values] float32

    def dequantize(self, data: np.ndarray) -> np.ndarray:
        """Values of whole blocks: [n * block bytes] uint8 -> [n * num_values] float32."""
        return self.values(data.view(self.block)).reshape(-1)


def _plain(blocks: np.ndarray) -> np.ndarray:
    return blocks.astype(np.float32)[:, None]


def _column(field: np.ndarray) -> np.ndarray:
    """A number per block as a column: [n] -> [n, 1] float32."""
    return field.astype(np.float32)[:, None]


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """All low halves, then all high ones: [..., n] uint8 -> [..., 2 n] uint8."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _column(blocks["scale"]) * _nibbles(blocks["low"]) + _column(blocks["least"])


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    fifth = np.unpackbits(blocks["high"], axis=-1, bitorder="little")
    steps = (_nibbles(blocks["low"]) | fifth << 4).astype(np.float32) - 16
    return _column(blocks["scale"]) * steps


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _column(blocks["scale"]) * blocks["steps"]


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """Eight groups of 32 values, each with a scale and an offset of six bits.

    Of the twelve packed bytes the first four hold the scales of groups 0 to 3, the next four their
    offsets; the two top bits of each belong to the group four later, whose low bits are in the last
    four bytes.
    """
    first, second, low = np.split(blocks["scales"], 3, axis=-1)
    scales = np.concatenate([first & 63, low & 15 | first >> 6 << 4], axis=-1)
    offsets = np.concatenate([second & 63, low >> 4 | second >> 6 << 4], axis=-1)
    scale = (_column(blocks["scale"]) * scales)[:, :, None]
    offset = (_column(blocks["offset"]) * offsets)[:, :, None]
    steps = _nibbles(blocks["low"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (scale * steps - offset).reshape(-1, 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """Sixteen groups of 16 values, each with a scale; 128 values share a run of packed bytes."""
    low = _nibbles(blocks["low"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    pairs = blocks["high"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    steps = (low | (pairs & 3) << 4).astype(np.float32) - 32
    scale = (_column(blocks["scale"]) * blocks["scales"])[:, :, None]
    return (scale * steps.reshape(-1, 16, 16)).reshape(-1, 256)


# By the number a GGUF file names a type with (ggml_type).
QUANTS = {
    0: Quant("F32", 1, np.dtype("<f4"), _plain),
    1: Quant("F16", 1, np.dtype("<f2"), _plain),
    3: Quant(
        "Q4_1",
        32,
        np.dtype([("scale", "<f2"), ("least", "<f2"), ("low", "u1", 16)]),
        _q4_1,
    ),
    6: Quant(
        "Q5_0",
        32,
        np.dtype([("scale", "<f2"), ("high", "u1", 4), ("low", "u1", 16)]),
        _q5_0,
    ),
    8: Quant("Q8_0", 32, np.dtype([("scale", "<f2"), ("steps", "i1", 32)]), _q8_0),
    12: Quant(
        "Q4_K",
        256,
        np.dtype([("scale", "<f2"), ("offset", "<f2"), ("scales", "u1", 12), ("low", "u1", 128)]),
        _q4_k,
    ),
    14: Quant(
        "Q6_K",
        256,
        np.dtype([("low", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("scale", "<f2")]),
        _q6_k,
    ),
}
