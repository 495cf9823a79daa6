"""Whole decode steps over a full cache, dense and tidal, beside the bytes they must read.

    python benchmarks/bench_decode.py --output results.json        # shapes of real models
    python benchmarks/bench_decode.py --shape tiny --device cpu     # to try it out
    python benchmarks/bench_decode.py path/to/model                 # a real model's weights

No weights are needed and no prompt is read: `Decoder(load_format="dummy")` and
`Decoder.measure_steps` run the path that every generated token takes, on random weights and a
cache of random keys and values. Peers (peers.py, peer_transformers.py) are measured in the same
run. Prints tables; writes JSON and, beside it, a plot. Method: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import decode_report
import peers
import tidaldecode
from provenance import command_line, commit, hardware_name, has_uncommitted_changes
from shapes import DEFAULT_SHAPES, NEARLY_EMPTY, SHAPES, Point
from step_bytes import H200_READ_TB_PER_S, kv_bytes_per_token, loaded_bytes, step_bytes
from tidaldecode import _core
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.config import KV_DTYPES, LM_HEAD_FORMATS, WEIGHT_FORMATS, PlanConfig
from tidaldecode.engine_config import resolve_device
from tidaldecode.errors import TidalError
from tidaldecode.plans import plan_letters, safe_config

# Dense and tidal steps take turns, so that a device that slows down slows both.
ROUNDS = 3
# What is left free for scratch, graphs and libraries.
CUDA_RESERVE_BYTES = 4 << 30

console = Console()
if not console.is_terminal:
    console.width = 120  # a log file has room for the tables


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model folder to measure, and where."""

    folder: Path
    load_format: str
    points: tuple[Point, ...]
    select_layers: tuple[int, ...] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    with_peers: bool = True


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("models", type=Path, nargs="*", help="Hugging Face model folders, with their own weights")
    add("--shape", action="append", choices=list(SHAPES), help="repeatable; default: " +
        ", ".join(DEFAULT_SHAPES))  # fmt: skip
    add("--context", type=int, action="append", help="tokens in the cache; repeatable")
    add("--batch-size", type=int, action="append", help="with each context; repeatable")
    add("--token-budget", type=int, help="default: the plan's, else 1024")
    add("--select-layers", type=int, nargs="+", help="default: the model's plan")
    add("--safe-plan", action="store_true", help="every layer chooses for itself, by keys of 4 "
        "bits: what token_budget gives a model that nobody calibrated")  # fmt: skip
    add("--device", default="auto")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--kv-dtype", default="auto", choices=["auto", *KV_DTYPES])
    add("--weight-format", default="auto", choices=WEIGHT_FORMATS)
    add("--lm-head-format", default="auto", choices=LM_HEAD_FORMATS)
    add("--steps", type=int, default=30, help="timed steps per row, at least")
    add("--warmup", type=int, default=4, help="untimed steps before every round of them")
    floors = f"TB/s for the floors; default: {H200_READ_TB_PER_S}, an H200's; none on a CPU"
    add("--bandwidth", type=float, help=floors)
    add("--peers", action="append", choices=["attention", "prompt", "selection", "hf", "none"],
        help="repeatable; default: attention and selection, on a GPU")  # fmt: skip
    add("--bench-ops", type=Path, help="the built bench_ops, to run beside the attention peers")
    add("--output", type=Path, help="JSON file to write; the plot goes beside it")
    args = parser.parse_args()
    if args.bandwidth is None and resolve_device(args.device) != "cpu":
        args.bandwidth = H200_READ_TB_PER_S
    return args


# --- what to measure ---


def targets(args: argparse.Namespace, parent: Path) -> list[Target]:
    """Folders given, and folders written for shapes."""
    found = [folder_target(args, folder) for folder in args.models]
    for name in args.shape or ([] if args.models else DEFAULT_SHAPES):
        points = asked_points(args) or SHAPES[name].points
        shape = SHAPES[name].for_contexts(max(context for context, _ in points))
        target = Target(
            folder=shape.write(parent),
            load_format="dummy",
            points=points,
            select_layers=tuple(args.select_layers or ()) or shape.select_layers,
            notes={"weights": "random", "config": shape.config, **shape.notes},
            with_peers=shape.with_peers,
        )
        found.append(target)
    return found


