"""Calls of many threads: decoded together, in line for rows and pages, each with its own answer."""

from __future__ import annotations

import _thread
import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tidaldecode import (
    CapacityError,
    ConfigError,
    Decoder,
    InvalidArgument,
    PlanConfig,
    Request,
)
from tiny_models import TinyModel, random_prompt, write_checkpoint, write_tokenizer

TINY = TinyModel(num_layers=3)
PROMPT = [5, 6, 7]
PAGE_SIZE = 16
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requests")
    return write_tokenizer(write_checkpoint(folder, TINY), TINY.vocab_size)


def open_decoder(folder: Path, **changes: Any) -> Decoder:
    """One row of 64 tokens, dense."""
    options = {"max_batch_size": 1, "max_seq_len": 64, "page_size": PAGE_SIZE, "attention": "full"}
    options |= changes
    return Decoder(folder, device="cpu", num_threads=1, **options)


CALLS: dict[str, Callable[[Decoder], Any]] = {
    "generate": lambda decoder: decoder.generate(PROMPT, max_new_tokens=3).text,
    "stream": lambda decoder: "".join(decoder.stream(PROMPT, max_new_tokens=3)),
    "session": lambda decoder: decoder.session().generate(PROMPT, max_new_tokens=3).text,
    "session stream": lambda decoder: "".join(decoder.session().stream(PROMPT, max_new_tokens=3)),
    "batch": lambda decoder: decoder.generate([PROMPT] * 3, max_new_tokens=3)[2].text,
    "append": lambda decoder: decoder.session().append([9] * 20),
}


def test_the_time_in_line_is_told(folder: Path):
    with open_decoder(folder, max_seq_len=4096) as decoder:
        began = time.monotonic()
        first, second = (
            decoder.submit(PROMPT, max_new_tokens=count, **GREEDY) for count in (2000, 1)
        )
        between = time.monotonic() - began
        before, after = first.result().timings, second.result().timings
        assert before.queue_s < before.total_s / 2
        assert before.total_s - between <= after.queue_s <= after.time_to_first_token_s


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("reads", [True, False], ids=["read", "unread"])
def test_a_call_waits_for_the_row_of_a_stream(folder: Path, call, reads: bool):
    with open_decoder(folder) as decoder:
        expected = call(decoder)
        stream = decoder.stream(PROMPT, max_new_tokens=50, ignore_eos=True)
        if reads:
            next(stream)
        assert call(decoder) == expected
        list(stream)
        assert len(stream.result.token_ids) == 50


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_call_waits_for_the_pages_of_another(folder: Path, call):
    with open_decoder(folder, max_batch_size=3, num_pages=4) as decoder:
        stream = decoder.stream(PROMPT, max_new_tokens=60, ignore_eos=True)
        call(decoder)
        list(stream)
        assert len(stream.result.token_ids) == 60


@pytest.mark.parametrize("call", ["generate", "stream", "session"])
def test_pages_that_a_session_holds_do_not_come_back(folder: Path, call: str):
    with open_decoder(folder, max_batch_size=2, num_pages=2) as decoder:
        session = decoder.session()
        session.append([9] * 20)
        with pytest.raises(CapacityError, match="close (other )?sessions"):
            CALLS[call](decoder)
        session.close()
        assert CALLS[call](decoder) is not None


def test_what_can_never_fit_is_refused_at_once(folder: Path):
    with open_decoder(folder) as decoder:
        stream = decoder.stream(PROMPT, max_new_tokens=50, ignore_eos=True)
        for host in (decoder, decoder.session()):
            with pytest.raises(CapacityError, match="max_seq_len 64"):
                host.generate(PROMPT, max_new_tokens=62)
        stream.close()


def busy(decoder: Decoder) -> ThreadPoolExecutor:
    """Holds the only row for a while: its reader is slow, and asked at every token."""
    running = threading.Event()

    def slowly() -> bool:
        running.set()
        time.sleep(0.02)
        return False

    pool = ThreadPoolExecutor(1)
    pool.submit(decoder.generate, PROMPT, max_new_tokens=60, should_stop=slowly, ignore_eos=True)
    assert running.wait(10)
    return pool


