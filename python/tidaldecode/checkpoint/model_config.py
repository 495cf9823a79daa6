"""config.json: which model a folder holds, checked field by field.

Called by model_folder.py. Supported are dense decoders of the Llama kind (families.py).
transformers accepts configs that cannot run (hidden_size -64, an unknown rope type,
factor "abc"), so nothing is taken over from it; defaults for absent fields are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidaldecode.checkpoint.families import BESIDE_TEXT_CONFIG, FAMILIES, WRAPPERS, Family
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
    ("phimoe", "mixture-of-experts layers are not supported"),
    ("phi", "models with other parts than text, or of the first generations, are not supported"),
    ("ministral3", "queries that are scaled by their position are not supported"),
    ("mllama", "models with a vision part are not supported"),
    ("_vl", "models with a vision part are not supported"),
    ("gpt2", "learned position embeddings are not supported"),
    ("t5", "encoder-decoder models are not supported"),
    ("bert", "encoder models are not supported"),
)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Fields and meaning of C++ LayerConfig (cpp/include/tidal/config.h)."""

    has_rope: bool = True


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
    branch_norms: bool = False
    tie_word_embeddings: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float = 0.0
    logit_scale: float = 1.0
    rope: RopeConfig = field(default_factory=RopeConfig)
    layers: tuple[LayerConfig, ...] = ()

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

    family: str  # a name in families.py
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
    where = str(path)
    raw, text_notes = _text_part(read_json_object(path), where)
    family = _read_family(raw, where)
    _refuse_unsupported_features(raw, FAMILIES[family], where)
    model = _read_model(raw, FAMILIES[family], where)
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
        notes=text_notes + notes + (quantization.notes if quantization else ()),
    )


