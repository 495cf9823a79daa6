"""Texts of tokenizers whose tokens are bytes: made here, without asking the text process.

A byte-level decoder (Llama 3, Qwen, GPT-2) does nothing but put the bytes of its tokens together.
With the bytes of each token known (Tokenizer.token_bytes) a token's text is a lookup, where a
question to the other process takes a hundred times as long.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class ByteText:
    """The text of one growing sequence."""

    __slots__ = ("_num_known", "_rest", "_token_bytes")

    def __init__(
        self, prompt_ids: Sequence[int], token_bytes: Callable[[Sequence[int]], list[bytes]]
    ) -> None:
        """Follows a prompt, whose last character the new tokens may complete.

        Args:
            prompt_ids: its last tokens.
            token_bytes: gives the bytes of tokens, none of those that are left out.
        """
        self._token_bytes = token_bytes
        self._rest = b""  # the beginning of a character
        self._num_known = 0
        self.push(prompt_ids)
        # What stands for an incomplete character has been shown as part of the prompt.
        self._num_known = 1 if self._rest else 0

    def push(self, token_ids: Sequence[int], ends: bool = False) -> str:
        """The characters that tokens make complete, and at the end those that are not."""
        return self._decode(b"".join(self._token_bytes(token_ids)), ends)

    def pieces(self, token_ids: Sequence[int], *, ends: bool = False) -> list[str]:
        """push() of each token, and of the end."""
        pieces = [self._decode(data, False) for data in self._token_bytes(token_ids)]
        return [*pieces, self._decode(b"", True)] if ends else pieces

    def _decode(self, data: bytes, is_last: bool) -> str:
        data = self._rest + data
        text, num_used = codecs.utf_8_decode(data, "replace", is_last)
        self._rest = data[num_used:]
        if self._num_known and text:
            text, self._num_known = text[1:], 0
        return text
