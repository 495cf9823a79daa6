"""From what a caller passes as a prompt to lists of token ids.

Called by frontend.py. A prompt is a text or token ids: a list, range or array of integers of
whatever library, or what a transformers tokenizer gives. Several of those are a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from tidaldecode.errors import InvalidArgument, show
from tidaldecode.sampling import as_index
from tidaldecode.text.chat import check_text

MAX_PROMPT_ITEMS = 1 << 24  # the longest contexts have some 10 million tokens
_EXPECTED = "a string, a list of token ids, or a list of those"


def encode_prompts(
    prompt: Any, encode: Callable[[list[str]], list[list[int]]], vocab_size: int
) -> tuple[list[list[int]], bool]:
    """Token ids of one prompt or of several.

    Args:
        prompt: see above.
        encode: gives the ids of some texts.
        vocab_size: ids must be below it.

    Returns: (ids per prompt, True if `prompt` was a list of prompts).
    Raises: InvalidArgument for an empty prompt, ids out of range or anything of another kind.
    """
    if isinstance(prompt, str):
        return _encode([prompt], encode, vocab_size, ["prompt"]), False
    items = _as_list(_input_ids(prompt, "prompt"), "prompt")
    if not items:
        raise InvalidArgument("prompt: got an empty list, expected at least one token or prompt")
    if _are_ints(items) or not any(isinstance(item, str) or _is_list_like(item) for item in items):
        return [check_token_ids(items, vocab_size, "prompt")], False
    places = [f"prompt {index}" for index in range(len(items))]
    return _encode(items, encode, vocab_size, places), True


def check_token_ids(ids: Any, vocab_size: int, where: str = "token_ids") -> list[int]:
    """`ids` as a list of ints, each a row of the embedding table.

    Raises: InvalidArgument naming the first id that is none.
    """
    values = _as_list(ids, where)
    if not values:
        raise InvalidArgument(f"{where}: got no tokens, expected at least one")
    if _are_ints(values) and min(values) >= 0 and max(values) < vocab_size:
        return list(values)
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


def _are_ints(values: list[Any]) -> bool:
    """Whether all are Python's own integers, which takes a hundredth of looking at each."""
    return set(map(type, values)) == {int}


def _encode(
    items: list[Any],
    encode: Callable[[list[str]], list[list[int]]],
    vocab_size: int,
    places: list[str],
) -> list[list[int]]:
    """Token ids of texts and of lists of ids; all texts go to the tokenizer together."""
    texts = [
        check_text(item, where)
        for item, where in zip(items, places, strict=True)
        if isinstance(item, str)
    ]
    encoded = iter(encode(texts) if texts else ())
    batch = []
    for item, where in zip(items, places, strict=True):
        if not isinstance(item, str):
            ids = check_token_ids(_input_ids(item, where), vocab_size, where)
        elif not (ids := next(encoded)):
            raise InvalidArgument(f"{where}: got a text of no tokens, expected at least one")
        batch.append(ids)
    return batch


def _input_ids(prompt: Any, where: str) -> Any:
    """The ids of what a transformers tokenizer gave, without padding; else the prompt itself."""
    if not isinstance(prompt, Mapping):
        return prompt
    if "input_ids" not in prompt:
        raise InvalidArgument(f"{where}: got {show(prompt)}, expected {_EXPECTED}")
    ids = _as_list(prompt["input_ids"], f"{where}: input_ids")
    mask = prompt.get("attention_mask")
    if mask is None:
        return ids
    mask = _as_list(mask, f"{where}: attention_mask")
    if len(mask) != len(ids):
        raise InvalidArgument(
            f"{where}: attention_mask: got {len(mask)} entries, expected {len(ids)} as in input_ids"
        )
    if any(_is_list_like(row) for row in ids):
        pairs = enumerate(zip(ids, mask, strict=True))
        return [
            _input_ids({"input_ids": row, "attention_mask": own}, f"{where} {index}")
            for index, (row, own) in pairs
        ]
    kept = [position for position, wanted in enumerate(mask) if wanted]
    if not kept:
        return []
    first, last = kept[0], kept[-1]
    if len(kept) != last - first + 1:
        raise InvalidArgument(
            f"{where}: attention_mask: got zeros between ones, expected them at the ends only: "
            "padding is left out, holes cannot be"
        )
    return ids[first : last + 1]


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
    if isinstance(value, (str, bytes, bytearray, set, frozenset)):
        return False
    if isinstance(value, Mapping):
        return "input_ids" in value
    # A scalar of an array library has a tolist too, but no length.
    return isinstance(value, Iterable) and hasattr(value, "__len__")


def _as_list(value: Any, where: str) -> list[Any]:
    """The items of a list, a range or an array; the rows of an array are lists."""

    def problem() -> InvalidArgument:  # made if there is one: a long list takes long to be shown
        return InvalidArgument(f"{where}: got {show(value)}, expected {_EXPECTED}")

    is_array = hasattr(value, "__array__") and not isinstance(value, type)
    if not (_is_list_like(value) or is_array) or isinstance(value, Mapping):
        raise problem()
    if is_array and not hasattr(value, "tolist"):
        import numpy  # has been imported by whoever made the array

        value = numpy.asarray(value)
    try:
        if hasattr(value, "tolist"):
            items = value.tolist()
        else:
            count = len(value)
            if count > MAX_PROMPT_ITEMS:
                raise InvalidArgument(
                    f"{where}: got {count:,} items, expected at most {MAX_PROMPT_ITEMS:,}"
                )
            items = list(islice(value, count))  # some have no end, whatever their length says
    except InvalidArgument:
        raise
    except Exception:
        raise problem() from None
    if not isinstance(items, list):  # an array of no dimension
        raise problem()
    return items
