"""The arithmetic of memory plans, over settings as large as they may be: exact, or a problem."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidaldecode import TidalError, _core

MAX = 2**63 - 1


def sizes(most: int) -> st.SearchStrategy[int]:
    """Small ones, large ones, and those around powers of two."""
    powers = st.integers(0, most.bit_length()).map(lambda bit: min(max(2**bit, 1), most))
    return st.one_of(st.integers(1, most), st.integers(1, 300), powers)


# Up to the limits of the engine, and some of them beyond.
MODELS = st.fixed_dictionaries(
    {
        "vocab_size": sizes(2**22),
        "hidden_size": sizes(2**20),
        "intermediate_size": sizes(2**20),
        "num_layers": st.integers(3, 12),
        "num_kv_heads": sizes(2**6),
        "group_size": sizes(2**6),
        "head_dim": sizes(2**9).map(lambda half: 2 * half),
        "max_position_embeddings": sizes(2**30),
    }
)
DECODERS = st.fixed_dictionaries(
    {
        "max_seq_len": st.one_of(st.just(0), sizes(2**32)),
        "max_batch_size": sizes(2**33),
        "page_size": sizes(2**33),
        "num_pages": st.one_of(st.just(0), sizes(2**32)),
        "prefill_chunk": st.one_of(st.just(0), sizes(2**40)),
        "token_budget": st.one_of(st.just(-1), sizes(2**63 - 1)),
        "min_token_budget": st.one_of(st.just(0), sizes(2**63 - 1)),
        "sink_tokens": st.one_of(st.just(0), sizes(2**63 - 1)),
        "recent_tokens": sizes(2**63 - 1),
        "sparse_min_context": st.one_of(st.just(-1), sizes(2**63 - 1)),
        "correction_interval": st.one_of(st.just(0), sizes(2**63 - 1)),
        "draft_tokens": st.integers(0, 64),
        "num_threads": st.integers(1, 1024),
        "select_layers": st.sampled_from([[], [2]]),
        "verify": st.booleans(),
        "granularity": st.sampled_from(["kv_head", "head", "layer"]),
    }
)


SMALL = {
    "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_layers": 2, "num_q_heads": 2,
    "num_kv_heads": 1, "head_dim": 4, "max_position_embeddings": 64,
}  # fmt: skip


def fill(target: Any, values: dict[str, Any]) -> Any:
    for name, value in values.items():
        setattr(target, name, value)
    return target


@settings(deadline=None, max_examples=600)
@given(MODELS, DECODERS)
def test_a_plan_is_exact_or_has_a_problem(model_values, values):
    group_size = model_values["group_size"]
    model = fill(_core.ModelConfig(), {k: v for k, v in model_values.items() if k != "group_size"})
    model.num_q_heads = group_size * model.num_kv_heads
    config = fill(_core.DecodeConfig(), values | {"dtype": "float32", "kv_dtype": "float32"})
    try:
        plan = _core.plan_memory(model, config, None)
    except TidalError:
        return
    page_bytes = 2 * model.num_layers * plan["page_size"] * model.num_kv_heads * model.head_dim * 4
    assert plan["kv_bytes"] == min(plan["num_pages"] * page_bytes, MAX)
    parts = [
        plan["weight_bytes"],
        plan["kv_bytes"],
        plan["reserve_bytes"],
        *plan["scratch"].values(),
    ]
    assert all(0 <= part <= MAX for part in parts)
    # Rows of logits, and positions of the page tables, are the least that these purposes hold.
    rows, positions = plan["max_batch_size"], plan["max_seq_len"]
    assert plan["scratch"]["sampling"] >= min(rows * model.vocab_size * 4, MAX)
    tables = rows * -(-positions // plan["page_size"]) * 4
    assert plan["scratch"]["activations of a step"] >= min(tables, MAX)
    if config.select_layers:
        scores = rows * model.num_q_heads * positions * 4
        assert plan["scratch"]["selection"] >= min(scores, MAX)
    assert (sum(parts) > plan["usable_bytes"]) == (plan["problem"] != "")


def test_a_plan_for_very_many_rows_takes_no_room_itself():
    model = fill(_core.ModelConfig(), SMALL)
    config = fill(_core.DecodeConfig(), {"max_batch_size": 2**31 - 1})
    plan = _core.plan_memory(model, config, None)
    assert plan["max_batch_size"] == 2**31 - 1 and "max_batch_size" in plan["problem"]


@pytest.mark.parametrize(
    "name",
    [
        "max_seq_len", "max_batch_size", "page_size", "num_pages", "prefill_chunk",
        "sink_tokens", "recent_tokens",
    ],
)  # fmt: skip
def test_what_is_32_bit_on_the_device_is_refused_beyond(name: str):
    model = fill(_core.ModelConfig(), SMALL)
    for value in (2**31, 2**32, 2**63 - 1):
        config = fill(_core.DecodeConfig(), {name: value, "token_budget": 2**63 - 1})
        with pytest.raises(TidalError, match=f"{name}: got {value}"):
            _core.plan_memory(model, config, None)