def folder_target(args: argparse.Namespace, folder: Path) -> Target:
    longest = read_model_folder(folder).model.max_position_embeddings
    usual = [min(context, longest) for context in (NEARLY_EMPTY, 4096, 16384, 32768, 131072)]
    points = [(context, batch_size) for batch_size in (1, 8) for context in sorted({*usual})]
    return Target(
        folder=folder,
        load_format="auto",
        points=asked_points(args) or tuple(points),
        select_layers=tuple(args.select_layers or ()) or None,
        notes={"weights": "the folder's"},
    )


def asked_points(args: argparse.Namespace) -> tuple[Point, ...]:
    """Every context with every batch size, if contexts are given, an almost empty cache first."""
    if not args.context:
        return ()
    contexts = sorted({NEARLY_EMPTY, *args.context})
    return tuple((c, b) for b in args.batch_size or [1] for c in contexts)


def fitting_points(
    target: Target, device: str, args: argparse.Namespace
) -> tuple[list[Point], list[str]]:
    """The points whose cache fits beside the weights, and a line for each that does not."""
    model, dtype = read_model_folder(target.folder, target.load_format).model, args.dtype
    kv_dtype = dtype if args.kv_dtype == "auto" else args.kv_dtype
    name = "cuda:0" if device == "cuda" else device
    free = next((d["free_bytes"] for d in _core.list_devices() if d["name"] == name), 0)
    room = free - loaded_bytes(model, dtype, args.weight_format, args.lm_head_format)
    room -= 0 if device == "cpu" else CUDA_RESERVE_BYTES
    fits, lines = [], []
    for context, batch_size in target.points:
        needed = context * batch_size * kv_bytes_per_token(model, kv_dtype)
        if needed <= room:
            fits.append((context, batch_size))
        else:
            lines.append(
                f"{target.folder.name}, {context} tokens x {batch_size}: the cache needs "
                f"{needed / 1e9:.1f} GB, {max(room, 0) / 1e9:.1f} GB are free for it"
            )
    return fits, lines


# --- measuring ---


