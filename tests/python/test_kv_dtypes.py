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
CODES = ("int8", "fp8")
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


@pytest.mark.parametrize(("kv_dtype", "scale_bytes"), [("int8", 4), ("fp8", 0)])
def test_codes_take_a_byte_a_number(folder: Path, kv_dtype: str, scale_bytes: int):
    """And int8 a scale a head."""
    sizes = {"max_seq_len": 256, "page_size": 16, "num_pages": 16, "device": "cpu"}
    plan = plan_memory(folder, kv_dtype=kv_dtype, **sizes)
    with open_decoder(folder, kv_dtype=kv_dtype, num_pages=16) as decoder:
        model = decoder.model
        head_bytes = model.head_dim + scale_bytes
        assert plan.kv_bytes == 256 * 2 * model.num_layers * model.num_kv_heads * head_bytes
        assert decoder.memory_plan().kv_bytes == plan.kv_bytes


@pytest.mark.parametrize("plan", [{"attention": "full"}, PLAN], ids=["dense", "tidal"])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16", "int8", "fp8"])
def test_a_fork_has_what_the_session_had(folder: Path, kv_dtype: str, plan: dict[str, Any]):
    """The page that both write to is copied, with its scales."""
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 4, "ignore_eos": True}
    with open_decoder(folder, kv_dtype=kv_dtype, max_batch_size=2, **plan) as decoder:
        session = decoder.session()
        session.append(PROMPT)
        with session.fork() as fork:
            first = fork.generate([7], **options)
            assert session.generate([7], **options).token_ids == first.token_ids


@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 2e-2), ("fp8", 3e-1)])
def test_codes_are_as_exact_as_their_steps(folder: Path, kv_dtype: str, most: float):
    """Off by what half a code of every key and value makes, however the tokens were read."""
    tokens = random_prompt(TINY, 200, seed=9)
    with open_decoder(folder, attention="full") as decoder:
        exact = decoder.step_logits(tokens, prefill=150)
    for options in ({}, {"prefill_chunk": 8}, {"page_size": 7}):
        with open_decoder(folder, kv_dtype=kv_dtype, attention="full", **options) as decoder:
            rounded = decoder.step_logits(tokens, prefill=150)
        error = np.abs(rounded - exact).max(-1) / np.abs(exact).max()
        assert 1e-4 < np.median(error) < most, options


@pytest.mark.parametrize("kv_dtype", CODES)
def test_verified_decoding_has_the_tokens_of_dense(folder: Path, kv_dtype: str):
    greedy = {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True}
    with open_decoder(folder, kv_dtype=kv_dtype, attention="full") as decoder:
        dense = decoder.generate(PROMPT, **greedy).token_ids
    with open_decoder(folder, kv_dtype=kv_dtype, verify=True, **PLAN) as decoder:
        assert decoder.generate(PROMPT, **greedy).token_ids == dense


@pytest.mark.parametrize("kv_dtype", CODES)
def test_found_pages_are_those_that_were_read(folder: Path, kv_dtype: str):
    options = {"max_new_tokens": 30, "temperature": 0, "ignore_eos": True}
    with open_decoder(folder, kv_dtype=kv_dtype, attention="full") as decoder:
        first = decoder.generate(PROMPT, **options)
        again = decoder.generate(PROMPT, **options)
    assert again.cached_tokens >= 144 and again.token_ids == first.token_ids


@pytest.mark.parametrize("kv_dtype", CODES)
def test_steps_are_measured(folder: Path, kv_dtype: str):
    with open_decoder(folder, kv_dtype=kv_dtype, **PLAN) as decoder:
        assert min(decoder.measure_steps(200, steps=3)) > 0


@pytest.mark.parametrize("attention", ["full", "tidal"])
def test_the_packaged_model_says_the_same(attention: str):
    """On a text of its kind: the mean divergence from a cache of 32 bits, in nats."""
    text = "The clerk wrote the number of every crate in the ledger. " * 40
    options = {"device": "cpu", "max_seq_len": 1024, "num_threads": 2, "attention": attention}
    logprobs = {}
    for kv_dtype in ("float32", "bfloat16", *CODES):
        with Decoder(demo_model_dir(), kv_dtype=kv_dtype, **options) as decoder:
            logits = decoder.step_logits(decoder.encode(text)[:600], prefill=500)
            logits = logits.astype(np.float64)
            logprobs[kv_dtype] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for kv_dtype, most in {"bfloat16": 0.001, "int8": 0.001, "fp8": 0.01}.items():
        exact, rounded = logprobs["float32"], logprobs[kv_dtype]
        assert (np.exp(exact) * (exact - rounded)).sum(-1).mean() <= most, kv_dtype


@pytest.mark.skipif(bool(cuda_is_missing()), reason=cuda_is_missing())
def test_cuda_refuses_int8(folder: Path):
    with pytest.raises(UnsupportedError, match="^kv_dtype: int8 with bfloat16 weights; on CUDA"):
        open_decoder(folder, device="cuda", dtype="bfloat16", kv_dtype="int8")
