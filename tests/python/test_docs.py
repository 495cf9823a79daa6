"""What the README shows works.

A Python block runs if the line `<!-- test -->` stands right above it. All such blocks of the file
share one namespace, in order, in an empty folder where every path given to `Decoder("...")` is a
link to the packaged demo model.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"

RUNNABLE = re.compile(r"^<!-- test -->\n+```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```(?:sh|bash|console|shell|text)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(tidaldecode [^`\n]+)`")
MODEL_ARGUMENT = re.compile(r"""Decoder\(\s*["']([^"']+)["']""")


def readme() -> str:
    if not README.is_file():
        pytest.skip("there is no README.md")
    return README.read_text()


def shell_commands() -> list[list[str]]:
    """Every `tidaldecode ...` command line of the README, in words."""
    text = readme()
    lines = [line for block in FENCE.findall(text) for line in joined_lines(block)]
    lines += INLINE.findall(text)
    commands = []
    for line in lines:
        line = line.strip().removeprefix("$ ")
        if line.startswith("tidaldecode "):
            commands.append(shlex.split(line, comments=True))
    return commands


def joined_lines(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


def cli_help(command: str) -> str:
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-m", "tidaldecode", command, "--help"],
        env=environment, capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip


def test_readme_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_model: Path):
    blocks = RUNNABLE.findall(readme())
    if not blocks:
        pytest.skip("README.md marks no Python block with <!-- test -->")
    monkeypatch.chdir(tmp_path)
    for path in {path for block in blocks for path in MODEL_ARGUMENT.findall(block)}:
        assert not Path(path).is_absolute(), f"README.md: {path} is an absolute path"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).symlink_to(demo_model, target_is_directory=True)
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, Python block {number}", "exec"), namespace)


def test_readme_names_only_options_that_exist():
    commands = shell_commands()
    assert commands, "README.md shows no tidaldecode command"
    helps: dict[str, str] = {}
    for words in commands:
        name = words[1]
        if name.startswith("-"):
            continue
        text = helps.setdefault(name, cli_help(name))
        for option in (word.split("=")[0] for word in words[2:] if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), (
                f"README.md: `{shlex.join(words)}`: {name} has no option {option}"
            )
