"""config.json: which model a folder holds, checked field by field.

Called by model_folder.py. Supported are decoders of the Llama kind, with experts or without
(families.py). transformers accepts configs that cannot run (hidden_size -64, an unknown rope type,
factor "abc"), so nothing is taken over from it; defaults for absent fields are its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidaldecode.checkpoint.expert_config import EXPERT_COUNTS, read_experts
from tidaldecode.checkpoint.families import (
    BESIDE_TEXT_CONFIG,
    FAMILIES,
    WRAPPERS,
    Family,
    Presence,
)
from tidaldecode.checkpoint.fields import read_bool, read_float, read_int
from tidaldecode.checkpoint.json_file import read_json_object
from tidaldecode.checkpoint.layer_kinds import LayerConfig, read_layers
from tidaldecode.checkpoint.quant_scheme import Quantization
from tidaldecode.checkpoint.quantization import read_quantization
from tidaldecode.checkpoint.rope_config import RopeConfig, read_rope, read_window_rope
from tidaldecode.errors import ConfigError, show

# Caps far above any public model: a typing error or an attack stops here, before any allocation.
_MAX_VOCAB = 2**22
_MAX_HIDDEN = 2**17
_MAX_INTERMEDIATE = 2**20
_MAX_LAYERS = 1024
_MAX_HEADS = 4096
_MAX_HEAD_DIM = 1024
_MAX_POSITIONS = 2**28

# Parts of a model_type and why models with it are refused; the first that fits speaks.
_REFUSAL_REASONS = (
    ("moe", "models with experts are supported of these types only"),
    ("deepseek", "latent attention and mixture-of-experts layers are not supported"),
    ("llama4", "chunked attention layers are not supported"),
    ("qwen3_next", "linear attention layers are not supported"),
    ("qwen3_5", "linear attention layers are not supported"),
    ("mamba", "state-space layers are not supported"),
    ("gemma", "of these Gemma 2 and the text part of Gemma 3 are supported"),
    ("phi", "models with other parts than text, or of the first generations, are not supported"),
    ("mllama", "models with a vision part are not supported"),
    ("_vl", "models with a vision part are not supported"),
    ("gpt2", "learned position embeddings are not supported"),
    ("t5", "encoder-decoder models are not supported"),
    ("bert", "encoder models are not supported"),
)


# What transformers' names of a family's classes end in.
_CLASS_ENDS = (
    "config|model|pretrainedmodel|for(causallm|sequenceclassification|tokenclassification)"
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Fields and meaning of C++ ModelConfig (cpp/include/tidal/config.h)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    input_norms: bool = True
    branch_norms: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    router_score: str = "softmax"
    router_correction: bool = False
    normalized_routing: bool = True
    routing_scale: float = 1.0
    shared_expert_size: int = 0
    shared_expert_gate: bool = False
    attention_sinks: bool = False
    tie_word_embeddings: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float = 0.0
    logit_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    rope: RopeConfig = field(default_factory=RopeConfig)
    window_rope: RopeConfig | None = None
    layers: tuple[LayerConfig, ...] = ()

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each layer; 0 where it sees everything."""
        return tuple(layer.window for layer in self.layers) or (0,) * self.num_layers

    @property
    def full_attention_layers(self) -> tuple[int, ...]:
        """The layers that see everything, which are those that a plan is about."""
        return tuple(layer for layer, window in enumerate(self.windows) if window == 0)

    @property
    def rope_window(self) -> int | None:
        """Length up to which the rotary frequencies stay as they are; None: at any length."""
        if self.rope.type == "dynamic":
            return self.max_position_embeddings
        return self.rope.original_max_position_embeddings if self.rope.type == "longrope" else None


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """All of config.json that the package uses."""

    family: str  # a name in families.py
    name: str  # what the config calls the model; may be empty
    dtype: str | None  # "float32", "bfloat16", "float16"; None if the config does not say
    eos_token_ids: tuple[int, ...]
    model: ModelConfig
    quantization: Quantization | None = None  # None: weights as they are
    # Whether the embedding is the output matrix too where none is stored, whatever `model` says.
    ties_without_head: bool = False
    notes: tuple[str, ...] = ()  # for the user: what was not taken as it stands


