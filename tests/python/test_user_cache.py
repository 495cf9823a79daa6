"""The user's cache: of use where it can be used, and never in the way."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tidaldecode import WeightsError
from tidaldecode.checkpoint.fingerprint import model_fingerprint
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.plans import find_plan
from tidaldecode.user_cache import cached_plan_file, is_kept, user_cache_dir, write_whole
from tiny_models import TinyModel, write_checkpoint

# Runs as another user, after all imports: what is imported may lie where that one cannot look.
AS_NOBODY = """
import os, sys
from pathlib import Path
import tidaldecode
from tidaldecode import demo_model_dir
from tidaldecode.checkpoint.model_folder import read_model_folder
from tidaldecode.plans import find_plan
from tidaldecode.user_cache import cached_plan_file, user_cache_dir
folder = read_model_folder(sys.argv[1])
if os.getuid() == 0:
    os.setuid(int(sys.argv[2]))
print(find_plan(folder), user_cache_dir())
try:
    cached_plan_file("0").parent.mkdir(parents=True)
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", TinyModel(num_layers=4))


def run_as_nobody(folder: Path, user: int, **environment: str) -> str:
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    result = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(folder), str(user)],
        capture_output=True, text=True, env=paths | environment, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_cache_that_may_not_be_searched_is_empty(folder: Path, tmp_path: Path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0 if os.getuid() else 0o700)
    try:
        output = run_as_nobody(folder, 65534, XDG_CACHE_HOME=str(locked / "cache"))
    finally:
        locked.chmod(0o700)
    assert output.startswith("None ")
    assert "PermissionError" in output


@pytest.mark.skipif(os.getuid() != 0, reason="needs a user that no table knows")
def test_a_user_without_a_home_has_no_cache(folder: Path):
    output = run_as_nobody(folder, 54321)
    assert output.startswith(f"None {os.devnull}")
    assert "NotADirectoryError" in output


def test_a_relative_place_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / ".cache" / "tidaldecode"


def test_a_file_in_place_of_the_cache_is_no_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not is_kept(cached_plan_file("").parent)
    assert find_plan(read_model_folder(folder)) is None


def keep_plan(folder: Path, content: str) -> Path:
    path = cached_plan_file(model_fingerprint(read_model_folder(folder)))
    path.parent.mkdir(parents=True)
    path.write_text(content)
    return path


def test_a_kept_plan_is_found(folder: Path):
    keep_plan(folder, json.dumps({"select_layers": [2]}))
    plan = find_plan(read_model_folder(folder))
    assert plan is not None and "user's cache" in plan.source


@pytest.mark.parametrize("content", ["", "{", '{"select_layers": [99]}', "\0" * 100, "[1]"])
def test_a_kept_plan_that_is_damaged_is_passed_over_and_said(folder: Path, content: str, caplog):
    path = keep_plan(folder, content)
    with caplog.at_level(logging.WARNING, logger="tidaldecode"):
        assert find_plan(read_model_folder(folder)) is None
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "calibrate again" in record.getMessage()


def test_a_plan_file_that_is_no_file_is_passed_over(folder: Path, caplog):
    path = keep_plan(folder, "")
    path.unlink()
    os.mkfifo(path)
    assert find_plan(read_model_folder(folder)) is None
    assert "not a regular file" in caplog.text


# The name of a model's files


def test_a_file_that_goes_while_a_model_is_named_is_a_typed_error(folder: Path):
    model = read_model_folder(folder)
    (folder / "gone.safetensors").symlink_to("nowhere")
    with pytest.raises(WeightsError, match="gone.safetensors: cannot be opened"):
        model_fingerprint(model)


def test_a_folder_that_goes_while_a_model_is_named_is_a_typed_error(folder: Path):
    model = read_model_folder(folder)
    folder.rename(folder.with_name("moved"))
    with pytest.raises(WeightsError, match="cannot be listed: No such file"):
        model_fingerprint(model)


def test_a_file_is_written_whole_and_a_device_is_never_replaced(tmp_path: Path):
    """What a user may write to would else be a file afterwards; root may write to /dev."""
    write_whole(tmp_path / "new" / "file", "a")
    write_whole(tmp_path / "new" / "file", "b")
    assert (tmp_path / "new" / "file").read_text() == "b"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path / "new"):
        with pytest.raises(OSError, match=r"not a regular file|[Ii]s a directory"):
            write_whole(path, "c")
    assert fifo.is_fifo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "new"]
