"""Faults on purpose, one of every kind: what shows that the search sees them. Used by its tests."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tidaldecode
from hostile_values import CallersError
from judge import Nonsense
from supervisor import Limits
from worker import FROZEN_SECONDS

LIMITS = Limits(seconds=30.0, cpu_seconds=1.0, memory_bytes=300 << 20)
KINDS = (
    "ok", "refused", "usage", "caller", "untyped", "pybind", "nonsense", "crash", "exit", "hang",
    "slow", "frozen", "memory", "panic",
)  # fmt: skip


class _Panic(BaseException):
    """Like the panics of Rust libraries, no Exception."""


def prepare(workspace: Path) -> None:
    """Needs nothing."""


def make_case(rng: random.Random) -> dict[str, Any]:
    """{"kind", "noise": what a smaller case does without}."""
    return {"kind": rng.choice(KINDS), "noise": rng.randrange(1, 100)}


def describe(case: dict[str, Any]) -> str:
    """The case for a reader."""
    return f"{case['kind']} {case['noise']}"


def group(case: dict[str, Any]) -> str:
    """What a fault of this case is filed under."""
    return "planted"


def smaller(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The case without its noise."""
    if case["noise"]:
        yield {**case, "noise": 0}


def run_case(case: dict[str, Any], workspace: Path) -> None:
    """Does what its kind says."""
    kind = case["kind"]
    if kind in _RAISED:
        raise _RAISED[kind]
    if kind == "usage":
        tidaldecode.plan_memory()
    elif kind == "crash":
        ctypes.string_at(0)
    elif kind == "exit":
        os._exit(3)
    elif kind == "hang":
        time.sleep(60)
    elif kind == "slow":
        end = time.process_time() + 1.2
        while time.process_time() < end:
            pass
    elif kind == "frozen":
        _hold_interpreter(2.5 * FROZEN_SECONDS)
    elif kind == "memory":
        kept = bytearray(1 << 30)
        kept[:: 1 << 12] = b"x" * len(range(0, 1 << 30, 1 << 12))
        time.sleep(1)


def _hold_interpreter(seconds: float) -> None:
    """Runs one operation of C for about so long; no other thread runs meanwhile."""
    count = 10**7
    started = time.process_time()
    sum(itertools.repeat(1, count))
    sum(itertools.repeat(1, int(count * seconds / (time.process_time() - started))))


_RAISED: dict[str, BaseException] = {
    "refused": tidaldecode.InvalidArgument("top_k: got -5, expected at least -1"),
    "caller": CallersError("own"),
    "untyped": AttributeError("'int' object has no attribute 'encode'"),
    "pybind": TypeError("logits(): incompatible function arguments. Invoked with: 3"),
    "nonsense": Nonsense("a NaN"),
    "panic": _Panic("index out of bounds"),
}
