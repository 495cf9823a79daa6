"""Reading the small JSON files of a model folder, which may be hostile or damaged.

First step of the walk from a folder to a model: model_config.py, generation_defaults.py,
weight_files.py and plans.py read their files through here. A file that is too big, not a regular
file, not UTF-8, nested too deep, or holds NaN or a repeated key is an error that names it, and
what stands there instead (foreign_format.py).
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from tidaldecode.checkpoint.foreign_format import describe_foreign
from tidaldecode.errors import ConfigError, TidalError, show

# The largest config.json files of public models are below 1 MiB.
MAX_JSON_BYTES = 8 * 1024 * 1024


def open_regular_file(path: Path, error: type[TidalError]) -> tuple[int, int]:
    """Opens `path` for reading without ever waiting (a FIFO would block a plain open).

    Returns: (file descriptor, size in bytes); the caller closes it.
    Raises: `error` if the path cannot be opened or is not a regular file (links are followed).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the name
        reason = getattr(cause, "strerror", None) or str(cause)
        raise error(f"{path}: cannot be opened: {reason}") from cause
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise error(f"{path}: is {kind}; expected a regular file")
    return descriptor, status.st_size


def check_no_device(path: Path) -> None:
    """Makes sure that opening `path` cannot wait: it is a regular file, or nothing.

    Raises: OSError for a FIFO, a device or a directory, and where one may not look.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_exactly(descriptor: int, offset: int, num_bytes: int) -> bytes:
    """Up to `num_bytes` bytes from `offset` on; fewer only where the file ends."""
    pieces = []
    while num_bytes > 0:
        piece = os.pread(descriptor, min(num_bytes, 1 << 24), offset)
        if not piece:
            break
        pieces.append(piece)
        offset += len(piece)
        num_bytes -= len(piece)
    return b"".join(pieces)


def read_beginning(path: Path, num_bytes: int, error: type[TidalError]) -> tuple[bytes, int]:
    """The first bytes of a regular file, and how many bytes it has.

    Raises: `error` naming the file, also where it changes or goes while it is read.
    """
    descriptor, size = open_regular_file(path, error)
    try:
        data = read_exactly(descriptor, 0, num_bytes)
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror}") from cause
    finally:
        os.close(descriptor)
    return data, max(size, len(data))


def list_folder(folder: Path, error: type[TidalError]) -> list[str]:
    """Names in a folder, in order.

    Raises: `error` naming it if it cannot be listed.
    """
    try:
        return sorted(os.listdir(folder))
    except OSError as cause:
        raise error(f"{folder}: cannot be listed: {cause.strerror}") from cause


def parse_json_object(data: bytes, where: str, error: type[TidalError]) -> dict[str, Any]:
    """Parses one JSON object, refusing what JSON leaves open: NaN, Infinity, repeated keys.

    Raises: `error`, its message starting with `where`.
    """
    try:
        return _parse(data, where, error)
    except error as cause:
        if foreign := describe_foreign(data):
            raise error(f"{where}: is {foreign}") from cause
        raise


def _parse(data: bytes, where: str, error: type[TidalError]) -> dict[str, Any]:

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated = next(key for key, count in counts.items() if count > 1)
            raise ValueError(f"key {show(repeated)} appears twice")
        return result

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{where}: not UTF-8 (byte {cause.start})") from cause
    if text.startswith("\ufeff"):
        raise error(f"{where}: starts with a byte-order mark; save it as plain UTF-8")
    try:
        value = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique_keys)
    except RecursionError:
        raise error(f"{where}: JSON is nested too deep") from None
    except ValueError as cause:
        raise error(f"{where}: not valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise error(f"{where}: got a JSON {type(value).__name__}, expected an object")
    return value


def read_json_object(
    path: Path, error: type[TidalError] = ConfigError, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Reads a JSON file of at most `max_bytes` that holds one object.

    Raises: `error` naming the file.
    """
    data, size = read_beginning(path, max_bytes + 1, error)
    if size > max_bytes:
        foreign = describe_foreign(data)
        raise error(
            f"{path}: {f'is {foreign}; ' if foreign else ''}{size} bytes, "
            f"expected at most {max_bytes}"
        )
    if not data.strip():
        raise error(f"{path}: is empty; expected a JSON object; is the download complete?")
    return parse_json_object(data, str(path), error)
