"""tidaldecode eval: what it runs, keeps, resumes and prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripted_model import SCRIPT, update_json, write_scripted_model
from tidaldecode import cli
from tidaldecode.errors import InvalidArgument
from tidaldecode.evaluation import runner
from tidaldecode.evaluation.report import summarise
from tidaldecode.evaluation.results import Record, ResultFile
from tidaldecode.evaluation.settings import tidal_setting

ON_CPU = ["--device", "cpu", "--num-threads", "1"]
PLAN = ["--tidal", "select_layers=1 token_budget=16"]


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
        ("dense", 1, 0.0),
        ("tidal select_layers=1 token_budget=16", 0, 1.0),
        ("tidal select_layers=1 token_budget=16", 1, 0.0),
    ]
    assert {r["output"] for r in records} == {SCRIPT}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    dense, tidal = report["settings"]
    assert (dense["setting"], dense["mean_score"], dense["worst"]["task"]) == ("dense", 0.5, "own")
    assert tidal["mean_output_tokens"] == len(SCRIPT.encode()) + 1  # and the end of text


def test_generated_tasks(run, tmp_path: Path):
    arguments = ["--task", "single", "--task", "copy", "--context", "1024", "--limit", "2", *PLAN]
    code, out, _ = run(*arguments)
    assert code == 0
    assert "single, 1,024 tokens" in out and "worst task" in out
    assert max(map(len, out.split("\n")[1:-2])) <= 80
    records = records_in(tmp_path / "out")
    assert len(records) == 8
    prompts = [(r["task"], r["index"], r["prompt_tokens"]) for r in records]
    assert prompts[:4] == prompts[4:]
    assert {r["prompt_tokens"] for r in records} == {1024 - 32, 1024 - 64}


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
        if len(calls) == 3:
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
    assert len(calls) == 3 + 2
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


def test_without_a_plan_dense_runs_alone(run, own: Path):
    code, out, err = run("--prompts", str(own))
    assert code == 0
    assert "tidal" not in out.partition("\n")[2].partition("Report")[0]
    assert err.startswith("note: no tidal run") and err.count("\n") == 1


def test_a_chat_template_goes_around_the_prompts(run, own: Path, tmp_path: Path):
    assert run("--prompts", str(own), "--chat", "--limit", "1", *PLAN)[0] == 0
    record = records_in(tmp_path / "out")[0]
    assert record["prompt_tokens"] == 1 + len("[user]one two three four five six >>")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--task", "needle"], "task: got 'needle', expected one of single"),
        (["--context", "64", "--tidal", "select_layers=1"], "context: got room for"),
        (["--limit", "0", "--tidal", "select_layers=1"], "limit: got 0"),
        (["--tidal", "layers=1"], "tidal: got 'layers=1', expected settings such as"),
        (["--tidal", "token_budget=x"], "tidal: token_budget: got 'x', expected an integer"),
        (["--tidal", "select_layers=b"], "select-layers: got 'b'"),
        (["--tidal", "token_budget=1 token_budget=2"], "token_budget is given twice"),
        ([*PLAN, *PLAN], "given twice, expected different settings"),
        (["--prompts", "/no/such", *PLAN], "/no/such: cannot be opened"),
        (["--prompts", "x", "--task", "copy", *PLAN], "prompts: got a file together with"),
        (["--max-new-tokens", "5", *PLAN], "max-new-tokens: got it without --prompts"),
        (["--out", "/dev/null/x", "--context", "512", "--task", "single", *PLAN], "out: /dev/null"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments: list[str], expected: str):
    code, out, err = run(*arguments)
    last = err.rstrip("\n").split("\n")[-1]
    assert (code, out) == (2, "")
    assert last.startswith("error: ") and expected in last


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
        "prompt_tokens": 500, "output_tokens": 2, "finish_reason": "stop", "seconds": 0.1,
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
    with ResultFile(path) as results:
        results.append(record("b", 0.5))
        results.append(kept)
    with open(path, "ab") as file:
        file.write(b'[]\n{"key": 1}\n\xff\n{"ke')
    with ResultFile(path) as results:
        assert set(results.records) == {"a1.0", "b0.5"}
        assert results.records["b0.5"] == record("b", 0.5)
        results.append(record("c", 0.1))
    with ResultFile(path) as results:
        assert set(results.records) == {"a1.0", "b0.5", "c0.1"}


def test_results_go_nowhere_else_than_a_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="out: .*expected a folder"):
        ResultFile(tmp_path / "file" / "results.jsonl")
