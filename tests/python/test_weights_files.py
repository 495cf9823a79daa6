"""Weight files: safetensors headers, shards and their index, hostile ones included."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from scripted_model import update_json
from tidaldecode.checkpoint.model_config import ModelConfig, read_checkpoint_config
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.checkpoint.safetensors_header import MAX_HEADER_BYTES, read_header
from tidaldecode.checkpoint.tensor_names import expected_tensor_names
from tidaldecode.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE, find_weights
from tidaldecode.errors import TidalError, WeightsError
from tiny_families import CORRECTION_PARTS, FAMILIES, OWN_NAMES
from tiny_models import TinyModel, random_weights, write_checkpoint

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "F16", "shape": [2], "data_offsets": [16, 20]}
TINY = TinyModel(num_layers=2)


def write_file(path: Path, header: Any, num_bytes: int = 20, text: bytes | None = None) -> Path:
    data = json.dumps(header).encode() if text is None else text
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(num_bytes))
    return path


def model_of(folder: Path) -> ModelConfig:
    return read_model_folder(folder).model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder with one weight file."""
    return write_checkpoint(tmp_path / "model", TINY)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good folder with two shards and an index."""
    folder = write_checkpoint(tmp_path / "sharded", TINY)
    weights = random_weights(TINY)
    (folder / SINGLE_FILE).unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        safetensors.numpy.save_file({name: weights[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    update_json(folder / INDEX_FILE, metadata={"total_size": 1}, weight_map=weight_map)
    return folder


def change_index(folder: Path, **entries: Any) -> None:
    path = folder / INDEX_FILE
    weight_map = json.loads(path.read_text())["weight_map"] | entries
    update_json(path, weight_map={k: v for k, v in weight_map.items() if v is not None})


# Headers


def test_a_good_header_is_read(tmp_path: Path):
    path = write_file(tmp_path / "w", {"__metadata__": {"format": "pt"}, "b": B, "a": A})
    first, second = read_header(path)
    assert (first.name, first.dtype, first.shape, first.num_bytes) == ("a", "F32", (2, 2), 16)
    assert (second.name, second.file_offset) == ("b", first.file_offset + 16)


def test_entries_point_at_the_bytes_safetensors_reads(folder: Path):
    expected = safetensors.numpy.load_file(folder / SINGLE_FILE)
    data = (folder / SINGLE_FILE).read_bytes()
    entries = read_header(folder / SINGLE_FILE)
    assert {entry.name for entry in entries} == set(expected)
    for entry in entries:
        raw = data[entry.file_offset : entry.file_offset + entry.num_bytes]
        assert np.array_equal(
            np.frombuffer(raw, np.float32).reshape(entry.shape), expected[entry.name]
        )


def test_scalars_and_empty_tensors_are_fine(tmp_path: Path):
    header = {
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]},
    }
    shapes = {
        entry.name: entry.shape for entry in read_header(write_file(tmp_path / "w", header, 4))
    }
    assert shapes == {"scalar": (), "empty": (0, 3)}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "header too small: 0 bytes"),
        (b"1234567", "header too small: 7 bytes"),
        (struct.pack("<Q", 2**63), f"{2**63}, expected at most"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1), "expected at most"),
        (struct.pack("<Q", 100) + b"{}", "has only 10 bytes"),
        (struct.pack("<Q", 0), "filled with zero bytes"),
        (struct.pack("<Q", 0) + b"\xff" * 9, "header length 0"),
        (struct.pack("<Q", 2) + b"\xff\xff", "not UTF-8"),
        (struct.pack("<Q", 2) + b"[]", "expected an object"),
        (struct.pack("<Q", 6) + b'{"a":}', "not valid JSON"),
        (struct.pack("<Q", 100_005) + b'{"a":' + b"[" * 100_000, "nested too deep"),
    ],
    ids=range(11),
)
def test_broken_headers_are_refused(tmp_path: Path, data: bytes, expected: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=expected) as error:
        read_header(path)
    assert str(path) in str(error.value)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4242\n"
FOREIGN = {
    LFS_POINTER: "git-lfs pointer.*git lfs pull",
    b"<!DOCTYPE html><html>Access denied</html>": "web page.*download the file again",
    b"\n\n<HTML lang=en>": "web page",
    b"\x1f\x8b\x08" + bytes(20): "gzip archive; unpack",
    b"PK\x03\x04" + bytes(20): "zip archive.*expected safetensors",
    b"\x80\x02}q\x00(X\x05": "Python pickle.*never read",
    b"GGUF\x03" + bytes(20): "GGUF file",
    bytes(4096): "zero bytes.*download the file again",
}


@pytest.mark.parametrize(("data", "expected"), FOREIGN.items(), ids=range(len(FOREIGN)))
@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE, "config.json", "generation_config.json"])
def test_a_file_of_another_kind_is_named(sharded: Path, name: str, data: bytes, expected: str):
    (sharded / name).write_bytes(data)
    with pytest.raises(TidalError, match=expected) as error:
        read_model_folder(sharded)
    assert str(sharded / name) in str(error.value)


def test_text_in_place_of_weights_is_shown(folder: Path):
    (folder / SINGLE_FILE).write_text("Invalid username or password.\n")
    with pytest.raises(WeightsError, match="is text: 'Invalid username or password.'; download"):
        read_model_folder(folder)


def test_a_good_file_is_never_taken_for_another_kind(tmp_path: Path):
    """A header of 0x8b1f bytes begins like a gzip archive."""
    text = json.dumps({"a": A, "b": B}).encode().ljust(0x8B1F)
    path = write_file(tmp_path / "w", None, 20, text)
    assert path.read_bytes().startswith(b"\x1f\x8b")
    assert len(read_header(path)) == 2


def test_a_header_of_a_hundred_thousand_tensors_is_read_at_once(tmp_path: Path):
    header = {
        f"layers.{i // 9}.mlp.experts.{i % 9}.up_proj.weight": {
            "dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]
        }
        for i in range(100_000)
    }  # fmt: skip
    path = write_file(tmp_path / "w", header, 100_000)
    started = time.process_time()
    assert len(read_header(path)) == 100_000
    assert time.process_time() - started < 5


def test_a_header_that_is_valid_and_far_too_long_is_refused_unread(tmp_path: Path):
    path = write_file(tmp_path / "w", {}, 0, b"{}" + b" " * 96_000_000)
    started = time.process_time()
    with pytest.raises(WeightsError, match="header length 96000002, expected at most"):
        read_header(path)
    assert time.process_time() - started < 0.5


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": A | changes, "b": B}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (entry(dtype="F31"), "'a': dtype: got 'F31'"),
        (entry(dtype=4), "'a': dtype: got 4"),
        (entry(shape=[-2, -2]), "'a': shape: got"),
        (entry(shape=[2.0, 2]), "'a': shape: got"),
        (entry(shape=[True, 4]), "'a': shape: got"),
        (entry(shape=[2**40, 2**40]), "'a': F32 .* needs"),
        (entry(shape=[2**63]), "'a': shape: got"),
        (entry(shape=[1] * 100), "'a': shape: got"),
        (entry(shape=[3, 2]), "'a': F32 .* needs 24 bytes, but data_offsets hold 16"),
        (entry(data_offsets=[16, 0]), "begin 16 lies behind end 0"),
        (entry(data_offsets=[0]), "data_offsets: got"),
        (entry(data_offsets=[-16, 0]), "data_offsets: got"),
        (entry(data_offsets=[0.0, 16]), "data_offsets: got"),
        (entry(extra=1), "expected dtype, shape and data_offsets"),
        ({"a": "F32"}, "expected dtype, shape and data_offsets"),
        ({"a": A, "b": B | {"data_offsets": [12, 16]}}, "'b' overlaps"),
        ({"a": A, "b": B | {"data_offsets": [18, 22]}}, "'b' leaves a hole"),
        ({"b": B}, "'b' leaves a hole"),
        ({"a": A}, "has bytes behind its last tensor"),
        ({"a": A, "b": B, "c": B | {"data_offsets": [20, 24]}}, "is cut short"),
        ({"__metadata__": {"x": 1}, "a": A, "b": B}, "__metadata__: 'x' is 1"),
        ({"__metadata__": [], "a": A, "b": B}, "__metadata__: got"),
    ],
    ids=range(22),
)
def test_bad_entries_are_named(tmp_path: Path, header: dict[str, Any], expected: str):
    with pytest.raises(WeightsError, match=expected):
        read_header(write_file(tmp_path / "model.safetensors", header))


def test_a_repeated_name_is_refused(tmp_path: Path):
    one = json.dumps(A)
    text = f'{{"a": {one}, "a": {one}}}'.encode()
    with pytest.raises(WeightsError, match="key 'a' appears twice"):
        read_header(write_file(tmp_path / "w", None, 16, text))


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "link loop", "broken link"])
def test_what_is_no_file_is_refused_without_waiting(folder: Path, kind: str):
    checkpoint = read_checkpoint_config(folder / "config.json")
    path = folder / SINGLE_FILE
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path if kind == "link loop" else folder / "gone")
    started = time.monotonic()
    with pytest.raises(WeightsError, match=SINGLE_FILE):
        find_weights(folder, checkpoint)
    assert time.monotonic() - started < 10


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(folder: Path):
    (folder / SINGLE_FILE).chmod(0)
    with pytest.raises(WeightsError, match="Permission denied"):
        read_model_folder(folder)


# Folders


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
def test_the_expected_names_are_those_of_the_checkpoint(tmp_path: Path, family: str, tie: bool):
    write_checkpoint(tmp_path, TinyModel(family=family, num_layers=2, tie=tie))
    model = model_of(tmp_path)
    assert {entry.name for entry in read_model_folder(tmp_path).weights} == set(
        expected_tensor_names(model)
    )
    renames = family in OWN_NAMES or CORRECTION_PARTS.get(family, "mlp.gate") != "mlp.gate"
    if not renames:  # which stack some parts, or name them anew
        names = {entry.name for entry in read_header(tmp_path / SINGLE_FILE)}
        assert set(expected_tensor_names(model)) == names


@pytest.mark.parametrize("rows", [127, 160])
def test_a_stack_of_other_rows_is_refused(tmp_path: Path, rows: int):
    model = TinyModel(family="phi3", num_layers=1)
    weights = random_weights(model)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    weights[name] = np.resize(weights[name], (rows, model.hidden_size))
    write_checkpoint(tmp_path, model, weights)
    with pytest.raises(
        WeightsError, match=rf"qkv_proj.*shape \[{rows}, 64\], expected 128 rows, 64"
    ):
        read_model_folder(tmp_path)


def test_shards_are_read(sharded: Path):
    entries = find_weights(sharded, read_checkpoint_config(sharded / "config.json")).entries
    assert len(entries) == len(expected_tensor_names(model_of(sharded)))
    assert len({entry.path for entry in entries}) == 2


def test_linked_files_are_fine(sharded: Path, tmp_path: Path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    assert len({entry.path for entry in read_model_folder(sharded).weights}) == 2


@pytest.mark.parametrize(
    "shard",
    ["../evil.safetensors", "/etc/passwd", "a\0.safetensors", "x" * 10_000 + ".safetensors",
     "sub/model.safetensors", "model.bin", ".safetensors", "", 7, None],
    ids=range(10),
)  # fmt: skip
def test_shard_names_that_leave_the_folder_are_refused_unopened(sharded: Path, shard: Any):
    path = sharded / INDEX_FILE
    weight_map = json.loads(path.read_text())["weight_map"] | {"model.norm.weight": shard}
    update_json(path, weight_map=weight_map)
    with pytest.raises(WeightsError, match="expected a plain"):
        read_model_folder(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map_is_refused(sharded: Path, weight_map: Any):
    update_json(sharded / INDEX_FILE, weight_map=weight_map)
    with pytest.raises(WeightsError, match="weight_map: got"):
        read_model_folder(sharded)


def test_a_missing_shard_is_named(sharded: Path):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="not there: 'model-00002-of-00002.safetensors'"):
        read_model_folder(sharded)


def test_a_shard_the_index_does_not_name_is_refused(sharded: Path):
    write_file(sharded / "model-00003-of-00003.safetensors", {}, 0)
    with pytest.raises(WeightsError, match="does not name the shards 'model-00003"):
        read_model_folder(sharded)


def test_a_tensor_in_the_wrong_shard_is_named(sharded: Path):
    path = sharded / INDEX_FILE
    weight_map = json.loads(path.read_text())["weight_map"]
    wrong = [s for s in set(weight_map.values()) if s != weight_map["model.norm.weight"]][0]
    change_index(sharded, **{"model.norm.weight": wrong})
    with pytest.raises(WeightsError, match="'model.norm.weight' is in .*, but the index says"):
        read_model_folder(sharded)


def test_a_tensor_in_two_shards_is_named(sharded: Path):
    for number in (1, 2):
        path = sharded / f"model-0000{number}-of-00002.safetensors"
        tensors = safetensors.numpy.load_file(path) | {"model.norm.weight": np.ones(64, "f4")}
        safetensors.numpy.save_file(tensors, path)
    with pytest.raises(WeightsError, match="'model.norm.weight' is in two files"):
        read_model_folder(sharded)


def test_an_index_that_promises_too_much_or_too_little_is_refused(sharded: Path):
    change_index(sharded, ghost="model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match="in no file: 'ghost'"):
        read_model_folder(sharded)
    change_index(sharded, ghost=None, **{"model.norm.weight": None})
    with pytest.raises(WeightsError, match="does not name the tensors 'model.norm.weight'"):
        read_model_folder(sharded)


def test_pickled_weights_are_refused_with_the_way_out(folder: Path):
    (folder / SINGLE_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin.*save_pretrained"):
        read_model_folder(folder)


def test_a_folder_without_weights_says_what_it_looked_for(folder: Path):
    (folder / SINGLE_FILE).unlink()
    with pytest.raises(WeightsError, match="expected model.safetensors or model.safetensors.index"):
        read_model_folder(folder)


def test_shards_without_an_index_are_called_so(sharded: Path):
    (sharded / INDEX_FILE).unlink()
    (sharded / "training_args.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(WeightsError, match=r"found 'model-00001.*without an index; download the"):
        read_model_folder(sharded)


def write_changed(folder: Path, **tensors: np.ndarray | None) -> None:
    weights = random_weights(TINY) | tensors
    kept = {name: value for name, value in weights.items() if value is not None}
    safetensors.numpy.save_file(kept, folder / SINGLE_FILE)


def test_missing_tensors_are_listed(folder: Path):
    write_changed(folder, **{"model.norm.weight": None})
    with pytest.raises(WeightsError, match="missing: 'model.norm.weight'"):
        read_model_folder(folder)
    write_changed(folder, **{"lm_head.weight": None})
    with pytest.raises(WeightsError, match="tie_word_embeddings"):
        read_model_folder(folder)


@pytest.mark.parametrize("dtype", ["int8", "float64"])
def test_weights_of_another_type_are_named(folder: Path, dtype: str):
    write_changed(folder, **{"model.norm.weight": np.ones(64, dtype)})
    with pytest.raises(WeightsError, match="'model.norm.weight': dtype (I8|F64), expected F32"):
        read_model_folder(folder)
