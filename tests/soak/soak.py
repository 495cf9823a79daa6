"""A soak: very many calls of every kind from several threads on one decoder.

    python tests/soak/soak.py [--calls 100000] [--threads 8] [--seed 0] [--shared-streams]

Fails on an answer that is not the one the same call gives alone, on an error without a type of the
package, on memory, files, threads, child processes, pages or rows that do not come back, and on a
run that does not end in time. `make soak` runs it; a short one is in the test suite.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calls import CALLS, VARIANTS, Call, shared_stream

from tidaldecode import CapacityError, Decoder, TidalError, demo_model_dir

# What an allocator keeps, of several threads and with no leak, varies by this much.
MAX_GROWTH_BYTES = 48 * 1024 * 1024
MAX_SHOWN_FAILURES = 10
PROGRESS_CALLS = 2_000
_TASKS = Path("/proc/self/task")
WAYS = ("waiting", "reading", "decoding", "paused")  # that a request may be on


def _resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Resources:
    """What the process and the decoder hold."""

    memory_bytes: int  # resident
    files: int
    threads: int
    children: int  # processes
    free_pages: int
    requests: int  # that have not ended

    @classmethod
    def now(cls, decoder: Decoder) -> Resources:
        """As they are after the garbage is gone."""
        gc.collect()
        core = decoder._open_core()
        children = [(task / "children").read_text().split() for task in _TASKS.iterdir()]
        return cls(
            memory_bytes=_resident_bytes(),
            files=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir(_TASKS)),
            children=sum(map(len, children)),
            free_pages=core.num_free_pages,
            requests=sum(core.stats()[f"num_{at}"] for at in WAYS),
        )

    def leaks_since(self, start: Resources) -> list[str]:
        """What has not come back, in words."""
        leaks = [
            f"{name}: {getattr(start, name)} at the start, {getattr(self, name)} at the end"
            for name in ("files", "threads", "children", "free_pages", "requests")
            if getattr(start, name) != getattr(self, name)
        ]
        growth = self.memory_bytes - start.memory_bytes
        if growth > MAX_GROWTH_BYTES:
            leaks.append(f"memory: grew by {growth / 2**20:.0f} MiB")
        return leaks


@dataclass
class Soak:
    """Calls on a decoder, their known answers, and what came of them."""

    decoder: Decoder
    calls: tuple[Call, ...]
    seed: int
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, outcome)
    failures: list[str] = field(default_factory=list)
    _known: dict[tuple[str, int], Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def learn(self) -> None:
        """Asks every variant of every call alone."""
        for call in self.calls:
            for variant in range(VARIANTS):
                self._known[call.__name__, variant] = call(self.decoder, variant)

    def run(self, num_calls: int, num_threads: int) -> None:
        """Makes calls from several threads; which ones is a matter of the seed alone."""
        numbers = iter(range(num_calls))

        def work() -> None:
            while True:
                with self._lock:
                    number = next(numbers, None)
                if number is None:
                    return
                if number and number % PROGRESS_CALLS == 0:
                    memory = _resident_bytes() / 2**20
                    line = f"{number:,} of {num_calls:,} calls, {memory:.0f} MiB resident"
                    print(line, file=sys.stderr, flush=True)
                draw = random.Random(self.seed * 1_000_003 + number)
                self._call(draw.choice(self.calls), draw.randrange(VARIANTS))

        threads = [threading.Thread(target=work) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # To join is to wait for Python's end of a thread: the system counts it a moment longer.
        deadline = time.monotonic() + 10
        while any((_TASKS / str(thread.native_id)).exists() for thread in threads):
            assert time.monotonic() < deadline, "a thread that was joined is still there"
            time.sleep(0.001)

    def _call(self, call: Call, variant: int) -> None:
        kind, failure = call.__name__, ""
        try:
            answer, known = call(self.decoder, variant), self._known[kind, variant]
            outcome = "as known" if answer == known else "WRONG"
            if answer != known:
                failure = f"{kind}, variant {variant}: got {answer!r:.300}, expected {known!r:.300}"
        except CapacityError:
            outcome = "CapacityError"  # others hold the rows or pages just now
        except BaseException as error:
            outcome = type(error).__name__
            # No call of these should fail but for room: a typed error is a failure too.
            title = "typed" if isinstance(error, TidalError) else "UNTYPED"
            failure = f"{kind}, variant {variant}: {title}: {traceback.format_exc()}"
        with self._lock:
            self.outcomes[kind, outcome] += 1
            if failure:
                self.failures.append(failure)


def report(soak: Soak, start: Resources, end: Resources) -> list[str]:
    """Prints what happened; returns why it is a failure."""
    names = sorted({outcome for _, outcome in soak.outcomes})
    print("kind".ljust(18) + "".join(name.rjust(18) for name in names))
    for call in soak.calls:
        row = [soak.outcomes[call.__name__, name] for name in names]
        print(call.__name__.ljust(18) + "".join(f"{count:,}".rjust(18) for count in row))
    print(f"\nat the start: {start}\nat the end:   {end}")
    silent = [
        f"{call.__name__}: none of its calls was answered"
        for call in soak.calls
        if not soak.outcomes[call.__name__, "as known"]
    ]
    return soak.failures + end.leaks_since(start) + silent


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--deadline", type=float, default=7200, help="seconds for all of it")
    parser.add_argument(
        "--shared-streams", action="store_true", help="streams that several threads read, too"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Runs the soak; returns the exit code."""
    options = parse(arguments)
    # A hang ends with the stacks of all threads and exit code 1.
    faulthandler.enable()
    faulthandler.dump_traceback_later(options.deadline, exit=True)
    # Sparse steps from the first token on, and fewer rows and pages than all threads could hold.
    # What a 16-bit cache rounds depends on the chunks a prompt is read in, hence on the other
    # calls: 6e-4 of the largest logit, and variant 3's first token leads by 0.01 of a logit.
    decoder = Decoder(
        demo_model_dir(), device=options.device, num_threads=1, max_seq_len=256, max_batch_size=6,
        num_pages=48, page_size=16, sparse_min_context=0, token_budget=24,
        kv_dtype="float32" if options.device == "cpu" else "auto",
    )  # fmt: skip
    calls = (*CALLS, shared_stream) if options.shared_streams else CALLS
    with decoder:
        soak = Soak(decoder, calls, options.seed)
        soak.learn()
        # What threads and allocators keep once is there before the first measurement.
        soak.run(max(options.calls // 10, 200), options.threads)
        start = Resources.now(decoder)
        began = time.monotonic()
        soak.run(options.calls, options.threads)
        seconds = time.monotonic() - began
        end = Resources.now(decoder)
        failures = report(soak, start, end)
    faulthandler.cancel_dump_traceback_later()
    for failure in failures[:MAX_SHOWN_FAILURES]:
        print(f"FAILED: {failure}", file=sys.stderr)
    verdict = f"{len(failures)} failures" if failures else "all well"
    print(
        f"{options.calls:,} calls (after {max(options.calls // 10, 200):,} to warm up) from "
        f"{options.threads} threads, seed {options.seed}, {seconds:.0f} s: {verdict}"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
