"""An fp8 KV cache on CUDA, end to end, against the CPU's: `pytest -m gpu`.

What fp8 rounds differs between devices: a key within rounding of the middle of two codes becomes
one here and the other there. So results are compared by how far both are from an exact cache's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from test_gpu import (
    BASE,
    DENSE,
    TIDAL,
    assert_graphs_equal_eager_bitwise,
    cuda_is_missing,
    greedy,
    open_decoder,
    prompts_for,
)
from tiny_models import random_prompt, random_weights, write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(cuda_is_missing()), reason=cuda_is_missing()),
]

SCORED = {
    "attention": "tidal", "scored_layers": (2,), "full_layers": 1, "token_budget": 48,
    "sparse_min_context": 0,
}  # fmt: skip
SHADOW = SCORED | {"shadow": "int4"}
PLANS = pytest.mark.parametrize(
    "plan", [DENSE, TIDAL, SCORED, SHADOW], ids=["dense", "tidal", "scored", "shadow"]
)
FP8 = {"kv_dtype": "fp8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("fp8"), BASE)


def distance(actual: np.ndarray, exact: np.ndarray) -> float:
    """In the Euclidean norm: what many roundings come to."""
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("scales", [None, (0.02, 0.3)], ids=["no scales", "scales"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(8, 64), (2, 128), (1, 64)])
def test_as_exact_as_on_the_cpu(
    tmp_path: Path, num_kv_heads: int, head_dim: int, dtype: str, scales: tuple[float, ...] | None
):
    model = dataclasses.replace(BASE, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    weights = random_weights(model)
    for layer in range(model.num_layers if scales else 0):
        for half, scale in zip("kv", scales or (), strict=True):
            weights[f"model.layers.{layer}.self_attn.{half}_scale"] = np.float32(scale)
    folder = write_checkpoint(tmp_path, model, weights)
    cuda = open_decoder(folder, "cuda", **FP8)
    cpu = open_decoder(folder, "cpu", **FP8)
    exact = open_decoder(folder, "cpu", kv_dtype="float32")

    def assert_as_exact(run: Any) -> None:
        ours, theirs, expected = run(cuda), run(cpu), run(exact)
        off = distance(theirs, expected)
        assert 1e-3 < off < 0.5, "the CPU"
        assert 0.7 * off < distance(ours, expected) < 1.3 * off + 1e-2
        assert distance(ours, theirs) < off + 1e-2

    for length in (33, 64, 300):  # many queries, whose pages are decoded first
        ids = random_prompt(model, length, seed=length)
        assert_as_exact(lambda decoder, ids=ids: decoder.logits(ids, last=len(ids)))
    ids = random_prompt(model, 260, seed=9)
    assert_as_exact(lambda decoder: decoder.step_logits(ids, prefill=200))


@PLANS
def test_graphs_equal_eager_bitwise(folder: Path, plan: dict[str, Any]):
    assert_graphs_equal_eager_bitwise(folder, **FP8, **plan)


@PLANS
@pytest.mark.parametrize("page_size", [16, 32, 256])
def test_page_size_changes_nothing(folder: Path, plan: dict[str, Any], page_size: int):
    prompts = prompts_for(BASE)
    expected = greedy(open_decoder(folder, "cuda", page_size=64, **FP8, **plan), prompts)
    assert greedy(open_decoder(folder, "cuda", page_size=page_size, **FP8, **plan), prompts) == (
        expected
    )


def test_a_budget_that_covers_the_context_is_dense_bitwise(folder: Path):
    dense = open_decoder(folder, "cuda", **FP8)
    tidal = open_decoder(folder, "cuda", **FP8, **(TIDAL | {"token_budget": 512}))
    ids = random_prompt(BASE, 260)
    assert np.array_equal(tidal.step_logits(ids, prefill=200), dense.step_logits(ids, prefill=200))


def test_verified_decoding_has_the_tokens_of_dense(folder: Path):
    """Checks of few tokens read the codes, those of 41 decoded pages, in a recorded step too."""
    prompts = prompts_for(BASE)
    expected = greedy(open_decoder(folder, "cuda", batch_invariant=True, **FP8), prompts)
    for options in (TIDAL, SHADOW, TIDAL | {"draft_tokens": 3}, TIDAL | {"draft_tokens": 40}):
        verified = open_decoder(folder, "cuda", batch_invariant=True, verify=True, **FP8, **options)
        assert greedy(verified, prompts) == expected


@PLANS
def test_a_nan_ends_its_own_sequence_only(folder: Path, tmp_path: Path, plan: dict[str, Any]):
    prompts = prompts_for(BASE)
    expected = greedy(open_decoder(folder, "cuda", **FP8, **plan), prompts)
    used = {token for row in prompts + expected for token in row}
    bad_id = next(token for token in range(BASE.vocab_size) if token not in used)
    weights = random_weights(BASE)
    weights["model.embed_tokens.weight"][bad_id] = np.nan
    broken = open_decoder(write_checkpoint(tmp_path, BASE, weights), "cuda", **FP8, **plan)
    bad_prompt = prompts[0][:20] + [bad_id] + prompts[0][21:]
    results = broken.generate(
        [bad_prompt, *prompts[1:]], max_new_tokens=64, temperature=0, ignore_eos=True
    )
    assert results[0].finish_reason == "error" and "NaN" in results[0].error
    assert [list(result.token_ids) for result in results[1:]] == expected[1:]
    assert greedy(broken, prompts) == expected  # the pages are clean again


def test_forks_and_found_pages(folder: Path):
    options = {"max_new_tokens": 30, "temperature": 0, "ignore_eos": True}
    prompt = random_prompt(BASE, 157, seed=3)  # ends within a page
    with open_decoder(folder, "cuda", **FP8) as decoder:
        first = decoder.generate(prompt, **options)
        again = decoder.generate(prompt, **options)
        assert again.cached_tokens >= 128
        with decoder.session() as session:
            session.append(prompt[:-1])
            with session.fork() as fork:
                ours = fork.generate([prompt[-1]], **options).token_ids
                assert session.generate([prompt[-1]], **options).token_ids == ours
        assert len(first.token_ids) == len(again.token_ids) == 30


def test_the_cache_takes_half(tmp_path: Path):
    model = dataclasses.replace(BASE, num_layers=2, head_dim=128)
    folder = write_checkpoint(tmp_path, model)
    plans = [
        open_decoder(folder, "cuda", num_pages=16, **options).memory_plan() for options in ({}, FP8)
    ]
    assert plans[0].kv_bytes == 2 * plans[1].kv_bytes
    # A row of 512 tokens in 16 bits, and its page table.
    decoded = 512 * 2 * model.num_kv_heads * 128 * 2
    purpose = "a layer's cache decoded for prompts"
    assert decoded < plans[1].scratch[purpose] < 1.01 * decoded
    assert purpose not in plans[0].scratch
