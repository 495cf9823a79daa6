"""The model families: what a `model_type` means beyond the fields that all share.

Used by model_config.py and tensor_names.py. A family is data: transformers' defaults of the fields
that a config may leave out, where its biases come from, and how its tensors are named. What it
computes is in the fields of ModelConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`. A bias is there always, never, or as a field of config.json says."""

    num_key_value_heads: int | None = None  # if config.json does not say; None: one a query head
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int | None = None  # of scaled rope; None: the length itself
    head_dim: int | None = None  # None: hidden_size over heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_types: Mapping[str, str] = field(default_factory=dict)  # other names of them
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # the field, if config.json does not say
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    branch_norms: bool = False
    partial_rotary_factor: float | None = None  # if config.json does not say; None: no such field
    has_interleaved_rotation: bool = False
    # A sliding window, which must not be in use: the field that switches it on, if there is one;
    # sliding_window and max_window_layers (0: no such field) if config.json does not say.
    has_window: bool = False
    window_switch: str | None = None
    sliding_window: int | None = None
    max_window_layers: int = 0
    intermediate_size: str = "intermediate_size"  # the field
    # Granite's: embedding_multiplier, residual_multiplier, attention_multiplier, logits_scaling.
    has_multipliers: bool = False
    # SmolLM3's: no_rope_layers, no_rope_layer_interval.
    has_layers_without_rope: bool = False
    # Granite 4's: layers of other kinds and experts, there if config.json does not say; and
    # position_embedding_type, without which nothing is rotated.
    is_hybrid: bool = False
    full_attention: tuple[str, ...] = ("full_attention",)  # names in layer_types
    # Parts of a layer under other names than the engine's, and those that are stacked in one.
    renamed: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# Models of text and images: `text_config` says what the text part is, which is used alone. What is
# of the whole folder stands beside it.
WRAPPERS = ("mistral3",)
BESIDE_TEXT_CONFIG = (
    "_name_or_path", "auto_map", "dtype", "torch_dtype", "eos_token_id", "quantization_config",
    "tie_word_embeddings",
)  # fmt: skip

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(
        num_key_value_heads=8,
        max_position_embeddings=131072,
        has_window=True,
        sliding_window=4096,
    ),
    "qwen2": Family(
        num_key_value_heads=32,
        max_position_embeddings=32768,
        qkv_bias=True,
        has_window=True,
        window_switch="use_sliding_window",
        sliding_window=4096,
        max_window_layers=28,
    ),
    "qwen3": Family(
        num_key_value_heads=32,
        max_position_embeddings=32768,
        head_dim=128,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        has_window=True,
        window_switch="use_sliding_window",
        sliding_window=4096,
        max_window_layers=28,
    ),
    "granite": Family(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        has_multipliers=True,
    ),
    "granitemoehybrid": Family(  # Granite 4, those without experts and state-space layers
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        intermediate_size="shared_intermediate_size",
        has_multipliers=True,
        is_hybrid=True,
        full_attention=("full_attention", "attention"),
        renamed={"shared_mlp.output_linear": "mlp.down_proj"},
        stacked={"shared_mlp.input_linear": _GATE_UP},
    ),
    "smollm3": Family(
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_theta=2000000.0,
        tie_word_embeddings=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        has_window=True,
        window_switch="use_sliding_window",
        has_layers_without_rope=True,
    ),
    "seed_oss": Family(
        num_key_value_heads=8,
        max_position_embeddings=524288,
        head_dim=128,
        attention_bias=True,
        qkv_bias="attention_bias",
        o_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
    "phi3": Family(  # Phi-3, 3.5 and 4
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_types={"su": "longrope", "yarn": "longrope"},
        partial_rotary_factor=1.0,
        has_window=True,
        stacked={"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": _GATE_UP},
    ),
    "glm4": Family(  # GLM-4-0414, dense
        num_key_value_heads=2,
        max_position_embeddings=131072,
        head_dim=128,
        rms_norm_eps=1.5625e-7,
        attention_bias=True,
        qkv_bias="attention_bias",
        branch_norms=True,
        partial_rotary_factor=0.5,
        has_interleaved_rotation=True,
        stacked={"mlp.gate_up_proj": _GATE_UP},
    ),
}
