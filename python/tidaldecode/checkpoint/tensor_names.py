"""Which stored tensors are the model's: names, prefixes, a second output matrix, what is left over.

Called by weight_files.py with all tensors of a folder. What the model does not need may be
anything and is noted; what would change what a layer computes is refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tidaldecode.checkpoint.cache_scales import is_cache_scale
from tidaldecode.checkpoint.families import FAMILIES, Family
from tidaldecode.checkpoint.fused_experts import split_experts
from tidaldecode.checkpoint.json_file import open_regular_file, read_exactly
from tidaldecode.checkpoint.model_config import CheckpointConfig, ModelConfig
from tidaldecode.checkpoint.quant_scheme import OTHER_CHECKPOINT, Quantization
from tidaldecode.checkpoint.quantized_tensors import (
    QuantizedTensor,
    Stored,
    StoredParts,
    is_all_zero,
    join_parts,
    resolve,
)
from tidaldecode.checkpoint.safetensors_header import TensorEntry
from tidaldecode.checkpoint.stacked_rows import split_rows, take_part
from tidaldecode.errors import WeightsError, show

_PREFIX = "model."
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
# A tensor of every model, by which a prefix is found.
_ANCHOR = "layers.0.post_attention_layernorm.weight"

_MLP_PARTS = ("gate_proj", "up_proj", "down_proj")
_CORRECTION = "e_score_correction_bias"
_EXPERT = re.compile(r"\.(\d+)\.")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_OWN_MODULE = re.compile(r"(model\.embed_tokens|model\.norm|lm_head)\.")
# Tables, masks and cache scales that other programs store inside of layers; they follow from the
# config or belong to another way of computing.
_CACHE_SCALE = re.compile(
    r".*\.self_attn\.((attn\.)?([kqv]|kv)_(scale|zero_point)|[kv]_proj\.([kv]_scale|output_scale))"
)
_BUFFER = re.compile(
    r"(.*\.)?rotary_emb\..*|.*\.(masked_bias|attn_bias|position_ids)"
    rf"|.*\.self_attn\.bias|{_CACHE_SCALE.pattern}"
)
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save)(\.|$)")
# Parts of quantised weights of other kinds than quantized_tensors.py knows.
_QUANTISED = re.compile(
    r"\.((weight|input)_\w*(scale|zero_point)\w*|SCB|weight\.(absmax|quant_\w+|nested_\w+)\S*)$"
)
_MAX_NAMES_SHOWN = 5
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class ModelTensors:
    """The tensors of a model, under the engine's names."""

    entries: list[TensorEntry | QuantizedTensor]  # in file order
    model: ModelConfig  # untied where the checkpoint holds an output matrix of its own
    notes: tuple[str, ...]  # for the user: what was not taken as it stands
    cache_scales: tuple[TensorEntry, ...] = ()  # cache_scales.py


def expected_tensor_names(model: ModelConfig) -> list[str]:
    """The names of the tensors a model needs, as Hugging Face spells them."""
    names = [_EMBEDDING]
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        if model.input_norms:
            names.append(f"{prefix}.input_layernorm.weight")
            names.append(f"{prefix}.post_attention_layernorm.weight")
        for part in ("q_proj", "k_proj", "v_proj"):
            names.append(f"{prefix}.self_attn.{part}.weight")
            if model.qkv_bias:
                names.append(f"{prefix}.self_attn.{part}.bias")
        names.append(f"{prefix}.self_attn.o_proj.weight")
        if model.o_bias:
            names.append(f"{prefix}.self_attn.o_proj.bias")
        if model.qk_norm:
            names += [f"{prefix}.self_attn.q_norm.weight", f"{prefix}.self_attn.k_norm.weight"]
        if model.attention_sinks:
            names.append(f"{prefix}.self_attn.sinks")
        if model.branch_norms:
            names.append(f"{prefix}.post_self_attn_layernorm.weight")
            names.append(f"{prefix}.post_mlp_layernorm.weight")
        if model.layers and model.layers[layer].has_experts:
            experts = [f"experts.{expert}." for expert in range(model.num_experts)]
            if model.shared_expert_size:
                experts.append("shared_experts.")
            modules = ["gate", *(expert + part for expert in experts for part in _MLP_PARTS)]
            if model.router_correction:
                names.append(f"{prefix}.mlp.gate.{_CORRECTION}")
            if model.shared_expert_gate:
                names.append(f"{prefix}.mlp.shared_expert_gate.weight")
        else:
            modules = list(_MLP_PARTS)
        for module in modules:
            names.append(f"{prefix}.mlp.{module}.weight")
            if model.mlp_bias:
                names.append(f"{prefix}.mlp.{module}.bias")
    names.append("model.norm.weight")
    if not model.tie_word_embeddings:
        names.append(_HEAD)
    return names


