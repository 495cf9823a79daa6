"""Keeps a chosen plan where Decoder finds it: beside the model, or in the user's cache.

Called by command.py; plans.py reads it.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tidaldecode import _core
from tidaldecode.calibration.run import Job, Outcome
from tidaldecode.checkpoint.json_file import check_no_device
from tidaldecode.errors import InvalidArgument
from tidaldecode.plans import PLAN_FILE
from tidaldecode.user_cache import cached_plan_file, write_whole


def plan_content(job: Job, outcome: Outcome, description: str, fingerprint: str) -> dict[str, Any]:
    """What the plan file holds: the plan, then what it was measured on and how it did."""
    chosen = outcome.chosen
    scores = {"loss": round(chosen.scores.loss, 6), **asdict(chosen.scores)}
    return {
        "description": f"Calibrated on {description}.",
        **chosen.candidate.options(),
        "version": _core.version(),
        "fingerprint": fingerprint,
        "context": list(job.contexts),
        "chat": job.is_chat,
        "max_loss": job.max_loss,
        "scores": {**scores, "kv_bytes_per_step": chosen.bytes_per_step},
        "held_out": {"same": outcome.num_same, "counted": outcome.held_out.num_counted},
    }


def check_output(output: Path) -> None:
    """Refuses a file that cannot be written before hours of work.

    Raises: InvalidArgument.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        check_no_device(output)
        if not os.access(output.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as cause:
        raise _not_writable(output, cause) from cause


def _not_writable(output: Path, cause: OSError) -> InvalidArgument:
    return InvalidArgument(f"output: {output}: {cause.strerror}; expected a file to write")


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
    try:
        write_whole(output, json.dumps(content, indent=2) + "\n")
    except OSError as cause:
        raise _not_writable(output, cause) from cause
    return output


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK)
