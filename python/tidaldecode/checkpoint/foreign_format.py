"""What a file that is not what its name says seems to be, for error messages.

Called where a file of a model folder cannot be read: json_file.py, safetensors_header.py. Downloads
go wrong in a few ways that all look like damage: a clone without git-lfs leaves pointers, a proxy
or a gated model gives a web page, a tool that stopped leaves zero bytes.
"""

from __future__ import annotations

import re

from tidaldecode.errors import show

BYTES_LOOKED_AT = 512

_AGAIN = "download the file again"
# What a file begins with, what that is and what to do.
_BEGINNINGS = (
    (
        b"version https://git-lfs",
        "a git-lfs pointer, not the file itself; run `git lfs pull` in the folder, or download the "
        "model again",
    ),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it"),
    (b"\xfd7zXZ\x00", "an xz archive; unpack it"),
    (b"BZh", "a bzip2 archive; unpack it"),
    (b"PK\x03\x04", "a zip archive, as PyTorch's pickled weights are; expected safetensors"),
    (b"GGUF", "a GGUF file, which is not read; expected a Hugging Face folder with safetensors"),
    (b"\x89HDF", "an HDF5 file, which is not read; expected safetensors"),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_PAGE_BEGINNINGS = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")
_TEXT_SHOWN = 60


def describe_foreign(beginning: bytes) -> str | None:
    """Says what a file seems to be that begins like this; None for what could be anything.

    Args:
        beginning: the first BYTES_LOOKED_AT bytes, or fewer if the file is shorter, or more.

    Returns: an article, a noun and what to do ("a gzip archive; unpack it").
    """
    beginning = beginning[:BYTES_LOOKED_AT]
    for magic, description in _BEGINNINGS:
        if beginning.startswith(magic):
            return description
    if _PICKLE.match(beginning):
        return "a Python pickle, which can run code and is never read; expected safetensors"
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_PAGE_BEGINNINGS):
        return (
            f"a web page (HTML), perhaps one that says why a download failed; {_AGAIN}, with a "
            "token where the model asks for one"
        )
    if beginning and not beginning.strip(b"\0"):
        return f"filled with zero bytes, as an unfinished download leaves it; {_AGAIN}"
    return None


def describe_text(beginning: bytes) -> str | None:
    """Shows a beginning that is text, where a file should be binary; None if it is not."""
    beginning = beginning[:BYTES_LOOKED_AT]
    try:
        text = beginning.decode("ascii").strip()
    except UnicodeDecodeError:
        return None
    if not text or not all(c.isprintable() or c in "\r\n\t" for c in text):
        return None
    return f"text: {show(text, _TEXT_SHOWN)}; {_AGAIN}"
