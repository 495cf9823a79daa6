"""Quantised checkpoints: each format means exactly what its description says, or is refused.

The engine reads a folder in a format, and the same folder decoded by numpy (quantized_models.py);
both must give the same bits. So must codes that stay in memory, and what they stand for in float32.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tidaldecode
from quantized_models import (
    FLOAT8,
    KINDS,
    Kind,
    Tensors,
    awq,
    fp8_blocks,
    gptq,
    is_projection,
    packed_group,
    quantized_tensors,
    write_both,
    write_quantized,
    write_safetensors,
)
from scripted_model import update_json
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.checkpoint.quantized_tensors import QuantizedTensor
from tidaldecode.cli import app
from tidaldecode.errors import WeightsError
from tiny_families import FAMILIES
from tiny_models import TinyModel, random_prompt, write_checkpoint

TINY = TinyModel(
    hidden_size=128, intermediate_size=384, num_layers=2, head_dim=32, dtype="bfloat16"
)
SMALL = TinyModel(num_layers=1, dtype="bfloat16")  # hidden 64, intermediate 96
UP = "model.layers.0.mlp.up_proj"
Opened = tuple[Path, dict[str, str]]


def open_decoder(folder: Path, **options) -> tidaldecode.Decoder:
    limits = {"max_seq_len": 64, "max_batch_size": 1, "num_threads": 1}
    return tidaldecode.Decoder(folder, device="cpu", **(limits | options))


# Matrices that stay in codes stand for float32 numbers.
EXACT = {"dtype": "float32", "kv_dtype": "float32"}


def assert_same(one: Path, other: Path, model: TinyModel, **options) -> None:
    """A quantised folder gives the bits of plain weights if it is decoded, and in float32 its own
    whether it is or not."""
    decoded = {"weight_format": "decoded"}
    assert_same_bits((one, options | decoded), (other, options), model)
    assert_same_bits((one, options | EXACT), (one, options | EXACT | decoded), model)


def assert_same_bits(one: Opened, other: Opened, model: TinyModel) -> None:
    """Two folders, each with its options: logits of every position, and greedy tokens."""
    prompt = random_prompt(model, 24)
    with open_decoder(one[0], **one[1]) as first, open_decoder(other[0], **other[1]) as second:
        logits = first.logits(prompt, last=len(prompt))
        assert np.isfinite(logits).all()
        assert np.array_equal(logits, second.logits(prompt, last=len(prompt)))
        texts = [
            decoder.generate(prompt, max_new_tokens=12, ignore_eos=True, temperature=0).token_ids
            for decoder in (first, second)
        ]
        assert texts[0] == texts[1]


# Meaning


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_format_means_what_numpy_decodes(tmp_path: Path, kind: Kind, dtype: str):
    model = dataclasses.replace(TINY, dtype=dtype)
    assert_same(*write_both(tmp_path, model, kind), model, dtype=dtype)


# Common formats: FP8 by tensor and channel and in blocks, int4 in groups, AWQ, GPTQ.
COMMON = (KINDS[0], fp8_blocks(64, 128), packed_group(32, False), awq(32), gptq(64, "gptq"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", COMMON, ids=lambda kind: kind.name)
def test_every_family_has_its_biases_and_norms(tmp_path: Path, family: str, kind: Kind):
    model = dataclasses.replace(TINY, family=family)
    assert_same(*write_both(tmp_path, model, kind), model)


@pytest.mark.parametrize("kind", KINDS[::4], ids=lambda kind: kind.name)
def test_the_output_matrix_may_be_quantised(tmp_path: Path, kind: Kind):
    config = kind.config | {"ignore": [], "modules_to_not_convert": None, "ignored_layers": []}
    kind = dataclasses.replace(kind, config=config)
    assert_same(
        *write_both(tmp_path, TINY, kind, lambda n: is_projection(n) or n == "lm_head.weight"), TINY
    )


def test_an_embedding_may_be_quantised(tmp_path: Path):
    kind = KINDS[0]
    config = json.loads(json.dumps(kind.config))
    config["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    kind = dataclasses.replace(kind, config=config)
    tied = dataclasses.replace(TINY, tie=True)
    assert_same(*write_both(tmp_path, tied, kind, lambda n: "norm" not in n), tied)


def test_tied_embeddings_stay_as_they_are(tmp_path: Path):
    tied = dataclasses.replace(TINY, tie=True)
    assert_same(*write_both(tmp_path, tied, KINDS[0]), tied)


def test_every_float8_code_is_exact(tmp_path: Path):
    """All codes but the two of NaN lie in one matrix, under scales that round."""
    model = dataclasses.replace(SMALL, dtype="float32")
    kind = KINDS[0]
    stored, meant = quantized_tensors(model, kind)
    codes = stored[f"{UP}.weight"][1]
    good = np.flatnonzero(np.isfinite(FLOAT8)).astype(np.uint8)
    codes[:] = np.resize(good, codes.shape)
    scales = (stored[f"{UP}.weight_scale"][1].astype(np.uint32) << 16).view(np.float32)
    meant[f"{UP}.weight"] = FLOAT8[codes] * scales
    one = write_quantized(tmp_path / "one", model, kind, stored)
    assert_same(one, write_checkpoint(tmp_path / "other", model, meant), model, dtype="float32")


def test_a_nan_among_codes_is_refused_by_name(tmp_path: Path):
    stored, _ = quantized_tensors(SMALL, KINDS[0])
    stored[f"{UP}.weight"][1][0, 0] = 0x7F
    folder = write_quantized(tmp_path, SMALL, KINDS[0], stored)
    with pytest.raises(WeightsError, match=rf"{UP}\.weight: holds a NaN, expected numbers"):
        open_decoder(folder)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 140),
    hidden=st.integers(1, 20).map(lambda n: 4 * n),
    intermediate=st.integers(1, 150),
    head_dim=st.sampled_from((2, 6, 16)),
)
def test_blocks_of_any_size_may_be_ragged(
    tmp_path_factory, rows: int, columns: int, hidden: int, intermediate: int, head_dim: int
):
    model = TinyModel(
        hidden_size=hidden, intermediate_size=intermediate, head_dim=head_dim, num_layers=1,
        dtype="bfloat16",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("blocks")
    assert_same(*write_both(folder, model, fp8_blocks(rows, columns)), model)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    groups=st.integers(1, 4),
    more=st.integers(1, 9),
    size=st.sampled_from((8, 24, 32)),
    kind=st.sampled_from(("symmetric", "zeros", "gptq", "gptq_v2", "awq")),
)
def test_groups_of_any_size(tmp_path_factory, groups: int, more: int, size: int, kind: str):
    kinds = {
        "symmetric": packed_group(size, True), "zeros": packed_group(size, False), "awq": awq(size),
        "gptq": gptq(size, "gptq"), "gptq_v2": gptq(size, "gptq_v2"),
    }  # fmt: skip
    model = TinyModel(
        hidden_size=size * groups, intermediate_size=size * more, head_dim=size, num_layers=1,
        dtype="bfloat16",
    )  # fmt: skip
    assert_same(*write_both(tmp_path_factory.mktemp("groups"), model, kinds[kind]), model)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(hidden=st.integers(1, 30).map(lambda n: 2 * n), intermediate=st.integers(1, 70))
def test_packed_rows_may_end_inside_a_word(tmp_path_factory, hidden: int, intermediate: int):
    kind = next(k for k in KINDS if k.name == "int4 per channel, with zero points")
    model = TinyModel(
        hidden_size=hidden, intermediate_size=intermediate, head_dim=6, num_layers=1,
        dtype="bfloat16",
    )  # fmt: skip
    assert_same(*write_both(tmp_path_factory.mktemp("packed"), model, kind), model)


# Which modules


def test_ignored_and_mixed_modules(tmp_path: Path):
    """Attention in FP8, the MLP in int4, one layer's parts as they are."""
    fp8, int4 = KINDS[0], packed_group(32, True)
    stored, meant = quantized_tensors(TINY, fp8, lambda n: "self_attn" in n and is_projection(n))
    other, other_meant = quantized_tensors(TINY, int4, lambda n: ".mlp." in n and ".1." not in n)
    stored = {n: t for n, t in stored.items() if ".mlp." not in n}
    stored |= {n: t for n, t in other.items() if ".mlp." in n}
    meant |= {n: v for n, v in other_meant.items() if ".mlp." in n}
    groups = {
        "attention": {
            "targets": ["re:.*self_attn.*"], "format": "float-quantized",
            "weights": fp8.config["config_groups"]["group_0"]["weights"],
        },
        "mlp": {
            "targets": ["Linear"], "format": "pack-quantized",
            "weights": int4.config["config_groups"]["group_0"]["weights"],
        },
    }  # fmt: skip
    config = fp8.config | {
        "format": "mixed-precision", "config_groups": groups,
        "ignore": ["lm_head", "re:.*layers\\.1\\.mlp\\..*"],
    }  # fmt: skip
    kind = dataclasses.replace(fp8, config=config)
    one = write_quantized(tmp_path / "one", TINY, kind, stored)
    assert_same(one, write_checkpoint(tmp_path / "other", TINY, meant), TINY)


