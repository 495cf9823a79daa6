"""Tiny random checkpoints of every supported family and rope type, for the tests.

The weights come from numpy, so that the GPU tests need no torch; `save_with_transformers` writes
the same weights through transformers' own `save_pretrained`, as a user's folder is written.
The weights are scaled so that logits are spread out, attention is neither flat nor one-hot, and a
change of positions changes the tokens (test_parity_transformers.py checks that).
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tiny_families import (
    ARCHITECTURES,
    BRANCH_NORMS,
    CORRECTION_PARTS,
    EVERY,
    GEMMAS,
    HALF_ROTATED,
    NULLS,
    OWN_FIELDS,
    OWN_NAMES,
    WITH_QK_NORM,
    WITH_QKV_BIAS,
    WITH_WIDE_QK_NORM,
    WITHOUT_ATTENTION_BIAS,
)

# Length up to which the scaled rope types behave as trained; prompts longer than this reach the
# part of each formula that a short prompt never sees.
ORIGINAL_POSITIONS = 64


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint to build. Equal values give equal files."""

    family: str = "llama"
    rope: str = "default"
    rope_extra: dict[str, Any] = field(default_factory=dict)  # over rope_parameters; None removes
    hidden_size: int = 64
    intermediate_size: int = 96
    num_layers: int = 4
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 320
    tie: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    fields: dict[str, Any] = field(default_factory=dict)  # over config.json; None removes
    dtype: str = "float32"
    max_position_embeddings: int | None = None  # None: 512, for dynamic ORIGINAL_POSITIONS
    eos_token_id: int | list[int] | None = None
    gain: float = 1.5  # of every matrix but lm_head: what a layer adds next to what it gets
    seed: int = 0

    @property
    def qkv_bias(self) -> bool:
        return self.family in WITH_QKV_BIAS or self.attention_bias

    @property
    def o_bias(self) -> bool:
        if self.family in ("seed_oss", "gpt_oss"):
            return self.family == "gpt_oss" or bool(self.fields.get("attention_out_bias"))
        without = ("qwen2", "qwen2_moe", "glm4", "glm4_moe")
        return self.family not in without and self.attention_bias

    @property
    def has_mlp_bias(self) -> bool:
        return self.family == "gpt_oss" or self.mlp_bias

    @property
    def has_input_norms(self) -> bool:
        return self.family not in ("olmo2", "olmo3")

    @property
    def kinds(self) -> str:
        """A letter a layer: w with a window, F without."""
        pattern = EVERY.get(self.family, "F")
        return (pattern * self.num_layers)[: self.num_layers]

    def num_experts(self, layer: int) -> int:
        """Experts of a layer; 0: it has one MLP."""
        own = OWN_FIELDS[self.family] | self.fields
        first = own.get("first_k_dense_replace", own.get("moe_layer_start_index", 0))
        last = own.get("moe_layer_end_index", self.num_layers)
        if layer in own.get("mlp_only_layers", ()) or not first <= layer <= last:
            return 0
        names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        return next((own[name] for name in names if name in own), 0)

    @property
    def shared_expert_size(self) -> int:
        """The size of the expert that all tokens have; 0: there is none."""
        own = OWN_FIELDS[self.family] | self.fields
        count = own.get("n_shared_experts", own.get("moe_num_shared_experts", 0))
        return own.get("shared_expert_intermediate_size", count * self.expert_size)

    @property
    def expert_size(self) -> int:
        own = OWN_FIELDS[self.family] | self.fields
        return own.get("moe_intermediate_size", self.intermediate_size)

    def mlps(self, layer: int) -> dict[str, int]:
        """Names in a layer, and sizes, of its MLP or its experts."""
        sizes = {f"mlp.experts.{i}.": self.expert_size for i in range(self.num_experts(layer))}
        if sizes and self.shared_expert_size:
            sizes["mlp.shared_experts."] = self.shared_expert_size
        return sizes or {"mlp.": self.intermediate_size}

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that turn."""
        share = 0.5 if self.family in HALF_ROTATED else 1.0
        return int(self.head_dim * self.rope_extra.get("partial_rotary_factor", share))

    @property
    def positions(self) -> int:
        if self.max_position_embeddings is not None:
            return self.max_position_embeddings
        return ORIGINAL_POSITIONS if self.rope == "dynamic" else 512


def rope_parameters(model: TinyModel) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": model.rope, "rope_theta": 10000.0}
    if model.rope in ("linear", "dynamic"):
        parameters["factor"] = 4.0
    elif model.rope == "llama3":
        parameters |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    elif model.rope == "yarn":
        parameters |= {"factor": 8.0}
    elif model.rope == "longrope":
        half = model.rotary_dim // 2
        parameters |= {
            "factor": 8.0,
            "short_factor": [1.0 + 0.05 * i for i in range(half)],
            "long_factor": [1.0 + 0.6 * i for i in range(half)],
        }
    if model.rope in ("llama3", "yarn", "longrope"):
        parameters["original_max_position_embeddings"] = ORIGINAL_POSITIONS
    if model.family == "ministral3":
        parameters["original_max_position_embeddings"] = ORIGINAL_POSITIONS
        parameters |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4}
    parameters |= model.rope_extra
    parameters = {key: value for key, value in parameters.items() if value is not None}
    if model.family not in ("olmo3", "gemma3_text"):
        return parameters
    in_window = {"rope_type": "default", "rope_theta": 500.0}
    return {"full_attention": parameters, "sliding_attention": in_window}


def config_json(model: TinyModel) -> dict[str, Any]:
    """The config.json a folder of this model has, in the current Hugging Face layout."""
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model.family]],
        "model_type": model.family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_q_heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": model.positions,
        "tie_word_embeddings": model.tie,
        "rope_parameters": rope_parameters(model),
        "bos_token_id": None,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": None,
        "dtype": model.dtype,
    }
    if model.family not in ("qwen2", "qwen2_moe", "phi3"):  # those derive it
        config["head_dim"] = model.head_dim
    if model.family not in WITHOUT_ATTENTION_BIAS:
        config["attention_bias"] = model.qkv_bias
    if model.family in GEMMAS:
        del config["hidden_act"]
    if model.family in ("llama", "granite", "smollm3", "seed_oss"):
        config["mlp_bias"] = model.mlp_bias
    if model.family == "granitemoehybrid":
        config["layer_types"] = ["full_attention"] * model.num_layers
        config["shared_intermediate_size"] = model.intermediate_size
    config |= OWN_FIELDS[model.family] | model.fields
    return {key: value for key, value in config.items() if value is not None or key in NULLS}


def random_weights(model: TinyModel) -> dict[str, np.ndarray]:
    """All tensors of the checkpoint, float32, already rounded to `model.dtype`."""
    rng = np.random.default_rng(model.seed)
    hidden, q_size = model.hidden_size, model.num_q_heads * model.head_dim
    kv_size = model.num_kv_heads * model.head_dim

    def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
        return rng.normal(0.0, gain / np.sqrt(columns), (rows, columns))

    def norm(size: int, mean: float = 1.0) -> np.ndarray:
        offset = 1.0 if model.family in GEMMAS else 0.0
        return mean * (1.0 + 0.2 * rng.normal(size=size)) - offset

    weights = {"model.embed_tokens.weight": rng.normal(0.0, 0.4, (model.vocab_size, hidden))}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        if model.has_input_norms:
            weights[prefix + "input_layernorm.weight"] = norm(hidden)
            weights[prefix + "post_attention_layernorm.weight"] = norm(hidden)
        # Scores have a standard deviation of about gain^2, so at 1.5 a few positions stand out.
        for name, rows in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = matrix(rows, hidden, model.gain)
            if model.qkv_bias:
                weights[f"{prefix}self_attn.{name}_proj.bias"] = 0.3 * rng.normal(size=rows)
        weights[prefix + "self_attn.o_proj.weight"] = matrix(hidden, q_size, model.gain)
        if model.o_bias:
            weights[prefix + "self_attn.o_proj.bias"] = 0.3 * rng.normal(size=hidden)
        if model.family in BRANCH_NORMS:
            weights[prefix + "post_self_attn_layernorm.weight"] = norm(hidden)
            weights[prefix + "post_mlp_layernorm.weight"] = norm(hidden)
        if model.family in WITH_QK_NORM:
            weights[prefix + "self_attn.q_norm.weight"] = norm(model.head_dim, model.gain)
            weights[prefix + "self_attn.k_norm.weight"] = norm(model.head_dim, model.gain)
        if model.family in WITH_WIDE_QK_NORM:
            weights[prefix + "self_attn.q_norm.weight"] = norm(q_size, model.gain)
            weights[prefix + "self_attn.k_norm.weight"] = norm(kv_size, model.gain)
        if model.family == "gpt_oss":
            weights[prefix + "self_attn.sinks"] = rng.normal(size=model.num_q_heads)
        if count := model.num_experts(layer):
            weights |= _router(model, prefix, count, rng)
        for mlp, inner in model.mlps(layer).items():
            for name, rows, columns in (
                ("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)
            ):  # fmt: skip
                weights[f"{prefix}{mlp}{name}_proj.weight"] = matrix(rows, columns, model.gain)
                if model.has_mlp_bias:
                    weights[f"{prefix}{mlp}{name}_proj.bias"] = 0.3 * rng.normal(size=rows)
    weights["model.norm.weight"] = norm(hidden)
    if not model.tie:
        weights["lm_head.weight"] = matrix(model.vocab_size, hidden, 3.0)
    weights = {name: round_to(value, model.dtype) for name, value in weights.items()}
    return _in_own_parts(weights, model)


def _router(
    model: TinyModel, prefix: str, count: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """What chooses and weighs the experts of a layer."""
    spread = 2.0 / np.sqrt(model.hidden_size)
    weights = {prefix + "mlp.gate.weight": rng.normal(0.0, spread, (count, model.hidden_size))}
    if model.has_mlp_bias:
        weights[prefix + "mlp.gate.bias"] = rng.normal(size=count)
    if model.family in CORRECTION_PARTS:
        part = f"{prefix}{CORRECTION_PARTS[model.family]}.e_score_correction_bias"
        shape = (1, count) if model.family == "ernie4_5_moe" else (count,)
        weights[part] = rng.normal(0.0, 0.2, shape)
    if model.family == "qwen2_moe":
        gate = rng.normal(0.0, spread, (1, model.hidden_size))
        weights[prefix + "mlp.shared_expert_gate.weight"] = gate
    return weights


def _in_own_parts(weights: dict[str, np.ndarray], model: TinyModel) -> dict[str, np.ndarray]:
    """The same as the model's family names and stacks them."""
    own_parts: dict[str, np.ndarray] = {}
    for own, ours in OWN_NAMES.get(model.family, {}).items():
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}."
            for kind in ("weight", "bias"):
                pieces = [weights.pop(f"{prefix}{part}.{kind}", None) for part in ours]
                if pieces[0] is not None:
                    own_parts[f"{prefix}{own}.{kind}"] = np.concatenate(pieces)
    if model.family == "gpt_oss":
        own_parts |= _fused_experts(weights, model)
    return weights | own_parts


