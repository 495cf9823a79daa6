"""Damaged model folders, walked from end to end: info, plan_memory, Decoder, generate.

A folder either loads and generates something possible, or is refused by name. What must not load
at all, a weight file that was cut, is checked too.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tidaldecode
from api_values import check_result
from command_line import run_command
from json_mutations import apply, mutate
from judge import Nonsense
from models import SMALL, write_model
from tidaldecode import TidalError

_LAYOUTS = ("single", "sharded")
_MOST_MUTATIONS = 3


@functools.lru_cache(maxsize=2)
def _documents(layout: str) -> dict[str, Any]:
    """The JSON of every file of the whole folder, as mutate() wants it."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name), sharded=layout == "sharded")
        return {path.name: _json_of(path) for path in sorted(folder.iterdir())}


def _json_of(path: Path) -> Any:
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        (size,) = struct.unpack("<Q", data[:8])
        data = data[8 : 8 + size]
    return json.loads(data)


def prepare(workspace: Path) -> None:
    """Writes the whole folders."""
    for layout in _LAYOUTS:
        write_model(workspace / layout, sharded=layout == "sharded")


def make_case(rng: random.Random) -> dict[str, Any]:
    """{"layout", "mutations"}."""
    layout = rng.choice(_LAYOUTS)
    # The tokenizer has a target of its own.
    files = {k: v for k, v in _documents(layout).items() if not k.startswith("tokenizer")}
    count = rng.choices(range(1, _MOST_MUTATIONS + 1), (6, 2, 1))[0]
    return {"layout": layout, "mutations": [mutate(rng, files) for _ in range(count)]}


def describe(case: dict[str, Any]) -> str:
    """The case for a reader."""
    return f"{case['layout']}: {json.dumps(case['mutations'])}"


def group(case: dict[str, Any]) -> str:
    """What a fault of this case is filed under."""
    return ", ".join(sorted({mutation["file"] for mutation in case["mutations"]}))


def smaller(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The case with one mutation less."""
    mutations = case["mutations"]
    for index in range(len(mutations) if len(mutations) > 1 else 0):
        yield {**case, "mutations": mutations[:index] + mutations[index + 1 :]}


def run_case(case: dict[str, Any], workspace: Path) -> None:
    """Damages a copy and walks it; every step may refuse, none may do anything else."""
    with tempfile.TemporaryDirectory(dir=workspace) as name:
        folder = Path(name) / "model"
        shutil.copytree(workspace / case["layout"], folder)
        for mutation in case["mutations"]:
            apply(folder, mutation)
        run_command("info", str(folder))
        refusal = None
        for step in (_plan, _load):
            try:
                step(folder)
            except TidalError as error:
                refusal = error
        is_cut = any(
            mutation["do"] == "cut" and mutation["file"].endswith(".safetensors")
            for mutation in case["mutations"][-1:]
        )
        if refusal is not None:
            raise refusal
        if is_cut:
            raise Nonsense("a weight file that was cut short has been loaded")


def _plan(folder: Path) -> None:
    plan = tidaldecode.plan_memory(folder, **SMALL)
    if min(plan.total_bytes, plan.weight_bytes, plan.kv_bytes) <= 0:
        raise Nonsense("a memory plan of nothing or less")
    str(plan)


def _load(folder: Path) -> None:
    with tidaldecode.Decoder(folder, **SMALL) as decoder:
        check_result("Decoder.generate", decoder.generate([1, 2, 3], max_new_tokens=3))
        check_result("Decoder.generate", decoder.generate("ab"))
        if repr(decoder.config) == "" or not decoder.plan:
            raise Nonsense("a decoder without a plan")
