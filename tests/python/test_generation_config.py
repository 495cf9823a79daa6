"""generation_config.json: means what it means to transformers, or is noted by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from scripted_model import update_json
from tidaldecode import Decoder
from tidaldecode.checkpoint import generation_defaults
from tidaldecode.checkpoint.generation_defaults import GenerationDefaults, read_generation_defaults
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.errors import ConfigError
from tiny_models import TinyModel, random_prompt, write_checkpoint

MODEL = TinyModel(num_layers=2, vocab_size=64)
PROMPT = random_prompt(MODEL, 8)


def read(folder: Path, **fields: Any) -> GenerationDefaults:
    (folder / "g.json").write_text(json.dumps(fields))
    return read_generation_defaults(folder / "g.json", MODEL.vocab_size)


def test_without_a_generation_config_decoding_is_greedy(tmp_path: Path):
    assert read_generation_defaults(tmp_path / "absent.json", 320) == GenerationDefaults()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": -1}, {"temperature": 0.0}),  # not looked at
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1},
         {"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_p": 1.5}, {"top_p": 1.0}),
        ({"top_k": None, "top_p": None, "min_p": None, "repetition_penalty": None},
         {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}),
        ({"max_new_tokens": 7}, {"max_new_tokens": 7, "max_length": None}),
        ({"max_new_tokens": 7, "max_length": 4}, {"max_new_tokens": 7, "max_length": None}),
        ({"max_length": 4096}, {"max_new_tokens": 4096, "max_length": 4096}),
        ({"max_new_tokens": None, "max_length": None}, {"max_new_tokens": 256}),
        ({"max_new_tokens": 10**12}, {"max_new_tokens": 2**31 - 1}),
        ({"eos_token_id": [5, 6]}, {"eos_token_ids": (5, 6)}),
        ({"eos_token_id": [5, 64, -1]}, {"eos_token_ids": (5,)}),
        ({"eos_token_id": -1}, {"eos_token_ids": ()}),
        ({"eos_token_id": None}, {"eos_token_ids": ()}),
        ({"temperature": None, "transformers_version": "5.0"}, {"temperature": 0.0}),
        ({"min_new_tokens": 3, "no_repeat_ngram_size": 2},
         {"min_new_tokens": 3, "no_repeat_ngram_size": 2}),
        ({"suppress_tokens": [19, -1, 64, 3]}, {"suppress_tokens": (19, 3)}),
        ({"bad_words_ids": [[53], [1, 2], [4, 64]]}, {"bad_words": ((53,), (1, 2))}),
        ({"min_new_tokens": None, "suppress_tokens": None, "bad_words_ids": None},
         {"min_new_tokens": 0, "suppress_tokens": (), "bad_words": ()}),
    ],
    ids=str,
)  # fmt: skip
def test_generation_defaults_are_read(tmp_path, fields, expected):
    defaults = read(tmp_path, **fields)
    for name, value in expected.items():
        assert getattr(defaults, name) == value


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"do_sample": "yes"}, "do_sample: got 'yes'"),
        ({"do_sample": True, "temperature": -1}, "temperature: got -1"),
        ({"do_sample": True, "temperature": "hot"}, "temperature: got 'hot'"),
        ({"top_p": -0.5}, "top_p: got -0.5"),
        ({"top_k": "all"}, "top_k: got 'all'"),
        ({"min_p": 2}, "min_p: got 2"),
        ({"repetition_penalty": 0}, "repetition_penalty: got 0"),
        ({"repetition_penalty": 1e-7}, "repetition_penalty: got 1e-07"),
        ({"repetition_penalty": 1e7}, "repetition_penalty: got"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"max_length": -1}, "max_length: got -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id: got '</s>'"),
        ({"eos_token_id": [[1]]}, "eos_token_id: got"),
        ({"min_new_tokens": -1}, "min_new_tokens: got -1"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size: got 2.5"),
        ({"suppress_tokens": 3}, "suppress_tokens: got 3"),
        ({"suppress_tokens": [True]}, "suppress_tokens: got True"),
        ({"bad_words_ids": [3]}, "bad_words_ids: got"),
        ({"bad_words_ids": [[]]}, "bad_words_ids: got"),
        ({"bad_words_ids": [["x"]]}, "bad_words_ids: got 'x'"),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_named(tmp_path, fields, expected):
    with pytest.raises(ConfigError, match=expected):
        read(tmp_path, **fields)


# What is not applied


@pytest.mark.parametrize(
    "fields",
    [
        {"begin_suppress_tokens": [220]},
        {"forced_bos_token_id": 1},
        {"forced_eos_token_id": [2]},
        {"num_beams": 4},
        {"min_length": 5},
        {"sequence_bias": [[[4], -1.0]]},
        {"guidance_scale": 1.5},
        {"do_sample": True, "typical_p": 0.9},
        {"min_length": 3, "num_beams": 4},
    ],
    ids=str,
)
def test_settings_that_would_change_the_text_are_noted_by_name(tmp_path, fields):
    (note,) = read(tmp_path, **fields).notes
    assert str(tmp_path / "g.json") in note
    for name in fields:
        assert (name in note) == (name != "do_sample")


@pytest.mark.parametrize(
    "fields",
    [
        {"no_repeat_ngram_size": 0, "suppress_tokens": None, "bad_words_ids": [], "num_beams": 1},
        {"no_repeat_ngram_size": 3, "suppress_tokens": [19], "bad_words_ids": [[53]]},  # applied
        {"typical_p": 1.0, "do_sample": True, "epsilon_cutoff": 0.0, "guidance_scale": 1.0},
        {"typical_p": 0.9, "eta_cutoff": 0.1},  # count only where tokens are drawn
        {"length_penalty": 2.0, "early_stopping": True},  # of beams, which there are none
        {"use_cache": True, "pad_token_id": 0, "bos_token_id": 1, "output_scores": True},
        {"unheard_of": 3},
    ],
    ids=str,
)
def test_settings_that_are_off_or_change_nothing_are_not_noted(tmp_path, fields):
    assert not read(tmp_path, **fields).notes


# Settings of transformers that are applied here, or change no text of a model like these.
APPLIED = {"max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p",
           "repetition_penalty", "eos_token_id", "min_new_tokens", "no_repeat_ngram_size",
           "suppress_tokens", "bad_words_ids"}  # fmt: skip
WITHOUT_EFFECT = {
    # of beams, which are noted by num_beams
    "early_stopping", "length_penalty", "low_memory",
    # of memory and speed
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "use_mtp",
    "compile_config", "disable_compile", "continuous_batching_config", "prefill_chunk_size",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "speculation_type",
    # of what is returned
    "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate",
    # of other tokens than those generated, or of numbers that are normal already
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "renormalize_logits",
    "remove_invalid_values",
    "transformers_version",
}  # fmt: skip


def test_every_setting_of_transformers_is_known():
    transformers = pytest.importorskip("transformers")
    names = {n for n in transformers.GenerationConfig().to_dict() if not n.startswith("_")}
    noted = {*generation_defaults._UNAPPLIED, *generation_defaults._UNAPPLIED_DRAWS}
    assert not noted & (APPLIED | WITHOUT_EFFECT)
    assert names - noted - APPLIED - WITHOUT_EFFECT == set()


# Against transformers


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 12},
        {"max_length": 20},
        {"max_new_tokens": 4, "max_length": 5},
        {"max_new_tokens": 4, "do_sample": True, "top_p": 0.0},
        {"max_new_tokens": 4, "do_sample": True, "top_k": 1},
        {"max_new_tokens": 4, "eos_token_id": -1},
        {"max_new_tokens": 4, "eos_token_id": 64},
        {"max_new_tokens": 12, "repetition_penalty": 1.3},
        {"max_new_tokens": 4, "top_p": 1.5, "temperature": -3, "top_k": -1},
        {"max_new_tokens": 12, "no_repeat_ngram_size": 1},
        {"max_new_tokens": 12, "no_repeat_ngram_size": 2, "repetition_penalty": 0.5},
        {"max_new_tokens": 9, "suppress_tokens": [*range(0, 64, 2), 70]},
        {"max_new_tokens": 9, "bad_words_ids": [[i] for i in range(40)] + [[50, 51], [7, 60]]},
        {"max_new_tokens": 9, "min_new_tokens": 5, "eos_token_id": [*range(48)]},
    ],
    ids=str,
)
def test_the_tokens_are_those_of_transformers(tmp_path: Path, fields: dict[str, Any]):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path, MODEL)
    (folder / "generation_config.json").write_text(json.dumps(fields))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.generate(torch.tensor([PROMPT]), pad_token_id=0)[0, len(PROMPT) :].tolist()
    with Decoder(folder, device="cpu", attention="full") as decoder:
        assert list(decoder.generate(PROMPT).token_ids) == expected


@pytest.mark.parametrize(
    "fields",
    [{"max_length": 12}, {"max_new_tokens": 3}, {"repetition_penalty": 5.0, "max_new_tokens": 9}],
    ids=str,
)
@pytest.mark.parametrize("has_own_file", [False, True])
def test_settings_in_config_json_count_where_there_is_no_file_of_their_own(
    tmp_path: Path, fields: dict[str, Any], has_own_file: bool
):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path, MODEL)
    update_json(folder / "config.json", **fields)
    if has_own_file:
        update_json(folder / "generation_config.json", max_new_tokens=5)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.generate(torch.tensor([PROMPT]), pad_token_id=0)[0, len(PROMPT) :].tolist()
    with Decoder(folder, device="cpu", attention="full") as decoder:
        assert list(decoder.generate(PROMPT).token_ids) == expected


def test_settings_of_an_older_config_json_are_noted_once(tmp_path: Path):
    folder = write_checkpoint(tmp_path, MODEL)
    update_json(folder / "config.json", min_length=2, eos_token_id=[3, -1])
    end_tokens, unapplied = read_model_folder(folder).notes
    assert "no token has the id -1" in end_tokens and "min_length" in unapplied


def test_a_prompt_beyond_max_length_gets_one_token(tmp_path: Path):
    folder = write_checkpoint(tmp_path, MODEL)
    update_json(folder / "generation_config.json", max_length=4)
    with Decoder(folder, device="cpu", attention="full") as decoder:
        assert len(decoder.generate(PROMPT).token_ids) == 1
        assert len(decoder.generate(PROMPT, max_new_tokens=6).token_ids) == 6


def test_the_decoder_says_what_is_not_applied_once(tmp_path: Path, caplog):
    folder = write_checkpoint(tmp_path, MODEL)
    update_json(folder / "generation_config.json", min_length=2, eos_token_id=[-1, 3])
    assert read_model_folder(folder).eos_token_ids == (3,)
    with caplog.at_level(logging.WARNING, logger="tidaldecode"):
        Decoder(folder, device="cpu", attention="full").close()
    assert caplog.text.count("min_length") == 1
    assert caplog.text.count("no token has the id -1") == 1
