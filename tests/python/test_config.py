"""DecodeConfig and plans: which settings are taken, which refused, and which win."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from scripted_model import update_json
from tidaldecode import Decoder
from tidaldecode.checkpoint.fingerprint import model_fingerprint
from tidaldecode.checkpoint.model_folder import ModelFolder, read_model_folder
from tidaldecode.config import PLAN_FIELDS, DecodeConfig, PlanConfig
from tidaldecode.errors import ConfigError
from tidaldecode.plans import (
    PLAN_FILE,
    choose_plan,
    find_plan,
    plan_letters,
    plan_notes,
    remember_evaluation,
)
from tiny_models import TinyModel, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers, no plan."""
    return write_checkpoint(tmp_path_factory.mktemp("bare"), TinyModel(num_layers=8))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a plan beside it."""
    path = write_checkpoint(tmp_path_factory.mktemp("planned"), TinyModel(num_layers=8))
    update_json(path / PLAN_FILE, select_layers=[2, 5], token_budget=32, pooling="max")
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"device": "gpu"}, "device: got 'gpu'"),
        ({"device": "cuda:x"}, "device: got 'cuda:x'"),
        ({"device": 0}, "device: got 0"),
        ({"dtype": "int8"}, "dtype: got 'int8', expected one of 'auto'"),
        ({"dtype": None}, "dtype: got None"),
        ({"kv_dtype": "fp4"}, "kv_dtype: got 'fp4'"),
        ({"attention": "dense"}, "attention: got 'dense', expected one of 'auto', 'tidal', 'full'"),
        ({"token_budget": 0}, "token_budget: got 0"),
        ({"token_budget": -5}, "token_budget: got -5"),
        ({"token_budget": 0.5}, "token_budget: got 0.5"),
        ({"token_budget": float("nan")}, "token_budget: got nan"),
        ({"token_budget": True}, "token_budget: got True"),
        ({"token_budget": 2**31}, "token_budget: got 2147483648"),
        ({"token_budget": "all"}, "token_budget: got 'all', expected an integer .* or 'auto'"),
        ({"top_p_mass": 0}, r"top_p_mass: got 0, expected a number in \(0, 1\]"),
        ({"top_p_mass": 1.01}, "top_p_mass: got 1.01"),
        ({"top_p_mass": float("nan")}, "top_p_mass: got nan"),
        ({"top_p_mass": True}, "top_p_mass: got True"),
        ({"top_p_mass": "0.9"}, "top_p_mass: got '0.9'"),
        ({"min_token_budget": 0}, "min_token_budget: got 0"),
        ({"select_layers": ()}, r"select_layers: got \(\)"),
        ({"select_layers": (5, 2)}, "strictly ascending"),
        ({"select_layers": (2, 2)}, "strictly ascending"),
        ({"select_layers": (0, 2)}, "strictly ascending"),
        ({"select_layers": (-1,)}, "strictly ascending"),
        ({"select_layers": (2.0,)}, "strictly ascending"),
        ({"select_layers": "2,13"}, "select_layers: got '2,13'"),
        ({"select_layers": 2}, "select_layers: got 2"),
        ({"select_layers": (2,), "attention": "full"}, "attention: got 'full' together with"),
        ({"scored_layers": (2,), "attention": "full"}, "together with scored_layers"),
        ({"scored_layers": ()}, r"scored_layers: got \(\)"),
        ({"scored_layers": (3, 3)}, "scored_layers: got .*strictly ascending"),
        ({"select_layers": (2, 4), "scored_layers": (4,)}, "scored_layers: got layer 4"),
        ({"full_layers": 0}, "full_layers: got 0"),
        ({"granularity": "page"}, "granularity: got 'page'"),
        ({"pooling": "mean"}, "pooling: got 'mean'"),
        ({"sink_tokens": -1}, "sink_tokens: got -1"),
        ({"recent_tokens": 0}, "recent_tokens: got 0"),
        ({"max_seq_len": 0}, "max_seq_len: got 0"),
        ({"max_batch_size": 0}, "max_batch_size: got 0"),
        ({"page_size": 0}, "page_size: got 0"),
        ({"num_threads": -1}, "num_threads: got -1"),
        ({"cuda_graphs": 1}, "cuda_graphs: got 1"),
        ({"batch_invariant": "on"}, "batch_invariant: got 'on'"),
        ({"prefix_cache": "yes"}, "prefix_cache: got 'yes'"),
        ({"max_chunk_ms": 0}, "max_chunk_ms: got 0"),
        ({"max_chunk_ms": True}, "max_chunk_ms: got True"),
        ({"decode_share": 1.0}, r"decode_share: got 1.0, expected a number in \[0, 1\)"),
    ],
    ids=str,
)
def test_bad_settings_are_named(options: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected):
        DecodeConfig(**options)


def test_sparse_min_context_is_automatic_unless_given(planned: Path):
    for automatic in ({}, {"sparse_min_context": "auto"}):
        config = Decoder(planned, device="cpu", **automatic).config
        assert config.sparse_min_context == config.token_budget
    config = Decoder(planned, device="cpu", sparse_min_context=0).config
    assert config.sparse_min_context == 0


def test_an_automatic_budget_is_a_mass_with_floor_and_cap(folder: Path):
    plan = {"device": "cpu", "select_layers": (2,), "max_seq_len": 8192}
    config = Decoder(folder, token_budget="auto", **plan).config
    assert (config.token_budget, config.top_p_mass, config.min_token_budget) == (4096, 0.98, 64)
    config = Decoder(folder, token_budget="auto", top_p_mass=0.5, min_token_budget=7, **plan).config
    assert (config.token_budget, config.top_p_mass, config.min_token_budget) == (4096, 0.5, 7)
    config = Decoder(folder, token_budget=32, top_p_mass=0.9, **plan).config
    assert (config.token_budget, config.top_p_mass, config.min_token_budget) == (32, 0.9, 32)


def test_a_config_is_immutable_and_takes_lists_of_layers():
    config = DecodeConfig(select_layers=[2, 5])
    assert config.select_layers == (2, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.token_budget = 3


def choose(path: Path, **options: Any) -> tuple[tuple[int, ...], dict[str, Any]] | None:
    asked = DecodeConfig(**options)
    plan = choose_plan(asked, asked.attention, read_model_folder(path))
    return None if plan is None else (plan.config.select_layers, plan.config.settings())


def test_auto_takes_the_plan_beside_the_model(planned: Path):
    assert choose(planned) == ((2, 5), {"token_budget": 32, "pooling": "max"})


def test_explicit_settings_win_over_the_plans(planned: Path):
    layers, settings = choose(planned, token_budget=64, sink_tokens=4)
    assert layers == (2, 5)
    assert settings == {"token_budget": 64, "pooling": "max", "sink_tokens": 4}


def test_explicit_layers_win_over_the_plans(planned: Path):
    assert choose(planned, select_layers=(3,)) == ((3,), {"token_budget": 32, "pooling": "max"})


def test_a_shadow_belongs_to_the_plans_own_layers(tmp_path: Path):
    """Else select layers by hand would be refused for what no layer of theirs reads."""
    path = write_checkpoint(tmp_path, TinyModel(num_layers=8))
    update_json(path / PLAN_FILE, scored_layers=[2, 5], token_budget=32, shadow="int4")
    options = {"device": "cpu", "max_seq_len": 64}
    assert Decoder(path, **options).config.shadow == "int4"
    assert Decoder(path, **options, select_layers=(3,)).config.shadow == "none"
    assert Decoder(path, **options, scored_layers=(3,), shadow="int4").config.shadow == "int4"


def test_full_ignores_the_plan(planned: Path):
    assert choose(planned, attention="full") is None


def test_auto_without_a_plan_is_dense_and_says_so_once(folder: Path, caplog):
    with caplog.at_level(logging.WARNING, logger="tidaldecode"):
        assert Decoder(folder, device="cpu").plan_source == "dense"
    (record,) = caplog.records
    assert "decoded densely" in record.getMessage()
    assert "tidaldecode calibrate MODEL_DIR" in record.getMessage()
    assert "select_layers=" not in record.getMessage()  # a guess is worse than useless


@pytest.mark.parametrize(
    "options",
    [{"attention": "tidal"}, {"token_budget": 64}, {"token_budget": "auto"}, {"shadow": "none"}],
    ids=str,
)
def test_without_a_plan_every_layer_chooses_where_it_is_asked_for(folder: Path, caplog, options):
    asked = {"attention": "tidal"} | options
    with caplog.at_level(logging.WARNING, logger="tidaldecode"):
        decoder = Decoder(folder, device="cpu", max_seq_len=512, **asked)
    assert decoder.plan == "FFPPPPPP"
    assert decoder.plan_source == "safe: every layer chooses for itself"
    assert decoder.config.shadow == asked.get("shadow", "int4")
    (record,) = caplog.records
    assert "every layer chooses for itself (FFPPPPPP)" in record.getMessage()
    assert "tidaldecode calibrate MODEL_DIR" in record.getMessage()


def test_a_token_budget_alone_asks_for_sparse_steps(folder: Path, planned: Path):
    asked = DecodeConfig(token_budget=64)
    assert choose_plan(asked, "auto", read_model_folder(folder)).is_safe
    assert not choose_plan(asked, "auto", read_model_folder(planned)).is_safe
    assert choose_plan(asked, "full", read_model_folder(folder)) is None


def test_a_model_too_small_to_choose_for_itself_is_refused(tmp_path: Path):
    folder = read_model_folder(write_checkpoint(tmp_path, TinyModel(num_layers=2)))
    with pytest.raises(ConfigError, match="a model of 2 layers has none to choose by itself"):
        choose_plan(DecodeConfig(token_budget=64), "auto", folder)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"select_layers": (2, 8)}, "layers up to 7"),
        ({"select_layers": (2,), "full_layers": 3}, "full_layers: got 3"),
        ({"scored_layers": (2, 8)}, "scored_layers: got .*layers up to 7"),
        ({"select_layers": (3,), "scored_layers": (2,), "full_layers": 3}, "full_layers: got 3"),
    ],
)
def test_layers_must_fit_the_model(folder: Path, options: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected):
        choose(folder, **options)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "select_layers: got None"),
        ({"select_layers": [5, 2]}, "strictly ascending"),
        ({"select_layers": [2, 99]}, "layers up to 7"),
        ({"select_layers": [2], "full_layers": 4}, "full_layers: got 4"),
        ({"select_layers": [2], "scored_layers": [2]}, "scored_layers: got layer 2"),
        ({"scored_layers": [5, 2]}, "scored_layers: got .*strictly ascending"),
        ({"scored_layers": []}, "scored_layers: got"),
        ({"select_layers": [2], "token_budget": 0}, "token_budget: got 0"),
        ({"select_layers": [2], "pooling": None}, "pooling: got None"),
        ({"select_layers": [2], "budget": 5}, "got the key 'budget'"),
    ],
    ids=str,
)
def test_a_bad_plan_file_is_named(tmp_path: Path, content: dict[str, Any], expected: str):
    write_checkpoint(tmp_path, TinyModel(num_layers=8))
    update_json(tmp_path / PLAN_FILE, **content)
    with pytest.raises(ConfigError, match=expected) as error:
        find_plan(read_model_folder(tmp_path))
    assert PLAN_FILE in str(error.value)


def known(folder: Path, name: str, family: str = "llama", **shape: int) -> Any:
    """What the table says for a model of a public model's shape."""
    tiny = read_model_folder(folder)
    model = dataclasses.replace(tiny.model, **shape)
    fields = {f.name: getattr(tiny, f.name) for f in dataclasses.fields(tiny)}
    fields |= {"name": name, "family": family, "model": model}
    plan = find_plan(ModelFolder(**fields))
    return plan.config.select_layers if plan else None


