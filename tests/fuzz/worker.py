"""The process that runs cases: one JSON line in, one JSON line out, until it is closed or dies.

Started by supervisor.py as `python worker.py TARGET WORKSPACE`. A crash, a hang or too much memory
is this process's end and not the end of the campaign.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Above what the supervisor allows: the last line of defence for the machine.
_MAX_ADDRESS_SPACE = 16 << 30
FROZEN_SECONDS = 3.0  # no thread may be kept from running for as long
_TICK_SECONDS = 0.02


class Heart:
    """A thread that notices for how long it could not run: somebody held the interpreter."""

    def __init__(self) -> None:
        self._longest = 0.0
        self._last = time.monotonic()
        threading.Thread(target=self._beat, name="heart", daemon=True).start()

    def _beat(self) -> None:
        while True:
            time.sleep(_TICK_SECONDS)
            self._note()

    def _note(self) -> None:
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._last = now

    def longest_pause(self) -> float:
        """Seconds of the longest pause since the last question."""
        pause = max(self._longest, time.monotonic() - self._last)
        self._longest, self._last = 0.0, time.monotonic()
        return pause


def run(target: Any, case: dict[str, Any], workspace: Path, heart: Heart) -> dict[str, Any]:
    """Runs a case and judges it."""
    from judge import Outcome, judge

    heart.longest_pause()
    started, used = time.monotonic(), sum(os.times()[:4])
    error: BaseException | None = None
    try:
        target.run_case(case, workspace)
    except BaseException as cause:  # whatever it is, it is what the case has shown
        error = cause
    seconds, cpu_seconds = time.monotonic() - started, sum(os.times()[:4]) - used
    outcome = judge(error)
    pause = heart.longest_pause()
    # Where the whole machine is slow, the processor time is not: both must agree.
    if not outcome.is_fault and pause > FROZEN_SECONDS and cpu_seconds > FROZEN_SECONDS / 2:
        outcome = Outcome("frozen", "other threads stood still", "", f"{pause:.1f} s")
    del error
    return {**asdict(outcome), "seconds": seconds, "cpu_seconds": cpu_seconds}


def main() -> int:
    """Serves the supervisor until its pipe closes."""
    name, workspace = sys.argv[1], Path(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what cases print goes where their complaints go
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_SPACE, _MAX_ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    target = importlib.import_module(name)
    target.prepare(workspace)
    heart = Heart()
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(target, json.loads(line), workspace, heart)), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
