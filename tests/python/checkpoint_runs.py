"""Runs of feature_runs.py for the kinds of folders that are read."""

from __future__ import annotations

import numpy as np

import tidaldecode
from feature_runs import Bench, uses
from quantized_models import KINDS, write_both
from tiny_models import TinyModel, random_prompt


@uses("quantised checkpoints")
def quantised_checkpoints(bench: Bench) -> None:
    model = TinyModel(
        hidden_size=128, intermediate_size=256, num_layers=2, num_q_heads=2, num_kv_heads=1,
        head_dim=64, dtype=bench.dtype,
    )  # fmt: skip
    prompt = random_prompt(model, 40)
    limits = {"device": bench.device, "dtype": bench.dtype, "max_seq_len": 64, "num_threads": 1}
    for index, kind in enumerate(KINDS):
        folders = write_both(bench.folder / str(index), model, kind)
        results = []
        for folder in folders:
            with tidaldecode.Decoder(folder, max_batch_size=1, **limits) as decoder:
                logits = decoder.logits(prompt, last=len(prompt))
                text = decoder.generate(prompt, max_new_tokens=8, ignore_eos=True, temperature=0)
                results.append((logits, text.token_ids))
        assert np.isfinite(results[0][0]).all(), kind.name
        assert np.array_equal(results[0][0], results[1][0]), kind.name
        assert results[0][1] == results[1][1], kind.name
    assert "decoded to" in bench.command("info", str(folders[0]))
