"""Every scored output, one JSON object a line, written as it comes: what makes a run resumable.

Used by runner.py. A record carries a key that changes with the model, the setting, the prompt and
the version of the engine, so that an older record counts only where it would come out the same.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tidaldecode.errors import InvalidArgument


@dataclass(frozen=True, kw_only=True)
class Record:
    """One prompt, decoded in one setting."""

    key: str
    setting: str
    plan: str  # as Decoder.plan
    task: str
    index: int
    context: int | None
    depth: float | None
    score: float
    output: str
    answers: tuple[str, ...]
    prompt_tokens: int
    output_tokens: int
    finish_reason: str
    seconds: float


_NAMES = tuple(field.name for field in fields(Record))


class ResultFile:
    """The records of a run, on disk and in memory."""

    def __init__(self, path: Path) -> None:
        """Reads what an earlier run has left.

        A line that is no record (the last one, if a run was cut off) is passed over.

        Raises: InvalidArgument if the file cannot be read or written.
        """
        self.path = path
        self.records: dict[str, Record] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            self._file = open(path, "ab")  # noqa: SIM115, closed by close()
        except OSError as cause:
            raise InvalidArgument(
                f"out: {path}: {cause.strerror}; expected a folder to write to"
            ) from cause
        for line in content.splitlines():
            record = _read_record(line)
            if record is not None:
                self.records[record.key] = record
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")

    def append(self, record: Record) -> None:
        """Keeps a record, on disk before this returns."""
        self.records[record.key] = record
        line = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False)
        # Text cut inside a character can hold what UTF-8 does not.
        self._file.write(line.encode("utf-8", "replace") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends writing; the records stay readable."""
        self._file.close()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read_record(line: bytes) -> Record | None:
    try:
        raw: Any = json.loads(line)
    except ValueError:
        return None
    if not isinstance(raw, dict) or set(raw) != set(_NAMES):
        return None
    if not isinstance(raw["key"], str) or not isinstance(raw["answers"], list):
        return None
    return Record(**{**raw, "answers": tuple(raw["answers"])})
