"""Properties that hold whatever the model says: seeds, chunks, batches, threads, faults, Ctrl-C."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import tidaldecode
from tiny_models import (
    TinyModel,
    random_prompt,
    random_weights,
    write_checkpoint,
    write_tokenizer,
)

MODEL = TinyModel(num_layers=5, num_q_heads=8, num_kv_heads=4, seed=31)
LENGTHS = (40, 7, 97, 64, 1, 130)
TIDAL = {"attention": "tidal", "select_layers": (1, 3), "full_layers": 1, "token_budget": 16}
DENSE = {"attention": "full"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("properties"), MODEL)
    return write_tokenizer(folder, MODEL.vocab_size)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [random_prompt(MODEL, n, seed=n) for n in LENGTHS]


def open_decoder(folder: Path, **options) -> tidaldecode.Decoder:
    defaults = {"device": "cpu", "dtype": "float32", "max_seq_len": 256, **DENSE}
    return tidaldecode.Decoder(folder, **(defaults | options))


def generate(decoder: tidaldecode.Decoder, prompts: list[list[int]], **options):
    defaults = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
    return decoder.generate(prompts, **(defaults | options))


def free_pages(decoder: tidaldecode.Decoder) -> int:
    return decoder._core.num_free_pages


def tokens(decoder: tidaldecode.Decoder, prompts: list[list[int]], **options) -> list[list[int]]:
    return [list(result.token_ids) for result in generate(decoder, prompts, **options)]


@pytest.mark.parametrize("attention", [DENSE, TIDAL], ids=["dense", "tidal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
class TestBatch:
    def test_a_row_equals_the_row_alone_bitwise(self, folder, prompts, attention, dtype):
        decoder = open_decoder(folder, dtype=dtype, max_batch_size=8, **attention)
        together = tokens(decoder, prompts)
        for prompt, row in zip(prompts, together, strict=True):
            assert tokens(decoder, [prompt]) == [row]

    def test_more_prompts_than_rows_run_in_waves(self, folder, prompts, attention, dtype):
        wide = open_decoder(folder, dtype=dtype, max_batch_size=8, **attention)
        narrow = open_decoder(folder, dtype=dtype, max_batch_size=2, **attention)
        assert tokens(narrow, prompts) == tokens(wide, prompts)


@pytest.mark.parametrize("attention", [DENSE, TIDAL], ids=["dense", "tidal"])
def test_the_same_call_gives_the_same_logits_bitwise(folder, prompts, attention):
    decoder = open_decoder(folder, **attention)
    for prompt in prompts:
        first = decoder.step_logits(prompt + prompts[0], prefill=len(prompt))
        again = decoder.step_logits(prompt + prompts[0], prefill=len(prompt))
        assert np.array_equal(first, again)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(folder, prompts, num_threads):
    expected = tokens(open_decoder(folder, **TIDAL), prompts)
    assert tokens(open_decoder(folder, num_threads=num_threads, **TIDAL), prompts) == expected


@pytest.mark.parametrize("prefill_chunk", [1, 7, 16, 64, 100, 1000])
@pytest.mark.parametrize("attention", [DENSE, TIDAL], ids=["dense", "tidal"])
def test_prefill_chunks_change_nothing(folder, prompts, attention, prefill_chunk):
    plain = open_decoder(folder, **attention)
    chunked = open_decoder(folder, prefill_chunk=prefill_chunk, **attention)
    assert tokens(chunked, prompts) == tokens(plain, prompts)
    prompt = prompts[-1]
    expected = plain.logits(prompt, last=len(prompt))
    actual = chunked.logits(prompt, last=len(prompt))
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < 1e-5  # a matrix product may sum in another order for another number of rows


@pytest.mark.parametrize("page_size", [1, 3, 16, 48, 64, 128])
@pytest.mark.parametrize("attention", [DENSE, TIDAL], ids=["dense", "tidal"])
def test_page_size_changes_nothing(folder, prompts, attention, page_size):
    expected = tokens(open_decoder(folder, **attention), prompts)
    assert tokens(open_decoder(folder, page_size=page_size, **attention), prompts) == expected


def test_scratch_memory_does_not_grow_with_the_square_of_the_context(tmp_path):
    model = dataclasses.replace(MODEL, max_position_embeddings=2**16)
    folder = write_checkpoint(tmp_path, model)

    def scratch_bytes(max_seq_len: int) -> int:
        decoder = open_decoder(folder, max_seq_len=max_seq_len, max_batch_size=1, **TIDAL)
        return decoder.memory_plan().scratch_bytes

    assert scratch_bytes(2**16) <= 17 * scratch_bytes(2**12)


class TestSampling:
    OPTIONS = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "max_new_tokens": 32}

    def test_the_same_seed_gives_the_same_tokens(self, folder, prompts):
        first = tokens(open_decoder(folder), prompts, seed=5, **self.OPTIONS)
        second = tokens(open_decoder(folder), prompts, seed=5, **self.OPTIONS)
        assert first == second

    def test_another_seed_gives_other_tokens(self, folder, prompts):
        decoder = open_decoder(folder)
        first = tokens(decoder, prompts, seed=5, **self.OPTIONS)
        assert tokens(decoder, prompts, seed=6, **self.OPTIONS) != first

    def test_there_is_no_fixed_default_seed(self, folder, prompts):
        decoder = open_decoder(folder)
        outcomes = [tokens(decoder, prompts[:1], **self.OPTIONS) for _ in range(3)]
        assert outcomes[0] != outcomes[1] or outcomes[1] != outcomes[2]

    def test_neighbours_have_no_say_in_the_draw(self, folder, prompts):
        decoder = open_decoder(folder, max_batch_size=8)
        alone = tokens(decoder, prompts[:1], seed=5, **self.OPTIONS)
        assert tokens(decoder, prompts, seed=5, **self.OPTIONS)[:1] == alone

    def test_top_k_1_is_greedy(self, folder, prompts):
        decoder = open_decoder(folder)
        sampled = tokens(decoder, prompts, temperature=1.0, top_k=1, seed=1)
        assert sampled == tokens(decoder, prompts)

    def test_a_tiny_temperature_is_finite_and_greedy(self, folder, prompts):
        decoder = open_decoder(folder)
        sampled = tokens(decoder, prompts, temperature=1e-30, seed=1)
        assert sampled == tokens(decoder, prompts)


def test_threads_may_share_a_decoder(folder, prompts):
    # Rows for one of the calls only: the other waits its turn.
    decoder = open_decoder(folder, max_batch_size=len(prompts), **TIDAL)
    expected = tokens(decoder, prompts)
    outcomes: dict[int, list[list[int]] | BaseException] = {}

    def work(number: int) -> None:
        try:
            for _ in range(3):
                outcomes[number] = tokens(decoder, prompts)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            outcomes[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "deadlock"
    assert outcomes == {0: expected, 1: expected}


def test_two_decoders_at_once(folder, prompts):
    one, two = open_decoder(folder), open_decoder(folder, **TIDAL)
    expected = tokens(one, prompts), tokens(two, prompts)
    pieces = one.stream(prompts[0], max_new_tokens=8, temperature=0, ignore_eos=True)
    assert tokens(two, prompts) == expected[1]
    for _ in pieces:
        pass
    assert tokens(one, prompts) == expected[0]


# --- faults ---


def write_with_nan_embedding(folder: Path, token_id: int) -> Path:
    weights = random_weights(MODEL)
    weights["model.embed_tokens.weight"][token_id] = np.nan
    write_tokenizer(folder, MODEL.vocab_size)
    return write_checkpoint(folder, MODEL, weights)


@pytest.mark.parametrize("attention", [DENSE, TIDAL], ids=["dense", "tidal"])
class TestNotANumber:
    def test_in_a_prompt_ends_that_sequence_only(self, folder, prompts, tmp_path, attention):
        expected = tokens(open_decoder(folder, max_batch_size=8, **attention), prompts)
        used = {token for row in prompts + expected for token in row}
        bad_id = next(token for token in range(MODEL.vocab_size) if token not in used)
        bad_folder = write_with_nan_embedding(tmp_path, bad_id)
        bad_prompt = prompts[3][:30] + [bad_id] + prompts[3][31:]
        decoder = open_decoder(bad_folder, max_batch_size=8, **attention)
        results = generate(decoder, prompts[:3] + [bad_prompt] + prompts[3:])
        bad = results.pop(3)
        assert bad.finish_reason == "error"
        assert list(bad.token_ids) == []
        assert "NaN" in bad.error
        assert [list(result.token_ids) for result in results] == expected
        assert {result.finish_reason for result in results} == {"length"}

    def test_while_decoding_ends_that_sequence_only(self, folder, prompts, tmp_path, attention):
        expected = tokens(open_decoder(folder, max_batch_size=8, **attention), prompts)
        # A token that one sequence generates, at a step after the first, and no other contains.
        row, step = next(
            (row, step)
            for row, output in enumerate(expected)
            for step, token in enumerate(output[:-1])
            if step >= 3
            and token not in output[:step]
            and all(token not in prompt for prompt in prompts)
            and all(token not in other for i, other in enumerate(expected) if i != row)
        )
        bad_folder = write_with_nan_embedding(tmp_path, expected[row][step])
        decoder = open_decoder(bad_folder, max_batch_size=8, **attention)
        results = generate(decoder, prompts)
        assert results[row].finish_reason == "error"
        assert list(results[row].token_ids) == expected[row][: step + 1]
        assert "NaN" in results[row].error
        for i, result in enumerate(results):
            if i != row:
                assert list(result.token_ids) == expected[i]
        # The pages that held NaN are clean for the next sequence.
        others = [prompt for i, prompt in enumerate(prompts) if i != row]
        assert tokens(decoder, others) == [t for i, t in enumerate(expected) if i != row]


@pytest.mark.parametrize("sign", [-1.0, 1.0], ids=["all -inf", "all +inf"])
def test_infinite_logits_are_an_error(tmp_path, prompts, sign):
    # Only hidden dimension 0 reaches the logits; it is large and positive in every token.
    weights = random_weights(MODEL)
    weights["model.embed_tokens.weight"][:, 0] = 100.0
    weights["model.norm.weight"][:] = 0.0
    weights["model.norm.weight"][0] = 1.0
    weights["lm_head.weight"][:] = 0.0
    weights["lm_head.weight"][:, 0] = sign * np.inf
    decoder = open_decoder(write_checkpoint(tmp_path, MODEL, weights))
    for result in generate(decoder, prompts):
        assert (result.finish_reason, list(result.token_ids)) == ("error", [])
        assert "inf" in result.error


def test_a_broken_sequence_in_a_stream_is_an_error(prompts, tmp_path):
    decoder = open_decoder(write_with_nan_embedding(tmp_path, prompts[0][5]))
    free = free_pages(decoder)
    stream = decoder.stream(prompts[0], max_new_tokens=4)
    assert "".join(stream) == ""
    assert stream.result.finish_reason == "error"
    assert "NaN" in stream.result.error
    assert free_pages(decoder) == free


class TestAbandonedCalls:
    def test_an_exception_while_streaming_frees_the_pages(self, folder, prompts):
        decoder = open_decoder(folder, max_seq_len=512)
        expected, free = tokens(decoder, prompts), free_pages(decoder)
        with pytest.raises(ZeroDivisionError):  # long before the end, which the engine goes on to
            for _ in decoder.stream(prompts[2], max_new_tokens=400, ignore_eos=True):
                assert free_pages(decoder) < free
                raise ZeroDivisionError
        gc.collect()  # the traceback may have held the stream
        assert free_pages(decoder) == free
        assert tokens(decoder, prompts) == expected

    def test_leaving_a_stream_frees_the_pages(self, folder, prompts):
        decoder = open_decoder(folder)
        free = free_pages(decoder)
        stream = decoder.stream(prompts[2], max_new_tokens=50, ignore_eos=True)
        next(stream)
        stream.close()
        assert free_pages(decoder) == free
        assert stream.result.finish_reason == "abort"

    def test_a_call_that_does_not_fit_takes_nothing(self, folder, prompts):
        decoder = open_decoder(folder, max_seq_len=100, max_batch_size=2)
        free = free_pages(decoder)
        with pytest.raises(tidaldecode.CapacityError, match="max_seq_len"):
            generate(decoder, [prompts[0], prompts[5]])
        assert free_pages(decoder) == free
        assert len(tokens(decoder, prompts[:1])[0]) == 24


INTERRUPTED = """
    import sys, tidaldecode
    decoder = tidaldecode.Decoder(sys.argv[1], device="cpu", dtype="float32", attention="full",
                                  max_seq_len=100_000, max_batch_size=1)
    prompt = [5] * int(sys.argv[2])
    free = decoder.num_free_pages
    caller = decoder.session() if sys.argv[3] == "session" else decoder
    print("ready", flush=True)
    try:
        caller.generate(prompt, max_new_tokens=100_000 - len(prompt), ignore_eos=True)
    except KeyboardInterrupt:
        after = caller.generate(prompt[:8], max_new_tokens=4, ignore_eos=True)
        if caller is not decoder:
            assert (len(prompt) > 8) == (len(caller) == 12), "what was not read must not stay"
            caller.close()
        assert decoder.num_free_pages == free, "pages were lost"
        print("interrupted", len(after.token_ids), flush=True)
        raise
    print("finished", flush=True)
"""


@pytest.mark.parametrize("caller", ["decoder", "session"])
@pytest.mark.parametrize("prompt_tokens", [8, 60_000], ids=["decoding", "prefilling"])
def test_ctrl_c_stops_within_a_step(tmp_path, prompt_tokens, caller):
    model = dataclasses.replace(MODEL, max_position_embeddings=100_000)
    folder = write_checkpoint(tmp_path, model)
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED), folder, str(prompt_tokens), caller],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert child.stdout is not None and child.stdout.readline().strip() == "ready"
        time.sleep(1.0)
        child.send_signal(signal.SIGINT)
        sent = time.monotonic()
        out, err = child.communicate(timeout=30)
        assert time.monotonic() - sent < 15, "Ctrl-C took too long"
    finally:
        child.kill()
    assert out.strip() == "interrupted 4", err
    assert "KeyboardInterrupt" in err
    assert child.returncode != 0
