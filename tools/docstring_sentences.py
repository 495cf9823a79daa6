"""For `make docs`: a docstring's `Returns:` and `Raises:` that are sentences become paragraphs.

griffe, which reads the docstrings, takes them for the heads of lists.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_SENTENCE = re.compile(r"^(Returns|Raises): (.+(?:\n +.+)*)", re.MULTILINE)


class DocstringSentences(griffe.Extension):
    """What mkdocs.yml names."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of an object that has been read."""
        if obj.docstring is not None:
            obj.docstring.value = _SENTENCE.sub(_paragraph, obj.docstring.value)


def _paragraph(found: re.Match[str]) -> str:
    return f"\n**{found[1]}:** {' '.join(found[2].split())}\n"
