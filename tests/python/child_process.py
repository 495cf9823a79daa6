"""Running Python code in a process of its own: for what could end or hang the one that tests."""

from __future__ import annotations

import subprocess
import sys
import textwrap

# What every child knows: a decoder of the packaged model, made by `make(...)`.
_PRELUDE = """
import atexit, gc, multiprocessing, os, resource, signal, sys, threading, time, warnings
import tidaldecode
from tidaldecode import Decoder, TidalError
from tidaldecode.errors import InvalidArgument, OutOfMemoryError, UnsupportedError

warnings.simplefilter("ignore", DeprecationWarning)  # of a fork of a process with threads
IDS = list(range(5, 60))

def make(**options):
    options = {"device": "cpu", "max_seq_len": 2048, "num_threads": 2} | options
    return Decoder(tidaldecode.demo_model_dir(), **options)

def in_child(action):
    "Exit code of a forked child that runs `action`: 0, what it says to sys.exit, or its signal."
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        code = 9
        try:
            action()
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def refused(kind, action):
    try:
        action()
    except kind:
        return
    raise AssertionError(f"{action} was not refused")
"""


def run_python(code: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Runs code after the prelude in a new interpreter.

    Raises: subprocess.TimeoutExpired if it hangs.
    """
    return subprocess.run(
        [sys.executable, "-c", _PRELUDE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def check_python(code: str, timeout: float = 180) -> str:
    """Runs code that must end well. Returns: what it printed."""
    done = run_python(code, timeout)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
