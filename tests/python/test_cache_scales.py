"""Scales of an fp8 cache that a checkpoint holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reference_llama import ReferenceLlama, TidalSettings
from tidaldecode import Decoder
from tidaldecode.checkpoint.cache_scales import scaled_model
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.errors import WeightsError
from tiny_models import TinyModel, random_prompt, random_weights, read_checkpoint, write_checkpoint

TINY = TinyModel(num_layers=3, seed=23)
PROMPT = random_prompt(TINY, 70, seed=3)
K_SCALE = "model.layers.1.self_attn.k_scale"


def write(folder: Path, model: TinyModel = TINY, **scales: object) -> Path:
    """A checkpoint with scales, by the ends of their names in layer 1."""
    named = {
        f"model.layers.1.self_attn.{name.replace('__', '.')}": np.float32(value)
        for name, value in scales.items()
    }
    return write_checkpoint(folder, model, random_weights(model) | named)


def open_decoder(folder: Path, kv_dtype: str = "fp8", **options: object) -> Decoder:
    return Decoder(folder, device="cpu", attention="full", kv_dtype=kv_dtype, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_holds_numbers_divided_by_their_scale(tmp_path: Path, dtype: str):
    # Both make a difference: keys saturate at 0.672, and values lie 2^-9 x 7 apart at least.
    model = TinyModel(num_layers=3, seed=23, dtype=dtype)
    folder = write(tmp_path, model, k_scale=0.0015, v_scale=7.0)
    reference = ReferenceLlama(*read_checkpoint(folder), kv_dtype="fp8")
    expected = reference.generate(PROMPT, 8, TidalSettings())
    with open_decoder(folder) as decoder:
        steps = decoder.step_logits(PROMPT + expected.token_ids[:-1], prefill=len(PROMPT))
    errors = np.abs(steps - np.stack(expected.logits)).max(-1) / np.abs(expected.logits).max()
    assert np.median(errors) <= 1e-3
    plain = write(tmp_path / "plain", model)
    with open_decoder(plain) as decoder:
        others = decoder.step_logits(PROMPT + expected.token_ids[:-1], prefill=len(PROMPT))
    assert np.abs(others - steps).max() > 1e-2 * np.abs(steps).max()


@pytest.mark.parametrize(
    ("names", "scales"),
    [
        (("k_scale", "v_scale"), (0.25, 0.5)),
        (("k_proj__k_scale", "v_proj__v_scale"), (0.25, 0.5)),
        (("k_proj__output_scale", "v_proj__output_scale"), (0.25, 0.5)),
        (("attn__k_scale", "attn__v_scale"), (0.25, 0.5)),
        (("kv_scale", "q_scale"), (0.25, 0.25)),
    ],
)
def test_names_that_writers_use(tmp_path: Path, names: tuple[str, ...], scales: tuple[float, ...]):
    folder = read_model_folder(write(tmp_path, **dict(zip(names, (0.25, 0.5), strict=True))))
    layers = scaled_model(folder.model, folder.cache_scales).layers
    assert [(layer.k_scale, layer.v_scale) for layer in layers] == [(1, 1), scales, (1, 1)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_is_one_number_of_any_float_type(tmp_path: Path, dtype: str, shape: tuple):
    model = TinyModel(num_layers=3, seed=23, dtype=dtype)
    folder = read_model_folder(write(tmp_path, model, k_scale=np.full(shape, 0.375)))
    assert scaled_model(folder.model, folder.cache_scales).layers[1].k_scale == 0.375


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "got 0.0, expected a finite number > 0"),
        (-0.5, "got -0.5, expected a finite number > 0"),
        (np.nan, "got nan, expected a finite number > 0"),
        (np.inf, "got inf, expected a finite number > 0"),
        ([0.5, 0.5], r"F32 \[2\], expected one number"),
        ([], r"F32 \[0\], expected one number"),
    ],
)
def test_scales_that_cannot_be_used(tmp_path: Path, value: object, message: str):
    folder = write(tmp_path, k_scale=value)
    with pytest.raises(WeightsError, match=f"model.safetensors: tensor '{K_SCALE}': {message}"):
        open_decoder(folder)
    with open_decoder(folder, "auto") as decoder:  # which does not use them
        assert decoder.generate(PROMPT, max_new_tokens=2).token_ids


def test_scales_are_noted(tmp_path: Path):
    (note,) = read_model_folder(write(tmp_path, k_scale=0.5)).notes
    assert "are used only with kv_dtype 'fp8'" in note and K_SCALE in note


def test_random_weights_have_no_scales(tmp_path: Path):
    folder = write(tmp_path, k_scale=0.0)
    with open_decoder(folder, load_format="dummy") as decoder:
        assert len(decoder.generate([5, 6], max_new_tokens=2, ignore_eos=True).token_ids) == 2
