"""The model families: what a `model_type` means beyond the fields that all share.

Used by model_config.py and tensor_names.py. A family is data: transformers' defaults of the fields
that a config may leave out, where its biases come from, and how its tensors are named. What it
computes is in the fields of ModelConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Always, never, or as a field of config.json says, which may be absent: never, or as stands here.
Presence = bool | str | tuple[str, bool]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a family: fields of config.json, and what it means if they are not there."""

    num_experts: int
    per_token: int
    size: tuple[str, int | None] = ("moe_intermediate_size", None)
    router_score: str = "softmax"
    has_correction: bool = False
    is_normalized: bool = True
    normalized_field: str | None = None  # that says otherwise
    scale_field: str | None = None
    has_groups: bool = False  # n_group, topk_group
    # An MLP that all tokens have beside them: its size, or how many of theirs it is; and whether
    # it has a gate.
    shared_size: tuple[str, int] | None = None
    shared_count: tuple[str, int] | None = None
    has_shared_gate: bool = False
    # Layers with experts: from the first to the last, every so-manyth, but for some.
    first_layer: tuple[str, int] | None = None
    last_layer_field: str | None = None  # -1: of the model
    step_field: str | None = None
    other_layers_field: str | None = None
    are_transposed: bool = False  # where they lie in one tensor: fused_experts.py


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`."""

    # If config.json does not say; None: it must.
    vocab_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None  # likewise; None: one a query head
    max_position_embeddings: int = 2048
    # Beside rope_parameters; None: what those say, or without that the length itself.
    original_max_position_embeddings: int | None = None
    head_dim: int | None = None  # None: hidden_size over heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_types: Mapping[str, str] = field(default_factory=dict)  # other names of them
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)  # if config.json has none
    has_query_scale: bool = False  # llama_4_scaling_beta
    # Layers with a window rotate by parameters of their own: their base, if config.json does not
    # say, and the field that has it in configs without rope_parameters.
    window_rope_theta: float | None = None
    window_rope_field: str | None = None
    tie_word_embeddings: bool = False
    qkv_bias: Presence = False
    o_bias: Presence = False
    mlp_bias: Presence = False
    input_norms: bool = True
    branch_norms: bool = False
    qk_norm: Presence = False
    wide_qk_norm: bool = False
    norm_offset: float = 0.0
    activation: tuple[str, str] = ("hidden_act", "silu")  # the field, and what absent means
    has_clamped_swiglu: bool = False  # in place of it, with swiglu_limit and swiglu_alpha
    attention_sinks: bool = False
    partial_rotary_factor: float | None = None  # if config.json does not say; None: no such field
    rotary_dim_field: str | None = None  # in place of it
    has_interleaved_rotation: bool = False
    # A sliding window: the field that switches it on, if there is one; sliding_window if
    # config.json does not say; and which layers have it.
    has_window: bool = False
    window_switch: str | None = None
    sliding_window: int | None = None
    has_layer_types: bool = False  # layer_types says which, if it is there
    # Else: those from this field on; 0: no such field. With an interval: those before it.
    max_window_layers: int = 0
    full_layer_interval: int = 0  # else: all but every so-manyth; 0: all of them
    full_layer_field: str | None = None  # that has this interval, where configs give it
    windows_without_rope: bool = False  # else: those without rotation
    intermediate_size: str = "intermediate_size"  # the field
    experts: Experts | None = None
    must_be_false: tuple[str, ...] = ()  # fields of what is not supported
    # Granite's: embedding_multiplier, residual_multiplier, attention_multiplier, logits_scaling.
    has_multipliers: bool = False
    # Gemma's: embeddings times the root of hidden_size, query_pre_attn_scalar; and the soft caps
    # attn_logit_softcapping and final_logit_softcapping, if config.json does not say.
    has_gemma_scales: bool = False
    softcaps: tuple[float, float] = (0.0, 0.0)
    # SmolLM3's: no_rope_layers, no_rope_layer_interval.
    has_layers_without_rope: bool = False
    # Granite 4's: layers of other kinds and experts, there if config.json does not say; and
    # position_embedding_type, without which nothing is rotated.
    is_hybrid: bool = False
    full_attention: tuple[str, ...] = ("full_attention",)  # names in layer_types
    # Parts of a layer under other names than the engine's (* is an expert's number), and those that
    # are stacked in one.
    renamed: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# Models of text and images: `text_config` says what the text part is, which is used alone, and what
# family it has if it does not say. What is of the whole folder stands beside it, and counts before
# what the part says of it.
WRAPPERS = {"mistral3": "mistral", "gemma3": "gemma3_text"}
BESIDE_TEXT_CONFIG = (
    "_name_or_path", "auto_map", "dtype", "torch_dtype", "eos_token_id", "quantization_config",
    "tie_word_embeddings",
)  # fmt: skip

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_MLP_PARTS = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL_NAMES = {
    "block_sparse_moe.gate": "mlp.gate",
    "block_sparse_moe.experts.*.w1": "mlp.experts.*.gate_proj",
    "block_sparse_moe.experts.*.w3": "mlp.experts.*.up_proj",
    "block_sparse_moe.experts.*.w2": "mlp.experts.*.down_proj",
}
_NORMS_OF_BRANCHES = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}
_NORMS_AROUND_BRANCHES = _NORMS_OF_BRANCHES | {
    "pre_feedforward_layernorm": "post_attention_layernorm"
}

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
        has_layer_types=True,
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
        has_layer_types=True,
        max_window_layers=28,
    ),
    "ministral": Family(
        num_key_value_heads=8,
        max_position_embeddings=131072,
        has_window=True,
        sliding_window=4096,
        has_layer_types=True,
    ),
    "ministral3": Family(
        num_key_value_heads=8,
        max_position_embeddings=262144,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        has_query_scale=True,
        has_window=True,
    ),
    "qwen3_moe": Family(
        num_key_value_heads=4,
        max_position_embeddings=32768,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        has_window=True,
        window_switch="use_sliding_window",
        sliding_window=4096,
        experts=Experts(
            num_experts=128,
            per_token=8,
            size=("moe_intermediate_size", 768),
            is_normalized=False,
            normalized_field="norm_topk_prob",
            step_field="decoder_sparse_step",
            other_layers_field="mlp_only_layers",
        ),
    ),
    "qwen2_moe": Family(
        num_key_value_heads=16,
        max_position_embeddings=32768,
        qkv_bias=("qkv_bias", True),
        has_window=True,
        window_switch="use_sliding_window",
        sliding_window=4096,
        has_layer_types=True,
        max_window_layers=28,
        full_layer_interval=2,
        experts=Experts(
            num_experts=60,
            per_token=4,
            size=("moe_intermediate_size", 1408),
            is_normalized=False,
            normalized_field="norm_topk_prob",
            shared_size=("shared_expert_intermediate_size", 5632),
            has_shared_gate=True,
            step_field="decoder_sparse_step",
            other_layers_field="mlp_only_layers",
        ),
        renamed={f"mlp.shared_expert.{part}": f"mlp.shared_experts.{part}" for part in _MLP_PARTS},
    ),
    "glm4_moe": Family(  # GLM-4.5 to 4.7
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        qkv_bias="attention_bias",
        qk_norm="use_qk_norm",
        partial_rotary_factor=0.5,
        experts=Experts(
            num_experts=128,
            per_token=8,
            size=("moe_intermediate_size", 1408),
            router_score="sigmoid",
            has_correction=True,
            normalized_field="norm_topk_prob",
            scale_field="routed_scaling_factor",
            has_groups=True,
            shared_count=("n_shared_experts", 1),
            first_layer=("first_k_dense_replace", 1),
        ),
    ),
    "dots1": Family(
        num_key_value_heads=32,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        has_window=True,
        sliding_window=4096,
        has_layer_types=True,
        max_window_layers=62,
        experts=Experts(
            num_experts=128,
            per_token=6,
            size=("moe_intermediate_size", 1408),
            router_score="sigmoid",
            has_correction=True,
            is_normalized=False,
            normalized_field="norm_topk_prob",
            scale_field="routed_scaling_factor",
            has_groups=True,
            shared_count=("n_shared_experts", 2),
            first_layer=("first_k_dense_replace", 0),
        ),
    ),
    "ernie4_5_moe": Family(
        num_key_value_heads=4,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        has_interleaved_rotation=True,
        must_be_false=("use_bias",),
        experts=Experts(
            num_experts=64,
            per_token=6,
            size=("moe_intermediate_size", 1536),
            has_correction=True,
            shared_count=("moe_num_shared_experts", 2),
            first_layer=("moe_layer_start_index", 1),
            last_layer_field="moe_layer_end_index",
            step_field="moe_layer_interval",
        ),
        renamed={"mlp.moe_statics": "mlp.gate", "mlp.gate.moe_statics": "mlp.gate"},
    ),
    "minimax_m2": Family(
        num_key_value_heads=8,
        max_position_embeddings=196608,
        head_dim=128,
        rope_theta=5000000.0,
        qk_norm=True,
        wide_qk_norm=True,
        partial_rotary_factor=1.0,
        rotary_dim_field="rotary_dim",
        experts=Experts(
            num_experts=256,
            per_token=8,
            size=("intermediate_size", 1536),
            router_score="sigmoid",
            has_correction=True,
        ),
        renamed=_MIXTRAL_NAMES | {"block_sparse_moe": "mlp.gate", "mlp": "mlp.gate"},
    ),
    "mixtral": Family(
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        has_window=True,
        experts=Experts(num_experts=8, per_token=2, size=("intermediate_size", 14336)),
        renamed=_MIXTRAL_NAMES,
    ),
    "gpt_oss": Family(
        vocab_size=201088,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        qkv_bias=("attention_bias", True),
        o_bias=("attention_bias", True),
        mlp_bias=True,
        has_clamped_swiglu=True,
        attention_sinks=True,
        has_window=True,
        sliding_window=128,
        has_layer_types=True,
        full_layer_interval=2,
        experts=Experts(
            num_experts=128,
            per_token=4,
            size=("intermediate_size", 2880),
            are_transposed=True,
        ),
        renamed={"mlp.router": "mlp.gate"},
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
        has_layer_types=True,
        windows_without_rope=True,
        has_layers_without_rope=True,
    ),
    "seed_oss": Family(
        num_key_value_heads=8,
        max_position_embeddings=524288,
        head_dim=128,
        qkv_bias=("attention_bias", True),
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
        qkv_bias=("attention_bias", True),
        branch_norms=True,
        partial_rotary_factor=0.5,
        has_interleaved_rotation=True,
        stacked={"mlp.gate_up_proj": _GATE_UP},
    ),
    "olmo2": Family(
        rms_norm_eps=1e-5,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        input_norms=False,
        branch_norms=True,
        qk_norm=True,
        wide_qk_norm=True,
        renamed=_NORMS_OF_BRANCHES,
    ),
    "olmo3": Family(
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        window_rope_theta=500000.0,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        input_norms=False,
        branch_norms=True,
        qk_norm=True,
        wide_qk_norm=True,
        has_window=True,
        sliding_window=4096,
        has_layer_types=True,
        full_layer_interval=4,
        renamed=_NORMS_OF_BRANCHES,
    ),
    "gemma2": Family(
        vocab_size=256000,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        head_dim=256,
        tie_word_embeddings=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        branch_norms=True,
        norm_offset=1.0,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        has_window=True,
        sliding_window=4096,
        has_layer_types=True,
        full_layer_interval=2,
        has_gemma_scales=True,
        softcaps=(50.0, 30.0),
        renamed=_NORMS_AROUND_BRANCHES,
    ),
    "gemma3_text": Family(
        vocab_size=262208,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        head_dim=256,
        rope_theta=1000000.0,
        window_rope_theta=10000.0,
        window_rope_field="rope_local_base_freq",
        tie_word_embeddings=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        branch_norms=True,
        qk_norm=True,
        norm_offset=1.0,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        has_window=True,
        sliding_window=4096,
        has_layer_types=True,
        full_layer_interval=6,
        full_layer_field="sliding_window_pattern",
        has_gemma_scales=True,
        renamed=_NORMS_AROUND_BRANCHES,
    ),
}
