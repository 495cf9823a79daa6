"""One question to a model: what goes in, what counts as right, and where it belongs.

Made by tasks.py and prompt_file.py, decoded by runner.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

# Token ids of a whole prompt, with all that the model wants around it (BOS, chat template).
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt and its answers."""

    task: str
    index: int  # among the examples of the same task and context
    context: int | None  # tokens of prompt and output together; None: the prompt is as it is
    prompt_ids: tuple[int, ...]
    answers: tuple[str, ...]
    rule: str  # how an output is scored, a name of scoring.RULES
    max_new_tokens: int
    depth: float | None = None  # where what is asked for lies: 0 at the start, 1 at the end

    @property
    def digest(self) -> str:
        """Changes with anything that could change the score."""
        content = (self.prompt_ids, self.answers, self.rule, self.max_new_tokens)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]
