"""What a first text costs: nothing that takes long is imported for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "numpy", "rich", "tokenizers", "jinja2", "huggingface_hub")


def modules_after(program: str) -> set[str]:
    """The modules that a program has imported at its end."""
    report = "\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program + report], capture_output=True, text=True, check=True,
        timeout=120,
    )  # fmt: skip
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_a_text_and_a_chat_import_nothing_heavy(demo_model: Path):
    program = f"""
import tidaldecode
with tidaldecode.Decoder({str(demo_model)!r}, device="cpu", max_seq_len=512) as decoder:
    print(decoder.generate("Hello", max_new_tokens=3).text)
    print("".join(decoder.stream("Hello", max_new_tokens=3, stop="zzz")))
    print(decoder.chat([{{"role": "user", "content": "Hi"}}], max_new_tokens=3).text)
"""
    assert not modules_after(program) & {*HEAVY}


def test_loading_starts_no_threads_and_leaves_the_environment():
    program = """
import os, sys
before = dict(os.environ)
import tidaldecode
print(len(os.listdir("/proc/self/task")), dict(os.environ) == before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["1", "True"]


def test_the_command_line_imports_nothing_heavy(demo_model: Path):
    program = f"""
from tidaldecode.cli.app import main
main(["generate", {str(demo_model)!r}, "Hello", "--max-new-tokens", "3", "--device", "cpu"])
"""
    assert not modules_after(program) & {
        *HEAVY,
        "tidaldecode.evaluation",
        "tidaldecode.calibration",
    }


def test_bench_start_prints_the_parts(tmp_path: Path):
    output = tmp_path / "start.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench_start.py"), "--device", "cpu",
         "--repeats", "1", "--output", str(output)],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    result = json.loads(output.read_text())
    for part in ("interpreter", "imports", "folder", "weights", "first token"):
        assert part in done.stdout
        assert result["parts_s"][part] > 0
    # Twice the aim, for a machine that does other work.
    assert result["command"]["processor_s"] < 2.4
    assert result["command"]["peak_mb"] < 300
