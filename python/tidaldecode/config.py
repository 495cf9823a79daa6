"""DecodeConfig: what the user wants of the engine, as one value; PlanConfig: the plan's part of it.

`Decoder(model_dir, token_budget=512)` is the same as
`Decoder(model_dir, config=DecodeConfig(token_budget=512))`. A setting left at None takes the value
of the model's plan (plans.py) where that has one, and else the engine's default, which is written
in one place, cpp/include/tidal/config.h.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from tidaldecode.errors import ConfigError, show

DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = (*DTYPES, "int8", "fp8")
ATTENTION_KINDS = ("auto", "tidal", "full")
LOAD_FORMATS = ("auto", "dummy")
LM_HEAD_FORMATS = ("auto", "decoded", "fp8", "int4")
WEIGHT_FORMATS = (*LM_HEAD_FORMATS, "mxfp4")
ACTIVATION_FORMATS = ("auto", "16bit", "fp8")
GRANULARITIES = ("layer", "kv_head", "head")
POOLINGS = ("sum", "max")
SHADOWS = ("none", "int4")
VERIFY_WORDS = ("greedy", "sample")  # beside True and False
DRAFTS = ("tidal", "ngram", "both")

CHOICES = {
    "dtype": ("auto", *DTYPES),
    "kv_dtype": ("auto", *KV_DTYPES),
    "attention": ATTENTION_KINDS,
    "load_format": LOAD_FORMATS,
    "weight_format": WEIGHT_FORMATS,
    "lm_head_format": LM_HEAD_FORMATS,
    "activation_format": ACTIVATION_FORMATS,
    "granularity": GRANULARITIES,
    "pooling": POOLINGS,
    "shadow": SHADOWS,
    "drafts": DRAFTS,
}
_INT32_MAX = 2**31 - 1
INT_RANGES = {
    "token_budget": (1, _INT32_MAX),
    "min_token_budget": (1, _INT32_MAX),
    "full_layers": (1, _INT32_MAX),
    "sink_tokens": (0, _INT32_MAX),
    "recent_tokens": (1, _INT32_MAX),
    "sparse_min_context": (0, _INT32_MAX),
    "correction_interval": (0, _INT32_MAX),
    "draft_tokens": (1, 64),
    "max_seq_len": (1, _INT32_MAX),
    "max_batch_size": (1, 65535),
    "page_size": (1, 65536),
    "num_pages": (1, _INT32_MAX),
    "prefill_chunk": (1, _INT32_MAX),
    "num_threads": (1, 4096),
}
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "gpu_memory_utilization": (lambda share: 0 < share <= 1, "a number in (0, 1]"),
    "host_kv_gib": (lambda gib: 0 <= gib <= 65536, "a number in [0, 65536]"),
    "max_chunk_ms": (lambda ms: 0 < ms <= 1e9, "a number in (0, 1e9]"),
    "decode_share": (lambda share: 0 <= share < 1, "a number in [0, 1)"),
}
# Integers that may be "auto" instead, as a value of their own.
_AUTOMATIC = ("token_budget", "recent_tokens")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")

# The settings that are options of commands: their help, in the order that it has there.
OPTION_HELP = {
    "device": "auto, cpu, cuda or cuda:N.",
    "dtype": "Weights: auto, float32, bfloat16 or float16.",
    "kv_dtype": "KV cache: auto (dtype), fp8; CPU: float32, bfloat16, float16, int8.",
    "weight_format": (
        "Layers' matrices: auto (a quantised checkpoint's codes), decoded, fp8, int4; "
        "of experts: mxfp4."
    ),
    "lm_head_format": "The output matrix: auto (as the checkpoint has it), decoded, fp8 or int4.",
    "activation_format": (
        "Inputs of fp8 products of prompts: 16bit, fp8, or auto: as the checkpoint says, on CUDA."
    ),
    "load_format": "auto, or dummy: random weights, to measure speed.",
    "attention": (
        "tidal, full, or auto: tidal if there is a plan for the model, or layers or a budget."
    ),
    "token_budget": (
        "Positions a sparse layer attends to, or auto: as many as --top-p-mass asks for."
    ),
    "top_p_mass": "Below 1, sets keep as few of these positions as hold this share of the softmax.",
    "min_token_budget": "Positions a set keeps whatever its mass.",
    "select_layers": "Dense layers that choose positions, separated by commas.",
    "scored_layers": "Layers that choose from the keys, and attend to those only.",
    "full_layers": "Dense layers in front.",
    "granularity": "Heads that share a set: kv_head, head or layer.",
    "pooling": "Over their scores: sum or max.",
    "shadow": "What scored layers choose from: none or int4.",
    "sink_tokens": "First positions, always chosen.",
    "recent_tokens": (
        "Last positions, always chosen; auto, the default: a quarter of the (least) budget."
    ),
    "sparse_min_context": (
        "Up to this length steps are dense; auto, the default: while that is faster."
    ),
    "correction_interval": (
        "Sparsely decoded tokens after which a dense pass rewrites their cache; 0 is never."
    ),
    "verify": "Tokens are drafted, dense passes decide: the tokens of dense decoding.",
    "drafts": "With --verify, what drafts: tidal (sparse steps), ngram (the text so far) or both.",
    "draft_tokens": "With --verify, drafts per dense pass, or auto.",
    "max_seq_len": "Tokens of prompt and output together.",
    "max_batch_size": "Sequences decoded together.",
    "num_pages": "Pages of the KV cache.",
    "page_size": "Tokens per KV page.",
    "gpu_memory_utilization": "Share of the memory that the decoder may take in all.",
    "prefix_cache": "Find again what earlier prompts had in common.",
    "prefill_chunk": "Prompt tokens per pass.",
    "max_chunk_ms": "Of a pass over prompts while others decode, at most.",
    "decode_share": "Of the time that decoding has while prompts wait.",
    "num_threads": "CPU threads.",
}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Which layers choose positions, and how. Holds nothing of a device. Immutable; checked.

    None takes the value of the model's plan where there is one, and else the engine's default.

    Args:
        select_layers: layers that read everything densely and choose positions on the way,
            strictly ascending.
        scored_layers: layers that score all keys to choose positions and attend to those only,
            strictly ascending, none of them in select_layers. Each reads half of what a select
            layer does.
        full_layers: dense layers in front of the first that chooses, >= 1.
        token_budget: positions a sparse layer attends to, per set, >= 1. "auto" is an adaptive
            budget: as many as top_p_mass asks for, 0.98 if it is not given, up to 4096.
        top_p_mass: below 1, an adaptive budget: of its token_budget best positions a set keeps as
            few as hold this share of the softmax of its heads, in (0, 1]. Needs pooling "sum".
        min_token_budget: positions a set keeps whatever its mass; None is 64, or token_budget if
            that is less.
        granularity: which heads share a set: "layer" (all), "kv_head" or "head" (the paper).
        pooling: "sum" or "max" over the scores of the heads that share a set.
        shadow: what scored layers choose from: "none" is the keys; "int4" keeps their keys in 4
            bits beside the cache and reads those, an eighth of K and V in 16 bits.
        sink_tokens: first positions, always chosen, >= 0.
        recent_tokens: last positions, always chosen, >= 1; "auto" is a quarter of the token_budget,
            of an adaptive one a quarter of min_token_budget.
        sparse_min_context: sequences of at most this many tokens are decoded densely; "auto" (the
            same as None): as long as that is the faster way on the device.
        correction_interval: every so many tokens that a sequence decoded sparsely, a dense pass
            rewrites their keys and values, which sparse steps leave slightly wrong; 0 is never.

    Raises:
        ConfigError: a value of the wrong kind or out of range; the message names the field.
    """

    select_layers: tuple[int, ...] | None = None
    scored_layers: tuple[int, ...] | None = None
    full_layers: int | None = None
    token_budget: int | str | None = None
    top_p_mass: float | None = None
    min_token_budget: int | None = None
    granularity: str | None = None
    pooling: str | None = None
    shadow: str | None = None
    sink_tokens: int | None = None
    recent_tokens: int | str | None = None
    sparse_min_context: int | str | None = None
    correction_interval: int | None = None

    def __post_init__(self) -> None:
        if is_auto(self.sparse_min_context):
            object.__setattr__(self, "sparse_min_context", None)
        for name in PLAN_SETTINGS:
            if getattr(self, name) is not None:
                check_setting(name, getattr(self, name))
        for name in LAYER_FIELDS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_layer_list(name, getattr(self, name)))
        both = sorted(set(self.select_layers or ()) & set(self.scored_layers or ()))
        if both:
            raise ConfigError(
                f"scored_layers: got layer {both[0]}, which select_layers has too, expected it in "
                "one of the two"
            )

    @property
    def choosing_layers(self) -> tuple[int, ...]:
        """The layers that choose positions, of both kinds, ascending; none: dense decoding."""
        return tuple(sorted((*(self.select_layers or ()), *(self.scored_layers or ()))))

    def settings(self) -> dict[str, Any]:
        """The settings that are given, by name, without the layers."""
        values = {name: getattr(self, name) for name in PLAN_SETTINGS}
        return {name: value for name, value in values.items() if value is not None}


