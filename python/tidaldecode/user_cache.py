"""Where a user's machine keeps what programs have worked out: plans and how they did.

Used by plans.py and the calibration. Follows each platform's convention; XDG_CACHE_HOME is the one
of Linux. Nothing here is needed to run: what cannot be read is not there, and who cannot write
loses nothing but the keeping.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tidaldecode.checkpoint.json_file import check_no_device

# Stands for "nowhere": below a file nothing exists and nothing can be made.
_NOWHERE = Path(os.devnull)


def user_cache_dir() -> Path:
    """The package's own folder in the user's cache; it need not exist.

    A user without a home (a container's, by number alone) has none: then it is a path that cannot
    exist, and writing there fails with an OSError as in a folder that is not writable.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The convention: a relative path is to be ignored.
    if os.path.isabs(base) and sys.platform != "darwin":
        return Path(base) / "tidaldecode"
    try:
        home = Path.home()
    except RuntimeError:
        home = _NOWHERE
    cache = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    return cache / "tidaldecode"


def cached_evaluation_file(fingerprint: str) -> Path:
    """What an evaluation has found of the plan of the model with this fingerprint."""
    return user_cache_dir() / "evaluated" / f"{fingerprint}.json"


def cached_plan_file(fingerprint: str) -> Path:
    """The plan of the model with this fingerprint."""
    return user_cache_dir() / "plans" / f"{fingerprint}.json"


def is_kept(path: Path) -> bool:
    """Whether there is such a file or folder; not, where this user may not look."""
    return os.path.exists(path)


def write_whole(path: Path, text: str) -> None:
    """Writes a file, its folders included, whole or not at all.

    Raises: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)


def replace_file(path: Path, text: str) -> None:
    """Writes beside the file first, so that what was there stays until all is written.

    Raises: OSError, also where a device or a FIFO is, which would be gone.
    """
    check_no_device(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
