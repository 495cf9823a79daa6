"""Shadow keys in sessions, batches, forks and corrections: the sets do not depend on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tidaldecode import ConfigError, Decoder, InvalidArgument, PlanConfig, plan_memory
from tiny_models import TinyModel, random_prompt, write_checkpoint

MODEL = TinyModel(num_layers=6, num_q_heads=8, num_kv_heads=4, seed=21)
PLAN = {
    "scored_layers": (1, 2, 4), "full_layers": 1, "token_budget": 12, "shadow": "int4",
    "sparse_min_context": 0,
}  # fmt: skip
OPTIONS = {"device": "cpu", "dtype": "float32", "num_threads": 1, "max_seq_len": 256}
GREEDY = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
PROMPTS = [random_prompt(MODEL, n) for n in (70, 3, 131, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), MODEL)


def tokens(decoder: Decoder, prompt: list[int], **options) -> list[int]:
    return list(decoder.generate(prompt, **(GREEDY | options)).token_ids)


@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_batch_rows_are_rows_alone(folder: Path, page_size: int):
    decoder = Decoder(folder, **OPTIONS, **PLAN, page_size=page_size, prefill_chunk=32)
    alone = [tokens(decoder, prompt) for prompt in PROMPTS]
    together = decoder.generate(PROMPTS, **GREEDY)
    assert [list(result.token_ids) for result in together] == alone
    assert tokens(Decoder(folder, **OPTIONS, **PLAN), PROMPTS[0]) == alone[0]


def test_a_session_goes_back_forks_and_goes_on(folder: Path):
    decoder = Decoder(folder, **OPTIONS, **PLAN, page_size=8)
    want = tokens(decoder, PROMPTS[0])
    with decoder.session() as session:
        session.append(PROMPTS[0])
        first = list(session.generate(**GREEDY).token_ids)
        assert first == want
        fork = session.fork()
        session.truncate(len(PROMPTS[0]))
        assert list(session.generate(**GREEDY).token_ids) == want
        # The fork goes on behind what it shares, in pages of its own.
        more = list(fork.generate(PROMPTS[1], **GREEDY).token_ids)
        session.truncate(len(PROMPTS[0]))
        session.append(PROMPTS[3])
        other = list(session.generate(**GREEDY).token_ids)
        fork.truncate(len(PROMPTS[0]))
        assert list(fork.generate(**GREEDY).token_ids) == want
        fork.close()
    assert tokens(decoder, PROMPTS[0] + PROMPTS[3]) == other
    with decoder.session() as session:
        session.append(PROMPTS[0])
        session.generate(**GREEDY)
        assert list(session.generate(PROMPTS[1], **GREEDY).token_ids) == more


def test_verified_text_is_that_of_dense_decoding(folder: Path):
    dense = Decoder(folder, **OPTIONS, attention="full")
    verified = Decoder(folder, **OPTIONS, **PLAN, verify=True)
    for prompt in PROMPTS:
        assert tokens(verified, prompt, max_new_tokens=40) == tokens(
            dense, prompt, max_new_tokens=40
        )


def test_a_correction_rewrites_the_shadow_too(folder: Path):
    """One token a correction: every key but the newest is that of dense reading."""
    decoder = Decoder(folder, **OPTIONS, **PLAN, correction_interval=1)
    fresh = Decoder(folder, **OPTIONS, **PLAN)
    found = tokens(decoder, PROMPTS[0])
    for count in range(1, len(found)):
        ids = PROMPTS[0] + found[:count]
        assert fresh.step_logits(ids, prefill=len(ids) - 1)[-1].argmax() == found[count]


def test_replays_run_plans_with_a_shadow(folder: Path):
    """A replay makes a shadow of its own, and another for every plan."""
    dense = Decoder(folder, **OPTIONS, attention="full")
    decoder = Decoder(folder, **OPTIONS, **PLAN)
    with dense.replay(PROMPTS[:2], max_new_tokens=12) as replay:
        for _ in range(2):
            for granularity in ("layer", "kv_head"):
                plan = PLAN | {"granularity": granularity}
                want = Decoder(folder, **OPTIONS, **plan)
                found = replay.greedy(12, **plan)
                assert found[0] == tokens(want, PROMPTS[0])
                assert found[1] == tokens(want, PROMPTS[1])
        assert replay.greedy(12, attention="full")[0] == tokens(dense, PROMPTS[0])
    continuation = tokens(decoder, PROMPTS[0])
    steps = decoder.step_logits(PROMPTS[0] + continuation[:-1], prefill=len(PROMPTS[0]))
    assert [int(row.argmax()) for row in steps] == continuation
    assert np.isfinite(steps).all()


def test_the_plan_of_memory_counts_it(folder: Path):
    limits = {"max_seq_len": 256, "max_batch_size": 1, "num_pages": 4, "page_size": 64}
    options = {**OPTIONS, **limits, **PLAN}
    with_shadow = plan_memory(folder, **options)
    without = plan_memory(folder, **options | {"shadow": "none"})
    key_bytes = MODEL.num_kv_heads * (MODEL.head_dim // 2 + 2)
    assert with_shadow.kv_bytes - without.kv_bytes == 3 * 256 * key_bytes
    assert Decoder(folder, **options).memory_plan().kv_bytes == with_shadow.kv_bytes


def test_what_no_layer_reads_is_refused(folder: Path):
    with pytest.raises(InvalidArgument, match='shadow: got "int4" without scored_layers'):
        Decoder(folder, **OPTIONS, select_layers=(2,), shadow="int4")
    for value in ("int8", "", 4, None.__class__):
        with pytest.raises(ConfigError, match="shadow: got"):
            PlanConfig(scored_layers=(2,), shadow=value)
    assert Decoder(folder, **OPTIONS, select_layers=(2,), shadow="none").plan == "FFSsss"
