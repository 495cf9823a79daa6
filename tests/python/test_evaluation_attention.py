"""The numpy side of the evaluation: the reference model, page-wise selection, attention, plots."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantized_models import KINDS, Kind, write_both
from scripted_model import write_scripted_model
from tidaldecode import Decoder, demo_model_dir
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.cli import app as cli
from tidaldecode.errors import InvalidArgument, UnsupportedError
from tidaldecode.evaluation.attention import chosen_positions, measure_attention
from tidaldecode.evaluation.example import Example
from tidaldecode.evaluation.plots import _split_budget
from tidaldecode.evaluation.quest import QuestReplay, chosen_tokens
from tidaldecode.evaluation.reference import ReferenceModel, missing_in_numpy
from tidaldecode.evaluation.report import summarise
from tidaldecode.evaluation.results import Record
from tidaldecode.evaluation.settings import (
    check_names,
    dense_setting,
    quest_setting,
    tidal_setting,
)
from tiny_families import FAMILIES
from tiny_models import TinyModel, random_prompt, write_checkpoint

CPU = {"device": "cpu", "num_threads": 1, "max_seq_len": 128, "max_batch_size": 1}


def attend_densely(model: ReferenceModel):
    def attend(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        grouped = model.weights_of(q, k).reshape(model.config.num_kv_heads, -1, len(k))
        return np.einsum("gqn,ngd->gqd", grouped, v).reshape(q.shape)

    return attend


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_computes_what_the_engine_does(tmp_path: Path, family: str):
    turns = {"partial_rotary_factor": 0.75} if family == "phi3" else {}
    tiny = TinyModel(family=family, rope_extra=turns)
    folder = write_checkpoint(tmp_path, tiny)
    ids = random_prompt(tiny, 100)
    want = Decoder(folder, attention="full", **CPU).step_logits(ids, prefill=97)
    missing = missing_in_numpy(read_model_folder(folder))
    if missing is not None:
        with pytest.raises(UnsupportedError, match=missing):
            ReferenceModel(read_model_folder(folder))
        return
    model = ReferenceModel(read_model_folder(folder))
    cache, logits = model.read(ids[:97], room=3)
    got = [logits, *(model.step(token, cache, attend_densely(model)) for token in ids[97:])]
    assert np.stack(got) == pytest.approx(want, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS[::3], ids=lambda kind: kind.name)
def test_the_reference_decodes_quantised_weights(tmp_path: Path, kind: Kind):
    tiny = TinyModel(hidden_size=128, intermediate_size=384)
    quantised, _ = write_both(tmp_path, tiny, kind)
    ids = random_prompt(tiny, 40)
    want = Decoder(quantised, attention="full", dtype="float32", **CPU).step_logits(ids, prefill=40)
    _, logits = ReferenceModel(read_model_folder(quantised)).read(ids, room=0)
    assert logits == pytest.approx(want[0], rel=1e-3, abs=1e-3)


def test_the_reference_refuses_scaled_positions(tmp_path: Path):
    folder = write_checkpoint(tmp_path, TinyModel(rope="yarn"))
    with pytest.raises(UnsupportedError, match="numpy has no rotary positions of type 'yarn'"):
        ReferenceModel(read_model_folder(folder))


# Page-wise selection


def test_pages_are_ranked_by_the_most_a_key_in_their_bounds_could_give():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(4, 8)), rng.normal(size=(50, 2, 8))
    chosen = chosen_tokens(q, k, token_budget=24, page_size=8)
    for head in range(4):
        pages = [k[i : i + 8, head // 2] for i in range(0, 50, 8)]
        # The larger of the two products, channel by channel.
        bounds = [
            np.maximum(q[head] * page.min(axis=0), q[head] * page.max(axis=0)).sum()
            for page in pages
        ]
        best = {6, *sorted(range(6), key=lambda i: -bounds[i])[:2]}
        assert set(np.flatnonzero(chosen[head]) // 8) == best
        assert chosen[head].sum() == 2 * 8 + 2


def test_a_covering_budget_is_dense_and_a_small_one_is_not(tmp_path: Path):
    tiny = TinyModel(num_layers=4)
    folder = write_checkpoint(tmp_path, tiny)
    ids, more = random_prompt(tiny, 90), random_prompt(tiny, 5, seed=1)
    decoder = Decoder(folder, attention="full", **CPU)
    want = decoder.step_logits([*ids, *more], prefill=90)
    replay = QuestReplay(ReferenceModel(read_model_folder(folder)), ids, room=8)
    for budget, is_dense in ((128, True), (16, False), (128, True)):
        (got,) = replay.step_logits([more], token_budget=budget, page_size=8)
        assert np.allclose(got, want, rtol=1e-3, atol=1e-3) == is_dense
        # Two pages, the newest of them not full yet.
        assert replay.mean_set_size == 0 if is_dense else 8 < replay.mean_set_size < 16
    (tokens,) = replay.greedy(8, eos_token_ids=(), token_budget=128, page_size=8)
    assert tokens == list(decoder.generate(ids, max_new_tokens=8, temperature=0).token_ids)
    (ended,) = replay.greedy(8, eos_token_ids=tokens[:3][-1:], token_budget=128, page_size=8)
    assert ended == tokens[: tokens.index(tokens[2]) + 1]


def test_quest_settings_are_read():
    setting = quest_setting("token_budget=128")
    assert setting.name == "quest token_budget=128 page_size=16" and setting.is_quest
    for text, expected in [
        ("budget=1", "quest: got 'budget=1'"),
        ("token_budget=x", "quest: got 'token_budget=x'"),
        ("token_budget=0", "quest: token_budget: got 0"),
        (f"token_budget={10**22}", "quest: token_budget: got 1"),  # no record could hold it
        ("token_budget=64 token_budget=32", "quest: token_budget is given twice"),
        ("token_budget=8", "quest: got page_size 16"),
    ]:
        with pytest.raises(InvalidArgument, match=expected):
            quest_setting(text)
    with pytest.raises(InvalidArgument, match="quest: 'quest token_budget=64 .* is given twice"):
        check_names([quest_setting(""), quest_setting("token_budget=64")])


# Attention


@pytest.mark.parametrize("granularity", ["kv_head", "head", "layer"])
@pytest.mark.parametrize(("pooling", "top_p_mass"), [("sum", 1.0), ("max", 1.0), ("sum", 0.6)])
def test_sets_are_those_of_the_engine(
    tmp_path: Path, granularity: str, pooling: str, top_p_mass: float
):
    """The first select layer stands behind dense layers, so its weights are the dense ones."""
    tiny = TinyModel(num_layers=3)
    folder = write_checkpoint(tmp_path, tiny)
    plan = {
        "token_budget": 20, "granularity": granularity, "pooling": pooling, "sink_tokens": 2,
        "recent_tokens": 3, "top_p_mass": top_p_mass, "min_token_budget": 8,
    }  # fmt: skip
    decoder = Decoder(folder, select_layers=(1,), sparse_min_context=0, **plan, **CPU)
    ids = random_prompt(tiny, 80)
    (token, _) = decoder.generate(ids, max_new_tokens=2, temperature=0, ignore_eos=True).token_ids
    model = ReferenceModel(read_model_folder(folder))
    cache, _ = model.read(ids, room=1)
    seen = []

    def attend(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        seen.append(model.weights_of(q, k))
        return attend_densely(model)(layer, q, k, v)

    model.step(token, cache, attend)
    chosen = chosen_positions(seen[1], model.config.num_kv_heads, plan)
    sets = decoder.selection()[1]
    for head, row in enumerate(chosen):
        positions = sets[head * len(sets) // len(chosen)]
        assert np.array_equal(np.flatnonzero(row), positions[positions >= 0])


def test_mass_and_overlap_of_a_plan(tmp_path: Path):
    tiny = TinyModel(num_layers=4)
    folder = read_model_folder(write_checkpoint(tmp_path, tiny))
    ids = tuple(random_prompt(tiny, 60))
    example = Example(
        task="t", index=0, context=None, prompt_ids=ids, answers=("x",), rule="any_found",
        max_new_tokens=4,
    )  # fmt: skip
    settings = [
        dense_setting(),
        tidal_setting("select_layers=1 token_budget=8"),
        tidal_setting("select_layers=1 token_budget=64"),
    ]
    report = measure_attention(folder, [example], settings, lambda done, total: None)
    assert report.token_budget == 8 and [m.plan for m in report.masses] == ["FSss"] * 2
    small, whole = (entry.mass for entry in report.masses)
    assert small[:2] == whole[:2] == (None, None)
    assert whole[2:] == pytest.approx((1.0, 1.0)) and 0 < small[2] < 1
    overlap = np.array(report.overlap)
    assert np.allclose(overlap, overlap.T) and np.allclose(np.diag(overlap), 1.0)


# The command


def arguments(out: Path) -> list[str]:
    return [
        "eval", str(demo_model_dir()), "--device", "cpu", "--num-threads", "1", "--out", str(out),
        "--task", "single", "--context", "400", "--limit", "1", "--quest", "token_budget=32",
        "--tidal", "select_layers=2,7 token_budget=32", "--attention",
    ]  # fmt: skip


def test_everything_together_and_drawn(tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main([*arguments(tmp_path), "--plots"]) == 0
    out = capsys.readouterr().out
    assert "quest 1: plan page-wise, token_budget=32 page_size=16" in out
    for name in ("accuracy", "needle", "mass", "overlap"):
        data = (tmp_path / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and f"Plot: {tmp_path / name}.png" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [s["plan"] for s in report["settings"]] == ["FFFFFFFF", "FFSssssS", "page-wise"]
    (entry,) = report["attention"]["masses"]
    assert entry["mass"][2] is None and 0 < entry["mass"][3] <= 1


@pytest.mark.parametrize("option", [["--attention"], ["--quest", "token_budget=32"]])
def test_what_numpy_does_not_have_is_an_error_before_any_work(tmp_path, capsys, option: list[str]):
    model = write_scripted_model(tmp_path / "model", sliding_window=64, model_type="mistral")
    out = tmp_path / "out"
    code = cli.main(["eval", str(model), *arguments(out)[2:-5], "--tidal", "", *option])
    assert code == 2
    assert "the model in numpy has no layers with a window" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("option", ["attention", "plots"])
def test_what_looks_at_prompts_needs_some_before_any_work(tmp_path, capsys, option: str):
    if option == "plots":
        pytest.importorskip("matplotlib")
    (tmp_path / "text.txt").write_text("The sky over the harbour was grey. " * 200)
    text = ["--text", str(tmp_path / "text.txt"), "--context", "400", "--limit", "1"]
    at = ["--device", "cpu", "--out", str(tmp_path / "out"), f"--{option}"]
    assert cli.main(["eval", str(demo_model_dir()), *text, *at]) == 2
    assert f"{option}: got no prompts to look at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_without_a_number_of_positions_are_drawn_at_their_mean_set():
    def split(setting: str) -> tuple[str, float]:
        return _split_budget(replace(summary, setting=setting))

    records = [
        Record(
            key=name, setting=name, plan="F", task="single", index=0, context=9, depth=None,
            score=1.0, output="7", answers=("7",), prompt_tokens=9, output_tokens=1,
            finish_reason="stop", same_tokens=1, kl=0.0, set_size=set_size, seconds=0.1,
        )
        for name, set_size in (("dense", 0.0), ("tidal", 20.5))
    ]  # fmt: skip
    _, summary = summarise(records)
    assert split("tidal") == ("tidal", 20.5)
    assert split("tidal select_layers=1 token_budget=auto") == ("tidal select_layers=1", 20.5)
    assert split("tidal token_budget=64 pooling=max") == ("tidal pooling=max", 64)


def test_plots_without_matplotlib_are_an_error_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([*arguments(tmp_path), "--plots"]) == 2
    error = capsys.readouterr().err
    assert "matplotlib is not installed; pip install 'tidaldecode[plots]'" in error
    assert not (tmp_path / "results.jsonl").exists()
