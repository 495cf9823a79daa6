"""Verified decoding beside dense and plain tidal: are the tokens dense, and what does it cost?

    python benchmarks/bench_verify.py MODEL_DIR --select-layers 2 4 9 --token-budget 64

Every prompt (seeded documentation-like text) is continued densely and verified, the first ones by
plain tidal decoding too, in turns within one process. Counts the prompts and tokens that came out
the same, the drafts kept and the tokens per dense pass; speeds are over the prompts that all three
continued. Writes one JSON file, anew after every batch, so that a run may be cut short.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
from pathlib import Path
from typing import Any

import tidaldecode
from provenance import ROOT, command_line, commit, hardware_name, has_uncommitted_changes
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.evaluation.filling import sentence_filler


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face model folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads; default: one per core")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tidal-prompts", type=int, default=20, help="for plain tidal decoding")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--select-layers", type=int, nargs="+", help="default: the model's plan")
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--draft-tokens", type=int, help="default: automatic")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/*-verify-DATE.json"
    )
    return parser.parse_args()


def open_decoders(args: argparse.Namespace) -> dict[str, tidaldecode.Decoder]:
    shared: dict[str, Any] = {
        "device": args.device,
        "dtype": args.dtype,
        "num_threads": args.threads,
        "max_seq_len": args.context + args.new_tokens,
        "max_batch_size": args.batch_size,
    }
    tidal: dict[str, Any] = {"attention": "tidal", "token_budget": args.token_budget}
    if args.select_layers:
        tidal["select_layers"] = tuple(args.select_layers)
    verified = tidal | {"verify": True, "draft_tokens": args.draft_tokens}
    return {
        "dense": tidaldecode.Decoder(args.model, attention="full", **shared),
        "tidal": tidaldecode.Decoder(args.model, **tidal, **shared),
        "verified": tidaldecode.Decoder(args.model, **verified, **shared),
    }


def make_prompt(decoder: tidaldecode.Decoder, num_tokens: int, seed: int) -> list[int]:
    filler = sentence_filler(random.Random(seed))
    # A sentence has more than four tokens.
    ids = decoder.encode("".join(filler(i) for i in range(num_tokens // 4)))
    assert len(ids) >= num_tokens
    return ids[:num_tokens]


def continue_batch(
    decoder: tidaldecode.Decoder, args: argparse.Namespace, prompts: list[list[int]], seed: int
) -> list[dict[str, Any]]:
    results = decoder.generate(
        prompts,
        max_new_tokens=args.new_tokens,
        temperature=args.temperature,
        seed=seed,
        ignore_eos=True,
    )
    # The sequences of a batch step together: the call's decoding is as long as its longest.
    slowest = min(result.timings.decode_tokens_per_s for result in results)
    return [
        {
            "token_ids": list(result.token_ids),
            "decode_s": (args.new_tokens - 1) / slowest / len(results),
            "verification": result.verification,
        }
        for result in results
    ]


def summarise(runs: dict[str, list[dict[str, Any]]], new_tokens: int) -> dict[str, Any]:
    """`runs`: the continued prompts of each way to decode, in the same order."""

    def same_prefix(one: list[int], other: list[int]) -> int:
        pairs = zip(one, other, strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(one))

    def agreement(name: str) -> dict[str, Any]:
        prefixes = [
            same_prefix(run["token_ids"], dense["token_ids"])
            for run, dense in zip(runs[name], runs["dense"], strict=False)
        ]
        return {
            "prompts": len(prefixes),
            "identical prompts": sum(prefix == new_tokens for prefix in prefixes),
            "tokens": new_tokens * len(prefixes),
            "tokens before the first difference": sum(prefixes),
        }

    timed = min(len(of_one) for of_one in runs.values())
    ms_per_token = {
        name: 1e3 * sum(run["decode_s"] for run in of_one[:timed]) / (timed * (new_tokens - 1))
        for name, of_one in runs.items()
    }
    counts = [run["verification"] for run in runs["verified"]]
    drafted = sum(count.drafted_tokens for count in counts)
    accepted = sum(count.accepted_tokens for count in counts)
    passes = sum(count.dense_passes for count in counts)
    return {
        "verified beside dense": agreement("verified"),
        "tidal beside dense": agreement("tidal"),
        "drafted tokens": drafted,
        "accepted tokens": accepted,
        "dense passes": passes,
        "acceptance rate": round(accepted / max(1, drafted), 4),
        "tokens per dense pass": round((accepted + passes) / max(1, passes), 3),
        "timed prompts": timed,
        "decode ms per token": {name: round(value, 3) for name, value in ms_per_token.items()},
        "speed of verified over dense": round(ms_per_token["dense"] / ms_per_token["verified"], 3),
        "speed of tidal over dense": round(ms_per_token["dense"] / ms_per_token["tidal"], 3),
    }


def main() -> None:
    args = parse_arguments()
    decoders = open_decoders(args)
    config = decoders["verified"].config
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    kind = "cpu" if config.device == "cpu" else "gpu"
    output = args.output or ROOT / "benchmarks" / "results" / f"{kind}-verify-{today}.json"
    report: dict[str, Any] = {
        "benchmark": "bench_verify",
        "date": today,
        "command": command_line(),
        "commit": commit(),
        "uncommitted changes": has_uncommitted_changes(),
        "device": hardware_name(config.device),
        "threads": config.num_threads,
        "model": args.model.name,
        "num_layers": read_model_folder(args.model).model.num_layers,
        "dtype": config.dtype,
        "kv_dtype": config.kv_dtype,
        "plan": decoders["verified"].plan,
        "token_budget": config.token_budget,
        "draft_tokens": config.draft_tokens or "auto",
        "temperature": args.temperature,
        "sizes": {
            "context": args.context,
            "new tokens": args.new_tokens,
            "batch size": args.batch_size,
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in decoders}
    for first in range(0, args.prompts, args.batch_size):
        seeds = range(first, min(args.prompts, first + args.batch_size))
        prompts = [make_prompt(decoders["dense"], args.context, seed) for seed in seeds]
        for name, decoder in decoders.items():
            if name != "tidal" or first < args.tidal_prompts:
                runs[name] += continue_batch(decoder, args, prompts, seed=first)
        report["results"] = summarise(runs, args.new_tokens)
        output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["results"], indent=1))
    print(f"written to {output}")


if __name__ == "__main__":
    main()
