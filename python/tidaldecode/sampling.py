"""How one call wants its tokens chosen, checked before any work is done.

Called by decoder.py. Settings a call leaves out come from generation_config.json
(generation_defaults.py). What the numbers do is in cpp/src/decode/sampler.cc.
"""

from __future__ import annotations

import inspect
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypedDict

from tidaldecode import _core
from tidaldecode.checkpoint.generation_defaults import GenerationDefaults
from tidaldecode.errors import InvalidArgument, show
from tidaldecode.text.chat import check_text
from tidaldecode.text.guide import Guide, check_guide

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 4096
MAX_BAD_WORD_TOKENS = 1024
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
    frequency_penalty: float
    presence_penalty: float
    seed: int | None  # None: a fresh one for every sequence
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    min_new_tokens: int
    no_repeat_ngram_size: int
    logit_bias: dict[int, float]
    suppress_tokens: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]
    allowed_token_ids: tuple[int, ...]  # empty: all
    max_length: int | None  # of prompt and output; of a default max_new_tokens only
    skip_special_tokens: bool  # their text is not shown
    include_stop_str_in_output: bool  # what ended the text belongs to it
    guide: Guide | None = None  # what the text must be

    def for_choice(self, index: int) -> SamplingSettings:
        """The settings of one of several answers to a prompt, with another seed for each."""
        if self.seed is None or index == 0:
            return self
        return replace(self, seed=(self.seed + index) % 2**64)

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
    frequency_penalty: float | None
    presence_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    min_new_tokens: int | None
    no_repeat_ngram_size: int | None
    logit_bias: Mapping[int, float] | None
    suppress_tokens: Sequence[int] | None
    bad_words: Sequence[str | Sequence[int]] | None
    allowed_token_ids: Sequence[int] | None
    ignore_eos: bool
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    guide: Guide | None


