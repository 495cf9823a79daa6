"""Time to first token of long prompts, beside transformers on the same shape.

    python benchmarks/bench_prefill.py --output results.json      # Llama-3.1-8B's shape
    python benchmarks/bench_prefill.py --shape tiny --device cpu --context 512 --peers none

Random weights (`load_format="dummy"`) and random token ids, one prompt at a time: from the call of
`generate` to its first token; with `--new-tokens N` also the time of each token after it. Model
FLOPs count the matrix products of every token, the output layer of the last one, and causal
attention. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import peer_transformers
import tidaldecode
from peers import one_line, version
from provenance import command_line, commit, hardware_name, has_uncommitted_changes
from shapes import SHAPES
from step_bytes import expert_layers
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.engine_config import resolve_device

H200_TFLOPS = 790.0  # bf16 matrix products, measured (benchmarks/README.md)
CONTEXTS = (8192, 32768, 131072)
_LONG = 65536  # a longer prompt is read once: it takes seconds
PEERS = ("flash", "cudnn", "compiled")
# How weights and their products' inputs are kept.
FORMATS = {
    "16bit": {},
    "fp8": {"weight_format": "fp8", "activation_format": "16bit"},
    "w8a8": {"weight_format": "fp8", "activation_format": "fp8"},
}

console = Console()
if not console.is_terminal:
    console.width = 120  # a log file has room for the table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", default="llama-3.1-8b", choices=list(SHAPES))
    add("--context", type=int, action="append", help=f"repeatable; default: {CONTEXTS}")
    add("--chunk", type=int, action="append", help="prefill_chunk; repeatable; default: automatic")
    add("--page-size", type=int, help="tokens per KV page")
    add("--device", default="auto")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--attention", action="append", choices=["full", "tidal"],
        help="of the tokens after the prompt; repeatable; default: full")  # fmt: skip
    add("--format", action="append", choices=list(FORMATS),
        help="of weights and activations; repeatable; default: 16bit")  # fmt: skip
    add("--new-tokens", type=int, default=1, help="with each prompt; default: 1")
    add("--repeats", type=int, default=5, help="timed prompts per row; of more than 64K tokens one")
    add("--peers", action="append", choices=[*PEERS, "none"],
        help="repeatable; default: all, on a GPU")  # fmt: skip
    add("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def model_tflop(model: ModelConfig, num_tokens: int) -> float:
    """What reading a prompt costs, in 10^12 operations."""
    qkv = (model.num_q_heads + 2 * model.num_kv_heads) * model.head_dim
    out = model.num_q_heads * model.head_dim
    of_experts = model.experts_per_token * model.expert_intermediate_size + model.shared_expert_size
    layers = expert_layers(model)
    inner = sum(of_experts if each else model.intermediate_size for each in layers)
    weights = model.hidden_size * (len(layers) * (qkv + out) + 3 * inner)
    products = num_tokens * weights + model.hidden_size * model.vocab_size
    visible = num_tokens * (num_tokens + 1) // 2
    attention = 2 * model.num_layers * model.num_q_heads * model.head_dim * visible
    return 2 * (products + attention) / 1e12


def repeats(args: argparse.Namespace, context: int) -> int:
    """Timed prompts of this length."""
    return args.repeats if context <= _LONG else 1


def seeds(args: argparse.Namespace, context: int, compiles: bool = False) -> range:
    """Seeds of a row's prompts, the untimed one first; a long one warms up on shorter rows, unless
    every length is compiled."""
    return range(repeats(args, context) + (compiles or context <= _LONG))


def prompt(num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(vocab_size) for _ in range(num_tokens)]


def engine_rows(args: argparse.Namespace, folder: Path, contexts: list[int]) -> Iterator[dict]:
    """One row a kind of attention, format, chunk size and context."""
    kinds = product(args.attention or ["full"], args.format or ["16bit"], args.chunk or [None])
    for attention, kept, chunk in kinds:
        options = {"prefill_chunk": chunk, "page_size": args.page_size, "load_format": "dummy"}
        options |= FORMATS[kept]
        if attention == "tidal":
            options["select_layers"] = SHAPES[args.shape].select_layers
        with tidaldecode.Decoder(
            folder, device=args.device, dtype=args.dtype, attention=attention,
            max_seq_len=max(contexts) + args.new_tokens, max_batch_size=1, **options,
        ) as decoder:  # fmt: skip
            for context in contexts:
                timings = [
                    decoder.generate(
                        prompt(context, decoder.model.vocab_size, seed),
                        max_new_tokens=args.new_tokens,
                        temperature=0.0,
                        ignore_eos=True,
                    ).timings
                    for seed in seeds(args, context)
                ][-repeats(args, context) :]
                row = {
                    "runner": ", ".join(("tidaldecode", attention, kept)[: 2 + (kept != "16bit")]),
                    "context": context,
                    "prefill_chunk": decoder.config.prefill_chunk,
                    "page_size": decoder.config.page_size,
                    "s": statistics.median(each.time_to_first_token_s for each in timings),
                    "median_of": len(timings),
                }
                if args.new_tokens > 1:
                    rate = statistics.median(each.decode_tokens_per_s for each in timings)
                    row |= {"new_tokens": args.new_tokens, "ms_per_token": round(1e3 / rate, 3)}
                yield row


def peer_rows(args: argparse.Namespace, folder: Path, contexts: list[int]) -> Iterator[dict]:
    """transformers with each attention asked for; what fails becomes a line for people."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import AutoConfig, AutoModelForCausalLM

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "compiled": SDPBackend.CUDNN_ATTENTION,  # the faster one
    }
    config = AutoConfig.from_pretrained(folder)
    with torch.inference_mode():
        with torch.device("cuda"):
            dtype = getattr(torch, args.dtype)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for peer in sorted(args.peers or PEERS, key=PEERS.index):  # compiling is for good
            if compiles := peer == "compiled":
                compile_layers(model)
            for context in contexts:
                row = {"runner": f"transformers, {peer}", "context": context}
                try:
                    with sdpa_kernel(backends[peer]):
                        seconds = [
                            peer_seconds(model, prompt(context, config.vocab_size, seed))
                            for seed in seeds(args, context, compiles)
                        ][-repeats(args, context) :]
                except Exception as error:  # whatever a peer throws must not end the run
                    yield {**row, "skipped": one_line(error)}
                    continue
                yield {**row, "s": statistics.median(seconds), "median_of": len(seconds)}
    del model
    peer_transformers.free_memory("cuda")


