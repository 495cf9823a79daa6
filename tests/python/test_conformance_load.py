"""guidellm and aiperf against the server: 200 requests each, by their own reports without error.

aiperf wants older versions of packages than others here: it is for an environment of its own, and
found on the path.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")

from serving import Served, serving  # noqa: E402
from tidaldecode.server import routing  # noqa: E402

REQUESTS, PROMPT_TOKENS, ANSWER_TOKENS = 200, 100, 16

pytestmark = pytest.mark.conformance


def program(name: str) -> str:
    """Where a program is: beside this Python, or on the path. Skips where it is not."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


@pytest.fixture(scope="module")
def served(demo_model: Path) -> Iterator[Served]:
    with serving(demo_model, engine={"max_seq_len": 1024, "max_batch_size": 8}) as served:
        yield served


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Fields of bodies that the server has ignored."""
    names: Counter[str] = Counter()
    read_body = routing.read_body

    def read(kind: Any, data: bytes) -> Any:
        body = read_body(kind, data)
        names.update(body.model_extra or {})
        return body

    monkeypatch.setattr(routing, "read_body", read)
    return names


def run(command: list[str], folder: Path) -> None:
    """Runs a program to its end, without a network but loopback."""
    # It may be installed elsewhere than what is tested.
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300,
        env=own | {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("kind", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(
    served: Served, demo_model: Path, tmp_path: Path, unknown: Counter[str], kind: str
):
    before = served.decoder.stats()
    report = tmp_path / "report.json"
    sizes = f"prompt_tokens={PROMPT_TOKENS},output_tokens={ANSWER_TOKENS}"
    run(
        [
            program("guidellm"), "run", "--disable-console",
            "--backend", f"kind=openai_http,target={served.url},request_format={kind}",
            "--profile", "kind=concurrent,streams=12",
            "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--tokenizer", f"kind=huggingface_auto,model={demo_model}",
            "--data", f"kind=synthetic_text,{sizes}", "--output", f"kind=json,path={report}",
        ],
        tmp_path,
    )  # fmt: skip
    (found,) = json.loads(report.read_text())["benchmarks"]
    totals = {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}
    assert found["metrics"]["request_totals"] == totals
    for each in found["requests"]["successful"]:
        assert each["output_metrics"]["text_tokens"] == ANSWER_TOKENS
        assert each["input_metrics"]["text_tokens"] >= PROMPT_TOKENS
    check_counted(served, before)
    assert not unknown


def test_aiperf(served: Served, demo_model: Path, tmp_path: Path, unknown: Counter[str]):
    before = served.decoder.stats()
    run(
        [
            program("aiperf"), "profile", "--model", "tidal-demo", "--url", served.url,
            "--endpoint-type", "chat", "--streaming", "--tokenizer", str(demo_model),
            "--request-count", str(REQUESTS), "--concurrency", "12",
            "--synthetic-input-tokens-mean", str(PROMPT_TOKENS),
            "--output-tokens-mean", str(ANSWER_TOKENS), "--extra-inputs", "ignore_eos:true",
            "--artifact-dir", str(tmp_path / "report"), "--ui", "none", "--random-seed", "1",
        ],
        tmp_path,
    )  # fmt: skip
    found = json.loads((tmp_path / "report" / "profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == REQUESTS and not found.get("error_summary")
    counts = found["usage_completion_tokens"]
    assert (counts["min"], counts["max"]) == (ANSWER_TOKENS, ANSWER_TOKENS)
    check_counted(served, before)
    assert not unknown


def check_counted(served: Served, before: dict[str, Any]) -> None:
    """The server has done what the program says it has."""
    after = served.decoder.stats()
    done = {name: after[name] - before[name] for name in ("num_finished", "generated_tokens")}
    assert done == {"num_finished": REQUESTS, "generated_tokens": REQUESTS * ANSWER_TOKENS}
