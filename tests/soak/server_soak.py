"""A soak over HTTP: very many requests of every kind on one server, on loopback only.

    python tests/soak/server_soak.py [--requests 100000] [--clients 24] [--seed 0]

30 % of the requests are left by their client at a random moment, 5 % are malformed. Fails on an
answer that is not the one the same request gets alone, on a status that was not to be, on a request
without an answer, and on memory, files, threads, pages or rows that do not come back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import gc
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tidaldecode import Decoder, demo_model_dir
from tidaldecode.server.run import Run
from tidaldecode.server.settings import ServeConfig

MAX_GROWTH_BYTES = 48 * 2**20
SHARE_LEFT, SHARE_MALFORMED = 0.30, 0.05
VARIANTS = 6
TEXTS = (
    "The sky over the harbour was",
    "x",
    "Ünïcödé 日本語 🎉",
    "def main():\n",
    "1 2 3 4",
    "A B " * 30,
)
GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 8}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MALFORMED: tuple[tuple[str, bytes, int], ...] = (
    (COMPLETIONS, b"{", 400),
    (COMPLETIONS, b'{"prompt": "\xff"}', 400),
    (COMPLETIONS, b'{"prompt": "x", "n": "two"}', 400),
    (CHAT, b'{"messages": []}', 400),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "model": "other"}', 404),
    ("/v1/nothing", b"{}", 404),
)


def kinds() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every kind of request: route and body without a prompt."""
    return {
        "plain": (COMPLETIONS, GREEDY),
        "sampled": (COMPLETIONS, GREEDY | {"temperature": 0.9, "seed": 3, "top_p": 0.9}),
        "two": (COMPLETIONS, GREEDY | {"n": 2}),
        "stop": (COMPLETIONS, GREEDY | {"stop": ["e", "a"]}),
        "scored": (COMPLETIONS, GREEDY | {"echo": True, "logprobs": 2, "max_tokens": 0}),
        "streamed": (COMPLETIONS, GREEDY | {"stream": True}),
        "chat": (CHAT, GREEDY),
        "chat streamed": (CHAT, GREEDY | {"stream": True, "n": 2}),
        "dense": (COMPLETIONS, GREEDY | {"attention": "full"}),
        "verified": (COMPLETIONS, GREEDY | {"attention": "verified"}),
    }


def request_of(kind: str, variant: int) -> tuple[str, dict[str, Any]]:
    """Route and body of a request."""
    route, body = kinds()[kind]
    text = TEXTS[variant]
    if route == CHAT:
        return route, body | {"messages": [{"role": "user", "content": text}]}
    return route, body | {"prompt": text}


def meaning_of(text: str) -> list[Any]:
    """What an answer says, whole or streamed, without what differs every time."""
    if not text.startswith("data: "):
        return [[c.get("text"), c.get("message"), c["logprobs"], c["finish_reason"]]
                for c in json.loads(text)["choices"]]  # fmt: skip
    said: dict[int, list[str]] = {}
    for part in text.split("\n\n"):
        if not part.startswith("data: {"):
            continue
        for choice in json.loads(part[6:])["choices"]:
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            said.setdefault(choice["index"], []).append(piece + (choice["finish_reason"] or ""))
    return ["".join(said[index]) for index in sorted(said)] + [text.endswith("[DONE]\n\n")]


