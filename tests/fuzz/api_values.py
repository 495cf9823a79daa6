"""Arguments that are right, and what must hold of calls that succeed.

VALID is by the parameter's name: a new parameter without an entry gets hostile values only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from judge import Nonsense
from models import VOCAB_SIZE
from tidaldecode import GenerationResult

_CALLBACKS = (
    "None", "lambda *a: None", "fail", "print", "lambda *a: decoder.close()",
    "lambda *a: decoder.generate([1], max_new_tokens=1)", "lambda *a: decoder.encode('a')",
)  # fmt: skip
_FLAGS = ("True", "False")
VALID: dict[str, tuple[str, ...]] = {
    "prompt": ("[1, 2, 3]", "'abc'", "[[1], [2, 3]]", "['a', 'b']", "np.array([5, 6])", "(7,)"),
    "prompts": ("[[1, 2]]", "['ab']", "[[1], [2, 3]]"),
    "messages": ("[{'role': 'user', 'content': 'hi'}]", "[{'role': 'system', 'content': 's'}]"),
    "token_ids": ("[1, 2, 3]", "np.arange(5)", "(4, 5)"),
    "text": ("'abc'", "'é'"),
    "continuations": ("[[1], [2]]", "[[], [3]]", "[[1, 2], []]"),
    "last": ("1", "2"),
    "prefill": ("1", "2"),
    "sequence": ("0", "1"),
    "length": ("0", "2"),
    "context": ("8", "64"),
    "batch_size": ("1", "2"),
    "steps": ("1", "2"),
    "warmup": ("0", "1"),
    "max_new_tokens": ("3", "1"),
    "temperature": ("0.0", "1.0", "0.7"),
    "top_k": ("0", "-1", "5"),
    "top_p": ("1.0", "0.5"),
    "min_p": ("0.0", "0.1"),
    "repetition_penalty": ("1.0", "1.3"),
    "frequency_penalty": ("0.0", "-2", "1.5"),
    "presence_penalty": ("0.0", "2", "-0.5"),
    "min_new_tokens": ("0", "1", "2"),
    "no_repeat_ngram_size": ("0", "1", "3"),
    "logit_bias": ("None", "{5: 2.5}", "{'7': -100, 8: 100}"),
    "suppress_tokens": ("None", "[5]", "range(9)"),
    "bad_words": ("None", "[[5], [1, 2]]", "['a', [3]]"),
    "allowed_token_ids": ("None", "[5, 6, 7]", "range(200)"),
    "seed": ("0", "7", "2**64 - 1"),
    "stop": ("None", "'b'", "['x', 'yz']"),
    "stop_token_ids": ("None", "[5]", "(1, 2)"),
    "ignore_eos": _FLAGS,
    "skip_special_tokens": _FLAGS,
    "include_stop_str_in_output": _FLAGS,
    "guide": (
        "None",
        "tidaldecode.Guide.regex('[ab]{2,5}')",
        "tidaldecode.Guide.json_object()",
        'tidaldecode.Guide.grammar(\'start: ("a" | "b" start)\')',
        "tidaldecode.Guide.json_schema({'enum': ['x', 1]})",
        "tidaldecode.Guide.regex('(a')",
    ),
    "schema": ("{'type': 'object'}", "'{\"enum\": [1]}'"),
    "pattern": ("'a+'",),
    "lark": ("'start: \"a\"'",),
    "kind": ("'regex'", "'grammar'"),
    "source": ("'a+'",),
    "tags": ("tidaldecode.text.reasoning.THINK",),
    "reasoning": ("None", "tidaldecode.text.reasoning.BRACKETS"),
    "begins_inside": _FLAGS,
    "add_special_tokens": _FLAGS,
    "add_generation_prompt": _FLAGS,
    "continue_final_message": _FLAGS,
    "enable_thinking": _FLAGS,
    "chat_template": ("None", "'{{ messages[0].content }}'"),
    "tools": ("None", "[{'type': 'function', 'function': {'name': 'f'}}]", "[len]"),
    "documents": ("None", "[{'title': 't', 'text': 'x'}]"),
    "revision": ("None", "'main'"),
    "plan": ("None", "tidaldecode.PlanConfig(scored_layers=[1], token_budget=8)"),
    "priority": ("0", "-3", "7"),
    "n": ("1", "2"),
    "max_unread": ("1", "3", "None"),
    "cache_salt": ("''", "'a caller'"),
    "logprobs": ("None", "0", "5"),
    "prompt_logprobs": ("None", "0", "20"),
    "first": ("0", "2"),
    "timeout": ("5.0", "30"),
    "on_prefill": _CALLBACKS,
    "should_stop": (*_CALLBACKS, "lambda: True", "lambda: False"),
    "progress": _CALLBACKS,
    "model_dir": ("model_dir",),
    "config": ("None",),
    "device": ("'cpu'",),
    "dtype": ("'auto'", "'float32'"),
    "weight_format": ("'auto'", "'decoded'", "'fp8'", "'int4'", "'mxfp4'"),
    "lm_head_format": ("'auto'", "'decoded'", "'fp8'", "'int4'"),
    "activation_format": ("'auto'", "'16bit'", "'fp8'"),
    "kv_dtype": ("'auto'", "'float32'", "'bfloat16'", "'int8'", "'fp8'"),
    "load_format": ("'auto'", "'dummy'"),
    "attention": ("'auto'", "'full'", "'tidal'"),
    "token_budget": ("16", "'auto'", "None"),
    "top_p_mass": ("None", "0.9"),
    "min_token_budget": ("None", "8"),
    "select_layers": ("(1, 3)", "[1]", "None"),
    "scored_layers": ("(1, 2)", "[4]", "None"),
    "shadow": ("'none'", "'int4'", "None"),
    "full_layers": ("None", "1"),
    "granularity": ("None", "'layer'", "'head'"),
    "pooling": ("None", "'sum'", "'max'"),
    "sink_tokens": ("None", "0", "2"),
    "recent_tokens": ("None", "1", "4"),
    "sparse_min_context": ("None", "0", "'auto'"),
    "correction_interval": ("None", "0", "3"),
    "verify": ("None", "True", "'greedy'"),
    "drafts": ("None", "'ngram'", "'both'"),
    "draft_tokens": ("None", "2", "'auto'"),
    "max_seq_len": ("64", "32"),
    "max_batch_size": ("1", "2"),
    "page_size": ("None", "8", "16"),
    "num_pages": ("None", "16"),
    "gpu_memory_utilization": ("None", "0.5"),
    "prefix_cache": ("None", "False"),
    "prefill_chunk": ("None", "16"),
    "host_kv_gib": ("None", "0", "0.01"),
    "max_chunk_ms": ("None", "0.5"),
    "decode_share": ("None", "0", "0.5"),
    "cuda_graphs": ("None", "False"),
    "batch_invariant": ("None", "True"),
    "num_threads": ("1", "2"),
}


def _integer_in(low: int, high: float) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        if isinstance(value, (bool, np.bool_)):
            return False
        try:
            return bool(low <= operator.index(value) <= high)
        except TypeError:
            return False

    return holds


def _number_in(low: float, high: float = math.inf) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        if isinstance(value, (bool, np.bool_, str, bytes)):
            return False
        number = float(value)
        return math.isfinite(number) and low <= number <= high

    return holds


# What a successful call may have been given, besides None: written down apart from the package.
_ACCEPTABLE: dict[str, Callable[[Any], bool]] = {
    "max_new_tokens": _integer_in(1, 2**31 - 1),
    "top_k": _integer_in(-1, 2**31 - 1),
    "seed": _integer_in(0, 2**64 - 1),
    "temperature": _number_in(0.0),
    "top_p": _number_in(0.0, 1.0),
    "min_p": _number_in(0.0, 1.0),
    "repetition_penalty": _number_in(1e-6, 1e6),
    "frequency_penalty": _number_in(-2.0, 2.0),
    "presence_penalty": _number_in(-2.0, 2.0),
    "min_new_tokens": _integer_in(0, 2**31 - 1),
    "no_repeat_ngram_size": _integer_in(0, 2**31 - 1),
    "logit_bias": lambda value: isinstance(value, Mapping),
    "ignore_eos": lambda value: isinstance(value, bool),
    "on_prefill": callable,
    "should_stop": callable,
    "progress": callable,
    "last": _integer_in(1, 2**31 - 1),
    "prefill": _integer_in(1, 2**31 - 1),
    "sequence": _integer_in(0, 2**31 - 1),
    "max_seq_len": _integer_in(1, 2**31 - 1),
    "num_pages": _integer_in(1, 2**31 - 1),
    "num_threads": _integer_in(1, 4096),
}
_FINISH_REASONS = ("stop", "length", "abort", "error")


def check_accepted(arguments: dict[str, Any]) -> None:
    """Raises Nonsense where a call that succeeded was given something impossible."""
    for name, value in arguments.items():
        holds = _ACCEPTABLE.get(name)
        if holds is not None and value is not None and not holds(value):
            raise Nonsense(f"{name}: an impossible value was accepted")


def check_result(call: str, result: Any) -> None:
    """Raises Nonsense for a result that cannot be right."""
    for entry in result if isinstance(result, list) else [result]:
        if isinstance(entry, GenerationResult):
            _check_generation(entry)
        elif isinstance(entry, np.ndarray):
            if not np.isfinite(entry).all():
                raise Nonsense("an array that is not finite")
        elif isinstance(entry, str):
            _check_text(entry)
    if call in ("Decoder.encode", "Decoder.render_chat"):
        if not all(type(value) is int and 0 <= value < VOCAB_SIZE for value in result):
            raise Nonsense("token ids beyond the vocabulary")


def _check_generation(result: GenerationResult) -> None:
    if result.finish_reason not in _FINISH_REASONS:
        raise Nonsense(f"finish_reason {result.finish_reason}")
    if not all(0 <= token_id < VOCAB_SIZE for token_id in result.token_ids):
        raise Nonsense("generated ids beyond the vocabulary")
    if result.finish_reason == "error" and not result.error:
        raise Nonsense("an error without a reason")
    if result.text is not None:
        _check_text(result.text)


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Nonsense("text that is not Unicode") from None