def _text_part(raw: dict[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of the text model, and notes for the user."""
    if raw.get("model_type") not in WRAPPERS:
        return raw, ()
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(f"{where}: text_config: got {show(text)}, expected an object")
    beside = {key: raw[key] for key in BESIDE_TEXT_CONFIG if text.get(key) is None and key in raw}
    note = f"{where}: of this model of text and images the text part is used; it takes no images"
    return text | beside, (note,)


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
    if raw.get("auto_map"):
        raise ConfigError(
            f"{where}: auto_map: the model wants to run Python code from its folder, which is "
            "never done; if it is a plain model of its type, remove the field"
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"{where}: hidden_act: got {show(activation)}, expected 'silu'")
    most = 0 if family.is_hybrid else 1  # beside a hybrid's experts there is an MLP
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        count = raw.get(key)
        if count is None and family.is_hybrid and key == "num_local_experts":
            raise ConfigError(
                f"{where}: {key} is missing, which means experts; expected 0: mixture-of-experts "
                "layers are not supported"
            )
        if isinstance(count, int) and count > most:
            raise ConfigError(
                f"{where}: {key}: got {count}: mixture-of-experts layers are not supported"
            )


def _read_model(raw: Mapping[str, Any], family: Family, where: str) -> ModelConfig:
    def size(key: str, high: int, **options: Any) -> Any:
        return read_int(raw, key, low=1, high=high, where=where, **options)

    def has(bias: bool | str) -> bool:
        if isinstance(bias, bool):
            return bias
        default = bias == "attention_bias" and family.attention_bias
        return read_bool(raw, bias, where=where, default=default)

    num_layers = size("num_hidden_layers", _MAX_LAYERS)
    hidden_size = size("hidden_size", _MAX_HIDDEN)
    num_q_heads = size("num_attention_heads", _MAX_HEADS)
    if raw.get("num_key_value_heads", 0) is None:
        num_kv_heads = num_q_heads  # null: one KV head per query head
    else:
        default = family.num_key_value_heads or num_q_heads
        num_kv_heads = size("num_key_value_heads", _MAX_HEADS, default=default)
    if num_q_heads % num_kv_heads != 0:
        raise ConfigError(
            f"{where}: num_key_value_heads: got {num_kv_heads}, expected a divisor of "
            f"num_attention_heads {num_q_heads}"
        )
    max_positions = size(
        "max_position_embeddings", _MAX_POSITIONS, default=family.max_position_embeddings
    )
    head_dim = _read_head_dim(raw, family.head_dim, hidden_size, num_q_heads, where)
    _check_layer_types(raw, family, num_layers, where)
    _refuse_windows(raw, family, num_layers, max_positions, where)
    return ModelConfig(
        vocab_size=size("vocab_size", _MAX_VOCAB),
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
        qk_norm=family.qk_norm,
        branch_norms=family.branch_norms,
        tie_word_embeddings=read_bool(
            raw, "tie_word_embeddings", where=where, default=family.tie_word_embeddings
        ),
        rope=read_rope(
            raw,
            family=family,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            where=where,
        ),
        layers=_read_layers(raw, family, num_layers, where),
        **_read_multipliers(raw, family, where),
    )


def _read_multipliers(raw: Mapping[str, Any], family: Family, where: str) -> dict[str, float]:
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


def _read_layers(
    raw: Mapping[str, Any], family: Family, num_layers: int, where: str
) -> tuple[LayerConfig, ...]:
    """Layer by layer; () if all are as by default."""
    if family.has_layers_without_rope:
        rotates = _rotating_layers(raw, num_layers, where)
    elif family.is_hybrid:
        rotates = [raw.get("position_embedding_type") == "rope"] * num_layers
    else:
        return ()
    return () if all(rotates) else tuple(LayerConfig(has_rope=bool(each)) for each in rotates)


def _rotating_layers(raw: Mapping[str, Any], num_layers: int, where: str) -> list[int]:
    """1 for each layer that rotates q and k, else 0."""
    rotates = raw.get("no_rope_layers")
    if rotates is None:
        interval = read_int(
            raw, "no_rope_layer_interval", low=1, high=_MAX_LAYERS, where=where, default=4
        )
        return [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if (
        not isinstance(rotates, list)
        or len(rotates) < num_layers
        or any(value not in (0, 1) for value in rotates)
    ):
        raise ConfigError(
            f"{where}: no_rope_layers: got {show(rotates)}, expected a list of {num_layers} "
            "numbers (num_hidden_layers), 1 for a layer with rotation and 0 for one without"
        )
    return rotates[:num_layers]


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


def _check_layer_types(raw: Mapping[str, Any], family: Family, num_layers: int, where: str) -> None:
    """Refuses layers that do not attend to the whole context."""
    layer_types = raw.get("layer_types")
    if layer_types is None:
        if family.is_hybrid:
            raise ConfigError(
                f"{where}: layer_types is missing, so all layers are state-space layers, which are "
                "not supported"
            )
        return
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        count = len(layer_types) if isinstance(layer_types, list) else show(layer_types)
        raise ConfigError(
            f"{where}: layer_types: got {count}, expected a list of {num_layers} names "
            "(num_hidden_layers)"
        )
    for index, kind in enumerate(layer_types):
        if kind not in family.full_attention:
            raise ConfigError(
                f"{where}: layer_types: layer {index} is {show(kind)}, expected "
                f"{family.full_attention[-1]!r}: other kinds of layers are not supported"
            )


def _refuse_windows(
    raw: Mapping[str, Any], family: Family, num_layers: int, max_positions: int, where: str
) -> None:
    """Refuses a sliding window in use; one never reached is none."""
    if not family.has_window:
        return
    if family.window_switch is not None:
        uses_window = read_bool(raw, family.window_switch, where=where, default=False)
        if raw.get("layer_types") is not None or not uses_window:
            return
        default = family.max_window_layers
        first = read_int(
            raw, "max_window_layers", low=0, high=2**31 - 1, where=where, default=default
        )
        if default and first >= num_layers:
            return
    window = raw.get("sliding_window", family.sliding_window)
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
