"""How one call wants its tokens chosen, checked before any work is done.

Called by decoder.py. Settings a call leaves out come from generation_config.json
(generation_defaults.py). What the numbers do is in cpp/src/decode/sampler.cc.
"""

from __future__ import annotations

import inspect
import math
import operator
import os
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypedDict

from tidaldecode.checkpoint.generation_defaults import GenerationDefaults
from tidaldecode.errors import InvalidArgument, show
from tidaldecode.text.chat import check_text

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
# Below it a softmax in float32 has one non-zero entry anyway; greedy says so without dividing.
_GREEDY_BELOW = 1e-6


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Checked settings of one call, every default filled in but the ones per prompt."""

    max_new_tokens: int
    max_new_tokens_is_explicit: bool  # a default shrinks to the room there is, a request does not
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None  # None: a fresh one for every sequence
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    max_length: int | None  # of prompt and output; of a default max_new_tokens only
    skip_special_tokens: bool  # their text is not shown
    include_stop_str_in_output: bool  # what ended the text belongs to it

    def draw_seed(self) -> int:
        """The seed of one sequence, from the system's randomness unless one was given."""
        return int.from_bytes(os.urandom(8), "little") if self.seed is None else self.seed


class SamplingOptions(TypedDict, total=False):
    """The settings of a call as keyword options; Decoder.generate explains each."""

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    skip_special_tokens: bool
    include_stop_str_in_output: bool


def check_sampling(
    *,
    defaults: GenerationDefaults,
    eos_token_ids: Iterable[int],
    vocab_size: int,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    ignore_eos: bool = False,
    skip_special_tokens: bool = True,
    include_stop_str_in_output: bool = False,
) -> SamplingSettings:
    """Checks the settings of a call and fills in the model's defaults.

    Raises: InvalidArgument naming the field, what was got and what was expected.
    """
    check_bool("ignore_eos", ignore_eos)
    heat = _number("temperature", temperature, defaults.temperature, low=0.0)
    limit = _integer("max_new_tokens", max_new_tokens, defaults.max_new_tokens, low=1)
    own_stops = _stop_token_ids(stop_token_ids, vocab_size)
    ends = () if ignore_eos else tuple(eos_token_ids)
    return SamplingSettings(
        max_new_tokens=limit,
        max_new_tokens_is_explicit=max_new_tokens is not None,
        temperature=0.0 if heat < _GREEDY_BELOW else heat,
        top_k=min(max(0, _integer("top_k", top_k, defaults.top_k, low=-1)), vocab_size),
        top_p=_number("top_p", top_p, defaults.top_p, low=0.0, high=1.0, open_low=True),
        min_p=_number("min_p", min_p, defaults.min_p, low=0.0, high=1.0),
        repetition_penalty=_number(
            "repetition_penalty",
            repetition_penalty,
            defaults.repetition_penalty,
            low=0.0,
            open_low=True,
        ),
        seed=None if seed is None else _integer("seed", seed, 0, low=0, high=2**64 - 1),
        stop=_stop_strings(stop),
        stop_token_ids=tuple(sorted({*ends, *own_stops})),
        max_length=defaults.max_length,
        skip_special_tokens=check_bool("skip_special_tokens", skip_special_tokens),
        include_stop_str_in_output=check_bool(
            "include_stop_str_in_output", include_stop_str_in_output
        ),
    )


def as_index(value: Any) -> int | None:
    """`value` as an int if it is one in kind (numpy's included, bool and float not), else None."""
    if _is_bool(value):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_bool(name: str, value: Any) -> bool:
    """`value`, if it is True or False.

    Raises: InvalidArgument naming the setting.
    """
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name}: got {show(value)}, expected True or False")
    return value


def check_integer(name: str, value: Any, *, low: int, high: int = 2**31 - 1) -> int:
    """`value` as an int within the bounds.

    Raises: InvalidArgument naming the setting.
    """
    number = as_index(value)
    if number is None or not low <= number <= high:
        raise InvalidArgument(
            f"{name}: got {show(value)}, expected an integer from {low} to {high}"
        )
    return number


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value`, if it is one of the words.

    Raises: InvalidArgument naming the setting.
    """
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise InvalidArgument(f"{name}: got {show(value)}, expected one of {expected}")
    return value


def check_callback(name: str, value: Any, num_arguments: int) -> Any:
    """`value`, if it can be called with so many arguments or is None.

    Raises: InvalidArgument naming the argument.
    """
    if value is None:
        return value
    problem = InvalidArgument(
        f"{name}: got {show(value)}, expected a function of {num_arguments} arguments"
    )
    if not callable(value):
        raise problem
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # one that does not tell
        return value
    try:
        signature.bind(*range(num_arguments))
    except TypeError:
        raise problem from None
    return value


def _is_bool(value: Any) -> bool:
    """True for True and False, those of array libraries included."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _integer(name: str, value: Any, default: int, *, low: int, high: int = 2**31 - 1) -> int:
    return default if value is None else check_integer(name, value, low=low, high=high)


def _number(
    name: str,
    value: Any,
    default: float,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
) -> float:
    if value is None:
        return default
    relation = ">" if open_low else ">="
    limit = "" if high == math.inf else f" and <= {high:g}"
    problem = InvalidArgument(
        f"{name}: got {show(value)}, expected a finite number {relation} {low:g}{limit}"
    )
    if isinstance(value, (str, bytes)) or _is_bool(value):
        raise problem
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise problem from None
    in_range = (number > low if open_low else number >= low) and number <= high
    if not (math.isfinite(number) and in_range):
        raise problem
    return number


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or isinstance(strings, bytes):
        raise InvalidArgument(f"stop: got {show(stop)}, expected a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidArgument(
            f"stop: got {len(strings)} strings, expected at most {MAX_STOP_STRINGS}"
        )
    for text in strings:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
            size = f" ({len(text)} characters)" if isinstance(text, str) else ""
            raise InvalidArgument(
                f"stop: got {show(text)}{size}, "
                f"expected strings of 1 to {MAX_STOP_CHARS} characters"
            )
        check_text(text, "stop")
    return tuple(strings)


def _stop_token_ids(ids: Any, vocab_size: int) -> tuple[int, ...]:
    if ids is None:
        return ()
    expected = f"integers from 0 to {vocab_size - 1} (vocab_size {vocab_size})"
    problem = InvalidArgument(f"stop_token_ids: got {show(ids)}, expected a list of {expected}")
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise problem
    try:
        values = list(islice(ids, MAX_STOP_TOKEN_IDS + 1))  # one without an end is too long as well
    except TypeError:  # an array of no dimension says that it can be iterated over
        raise problem from None
    if len(values) > MAX_STOP_TOKEN_IDS:
        count = len(ids) if isinstance(ids, Sized) else f"more than {MAX_STOP_TOKEN_IDS}"
        raise InvalidArgument(
            f"stop_token_ids: got {count} ids, expected at most {MAX_STOP_TOKEN_IDS}"
        )
    result = []
    for value in values:
        token_id = as_index(value)
        if token_id is None or not 0 <= token_id < vocab_size:
            raise InvalidArgument(f"stop_token_ids: got {show(value)}, expected {expected}")
        result.append(token_id)
    return tuple(result)
