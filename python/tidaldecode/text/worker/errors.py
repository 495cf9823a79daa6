"""What goes wrong with a text, by whose fault it is."""

from __future__ import annotations


class TextError(Exception):
    """An error with a kind: "failed" is the folder's fault, "refused" the caller's."""

    def __init__(self, kind: str, message: str) -> None:
        """Takes the kind and a message of one line."""
        super().__init__(message)
        self.kind = kind