_FUSED = {("gate", "up"): "gate_up_proj", ("down",): "down_proj"}


def _fused_experts(weights: dict[str, np.ndarray], model: TinyModel) -> dict[str, np.ndarray]:
    """Takes out the experts: those of a layer transposed, rows of gate and up in turn."""
    fused: dict[str, np.ndarray] = {}
    for layer, parts, kind in product(range(model.num_layers), _FUSED, ("weight", "bias")):
        prefix, experts = f"model.layers.{layer}.mlp.experts.", []
        for expert in range(model.num_experts(layer)):
            pieces = [weights.pop(f"{prefix}{expert}.{part}_proj.{kind}") for part in parts]
            rows = np.stack(pieces, axis=1)
            experts.append(rows.reshape(-1, *rows.shape[2:]).T)
        fused[prefix + _FUSED[parts] + ("_bias" if kind == "bias" else "")] = np.stack(experts)
    return fused


def random_prompt(model: TinyModel, length: int, seed: int = 0) -> list[int]:
    """Token ids from `model.vocab_size`, the same for the same seed."""
    rng = np.random.default_rng(1000 + seed)
    return rng.integers(3, model.vocab_size, length).tolist()


# --- dtypes: numpy has no bfloat16, so a value of it is a float32 whose low 16 bits are zero ---


