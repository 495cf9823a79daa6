"""Memory plans of models and settings without measure, against the same sums in Python's integers.

A plan must say what it would take, exactly and whatever the size, or be refused; it fits if and
only if it has no problem.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tidaldecode
from judge import Nonsense
from models import write_config

_MOST_BYTES = 2**63 - 1
_NUM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_KV_DTYPES = (*_NUM_BYTES, "int8", "fp8")
_HIGHEST = {
    "vocab_size": 2**22, "hidden_size": 2**17, "intermediate_size": 2**20,
    "num_hidden_layers": 1024, "num_key_value_heads": 4096, "group": 8, "head_dim": 1024,
    "max_position_embeddings": 2**28,
}  # fmt: skip
_OPTIONS = {
    "max_seq_len": 2**31 - 1, "max_batch_size": 65535, "page_size": 65536, "num_pages": 2**31 - 1,
    "prefill_chunk": 2**31 - 1, "num_threads": 4096, "token_budget": 2**31 - 1,
    "sparse_min_context": 2**31 - 1, "sink_tokens": 100, "recent_tokens": 100, "draft_tokens": 64,
}  # fmt: skip


def prepare(workspace: Path) -> None:
    """Needs nothing."""


def _some_size(rng: random.Random, high: int) -> int:
    """Small ones, the largest, and all magnitudes between."""
    draw = rng.random()
    if draw < 0.25:
        return rng.randint(1, min(8, high))
    if draw < 0.4:
        return high
    return rng.randint(1, min(high, 2 ** rng.randint(1, high.bit_length())))


def make_case(rng: random.Random) -> dict[str, Any]:
    """{"model": fields of config.json, "options": of plan_memory}."""
    sizes = {name: _some_size(rng, high) for name, high in _HIGHEST.items()}
    sizes["head_dim"] += sizes["head_dim"] % 2
    sizes["num_attention_heads"] = sizes["num_key_value_heads"] * sizes.pop("group")
    sizes["num_hidden_layers"] = min(sizes["num_hidden_layers"], rng.choice((1, 2, 40, 1024)))
    options: dict[str, Any] = {
        "dtype": rng.choice([*_NUM_BYTES]),
        "kv_dtype": rng.choice(_KV_DTYPES),
    }
    for name, high in _OPTIONS.items():
        if rng.random() < 0.5:
            options[name] = _some_size(rng, high)
    if rng.random() < 0.5:
        options["select_layers"] = [rng.randint(1, 40)]
    options["verify"] = rng.random() < 0.3
    options["drafts"] = rng.choice((None, "tidal", "ngram", "both"))
    return {"model": sizes, "options": options}


def describe(case: dict[str, Any]) -> str:
    """The case for a reader."""
    options = ", ".join(f"{name}={value!r}" for name, value in case["options"].items())
    return f"config.json {json.dumps(case['model'])}; plan_memory(folder, {options})"


def group(case: dict[str, Any]) -> str:
    """What a fault of this case is filed under."""
    return "plan_memory"


def smaller(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The case with one option less, or one size of the model at its least."""
    for name in case["options"]:
        rest = {key: value for key, value in case["options"].items() if key != name}
        yield {**case, "options": rest}
    for name, value in case["model"].items():
        if value > 2:
            yield {**case, "model": {**case["model"], name: 2}}


def run_case(case: dict[str, Any], workspace: Path) -> None:
    """Plans and checks the sums."""
    with tempfile.TemporaryDirectory(dir=workspace) as name:
        folder = write_config(Path(name), **case["model"])
        options = {"device": "cpu", "load_format": "dummy", **case["options"]}
        plan = tidaldecode.plan_memory(folder, **options)
        _check(plan, case)


def _check(plan: tidaldecode.MemoryPlan, case: dict[str, Any]) -> None:
    model, options = case["model"], case["options"]
    heads, head_dim = model["num_key_value_heads"], model["head_dim"]
    kv_dtype = options.get("kv_dtype", options.get("dtype", "bfloat16"))
    row_bytes = head_dim * _NUM_BYTES.get(kv_dtype, 1) + (4 if kv_dtype == "int8" else 0)
    token_bytes = 2 * model["num_hidden_layers"] * heads * row_bytes
    # A budget without layers lets every layer but the first two choose, by keys in 4 bits.
    if "token_budget" in options and "select_layers" not in options:
        token_bytes += (model["num_hidden_layers"] - 2) * heads * (head_dim // 2 + 2)
    # The largest int64 stands for all that is beyond it.
    if plan.kv_bytes != min(plan.num_pages * plan.page_size * token_bytes, _MOST_BYTES):
        raise Nonsense("kv_bytes is not what the cache takes")
    if plan.weight_bytes != _num_weights(model) * _NUM_BYTES[options.get("dtype", "bfloat16")]:
        raise Nonsense("weight_bytes is not what the weights take")
    if any(size < 0 for size in (*plan.scratch.values(), plan.reserve_bytes, plan.host_bytes)):
        raise Nonsense("a negative size")
    for name in ("num_pages", "page_size", "max_seq_len", "max_batch_size"):
        if name in options and getattr(plan, name) != options[name]:
            raise Nonsense(f"{name} is not what was asked for")
    if (plan.total_bytes > plan.usable_bytes) != bool(plan.problem):
        raise Nonsense("a problem is there if and only if the plan does not fit: it is not so")
    str(plan)


def _num_weights(model: dict[str, int]) -> int:
    hidden, inner = model["hidden_size"], model["intermediate_size"]
    q_size = model["num_attention_heads"] * model["head_dim"]
    kv_size = model["num_key_value_heads"] * model["head_dim"]
    layer = 2 * hidden * q_size + 2 * hidden * kv_size + 3 * hidden * inner + 2 * hidden
    return 2 * model["vocab_size"] * hidden + model["num_hidden_layers"] * layer + hidden
