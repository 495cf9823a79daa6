"""config.json: which model a folder holds, checked field by field.

Called by model_folder.py. Supported are the dense decoders of the Llama kind (llama, mistral,
qwen2, qwen3). transformers accepts configs that cannot run (hidden_size -64, an unknown rope type,
factor "abc"), so nothing is taken over from it; defaults for absent fields are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidaldecode.checkpoint.fields import read_bool, read_float, read_int
from tidaldecode.checkpoint.json_file import read_json_object
from tidaldecode.checkpoint.quant_scheme import Quantization
from tidaldecode.checkpoint.quantization import read_quantization
from tidaldecode.checkpoint.rope_config import RopeConfig, read_rope
from tidaldecode.errors import ConfigError, show

# Caps far above any public model: a typing error or an attack stops here, before any allocation.
_MAX_VOCAB = 2**22
_MAX_HIDDEN = 2**17
_MAX_INTERMEDIATE = 2**20
_MAX_LAYERS = 1024
_MAX_HEADS = 4096
_MAX_HEAD_DIM = 1024
_MAX_POSITIONS = 2**28

# What transformers assumes where a config of the family leaves the field out.
_FAMILY_DEFAULTS: dict[str, dict[str, int | None]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "head_dim": None},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "head_dim": None},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": None},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}
MODEL_FAMILIES = tuple(_FAMILY_DEFAULTS)

# Parts of a model_type and why models with it are refused; the first that fits speaks.
_REFUSAL_REASONS = (
    ("moe", "mixture-of-experts layers are not supported"),
    ("mixtral", "mixture-of-experts layers are not supported"),
    ("deepseek", "latent attention and mixture-of-experts layers are not supported"),
    ("gpt_oss", "attention sinks and mixture-of-experts layers are not supported"),
    ("llama4", "mixture-of-experts and chunked attention layers are not supported"),
    ("qwen3_next", "linear attention layers are not supported"),
    ("qwen3_5", "linear attention layers are not supported"),
    ("mamba", "state-space layers are not supported"),
    ("gemma", "its scaled embeddings, soft caps and sliding layers are not supported"),
    ("phi", "fused projections and partial rotary embeddings are not supported"),
    ("mistral3", "models with a vision part are not supported"),
    ("mllama", "models with a vision part are not supported"),
    ("_vl", "models with a vision part are not supported"),
    ("gpt2", "learned position embeddings are not supported"),
    ("t5", "encoder-decoder models are not supported"),
    ("bert", "encoder models are not supported"),
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
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def rope_window(self) -> int | None:
        """Length up to which the rotary frequencies stay as they are; None: at any length."""
        if self.rope.type == "dynamic":
            return self.max_position_embeddings
        return self.rope.original_max_position_embeddings if self.rope.type == "longrope" else None


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """All of config.json that the package uses."""

    family: str  # "llama", "mistral", "qwen2" or "qwen3"
    name: str  # what the config calls the model; may be empty
    dtype: str | None  # "float32", "bfloat16", "float16"; None if the config does not say
    eos_token_ids: tuple[int, ...]
    model: ModelConfig
    quantization: Quantization | None = None  # None: weights as they are
    notes: tuple[str, ...] = ()  # for the user: what was not taken as it stands


def read_checkpoint_config(path: Path) -> CheckpointConfig:
    """Reads and checks config.json.

    Args:
        path: the file.

    Raises: ConfigError naming the file and the field.
    """
    raw = read_json_object(path)
    where = str(path)
    family = _read_family(raw, where)
    _refuse_unsupported_features(raw, where)
    model = _read_model(raw, family, where)
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
        notes=notes + (quantization.notes if quantization else ()),
    )


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
    if isinstance(family, str) and family in MODEL_FAMILIES:
        return family
    reason = "its layers are not known to this engine"
    if family is None:
        reason = "config.json does not name a model type"
    elif isinstance(family, str):
        reasons = (why for part, why in _REFUSAL_REASONS if part in family.lower())
        reason = next(reasons, reason)
    raise ConfigError(
        f"{where}: model_type: got {show(family)}, expected one of {', '.join(MODEL_FAMILIES)}: "
        f"{reason}"
    )


def _refuse_unsupported_features(raw: Mapping[str, Any], where: str) -> None:
    if raw.get("auto_map"):
        raise ConfigError(
            f"{where}: auto_map: the model wants to run Python code from its folder, which is "
            "never done; if it is a plain model of its type, remove the field"
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"{where}: hidden_act: got {show(activation)}, expected 'silu'")
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(raw.get(key), int) and raw[key] > 1:
            raise ConfigError(
                f"{where}: {key}: got {raw[key]}: mixture-of-experts layers are not supported"
            )


def _read_model(raw: Mapping[str, Any], family: str, where: str) -> ModelConfig:
    defaults = _FAMILY_DEFAULTS[family]

    def size(key: str, high: int, **options: Any) -> Any:
        return read_int(raw, key, low=1, high=high, where=where, **options)

    num_layers = size("num_hidden_layers", _MAX_LAYERS)
    hidden_size = size("hidden_size", _MAX_HIDDEN)
    num_q_heads = size("num_attention_heads", _MAX_HEADS)
    if raw.get("num_key_value_heads", 0) is None:
        num_kv_heads = num_q_heads  # null: one KV head per query head
    else:
        default = defaults["num_key_value_heads"] or num_q_heads
        num_kv_heads = size("num_key_value_heads", _MAX_HEADS, default=default)
    if num_q_heads % num_kv_heads != 0:
        raise ConfigError(
            f"{where}: num_key_value_heads: got {num_kv_heads}, expected a divisor of "
            f"num_attention_heads {num_q_heads}"
        )
    max_positions = size(
        "max_position_embeddings", _MAX_POSITIONS, default=defaults["max_position_embeddings"]
    )
    head_dim = _read_head_dim(raw, defaults["head_dim"], hidden_size, num_q_heads, where)
    _refuse_sliding_layers(raw, family, num_layers, max_positions, where)
    attention_bias = family in ("llama", "qwen3") and read_bool(
        raw, "attention_bias", where=where, default=False
    )
    return ModelConfig(
        vocab_size=size("vocab_size", _MAX_VOCAB),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size", _MAX_INTERMEDIATE),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=read_float(raw, "rms_norm_eps", where=where, default=1e-6, high=1.0),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=family == "llama" and read_bool(raw, "mlp_bias", where=where, default=False),
        qk_norm=family == "qwen3",
        tie_word_embeddings=read_bool(raw, "tie_word_embeddings", where=where, default=False),
        rope=read_rope(raw, head_dim=head_dim, max_position_embeddings=max_positions, where=where),
    )


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


def _refuse_sliding_layers(
    raw: Mapping[str, Any], family: str, num_layers: int, max_positions: int, where: str
) -> None:
    """Refuses layers that do not attend to the whole context; a window never reached is none."""
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            count = len(layer_types) if isinstance(layer_types, list) else show(layer_types)
            raise ConfigError(
                f"{where}: layer_types: got {count}, expected a list of {num_layers} names "
                "(num_hidden_layers)"
            )
        for index, kind in enumerate(layer_types):
            if kind != "full_attention":
                raise ConfigError(
                    f"{where}: layer_types: layer {index} is {show(kind)}, expected "
                    "'full_attention': other kinds of attention are not supported"
                )
    if family.startswith("qwen"):
        uses_window = read_bool(raw, "use_sliding_window", where=where, default=False)
        first = read_int(raw, "max_window_layers", low=0, high=2**31 - 1, where=where, default=28)
        if layer_types is not None or not uses_window or first >= num_layers:
            return
        window = raw.get("sliding_window", 4096)
    elif family == "mistral":
        window = raw.get("sliding_window", 4096)
    else:
        return
    if window is None:
        return
    window = read_int(
        {"sliding_window": window}, "sliding_window", low=1, high=2**31 - 1, where=where
    )
    if window < max_positions:
        raise ConfigError(
            f"{where}: sliding_window: got {window}, expected null or at least "
            f"max_position_embeddings {max_positions}: sliding attention is not supported"
        )


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
