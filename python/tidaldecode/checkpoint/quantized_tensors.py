"""Matrices that a checkpoint stores in parts: codes, scales, zero points and what else there is.

Called by weight_files.py and tensor_names.py: join_parts() puts the parts of a matrix under the one
name it would have as it is ("….weight"), resolve() finds out what they mean. Shapes are checked by
the C++ engine (quantized_weight_source.cc), which also decodes them.
"""

from __future__ import annotations

import math
import os
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tidaldecode.checkpoint.json_file import open_regular_file, read_exactly
from tidaldecode.checkpoint.quant_scheme import OTHER_CHECKPOINT, Quantization, QuantScheme
from tidaldecode.checkpoint.safetensors_header import TensorEntry
from tidaldecode.errors import WeightsError, show

# safetensors' names of the types the engine computes with, and the engine's own.
WEIGHT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# How each format calls its parts and stores its codes.
_CODES = {
    "float8": ("weight", "F8_E4M3"),
    "int8": ("weight", "I8"),
    "int4_packed": ("weight_packed", "I32"),
    "int8_packed": ("weight_packed", "I32"),
    "int4_gptq": ("qweight", "I32"),
    "int4_awq": ("qweight", "I32"),
    "mxfp4": ("blocks", "U8"),
}
_SCALES = {
    "float8": ("weight_scale", "weight_scale_inv"),
    "int8": ("weight_scale",),
    "int4_packed": ("weight_scale",),
    "int8_packed": ("weight_scale",),
    "int4_gptq": ("scales",),
    "int4_awq": ("scales",),
    "mxfp4": ("scales",),
}
_ZEROS = {
    "int4_packed": "weight_zero_point",
    "int8_packed": "weight_zero_point",
    "int4_gptq": "qzeros",
    "int4_awq": "qzeros",
}
_OTHERS = {
    "int4_packed": ("weight_shape", "weight_g_idx"),
    "int8_packed": ("weight_shape", "weight_g_idx"),
    "int4_gptq": ("g_idx",),
}
# Fixed scales of a product's inputs, and what is known besides.
_INPUT_SCALES = ("input_scale", "activation_scale")
_ACTIVATION_PARTS = frozenset((*_INPUT_SCALES, "input_zero_point"))
_PARTS = _ACTIVATION_PARTS.union(
    "weight_packed weight_scale weight_scale_inv weight_zero_point weight_shape weight_g_idx "
    "weight_global_scale input_global_scale qweight qzeros scales g_idx".split()
)


@dataclass(frozen=True)
class StackPart:
    """Which one of several matrices that are stored as one (stacked_rows.py)."""

    rows: tuple[int, ...]  # of each of them
    index: int

    @property
    def first(self) -> int:
        """Its first row."""
        return sum(self.rows[: self.index])

    @property
    def count(self) -> int:
        """Its rows."""
        return self.rows[self.index]


