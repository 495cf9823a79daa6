"""Texts of tokenizers whose tokens are bytes: made here, without asking the text process.

A byte-level decoder (Llama 3, Qwen, GPT-2) does nothing but put the bytes of its tokens together.
With the bytes of each token known (Tokenizer.token_bytes) a token's text is a lookup, where a
question to the other process takes a hundred times as long.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import Any

_utf8 = codecs.getincrementaldecoder("utf-8")


class _Text:
    """The text of one growing sequence."""

    __slots__ = ("_decoder", "_num_known")

    def __init__(self, before: bytes) -> None:
        """Follows bytes of a prompt, whose last character the new tokens may complete."""
        self._decoder = _utf8("replace")
        self._decoder.decode(before)
        # What stands for an incomplete character has been shown as part of the prompt.
        self._num_known = 1 if self._decoder.getstate()[0] else 0

    def push(self, data: bytes, ends: bool = False) -> str:
        """The characters that are complete now."""
        text = self._decoder.decode(data, ends)
        if self._num_known and text:
            text, self._num_known = text[1:], 0
        return text


def detokenize_bytes(
    rows: Sequence[dict[str, Any]],
    token_bytes: Callable[[Sequence[int]], list[bytes]],
    special_ids: Collection[int],
) -> list[dict[str, Any]]:
    """What new tokens of several sequences add to their texts.

    Args:
        rows: as worker/backend.py's detokenize() takes them.
        token_bytes: gives the bytes of tokens.
        special_ids: the tokens that a row which skips special tokens leaves out.

    Returns: as there; a state is for the next call only.
    """
    answers = []
    for row in rows:
        skipped = special_ids if row["skips"] else ()
        text = row["state"]
        if text is None:
            shown = [token_id for token_id in row["prompt"] if token_id not in skipped]
            text = _Text(b"".join(token_bytes(shown)))
        ids = row["ids"]
        pieces = [
            "" if token_id in skipped else text.push(data)
            for token_id, data in zip(ids, token_bytes(ids), strict=True)
        ]
        if row["ends"]:
            pieces.append(text.push(b"", True))
        answers.append({"pieces": pieces, "state": text})
    return answers
