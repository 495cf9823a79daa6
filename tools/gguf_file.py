"""Reads a GGUF file, llama.cpp's format: metadata, and tensors as float32, some rows at a time.

Used by gguf_folder.py. The format is described in ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gguf_quants import QUANTS, Quant

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# By the number of a metadata value's type.
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
    11: "<i8", 12: "<f8",
}  # fmt: skip


class GgufError(Exception):
    """The file is damaged, or holds what is not known here."""


@dataclass(frozen=True)
class GgufTensor:
    """One weight."""

    name: str
    shape: tuple[int, ...]  # outermost first, as in PyTorch: the reverse of the file's order
    quant: Quant
    data: np.ndarray  # [bytes] uint8, mapped from the file

    @property
    def num_rows(self) -> int:
        """Runs of the innermost dimension."""
        return math.prod(self.shape[:-1])

    def rows(self, start: int, end: int) -> np.ndarray:
        """Values of some rows: [end - start, shape[-1]] float32."""
        row_bytes = len(self.data) // self.num_rows
        data = self.data[start * row_bytes : end * row_bytes]
        return self.quant.dequantize(data).reshape(end - start, self.shape[-1])


class _Header(NamedTuple):
    """What the file says of a tensor in front of all tensors."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # bytes behind the first tensor's place


class GgufFile:
    """Metadata and tensors of a file, which stays mapped and is not read before it is asked for.

    Attributes:
        metadata: values by their key; arrays are lists, 32-bit floats numpy's.
        tensors: in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        """Reads the metadata and finds the tensors.

        Raises: GgufError; OSError.
        """
        self._path = path
        self._data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, "u1")
        self._position = 0
        magic, version = self._take(4).tobytes(), self._number("<u4")
        if magic != _MAGIC or version not in _VERSIONS:
            raise GgufError(
                f"{path}: begins with {magic!r}, version {version}; expected {_MAGIC!r}, version "
                f"{' or '.join(map(str, _VERSIONS))}"
            )
        num_tensors, num_values = self._number("<u8"), self._number("<u8")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            self.metadata[key] = self._value(self._number("<u4"))
        headers = [self._header() for _ in range(num_tensors)]
        alignment = int(self.metadata.get("general.alignment", 32))
        start = -(-self._position // alignment) * alignment
        self.tensors = [self._tensor(start, header) for header in headers]

    def _take(self, num_bytes: int) -> np.ndarray:
        end = self._position + num_bytes
        if end > len(self._data):
            raise GgufError(
                f"{self._path}: ends at byte {len(self._data)}, expected more at {self._position}; "
                "fetch it again"
            )
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def _number(self, dtype: str) -> Any:
        return self._take(np.dtype(dtype).itemsize).view(dtype)[0].item()

    def _string(self) -> str:
        try:
            return self._take(self._number("<u8")).tobytes().decode("utf-8")
        except UnicodeDecodeError as cause:
            raise GgufError(f"{self._path}: text before {self._position}: {cause}") from cause

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._number("<u4"), self._number("<u8"))
        if kind not in _NUMBERS:
            raise GgufError(f"{self._path}: metadata of type {kind}, expected 0 to 12")
        value = self._take(np.dtype(_NUMBERS[kind]).itemsize).view(_NUMBERS[kind])[0]
        return value if kind == 6 else value.item()  # a 32-bit float keeps its short decimal form

    def _array(self, kind: int, length: int) -> list[Any]:
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            return self._take(length * dtype.itemsize).view(dtype).tolist()
        return [self._value(kind) for _ in range(length)]

    def _header(self) -> _Header:
        name = self._string()
        shape = [self._number("<u8") for _ in range(self._number("<u4"))]
        return _Header(name, tuple(reversed(shape)), self._number("<u4"), self._number("<u8"))

    def _tensor(self, start: int, header: _Header) -> GgufTensor:
        where, quant = f"{self._path}: {header.name}", QUANTS.get(header.kind)
        if quant is None:
            known = ", ".join(q.name for q in QUANTS.values())
            raise GgufError(f"{where}: type {header.kind} is not known here, only {known}")
        num_values = math.prod(header.shape)
        if not num_values or header.shape[-1] % quant.num_values:
            raise GgufError(
                f"{where}: shape {list(header.shape)}, expected rows of a multiple of "
                f"{quant.num_values} values ({quant.name})"
            )
        self._position = start + header.offset
        data = self._take(num_values // quant.num_values * quant.block.itemsize)
        return GgufTensor(header.name, header.shape, quant, data)