@dataclass(frozen=True, kw_only=True)
class StoredParts:
    """The tensors of one module that belong to its weight."""

    name: str  # "….weight"
    module: str  # as the file spells it
    parts: Mapping[str, TensorEntry]  # by the last part of their names; `weight` may be among them
    stack_part: StackPart | None = None  # the rows that are meant; None: all

    @property
    def first(self) -> TensorEntry:
        """The part that names the others in messages."""
        known = [part for part in self.parts if part != "weight"]
        return self.parts[known[0] if known else "weight"]


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A matrix in parts, and what they mean: a description for the engine."""

    name: str  # "….weight"
    shape: tuple[int, int]  # [out, in] of the matrix
    scheme: QuantScheme
    block: tuple[int, int]  # rows and columns that share a scale
    codes: TensorEntry
    scales: TensorEntry
    zeros: TensorEntry | None
    input_scale: TensorEntry | None = None  # of its products' inputs, where that is fixed
    stored_name: str = ""  # as of a TensorEntry

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts, as stored."""
        return sum(part.num_bytes for part in (self.codes, self.scales, self.zeros) if part)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the matrix in 16 bits."""
        return 2 * self.shape[0] * self.shape[1]

    @property
    def path(self) -> Path:
        """The file with the codes."""
        return self.codes.path


Stored = TensorEntry | StoredParts


def codes_per_word(scheme: QuantScheme) -> int:
    """Codes in an I32 of formats that pack them."""
    return 4 if scheme.format == "int8_packed" else 8


def join_parts(entries: list[TensorEntry]) -> list[Stored]:
    """The tensors of all files, those of a quantised matrix together."""
    parts: dict[str, dict[str, TensorEntry]] = {}
    for entry in entries:
        module, _, part = entry.name.rpartition(".")
        if module and part in _PARTS:
            parts.setdefault(module, {})[part] = entry
    joined: list[Stored] = []
    done: set[str] = set()
    for entry in entries:
        module, _, part = entry.name.rpartition(".")
        if module not in parts or (part != "weight" and part not in _PARTS):
            joined.append(entry)
            continue
        if part == "weight":
            parts[module][part] = entry
        if module not in done:
            done.add(module)
            joined.append(StoredParts(name=f"{module}.weight", module=module, parts=parts[module]))
    return joined


def resolve(stored: Stored, quantization: Quantization | None) -> TensorEntry | QuantizedTensor:
    """What a stored tensor of the model is: a plain one, or a matrix in parts and its meaning.

    Args:
        stored: under the name that the engine has for it.
        quantization: as config.json says; None without one.

    Raises: WeightsError for parts that are missing or of another type, that config.json does not
        explain, or that would need what is not supported.
    """
    if isinstance(stored, TensorEntry):
        if stored.dtype in WEIGHT_DTYPES or quantization is None:
            return stored
        module = (stored.stored_name or stored.name).removesuffix(".weight")
        stored = StoredParts(name=stored.name, module=module, parts={"weight": stored})
    weight = stored.parts.get("weight")
    is_alone = _ACTIVATION_PARTS.issuperset(stored.parts.keys() - {"weight"})
    if weight is not None and weight.dtype in WEIGHT_DTYPES and is_alone:
        return weight
    if quantization is None:
        _refuse(
            stored.first,
            "a part of quantised weights, but config.json has no quantization_config; quantised "
            f"weights are not supported without: get the whole folder, {OTHER_CHECKPOINT}",
        )
    module = stored.name.removesuffix(".weight")
    scheme = quantization.scheme_of((stored.module, module))
    if scheme is None:
        _refuse(
            stored.first,
            f"a part of quantised weights, but quantization_config in config.json (method "
            f"{quantization.method}) leaves {show(stored.module, 120)} out; config.json and the "
            "weights do not belong together",
        )
    return _resolve_parts(stored, scheme)


def _resolve_parts(stored: StoredParts, scheme: QuantScheme) -> QuantizedTensor:
    codes_part, codes_dtype = _CODES[scheme.format]
    zeros_part = _ZEROS.get(scheme.format)
    scales_parts = [part for part in _SCALES[scheme.format] if part in stored.parts]
    known = {codes_part, *scales_parts[:1], *_OTHERS.get(scheme.format, ()), *_ACTIVATION_PARTS}
    if scheme.has_zeros and zeros_part is not None:
        known.add(zeros_part)
    strangers = [part for part in stored.parts if part not in known]
    if strangers:
        _refuse(
            stored.parts[strangers[0]],
            f"no part of a matrix stored as {scheme.text}, which quantization_config says; "
            "config.json and the weights do not belong together",
        )
    codes = _take(stored, codes_part, scheme, (codes_dtype,))
    scale_dtypes = ("U8",) if scheme.format == "mxfp4" else WEIGHT_DTYPES
    scales = _take(stored, (scales_parts or _SCALES[scheme.format])[0], scheme, scale_dtypes)
    zeros = None
    if scheme.has_zeros and zeros_part is not None:
        zeros = _take(stored, zeros_part, scheme, ("I32",))
    shape = _read_shape(stored, codes, scheme)
    rows, columns = scheme.block
    if scheme.may_have_one_scale and math.prod(scales.shape) == 1:
        rows = columns = None
    if zeros_part is not None and columns is not None and shape[1] % columns != 0:
        _refuse(codes, f"{shape[1]} columns, expected a multiple of the group_size {columns}")
    resolved = QuantizedTensor(
        name=stored.name,
        shape=shape,
        scheme=scheme,
        block=(rows or max(1, shape[0]), columns or max(1, shape[1])),
        codes=codes,
        scales=scales,
        zeros=zeros,
        input_scale=_input_scale(stored, scheme),
        stored_name=f"{stored.module}.weight",
    )
    _check_order(stored, resolved)
    return resolved


def _input_scale(stored: StoredParts, scheme: QuantScheme) -> TensorEntry | None:
    """The fixed scale of the inputs; None if each token has its own."""
    parts = [part for part in _INPUT_SCALES if part in stored.parts]
    if not parts or not scheme.quantizes_activations or scheme.activations != "static":
        return None
    entry = _take(stored, parts[0], scheme, WEIGHT_DTYPES)
    if math.prod(entry.shape) != 1:
        _refuse(entry, f"shape {show(list(entry.shape))}, expected one number")
    return entry


def _refuse(entry: TensorEntry, problem: str) -> NoReturn:
    raise WeightsError(f"{entry.path}: tensor {show(entry.name, 120)}: {problem}")


def _take(
    stored: StoredParts, part: str, scheme: QuantScheme, dtypes: Mapping[str, str] | tuple[str, ...]
) -> TensorEntry:
    """A part that must be there, of one of the types."""
    entry = stored.parts.get(part)
    if entry is None:
        _refuse(
            stored.first,
            f"{show(f'{stored.module}.{part}', 120)} is missing beside it, expected of a matrix "
            f"stored as {scheme.text}; is the download complete?",
        )
    if entry.dtype not in dtypes:
        _refuse(
            entry,
            f"dtype {entry.dtype}, expected {', '.join(dtypes)} (a part of a matrix stored as "
            f"{scheme.text})",
        )
    return entry


def _read_shape(stored: StoredParts, codes: TensorEntry, scheme: QuantScheme) -> tuple[int, int]:
    """[out, in] of the matrix that is stored."""
    if len(codes.shape) != 2 or 0 in codes.shape:
        _refuse(codes, f"shape {show(list(codes.shape))}, expected two sizes above 0")
    first, second = codes.shape
    if scheme.format == "int4_gptq":
        return second, first * codes_per_word(scheme)
    if scheme.format == "int4_awq":
        return second * codes_per_word(scheme), first
    if scheme.format == "mxfp4":
        return first, second * 2
    if scheme.format not in ("int4_packed", "int8_packed"):
        return first, second
    in_word = codes_per_word(scheme)
    entry = _take(stored, "weight_shape", scheme, ("I64", "I32"))
    if entry.shape != (2,):
        _refuse(entry, f"shape {show(list(entry.shape))}, expected [2]")
    rows, columns = struct.unpack("<2q" if entry.dtype == "I64" else "<2i", read_tensor(entry))
    if rows != first or not 0 < columns <= second * in_word or second != -(-columns // in_word):
        _refuse(
            entry,
            f"holds [{rows}, {columns}], which does not fit {show(codes.name, 120)} of shape "
            f"[{first}, {second}] with {in_word} values in each; is the file damaged?",
        )
    return rows, columns


def _check_order(stored: StoredParts, matrix: QuantizedTensor) -> None:
    """Refuses columns that are stored in another order; a list that says they are not is fine."""
    entry = stored.parts.get("g_idx", stored.parts.get("weight_g_idx"))
    if entry is None:
        if matrix.scheme.has_order:
            _take(stored, "g_idx", matrix.scheme, ("I32",))
        return
    columns, group_size = matrix.shape[1], matrix.block[1]
    if entry.dtype != "I32" or entry.shape != (columns,):
        _refuse(
            entry,
            f"{entry.dtype} {show(list(entry.shape))}, expected I32 [{columns}], the group of each "
            "column",
        )
    if read_tensor(entry) != array("i", (i // group_size for i in range(columns))).tobytes():
        _refuse(
            entry,
            "columns in the order of their activations (desc_act, actorder), which is not "
            f"supported; use a checkpoint without, {OTHER_CHECKPOINT}",
        )


def is_all_zero(entry: TensorEntry) -> bool:
    """Whether a tensor holds nothing but zero bytes."""
    return not read_tensor(entry).strip(b"\0")


def read_tensor(entry: TensorEntry) -> bytes:
    """A small tensor's bytes."""
    descriptor, _ = open_regular_file(entry.path, WeightsError)
    try:
        data = read_exactly(descriptor, entry.file_offset, entry.num_bytes)
    except OSError as cause:
        raise WeightsError(f"{entry.path}: cannot be read: {cause.strerror}") from cause
    finally:
        os.close(descriptor)
    if len(data) != entry.num_bytes:
        _refuse(entry, f"{entry.num_bytes - len(data)} bytes are missing; is the file complete?")
    return data
