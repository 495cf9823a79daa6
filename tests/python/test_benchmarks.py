"""benchmarks/bench_decode.py: the shapes it knows, the bytes it counts, and that it runs. That
bench_verify.py, bench_drafts.py, bench_prefill.py and bench_serve_core.py run. That a widened model
is the small one.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tidaldecode import DecodeConfig, Decoder, PlanConfig, demo_model_dir, plan_memory
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.plans import choose_plan, plan_letters
from tiny_families import FAMILIES
from tiny_models import TinyModel, config_json

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from bench_prefill import model_tflop  # noqa: E402
from kept_report import describe  # noqa: E402
from request_targets import num_words  # noqa: E402
from shapes import NEARLY_EMPTY, SHAPES  # noqa: E402
from step_bytes import (  # noqa: E402
    H200_READ_TB_PER_S,
    StepBytes,
    kv_bytes_per_token,
    loaded_bytes,
    step_bytes,
)
from widen_model import widen  # noqa: E402

GPU = DecodeConfig(dtype="bfloat16", kv_dtype="bfloat16", token_budget=1024)
# Parameters of the published checkpoints.
PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-2-7b": 6_738_415_616,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.3-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_the_model_it_is_called_after(tmp_path: Path, name: str):
    shape = SHAPES[name].for_contexts(max(context for context, _ in SHAPES[name].points))
    folder = read_model_folder(shape.write(tmp_path), "dummy")
    if name in PARAMETERS:
        assert loaded_bytes(folder.model, "bfloat16") == 2 * PARAMETERS[name]
    longest = max(context for context, _ in shape.points)
    assert folder.model.max_position_embeddings >= longest
    plan = choose_plan(PlanConfig(select_layers=shape.select_layers), "auto", folder)
    sees_everything = [not window for window in folder.model.windows]
    assert plan is not None
    assert plan.config.select_layers[0] == sees_everything.index(True, 2)


def test_only_raised_positions_are_noted():
    assert "max_position_embeddings" not in SHAPES["llama-3.1-8b"].for_contexts(131072).notes
    raised = SHAPES["llama-2-7b"].for_contexts(102400)
    assert raised.config["max_position_embeddings"] == 102400
    assert raised.notes["max_position_embeddings"]["real"] == 4096
    assert SHAPES["llama-2-7b"].config["max_position_embeddings"] == 4096


def test_floors_are_those_worked_out_by_hand(tmp_path: Path):
    model = read_model_folder(SHAPES["llama-3.1-8b"].write(tmp_path), "dummy").model
    tidal = plan_letters([0] * 32, PlanConfig(select_layers=(2, 13)))
    assert kv_bytes_per_token(model, "bfloat16") == 131072

    def floor(plan: str, context: int, batch_size: int = 1) -> float:
        return step_bytes(model, GPU, plan, context, batch_size).floor_ms(H200_READ_TB_PER_S)

    assert floor("F" * 32, NEARLY_EMPTY) == pytest.approx(3.23, abs=0.01)
    assert floor("F" * 32, 131072) == pytest.approx(3.23 + 3.69, abs=0.01)
    # 4 of 32 layers read all of it, 28 read 1024 positions.
    assert floor(tidal, 131072) == pytest.approx(3.23 + 3.69 / 8 + 0.025, abs=0.01)
    assert floor(tidal, 1000) == floor("F" * 32, 1000)
    weights = step_bytes(model, GPU, tidal, 32768, 8).weights
    assert weights - step_bytes(model, GPU, tidal, 32768, 1).weights == 7 * 4096 * 2
    assert (
        step_bytes(model, GPU, tidal, 9999, 8).kv == 8 * step_bytes(model, GPU, tidal, 9999, 1).kv
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
def test_weights_are_counted_as_the_engine_loads_them(tmp_path: Path, family: str, tie: bool):
    biased = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    config = config_json(TinyModel(family=family, tie=tie, **biased))
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder = Decoder(
        tmp_path, load_format="dummy", device="cpu", dtype="float16", max_seq_len=64,
        max_batch_size=1,
    )  # fmt: skip
    memory = decoder.memory_plan()
    assert memory.weight_bytes == loaded_bytes(decoder.model, "float16")
    assert memory.kv_bytes == 64 * kv_bytes_per_token(decoder.model, "float16")
    coded = plan_memory(
        tmp_path, load_format="dummy", device="cpu", dtype="float16", lm_head_format="fp8"
    )
    scales = 4 * decoder.model.vocab_size
    assert coded.weight_bytes - scales == loaded_bytes(
        decoder.model, "float16", lm_head_format="fp8"
    )


def test_what_mxfp4_holds_and_reads(tmp_path: Path):
    shape = SHAPES["gpt-oss-20b"]
    model = read_model_folder(shape.write(tmp_path), "dummy").model
    assert loaded_bytes(model, "bfloat16") == pytest.approx(2 * 20_914_757_184, rel=1e-6)
    experts = 24 * 32 * 3 * 2880 * 2880
    in_codes = loaded_bytes(model, "bfloat16", "mxfp4")
    assert in_codes == loaded_bytes(model, "bfloat16") - 2 * experts + experts * 17 // 32

    def read(weight_format: str, batch_size: int) -> StepBytes:
        config = dataclasses.replace(GPU, weight_format=weight_format)
        return step_bytes(model, config, "wF" * 12, 131072, batch_size)

    one = read("auto", 1).weights - read("mxfp4", 1).weights
    assert one == pytest.approx((2 - 17 / 32) * experts / 8)  # 4 of 32 experts
    # 12 layers read everything, 12 a window of 128.
    assert read("mxfp4", 1).kv == 12 * (131072 + 128) * 2 * 8 * 64 * 2


def test_weights_in_mxfp4_are_counted_as_the_engine_loads_them(tmp_path: Path):
    config = config_json(TinyModel(family="gpt_oss"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = plan_memory(
        tmp_path, load_format="dummy", device="cpu", dtype="float16", max_seq_len=64,
        weight_format="mxfp4",
    )  # fmt: skip
    model = read_model_folder(tmp_path, "dummy").model
    assert plan.weight_bytes == loaded_bytes(model, "float16", "mxfp4")


def run_benchmark(*words: object, script: str = "bench_decode.py") -> tuple[dict, str]:
    """Runs it, gives its JSON and what it printed."""
    output = Path(words[-1])
    command = [sys.executable, str(BENCHMARKS / script), *map(str, words[:-1])]
    command += ["--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done.stdout


def test_a_run_on_a_shape(tmp_path: Path):
    report, printed = run_benchmark(
        "--shape", "tiny", "--context", 1200, "--context", 2 * 10**8, "--batch-size", 2,
        "--steps", 3, "--bandwidth", 0.001, tmp_path / "out" / "steps.json",
    )  # fmt: skip
    kinds = [(row["context"], row["batch_size"], row["attention"]) for row in report["rows"]]
    assert kinds == [(NEARLY_EMPTY, 2, "dense"), (1200, 2, "dense"), (1200, 2, "tidal")]
    for row in report["rows"]:
        assert row["ms_per_step"] > 0 and len(row["ms_per_step_all"]) == 3
        assert row["ratio_to_floor"] == pytest.approx(
            row["ms_per_step"] / row["floor_ms"], abs=2e-3
        )
    assert [row["plan"] for row in report["rows"]] == ["FFFFFFFF", "FFFFFFFF", "FFSssSss"]
    assert "200000000 tokens x 2" in report["skipped"][0]
    assert str(tmp_path) not in json.dumps(report)
    assert "1,200" in printed and "tidal" in printed


def test_a_run_on_a_model_folder(tmp_path: Path, demo_model: Path):
    report, _ = run_benchmark(
        demo_model, "--context", 512, "--steps", 3, "--kv-dtype", "fp8", tmp_path / "steps.json"
    )
    assert report["models"][0]["weights"] == "the folder's"
    assert report["models"][0]["kv_dtype"] == "fp8"
    assert [row["attention"] for row in report["rows"]] == ["dense", "dense", "tidal"]
    assert [row["floor_ms"] for row in report["rows"]] == [None] * 3


def test_a_run_of_the_safe_plan(tmp_path: Path):
    report, _ = run_benchmark(
        "--shape", "tiny", "--context", 1200, "--steps", 3, "--safe-plan", "--peers", "none",
        tmp_path / "steps.json",
    )  # fmt: skip
    assert [row["plan"] for row in report["rows"]] == ["FFFFFFFF", "FFFFFFFF", "FFPPPPPP"]


def test_verified_decoding_is_compared_with_dense(tmp_path: Path, demo_model: Path):
    report, printed = run_benchmark(
        demo_model, "--dtype", "float32", "--threads", 1, "--context", 200, "--new-tokens", 12,
        "--prompts", 3, "--tidal-prompts", 1, "--draft-tokens", 3, tmp_path / "verify.json",
        script="bench_verify.py",
    )  # fmt: skip
    results = report["results"]
    assert results["verified beside dense"] == {
        "prompts": 3,
        "identical prompts": 3,
        "tokens": 36,
        "tokens before the first difference": 36,
    }
    assert results["tidal beside dense"]["prompts"] == results["timed prompts"] == 1
    assert results["accepted tokens"] + results["dense passes"] == 3 * 11
    assert set(results["decode ms per token"]) == {"dense", "tidal", "verified"}
    assert str(tmp_path) not in json.dumps(report) and "identical prompts" in printed


def test_drafts_are_counted_by_task(tmp_path: Path, demo_model: Path):
    report, printed = run_benchmark(
        demo_model, "--dtype", "float32", "--context", 300, "--new-tokens", 40, "--prompts", 2,
        "--tasks", "copy", "continue", "--select-layers", 2, 7, "--token-budget", 32,
        tmp_path / "drafts.json", script="bench_drafts.py",
    )  # fmt: skip
    assert set(report["results"]) == {"copy", "continue"}
    for task in report["results"].values():
        assert set(task) == {"tidal", "ngram", "both"}
        for name, counts in task.items():
            assert counts["answers"] == counts["as dense"] == 2
            assert counts["accepted tokens"] <= counts["drafted tokens"]
            assert counts["ngram tokens"] <= counts["drafted tokens"]
            assert (counts["ngram tokens"] == 0) is (name == "tidal")
            assert (counts["sparse steps per token"] == 0) is (name == "ngram")
    assert "copy both" in printed


def test_loading_is_measured(tmp_path: Path):
    report, printed = run_benchmark(
        "--shape", "tiny", "--repeats", 1, "--max-seq-len", 64, tmp_path / "load.json",
        script="bench_load.py",
    )  # fmt: skip
    (run,) = report["results"]["runs"]
    model = read_model_folder(SHAPES["tiny"].write(tmp_path), "dummy").model
    assert run["weight_bytes"] == run["plan"]["weight_bytes"] == loaded_bytes(model, "bfloat16")
    assert run["gb_per_s"] > 0 and run["ready_s"] >= run["weights_s"] > 0
    assert report["results"]["pinned_gb_per_s"] is None
    assert "loading, from the page cache" in printed


def test_bench_prefill_runs(tmp_path: Path):
    output = tmp_path / "prefill.json"
    command = [
        sys.executable, str(BENCHMARKS / "bench_prefill.py"), "--shape", "tiny", "--device", "cpu",
        "--context", "64", "--chunk", "32", "--repeats", "1", "--peers", "none",
        "--format", "16bit", "--format", "w8a8", "--output", str(output),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    rows = json.loads(output.read_text())["rows"]
    assert [row["runner"] for row in rows] == ["tidaldecode, full", "tidaldecode, full, w8a8"]
    for row in rows:
        assert row["prefill_chunk"] == 32 and row["median_of"] == 1 and row["s"] > 0


def test_the_same_requests_go_to_a_decoder_and_to_a_server(tmp_path: Path):
    report, printed = run_benchmark(
        "--shape", "tiny", "--dtype", "float32", "--threads", 1, "--select-layers", 2, 5,
        "--token-budget", 64, "--max-batch-size", 12, "--scenario", "streams", "--scenario",
        "again", "--scenario", "arrivals", "--attention", "tidal", "--streams", 3, "--context", 100,
        "--new-tokens", 20, "--long-context", 300, "--short-context", 20, "--seconds", 0.5,
        tmp_path / "serve.json", script="bench_serve_core.py",
    )  # fmt: skip
    ways = [(row["scenario"], row["through"]) for row in report["rows"]]
    scenarios = ("streams", "again", "arrivals")
    assert ways == [(each, way) for way in ("submit", "http") for each in scenarios]
    for row in report["rows"]:
        if row["scenario"] == "again":
            assert len(row["again_ms"]) == 3 and min(row["again_ms"]) > 0
        else:
            assert row["tokens_per_s"] > 0
            # A reader that has to wait for the processor finds several tokens at once.
            between = row["ms_between_tokens"]
            assert between["max"] >= between["p99"] >= between["p50"] >= 0
        if row["through"] == "http":
            assert row["events"] > 0 and row["client_s"] > 0
    assert report["plan"] == "FFSssSss" and "http / submit" in printed


def test_settings_of_eval_are_described_and_the_models_own_plan_is_one(demo_model: Path):
    folder = read_model_folder(demo_model)
    for name, label in [
        ("dense", "dense"),
        ("tidal", "2 S, K=64, kv_head"),
        ("tidal scored_layers=3 token_budget=32 granularity=layer", "1 P, K=32, layer"),
    ]:
        assert describe(folder, name)[0] == label


def test_tokens_are_counted_by_words():
    def event(text: str) -> bytes:
        return b'data: {"id":"a","choices":[{"index":0,"text":"' + text.encode() + b'","logprobs"'

    counts = [num_words(event(text)) for text in ("", "a", " abcd", " abcd efgh")]
    assert counts == [0, 1, 1, 2]
    assert num_words(b'data: {"choices":[],"usage":{"completion_tokens":5}}') == 0


def test_model_flops_are_those_worked_out_by_hand(tmp_path: Path):
    folder = read_model_folder(SHAPES["llama-3.1-8b"].write(tmp_path), "dummy")
    # 2 x 6.979e9 weights of the layers a token, 4 x 4096 x 32 a visible token, the output layer.
    n = 32768
    by_hand = 2 * 6_979_321_856 * n + 4 * 4096 * 32 * n * (n + 1) // 2 + 2 * 128256 * 4096
    assert model_tflop(folder.model, n) == pytest.approx(by_hand / 1e12)


def test_model_flops_of_experts_are_those_of_a_token(tmp_path: Path):
    model = read_model_folder(SHAPES["glm-4.5-air"].write(tmp_path), "dummy").model
    # q, k, v and o in 46 layers; 8 experts of 128 and the shared one in 45, an MLP in the first.
    attention, mlps = 46 * (12288 + 2 * 1024 + 12288), 3 * (45 * 9 * 1408 + 10944)
    by_hand = 2 * 4096 * (attention + mlps) * 1000 + 4 * 12288 * 46 * 500_500 + 2 * 151552 * 4096
    assert model_tflop(model, 1000) == pytest.approx(by_hand / 1e12)


def test_a_widened_model_is_the_same_function(tmp_path: Path):
    small = demo_model_dir()
    config = json.loads((small / "config.json").read_text())
    shape = SHAPES["llama-3.1-8b"].config | {
        "hidden_size": 2 * config["hidden_size"],
        "intermediate_size": config["intermediate_size"] + 64,
        "num_hidden_layers": config["num_hidden_layers"] + 3,
        "num_attention_heads": 4 * config["num_attention_heads"],
        "num_key_value_heads": 2 * config["num_key_value_heads"],
        "head_dim": 128,
        "vocab_size": config["vocab_size"] + 100,
    }
    widen(small, tmp_path / "wide", shape)
    ids = list(range(200, 500))
    logits = []
    for folder in (small, tmp_path / "wide"):
        options = {"attention": "full", "device": "cpu", "dtype": "float32", "max_seq_len": 512}
        with Decoder(folder, **options) as decoder:
            logits.append(decoder.logits(ids)[0])
    expected, found = logits
    # Queries are rounded to bfloat16 once more.
    bound = 2e-3 * np.abs(expected).max()
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=0, atol=bound)
    assert found[len(expected) :].max() < expected.max()
