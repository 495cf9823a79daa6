"""What decoding does beside steps of one plan, for every family: the answers stay the same.

That they are transformers' is in test_parity_transformers.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tidaldecode import ConfigError, Decoder
from tiny_families import FAMILIES
from tiny_models import TinyModel, random_prompt, random_weights, round_to, write_checkpoint

GREEDY: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
# So many layers that of those without a window one is sparse.
LAYERS = {"olmo3": 12, "gemma3_text": 9}
# Every layer of these attends to a window: there is nothing to choose.
ONLY_WINDOWS = ("ministral",)


def tiny(family: str) -> TinyModel:
    turns = {"partial_rotary_factor": 0.75} if family == "phi3" else {}
    return TinyModel(family=family, num_layers=LAYERS.get(family, 5), rope_extra=turns, seed=40)


def plan(family: str) -> dict[str, Any]:
    """Every second of the layers that see everything selects, but the first of all."""
    full = [layer for layer, kind in enumerate(tiny(family).kinds) if kind == "F" and layer > 0]
    if not full:
        pytest.skip("has no layer that sees everything")
    return {
        "select_layers": tuple(full[::2]), "token_budget": 24, "full_layers": 1,
        "sparse_min_context": 0,
    }  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(family), tiny(family))


def open_decoder(folder: Path, **options: Any) -> Decoder:
    defaults = {"device": "cpu", "max_seq_len": 256, "num_threads": 1, "page_size": 16}
    return Decoder(folder, **defaults | options)


def prompts(family: str) -> list[list[int]]:
    return [random_prompt(tiny(family), length, seed=length) for length in (90, 5, 140, 33)]


def test_a_plan_with_room_for_all_is_dense(family: str, folder: Path):
    wide = plan(family) | {"token_budget": 256, "recent_tokens": 8}
    dense = open_decoder(folder, attention="full", max_batch_size=4)
    tidal = open_decoder(folder, max_batch_size=4, **wide)
    for a, b in zip(
        dense.generate(prompts(family), **GREEDY),
        tidal.generate(prompts(family), **GREEDY),
        strict=True,
    ):
        assert a.token_ids == b.token_ids and len(set(a.token_ids)) > 4


def test_sparse_steps_choose_and_rows_do_not_depend_on_each_other(family: str, folder: Path):
    decoder = open_decoder(folder, max_batch_size=4, **plan(family))
    assert "s" in decoder.plan
    assert decoder.plan.replace("w", "F").count("F") == decoder.plan.count("F") + sum(
        kind == "w" for kind in tiny(family).kinds
    )
    together = decoder.generate(prompts(family), **GREEDY)
    for prompt, answer in zip(prompts(family), together, strict=True):
        assert decoder.generate(prompt, **GREEDY).token_ids == answer.token_ids
        if len(prompt) > 24:
            first = plan(family)["select_layers"][0]
            assert decoder.selection()[first].shape[-1] == 24


def test_verified_decoding_is_dense(family: str, folder: Path):
    dense = open_decoder(folder, attention="full").generate(prompts(family)[0], **GREEDY)
    decoder = open_decoder(folder, verify=True, **plan(family))
    verified = decoder.generate(prompts(family)[0], **GREEDY)
    assert verified.token_ids == dense.token_ids


def test_a_corrected_cache_is_the_one_of_a_prompt(family: str, folder: Path):
    text = random_prompt(tiny(family), 96, seed=7)
    corrected = open_decoder(folder, correction_interval=1, **plan(family))
    sparse = open_decoder(folder, prefix_cache=False, **plan(family))
    steps = corrected.step_logits(text, prefill=90)
    apart = sparse.step_logits(text, prefill=90)
    for index in range(1, len(steps)):
        read = sparse.step_logits(text[: 90 + index], prefill=89 + index)
        np.testing.assert_allclose(steps[index], read[-1], rtol=0, atol=2e-4)
    assert np.abs(apart[2:] - steps[2:]).max() > 1e-3  # what sparse steps write is another


def test_chunks_turns_and_what_is_found_again_change_nothing(family: str, folder: Path):
    first, _, second, _ = prompts(family)
    text = first + second[:60]
    want = open_decoder(folder, attention="full", prefix_cache=False).generate(text, **GREEDY)
    decoder = open_decoder(folder, attention="full", prefill_chunk=16)
    with decoder.session() as session:
        session.append(first)
        assert session.generate(second[:60], **GREEDY).token_ids == want.token_ids
    decoder.generate(first, max_new_tokens=1)
    again = decoder.generate(text, **GREEDY)
    assert again.token_ids == want.token_ids and again.cached_tokens > 0


def test_layers_with_a_window_have_nothing_to_choose(family: str, folder: Path):
    kinds = tiny(family).kinds
    if "w" not in kinds:
        pytest.skip("has no window")
    layer = kinds.index("w", 1)
    with pytest.raises(ConfigError, match=rf"select_layers.*\[{layer}\] attend to a window \(24"):
        open_decoder(folder, select_layers=(layer,), full_layers=1)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_windows_hold_in_every_cache(family: str, folder: Path, kv_dtype: str):
    """The text of a window alone decides, in a cache that rounds too: what is before it is not
    read by any layer of a model of windows only."""
    if family not in ONLY_WINDOWS:
        pytest.skip("has layers that see everything")
    reach = tiny(family).num_layers * 24  # a token further back reaches none of the last one's
    tail = random_prompt(tiny(family), reach, seed=1)
    decoder = open_decoder(folder, attention="full", kv_dtype=kv_dtype, prefix_cache=False)
    logits = [decoder.logits(random_prompt(tiny(family), 60, seed=s) + tail) for s in (2, 3)]
    assert np.array_equal(*logits)


def test_a_router_in_float32_beside_16_bits_chooses_as_it_is_stored(tmp_path: Path):
    """ERNIE 4.5 stores its routers so; rounded they choose other experts for some tokens."""
    model = dataclasses.replace(tiny("ernie4_5_moe"), dtype="bfloat16")
    weights = random_weights(model)
    rng = np.random.default_rng(5)
    for name, value in weights.items():
        # Experts so alike that a rounding decides between them.
        if name.endswith("mlp.gate.weight"):
            weights[name] = value[:1] * (1 + 1e-3 * rng.normal(size=value.shape))
        elif name.endswith("e_score_correction_bias"):
            weights[name] = np.zeros_like(value)
    mixed = write_checkpoint(tmp_path / "mixed", model, weights, float32="mlp.gate.weight")
    whole = write_checkpoint(
        tmp_path / "whole", dataclasses.replace(model, dtype="float32"), weights
    )
    rounded = {
        name: round_to(value, "bfloat16") if name.endswith("mlp.gate.weight") else value
        for name, value in weights.items()
    }
    other = write_checkpoint(tmp_path / "rounded", model, rounded)
    prompt = random_prompt(model, 64)
    logits = []
    for folder in (mixed, whole, other):
        with Decoder(folder, device="cpu", max_seq_len=128, kv_dtype="float32") as decoder:
            logits.append(decoder.logits(prompt))
    near, far = (np.abs(each - logits[1]).max() for each in (logits[0], logits[2]))
    assert near < 1e-4 < 0.1 < far
