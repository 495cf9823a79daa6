"""tidaldecode calibrate: the command and the plan it keeps."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from scripted_model import update_json, write_scripted_model
from tidaldecode import Decoder
from tidaldecode.calibration import command as calibrate_command
from tidaldecode.calibration import plan_store
from tidaldecode.calibration import run as run_module
from tidaldecode.checkpoint.fingerprint import model_fingerprint
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.cli import app as cli
from tiny_models import TinyModel, write_checkpoint, write_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_scripted_model(tmp_path / "model", max_position_embeddings=2048)


@pytest.fixture
def run(model: Path, capsys) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(
            ["calibrate", str(model), "--device", "cpu", "--num-threads", "1", *arguments]
        )
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def choosing_layers(plan: dict) -> list[int]:
    return sorted(plan.get("select_layers", []) + plan.get("scored_layers", []))


SMALL = ("--context", "1024", "--token-budget", "32")
CANNOT_JUDGE = r"note: this model cannot judge by questions: of 1\d asked, 0 were answered rightly"


def test_a_calibration_writes_the_plan_that_decoders_use(run, model: Path, caplog):
    code, out, err = run(*SMALL, "--max-loss", "9")
    assert code == 0 and re.match(CANNOT_JUDGE, err) and err.count("\n") == 1
    plan = json.loads((model / "tidal_plan.json").read_text())
    assert plan["fingerprint"] == model_fingerprint(read_model_folder(model))
    assert plan["scored_layers"] == [1] and plan["token_budget"] == 32
    assert plan["context"] == [1024] and plan["max_loss"] == 9 and plan["chat"] is True
    assert plan["held_out"] == {"same": 0, "counted": 0}
    assert set(plan["scores"]) == {
        "loss", "text_loss", "text_kl", "answer_kl", "agreement", "set_size", "kv_bytes_per_step",
    }  # fmt: skip
    assert "FPs *" in out and f"Plan: {model / 'tidal_plan.json'}" in out
    assert "Judged at 1,024 tokens: 2 windows of text" in out and "Held-out" not in out
    assert max(map(len, out.split("\n")[1:-2])) <= 80
    decoder = Decoder(model, device="cpu", max_seq_len=256)
    assert decoder.plan == "FPs"
    assert decoder.plan_source == "tidal_plan.json, calibrated"
    assert decoder.config.recent_tokens == plan["recent_tokens"]
    assert "plan FPs calibrated: judged on text alone" in caplog.text
    assert cli.main(["info", str(model)]) == 0


def test_a_plan_that_is_not_good_enough_is_not_kept(run, model: Path, monkeypatch):
    code, out, err = run(*SMALL, "--max-loss", "-1")
    assert code == 3 and "FPs *" in out and "Plan:" not in out
    last = err.rstrip("\n").split("\n")[-1]
    assert last.startswith("note: no plan loses as little as -1 (the best ")
    assert "none was kept" in last and "--keep-anyway" in last and "--token-budget" in last
    assert not (model / "tidal_plan.json").exists()
    assert Decoder(model, device="cpu", max_seq_len=256).plan_source == "dense"
    output = model / "other.json"
    assert run(*SMALL, "--max-loss", "-1", "--output", str(output))[0] == 3 and not output.exists()
    code, out, _ = run(*SMALL, "--max-loss", "-1", "--keep-anyway")
    assert code == 0 and f"Plan: {model / 'tidal_plan.json'}" in out
    assert Decoder(model, device="cpu", max_seq_len=256).plan == "FPs"


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


def test_a_plan_that_can_be_written_nowhere_is_printed(run, model, monkeypatch, tmp_path):
    monkeypatch.setattr(plan_store, "_is_writable", lambda folder: False)
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    code, out, err = run(*SMALL)
    assert code == 2 and "the scores are not kept" in err and "save" in err
    content = json.loads(out[out.index("{") :])
    assert content["scored_layers"] == [1] and content["token_budget"] == 32


def test_a_plan_is_kept_where_nobody_reads_what_is_printed(run, model: Path, monkeypatch):
    class Full(StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    code, _, err = run(*SMALL)
    assert code == 1 and "No space left on device" in err
    assert json.loads((model / "tidal_plan.json").read_bytes())["token_budget"] == 32


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


def test_contexts_are_a_short_and_a_long_one_by_default(model: Path):
    folder = read_model_folder(model)
    assert calibrate_command._contexts(None, folder, "cpu") == (512, 2048)
    longer = replace(folder, model=replace(folder.model, max_position_embeddings=131072))
    assert calibrate_command._contexts(None, longer, "cpu") == (1024, 4096)
    assert calibrate_command._contexts([800, 300, 800], folder, "cpu") == (300, 800)


def test_too_little_memory_advises_a_shorter_context(run, model: Path, monkeypatch):
    monkeypatch.setattr(run_module.Job, "page_size", 65536)
    options = run_module.Job.decoder_options
    monkeypatch.setattr(
        run_module.Job, "decoder_options", lambda job: options(job) | {"num_pages": 2**31 - 1}
    )
    code, out, err = run(*SMALL)
    assert (code, out) == (1, "")
    assert "need " in err and "give a shorter --context, or free memory" in err
    assert "num_pages to" not in err and "gpu_memory_utilization to" not in err


def test_the_demo_answers_held_out_questions(demo_model: Path, tmp_path: Path, capsys):
    """The whole way of a model that can judge, at the size of a test."""
    folder = tmp_path / "demo"
    shutil.copytree(demo_model, folder)
    (folder / "tidal_plan.json").unlink()
    code = cli.main(
        ["calibrate", str(folder), "--device", "cpu", "--num-threads", "1", "--context", "300",
         "--token-budget", "64", "--max-choosing-layers", "2", "--max-loss", "0.5"]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0 and "note:" not in captured.err
    plan = json.loads((folder / "tidal_plan.json").read_text())
    held_out = plan["held_out"]
    assert held_out["counted"] >= 24 and held_out["same"] >= 0.8 * held_out["counted"]
    shown = f"Held-out questions: {held_out['same']} of {held_out['counted']} that dense answers"
    assert (
        shown in captured.out
        and "95 % interval" in captured.out
        and "through the chat template" in " ".join(captured.out.split())
    )
    assert plan["scores"]["agreement"] >= 0.5 and len(choosing_layers(plan)) <= 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--builtin", "--text", __file__], "text: got both"),
        (["--text", "/no/such"], "text: /no/such: No such file"),
        ([*SMALL, "--token-budget", "600"], "token_budget: got 600, expected an integer"),
        (["--max-choosing-layers", "0"], "max_choosing_layers: got 0"),
        (["--max-loss", "nan"], "max-loss: got nan, expected a number of nats"),
        ([*SMALL, "--output", "/dev/null/x"], "output: /dev/null/x: "),
        (
            [*SMALL, "--output", "/dev/null"],
            "output: /dev/null: not a regular file",
        ),
        (["--context", "4096"], "context: got 4096, expected an integer from 1 to 2048"),
        (["--context", "60"], "context: got "),
        (["--kv-dtype", "int3"], "kv_dtype: got 'int3', expected one of"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments: list[str], expected: str):
    code, out, err = run(*arguments)
    last = err.rstrip("\n").split("\n")[-1]
    assert (code, out) == (2, "")
    assert last.startswith("error: ") and expected in last


def test_no_chat_is_plain_text(run, model: Path):
    assert run(*SMALL, "--no-chat", "--max-loss", "9")[0] == 0
    assert json.loads((model / "tidal_plan.json").read_text())["chat"] is False
    update_json(model / "tokenizer_config.json", chat_template=None)
    code, _, err = run(*SMALL, "--chat")
    assert code == 2 and "chat template" in err


def test_a_model_of_windows_alone_is_refused_before_anybody_waits(tmp_path: Path, capsys):
    model = TinyModel(family="ministral", max_position_embeddings=2048)
    folder = write_tokenizer(write_checkpoint(tmp_path / "model", model), model.vocab_size)
    assert cli.main(["calibrate", str(folder), "--device", "cpu", *SMALL]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: calibrate: got a model with 0 layers without a window behind")


def test_of_a_model_with_windows_the_other_layers_choose(tmp_path: Path, capsys):
    model = TinyModel(family="gemma3_text", num_layers=9, max_position_embeddings=2048)
    folder = write_tokenizer(write_checkpoint(tmp_path / "model", model), model.vocab_size)
    options = ("--context", "256", "--token-budget", "32", "--max-loss", "9")
    assert cli.main(["calibrate", str(folder), "--device", "cpu", *options]) == 0
    plan = json.loads((folder / "tidal_plan.json").read_text())
    assert set(choosing_layers(plan)) < {2, 5, 8}
    printed = capsys.readouterr().out
    assert "w a window of the model's" in printed and "Plan:" in printed
    assert Decoder(folder, device="cpu", max_seq_len=256).plan.count("w") == 6
