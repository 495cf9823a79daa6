"""config.json of models with experts, public ones among them, and of folders that bring code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from test_model_folder import REMOVED, read
from tidaldecode.checkpoint.model_config import read_checkpoint_config
from tidaldecode.errors import ConfigError

# As published; what the engine has no use for is left in.
GLM_45_AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338], "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "partial_rotary_factor": 0.5,
    "intermediate_size": 10944, "max_position_embeddings": 131072, "model_type": "glm4_moe",
    "moe_intermediate_size": 1408, "norm_topk_prob": True, "num_attention_heads": 96,
    "n_group": 1, "topk_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
    "routed_scaling_factor": 1.0, "num_experts_per_tok": 8, "first_k_dense_replace": 1,
    "num_hidden_layers": 46, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 1000000, "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_qk_norm": False,
    "vocab_size": 151552,
}  # fmt: skip
MINIMAX_M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"], "attn_type_list": [1] * 62, "head_dim": 128,
    "auto_map": {
        "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
        "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
    },
    "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 1536,
    "max_position_embeddings": 196608, "model_type": "minimax_m2", "num_attention_heads": 48,
    "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8,
    "num_local_experts": 256, "num_mtp_modules": 3, "qk_norm_type": "per_layer",
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
    "rms_norm_eps": 1e-06, "rope_theta": 5000000, "rotary_dim": 64, "scoring_func": "sigmoid",
    "shared_intermediate_size": 0, "tie_word_embeddings": False, "use_mtp": True,
    "use_qk_norm": True, "use_routing_bias": True, "vocab_size": 200064,
}  # fmt: skip
ERNIE_45_21B: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 12288,
    "max_position_embeddings": 131072, "model_type": "ernie4_5_moe", "num_attention_heads": 20,
    "num_key_value_heads": 4, "num_hidden_layers": 28, "pad_token_id": 0, "rms_norm_eps": 1e-05,
    "vocab_size": 103424, "rope_theta": 500000, "use_rmsnorm": True, "tie_word_embeddings": True,
    "use_bias": False, "moe_num_experts": 64, "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1, "moe_layer_end_index": 27, "moe_layer_interval": 1,
    "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_intermediate_size": 1536, "moe_k": 6,
    "moe_use_aux_free": True, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN15_MOE: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192,
    "max_window_layers": 21, "model_type": "qwen2_moe", "moe_intermediate_size": 1408,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
    "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "billions", "first", "shared"),
    [
        (GLM_45_AIR, 107, 1, 1408),
        (MINIMAX_M2, 229, 0, 0),
        (ERNIE_45_21B, 22, 1, 3072),
        (QWEN15_MOE, 14, 0, 5632),
    ],
    ids=["GLM-4.5-Air", "MiniMax-M2", "ERNIE-4.5-21B-A3B", "Qwen1.5-MoE-A2.7B"],
)
def test_public_models_are_as_large_as_they_are(
    tmp_path: Path, fields: dict[str, Any], billions: int, first: int, shared: int
):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    model = read_checkpoint_config(path).model
    own = [layer.has_experts for layer in model.layers]
    assert own == [layer >= first for layer in range(model.num_layers)]
    assert model.shared_expert_size == shared
    heads = model.num_layers * 2 * (model.num_q_heads + model.num_kv_heads) * model.head_dim
    of_experts = model.num_experts * model.expert_intermediate_size + shared
    inner = sum(of_experts if each else model.intermediate_size for each in own)
    tables = (1 if model.tie_word_embeddings else 2) * model.vocab_size
    assert round(model.hidden_size * (heads + 3 * inner + tables) / 1e9) == billions


def test_experts_are_read(tmp_path: Path):
    def experts(family: str, **changes: Any):
        model = read(tmp_path, family, **changes).model
        return (
            "".join("Ee"[not layer.has_experts] for layer in model.layers),
            (model.router_score, model.router_correction, model.normalized_routing),
            model.routing_scale,
            (model.shared_expert_size, model.shared_expert_gate),
        )

    softmax, sigmoid = ("softmax", False, False), ("sigmoid", True, True)
    assert experts("qwen2_moe") == ("EeEE", softmax, 1.0, (128, True))
    none = {"shared_expert_intermediate_size": 0, "decoder_sparse_step": 2}
    assert experts("qwen2_moe", **none) == ("eeeE", softmax, 1.0, (0, False))
    assert experts("glm4_moe") == ("eEEE", sigmoid, 1.5, (64, False))
    assert experts("glm4_moe", n_shared_experts=3, first_k_dense_replace=3)[::3] == (
        "eeeE",
        (192, False),
    )
    assert experts("dots1") == ("eEEE", ("sigmoid", True, False), 0.8, (128, False))
    assert experts("dots1", n_group=2, topk_group=2, norm_topk_prob=True)[1] == sigmoid
    assert experts("ernie4_5_moe") == ("eEEe", ("softmax", True, True), 1.0, (128, False))
    assert experts("ernie4_5_moe", moe_layer_interval=2)[0] == "eEee"
    assert experts("ernie4_5_moe", moe_layer_end_index=-1)[0] == "eEEE"
    assert experts("minimax_m2") == ("EEEE", sigmoid, 1.0, (0, False))
    assert read(tmp_path, "minimax_m2").model.rope.rotary_dim == 8
    assert not read(tmp_path, "glm4_moe", use_qk_norm=REMOVED).model.qk_norm


def test_code_of_a_folder_is_no_more_than_its_type_says(tmp_path: Path):
    """Folders that are older than transformers' own classes bring these; they are not run."""
    for family, stem, model in (
        ("phi3", "Phi3", "Phi3Model"),
        ("ernie4_5_moe", "Ernie4_5_Moe", "Ernie4_5_Model"),
    ):
        own = {
            "AutoConfig": f"a.{stem}Config",
            "AutoModelForCausalLM": f"b.{stem}ForCausalLM",
            "AutoModel": f"b.{model}",
        }
        checkpoint = read(tmp_path, family, auto_map=own)
        assert checkpoint.family == family
        assert "Python code of the folder is not run" in checkpoint.notes[0]
        other_model = {"AutoModelForCausalLM": f"b.{stem}ThingForCausalLM"}
        for other in (own | other_model, ["a"], {"AutoConfig": 1}, "x"):
            with pytest.raises(ConfigError, match="auto_map: the model wants to run Python code"):
                read(tmp_path, family, auto_map=other)