def test_should_stop_ends_the_waiting(folder: Path):
    with open_decoder(folder) as decoder, busy(decoder):
        for host in (decoder, decoder.session()):
            result = host.generate(PROMPT, max_new_tokens=3, should_stop=lambda: True)
            assert (result.finish_reason, result.token_ids, result.text) == ("abort", (), "")
            with host.stream(PROMPT, max_new_tokens=3, should_stop=lambda: True) as stream:
                assert list(stream) == []
            assert stream.result is not None and stream.result.finish_reason == "abort"
        several = decoder.generate([PROMPT] * 3, should_stop=lambda: True)
        assert [result.finish_reason for result in several] == ["abort"] * 3
        assert decoder.session().append(PROMPT, should_stop=lambda: True) is False


def test_ctrl_c_ends_a_call(folder: Path):
    with open_decoder(folder, max_seq_len=20_000) as decoder:
        timer = threading.Timer(0.2, _thread.interrupt_main)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            decoder.generate(PROMPT, max_new_tokens=19_000, ignore_eos=True)
        assert decoder.stats()["num_decoding"] == 0
        assert decoder.generate(PROMPT, max_new_tokens=3).finish_reason == "length"


def test_many_users_are_all_served_with_their_own_answers(folder: Path):
    prompts = [random_prompt(TINY, length, seed=length) for length in (3, 20, 33, 9, 40, 1, 15, 27)]
    with open_decoder(folder, max_batch_size=3, num_pages=9, prefix_cache=False) as decoder:
        want = [decoder.generate(prompt, max_new_tokens=20, **GREEDY) for prompt in prompts]

        def ask(index: int) -> bool:
            if index % 3 == 0:
                stream = decoder.stream(prompts[index], max_new_tokens=20, **GREEDY)
                return "".join(stream) == want[index].text
            host = decoder if index % 3 == 1 else decoder.session()
            result = host.generate(prompts[index], max_new_tokens=20, **GREEDY)
            return result.token_ids == want[index].token_ids

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, [i for _ in range(5) for i in range(8)]))
        stats = decoder.stats()
        assert stats["num_decoding"] == stats["num_waiting"] == stats["num_paused"] == 0
        assert stats["pages_free"] == decoder.num_free_pages == 9
        assert stats["generated_tokens"] == 20 * 8 * 6


def test_calls_of_several_threads_share_their_steps(folder: Path):
    with open_decoder(folder, max_batch_size=8, max_seq_len=512) as decoder:
        streams = [decoder.stream(PROMPT, max_new_tokens=400, **GREEDY) for _ in range(8)]
        for stream in streams:
            list(stream)
        stats = decoder.stats()
        assert stats["generated_tokens"] == 8 * 400
        assert stats["num_steps"] < 2 * 400


def test_passes_are_counted_by_kind(folder: Path):
    tidal = {"select_layers": [1], "token_budget": 4, "sparse_min_context": 0, "draft_tokens": 4}
    prompt = PROMPT * 5
    with open_decoder(folder, max_seq_len=128, attention="tidal", **tidal) as decoder:
        began = time.monotonic()
        decoder.generate(prompt, max_new_tokens=30, **GREEDY)
        took, stats = time.monotonic() - began, decoder.stats()
        assert (stats["num_chunks"], stats["num_checks"]) == (1, 0)
        assert (stats["num_steps"], stats["num_dense_steps"]) == (29, 0)
        assert stats["pass_tokens"] == len(prompt) + 29
        assert 0 < stats["chunk_s"] + stats["step_s"] + stats["gap_s"] <= took
        dense = decoder.submit(prompt, attention="full", max_new_tokens=10, **GREEDY).result()
        stats = decoder.stats()
        assert stats["num_dense_steps"] == 9 and 0 < stats["dense_step_s"] < stats["step_s"]
        verified = decoder.submit(prompt, verify=True, max_new_tokens=10, **GREEDY).result()
        stats = decoder.stats()
        assert verified.token_ids == dense.token_ids
        assert 0 < stats["num_checks"] <= verified.verification.dense_passes
        assert 0 < stats["check_s"] < stats["chunk_s"]


