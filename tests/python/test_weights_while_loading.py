"""Weight files that change between the reading of their headers and of their last tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.numpy

from scripted_model import update_json
from tidaldecode import Decoder
from tidaldecode.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE
from tidaldecode.errors import WeightsError
from tiny_models import TinyModel, random_weights, write_checkpoint

TINY = TinyModel(num_layers=2)
IDS = [1, 2, 3, 4]


def shard(folder: Path, number: int) -> Path:
    return folder / f"model-{number:05d}-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder as the Hugging Face cache has it: links to the shards."""
    folder, blobs = write_checkpoint(tmp_path / "model", TINY), tmp_path / "blobs"
    blobs.mkdir()
    weights = random_weights(TINY)
    (folder / SINGLE_FILE).unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        path = shard(folder, number)
        safetensors.numpy.save_file({name: weights[name] for name in part}, blobs / path.name)
        path.symlink_to(blobs / path.name)
        weight_map |= dict.fromkeys(part, path.name)
    update_json(folder / INDEX_FILE, metadata={"total_size": 1}, weight_map=weight_map)
    return folder


def replace(path: Path) -> None:
    """By a file of the same size, as a download does."""
    real = path.resolve()
    other = real.with_suffix(".new")
    other.write_bytes(bytes(real.stat().st_size))
    os.replace(other, real)


def replace_keeping_times(path: Path) -> None:
    status = path.stat()
    replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


def switch_link(path: Path) -> None:
    other = path.resolve().with_suffix(".other")
    shutil.copy2(path, other)
    path.unlink()
    path.symlink_to(other)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 32)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(8))


def remove(path: Path) -> None:
    path.unlink()


def rename_folder(path: Path) -> None:
    """Another model takes the folder's name."""
    moved = path.parent.with_name("moved")
    path.parent.rename(moved)
    shutil.copytree(moved, path.parent)  # copies what the links point to


ALL = (replace, replace_keeping_times, rewrite, switch_link, truncate, lengthen, remove)


def load_and(change: Callable[[], None], folder: Path, at: float) -> None:
    """Loads, and makes the change once this share of the bytes has been read."""
    changed = False

    def progress(done: int, total: int) -> None:
        nonlocal changed
        if not changed and done >= at * total:
            changed = True
            change()

    Decoder(folder, device="cpu", max_seq_len=64, progress=progress).close()


@pytest.mark.parametrize("change", [*ALL, rename_folder])
def test_a_shard_that_changes_before_it_is_read(sharded: Path, change: Callable[[Path], None]):
    # The first tensor is the embedding, which lies in one of the two.
    names = safetensors.numpy.load_file(shard(sharded, 1))
    later = shard(sharded, 2 if "model.embed_tokens.weight" in names else 1)
    with pytest.raises(WeightsError, match=later.name):
        load_and(lambda: change(later), sharded, 0.0)


@pytest.mark.parametrize("change", [rewrite, truncate, lengthen])
@pytest.mark.parametrize("number", [1, 2])
def test_a_shard_that_changes_in_place_while_or_after_it_is_read(
    sharded: Path, change: Callable[[Path], None], number: int
):
    path = shard(sharded, number)
    with pytest.raises(WeightsError, match=path.name):
        load_and(lambda: change(path), sharded, 1.0)


@pytest.mark.parametrize("change", [replace, switch_link, remove])
def test_a_shard_that_is_replaced_after_it_was_opened_stays_the_old_one(
    sharded: Path, change: Callable[[Path], None]
):
    with Decoder(sharded, device="cpu", max_seq_len=64) as decoder:
        want = decoder.logits(IDS)

    def progress(done: int, total: int) -> None:
        if done == total:
            change(shard(sharded, 1))

    with Decoder(sharded, device="cpu", max_seq_len=64, progress=progress) as decoder:
        got = decoder.logits(IDS)
    assert (got == want).all()
