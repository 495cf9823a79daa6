"""What speed is measured with: load_format="dummy" and Decoder.measure_steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tidaldecode import Decoder
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.errors import CapacityError, ConfigError, InvalidArgument, WeightsError
from tiny_families import FAMILIES
from tiny_models import TinyModel, config_json, random_prompt, write_checkpoint

TINY = TinyModel(num_layers=6, dtype="bfloat16")
OPTIONS = {"device": "cpu", "num_threads": 1, "max_seq_len": 256, "max_batch_size": 2}
TIDAL = {"select_layers": (2, 4), "token_budget": 16}


def write_config(folder: Path, model: TinyModel = TINY, **changes) -> Path:
    """A folder with nothing but config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {key: value for key, value in (config_json(model) | changes).items() if value != "gone"}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config-only"))


@pytest.fixture(scope="module")
def decoder(config_only: Path) -> Decoder:
    return Decoder(config_only, load_format="dummy", **OPTIONS, **TIDAL)


# load_format


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
def test_a_config_alone_is_a_model(tmp_path: Path, family: str, tie: bool):
    model = TinyModel(
        family=family, tie=tie, attention_bias=family in ("llama", "qwen3"), num_layers=6
    )
    full = [layer for layer, kind in enumerate(model.kinds) if kind == "F" and layer > 0]
    plan = TIDAL | {"select_layers": full[::2]} if full else {"attention": "full"}
    decoder = Decoder(write_config(tmp_path, model), load_format="dummy", **OPTIONS, **plan)
    result = decoder.generate(random_prompt(model, 40), max_new_tokens=5, ignore_eos=True)
    assert len(result.token_ids) == 5 and result.error is None
    assert np.isfinite(decoder.logits(random_prompt(model, 40), last=40)).all()


def test_without_it_the_weights_are_missed(config_only: Path):
    with pytest.raises(WeightsError, match="no weights|safetensors"):
        Decoder(config_only, **OPTIONS)


def test_weight_files_are_not_looked_at(tmp_path: Path):
    write_checkpoint(tmp_path, TINY)
    prompt = random_prompt(TINY, 20)
    real = Decoder(tmp_path, **OPTIONS).logits(prompt)
    random = Decoder(tmp_path, load_format="dummy", **OPTIONS).logits(prompt)
    assert not np.allclose(real, random, atol=1e-3)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    again = Decoder(tmp_path, load_format="dummy", **OPTIONS).logits(prompt)
    assert np.array_equal(random, again), "the same weights every time"


def test_the_memory_is_the_real_models(config_only: Path, tmp_path: Path):
    write_checkpoint(tmp_path, TINY)
    real, random = (
        Decoder(tmp_path, **OPTIONS),
        Decoder(config_only, load_format="dummy", **OPTIONS),
    )
    plans = (real.memory_plan(), random.memory_plan())
    assert plans[0].weight_bytes == plans[1].weight_bytes
    assert plans[0].total_bytes == plans[1].total_bytes


def test_the_config_says_so_and_can_be_given_again(decoder: Decoder, config_only: Path):
    assert decoder.config.load_format == "dummy"
    assert Decoder(config_only, config=decoder.config).config == decoder.config
    assert decoder.folder.weights == () and decoder.folder.weight_bytes == 0


def test_the_dtype_is_the_configs_or_bfloat16(tmp_path: Path):
    for given, used in (("float16", "float16"), ("float32", "float32"), ("gone", "bfloat16")):
        folder = write_config(tmp_path / given, dtype=given)
        assert read_model_folder(folder, "dummy").dtype == used
        assert Decoder(folder, load_format="dummy", **OPTIONS).config.dtype == used


@pytest.mark.parametrize("value", ["random", "", None, True, 1])
def test_other_formats_are_refused(config_only: Path, value):
    with pytest.raises(ConfigError, match="load_format: got .*expected one of 'auto', 'dummy'"):
        Decoder(config_only, load_format=value)


# measure_steps


@pytest.mark.parametrize("attention", ["auto", "full"])
@pytest.mark.parametrize(("context", "batch_size"), [(1, 1), (200, 1), (256, 2)])
def test_every_step_has_its_time(decoder: Decoder, context: int, batch_size: int, attention: str):
    free = decoder.num_free_pages
    seconds = decoder.measure_steps(context, batch_size, steps=4, warmup=1, attention=attention)
    assert len(seconds) == 4 and all(0 < value < 60 for value in seconds)
    assert decoder.num_free_pages == free
    assert len(decoder.measure_steps(context, steps=1, warmup=0)) == 1
    assert len(decoder.measure_steps(1)) == 30


def test_decoding_goes_on_as_before(tmp_path: Path):
    folder = write_checkpoint(tmp_path, TINY)
    prompt = random_prompt(TINY, 100)
    fresh, used = (Decoder(folder, **OPTIONS, **TIDAL) for _ in range(2))
    want = fresh.generate(prompt, max_new_tokens=20, ignore_eos=True).token_ids
    used.measure_steps(256, 2, steps=2)
    assert used.generate(prompt, max_new_tokens=20, ignore_eos=True).token_ids == want
    used.measure_steps(256, 2, steps=2)
    assert used.generate(prompt, max_new_tokens=20, ignore_eos=True).token_ids == want


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        ({"context": 0}, InvalidArgument, "context: got 0, expected an integer from 1"),
        ({"context": 1.5}, InvalidArgument, "context: got 1.5"),
        ({"context": True}, InvalidArgument, "context: got True"),
        ({"batch_size": 0}, InvalidArgument, "batch_size: got 0"),
        ({"batch_size": 2**40}, InvalidArgument, "batch_size: got 1099511627776"),
        ({"steps": 0}, InvalidArgument, "steps: got 0"),
        ({"warmup": -1}, InvalidArgument, "warmup: got -1"),
        ({"attention": "tidal"}, InvalidArgument, "attention: got 'tidal', expected one of 'auto'"),
        ({"context": 257}, CapacityError, "257 tokens, have max_seq_len 256"),
        ({"batch_size": 3}, CapacityError, "need 3 rows, have max_batch_size 2"),
    ],
)
def test_bad_arguments_are_named(decoder: Decoder, arguments, error, expected):
    with pytest.raises(error, match=expected):
        decoder.measure_steps(**({"context": 10, "steps": 1} | arguments))


def test_too_few_pages_are_an_error_that_takes_none(config_only: Path):
    decoder = Decoder(config_only, load_format="dummy", **OPTIONS, page_size=16, num_pages=20)
    with pytest.raises(CapacityError, match="need 16 pages of 16 tokens, have 4"):
        decoder.measure_steps(256, 2)
    assert decoder.num_free_pages == 20


def test_a_closed_decoder_measures_nothing(config_only: Path):
    decoder = Decoder(config_only, load_format="dummy", **OPTIONS)
    decoder.close()
    with pytest.raises(InvalidArgument, match="closed"):
        decoder.measure_steps(10)
