"""Real calls: first token and milliseconds per token over context length, dense and tidal.

One Decoder per setting, the same random prompts for all; the settings take turns within a context
length, so that a drifting machine touches them alike. A step's time is the call's decode time over
its steps, the median of several calls after an untimed one. Writes JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tidaldecode
from provenance import command_line, commit, hardware_name
from tidaldecode.checkpoint.model_folder import read_model_folder


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face model folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--context", type=int, action="append", help="prompt tokens; repeatable")
    parser.add_argument("--select-layers", type=int, nargs="+", help="default: the model's plan")
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64, help="decode steps per call")
    parser.add_argument("--runs", type=int, default=3, help="timed calls per setting")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    source = random.Random(seed)
    # 16 leaves out the special tokens, which stand first in most vocabularies.
    low = min(16, vocab_size - 1)
    return [[source.randrange(low, vocab_size) for _ in range(length)] for _ in range(count)]


def measure(decoder: tidaldecode.Decoder, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """One call: prefill, then `steps` decode steps of all prompts together."""
    results = decoder.generate(prompts, max_new_tokens=steps + 1, temperature=0.0, ignore_eos=True)
    last = results[-1]
    return {
        "time_to_first_token_s": last.timings.time_to_first_token_s,
        "ms_per_step": 1e3 / last.timings.decode_tokens_per_s,
        "token_ids": list(results[0].token_ids[:32]),
    }


def measure_all(
    decoders: dict[str, tidaldecode.Decoder], prompts: list[list[int]], runs: int, steps: int
) -> list[dict[str, Any]]:
    """The settings in turn, `runs` times after one untimed round; medians."""
    calls: dict[str, list[dict[str, Any]]] = {name: [] for name in decoders}
    for _ in range(runs + 1):
        for name, decoder in decoders.items():
            calls[name].append(measure(decoder, prompts, steps))
    rows = []
    for name, decoder in decoders.items():
        timed = calls[name][1:]
        ms_per_step = statistics.median(call["ms_per_step"] for call in timed)
        first_token_s = statistics.median(call["time_to_first_token_s"] for call in timed)
        rows.append(
            {
                "context": len(prompts[0]),
                "batch_size": len(prompts),
                "attention": name,
                "plan": decoder.plan,
                "time_to_first_token_s": first_token_s,
                "ms_per_step": ms_per_step,
                "ms_per_step_all": [call["ms_per_step"] for call in timed],
                "steps_per_run": steps,
                "token_ids": timed[0]["token_ids"],
            }
        )
    return rows


def main() -> None:
    args = parse_arguments()
    folder = read_model_folder(args.model)
    contexts = args.context or [1024, 4096, 16384, 32768]
    room = folder.model.max_position_embeddings - args.steps - 1
    contexts = sorted({min(context, room) for context in contexts})
    shared: dict[str, Any] = {
        "device": args.device,
        "dtype": args.dtype,
        "max_batch_size": args.batch_size,
        "max_seq_len": contexts[-1] + args.steps + 1,
    }
    tidal = {"select_layers": tuple(args.select_layers)} if args.select_layers else {}
    if args.token_budget:
        tidal["token_budget"] = args.token_budget
    decoders = {
        "dense": tidaldecode.Decoder(args.model, attention="full", **shared),
        "tidal": tidaldecode.Decoder(args.model, attention="tidal", **shared, **tidal),
    }
    rows = []
    table = Table("context", "attention", "plan", "first token s", "ms per step", "x dense")
    for context in contexts:
        prompts = random_prompts(args.batch_size, context, folder.model.vocab_size, seed=context)
        measured = measure_all(decoders, prompts, args.runs, args.steps)
        for row in measured:
            ratio = measured[0]["ms_per_step"] / row["ms_per_step"]
            table.add_row(
                str(context),
                row["attention"],
                row["plan"],
                f"{row['time_to_first_token_s']:.3f}",
                f"{row['ms_per_step']:.3f}",
                f"{ratio:.2f}",
            )
        rows += measured
    Console().print(table)
    config = decoders["tidal"].config
    report = {
        "benchmark": "bench_generate",
        "model": args.model.name,
        "device": hardware_name(config.device),
        "dtype": config.dtype,
        "kv_dtype": config.kv_dtype,
        "token_budget": config.token_budget,
        "median_of": args.runs,
        "commit": commit(),
        "command": command_line(),
        "rows": rows,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
