"""How fast weights get from the page cache onto the device, and how much host memory that takes.

    python benchmarks/bench_load.py --output load.json                 # the shapes of Llama-3.1-8B
    python benchmarks/bench_load.py --layers 2 --device cpu            # a small one, to try it out
    python benchmarks/bench_load.py --folder path/to/model             # a real model's files

Writes a folder of random weights in shards (16 GB in all; --directory says where), reads it once so
that it is in the page cache, and then loads it several times, each in a process of its own. Beside
that: the bandwidth of copies from pinned memory alone (torch, where it is installed), and what the
decoder took of the device beside its memory plan. Method: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

import tidaldecode
from provenance import command_line, commit, hardware_name, has_uncommitted_changes
from shapes import SHAPES
from tidaldecode import _core
from tidaldecode.checkpoint.families import FAMILIES
from tidaldecode.checkpoint.model_config import ModelConfig
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.checkpoint.tensor_names import expected_tensor_names
from tidaldecode.engine_config import resolve_device

SHARD_BYTES = 5_000_000_000  # as Hugging Face cuts them
NOISE_BYTES = 1 << 26  # repeated: no cache or file system makes use of that
PIECE_BYTES = 16 << 20
SAMPLE_S = 0.005

# The shapes whose tensors tensor_shape() knows.
_DENSE = [
    name
    for name, shape in SHAPES.items()
    if FAMILIES[shape.config["model_type"]].experts is None
    and not FAMILIES[shape.config["model_type"]].branch_norms
]

console = Console()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, help="load this model instead of writing one")
    add("--shape", choices=_DENSE, default="llama-3.1-8b")
    add("--layers", type=int, help="of the model that is written; default: the shape's own")
    add("--directory", type=Path, help="where it is written; default: a temporary folder")
    add("--device", default="auto")
    add("--dtype", default="auto", help="other than the files': loading converts")
    add("--max-seq-len", type=int, default=8192)
    add("--repeats", type=int, default=3)
    add("--output", type=Path, help="JSON file to write")
    add("--load-one", type=Path, help=argparse.SUPPRESS)  # what the processes do that load
    return parser.parse_args()


# --- a model folder ---


def tensor_shape(name: str, model: ModelConfig) -> list[int]:
    """The shape of a tensor by its name in checkpoints; of dense models without biases."""
    q_size, kv_size = model.num_q_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden, inner = model.hidden_size, model.intermediate_size
    shapes = {
        "embed_tokens": [model.vocab_size, hidden],
        "lm_head": [model.vocab_size, hidden],
        "q_proj": [q_size, hidden],
        "k_proj": [kv_size, hidden],
        "v_proj": [kv_size, hidden],
        "o_proj": [hidden, q_size],
        "gate_proj": [inner, hidden],
        "up_proj": [inner, hidden],
        "down_proj": [hidden, inner],
        "q_norm": [model.head_dim],
        "k_norm": [model.head_dim],
    }
    return shapes.get(name.split(".")[-2], [hidden])  # the other norms


def noise() -> np.ndarray:
    """Normal values of a model's usual spread as bfloat16 bits."""
    values = np.random.default_rng(0).standard_normal(NOISE_BYTES // 2, dtype=np.float32) * 0.02
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def shards(model: ModelConfig) -> list[dict[str, list[int]]]:
    """Names and shapes of each file's tensors, in order."""
    files: list[dict[str, list[int]]] = [{}]
    size = 0
    for name in expected_tensor_names(model):
        shape = tensor_shape(name, model)
        num_bytes = 2 * int(np.prod(shape))
        if files[-1] and size + num_bytes > SHARD_BYTES:
            files.append({})
            size = 0
        files[-1][name] = shape
        size += num_bytes
    return files


def write_model(args: argparse.Namespace, parent: Path) -> Path:
    """A model folder of random bfloat16 weights."""
    shape = SHAPES[args.shape]
    if args.layers:
        shape = replace(shape, config=shape.config | {"num_hidden_layers": args.layers})
    folder = shape.write(parent)
    model = read_model_folder(folder, "dummy").model
    values = memoryview(noise()).cast("B")
    files = shards(model)
    total = sum(2 * int(np.prod(shape)) for file in files for shape in file.values())
    weight_map = {}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
               TransferSpeedColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"Writing {folder.name}", total=total)
        for index, file in enumerate(files):
            name = f"model-{index + 1:05}-of-{len(files):05}.safetensors"
            weight_map |= dict.fromkeys(file, name)
            for written in write_shard(folder / name, file, values):
                progress.advance(task, written)
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json))
    return folder


