"""Decoder's own behaviour: prompts in every form, settings, results, chat, lifetime."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tidaldecode
from scripted_model import BOS, EOS, SCRIPT, update_json, write_scripted_model
from tidaldecode import Decoder, GenerationResult
from tidaldecode.errors import CapacityError, InvalidArgument
from tidaldecode.results import make_result
from tiny_models import TinyModel, random_prompt, write_checkpoint

TINY = TinyModel(num_layers=4)
OPTIONS = {"device": "cpu", "attention": "full", "max_seq_len": 64, "num_threads": 1}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("scripted"))


@pytest.fixture(scope="module")
def decoder(scripted: Path) -> Decoder:
    return Decoder(scripted, **OPTIONS, max_batch_size=3)


@pytest.fixture(scope="module")
def wordless(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A model without a tokenizer whose tokens look random."""
    folder = write_checkpoint(tmp_path_factory.mktemp("wordless"), TINY)
    return Decoder(folder, **OPTIONS, max_batch_size=2)


def test_importing_loads_neither_torch_nor_transformers():
    code = (
        "import sys, tidaldecode; print([m for m in ('torch', 'transformers', 'typer') "
        "if m in sys.modules], tidaldecode.__version__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["[]", tidaldecode.__version__]


# Prompts


def test_one_prompt_gives_one_result_and_a_list_gives_a_list(decoder: Decoder):
    assert isinstance(decoder.generate(">"), GenerationResult)
    assert isinstance(decoder.generate([BOS, 62]), GenerationResult)
    assert [r.text for r in decoder.generate([">"])] == [SCRIPT]
    assert [r.text for r in decoder.generate([[62], [BOS, 62]])] == [SCRIPT] * 2


def test_text_and_ids_mix_and_numpy_counts(decoder: Decoder):
    results = decoder.generate([">", [62], np.array([62], np.int32), (BOS, 62)])
    assert [r.text for r in results] == [SCRIPT] * 4
    assert [r.prompt_tokens for r in results] == [2, 1, 1, 2]
    assert decoder.generate(np.array([BOS, 62])).text == SCRIPT
    assert len(decoder.generate(np.full((2, 3), 62), max_new_tokens=1)) == 2


def test_the_tokenizer_puts_bos_in_front(decoder: Decoder):
    assert decoder.encode("a>") == [BOS, 97, 62]


def test_more_prompts_than_rows_run_in_waves(decoder: Decoder):
    prompts = [[*b"x" * n, 62] for n in range(1, 9)]
    results = decoder.generate(prompts)
    assert [r.text for r in results] == [SCRIPT] * 8
    assert [r.prompt_tokens for r in results] == list(range(2, 10))


def test_waves_also_respect_the_pages(scripted: Path):
    small = Decoder(scripted, **OPTIONS, max_batch_size=3, page_size=16, num_pages=5)
    results = small.generate([[62]] * 4, max_new_tokens=24)  # two pages each
    assert [r.text for r in results] == [SCRIPT] * 4
    with pytest.raises(CapacityError, match="page|max_seq_len"):
        small.generate([[62]] * 4, max_new_tokens=200)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([], "got an empty list"),
        ([[]], "prompt 0: got no tokens"),
        ([">", []], "prompt 1: got no tokens"),
        ([-1], r"token_ids\[0\]: got -1, expected an integer from 0 to 319"),
        ([5, 320], r"token_ids\[1\]: got 320, .*vocab_size 320"),
        ([2**31], "got 2147483648"),
        ([2**200], "an integer of 201 bits"),
        ([True], "got True"),
        ([1.0], "got 1.0"),
        ([float("nan")], "got nan"),
        ([None], "got None"),
        ([[1, [2]]], "prompt 0: token_ids"),
        ([[1], 5], "prompt 1: got 5"),
        ([[1], None], "prompt 1: got None"),
        (7, "prompt: got 7, expected a string"),
        (None, "prompt: got None"),
        (b"bytes", "prompt: got b'bytes'"),
        ({"a": 1}, "prompt: got {'a': 1}"),
        ("\ud800", "lone surrogate"),
        (np.array([1.5]), "got "),
        (np.array([True]), "got "),
    ],
    ids=range(21),
)
def test_bad_prompts_are_named(decoder: Decoder, prompt, expected):
    with pytest.raises(InvalidArgument, match=expected):
        decoder.generate(prompt)


