"""The demo: its text, its numbers, and what it prints."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from scripted_model import write_scripted_model
from tidaldecode import Decoder, demo_model_dir
from tidaldecode.cli import app as cli
from tidaldecode.cli.demo import answer_is_correct, rows_read_per_step, run_demo
from tidaldecode.cli.demo_text import HiddenKey, filler_sentence, hide_key
from tidaldecode.cli.demo_view import density_line, marker_line, show_comparison
from tidaldecode.cli.terminal import Bars
from tidaldecode.text.tokenizer import Tokenizer
from tiny_models import TinyModel, write_checkpoint

ON_CPU = ["--device", "cpu", "--num-threads", "1"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(demo_model_dir(), 8192)


@pytest.mark.parametrize("num_tokens", [256, 1024, 4096])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_prompt_hides_its_key_once_and_asks_for_it(tokenizer, num_tokens: int, seed: int):
    prompt = hide_key(tokenizer.encode, num_tokens, seed)
    text = tokenizer.decode(prompt.prompt_ids)
    assert num_tokens - 40 <= len(prompt.prompt_ids) <= num_tokens
    assert prompt.prompt_ids[0] == 0  # BOS
    assert text.count(prompt.number) == 1
    assert text.count(f"special magic number for {prompt.key}") == 2
    assert text.endswith(f"What is the special magic number for {prompt.key}?\nAnswer:")
    needle = tokenizer.decode(prompt.prompt_ids[prompt.needle_start : prompt.needle_end])
    assert needle.strip() == f"The special magic number for {prompt.key} is {prompt.number}."
    assert 0.05 < prompt.needle_start / len(prompt.prompt_ids) < 0.95


def test_a_seed_gives_the_same_prompt_again(tokenizer: Tokenizer):
    assert hide_key(tokenizer.encode, 512, 7) == hide_key(tokenizer.encode, 512, 7)
    assert hide_key(tokenizer.encode, 512, 7) != hide_key(tokenizer.encode, 512, 8)


def test_the_filler_is_plain_sentences_that_vary():
    import random

    rng = random.Random(0)
    sentences = [filler_sentence(rng) for _ in range(500)]
    assert len(set(sentences)) > 450
    assert all(re.fullmatch(r"[A-Z][A-Za-z ,]+\.", sentence) for sentence in sentences)
    assert not any("magic" in sentence for sentence in sentences)


def test_a_prompt_too_short_for_its_question_is_refused(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="num_tokens: got 50"):
        hide_key(tokenizer.encode, 50, 0)


@pytest.mark.parametrize(
    ("text", "is_correct"),
    [(" 1234567\nmore", True), ("It is 1234567.", True), ("12345678", False),
     ("7 or 1234567", False), ("", False), ("none", False)],
)  # fmt: skip
def test_only_the_hidden_number_is_right(text: str, is_correct: bool):
    assert answer_is_correct(text, "1234567") == is_correct


@pytest.mark.parametrize(
    ("options", "seq_len", "rows"),
    [
        ({"attention": "full"}, 50, 4 * 50),
        ({"select_layers": (1, 3), "token_budget": 8}, 50, 3 * 50 + 8),
        ({"select_layers": (1,), "token_budget": 8}, 50, 2 * 50 + 2 * 8),
        ({"select_layers": (1,), "token_budget": 8, "granularity": "head"}, 50, 2 * 50 + 2 * 16),
        ({"select_layers": (1,), "token_budget": 8, "granularity": "layer"}, 50, 2 * 50 + 2 * 8),
        ({"select_layers": (1,), "token_budget": 64}, 50, 4 * 50),
        ({"select_layers": (1,), "token_budget": 8, "sparse_min_context": 50}, 50, 4 * 50),
        # Two layers read all keys, which are half of the rows, and then their sets.
        ({"scored_layers": (2, 3), "token_budget": 8}, 50, 2 * 50 + 2 * (25 + 8)),
    ],
    ids=str,
)
def test_rows_read_follow_from_the_plan(tmp_path: Path, options, seq_len: int, rows: int):
    folder = write_checkpoint(tmp_path, TinyModel(num_layers=4))
    decoder = Decoder(folder, device="cpu", max_seq_len=64, max_batch_size=1, **options)
    assert rows_read_per_step(decoder, seq_len) == rows


def test_a_layer_with_a_window_reads_no_more_than_it(tmp_path: Path):
    model = TinyModel("gemma3_text", num_layers=4, fields={"sliding_window": 16})
    decoder = Decoder(write_checkpoint(tmp_path, model), device="cpu", max_seq_len=64)
    num_windows = decoder.plan.count("w")
    assert 0 < num_windows < 4
    assert rows_read_per_step(decoder, 50) == num_windows * 16 + (4 - num_windows) * 50


def test_the_density_line_shows_where_positions_lie():
    levels = ".:-=+*#%@"
    assert density_line(np.array([], int), 560, levels) == "." * 56
    line = density_line(np.array([0, 10, 11, 559, 558, 557, 556]), 560, levels)
    assert (line[0], line[1], line[55], len(line)) == (":", "-", "=", 56)
    assert density_line(np.arange(560), 560, levels) == "*" * 56
    assert len(density_line(np.array([0, 4]), 5, levels)) == 56


def test_the_marker_covers_the_hidden_sentence():
    prompt = HiddenKey(prompt_ids=[0] * 560, key="k", number="1", needle_start=100, needle_end=120)
    assert marker_line(prompt, 560, "v") == " " * 10 + "vv"


@pytest.fixture(scope="module")
def comparisons() -> list:
    return list(
        run_demo(demo_model_dir(), (512, 2048), Bars(False), seed=0, device="cpu", num_threads=1)
    )


def test_both_ways_find_the_key(comparisons):
    for comparison in comparisons:
        assert comparison.dense.is_correct, comparison.dense.answer
        assert comparison.tidal.is_correct, comparison.tidal.answer
        assert comparison.dense.plan == "FFFFFFFF"
        assert comparison.tidal.plan == "FFSssssS"
        n = len(comparison.prompt.prompt_ids) + 1
        assert comparison.dense.rows_per_step == 8 * n
        assert comparison.tidal.rows_per_step == 4 * n + 4 * 64
        assert {layer: sets.shape for layer, sets in comparison.tidal.selection.items()} == {
            2: (2, 64), 7: (2, 64),
        }  # fmt: skip
        assert comparison.dense.selection == {}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_is_printed_fits_80_columns(comparisons, encoding: str):
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    console = Console(file=buffer, width=80, legacy_windows=False)
    for comparison in comparisons:
        show_comparison(console, comparison)
    buffer.flush()
    text = buffer.buffer.getvalue().decode(encoding)
    assert max(map(len, text.split("\n"))) <= 80
    assert "\x1b" not in text
    for part in ("dense", "tidal", "FFSssssS", "KV rows per step", "ms per token", "layer 7 set 1",
                 "key is here", "fewer"):  # fmt: skip
        assert part in text
    assert text.count(comparisons[0].prompt.number) == 3  # asked, and answered twice


def test_an_answer_in_brackets_is_no_markup(comparisons):
    console = Console(file=io.StringIO(), width=80)
    dense = dataclasses.replace(comparisons[0].dense, answer="[/INST] 1234567")
    show_comparison(console, dataclasses.replace(comparisons[0], dense=dense))
    assert "[/INST] 1234567" in console.file.getvalue()


def test_a_model_without_a_plan_gets_an_explanation(tmp_path: Path, capsys):
    folder = write_scripted_model(tmp_path, max_position_embeddings=4096)
    code = cli.main(["demo", "--model", str(folder), "--context", "300", *ON_CPU])
    out = capsys.readouterr().out
    assert code == 0
    assert "dense" in out and "no" in out
    words = " ".join(out.split())
    assert "there is no plan for this model" in words and "tidaldecode calibrate" in words


def test_a_budget_stands_in_for_a_plan(tmp_path: Path, capsys):
    """As in every command: each layer then chooses for itself."""
    folder = write_scripted_model(tmp_path, max_position_embeddings=4096)
    arguments = ["--context", "300", *ON_CPU, "--token-budget", "16"]
    assert cli.main(["demo", "--model", str(folder), *arguments]) == 0
    out = capsys.readouterr().out
    assert "FFP" in out and "Where the 16 positions lie" in out and "x fewer" in out


def test_layers_given_by_hand_stand_in_for_a_plan(tmp_path: Path, capsys):
    folder = write_scripted_model(tmp_path, max_position_embeddings=4096)
    arguments = ["--select-layers", "1", "--token-budget", "16", "--seed", "3"]
    code = cli.main(["demo", "--model", str(folder), "--context", "300", *ON_CPU, *arguments])
    out = capsys.readouterr().out
    assert code == 0
    assert "FSs" in out and "Where the 16 positions lie" in out


def test_sets_of_an_adaptive_budget_are_shown(capsys):
    model = str(demo_model_dir())
    budget = ["--token-budget", "64", "--top-p-mass", "0.9", "--min-token-budget", "16"]
    assert cli.main(["demo", "--model", model, "--context", "700", *ON_CPU, *budget]) == 0
    assert "Where the" in capsys.readouterr().out
