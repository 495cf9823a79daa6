"""Tiny model folders for the targets: real tokenizer, chat template, plan and defaults."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import safetensors.numpy  # noqa: E402

from scripted_model import write_byte_tokenizer  # noqa: E402
from tiny_models import TinyModel, config_json, random_weights, write_checkpoint  # noqa: E402

MODEL = TinyModel(
    num_layers=4, hidden_size=32, intermediate_size=48, num_q_heads=4, num_kv_heads=2, head_dim=8
)
VOCAB_SIZE = MODEL.vocab_size
PLAN = {
    "description": "by hand", "select_layers": [1, 3], "full_layers": 1, "token_budget": 16,
    "granularity": "layer", "pooling": "sum", "sink_tokens": 1, "recent_tokens": 4,
    "sparse_min_context": 0,
}  # fmt: skip
GENERATION = {
    "do_sample": True, "temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01,
    "repetition_penalty": 1.1, "max_new_tokens": 8, "eos_token_id": [257], "bos_token_id": 256,
}  # fmt: skip
# What keeps a decoder of a mutated folder small.
SMALL = {"device": "cpu", "max_seq_len": 64, "max_batch_size": 2, "num_threads": 1}


def write_model(folder: Path, *, sharded: bool = False) -> Path:
    """A folder as a user has one, in one weight file or two."""
    write_checkpoint(folder, MODEL)
    if sharded:
        (folder / "model.safetensors").unlink()
        _write_shards(folder)
    write_byte_tokenizer(folder, vocab_size=260)
    (folder / "tidal_plan.json").write_text(json.dumps(PLAN))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def _write_shards(folder: Path) -> None:
    weights = random_weights(MODEL)
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        safetensors.numpy.save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index | {"weight_map": weight_map})
    )


def write_config(folder: Path, **fields: object) -> Path:
    """config.json alone, for what needs no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(MODEL) | fields))
    return folder
