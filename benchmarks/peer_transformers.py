"""A decode step of Hugging Face transformers, compiled, over a full static cache.

The same shape with random weights in bfloat16, at the longest context measured with one sequence.
A step is what its generate() does with a static cache, without the overhead of that loop: forward,
argmax, the token down to the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import Progress

from peers import Model, Row, one_line, version

WARMUP = 5  # compiling, recording and replaying included
STEPS = 10


def measure(models: list[Model], device: str, progress: Progress) -> Iterator[Row]:
    """One row per model; one that says "skipped" is a line for people."""
    longest = {
        folder: max(context for context, batch_size in points if batch_size == 1)
        for folder, _, points in models
        if any(batch_size == 1 for _, batch_size in points)
    }
    task = progress.add_task("transformers", total=len(longest))
    for folder, context in longest.items():
        progress.update(task, description=f"transformers, {folder.name}, {context} tokens")
        try:
            times = step_times(folder, context, device)
        except Exception as error:  # whatever a peer throws must not end the run
            yield {"skipped": f"transformers, {folder.name}: {one_line(error)}"}
            continue
        finally:
            free_memory(device)
            progress.advance(task)
        yield {
            "peer": "transformers, static cache, compiled",
            "version": f"{version('transformers')}, {version('torch')}",
            "kind": "step",
            "model": folder.name,
            "context": context,
            "batch_size": 1,
            "ms": round(statistics.median(times), 3),
            "median_of": len(times),
        }


def step_times(folder: Path, context: int, device: str) -> list[float]:
    """Milliseconds of single steps."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.inference_mode():
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        cache = full_cache(model.config, context, device)
        forward = torch.compile(model.forward, mode="reduce-overhead")
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        positions = torch.full((1, 1), context - 1, device=device)
        times = []
        for _ in range(WARMUP + STEPS):
            for layer in cache.layers:  # one token back: every step is the same step
                layer.cumulative_length.fill_(context - 1)
            synchronize(device)
            start = time.perf_counter()
            torch.compiler.cudagraph_mark_step_begin()
            out = forward(
                input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True
            )
            int(out.logits[0, -1].argmax())
            times.append(1e3 * (time.perf_counter() - start))
        return times[WARMUP:]


def full_cache(config: Any, context: int, device: str) -> Any:
    """A StaticCache of random keys and values; the last position is the new token's."""
    import torch
    from transformers import StaticCache

    cache = StaticCache(config=config, max_cache_len=context)
    head_dim = getattr(config, "head_dim", None)
    cache.early_initialization(
        batch_size=1,
        num_heads=config.num_key_value_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        dtype=torch.bfloat16,
        device=torch.device(device),
    )
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def synchronize(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def free_memory(device: str) -> None:
    import gc

    import torch

    torch.compiler.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
