"""A KV cache of fewer bits: what it takes, and what it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from test_gpu import cuda_is_missing
from tidaldecode import Decoder, demo_model_dir, plan_memory
from tidaldecode.errors import UnsupportedError
from tiny_models import TinyModel, random_prompt, write_checkpoint

TINY = TinyModel(num_layers=4, seed=31)
PROMPT = random_prompt(TINY, 157, seed=3)  # ends within a page
PLAN = {"scored_layers": (1, 2), "token_budget": 24, "sparse_min_context": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), TINY)


def open_decoder(folder: Path, **options: Any) -> Decoder:
    defaults = {"device": "cpu", "dtype": "float32", "max_seq_len": 256, "page_size": 16}
    return Decoder(folder, **defaults | {"num_threads": 1} | options)


def test_auto_is_the_dtype_of_the_weights(folder: Path):
    for dtype in ("float32", "bfloat16", "float16"):
        with open_decoder(folder, dtype=dtype) as decoder:
            assert decoder.config.kv_dtype == dtype


def test_int8_takes_a_byte_a_number_and_a_scale_a_head(folder: Path):
    sizes = {"max_seq_len": 256, "page_size": 16, "num_pages": 16, "device": "cpu"}
    plan = plan_memory(folder, kv_dtype="int8", **sizes)
    with open_decoder(folder, kv_dtype="int8", num_pages=16) as decoder:
        model = decoder.model
        assert plan.kv_bytes == 256 * 2 * model.num_layers * model.num_kv_heads * (
            model.head_dim + 4
        )
        assert decoder.memory_plan().kv_bytes == plan.kv_bytes


@pytest.mark.parametrize("plan", [{"attention": "full"}, PLAN], ids=["dense", "tidal"])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16", "int8"])
def test_a_fork_has_what_the_session_had(folder: Path, kv_dtype: str, plan: dict[str, Any]):
    """The page that both write to is copied, with its scales."""
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 4, "ignore_eos": True}
    with open_decoder(folder, kv_dtype=kv_dtype, max_batch_size=2, **plan) as decoder:
        session = decoder.session()
        session.append(PROMPT)
        with session.fork() as fork:
            first = fork.generate([7], **options)
            assert session.generate([7], **options).token_ids == first.token_ids


def test_int8_is_as_exact_as_its_steps(folder: Path):
    """Off by what half a code of every key and value makes, however the tokens were read."""
    tokens = random_prompt(TINY, 200, seed=9)
    with open_decoder(folder, attention="full") as decoder:
        exact = decoder.step_logits(tokens, prefill=150)
    for options in ({}, {"prefill_chunk": 8}, {"page_size": 7}):
        with open_decoder(folder, kv_dtype="int8", attention="full", **options) as decoder:
            rounded = decoder.step_logits(tokens, prefill=150)
        error = np.abs(rounded - exact).max(-1) / np.abs(exact).max()
        assert 1e-4 < np.median(error) < 2e-2, options


def test_verified_decoding_has_the_tokens_of_dense(folder: Path):
    greedy = {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True}
    with open_decoder(folder, kv_dtype="int8", attention="full") as decoder:
        dense = decoder.generate(PROMPT, **greedy).token_ids
    with open_decoder(folder, kv_dtype="int8", verify=True, **PLAN) as decoder:
        assert decoder.generate(PROMPT, **greedy).token_ids == dense


def test_steps_are_measured(folder: Path):
    with open_decoder(folder, kv_dtype="int8", **PLAN) as decoder:
        assert min(decoder.measure_steps(200, steps=3)) > 0


@pytest.mark.parametrize("attention", ["full", "tidal"])
def test_the_packaged_model_says_the_same(attention: str):
    """On a text of its kind: the mean divergence from a cache of 32 bits, in nats."""
    text = "The clerk wrote the number of every crate in the ledger. " * 40
    options = {"device": "cpu", "max_seq_len": 1024, "num_threads": 2, "attention": attention}
    logprobs = {}
    for kv_dtype in ("float32", "bfloat16", "int8"):
        with Decoder(demo_model_dir(), kv_dtype=kv_dtype, **options) as decoder:
            logits = decoder.step_logits(decoder.encode(text)[:600], prefill=500)
            logits = logits.astype(np.float64)
            logprobs[kv_dtype] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for kv_dtype in ("bfloat16", "int8"):
        exact, rounded = logprobs["float32"], logprobs[kv_dtype]
        assert (np.exp(exact) * (exact - rounded)).sum(-1).mean() <= 0.001, kv_dtype


@pytest.mark.skipif(bool(cuda_is_missing()), reason=cuda_is_missing())
def test_cuda_refuses_int8(folder: Path):
    with pytest.raises(UnsupportedError, match="^kv_dtype: int8 with bfloat16 weights; on CUDA"):
        open_decoder(folder, device="cuda", dtype="bfloat16", kv_dtype="int8")
