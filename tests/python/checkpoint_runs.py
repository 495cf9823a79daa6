"""Runs of feature_runs.py for the kinds of folders that are read."""

from __future__ import annotations

import numpy as np

import tidaldecode
from feature_runs import Bench, uses
from quantized_models import KINDS, write_both
from tiny_models import TinyModel, random_prompt, write_checkpoint


@uses("quantised checkpoints")
def quantised_checkpoints(bench: Bench) -> None:
    model = TinyModel(
        hidden_size=128, intermediate_size=256, num_layers=2, num_q_heads=2, num_kv_heads=1,
        head_dim=64, dtype=bench.dtype,
    )  # fmt: skip
    prompt = random_prompt(model, 40)
    limits = {"device": bench.device, "dtype": bench.dtype, "max_seq_len": 64, "num_threads": 1}
    for index, kind in enumerate(KINDS):
        stored, meant = write_both(bench.folder / str(index), model, kind)
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
    assert "int4 are kept so" in " ".join(bench.command("info", str(stored)).split())


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
