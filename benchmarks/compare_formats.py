"""What formats of weights and cache cost: perplexity, and KL from the same model in 16 bits.

    python benchmarks/compare_formats.py MODEL_DIR --text manual.txt --output formats.json

Windows of a text are read up to their last tokens, which are decoded densely one by one, as given
(teacher forcing), in every format. KL is from the next-token distributions with weights and cache
in 16 bits, in nats, mean over all steps. Writes one JSON file, anew after every format.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

import tidaldecode
from provenance import command_line, commit, hardware_name, has_uncommitted_changes
from tidaldecode.evaluation.distributions import divergences, token_losses

# Weights and cache; the first is what the others are compared with.
FORMATS = (
    ("auto", "bfloat16"),
    ("auto", "fp8"),
    ("auto", "int8"),
    ("fp8", "bfloat16"),
    ("fp8", "fp8"),
    ("int4", "bfloat16"),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face model folder, in 16 bits")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--device", default="auto", help="int8 caches are the CPU's")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--scored-tokens", type=int, default=256, help="decoded of a window")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def windows_of(args: argparse.Namespace, decoder: tidaldecode.Decoder) -> list[list[int]]:
    ids = decoder.encode(args.text.read_text(encoding="utf-8"))
    if len(ids) < args.context * args.windows:
        raise SystemExit(f"{args.text} has {len(ids)} tokens, too few for the windows")
    step = len(ids) // args.windows
    return [ids[i * step : i * step + args.context] for i in range(args.windows)]


def logits_in(args: argparse.Namespace, weights: str, cache: str) -> tuple[list, list]:
    """Logits [scored tokens + 1, vocab_size] and the tokens that came, of each window."""
    prefill = args.context - args.scored_tokens
    with tidaldecode.Decoder(
        args.model,
        device=args.device,
        dtype=args.dtype,
        attention="full",
        max_seq_len=args.context,
        weight_format=weights,
        kv_dtype=cache,
    ) as decoder:
        windows = windows_of(args, decoder)
        found = [decoder.step_logits(ids, prefill) for ids in windows]
    return found, [ids[prefill:] for ids in windows]


def main() -> None:
    args = parse_arguments()
    reference: list[np.ndarray] = []
    rows: list[dict[str, Any]] = []
    for weights, cache in FORMATS:
        if cache == "int8" and args.device not in ("auto", "cpu"):
            continue
        found, came = logits_in(args, weights, cache)
        reference = reference or found
        losses = np.concatenate([token_losses(f, c) for f, c in zip(found, came, strict=True)])
        kl = np.concatenate([divergences(r, f) for r, f in zip(reference, found, strict=True)])
        rows.append(
            {
                "weight_format": weights,
                "kv_dtype": cache,
                "perplexity": round(math.exp(losses.mean()), 4),
                "kl": round(float(kl.mean()), 6),
                "kl_99th_percentile": round(float(np.percentile(kl, 99)), 5),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        report = {
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "uncommitted changes": has_uncommitted_changes(),
            "command": command_line(),
            "hardware": hardware_name(args.device),
            "rows": rows,
        }
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
