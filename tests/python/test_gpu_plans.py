"""Plans on the GPU: the commands calibrate and eval, and replays of any plan: `pytest -m gpu`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from test_gpu import pytestmark as on_gpu
from tidaldecode import Decoder
from tidaldecode.cli import app as cli
from tidaldecode.evaluation.distributions import divergences

pytestmark = [*on_gpu, pytest.mark.parametrize("dtype", ["bfloat16", "float16"])]

PROMPTS = [list(range(100, 700)), list(range(300, 600))]
PLAN = {"select_layers": (2, 7), "token_budget": 64, "sparse_min_context": 0}


@pytest.fixture
def bare_demo(demo_model: Path, tmp_path: Path) -> Path:
    """The demo model without its plan."""
    folder = tmp_path / "demo"
    shutil.copytree(demo_model, folder)
    (folder / "tidal_plan.json").unlink()
    return folder


def test_calibrate(bare_demo: Path, capsys, dtype: str):
    code = cli.main(
        ["calibrate", str(bare_demo), "--device", "cuda", "--dtype", dtype, "--context", "512",
         "--context", "1024", "--token-budget", "64", "--max-loss", "0.5"]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0 and "note:" not in captured.err and "error:" not in captured.err
    plan = json.loads((bare_demo / "tidal_plan.json").read_text())
    assert plan["held_out"]["counted"] >= 24
    assert plan["held_out"]["same"] >= 0.8 * plan["held_out"]["counted"]
    with Decoder(bare_demo, device="cuda", dtype=dtype, max_seq_len=512) as decoder:
        assert decoder.plan_source == "tidal_plan.json, calibrated"
        for kind in ("select_layers", "scored_layers"):
            assert getattr(decoder.config, kind) == (tuple(plan.get(kind, ())) or None)


def test_eval(demo_model: Path, tmp_path: Path, capsys, dtype: str):
    (tmp_path / "book.txt").write_text((demo_model / "README.md").read_text() * 4)
    code = cli.main(
        ["eval", str(demo_model), "--device", "cuda", "--dtype", dtype, "--task", "single",
         "--context", "1024", "--limit", "5", "--out", str(tmp_path / "out"), "--tidal", "",
         "--tidal", "token_budget=128 granularity=layer recent_tokens=auto",
         "--text", str(tmp_path / "book.txt"), "--scored-tokens", "64"]
    )  # fmt: skip
    assert code == 0 and "error:" not in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    dense, *tidal = report["settings"]
    assert dense["mean_score"] >= 0.8
    for entry in tidal:
        assert entry["mean_score"] >= dense["mean_score"] - 0.4 and entry["mean_kl"] < 1.0
    for entry in report["perplexity"]:
        assert np.isfinite(entry["perplexity"]) and entry["kl"] < 1.0


def test_a_replay_decodes_as_a_decoder_of_each_plan(demo_model: Path, dtype: str):
    """Steps of a replay are recorded as a decoder's are; other rows make them equal to rounding."""
    options = {"device": "cuda", "dtype": dtype, "max_seq_len": 1024, "max_batch_size": 2}
    answer = list(range(700, 716))
    with Decoder(demo_model, attention="full", **options) as decoder:
        with decoder.replay(PROMPTS, max_new_tokens=32) as replay:
            for plan in (PLAN, PLAN | {"granularity": "kv_head"}, {"attention": "full"}):
                got = replay.step_logits([answer, answer], **plan)
                assert replay.greedy(8, **plan) == replay.greedy(8, **plan)
                with Decoder(demo_model, **options, **plan) as other:
                    for prompt, rows in zip(PROMPTS, got, strict=True):
                        want = other.step_logits([*prompt, *answer], prefill=len(prompt))
                        # One position at the edge of a set may differ by rounding.
                        assert np.median(divergences(want, rows)) < 1e-2