LLAMA_3 = {"num_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_q_heads": 32,
           "num_kv_heads": 8, "vocab_size": 128256}  # fmt: skip
LLAMA_2 = LLAMA_3 | {"intermediate_size": 11008, "num_kv_heads": 32, "vocab_size": 32000}
QWEN_3_4B = {"num_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "num_q_heads": 32,
             "num_kv_heads": 8, "vocab_size": 151936}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "family", "shape", "expected"),
    [
        ("Llama-3.1-8B-Instruct", "llama", LLAMA_3, (2, 13)),
        ("a-finetune", "llama", LLAMA_3, (2, 13)),
        ("DeepSeek-R1-Distill-Llama-8B", "llama", LLAMA_3, (2, 12)),
        ("Llama-2-7b-hf", "llama", LLAMA_2, (2, 7)),
        ("another-7b", "llama", LLAMA_2, None),
        ("Mistral-7B", "mistral", LLAMA_3, None),
        ("Qwen3-4B", "qwen3", QWEN_3_4B, (2, 20)),
        ("Qwen3-4B", "qwen2", QWEN_3_4B, None),
    ],
)
def test_known_models_are_found_by_shape_and_name(folder, name, family, shape, expected):
    assert known(folder, name, family, **shape) == expected


# With the engine


def open_decoder(path: Path, **options: Any) -> Decoder:
    return Decoder(path, **({"device": "cpu", "max_seq_len": 64, "max_batch_size": 1} | options))


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ({}, "FFSssSss"),
        ({"attention": "full"}, "FFFFFFFF"),
        ({"select_layers": (3,)}, "FFFSssss"),
        ({"select_layers": (1, 7)}, "FSsssssS"),
        ({"select_layers": (2, 3, 4)}, "FFSSSsss"),
        ({"scored_layers": (2, 5)}, "FFPssPss"),
        ({"scored_layers": (1, 2, 3, 4, 5, 6, 7)}, "FPPPPPPP"),
        ({"select_layers": (4,), "scored_layers": (3, 6)}, "FFFPSsPs"),
        ({"select_layers": (1,), "scored_layers": (7,), "full_layers": 1}, "FSsssssP"),
    ],
    ids=str,
)
def test_the_engine_builds_the_plan_that_was_chosen(planned, options, plan):
    decoder = open_decoder(planned, **options)
    assert decoder.plan == plan
    assert plan_letters([0] * 8, decoder.config) == plan
    assert decoder.config.attention == ("tidal" if decoder.config.choosing_layers else "full")


