"""The bytes that a decode step cannot avoid reading, and the time that takes: its floor."""

from __future__ import annotations

from dataclasses import dataclass

from tidaldecode import DecodeConfig
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.plan_bytes import VALUE_BYTES, plan_kv_bytes, row_bytes

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

    weights = layers x (qkv + o + MLP or its experts + norms) + last norm + lm_head
              + batch embedding rows
    KV      = batch x sum over layers of what a layer of that kind reads (plan_bytes.py).

    Every weight is read once for the whole batch; of experts those that tokens which choose at
    random have. Left out: what is written (the new token's K and V, scores, activations) and
    everything small that stays in a cache.

    Args:
        plan: one letter per layer, as the step runs it.
        context: tokens of each sequence in the cache, the newest included.
    """
    share = model.experts_per_token / model.num_experts if model.num_experts else 0.0
    read_experts = round(model.num_experts * (1.0 - (1.0 - share) ** batch_size))
    embedding = batch_size * model.hidden_size * VALUE_BYTES[config.dtype]
    tables = embedding + _head_bytes(model, config.dtype, config.lm_head_format)
    return StepBytes(
        weights=tables + _layers_bytes(model, config.dtype, config.weight_format, read_experts),
        kv=batch_size * plan_kv_bytes(model, config, plan, context, config.kv_dtype),
    )


# Bytes of a weight that is random or was rounded (weight_format, lm_head_format), with its share of
# the scales: those of rows count for next to nothing.
_CODED_BYTES = {"fp8": 1.0, "int4": 0.5 + 2 / 128}
_EXPERT_BYTES = _CODED_BYTES | {"mxfp4": 0.5 + 1 / 32}  # likewise, of experts


def _head_bytes(model: ModelConfig, dtype: str, lm_head_format: str) -> int:
    number = _CODED_BYTES.get(lm_head_format, VALUE_BYTES[dtype])
    return round(model.vocab_size * model.hidden_size * number)


def _layers_bytes(model: ModelConfig, dtype: str, weight_format: str, num_experts: int) -> int:
    """All layers, of which those with experts have so many, and the last norm."""
    number = VALUE_BYTES[dtype]
    norm_number = number if model.norm_offset == 0.0 else 4
    hidden, inner = model.hidden_size, model.intermediate_size
    q_size, kv_size = model.num_q_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = hidden * (2 * q_size + 2 * kv_size)
    biases = q_size + 2 * kv_size if model.qkv_bias else 0
    biases += hidden if model.o_bias else 0
    norms = 2 * hidden * (model.input_norms + model.branch_norms)
    if model.qk_norm:
        norms += q_size + kv_size if model.wide_qk_norm else 2 * model.head_dim
    matrices, experts, corrections, small = 0, 0, 0, model.num_layers * biases
    for has_experts in expert_layers(model):
        matrices += attention
        if has_experts:
            experts += 3 * num_experts * hidden * model.expert_intermediate_size
            matrices += 3 * hidden * model.shared_expert_size
            small += (model.num_experts + model.shared_expert_gate) * hidden  # the router
            corrections += model.num_experts if model.router_correction else 0
            if model.mlp_bias:
                of_expert = 2 * model.expert_intermediate_size + hidden
                small += model.num_experts + num_experts * of_expert
        else:
            matrices += 3 * hidden * inner
            small += 2 * inner + hidden if model.mlp_bias else 0
    sinks = 4 * model.num_layers * model.num_q_heads if model.attention_sinks else 0
    norm_bytes = (model.num_layers * norms + hidden) * norm_number
    matrix_bytes = round(
        matrices * _CODED_BYTES.get(weight_format, number)
        + experts * _EXPERT_BYTES.get(weight_format, number)
    )
    return matrix_bytes + small * number + norm_bytes + sinks + 4 * corrections


def expert_layers(model: ModelConfig) -> list[bool]:
    """Layer by layer, whether its MLP is one of experts."""
    return [layer.has_experts for layer in model.layers] or [False] * model.num_layers


def loaded_bytes(
    model: ModelConfig, dtype: str, weight_format: str = "auto", lm_head_format: str = "auto"
) -> int:
    """All weights in memory: those of a step, and the embedding table if it is one of its own."""
    embedding = model.vocab_size * model.hidden_size * VALUE_BYTES[dtype]
    is_head = model.tie_word_embeddings and lm_head_format not in _CODED_BYTES
    head = 0 if is_head else _head_bytes(model, dtype, lm_head_format)
    return embedding + head + _layers_bytes(model, dtype, weight_format, model.num_experts)


def kv_bytes_per_token(model: ModelConfig, kv_dtype: str) -> int:
    """Keys and values of one token in all layers."""
    return model.num_layers * row_bytes(model, kv_dtype)
