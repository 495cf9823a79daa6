"""tidaldecode eval: damaged and unwritable files, and tables at every width."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from scripted_model import write_scripted_model
from tidaldecode.cli import app as cli
from tidaldecode.errors import TidalError
from tidaldecode.evaluation import runner
from tidaldecode.evaluation.perplexity import Perplexity, summarise_losses
from tidaldecode.evaluation.report import as_json, summarise
from tidaldecode.evaluation.results import LossRecord, Record, ResultFile
from tidaldecode.evaluation.settings import dense_setting
from tidaldecode.evaluation.view import show_report
from tidaldecode.replay import Replay


def record(key: str = "k", **changes) -> Record:
    values = {
        "key": key, "setting": "dense", "plan": "FF", "task": "single", "index": 0,
        "context": 4096, "depth": 0.5, "score": 1.0, "output": "7", "answers": ("7",),
        "prompt_tokens": 9, "output_tokens": 1, "finish_reason": "stop", "same_tokens": 1,
        "kl": 0.0, "set_size": 0.0, "seconds": 1.0,
    }  # fmt: skip
    return Record(**(values | changes))


DAMAGED = [
    {"score": float("nan")}, {"score": "1"}, {"score": None}, {"score": True}, {"kl": float("inf")},
    {"kl": 10**400}, {"context": 1.5}, {"answers": "7"}, {"answers": [7]}, {"key": 3},
    {"setting": None}, {"more": 1}, {"output_tokens": []},
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED, ids=str)
def test_a_damaged_record_is_passed_over_and_named(tmp_path: Path, caplog, damage: dict):
    path = tmp_path / "results.jsonl"
    with ResultFile(path, Record) as results:
        results.append(record("good"))
    line = json.dumps(dataclasses.asdict(record("bad")) | damage)
    path.write_bytes(path.read_bytes() + line.encode() + b"\n")
    with ResultFile(path, Record) as results:
        assert list(results.records) == ["good"]
        results.append(record("next"))
    assert f"{path}: line 2: no record of this version" in caplog.text
    assert list(ResultFile(path, Record).records) == ["good", "next"]


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"[" * 50_000, b"null", b"\x00" * 8], ids=len)
def test_lines_that_are_no_json(tmp_path: Path, caplog, damage: bytes):
    path = tmp_path / "results.jsonl"
    path.write_bytes(damage + b"\n" + damage + b"\n")
    with ResultFile(path, Record) as results:
        assert results.records == {}
    assert f"{path}: 2 lines from line 1 on" in caplog.text


def test_a_last_line_cut_off_is_no_fault(tmp_path: Path, caplog):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"key": "torn')
    with ResultFile(path, Record) as results:
        results.append(record("next"))
    assert caplog.text == ""
    assert list(ResultFile(path, Record).records) == ["next"]


def test_a_full_disk_costs_no_work(tmp_path: Path, caplog, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with ResultFile(tmp_path / "results.jsonl", Record) as results:
        results.append(record("one"))
        results.append(record("two"))
        assert list(results.records) == ["one", "two"]
    assert caplog.text.count("No space left on device; the run goes on") == 1


def evaluate(folder: Path) -> int:
    """Asks one prompt; what comes of it goes to `folder`/out."""
    model = write_scripted_model(folder / "model", max_position_embeddings=2048)
    own = folder / "own.jsonl"
    own.write_text(json.dumps({"prompt": "one >", "answers": ["STOP"]}))
    return cli.main(
        ["eval", str(model), "--device", "cpu", "--num-threads", "1", "--prompts", str(own),
         "--out", str(folder / "out"), "--tidal", "select_layers=1 token_budget=16"]
    )  # fmt: skip


def test_a_report_that_cannot_be_written_is_printed(tmp_path: Path, capsys):
    (tmp_path / "out" / "report.json").mkdir(parents=True)
    code = evaluate(tmp_path)
    captured = capsys.readouterr()
    assert code == 1 and "100.0" in captured.out and "Report:" not in captured.out
    assert captured.err.endswith("what is printed here was not written\n")
    assert len((tmp_path / "out" / "results.jsonl").read_bytes().splitlines()) == 2


def test_a_report_is_written_where_nobody_reads_what_is_printed(
    tmp_path: Path, capsys, monkeypatch
):
    class Full(StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    assert evaluate(tmp_path) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and "was not written" not in err
    assert json.loads((tmp_path / "out" / "report.json").read_bytes())["asked"] == 1


def test_no_number_of_a_report_is_none(monkeypatch):
    """Losses beyond all measure stay numbers of strict JSON."""
    losses = [
        LossRecord(key=name, setting=name, plan="F", context=9, window=0, num_tokens=1, loss=loss,
                   kl=0.0, agreement=1.0, set_size=0.0, seconds=0.0)
        for name, loss in (("dense", 1.0), ("tidal", 1e14))
    ]  # fmt: skip
    content = as_json({}, summarise([record()]), summarise_losses(losses), None)
    json.dumps(content, allow_nan=False)


def test_logits_that_are_no_numbers_are_an_error(monkeypatch):
    monkeypatch.setattr(Replay, "step_logits", lambda *args, **plan: [np.full((2, 4), np.nan)])
    prompt = runner.Prompt.__new__(runner.Prompt)
    prompt._replay = Replay.__new__(Replay)
    with pytest.raises(TidalError, match="dense: the logits after a prompt hold a NaN"):
        prompt.logits(dense_setting(), [1, 2])


@pytest.mark.parametrize("width", [10, 40, 60, 80, 200])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_no_number_is_cut_off_at_any_width(width: int, count: int):
    names = ["dense", *(f"tidal select_layers=2,{9 + index}" for index in range(count))]
    records = [
        record(f"{name} {task}", setting=name, task=task, kl=0.1234, score=0.875)
        for name in names
        for task in ("single", "a task with a long name")
    ]
    perplexities = [
        Perplexity(
            setting=name, plan="FSs", context=8192, num_tokens=2048, perplexity=1234.567,
            over_dense=0.1, kl=0.25, agreement=0.9, set_size=64.0,
        )
        for name in names
    ]  # fmt: skip
    console = Console(file=StringIO(), width=width)
    show_report(console, summarise(records), perplexities)
    text = console.file.getvalue()
    assert "…" not in text
    assert len(re.findall(r"\b87\.5\b", text)) == 4 * len(names)  # tasks, mean and worst
    assert text.count("1234.567") == len(names) and text.count("0.2500") == count
    if width == 80 and count == 12:  # a row a setting, narrower than the terminal
        assert max(map(len, text.splitlines())) <= 80
