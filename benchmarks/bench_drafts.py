"""What drafts are worth to verified decoding: how many are kept, how few dense passes it takes.

    python benchmarks/bench_drafts.py MODEL_DIR --select-layers 2 4 9 --token-budget 64

Questions about documents, and passages to be copied (the tasks of `tidaldecode eval`), and seeded
documentation-like text to be continued, are answered densely and by verified decoding with each
kind of drafts. Counts tokens, drafts, those kept and dense passes, which depend on the text alone
where the text drafts; no time is taken. Writes one JSON file, anew after every task.
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
from tidaldecode.config import DRAFTS
from tidaldecode.evaluation.example import make_encoder
from tidaldecode.evaluation.filling import sentence_filler
from tidaldecode.evaluation.tasks import TASKS, make_examples

CONTINUE = "continue"  # the task of bench_verify.py


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face model folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--tasks", nargs="+", choices=(*TASKS, CONTINUE), default=[*TASKS, CONTINUE]
    )
    parser.add_argument("--prompts", type=int, default=10, help="of each task")
    parser.add_argument("--context", type=int, default=2048, help="tokens of prompt and answer")
    parser.add_argument("--new-tokens", type=int, default=256, help=f"of {CONTINUE}")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--select-layers", type=int, nargs="+", help="default: the model's plan")
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--draft-tokens", type=int, help="default: automatic")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/*-drafts-DATE.json"
    )
    return parser.parse_args()


def open_decoders(args: argparse.Namespace) -> dict[str, tidaldecode.Decoder]:
    shared: dict[str, Any] = {
        "device": args.device,
        "dtype": args.dtype,
        "max_seq_len": args.context,
        "max_batch_size": args.batch_size,
    }
    verified: dict[str, Any] = {
        "select_layers": args.select_layers,
        "token_budget": args.token_budget,
        "verify": True,
        "draft_tokens": args.draft_tokens,
    }
    ways = {"dense": {"attention": "full"}} | {name: verified | {"drafts": name} for name in DRAFTS}
    return {name: tidaldecode.Decoder(args.model, **shared, **way) for name, way in ways.items()}


def make_prompts(args: argparse.Namespace, task: str) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts, with the settings of their calls."""
    encode, _ = make_encoder(read_model_folder(args.model), False if task == CONTINUE else None)
    if task != CONTINUE:
        examples = make_examples(
            [task], encode, [args.context], per_task=args.prompts, seed=args.seed
        )
        return [(list(e.prompt_ids), {"max_new_tokens": e.max_new_tokens}) for e in examples]
    length = args.context - args.new_tokens
    settings = {"max_new_tokens": args.new_tokens, "ignore_eos": True}
    fillers = [sentence_filler(random.Random(args.seed + i)) for i in range(args.prompts)]
    # A sentence has more than four tokens.
    texts = ["".join(filler(i) for i in range(length // 4)) for filler in fillers]
    return [(encode(text)[:length], settings) for text in texts]


def answer(
    decoder: tidaldecode.Decoder, args: argparse.Namespace, task: str
) -> list[tidaldecode.GenerationResult]:
    """The answers to a task's prompts, as many at once as the decoder has rows."""
    requests = [
        decoder.submit(ids, temperature=args.temperature, seed=args.seed, **settings)
        for ids, settings in make_prompts(args, task)
    ]
    return [request.result() for request in requests]


def summarise(
    results: list[tidaldecode.GenerationResult], dense: list[tidaldecode.GenerationResult]
) -> dict[str, Any]:
    checks = [result.verification for result in results if result.verification is not None]
    total = {
        name: sum(getattr(check, name) for check in checks)
        for name in ("drafted_tokens", "ngram_tokens", "accepted_tokens", "dense_passes")
    }
    # The first token of an answer comes with its prompt.
    tokens = sum(len(result.token_ids) - 1 for result in results)
    same = sum(a.token_ids == b.token_ids for a, b in zip(results, dense, strict=True))
    return {
        "answers": len(results),
        "as dense": same,
        "tokens": tokens,
        **{name.replace("_", " "): count for name, count in total.items()},
        "acceptance rate": round(total["accepted_tokens"] / max(1, total["drafted_tokens"]), 3),
        "dense passes per token": round(total["dense_passes"] / max(1, tokens), 3),
        "sparse steps per token": round(
            (total["drafted_tokens"] - total["ngram_tokens"]) / max(1, tokens), 3
        ),
    }


def main() -> None:
    args = parse_arguments()
    decoders = open_decoders(args)
    config = decoders["both"].config
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    kind = "cpu" if config.device == "cpu" else "gpu"
    output = args.output or ROOT / "benchmarks" / "results" / f"{kind}-drafts-{today}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "benchmark": "bench_drafts",
        "date": today,
        "command": command_line(),
        "commit": commit(),
        "uncommitted changes": has_uncommitted_changes(),
        "device": hardware_name(config.device),
        "model": args.model.name,
        "dtype": config.dtype,
        "plan": decoders["both"].plan,
        "token_budget": config.token_budget,
        "draft_tokens": config.draft_tokens or "auto",
        "temperature": args.temperature,
        "context": args.context,
        "results": {},
    }
    for task in args.tasks:
        results = {name: answer(decoder, args, task) for name, decoder in decoders.items()}
        dense = results.pop("dense")
        report["results"][task] = {
            name: summarise(of_one, dense) for name, of_one in results.items()
        }
        output.write_text(json.dumps(report, indent=1) + "\n")
        for name, counts in report["results"][task].items():
            print(task, name, counts, flush=True)
    print(f"written to {output}")


if __name__ == "__main__":
    main()
