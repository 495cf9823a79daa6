"""The parent's side of the process that handles text (worker/): started, asked, ended.

One process for a decoder, asked by one thread at a time. It is ended when a call takes too long,
when the caller is interrupted while it waits, and with its owner; the next call starts another.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidaldecode.errors import InvalidArgument, OutOfMemoryError, UnsupportedError

_HEADER_BYTES = 8
# An answer may be this share of the memory of who gives it: read, it takes a multiple here.
_ANSWER_SHARE = 16
# The clock's limit, in processor times: on a busy machine a process gets only a share.
_CLOCK_FACTOR = 4
_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from worker.server import serve; serve()"


@dataclass(frozen=True)
class Limits:
    """What a call may take before the process is ended."""

    cpu_s: float
    memory_bytes: int  # address space of the whole process


class TextProcessError(Exception):
    """A call that the process did not do: `kind` is "failed", "refused", "memory" or "ended"."""

    def __init__(self, kind: str, message: str) -> None:
        """Takes the kind and a message of one line."""
        super().__init__(message)
        self.kind = kind


@dataclass
class _Running:
    """A process that has been started."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    owner: int  # the process that started it, and may ask it
    load: Limits | None  # limits of the first call while its answer has not been read

    @property
    def is_lost(self) -> bool:
        """True if it has ended, or belongs to the process that this one is a fork of."""
        return self.owner != os.getpid() or self.process.poll() is not None

    def end(self) -> None:
        """Ends it and takes its exit status; in a fork of its owner only lets go of it."""
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        else:
            self.process.returncode = 0  # not this process's child: there is nothing to wait for
        self.socket.close()


class TextProcess:
    """A process that holds a folder's tokenizer; see worker/backend.py for its calls."""

    def __init__(self, arguments: dict[str, Any], limits: Limits) -> None:
        """Starts it and lets it load while the caller goes on.

        Args:
            arguments: of its first call, "load".
            limits: of that call.

        Raises: UnsupportedError, OutOfMemoryError if it cannot be started.
        """
        self._arguments = arguments
        self._limits = limits
        # A fork may happen while another thread holds the lock, so every process has its own.
        self._locks: dict[int, threading.Lock] = {}
        self._held: list[_Running] = []  # at most one
        self._is_closed = False
        weakref.finalize(self, _end_all, self._held)  # at the interpreter's exit too
        with self._lock:
            self._start()

    @property
    def _lock(self) -> threading.Lock:
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def loaded(self) -> Any:
        """What "load" gave; waits for it.

        Raises: TextProcessError.
        """
        with self._lock:
            return self._finish_loading(self._open())

    def call(self, name: str, arguments: dict[str, Any], limits: Limits) -> Any:
        """What a call gives.

        Raises: TextProcessError.
        """
        data = _frame(name, arguments, limits)
        with self._lock:
            running = self._open()
            self._finish_loading(running)
            return self._ask(running, data, limits)

    def close(self) -> None:
        """Ends the process, whatever it does; later calls are errors."""
        self._is_closed = True
        _end_all(self._held)

    def _open(self) -> _Running:
        """The process; another if it has ended since the last call, or if this is a fork."""
        if self._is_closed:
            raise InvalidArgument("text: its decoder is closed; create a new one")
        if self._held and self._held[0].is_lost:
            _end_all(self._held)
        if not self._held:
            self._start()
        if not self._held:
            raise InvalidArgument("text: its decoder was closed meanwhile; create a new one")
        return self._held[0]

    def _start(self) -> None:
        running = _start(self._limits)
        self._held.append(running)
        if self._is_closed:  # meanwhile
            _end_all(self._held)
            return
        self._send(running, _frame("load", self._arguments, self._limits), self._limits)

    def _finish_loading(self, running: _Running) -> Any:
        if running.load is None:
            return None
        value = self._receive(running, running.load)
        running.load = None
        return value

    def _ask(self, running: _Running, data: bytes, limits: Limits) -> Any:
        self._send(running, data, limits)
        return self._receive(running, limits)

    def _send(self, running: _Running, data: bytes, limits: Limits) -> None:
        try:
            running.socket.settimeout(limits.cpu_s * _CLOCK_FACTOR)
            running.socket.sendall(data)
        except OSError as cause:
            raise self._ended(running, limits) from cause
        except BaseException:
            _end_all(self._held)
            raise

    def _receive(self, running: _Running, limits: Limits) -> Any:
        """The answer to what was sent; whatever happens, none is left over for the next call."""
        deadline = time.monotonic() + limits.cpu_s * _CLOCK_FACTOR
        try:
            size = int.from_bytes(_read(running.socket, _HEADER_BYTES, deadline), "little")
            if size > limits.memory_bytes // _ANSWER_SHARE:
                raise TextProcessError("failed", f"gave {size} bytes, far more than a text may")
            answer = json.loads(_read(running.socket, size, deadline))
        except OSError as cause:
            raise self._ended(running, limits) from cause
        except BaseException:
            _end_all(self._held)
            raise
        if "error" not in answer:
            return answer["value"]
        if answer["error"] == "memory" or running.load is not None:
            _end_all(self._held)
        message = answer["message"]
        if answer["error"] == "memory":
            message = f"needs more than the {limits.memory_bytes / 2**30:.1f} GiB it may take"
        raise TextProcessError(answer["error"], message)

    def _ended(self, running: _Running, limits: Limits) -> Exception:
        """Ends a process that has not answered; returns the error that says why."""
        if self._is_closed:
            return InvalidArgument("text: its decoder was closed meanwhile; create a new one")
        process = running.process
        try:
            # After an end of file it is about to end; one that is still at work is not waited for.
            status = process.wait(0.2)
        except subprocess.TimeoutExpired:
            status = None
        _end_all(self._held)
        if status is None or status == -signal.SIGXCPU:
            return TextProcessError("ended", f"still running after {limits.cpu_s:.3g} s")
        if status >= 0:
            return TextProcessError("ended", f"its process ended with exit code {status}")
        return TextProcessError(
            "ended",
            f"its process ended by {signal.Signals(-status).name}: a crash, or more than the "
            f"{limits.memory_bytes / 2**30:.1f} GiB it may take",
        )


