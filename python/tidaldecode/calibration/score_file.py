"""What a calibration has worked out, kept in the user's cache so that a repeated command goes on.

Used by questions.py and objective.py. One JSON list a line: a key and a value. A file that cannot
be written loses nothing but that.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tidaldecode.checkpoint.json_file import check_no_device

_logger = logging.getLogger("tidaldecode")


class ScoreFile:
    """Values by key, in memory and, where there is a file, on disk."""

    def __init__(self, path: Path | None) -> None:
        """Reads what an earlier run has left, but for lines that are none (one that was cut off).

        Args:
            path: the file; None keeps values in memory alone.
        """
        self._path = path
        self._values: dict[str, Any] = {}
        try:
            if path is not None:
                check_no_device(path)
            content = path.read_bytes() if path is not None else b""
        except FileNotFoundError:
            content = b""
        except OSError as cause:
            self._give_up(cause)
            content = b""
        for line in content.splitlines():
            try:
                key, value = json.loads(line, parse_constant=_refuse)
            except (ValueError, TypeError, RecursionError):
                continue
            if isinstance(key, str):
                self._values[key] = value
        self._is_torn = bool(content) and not content.endswith(b"\n")

    def get(self, key: str) -> Any:
        """The value of a key; None if there is none."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps a value of JSON."""
        self._values[key] = value
        if self._path is None:
            return
        text = ("\n" if self._is_torn else "") + json.dumps([key, value], allow_nan=False) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(text)
            self._is_torn = False
        except OSError as cause:
            self._give_up(cause)

    def _give_up(self, cause: OSError) -> None:
        _logger.warning(
            "%s: %s; the scores are not kept, so a run that is cut off starts over",
            self._path,
            cause.strerror,
        )
        self._path = None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no score")
