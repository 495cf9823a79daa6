"""Decoder.replay(): prompts read once, continued with one plan after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tidaldecode import Decoder
from tidaldecode.errors import CapacityError, InvalidArgument
from tiny_models import TinyModel, random_prompt, write_checkpoint

TINY = TinyModel(num_layers=4)
OPTIONS = {"device": "cpu", "max_seq_len": 96, "max_batch_size": 2, "num_threads": 1}
PLANS = (
    {"select_layers": (2,), "token_budget": 16, "sparse_min_context": 0},
    {"attention": "full"},
    {"select_layers": (1, 3), "token_budget": 8, "granularity": "layer", "recent_tokens": 4},
    {"select_layers": (2,), "token_budget": 16, "sparse_min_context": 0, "correction_interval": 3},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [random_prompt(TINY, length, seed=length) for length in (60, 41)]


def test_a_replay_decodes_as_a_decoder_of_each_plan(folder: Path, prompts):
    with Decoder(folder, attention="full", **OPTIONS) as decoder:
        with decoder.replay(prompts, max_new_tokens=12) as replay:
            for plan in PLANS:
                other = Decoder(folder, **OPTIONS, **plan)
                want = other.generate(prompts, max_new_tokens=12, temperature=0)
                assert replay.greedy(12, **plan) == [list(r.token_ids) for r in want]
                tokens = [random_prompt(TINY, 12, seed=1), []]
                rows = replay.step_logits(tokens, **plan)
                for ids, more, got in zip(prompts, tokens, rows, strict=True):
                    assert np.array_equal(got, other.step_logits([*ids, *more], prefill=len(ids)))


def test_a_replay_frees_its_pages_and_ends_with_its_decoder(folder: Path, prompts):
    decoder = Decoder(folder, attention="full", **OPTIONS)
    pages = decoder.num_free_pages
    seen = []
    replay = decoder.replay(prompts, max_new_tokens=4, on_prefill=lambda *at: seen.append(at))
    assert decoder.num_free_pages < pages and seen[-1] == (101, 101)
    replay.close()
    assert decoder.num_free_pages == pages
    with pytest.raises(InvalidArgument, match="replay: it is closed"):
        replay.greedy(1, attention="full")
    other = decoder.replay(prompts, max_new_tokens=4)
    decoder.close()
    with pytest.raises(InvalidArgument, match="replay: it is closed"):
        other.greedy(1, attention="full")


def test_bad_calls_are_refused(folder: Path, prompts):
    with Decoder(folder, attention="full", **OPTIONS) as decoder:
        with pytest.raises(CapacityError, match="max_seq_len 96"):
            decoder.replay(prompts, max_new_tokens=40)
        with pytest.raises(InvalidArgument, match="max_new_tokens: got 0"):
            decoder.replay(prompts, max_new_tokens=0)
        with decoder.replay(prompts, max_new_tokens=4) as replay:
            with pytest.raises(InvalidArgument, match="continuations: got 1, expected one per"):
                replay.step_logits([[1]], attention="full")
            with pytest.raises(CapacityError, match="have room for"):
                replay.greedy(5, attention="full")
            with pytest.raises(TypeError, match="layers"):
                replay.greedy(1, layers=(2,))
