"""Schemathesis against the server: bodies made up from its schema, answers held against it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")

from serving import Served, serving  # noqa: E402

PROGRAM = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_schema_conformance",
)  # fmt: skip

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs schemathesis")


@pytest.fixture(scope="module")
def served(demo_model: Path) -> Iterator[Served]:
    with serving(demo_model, engine={"max_seq_len": 128}, max_n=2) as served:
        yield served


def num_cases(url: str, seed: int, examples: int, folder: Path) -> int:
    """Cases of a run that has found nothing."""
    assert PROGRAM is not None
    run = subprocess.run(
        [
            PROGRAM, "run", url + "/openapi.json", "--phases", "fuzzing", "--checks",
            ",".join(CHECKS), "-n", str(examples), "--seed", str(seed), "--request-timeout", "60",
            "--generation-database", "none", "--no-color",
        ],
        cwd=folder, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    found = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    assert found is not None, run.stdout[-2000:]
    return int(found.group(1))


def test_made_up_bodies(served: Served, tmp_path: Path):
    assert num_cases(served.url, 1, 15, tmp_path) >= 100


@pytest.mark.conformance
def test_two_thousand_made_up_bodies(served: Served, tmp_path: Path):
    assert num_cases(served.url, 2, 300, tmp_path) >= 2000