def round_to(value: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that `dtype` can hold, rounded to nearest even."""
    value = np.ascontiguousarray(value, dtype=np.float32)
    if dtype == "float16":
        return value.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = value.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
        return np.where(np.isnan(value), value, rounded)
    if dtype == "fp8":  # e4m3: 4 significant bits, at least 2^-9 apart; saturates at 448
        step = np.exp2(np.maximum(np.frexp(value)[1] - 4, -9), dtype=np.float32)
        return np.clip(np.round(value / step) * step, np.float32(-448), np.float32(448))
    return value


def encode(value: np.ndarray, dtype: str) -> bytes:
    if dtype == "float16":
        return value.astype(np.float16).tobytes()
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16).tobytes()
    return np.ascontiguousarray(value, dtype=np.float32).tobytes()


def decode(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "F16":
        return np.frombuffer(data, np.float16).astype(np.float32)
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, np.float32)


SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


# --- folders ---


def write_checkpoint(
    folder: Path,
    model: TinyModel,
    weights: dict[str, np.ndarray] | None = None,
    float32: str = "",
) -> Path:
    """Writes config.json and one model.safetensors. `weights` replaces the random ones; those whose
    names end in `float32`, if that is given, are stored so."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(model) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(config_json(model), indent=2))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name in sorted(weights):
        dtype = "float32" if float32 and name.endswith(float32) else model.dtype
        blob = encode(weights[name], dtype)
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(weights[name].shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<Q", len(text)) + text + b"".join(blobs)
    (folder / "model.safetensors").write_bytes(data)
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> Path:
    """A tokenizer whose token i is the word "ti", so that text can be streamed."""
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel", "vocab": {f"t{i}": i for i in range(vocab_size)}, "unk_token": "t0"
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def write_nan_model(folder: Path) -> Path:
    """A folder with a tokenizer, whose model's numbers are none from the first token on."""
    model = TinyModel(num_layers=2)
    weights = random_weights(model)
    weights["model.embed_tokens.weight"][:] = np.nan
    return write_tokenizer(write_checkpoint(folder, model, weights), model.vocab_size)


def save_with_transformers(folder: Path, model: TinyModel, max_shard_size: str = "1GB") -> Path:
    """The same checkpoint, written by transformers: its config.json and its (sharded) files."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**config_json(model))
    torch_dtype = getattr(torch, model.dtype)
    state = {k: torch.from_numpy(v).to(torch_dtype) for k, v in random_weights(model).items()}
    if any(
        map(model.num_experts, range(model.num_layers))
    ):  # which transformers stacks as it loads them
        own = write_checkpoint(folder / "own", model)
        torch_model = AutoModelForCausalLM.from_pretrained(own, dtype=torch_dtype)
    else:
        torch_model = AutoModelForCausalLM.from_config(config).to(torch_dtype)
        missing, unexpected = torch_model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    torch_model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and all tensors as float32, read with nothing of the engine."""
    config = json.loads((folder / "config.json").read_text())
    weights: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                weights[name] = decode(data[begin:end], entry["dtype"]).reshape(entry["shape"])
    return config, weights