def safetensors_head(shapes: dict[str, list[int]]) -> bytes:
    """What stands in a file of bfloat16 tensors in front of them."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, file: dict[str, list[int]], values: memoryview) -> Iterator[int]:
    """One file; yields bytes as they are written."""
    size = 2 * sum(int(np.prod(shape)) for shape in file.values())
    with path.open("wb") as output:
        output.write(safetensors_head(file))
        done = 0
        while done < size:
            begin = done % len(values)
            piece = values[begin : min(len(values), begin + size - done)]
            output.write(piece)
            done += len(piece)
            yield len(piece)


def read_once(folder: Path) -> float:
    """Brings the files into the page cache; GB/s of the second time, one thread."""
    buffer = bytearray(PIECE_BYTES)
    for _ in range(2):
        start, total = time.perf_counter(), 0
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    total += count
    return total / (time.perf_counter() - start) / 1e9


# --- loading, in a process of its own ---


class HostMemory:
    """Samples this process's anonymous memory: what it takes beside the page cache."""

    def __init__(self) -> None:
        self.peak = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> HostMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ends.wait(SAMPLE_S):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> int:
        """Bytes: RssAnon, and RssShmem, which is where pinned memory may be counted."""
        lines = Path("/proc/self/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        return 1024 * sum(int(values[key].split()[0]) for key in ("RssAnon", "RssShmem"))


def free_bytes(device: str) -> int:
    name = "cuda:0" if device == "cuda" else device
    return next((d["free_bytes"] for d in _core.list_devices() if d["name"] == name), 0)


def load_one(args: argparse.Namespace) -> dict[str, Any]:
    """Loads the folder once."""
    device = resolve_device(args.device)
    options = {
        "device": device, "dtype": args.dtype, "attention": "full",
        "max_seq_len": args.max_seq_len, "max_batch_size": 1,
    }  # fmt: skip
    before_device = HostMemory.now()
    tidaldecode.plan_memory(args.load_one, **options)  # the first use of a GPU takes its time
    with_device = HostMemory.now()
    free_before = free_bytes(device)
    times: list[tuple[float, int]] = []
    with HostMemory() as host:
        start = time.perf_counter()
        decoder = tidaldecode.Decoder(
            args.load_one, **options,
            progress=lambda done, total: times.append((time.perf_counter(), done)),
        )  # fmt: skip
        ready_s = time.perf_counter() - start
    plan = decoder.memory_plan()
    (first_time, first_bytes), (last_time, last_bytes) = times[0], times[-1]
    weights_on_host = plan.weight_bytes if device == "cpu" else 0
    return {
        "weight_bytes": last_bytes,
        "gb_per_s": (last_bytes - first_bytes) / (last_time - first_time) / 1e9,
        "weights_s": last_time - start,
        "ready_s": ready_s,
        "host_bytes_peak": host.peak,
        "host_bytes_before": with_device,
        "host_bytes_before_device": before_device,
        # On a CPU the weights themselves are host memory (and of the cache what is in use).
        "host_bytes_for_loading": host.peak - with_device - weights_on_host,
        "device_bytes_taken": free_before - free_bytes(device),
        "plan": asdict(plan),
    }


def run_load(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--load-one", str(folder), "--device", args.device,
               "--dtype", args.dtype, "--max-seq-len", str(args.max_seq_len)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"loading failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# --- what copies alone reach ---


def pinned_gb_per_s(device: str) -> float | None:
    """Copies from pinned host memory to the device, by torch; None without it or on a CPU."""
    if device == "cpu" or importlib.util.find_spec("torch") is None:
        return None
    import torch

    source = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device)
    rates = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(64):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(64 * PIECE_BYTES / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)


# --- the report ---


def report(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device = resolve_device(args.device)
    now = datetime.datetime.now(datetime.timezone.utc)
    cached = read_once(folder)
    runs = [run_load(args, folder) for _ in range(args.repeats)]
    pinned = pinned_gb_per_s(device)
    rate = statistics.median(run["gb_per_s"] for run in runs)
    return {
        "benchmark": "bench_load",
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "uncommitted changes": has_uncommitted_changes(),
        "command": command_line(),
        "device": hardware_name("cuda:0" if device == "cuda" else device),
        "libraries": dict(_core.list_libraries()),
        "model": folder.name,
        "sizes": {"layers": read_model_folder(folder).model.num_layers,
                  "repeats": args.repeats, "dtype": args.dtype},
        "results": {
            "gb_per_s": rate,
            "pinned_gb_per_s": pinned,
            "share_of_pinned": pinned and rate / pinned,
            "one_thread_read_gb_per_s": cached,
            "ready_s": statistics.median(run["ready_s"] for run in runs),
            "host_bytes_for_loading": max(run["host_bytes_for_loading"] for run in runs),
            "runs": runs,
        },
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    values = result["results"]
    run = values["runs"][0]
    plan = tidaldecode.MemoryPlan(**run["plan"])
    pinned = values["pinned_gb_per_s"]
    rows = [
        ("weights", f"{run['weight_bytes'] / 1e9:.2f} GB"),
        ("loading, from the page cache", f"{values['gb_per_s']:.1f} GB/s"),
        ("copies from pinned memory alone", f"{pinned:.1f} GB/s" if pinned else "not measured"),
        ("share", f"{values['share_of_pinned']:.0%}" if pinned else "-"),
        ("one thread reading the files", f"{values['one_thread_read_gb_per_s']:.1f} GB/s"),
        ("until the decoder is ready", f"{values['ready_s']:.2f} s"),
        ("host memory for loading, peak", f"{values['host_bytes_for_loading'] / 1e6:.0f} MB"),
        ("planned on the device", f"{plan.total_bytes / 1e9:.2f} GB"),
        ("taken of the device", f"{run['device_bytes_taken'] / 1e9:.2f} GB"),
    ]
    table = Table(title=f"{result['model']}, {result['device']}")
    table.add_column("")
    table.add_column("", justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def main() -> None:
    args = parse_arguments()
    if args.load_one:
        print(json.dumps(load_one(args)))
        return
    with tempfile.TemporaryDirectory(dir=args.directory) as parent:
        result = report(args, args.folder or write_model(args, Path(parent)))
    show(result)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
