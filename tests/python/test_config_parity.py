"""Python's settings are the engine's: same names, same defaults, each written once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import tidaldecode
from tidaldecode import _core
from tidaldecode.checkpoint.generation_defaults import GenerationDefaults
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.checkpoint.rope_config import ROPE_TYPES, RopeConfig
from tidaldecode.config import ATTENTION_KINDS, CHOICES, OPTION_HELP, DecodeConfig, PlanConfig
from tiny_models import TinyModel, write_checkpoint

# Settings of Python's own: whether select_layers and weight files reach the engine at all.
PYTHONS_OWN = {"attention", "load_format"}


def core_fields(value: Any) -> dict[str, Any]:
    """Data attributes of a _core value, as Python values."""
    names = [n for n in dir(type(value)) if not n.startswith("_")]
    fields = {name: getattr(value, name) for name in names}
    return {name: field for name, field in fields.items() if not callable(field)}


def python_fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def comparable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def test_decode_config_has_the_engines_fields():
    assert python_fields(DecodeConfig) - PYTHONS_OWN == set(core_fields(_core.DecodeConfig()))
    assert python_fields(PlanConfig) == set(core_fields(_core.PlanConfig()))
    assert issubclass(DecodeConfig, PlanConfig) and issubclass(_core.DecodeConfig, _core.PlanConfig)


def test_decode_config_writes_no_default_of_its_own():
    for field in dataclasses.fields(DecodeConfig):
        assert field.default in (None, "auto"), f"{field.name}: the default belongs in config.h"


def test_every_setting_is_an_option_of_commands_but_a_few():
    assert python_fields(DecodeConfig) - {*OPTION_HELP} == {
        "host_kv_gib", "cuda_graphs", "batch_invariant",
    }  # fmt: skip
    assert {*OPTION_HELP} < python_fields(DecodeConfig)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("config"), TinyModel(num_layers=4))


def test_settings_left_out_have_the_engines_defaults(tiny_folder):
    expected = core_fields(_core.DecodeConfig())
    decoder = tidaldecode.Decoder(
        tiny_folder, device="cpu", select_layers=(2,), max_seq_len=4096, token_budget=64
    )
    actual = decoder.config
    for name in (
        "full_layers", "granularity", "pooling", "sink_tokens",
        "max_batch_size", "page_size", "cuda_graphs", "batch_invariant",
    ):  # fmt: skip
        assert getattr(actual, name) == expected[name], name
    assert (actual.granularity, actual.sink_tokens, actual.recent_tokens) == ("layer", 1, 16)


def test_automatic_settings_are_filled_in(tiny_folder):
    config = tidaldecode.Decoder(tiny_folder, device="cpu").config
    assert config.dtype == "float32"
    assert config.kv_dtype == "float32"
    assert config.max_seq_len == TinyModel().positions
    assert config.num_pages >= 1
    assert config.prefill_chunk >= 1


def test_the_default_budget_needs_no_explicit_value(tiny_folder):
    decoder = tidaldecode.Decoder(tiny_folder, device="cpu", select_layers=(2,), max_seq_len=4096)
    assert decoder.config.token_budget == _core.DecodeConfig().token_budget


def test_rope_config_names_and_defaults():
    core = core_fields(_core.RopeConfig())
    assert python_fields(RopeConfig) == set(core)
    for name, value in core.items():
        assert comparable(value) == getattr(RopeConfig(), name), name


def test_model_config_names():
    core = set(core_fields(_core.ModelConfig()))
    assert python_fields(ModelConfig) <= core
    assert core - python_fields(ModelConfig) <= {"group_size", "q_size", "kv_size"}


def test_sampling_defaults_are_the_engines():
    core = core_fields(_core.SamplingParams())
    ours = dataclasses.asdict(GenerationDefaults())
    # The engine's stop_token_ids, found per model; what limits max_new_tokens; words for people.
    for name in ("eos_token_ids", "max_length", "notes"):
        ours.pop(name)
    for name, value in ours.items():
        assert comparable(core[name]) == value, name
    of_calls = {"seed", "stop_token_ids", "frequency_penalty", "presence_penalty", "logit_bias"}
    assert set(core) - set(ours) == of_calls | {"allowed_token_ids", "guide"}


@pytest.mark.parametrize(
    ("owner", "field", "choices"),
    [
        # "auto" is a word of Python's, and elsewhere the engine's default.
        *(
            (_core.DecodeConfig, name, [choice for choice in choices if choice != "auto"])
            for name, choices in CHOICES.items()
            if name not in PYTHONS_OWN
        ),
        (_core.DecodeConfig, "device", ("cpu", "cuda:0", "cuda:7")),
        (_core.RopeConfig, "type", ROPE_TYPES),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_word_is_known_to_the_engine(owner, field, choices):
    value = owner()
    for choice in choices:
        setattr(value, field, choice)
        assert getattr(value, field) == choice
    with pytest.raises(tidaldecode.TidalError, match="nonsense"):
        setattr(value, field, "nonsense")


def test_attention_kinds():
    assert set(ATTENTION_KINDS) == {"auto", "tidal", "full"}


def test_errors_are_one_family():
    for name in (
        "ConfigError", "WeightsError", "UnsupportedError", "OutOfMemoryError", "BackendError",
        "InvalidArgument", "CapacityError",
    ):  # fmt: skip
        assert issubclass(getattr(tidaldecode, name), tidaldecode.TidalError)
    assert issubclass(tidaldecode.InvalidArgument, ValueError)
    assert issubclass(tidaldecode.CapacityError, tidaldecode.InvalidArgument)
    assert issubclass(tidaldecode.OutOfMemoryError, MemoryError)


def test_engine_errors_arrive_as_these_classes(tiny_folder):
    with pytest.raises(tidaldecode.TidalError, match="select_layers"):
        tidaldecode.Decoder(tiny_folder, device="cpu", select_layers=(2, 40))
    decoder = tidaldecode.Decoder(tiny_folder, device="cpu", attention="full", max_seq_len=64)
    with pytest.raises(tidaldecode.CapacityError):
        decoder.generate([[5] * 60], max_new_tokens=32)
    with pytest.raises(tidaldecode.InvalidArgument):
        decoder.generate([[5, TinyModel().vocab_size]], max_new_tokens=2)