def is_same(one: Any, other: Any) -> bool:
    """Whether two answers say the same; beside other requests numbers are rounded otherwise."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-3
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other


class Soak:
    """Requests, their known answers, and what came of them."""

    def __init__(self, url: str, seed: int) -> None:
        """Sends to a server."""
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        self._url = url
        self._seed = seed
        self._known: dict[tuple[str, int], list[Any]] = {}

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._url, timeout=60, limits=httpx.Limits())

    async def learn(self) -> None:
        """Sends every request alone."""
        async with self._client() as client:
            for kind in kinds():
                for variant in range(VARIANTS):
                    route, body = request_of(kind, variant)
                    response = await client.post(route, json=body)
                    self._known[kind, variant] = meaning_of(response.text)

    async def run(self, count: int, num_clients: int) -> None:
        """Sends requests from several clients; which ones is a matter of the seed alone."""
        numbers = iter(range(count))

        async def work() -> None:
            async with self._client() as client:
                for number in numbers:
                    draw = random.Random(self._seed * 1_000_003 + number)
                    await self._send(client, draw)

        await asyncio.gather(*[work() for _ in range(num_clients)])

    async def _send(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        fate = draw.random()
        kind, variant = draw.choice(list(kinds())), draw.randrange(VARIANTS)
        try:
            if fate < SHARE_MALFORMED:
                kind = "malformed"
                route, data, status = draw.choice(MALFORMED)
                headers = {"content-type": "application/json"}
                response = await client.post(route, content=data, headers=headers)
                outcome = "as known" if response.status_code == status else "WRONG"
            elif fate < SHARE_MALFORMED + SHARE_LEFT:
                outcome = await self._leave(client, request_of(kind, variant), draw)
            else:
                route, body = request_of(kind, variant)
                response = await client.post(route, json=body)
                is_known = is_same(meaning_of(response.text), self._known[kind, variant])
                outcome = "as known" if is_known else "WRONG"
                if not is_known:
                    self.failures.append(f"{kind} {variant}: {response.text[:300]}")
        except Exception as error:
            outcome = type(error).__name__
            self.failures.append(f"{kind} {variant}: {error!r}")
        self.outcomes[kind, outcome] += 1

    async def _leave(
        self, client: httpx.AsyncClient, request: tuple[str, dict[str, Any]], draw: random.Random
    ) -> str:
        """Sends a request of many tokens, and leaves at a random moment."""
        route, body = request
        body = body | {"max_tokens": 200, "stream": draw.random() < 0.7}

        async def read() -> None:
            async with client.stream("POST", route, json=body) as response:
                async for _ in response.aiter_raw():
                    if draw.random() < 0.2:
                        return

        with contextlib.suppress(asyncio.TimeoutError, httpx.TransportError):
            await asyncio.wait_for(read(), draw.random() * 0.03)
        return "left"


def held(run: Run) -> dict[str, int]:
    """What the process and the server hold, once they are idle."""
    decoder = run.service.model.decoder
    ways = ("num_waiting", "num_reading", "num_decoding", "num_paused", "pages_held")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        stats = decoder.stats()
        if not (run.service.exchanges or len(run.service.feed) or any(stats[w] for w in ways)):
            break
        time.sleep(0.05)
    time.sleep(0.5)  # connections that were just closed
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_bytes": resident * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "exchanges": len(run.service.exchanges),
        "answers": len(run.service.feed),
        "connections": len(run._server.server_state.connections),
        "requests": sum(decoder.stats()[way] for way in ways[:4]),
        "pages": decoder.stats()["pages_held"],
    }


def leaks(start: dict[str, int], end: dict[str, int]) -> list[str]:
    """What has not come back."""
    found = [
        f"{name}: {start[name]} at the start, {end[name]} at the end"
        for name in start
        if name != "memory_bytes" and end[name] > start[name]
    ]
    growth = end["memory_bytes"] - start["memory_bytes"]
    return found + (
        [f"memory: grew by {growth / 2**20:.0f} MiB"] if growth > MAX_GROWTH_BYTES else []
    )


def serve() -> tuple[Run, threading.Thread]:
    """A server of the demo model, sparse from the first token, with few rows and pages.

    In a cache of float32 a value does not depend on the chunk that it was read in.
    """

    def load(_: object) -> Decoder:
        return Decoder(
            demo_model_dir(), device="cpu", num_threads=1, max_seq_len=384, max_batch_size=8,
            num_pages=96, page_size=16, sparse_min_context=0, token_budget=24, kv_dtype="float32",
        )  # fmt: skip

    run = Run(load, ServeConfig(port=0, max_queued_requests=4096))
    thread = threading.Thread(target=run.run)
    thread.start()
    while run.service.state == "loading":
        time.sleep(0.05)
    return run, thread


def main() -> int:
    """Runs the soak; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline", type=float, default=7200, help="seconds for all of it")
    options = parser.parse_args()
    faulthandler.enable()
    faulthandler.dump_traceback_later(options.deadline, exit=True)
    run, thread = serve()
    soak = Soak(run.address, options.seed)
    asyncio.run(soak.learn())
    # What threads and allocators keep once is there before the first measurement.
    asyncio.run(soak.run(max(200, options.requests // 10), options.clients))
    soak.outcomes.clear()
    start, began = held(run), time.monotonic()
    asyncio.run(soak.run(options.requests, options.clients))
    seconds, end = time.monotonic() - began, held(run)
    run.service.loop.call_soon_threadsafe(run.end)
    thread.join()
    for (kind, outcome), count in sorted(soak.outcomes.items()):
        print(f"{kind:15}{outcome:20}{count:>9,}")
    print(f"at the start: {start}\nat the end:   {end}")
    failures = soak.failures + leaks(start, end)
    if sum(soak.outcomes.values()) != options.requests:
        failures.append(f"{sum(soak.outcomes.values())} of {options.requests} were answered")
    for failure in failures[:10]:
        print(f"FAILED: {failure}", file=sys.stderr)
    verdict = f"{len(failures)} failures" if failures else "all well"
    print(f"{options.requests:,} requests, seed {options.seed}, {seconds:.0f} s: {verdict}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
