"""What the README and the guides show works.

Above a Python block stands `<!-- test -->`, and it runs, or `<!-- no test: WHY -->`. All blocks of
a file that run share one namespace, in order, in an empty folder where every path given to
`Decoder("...")` is a link to the packaged demo model.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tidaldecode.checkpoint.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
# Those that show Python, and those that show commands.
WITH_PYTHON = ("README.md", "docs/guide.md", "docs/structured.md")
WITH_COMMANDS = (
    "README.md",
    "docs/guide.md",
    "docs/quality.md",
    "docs/performance.md",
    "docs/server.md",
)

PYTHON = re.compile(r"^<!-- (test|no test: .+) -->\n```python\n(.*?)^```", re.M | re.S)
FENCE = re.compile(r"^```(?:sh|bash|console|shell|text)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
TEXTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE = re.compile(r"`(tidaldecode [^`\n]+)`")
MODEL_ARGUMENT = re.compile(r"""Decoder\(\s*["']([^"']+)["']""")


def shell_commands(text: str) -> list[list[str]]:
    """Every `tidaldecode ...` command line of a text, in words."""
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


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_blocks_of_python_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_model: Path
):
    blocks = [block for mark, block in PYTHON.findall((ROOT / name).read_text()) if mark == "test"]
    assert blocks, f"{name} marks no Python block with <!-- test -->"
    monkeypatch.chdir(tmp_path)
    for path in {path for block in blocks for path in MODEL_ARGUMENT.findall(block)}:
        assert not Path(path).is_absolute(), f"{name}: {path} is an absolute path"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).symlink_to(demo_model, target_is_directory=True)
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}, Python block {number}", "exec"), namespace)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_block_of_python_runs_or_says_why_not(path: Path):
    text = path.read_text()
    marked = PYTHON.findall(text)
    assert len(marked) == text.count("```python"), f"{path.name}: a block has no mark above it"
    runs = any(mark == "test" for mark, _ in marked)
    assert not runs or path.relative_to(ROOT).as_posix() in WITH_PYTHON


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_only_options_that_exist_are_named(name: str):
    commands = shell_commands((ROOT / name).read_text())
    assert commands, f"{name} shows no tidaldecode command"
    helps: dict[str, str] = {}
    for words in commands:
        command = words[1]
        if command.startswith("-"):
            continue
        text = helps.setdefault(command, cli_help(command))
        for option in (word.split("=")[0] for word in words[2:] if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), (
                f"{name}: `{shlex.join(words)}`: {command} has no option {option}"
            )


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    for target in LINK.findall(path.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (path.parent / target.partition("#")[0]).exists(), f"{path.name}: {target}"


def test_the_guide_names_every_family():
    loads = (ROOT / "docs/guide.md").read_text().partition("## What loads")[2]
    rows = [line for line in loads.split("\n") if line.startswith("| `")]
    named = set(re.findall(r"`([a-z0-9_]+)`", " ".join(row.split("|")[1] for row in rows)))
    assert named >= set(FAMILIES)
