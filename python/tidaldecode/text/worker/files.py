"""Reading a tokenizer's side files, which may be damaged, hostile, or not there."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

from .errors import TextError

# The largest chat templates of public models are below 100 kB, added tokens below 1 MB.
_MAX_BYTES = 8 * 1024 * 1024


def read_text(path: str) -> str:
    """The text in a file.

    Raises: FileNotFoundError; TextError naming the file for anything else.
    """
    name = os.path.basename(path)
    try:
        # Without waiting, as a plain open of a FIFO would.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise TextError("failed", f"{name}: is not a regular file")
            if status.st_size > _MAX_BYTES:
                raise TextError(
                    "failed", f"{name}: {status.st_size} bytes, expected at most {_MAX_BYTES}"
                )
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as cause:
        raise TextError("failed", f"{name}: cannot be read: {cause.strerror}") from cause
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        raise TextError(
            "failed", f"{name}: is a git-lfs pointer, not the file itself; use git lfs pull"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise TextError("failed", f"{name}: is not UTF-8 (byte {cause.start})") from cause


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no file.

    Raises: TextError naming the file.
    """
    name = os.path.basename(path)
    try:
        text = read_text(path)
    except FileNotFoundError:
        return {}
    if text.lstrip().lower().startswith(("<!doctype html", "<html")):
        raise TextError("failed", f"{name}: is an HTML page, expected JSON; download it again")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise TextError("failed", f"{name}: not valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise TextError("failed", f"{name}: expected a JSON object")
    return value
