"""Which layers attend to a window and which rotate how: what config.json says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from test_model_folder import REMOVED, read, rope
from tidaldecode.checkpoint.model_config import read_checkpoint_config
from tidaldecode.errors import ConfigError
from tiny_models import TinyModel


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("mistral", {"sliding_window": 128, "layer_types": ["full_attention"] * 4},
         "layer_types: .*sliding_window is 128, and models of this type have it in all layers"),
        ("mistral", {"sliding_window": 0}, "sliding_window: got 0"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window: got 'wide'"),
        ("qwen3", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
         "layer_types: got 'sliding_attention' although use_sliding_window is false"),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, "layer_types: got 3"),
        ("llama", {"layer_types": "full"}, "layer_types: got 'full'"),
        ("llama", {"layer_types": ["sliding_attention"] * 4},
         "layer 0 is 'sliding_attention', expected 'full_attention'"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 4},
         "layer 0 is 'chunked_attention', expected 'full_attention' or 'sliding_attention'"),
        ("olmo3", {"sliding_window": None, "layer_types": ["sliding_attention"] * 4},
         "sliding_window: got none, expected its length"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern: got 0"),
        ("gemma3_text", rope(factor=2.0), "rope_parameters: got the key 'rope_theta', expected an "
         "object each for full_attention and sliding_attention"),
        ("olmo3", {"rope_parameters": {"sliding_attention": {"rope_type": "dynamic", "factor": 2}}},
         "sliding_attention: rope_type: got 'dynamic', expected one that does not depend"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4},
                                       "sliding_attention": {"rope_theta": 1e6}}},
         "rotate all layers alike"),
    ],
)  # fmt: skip
def test_windows_that_contradict_are_refused(tmp_path, family, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        read(tmp_path, family, **changes)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 512}),  # as long as the context: never in use
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 4, "sliding_window": 64}),
        ("qwen3", {"layer_types": ["full_attention"] * 4}),
    ],
)
def test_sliding_windows_out_of_use_are_accepted(tmp_path, family, changes):
    assert read(tmp_path, family, **changes).family == family


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("mistral", {"sliding_window": 128}, (128,) * 4),
        ("mistral", {"sliding_window": REMOVED, "max_position_embeddings": 8192}, (4096,) * 4),
        ("mistral", {"sliding_window": 128, "layer_types": ["sliding_attention"] * 4}, (128,) * 4),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 64},
         (0, 0, 64, 64)),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64,
                   "layer_types": ["full_attention", "sliding_attention"] * 2}, (0, 64, 0, 64)),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 64}, (0, 0, 64, 0)),
        ("phi3", {"sliding_window": 64}, (64,) * 4),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, (64,) * 4),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 64}, (64, 0, 64, 0)),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
         (64, 0, 0, 0)),
        ("dots1", {"sliding_window": 64, "max_window_layers": 3}, (0, 0, 0, 64)),
        ("gemma3_text", {"sliding_window_pattern": 2}, (24, 0, 24, 0)),
        ("gemma3_text", {"sliding_window_pattern": REMOVED}, (24,) * 4),
        ("gemma3_text", {"layer_types": ["full_attention"] * 4}, (0,) * 4),
    ],
)  # fmt: skip
def test_windows_are_those_of_transformers(tmp_path: Path, family, changes, windows):
    assert read(tmp_path, family, **changes).model.windows == windows


def test_a_window_as_long_as_the_model_counts_beyond_it(tmp_path: Path):
    read(tmp_path, "mistral", sliding_window=512)
    path = tmp_path / "config.json"
    for longest, window in ((None, 0), (100, 0), (512, 0), (513, 512)):
        assert read_checkpoint_config(path, longest).model.windows == (window,) * 4


@pytest.mark.parametrize("family", ["olmo3", "gemma3_text"])
def test_layers_with_a_window_rotate_in_their_own_way_however_long_it_is(tmp_path: Path, family):
    kinds = TinyModel(family=family).kinds
    windows = read(tmp_path, family, sliding_window=4096).model.windows
    assert windows == tuple(4096 if kind == "w" else 0 for kind in kinds)


def test_a_gemma_of_old_has_two_bases(tmp_path: Path):
    model = read(
        tmp_path, "gemma3_text", rope_parameters=REMOVED, rope_local_base_freq=500.0,
        rope_theta=2e6, rope_scaling={"rope_type": "linear", "factor": 8.0},
    ).model  # fmt: skip
    assert (model.rope.type, model.rope.theta, model.rope.factor) == ("linear", 2e6, 8.0)
    assert (model.window_rope.type, model.window_rope.theta) == ("default", 500.0)


def test_what_the_text_part_of_gemma_3_leaves_out_is_known(tmp_path: Path):
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
            "num_hidden_layers": 34, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": text, "dtype": "bfloat16"}))
    model = read_checkpoint_config(path).model
    assert (model.num_q_heads, model.num_kv_heads, model.head_dim) == (8, 4, 256)
    assert (model.vocab_size, model.tie_word_embeddings) == (262208, True)
    assert model.windows.count(1024) == 29 and model.full_attention_layers[0] == 5
    assert (model.rope.theta, model.window_rope.theta) == (1e6, 1e4)
    assert model.max_position_embeddings == 131072
