"""The bytes that a decode step cannot avoid reading, and the time that takes: its floor."""

from __future__ import annotations

from dataclasses import dataclass

from tidaldecode import DecodeConfig
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.plan_bytes import VALUE_BYTES, layer_kv_bytes, row_bytes

# Measured on an H200 (sum over 0.5 GB); its data sheet says 4.8.
H200_READ_TB_PER_S = 4.65


@dataclass(frozen=True)
class StepBytes:
    """What one step of a batch reads at least."""

    weights: int
    kv: int

    def floor_ms(self, tb_per_s: float) -> float:
        """Milliseconds at a read bandwidth."""
        return (self.weights + self.kv) / tb_per_s * 1e-9


def step_bytes(
    model: ModelConfig, config: DecodeConfig, plan: str, context: int, batch_size: int
) -> StepBytes:
    """Weights and keys and values that must be read.

    weights = dtype x (layers x (qkv + o + gate + up + down + norms) + last norm + lm_head
                       + batch embedding rows)
    KV      = batch x sum over layers of what a layer of that kind reads (plan_bytes.py).

    Every weight is read once for the whole batch. Left out: what is written (the new token's K and
    V, scores, activations) and everything small that stays in a cache.

    Args:
        plan: one letter per layer, as the step runs it.
        context: tokens of each sequence in the cache, the newest included.
    """
    hidden = model.hidden_size
    weights = model.num_layers * layer_elements(model)
    weights += hidden + model.vocab_size * hidden + batch_size * hidden
    saved = saved_bytes(model, config.dtype, config.weight_format)
    read = layer_kv_bytes(model, config, context, config.kv_dtype)
    return StepBytes(
        weights=weights * VALUE_BYTES[config.dtype] - saved,
        kv=batch_size * sum(read[letter] for letter in plan),
    )


# Of a matrix of random or rounded weights (weight_format), scales included: those of rows count for
# next to nothing.
_CODED_BYTES = {"fp8": 1.0, "int4": 0.5 + 2 / 128}


def saved_bytes(model: ModelConfig, dtype: str, weight_format: str) -> int:
    """What the layers' matrices take less in the codes of weight_format than in dtype."""
    if weight_format not in _CODED_BYTES:
        return 0
    hidden, inner = model.hidden_size, model.intermediate_size
    q_size, kv_size = model.num_q_heads * model.head_dim, model.num_kv_heads * model.head_dim
    matrices = hidden * (2 * q_size + 2 * kv_size + 3 * inner)
    saved = matrices * (VALUE_BYTES[dtype] - _CODED_BYTES[weight_format])
    return round(model.num_layers * saved)


def layer_elements(model: ModelConfig) -> int:
    """Weights of one layer, norms and biases included."""
    hidden, inner = model.hidden_size, model.intermediate_size
    q_size, kv_size = model.num_q_heads * model.head_dim, model.num_kv_heads * model.head_dim
    elements = (q_size + 2 * kv_size) * hidden + hidden * q_size + 3 * hidden * inner + 2 * hidden
    elements += 2 * model.head_dim if model.qk_norm else 0
    elements += 2 * hidden if model.branch_norms else 0
    elements += q_size + 2 * kv_size if model.qkv_bias else 0
    elements += hidden if model.o_bias else 0
    elements += 2 * inner + hidden if model.mlp_bias else 0
    return elements


def loaded_bytes(model: ModelConfig, dtype: str, weight_format: str = "auto") -> int:
    """All weights in memory: those of a step, and the embedding table if it is one of its own."""
    tables = 1 if model.tie_word_embeddings else 2
    elements = model.num_layers * layer_elements(model) + model.hidden_size
    elements += tables * model.vocab_size * model.hidden_size
    return elements * VALUE_BYTES[dtype] - saved_bytes(model, dtype, weight_format)


def kv_bytes_per_token(model: ModelConfig, kv_dtype: str) -> int:
    """Keys and values of one token in all layers."""
    return model.num_layers * row_bytes(model, kv_dtype)
