"""Every scored output, one JSON object a line, written as it comes: what makes a run resumable.

Used by runner.py and perplexity.py. A record carries a key (resume.py), so that an older one counts
only where it would come out the same.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from tidaldecode.checkpoint.json_file import check_no_device
from tidaldecode.errors import InvalidArgument

_LARGEST = 1e15  # of any number in a record
_SHARES = ("score", "depth", "agreement")  # fields from 0 to 1
_SIGNED = ("kl", "loss")  # fields that rounding, or a text, may make negative

_logger = logging.getLogger("tidaldecode")

Place = tuple[str, int | None, int]  # task, context and index of a prompt


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
    def place(self) -> Place:
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

        A line that is no record is passed over, with a note unless it is a last one cut off.

        Raises: InvalidArgument if the file cannot be read or written.
        """
        self.path = path
        self.records: dict[str, AnyRecord] = {}
        self._is_lost = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            check_no_device(path)
            content = path.read_bytes() if path.exists() else b""
            self._file = open(path, "ab")  # noqa: SIM115, closed by close()
        except OSError as cause:
            raise InvalidArgument(
                f"out: {path}: {cause.strerror}; expected a folder to write to"
            ) from cause
        lines = content.split(b"\n")
        bad = []
        for number, line in enumerate(lines, start=1):
            record = _read_record(line, kind) if line.strip() else None
            if record is not None:
                self.records[record.key] = record
            elif line.strip() and number < len(lines):
                bad.append(number)
        if bad:
            some = f"line {bad[0]}" if len(bad) == 1 else f"{len(bad)} lines from line {bad[0]} on"
            _logger.warning(
                "%s: %s: no record of this version, passed over and decoded again", path, some
            )
        self._is_torn = bool(lines[-1])

    def append(self, record: AnyRecord) -> None:
        """Keeps a record, on disk before this returns; where that is full, in memory alone."""
        self.records[record.key] = record
        line = json.dumps(asdict(record), ensure_ascii=False, allow_nan=False)
        # Text cut inside a character can hold what UTF-8 does not.
        encoded = b"\n" * self._is_torn + line.encode("utf-8", "replace") + b"\n"
        if self._is_lost:
            return
        try:
            self._file.write(encoded)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._is_torn = False
        except OSError as cause:
            self._is_lost = True
            _logger.warning(
                "%s: %s; the run goes on, but what it finds from here on is not kept",
                self.path,
                cause.strerror,
            )

    def close(self) -> None:
        """Ends writing; the records stay readable."""
        with suppress(OSError):  # what a full disk did not take was said before
            self._file.close()

    def __enter__(self) -> ResultFile[AnyRecord]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read_record(line: bytes, kind: type[AnyRecord]) -> AnyRecord | None:
    """A line as a record; None if it is none, or holds a value that no run writes."""
    try:
        raw: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    own = fields(kind)
    if not isinstance(raw, dict) or set(raw) != {field.name for field in own}:
        return None
    if not all(_fits(raw[field.name], str(field.type)) for field in own):
        return None
    numbers = {k: v for k, v in raw.items() if isinstance(v, (int, float))}
    if any(v < 0 and k not in _SIGNED or v > 1 and k in _SHARES for k, v in numbers.items()):
        return None
    # Lists were tuples.
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return kind(**values)


def _fits(value: Any, kind: str) -> bool:
    """Whether a value of JSON is of a field's type and, as a number, finite."""
    if value is None:
        return kind.endswith("| None")
    if kind == "tuple[str, ...]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == "str":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # NaN and infinity too, which JSON does not have but Python reads.
    return abs(value) <= _LARGEST and (isinstance(value, int) or kind.startswith("float"))
