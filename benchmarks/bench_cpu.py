"""The CPU engine beside transformers, its sparse steps beside its dense ones, and formats of cache
and weights beside each other, in one run.

    python benchmarks/bench_cpu.py MODEL_DIR --select-layers 2,4,9 --token-budget 64

Method: benchmarks/README.md. Every number comes from the calls a user makes (`Decoder.generate`;
transformers' `forward` with its cache); the contestants take turns within one
process, so that a machine that slows down slows all of them. Writes one JSON file.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tidaldecode
from provenance import ROOT, commit, has_uncommitted_changes

WORDS = (
    "the a of and to is in for that file option command system package buffer value default "
    "returns reads writes kernel socket thread module error message user name line when before "
    "after with without each given following section described interface version directory"
).split()

Block = Callable[[], float]  # runs once, returns its measure


def main() -> None:
    options = parse_options()
    sizes = {"decode tokens a block": options.block, "repetitions": options.repetitions}
    report: dict[str, Any] = {"benchmark": "bench_cpu", **provenance(options), "sizes": sizes}
    report["results"] = results = {}
    longest = [options.versus, *options.sparse_contexts, *options.format_contexts]
    prompt = long_prompt(options.model_dir, max(longest))
    if options.versus:
        results["versus transformers"] = versus_transformers(options, prompt[: options.versus])
        write(options.output, report)
    results["tidal versus dense"] = {}
    for context in options.sparse_contexts:
        outcome = tidal_versus_dense(options, prompt[:context])
        results["tidal versus dense"][str(context)] = outcome
        write(options.output, report)
    results["formats"] = {}
    for context in options.format_contexts:
        results["formats"][str(context)] = formats(options, prompt[:context])
        write(options.output, report)
    print(f"written to {options.output}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument(
        "--versus",
        type=int,
        default=8192,
        metavar="TOKENS",
        help="context beside transformers; 0 leaves that part out",
    )
    parser.add_argument(
        "--sparse-contexts",
        type=numbers,
        default=[16384, 32512],
        metavar="N,N",
        help="contexts of tidal beside dense; a model's last positions are output",
    )
    parser.add_argument(
        "--format-contexts",
        type=numbers,
        default=[1024, 32512],
        metavar="N,N",
        help="contexts of dense steps with every format",
    )
    parser.add_argument("--select-layers", type=numbers, default=[2, 4, 9], metavar="N,N")
    parser.add_argument("--token-budget", type=int, default=64)
    parser.add_argument("--dtype", default="auto", help="of our weights (transformers: float32)")
    parser.add_argument("--threads", type=int, default=None, help="default: one per core")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--prefill-repetitions", type=int, default=3)
    parser.add_argument("--block", type=int, default=12, help="decode steps per repetition")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    default = ROOT / "benchmarks" / "results" / f"cpu-{options.model_dir.name}-{stamp}.json"
    options.output = options.output or default
    return options


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


# --- what ran where ---


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    import numpy
    import torch
    import transformers

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "uncommitted changes": has_uncommitted_changes(),
        "device": processor(),
        "threads": options.threads or len_of_affinity(),
        "model": options.model_dir.name,
        "versions": {
            "tidaldecode": tidaldecode.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.is_file() else [])
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def len_of_affinity() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


# --- contestants ---


def long_prompt(model_dir: Path, num_tokens: int) -> list[int]:
    """Token ids of seeded words in the manner of documentation, the model's BOS in front."""
    rng = random.Random(0)
    words = [rng.choice(WORDS) + ("." if rng.random() < 0.08 else "") for _ in range(num_tokens)]
    decoder = tidaldecode.Decoder(model_dir, device="cpu", attention="full", max_seq_len=64)
    ids = decoder.encode(" ".join(words))
    assert len(ids) >= num_tokens, "a word is at least one token"
    return ids[:num_tokens]


def open_decoder(options: argparse.Namespace, num_tokens: int, **settings) -> tidaldecode.Decoder:
    return tidaldecode.Decoder(
        options.model_dir, device="cpu", dtype=options.dtype, max_seq_len=num_tokens,
        max_batch_size=1, num_threads=options.threads, **settings,
    )  # fmt: skip


def decode_blocks(decoder: tidaldecode.Decoder, prompt: list[int], block: int) -> Block:
    """Reads the prompt, then gives a function that decodes `block` tokens behind it: ms per token.

    The engine decodes whether or not somebody takes the tokens, so a block is a call of its own;
    the prompt is found in the cache.
    """
    options = {"temperature": 0, "ignore_eos": True}
    decoder.generate(prompt, max_new_tokens=1, **options)

    def run() -> float:
        result = decoder.generate(prompt, max_new_tokens=block + 1, **options)
        assert result.cached_tokens > len(prompt) - 2 * decoder.config.page_size
        return 1e3 / result.timings.decode_tokens_per_s

    return run


