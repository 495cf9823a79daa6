"""One of several matrices that a checkpoint stores as one, the first above the second: its rows.

Called by tensor_names.py (phi3's qkv_proj, say). What is found is cut, and nothing is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tidaldecode.checkpoint.quantized_tensors import (
    WEIGHT_DTYPES,
    QuantizedTensor,
    StackPart,
    Stored,
    StoredParts,
    codes_per_word,
)
from tidaldecode.checkpoint.safetensors_header import TensorEntry
from tidaldecode.errors import WeightsError, show

# Formats whose parts have outputs for columns.
_TRANSPOSED = ("int4_gptq", "int4_awq")


def split_rows(stored: Stored, rows: Sequence[int]) -> list[Stored]:
    """A stored tensor as several: numbers at once, parts of a matrix once they are resolved.

    Args:
        rows: of each of them, from the top.

    Raises: WeightsError for numbers of other rows.
    """
    parts = [StackPart(tuple(rows), index) for index in range(len(rows))]
    if isinstance(stored, TensorEntry) and stored.dtype in WEIGHT_DTYPES:
        return [_part_of_numbers(stored, part) for part in parts]
    if isinstance(stored, TensorEntry):
        module = stored.name.rpartition(".")[0]
        stored = StoredParts(name=stored.name, module=module, parts={"weight": stored})
    return [replace(stored, stack_part=part) for part in parts]


def take_part(
    found: TensorEntry | QuantizedTensor, part: StackPart
) -> TensorEntry | QuantizedTensor:
    """The rows that are one of several matrices'.

    Raises: WeightsError for a tensor of other rows, and for codes or scales that belong to two.
    """
    if isinstance(found, TensorEntry):
        return _part_of_numbers(found, part)
    return _part_of_matrix(found, part)


def _check_rows(entry: TensorEntry, shape: Sequence[int], part: StackPart) -> None:
    if not shape or shape[0] != sum(part.rows):
        raise WeightsError(
            f"{entry.path}: tensor {show(entry.name, 120)}: shape {list(shape)}, expected "
            f"{sum(part.rows)} rows, {' + '.join(map(str, part.rows))}; config.json and the "
            "weights do not belong together"
        )


def _part_of_numbers(entry: TensorEntry, part: StackPart) -> TensorEntry:
    _check_rows(entry, entry.shape, part)
    return _cut(entry, 0, part.first, part.count)


def _part_of_matrix(matrix: QuantizedTensor, part: StackPart) -> QuantizedTensor:
    _check_rows(matrix.codes, matrix.shape, part)
    along = 1 if matrix.scheme.format in _TRANSPOSED else 0  # the outputs
    in_word = codes_per_word(matrix.scheme)
    # The other formats have codes of several inputs in a word.
    together = in_word if matrix.scheme.format == "int4_awq" else 1
    codes = _cut_outputs(matrix.codes, along, part, together)
    has_one_scale = matrix.block[0] == matrix.shape[0]
    scales = matrix.scales
    if not has_one_scale:
        scales = _cut_outputs(scales, along, part, matrix.block[0])
    zeros = matrix.zeros and _cut_outputs(matrix.zeros, along, part, in_word)

    def own(entry: TensorEntry) -> TensorEntry:
        return replace(entry, name=f"{entry.name} ({matrix.name})")

    return replace(
        matrix,
        shape=(part.count, matrix.shape[1]),
        block=(part.count if has_one_scale else matrix.block[0], matrix.block[1]),
        codes=own(codes),
        scales=own(scales),
        zeros=zeros and own(zeros),
        input_scale=matrix.input_scale and own(matrix.input_scale),
    )


def _cut_outputs(entry: TensorEntry, along: int, part: StackPart, together: int) -> TensorEntry:
    """The part of a tensor in which so many outputs have one element."""
    is_last = part.first + part.count == sum(part.rows)
    if part.first % together != 0 or (part.count % together != 0 and not is_last):
        raise WeightsError(
            f"{entry.path}: tensor {show(entry.name, 120)}: {together} rows have one element, and "
            f"the matrix stands for several, of {', '.join(map(str, part.rows))} rows; expected "
            f"multiples of {together}"
        )
    return _cut(entry, along, part.first // together, -(-part.count // together))


def _cut(entry: TensorEntry, along: int, first: int, count: int) -> TensorEntry:
    """A tensor's elements from the first-th along a dimension; all of one of another shape, which
    the engine refuses."""
    is_there = along < len(entry.shape) and first + count <= entry.shape[along]
    if not is_there or 0 in entry.shape or (along > 0 and len(entry.shape) != 2):
        return entry
    size = entry.num_bytes // math.prod(entry.shape)
    behind = math.prod(entry.shape[along + 1 :])
    shape = (*entry.shape[:along], count, *entry.shape[along + 1 :])
    lie_together = along == 0 or count == entry.shape[along]
    return replace(
        entry,
        shape=shape,
        file_offset=entry.file_offset + first * behind * size,
        num_bytes=math.prod(shape) * size,
        strides=() if lie_together else (entry.shape[1], 1),
    )