def open_decoder(target: Target, points: list[Point], args: argparse.Namespace):
    page_size = _core.DecodeConfig().page_size
    plan: dict[str, Any] = {"select_layers": target.select_layers}
    if args.safe_plan:
        model = read_model_folder(target.folder, target.load_format).model
        plan = asdict(safe_config(model.windows))
    plan["token_budget"] = args.token_budget
    return tidaldecode.Decoder(
        target.folder,
        load_format=target.load_format,
        device=args.device,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        weight_format=args.weight_format,
        lm_head_format=args.lm_head_format,
        **plan,
        max_seq_len=max(context for context, _ in points),
        max_batch_size=max(batch_size for _, batch_size in points),
        num_pages=max(b * -(-context // page_size) for context, b in points),
        page_size=page_size,
        gpu_memory_utilization=1.0,  # fitting_points leaves room
    )


def attention_kinds(decoder: tidaldecode.Decoder, context: int) -> dict[str, str]:
    """Kinds of step that differ at this length, with measure_steps' word for each."""
    config = decoder.config
    kinds = {"dense": "full"}
    dense_up_to = max(config.token_budget or 0, config.sparse_min_context or 0)
    if config.attention == "tidal" and context > dense_up_to:
        kinds["tidal"] = "auto"
    return kinds


def measure_point(
    decoder: tidaldecode.Decoder, point: Point, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row per kind of step; the kinds take turns."""
    context, batch_size = point
    kinds = attention_kinds(decoder, context)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, attention in kinds.items():
            seconds = decoder.measure_steps(
                context,
                batch_size,
                steps=-(-args.steps // ROUNDS),
                warmup=args.warmup,
                attention=attention,
            )
            times[kind] += [1e3 * value for value in seconds]
    for kind, values in times.items():
        dense = plan_letters(decoder.model.windows, PlanConfig())
        plan = decoder.plan if kind == "tidal" else dense
        least = step_bytes(decoder.model, decoder.config, plan, context, batch_size)
        ms = statistics.median(values)
        floor_ms = least.floor_ms(args.bandwidth) if args.bandwidth else None
        yield {
            "model": decoder.folder.path.name,
            "context": context,
            "batch_size": batch_size,
            "attention": kind,
            "plan": plan,
            "ms_per_step": round(ms, 4),
            "tokens_per_s": round(1e3 * batch_size / ms, 1),
            "weight_bytes": least.weights,
            "kv_bytes": least.kv,
            "floor_ms": floor_ms and round(floor_ms, 4),
            "ratio_to_floor": floor_ms and round(ms / floor_ms, 3),
            "x_dense": round(statistics.median(times["dense"]) / ms, 3),
            "nearly_empty": context == NEARLY_EMPTY,
            "ms_per_step_all": [round(value, 4) for value in values],
        }


def measure_target(
    target: Target, args: argparse.Namespace, report: dict[str, Any], progress: Progress
) -> list[Point]:
    """Adds a model and its rows to the report; gives the points that were measured."""
    points, lines = fitting_points(target, resolve_device(args.device), args)
    for line in lines:
        skip(report, line)
    if not points:
        return []
    task = progress.add_task(f"{target.folder.name}: loading", total=len(points))
    start = time.perf_counter()
    try:
        with open_decoder(target, points, args) as decoder:
            loaded = time.perf_counter() - start
            report["models"].append(describe(target, decoder, loaded))
            for point in points:
                label = f"{target.folder.name}: {point[0]} tokens x {point[1]}"
                progress.update(task, description=label)
                report["rows"] += measure_point(decoder, point, args)
                progress.advance(task)
    except TidalError as error:
        skip(report, f"{target.folder.name}: {error}")
        return []
    progress.update(task, description=target.folder.name)
    return points


def describe(target: Target, decoder: tidaldecode.Decoder, load_s: float) -> dict[str, Any]:
    config = decoder.config
    settings = (
        "dtype",
        "weight_format",
        "lm_head_format",
        "kv_dtype",
        "token_budget",
        "granularity",
        "page_size",
        "max_seq_len",
    )
    return {
        "model": target.folder.name,
        "plan": decoder.plan,
        "plan_source": decoder.plan_source,
        **{name: getattr(config, name) for name in settings},
        "memory": asdict(decoder.memory_plan()),
        "load_s": round(load_s, 2),
        **target.notes,
    }


def skip(report: dict[str, Any], line: str) -> None:
    console.print(f"skipped: {line}", style="yellow", highlight=False, markup=False)
    report["skipped"].append(line)


def new_report(args: argparse.Namespace) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "benchmark": "bench_decode",
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "uncommitted changes": has_uncommitted_changes(),
        "command": command_line(),
        "device": hardware_name(resolve_device(args.device)),
        "libraries": dict(_core.list_libraries()),
        "times": f"median ms of {ROUNDS} x {-(-args.steps // ROUNDS)} steps after {args.warmup} "
        "untimed ones, by the host's clock",
        "floor": "weights and KV that must be read (step_bytes.py), at the bandwidth",
        "bandwidth_tb_per_s": args.bandwidth,
        "nearly_empty": f"{NEARLY_EMPTY} tokens: a step whose attention reads next to nothing",
        "models": [],
        "rows": [],
        "peers": [],
        "ops": [],
        "skipped": [],
    }


def measure_peers(
    measured: list[tuple[Target, list[Point]]],
    args: argparse.Namespace,
    report: dict[str, Any],
    progress: Progress,
) -> None:
    """Peers at the same shapes and lengths; each that is not there is one line."""
    device = "cpu" if resolve_device(args.device) == "cpu" else "cuda"
    models = [(t.folder, t.load_format, points) for t, points in measured if t.with_peers]
    if args.bench_ops:
        report["ops"] = run_bench_ops(args.bench_ops, device, report)
    for row in peers.measure(
        asked_peers(args), models, device, args.token_budget or 1024, progress
    ):
        if "skipped" in row:
            skip(report, row["skipped"])
        else:
            report["peers"].append(row)


def run_bench_ops(program: Path, device: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The engine's own ops, so that peers have their counterpart in the same run."""
    command = [str(program), "--device", device, "--filter", "attention_full"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        skip(report, f"bench_ops: {done.stderr.strip()}")
    return [row for line in done.stdout.splitlines() if "op" in (row := json.loads(line))]


def asked_peers(args: argparse.Namespace) -> Iterable[str]:
    if args.peers is None:
        return () if resolve_device(args.device) == "cpu" else ("attention", "selection")
    return [peer for peer in args.peers if peer != "none"]


def main() -> None:
    args = parse_arguments()
    start = time.perf_counter()
    report = new_report(args)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with tempfile.TemporaryDirectory() as parent:
        measured: list[tuple[Target, list[Point]]] = []
        with Progress(*columns, console=console) as progress:
            for target in targets(args, Path(parent)):
                measured.append((target, measure_target(target, args, report, progress)))
            measure_peers(measured, args, report, progress)
    report["seconds"] = round(time.perf_counter() - start, 1)
    decode_report.print_tables(console, report)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        decode_report.plot(report, args.output.with_suffix(".png"), lambda line: skip(report, line))


if __name__ == "__main__":
    main()
