"""What a wheel holds, seen on the package that `make test` installs: all of the package, the
engine, and nothing else."""

from __future__ import annotations

import re
from importlib.metadata import Distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "tidaldecode"
ENGINE = re.compile(r"tidaldecode/(_core\..*|libtidal_cuda)\.so")
MADE_BY_PIP = re.compile(r".*\.pyc|(.*/)?bin/tidaldecode|tidaldecode-[\d.]+\.dist-info/.*")


def names(installed: Distribution) -> set[str]:
    return {f.as_posix() for f in installed.files or () if not MADE_BY_PIP.fullmatch(str(f))}


def test_it_holds_the_package_and_the_engine_alone(installed: Distribution):
    engine = {name for name in names(installed) if ENGINE.fullmatch(name)}
    assert len([name for name in engine if "/_core." in name]) == 1, engine
    tree = {
        f"tidaldecode/{file.relative_to(PACKAGE).as_posix()}"
        for file in PACKAGE.rglob("*")
        if file.is_file() and file.suffix not in (".pyc", ".so")
    }
    assert {"tidaldecode/py.typed", "tidaldecode/_core.pyi", "tidaldecode/cli/app.py"} <= tree
    assert names(installed) - engine == tree


def test_it_is_small(installed: Distribution):
    """Wheels on PyPI may be 100 MB; this one is the demo's model, and code."""
    sizes = {f.as_posix(): f.size or 0 for f in installed.files or () if f.suffix != ".pyc"}
    assert sum(size for name, size in sizes.items() if "libtidal_cuda" not in name) < 25e6


def test_it_offers_the_extras_that_texts_and_messages_name(installed: Distribution):
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *PACKAGE.rglob("*.py")]
    named = re.findall(
        r"(?:'\.|tidaldecode)\[([a-z\d,]+)\]", "".join(text.read_text() for text in texts)
    )
    extras = {extra for group in named for extra in group.split(",")}
    assert {"serve", "structured", "hf"} <= extras
    assert extras <= set(installed.metadata.get_all("Provides-Extra"))


def test_its_command_is_there(installed: Distribution):
    (command,) = installed.entry_points
    assert (command.group, command.name) == ("console_scripts", "tidaldecode")
    assert callable(command.load())
