"""Bytes of keys and values that a step of a plan reads: what plans are compared by.

Used by calibration/search.py, evaluation/ and the benchmarks, so that all count alike.
"""

from __future__ import annotations

import logging

from tidaldecode import _core
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.config import PlanConfig
from tidaldecode.plans import layers_free_to_choose, plan_letters, safe_config

_logger = logging.getLogger(__name__)

VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}  # of a number
_SCALE_BYTES = {"int8": 4}  # of one head of a token, by dtype
_DEFAULTS = _core.PlanConfig()


def kv_bytes_per_step(model: ModelConfig, config: PlanConfig, seq_len: int, kv_dtype: str) -> int:
    """Bytes of keys and values that a step reads for one sequence.

    F and S read all K and V, s those of its set, P all K, or their shadow, and then K and V of its
    set, w those of its window. A set counts as large as the budget allows. With sets per query head
    every head reads its own positions: those that two heads of a KV head share count twice, up to
    the whole cache. A sequence that the budget covers is read whole. Rewriting tokens
    (correction_interval) is not counted.

    Args:
        model: its shape.
        config: a plan; one without layers that choose is dense.
        seq_len: tokens in the cache.
        kv_dtype: of the cache.
    """
    if seq_len <= most_positions(config):
        config = PlanConfig()
    return plan_kv_bytes(model, config, plan_letters(model.windows, config), seq_len, kv_dtype)


def plan_kv_bytes(
    model: ModelConfig, config: PlanConfig, letters: str, seq_len: int, kv_dtype: str
) -> int:
    """What the layers of a plan, a letter each, read together; else as kv_bytes_per_step()."""
    read = layer_kv_bytes(model, config, seq_len, kv_dtype)
    row = row_bytes(model, kv_dtype)
    return sum(
        row * min(seq_len, window) if letter == "w" else read[letter]
        for letter, window in zip(letters, model.windows, strict=True)
    )


def weight_bytes_per_step(folder: ModelFolder) -> int:
    """Bytes of weights, as stored, that a step of one sequence reads.

    All but the embedding table, if the output matrix is another, and of experts those of a token.
    """
    model = folder.model
    share = model.experts_per_token / model.num_experts if model.num_experts else 1.0
    total = 0.0
    for entry in folder.weights:
        if entry.name == "model.embed_tokens.weight" and not model.tie_word_embeddings:
            continue
        total += entry.num_bytes * (share if ".mlp.experts." in entry.name else 1.0)
    return round(total)


def bytes_per_step(folder: ModelFolder, config: PlanConfig, seq_len: int) -> int:
    """Bytes of weights, keys and values that a step of one sequence reads.

    Args:
        folder: its model, weights and cache as stored.
        config: the plan.
        seq_len: tokens in the cache.
    """
    cache = kv_bytes_per_step(folder.model, config, seq_len, folder.dtype)
    return weight_bytes_per_step(folder) + cache


def best_gain(folder: ModelFolder, config: PlanConfig, seq_len: int) -> float:
    """How much faster than a dense step one of a plan can be at best, by the bytes of one sequence.

    Args:
        folder: its model, weights and cache as stored.
        config: the plan.
        seq_len: tokens in the cache.
    """
    return bytes_per_step(folder, PlanConfig(), seq_len) / bytes_per_step(folder, config, seq_len)


def note_on_gain(folder: ModelFolder) -> str | None:
    """What sparse steps can gain where most layers have windows; None for other models."""
    windows, seq_len = folder.model.windows, folder.model.max_position_embeddings
    has_gain = any(windows) and layers_free_to_choose(windows)
    if not has_gain or folder.load_format == "dummy":  # whose weights are not known here
        return None
    gain = best_gain(folder, safe_config(windows), seq_len)
    return (
        f"{windows.count(0)} of {len(windows)} layers see more than a window: with {seq_len:,} "
        f"tokens a sparse step is at best {gain:.1f}x as fast as a dense one (tidaldecode info "
        "shows other lengths)"
    )


def log_gain(folder: ModelFolder) -> None:
    """Says note_on_gain() through the package's log."""
    note = note_on_gain(folder)
    if note is not None:
        _logger.warning("%s", note)


def layer_kv_bytes(
    model: ModelConfig, config: PlanConfig, seq_len: int, kv_dtype: str
) -> dict[str, int]:
    """What a layer of each kind reads of one sequence, as kv_bytes_per_step() counts, by letter.

    Layers with a window are none of these kinds.
    """
    heads = model.num_q_heads // model.num_kv_heads if config.granularity == "head" else 1
    chosen = min(seq_len, most_positions(config) * heads)
    row = row_bytes(model, kv_dtype)
    whole, of_set = seq_len * row, chosen * row
    keys = seq_len * _shadow_row_bytes(model) if config.shadow == "int4" else whole // 2
    return {"F": whole, "S": whole, "s": of_set, "P": keys + of_set}


def row_bytes(model: ModelConfig, kv_dtype: str) -> int:
    """Bytes of K and V of one position in one layer."""
    head = model.head_dim * VALUE_BYTES[kv_dtype] + _SCALE_BYTES.get(kv_dtype, 0)
    return 2 * model.num_kv_heads * head


def _shadow_row_bytes(model: ModelConfig) -> int:
    """Bytes of a position's keys in 4 bits, and their scales, in one layer."""
    return model.num_kv_heads * (model.head_dim // 2 + 2)


def most_positions(config: PlanConfig) -> int:
    """The positions that a set has at most."""
    if config.token_budget is None:
        return _DEFAULTS.token_budget
    return _core.AUTOMATIC_BUDGET if isinstance(config.token_budget, str) else config.token_budget