def read_checkpoint_config(path: Path, max_seq_len: int | None = None) -> CheckpointConfig:
    """Reads and checks config.json.

    Args:
        path: the file.
        max_seq_len: of DecodeConfig: sequences may be longer than the model's own.

    Raises: ConfigError naming the file and the field.
    """
    where = str(path)
    whole = read_json_object(path)
    raw, text_notes = _text_part(whole, where)
    family = _read_family(raw, where)
    _refuse_unsupported_features(raw, FAMILIES[family], where)
    model = _read_model(raw, FAMILIES[family], max_seq_len, where)
    quantization = read_quantization(raw, where)
    name = raw.get("_name_or_path")
    eos_token_ids, notes = read_token_ids(raw, "eos_token_id", model.vocab_size, where)
    return CheckpointConfig(
        family=family,
        name=name if isinstance(name, str) else "",
        dtype=_read_dtype(raw, where),
        eos_token_ids=eos_token_ids,
        model=model,
        quantization=quantization,
        # The default of wrappers, whose text part does not decide.
        ties_without_head=_is_wrapper(whole) and whole.get("tie_word_embeddings") is None,
        notes=(
            *text_notes,
            *notes,
            *(quantization.notes if quantization else ()),
            *([_not_run(where, family)] if raw.get("auto_map") else []),
        ),
    )


def _is_wrapper(raw: Mapping[str, Any]) -> bool:
    family = raw.get("model_type")
    return isinstance(family, str) and family in WRAPPERS


