"""tidaldecode eval: what it runs, keeps, resumes and prints."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from scripted_model import SCRIPT, update_json, write_scripted_model
from tidaldecode import Decoder, demo_model_dir
from tidaldecode.cli import app as cli
from tidaldecode.cli.demo_text import filler_sentence
from tidaldecode.errors import InvalidArgument
from tidaldecode.evaluation import runner
from tidaldecode.evaluation.distributions import token_losses
from tidaldecode.evaluation.perplexity import make_windows
from tidaldecode.evaluation.report import summarise
from tidaldecode.evaluation.results import Record, ResultFile
from tidaldecode.evaluation.settings import tidal_setting

ON_CPU = ["--device", "cpu", "--num-threads", "1"]
PLAN = ["--tidal", "select_layers=1 token_budget=16"]
LENGTH = len(SCRIPT.encode()) + 1  # tokens of an output, the end of text included


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripted")
    return write_scripted_model(folder, max_position_embeddings=2048)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    lines = [
        {"prompt": "one two three four five six >", "answers": ["no", "STOP"]},
        {"prompt": "seven eight nine ten eleven >", "answers": ["seven"]},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@pytest.fixture
def run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs eval in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["eval", str(model), *ON_CPU, "--out", str(tmp_path / "out"), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def records_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().splitlines()]


def test_own_prompts_densely_and_with_a_setting(run, own: Path, tmp_path: Path):
    code, out, err = run("--prompts", str(own), *PLAN)
    assert (code, err) == (0, "")
    assert "plan FFF" in out and "plan FSs, select_layers=1 token_budget=16" in out
    assert out.count("50.0") == 6  # the task, the mean and the worst task, twice
    records = records_in(tmp_path / "out")
    assert [(r["setting"], r["index"], r["score"]) for r in records] == [
        ("dense", 0, 1.0),
        ("tidal select_layers=1 token_budget=16", 0, 1.0),
        ("dense", 1, 0.0),
        ("tidal select_layers=1 token_budget=16", 1, 0.0),
    ]
    assert {r["output"] for r in records} == {SCRIPT}
    assert {(r["same_tokens"], r["finish_reason"]) for r in records} == {(LENGTH, "stop")}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    dense, tidal = report["settings"]
    assert (dense["setting"], dense["mean_score"], dense["worst"]["task"]) == ("dense", 0.5, "own")
    assert tidal["mean_output_tokens"] == tidal["mean_same_tokens"] == LENGTH
    assert tidal["same_outputs"] == 1.0 and tidal["mean_kl"] < 1e-3
    assert (dense["mean_set_size"], tidal["mean_set_size"]) == (0, 16)
    assert report["perplexity"] == []


def test_generated_tasks(run, tmp_path: Path):
    arguments = ["--task", "single", "--task", "copy", "--context", "1024", "--limit", "2", *PLAN]
    code, out, _ = run(*arguments)
    assert code == 0
    assert "single, 1,024 tokens" in out and "worst task" in out
    assert "KL to dense" in out and max(map(len, out.split("\n")[1:-2])) <= 80
    records = records_in(tmp_path / "out")
    assert len(records) == 8
    prompts = [(r["task"], r["index"], r["prompt_tokens"]) for r in records]
    assert prompts[::2] == prompts[1::2]
    assert {r["prompt_tokens"] for r in records} == {1024 - 32, 1024 - 64}


def test_what_is_asked_twice_counts_once(run, trained_text: Path, tmp_path: Path):
    """Else intervals of the answers kept would be of more prompts than there are."""
    once = ["--task", "single", "--context", "1024", "--limit", "2", *PLAN]
    text = ["--text", str(trained_text), "--scored-tokens", "64"]
    code, out, _ = run(*once, *text)
    assert code == 0 and "single, 1,024 tokens" in out
    assert run(*once, *text, "--task", "single", "--context", "1024") == (code, out, "")
    assert json.loads((tmp_path / "out" / "report.json").read_bytes())["asked"] == 2


def test_a_second_run_decodes_nothing_and_says_the_same(run, own: Path, tmp_path, monkeypatch):
    arguments = ["--prompts", str(own), *PLAN]
    first = run(*arguments)
    before = (tmp_path / "out" / "results.jsonl").read_bytes()

    def refuse(*args, **options):
        raise AssertionError("an engine was built")

    monkeypatch.setattr(runner, "Decoder", refuse)
    assert run(*arguments) == first
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_an_interrupted_run_resumes(run, own: Path, tmp_path: Path, monkeypatch):
    arguments = ["--prompts", str(own), *PLAN]
    decode, calls = runner._decode, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(runner, "_decode", interrupted)
    code, _, err = run(*arguments)
    assert code == 130
    assert err == "note: the same command goes on from here\nerror: interrupted\n"
    results = tmp_path / "out" / "results.jsonl"
    with open(results, "ab") as file:
        file.write(b'{"key": "torn')
    assert run(*arguments)[0] == 0
    assert len(calls) == 2 + 1  # the second prompt was asked again
    lines = results.read_bytes().splitlines()
    assert len(lines) == 5 and lines[2] == b'{"key": "torn'


def test_a_changed_model_or_setting_is_decoded_again(tmp_path: Path, own: Path, capsys):
    folder = write_scripted_model(tmp_path / "model", max_position_embeddings=2048)
    arguments = ["eval", str(folder), *ON_CPU, "--out", str(tmp_path), "--prompts", str(own)]
    for expected, extra in ((4, PLAN), (4, PLAN), (6, ["--tidal", "select_layers=2"])):
        assert cli.main([*arguments, *extra]) == 0
        assert len(records_in(tmp_path)) == expected
    update_json(folder / "config.json", max_position_embeddings=1024)
    assert cli.main([*arguments, *PLAN]) == 0
    assert len(records_in(tmp_path)) == 10


def test_a_changed_plan_leaves_the_dense_results(tmp_path: Path, own: Path, capsys):
    folder = write_scripted_model(tmp_path / "model", max_position_embeddings=2048)
    arguments = ["eval", str(folder), *ON_CPU, "--out", str(tmp_path), "--prompts", str(own)]
    for expected, layer in ((4, 1), (6, 2)):
        update_json(folder / "tidal_plan.json", select_layers=[layer], token_budget=16)
        assert cli.main(arguments) == 0
        assert len(records_in(tmp_path)) == expected
    assert "plan FFS" in capsys.readouterr().out


def test_without_a_plan_every_layer_chooses_for_itself(run, own: Path):
    code, out, err = run("--prompts", str(own))
    assert code == 0
    assert "plan FFP" in out
    assert err.startswith("note: there is no plan") and err.count("\n") == 1
    assert err.count("tidaldecode calibrate MODEL_DIR") == 1 and "select_layers=" not in err


def test_a_chat_template_goes_around_the_prompts(run, own: Path, tmp_path: Path):
    """By default, where the folder has one."""
    prompt = "one two three four five six >"
    for chosen, expected in (([], f"[user]{prompt}>"), (["--no-chat"], prompt)):
        assert run("--prompts", str(own), "--limit", "1", *chosen, *PLAN)[0] == 0
        assert records_in(tmp_path / "out")[-1]["prompt_tokens"] == 1 + len(expected)
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["chat"] is (not chosen)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--task", "needle"], "task: got 'needle', expected one of single"),
        (["--context", "64", "--tidal", "select_layers=1"], "context: got room for"),
        (["--limit", "0", "--tidal", "select_layers=1"], "limit: got 0"),
        (["--tidal", "layers=1"], "tidal: got 'layers=1', expected settings such as"),
        (["--tidal", "token_budget=x"], "tidal: token_budget: got 'x', expected an integer"),
        (["--tidal", "select_layers=b"], "select_layers: got 'b'"),
        (["--tidal", "token_budget=1 token_budget=2"], "token_budget is given twice"),
        ([*PLAN, *PLAN], "given twice, expected different settings"),
        (["--prompts", "/no/such", *PLAN], "/no/such: cannot be opened"),
        (["--prompts", "x", "--task", "copy", *PLAN], "prompts: got a file together with"),
        (["--prompts", "x", "--context", "9", *PLAN], "prompts: got a file together with"),
        (["--text", "/no/such", *PLAN], "text: /no/such: No such file"),
        (["--text", __file__, "--context", "200", *PLAN], "context: got 200, expected more than"),
        (["--text", __file__, "--context", "99999", *PLAN], "expected at least 99998"),
        (["--max-new-tokens", "5", *PLAN], "max-new-tokens: got it without --prompts"),
        (["--scored-tokens", "5", *PLAN], "scored-tokens: got it without --text"),
        (["--text", __file__, "--scored-tokens", "0", *PLAN], "scored_tokens: got 0"),
        (["--tidal", "correction_interval=x"], "tidal: correction_interval: got 'x'"),
        (["--out", "/dev/null/x", "--context", "512", "--task", "single", *PLAN], "out: /dev/null"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments: list[str], expected: str):
    code, out, err = run(*arguments)
    last = err.rstrip("\n").split("\n")[-1]
    assert (code, out) == (2, "")
    assert last.startswith("error: ") and expected in last


@pytest.fixture
def trained_text(tmp_path: Path) -> Path:
    """More text than any window, in words the packaged model knows."""
    rng = random.Random(1)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(filler_sentence(rng) for _ in range(120)), encoding="utf-8")
    return path


def test_adaptive_budgets_are_settings_too(run, own: Path, tmp_path: Path):
    setting = "select_layers=1 token_budget=32 top_p_mass=0.6 min_token_budget=4"
    assert run("--prompts", str(own), "--tidal", setting)[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 4 <= report["settings"][1]["mean_set_size"] < 32
    assert "got 'x', expected a number" in run("--tidal", "top_p_mass=x")[2]


def test_perplexity_is_that_of_decode_steps(trained_text: Path, tmp_path: Path, capsys):
    """Against the same windows through a decoder of each plan."""
    plan = {"select_layers": (2, 7), "token_budget": 32, "sparse_min_context": 0}
    arguments = [
        "eval", str(demo_model_dir()), *ON_CPU, "--out", str(tmp_path), "--text", str(trained_text),
        "--context", "600", "--limit", "2", "--tidal", "select_layers=2,7 token_budget=32",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    assert "600 tokens" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"] == []
    dense, tidal = report["perplexity"]
    assert dense["over_dense"] == dense["kl"] == 0 and tidal["kl"] > 0
    assert (dense["set_size"], tidal["set_size"]) == (0, 32)
    for entry, options in ((dense, {"attention": "full"}), (tidal, plan)):
        losses = []
        with Decoder(demo_model_dir(), device="cpu", max_seq_len=600, **options) as decoder:
            for window in make_windows(trained_text.read_text(), decoder.encode, [600], count=2):
                ids = [*window.prompt_ids, *window.scored_ids]
                logits = decoder.step_logits(ids[:-1], prefill=len(window.prompt_ids))
                losses.append(token_losses(logits, window.scored_ids).mean())
        assert entry["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
        assert entry["num_tokens"] == 512
    assert dense["agreement"] == 1.0 and 0.1 < tidal["agreement"] < 1.0
    before = (tmp_path / "losses.jsonl").read_bytes()
    assert cli.main(arguments) == 0
    assert (tmp_path / "losses.jsonl").read_bytes() == before
    # One more setting: that alone is decoded.
    assert cli.main([*arguments, "--tidal", "select_layers=2,7 token_budget=64"]) == 0
    after = (tmp_path / "losses.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == before.count(b"\n") + 2


def test_cache_correction_counts_in_a_setting(trained_text: Path, tmp_path: Path, capsys):
    """After a correction steps see another cache; before the first one nothing differs."""
    plan = "select_layers=2,7 token_budget=32"
    arguments = [
        "eval", str(demo_model_dir()), *ON_CPU, "--out", str(tmp_path), "--text", str(trained_text),
        "--context", "600", "--limit", "1", "--scored-tokens", "40", "--tidal", plan,
        "--tidal", f"{plan} correction_interval=40", "--tidal", f"{plan} correction_interval=1",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    _, plain, late, always = report["perplexity"]
    assert plain["num_tokens"] == 40
    assert (late["perplexity"], late["kl"]) == (plain["perplexity"], plain["kl"])
    assert always["kl"] != plain["kl"]
    options = {"select_layers": (2, 7), "token_budget": 32, "correction_interval": 1}
    with Decoder(
        demo_model_dir(), device="cpu", max_seq_len=600, sparse_min_context=0, **options
    ) as decoder:
        (window,) = make_windows(
            trained_text.read_text(), decoder.encode, [600], count=1, scored_tokens=40
        )
        ids = [*window.prompt_ids, *window.scored_ids]
        logits = decoder.step_logits(ids[:-1], prefill=len(window.prompt_ids))
    want = np.exp(token_losses(logits, window.scored_ids).mean())
    assert always["perplexity"] == pytest.approx(want, rel=1e-4)


def test_windows_predict_no_token_twice():
    text = "".join(chr(97 + i % 26) for i in range(1000))

    def encode(text: str) -> list[int]:
        return [256, *text.encode()]

    windows = make_windows(text, encode, [301, 901], count=4, scored_tokens=100)
    assert [(w.context, w.index) for w in windows] == [(301, i) for i in range(4)] + [
        (901, i) for i in range(2)
    ]
    for window in windows:
        assert len(window.prompt_ids) + len(window.scored_ids) == window.context
        assert window.prompt_ids[0] == 256 and 256 not in window.prompt_ids[1:]
        piece = bytes([*window.prompt_ids[1:], *window.scored_ids]).decode()
        assert piece in text


def test_agreement_with_dense_is_judged_along_the_dense_output(tmp_path: Path, capsys):
    """A budget that loses the answer changes tokens; one that covers everything changes nothing."""
    arguments = [
        "eval", str(demo_model_dir()), *ON_CPU, "--out", str(tmp_path), "--task", "single",
        "--context", "512", "--limit", "2",
        "--tidal", "select_layers=2,7 token_budget=1024",
        "--tidal", "select_layers=2 token_budget=4",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    dense, whole, poor = report["settings"]
    assert dense["same_outputs"] == whole["same_outputs"] == 1.0
    assert whole["mean_kl"] == 0.0 and whole["mean_score"] == dense["mean_score"]
    assert poor["mean_kl"] > 0.01 and poor["mean_same_tokens"] < dense["mean_output_tokens"]


def test_a_setting_is_sparse_at_every_length_unless_told_otherwise():
    assert tidal_setting("").options == {"attention": "tidal", "sparse_min_context": 0}
    setting = tidal_setting("select_layers=2,9  pooling=max sparse_min_context=auto")
    assert setting.name == "tidal select_layers=2,9 pooling=max sparse_min_context=auto"
    assert setting.options == {
        "attention": "tidal", "select_layers": (2, 9), "pooling": "max",
        "sparse_min_context": "auto",
    }  # fmt: skip


def record(task: str, score: float, **changes) -> Record:
    values = {
        "key": f"{task}{score}", "setting": "dense", "plan": "FF", "task": task, "index": 0,
        "context": 512, "depth": None, "score": score, "output": "", "answers": ("x",),
        "prompt_tokens": 500, "output_tokens": 2, "finish_reason": "stop", "same_tokens": 2,
        "kl": 0.0, "set_size": 0.0, "seconds": 0.1,
    }  # fmt: skip
    return Record(**(values | changes))


def test_tasks_count_the_same_whatever_their_number_of_prompts():
    records = [record("a", 1.0), record("a", 1.0), record("a", 0.4), record("b", 0.2)]
    (summary,) = summarise(records)
    assert summary.mean_score == pytest.approx((0.8 + 0.2) / 2)
    assert (summary.worst.task, summary.worst.num_prompts) == ("b", 1)
    assert summary.mean_output_tokens == 2


def test_results_survive_what_is_no_record(tmp_path: Path):
    path = tmp_path / "deep" / "results.jsonl"
    kept = record("a", 1.0, output="é\ud83c")
    with ResultFile(path, Record) as results:
        results.append(record("b", 0.5))
        results.append(kept)
    with open(path, "ab") as file:
        file.write(b'[]\n{"key": 1}\n\xff\n{"ke')
    with ResultFile(path, Record) as results:
        assert set(results.records) == {"a1.0", "b0.5"}
        assert results.records["b0.5"] == record("b", 0.5)
        results.append(record("c", 0.1))
    with ResultFile(path, Record) as results:
        assert set(results.records) == {"a1.0", "b0.5", "c0.1"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("score", 2**32), ("score", -0.1), ("depth", 1.5), ("seconds", -1), ("set_size", -3.0),
     ("output_tokens", -1), ("kl", 1e300)],
)  # fmt: skip
def test_a_record_that_no_run_writes_is_none(tmp_path: Path, name: str, value):
    path = tmp_path / "results.jsonl"
    line = asdict(record("a", 1.0)) | {name: value}
    path.write_text(json.dumps(line) + "\n")
    with ResultFile(path, Record) as results:
        assert not results.records


def test_results_go_nowhere_else_than_a_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="out: .*expected a folder"):
        ResultFile(tmp_path / "file" / "results.jsonl", Record)