@pytest.mark.parametrize("kind", [KINDS[0], packed_group(32, False), gptq(32, "gptq")],
                         ids=lambda kind: kind.name)  # fmt: skip
def test_wrapped_names_are_found(tmp_path: Path, kind: Kind):
    stored, meant = quantized_tensors(TINY, kind)
    wrapped = {f"language_model.{name}": tensor for name, tensor in stored.items()}
    one = write_quantized(tmp_path / "one", TINY, kind, wrapped)
    assert_same(one, write_checkpoint(tmp_path / "other", TINY, meant), TINY)


def test_a_quantised_output_matrix_beside_tied_embeddings_is_used(tmp_path: Path):
    tied = dataclasses.replace(TINY, tie=True)
    kind = dataclasses.replace(KINDS[0], config=KINDS[0].config | {"ignore": []})
    stored, meant = quantized_tensors(TINY, kind, lambda n: n == "lm_head.weight")
    one = write_quantized(tmp_path / "one", tied, kind, stored)
    assert_same(one, write_checkpoint(tmp_path / "other", TINY, meant), TINY)
    (note,) = read_model_folder(one).notes
    assert "the stored lm_head.weight_scale differs from the embedding" in note


def test_quantised_parts_without_a_place_are_named(tmp_path: Path):
    stored, _ = quantized_tensors(SMALL, KINDS[0])
    part = stored[f"{UP}.weight_scale"]
    stored["vision.tower.weight_scale"] = part
    (note,) = read_model_folder(write_quantized(tmp_path, SMALL, KINDS[0], stored)).notes
    assert "does not use: 'vision.tower.weight_scale'" in note
    stored["model.layers.0.mlp.router.weight_scale"] = part
    with pytest.raises(tidaldecode.WeightsError, match="no place for: '.*router.weight_scale'"):
        read_model_folder(write_quantized(tmp_path, SMALL, KINDS[0], stored))


