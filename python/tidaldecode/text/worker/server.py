"""The text process: reads requests, answers them, and keeps to the limits that each carries.

Started by text_process.py, one for each decoder: what a folder's tokenizer or template does to it
(endless loops, gigabytes, panics) ends this process and no other. Requests and answers are frames
on descriptor 0, a socket: 8 bytes of length, then JSON.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import sys
import time
from typing import Any

from .backend import Backend
from .errors import TextError

_SOCKET = 0
_HEADER_BYTES = 8
# The end of the parent is an end of file, unless a fork of the parent still holds the socket.
_PARENT_CHECK_MS = 10_000


def serve() -> None:
    """Answers requests until the parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    parent = os.getppid()
    backend: Backend | None = None
    while (data := _read_frame(parent)) is not None:
        try:
            request = json.loads(data)
            _limit(request["cpu_s"], request["memory_bytes"])
            arguments = request["arguments"]
            if request["call"] == "load":
                backend = Backend(**arguments)
                answer: dict[str, Any] = {"value": backend.describe()}
            else:
                answer = {"value": getattr(backend, request["call"])(**arguments)}
        except BaseException as cause:  # panics of the Rust library are no Exception
            answer = _failure(cause)
        _write_frame(answer)


def _failure(cause: BaseException) -> dict[str, str]:
    kind = cause.kind if isinstance(cause, TextError) else "failed"
    if isinstance(cause, MemoryError):
        kind = "memory"
    reason = " ".join(str(cause).split())
    return {"error": kind, "message": (reason or type(cause).__name__)[:1000]}


def _limit(cpu_s: float, memory_bytes: int) -> None:
    """Sets what the process may use until the next request: the kernel ends it beyond that."""
    used = time.process_time()
    for kind, most in (
        (resource.RLIMIT_CPU, math.ceil(used + cpu_s)),
        (resource.RLIMIT_AS, memory_bytes),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(
            kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
        )


def _read_frame(parent: int) -> bytes | None:
    poll = select.poll()
    poll.register(_SOCKET, select.POLLIN)
    while not poll.poll(_PARENT_CHECK_MS):
        if os.getppid() != parent:
            return None
    header = _read(_HEADER_BYTES)
    return None if header is None else _read(int.from_bytes(header, "little"))


def _read(num_bytes: int) -> bytes | None:
    data = bytearray()
    while len(data) < num_bytes:
        piece = os.read(_SOCKET, min(num_bytes - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _write_frame(answer: dict[str, Any]) -> None:
    try:
        data = json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        data = json.dumps({"error": "failed", "message": "gave a lone surrogate"}).encode()
    left = memoryview(len(data).to_bytes(_HEADER_BYTES, "little") + data)
    try:
        while left:
            left = left[os.write(_SOCKET, left) :]
    except OSError:  # nobody wants the answer any more
        sys.exit(0)