class TestSubmit:
    def test_requests_answer_as_calls_do(self, folder: Path):
        prompts = [random_prompt(TINY, length, seed=length) for length in (3, 20, 33, 9, 40)]
        with open_decoder(folder, max_batch_size=3) as decoder:
            want = [decoder.generate(prompt, max_new_tokens=20, **GREEDY) for prompt in prompts]
            requests = [decoder.submit(p, max_new_tokens=20, **GREEDY) for p in prompts]
            assert {request.status for request in requests} <= {
                "waiting", "reading", "decoding", "finished"
            }  # fmt: skip
            for request, right in zip(reversed(requests), reversed(want), strict=True):
                result = request.result()
                assert (result.text, result.token_ids) == (right.text, right.token_ids)
                assert request.status == "finished"
                assert request.result() is result
            assert "".join(decoder.submit(prompts[1], max_new_tokens=20, **GREEDY)) == want[1].text

    def test_it_goes_on_while_nobody_waits(self, folder: Path):
        with open_decoder(folder) as decoder:
            request = decoder.submit(PROMPT, max_new_tokens=9, **GREEDY)
            deadline = time.monotonic() + 20
            while request.status != "finished" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert decoder.stats()["num_finished"] == 1
            assert len(request.result(timeout=0).token_ids) == 9

    def test_timeouts_and_cancelling(self, folder: Path):
        with open_decoder(folder, max_seq_len=20_000) as decoder:
            request = decoder.submit(PROMPT, max_new_tokens=19_000, ignore_eos=True)
            waiting = decoder.submit(PROMPT, max_new_tokens=5)
            with pytest.raises(TimeoutError, match="after 0.05 s"):
                request.result(timeout=0.05)
            while decoder.stats()["generated_tokens"] == 0:
                time.sleep(0.01)
            with pytest.raises(TimeoutError):
                request.result(timeout=0.05)  # hears of one at least
            assert waiting.status == "waiting"
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0)
            request.cancel()
            request.cancel()
            result = request.result()
            assert result.finish_reason == "abort" and 0 < len(result.token_ids) < 19_000
            assert waiting.result().finish_reason in ("length", "stop")
            assert decoder.stats()["pages_held"] == 0

    def test_a_request_may_name_its_plan(self, folder: Path):
        tidal = {"select_layers": [1], "full_layers": 1, "token_budget": 4, "recent_tokens": 1}
        sparse = PlanConfig(**tidal, sparse_min_context=0)
        prompt = random_prompt(TINY, 40, seed=7)
        with open_decoder(folder, max_batch_size=6, max_seq_len=128) as decoder:
            dense = decoder.generate(prompt, max_new_tokens=30, **GREEDY).token_ids
            asked = [
                {}, {"attention": "full"}, {"plan": sparse}, {"plan": sparse, "verify": True},
                {"plan": sparse}, {"attention": "auto"},
            ]  # fmt: skip
            requests = [decoder.submit(prompt, max_new_tokens=30, **GREEDY, **a) for a in asked]
            answers = [request.result().token_ids for request in requests]
            assert answers[0] == answers[1] == answers[3] == answers[5] == dense
            assert requests[3].result().verification.drafted_tokens > 0
            assert answers[2] == answers[4]
        with open_decoder(folder, max_seq_len=128, attention="tidal", **tidal,
                          sparse_min_context=0) as own:  # fmt: skip
            assert own.generate(prompt, max_new_tokens=30, **GREEDY).token_ids == answers[2]
            dense_request = own.submit(prompt, attention="full", max_new_tokens=30, **GREEDY)
            assert dense_request.result().token_ids == dense
        assert answers[2] != dense, "the plan does something"

    def test_priority(self, folder: Path):
        with open_decoder(folder, max_seq_len=20_000) as decoder:
            first = decoder.submit(PROMPT, max_new_tokens=2_000, **GREEDY)
            late = decoder.submit(PROMPT, max_new_tokens=19_000, priority=1, **GREEDY)
            early = decoder.submit(PROMPT, max_new_tokens=3, priority=-1, **GREEDY)
            assert len(early.result().token_ids) == 3
            assert late.status != "finished"
            late.cancel()
            assert len(first.result().token_ids) == 2_000

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"attention": "half"}, ConfigError, "attention: got 'half'"),
            ({"plan": {"select_layers": [1]}}, ConfigError, "plan: got a dict"),
            ({"plan": PlanConfig(select_layers=[9])}, ConfigError, "select_layers"),
            ({"verify": "greedy"}, InvalidArgument, "verify"),
            ({"priority": 0.5}, InvalidArgument, "priority"),
            ({"max_new_tokens": 99}, CapacityError, "max_seq_len 64"),
            ({"nonsense": 1}, TypeError, "nonsense"),
        ],
    )
    def test_bad_options_are_named(self, folder: Path, options, error, match):
        with open_decoder(folder) as decoder:
            with pytest.raises(error, match=match):
                decoder.submit(PROMPT, **options)
            assert decoder.stats()["num_waiting"] == decoder.stats()["num_finished"] == 0

    def test_async(self, folder: Path):
        async def pieces(request: Request) -> str:
            return "".join([piece async for piece in request])

        async def ask(decoder: Decoder) -> None:
            want = decoder.generate(PROMPT, max_new_tokens=30, **GREEDY).text
            requests = [decoder.submit(PROMPT, max_new_tokens=30, **GREEDY) for _ in range(40)]
            texts = await asyncio.gather(*[pieces(request) for request in requests[:20]])
            results = await asyncio.gather(*requests[20:])
            assert texts + [result.text for result in results] == [want] * 40
            # A task that is cancelled cancels its request.
            request = decoder.submit(PROMPT, max_new_tokens=19_000, ignore_eos=True)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(pieces(request), timeout=0.1)
            assert request.status == "finished"
            assert request.result().finish_reason == "abort"

        num_files = len(os.listdir("/proc/self/fd"))
        with open_decoder(folder, max_batch_size=4, max_seq_len=20_000, num_pages=2000) as decoder:
            asyncio.run(ask(decoder))
        assert len(os.listdir("/proc/self/fd")) <= num_files


