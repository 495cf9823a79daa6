"""Which commit a figure belongs to; used by every script that writes into benchmarks/results/."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def git(*words: str) -> str:
    """Output of a git command in the project; empty outside a checkout."""
    command = ["git", "-C", str(ROOT), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit measured; TIDAL_COMMIT names it where the tree travels without its history."""
    return git("rev-parse", "--short", "HEAD") or os.environ.get("TIDAL_COMMIT", "unknown")


def has_uncommitted_changes() -> bool:
    return bool(git("status", "--porcelain"))
