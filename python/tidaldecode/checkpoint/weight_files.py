"""The weight files of a folder: which there are, and where each tensor the model needs lies.

Called by model_folder.py. One model.safetensors, or shards with an index. The tensors' bytes are
read by the C++ engine, which also checks every shape.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tidaldecode.checkpoint.json_file import list_folder, read_json_object
from tidaldecode.checkpoint.model_config import CheckpointConfig
from tidaldecode.checkpoint.quantized_tensors import WEIGHT_DTYPES, QuantizedTensor
from tidaldecode.checkpoint.safetensors_header import (
    MAX_HEADER_BYTES,
    TensorEntry,
    read_header,
)
from tidaldecode.checkpoint.tensor_names import ModelTensors, list_names, select_tensors
from tidaldecode.errors import WeightsError, show

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# A file of the folder itself: no separators, so no way out of it; links are left to the system
# (the Hugging Face cache is made of them).
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,240}\.safetensors")
_USUAL_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth")


def find_weights(folder: Path, checkpoint: CheckpointConfig) -> ModelTensors:
    """Where each tensor of the model lies.

    Args:
        folder: a Hugging Face model folder.
        checkpoint: decides which tensors are needed, how they are named, and what the parts of
            quantised ones mean.

    Raises: WeightsError for files that are missing, damaged or only pickled, an index that does
        not fit them, or tensors that are missing, of another model or of another type.
    """
    # A broken link counts: opening it then says what is wrong.
    if os.path.lexists(folder / SINGLE_FILE):
        entries = read_header(folder / SINGLE_FILE)
    elif os.path.lexists(folder / INDEX_FILE):
        entries = _read_shards(folder)
    else:
        raise WeightsError(_explain_no_weights(folder))
    tensors = select_tensors(entries, checkpoint, folder)
    _check_dtypes(tensors.entries)
    return tensors


def has_weights(folder: Path) -> bool:
    """Whether the weight files of a folder are all there, as far as their names tell."""
    if os.path.exists(folder / SINGLE_FILE):
        return True
    try:
        shards = set(_read_index(folder / INDEX_FILE).values())
    except WeightsError:
        return False
    return all(os.path.exists(folder / shard) for shard in shards)


def _explain_no_weights(folder: Path) -> str:
    names = list_folder(folder, WeightsError)
    expected = f"expected {SINGLE_FILE} or {INDEX_FILE} with its shards"
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return (
            f"{folder}: {expected}, found {list_names(shards)} without an index; download the "
            f"index too, or rename a file that holds all weights to {SINGLE_FILE}"
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{folder}: holds only pickled weights ({list_names(pickles)}), which can run code "
            'and are never read; convert them once: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('OUT')\""
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    found = f"; GGUF files ({list_names(gguf)}) are not read" if gguf else ""
    return f"{folder}: no weights: {expected}{found}"


def _read_index(path: Path) -> dict[str, str]:
    """{tensor name: shard name}, every shard name a plain file name."""
    # An index names what the headers of all shards do.
    index = read_json_object(path, WeightsError, MAX_HEADER_BYTES)
    weight_map: Any = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(
            f"{path}: weight_map: got {show(weight_map)}, "
            "expected an object of tensor and file names"
        )
    for shard in weight_map.values():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise WeightsError(
                f"{path}: weight_map: got the file name {show(shard)}, expected a plain "
                "*.safetensors name in the same folder"
            )
    return weight_map


def _read_shards(folder: Path) -> list[TensorEntry]:
    index_path = folder / INDEX_FILE
    weight_map = _read_index(index_path)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not os.path.lexists(folder / shard)]
    if missing:
        raise WeightsError(
            f"{index_path}: names files that are not there: {list_names(missing)}; "
            "is the download complete?"
        )
    present = {name for name in list_folder(folder, WeightsError) if _USUAL_SHARD.fullmatch(name)}
    extra = present.difference(shards)
    if extra:
        raise WeightsError(
            f"{index_path}: does not name the shards {list_names(extra)} beside it; "
            "remove files of another download"
        )
    found: dict[str, TensorEntry] = {}
    entries = [entry for shard in shards for entry in read_header(folder / shard)]
    for entry in entries:
        if entry.name in found:
            first = found[entry.name].path.name
            raise WeightsError(
                f"{index_path}: tensor {show(entry.name, 120)} is in two files: {first} and "
                f"{entry.path.name}"
            )
        found[entry.name] = entry
    _check_index(index_path, weight_map, found)
    return entries


def _check_index(path: Path, weight_map: dict[str, str], found: dict[str, TensorEntry]) -> None:
    absent = [name for name in weight_map if name not in found]
    if absent:
        raise WeightsError(f"{path}: names tensors that are in no file: {list_names(absent)}")
    unlisted = [name for name in found if name not in weight_map]
    if unlisted:
        raise WeightsError(f"{path}: does not name the tensors {list_names(unlisted)} in its files")
    for name, shard in weight_map.items():
        if found[name].path.name != shard:
            raise WeightsError(
                f"{path}: tensor {show(name, 120)} is in {found[name].path.name}, "
                f"but the index says {shard}"
            )


def _check_dtypes(entries: list[TensorEntry | QuantizedTensor]) -> None:
    for entry in entries:
        if isinstance(entry, TensorEntry) and entry.dtype not in WEIGHT_DTYPES:
            raise WeightsError(
                f"{entry.path}: tensor {show(entry.name, 120)}: dtype {entry.dtype}, "
                f"expected {', '.join(WEIGHT_DTYPES)}"
            )