def test_a_config_value_and_options_are_the_same(planned: Path):
    options = {"device": "cpu", "max_seq_len": 64, "token_budget": 16, "max_batch_size": 2}
    one = Decoder(planned, **options).config
    assert one == Decoder(planned, config=DecodeConfig(**options)).config
    assert (one.token_budget, one.pooling, one.page_size) == (16, "max", 64)


def test_a_config_value_together_with_options_is_refused(planned: Path):
    with pytest.raises(ConfigError, match="together with token_budget"):
        Decoder(planned, config=DecodeConfig(), token_budget=16)
    with pytest.raises(ConfigError, match="config: got a dict"):
        Decoder(planned, config={"device": "cpu"})


def test_recent_tokens_are_a_quarter_of_what_every_set_has(folder: Path):
    plan = {"select_layers": (2,), "max_seq_len": 8192, "max_batch_size": 1}
    cases = [
        ({}, 256),
        ({"token_budget": 64}, 16),
        ({"token_budget": 64, "recent_tokens": "auto"}, 16),
        ({"token_budget": 2}, 1),
        ({"token_budget": 8, "sink_tokens": 7}, 1),
        ({"token_budget": 64, "recent_tokens": 3}, 3),
        ({"token_budget": "auto"}, 16),  # of min_token_budget, which is 64
        ({"token_budget": 1024, "top_p_mass": 0.9, "min_token_budget": 100}, 25),
        ({"max_seq_len": 64}, 16),  # a budget beyond the longest sequence is the longest sequence
    ]
    for options, expected in cases:
        assert Decoder(folder, device="cpu", **plan | options).config.recent_tokens == expected
    with pytest.raises(ConfigError, match="recent_tokens: got 'all', expected .* or 'auto'"):
        DecodeConfig(recent_tokens="all")


