"""A Hugging Face model folder out of a GGUF file, in the layout of the model it was made from.

Used by public_models.py. Weights are dequantised to bfloat16 and written as they are read, so that
memory does not grow with the model. Architectures: llama and gemma3. What the file holds and this
does not know is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gguf_file import GgufError, GgufFile, GgufTensor
from gguf_tokenizer import GgufTokenizer

_ROWS_VALUES = 8 * 1024 * 1024  # values that are in memory at once: 32 MiB of float32
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_SHARED_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_NAMES = _SHARED_NAMES | {"ffn_norm": "post_attention_layernorm"}
_GEMMA3_NAMES = _SHARED_NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

Json = dict[str, Any]


def write_folder(source: Path, folder: Path, max_shard_bytes: int | None = None) -> None:
    """Writes config, tokenizer and weights of a GGUF file into an empty folder.

    Args:
        source: the GGUF file.
        folder: an existing folder.
        max_shard_bytes: most bytes of weights a file holds, if a tensor alone is not larger; None
            is one file for all.

    Raises: GgufError; OSError.
    """
    gguf = GgufFile(source)
    name = gguf.metadata.get("general.architecture")
    architecture = _ARCHITECTURES.get(name)
    if architecture is None:
        expected = " or ".join(_ARCHITECTURES)
        raise GgufError(f"{source}: general.architecture: got {name!r}, expected {expected}")
    prefix = f"{name}."
    values = {k.removeprefix(prefix): v for k, v in gguf.metadata.items() if k.startswith(prefix)}
    shape = _Shape(values)
    tokenizer = GgufTokenizer(gguf.metadata)
    tensors = [_Tensor(tensor, architecture, shape) for tensor in gguf.tensors]
    config = architecture.config(shape) | {
        "vocab_size": _vocab_size(gguf, tokenizer),
        "tie_word_embeddings": all(t.name != "lm_head.weight" for t in tensors),
        "torch_dtype": "bfloat16",
    }
    shape.check_all_used()
    ids = {f"{n}_token_id": tokenizer.special_id(n) for n in ("bos", "eos", "pad")}
    ids = {key: value for key, value in ids.items() if value is not None}
    files = {
        "config.json": config | ids,
        "generation_config.json": ids,
        "tokenizer.json": tokenizer.tokenizer_json(),
        "tokenizer_config.json": tokenizer.tokenizer_config(config["max_position_embeddings"]),
        "special_tokens_map.json": tokenizer.special_tokens_map(),
    }
    for file, content in files.items():
        _write_json(folder / file, content)
    _write_weights(folder, tensors, max_shard_bytes)


class _Shape:
    """An architecture's metadata, and which of them have been used."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self._unused = set(values)

    def take(self, key: str, default: Any = None) -> Any:
        """A value; without a default it must be there."""
        self._unused.discard(key)
        value = self._values.get(key, default)
        if value is None:
            raise GgufError(f"{key}: it is missing")
        return value

    def number(self, key: str) -> float:
        """A 32-bit float as the short decimal that was meant: 1e-05, not 9.99999974e-06."""
        return float(str(np.float32(self.take(key))))

    def head_dim(self) -> int:
        """Values of a head; keys, values and rotation must agree on it."""
        heads = self.take("attention.head_count")
        head_dim = self.take("attention.key_length", self.take("embedding_length") // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.take(key, head_dim) != head_dim:
                raise GgufError(f"{key}: got {self.take(key)}, expected {head_dim} as for keys")
        return head_dim

    def check_all_used(self) -> None:
        """Raises: GgufError naming what nobody asked for: the model may need it."""
        if self._unused - {"vocab_size"}:  # said by the tokenizer and the embedding
            raise GgufError(f"not known here: {', '.join(sorted(self._unused))}")


def _shared_config(shape: _Shape) -> Json:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": shape.head_dim(),
        "hidden_size": shape.take("embedding_length"),
        "initializer_range": 0.02,
        "intermediate_size": shape.take("feed_forward_length"),
        "max_position_embeddings": shape.take("context_length"),
        "num_attention_heads": shape.take("attention.head_count"),
        "num_hidden_layers": shape.take("block_count"),
        "num_key_value_heads": shape.take("attention.head_count_kv"),
        "rms_norm_eps": shape.number("attention.layer_norm_rms_epsilon"),
        "rope_scaling": None,
        "rope_theta": shape.number("rope.freq_base"),
        "use_cache": True,
    }


