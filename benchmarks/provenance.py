"""What a figure belongs to: commit, command, device. For every script that writes results."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from tidaldecode import _core

ROOT = Path(__file__).resolve().parent.parent


def git(*words: str) -> str:
    """Output of a git command in the project; empty outside a checkout."""
    command = ["git", "-C", str(ROOT), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit measured; TIDAL_COMMIT names it where the tree travels without its history."""
    return os.environ.get("TIDAL_COMMIT") or git("rev-parse", "--short", "HEAD") or "unknown"


def has_uncommitted_changes() -> bool | None:
    """None where nothing here can tell."""
    if os.environ.get("TIDAL_COMMIT"):
        return None
    return bool(git("status", "--porcelain"))


def command_line() -> str:
    """What was asked for, without the places of this machine."""
    words = sys.argv[1:]
    if "--output" in words:
        at = words.index("--output")
        del words[at : at + 2]
    names = [Path(word).name if Path(word).exists() else word for word in words]
    return shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *names])


def hardware_name(device: str) -> str:
    """The GPU or processor behind the engine's name of a device."""
    devices = {entry["name"]: entry["hardware"] for entry in _core.list_devices()}
    return devices.get(device) or platform.processor()
