"""What a user would run instead, at the same sizes: single ops of torch and FlashInfer.

Each peer is one function that prepares random data and gives a call to time; one that is not
installed or fails is reported in one line. An op runs on many copies of its data in turn, more
than the L2 holds, recorded in one CUDA graph; the time is a replay's, by events, over its ops. On
a CPU, which is there to try this file out, the calls are timed one after the other.

Attention is from one new token per sequence to a full cache in bfloat16: torch contiguous,
FlashInfer in pages of 16; prompts are causal attention of all tokens to each other, contiguous.
Selection is top-k alone, of one row of float32 scores per KV head: the engine's SelectTopK pools
and normalises them as well.
"""

from __future__ import annotations

import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from shapes import NEARLY_EMPTY, Point
from tidaldecode.checkpoint.model_folder import read_model_folder

SAMPLES = 20
COLD_BYTES = 1.5e9  # of all copies together: many times any L2
MAX_COPIES = 32
PROMPT_TOKENS = 32768
FLASHINFER_PAGE_SIZE = 16
FLASHINFER_WORKSPACE_BYTES = 512 << 20

Call = Callable[[int], object]  # runs the op on the i-th copy of its data
Row = dict[str, Any]
Model = tuple[Path, str, list[Point]]  # folder, load_format, what was measured


@dataclass(frozen=True)
class AttentionCase:
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    batch_size: int

    @property
    def num_bytes(self) -> int:
        """Keys and values, read once."""
        return 2 * self.batch_size * self.context * self.num_kv_heads * self.head_dim * 2


@dataclass(frozen=True)
class SelectionCase:
    rows: int
    context: int
    token_budget: int

    @property
    def num_bytes(self) -> int:
        """Scores, read once."""
        return self.rows * self.context * 4


@dataclass(frozen=True)
class PromptCase:
    """One layer's causal attention over a whole prompt."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    context: int

    @property
    def num_bytes(self) -> int:
        """Queries, keys and values read, outputs written, once."""
        return 4 * self.context * (self.num_q_heads + self.num_kv_heads) * self.head_dim

    @property
    def num_flops(self) -> int:
        """Two products over the tokens that each query sees."""
        return 4 * self.num_q_heads * self.head_dim * self.context * (self.context + 1) // 2


Case = AttentionCase | SelectionCase | PromptCase
Peer = Callable[[Any, int, str], Call]  # case, copies, device


def measure(
    kinds: Iterable[str], models: list[Model], device: str, token_budget: int, progress: Progress
) -> Iterator[Row]:
    """Rows of all peers of the kinds asked ("attention", "prompt", "selection", "hf").

    A row that says "skipped" is a line for people.
    """
    for kind in kinds:
        if kind == "hf":
            import peer_transformers

            yield from peer_transformers.measure(models, device, progress)
            continue
        cases = attention_cases(models) if kind == "attention" else []
        cases = prompt_cases(models) if kind == "prompt" else cases
        cases = selection_cases(models, token_budget) if kind == "selection" else cases
        yield from measure_ops(kind, cases, device, progress)


def attention_cases(models: list[Model]) -> list[AttentionCase]:
    cases = {}  # a set that keeps its order: models share shapes
    for folder, load_format, points in models:
        model = read_model_folder(folder, load_format).model
        for context, batch_size in points:
            heads = (model.num_q_heads, model.num_kv_heads, model.head_dim)
            if context != NEARLY_EMPTY:
                cases[AttentionCase(*heads, context, batch_size)] = None
    return list(cases)


def prompt_cases(models: list[Model]) -> list[PromptCase]:
    cases = {}
    for folder, load_format, _ in models:
        model = read_model_folder(folder, load_format).model
        heads = (model.num_q_heads, model.num_kv_heads, model.head_dim)
        cases[PromptCase(*heads, PROMPT_TOKENS)] = None
    return list(cases)


def selection_cases(models: list[Model], token_budget: int) -> list[SelectionCase]:
    cases = {}
    for case in attention_cases(models):
        if case.context > token_budget:
            rows = case.batch_size * case.num_kv_heads
            cases[SelectionCase(rows, case.context, token_budget)] = None
    return list(cases)


def measure_ops(kind: str, cases: list[Any], device: str, progress: Progress) -> Iterator[Row]:
    try:
        import torch
    except ImportError as error:
        yield {"skipped": f"peers: {error}"}
        return
    if device != "cpu" and not torch.cuda.is_available():
        yield {"skipped": f"peers: torch {torch.__version__} sees no GPU"}
        return
    peers = PEERS[kind]
    task = progress.add_task(f"{kind} peers", total=len(peers) * len(cases))
    for name, prepare in peers.items():
        failed: dict[str, list[Any]] = {}  # cases by reason: one line for each reason
        for case in cases:
            progress.update(task, description=f"{name}, {case.context} tokens")
            row = measure_op(prepare, case, device)
            progress.advance(task)
            if "error" in row:
                failed.setdefault(row["error"], []).append(case)
            else:
                yield {"peer": name, "version": version(name), "kind": kind, **asdict(case), **row}
        for reason, without in failed.items():
            where = "" if len(without) == len(cases) else f" at {', '.join(map(str, without))}"
            yield {"skipped": f"{name}{where}: {reason}"}
    progress.update(task, description=f"{kind} peers")


def measure_op(prepare: Peer, case: Case, device: str) -> Row:
    """Time of one op of one peer, or why there is none."""
    import torch

    copies = min(MAX_COPIES, max(2, math.ceil(COLD_BYTES / case.num_bytes)))
    if device == "cpu":
        copies = 2
    try:
        with torch.inference_mode():
            times = time_op(prepare(case, copies, device), copies, device)
    except Exception as error:  # whatever a peer throws must not end the run
        return {"error": one_line(error)}
    finally:
        if device != "cpu":
            torch.cuda.empty_cache()
    us = statistics.median(times)
    row = {
        "us": round(us, 2),
        "tb_per_s": round(case.num_bytes / us * 1e-6, 3),
        "copies": copies,
        "median_of": len(times),
    }
    if isinstance(case, PromptCase):
        row["tflop_per_s"] = round(case.num_flops / us * 1e-6, 1)
    return row


def time_op(call: Call, copies: int, device: str) -> list[float]:
    """Microseconds per op, one value a sample."""
    if device == "cpu":
        return [time_on_cpu(call, copies) for _ in range(3)]
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles, plans and allocates outside of the recording
        for i in range(copies):
            call(i)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    times = []
    for _ in range(SAMPLES + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / copies)
    return times[2:]  # without the warm-up


def time_on_cpu(call: Call, copies: int) -> float:
    start = time.perf_counter()
    for i in range(copies):
        call(i)
    return 1e6 * (time.perf_counter() - start) / copies


# --- attention ---


def sdpa(backend: str) -> Peer:
    """torch's scaled_dot_product_attention, held to one backend."""

    def prepare(case: AttentionCase, copies: int, device: str) -> Call:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        b, d = case.batch_size, case.head_dim
        options = {"device": device, "dtype": torch.bfloat16}
        q = torch.randn(b, case.num_q_heads, 1, d, **options)
        k = torch.randn(copies, b, case.num_kv_heads, case.context, d, **options)
        v = torch.randn(copies, b, case.num_kv_heads, case.context, d, **options)
        grouped = case.num_q_heads != case.num_kv_heads
        only = getattr(SDPBackend, backend)

        def call(i: int) -> object:
            with sdpa_kernel(only):
                return scaled_dot_product_attention(q, k[i], v[i], enable_gqa=grouped)

        return call

    return prepare


