"""Rows and pages that calls of several threads share: they wait for each other, never for ever."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tidaldecode import CapacityError, Decoder, room
from tiny_models import TinyModel, write_checkpoint, write_tokenizer

PROMPT = [5, 6, 7]
PAGE_SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = TinyModel(num_layers=2)
    folder = tmp_path_factory.mktemp("room")
    return write_tokenizer(write_checkpoint(folder, model), model.vocab_size)


@pytest.fixture
def decoder(folder: Path) -> Iterator[Decoder]:
    """One row."""
    with Decoder(folder, **options(max_batch_size=1)) as decoder:
        yield decoder


def options(**changes: Any) -> dict[str, Any]:
    return {
        "device": "cpu",
        "attention": "full",
        "max_seq_len": 64,
        "page_size": PAGE_SIZE,
    } | changes


class Reader:
    """Another thread that holds a stream of 20 tokens and reads it slowly."""

    def __init__(self, decoder: Decoder, seconds: float = 0.8, **sampling: Any) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._is_over = threading.Event()
        started: Future[None] = Future()

        def run() -> None:
            with decoder.stream(PROMPT, max_new_tokens=20, ignore_eos=True, **sampling) as stream:
                next(stream)
                started.set_result(None)
                for _ in stream:
                    if self._is_over.wait(seconds / 20):
                        break

        self.done = self._pool.submit(run)
        started.result(10)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.done.result(20)
        self._pool.shutdown()


CALLS: dict[str, Callable[[Decoder], Any]] = {
    "generate": lambda decoder: decoder.generate(PROMPT, max_new_tokens=3),
    "stream": lambda decoder: "".join(decoder.stream(PROMPT, max_new_tokens=3)),
    "session": lambda decoder: decoder.session().generate(PROMPT, max_new_tokens=3).text,
    "session stream": lambda decoder: "".join(decoder.session().stream(PROMPT, max_new_tokens=3)),
    "chunks": lambda decoder: decoder.generate([PROMPT] * 3, max_new_tokens=3),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_call_waits_for_the_row_of_another_thread(decoder: Decoder, call):
    expected = call(decoder)
    with Reader(decoder) as reader:
        assert not reader.done.done()
        result = call(decoder)
    if isinstance(expected, str):
        assert result == expected
    else:
        results, rights = [r if isinstance(r, list) else [r] for r in (result, expected)]
        assert [r.token_ids for r in results] == [r.token_ids for r in rights]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_call_waits_for_the_pages_of_another_thread(folder: Path, call):
    # 3 + 20 tokens take two pages; a call needs one.
    with Decoder(folder, **options(max_batch_size=2, num_pages=2)) as decoder, Reader(decoder):
        call(decoder)


def test_reading_into_a_session_waits_for_pages(folder: Path):
    with Decoder(folder, **options(max_batch_size=2, num_pages=2)) as decoder, Reader(decoder):
        session = decoder.session()
        assert session.append([9] * 20)
        assert len(session) == 20


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_what_the_own_thread_holds_is_not_waited_for(decoder: Decoder, call):
    with decoder.stream(PROMPT, max_new_tokens=20, ignore_eos=True) as stream:
        next(stream)
        started = time.monotonic()
        with pytest.raises(CapacityError, match="need 1 row.*max_batch_size 1"):
            call(decoder)
        assert time.monotonic() - started < 5
        next(stream)
    call(decoder)


def test_a_session_between_its_turns_is_not_waited_for(folder: Path):
    with Decoder(folder, **options(max_batch_size=2, num_pages=2)) as decoder:
        session = decoder.session()
        session.append([9] * 20)
        with pytest.raises(CapacityError, match="pages"):
            decoder.generate(PROMPT, max_new_tokens=3)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_stream_that_nobody_reads_is_given_up(decoder: Decoder, call, monkeypatch):
    monkeypatch.setattr(room, "STALLED_SECONDS", 0.3)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(decoder.stream, PROMPT, max_new_tokens=20).result()
        started = time.monotonic()
        with pytest.raises(CapacityError, match="need 1 row"):
            call(decoder)
        assert time.monotonic() - started < 5
        stream.close()
    call(decoder)


def test_two_threads_that_hold_and_want_do_not_wait_for_ever(folder: Path, monkeypatch):
    monkeypatch.setattr(room, "STALLED_SECONDS", 0.3)
    both_hold = threading.Barrier(2)

    def hold_and_want(decoder: Decoder) -> str:
        with decoder.stream(PROMPT, max_new_tokens=20, ignore_eos=True) as stream:
            next(stream)
            both_hold.wait(10)
            try:
                return decoder.generate(PROMPT, max_new_tokens=3).finish_reason
            except CapacityError:
                return "no room"

    with Decoder(folder, **options(max_batch_size=2)) as decoder, ThreadPoolExecutor(2) as pool:
        outcomes = [pool.submit(hold_and_want, decoder) for _ in range(2)]
        assert "no room" in [outcome.result(20) for outcome in outcomes]
        assert decoder.generate(PROMPT, max_new_tokens=3).finish_reason == "length"


@pytest.mark.parametrize("call", ["generate", "session"])
def test_what_can_never_fit_is_refused_at_once(decoder: Decoder, call: str):
    with Reader(decoder, seconds=10) as reader:
        host = decoder if call == "generate" else decoder.session()
        with pytest.raises(CapacityError):
            host.generate(PROMPT, max_new_tokens=62)
        assert not reader.done.done()


def test_should_stop_ends_the_waiting(decoder: Decoder):
    with Reader(decoder, seconds=10) as reader:
        for host in (decoder, decoder.session()):
            result = host.generate(PROMPT, max_new_tokens=3, should_stop=lambda: True)
            assert (result.finish_reason, result.token_ids, result.text) == ("abort", (), "")
            with host.stream(PROMPT, max_new_tokens=3, should_stop=lambda: True) as stream:
                assert list(stream) == []
            assert stream.result is not None and stream.result.finish_reason == "abort"
        several = decoder.generate([PROMPT] * 3, should_stop=lambda: True)
        assert [result.finish_reason for result in several] == ["abort"] * 3
        assert decoder.session().append(PROMPT, should_stop=lambda: True) is False
        assert not reader.done.done()


def test_ctrl_c_ends_the_waiting(decoder: Decoder):
    with Reader(decoder, seconds=10) as reader:
        threading.Timer(0.2, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            decoder.generate(PROMPT, max_new_tokens=3)
        assert not reader.done.done()
    assert decoder.generate(PROMPT, max_new_tokens=3).finish_reason == "length"


def test_a_stream_waits_for_a_call_that_runs(decoder: Decoder):
    running = threading.Event()
    with ThreadPoolExecutor(1) as pool:

        def slowly() -> bool:
            running.set()
            time.sleep(0.02)
            return False

        call = pool.submit(decoder.generate, PROMPT, max_new_tokens=20, should_stop=slowly)
        assert running.wait(10)
        assert len(list(decoder.stream(PROMPT, max_new_tokens=3, ignore_eos=True))) == 3
        assert call.done() or call.result(10)


def test_more_users_than_rows_are_all_served(folder: Path):
    with (
        Decoder(folder, **options(max_batch_size=2, num_pages=6)) as decoder,
        ThreadPoolExecutor(12) as pool,
    ):
        calls = [call for call in CALLS.values() for _ in range(6)]
        for outcome in [pool.submit(call, decoder) for call in calls]:
            outcome.result(60)
        assert decoder.num_free_pages == 6