def test_a_plan_config_holds_nothing_of_a_device():
    names = {field.name for field in dataclasses.fields(PlanConfig)}
    assert names == set(PLAN_FIELDS) and {"select_layers", "correction_interval"} < names
    assert names.isdisjoint({"device", "dtype", "kv_dtype", "verify", "page_size"})
    with pytest.raises(TypeError):
        PlanConfig(dtype="float32")
    plan = PlanConfig(select_layers=[2, 5], sparse_min_context="auto", sink_tokens=4)
    assert plan.select_layers == (2, 5)
    assert plan.settings() == {"sink_tokens": 4}
    with pytest.raises(ConfigError, match="granularity: got 'page'"):
        PlanConfig(granularity="page")


def test_a_published_plan_has_whole_settings_and_says_it_was_not_measured(folder: Path):
    tiny = read_model_folder(folder)
    model = dataclasses.replace(tiny.model, **LLAMA_3)
    llama = dataclasses.replace(tiny, name="Llama-3.1-8B-Instruct", family="llama", model=model)
    plan = choose_plan(DecodeConfig(), "auto", llama)
    assert plan.description == "published for Llama-3.1-8B, not measured here"
    assert plan.config == PlanConfig(
        select_layers=(2, 13), full_layers=2, token_budget=1024, granularity="layer",
        pooling="sum", sink_tokens=1, recent_tokens="auto",
    )  # fmt: skip
    (note,) = plan_notes(DecodeConfig(), plan, llama)
    assert note.startswith("plan FFSss") and "published for Llama-3.1-8B, not measured" in note
    assert "tidaldecode calibrate MODEL_DIR" in note


