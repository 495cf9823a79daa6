"""Markers in a text that comes in pieces: what of its end may still become one."""

from __future__ import annotations


def beginning_at_end(text: str, marker: str) -> int:
    """The length of the longest end of `text` that begins `marker` and is not all of it."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
