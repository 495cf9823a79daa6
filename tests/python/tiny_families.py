"""What checkpoints of the families differ in, for the tests: fields of config.json and names.

Nothing of it comes from the package, whose own tables (checkpoint/families.py) it tests.
"""

from __future__ import annotations

from typing import Any

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# The families with every rope type; of the others those that are used.
_FEW_ROPES = {
    "granite": ("default",),
    "granitemoehybrid": ("default",),
    "smollm3": ("default", "yarn"),
    "seed_oss": ("default",),
    "phi3": ("default", "longrope"),
    "glm4": ("default", "yarn"),
    "ministral": ("default",),
    "ministral3": ("yarn",),
    "qwen3_moe": ("default", "yarn"),
    "mixtral": ("default",),
    "qwen2_moe": ("default",),
    "glm4_moe": ("default", "yarn"),
    "dots1": ("default",),
    "ernie4_5_moe": ("default",),
    "minimax_m2": ("default",),
    "gpt_oss": ("default", "yarn"),
    "olmo2": ("default",),
    "olmo3": ("default", "yarn"),
    "gemma2": ("default",),
    "gemma3_text": ("default", "linear"),
}

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
FAMILIES = tuple(ARCHITECTURES)
FAMILY_ROPES = [(name, rope) for name in FAMILIES for rope in _FEW_ROPES.get(name, ROPE_TYPES)]

# What a config.json of a family says beyond what all say, over that; None removes a field.
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.4, "logits_scaling": 10.0,
    },
    "granitemoehybrid": {
        "embedding_multiplier": 1.5, "residual_multiplier": 0.7,
        "attention_multiplier": 0.3, "logits_scaling": 8.0, "num_local_experts": 0,
        "num_experts_per_tok": 0, "position_embedding_type": "rope", "mamba_n_heads": 16,
    },
    "smollm3": {"no_rope_layer_interval": 3, "use_sliding_window": False},
    "seed_oss": {"attention_out_bias": False},
    "phi3": {"sliding_window": None},
    "glm4": {},
    "qwen3_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "norm_topk_prob": True, "mlp_only_layers": [0], "use_sliding_window": False,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128, "mlp_only_layers": [1], "use_sliding_window": False,
    },
    "glm4_moe": {
        "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
    },
    "dots1": {
        "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 0.8,
        "sliding_window": None,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 64,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 2,
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "gpt_oss": {
        "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 24, "swiglu_limit": 1.5,
    },
    "ministral": {"sliding_window": 24},
    "ministral3": {"sliding_window": None},
    "olmo2": {},
    "olmo3": {"sliding_window": 24},
    "gemma2": {
        "sliding_window": 24, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 3.0, "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {
        "sliding_window": 24, "sliding_window_pattern": 3, "query_pre_attn_scalar": 8,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}  # fmt: skip
# Families whose layers attend to a window, which layer by layer (w) or to everything (F).
EVERY = {"ministral": "w", "gpt_oss": "wF", "olmo3": "wwwF", "gemma2": "wF", "gemma3_text": "wwF"}
GEMMAS = ("gemma2", "gemma3_text")
BRANCH_NORMS = ("glm4", "olmo2", "olmo3", *GEMMAS)
# Their names of the norms, where they are not glm4's.
_NORMS_OF_BRANCHES = {
    "post_attention_layernorm": ("post_self_attn_layernorm",),
    "post_feedforward_layernorm": ("post_mlp_layernorm",),
}
_NORMS_AROUND_BRANCHES = {
    "pre_feedforward_layernorm": ("post_attention_layernorm",), **_NORMS_OF_BRANCHES
}  # fmt: skip
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
NULLS = ("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window")
_MIXTRAL_NAMES = {
    "block_sparse_moe.gate": ("mlp.gate",),
    **{
        f"block_sparse_moe.experts.{expert}.{own}": (f"mlp.experts.{expert}.{part}_proj",)
        for expert in range(4)
        for own, part in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    },
}
# How a family names parts of a layer, some of them several of ours below each other.
OWN_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "phi3": {"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": _GATE_UP},
    "glm4": {"mlp.gate_up_proj": _GATE_UP},
    "granitemoehybrid": {
        "shared_mlp.input_linear": _GATE_UP, "shared_mlp.output_linear": ("mlp.down_proj",)
    },
    "mixtral": _MIXTRAL_NAMES,
    "minimax_m2": _MIXTRAL_NAMES,
    "qwen2_moe": {
        f"mlp.shared_expert.{part}_proj": (f"mlp.shared_experts.{part}_proj",)
        for part in ("gate", "up", "down")
    },
    "gpt_oss": {"mlp.router": ("mlp.gate",)},  # and fused_experts()
    "olmo2": _NORMS_OF_BRANCHES,
    "olmo3": _NORMS_OF_BRANCHES,
    "gemma2": _NORMS_AROUND_BRANCHES,
    "gemma3_text": _NORMS_AROUND_BRANCHES,
}  # fmt: skip
# Whose routers have a correction, and the part of a layer that it is stored under.
CORRECTION_PARTS = {
    "glm4_moe": "mlp.gate", "dots1": "mlp.gate", "ernie4_5_moe": "mlp.moe_statics",
    "minimax_m2": "block_sparse_moe",
}  # fmt: skip
HALF_ROTATED = ("glm4", "glm4_moe", "minimax_m2")  # half of the dims of a head turn
WITH_QKV_BIAS = ("qwen2", "qwen2_moe", "seed_oss", "glm4", "gpt_oss")
WITH_WIDE_QK_NORM = ("olmo2", "olmo3", "minimax_m2")
WITH_QK_NORM = ("qwen3", "qwen3_moe", "gemma3_text", "glm4_moe", "dots1")
WITHOUT_ATTENTION_BIAS = (  # whose config.json has no such field
    "mistral", "qwen2", "qwen2_moe", "phi3", "ministral", "ministral3", "mixtral", "minimax_m2",
    "ernie4_5_moe",
)  # fmt: skip
