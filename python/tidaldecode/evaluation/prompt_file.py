"""The user's own prompts as a task: one JSON object a line, `prompt` and `answers`.

Called by command.py. Any accepted answer in the output makes it right.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tidaldecode.checkpoint.json_file import open_regular_file, parse_json_object
from tidaldecode.errors import InvalidArgument, show
from tidaldecode.evaluation.example import Encode, Example

_KEYS = ("prompt", "answers")
_FORM = '{"prompt": "...", "answers": ["..."]}'


def read_prompt_file(
    path: Path, encode: Encode, *, max_new_tokens: int, limit: int | None = None
) -> list[Example]:
    """The examples of a file, its name being that of the task.

    Args:
        path: JSON lines; empty lines are skipped.
        encode: token ids of a prompt.
        max_new_tokens: room for every output.
        limit: of how many lines; None is all.

    Raises: InvalidArgument naming the line, what it has and what it should have.
    """
    descriptor, _ = open_regular_file(path, InvalidArgument)
    examples: list[Example] = []
    with os.fdopen(descriptor, "rb") as file:
        for number, line in enumerate(file, start=1):
            if limit is not None and len(examples) >= limit:
                break
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            prompt, answers = _read_line(line, where)
            prompt_ids = encode(prompt)
            examples.append(
                Example(
                    task=path.stem,
                    index=len(examples),
                    context=None,
                    prompt_ids=tuple(prompt_ids),
                    answers=answers,
                    rule="any_found",
                    max_new_tokens=max_new_tokens,
                )
            )
    if not examples:
        raise InvalidArgument(f"{path}: got no prompts, expected lines such as {_FORM}")
    return examples


def _read_line(line: bytes, where: str) -> tuple[str, tuple[str, ...]]:
    raw = parse_json_object(line, where, InvalidArgument)
    for key in _KEYS:
        if key not in raw:
            raise InvalidArgument(f"{where}: {key} is missing; expected {_FORM}")
    prompt = raw["prompt"]
    if not _is_text(prompt):
        raise InvalidArgument(
            f"{where}: prompt: got {show(prompt)}, expected a string that is not empty"
        )
    answers = raw["answers"]
    if isinstance(answers, str):
        answers = [answers]
    fits = isinstance(answers, list) and answers and all(_is_text(answer) for answer in answers)
    if not fits:
        raise InvalidArgument(
            f"{where}: answers: got {show(answers)}, expected a list of at least one string, "
            "none of them empty"
        )
    return prompt, tuple(answers)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
