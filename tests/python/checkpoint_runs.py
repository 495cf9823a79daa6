"""Runs of feature_runs.py for the kinds of folders that are read."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

import tidaldecode
from feature_runs import Bench, uses
from mxfp4_models import write_both_mxfp4
from quantized_models import KINDS, write_both
from tiny_models import TinyModel, random_prompt, random_weights, write_checkpoint


@uses("quantised checkpoints")
def quantised_checkpoints(bench: Bench) -> None:
    model = TinyModel(
        hidden_size=128, intermediate_size=256, num_layers=2, num_q_heads=2, num_kv_heads=1,
        head_dim=64, dtype=bench.dtype,
    )  # fmt: skip
    prompt = random_prompt(model, 40)
    limits = {
        "device": bench.device, "dtype": bench.dtype, "max_seq_len": 64, "num_threads": 1,
        "activation_format": "16bit",
    }  # fmt: skip
    stacked = dataclasses.replace(
        model, family="phi3", hidden_size=256, num_q_heads=4, num_kv_heads=2
    )
    for index, (shape, kind) in enumerate(itertools.product((model, stacked), KINDS)):
        stored, meant = write_both(bench.folder / str(index), shape, kind)
        results = []
        for folder, weight_format in ((meant, "auto"), (stored, "decoded"), (stored, "auto")):
            with tidaldecode.Decoder(
                folder, max_batch_size=1, weight_format=weight_format, **limits
            ) as decoder:
                logits = decoder.logits(prompt, last=len(prompt))
                text = decoder.generate(prompt, max_new_tokens=8, ignore_eos=True, temperature=0)
                steps = decoder.step_logits(prompt, prefill=30)
                results.append((logits, text.token_ids, steps))
        assert np.isfinite(results[0][0]).all(), kind.name
        assert np.array_equal(results[0][0], results[1][0]), kind.name
        assert results[0][1] == results[1][1], kind.name
        # Codes are not rounded to 16 bits on the way; steps multiply by what they stand for.
        scale = np.abs(results[0][2]).max()
        assert np.abs(results[2][2] - results[0][2]).max() < 0.05 * scale, kind.name
    stored, meant = write_both_mxfp4(
        bench.folder / "mxfp4", dataclasses.replace(model, family="gpt_oss", gain=1.0)
    )
    logits = []
    for folder, weight_format in ((meant, "auto"), (stored, "decoded"), (stored, "auto")):
        with tidaldecode.Decoder(
            folder, max_batch_size=1, weight_format=weight_format, **limits
        ) as decoder:
            logits.append(decoder.logits(prompt, last=len(prompt)))
            assert np.isfinite(decoder.step_logits(prompt, prefill=30)).all()
    assert np.array_equal(logits[0], logits[1])
    # Where rounding decides between two experts it may decide otherwise.
    away = np.abs(logits[2] - logits[0]).max(axis=1) / np.abs(logits[0]).max()
    assert np.median(away) < 0.05
    assert "int4 and MXFP4 are kept so" in " ".join(bench.command("info", str(stored)).split())


@uses("weight_format")
def weight_format(bench: Bench) -> None:
    model = TinyModel(hidden_size=256, intermediate_size=512, head_dim=64, dtype=bench.dtype)
    folder = write_checkpoint(bench.folder / "numbers", model)
    prompt = random_prompt(model, 60)
    held = {}
    for choice in ("decoded", "fp8", "int4"):
        with tidaldecode.Decoder(
            folder, device=bench.device, dtype=bench.dtype, weight_format=choice, max_seq_len=128
        ) as decoder:
            held[choice] = decoder.memory_plan().weight_bytes
            texts = decoder.generate([prompt, prompt[:9]], max_new_tokens=6, ignore_eos=True)
            assert [len(text.token_ids) for text in texts] == [6, 6]
            assert np.isfinite(decoder.step_logits(prompt, prefill=50)).all()
    bench.command("generate", str(bench.model), "Once", "-n", "4", "--weight-format", "int4")
    assert held["int4"] < held["fp8"] < held["decoded"]
    experts = write_checkpoint(
        bench.folder / "experts", dataclasses.replace(model, family="gpt_oss")
    )
    with tidaldecode.Decoder(
        experts, device=bench.device, dtype=bench.dtype, weight_format="mxfp4", max_seq_len=128
    ) as decoder:
        assert len(decoder.generate(prompt, max_new_tokens=6, ignore_eos=True).token_ids) == 6


@uses("lm_head_format")
def lm_head_format(bench: Bench) -> None:
    held = {}
    for tie in (False, True):
        model = TinyModel(hidden_size=256, intermediate_size=512, head_dim=64, dtype=bench.dtype)
        model = dataclasses.replace(model, tie=tie)
        prompt = random_prompt(model, 60)
        for kind in (None, next(kind for kind in KINDS if kind.name.startswith("AWQ"))):
            folder = bench.folder / f"{tie}-{kind.name if kind else 'numbers'}"
            folder = write_both(folder, model, kind)[0] if kind else write_checkpoint(folder, model)
            for choice in ("decoded", "fp8", "int4"):
                with tidaldecode.Decoder(
                    folder, device=bench.device, dtype=bench.dtype, lm_head_format=choice,
                    max_seq_len=128, num_threads=1,
                ) as decoder:  # fmt: skip
                    held[tie, choice] = decoder.memory_plan().weight_bytes
                    text = decoder.generate(prompt, max_new_tokens=6, ignore_eos=True)
                    assert len(text.token_ids) == 6
                    logits = decoder.logits(prompt, last=len(prompt))
                    steps = decoder.step_logits(prompt, prefill=50)
                    assert np.abs(logits[49:] - steps).max() < 0.05 * np.abs(logits).max()
    assert held[False, "int4"] < held[False, "fp8"] < held[False, "decoded"]
    assert held[True, "decoded"] < held[True, "int4"] < held[True, "fp8"]
    bench.command("generate", str(bench.model), "Once", "-n", "4", "--lm-head-format", "fp8")


@uses("activation_format")
def activation_format(bench: Bench) -> None:
    model = TinyModel(
        hidden_size=256, intermediate_size=512, num_layers=2, num_q_heads=4, num_kv_heads=2,
        head_dim=64, dtype=bench.dtype,
    )  # fmt: skip
    prompt = random_prompt(model, 150)
    limits = {"device": bench.device, "dtype": bench.dtype, "max_seq_len": 256, "num_threads": 1}
    for index, kind in enumerate(KINDS[:5]):
        stored, _ = write_both(bench.folder / str(index), model, kind)
        held: dict[str, list[np.ndarray]] = {}
        for choice in ("16bit", "fp8"):
            logits = []
            for chunk in (20, 67, 150):
                with tidaldecode.Decoder(
                    stored, activation_format=choice, prefill_chunk=chunk, **limits
                ) as decoder:
                    assert decoder.config.activation_format == choice
                    logits.append(decoder.logits(prompt, last=len(prompt)))
                    text = decoder.generate([prompt, prompt[:1]], max_new_tokens=6, ignore_eos=True)
                    assert [len(each.token_ids) for each in text] == [6, 6]
            held[choice] = logits
        away = np.linalg.norm(held["fp8"][0] - held["16bit"][0])
        assert away > 0.01 * np.linalg.norm(held["fp8"][0]), kind.name
        # Where rounding decides between two codes, what follows differs by more.
        cuts = max(np.linalg.norm(each - held["fp8"][0]) for each in held["fp8"])
        assert cuts < 0.9 * away, kind.name
        with tidaldecode.Decoder(stored, **limits) as decoder:
            says = bench.device != "cpu" and kind.name != "FP8, older name"
            assert decoder.config.activation_format == ("fp8" if says else "16bit")
    said = " ".join(bench.command("info", str(stored), "--activation-format", "fp8").split())
    assert "activations of prompts are quantised to FP8" in said
    assert "inputs of products in fp8" in said or bench.device == "cpu"


@uses("kv_dtype")
def kv_dtype(bench: Bench) -> None:
    model = TinyModel(
        hidden_size=256, intermediate_size=512, num_layers=4, head_dim=64, dtype=bench.dtype
    )
    scales = {
        f"model.layers.{layer}.self_attn.{half}_scale": np.float32(0.03125)
        for layer in range(4)
        for half in "kv"
    }
    folder = write_checkpoint(bench.folder / "scales", model, random_weights(model) | scales)
    prompt = random_prompt(model, 200)
    limits = {"device": bench.device, "dtype": bench.dtype, "max_seq_len": 512}
    plans = (
        {"attention": "full"},
        {"select_layers": (2,), "token_budget": 32, "sparse_min_context": 0},
        {"scored_layers": (2,), "shadow": "int4", "token_budget": 32, "sparse_min_context": 0},
    )
    bytes_of = {}
    for choice in ("auto", "fp8"):
        for plan in plans:
            with tidaldecode.Decoder(folder, kv_dtype=choice, **limits, **plan) as decoder:
                memory = decoder.memory_plan()
                bytes_of[choice] = memory.kv_bytes / memory.num_pages
                texts = decoder.generate([prompt, prompt[:9]], max_new_tokens=6, ignore_eos=True)
                assert [len(text.token_ids) for text in texts] == [6, 6]
                assert np.isfinite(decoder.step_logits(prompt, prefill=150)).all()
                with decoder.session() as session:
                    session.append(prompt)
                    with session.fork() as fork:
                        assert fork.generate([7], max_new_tokens=4, ignore_eos=True).token_ids
        bench.command("generate", str(bench.model), "Once", "-n", "4", "--kv-dtype", choice)
    assert bytes_of["fp8"] < 0.6 * bytes_of["auto"]
    with tidaldecode.Decoder(folder, kv_dtype="fp8", verify=True, **limits, **plans[1]) as decoder:
        assert decoder.generate(prompt, max_new_tokens=8, ignore_eos=True).token_ids
