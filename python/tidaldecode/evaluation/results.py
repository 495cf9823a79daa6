"""Every scored output, one JSON object a line, written as it comes: what makes a run resumable.

Used by runner.py and perplexity.py. A record carries a key (resume.py), so that an older one counts
only where it would come out the same.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

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
    same_tokens: int  # of the output, until it first differs from the dense one
    kl: float  # from the dense next-token distributions along the dense output, mean, nats
    set_size: float  # positions of a set along the dense output, mean; 0 where all steps are dense
    seconds: float

    @property
    def place(self) -> tuple[str, int | None, int]:
        """Which prompt it is, the same in every setting."""
        return self.task, self.context, self.index


@dataclass(frozen=True, kw_only=True)
class LossRecord:
    """One window of a text, its last tokens predicted in one setting by decode steps."""

    key: str
    setting: str
    plan: str  # as Decoder.plan
    context: int
    window: int
    num_tokens: int  # predicted ones
    loss: float  # mean, nats a token
    kl: float  # from the dense next-token distributions, mean, nats
    agreement: float  # share of steps whose most likely token is the dense one
    set_size: float  # positions of a set, mean; 0 where all steps are dense
    seconds: float


AnyRecord = TypeVar("AnyRecord", Record, LossRecord)


class ResultFile(Generic[AnyRecord]):
    """The records of a run, all of one kind, on disk and in memory."""

    def __init__(self, path: Path, kind: type[AnyRecord]) -> None:
        """Reads what an earlier run has left.

        A line that is no record (the last one, if a run was cut off) is passed over.

        Raises: InvalidArgument if the file cannot be read or written.
        """
        self.path = path
        self.records: dict[str, AnyRecord] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            self._file = open(path, "ab")  # noqa: SIM115, closed by close()
        except OSError as cause:
            raise InvalidArgument(
                f"out: {path}: {cause.strerror}; expected a folder to write to"
            ) from cause
        for line in content.splitlines():
            record = _read_record(line, kind)
            if record is not None:
                self.records[record.key] = record
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")

    def append(self, record: AnyRecord) -> None:
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

    def __enter__(self) -> ResultFile[AnyRecord]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read_record(line: bytes, kind: type[AnyRecord]) -> AnyRecord | None:
    try:
        raw: Any = json.loads(line)
    except ValueError:
        return None
    names = {field.name for field in fields(kind)}
    if not isinstance(raw, dict) or set(raw) != names or not isinstance(raw["key"], str):
        return None
    # Lists were tuples.
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
