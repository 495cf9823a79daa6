"""config.json and generation_config.json: good ones understood, bad ones refused by name."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from scripted_model import update_json
from tidaldecode.checkpoint.json_file import MAX_JSON_BYTES
from tidaldecode.checkpoint.model_config import CheckpointConfig, read_checkpoint_config
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.errors import ConfigError
from tiny_families import FAMILIES, ROPE_TYPES, WITH_QK_NORM, WITH_QKV_BIAS, WITH_WIDE_QK_NORM
from tiny_models import TinyModel, config_json, write_checkpoint

REMOVED = ...


def read(folder: Path, family: str = "llama", **changes: Any) -> CheckpointConfig:
    """Reads a tiny config with fields replaced, or taken out with REMOVED."""
    config = config_json(TinyModel(family=family)) | changes
    config = {key: value for key, value in config.items() if value is not REMOVED}
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return read_checkpoint_config(path)


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **changes}}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read(tmp_path: Path, family: str):
    checkpoint = read(tmp_path, family)
    model = checkpoint.model
    assert checkpoint.family == family
    assert (model.num_layers, model.num_q_heads, model.num_kv_heads, model.head_dim) == (
        4,
        4,
        2,
        16,
    )
    assert model.qkv_bias == (family in WITH_QKV_BIAS)
    assert model.qk_norm == (family in WITH_QK_NORM + WITH_WIDE_QK_NORM)
    assert model.o_bias == model.mlp_bias == model.attention_sinks == (family == "gpt_oss")
    assert not model.tie_word_embeddings
    kinds = TinyModel(family=family).kinds
    assert "".join("w" if window else "F" for window in model.windows) == kinds


def test_absent_fields_mean_what_transformers_means(tmp_path: Path):
    model = read(tmp_path, num_key_value_heads=REMOVED, head_dim=REMOVED, rms_norm_eps=REMOVED,
                 max_position_embeddings=REMOVED, rope_parameters=REMOVED).model  # fmt: skip
    assert model.num_kv_heads == 4
    assert model.head_dim == 16
    assert model.rms_norm_eps == 1e-6
    assert model.max_position_embeddings == 2048
    assert (model.rope.type, model.rope.theta) == ("default", 10000.0)


def test_biases_of_llama_reach_all_projections(tmp_path: Path):
    model = read(tmp_path, attention_bias=True, mlp_bias=True).model
    assert model.qkv_bias and model.o_bias and model.mlp_bias


def test_qwen3_head_dim_defaults_to_128(tmp_path: Path):
    assert read(tmp_path, "qwen3", head_dim=REMOVED).model.head_dim == 128


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_is_read_under_both_names(tmp_path: Path, key: str, name: str):
    assert read(tmp_path, **{"dtype": REMOVED, key: name}).dtype == name


@pytest.mark.parametrize(
    ("value", "known", "unknown"),
    [(320, (), "320"), ([3, -1], (3,), "-1"), (10**40, (), "an integer of"), (-1, (), "-1")],
)
def test_an_end_token_that_no_row_has_is_left_out_and_said(tmp_path, value, known, unknown):
    checkpoint = read(tmp_path, eos_token_id=value)
    assert checkpoint.eos_token_ids == known
    assert f"eos_token_id: no token has the id {unknown}" in checkpoint.notes[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": None, "torch_dtype": "float16"},
        {"dtype": "torch.float16"},
        {"torch_dtype": "bfloat16", "dtype": "float16"},
    ],
    ids=str,
)
def test_forms_of_dtype_are_understood(tmp_path: Path, changes: dict[str, Any]):
    assert read(tmp_path, **changes).dtype == "float16"


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": None},
        {"rope_scaling": None, "rope_theta": None},
        {"head_dim": None},
        {"pretraining_tp": 2, "use_cache": "yes", "attention_dropout": -1, "initializer_range": 0},
        {"architectures": None},
        {"layer_types": None},
        {"quantization_config": None, "auto_map": None},
        {"auto_map": {}},
        {"sliding_window": 7},  # not a setting of llama
        {"dtype": "auto"},
        {"unheard_of": {"deep": [1, {"a": None}]}},
    ],
    ids=str,
)
def test_what_the_model_does_not_need_may_be_anything(tmp_path: Path, changes: dict[str, Any]):
    assert read(tmp_path, **changes).model.num_layers == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": -64}, "hidden_size: got -64"),
        ({"hidden_size": 0}, "hidden_size: got 0"),
        ({"hidden_size": 2**40}, "hidden_size: got 1099511627776"),
        ({"hidden_size": 64.0}, "hidden_size: got 64.0"),
        ({"hidden_size": "64"}, "hidden_size: got '64'"),
        ({"hidden_size": True}, "hidden_size: got True"),
        ({"hidden_size": REMOVED}, "hidden_size is missing"),
        ({"hidden_size": 66, "head_dim": REMOVED}, "num_attention_heads: got 4, .* divisor"),
        ({"intermediate_size": 0}, "intermediate_size: got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads: got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, .* divisor"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: got 0"),
        ({"head_dim": 15}, "head_dim: got 15"),
        ({"head_dim": 0}, "head_dim: got 0"),
        ({"hidden_size": 60, "head_dim": REMOVED}, "head_dim: got 15"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: got 1000000"),
        ({"vocab_size": 10**12}, "vocab_size: got 1000000000000"),
        ({"max_position_embeddings": 0}, "max_position_embeddings: got 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: got 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: got 'small'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: got 'yes'"),
        ({"dtype": "float8_e4m3fn"}, "dtype: got 'float8_e4m3fn'"),
        ({"eos_token_id": [3, 2.0]}, "eos_token_id: got 2.0, .*vocab_size 320"),
        ({"eos_token_id": "end"}, "eos_token_id: got 'end'"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"auto_map": {"AutoConfig": "x.Y"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config: .*'hqq'"),
        ({"num_local_experts": 8}, "num_local_experts: got 8: experts are not supported in models"),
        ({"model_type": "phimoe"}, "'phimoe', .*with experts are supported of these types only"),
        ({"model_type": "gemma4"}, "'gemma4', .*Gemma 2 and the text part of Gemma 3"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected 'silu' or 'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: .* both directions"),
        ({"is_causal": False}, "is_causal: got False: .* both directions"),
        ({"model_type": "nonsense"}, "'nonsense', expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": REMOVED}, "model_type: got None"),
        ({"model_type": ["llama"]}, "model_type: got"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_fields_are_named(tmp_path: Path, changes: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected) as error:
        read(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(error.value)


# What families have of their own


def test_granites_factors_are_read(tmp_path: Path):
    model = read(tmp_path, "granite").model
    scales = (model.embedding_scale, model.residual_scale, model.attention_scale, model.logit_scale)
    assert scales == (3.0, 0.22, 0.4, 1 / 10)
    model = read(tmp_path, "granite", attention_multiplier=REMOVED, logits_scaling=REMOVED).model
    assert (model.attention_scale, model.logit_scale) == (1.0, 1.0)
    # In other families they are names like any other.
    assert read(tmp_path, embedding_multiplier=7.0).model.embedding_scale == 1.0


@pytest.mark.parametrize(
    ("changes", "rotates"),
    [
        ({"no_rope_layer_interval": REMOVED}, [1, 1, 1, 0]),
        ({"no_rope_layer_interval": 2}, [1, 0, 1, 0]),
        ({"no_rope_layers": [0, 1, 0, 1, 1, 0]}, [0, 1, 0, 1]),
    ],
)
def test_layers_without_rotation_are_read(tmp_path: Path, changes: dict, rotates: list[int]):
    layers = read(tmp_path, "smollm3", **changes).model.layers
    assert [layer.has_rope for layer in layers] == [bool(each) for each in rotates]
    assert read(tmp_path, "smollm3", no_rope_layers=[1] * 4).model.layers == ()
    hybrid = read(tmp_path, "granitemoehybrid", position_embedding_type=REMOVED).model
    assert not any(layer.has_rope for layer in hybrid.layers)


def test_a_part_of_a_head_turns(tmp_path: Path):
    model = read(tmp_path, "phi3", partial_rotary_factor=0.5, **rope(rope_type="default")).model
    assert model.rope.rotary_dim == 8
    share = {"partial_rotary_factor": 0.75}
    assert read(tmp_path, "phi3", **rope(**share)).model.rope.rotary_dim == 12
    assert read(tmp_path, "phi3", **rope(partial_rotary_factor=1.0)).model.rope.rotary_dim == 0


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_phi3s_older_names_of_longrope(tmp_path: Path, name: str):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    checkpoint = read(tmp_path, "phi3", rope_parameters=REMOVED, max_position_embeddings=131072,
                      rope_scaling={"type": name, **factors}, sliding_window=262144)  # fmt: skip
    rotation = checkpoint.model.rope
    assert (rotation.type, rotation.factor) == ("longrope", 32.0)
    assert rotation.original_max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("granite", {"residual_multiplier": 0}, "residual_multiplier: got 0"),
        ("granite", {"logits_scaling": "big"}, "logits_scaling: got 'big'"),
        ("granitemoehybrid", {"num_local_experts": 1}, "num_local_experts: got 1: experts"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok: got 9, expected at most"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts: got 0"),
        ("qwen3_moe", {"mlp_only_layers": [1.5]}, "mlp_only_layers: got"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: got 0"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob: got 1"),
        ("qwen2_moe", {"shared_expert_intermediate_size": -1},
         "shared_expert_intermediate_size: got -1"),
        ("glm4_moe", {"n_group": 4, "topk_group": 2}, "topk_group: got 2 of n_group 4, expected"),
        ("glm4_moe", {"n_shared_experts": "one"}, "n_shared_experts: got 'one'"),
        ("glm4_moe", {"routed_scaling_factor": 0}, "routed_scaling_factor: got 0"),
        ("dots1", {"first_k_dense_replace": -1}, "first_k_dense_replace: got -1"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias: got True, expected false"),
        ("ernie4_5_moe", {"moe_k": 7}, "moe_k: got 7, expected at most moe_num_experts 6"),
        ("minimax_m2", {"rotary_dim": 32}, "rotary_dim: got 32, expected an integer from 2 to 16"),
        ("minimax_m2", {"rotary_dim": 5}, "rotary_dim: 5 of 16 dims turn, expected an even"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit: got 0"),
        ("gpt_oss", {"swiglu_alpha": "steep"}, "swiglu_alpha: got 'steep'"),
        ("gpt_oss", {"num_local_experts": 1}, "num_experts_per_tok: got 2, expected at most"),
        ("gemma2", {"attn_logit_softcapping": -1}, "attn_logit_softcapping: got -1"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: got 0"),
        ("ministral3", {"rope_parameters": {"rope_theta": 1e6, "llama_4_scaling_beta": 0.1}},
         "llama_4_scaling_beta: got 0.1 without original_max_position_embeddings"),
        ("granitemoehybrid", {"num_local_experts": REMOVED}, "num_local_experts is missing"),
        ("granitemoehybrid", {"layer_types": REMOVED}, "layer_types is missing"),
        ("granitemoehybrid", {"layer_types": ["mamba"] * 4}, "layer 0 is 'mamba'"),
        ("granitemoehybrid", {"shared_intermediate_size": REMOVED}, "shared_intermediate_size"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers: got \\[1, 0\\]"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers"),
        ("phi3", {"partial_rotary_factor": 0.1}, "partial_rotary_factor: 1 of 16"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor: got 1.5"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, expected 1"),
    ],
)  # fmt: skip
def test_what_a_family_does_not_have_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], expected: str
):
    with pytest.raises(ConfigError, match=expected):
        read(tmp_path, family, **changes)


def test_a_wrapper_of_a_text_model_is_read(tmp_path: Path):
    text = config_json(TinyModel(family="mistral"))
    dtype = text.pop("dtype")
    wrapper = {"model_type": "mistral3", "text_config": text, "dtype": dtype, "eos_token_id": 7}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(wrapper | {"vision_config": {"hidden_size": 3}}))
    checkpoint = read_checkpoint_config(path)
    assert (checkpoint.family, checkpoint.dtype, checkpoint.eos_token_ids) == (
        "mistral", "float32", (7,)
    )  # fmt: skip
    assert checkpoint.model.hidden_size == 64
    own = {"dtype": "bfloat16", "eos_token_id": 5, "tie_word_embeddings": True}
    path.write_text(json.dumps(wrapper | {"text_config": text | own, "tie_word_embeddings": False}))
    assert read_checkpoint_config(path).dtype == "float32"
    assert read_checkpoint_config(path).eos_token_ids == (7,)
    assert not read_checkpoint_config(path).model.tie_word_embeddings
    for bad, expected in (
        (None, "text_config: got None, expected an object"),
        (text | {"model_type": "pixtral"}, "pixtral"),
    ):
        path.write_text(json.dumps(wrapper | {"text_config": bad}))
        with pytest.raises(ConfigError, match=expected):
            read_checkpoint_config(path)


def test_the_text_part_of_a_wrapper_has_a_family_by_default(tmp_path: Path):
    path = tmp_path / "config.json"
    for wrapper, family in (("mistral3", "mistral"), ("gemma3", "gemma3_text")):
        text = config_json(TinyModel(family=family))
        del text["model_type"]
        path.write_text(json.dumps({"model_type": wrapper, "text_config": text}))
        assert read_checkpoint_config(path).family == family


# RoPE


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_every_rope_type_is_read(tmp_path: Path, kind: str):
    config = config_json(TinyModel(rope=kind))
    (tmp_path / "config.json").write_text(json.dumps(config))
    parameters = config["rope_parameters"]
    result = read_checkpoint_config(tmp_path / "config.json").model.rope
    assert result.type == kind
    for name, value in parameters.items():
        ours = getattr(result, {"rope_type": "type", "rope_theta": "theta"}.get(name, name))
        assert list(ours) == value if isinstance(value, list) else ours == value


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_the_old_rope_form_is_read(tmp_path: Path, key: str):
    result = read(
        tmp_path, rope_parameters=REMOVED, rope_theta=5e5, rope_scaling={key: "linear", "factor": 2}
    ).model.rope
    assert (result.type, result.factor, result.theta) == ("linear", 2.0, 5e5)


def test_an_absent_original_length_is_the_whole(tmp_path: Path):
    result = read(tmp_path, **rope(rope_type="yarn", factor=4.0)).model.rope
    assert result.original_max_position_embeddings == 512


def test_the_top_level_original_length_wins(tmp_path: Path):
    changes = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    result = read(tmp_path, original_max_position_embeddings=128, **changes).model.rope
    assert result.original_max_position_embeddings == 128


def test_the_default_of_a_top_level_original_length_wins_too(tmp_path: Path):
    """Phi-3's, as in transformers."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    changes = rope(rope_type="longrope", original_max_position_embeddings=64, **factors)
    result = read(tmp_path, "phi3", **changes).model.rope
    assert result.original_max_position_embeddings == 4096