def check_sampling(
    *,
    defaults: GenerationDefaults,
    eos_token_ids: Iterable[int],
    vocab_size: int,
    encode_word: Callable[[str], list[list[int]]],
    **asked: Unpack[SamplingOptions],
) -> SamplingSettings:
    """Checks the settings of a call and fills in the model's defaults.

    Args:
        defaults: of the settings that are None.
        eos_token_ids: end the text unless ignore_eos.
        vocab_size: token ids are below it.
        encode_word: gives the rows of tokens that a bad word may be written in.
        asked: the settings, as Decoder.generate explains them.

    Raises: InvalidArgument naming the field, what was got and what was expected; TypeError for a
        field that does not exist.
    """
    for name in asked.keys() - SamplingOptions.__annotations__.keys():
        raise TypeError(f"check_sampling() got an unexpected keyword argument '{name}'")

    def integer(name: str, *, low: int, high: int = 2**31 - 1) -> int:
        return _integer(name, asked.get(name), getattr(defaults, name, 0), low=low, high=high)

    def number(name: str, **limits: Any) -> float:
        return _number(name, asked.get(name), getattr(defaults, name, 0.0), **limits)

    def flag(name: str, default: bool) -> bool:
        return check_bool(name, asked.get(name, default))

    def token_ids(name: str, most: int) -> tuple[int, ...]:
        return _token_ids(name, asked.get(name), vocab_size, most, getattr(defaults, name, ()))

    ends = tuple(eos_token_ids)
    heat = number("temperature", low=0.0)
    stop_token_ids = {*token_ids("stop_token_ids", MAX_STOP_TOKEN_IDS)}
    stop_token_ids.update(() if flag("ignore_eos", False) else ends)
    words = _bad_words(asked.get("bad_words"), vocab_size, encode_word, defaults.bad_words)
    penalties = {"low": -_core.MAX_PENALTY, "high": _core.MAX_PENALTY}
    repetition = {"low": 1 / _core.MAX_REPETITION_PENALTY, "high": _core.MAX_REPETITION_PENALTY}
    return SamplingSettings(
        max_new_tokens=integer("max_new_tokens", low=1),
        max_new_tokens_is_explicit=asked.get("max_new_tokens") is not None,
        temperature=0.0 if heat < _GREEDY_BELOW else heat,
        top_k=min(max(0, integer("top_k", low=-1)), vocab_size),
        top_p=number("top_p", low=0.0, high=1.0, open_low=True),
        min_p=number("min_p", low=0.0, high=1.0),
        repetition_penalty=number("repetition_penalty", **repetition),
        frequency_penalty=number("frequency_penalty", **penalties),
        presence_penalty=number("presence_penalty", **penalties),
        seed=None if asked.get("seed") is None else integer("seed", low=0, high=2**64 - 1),
        stop=_stop_strings(asked.get("stop")),
        stop_token_ids=tuple(sorted(stop_token_ids)),
        min_new_tokens=_check_order(asked, integer("min_new_tokens", low=0)),
        no_repeat_ngram_size=integer("no_repeat_ngram_size", low=0),
        logit_bias=_logit_bias(asked.get("logit_bias"), vocab_size),
        suppress_tokens=token_ids("suppress_tokens", vocab_size),
        # As in transformers, end-of-text ids end the text whatever words are bad.
        bad_words=tuple(word for word in words if len(word) > 1 or word[0] not in ends),
        allowed_token_ids=_allowed_token_ids(asked.get("allowed_token_ids"), vocab_size),
        max_length=defaults.max_length,
        skip_special_tokens=flag("skip_special_tokens", True),
        include_stop_str_in_output=flag("include_stop_str_in_output", False),
        guide=check_guide(asked.get("guide")),
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


def check_seconds(name: str, value: Any) -> float:
    """`value` as a finite number of seconds, at least 0.

    Raises: InvalidArgument naming the setting.
    """
    return _number(name, value, 0.0, low=0.0)


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


def _check_order(asked: SamplingOptions, min_new_tokens: int) -> int:
    """`min_new_tokens`, if a call that asks for it leaves room for so many."""
    most = asked.get("max_new_tokens")
    if asked.get("min_new_tokens") is not None and most is not None and min_new_tokens > most:
        raise InvalidArgument(
            f"min_new_tokens: got {min_new_tokens}, expected at most max_new_tokens, {most}"
        )
    return min_new_tokens


def _items(name: str, values: Any, expected: str, most: int, noun: str = "ids") -> list[Any]:
    """The items of a list, tuple, range or array; one without an end is too long as well."""
    problem = InvalidArgument(f"{name}: got {show(values)}, expected a list of {expected}")
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise problem
    try:
        items = list(islice(values, most + 1))
    except TypeError:  # an array of no dimension says that it can be iterated over
        raise problem from None
    if len(items) > most:
        count = len(values) if isinstance(values, Sized) else f"more than {most}"
        raise InvalidArgument(f"{name}: got {count} {noun}, expected at most {most}")
    return items


def _token_ids(
    name: str, ids: Any, vocab_size: int, most: int, default: tuple[int, ...] = ()
) -> tuple[int, ...]:
    if ids is None:
        return default
    expected = f"integers from 0 to {vocab_size - 1} (vocab_size {vocab_size})"
    items = _items(name, ids, expected, most)
    return tuple(_token_id(name, item, vocab_size, expected) for item in items)


def _token_id(name: str, value: Any, vocab_size: int, expected: str) -> int:
    token_id = as_index(value)
    if token_id is None or not 0 <= token_id < vocab_size:
        raise InvalidArgument(f"{name}: got {show(value)}, expected {expected}")
    return token_id


def _allowed_token_ids(ids: Any, vocab_size: int) -> tuple[int, ...]:
    allowed = _token_ids("allowed_token_ids", ids, vocab_size, vocab_size)
    if ids is not None and not allowed:
        raise InvalidArgument("allowed_token_ids: got an empty list, expected at least one id")
    return allowed


def _logit_bias(biases: Any, vocab_size: int) -> dict[int, float]:
    if biases is None:
        return {}
    expected = f"token ids from 0 to {vocab_size - 1} (vocab_size {vocab_size}) with their biases"
    if not isinstance(biases, Mapping):
        raise InvalidArgument(
            f"logit_bias: got {show(biases)}, expected a dictionary of {expected}"
        )
    if len(biases) > _core.MAX_LOGIT_BIASES:
        raise InvalidArgument(
            f"logit_bias: got {len(biases)} tokens, expected at most {_core.MAX_LOGIT_BIASES}"
        )
    result = {}
    for key, bias in biases.items():
        # JSON has texts for keys.
        token = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 20 else key
        token_id = _token_id("logit_bias", token, vocab_size, expected)
        most = _core.MAX_LOGIT_BIAS
        result[token_id] = _number("logit_bias", bias, 0.0, low=-most, high=most)
    return result


def _bad_words(
    words: Any,
    vocab_size: int,
    encode_word: Callable[[str], list[list[int]]],
    default: tuple[tuple[int, ...], ...],
) -> tuple[tuple[int, ...], ...]:
    if words is None:
        return default
    expected = "texts and of lists of token ids"
    rows: list[tuple[int, ...]] = []
    for word in _items("bad_words", words, expected, MAX_BAD_WORDS, "words"):
        if isinstance(word, str):
            check_text(word, "bad_words")
            if not 1 <= len(word) <= MAX_STOP_CHARS:
                raise InvalidArgument(
                    f"bad_words: got a text of {len(word)} characters, "
                    f"expected 1 to {MAX_STOP_CHARS}"
                )
            rows += [tuple(row) for row in encode_word(word) if row]
            continue
        row = _token_ids("bad_words", word, vocab_size, MAX_BAD_WORD_TOKENS)
        if not row:
            raise InvalidArgument(
                f"bad_words: got {show(word)}, expected a text or at least one token id"
            )
        rows.append(row)
    return tuple(dict.fromkeys(rows))
