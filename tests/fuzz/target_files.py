"""Damaged files of `eval` and `calibrate`: their records, their scores, their plan, their prompts.

The commands are run to their end on a tiny model, so that later runs find everything done; each
case then damages what they have kept and runs the command again. It ends with a report of JSON
that any parser reads, or says in one line what it cannot use.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from command_line import run_command
from json_mutations import BYTES, VALUES, change_text
from judge import Nonsense
from models import write_model
from supervisor import Limits
from tidaldecode.user_cache import user_cache_dir

LIMITS = Limits(seconds=60.0, cpu_seconds=40.0)
_PROMPTS = "\n".join(json.dumps({"prompt": f"ab{i}", "answers": ["c"]}) for i in range(3))
# The scores that `calibrate` keeps in the user's cache, under a name that changes with the model.
_SCORES = "scores"
# The keys of each file's lines.
_FILES = {
    "results.jsonl": (
        "key", "setting", "plan", "task", "index", "context", "depth", "score", "output", "answers",
        "prompt_tokens", "output_tokens", "finish_reason", "same_tokens", "kl", "set_size",
        "seconds",
    ),
    "losses.jsonl": (
        "key", "setting", "plan", "context", "window", "num_tokens", "loss", "kl", "agreement",
        "set_size", "seconds",
    ),
    "report.json": ("version", "settings"),
    "prompts.jsonl": ("prompt", "answers"),
    _SCORES: (0, 1),
}  # fmt: skip


def prepare(workspace: Path) -> None:
    """Runs the commands once, from beginning to end."""
    write_model(workspace / "model")
    (workspace / "text.txt").write_text("The sea is wide and the boat is small. " * 200)
    (workspace / "work").mkdir()
    (workspace / "work" / "prompts.jsonl").write_text(_PROMPTS + "\n")
    code, said = _evaluate(workspace, workspace / "work")
    if code != 0:
        raise RuntimeError(f"eval does not run: {said}")


def _evaluate(workspace: Path, work: Path) -> tuple[int, str]:
    return run_command(
        "eval", str(workspace / "model"), "--device", "cpu", "--num-threads", "1",
        "--prompts", str(work / "prompts.jsonl"), "-n", "3", "--text", str(workspace / "text.txt"),
        "--context", "128", "--limit", "2", "--scored-tokens", "4",
        "--tidal", "select_layers=1,3 token_budget=16", "--out", str(work),
    )  # fmt: skip


def _calibrate(workspace: Path, work: Path) -> tuple[int, str]:
    return run_command(
        "calibrate", str(workspace / "model"), "--device", "cpu", "--num-threads", "1",
        "--text", str(workspace / "text.txt"), "--context", "512", "--token-budget", "16",
        "--max-choosing-layers", "1", "--output", str(work / "plan.json"),
    )  # fmt: skip


def make_case(rng: random.Random) -> dict[str, Any]:
    """{"file", "changes": [...]}; a change is of one line, or of the file as a whole."""
    file = rng.choice(sorted(_FILES))
    return {"file": file, "changes": [_change(rng, file) for _ in range(rng.randint(1, 3))]}


def _change(rng: random.Random, file: str) -> dict[str, Any]:
    draw = rng.random()
    if draw < 0.1:
        return {"do": "bytes", "text": rng.choice(BYTES)}
    if draw < 0.2:
        return {"do": "cut", "share": round(rng.random(), 3)}
    if draw < 0.3:
        return {"do": "flip", "share": round(rng.random(), 4), "bit": rng.randrange(8)}
    if draw < 0.38:
        return {"do": rng.choice(("directory", "fifo", "read only", "missing"))}
    line = rng.randrange(6)
    if draw < 0.45:
        return {"do": "line", "line": line, "text": rng.choice((*VALUES, *BYTES))}
    key = rng.choice(_FILES[file])
    if draw < 0.55:
        return {"do": "delete", "line": line, "path": [key]}
    return {"do": "set", "line": line, "path": [key], "json": rng.choice(VALUES)}


def describe(case: dict[str, Any]) -> str:
    """The case for a reader."""
    command = "calibrate" if case["file"] == _SCORES else "eval --out"
    return f"{command}, {case['file']}: {json.dumps(case['changes'])}"


def group(case: dict[str, Any]) -> str:
    """What a fault of this case is filed under."""
    file: str = case["file"]
    return file


def smaller(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The case with one change less."""
    changes = case["changes"]
    for index in range(len(changes) if len(changes) > 1 else 0):
        yield {**case, "changes": changes[:index] + changes[index + 1 :]}


def run_case(case: dict[str, Any], workspace: Path) -> None:
    """Damages a copy of what the commands have kept and runs them again."""
    if case["file"] == _SCORES:
        _run_calibration(case, workspace)
        return
    with tempfile.TemporaryDirectory(dir=workspace) as name:
        work = Path(name) / "work"
        shutil.copytree(workspace / "work", work)
        for change in case["changes"]:
            _apply(work / case["file"], change)
        code, said = _evaluate(workspace, work)
        if code == 0:
            _check_report(work / "report.json")
        elif "error: " not in said:
            raise Nonsense(f"exit code {code} without a word")


def _run_calibration(case: dict[str, Any], workspace: Path) -> None:
    kept, cache = workspace / "kept scores", user_cache_dir() / "scores"
    if not kept.exists():
        _calibrate(workspace, workspace)
        shutil.copytree(cache, kept)
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(kept, cache)
    for path in cache.glob("*.jsonl"):
        for change in case["changes"]:
            _apply(path, change)
    code, said = _calibrate(workspace, workspace)
    if code == 0:
        plan = json.loads((workspace / "plan.json").read_text(), parse_constant=_refuse)
        if not plan.get("select_layers") and not plan.get("scored_layers"):
            raise Nonsense("a plan of no layers was kept")
    elif not said:
        raise Nonsense(f"exit code {code} without a word")


def _refuse(name: str) -> None:
    raise Nonsense(f"a file that was written holds {name}")


def _check_report(path: Path) -> None:
    try:
        report = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except ValueError:
        raise Nonsense("report.json is no JSON") from None
    for summary in report["settings"]:
        if not 0 <= summary["mean_score"] <= 1:
            raise Nonsense("report.json: a mean score that cannot be")


def _apply(path: Path, change: dict[str, Any]) -> None:
    do = change["do"]
    if not path.is_file():
        return
    data = path.read_bytes()
    if do == "bytes":
        path.write_bytes(change["text"].encode("latin-1", "xmlcharrefreplace"))
    elif do == "cut":
        os.truncate(path, int(len(data) * change["share"]))
    elif do == "flip" and data:
        changed = bytearray(data)
        changed[int(change["share"] * (len(data) - 1))] ^= 1 << change["bit"]
        path.write_bytes(changed)
    elif do == "read only":
        path.chmod(0o400)
    elif do in ("directory", "fifo", "missing"):
        path.unlink()
        if do != "missing":
            (path.mkdir if do == "directory" else lambda: os.mkfifo(path))()
    elif do in ("line", "delete", "set"):
        path.write_bytes(_changed_lines(data, change))


def _changed_lines(data: bytes, change: dict[str, Any]) -> bytes:
    lines = data.splitlines()
    if not lines:
        return data
    number = change["line"] % len(lines)
    if change["do"] == "line":
        lines[number] = change["text"].encode("utf-8", "surrogatepass")
    else:
        try:
            lines[number] = change_text(json.loads(lines[number]), change).encode()
        except (ValueError, LookupError, TypeError, RecursionError):
            return data
    return b"\n".join(lines) + b"\n"
