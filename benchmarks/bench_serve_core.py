"""Many requests at once: tokens a second and waiting, tidal and dense, by submit and over HTTP.

Scenarios, each with every request tidal (the decoder's plan) and each with every request dense:
  streams   N streams whose prompts are known already: tokens a second, milliseconds between tokens
  arrivals  N streams while a long prompt and short ones arrive: what that does to the streams, and
            how long the first token of each takes
  crowd     many prompts at once with long answers, more than there is room for
  again     a long prompt, and the same once more
  prompts   many short prompts: tokens read a second until each has its first token

Random weights at a real model's shape, or a model folder. Each way of asking (--through) has a
process and a decoder of its own, one after the other: Decoder.submit, read by a thread a request;
and `tidaldecode serve` with streams (request_targets.py). Tokens are timed where they are read.
Writes JSON, and after the rows a table of one way beside the other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from provenance import command_line, commit
from request_targets import TARGETS, Reader, Target, write_word_tokens
from shapes import SHAPES

Report = dict[str, Any]
SCENARIOS = ("streams", "arrivals", "crowd", "again", "prompts")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model folder instead of random weights")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="default: all")
    parser.add_argument("--attention", action="append", choices=("tidal", "full"))
    parser.add_argument("--through", action="append", choices=tuple(TARGETS), help="default: both")
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
    parser.add_argument("--threads", type=int, help="of a CPU engine")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


class Load:
    """The requests of a benchmark, and what answers them."""

    def __init__(self, target: Target, attention: str, args: argparse.Namespace):
        self.target, self.attention, self.args = target, attention, args
        # Nothing that the other kind has read is found again, but for streams.
        self.offset = 10**6 if attention == "full" else 0

    def prompt(self, length: int, seed: int) -> list[int]:
        source = random.Random(seed + self.offset)
        return [source.randrange(16, self.target.vocab_size) for _ in range(length)]

    def ask(self, prompt: list[int], new_tokens: int) -> Reader:
        return self.target.ask(prompt, new_tokens, "full" if self.attention == "full" else None)

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
        "p99": round(quantiles(values, n=100, method="inclusive")[98], 2),
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
    time.sleep(min(4.0, args.seconds))
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
        reader.cancel()
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
    before = load.target.num_pauses()
    begin = time.perf_counter()
    readers = [load.ask(load.prompt(length, 4000 + i), new_tokens) for i in range(count)]
    for reader in readers:
        reader.join()
    seconds = time.perf_counter() - begin
    after = load.target.num_pauses()
    gaps = [gap for reader in readers for gap in reader.gaps_ms(begin, begin + seconds)]
    return {
        "requests": count,
        "prompt": length,
        "new_tokens": new_tokens,
        "seconds": round(seconds, 2),
        "generated_tokens_per_s": round(count * new_tokens / seconds, 1),
        "ms_between_tokens": spread(gaps),
        "first_token_s": spread([reader.first_token_s for reader in readers]),
        "pauses": after - before,
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


def prepare(args: argparse.Namespace, parent: Path) -> tuple[Path, dict[str, Any]]:
    """The folder that is measured, and the options of its decoder."""
    longest = max(args.long_context + 64, args.context + 60_000, sum(args.crowd[1:]))
    options = {
        "device": args.device, "dtype": args.dtype, "select_layers": args.select_layers,
        "token_budget": args.token_budget, "max_seq_len": longest,
        "max_batch_size": args.max_batch_size,
    }  # fmt: skip
    if args.threads is not None:
        options["num_threads"] = args.threads
    if args.model is not None:
        return args.model, options
    shape = SHAPES[args.shape].for_contexts(longest)
    folder = shape.write(parent)
    write_word_tokens(folder, shape.config["vocab_size"])
    return folder, options | {"load_format": "dummy"}


def measure(
    args: argparse.Namespace, through: str, asked: tuple[Path, dict[str, Any]], report: Report
) -> Report:
    """Adds the rows of one way of asking; in a process of its own."""
    target = TARGETS[through](*asked)
    report |= target.about
    try:
        for scenario in args.scenario or SCENARIOS:
            for attention in args.attention or ("full", "tidal"):
                before, began = target.costs(), time.perf_counter()
                row = {"scenario": scenario, "attention": attention, "through": through}
                row |= RUNS[scenario](Load(target, attention, args))
                row["took_s"] = round(time.perf_counter() - began, 1)
                after = target.costs()
                row |= {name: round(after[name] - before[name], 4) for name in after}
                report["rows"].append(row)
                if args.output:
                    args.output.write_text(json.dumps(report, indent=1))
                print(json.dumps(row), flush=True)
    finally:
        target.close()
    return report


def main() -> None:
    args = parse_arguments()
    report: Report = {"commit": commit(), "command": command_line(), "rows": []}
    with tempfile.TemporaryDirectory() as parent:
        asked = prepare(args, Path(parent))
        for through in args.through or TARGETS:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as process:
                report = process.submit(measure, args, through, asked, report).result()
    show(report["rows"])


def figures(row: dict[str, Any]) -> dict[str, float]:
    """What is compared of a row."""
    found: dict[str, float] = {}
    for name in ("tokens_per_s", "generated_tokens_per_s", "again_ms", "tokens_per_s_alone"):
        if name in row:
            found[name] = median(row[name]) if isinstance(row[name], list) else row[name]
    for name in ("p50", "p99"):
        if name in row.get("ms_between_tokens", {}):
            found[f"ms between tokens, {name}"] = row["ms_between_tokens"][name]
    if row.get("long_first_token_s"):
        found["long_first_token_s"] = max(row["long_first_token_s"])
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the ways of asking beside each other."""
    ways = list(dict.fromkeys(row["through"] for row in rows))
    table = Table("scenario", "attention", "figure", *ways, *(["http / submit"] * (len(ways) > 1)))
    by_way = {(row["scenario"], row["attention"], row["through"]): figures(row) for row in rows}
    for scenario, attention in dict.fromkeys(key[:2] for key in by_way):
        found = [by_way.get((scenario, attention, way), {}) for way in ways]
        for name in found[0]:
            values = [each[name] for each in found if name in each]
            cells = [f"{value:,.2f}" for value in values]
            if len(values) > 1:
                by_name = dict(zip(ways, values, strict=True))
                cells.append(f"{by_name['http'] / by_name['submit']:.3f}")
            table.add_row(scenario, attention, name, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
