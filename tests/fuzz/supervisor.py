"""The watching side of a worker: deadlines, memory, and who is to blame when a process dies.

Used by fuzz.py; worker.py is the other end of the pipes.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judge import Outcome

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LOOK_SECONDS = 0.02
_START_SECONDS = 120.0
_CASES_PER_WORKER = 2000  # then a fresh one: what earlier cases left must not add up


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one case may take."""

    seconds: float = 20.0  # then it hangs
    cpu_seconds: float = 10.0  # more is slow
    memory_bytes: int = 1 << 30  # on top of what the worker had


# A stranger's text files may use 10 s of a processor and 2 GiB a call, and not more.
TEXT_LIMITS = Limits(seconds=40.0, cpu_seconds=15.0, memory_bytes=(2 << 30) + (512 << 20))


class Worker:
    """A worker process for one target; a new one takes the place of one that has died."""

    def __init__(self, target: str, limits: Limits) -> None:
        self._target, self._limits = target, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._num_run = 0

    def run(self, case: dict[str, Any]) -> Outcome:
        """Runs one case to its end, or ends it."""
        if self._process is None or self._num_run >= _CASES_PER_WORKER:
            self.close()
            self._start()
        self._num_run += 1
        process = self._process
        assert process is not None and process.stdin is not None
        before = _memory(process.pid)
        try:
            process.stdin.write(json.dumps(case).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._died()
        started = time.monotonic()
        while not self._has_answer(_LOOK_SECONDS):
            if _memory(process.pid) - before > self._limits.memory_bytes:
                return self._ended("memory", f"more than {self._limits.memory_bytes >> 20} MiB")
            if time.monotonic() - started > self._limits.seconds:
                return self._ended("hang", f"still running after {self._limits.seconds:g} s")
        return self._answer()

    def close(self) -> None:
        """Ends the process and what it started, and clears its files away."""
        process, self._process = self._process, None
        if process is None:
            return
        _kill_group(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tidal-fuzz-", ignore_cleanup_errors=True)
        workspace = Path(self._folder.name)
        self._log = (workspace / "stderr.txt").open("w+b")
        environment = {
            **os.environ,
            "XDG_CACHE_HOME": str(workspace / "cache"),
            "HOME": str(workspace / "home"),
            "TMPDIR": str(workspace),
            "TIDAL_LOG": "error",
            "TRANSFORMERS_VERBOSITY": "critical",
            "HF_HUB_OFFLINE": "1",
            "RUST_BACKTRACE": "0",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), self._target, workspace],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,
        )
        self._num_run = 0
        started = time.monotonic()
        while not self._has_answer(0.5):
            if time.monotonic() - started > _START_SECONDS:
                raise RuntimeError(f"{self._target}: the worker does not start")
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"{self._target}: the worker ended while starting: {self._tail()}")

    def _has_answer(self, seconds: float) -> bool:
        assert self._process is not None and self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def _answer(self) -> Outcome:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return self._died()
        reply = json.loads(line)
        cpu_seconds = reply.pop("cpu_seconds")
        reply.pop("seconds")
        outcome = Outcome(**reply)
        if not outcome.is_fault and cpu_seconds > self._limits.cpu_seconds:
            limit = self._limits.cpu_seconds
            return Outcome(
                "slow", f"more than {limit:g} s of a processor", "", f"{cpu_seconds:.1f} s"
            )
        return outcome

    def _died(self) -> Outcome:
        assert self._process is not None
        code = self._process.wait()
        last_words = self._tail()
        self.close()
        what = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return Outcome("crash", what, "", last_words)

    def _ended(self, kind: str, what: str) -> Outcome:
        self.close()
        return Outcome(kind, what)

    def _tail(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 300))
        return " ".join(self._log.read().decode(errors="replace").split())


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the worker's own session: itself, and the processes that the package started in it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()


def _memory(pid: int) -> int:
    """Resident bytes of a process and its children."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return 0
    return resident + sum(_memory(int(child)) for child in children)