def test_a_text_of_no_tokens_is_refused(tmp_path: Path):
    folder = write_scripted_model(tmp_path)
    path = folder / "tokenizer.json"
    update_json(path, post_processor=None)
    with pytest.raises(InvalidArgument, match="got a text of no tokens"):
        Decoder(folder, **OPTIONS, max_batch_size=1).generate("")


# Lengths


def test_a_prompt_may_fill_all_but_one_position(decoder: Decoder):
    assert len(decoder.generate([98] * 63, max_new_tokens=1).token_ids) == 1


@pytest.mark.parametrize("length", [64, 65, 640])
def test_a_prompt_without_room_is_refused_with_both_numbers(decoder: Decoder, length: int):
    with pytest.raises(CapacityError, match=f"{length} prompt tokens .*max_seq_len 64"):
        decoder.generate([98] * length)


def test_a_batch_with_one_prompt_too_long_does_no_work(decoder: Decoder):
    free = decoder._core.num_free_pages
    seen: list[int] = []
    prompts = [[62]] * 4 + [[98] * 99]
    with pytest.raises(CapacityError, match="prompt 4: 99"):
        decoder.generate(prompts, on_prefill=lambda done, total: seen.append(done))
    assert seen == []
    assert decoder._core.num_free_pages == free


def test_the_default_length_shrinks_to_the_room_but_a_request_does_not(wordless: Decoder):
    prompt = random_prompt(TINY, 60)
    assert len(wordless.generate(prompt, ignore_eos=True).token_ids) == 4
    with pytest.raises(CapacityError, match="max_new_tokens 5"):
        wordless.generate(prompt, max_new_tokens=5)


# Settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: got 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens: got True"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"temperature": "hot"}, "temperature: got 'hot'"),
        ({"top_k": -2}, "top_k: got -2"),
        ({"top_p": 0}, "top_p: got 0"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"min_p": 2}, "min_p: got 2"),
        ({"min_p": -0.1}, "min_p: got -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty: got 0"),
        ({"seed": 2**64}, "seed: got 18446744073709551616"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 0.5}, "seed: got 0.5"),
        ({"stop": ""}, "stop: got ''"),
        ({"stop": ["a", ""]}, "stop: got ''"),
        ({"stop": "x" * 1_000_000}, "stop: got .*1 to 1024 characters"),
        ({"stop": ["x"] * 17}, "stop: got 17 strings, expected at most 16"),
        ({"stop": b"x"}, "stop: got b'x'"),
        ({"stop": 5}, "stop: got 5"),
        ({"stop_token_ids": [320]}, "stop_token_ids: got 320"),
        ({"stop_token_ids": [-1]}, "stop_token_ids: got -1"),
        ({"stop_token_ids": 5}, "stop_token_ids: got 5"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids: got 1.0"),
        ({"stop_token_ids": list(range(300)) * 4}, "stop_token_ids: got 1200 ids"),
        ({"ignore_eos": "yes"}, "ignore_eos: got 'yes'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_named_everywhere(decoder: Decoder, settings, expected):
    for call in (decoder.generate, decoder.stream):
        with pytest.raises(InvalidArgument, match=expected):
            call(">", **settings)


def test_an_unknown_setting_is_a_type_error(decoder: Decoder):
    for call in (decoder.generate, decoder.stream):
        with pytest.raises(TypeError, match="max_tokens"):
            call(">", max_tokens=5)


def test_a_tiny_temperature_is_greedy_and_a_high_one_still_gives_tokens(wordless: Decoder):
    prompt = random_prompt(TINY, 8)
    greedy = wordless.generate(prompt, max_new_tokens=6).token_ids
    for temperature in (0, 1e-30, 1e-5):
        assert (
            wordless.generate(prompt, max_new_tokens=6, temperature=temperature).token_ids == greedy
        )
    hot = wordless.generate(prompt, max_new_tokens=6, temperature=1e30, seed=1)
    assert len(hot.token_ids) == 6


def test_a_seed_repeats_a_text_and_no_seed_does_not(wordless: Decoder):
    prompt = random_prompt(TINY, 8)

    def sample(**settings):
        return wordless.generate(prompt, max_new_tokens=20, temperature=2.0, **settings).token_ids

    assert sample(seed=5) == sample(seed=5) == sample(seed=2**64 - 1 - (2**64 - 6))
    assert sample(seed=5) != sample(seed=6)
    assert sample() != sample()


def test_each_prompt_of_a_batch_has_draws_of_its_own_without_a_seed(wordless: Decoder):
    prompt = random_prompt(TINY, 8)
    one, two = wordless.generate([prompt, prompt], max_new_tokens=20, temperature=2.0)
    assert one.token_ids != two.token_ids
    one, two = wordless.generate([prompt, prompt], max_new_tokens=20, temperature=2.0, seed=3)
    assert one.token_ids == two.token_ids


def test_top_k_of_one_is_greedy(wordless: Decoder):
    prompt = random_prompt(TINY, 8)
    greedy = wordless.generate(prompt, max_new_tokens=6).token_ids
    assert wordless.generate(prompt, max_new_tokens=6, temperature=1.0, top_k=1).token_ids == greedy


def test_defaults_come_from_generation_config(tmp_path: Path):
    folder = write_checkpoint(tmp_path, TINY)
    update_json(
        folder / "generation_config.json", max_new_tokens=7, do_sample=True, temperature=2.0
    )
    decoder = Decoder(folder, **OPTIONS, max_batch_size=1)
    prompt = random_prompt(TINY, 8)
    first, second = (decoder.generate(prompt).token_ids for _ in range(2))
    assert len(first) == 7
    assert first != second
    greedy = [decoder.generate(prompt, temperature=0).token_ids for _ in range(2)]
    assert greedy[0] == greedy[1]


# Ends


def test_an_end_token_ends_the_text_without_being_in_it(decoder: Decoder):
    result = decoder.generate(">")
    assert (result.finish_reason, result.stop_reason) == ("stop", EOS)
    assert result.token_ids[-1] == EOS
    assert result.text == SCRIPT


def test_ignore_eos_goes_on(decoder: Decoder):
    result = decoder.generate(">", ignore_eos=True, max_new_tokens=30)
    assert result.finish_reason == "length"
    assert EOS in result.token_ids[:-1]


def test_own_stop_tokens_end_the_text(decoder: Decoder):
    result = decoder.generate(">", stop_token_ids=[ord("c")])
    assert (result.finish_reason, result.stop_reason) == ("stop", ord("c"))
    assert result.text == "aé世🎉b"
    assert result.token_ids[-1] == ord("c")


def test_each_sequence_of_a_batch_stops_for_itself(decoder: Decoder):
    results = decoder.generate([">", "c", [ord("O")]], stop=["S"], max_new_tokens=8)
    assert [r.finish_reason for r in results] == ["length", "stop", "stop"]
    assert [r.stop_reason for r in results] == [None, "S", EOS]
    assert [r.text for r in results][1:] == ["d. ", "P"]


def test_timings_are_there_and_make_sense(decoder: Decoder):
    timings = decoder.generate(">").timings
    assert 0 <= timings.queue_s < timings.time_to_first_token_s < timings.total_s < 60
    assert timings.decode_tokens_per_s > 0
    assert decoder.generate(">", max_new_tokens=1).timings.decode_tokens_per_s == 0.0


def test_speed_counts_the_steps_past_a_stop_string_as_their_time_does():
    core = SimpleNamespace(
        token_ids=[1, 2, 3, 4, 5],
        finish_reason="abort",
        prompt_tokens=1,
        cached_tokens=0,
        queue_s=0.0,
        time_to_first_token_s=1.0,
        decode_s=2.0,
        error="",
        has_logprobs=False,
        has_prompt_logprobs=False,
        verification=SimpleNamespace(dense_passes=0),
    )
    text = {"text": "ab", "matched_stop": "c", "num_tokens": 3}
    result = make_result(core, prompt_ids=[0], stop_token_ids=(), **text)
    assert result.token_ids == (1, 2, 3)
    assert result.timings.decode_tokens_per_s == 2.0


def test_nan_logits_end_only_their_sequence(tmp_path: Path):
    folder = write_scripted_model(tmp_path)
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][ord("Z")] = np.nan
    save_file(weights, folder / "model.safetensors")
    decoder = Decoder(folder, **OPTIONS, max_batch_size=2)
    good, bad = decoder.generate([">", [ord("Z")]])
    assert good.text == SCRIPT and good.error is None
    assert bad.finish_reason == "error" and bad.token_ids == ()
    assert "NaN" in bad.error
    stream = decoder.stream([ord("Z")])
    assert list(stream) == []
    assert stream.result.finish_reason == "error"


# Looking inside


def test_logits_have_one_row_per_position(wordless: Decoder):
    ids = random_prompt(TINY, 12)
    logits = wordless.logits(ids, last=12)
    assert (logits.shape, logits.dtype) == ((12, 320), np.float32)
    assert np.allclose(wordless.logits(ids), logits[-1:], atol=1e-5)
    steps = wordless.step_logits(ids, prefill=4)
    assert steps.shape == (9, 320)
    assert np.allclose(steps, logits[3:], atol=1e-3)


def test_selection_shows_what_was_chosen(tmp_path: Path):
    folder = write_checkpoint(tmp_path, TINY)
    decoder = Decoder(
        folder,
        device="cpu",
        max_seq_len=64,
        max_batch_size=2,
        select_layers=(1, 3),
        token_budget=8,
        granularity="kv_head",
    )
    assert decoder.plan == "FSsS"
    decoder.generate([random_prompt(TINY, 30), random_prompt(TINY, 20)], max_new_tokens=5)
    for sequence, length in ((0, 34), (1, 24)):
        selection = decoder.selection(sequence)
        assert list(selection) == [1, 3]
        for sets in selection.values():
            assert (sets.shape, sets.dtype) == ((2, 8), np.int32)
            assert np.all(np.diff(sets, axis=1) > 0)
            assert np.all(sets[:, 0] == 0) and np.all(sets[:, -1] == length - 1)
    with pytest.raises(InvalidArgument, match="sequence"):
        decoder.selection(2)


def test_repr_says_what_runs(decoder: Decoder):
    assert "device='cpu'" in repr(decoder) and "plan='FFF'" in repr(decoder)


def test_loading_reports_progress(scripted: Path):
    seen: list[tuple[int, int]] = []
    Decoder(scripted, **OPTIONS, max_batch_size=1, progress=lambda *p: seen.append(p))
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1] > 0


