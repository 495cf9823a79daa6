"""Decoder.logits() and step_logits(): requests beside others, for the logits of given tokens."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tidaldecode import Decoder
from tidaldecode.errors import CapacityError, InvalidArgument
from tiny_models import TinyModel, random_prompt, write_checkpoint

TINY = TinyModel(num_layers=4)
PLAN = {"select_layers": (2,), "token_budget": 16, "sparse_min_context": 0}
OPTIONS = {"device": "cpu", "max_seq_len": 1024, "max_batch_size": 3, "num_threads": 1, **PLAN}
PROMPT = random_prompt(TINY, 300, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture
def decoder(folder: Path):
    with Decoder(folder, **OPTIONS) as made:
        yield made


def test_logits_are_the_same_beside_others(folder: Path, decoder: Decoder):
    with Decoder(folder, **OPTIONS) as alone:
        want = alone.logits(PROMPT, 5), alone.step_logits(PROMPT, 280)
    requests = [
        decoder.submit(random_prompt(TINY, 90, seed=seed), max_new_tokens=150, temperature=0)
        for seed in range(4)
    ]
    for _ in range(3):
        assert np.array_equal(decoder.logits(PROMPT, 5), want[0])
        assert np.array_equal(decoder.step_logits(PROMPT, 280), want[1])
    assert all(len(request.result().token_ids) == 150 for request in requests)


def test_threads_score_at_once(decoder: Decoder):
    want = decoder.step_logits(PROMPT, 250)
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(decoder.step_logits(PROMPT, 250)))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 5 and all(np.array_equal(rows, want) for rows in results)


@pytest.mark.parametrize(
    "call",
    [
        lambda decoder, ids: decoder.step_logits(ids, 1),
        lambda decoder, ids: decoder.replay([ids[:1]], max_new_tokens=1023).greedy(1023),
    ],
)
def test_ctrl_c_ends_it(decoder: Decoder, call):
    decoder.logits([5])  # its thread runs
    free = decoder.num_free_pages
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        while time.monotonic() < begin + 30:
            call(decoder, random_prompt(TINY, 1024, seed=3))
    timer.join()
    assert decoder.num_free_pages == free
    assert decoder.stats()["num_decoding"] == 0
    assert decoder.logits([5, 6], 2).shape[0] == 2


def test_what_is_no_part_of_the_tokens_is_refused_by_its_name(decoder: Decoder):
    for last in (0, 4):
        with pytest.raises(InvalidArgument, match=f"last: got {last}, expected an integer from 1"):
            decoder.logits([5, 6, 7], last)
    with pytest.raises(InvalidArgument, match="prefill: got 4, expected an integer from 1 to 3"):
        decoder.step_logits([5, 6, 7], 4)
    with pytest.raises(InvalidArgument, match="no tokens"):
        decoder.logits([])
    with pytest.raises(
        CapacityError, match="1025 tokens need 1025 positions, have max_seq_len 1024"
    ):
        decoder.logits(random_prompt(TINY, 1025, seed=1))


def test_pages_that_nobody_gives_back(folder: Path):
    with Decoder(folder, **{**OPTIONS, "num_pages": 5}) as decoder, decoder.session() as session:
        session.append(random_prompt(TINY, 200, seed=2))
        with pytest.raises(CapacityError, match="close sessions"):
            decoder.step_logits(PROMPT, 250)
        session.close()
        assert decoder.step_logits(PROMPT, 250).shape[0] == 51
        with pytest.raises(CapacityError, match="need 6 pages of 64 tokens, have 5"):
            decoder.logits(random_prompt(TINY, 321, seed=2))


def test_a_replay_has_one_call_at_a_time(decoder: Decoder):
    with decoder.replay([PROMPT], max_new_tokens=100) as replay:
        want = replay.greedy(100, **PLAN)
        outputs: list[list[list[int]]] = []
        threads = [
            threading.Thread(target=lambda: outputs.append(replay.greedy(100, **PLAN)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outputs == [want] * 3
        assert replay.mean_set_size == 16.0
