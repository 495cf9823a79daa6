"""Where a user's machine keeps what programs have worked out: plans and how they did.

Used by plans.py and the calibration. Follows each platform's convention; XDG_CACHE_HOME is the one
of Linux.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache_dir() -> Path:
    """The package's own folder in the user's cache; it need not exist, nor be one that can.

    Ask os.path whether a file is in it: Path's methods raise where a folder cannot be searched.
    """
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "tidaldecode"
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The convention: a relative path is to be ignored.
    root = Path(base) if os.path.isabs(base) else _home() / ".cache"
    return root / "tidaldecode"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without one
        return Path(os.devnull) / "home"  # nothing is there, and nothing can be written there


def cached_evaluation_file(fingerprint: str) -> Path:
    """What an evaluation has found of the plan of the model with this fingerprint."""
    return user_cache_dir() / "evaluated" / f"{fingerprint}.json"


def cached_plan_file(fingerprint: str) -> Path:
    """The plan of the model with this fingerprint."""
    return user_cache_dir() / "plans" / f"{fingerprint}.json"


def write_whole(path: Path, text: str) -> None:
    """Writes a file, its folders included, whole or not at all.

    Raises: OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
