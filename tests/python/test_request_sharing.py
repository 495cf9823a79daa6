"""What requests share and give up to others: prompts read once, pages in host memory, passes."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from test_requests import GREEDY, PAGE_SIZE, PROMPT, TINY, open_decoder
from tidaldecode import Decoder, InvalidArgument, Request
from tiny_models import random_prompt, write_checkpoint, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharing")
    return write_tokenizer(write_checkpoint(folder, TINY), TINY.vocab_size)


def test_several_answers_to_a_prompt_read_it_once(folder: Path):
    prompt = random_prompt(TINY, 200, seed=3)
    options = {"max_new_tokens": 6, "temperature": 1.0, "ignore_eos": True}
    with open_decoder(folder, max_batch_size=8, max_seq_len=256) as decoder:
        first = decoder.submit(prompt, n=4, seed=11, **options)
        assert first.choices[0] is first and len(first.choices) == 4
        answers = [choice.result() for choice in first.choices]
        # Twelve whole pages are found by the three others.
        assert [answer.cached_tokens for answer in answers] == [0, 192, 192, 192]
        assert decoder.stats()["read_tokens"] == 200 + 3 * 8
    with open_decoder(folder, max_seq_len=256, prefix_cache=False) as decoder:
        for i, answer in enumerate(answers):
            alone = decoder.generate(prompt, seed=11 + i, **options)
            assert alone.token_ids == answer.token_ids
        unlike = decoder.submit(prompt, n=3, **options)
        assert len({choice.result().token_ids for choice in unlike.choices}) == 3


def test_cancelling_a_request_ends_all_its_choices(folder: Path):
    with open_decoder(folder, max_seq_len=4096) as decoder:
        first = decoder.submit(PROMPT, n=3, max_new_tokens=4000, **GREEDY)
        first.choices[2].cancel()
        assert first.status != "finished"
        first.cancel()
        assert {choice.result().finish_reason for choice in first.choices} == {"abort"}
        assert decoder.stats()["pages_held"] == 0
    with open_decoder(folder) as decoder:
        for bad in (0, -1, 129, 1.5, True, "2", None):
            with pytest.raises(InvalidArgument, match=r"^n: got .*expected"):
                decoder.submit(PROMPT, n=bad)


def test_a_salt_keeps_prompts_apart(folder: Path):
    prompt = random_prompt(TINY, 50, seed=4)
    with open_decoder(folder) as decoder:

        def found(**options: Any) -> int:
            return decoder.submit(prompt, max_new_tokens=2, **options).result().cached_tokens

        assert [found(cache_salt="one"), found(cache_salt="one")] == [0, 48]
        assert [found(cache_salt=salt) for salt in ("two", "", "", "\u00e9")] == [0, 0, 48, 0]
        for bad in (None, 3, b"x", "\ud800"):
            with pytest.raises(InvalidArgument, match="^cache_salt: "):
                decoder.submit(prompt, cache_salt=bad)


def test_an_event_loop_hears_every_token_of_drafts_that_were_kept(folder: Path):
    """Several tokens of one pass are read one after the other, and nobody waits for a next pass."""
    plan = {"attention": "tidal", "scored_layers": (1, 2), "token_budget": 16, "verify": True}

    async def run(decoder: Decoder) -> list[str]:
        requests = [decoder.submit([5 + i] * 40, max_new_tokens=30, **GREEDY) for i in range(3)]

        async def whole(request: Request) -> str:
            return "".join([piece async for piece in request])

        return await asyncio.wait_for(asyncio.gather(*map(whole, requests)), 60)

    with open_decoder(folder, max_batch_size=4, max_seq_len=128, **plan) as decoder:
        texts = asyncio.run(run(decoder))
        expected = decoder.generate([[5 + i] * 40 for i in range(3)], max_new_tokens=30, **GREEDY)
        assert texts == [result.text for result in expected]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
def test_paused_requests_go_on_from_host_memory(folder: Path, is_sparse: bool, kv_dtype: str):
    plan = {"attention": "tidal", "scored_layers": (1, 2), "token_budget": 32}
    options = {"max_batch_size": 2, "max_seq_len": 1440, "kv_dtype": kv_dtype}
    options |= plan if is_sparse else {}
    # Room for what is reserved at first, 65 pages each, and not for the 89 that both come to.
    limits = {"num_pages": 140, "prefix_cache": False}
    prompts = [[5 + i] * 16 for i in range(2)]

    def run(**more: Any) -> tuple[list[tuple[int, ...]], dict[str, int]]:
        with open_decoder(folder, **options, **more) as decoder:
            requests = [decoder.submit(p, max_new_tokens=1400, **GREEDY) for p in prompts]
            return [request.result().token_ids for request in requests], decoder.stats()

    expected, stats = run()
    assert stats["num_pauses"] == 0
    tokens, stats = run(**limits, host_kv_gib=0.01)
    assert stats["num_pauses"] > 0 and stats["pages_on_host"] == 0
    assert stats["read_tokens"] == 32, "nothing was read again"
    assert tokens == expected
    again, stats = run(**limits)
    assert stats["num_pauses"] > 0 and stats["read_tokens"] > 1000
    assert is_sparse or again == expected


@pytest.mark.parametrize("kind", ["logits", "step_logits", "replay"])
def test_others_decode_while_tokens_are_scored(folder: Path, kind: str):
    ids = random_prompt(TINY, 1000, seed=5)

    def replay(decoder: Decoder) -> Any:
        with decoder.replay([ids[:16]], max_new_tokens=1000) as held:
            return held.step_logits([ids[:900]], token_budget=16, scored_layers=(1, 2))[0]

    scores = {
        "logits": lambda decoder: decoder.logits(ids, last=1000),
        "step_logits": lambda decoder: decoder.step_logits(ids, prefill=16),
        "replay": replay,
    }[kind]
    options = {"max_batch_size": 2, "max_seq_len": 4096, "prefill_chunk": 16}
    with open_decoder(folder, **options) as decoder, ThreadPoolExecutor() as pool:
        expected = scores(decoder)
        request = decoder.submit(PROMPT, max_new_tokens=4000, **GREEDY)
        request.read(5.0)
        scored = pool.submit(scores, decoder)
        num_tokens = len(request.token_ids)
        while not scored.done():
            request.read(0.1)
        assert len(request.token_ids) - num_tokens > 20, "it was held up"
        request.cancel()
        assert (scored.result() == expected).all()


class TestPrefixCache:
    def test_a_known_prompt_is_not_read_again(self, folder: Path):
        prompt = random_prompt(TINY, 50, seed=1)
        with open_decoder(folder) as decoder, open_decoder(folder, prefix_cache=False) as without:
            for new in ([], [3], [4, 5]):
                found = decoder.generate(prompt + new, max_new_tokens=8, **GREEDY)
                read = without.generate(prompt + new, max_new_tokens=8, **GREEDY)
                assert found.token_ids == read.token_ids
                assert (found.cached_tokens, read.cached_tokens) == (48 if new else 0, 0)
            stats = decoder.stats()
            assert stats["cached_tokens"] == 96
            assert stats["pages_cached"] == 3 and stats["pages_held"] == 0
            assert decoder.num_free_pages == 4, "what is known is room as well"

    def test_progress_counts_what_was_found(self, folder: Path):
        prompt = random_prompt(TINY, 50, seed=2)
        with open_decoder(folder) as decoder:
            decoder.generate(prompt, max_new_tokens=2)
            seen: list[tuple[int, int]] = []
            decoder.generate(prompt, max_new_tokens=2, on_prefill=lambda *p: seen.append(p))
            assert seen == [(50, 50)]

    def test_known_pages_leave_when_room_is_needed(self, folder: Path):
        with open_decoder(folder) as decoder:
            for seed in range(4):
                decoder.generate(random_prompt(TINY, 50, seed=seed), max_new_tokens=8, **GREEDY)
            assert decoder.stats()["pages_cached"] == 3

    def test_a_session_shares_what_it_has_read(self, folder: Path):
        prompt = random_prompt(TINY, 50, seed=3)
        with open_decoder(folder, num_pages=12) as decoder:
            session = decoder.session()
            session.append(prompt)
            assert decoder.generate(prompt, max_new_tokens=3).cached_tokens == 48
            # And goes its own way from the midst of a page that others know.
            session.truncate(20)
            other = prompt[:20] + [7] * 9
            want = decoder.generate(other, max_new_tokens=9, **GREEDY).token_ids
            assert session.generate([7] * 9, max_new_tokens=9, **GREEDY).token_ids == want
            assert decoder.generate(prompt, max_new_tokens=3).cached_tokens == 48

    def test_sparse_answers_are_not_shared(self, folder: Path):
        options = {"select_layers": [1], "token_budget": 8, "sparse_min_context": 0}
        prompt = random_prompt(TINY, 30, seed=4)
        with Decoder(
            folder, device="cpu", num_threads=1, max_seq_len=128, page_size=PAGE_SIZE,
            full_layers=1, recent_tokens=2, sink_tokens=1, **options,
        ) as decoder:  # fmt: skip
            answer = decoder.generate(prompt, max_new_tokens=40, **GREEDY).token_ids
            again = decoder.generate(prompt + list(answer), max_new_tokens=3, **GREEDY)
            assert again.cached_tokens == 16, "the prompt's whole pages, and none of the answer's"
