"""Trained models: the packaged one, and reflm-30m where it is found (--reference-model DIR)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

import tidaldecode
from retrieval_prompts import RetrievalPrompt, manual_text, retrieval_prompt

NEW_TOKENS = 128
REFLM_PLAN = {"select_layers": (2, 4, 9), "token_budget": 64}
DEMO_PLAN = {"select_layers": (2, 7), "token_budget": 64, "sink_tokens": 1}


def open_decoder(folder: Path, **options) -> tidaldecode.Decoder:
    return tidaldecode.Decoder(folder, **({"device": "cpu", "attention": "full"} | options))


def greedy(decoder: tidaldecode.Decoder, prompt: list[int]) -> list[int]:
    result = decoder.generate(prompt, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    return list(result.token_ids)


@lru_cache(maxsize=2)
def transformers_model(folder: Path):
    torch = pytest.importorskip("torch", reason="the reference here is transformers on torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def transformers_tokens(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = transformers_model(folder).generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=new_tokens,
            max_new_tokens=new_tokens, do_sample=False, pad_token_id=2, eos_token_id=None,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def manual_prompt(decoder: tidaldecode.Decoder, num_tokens: int, seed: int) -> list[int]:
    text = "\n\n".join(manual_text(num_tokens, seed))
    ids = decoder.encode(text)
    assert ids[0] == 0, "these models need their begin-of-text token in front"
    return ids[:num_tokens]


def hidden_keys(decoder: tidaldecode.Decoder, num_tokens: int, count: int) -> list[RetrievalPrompt]:
    return [
        retrieval_prompt(decoder.encode, num_tokens, (i + 0.5) / count, seed=i)
        for i in range(count)
    ]


def keys_found(decoder: tidaldecode.Decoder, prompts: list[RetrievalPrompt]) -> int:
    results = decoder.generate([p.text for p in prompts], max_new_tokens=10, temperature=0)
    return sum(p.answer in r.text for p, r in zip(prompts, results, strict=True))


def test_demo_model_equals_transformers(demo_model: Path):
    decoder = open_decoder(demo_model, dtype="float32", max_seq_len=2304)
    for num_tokens in (1, 60, 2000):
        prompt = manual_prompt(decoder, num_tokens, seed=num_tokens)
        assert greedy(decoder, prompt) == transformers_tokens(demo_model, prompt, NEW_TOKENS)


def test_demo_model_finds_hidden_keys_dense_and_tidal(demo_model: Path):
    dense = open_decoder(demo_model, max_seq_len=4352, max_batch_size=4)
    tidal = open_decoder(
        demo_model, attention="tidal", max_seq_len=4352, max_batch_size=4, **DEMO_PLAN
    )
    prompts = hidden_keys(dense, 4096, 6)
    assert keys_found(dense, prompts) == 6
    assert keys_found(tidal, prompts) == 6


def test_demo_model_brings_its_plan(demo_model: Path):
    decoder = tidaldecode.Decoder(demo_model, device="cpu", max_seq_len=512)
    assert decoder.plan == "FFSssssS"
    for name, value in DEMO_PLAN.items():
        assert getattr(decoder.config, name) == value


def test_demo_model_covering_budget_is_dense_bitwise(demo_model: Path):
    dense = open_decoder(demo_model, max_seq_len=1024)
    tidal = open_decoder(
        demo_model, attention="tidal", max_seq_len=1024, select_layers=(2, 7), token_budget=1024
    )
    ids = manual_prompt(dense, 800, seed=5)
    assert np.array_equal(tidal.step_logits(ids, prefill=760), dense.step_logits(ids, prefill=760))


@pytest.mark.parametrize("num_tokens", [100, 500, 1500])
def test_reflm_greedy_equals_transformers(reference_model: Path, num_tokens: int):
    check_reflm_greedy(reference_model, num_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [4000, 8000])
def test_reflm_greedy_equals_transformers_on_long_prompts(reference_model: Path, num_tokens: int):
    check_reflm_greedy(reference_model, num_tokens)


def check_reflm_greedy(folder: Path, num_tokens: int) -> None:
    decoder = open_decoder(
        folder, dtype="float32", max_seq_len=num_tokens + NEW_TOKENS, max_batch_size=1
    )
    prompt = manual_prompt(decoder, num_tokens, seed=num_tokens)
    assert greedy(decoder, prompt) == transformers_tokens(folder, prompt, NEW_TOKENS)


def test_reflm_dtype_auto_is_the_checkpoints(reference_model: Path):
    """bfloat16 weights in place: the same products in float32, so the same tokens."""
    decoder = open_decoder(reference_model, max_seq_len=1000, max_batch_size=1)
    assert decoder.config.dtype == "bfloat16"
    prompt = manual_prompt(decoder, 700, seed=1)
    assert greedy(decoder, prompt) == transformers_tokens(reference_model, prompt, NEW_TOKENS)


def test_reflm_finds_a_hidden_key(reference_model: Path):
    tidal = open_decoder(
        reference_model, attention="tidal", max_seq_len=2304, max_batch_size=1, **REFLM_PLAN
    )
    assert keys_found(tidal, hidden_keys(tidal, 2048, 2)) == 2


@pytest.mark.slow
def test_reflm_verified_equals_dense(reference_model: Path):
    options = {"dtype": "float32", "max_seq_len": 1264, "max_batch_size": 4}
    dense = open_decoder(reference_model, **options)
    verified = open_decoder(
        reference_model, attention="tidal", verify=True, **options, **REFLM_PLAN
    )
    prompts = [manual_prompt(dense, 100 + 55 * i, seed=i) for i in range(20)]
    call = {"max_new_tokens": 64, "temperature": 0, "ignore_eos": True}
    expected, actual = dense.generate(prompts, **call), verified.generate(prompts, **call)
    assert [r.token_ids for r in actual] == [r.token_ids for r in expected]
    drafted = sum(r.verification.drafted_tokens for r in actual)
    accepted = sum(r.verification.accepted_tokens for r in actual)
    assert 0.5 * drafted < accepted < drafted, "drafts agree mostly, but not always"


@pytest.mark.slow
def test_reflm_finds_hidden_keys_dense_and_tidal(reference_model: Path):
    dense = open_decoder(reference_model, max_seq_len=4352, max_batch_size=4)
    tidal = open_decoder(
        reference_model, attention="tidal", max_seq_len=4352, max_batch_size=4, **REFLM_PLAN
    )
    prompts = hidden_keys(dense, 4096, 12)
    assert keys_found(dense, prompts) >= 11
    assert keys_found(tidal, prompts) >= 11
