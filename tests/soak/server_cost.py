"""What the server's front end costs: processor time per streamed event, and per step handed over.

    python tests/soak/server_cost.py [--rows 64] [--tokens 400] [--rounds 3]

The engine is the packaged demo model on one thread; what it takes is measured apart, by its own
clock, and taken off. Streams come from a process of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time

from tidaldecode import Decoder, demo_model_dir
from tidaldecode.server.feed import Feed
from tidaldecode.server.run import Run
from tidaldecode.server.settings import ServeConfig

CLIENT = """
import asyncio, sys, json
async def one(host, port, body):
    reader, writer = await asyncio.open_connection(host, port, limit=2**24)
    head = b"POST /v1/chat/completions HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n"
    head += b"content-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n"
    writer.write(head % len(body) + body)
    data = await reader.read(-1)
    writer.close()
    return data.count(b"data: ")
async def main():
    host, port, rows, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "stream": True,
                       "max_tokens": tokens, "ignore_eos": True}).encode()
    print(sum(await asyncio.gather(*[one(host, port, body) for _ in range(rows)])))
asyncio.run(main())
"""


def thread_seconds() -> float:
    """Processor time of the calling thread."""
    return time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)


class TimedInbox:
    """A feed's inbox, and the processor time that taking out of it has cost."""

    def __init__(self, feed: Feed) -> None:
        self.take_s = 0.0
        self.num_takes = 0
        self.add, self.remove, self.close = (
            feed._inbox.add, feed._inbox.remove, feed._inbox.close
        )  # fmt: skip
        self._take = feed._inbox.take
        feed._inbox = self  # type: ignore[assignment]

    def take(self) -> list[tuple[int, list[int], bool]]:
        """As the inbox's."""
        began = thread_seconds()
        letters = self._take()
        self.take_s += thread_seconds() - began
        self.num_takes += 1
        return letters


def measure(run: Run, options: argparse.Namespace, inbox: TimedInbox) -> dict[str, float]:
    """One round: all rows at once."""
    host, port = run.socket.getsockname()[:2]
    seconds: list[float] = []

    def now() -> float:
        seen = threading.Event()

        def look() -> None:
            seconds.append(thread_seconds())
            seen.set()

        run.service.loop.call_soon_threadsafe(look)
        seen.wait()
        return seconds[-1]

    began, taken, takes = now(), inbox.take_s, inbox.num_takes
    decoder = run.service.model.decoder
    passes = decoder.stats()["num_steps"]
    command = [
        sys.executable,
        "-c",
        CLIENT,
        host,
        str(port),
        str(options.rows),
        str(options.tokens),
    ]
    events = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    passes = decoder.stats()["num_steps"] - passes
    loop_s = now() - began
    return {
        "events": events,
        "loop_us_per_event": 1e6 * loop_s / events,
        "passes": passes,
        "wakes": inbox.num_takes - takes,
        "hand_over_us_per_pass": 1e6 * (inbox.take_s - taken) / max(1, passes),
    }


def main() -> int:
    """Prints a line of JSON a round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    def load(progress: object) -> Decoder:
        return Decoder(
            demo_model_dir(), device="cpu", num_threads=1, max_seq_len=1024,
            max_batch_size=options.rows,
        )  # fmt: skip

    run = Run(load, ServeConfig(port=0))
    thread = threading.Thread(target=run.run)
    thread.start()
    while run.service.state == "loading":
        time.sleep(0.05)
    inbox = TimedInbox(run.service.feed)
    for _ in range(options.rounds):
        print(json.dumps(measure(run, options, inbox)), flush=True)
    run.service.loop.call_soon_threadsafe(run.end)
    thread.join()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
