"""The command line: what goes where, in which words, with which exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tidaldecode
from scripted_model import SCRIPT, update_json, write_scripted_model
from tidaldecode.cli import app as cli
from tidaldecode.cli.options import parse_layers
from tidaldecode.errors import InvalidArgument
from tiny_models import TinyModel, write_checkpoint

# One thread: the machine that runs the tests may have other work.
SMALL = ["--device", "cpu", "--num-threads", "1", "--max-seq-len", "64"]
FAST = [*SMALL, "--attention", "full"]
LONG = ["--device", "cpu", "--num-threads", "1", "--attention", "full", "--ignore-eos"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_scripted_model(tmp_path_factory.mktemp("scripted")))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def start(*arguments: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tidaldecode", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, text=True,
        encoding="utf-8", **options,
    )  # fmt: skip


def test_generate_writes_the_text_and_nothing_else(run, model: str):
    assert run("generate", model, ">", *FAST) == (0, SCRIPT + "\n", "")


def test_a_process_of_its_own_does_the_same(model: str):
    process = start("generate", model, "-", *FAST)
    out, err = process.communicate("hello >\n", timeout=60)
    assert (process.returncode, out, err) == (0, SCRIPT + "\n", "")


def test_a_prompt_comes_from_a_file_or_stdin(run, model: str, tmp_path: Path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("see é>\n", encoding="utf-8")
    code, out, _ = run("generate", model, "--prompt-file", str(tmp_path / "prompt.txt"), *FAST)
    assert (code, out) == (0, SCRIPT + "\n")

    class Stdin:
        class buffer:
            @staticmethod
            def read() -> bytes:
                return b"x>"

    monkeypatch.setattr(sys, "stdin", Stdin)
    for arguments in (["-"], ["--prompt-file", "-"]):
        assert run("generate", model, *arguments, *FAST)[:2] == (0, SCRIPT + "\n")


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_one_line_break_at_the_end_of_a_prompt_is_the_editors(
    run, model: str, tmp_path: Path, ending: str
):
    (tmp_path / "prompt.txt").write_bytes(f"see é>{ending}".encode())
    assert run("generate", model, "--prompt-file", str(tmp_path / "prompt.txt"), *FAST)[1] == (
        SCRIPT + "\n"
    )
    (tmp_path / "prompt.txt").write_bytes(f"x>\n{ending}".encode())
    out = run("generate", model, "--prompt-file", str(tmp_path / "prompt.txt"), *FAST)[1]
    assert (out == SCRIPT + "\n") == (ending == "")  # no more than one is left out


def test_options_that_do_not_go_together_are_refused_before_the_model_is_read(run):
    code, _, err = run("generate", "/no/such/model", "x", "--system", "s")
    assert (code, err) == (2, "error: system: got a system message without --chat, expected both\n")


def test_chat_uses_the_template(run, model: str):
    code, out, _ = run("generate", model, "hi", "--chat", "--system", "be", *FAST)
    assert (code, out) == (0, SCRIPT + "\n")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--stop", "b", "--stop", "é"], "a"),
        (["--stop-token-id", "98"], "aé世🎉"),
        (["-n", "1"], "a"),
        (["--max-new-tokens", "3", "--temperature", "0", "--seed", "1"], "aé"),
    ],
)
def test_settings_reach_the_call(run, model: str, options, text):
    assert run("generate", model, ">", *FAST, *options) == (0, text + "\n", "")


@pytest.mark.parametrize(
    "options",
    [
        ["--verify"],
        ["--verify", "--draft-tokens", "3"],
        ["--verify", "--drafts", "both"],
        ["--correction-interval", "2"],
        ["--recent-tokens", "1", "--sparse-min-context", "8"],
        ["--recent-tokens", "auto", "--sparse-min-context", "auto", "--draft-tokens", "auto"],
    ],
    ids=" ".join,
)
def test_settings_of_sparse_decoding_reach_the_decoder(run, model: str, monkeypatch, options):
    seen = {}

    def open_and_look(*arguments, **settings):
        seen.update(settings)
        return tidaldecode.Decoder(*arguments, **settings)

    monkeypatch.setattr(cli, "Decoder", open_and_look)
    # Budget 2: all but the first steps are sparse.
    plan = ["--select-layers", "1", "--full-layers", "1", "--token-budget", "2"]
    assert run("generate", model, "hello >", *SMALL, *plan, *options)[:2] == (0, SCRIPT + "\n")
    assert seen.get("verify") is ("--verify" in options or None)
    assert seen.get("drafts") == ("both" if "both" in options else None)
    has_auto = "auto" in options
    assert seen.get("draft_tokens") == (3 if "3" in options else "auto" if has_auto else None)
    assert seen.get("recent_tokens") == (1 if "1" in options else "auto" if has_auto else None)
    assert seen.get("sparse_min_context") == (8 if "8" in options else "auto" if has_auto else None)
    assert seen.get("correction_interval") == (2 if "2" in options else None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate"], "Missing argument"),
        (["generate", "{model}"], "prompt: got neither"),
        (["generate", "{model}", "x", "--prompt-file", "y"], "prompt: got both"),
        (
            ["generate", "{model}", "--prompt-file", "/no/such"],
            "prompt-file: /no/such: No such file",
        ),
        (["generate", "{model}", "x", "--nonsense"], "nonsense"),
        (["generate", "{model}", "x", "--top-k", "many"], "--top-k"),
        (["generate", "{model}", "x", "--top-p", "7"], "top_p: got 7"),
        (["generate", "{model}", "x", "--system", "s"], "system: got a system message without"),
        (["generate", "{model}", "x", "--device", "gpu"], "device: got 'gpu'"),
        (["generate", "{model}", "x", "--select-layers", "a"], "select-layers: got 'a'"),
        (["generate", "{model}", "x", "--recent-tokens", "a"], "expected an integer or auto"),
        (["generate", "{model}", "x" * 99], "prompt tokens"),
        (["generate", "no/such", "x"], "hf download no/such"),
        (["info", "/no/such"], "no such folder"),
        (["demo", "--context", "16"], "context: got 16"),
        (["demo", "--context", "much"], "--context"),
        (["nonsense"], "nonsense"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(run, model: str, arguments, expected):
    filled = [argument.replace("{model}", model) for argument in arguments]
    if len(filled) > 1 and filled[0] == "generate":
        filled = [*filled[:1], *FAST, *filled[1:]]  # what comes last counts
    code, out, err = run(*filled)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert expected in err


def test_debug_adds_the_traceback(run, model: str):
    code, _, err = run("generate", model, "x", "--top-p", "7", *FAST, "--debug")
    assert code == 2
    assert "Traceback" in err and err.rstrip().split("\n")[-1].startswith("error: top_p")


def test_a_failure_while_running_is_exit_code_1(run, model: str, monkeypatch):
    def fail(*args, **options):
        raise tidaldecode.BackendError("the device is gone")

    monkeypatch.setattr(cli, "Decoder", fail)
    assert run("generate", model, "x") == (1, "", "error: the device is gone\n")

    def surprise(*args, **options):
        raise RuntimeError("a bug\nin two lines")

    monkeypatch.setattr(cli, "Decoder", surprise)
    code, _, err = run("generate", model, "x")
    assert code == 1
    assert err.startswith("error: RuntimeError: a bug in two lines") and "--debug" in err


def test_a_model_without_usable_logits_is_exit_code_1(run, tmp_path: Path):
    folder = write_scripted_model(tmp_path)
    import numpy as np
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][:] = np.nan
    save_file(weights, folder / "model.safetensors")
    code, out, err = run("generate", str(folder), ">", *FAST)
    assert (code, out) == (1, "\n")
    assert err.startswith("error: ") and "NaN" in err


def test_a_dense_fallback_is_noted_in_one_line(run, model: str):
    code, out, err = run("generate", model, ">", *SMALL)
    assert (code, out) == (0, SCRIPT + "\n")
    assert err.startswith("note: ") and err.count("\n") == 1 and "tidaldecode calibrate" in err


def test_ctrl_c_is_exit_code_130(tmp_path: Path):
    folder = write_scripted_model(tmp_path, max_position_embeddings=2**19)
    process = start("generate", str(folder), ">", *LONG, "-n", "500000")
    assert process.stdout is not None and process.stdout.read(5) == SCRIPT[:5]
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert process.returncode == 130
    assert err.strip().split("\n")[-1] == "error: interrupted"
    assert "Traceback" not in err


def test_a_reader_that_goes_away_ends_the_program_quietly(tmp_path: Path):
    folder = write_scripted_model(tmp_path, max_position_embeddings=2**19)
    process = start("generate", str(folder), ">", *LONG, "-n", "500000")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(5) == SCRIPT[:5]
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=30)
    assert (process.returncode, err) == (1, "")


@pytest.mark.parametrize("command", ["generate {model} - {fast}", "chat {model} {fast}", "info"])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_streams_that_a_shell_has_closed_are_empty(model: str, command: str, closed: str):
    filled = command.format(model=model, fast=" ".join(FAST))
    program = f"echo '>' | '{sys.executable}' -m tidaldecode {filled} {closed}"
    done = subprocess.run(["sh", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (closed == "<&-" and "chat" not in command)


def test_output_survives_a_terminal_without_unicode(model: str):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = start("generate", model, ">", *FAST, env=environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == "a???bcd. STOP\n"


def test_info_shows_the_installation(run):
    code, out, _ = run("info")
    assert code == 0
    for text in (tidaldecode.__version__, "Python", "CUDA backend", "cpu", "OpenBLAS"):
        assert text in out
    assert max(map(len, out.split("\n"))) <= 80


def test_info_describes_a_folder_without_loading_it(run, tmp_path: Path):
    folder = write_checkpoint(tmp_path / "qwen", TinyModel(family="qwen3", rope="yarn"))
    update_json(folder / "tidal_plan.json", select_layers=[1, 3], token_budget=99)
    code, out, _ = run("info", str(folder))
    assert code == 0
    for text in ("qwen (qwen3)", "4 query, 2 KV, size 16", "yarn x8", "FSsS, token budget 99",
                 "tokenizer: none", "no token", "float32, 1 file"):  # fmt: skip
        assert text in out
    (folder / "tidal_plan.json").unlink()
    assert "none; run `tidaldecode calibrate MODEL_DIR`" in " ".join(
        run("info", str(folder))[1].split()
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (TinyModel(family="smollm3", num_layers=6), "RoPE base 10000, none in 2 of 6 layers"),
        (TinyModel(family="glm4"), "RoPE base 10000, 8 of 16 dims turn"),
        (TinyModel(family="gemma3_text"), "RoPE base 10000; in a window base 500"),
        (TinyModel(family="gemma2"), "MLP 96; 2 see a window of 24 tokens"),
        (TinyModel(family="qwen3_moe"), "MLP 96; 3 have 6 experts of 64, 2 a token"),
        (TinyModel(family="dots1"), "3 have 6 experts of 64, 2 a token, and one of 128 for all"),
        # 4 layers of 30,848 numbers, the last norm and the output matrix; 4 x 512 x 64 of K and V.
        (TinyModel(), "512 tokens dense 1.1 MB; every layer chooses 1.1 MB, at best 1.0x as fast"),
        # 24 tokens of K and V in each of the 4 layers, which have nothing to choose.
        (TinyModel(family="ministral"), "512 tokens dense 0.6 MB Memory"),
    ],
    ids=lambda value: value.family if isinstance(value, TinyModel) else "",
)
def test_info_says_what_is_special(run, tmp_path: Path, model: TinyModel, expected: str):
    folder = write_checkpoint(tmp_path / "model", model)
    assert expected in " ".join(run("info", str(folder))[1].split())


def test_info_says_once_that_a_plan_is_of_another_model(run, tmp_path: Path):
    folder = write_checkpoint(tmp_path / "model", TinyModel())
    (folder / "tidal_plan.json").write_text('{"select_layers": [2], "fingerprint": "0123"}')
    assert run("info", str(folder))[2].count("calibrated for the model '0123'") == 1


@pytest.mark.parametrize("command", [[], ["generate"], ["info"], ["demo"], ["eval"], ["calibrate"]])
def test_help_explains_every_command(run, command: list[str]):
    code, out, err = run(*command, "--help")
    assert (code, err) == (0, "")
    assert "--help" in out and "Usage" in out


def test_names_with_brackets_are_shown_as_they_are(run, tmp_path: Path):
    """No markup: a folder's name is anybody's."""
    folder = write_scripted_model(tmp_path / "a[b]c")
    assert "a[b]c (llama)" in run("info", str(folder))[1]
    own = tmp_path / "own[bold].jsonl"
    own.write_text('{"prompt": "one >", "answers": ["STOP"]}')
    plan = ["--tidal", "select_layers=1 token_budget=16", "--out", str(tmp_path / "out")]
    at = ["--device", "cpu", "--num-threads", "1", "--prompts", str(own)]
    code, out, _ = run("eval", str(folder), *at, *plan)
    assert code == 0 and "\n own[bold] " in out


def test_help_names_the_engines_defaults(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run("generate", "--help")
    assert "[default: 1024]" in out and "[default: layer]" in out


def test_version(run):
    assert run("--version") == (0, f"tidaldecode {tidaldecode.__version__}\n", "")


def test_layers_are_parsed():
    assert parse_layers("2,13", "select-layers") == (2, 13)
    assert parse_layers(" 2 , 13 ", "select-layers") == (2, 13)
    for bad in ("", "2,", "a", "2;13"):
        with pytest.raises(InvalidArgument, match="select-layers"):
            parse_layers(bad, "select-layers")


def test_help_says_what_no_other_command_has(run, monkeypatch):
    pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")
    monkeypatch.setenv("COLUMNS", "150")
    code, out, _ = run("serve", "--help")
    assert code == 0
    assert "[default: 64]" in next(line for line in out.splitlines() if "--max-batch-size" in line)
    assert "-1" not in out  # the engine's mark for what is automatic
