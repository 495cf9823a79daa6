"""Writes small GGUF files, as llama.cpp's converter would, for the tests of tools/.

Written after ggml's docs/gguf.md and llama.cpp's convert_hf_to_gguf.py; shares no code with tools/.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripted_model import CHAT_TEMPLATE, byte_letters
from tiny_models import TinyModel

NORMAL, CONTROL = 1, 3
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
_ALIGNMENT = 32
_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}


class Float32(float):
    """A number that is written with 32 bits."""


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, np.ndarray]]
) -> Path:
    """Writes a file.

    Args:
        tensors: by name their type and values, [rows, columns] or [columns] float32.
    """
    header, data = bytearray(), bytearray()
    for name, (kind, values) in tensors.items():
        header += _string(name) + struct.pack("<I", values.ndim)
        header += struct.pack(f"<{values.ndim}Q", *reversed(values.shape))
        header += struct.pack("<IQ", kind, len(data))
        data += quantize(values, kind)
        data += bytes(-len(data) % _ALIGNMENT)
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    start += b"".join(_string(key) + _typed(value) for key, value in metadata.items())
    start += bytes(header)
    path.write_bytes(start + bytes(-len(start) % _ALIGNMENT) + data)
    return path


def quantize(values: np.ndarray, kind: int) -> bytes:
    """Blocks of a tensor; values that the type can hold come back unchanged."""
    if kind in (F32, F16):
        return values.astype("<f4" if kind == F32 else "<f2").tobytes()
    blocks = bytearray()
    for block in values.reshape(-1, 32).astype(np.float64):
        if kind == Q8_0:
            scale = np.float16(np.abs(block).max() / 127)
            blocks += scale.tobytes() + np.rint(block / float(scale)).astype("i1").tobytes()
            continue
        least = np.float16(block.min())
        scale = np.float16((block.max() - block.min()) / 15)
        steps = np.rint((block - float(least)) / float(scale)).clip(0, 15).astype("u1")
        blocks += scale.tobytes() + least.tobytes() + (steps[:16] | steps[16:] << 4).tobytes()
    return bytes(blocks)


def llama_metadata(model: TinyModel) -> dict[str, Any]:
    """The metadata of a tiny llama with a byte-level tokenizer."""
    tokens = [*byte_letters(), "<s>", "</s>"]
    tokens += [f"<unused{i}>" for i in range(len(tokens), model.vocab_size - 1)] + ["Ġt"]
    types = [NORMAL] * 256 + [CONTROL] * (model.vocab_size - 257) + [NORMAL]
    return {
        "general.architecture": "llama",
        "llama.block_count": model.num_layers,
        "llama.context_length": model.positions,
        "llama.embedding_length": model.hidden_size,
        "llama.feed_forward_length": model.intermediate_size,
        "llama.attention.head_count": model.num_q_heads,
        "llama.attention.head_count_kv": model.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": Float32(1e-5),
        "llama.rope.freq_base": Float32(10000.0),
        "llama.rope.dimension_count": model.head_dim,
        "llama.vocab_size": model.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["Ġ t"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def llama_tensors(
    model: TinyModel, weights: Mapping[str, np.ndarray], kind: int
) -> dict[str, tuple[int, np.ndarray]]:
    """Weights of a tiny llama, matrices in a type of choice; everything else in float32."""
    tensors = {}
    for name, values in weights.items():
        parts = name.split(".")
        if parts[1] == "layers":
            short = f"blk.{parts[2]}.{_PARTS['.'.join(parts[3:-1])]}.weight"
        else:
            short = _TOP[parts[1]] if parts[0] == "model" else "output.weight"
        heads = {"q_proj": model.num_q_heads, "k_proj": model.num_kv_heads}.get(parts[-2])
        if heads is not None:
            values = interleave(values, heads)
        tensors[short] = (kind if values.ndim == 2 else F32, values.astype(np.float32))
    return tensors


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp rotates them: row i of a head, then row i + d/2, then i + 1."""
    half = weight.shape[0] // heads // 2
    order = [h * 2 * half + i + j * half for h in range(heads) for i in range(half) for j in (0, 1)]
    return weight[order]


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    """A metadata value behind its type's number."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, Float32):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
