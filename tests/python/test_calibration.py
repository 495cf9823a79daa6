"""tidaldecode calibrate: its data, its search, its yardstick and the plan it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scripted_model import update_json, write_scripted_model
from tidaldecode import Decoder, demo_model_dir
from tidaldecode.calibration import objective as objective_module
from tidaldecode.calibration import plan_store
from tidaldecode.calibration.data import WORDS, CalibrationData, builtin_text, make_data
from tidaldecode.calibration.objective import Objective, Scores, decoder_options
from tidaldecode.calibration.search import (
    Candidate,
    Point,
    Search,
    choose,
    frontier,
    kv_bytes_per_step,
)
from tidaldecode.checkpoint.fingerprint import model_fingerprint
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.cli import app as cli
from tidaldecode.cli.demo_text import KEY_WORDS
from tidaldecode.errors import InvalidArgument, UnsupportedError
from tidaldecode.evaluation.distributions import divergences
from tidaldecode.evaluation.tasks import make_examples
from tidaldecode.text.tokenizer import Tokenizer

# Data


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(demo_model_dir(), 8192)


def data_of(tokenizer: Tokenizer, **changes) -> CalibrationData:
    values = {
        "description": "a test", "context": 512, "num_windows": 3, "scored_tokens": 16,
        "num_questions": 10, "seed": 0,
    }  # fmt: skip
    return make_data(builtin_text(), tokenizer.encode, **(values | changes))


def test_prompts_are_as_long_as_asked_and_the_same_for_a_seed(tokenizer: Tokenizer):
    data = data_of(tokenizer)
    assert {len(w.prompt_ids) + len(w.scored_ids) for w in data.windows} == {512}
    assert {len(ids) for ids in data.questions} == {512 - 16}
    assert data == data_of(tokenizer) and data.digest == data_of(tokenizer).digest
    other = data_of(tokenizer, seed=1)
    assert set(other.questions).isdisjoint(data.questions) and other.digest != data.digest
    assert other.windows == data.windows


def test_the_evaluation_shares_nothing_with_it(tokenizer: Tokenizer):
    """No key word, and no line of eight words, is in prompts of both."""
    assert set(WORDS).isdisjoint(KEY_WORDS)

    def phrases(prompts: list) -> set[tuple[str, ...]]:
        texts = [tokenizer.decode(ids).split() for ids in prompts]
        return {tuple(words[i : i + 8]) for words in texts for i in range(len(words) - 7)}

    data = data_of(tokenizer, context=1024)
    own = [*data.questions, *(window.prompt_ids for window in data.windows)]
    names = ["single", "multikey", "multivalue", "multiquery", "variables", "keyvalue", "copy"]
    examples = make_examples(names, tokenizer.encode, [1024], per_task=3, seed=0)
    assert phrases(own).isdisjoint(phrases([example.prompt_ids for example in examples]))


def test_the_answer_is_in_the_prompt(tokenizer: Tokenizer):
    for ids in data_of(tokenizer, num_questions=5).questions[:2]:
        text = tokenizer.decode(ids)
        asked = text[text.rindex("hat is the ") + 11 :].split("?")[0]
        assert text.count(asked) >= 2, asked


def test_a_text_without_sentences_or_too_short_is_refused(tokenizer: Tokenizer):
    with pytest.raises(InvalidArgument, match="text: got .* tokens, expected at least"):
        make_data(
            "Short. Text.", tokenizer.encode, description="", context=512, num_windows=1,
            scored_tokens=16, num_questions=1, seed=0,
        )  # fmt: skip
    with pytest.raises(InvalidArgument, match="no two sentences"):
        make_data(
            "word " * 2000, tokenizer.encode, description="", context=512, num_windows=1,
            scored_tokens=16, num_questions=1, seed=0,
        )  # fmt: skip


# Search

MODEL = ModelConfig(
    vocab_size=100, hidden_size=64, intermediate_size=64, num_layers=12, num_q_heads=4,
    num_kv_heads=2, head_dim=16, max_position_embeddings=4096,
)  # fmt: skip


def scores(loss: float) -> Scores:
    return Scores(text_loss=loss, text_kl=loss, answer_kl=0.0, agreement=1.0)


def planted(candidate: Candidate) -> Scores:
    """Least at layers 2, 5 and 9, recents of a quarter, one sink, one set for all heads."""
    loss = sum(min(abs(layer - best) for layer in candidate.select_layers) for best in (2, 5, 9))
    loss += 10.0 / candidate.token_budget
    loss += 0.1 * abs(candidate.recent_share - 0.25) + 0.01 * candidate.sink_tokens
    return scores(loss + 0.1 * (candidate.granularity != "layer"))


def test_the_search_finds_what_is_planted():
    counts: list[int] = []
    search = Search(MODEL, planted, seq_len=1000, value_bytes=4, on_scored=counts.append)
    points = search.run([64, 256], 3)
    best = min(points, key=lambda point: point.scores.loss).candidate
    assert (best.select_layers, best.token_budget) == ((2, 5, 9), 256)
    assert (best.recent_share, best.sink_tokens, best.granularity) == (0.25, 1, "layer")
    assert counts == list(range(1, len(points) + 1)) and len(points) < 400
    assert len({point.candidate for point in points}) == len(points)
    assert max(len(point.candidate.select_layers) for point in points) == 3


def test_a_plan_that_its_answers_rule_out_is_not_scored():
    """The same plans are found, whatever the bound leaves out."""

    def best_at_each_cost(bound) -> tuple[int, set[tuple[int, float]]]:
        search = Search(MODEL, planted, seq_len=1000, value_bytes=4, bound=bound)
        points = search.run([64, 256], 3)
        assert all(bound(point.candidate) <= point.scores.loss for point in points)
        return len(points), {(p.bytes_per_step, p.scores.loss) for p in frontier(points)}

    all_of_them, expected = best_at_each_cost(lambda candidate: 0.0)
    some, same = best_at_each_cost(lambda candidate: 0.8 * planted(candidate).loss)
    few, as_well = best_at_each_cost(lambda candidate: planted(candidate).loss)
    assert few < some < all_of_them and expected == same == as_well


def test_a_model_without_room_for_a_sparse_layer_is_refused():
    search = Search(replace(MODEL, num_layers=2), planted, seq_len=100, value_bytes=4)
    with pytest.raises(UnsupportedError, match="got a model of 2 layers, expected at least 3"):
        search.run([64], 3)


def test_a_step_reads_whole_caches_and_sets():
    candidate = Candidate(select_layers=(2, 5), token_budget=64)  # FFSssSssssss
    row = 2 * 2 * 16 * 4
    assert kv_bytes_per_step(MODEL, candidate, 1000, 4) == row * (4 * 1000 + 8 * 64)
    assert kv_bytes_per_step(MODEL, candidate, 30, 4) == row * 12 * 30
    dense = Candidate(select_layers=(), token_budget=1)
    assert kv_bytes_per_step(MODEL, dense, 1000, 4) == row * 12 * 1000


def test_the_cheapest_plan_that_is_good_enough_is_chosen():
    points = [
        Point(
            candidate=Candidate(select_layers=(2,), token_budget=cost),
            bytes_per_step=cost,
            scores=scores(loss),
        )
        for cost, loss in ((10, 0.5), (20, 0.6), (30, 0.02), (40, 0.01), (30, 0.03))
    ]
    assert [point.bytes_per_step for point in frontier(points)] == [10, 30, 40]
    assert choose(points, 0.03).bytes_per_step == 30
    assert choose(points, 1.0).bytes_per_step == 10
    assert choose(points, 0.001).bytes_per_step == 40


def test_recents_leave_room_for_the_sinks():
    options = Candidate(select_layers=(2,), token_budget=8, recent_share=1.0, sink_tokens=4)
    assert options.options()["recent_tokens"] == 4
    none = Candidate(select_layers=(3,), token_budget=64, recent_share=0.0).options()
    assert (none["recent_tokens"], none["full_layers"]) == (1, 3)


# Yardstick


def test_losses_are_those_of_decode_steps(tokenizer: Tokenizer, tmp_path: Path, monkeypatch):
    data = data_of(tokenizer, num_windows=2, num_questions=5)
    plan = Candidate(select_layers=(2, 7), token_budget=32).options()
    cache = tmp_path / "scores.jsonl"
    with Decoder(demo_model_dir(), **decoder_options(data, 64), device="cpu") as decoder:
        objective = Objective(decoder, data, cache)
        answers = objective.answers(**plan)
        got = objective.scores(**plan)
        whole = objective.scores(**{**plan, "token_budget": 512})
    assert (whole.text_loss, whole.text_kl, whole.answer_kl, whole.agreement) == (0, 0, 0, 1)
    assert (answers.answer_kl, answers.agreement) == (got.answer_kl, got.agreement)
    assert answers.loss == pytest.approx(got.loss - got.text_kl)
    divergent = []
    for window in data.windows:
        ids = [*window.prompt_ids, *window.scored_ids[:-1]]
        rows = [
            Decoder(demo_model_dir(), device="cpu", max_seq_len=512, **options).step_logits(
                ids, prefill=len(window.prompt_ids)
            )
            for options in ({"attention": "full"}, {**plan, "sparse_min_context": 0})
        ]
        divergent.append(divergences(*rows).mean())
    assert got.text_kl == pytest.approx(np.mean(divergent), abs=2e-6) and got.text_kl > 0

    monkeypatch.setattr(objective_module, "_Batch", None)  # nothing is decoded again
    cache.write_bytes(cache.read_bytes() + b'["torn')
    with Decoder(demo_model_dir(), **decoder_options(data, 64), device="cpu") as decoder:
        again = Objective(decoder, data, cache)
        assert again.scores(**plan) == got and again.answers(**plan) == answers


# The command and its plan


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_scripted_model(tmp_path / "model", max_position_embeddings=2048)


@pytest.fixture
def run(model: Path, capsys) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(
            ["calibrate", str(model), "--device", "cpu", "--num-threads", "1", "--context", "1024",
             *arguments]
        )  # fmt: skip
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


SMALL = ("--builtin", "--token-budget", "32")


def test_a_calibration_writes_the_plan_that_decoders_use(run, model: Path):
    code, out, err = run(*SMALL, "--max-loss", "9")
    assert (code, err) == (0, "")
    plan = json.loads((model / "tidal_plan.json").read_text())
    assert plan["fingerprint"] == model_fingerprint(read_model_folder(model))
    assert plan["select_layers"] == [1] and plan["token_budget"] == 32
    assert set(plan["scores"]) == {
        "text_loss", "text_kl", "answer_kl", "agreement", "kv_bytes_per_step",
    }  # fmt: skip
    assert "plan FSs" in out and f"Plan: {model / 'tidal_plan.json'}" in out
    assert max(map(len, out.split("\n")[1:-2])) <= 80
    decoder = Decoder(model, device="cpu", max_seq_len=256)
    assert decoder.plan == "FSs"
    assert decoder.plan_source == "tidal_plan.json, calibrated"
    assert decoder.config.recent_tokens == plan["recent_tokens"]


def test_the_same_seed_gives_the_same_plan(run, model: Path, tmp_path: Path, monkeypatch):
    files = []
    for name in ("first", "second"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache {name}"))
        output = tmp_path / name / "plan.json"
        assert run(*SMALL, "--output", str(output))[0] == 0
        files.append(output.read_bytes())
    assert files[0] == files[1] and not (model / "tidal_plan.json").exists()


def test_a_folder_that_cannot_be_written_leaves_the_plan_in_the_cache(run, model, monkeypatch):
    monkeypatch.setattr(plan_store, "_is_writable", lambda folder: False)
    code, out, _ = run(*SMALL)
    assert code == 0 and not (model / "tidal_plan.json").exists()
    place = Path(out.rstrip("\n").split("Plan: ")[1])
    assert place.is_file() and place.stem == model_fingerprint(read_model_folder(model))
    decoder = Decoder(model, device="cpu", max_seq_len=256)
    assert decoder.plan_source == "tidal_plan.json, calibrated, in the user's cache"
    update_json(model / "config.json", max_position_embeddings=1024)  # another model now
    assert Decoder(model, device="cpu", max_seq_len=256).plan_source == "dense"


def test_a_plan_of_another_model_is_not_used(run, model: Path, caplog):
    assert run(*SMALL)[0] == 0
    update_json(model / "config.json", max_position_embeddings=1024)
    decoder = Decoder(model, device="cpu", max_seq_len=256)
    assert decoder.plan_source == "dense"
    assert "calibrated for the model" in caplog.text and "calibrate again" in caplog.text
    plan = json.loads((model / "tidal_plan.json").read_text())
    del plan["fingerprint"]
    (model / "tidal_plan.json").write_text(json.dumps(plan))
    assert Decoder(model, device="cpu", max_seq_len=256).plan_source == "tidal_plan.json"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "text: got neither, expected --text FILE or --builtin"),
        (["--builtin", "--text", __file__], "text: got both"),
        (["--text", "/no/such"], "text: /no/such: No such file"),
        (["--builtin", "--token-budget", "600"], "token_budget: got 600, expected an integer"),
        (["--builtin", "--max-select-layers", "0"], "max_select_layers: got 0"),
        ([*SMALL, "--output", "/dev/null/x"], "output: /dev/null/x: "),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments: list[str], expected: str):
    code, out, err = run(*arguments)
    last = err.rstrip("\n").split("\n")[-1]
    assert (code, out) == (2, "")
    assert last.startswith("error: ") and expected in last
