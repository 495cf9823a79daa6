"""weight_format and lm_head_format: numbers are rounded to codes while they are loaded, and to no
others; codes that are kept are the float32 numbers that they stand for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import tidaldecode
from mxfp4_models import from_mxfp4, to_mxfp4
from quantized_models import (
    FLOAT8,
    KINDS,
    Kind,
    is_projection,
    packed_group,
    quantized_tensors,
    to_float8,
    write_both,
    write_quantized,
)
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.errors import ConfigError
from tiny_models import TinyModel, random_prompt, random_weights, round_to, write_checkpoint

MODEL = TinyModel(hidden_size=160, intermediate_size=320, head_dim=16, dtype="float32")
EXPERTS = dataclasses.replace(MODEL, family="gpt_oss")  # each of which lies in a larger tensor
WIDE = TinyModel(
    hidden_size=128, intermediate_size=384, num_layers=2, head_dim=32, dtype="bfloat16"
)
FORMATS = [(MODEL, "fp8"), (MODEL, "int4"), (EXPERTS, "fp8"), (EXPERTS, "int4"), (EXPERTS, "mxfp4")]
IDS = [f"{model.family}, {weight_format}" for model, weight_format in FORMATS]


def open_decoder(folder: Path, **options) -> tidaldecode.Decoder:
    return tidaldecode.Decoder(folder, device="cpu", num_threads=1, **options)


def rounded(weight: np.ndarray, weight_format: str) -> np.ndarray:
    """What the codes of a matrix stand for, by the definition: float32 products."""
    if weight_format == "fp8":
        scale = (np.abs(weight).max(axis=1, keepdims=True) / np.float32(448)).astype(np.float32)
        return FLOAT8[to_float8(weight / scale)] * scale
    if weight_format == "mxfp4":
        return from_mxfp4(*to_mxfp4(weight))
    result = np.empty_like(weight)
    for begin in range(0, weight.shape[1], 128):
        group = weight[:, begin : begin + 128]
        largest = np.abs(group).max(axis=1, keepdims=True)
        scale = round_to((largest / np.float32(7.5)).astype(np.float32), "bfloat16")
        scale = scale.astype(np.float32)
        codes = np.clip(np.rint(group / scale), -8, 7).astype(np.float32)
        result[:, begin : begin + 128] = codes * scale
    return result


def all_rounded(weights: dict[str, np.ndarray], weight_format: str) -> dict[str, np.ndarray]:
    """The same with the matrices of all layers rounded, or of experts alone."""
    meant = dict(weights)
    for name, weight in weights.items():
        if is_projection(name) and weight_format != "mxfp4":
            meant[name] = rounded(weight, weight_format)
        elif name.endswith((".gate_up_proj", ".down_proj")):  # of all experts, transposed
            meant[name] = np.stack([rounded(one.T, weight_format).T for one in weight])
    return meant


@pytest.mark.parametrize(("model", "weight_format"), FORMATS, ids=IDS)
def test_the_layers_matrices_are_rounded_and_nothing_else(
    tmp_path: Path, model: TinyModel, weight_format: str, caplog
):
    weights = random_weights(model)
    stored = write_checkpoint(tmp_path / "stored", model, weights)
    decoded = write_checkpoint(tmp_path / "meant", model, all_rounded(weights, weight_format))
    prompt = random_prompt(model, 20)
    with open_decoder(decoded, dtype="float32") as plain:
        want = plain.logits(prompt)
    with open_decoder(stored, dtype="float32", weight_format=weight_format) as decoder:
        assert np.array_equal(decoder.logits(prompt), want)
        assert decoder.config.weight_format == weight_format
    whose = "experts'" if weight_format == "mxfp4" else "layers'"
    assert f"weight_format {weight_format}: the {whose} matrices are rounded, by" in caplog.text


@pytest.mark.parametrize(("model", "weight_format"), FORMATS, ids=IDS)
def test_random_weights_run_in_codes(tmp_path: Path, model: TinyModel, weight_format: str):
    folder = write_checkpoint(tmp_path, model)
    with open_decoder(folder, load_format="dummy", weight_format=weight_format) as decoder:
        assert np.isfinite(decoder.logits(random_prompt(model, 8))).all()


def test_mxfp4_is_of_experts(tmp_path: Path):
    with pytest.raises(ConfigError, match=r'"mxfp4", which is of experts, and this model has none'):
        open_decoder(write_checkpoint(tmp_path, MODEL), weight_format="mxfp4")
    with pytest.raises(ConfigError, match="lm_head_format: got 'mxfp4'"):
        open_decoder(write_checkpoint(tmp_path / "head", EXPERTS), lm_head_format="mxfp4")


HEAD_FORMATS = ("fp8", "int4")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def with_rounded_head(weights: dict[str, np.ndarray], head_format: str) -> dict[str, np.ndarray]:
    """The same with an output matrix of its own, rounded."""
    return weights | {HEAD: rounded(weights.get(HEAD, weights[EMBEDDING]), head_format)}


def assert_same_logits(one: tidaldecode.Decoder, other: tidaldecode.Decoder) -> None:
    """In a chunk of a prompt, and in steps."""
    prompt = random_prompt(MODEL, 20)
    assert np.array_equal(one.logits(prompt, last=20), other.logits(prompt, last=20))
    assert np.array_equal(*(each.step_logits(prompt, prefill=9) for each in (one, other)))


@pytest.mark.parametrize("tie", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("layers", ["auto", "int4"])
@pytest.mark.parametrize("head_format", HEAD_FORMATS)
def test_the_output_matrix_is_rounded_by_itself(
    tmp_path: Path, tie: bool, layers: str, head_format: str, caplog
):
    model = dataclasses.replace(MODEL, tie=tie)
    weights = random_weights(model)
    stored = write_checkpoint(tmp_path / "stored", model, weights)
    meant = with_rounded_head(weights, head_format)
    if layers != "auto":
        meant = all_rounded(meant, layers)
    plain = write_checkpoint(tmp_path / "meant", MODEL, meant)
    with (
        open_decoder(plain) as want,
        open_decoder(stored, weight_format=layers, lm_head_format=head_format) as got,
    ):
        assert_same_logits(got, want)
        assert got.config.lm_head_format == head_format
    assert f"lm_head_format {head_format}: the output matrix is rounded, by" in caplog.text
    assert ("weight_format int4" in caplog.text) == (layers == "int4")


@pytest.mark.parametrize("tie", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_codes_of_the_layers_stay_beside_a_rounded_output_matrix(
    tmp_path: Path, tie: bool, kind: Kind
):
    model = dataclasses.replace(WIDE, tie=tie, dtype="float32")
    stored, meant = quantized_tensors(model, kind)
    folder = write_quantized(tmp_path / "stored", model, kind, stored)
    untied = dataclasses.replace(model, tie=False)
    plain = write_checkpoint(tmp_path / "meant", untied, with_rounded_head(meant, "fp8"))
    options = {"dtype": "float32", "kv_dtype": "float32"}
    with (
        open_decoder(plain, **options) as want,
        open_decoder(folder, lm_head_format="fp8", **options) as kept,
        open_decoder(folder, lm_head_format="fp8", weight_format="decoded", **options) as decoded,
    ):
        assert_same_logits(kept, want)
        assert_same_logits(decoded, want)


def test_a_quantised_output_matrix_may_be_decoded_by_itself(tmp_path: Path):
    kind = KINDS[0]
    kind = dataclasses.replace(kind, config=kind.config | {"ignore": []})
    stored, _ = quantized_tensors(WIDE, kind, lambda name: is_projection(name) or name == HEAD)
    folder = write_quantized(tmp_path, WIDE, kind, stored)

    def weight_bytes(**options) -> int:
        return tidaldecode.plan_memory(folder, device="cpu", max_seq_len=64, **options).weight_bytes

    head = random_weights(WIDE)[HEAD]
    of_codes = head.size + 2 * head.shape[0]
    assert weight_bytes(lm_head_format="decoded") - weight_bytes() == 2 * head.size - of_codes
    both = {"lm_head_format": "decoded", "weight_format": "decoded"}
    assert weight_bytes(**both) == weight_bytes(weight_format="decoded")
    with pytest.raises(ConfigError, match="lm_head_format: the checkpoint is quantised already"):
        open_decoder(folder, lm_head_format="fp8")


@pytest.mark.parametrize("tie", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("head_format", HEAD_FORMATS)
def test_random_output_matrices_run_in_codes(tmp_path: Path, tie: bool, head_format: str):
    folder = write_checkpoint(tmp_path, dataclasses.replace(MODEL, tie=tie))
    with open_decoder(folder, load_format="dummy", lm_head_format=head_format) as decoder:
        assert np.isfinite(decoder.logits(random_prompt(MODEL, 8))).all()


def test_codes_are_not_rounded_again(tmp_path: Path):
    model = TinyModel(dtype="bfloat16")
    stored, _ = quantized_tensors(model, KINDS[0])
    folder = write_quantized(tmp_path, model, KINDS[0], stored)
    with pytest.raises(ConfigError, match="weight_format: the checkpoint is quantised already"):
        open_decoder(folder, weight_format="int4")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_codes_that_are_kept_are_not_rounded_to_16_bits(tmp_path: Path, kind: Kind, dtype: str):
    model = dataclasses.replace(WIDE, dtype=dtype)
    stored, _ = quantized_tensors(model, kind)
    folder = write_quantized(tmp_path, model, kind, stored)
    # Nothing of int8 is kept.
    decoded_dtype = dtype if kind.name.startswith("int8") else "float32"
    prompt = random_prompt(model, 24)
    with (
        open_decoder(folder, kv_dtype="float32") as kept,
        open_decoder(
            folder, dtype=decoded_dtype, kv_dtype="float32", weight_format="decoded"
        ) as decoded,
    ):
        assert np.array_equal(kept.logits(prompt, last=24), decoded.logits(prompt, last=24))
        steps = [decoder.step_logits(prompt, prefill=9) for decoder in (kept, decoded)]
        assert np.array_equal(*steps)


@pytest.mark.parametrize("kind", [KINDS[0], packed_group(32, True)], ids=lambda kind: kind.name)
def test_the_memory_plan_is_of_what_is_kept(tmp_path: Path, kind: Kind):
    stored, plain = write_both(tmp_path, WIDE, kind)

    def weight_bytes(folder: Path, **options) -> int:
        return tidaldecode.plan_memory(folder, device="cpu", max_seq_len=64, **options).weight_bytes

    assert weight_bytes(stored, weight_format="decoded") == weight_bytes(plain)
    assert weight_bytes(stored) == read_model_folder(stored).weight_bytes


@pytest.mark.parametrize("tie", [False, True], ids=["own", "tied"])
def test_the_memory_plan_counts_the_output_matrix(tmp_path: Path, tie: bool):
    folder = write_checkpoint(tmp_path, dataclasses.replace(WIDE, tie=tie))
    vocab_size, hidden = random_weights(WIDE)[EMBEDDING].shape

    def weight_bytes(**options) -> int:
        return tidaldecode.plan_memory(folder, device="cpu", max_seq_len=64, **options).weight_bytes

    replaced = 0 if tie else 2 * vocab_size * hidden
    added = {
        "fp8": vocab_size * (hidden + 4),  # a float32 for each row
        "int4": vocab_size * (hidden // 2 + 2 * -(-hidden // 128)),
    }
    for head_format, size in added.items():
        assert weight_bytes(lm_head_format=head_format) - weight_bytes() == size - replaced