def test_an_older_name_of_the_config_counts(tmp_path: Path):
    one, other = write_both(tmp_path, TINY, KINDS[0])
    update_json(one / "config.json", quantization_config=None, compression_config=KINDS[0].config)
    assert_same(one, other, TINY)


def test_zero_biases_of_gptq_are_none(tmp_path: Path):
    kind = gptq(32, "gptq")
    stored, meant = quantized_tensors(SMALL, kind)
    biases = {
        name.removesuffix("qweight") + "bias": ("F16", np.zeros(t.shape[1], np.uint16))
        for name, (_, t) in stored.items()
        if name.endswith("qweight")
    }
    one = write_quantized(tmp_path / "one", SMALL, kind, stored | biases)
    assert_same(one, write_checkpoint(tmp_path / "other", SMALL, meant), SMALL)
    biases[f"{UP}.bias"][1][3] = 1
    write_quantized(one, SMALL, kind, stored | biases)
    with pytest.raises(tidaldecode.WeightsError, match=f"{UP}.bias.*no such biases"):
        read_model_folder(one)


def test_modules_that_gptq_left_as_they_are_are_used_so(tmp_path: Path):
    kind = gptq(32, "gptq", dynamic={"-:.*self_attn.*": {}, "lm_head": {}})
    one, other = write_both(tmp_path, TINY, kind, lambda n: ".mlp." in n)
    assert_same(one, other, TINY)


