"""Many requests at once, through Decoder.submit: tokens a second and waiting, tidal and dense.

Scenarios, each with every request tidal (the decoder's plan) and each with every request dense:
  streams   N streams whose prompts are known already: tokens a second, milliseconds between tokens
  arrivals  N streams while a long prompt and short ones arrive: what that does to the streams, and
            how long the first token of each takes
  crowd     many prompts at once with long answers, more than there is room for
  again     a long prompt, and the same once more
  prompts   many short prompts: tokens read a second until each has its first token

Random weights at a real model's shape, or a model folder. Tokens are timed where they are read, by
a thread a request. Writes JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

import tidaldecode
from provenance import command_line, commit, hardware_name
from shapes import SHAPES

SCENARIOS = ("streams", "arrivals", "crowd", "again", "prompts")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model folder instead of random weights")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="default: all")
    parser.add_argument("--attention", action="append", choices=("tidal", "full"))
    parser.add_argument("--token-budget", type=int, default=1024)
    parser.add_argument("--select-layers", type=int, nargs="+", default=[2, 13])
    parser.add_argument("--streams", type=int, default=24, help="streams of the first scenario")
    parser.add_argument("--context", type=int, default=32_768, help="tokens of a stream's prompt")
    parser.add_argument("--new-tokens", type=int, default=256, help="of a stream")
    parser.add_argument("--long-context", type=int, default=131_072)
    parser.add_argument("--short-context", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=45.0, help="of the arrivals")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between long prompts")
    parser.add_argument("--crowd", type=int, nargs=3, default=[64, 20_000, 2_000],
                        metavar=("REQUESTS", "PROMPT", "NEW"))  # fmt: skip
    parser.add_argument("--prompts", type=int, nargs=2, default=[64, 512],
                        metavar=("REQUESTS", "PROMPT"))  # fmt: skip
    parser.add_argument("--max-batch-size", type=int, default=64)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


class Reader(threading.Thread):
    """Reads a request to its end and notes when each token came."""

    def __init__(self, request: tidaldecode.Request) -> None:
        super().__init__(daemon=True)
        self.request = request
        self.started = time.perf_counter()
        self.times: list[float] = []
        self.start()

    def run(self) -> None:
        while self.request.status != "finished" or not self._has_all():
            self.request.read(0.1)
            now = time.perf_counter()
            self.times += [now] * (len(self.request.token_ids) - len(self.times))

    def _has_all(self) -> bool:
        return len(self.times) == len(self.request.result().token_ids)

    @property
    def first_token_s(self) -> float:
        return self.times[0] - self.started

    def gaps_ms(self, begin: float, end: float) -> list[float]:
        """Between tokens that came within the time."""
        times = [moment for moment in self.times if begin <= moment <= end]
        return [(b - a) * 1e3 for a, b in zip(times, times[1:], strict=False)]


class Load:
    """A decoder, and the requests of a benchmark."""

    def __init__(self, decoder: tidaldecode.Decoder, attention: str, args: argparse.Namespace):
        self.decoder, self.attention, self.args = decoder, attention, args
        # Nothing that the other kind has read is found again, but for streams.
        self.offset = 10**6 if attention == "full" else 0

    def prompt(self, length: int, seed: int) -> list[int]:
        source = random.Random(seed + self.offset)
        vocab_size = self.decoder.model.vocab_size
        return [source.randrange(16, vocab_size) for _ in range(length)]

    def ask(self, prompt: list[int], new_tokens: int) -> Reader:
        attention = "full" if self.attention == "full" else None
        return Reader(
            self.decoder.submit(
                prompt, max_new_tokens=new_tokens, temperature=0, ignore_eos=True,
                attention=attention,
            )
        )  # fmt: skip

    def known_streams(self, count: int, new_tokens: int) -> list[Reader]:
        """Streams whose prompts have been read before, so that all begin to decode at once."""
        prompts = [self.prompt(self.args.context, seed - self.offset) for seed in range(count)]
        for reader in [self.ask(prompt, 1) for prompt in prompts]:
            reader.join()
        return [self.ask(prompt, new_tokens) for prompt in prompts]


def spread(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile and largest."""
    if len(values) < 2:
        return {"count": len(values)}
    return {
        "count": len(values),
        "p50": round(median(values), 2),
        "p99": round(quantiles(values, n=100)[98], 2),
        "max": round(max(values), 2),
    }


def streams(load: Load) -> dict[str, Any]:
    alone = load.known_streams(1, load.args.new_tokens)[0]
    alone.join()
    readers = load.known_streams(load.args.streams, load.args.new_tokens)
    for reader in readers:
        reader.join()
    begin = max(reader.times[0] for reader in readers)
    end = min(reader.times[-1] for reader in readers)
    count = sum(begin <= moment <= end for reader in readers for moment in reader.times)
    gaps = [gap for reader in readers for gap in reader.gaps_ms(begin, end)]
    return {
        "streams": len(readers),
        "context": load.args.context,
        "tokens_per_s_of_one": round(
            (len(alone.times) - 1) / (alone.times[-1] - alone.times[0]), 1
        ),
        "tokens_per_s": round(count / (end - begin), 1),
        "ms_between_tokens": spread(gaps),
    }