class TestTimeout:
    """An answer that comes as fast as it is read."""

    class Endless:  # a stream and its generation
        result = error = None

        def __init__(self) -> None:
            self.token_ids: list[int] = []
            self.is_closed = False

        def read(self, timeout: float) -> str:
            time.sleep(0.01)
            self.token_ids.append(5)
            assert len(self.token_ids) < 200
            return "x"

        def status(self, sequence: int) -> str:
            return "decoding"

        def close(self) -> None:
            self.is_closed = True

    def test_is_late_too(self):
        endless = self.Endless()
        with pytest.raises(TimeoutError, match=r"decoding after 0\.02 s"):
            Request(endless, endless).result(timeout=0.02)

    def test_leaves_the_event_loop_to_others(self):
        endless = self.Endless()

        async def wait() -> None:
            await asyncio.wait_for(Request(endless, endless)._finish(), 0.05)

        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(wait())
        assert endless.is_closed


class TestAsync:
    """Waiting in an event loop ends, however and wherever the request does."""

    def run(self, coroutine: Any) -> Any:
        return asyncio.run(asyncio.wait_for(coroutine, 20))

    @pytest.mark.parametrize("has_text", [True, False])
    def test_the_engine_may_be_ahead(self, folder: Path, tmp_path: Path, has_text: bool):
        model = folder if has_text else write_checkpoint(tmp_path, TINY)  # without a tokenizer

        async def late(decoder: Decoder) -> None:
            for prompt, new_tokens in ((PROMPT, 300), (PROMPT, 8), ([5, 6, 7, 8] * 40, 1)):
                request = decoder.submit(prompt, max_new_tokens=new_tokens, **GREEDY)
                if new_tokens < 100:
                    await asyncio.sleep(0.2)
                assert len((await request).token_ids) == new_tokens

        with open_decoder(model, max_seq_len=512, prefill_chunk=16) as decoder:
            self.run(late(decoder))

    def test_another_thread_cancels_or_closes(self, folder: Path):
        async def cancelled(decoder: Decoder) -> None:
            request = decoder.submit(PROMPT, max_new_tokens=19_000, ignore_eos=True)
            threading.Timer(0.02, request.cancel).start()
            assert (await request).finish_reason == "abort"

        async def closed(decoder: Decoder) -> None:
            request = decoder.submit(PROMPT, max_new_tokens=19_000, ignore_eos=True)
            threading.Timer(0.02, decoder.close).start()
            try:
                assert (await request).finish_reason == "abort"
            except InvalidArgument as error:
                assert "closed" in str(error)

        for end in (cancelled, closed) * 3:
            with open_decoder(folder, max_seq_len=20_000) as decoder:
                self.run(end(decoder))

    def test_several_tasks_and_loops_wait_for_one_request(self, folder: Path):
        async def several(decoder: Decoder) -> None:
            request = decoder.submit(PROMPT, max_new_tokens=200, **GREEDY)
            results = await asyncio.gather(*[wait(request) for _ in range(3)])
            assert results[0] is results[1] is results[2]

        async def wait(request: Request) -> Any:
            return await request

        async def first_piece(request: Request) -> str:
            return await anext(aiter(request))

        num_files = len(os.listdir("/proc/self/fd"))
        with open_decoder(folder, max_seq_len=512) as decoder:
            self.run(several(decoder))
            request = decoder.submit(PROMPT, max_new_tokens=200, **GREEDY)
            piece = self.run(first_piece(request))
            assert self.run(wait(request)).text.startswith(piece)
        assert len(os.listdir("/proc/self/fd")) <= num_files

    def test_whoever_comes_first_leaves_the_others_their_wake(self, folder: Path):
        async def both(decoder: Decoder) -> None:
            first = decoder.submit(PROMPT, max_new_tokens=19_000, **GREEDY)
            request = decoder.submit(PROMPT, max_new_tokens=9, **GREEDY)
            waits = asyncio.ensure_future(request._finish())
            await asyncio.sleep(0.01)
            first.cancel()
            while request.status != "finished":
                time.sleep(0.01)  # the loop hears nothing
            async for _ in request:  # all are there: nothing is waited for
                pass
            assert (await waits).finish_reason == "length"

        with open_decoder(folder, max_seq_len=20_000) as decoder:
            self.run(both(decoder))

    def test_leaving_a_loop_over_a_request_leaves_no_file_open(self, folder: Path):
        async def leave(decoder: Decoder) -> None:
            num_files = len(os.listdir("/proc/self/fd"))
            requests = [decoder.submit(PROMPT, max_new_tokens=200, **GREEDY) for _ in range(9)]
            for request in requests:
                async for _ in request:
                    break
            await asyncio.sleep(0.01)
            assert len(os.listdir("/proc/self/fd")) <= num_files
            for request in requests:
                request.cancel()

        with open_decoder(folder, max_seq_len=512) as decoder:
            self.run(leave(decoder))

    def test_an_error_is_raised_to_everybody(self, folder: Path):
        async def wait(request: Request) -> None:
            await request

        with open_decoder(folder, num_pages=2) as decoder:
            session = decoder.session()
            session.append([9] * 20)
            request = decoder.submit(PROMPT, max_new_tokens=3)
            for _ in range(2):
                with pytest.raises(CapacityError, match="close sessions"):
                    self.run(wait(request))
                with pytest.raises(CapacityError, match="close sessions"):
                    request.result()
            assert request.status == "finished"