def sdpa_prompt(backend: str) -> Peer:
    """The same over a whole prompt, causal; laid out [tokens, heads, d] as projections leave it."""

    def prepare(case: PromptCase, copies: int, device: str) -> Call:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        def random(heads: int) -> torch.Tensor:
            shape = (copies, 1, case.context, heads, case.head_dim)
            return torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(2, 3)

        q, k, v = random(case.num_q_heads), random(case.num_kv_heads), random(case.num_kv_heads)
        grouped = case.num_q_heads != case.num_kv_heads
        only = getattr(SDPBackend, backend)

        def call(i: int) -> object:
            with sdpa_kernel(only):
                return scaled_dot_product_attention(
                    q[i], k[i], v[i], is_causal=True, enable_gqa=grouped
                )

        return call

    return prepare


def flashinfer_decode(case: AttentionCase, copies: int, device: str) -> Call:
    """FlashInfer's paged decode without tensor cores, pages in random order."""
    import flashinfer
    import torch

    page = FLASHINFER_PAGE_SIZE
    per_row, last = -(-case.context // page), (case.context - 1) % page + 1
    num_pages = per_row * case.batch_size
    ints = {"device": device, "dtype": torch.int32}
    bfloat16 = {"device": device, "dtype": torch.bfloat16}
    indptr = torch.arange(case.batch_size + 1, **ints) * per_row
    indices = torch.randperm(num_pages, device=device).to(torch.int32)
    last_page_len = torch.full((case.batch_size,), last, **ints)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=indptr.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last_page_len.clone(),
    )
    wrapper.plan(
        indptr, indices, last_page_len, case.num_q_heads, case.num_kv_heads, case.head_dim, page,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    q = torch.randn(case.batch_size, case.num_q_heads, case.head_dim, **bfloat16)
    cache_shape = (num_pages, 2, page, case.num_kv_heads, case.head_dim)
    caches = [torch.randn(cache_shape, **bfloat16) for _ in range(copies)]
    return lambda i: wrapper.run(q, caches[i])


# --- selection ---


def torch_top_k(case: SelectionCase, copies: int, device: str) -> Call:
    import torch

    scores = torch.randn(copies, case.rows, case.context, device=device)
    return lambda i: torch.topk(scores[i], case.token_budget, sorted=False)


def flashinfer_top_k(case: SelectionCase, copies: int, device: str) -> Call:
    import flashinfer
    import torch

    scores = torch.randn(copies, case.rows, case.context, device=device)
    return lambda i: flashinfer.top_k(scores[i], case.token_budget)


PEERS: dict[str, dict[str, Peer]] = {
    "attention": {
        "torch sdpa cudnn": sdpa("CUDNN_ATTENTION"),
        "torch sdpa flash": sdpa("FLASH_ATTENTION"),
        "flashinfer decode": flashinfer_decode,
    },
    "prompt": {
        "torch sdpa cudnn": sdpa_prompt("CUDNN_ATTENTION"),
        "torch sdpa flash": sdpa_prompt("FLASH_ATTENTION"),
    },
    "selection": {"torch topk": torch_top_k, "flashinfer top_k": flashinfer_top_k},
}


def version(peer: str) -> str:
    """Name and version of the package behind a peer, "torch 2.13.0"."""
    name = peer.split()[0]
    package = {"flashinfer": "flashinfer-python"}.get(name, name)
    return f"{name} {importlib.metadata.version(package)}"


def one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else text[:197] + "..."