def select_tensors(
    entries: list[TensorEntry], checkpoint: CheckpointConfig, folder: Path
) -> ModelTensors:
    """Picks the tensors of the model out of all that are stored.

    Args:
        entries: of all files, in file order.
        checkpoint: as config.json says.
        folder: for messages.

    Raises: WeightsError for tensors that are missing, or that would change what a layer computes.
    """
    model, quantization = checkpoint.model, checkpoint.quantization
    stored = join_parts(entries)
    family = FAMILIES[checkpoint.family]
    prefix = _find_prefix({entry.name for entry in stored}, model, folder)
    found = _canonical_names(stored, prefix)
    if family.experts is not None:
        found = split_experts(found, model, are_transposed=family.experts.are_transposed)
    found = _in_engine_parts(found, family, model)
    notes: list[str] = []
    if checkpoint.ties_without_head and _HEAD not in found:
        model = replace(model, tie_word_embeddings=True)
    if model.tie_word_embeddings:
        model = _settle_head(found, model, folder, notes)
    needed = set(expected_tensor_names(model))
    left_over = {name: entry for name, entry in found.items() if name not in needed}
    if quantization is not None and quantization.method == "gptq":
        left_over = {name: e for name, e in left_over.items() if not _is_idle_bias(name, e)}
    _refuse_meaningful(left_over, model, folder)
    missing = needed.difference(found)
    if missing:
        hint = "; does config.json lack tie_word_embeddings: true?" if missing == {_HEAD} else ""
        raise WeightsError(f"{folder}: tensors are missing: {list_names(missing)}{hint}")
    notes += _notes_on(left_over, model, folder)
    selected = [
        _read_as(entry, name, quantization) for name, entry in found.items() if name in needed
    ]
    scales = tuple(
        replace(entry, name=name)
        for name, entry in left_over.items()
        if is_cache_scale(name) and isinstance(entry, TensorEntry)
    )
    return ModelTensors(entries=selected, model=model, notes=tuple(notes), cache_scales=scales)


def _read_as(
    stored: Stored, name: str, quantization: Quantization | None
) -> TensorEntry | QuantizedTensor:
    """What a stored tensor is under the engine's name, or the rows of it that are meant."""
    if isinstance(stored, TensorEntry):
        return resolve(replace(stored, name=name, stored_name=stored.name), quantization)
    found = resolve(replace(stored, name=name), quantization)
    return found if stored.stack_part is None else take_part(found, stored.stack_part)


def _in_engine_parts(
    found: Mapping[str, Stored], family: Family, model: ModelConfig
) -> dict[str, Stored]:
    """The same with the engine's names of a layer's parts, those that are stacked one by one."""
    rows = {
        "self_attn.q_proj": model.num_q_heads * model.head_dim,
        "self_attn.k_proj": model.num_kv_heads * model.head_dim,
        "self_attn.v_proj": model.num_kv_heads * model.head_dim,
        "mlp.gate_proj": model.intermediate_size,
        "mlp.up_proj": model.intermediate_size,
    }
    result: dict[str, Stored] = {}
    for name, entry in found.items():
        layer = _LAYER.match(name)
        part, dot, kind = name[layer.end() :].rpartition(".") if layer else ("", "", "")
        expert = _EXPERT.search(part)
        pattern = _EXPERT.sub(".*.", part, count=1)
        if layer and pattern in family.renamed:
            own = family.renamed[pattern].replace("*", expert[1] if expert else "")
            name = f"{layer[0]}{own}{dot}{kind}"
        if kind == _CORRECTION and isinstance(entry, TensorEntry) and entry.shape[:-1] == (1,):
            entry = replace(entry, shape=entry.shape[1:])  # ernie4_5_moe's, of one group
        if layer is None or part not in family.stacked:
            result[name] = entry
            continue
        parts = family.stacked[part]
        pieces = split_rows(entry, [rows[each] for each in parts])
        for each, piece in zip(parts, pieces, strict=True):
            result[f"{layer[0]}{each}{dot}{kind}"] = piece
    return result


def _is_idle_bias(name: str, entry: Stored) -> bool:
    """Whether a tensor is the bias of zeros that GPTQ's writers give to layers without one."""
    return name.endswith("_proj.bias") and isinstance(entry, TensorEntry) and is_all_zero(entry)


def _stored_name(entry: Stored) -> str:
    """A name that is in a file."""
    return entry.first.name if isinstance(entry, StoredParts) else entry.name


def list_names(names: Iterable[str]) -> str:
    """The first few of many names, for a message."""
    ordered = sorted(names)
    shown = ", ".join(show(name, 120) for name in ordered[:_MAX_NAMES_SHOWN])
    rest = len(ordered) - _MAX_NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def _canonical_names(entries: list[Stored], prefix: str) -> dict[str, Stored]:
    """{name as if the model's prefix were "model.": entry}; names of other parts as they are.

    A base model is saved without a prefix, wrappers (torch.compile, DataParallel, the language
    part of a larger model) put more in front.
    """
    if prefix == _PREFIX:
        return {entry.name: entry for entry in entries}
    # The output matrix stands beside the model or beside one of what is around it.
    steps = prefix.split(".")[:-1]
    around = ["".join(f"{step}." for step in steps[:depth]) for depth in range(len(steps), -1, -1)]
    names = {entry.name for entry in entries}
    head = next((p + _HEAD for p in around if p + _HEAD in names), None)
    found: dict[str, Stored] = {}
    for entry in entries:
        if entry.name == head:
            name = _HEAD
        elif entry.name.startswith(prefix):
            name = _PREFIX + entry.name[len(prefix) :]
        else:
            name = entry.name
        found[name] = entry
    return found