PLAN_FIELDS = tuple(field.name for field in fields(PlanConfig))
LAYER_FIELDS = ("select_layers", "scored_layers")
# What shapes the choice of positions beside the layers; a plan file may give each.
PLAN_SETTINGS = tuple(name for name in PLAN_FIELDS if name not in LAYER_FIELDS)


def plan_part(settings: PlanConfig, **changes: Any) -> PlanConfig:
    """The settings of a plan alone, out of a DecodeConfig too, with some of them changed."""
    return PlanConfig(**{name: getattr(settings, name) for name in PLAN_FIELDS} | changes)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(PlanConfig):
    """Settings of a Decoder: those of a PlanConfig and these. Immutable; checked on construction.

    Args:
        device: "auto" (the first CUDA device that works, else the CPU), "cpu", "cuda", "cuda:1".
        dtype: of the weights: "auto" (the checkpoint's; on CUDA float32 becomes bfloat16),
            "float32", "bfloat16" or "float16". Arithmetic accumulates in float32 everywhere.
        kv_dtype: of the KV cache: "auto" is dtype. "fp8" (e4m3) takes half of 16 bits: 4
            significant bits, numbers up to 448 times the layer's k_scale or v_scale in the
            checkpoint, or 1 without. CUDA takes nothing else; the CPU also "float32", "bfloat16",
            "float16", and "int8", as small as fp8 and about as exact as bfloat16, with a scale for
            each token and head.
        load_format: "auto" reads the folder's weight files; "dummy" looks for none and gives the
            model random weights of the shapes in config.json, for measuring speed: what it writes
            means nothing. Prompts of token ids then need no tokenizer either.
        weight_format: how the layers' matrices are kept. "auto" keeps the codes of a quantised
            checkpoint (fp8, int4, of experts MXFP4) on the CPU and on CUDA devices of compute
            capability 9.0, and decodes others, and those on other devices, to dtype while loading,
            as "decoded" does all. "fp8" and "int4" round a checkpoint of numbers to codes while
            loading: to the nearest float8 with a scale for each row, or 4 bits with one for every
            128 inputs; "mxfp4" those of experts alone, to float4 e2m1 with a power of 2 for every
            32. The log says by how much. On other devices the rounded numbers are kept in dtype.
        lm_head_format: the same of the output matrix, by itself: "auto" is as the checkpoint has
            it, and in numbers where weight_format is "decoded". One that is the embedding table too
            gets codes of its own, beside it.
        activation_format: the inputs of the products of prompts with layers' matrices in fp8 codes,
            experts left out. "fp8" (W8A8) rounds them to float8 as well, under a scale for each
            token (its largest number over 448), for every 128 inputs where those of the weights are
            of blocks, or the checkpoint's own fixed one. "16bit" leaves them (in float32 on the
            CPU). "auto" is "fp8" on CUDA where the checkpoint says that it is meant so
            (compressed-tensors' input_activations, quant_method "fp8"), else "16bit". All tokens of
            a prompt are treated alike, in chunks of any length (what differs by rounding may round
            to another code); those that are decoded, checked or corrected are not rounded, and so
            not found in the prefix cache by later prompts.
        attention: "tidal", "full" (dense), or "auto": tidal if select_layers, scored_layers or a
            token_budget are given or there is a plan for this model, else dense. Without layers and
            without a plan every layer chooses for itself, by shadow keys ("int4").
        verify: True has tokens drafted first and a dense pass over the drafts decide, so that the
            tokens are those of dense decoding, greedy or sampled. "sample" is the same; "greedy" is
            the same for calls with temperature 0 and refuses others. Needs no correction_interval
            and allows none.
        drafts: what drafts, with verify. "tidal" is sparse steps; a dense decoder has none and
            drafts nothing. "ngram" is the text itself, prompt and answer (prompt lookup): what
            followed its last tokens, 4 of them if it can be, 2 at least, the last time that they
            occurred in it. That takes no step, and a dense decoder has it too; where they never
            occurred, a dense step gives the next token. "both" is the text where it drafts
            anything, else sparse steps. None is "tidal".
        draft_tokens: drafts per dense pass, 1 to 64; "auto" (the same as None): one more than last
            time if all were kept, else as many as were; from the text, where a draft takes no step,
            twice as many as were kept; from 1 to 16.
        max_seq_len: tokens of one sequence, prompt and output; None is the model's
            max_position_embeddings, as far as memory allows.
        max_batch_size: sequences decoded together.
        page_size: tokens per page of the KV cache.
        num_pages: pages of the KV cache; None is what memory allows.
        gpu_memory_utilization: share of the memory that weights, cache and everything else may take
            in all, in (0, 1]; 0.9 if None. On a GPU of its whole memory, as far as that is free; on
            the CPU of the memory that is free.
        host_kv_gib: GiB of host memory for the pages of requests that are paused to make room for
            others; they go on from them. Without room there, 0 if None, what they had read is read
            again, and what they had decoded sparsely becomes dense.
        prefix_cache: False reads every prompt whole; else pages that an earlier call has read are
            found again by their tokens (GenerationResult.cached_tokens). None is True.
        prefill_chunk: prompt tokens per pass; None is the backend's choice.
        max_chunk_ms: milliseconds that a pass over prompts takes at most while others decode;
            60 if None.
        decode_share: share of the time that decoding has at least while prompts wait, in [0, 1);
            0.25 if None. 0 reads all prompts first.
        cuda_graphs: False launches every kernel of a step by itself (for debugging).
        batch_invariant: True gives a call on CUDA the same tokens whatever else runs, and verified
            decoding those of dense decoding. Not across a pause after which tokens are read again,
            and where an answer comes back in a prompt only if both calls find it in the prefix
            cache, or neither does. Costs up to 4 % of a step of up to 16 rows, and half of the
            speed beyond (docs/performance.md). On the CPU, where steps of up to 64 rows are always
            so and longer chunks of prompts to rounding, it changes nothing. None is False.
        num_threads: of the CPU backend; None is one per processor that the process, or its
            container, may use.

    Raises:
        ConfigError: a value of the wrong kind or out of range; the message names the field.
    """

    device: str = "auto"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    load_format: str = "auto"
    weight_format: str = "auto"
    lm_head_format: str = "auto"
    activation_format: str = "auto"
    attention: str = "auto"
    verify: bool | str | None = None
    drafts: str | None = None
    draft_tokens: int | str | None = None
    max_seq_len: int | None = None
    max_batch_size: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    gpu_memory_utilization: float | None = None
    host_kv_gib: float | None = None
    prefix_cache: bool | None = None
    prefill_chunk: int | None = None
    max_chunk_ms: float | None = None
    decode_share: float | None = None
    cuda_graphs: bool | None = None
    batch_invariant: bool | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ConfigError(
                f"device: got {show(self.device)}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'"
            )
        if is_auto(self.draft_tokens):
            object.__setattr__(self, "draft_tokens", None)
        for name in (*CHOICES, *INT_RANGES):
            value = getattr(self, name)
            if name not in PLAN_SETTINGS and value is not getattr(DecodeConfig, name):
                check_setting(name, value)
        for name, (is_right, expected) in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and is_right(value)):
                raise ConfigError(f"{name}: got {show(value)}, expected {expected}")
        for name in ("prefix_cache", "cuda_graphs", "batch_invariant"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise ConfigError(
                    f"{name}: got {show(getattr(self, name))}, expected True or False"
                )
        is_word = isinstance(self.verify, str) and self.verify in VERIFY_WORDS
        if not is_word and not isinstance(self.verify, (bool, type(None))):
            raise ConfigError(
                f"verify: got {show(self.verify)}, expected True, False, 'greedy' or 'sample'"
            )
        given = [name for name in LAYER_FIELDS if getattr(self, name) is not None]
        if given and self.attention == "full":
            raise ConfigError(
                f"attention: got 'full' together with {given[0]}, expected one of them: "
                "dense decoding selects nothing"
            )


def is_auto(value: Any) -> bool:
    """True for the word "auto"; an array, compared with it, would answer with an array."""
    return isinstance(value, str) and value == "auto"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_setting(name: str, value: Any, where: str = "") -> None:
    """Checks one setting by its field's name; `where` (a file) goes in front of the message."""
    prefix = f"{where}: {name}" if where else name
    if name in CHOICES:
        if not isinstance(value, str) or value not in CHOICES[name]:
            expected = ", ".join(repr(choice) for choice in CHOICES[name])
            raise ConfigError(f"{prefix}: got {show(value)}, expected one of {expected}")
        return
    has_auto = name in _AUTOMATIC
    if has_auto and is_auto(value):
        return
    if name == "top_p_mass":
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value <= 1:
            raise ConfigError(f"{prefix}: got {show(value)}, expected a number in (0, 1]")
        return
    low, high = INT_RANGES[name]
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not low <= value <= high:
        expected = f"an integer from {low} to {high}"
        if has_auto:
            expected += " or 'auto'"
        raise ConfigError(f"{prefix}: got {show(value)}, expected {expected}")


def check_layer_list(name: str, value: Any, where: str = "") -> tuple[int, ...]:
    """Strictly ascending layer numbers, at least one; their upper end is checked with the model."""
    prefix = f"{where}: {name}" if where else name
    expected = "strictly ascending layer numbers >= 1, for example (2, 13)"
    if isinstance(value, (str, bytes)) or not isinstance(value, (tuple, list)) or not value:
        raise ConfigError(f"{prefix}: got {show(value)}, expected {expected}")
    previous = 0
    for layer in value:
        is_int = isinstance(layer, int) and not isinstance(layer, bool)
        if not is_int or layer <= previous:
            raise ConfigError(f"{prefix}: got {show(list(value))}, expected {expected}")
        previous = layer
    return tuple(value)


def one_config(config: DecodeConfig | None, options: dict[str, Any]) -> DecodeConfig:
    """The keyword options as a DecodeConfig, or the one that was given."""
    if config is None:
        return DecodeConfig(**options)
    if not isinstance(config, DecodeConfig):
        raise ConfigError(f"config: got a {type(config).__name__}, expected a DecodeConfig")
    defaults = {field.name: field.default for field in fields(DecodeConfig)}
    both = [name for name, value in options.items() if not _is_default(value, defaults[name])]
    if both:
        raise ConfigError(
            f"config: given together with {', '.join(both)}; expected one of the two ways"
        )
    return config


def _is_default(value: Any, default: Any) -> bool:
    """Whether nothing was given; the defaults are words and None."""
    return value is default or (isinstance(value, str) and value == default)