def _text_part(raw: dict[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of the text model, and notes for the user."""
    if not _is_wrapper(raw):
        return raw, ()
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(f"{where}: text_config: got {show(text)}, expected an object")
    default = {"model_type": WRAPPERS[raw["model_type"]]}
    beside = {key: raw[key] for key in BESIDE_TEXT_CONFIG if raw.get(key) is not None}
    note = f"{where}: of this model of text and images the text part is used; it takes no images"
    return default | text | beside, (note,)


def read_token_ids(
    raw: Mapping[str, Any], key: str, vocab_size: int, where: str
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """A field that is one token id, a list of them, or absent; and notes on it for the user.

    An id that no row of the vocabulary has (-1 for "none", a token of a longer tokenizer) can never
    be drawn, so it is left out.

    Raises: ConfigError for what is no integer.
    """
    value = raw.get(key)
    if value is None:
        return (), ()
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise ConfigError(
                f"{where}: {key}: got {show(token_id)}, "
                f"expected an integer from 0 to {vocab_size - 1} (vocab_size {vocab_size})"
            )
    unknown = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
    note = (
        f"{where}: {key}: no token has the id {', '.join(show(i) for i in unknown[:5])} "
        f"(vocab_size {vocab_size}), so it ends no text"
    )
    known = tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)
    return known, (note,) if unknown else ()


def _read_family(raw: Mapping[str, Any], where: str) -> str:
    family = raw.get("model_type")
    if isinstance(family, str) and family in FAMILIES:
        return family
    reason = "its layers are not known to this engine"
    if family is None:
        reason = "config.json does not name a model type"
    elif isinstance(family, str):
        reasons = (why for part, why in _REFUSAL_REASONS if part in family.lower())
        reason = next(reasons, reason)
    raise ConfigError(
        f"{where}: model_type: got {show(family)}, expected one of {', '.join(FAMILIES)}: {reason}"
    )


def _refuse_unsupported_features(raw: Mapping[str, Any], family: Family, where: str) -> None:
    if not _is_code_of_family(raw.get("auto_map"), raw["model_type"]):
        raise ConfigError(
            f"{where}: auto_map: the model wants to run Python code from its folder, which is "
            "never done; if it is a plain model of its type, remove the field"
        )
    for key, is_wrong in (
        ("use_bidirectional_attention", bool(raw.get("use_bidirectional_attention"))),
        ("is_causal", raw.get("is_causal") is False),
    ):
        if is_wrong:
            raise ConfigError(
                f"{where}: {key}: got {show(raw[key])}: the model reads its text in both "
                "directions, so it cannot continue one"
            )
    for key in family.must_be_false:
        if raw.get(key):
            raise ConfigError(
                f"{where}: {key}: got {show(raw[key])}, expected false: what it means is not "
                "supported in models of this type"
            )
    if family.experts is not None:
        return
    most = 0 if family.is_hybrid else 1  # beside a hybrid's experts there is an MLP
    for key in EXPERT_COUNTS:
        count = raw.get(key)
        if count is None and family.is_hybrid and key == "num_local_experts":
            raise ConfigError(
                f"{where}: {key} is missing, which means experts; expected 0: experts are not "
                "supported in models of this type"
            )
        if isinstance(count, int) and count > most:
            raise ConfigError(
                f"{where}: {key}: got {count}: experts are not supported in models of this type"
            )


def _not_run(where: str, family: str) -> str:
    return (
        f"{where}: auto_map: the Python code of the folder is not run; the model is read as its "
        f"type, {family}, says"
    )


def _is_code_of_family(auto_map: Any, family: str) -> bool:
    """Whether the classes that the folder brings are named as transformers names those that it has
    for the family itself (Phi3ForCausalLM): the folder is older than they are."""
    if not auto_map:
        return True
    if not isinstance(auto_map, Mapping):
        return False
    stem = family.replace("_", "").removesuffix("moe")
    names = (str(path).rpartition(".")[2].replace("_", "").lower() for path in auto_map.values())
    return all(re.fullmatch(f"{stem}(moe)?({_CLASS_ENDS})", name) for name in names)


def _read_model(
    raw: Mapping[str, Any], family: Family, max_seq_len: int | None, where: str
) -> ModelConfig:
    def size(key: str, high: int, **options: Any) -> Any:
        return read_int(raw, key, low=1, high=high, where=where, **options)

    def has(part: Presence) -> bool:
        if isinstance(part, bool):
            return part
        key, default = (part, False) if isinstance(part, str) else part
        return read_bool(raw, key, where=where, default=default)

    num_layers = size("num_hidden_layers", _MAX_LAYERS)
    hidden_size = size("hidden_size", _MAX_HIDDEN)
    num_q_heads, num_kv_heads = _read_heads(raw, family, where)
    max_positions = size(
        "max_position_embeddings", _MAX_POSITIONS, default=family.max_position_embeddings
    )
    head_dim = _read_head_dim(raw, family.head_dim, hidden_size, num_q_heads, where)
    rope = {
        "family": family,
        "head_dim": head_dim,
        "max_position_embeddings": max_positions,
        "where": where,
    }
    return ModelConfig(
        vocab_size=size("vocab_size", _MAX_VOCAB, **_default(family.vocab_size)),
        hidden_size=hidden_size,
        intermediate_size=size(family.intermediate_size, _MAX_INTERMEDIATE),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=read_float(
            raw, "rms_norm_eps", where=where, default=family.rms_norm_eps, high=1.0
        ),
        qkv_bias=has(family.qkv_bias),
        o_bias=has(family.o_bias),
        mlp_bias=has(family.mlp_bias),
        input_norms=family.input_norms,
        branch_norms=family.branch_norms,
        qk_norm=has(family.qk_norm),
        wide_qk_norm=family.wide_qk_norm,
        norm_offset=family.norm_offset,
        attention_sinks=family.attention_sinks,
        tie_word_embeddings=read_bool(
            raw, "tie_word_embeddings", where=where, default=family.tie_word_embeddings
        ),
        rope=read_rope(raw, **rope),
        window_rope=read_window_rope(raw, **rope),
        layers=read_layers(raw, family, num_layers, max(max_positions, max_seq_len or 0), where),
        **_read_activation(raw, family, where),
        **read_experts(raw, family, where),
        **_read_multipliers(raw, family, where),
        **_read_gemma_scales(raw, family, hidden_size, where),
    )


def _default(value: int | None) -> dict[str, int]:
    """The default of a field; without one it must be there."""
    return {} if value is None else {"default": value}


def _read_heads(raw: Mapping[str, Any], family: Family, where: str) -> tuple[int, int]:
    """Query heads and KV heads."""
    num_q_heads = read_int(
        raw, "num_attention_heads", low=1, high=_MAX_HEADS, where=where,
        **_default(family.num_attention_heads),
    )  # fmt: skip
    num_kv_heads = num_q_heads
    if raw.get("num_key_value_heads", 0) is not None:  # null: one KV head per query head
        default = family.num_key_value_heads or num_q_heads
        num_kv_heads = read_int(
            raw, "num_key_value_heads", low=1, high=_MAX_HEADS, where=where, default=default
        )
    if num_q_heads % num_kv_heads != 0:
        raise ConfigError(
            f"{where}: num_key_value_heads: got {num_kv_heads}, expected a divisor of "
            f"num_attention_heads {num_q_heads}"
        )
    return num_q_heads, num_kv_heads


def _read_activation(raw: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    if family.has_clamped_swiglu:
        return {
            "activation": "clamped_swiglu",
            "swiglu_limit": read_float(raw, "swiglu_limit", where=where, default=7.0),
            "swiglu_alpha": read_float(raw, "swiglu_alpha", where=where, default=1.702),
        }
    field_name, default = family.activation
    name = raw.get(field_name)
    name = default if name is None else name
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if not isinstance(name, str) or name not in known:
        raise ConfigError(
            f"{where}: {field_name}: got {show(name)}, expected 'silu' or 'gelu_pytorch_tanh'"
        )
    return {"activation": known[name]}


def _read_gemma_scales(
    raw: Mapping[str, Any], family: Family, hidden_size: int, where: str
) -> dict[str, Any]:
    if not family.has_gemma_scales:
        return {}

    def softcap(key: str, default: float) -> float:
        if key in raw and raw[key] is None:
            return 0.0
        value: float = read_float(raw, key, where=where, default=default)
        return value

    query_scale = read_float(raw, "query_pre_attn_scalar", where=where, default=256.0)
    attention, logits = family.softcaps
    return {
        "embedding_scale": hidden_size**0.5,
        "attention_scale": query_scale**-0.5,
        "attention_softcap": softcap("attn_logit_softcapping", attention),
        "logit_softcap": softcap("final_logit_softcapping", logits),
    }


def _read_multipliers(raw: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    if not family.has_multipliers:
        return {}

    def number(key: str) -> float:
        value: float = read_float(raw, key, where=where, default=1.0)
        return value

    return {
        "embedding_scale": number("embedding_multiplier"),
        "residual_scale": number("residual_multiplier"),
        "attention_scale": number("attention_multiplier"),
        "logit_scale": 1.0 / number("logits_scaling"),
    }


def _read_head_dim(
    raw: Mapping[str, Any], default: int | None, hidden_size: int, num_q_heads: int, where: str
) -> int:
    explicit = raw.get("head_dim") is not None
    if not explicit and default is None and hidden_size % num_q_heads != 0:
        raise ConfigError(
            f"{where}: num_attention_heads: got {num_q_heads}, expected a divisor of hidden_size "
            f"{hidden_size} (or an explicit head_dim)"
        )
    derived = default or hidden_size // num_q_heads
    head_dim: int = read_int(
        raw, "head_dim", low=2, high=_MAX_HEAD_DIM, where=where, default=derived
    )
    if head_dim % 2 != 0 or not 2 <= head_dim <= _MAX_HEAD_DIM:
        source = "" if explicit else f" (hidden_size {hidden_size} / {num_q_heads} heads)"
        raise ConfigError(
            f"{where}: head_dim: got {head_dim}{source}, "
            f"expected an even integer from 2 to {_MAX_HEAD_DIM}"
        )
    return head_dim


def _read_dtype(raw: Mapping[str, Any], where: str) -> str | None:
    """`dtype` (transformers 5) or `torch_dtype` (before)."""
    value = raw.get("dtype") if raw.get("dtype") is not None else raw.get("torch_dtype")
    if value is None or value == "auto":
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(
            f"{where}: dtype: got {show(value)}, expected float32, bfloat16 or float16"
        )
    return name
