"""KV bytes of a step, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.config import PlanConfig
from tidaldecode.plan_bytes import kv_bytes_per_step
from tiny_models import TinyModel, write_checkpoint


def test_bytes_of_every_kind_of_layer(tmp_path: Path):
    folder = read_model_folder(write_checkpoint(tmp_path, TinyModel(num_layers=6)))
    model = folder.model
    group = model.num_q_heads // model.num_kv_heads
    assert group > 1
    half = model.num_kv_heads * model.head_dim * 4  # K of one position
    mixed = PlanConfig(select_layers=(2,), scored_layers=(4,), token_budget=10)  # FFSsPs
    of_mixed = half * (3 * 200 + 20 + (100 + 20) + 20)
    assert kv_bytes_per_step(model, mixed, 100, "float32") == of_mixed
    assert kv_bytes_per_step(model, mixed, 100, "bfloat16") * 2 == of_mixed
    codes = model.num_kv_heads * (model.head_dim + 4)  # and a scale
    assert kv_bytes_per_step(model, PlanConfig(), 100, "int8") == codes * 6 * 200
    assert kv_bytes_per_step(model, mixed, 100, "fp8") * 4 == of_mixed
    heads = replace(mixed, granularity="head")
    own = 20 * group
    assert kv_bytes_per_step(model, heads, 100, "float32") == half * (3 * 200 + 3 * own + 100)
    shadow = replace(mixed, shadow="int4")
    code = model.num_kv_heads * (model.head_dim // 2 + 2)
    assert kv_bytes_per_step(model, shadow, 100, "float32") == (
        half * (3 * 200 + 20 + 20 + 20) + code * 100
    )
    # At most the whole cache; what the budget covers is dense.
    wide = replace(heads, token_budget=90)
    assert kv_bytes_per_step(model, wide, 100, "float32") == half * (6 * 200 + 100)
    assert kv_bytes_per_step(model, mixed, 10, "float32") == half * 6 * 20
    assert kv_bytes_per_step(model, PlanConfig(), 100, "float32") == half * 6 * 200
    # The engine's default budget is 1024, an automatic one at most 4096.
    for budget, most in ((None, 1024), ("auto", 4096)):
        plan = PlanConfig(select_layers=(2,), token_budget=budget)
        assert kv_bytes_per_step(model, plan, 5000, "float32") == half * (3 * 10000 + 3 * 2 * most)
