"""Errors: one family, messages of one bounded printable line, and the engine's own among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.numpy

import tidaldecode
from scripted_model import update_json
from tidaldecode import Decoder
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.cli.terminal import one_line
from tidaldecode.errors import (
    BackendError,
    ConfigError,
    InvalidArgument,
    TidalError,
    UnsupportedError,
    WeightsError,
    show,
)
from tiny_models import TinyModel, random_weights, write_checkpoint

TINY = TinyModel(num_layers=3)


@pytest.mark.parametrize(
    ("name", "builtin"),
    [("InvalidArgument", ValueError), ("CapacityError", ValueError),
     ("OutOfMemoryError", MemoryError), ("ConfigError", Exception)],
)  # fmt: skip
def test_errors_can_be_caught_as_builtin_ones(name: str, builtin: type):
    kind = getattr(tidaldecode, name)
    assert issubclass(kind, TidalError) and issubclass(kind, builtin)
    with pytest.raises(builtin, match="why"):
        raise kind("why")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, "5"),
        ("text", "'text'"),
        ("é\n\x1b[31m", r"'\xe9\n\x1b[31m'"),
        (2**200, "an integer of 201 bits"),
        (True, "True"),
        (float("nan"), "nan"),
        (None, "None"),
    ],
)
def test_values_are_shown_on_one_printable_line(value, expected):
    assert show(value) == expected


@pytest.mark.parametrize("value", ["x" * 10_000, ["y"] * 10_000, {"k": "z" * 10_000}])
def test_shown_values_are_bounded(value):
    assert len(show(value)) <= 60
    assert show(value).endswith("...")


def test_a_line_for_the_terminal_holds_no_control_characters():
    assert one_line("a\n b\x1b[31m\x07") == "a b\\x1b[31m\\x07"


def test_names_from_a_hostile_folder_are_escaped(tmp_path: Path):
    write_checkpoint(tmp_path, TINY)
    name, value = "evil\x1b[2J\n", random_weights(TINY)["model.norm.weight"]
    weights = random_weights(TINY) | {f"model.layers.0.{name}": value}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"evil\\x1b\[2J\\n") as error:
        Decoder(tmp_path, device="cpu")
    assert str(error.value).isprintable()
    safetensors.numpy.save_file(
        random_weights(TINY) | {name: value}, tmp_path / "model.safetensors"
    )
    (note,) = read_model_folder(tmp_path).notes
    assert "evil" in note and note.isprintable()


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.norm.weight", [32], "model.norm.weight.*32.*64"),
        ("model.layers.1.self_attn.k_proj.weight", [64, 64], "layers.1.self_attn.k_proj.*64.*32"),
        ("model.layers.0.mlp.down_proj.weight", [96, 64], "down_proj.*96.*64"),
        ("model.embed_tokens.weight", [319, 64], "embed_tokens.*319.*320"),
    ],
)
def test_a_weight_of_the_wrong_shape_is_named_with_both(tmp_path: Path, name, shape, expected):
    import numpy as np

    write_checkpoint(tmp_path, TINY)
    weights = random_weights(TINY) | {name: np.zeros(shape, np.float32)}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=expected):
        Decoder(tmp_path, device="cpu", max_seq_len=64)


def test_a_file_cut_short_after_its_header_was_read_is_an_error(tmp_path: Path, monkeypatch):
    write_checkpoint(tmp_path, TINY)
    path = tmp_path / "model.safetensors"
    from tidaldecode import decoder as decoder_module

    def cut(*args):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1000)
        return real(*args)

    real = decoder_module.core_weights
    monkeypatch.setattr(decoder_module, "core_weights", cut)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        Decoder(tmp_path, device="cpu", max_seq_len=64)


def test_a_device_that_is_not_there_says_why(tmp_path: Path):
    write_checkpoint(tmp_path, TINY)
    with pytest.raises((UnsupportedError, BackendError), match="CUDA|cuda"):
        Decoder(tmp_path, device="cuda:99", max_seq_len=64)


def test_a_budget_below_sinks_and_recent_tokens_is_refused(tmp_path: Path):
    write_checkpoint(tmp_path, TINY)
    with pytest.raises((InvalidArgument, ConfigError), match="token_budget"):
        Decoder(tmp_path, device="cpu", select_layers=(1,), token_budget=4, sink_tokens=4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_p_mass": 0.9, "pooling": "max"}, 'pooling: got "max" with an adaptive budget'),
        ({"token_budget": "auto", "pooling": "max"}, 'pooling: got "max" with an adaptive budget'),
        ({"token_budget": 8, "min_token_budget": 9}, "min_token_budget: got 9, expected at most"),
    ],
)
def test_settings_of_an_adaptive_budget_that_do_not_fit(tmp_path: Path, options, expected):
    write_checkpoint(tmp_path, TINY)
    with pytest.raises(InvalidArgument, match=expected):
        Decoder(tmp_path, device="cpu", select_layers=(1,), **options)


def test_no_code_of_a_folder_runs(tmp_path: Path):
    write_checkpoint(tmp_path, TINY)
    (tmp_path / "evil.py").write_text("raise SystemExit('run')\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", None]}
    update_json(tmp_path / "tokenizer_config.json", auto_map=auto_map)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}}))
    decoder = Decoder(tmp_path, device="cpu", attention="full", max_seq_len=64)
    with pytest.raises(ConfigError, match="tokenizer"):
        decoder.generate("text")
    update_json(tmp_path / "config.json", auto_map=auto_map)
    with pytest.raises(ConfigError, match="auto_map"):
        Decoder(tmp_path, device="cpu")
