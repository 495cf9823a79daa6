"""Experts whose matrices a checkpoint stores in one tensor a layer: the parts of each expert in it.

Called by tensor_names.py. gpt_oss has matrices in 16 or 32 bits transposed, those in MXFP4 as codes
and scales; rows of gate and up take turns. Of other families transformers can store what it has in
memory: the rows of up behind those of gate. What is found is cut, and nothing is read.
Source: transformers 5.24 (models/gpt_oss, integrations/mxfp4.py, conversion_mapping.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.checkpoint.quant_scheme import MXFP4_GROUP
from tidaldecode.checkpoint.quantized_tensors import Stored, StoredParts
from tidaldecode.checkpoint.safetensors_header import TensorEntry
from tidaldecode.errors import WeightsError, show

_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)(_\w+)?")
# The matrices that are in a stored one.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# What the ends of names say: the part of a module that it is for the engine.
_KINDS = {None: "weight", "_bias": "bias", "_blocks": "blocks", "_scales": "scales"}


@dataclass(frozen=True)
class _Layout:
    """How an expert's numbers of one kind lie in a stored tensor."""

    shape: tuple[int, ...]  # of the stored tensor
    width: int  # columns of an expert's matrix, as stored; 0: a vector
    turns: int  # matrices whose rows take turns; 1: each has its own in a row
    strides: tuple[int, ...]  # from one stored row to the next, and one column; () of a vector: 1


def split_experts(
    found: Mapping[str, Stored], model: ModelConfig, *, are_transposed: bool
) -> dict[str, Stored]:
    """The same tensors, those of all experts cut into the matrices and biases of each one.

    Args:
        found: the tensors of a model, whose names begin with "model.".
        model: says how many experts there are, and of which sizes.
        are_transposed: as gpt_oss has them, whose rows take turns; else only numbers are known.

    Raises: WeightsError for a tensor of another shape, and for codes or scales alone.
    """
    result: dict[str, Stored] = {}
    parts: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in found.items():
        fused = _FUSED.fullmatch(name)
        kind = _KINDS.get(fused[3]) if fused else None
        is_known = kind is not None and (are_transposed or kind == "weight")
        if fused is None or kind is None or not is_known or isinstance(entry, StoredParts):
            result[name] = entry
            continue
        _check_pair(name, entry, kind, found)
        for module, piece in _pieces(entry, fused[2], kind, model, are_transposed):
            own = f"{fused[1]}.{module}"
            if kind == "bias":
                result[f"{own}.bias"] = piece
            else:
                parts.setdefault(own, {})[kind] = piece
    for own, pieces in parts.items():
        name = f"{own}.weight"
        module = own[: own.index(".experts.")] + ".experts"
        joined = StoredParts(name=name, module=module, parts=pieces)
        result[name] = pieces["weight"] if len(pieces) == 1 else joined
    return result


def _check_pair(name: str, entry: TensorEntry, kind: str, found: Mapping[str, Stored]) -> None:
    """Refuses codes without scales, and scales without codes."""
    other = {"blocks": "scales", "scales": "blocks"}.get(kind)
    if other is None:
        return
    needed = name.removesuffix(kind) + other
    if needed not in found:
        raise WeightsError(
            f"{entry.path}: tensor {show(entry.name, 120)}: {show(needed, 120)} is missing beside "
            "it, expected of matrices stored as MXFP4; is the download complete?"
        )


def _pieces(
    entry: TensorEntry, fused: str, kind: str, model: ModelConfig, are_transposed: bool
) -> Iterator[tuple[str, TensorEntry]]:
    """What each expert has of a stored tensor, by the module it belongs to ("3.gate_proj")."""
    names = _PARTS[fused]
    hidden, inner = model.hidden_size, model.expert_intermediate_size
    rows, columns = (2 * inner, hidden) if fused == "gate_up_proj" else (hidden, inner)
    count = len(names)
    shape = (model.num_experts, rows, columns)
    layout = (
        _transposed(entry, kind, *shape, turns=count)
        if are_transposed
        else _Layout(shape, columns, 1, (columns, 1))
    )
    if entry.shape != layout.shape:
        raise WeightsError(
            f"{entry.path}: tensor {show(entry.name, 120)}: shape {list(entry.shape)}, expected "
            f"{list(layout.shape)} ({model.num_experts} experts, hidden_size {hidden}, their "
            f"intermediate size {inner}); config.json and the weights do not belong together"
        )
    to_row, to_column = layout.strides
    own = (rows // count, layout.width) if layout.width else (rows // count,)
    to_next = 1 if layout.turns > 1 else own[0]  # rows from a matrix to the next
    is_dense = layout.turns == 1 and to_column == 1
    expert_size = math.prod(layout.shape[1:])
    size = entry.num_bytes // math.prod(layout.shape)  # of an element
    for expert in range(model.num_experts):
        for first, part in enumerate(names):
            begin = expert * expert_size + first * to_next * to_row
            yield (
                f"{expert}.{part}",
                replace(
                    entry,
                    name=f"{entry.name}[{expert}, {first * to_next}::{layout.turns}]",
                    shape=own,
                    file_offset=entry.file_offset + begin * size,
                    num_bytes=math.prod(own) * size,
                    strides=() if is_dense else (layout.turns * to_row, to_column)[: len(own)],
                ),
            )


def _transposed(
    entry: TensorEntry, kind: str, num_experts: int, rows: int, columns: int, *, turns: int
) -> _Layout:
    """As gpt_oss has them."""
    if kind == "weight":
        return _Layout((num_experts, columns, rows), columns, turns, (1, rows))
    if kind == "bias":
        return _Layout((num_experts, rows), 0, turns, (1, 1))
    if columns % MXFP4_GROUP != 0:
        raise WeightsError(
            f"{entry.path}: tensor {show(entry.name, 120)}: matrices of {columns} columns in "
            f"MXFP4, expected a multiple of {MXFP4_GROUP}"
        )
    groups = columns // MXFP4_GROUP
    if kind == "scales":
        return _Layout((num_experts, rows, groups), groups, turns, (groups, 1))
    width = columns // 2
    return _Layout((num_experts, rows, groups, MXFP4_GROUP // 2), width, turns, (width, 1))