def test_what_eval_found_of_a_published_plan_is_remembered(folder: Path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny = read_model_folder(folder)
    model = dataclasses.replace(tiny.model, **LLAMA_3)
    llama = dataclasses.replace(tiny, name="Llama-3.1-8B", family="llama", model=model)
    config = find_plan(llama).config
    remember_evaluation(llama, config, "9 of 10 answers, dense 10")
    plan = find_plan(llama)
    assert (
        plan.description == "published for Llama-3.1-8B, evaluated here: 9 of 10 answers, dense 10"
    )
    assert plan_notes(DecodeConfig(), plan, llama) == [
        f"plan {plan_letters([0] * 32, PlanConfig(select_layers=(2, 13)))} {plan.description}"
    ]
    other = choose_plan(DecodeConfig(token_budget=64), "auto", llama)
    assert other.description == "published for Llama-3.1-8B, not measured here"
    remember_evaluation(llama, dataclasses.replace(config, token_budget=64), "all")
    assert find_plan(llama).description.endswith("not measured here")
    (record,) = (tmp_path / "tidaldecode" / "evaluated").iterdir()
    record.write_text("{damaged")
    assert find_plan(llama).description.endswith("not measured here")
    record.unlink()
    record.parent.rmdir()
    record.parent.write_text("no folder")
    remember_evaluation(llama, config, "all")  # nowhere to write: nothing is lost
    assert find_plan(llama).description.endswith("not measured here")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"verify": True}, "verify: every step is dense (there is no plan)"),
        ({"verify": True, "attention": "full"}, "verify: every step is dense (attention='full')"),
    ],
    ids=str,
)
def test_verify_without_a_plan_says_that_it_is_dense(folder: Path, caplog, options, expected):
    with Decoder(folder, device="cpu", **options) as decoder:
        assert decoder.plan_source == "dense"
    assert sum(expected in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            {"context": [512, 4096], "scores": {"loss": 0.0284}, "max_loss": 0.03,
             "held_out": {"same": 22, "counted": 24}},
            "plan FFSssSss calibrated: 22 of 24 held-out answers as dense at 512 and 4,096 tokens, "
            "loss 0.0284 nats",
        ),
        (
            {"context": 4096, "scores": {"loss": 2.5}, "max_loss": 0.03,
             "held_out": {"same": 0, "counted": 0}},
            "plan FFSssSss calibrated: judged on text alone (the model answers too few questions) "
            "at 4,096 tokens, loss 2.5 nats (more than the 0.03 asked for)",
        ),
        ({"scores": []}, "plan FFSssSss calibrated"),
        ({"scores": {"loss": 10**400}, "context": [True], "held_out": {"same": 1, "counted": True}},
         "plan FFSssSss calibrated"),
        ({"scores": {"loss": 1}, "max_loss": -(10**400), "held_out": {"same": [1], "counted": 5}},
         "plan FFSssSss calibrated: loss 1 nats"),
    ],
)  # fmt: skip
def test_a_calibrated_plan_says_at_every_start_how_it_did(tmp_path, caplog, extra, expected):
    write_checkpoint(tmp_path, TinyModel(num_layers=8))
    own = model_fingerprint(read_model_folder(tmp_path))
    update_json(tmp_path / PLAN_FILE, select_layers=[2, 5], fingerprint=own, **extra)
    for _ in range(2):
        Decoder(tmp_path, device="cpu", max_seq_len=64).close()
    assert [record.getMessage() for record in caplog.records] == [expected] * 2
    caplog.clear()
    Decoder(tmp_path, device="cpu", max_seq_len=64, token_budget=16).close()
    assert caplog.records == []  # another plan than the one that was measured


CACHE_PROBE = """
import os, sys
sys.path[:0] = os.environ["PROBE_PATH"].split(":")
import tidaldecode
folder = sys.argv[1]
if os.getuid() == 0:
    os.setuid(65534)
os.environ.pop("HOME", None)
print(tidaldecode.Decoder(folder, device="cpu", max_seq_len=64).plan_source)
"""


@pytest.mark.parametrize("cache", ["locked/x", ""])
def test_a_cache_that_cannot_be_searched_is_an_empty_one(cache: str):
    """Also that of a user without a home."""
    place = Path(tempfile.mkdtemp())
    try:
        place.chmod(0o755)
        (place / "locked").mkdir(mode=0o700)
        model = write_checkpoint(place / "model", TinyModel(num_layers=3))
        for file in [model, *model.iterdir()]:
            file.chmod(0o755)
        if os.getuid() != 0:
            (place / "locked").chmod(0)
        environment = {
            **os.environ,
            "XDG_CACHE_HOME": str(place / cache) if cache else "",
            "PROBE_PATH": ":".join(sys.path),
        }
        done = subprocess.run(
            [sys.executable, "-c", CACHE_PROBE, str(model)],
            capture_output=True, text=True, env=environment,
        )  # fmt: skip
        assert done.stdout == "dense\n", done.stderr
    finally:
        shutil.rmtree(place, ignore_errors=True)
