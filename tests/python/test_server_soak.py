"""A short run of the soak over HTTP; `make soak-server` makes the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")

SOAK = Path(__file__).resolve().parents[1] / "soak" / "server_soak.py"


def test_mixed_requests_leave_nothing_behind():
    command = [sys.executable, str(SOAK), "--requests", "1500", "--deadline", "150"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all well" in run.stdout