def test_shards_may_part_a_matrix(tmp_path: Path):
    kind = packed_group(32, False)
    stored, meant = quantized_tensors(TINY, kind)
    one = write_quantized(tmp_path / "one", TINY, kind, {"none": stored["model.norm.weight"]})
    (one / "model.safetensors").unlink()
    names = sorted(stored)
    weight_map = {}
    for number in (1, 2):
        shard = f"model-{number:05d}-of-00002.safetensors"
        part = names[number - 1 :: 2]
        write_safetensors(one / shard, {name: stored[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    update_json(one / "model.safetensors.index.json", weight_map=weight_map)
    assert_same(one, write_checkpoint(tmp_path / "other", TINY, meant), TINY)


# What is said


def test_the_folder_says_what_it_stores(tmp_path: Path, capsys):
    folder = write_quantized(tmp_path, TINY, KINDS[0])
    found = read_model_folder(folder)
    matrices = [weight for weight in found.weights if isinstance(weight, QuantizedTensor)]
    assert len(matrices) == 7 * TINY.num_layers
    assert found.dtype == "bfloat16"
    assert found.weight_bytes < 0.7 * found.decoded_bytes
    assert app.main(["info", str(folder)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "compressed-tensors: FP8, a scale per row; FP8, int4 and MXFP4 are kept so on" in text
    assert "all else is decoded to bfloat16" in text


def test_weight_only_checkpoints_say_nothing_of_activations(tmp_path: Path, capsys):
    assert app.main(["info", str(write_quantized(tmp_path, TINY, gptq(64, "gptq")))]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "gptq: int4, groups of 64; FP8, int4 and MXFP4 are kept" in text
    assert "activations are not quantised" not in text


def test_cache_scales_are_noted(tmp_path: Path):
    stored, _ = quantized_tensors(SMALL, KINDS[0])
    scale = ("F32", np.ones(1, np.float32).view(np.uint32))
    name = "model.layers.0.self_attn.k_scale"
    config = KINDS[0].config | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    kind = dataclasses.replace(KINDS[0], config=config)
    notes = read_model_folder(write_quantized(tmp_path, SMALL, kind, stored | {name: scale})).notes
    assert len(notes) == 2
    assert "kv_cache_scheme: the KV cache is quantised only by kv_dtype 'fp8'" in notes[0]
    assert "scales of a quantised KV cache are used only" in notes[1] and name in notes[1]


def test_fields_that_are_not_known_are_noted(tmp_path: Path):
    kind = gptq(32, "gptq", hyper_mode=3)
    (note,) = read_model_folder(write_quantized(tmp_path, SMALL, kind)).notes
    assert "'hyper_mode': not known here" in note


def test_random_weights_need_no_files(tmp_path: Path):
    folder = write_quantized(tmp_path, SMALL, KINDS[0])
    (folder / "model.safetensors").unlink()
    with open_decoder(folder, load_format="dummy") as decoder:
        assert len(decoder.generate([5, 6], max_new_tokens=2, ignore_eos=True).token_ids) == 2


# Damaged parts


def changed(kind: Kind, **parts: tuple[str, np.ndarray] | None) -> Tensors:
    """The tensors of a good folder, those of up_proj changed; None removes one."""
    stored, _ = quantized_tensors(SMALL, kind)
    for part, tensor in parts.items():
        stored.pop(f"{UP}.{part}", None)
        if tensor is not None:
            stored[f"{UP}.{part}"] = tensor
    return stored


def words(*shape: int) -> tuple[str, np.ndarray]:
    return "I32", np.zeros(shape, np.uint32)


def bf16(*shape: int) -> tuple[str, np.ndarray]:
    return "BF16", np.full(shape, 0x3F80, np.uint16)


FP8, INT4, GPTQ = KINDS[0], packed_group(32, False), gptq(32, "gptq")
AWQ = next(kind for kind in KINDS if kind.name == "AWQ in groups of 32")
NAN = ("BF16", np.full((96, 1), 0x7FC0, np.uint16))
DAMAGE = [
    (FP8, {"weight_scale": None}, "weight_scale. is missing"),
    (FP8, {"weight": None}, "up_proj.weight' is missing"),
    (FP8, {"weight_scale": bf16(95, 1)}, r"weight_scale: shape \[95, 1\], expected \[96, 1\]"),
    (FP8, {"weight_scale": bf16(96, 2)}, r"shape \[96, 2\], expected \[96, 1\]"),
    (FP8, {"weight_scale": ("F8_E8M0", np.ones((96, 1), np.uint8))}, "dtype F8_E8M0, expected F32"),
    (FP8, {"weight_scale": NAN}, "weight_scale: holds nan, expected finite"),
    (FP8, {"weight": ("F8_E5M2", np.ones((96, 64), np.uint8))}, "dtype F8_E5M2, expected F8_E4M3"),
    (FP8, {"weight": bf16(96, 64)}, "dtype BF16, expected F8_E4M3"),
    (FP8, {"weight": ("F8_E4M3", np.ones((64, 96), np.uint8))}, r"\[96, 1\], expected \[64, 1\]"),
    (FP8, {"weight": ("F8_E4M3", np.ones(64, np.uint8))}, r"shape \[64\], expected two sizes"),
    (FP8, {"weight_zero_point": words(12, 1)}, "weight_zero_point.*no part of a matrix stored as"),
    (FP8, {"weight_global_scale": bf16(1)}, "weight_global_scale.*no part of a matrix"),
    (FP8, {"qweight": words(8, 96)}, "qweight.*no part of a matrix"),
    (INT4, {"weight_shape": None}, "weight_shape. is missing"),
    (INT4, {"weight_shape": ("I64", np.array([96, 65]))}, r"holds \[96, 65\], which does not fit"),
    (INT4, {"weight_shape": ("I64", np.array([97, 64]))}, r"holds \[97, 64\], which does not fit"),
    (INT4, {"weight_shape": ("I64", np.array([96]))}, r"shape \[1\], expected \[2\]"),
    (INT4, {"weight_packed": words(96, 9)}, "does not fit .*up_proj.weight_packed"),
    (INT4, {"weight_scale": bf16(96, 3)}, r"shape \[96, 3\], expected \[96, 2\]"),
    (INT4, {"weight_zero_point": None}, "weight_zero_point. is missing"),
    (INT4, {"weight_zero_point": words(96, 2)}, r"shape \[96, 2\], expected \[12, 2\]"),
    (INT4, {"weight_zero_point": bf16(12, 2)}, "dtype BF16, expected I32"),
    (packed_group(32, True), {"weight_zero_point": words(12, 2)}, "weight_zero_point.*no part"),
    (packed_group(32, True), {"weight_g_idx": ("I32", np.arange(64, dtype=np.int32)[::-1] // 32)},
     "order of their activations"),
    (GPTQ, {"qzeros": None}, "qzeros. is missing"),
    (GPTQ, {"qzeros": words(2, 11)}, r"qzeros: shape \[2, 11\], expected \[2, 12\]"),
    (GPTQ, {"scales": ("F16", np.ones((96, 2), np.uint16))}, r"\[96, 2\], expected \[2, 96\]"),
    (GPTQ, {"qweight": words(8, 0)}, r"shape \[8, 0\], expected two sizes above 0"),
    (GPTQ, {"qweight": words(9, 96)}, "72 columns, expected a multiple of the group_size 32"),
    (GPTQ, {"g_idx": ("I32", np.arange(64, dtype=np.int32)[::-1] // 32)}, "desc_act"),
    (GPTQ, {"g_idx": words(63)}, r"g_idx.*I32 \[63\], expected I32 \[64\]"),
    (gptq(32, "gptq", desc_act=True), {"g_idx": None}, "g_idx. is missing"),
    (AWQ, {"qweight": words(64, 11)}, r"shape \[2, 12\], expected \[2, 11\]|\[2, 96\], expected"),
    (AWQ, {"scales": None}, "scales. is missing"),
    (AWQ, {"g_idx": words(64)}, "g_idx.*no part of a matrix"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "parts", "message"), DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_parts_are_named(tmp_path: Path, kind: Kind, parts: dict, message: str):
    folder = write_quantized(tmp_path, SMALL, kind, changed(kind, **parts))
    with pytest.raises(tidaldecode.WeightsError, match=message) as error:
        open_decoder(folder)
    assert UP in str(error.value)


@pytest.mark.parametrize("kind", [FP8, INT4, GPTQ, AWQ], ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [[2**61, 0], [0, 2**61], [2**61, 2**61, 0], [0]], ids=str)
def test_sizes_of_nothing_may_be_any(tmp_path: Path, kind: Kind, shape: list[int]):
    """A tensor without bytes may have a shape beyond 64 bits."""
    stored = changed(kind)
    for part in [name for name in stored if name.startswith(UP)]:
        dtype = stored[part][0]
        write_quantized(tmp_path, SMALL, kind, stored | {part: (dtype, np.zeros(0, np.uint8))})
        path = tmp_path / "model.safetensors"
        size = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + size])
        header[part]["shape"] = shape
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + path.read_bytes()[8 + size :])
        with pytest.raises(tidaldecode.WeightsError, match=UP):
            open_decoder(tmp_path)


DTYPES = {"F8_E4M3": np.uint8, "I8": np.uint8, "BF16": np.uint16, "I32": np.uint32, "I64": np.int64}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from((FP8, INT4, GPTQ, AWQ)),
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.sampled_from((0, 1, 2, 8, 12, 64, 96, 97)), max_size=3),
    data=st.data(),
)
def test_any_part_may_be_anything(tmp_path_factory, kind: Kind, dtype: str, shape, data):
    """Whatever a part is, the folder is read as it means or refused with a WeightsError."""
    stored = changed(kind)
    parts = sorted(name for name in stored if name.startswith(UP))
    stored[data.draw(st.sampled_from(parts))] = (dtype, np.zeros(shape, DTYPES[dtype]))
    folder = write_quantized(tmp_path_factory.mktemp("parts"), SMALL, kind, stored)
    try:
        open_decoder(folder).close()
    except tidaldecode.WeightsError as error:
        assert UP in str(error)


def test_groups_must_divide_the_columns(tmp_path: Path):
    stored, _ = quantized_tensors(SMALL, packed_group(32, True))
    folder = write_quantized(tmp_path, SMALL, packed_group(48, True), stored)
    with pytest.raises(tidaldecode.WeightsError, match="64 columns, .*multiple of the group_size"):
        read_model_folder(folder)


def test_the_matrix_must_be_the_models(tmp_path: Path):
    folder = write_quantized(tmp_path, SMALL, FP8)
    update_json(folder / "config.json", intermediate_size=88)
    with pytest.raises(tidaldecode.WeightsError, match=r"shape \[96, 64\], expected \[88, 64\]"):
        open_decoder(folder)


@pytest.mark.parametrize("kind", [FP8, INT4, GPTQ], ids=lambda kind: kind.name)
def test_a_file_cut_short_is_damaged(tmp_path: Path, kind: Kind):
    folder = write_quantized(tmp_path, SMALL, kind)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(tidaldecode.WeightsError, match="cut short"):
        open_decoder(folder)


def test_parts_need_a_config(tmp_path: Path):
    folder = write_quantized(tmp_path, SMALL, FP8, quantization_config=None)
    with pytest.raises(tidaldecode.WeightsError, match="has no quantization_config"):
        read_model_folder(folder)


def test_quantised_parts_of_an_ignored_module_are_refused(tmp_path: Path):
    kind = dataclasses.replace(FP8, config=FP8.config | {"ignore": ["lm_head", UP]})
    with pytest.raises(tidaldecode.WeightsError, match=f"leaves '{UP}' out"):
        read_model_folder(write_quantized(tmp_path, SMALL, kind))


def test_a_plain_matrix_that_the_config_calls_quantised_is_used(tmp_path: Path):
    stored, meant = quantized_tensors(TINY, FP8, lambda n: is_projection(n) and ".1." not in n)
    one = write_quantized(tmp_path / "one", TINY, FP8, stored)
    assert_same(one, write_checkpoint(tmp_path / "other", TINY, meant), TINY)
