"""From the start of the process to the first word: where the time goes.

    python benchmarks/bench_start.py                                   # the packaged demo model
    python benchmarks/bench_start.py path/to/model --device cuda --output start.json

Runs `tidaldecode generate MODEL "Hello" --max-new-tokens 5` as a user does, and beside it a process
that takes its time part by part: the interpreter, the imports, reading the folder, weights (the
tokenizer is read beside them in a process of its own), waiting for that, and the first token.
Processor time includes child processes; medians of --repeats, from warm page caches.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

PARTS = ("interpreter", "imports", "folder", "weights", "tokenizer", "first token")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", type=Path, nargs="?", help="a model folder; default: the packaged demo model")
    add("--prompt", default="Hello")
    add("--device", default="auto")
    add("--max-seq-len", type=int, help="default: the model's own, as the command takes it")
    add("--repeats", type=int, default=5)
    add("--output", type=Path, help="JSON file to write")
    add("--started", type=float, help=argparse.SUPPRESS)  # what the process that is timed gets
    return parser.parse_args()


def timed_parts(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each part; runs in a process of its own, started at args.started."""
    marks = [args.started, time.time()]
    import tidaldecode
    from tidaldecode import decoder as decoder_module
    from tidaldecode.text.frontend import Frontend

    marks.append(time.time())
    read_folder, finish = decoder_module.read_model_folder, Frontend.finish_loading
    seen: dict[str, float] = {}

    def mark_folder(*values: Any) -> Any:
        folder = read_folder(*values)
        seen["folder"] = time.time()
        return folder

    def mark_weights(self: Frontend) -> None:
        seen["weights"] = time.time()
        finish(self)

    decoder_module.read_model_folder = mark_folder
    Frontend.finish_loading = mark_weights
    decoder = tidaldecode.Decoder(
        args.model, device=args.device, max_seq_len=args.max_seq_len, max_batch_size=1
    )
    marks += [seen["folder"], seen["weights"], time.time()]
    with decoder.stream(args.prompt, max_new_tokens=5, ignore_eos=True) as stream:
        while not stream.token_ids and next(stream, None) is not None:
            pass
        marks.append(time.time())
    return {part: b - a for part, (a, b) in zip(PARTS, pairwise(marks), strict=True)}


def run_parts(args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, str(args.model), "--prompt", args.prompt]
    command += ["--device", args.device]
    if args.max_seq_len is not None:
        command += ["--max-seq-len", str(args.max_seq_len)]
    command += ["--started", repr(time.time())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_command(args: argparse.Namespace) -> dict[str, float]:
    """Seconds, processor seconds and peak of memory of the command."""
    command = [sys.executable, "-m", "tidaldecode", "generate", str(args.model), args.prompt]
    command += ["--max-new-tokens", "5", "--device", args.device]
    if args.max_seq_len is not None:
        command += ["--max-seq-len", str(args.max_seq_len)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    # wait4 counts the process with its children's time, and the largest of their memories.
    return {
        "wall_s": wall,
        "processor_s": max(used, usage.ru_utime + usage.ru_stime),
        "peak_mb": usage.ru_maxrss / 1024,
    }


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    args = parse_arguments()
    if args.started is not None:
        print(json.dumps(timed_parts(args)))
        return
    from provenance import command_line, commit, hardware_name, has_uncommitted_changes
    from tidaldecode import demo_model_dir
    from tidaldecode.engine_config import resolve_device

    args.model = args.model or demo_model_dir()
    device = resolve_device(args.device)
    run_parts(args)  # files into the page cache
    parts_runs = [run_parts(args) for _ in range(args.repeats)]
    command_runs = [run_command(args) for _ in range(args.repeats)]
    parts, command = medians(parts_runs), medians(command_runs)
    print(f"{args.model.name} on {device} ({hardware_name(device)}), medians of {args.repeats}")
    for part in PARTS:
        print(f"  {part:<12} {parts[part]:7.3f} s")
    print(f"  {'first word':<12} {sum(parts.values()):7.3f} s after the start of the process")
    print(
        f"  the command: {command['wall_s']:.2f} s, {command['processor_s']:.2f} s of processor "
        f"time with its children, {command['peak_mb']:.0f} MB at most"
    )
    if args.output is not None:
        result = {
            "benchmark": "start",
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "uncommitted_changes": has_uncommitted_changes(),
            "command_line": command_line(),
            "device": device,
            "hardware": hardware_name(device),
            "model": args.model.name,
            "parts_s": parts,
            "command": command,
            "runs": {"parts_s": parts_runs, "command": command_runs},
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
