"""From what a caller passes as a prompt to lists of token ids.

Called by decoder.py. A prompt is a string or a list of token ids; a list of prompts is a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tidaldecode.errors import InvalidArgument, show
from tidaldecode.sampling import as_index

_EXPECTED = "a string, a list of token ids, or a list of those"


def encode_prompts(
    prompt: Any, encode: Callable[[str], list[int]], vocab_size: int
) -> tuple[list[list[int]], bool]:
    """Token ids of one prompt or of several.

    Args:
        prompt: see above; numpy arrays of integers count as lists.
        encode: gives the ids of a text.
        vocab_size: ids must be below it.

    Returns: (ids per prompt, True if `prompt` was a list of prompts).
    Raises: InvalidArgument for an empty prompt, ids out of range or anything of another kind.
    """
    if isinstance(prompt, str):
        return [_encode_text(prompt, encode, "prompt")], False
    items = _as_list(prompt, "prompt")
    if not items:
        raise InvalidArgument("prompt: got an empty list, expected at least one token or prompt")
    if not any(isinstance(item, str) or _is_list_like(item) for item in items):
        return [check_token_ids(items, vocab_size, "prompt")], False
    batch = []
    for index, item in enumerate(items):
        where = f"prompt {index}"
        if isinstance(item, str):
            batch.append(_encode_text(item, encode, where))
        else:
            batch.append(check_token_ids(_as_list(item, where), vocab_size, where))
    return batch, True


def check_token_ids(ids: Any, vocab_size: int, where: str = "token_ids") -> list[int]:
    """`ids` as a list of ints, each a row of the embedding table.

    Raises: InvalidArgument naming the first id that is none.
    """
    values = _as_list(ids, where)
    if not values:
        raise InvalidArgument(f"{where}: got no tokens, expected at least one")
    result = []
    for position, value in enumerate(values):
        token_id = as_index(value)
        if token_id is None or not 0 <= token_id < vocab_size:
            raise InvalidArgument(
                f"{where}: token_ids[{position}]: got {show(value)}, expected an integer from 0 to "
                f"{vocab_size - 1} (vocab_size {vocab_size})"
            )
        result.append(token_id)
    return result


def check_continuations(continuations: Any, vocab_size: int) -> list[list[int]]:
    """Lists of token ids, one a prompt; nothing may follow a prompt, unlike a prompt itself.

    Raises: InvalidArgument naming what is none.
    """
    found = []
    for index, ids in enumerate(_as_list(continuations, "continuations")):
        where = f"continuation {index}"
        items = _as_list(ids, where)
        found.append(check_token_ids(items, vocab_size, where) if items else [])
    return found


def _is_list_like(value: Any) -> bool:
    if isinstance(value, (str, bytes, bytearray, Mapping, set, frozenset)):
        return False
    # A numpy scalar has __iter__-less type; an array of one dimension or more has a length.
    return isinstance(value, Iterable) and hasattr(value, "__len__")


def _as_list(value: Any, where: str) -> list[Any]:
    if not _is_list_like(value):
        raise InvalidArgument(f"{where}: got {show(value)}, expected {_EXPECTED}")
    try:
        return list(value)
    except TypeError:
        raise InvalidArgument(f"{where}: got {show(value)}, expected {_EXPECTED}") from None


def _encode_text(text: str, encode: Callable[[str], list[int]], where: str) -> list[int]:
    ids = encode(text)
    if not ids:
        raise InvalidArgument(f"{where}: got a text of no tokens, expected at least one")
    return ids
