"""The command line's manners: bars and lines of progress, tables that leave nothing out, Ctrl-C."""

from __future__ import annotations

import shlex
import subprocess
import sys
import types
from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from tidaldecode import __main__ as entry
from tidaldecode.cli import terminal
from tidaldecode.cli.terminal import Bars, print_whole, whole_width


def test_a_pipe_gets_a_line_a_minute(capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    bars = Bars(shown=False)
    with bars.counting("Plans") as on_done:
        for done in range(1, 8):
            clock[0] += 30
            on_done(done, 58)
    with bars.reading("Reading") as on_prefill:
        clock[0] += 59
        on_prefill(20_000, 40_000)
        on_prefill(40_000, 40_000)  # nothing is left to wait for
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Plans: 2 of 58, about 28 min left",
        "Plans: 4 of 58, about 27 min left",
        "Plans: 6 of 58, about 26 min left",
        "Reading: 50 %, less than a minute left",
    ]


def test_bars_may_be_inside_another(capsys):
    bars = Bars(shown=True)
    with bars.counting("Plans") as on_done:
        on_done(0, 2)
        for done in (1, 2):
            with bars.reading("Reading") as on_prefill:
                on_prefill(1, 5000)
                on_prefill(5000, 5000)
            on_done(done, 2)
    with bars.reading("Again") as on_prefill:
        on_prefill(1, 5000)
        raise_inside = pytest.raises(KeyboardInterrupt)
        with raise_inside, bars.counting("Inner") as on_done:
            on_done(1, 2)
            raise KeyboardInterrupt
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("width", [1, 8, 20, 80, 200])
def test_a_table_leaves_nothing_out(width: int):
    table = Table(pad_edge=False)
    for index in range(6):
        table.add_column(f"column {index}", no_wrap=True)
    table.add_row(*[f"{100 / 3:.4f}"] * 6)
    console = Console(file=StringIO(), width=width)
    print_whole(console, table)
    text = console.file.getvalue()
    assert "…" not in text and text.count("33.3333") == 6 and "column 5" in text
    assert whole_width(console, table) < 80


def test_ctrl_c_while_importing_is_one_line(monkeypatch, capsys):
    class Interrupting(types.ModuleType):
        def __getattr__(self, name: str):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "tidaldecode.cli.app", Interrupting("app"))
    assert entry.main() == 130
    assert capsys.readouterr() == ("", "error: interrupted\n")


NOTES = """
import logging, sys
from tidaldecode.cli import app
def run(arguments):
    for size in (9, 9000, 9):
        logging.getLogger("tidaldecode").warning("x" * size)
    print("done")
    return 0
app._run = run
sys.exit(app.main([]))
"""


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-", "2> >(true)"])
def test_a_stderr_that_takes_nothing_changes_nothing(stderr: str):
    for arguments, code, said in (
        (["-c", NOTES], 0, "done\n"),
        (["-m", "tidaldecode", "generate", "/no/such", "x"], 2, ""),
    ):
        command = shlex.join([sys.executable, *arguments])
        done = subprocess.run(["bash", "-c", f"{command} {stderr}"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, said)


def test_python_m_has_the_exit_codes_of_the_commands():
    for arguments, code in ((["--version"], 0), (["generate", "/no/such", "x"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "tidaldecode", *arguments], capture_output=True, text=True
        )
        assert done.returncode == code and "Traceback" not in done.stderr
