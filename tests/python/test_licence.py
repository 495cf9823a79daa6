"""The licence: the whole text, the same name everywhere it is said, and in what is installed."""

from __future__ import annotations

import hashlib
import re
from importlib.metadata import Distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPDX = "Apache-2.0"
WHEEL_SPDX = "Apache-2.0 AND MIT AND BSD-3-Clause"  # with the page's files of others
VENDOR = "python/tidaldecode/server/web/vendor"


def test_the_licence_is_the_unchanged_apache_text():
    text = (ROOT / "LICENSE").read_text()
    terms = text[: text.index("END OF TERMS AND CONDITIONS")]
    words = " ".join(terms.split()).encode()
    assert hashlib.sha256(words).hexdigest() == (
        "09ae9bf1886f530f7338889ef805f37b288ec6adedd1e1e32058921acf05a782"
    )
    assert "Copyright 2026 tidaldecode developers" in text


@pytest.mark.parametrize(
    "file", ["pyproject.toml", "README.md", "python/tidaldecode/models/tidal-demo/README.md"]
)
def test_every_place_names_the_same_licence(file: str):
    assert SPDX in re.findall(r"Apache[-\d. ]*\d", (ROOT / file).read_text())


def test_the_files_of_others_are_named_with_their_licences():
    table = (ROOT / "third_party" / "README.md").read_text()
    texts = (ROOT / VENDOR / "LICENSES.txt").read_text()
    files = sorted(file.name for file in (ROOT / VENDOR).glob("*.js"))
    assert files == sorted(re.findall(r"^\| `(\w+\.js)`", table, re.M))
    for file in files:
        assert file in texts, file
    assert re.search(f'^license = "{WHEEL_SPDX}"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert f'"{VENDOR}/LICENSES.txt"' in (ROOT / "pyproject.toml").read_text()
    for words in ("The MIT License", "Redistribution and use in source", "END OF TERMS"):
        assert words in texts, words


def test_the_installed_package_carries_its_licence(installed: Distribution):
    assert installed.metadata["License-Expression"] == WHEEL_SPDX
    assert any(f.name == "LICENSES.txt" for f in installed.files)
    (licence,) = [f for f in installed.files if f.name == "LICENSE"]
    assert licence.read_text() == (ROOT / "LICENSE").read_text()
