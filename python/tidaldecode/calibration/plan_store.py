"""Keeps a chosen plan where Decoder finds it: beside the model, or in the user's cache.

Called by command.py; plans.py reads it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tidaldecode import _core
from tidaldecode.calibration.data import CalibrationData
from tidaldecode.calibration.search import Point
from tidaldecode.errors import InvalidArgument
from tidaldecode.plans import PLAN_FILE
from tidaldecode.user_cache import cached_plan_file


def plan_content(point: Point, data: CalibrationData, fingerprint: str) -> dict[str, Any]:
    """What the plan file holds: the plan, then what it was measured on and how it did."""
    scores = {**asdict(point.scores), "kv_bytes_per_step": point.bytes_per_step}
    return {
        "description": f"Calibrated on {data.description}.",
        **point.candidate.options(),
        "version": _core.version(),
        "fingerprint": fingerprint,
        "data": data.digest,
        "context": data.context,
        "scores": scores,
    }


def store_plan(content: dict[str, Any], model_dir: Path, output: Path | None) -> Path:
    """Writes a plan file, whole or not at all.

    Args:
        content: what plan_content() gives.
        model_dir: the model's folder, where the file goes if it can be written there.
        output: a file to write instead; None also means the user's cache, where model_dir is not
            writable.

    Returns: where it is.
    Raises: InvalidArgument if it cannot be written.
    """
    if output is None:
        beside = model_dir / PLAN_FILE
        output = beside if _is_writable(model_dir) else cached_plan_file(content["fingerprint"])
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, output)
    except OSError as cause:
        raise InvalidArgument(
            f"output: {output}: {cause.strerror}; expected a file that can be written"
        ) from cause
    return output


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK)
