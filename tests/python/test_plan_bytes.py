"""KV bytes of a step, by hand."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from tidaldecode import Decoder
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.config import PlanConfig
from tidaldecode.plan_bytes import best_gain, kv_bytes_per_step, note_on_gain
from tidaldecode.plans import safe_config
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


def test_models_whose_layers_have_windows_say_what_can_be_gained(tmp_path: Path, caplog):
    plain = read_model_folder(write_checkpoint(tmp_path / "plain", TinyModel(num_layers=6)))
    assert note_on_gain(plain) is None
    model = TinyModel(family="gemma3_text", num_layers=12)
    folder = read_model_folder(write_checkpoint(tmp_path / "windows", model))
    longest = folder.model.max_position_embeddings
    gain = best_gain(folder, safe_config(folder.model.windows), longest)
    note = note_on_gain(folder)
    assert gain >= 1 and note is not None
    assert f"4 of 12 layers see more than a window: with {longest:,} tokens" in note
    assert f"at best {gain:.1f}x as fast" in note
    with caplog.at_level(logging.WARNING, logger="tidaldecode"):
        Decoder(folder.path, device="cpu", max_seq_len=64).close()
        Decoder(folder.path, device="cpu", max_seq_len=64, attention="full").close()
    assert [record.getMessage() for record in caplog.records].count(note) == 1