def _end_all(held: list[_Running]) -> None:
    while held:
        try:
            running = held.pop()
        except IndexError:  # another thread was quicker
            return
        running.end()


def _frame(name: str, arguments: dict[str, Any], limits: Limits) -> bytes:
    request = {
        "call": name,
        "arguments": arguments,
        "cpu_s": limits.cpu_s,
        "memory_bytes": limits.memory_bytes,
    }
    text = json.dumps(request, ensure_ascii=False, separators=(",", ":"))
    # A folder's path may have bytes that are no UTF-8, which Python keeps as lone surrogates.
    data = text.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(_HEADER_BYTES, "little") + data


def _start(limits: Limits) -> _Running:
    if not sys.executable:
        raise UnsupportedError(
            "text: sys.executable is empty, expected the path of this Python: text is handled in a "
            "process of its own; pass token ids instead"
        )
    ours, theirs = socket.socketpair()
    if ours.fileno() <= 2:  # the program has closed those, and may want them for itself
        number = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, 3)
        ours.close()
        ours = socket.socket(fileno=number)
    paths = [str(Path(__file__).parent), *(os.path.abspath(p) for p in sys.path)]
    try:
        process = subprocess.Popen(
            # Neither the environment nor site-packages' start-up code has a say.
            [sys.executable, "-I", "-S", "-c", _PROGRAM, *paths],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for the parent
        )
    except BaseException as cause:
        ours.close()
        if not isinstance(cause, OSError):
            raise
        kind = OutOfMemoryError if cause.errno == errno.ENOMEM else UnsupportedError
        raise kind(
            f"text: cannot start {sys.executable} for it: {cause.strerror}; text is handled in a "
            "process of its own; pass token ids instead"
        ) from cause
    finally:
        theirs.close()
    return _Running(process, ours, os.getpid(), limits)


def _read(source: socket.socket, num_bytes: int, deadline: float) -> bytearray:
    """Exactly this many bytes.

    Raises: TimeoutError (an OSError) after the deadline; ConnectionError at the end of the file.
    """
    data = bytearray(num_bytes)
    left = memoryview(data)
    while left:
        source.settimeout(max(1e-3, deadline - time.monotonic()))
        count = source.recv_into(left)
        if count == 0:
            raise ConnectionError("end of file")
        left = left[count:]
    return data
