"""Where a user's machine keeps what programs have worked out: calibrated plans live there.

Used by plans.py and the calibration. Follows each platform's convention; XDG_CACHE_HOME is the one
of Linux.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache_dir() -> Path:
    """The package's own folder in the user's cache; it need not exist."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tidaldecode"
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The convention: a relative path is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "tidaldecode"


def cached_plan_file(fingerprint: str) -> Path:
    """The plan of the model with this fingerprint."""
    return user_cache_dir() / "plans" / f"{fingerprint}.json"
