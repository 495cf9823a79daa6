"""Tokenizers that put a space in front of a text, and how they read one that follows others."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

Parts = tuple[Any, Any]  # normalizer and pre-tokenizer


def without_prefix(tokenizer: Tokenizer) -> Parts | None:
    """The parts of a tokenizer, changed so that nothing comes in front; None if nothing does."""
    normalizer = _state(tokenizer.normalizer)
    pre_tokenizer = _state(tokenizer.pre_tokenizer)
    changed = _strip(normalizer), _strip(pre_tokenizer)
    if changed == (normalizer, pre_tokenizer):
        return None
    return (
        _made(normalizers.Sequence([]), changed[0]),
        _made(pre_tokenizers.Sequence([]), changed[1]),
    )


def _state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


def _made(empty: Any, state: Any) -> Any:
    """A part with this state; `empty` is any part of its kind."""
    if state is None:
        return None
    empty.__setstate__(json.dumps(state).encode())
    return empty


def _strip(state: Any) -> Any:
    """The state of a part without what it puts in front of a text."""
    if not isinstance(state, dict):
        return state
    kind = state.get("type")
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return state | {"prepend_scheme": "never"}
    if kind == "ByteLevel":
        return state | {"add_prefix_space": False}
    for name in ("normalizers", "pretokenizers"):
        if kind == "Sequence" and name in state:
            inner = (_strip(part) for part in state[name])
            return state | {name: [part for part in inner if part is not None]}
    return state