def test_rope_nested_per_layer_type_is_read_if_all_layers_are_full(tmp_path: Path):
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    assert read(tmp_path, rope_parameters=nested).model.rope.theta == 1e6
    with pytest.raises(ConfigError, match="full_attention"):
        read(tmp_path, rope_parameters={"sliding_attention": {"rope_type": "default"}})


LONG = {"rope_type": "longrope", "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_type": "mystery"}, "rope_type: got 'mystery', expected one of default"),
        ({"rope_type": ["linear"]}, "rope_type: got"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": "abc"}, "factor: got 'abc'"),
        ({"rope_type": "linear", "factor": 0}, "factor: got 0"),
        ({"rope_type": "linear", "factor": -1}, "factor: got -1"),
        ({"rope_type": "linear", "factor": 0.5}, "factor: got 0.5"),
        ({"rope_type": "dynamic", "factor": True}, "factor: got True"),
        ({"rope_theta": 0}, "rope_theta: got 0"),
        ({"rope_theta": -1.0}, "rope_theta: got -1.0"),
        (LLAMA3 | {"high_freq_factor": None}, "high_freq_factor is missing"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "more than low_freq_factor"),
        (LLAMA3 | {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({"rope_type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 2}, "beta_fast: got 1"),
        ({"rope_type": "yarn", "factor": 4, "truncate": "no"}, "truncate: got 'no'"),
        ({"rope_type": "yarn", "factor": 4, "attention_factor": -1}, "attention_factor: got -1"),
        (LONG | {"long_factor": [1.0] * 8}, "short_factor: got None"),
        (LONG | {"short_factor": [1.0] * 8, "long_factor": [1.0] * 7}, "got 7 numbers, .*of 8"),
        (LONG | {"short_factor": [1.0] * 8, "long_factor": [1.0] * 7 + [0]}, "got 0 in it"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5"),
    ],
    ids=str,
)
def test_bad_rope_parameters_are_named(tmp_path: Path, parameters: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected):
        read(tmp_path, **rope(**parameters))


def test_a_rope_field_that_is_no_object_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="rope_scaling: got 'linear'"):
        read(tmp_path, rope_scaling="linear")


# Damaged files


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"\xef\xbb\xbf{}", "byte-order mark"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1]", "expected an object"),
        (b"{", "not valid JSON"),
        (b'{"rope_theta": NaN}', "NaN is not a JSON number"),
        (b'{"rope_theta": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
        (b'{"a": ' + b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
    ids=range(11),
)
def test_damaged_json_is_refused(tmp_path: Path, data: bytes, expected: str):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ConfigError, match=expected):
        read_checkpoint_config(tmp_path / "config.json")


def test_a_huge_config_is_refused_unread(tmp_path: Path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 30)  # a hole: nothing is written
    started = time.process_time()
    with pytest.raises(ConfigError, match=f"expected at most {MAX_JSON_BYTES}"):
        read_checkpoint_config(tmp_path / "config.json")
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("kind", ["absent", "directory", "fifo", "link loop"])
def test_a_config_that_is_no_file_is_refused_without_waiting(tmp_path: Path, kind: str):
    path = tmp_path / "config.json"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link loop":
        path.symlink_to(path)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", "hf download meta-llama/Llama-3.1-8B --local-dir Llama-3.1-8B"),
        ("/no/such/place", "no such folder"),
        ("\0", "expected a"),
        (None, "model_dir: got None"),
        (b"bytes", "model_dir: got b'bytes'"),
    ],
)
def test_what_is_no_folder_is_explained(name: Any, expected: str):
    with pytest.raises(ConfigError, match=expected):
        read_model_folder(name)


def test_a_file_in_place_of_the_folder_is_explained(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="is a file"):
        read_model_folder(tmp_path / "model.gguf")


def test_end_tokens_of_both_files_count(tmp_path: Path):
    write_checkpoint(tmp_path, TinyModel(eos_token_id=[9, 4]))
    update_json(tmp_path / "generation_config.json", eos_token_id=[7, 9])
    assert read_model_folder(tmp_path).eos_token_ids == (4, 7, 9)


def test_the_dtype_of_the_weights_counts_where_the_config_is_silent(tmp_path: Path):
    write_checkpoint(tmp_path, TinyModel(dtype="float16"))
    update_json(tmp_path / "config.json", dtype=None)
    assert read_model_folder(tmp_path).dtype == "float16"
