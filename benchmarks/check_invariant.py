"""Batch-invariant decoding on trial: does a text depend on what runs beside it, or on drafts?

    python benchmarks/check_invariant.py MODEL_DIR --select-layers 2 4 9 --token-budget 64

Every prompt (seeded documentation-like text, of lengths on both sides of where sparse steps begin)
is continued densely and verified, and by plain tidal decoding, alone and in a batch that others
join and leave; the last also without `batch_invariant`, to see that there is something to find.
Counts the texts that are the same token for token. Writes one JSON file, anew after every run, so
that a run may be cut short.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tidaldecode
from provenance import command_line, commit, hardware_name, has_uncommitted_changes
from tidaldecode.evaluation.filling import sentence_filler

# Some are shorter than sparse_min_context on a GPU.
SHORTEST, LONGEST = 1200, 3200


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face model folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--select-layers", type=int, nargs="+", required=True)
    parser.add_argument("--token-budget", type=int, required=True)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def make_prompts(args: argparse.Namespace) -> list[list[int]]:
    options = {"device": "cpu", "max_seq_len": 64, "attention": "full"}
    prompts = []
    with tidaldecode.Decoder(args.model, **options) as decoder:
        for seed in range(args.prompts):
            count = random.Random(-1 - seed).randint(SHORTEST, LONGEST)
            filler = sentence_filler(random.Random(seed))
            ids = decoder.encode("".join(filler(i) for i in range(count // 4)))
            prompts.append(ids[:count])
    return prompts


def texts_of(args: argparse.Namespace, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
    with tidaldecode.Decoder(
        args.model,
        device=args.device,
        dtype=args.dtype,
        max_seq_len=LONGEST + args.new_tokens,
        **options,
    ) as decoder:
        begin = time.perf_counter()
        results = decoder.generate(
            prompts,
            max_new_tokens=args.new_tokens,
            temperature=args.temperature,
            seed=7,
            ignore_eos=True,
        )
        took = time.perf_counter() - begin
    checks = [result.verification for result in results if result.verification]
    return {
        "texts": [list(result.token_ids) for result in results],
        "seconds": round(took, 2),
        "drafted": sum(check.drafted_tokens for check in checks),
        "accepted": sum(check.accepted_tokens for check in checks),
    }


def run(args: argparse.Namespace, prompts: list[list[int]]) -> Iterator[dict[str, Any]]:
    tidal = {"select_layers": tuple(args.select_layers), "token_budget": args.token_budget}
    ways = {"dense": {"attention": "full"}, "verified": tidal | {"verify": True}, "tidal": tidal}
    runs = {}
    for is_invariant in (True, False):
        for name, options in ways.items():
            for batch_size in (1, args.batch_size):
                if not is_invariant and (batch_size == 1) != (name == "dense"):
                    continue
                key = f"{name} b{batch_size}" + ("" if is_invariant else " as usual")
                runs[key] = texts_of(
                    args,
                    prompts,
                    batch_invariant=is_invariant,
                    max_batch_size=batch_size,
                    **options,
                )
                yield runs


def compare(runs: dict[str, Any], batch_size: int) -> dict[str, str]:
    together = f"b{batch_size}"
    pairs = [
        ("dense b1", f"dense {together}"),
        ("dense b1", "verified b1"),
        ("dense b1", f"verified {together}"),
        ("tidal b1", f"tidal {together}"),
        ("dense b1 as usual", f"verified {together} as usual"),
        ("dense b1", "tidal b1"),
    ]
    counts = {}
    for one, other in pairs:
        if one not in runs or other not in runs:
            continue
        both = zip(runs[one]["texts"], runs[other]["texts"], strict=True)
        same = sum(a == b for a, b in both)
        counts[f"{one} = {other}"] = f"{same} of {len(runs[one]['texts'])}"
    return counts


def main() -> None:
    args = parse_arguments()
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "uncommitted changes": has_uncommitted_changes(),
        "command": command_line(),
        "hardware": hardware_name("cuda:0" if args.device.startswith("cuda") else args.device),
    }
    for runs in run(args, make_prompts(args)):
        report["same texts"] = compare(runs, args.batch_size)
        report["runs"] = {
            name: {key: value for key, value in each.items() if key != "texts"}
            for name, each in runs.items()
        }
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        name = list(runs)[-1]
        print(name, runs[name]["seconds"], "s", report["same texts"], flush=True)


if __name__ == "__main__":
    main()
