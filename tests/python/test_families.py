"""What decoding does beside steps of one plan, for every family: the answers stay the same.

That they are transformers' is in test_parity_transformers.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tidaldecode import Decoder
from tiny_models import FAMILIES, TinyModel, random_prompt, write_checkpoint

GREEDY: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}
PLAN = {"select_layers": (1, 3), "token_budget": 24, "full_layers": 1, "sparse_min_context": 0}


def tiny(family: str) -> TinyModel:
    turns = {"partial_rotary_factor": 0.75} if family == "phi3" else {}
    return TinyModel(family=family, num_layers=5, rope_extra=turns, seed=40)


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
    wide = PLAN | {"token_budget": 256, "recent_tokens": 8}
    dense = open_decoder(folder, attention="full", max_batch_size=4)
    tidal = open_decoder(folder, max_batch_size=4, **wide)
    for a, b in zip(
        dense.generate(prompts(family), **GREEDY),
        tidal.generate(prompts(family), **GREEDY),
        strict=True,
    ):
        assert a.token_ids == b.token_ids and len(set(a.token_ids)) > 4


def test_sparse_steps_choose_and_rows_do_not_depend_on_each_other(family: str, folder: Path):
    decoder = open_decoder(folder, max_batch_size=4, **PLAN)
    together = decoder.generate(prompts(family), **GREEDY)
    for prompt, answer in zip(prompts(family), together, strict=True):
        assert decoder.generate(prompt, **GREEDY).token_ids == answer.token_ids
        if len(prompt) > 24:
            assert decoder.selection()[1].shape[-1] == 24


def test_verified_decoding_is_dense(family: str, folder: Path):
    dense = open_decoder(folder, attention="full").generate(prompts(family)[0], **GREEDY)
    verified = open_decoder(folder, verify=True, **PLAN).generate(prompts(family)[0], **GREEDY)
    assert verified.token_ids == dense.token_ids


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
