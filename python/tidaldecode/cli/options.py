"""The command line's options, declared once: engine settings and sampling settings with their help.

Used by cli.py. Names and meanings are those of DecodeConfig and Decoder.generate.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from tidaldecode import _core
from tidaldecode.config import LAYER_FIELDS, DecodeConfig
from tidaldecode.errors import InvalidArgument, show

_ENGINE = "Engine"
_SAMPLING = "Sampling"
_DEFAULTS = _core.DecodeConfig()


def _engine_option(help_text: str, field: str = "") -> Any:
    if field:
        value = getattr(_DEFAULTS, field)
        is_auto = value == 0 and field in (
            "draft_tokens",
            "max_seq_len",
            "num_pages",
            "prefill_chunk",
            "num_threads",
            "min_token_budget",
        )
        default = "automatic" if is_auto else value
        help_text += f" [dim]\\[default: {default}][/dim]"
    return typer.Option(help=help_text, rich_help_panel=_ENGINE)


def _sampling_option(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=_SAMPLING)


ModelDir = Annotated[
    Path, typer.Argument(help="A Hugging Face model folder, or a hub id: org/name\\[@revision].")
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")]

Device = Annotated[str, _engine_option("auto, cpu, cuda or cuda:N.")]
DType = Annotated[str, _engine_option("Weights: auto, float32, bfloat16 or float16.")]
KvDType = Annotated[
    str, _engine_option("KV cache: auto (dtype), fp8; CPU: float32, bfloat16, float16, int8.")
]
WeightFormat = Annotated[
    str,
    _engine_option(
        "Layers' matrices: auto (a quantised checkpoint's codes), decoded, fp8, int4; of experts: "
        "mxfp4."
    ),
]
LmHeadFormat = Annotated[
    str, _engine_option("The output matrix: auto (as the checkpoint has it), decoded, fp8 or int4.")
]
ActivationFormat = Annotated[
    str,
    _engine_option(
        "Inputs of fp8 products of prompts: 16bit, fp8, or auto: as the checkpoint says, on CUDA."
    ),
]
Attention = Annotated[
    str, _engine_option("tidal, full, or auto: tidal if there is a plan for the model.")
]
TokenBudget = Annotated[
    str | None,
    _engine_option(
        "Positions a sparse layer attends to, or auto: as many as --top-p-mass asks for.",
        "token_budget",
    ),
]
TopPMass = Annotated[
    float | None,
    _engine_option(
        "Below 1, sets keep as few of these positions as hold this share of the softmax.",
        "top_p_mass",
    ),
]
MinTokenBudget = Annotated[
    int | None,
    _engine_option("Positions a set keeps whatever its mass.", "min_token_budget"),
]
PromptFile = Annotated[
    str | None, typer.Option(help="A file with the text to continue; - is stdin.")
]
SelectLayers = Annotated[
    str | None, _engine_option("Dense layers that choose positions, separated by commas.")
]
ScoredLayers = Annotated[
    str | None, _engine_option("Layers that choose from the keys, and attend to those only.")
]
FullLayers = Annotated[int | None, _engine_option("Dense layers in front.", "full_layers")]
Granularity = Annotated[
    str | None, _engine_option("Heads that share a set: kv_head, head or layer.", "granularity")
]
Pooling = Annotated[str | None, _engine_option("Over their scores: sum or max.", "pooling")]
Shadow = Annotated[
    str | None, _engine_option("What scored layers choose from: none or int4.", "shadow")
]
SinkTokens = Annotated[int | None, _engine_option("First positions, always chosen.", "sink_tokens")]
RecentTokens = Annotated[
    int | None, _engine_option("Last positions, always chosen; default: a quarter of the budget.")
]
SparseMinContext = Annotated[
    int | None,
    _engine_option(
        "Up to this length steps are dense; default: while that is faster.", "sparse_min_context"
    ),
]
CorrectionInterval = Annotated[
    int | None,
    _engine_option(
        "Sparsely decoded tokens after which a dense pass rewrites their cache; 0 is never.",
        "correction_interval",
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Tokens are drafted, dense passes decide: the tokens of dense decoding.",
        rich_help_panel=_ENGINE,
    ),
]
Drafts = Annotated[
    str | None,
    _engine_option(
        "With --verify, what drafts: tidal (sparse steps), ngram (the text so far) or both.",
        "drafts",
    ),
]
DraftTokens = Annotated[
    int | None, _engine_option("With --verify, drafts per dense pass.", "draft_tokens")
]
MaxSeqLen = Annotated[
    int | None, _engine_option("Tokens of prompt and output together.", "max_seq_len")
]
MaxBatchSize = Annotated[
    int | None, _engine_option("Sequences decoded together.", "max_batch_size")
]
NumPages = Annotated[int | None, _engine_option("Pages of the KV cache.", "num_pages")]
GpuMemoryUtilization = Annotated[
    float | None,
    _engine_option(
        "Share of the memory that the decoder may take in all.", "gpu_memory_utilization"
    ),
]
PageSize = Annotated[int | None, _engine_option("Tokens per KV page.", "page_size")]
PrefillChunk = Annotated[int | None, _engine_option("Prompt tokens per pass.", "prefill_chunk")]
MaxChunkMs = Annotated[
    float | None,
    _engine_option("Of a pass over prompts while others decode, at most.", "max_chunk_ms"),
]
DecodeShare = Annotated[
    float | None,
    _engine_option("Of the time that decoding has while prompts wait.", "decode_share"),
]
PrefixCache = Annotated[
    bool | None,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Find again what earlier prompts had in common. [dim]\\[default: yes][/dim]",
        rich_help_panel=_ENGINE,
    ),
]
LoadFormat = Annotated[str, _engine_option("auto, or dummy: random weights, to measure speed.")]
NumThreads = Annotated[int | None, _engine_option("CPU threads.", "num_threads")]

MaxNewTokens = Annotated[
    int | None, _sampling_option("Most tokens to generate.", "--max-new-tokens", "-n")
]
Temperature = Annotated[float | None, _sampling_option("0 is greedy.")]
TopK = Annotated[int | None, _sampling_option("Keep the k most likely tokens; 0 is off.")]
TopP = Annotated[float | None, _sampling_option("Keep tokens up to this probability.")]
MinP = Annotated[float | None, _sampling_option("Drop tokens below this share of the best.")]
RepetitionPenalty = Annotated[float | None, _sampling_option("1 is off.")]
Seed = Annotated[int | None, _sampling_option("Of the draws; a new one each time if not given.")]
Stop = Annotated[list[str] | None, _sampling_option("Text that ends the output; may be repeated.")]
StopTokenId = Annotated[
    list[int] | None, _sampling_option("Token id that ends the output; may be repeated.")
]
IgnoreEos = Annotated[bool, _sampling_option("Go on after end-of-text tokens.", "--ignore-eos")]

Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Put prompts through the model's chat template. "
        "[dim]\\[default: if the folder has one][/dim]",
    ),
]

_ENGINE_FIELDS = tuple(field.name for field in fields(DecodeConfig))
_SAMPLING_FIELDS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "ignore_eos",
)


# Where and in what a model runs, of every command that measures one.
PLACE_OPTIONS = (
    "device",
    "dtype",
    "kv_dtype",
    "weight_format",
    "lm_head_format",
    "activation_format",
    "num_threads",
)


def engine_options(values: dict[str, Any]) -> dict[str, Any]:
    """The Decoder's options out of a command's arguments; those not given are left out."""
    options = {k: v for k, v in values.items() if k in _ENGINE_FIELDS and v is not None}
    for name in LAYER_FIELDS:
        if name in options:
            options[name] = parse_layers(options[name], name.replace("_", "-"))
    if options.get("token_budget", "auto") != "auto":
        options["token_budget"] = _parse_budget(options["token_budget"])
    return options


def _parse_budget(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidArgument(
            f"token-budget: got {show(text)}, expected a number of positions or auto"
        ) from None


def sampling_options(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a call out of a command's arguments."""
    options = {k: v for k, v in values.items() if k in _SAMPLING_FIELDS and v is not None}
    if values.get("stop_token_id"):
        options["stop_token_ids"] = values["stop_token_id"]
    return options


def parse_layers(text: str, name: str) -> tuple[int, ...]:
    """ "2,13" as (2, 13).

    Raises: InvalidArgument for anything else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidArgument(
            f"{name}: got {show(text)}, expected layer numbers such as 2,13"
        ) from None