def test_an_error_while_loading_is_passed_on(scripted: Path):
    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Decoder(scripted, **OPTIONS, max_batch_size=1, progress=fail)


def test_more_positions_than_the_model_knows_are_noted(scripted: Path, caplog):
    Decoder(scripted, **(OPTIONS | {"max_seq_len": 1024}), max_batch_size=1)
    (record,) = caplog.records
    assert "max_seq_len 1024" in record.getMessage()
    assert "max_position_embeddings 512" in record.getMessage()


# Lifetime


def test_a_closed_decoder_says_so(scripted: Path):
    decoder = Decoder(scripted, **OPTIONS, max_batch_size=2)
    stream = decoder.stream(">")
    next(stream)
    decoder.close()
    decoder.close()
    assert stream.result.finish_reason == "abort"
    assert "closed" in repr(decoder)
    for use in (
        lambda: decoder.generate(">"),
        lambda: decoder.stream(">"),
        lambda: decoder.render_chat([]),
        lambda: decoder.logits([1]),
        lambda: decoder.selection(),
        lambda: decoder.plan,
        lambda: decoder.config,
        lambda: decoder.memory_plan(),
    ):
        with pytest.raises(InvalidArgument, match="closed"):
            use()


def test_a_decoder_closes_at_the_end_of_its_block(scripted: Path):
    with Decoder(scripted, **OPTIONS, max_batch_size=1) as decoder:
        assert decoder.generate(">").text == SCRIPT
    assert "closed" in repr(decoder)


def test_a_stream_outlives_a_dropped_decoder(scripted: Path):
    stream = Decoder(scripted, **OPTIONS, max_batch_size=1).stream(">")
    gc.collect()
    assert "".join(stream) == SCRIPT


def test_threads_may_share_a_decoder(decoder: Decoder):
    texts: list[str] = []

    def work() -> None:
        for _ in range(5):
            try:
                texts.append(decoder.generate(">").text)
            except CapacityError:
                texts.append(SCRIPT)  # all rows were taken: said clearly, nothing broken

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [SCRIPT] * 20
