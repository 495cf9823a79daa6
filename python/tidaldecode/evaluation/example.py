"""One question to a model: what goes in, what counts as right, and where it belongs.

Made by tasks.py and prompt_file.py, decoded by runner.py. Questions of a kind are a series.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from tidaldecode.checkpoint.model_folder import ModelFolder
from tidaldecode.text.tokenizer import Tokenizer

# Token ids of a whole prompt, with all that the model wants around it (BOS, chat template).
Encode = Callable[[str], list[int]]


def make_encoder(folder: ModelFolder, is_chat: bool | None) -> tuple[Encode, bool]:
    """How prompts of a model become token ids, and whether through its chat template.

    Args:
        folder: the model.
        is_chat: True is the template, False plain text, None the template if there is one.

    Raises: ConfigError for a folder without a tokenizer, or without the template asked for.
    """
    tokenizer = Tokenizer(folder.path, folder.model.vocab_size)
    if is_chat is None:
        is_chat = tokenizer.has_chat_template
    if not is_chat:
        return tokenizer.encode, False

    def encode(text: str) -> list[int]:
        return tokenizer.render_chat([{"role": "user", "content": text}])

    encode("")  # a template that fails does so before any work
    return encode, True


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


@dataclass(frozen=True, kw_only=True)
class Series:
    """The examples of one task at one context, in order, made when they are asked for."""

    context: int | None  # of every example
    most: int  # how many there are, or may be asked
    room: int  # tokens of the longest prompt and output together
    length: int  # at which the bytes of a step count: the context, or the mean of own prompts
    make: Callable[[int], Example]  # of an index below most
