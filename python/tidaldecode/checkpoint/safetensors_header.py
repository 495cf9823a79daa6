"""The header of a safetensors file, read and checked before any tensor is touched.

Called by weight_files.py. Layout: 8 bytes little-endian header length, a JSON object
{name: {dtype, shape, data_offsets}}, then the tensors' bytes without holes or overlaps.
Source: https://github.com/huggingface/safetensors (README, "Format"); stricter than its library in
one point, repeated names are refused as its README asks.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tidaldecode.checkpoint.foreign_format import (
    BYTES_LOOKED_AT,
    describe_foreign,
    describe_text,
)
from tidaldecode.checkpoint.json_file import open_regular_file, parse_json_object, read_exactly
from tidaldecode.errors import WeightsError, show

# The library allows 100 MB, which take seconds and gigabytes to parse. A tensor takes about 110
# bytes, so this is room for 150,000 in one file; public models have less than a tenth of that.
MAX_HEADER_BYTES = 16 * 1024 * 1024
_LENGTH_BYTES = 8
_MAX_RANK = 64
_MAX_TENSOR_BYTES = 2**62

# Bits per element of every type the format names.
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


class FileIdentity(NamedTuple):
    """What tells one state of a file from another: compared when the tensors have been read."""

    device: int
    inode: int
    size: int  # bytes
    mtime_ns: int  # of the last change, since 1970


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    name: str
    dtype: str  # as the file spells it: "BF16"
    shape: tuple[int, ...]
    path: Path
    file_offset: int  # of its first byte, from the start of the file
    num_bytes: int
    identity: FileIdentity  # of the file when its header was read
    # Elements from one to the next along each dimension, of a part of a tensor or a transposed one;
    # (): they lie one behind the other.
    strides: tuple[int, ...] = ()
    stored_name: str = ""  # in the file, where `name` is another: the engine's


def read_header(path: Path) -> list[TensorEntry]:
    """All tensors of one safetensors file, in the order of their bytes.

    Raises: WeightsError naming the file and, where there is one, the tensor.
    """
    descriptor, file_bytes = open_regular_file(path, WeightsError)
    try:
        status = os.fstat(descriptor)
        identity = FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        header_bytes = _read_length(descriptor, path, file_bytes)
        data = read_exactly(descriptor, _LENGTH_BYTES, header_bytes)
    except OSError as cause:
        raise WeightsError(f"{path}: cannot be read: {cause.strerror}") from cause
    finally:
        os.close(descriptor)
    header = parse_json_object(data, f"{path}: header", WeightsError)
    _check_metadata(header.pop("__metadata__", {}), path)
    start = _LENGTH_BYTES + header_bytes
    place = _Place(path, start, identity)
    entries = [_read_entry(name, value, place) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.file_offset, entry.num_bytes))
    _check_layout(entries, path, start, file_bytes)
    return entries


def _read_length(descriptor: int, path: Path, file_bytes: int) -> int:
    """Bytes of the header: what the file begins with.

    Raises: WeightsError for a length that cannot be, saying what the file is instead if that shows.
    """
    beginning = read_exactly(descriptor, 0, BYTES_LOOKED_AT)
    if len(beginning) < _LENGTH_BYTES:
        raise WeightsError(
            f"{path}: header too small: {len(beginning)} bytes, expected 8 or more; is the "
            "download complete?"
        )
    header_bytes = int.from_bytes(beginning[:_LENGTH_BYTES], "little")
    if 0 < header_bytes <= min(MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
        return header_bytes
    foreign = describe_foreign(beginning) or describe_text(beginning)
    if foreign:
        raise WeightsError(f"{path}: is {foreign}")
    if header_bytes > MAX_HEADER_BYTES:
        raise WeightsError(
            f"{path}: header length {header_bytes}, expected at most {MAX_HEADER_BYTES}; is it a "
            "safetensors file?"
        )
    if header_bytes == 0:
        raise WeightsError(f"{path}: header length 0: not valid JSON; is the download complete?")
    raise WeightsError(
        f"{path}: header length {header_bytes}, but the file has only {file_bytes} bytes; "
        "is the download complete?"
    )


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict):
        raise WeightsError(f"{path}: __metadata__: got {show(metadata)}, expected an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise WeightsError(
                f"{path}: __metadata__: {show(key)} is {show(value)}, expected a string"
            )


def _is_count(value: Any) -> bool:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and 0 <= value < _MAX_TENSOR_BYTES


@dataclass(frozen=True)
class _Place:
    """Where the tensors of a file lie."""

    path: Path
    start: int  # of the first tensor's bytes
    identity: FileIdentity


def _read_entry(name: str, value: Any, place: _Place) -> TensorEntry:
    where = f"{place.path}: tensor {show(name, 120)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{where}: got {show(value)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise WeightsError(f"{where}: dtype: got {show(dtype)}, which safetensors does not have")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_count, shape)):
        raise WeightsError(f"{where}: shape: got {show(shape)}, expected integers >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise WeightsError(f"{where}: data_offsets: got {show(offsets)}, expected [begin, end]")
    begin, end = offsets
    if begin > end:
        raise WeightsError(f"{where}: data_offsets: begin {begin} lies behind end {end}")
    num_bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if num_bits != 8 * (end - begin):
        raise WeightsError(
            f"{where}: {dtype} {show(shape)} needs {show(num_bits // 8)} bytes, "
            f"but data_offsets hold {end - begin}"
        )
    return TensorEntry(
        name, dtype, tuple(shape), place.path, place.start + begin, end - begin, place.identity
    )


def _check_layout(entries: list[TensorEntry], path: Path, start: int, file_bytes: int) -> None:
    """The tensors must cover the file from the header to its end, each byte once."""
    position = start
    for entry in entries:
        if entry.file_offset != position:
            problem = "overlaps the one before" if entry.file_offset < position else "leaves a hole"
            raise WeightsError(
                f"{path}: tensor {show(entry.name, 120)} {problem}: it begins at byte "
                f"{entry.file_offset}, expected {position}"
            )
        position += entry.num_bytes
    if position != file_bytes:
        problem = "is cut short" if position > file_bytes else "has bytes behind its last tensor"
        raise WeightsError(
            f"{path}: {problem}: {file_bytes} bytes, expected {position}; is the download complete?"
        )