def arrivals(load: Load) -> dict[str, Any]:
    args = load.args
    alone = load.ask(load.prompt(args.long_context, 1000), 1)
    alone.join()
    readers = load.known_streams(8, 10**6 if args.context > 10**6 else 60_000)
    while not all(reader.times for reader in readers):
        time.sleep(0.01)
    quiet = time.perf_counter()
    time.sleep(4.0)
    begin = time.perf_counter()
    long_ones: list[Reader] = []
    short_ones: list[Reader] = []
    while (now := time.perf_counter()) - begin < args.seconds:
        if now - begin >= len(long_ones) * args.every:
            long_ones.append(load.ask(load.prompt(args.long_context, 2000 + len(long_ones)), 8))
        if now - begin >= len(short_ones) * 2.0:
            short_ones.append(load.ask(load.prompt(args.short_context, 3000 + len(short_ones)), 8))
        time.sleep(0.01)
    end = time.perf_counter()
    for reader in readers:
        reader.request.cancel()
    for reader in [*long_ones, *short_ones]:
        reader.join()
    quiet_rate = sum(quiet <= t <= begin for r in readers for t in r.times) / (begin - quiet)
    rate = sum(begin <= t <= end for r in readers for t in r.times) / (end - begin)
    gaps = [gap for reader in readers for gap in reader.gaps_ms(begin, end)]
    return {
        "streams": len(readers),
        "ms_between_tokens": spread(gaps),
        "tokens_per_s_alone": round(quiet_rate, 1),
        "tokens_per_s": round(rate, 1),
        "share_of_alone": round(rate / quiet_rate, 3),
        "long_first_token_s_alone": round(alone.first_token_s, 3),
        "long_first_token_s": [round(reader.first_token_s, 3) for reader in long_ones],
        "short_first_token_s": spread([reader.first_token_s for reader in short_ones]),
    }


def crowd(load: Load) -> dict[str, Any]:
    count, length, new_tokens = load.args.crowd
    before = load.decoder.stats()
    begin = time.perf_counter()
    readers = [load.ask(load.prompt(length, 4000 + i), new_tokens) for i in range(count)]
    for reader in readers:
        reader.join()
    seconds = time.perf_counter() - begin
    after = load.decoder.stats()
    gaps = [gap for reader in readers for gap in reader.gaps_ms(begin, begin + seconds)]
    return {
        "requests": count,
        "prompt": length,
        "new_tokens": new_tokens,
        "seconds": round(seconds, 2),
        "generated_tokens_per_s": round(count * new_tokens / seconds, 1),
        "ms_between_tokens": spread(gaps),
        "first_token_s": spread([reader.first_token_s for reader in readers]),
        "pauses": after["num_pauses"] - before["num_pauses"],
    }


def again(load: Load) -> dict[str, Any]:
    prompt = load.prompt(load.args.long_context, 5000)
    times = []
    for _ in range(4):
        reader = load.ask(prompt, 1)
        reader.join()
        times.append(round(reader.first_token_s * 1e3, 1))
    return {"prompt": len(prompt), "first_ms": times[0], "again_ms": times[1:]}


def prompts(load: Load) -> dict[str, Any]:
    count, length = load.args.prompts
    rates = []
    for turn in range(3):
        texts = [load.prompt(length, 6000 + turn * count + i) for i in range(count)]
        begin = time.perf_counter()
        readers = [load.ask(text, 1) for text in texts]
        for reader in readers:
            reader.join()
        rates.append(round(count * length / (max(r.times[0] for r in readers) - begin), 1))
    return {"requests": count, "prompt": length, "tokens_per_s": rates}


RUNS = {
    "streams": streams, "arrivals": arrivals, "crowd": crowd, "again": again, "prompts": prompts,
}  # fmt: skip


def open_decoder(args: argparse.Namespace, parent: Path) -> tidaldecode.Decoder:
    longest = max(args.long_context + 64, args.context + 60_000, sum(args.crowd[1:]))
    folder, load_format = args.model, "auto"
    if folder is None:
        folder = SHAPES[args.shape].for_contexts(longest).write(parent)
        load_format = "dummy"
    return tidaldecode.Decoder(
        folder,
        load_format=load_format,
        device=args.device,
        dtype=args.dtype,
        select_layers=args.select_layers,
        token_budget=args.token_budget,
        max_seq_len=longest,
        max_batch_size=args.max_batch_size,
    )


def main() -> None:
    args = parse_arguments()
    console = Console()
    report: dict[str, Any] = {"commit": commit(), "command": command_line(), "rows": []}
    with tempfile.TemporaryDirectory() as parent:
        decoder = open_decoder(args, Path(parent))
        report["device"] = hardware_name(decoder.config.device)
        report["plan"] = decoder.plan
        report["num_pages"] = decoder.config.num_pages
        for scenario in args.scenario or SCENARIOS:
            for attention in args.attention or ("full", "tidal"):
                row = RUNS[scenario](Load(decoder, attention, args))
                report["rows"].append({"scenario": scenario, "attention": attention} | row)
                if args.output:
                    args.output.write_text(json.dumps(report, indent=1))
                console.print_json(json.dumps(report["rows"][-1]), indent=None)
        decoder.close()
    show(report, console)


def show(report: dict[str, Any], console: Console) -> None:
    table = Table("scenario", "attention", "tokens/s", "ms between tokens, p50 / p99")
    for row in report["rows"]:
        gaps = row.get("ms_between_tokens", {})
        rate = row.get("tokens_per_s") or row.get("generated_tokens_per_s") or ""
        spread_text = f"{gaps.get('p50')} / {gaps.get('p99')}" if gaps else ""
        table.add_row(row["scenario"], row["attention"], str(rate), spread_text)
    console.print(table)


if __name__ == "__main__":
    main()