def _find_prefix(names: set[str], model: ModelConfig, folder: Path) -> str:
    """What stands in front of the names of the model: of several sets the one that is whole."""
    ends = [
        name.removeprefix(_PREFIX)
        for name in expected_tensor_names(model)
        if name not in (_EMBEDDING, _HEAD)  # tied ones may be either
    ]
    found = {name.removesuffix(_ANCHOR) for name in names if name.endswith(_ANCHOR)}
    found = {prefix for prefix in found if not prefix or prefix.endswith(".")} or {_PREFIX}
    whole = {prefix for prefix in found if all(prefix + end in names for end in ends)}
    for prefixes in (whole, found):
        for usual in (_PREFIX, ""):
            if usual in prefixes:
                return usual
        if len(prefixes) == 1:
            return prefixes.pop()
    raise WeightsError(
        f"{folder}: tensors of several models: names begin with {list_names(found)}; expected "
        f"one model, with names that begin with {_PREFIX!r}"
    )


def _settle_head(
    found: dict[str, Stored], model: ModelConfig, folder: Path, notes: list[str]
) -> ModelConfig:
    """Decides about an output matrix that is stored although config.json ties it, as transformers.

    One that equals the embedding is not needed; another one is used; alone it is the embedding too.
    """
    head = found.get(_HEAD)
    if head is None:
        return model
    if _EMBEDDING not in found:
        found[_EMBEDDING] = found.pop(_HEAD)
        return model
    if _same_content(head, found[_EMBEDDING]):
        del found[_HEAD]
        return model
    notes.append(
        f"{folder}: config.json says tie_word_embeddings, but the stored {_stored_name(head)} "
        "differs from the embedding, so it is used"
    )
    return replace(model, tie_word_embeddings=False)


def _same_content(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same bytes; where they differ, that shows in the first chunk."""
    if isinstance(one, StoredParts) or isinstance(other, StoredParts):
        return False
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    descriptors = []
    try:
        for entry in (one, other):
            descriptors.append(open_regular_file(entry.path, WeightsError)[0])
        for start in range(0, one.num_bytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, one.num_bytes - start)
            first = read_exactly(descriptors[0], one.file_offset + start, size)
            if first != read_exactly(descriptors[1], other.file_offset + start, size):
                return False
    except OSError as cause:
        raise WeightsError(f"{one.path}: cannot be read: {cause.strerror}") from cause
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return True


def _refuse_meaningful(left_over: Mapping[str, Stored], model: ModelConfig, folder: Path) -> None:
    """Refuses tensors without a place that say the model is not what config.json describes."""
    refused = [name for name in left_over if _has_meaning(name, model)]
    if not refused:
        return
    if any(_ADAPTER.search(name) for name in refused):
        why = "an adapter that is not merged into the weights; merge it first (merge_and_unload)"
    elif any(_QUANTISED.search(name) for name in refused):
        why = f"parts of quantised weights of a kind that is not supported; {OTHER_CHECKPOINT}"
    elif all(name.endswith("_proj.bias") for name in refused):
        why = "config.json says that there are no such biases (attention_bias, mlp_bias)"
    else:
        why = "config.json and the weights do not belong together"
    names = list_names(_stored_name(left_over[name]) for name in refused)
    raise WeightsError(f"{folder}: tensors the model has no place for: {names}: {why}")


def _has_meaning(name: str, model: ModelConfig) -> bool:
    if _ADAPTER.search(name):
        return True
    if _BUFFER.fullmatch(name):
        return False
    layer = _LAYER.match(name)
    if layer is not None:
        return len(layer[1]) > 9 or int(layer[1]) < model.num_layers
    return _OWN_MODULE.match(name) is not None


def _notes_on(left_over: Mapping[str, Stored], model: ModelConfig, folder: Path) -> Iterable[str]:
    stored = {name: _stored_name(entry) for name, entry in left_over.items()}
    scales = [stored[name] for name in stored if _CACHE_SCALE.fullmatch(name)]
    if scales:
        yield (
            f"{folder}: scales of a quantised KV cache are used only with kv_dtype 'fp8': "
            f"{list_names(scales)}"
        )
    unused = {name: text for name, text in stored.items() if not _BUFFER.fullmatch(name)}
    layers = {name for name in unused if _LAYER.match(name)}
    if layers:
        yield (
            f"{folder}: config.json says {model.num_layers} layers; those behind them are not "
            f"used: {list_names(unused[name] for name in layers)}"
        )
    others = [text for name, text in unused.items() if name not in layers]
    if others:
        yield f"{folder}: tensors that the model does not use: {list_names(others)}"