def compile_layers(model: Any) -> None:
    """All of every layer but attention, for each length. The whole forward pass compiled is slower
    than eager (32K, torch 2.11: 2.66 s instead of 1.38), for its attention takes far longer."""
    import torch
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa", torch.compiler.disable(sdpa_attention_forward))
    torch._dynamo.config.recompile_limit = 1024  # each layer is a program
    for layer in model.model.layers:
        layer.compile(dynamic=False)


def peer_seconds(model: Any, ids: list[int]) -> float:
    """As its generate() reads a prompt: one pass, logits of the last token, the token down."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    out = model(input_ids=torch.tensor([ids], device="cuda"), use_cache=True, logits_to_keep=1)
    int(out.logits[0, -1].argmax())
    return time.perf_counter() - start


def with_rates(row: dict, model: ModelConfig, is_cuda: bool) -> dict:
    """The row with what its time means."""
    if "s" not in row:
        return row
    tflops = model_tflop(model, row["context"]) / row["s"]
    rates = {"s": round(row["s"], 4), "tokens_per_s": round(row["context"] / row["s"])}
    rates["tflops"] = round(tflops, 1)
    if is_cuda:
        rates["share_of_790"] = round(tflops / H200_TFLOPS, 3)
    return row | rates


def show(rows: list[dict]) -> None:
    table = Table(title="Time to first token")
    for name in ("prompt", "runner", "chunk", "s", "tokens/s", "TFLOP/s", "of 790", "ms/token"):
        table.add_column(name, justify="left" if name == "runner" else "right")
    for row in rows:
        if "skipped" in row:
            console.print(f"{row['runner']}, {row['context']} tokens: {row['skipped']}")
            continue
        share = f"{row['share_of_790']:.0%}" if "share_of_790" in row else ""
        table.add_row(
            f"{row['context']:,}", row["runner"], str(row.get("prefill_chunk", "")),
            f"{row['s']:.3f}", f"{row['tokens_per_s']:,}", f"{row['tflops']:.0f}", share,
            f"{row['ms_per_token']:.2f}" if "ms_per_token" in row else "",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    args = parse_arguments()
    contexts = args.context or list(CONTEXTS)
    with tempfile.TemporaryDirectory() as parent:
        shape = SHAPES[args.shape].for_contexts(max(contexts) + args.new_tokens)
        folder = shape.write(Path(parent))
        model = read_model_folder(folder, "dummy").model
        device = resolve_device(args.device)
        is_cuda = device != "cpu"
        rows = [with_rates(row, model, is_cuda) for row in engine_rows(args, folder, contexts)]
        if is_cuda and args.peers != ["none"]:
            rows += [with_rates(row, model, True) for row in peer_rows(args, folder, contexts)]
    show(rows)
    if args.output:
        report = {
            "benchmark": "prefill",
            "command": command_line(),
            "commit": commit(),
            "uncommitted_changes": has_uncommitted_changes(),
            "date": datetime.date.today().isoformat(),
            "device": hardware_name(device),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "shape": args.shape,
            "dtype": args.dtype,
            "rows": rows,
        }
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
