"""tidaldecode chat: piped, and typed at a terminal (a pty)."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripted_model import SCRIPT, update_json, write_byte_tokenizer, write_scripted_model
from tidaldecode.cli import app as cli

FAST = ["--device", "cpu", "--num-threads", "1", "--attention", "full"]
DEADLINE_S = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Writes SCRIPT behind every message: its chat template ends in the model's start sign."""
    return str(write_scripted_model(tmp_path_factory.mktemp("scripted")))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with room for long answers; --ignore-eos makes them."""
    folder = tmp_path_factory.mktemp("endless")
    return str(write_scripted_model(folder, max_position_embeddings=2**19))


@pytest.fixture
def pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs chat in this process with text as stdin; returns (exit code, stdout, stderr)."""

    def call(model: str, text: str | bytes, *arguments: str) -> tuple[int, str, str]:
        data = text.encode() if isinstance(text, str) else text
        stdin = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        code = cli.main(["chat", model, *FAST, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# Piped


def test_every_line_is_a_message_and_every_answer_a_line(pipe, model: str):
    assert pipe(model, "hi\n\nand now?\n") == (0, f"{SCRIPT}\n{SCRIPT}\n", "")
    assert pipe(model, "no line break") == (0, f"{SCRIPT}\n", "")
    assert pipe(model, "") == (0, "", "")


def test_the_whole_conversation_is_saved(pipe, model: str, tmp_path: Path):
    file = tmp_path / "talk.json"
    text = f"first \\\nline é\r\n//slash\n/save {file}\n/exit\nnever read\n"
    code, out, err = pipe(model, text, "--system", "be brief")
    assert (code, out, err) == (0, f"{SCRIPT}\n{SCRIPT}\n", f"note: saved to {file}\n")
    answer = {"role": "assistant", "content": SCRIPT}
    assert json.loads(file.read_text(encoding="utf-8")) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first \nline é"},
        answer,
        {"role": "user", "content": "/slash"},
        answer,
    ]
    assert os.listdir(tmp_path) == ["talk.json"]


def test_reset_forgets_all_but_the_system_message(pipe, model: str, tmp_path: Path):
    file = tmp_path / "talk.json"
    code, _, _ = pipe(model, f"hi\n/reset\n/save {file}\n", "--system", "be")
    assert code == 0
    assert json.loads(file.read_text()) == [{"role": "system", "content": "be"}]


def test_settings_reach_the_answer(pipe, model: str):
    assert pipe(model, "hi\n", "--stop", "b") == (0, SCRIPT[: SCRIPT.index("b")] + "\n", "")
    assert pipe(model, "hi\n", "-n", "3") == (0, "aé\n", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/nonsense\n", "'/nonsense': there is no such command; /help"),
        ("/save\n", "/save: got no file name"),
        ("/save /no/such/folder/file\n", "/save: '/no/such/folder/file': No such file"),
        ("/save /\n", "/save: '/': "),
        ("/save ~no-such-user/file\n", "/save: '~no-such-user/file': "),
        ("/save a\0b\n", "/save: 'a\\x00b': "),
        (b"caf\xe9\n", "stdin: line 1 is not UTF-8 (byte 3)"),
        ("x" * 600 + "\n", "/reset starts a new one, --max-seq-len gives it more room"),
    ],
)
def test_an_error_ends_a_pipe_with_one_line_and_code_2(pipe, model: str, text, expected):
    code, out, err = pipe(model, text)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert expected in err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--top-p", "7"], "top_p: got 7"),
        (["--max-new-tokens", "100000"], "max_new_tokens"),
        (["--max-seq-len", "4"], "max_seq_len"),
    ],
)
def test_a_wrong_setting_is_said_before_the_first_message(pipe, model: str, options, expected):
    code, out, err = pipe(model, "", *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err


def test_a_full_context_says_what_to_do(pipe, model: str):
    code, out, err = pipe(model, "hi\n", "--max-seq-len", "16")
    assert code == 0 and SCRIPT.startswith(out.rstrip("\n�"))
    assert err == (
        "note: the context of 16 tokens is full; /reset starts a new conversation, "
        "--max-seq-len gives it more room\n"
    )


def test_no_chat_template_is_said_before_the_first_message(pipe, tmp_path: Path):
    folder = write_scripted_model(tmp_path)
    write_byte_tokenizer(folder, chat_template=None)
    code, out, err = pipe(str(folder), "hi\n")
    assert (code, out) == (2, "")
    assert "has no chat template" in err and "Traceback" not in err


def test_a_failed_save_keeps_the_old_file(pipe, model: str, tmp_path: Path, monkeypatch):
    file = tmp_path / "talk.json"
    file.write_text("old")

    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    code, _, err = pipe(model, f"hi\n/save {file}\n")
    assert code == 2 and "No space left on device" in err
    assert os.listdir(tmp_path) == ["talk.json"] and file.read_text() == "old"


# At a terminal


class Terminal:
    """A chat process at a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._screen, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tidaldecode", "chat", *arguments, *FAST],
            stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its own terminal
            env=os.environ | {"TERM": "dumb", "COLUMNS": "200"},
        )  # fmt: skip
        os.close(inside)
        self.shown = ""  # all that has been read and not yet waited for

    def wait_for(self, pattern: str) -> str:
        """Everything up to where the pattern ends."""
        end = time.monotonic() + DEADLINE_S
        while (match := re.search(pattern, self.shown)) is None:
            left = end - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.shown!r}"
            if select.select([self._screen], [], [], left)[0]:
                try:
                    data = os.read(self._screen, 65536)
                except OSError:  # the other side is closed
                    data = b""
                assert data, f"it ended without {pattern!r}: {self.shown!r}"
                self.shown += data.decode(errors="replace")
        found, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return found

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode(errors="surrogateescape"))

    def interrupt(self) -> None:
        """Types Ctrl-C, a moment later: readline misses one between its prompt and its wait."""
        time.sleep(0.3)
        self.type("\x03")

    def exit_code(self) -> int:
        """Waits for the end."""
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


@pytest.fixture
def terminal():
    """Opens chats; they end with the test."""
    opened: list[Terminal] = []

    def call(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield call
    for one in opened:
        one.close()


def cached(line: str) -> int:
    """Tokens that the line behind an answer calls cached."""
    found = re.search(r"\[(\d+) tokens cached, (\d+) read, (\d+) new, [\d.]+ tokens/s", line)
    assert found, line
    return int(found[1])


def test_turns_reuse_what_is_cached_and_say_so(terminal, model: str):
    chat = terminal(model)
    chat.wait_for(r"plan F+; /help")
    counts = []
    for text in ("hello", "again", "more"):
        chat.wait_for("> ")
        chat.type(f"{text}\n")
        chat.wait_for(re.escape(SCRIPT))
        counts.append(cached(chat.wait_for(r"tokens/s[^\n]*\n")))
    assert counts[0] == 0 and counts[0] < counts[1] < counts[2]
    chat.wait_for("> ")
    chat.type("/help\n")
    chat.wait_for("forget the conversation")
    chat.type("/nonsense\n")
    chat.wait_for("error: '/nonsense': there is no such command")
    chat.wait_for("> ")
    chat.type("caf\udce9\n")  # a byte that is no UTF-8: readline drops it, input() alone does not
    chat.wait_for("error: prompt: got the lone surrogate|tokens/s")
    chat.wait_for("> ")
    chat.type("/exit\n")
    assert chat.exit_code() == 0


def test_ctrl_c_stops_an_answer_and_not_the_program(terminal, endless: str, tmp_path: Path):
    chat = terminal(endless, "--ignore-eos", "-n", "400000")
    chat.wait_for("> ")
    chat.type("hi\n")
    chat.wait_for(re.escape(SCRIPT[:5]))
    chat.interrupt()
    chat.wait_for(r"tokens/s; stopped\]")
    chat.wait_for("> ")
    chat.type("and?\n")
    chat.wait_for(re.escape(SCRIPT[:5]))
    chat.interrupt()
    chat.wait_for(r"tokens/s; stopped\]")
    chat.wait_for("> ")
    chat.type(f"/save {tmp_path / 'talk.json'}\n")
    chat.wait_for("note: saved to")
    messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert all(m["content"].startswith(SCRIPT[:5]) for m in messages[1::2]), "what was said stays"
    chat.wait_for("> ")
    chat.interrupt()
    assert chat.exit_code() == 0
    assert "Traceback" not in chat.shown


def test_ctrl_c_drops_what_is_half_typed(terminal, model: str):
    chat = terminal(model)
    chat.wait_for("> ")
    chat.type("half a line")
    chat.wait_for("half a line")
    chat.interrupt()
    chat.wait_for("> ")
    chat.type("two\\\n")
    chat.wait_for(r"\. ")
    chat.interrupt()
    chat.wait_for("> ")
    chat.type("x\n")
    shown = chat.wait_for(r"tokens/s[^\n]*\n")
    assert "[0 tokens cached, 9 read" in shown  # <s>[user]x>
    chat.wait_for("> ")
    chat.type("\x04")
    assert chat.exit_code() == 0


def test_a_full_context_goes_on_after_reset(terminal, model: str):
    chat = terminal(model, "--max-seq-len", "48")
    chat.wait_for("> ")
    chat.type("x" * 60 + "\n")
    chat.wait_for("error: the conversation has no room left for this")
    chat.wait_for("> ")
    chat.type("a\n")
    chat.wait_for(re.escape(SCRIPT))
    chat.wait_for("> ")
    chat.type("bbbbbbbbbbbb\n")
    chat.wait_for("/reset starts a new")
    chat.wait_for("> ")
    chat.type("/reset\n")
    chat.wait_for("> ")
    chat.type("c\n")
    chat.wait_for(re.escape(SCRIPT))


def test_a_killed_pipe_is_interrupted(endless: str):
    process = subprocess.Popen(
        [sys.executable, "-m", "tidaldecode", "chat", endless, *FAST, "--ignore-eos"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        encoding="utf-8",
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("hi\n" * 10_000)
    process.stdin.flush()
    assert process.stdout.read(5) == SCRIPT[:5]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert err == "error: interrupted\n"


def test_a_template_that_refuses_the_system_role_is_an_error(pipe, tmp_path: Path):
    folder = write_scripted_model(tmp_path)
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}>"
    )
    update_json(folder / "tokenizer_config.json", chat_template=template)
    assert pipe(str(folder), "hi\n") == (0, f"{SCRIPT}\n", "")
    code, out, err = pipe(str(folder), "hi\n", "--system", "x")
    assert (code, out) == (2, "") and "no system" in err