def decode_beside(
    options: argparse.Namespace, prompt: list[int], decoders: dict[str, tidaldecode.Decoder]
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Seconds that each took to read the prompt, and ms per token behind it, by name."""
    prefill_s: dict[str, float] = {}
    blocks: dict[str, Block] = {}
    for name, decoder in decoders.items():
        start = time.perf_counter()
        blocks[name] = decode_blocks(decoder, prompt, options.block)
        prefill_s[name] = round(time.perf_counter() - start, 2)
    return prefill_s, interleaved(blocks, options.repetitions)


def interleaved(blocks: dict[str, Block], repetitions: int) -> dict[str, dict[str, Any]]:
    """Each block in turn, `repetitions` times after one turn of warming up."""
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for turn in range(repetitions + 1):
        for name, run in blocks.items():
            value = run()
            if turn > 0:
                times[name].append(value)
    return {
        name: {"median": round(statistics.median(values), 4), "all": [round(v, 4) for v in values]}
        for name, values in times.items()
    }


# --- parts ---


def versus_transformers(options: argparse.Namespace, prompt: list[int]) -> dict[str, Any]:
    import torch
    import transformers

    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        options.model_dir, dtype=torch.float32
    ).eval()
    ours = open_decoder(options, len(prompt) + options.block + 1, attention="full")
    ids = torch.tensor([prompt])

    def their_prefill() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            theirs(ids, use_cache=True, logits_to_keep=1)
        return len(prompt) / (time.perf_counter() - start)

    def our_prefill() -> float:
        result = ours.generate(prompt, max_new_tokens=1, temperature=0, ignore_eos=True)
        return len(prompt) / result.timings.time_to_first_token_s

    prefill = interleaved(
        {"transformers": their_prefill, "tidaldecode": our_prefill}, options.prefill_repetitions
    )
    their_steps = transformers_steps(theirs, ids)

    def their_decode() -> float:
        start = time.perf_counter()
        for _ in range(options.block):
            next(their_steps)
        return 1e3 * (time.perf_counter() - start) / options.block

    our_decode = decode_blocks(ours, prompt, options.block)
    decode = interleaved(
        {"transformers": their_decode, "tidaldecode": our_decode}, options.repetitions
    )
    outcome = {
        "context": len(prompt),
        "transformers attention": theirs.config._attn_implementation,
        "prefill tokens per s": prefill,
        "dense decode ms per token": decode,
        "prefill speed ratio": ratio(prefill, "tidaldecode", "transformers"),
        "decode speed ratio": ratio(decode, "transformers", "tidaldecode"),
    }
    print(f"{len(prompt)} tokens, beside transformers ({outcome['transformers attention']}):")
    print_rows("prefill, tokens/s", prefill, outcome["prefill speed ratio"])
    print_rows("dense decode, ms/token", decode, outcome["decode speed ratio"])
    ours.close()
    return outcome


def transformers_steps(model: Any, ids: Any) -> Iterator[int]:
    """Greedy decoding through transformers' cache, one token at a time."""
    import torch

    with torch.inference_mode():
        out = model(ids, use_cache=True, logits_to_keep=1)
    while True:
        with torch.inference_mode():
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        yield int(token)


def tidal_versus_dense(options: argparse.Namespace, prompt: list[int]) -> dict[str, Any]:
    room = len(prompt) + options.block + 1
    plan = {"select_layers": options.select_layers, "token_budget": options.token_budget}
    decoders = {
        "dense": open_decoder(options, room, attention="full"),
        "tidal": open_decoder(options, room, attention="tidal", **plan),
    }
    prefill_s, decode = decode_beside(options, prompt, decoders)
    outcome = {
        "context": len(prompt),
        "plan": decoders["tidal"].plan,
        "token_budget": options.token_budget,
        "dtype": decoders["dense"].config.dtype,
        "kv_dtype": decoders["dense"].config.kv_dtype,
        "memory": dataclasses.asdict(decoders["dense"].memory_plan()),
        "prefill s": prefill_s,
        "decode ms per token": decode,
        "speed ratio": ratio(decode, "dense", "tidal"),
    }
    print(f"{len(prompt)} tokens, plan {outcome['plan']}, K={options.token_budget}:")
    print_rows("decode, ms/token", decode, outcome["speed ratio"])
    for decoder in decoders.values():
        decoder.close()
    return outcome


# Formats of the cache with the checkpoint's weights, and of the weights with a cache of theirs.
FORMATS: dict[str, dict[str, str]] = {
    "as stored": {},
    "kv float32": {"kv_dtype": "float32"},
    "kv int8": {"kv_dtype": "int8"},
    "weights fp8": {"weight_format": "fp8"},
    "weights int4": {"weight_format": "int4"},
    "weights int4, kv int8": {"weight_format": "int4", "kv_dtype": "int8"},
}


def formats(options: argparse.Namespace, prompt: list[int]) -> dict[str, Any]:
    room = len(prompt) + options.block + 1
    decoders = {
        name: open_decoder(options, room, attention="full", **settings)
        for name, settings in FORMATS.items()
    }
    prefill_s, decode = decode_beside(options, prompt, decoders)
    plans = {name: decoder.memory_plan() for name, decoder in decoders.items()}
    times = {name: ratio(decode, name, "as stored") for name in FORMATS}
    print(f"{len(prompt)} tokens, dense, ms/token and times what the checkpoint as stored takes:")
    for name, measure in decode.items():
        print(f"  {name}: {measure['median']:.4g} (x{times[name]:.3f})", flush=True)
    for decoder in decoders.values():
        decoder.close()
    return {
        "dtype": options.dtype,
        "bytes": {
            name: {"weights": plan.weight_bytes, "kv": plan.kv_bytes}
            for name, plan in plans.items()
        },
        "prefill s": prefill_s,
        "decode ms per token": decode,
        "times as stored": times,
    }


def ratio(measures: dict[str, dict[str, Any]], above: str, below: str) -> float:
    return round(measures[above]["median"] / measures[below]["median"], 3)


def print_rows(title: str, measures: dict[str, dict[str, Any]], quotient: float) -> None:
    values = ", ".join(f"{name} {measure['median']:.4g}" for name, measure in measures.items())
    print(f"  {title}: {values} (x{quotient:.2f})", flush=True)


if __name__ == "__main__":
    main()