def _llama_config(shape: _Shape) -> Json:
    return _shared_config(shape) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "mlp_bias": False,
    }


def _gemma3_config(shape: _Shape) -> Json:
    """What a GGUF file does not say is the same in all models of the family."""
    shared = _shared_config(shape)
    period = 6  # five layers with a window, then one without
    kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
    return shared | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shared["head_dim"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": shape.take("attention.sliding_window"),
        "_sliding_window_pattern": period,
        "layer_types": [kinds[i % period] for i in range(shared["num_hidden_layers"])],
        "rope_local_base_freq": 10000.0,
    }


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp stores a family of models."""

    layer_names: dict[str, str]  # of a layer's parts: llama.cpp's to Hugging Face's
    config: Callable[[_Shape], Json]
    rotary_is_interleaved: bool  # pairs (i, i + d/2) of q and k rows lie side by side
    norm_offset: float  # what llama.cpp has added to the weights of norms


_ARCHITECTURES = {
    "llama": _Architecture(_LLAMA_NAMES, _llama_config, True, 0.0),
    "gemma3": _Architecture(_GEMMA3_NAMES, _gemma3_config, False, 1.0),
}


class _Tensor:
    """A weight under its Hugging Face name."""

    def __init__(self, source: GgufTensor, architecture: _Architecture, shape: _Shape) -> None:
        self._source = source
        self.name = _hugging_face_name(source.name, architecture)
        self.shape = source.shape
        self.num_bytes = 2 * source.num_rows * source.shape[-1]
        is_rotated = source.name.endswith((".attn_q.weight", ".attn_k.weight"))
        is_interleaved = architecture.rotary_is_interleaved and is_rotated
        self._head_dim = shape.head_dim() if is_interleaved else None
        self._offset = architecture.norm_offset if "norm" in source.name else 0.0

    def chunks(self) -> Iterator[np.ndarray]:
        """The values, some rows at a time, as bits of bfloat16: [rows, columns] uint16 each."""
        step = max(1, _ROWS_VALUES // self.shape[-1])
        if self._head_dim is not None:
            step = max(1, step // self._head_dim) * self._head_dim  # whole heads
        for start in range(0, self._source.num_rows, step):
            rows = self._source.rows(start, min(start + step, self._source.num_rows))
            if self._head_dim is not None:
                pairs = rows.reshape(-1, self._head_dim // 2, 2, rows.shape[-1])
                rows = np.ascontiguousarray(pairs.swapaxes(1, 2))
            yield _bfloat16_bits(rows - np.float32(self._offset), self.name)


def _hugging_face_name(name: str, architecture: _Architecture) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in architecture.layer_names:
        raise GgufError(f"{name}: a tensor of this name is not known here")
    return f"model.layers.{match[1]}.{architecture.layer_names[match[2]]}.weight"


def _bfloat16_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Rounds float32 to the nearest bfloat16, ties to even: [...] uint16."""
    if not np.isfinite(values).all():
        raise GgufError(f"{name}: not all values are finite")
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def _vocab_size(gguf: GgufFile, tokenizer: GgufTokenizer) -> int:
    rows = {t.name: t.shape[0] for t in gguf.tensors}.get("token_embd.weight")
    if rows != tokenizer.num_tokens:
        raise GgufError(f"token_embd.weight: {rows} rows, expected {tokenizer.num_tokens} (tokens)")
    return rows


def _write_weights(folder: Path, tensors: list[_Tensor], max_shard_bytes: int | None) -> None:
    shards: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        size = sum(t.num_bytes for t in shards[-1]) + tensor.num_bytes
        if shards[-1] and max_shard_bytes is not None and size > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if max_shard_bytes is None:
        _write_safetensors(folder / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_safetensors(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, tensors: list[_Tensor]) -> None:
    """Writes a file tensor by tensor; safetensors' own writer wants all of them in memory."""
    header: Json = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            _write_tensor(file, tensor)


def _write_tensor(file: BinaryIO, tensor: _Tensor) -> None:
    for chunk in tensor.chunks():
        file.write(chunk.tobytes())


def _write_json(path: Path, content: Json) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
