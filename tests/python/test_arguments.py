"""Arguments of the wrong kind: a typed error that names the argument, whatever the value is.

The search of tests/fuzz makes up such calls by the thousand; here is each kind of them once.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripted_model import write_scripted_model
from tidaldecode import ConfigError, DecodeConfig, Decoder, InvalidArgument, plan_memory
from tidaldecode.errors import show

OPTIONS: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "num_threads": 1}


class NoText:
    """A value whose repr is no text."""

    def __repr__(self) -> Any:
        return 3


class Raises:
    """A value whose repr raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Loud:
    """A value whose repr is not printable."""

    def __repr__(self) -> str:
        return "\x1b[31m\n" * 1000


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def case_name(value: Any) -> str:
    """Names a case as messages show its value, but alike in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", show(value))


# No setting takes one of them.
ABSURD = [
    NoText(), Raises(), Loud(), nested(100_000), object(), float("nan"), b"auto", {"a": 1}, print,
    np.array([1, 2]), np.array([]), np.ma.masked, 2**70, -(10**400), 2j, "\ud800",
]  # fmt: skip
# What some arguments of a call do take all the same.
SENSIBLE = [
    ("on_prefill", show(print)), ("should_stop", show(print)), ("temperature", show(2**70)),
    ("repetition_penalty", show(2**70)), ("stop_token_ids", show(np.array([1, 2]))),
    ("stop_token_ids", show(np.array([]))), ("suppress_tokens", show(np.array([1, 2]))),
    ("suppress_tokens", show(np.array([]))), ("allowed_token_ids", show(np.array([1, 2]))),
    ("bad_words", show(np.array([]))),
]  # fmt: skip
IDS = [f"{index} {type(value).__name__}" for index, value in enumerate(ABSURD)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("arguments"))


@pytest.fixture(scope="module")
def decoder(folder: Path):
    with Decoder(folder, **OPTIONS) as decoder:
        yield decoder


@pytest.mark.parametrize(
    ("value", "expected"),
    [(NoText(), "a NoText"), (Raises(), "a Raises"), (nested(100_000), "a list")],
)
def test_a_value_that_cannot_show_itself_is_named_by_its_type(value, expected):
    assert show(value) == expected


def test_what_is_shown_is_printable():
    assert show(Loud()).isprintable() and len(show(Loud())) == 60


def test_a_callers_interruption_is_not_swallowed():
    class Interrupts:
        def __repr__(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show(Interrupts())


def is_quiet(call, name: str) -> None:
    """Checks that the call is refused by the argument's name, in one printable line."""
    with pytest.raises((InvalidArgument, ConfigError), match=name) as error:
        call()
    text = str(error.value)
    assert text.isprintable() and "incompatible" not in text and len(text) < 500


@pytest.mark.parametrize("value", ABSURD, ids=IDS)
@pytest.mark.parametrize("name", list(DecodeConfig.__dataclass_fields__))
def test_a_setting_refuses_the_absurd(name: str, value):
    is_quiet(lambda: DecodeConfig(**{name: value}), name)


@pytest.mark.parametrize("value", ABSURD, ids=IDS)
@pytest.mark.parametrize(
    "name",
    ["draft_tokens", "drafts", "sparse_min_context", "token_budget", "verify", "attention"],
)
def test_so_do_the_constructor_and_the_memory_plan(folder: Path, name: str, value):
    is_quiet(lambda: Decoder(folder, **OPTIONS, **{name: value}), name)
    is_quiet(lambda: plan_memory(folder, **OPTIONS, **{name: value}), name)
    is_quiet(lambda: Decoder(folder, config=DecodeConfig(**OPTIONS), **{name: value}), "config")


def test_a_word_that_was_put_together_is_the_default_too(folder: Path):
    auto = "".join(["au", "to"])
    with Decoder(folder, config=DecodeConfig(**OPTIONS), dtype=auto) as decoder:
        assert decoder.config.dtype == "float32"


@pytest.mark.filterwarnings("ignore:Warning. converting a masked element")
@pytest.mark.parametrize("value", ABSURD, ids=IDS)
@pytest.mark.parametrize(
    "name",
    ["max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
     "frequency_penalty", "presence_penalty", "min_new_tokens", "no_repeat_ngram_size",
     "logit_bias", "suppress_tokens", "bad_words", "allowed_token_ids",
     "stop_token_ids", "ignore_eos", "guide", "on_prefill", "should_stop"],
)  # fmt: skip
def test_so_does_a_call(decoder: Decoder, name: str, value):
    if (name, show(value)) in SENSIBLE:
        return
    is_quiet(lambda: decoder.generate([1, 2], **{name: value}), f"^{name}")
    is_quiet(lambda: decoder.stream([1, 2], **{name: value}), f"^{name}")


@pytest.mark.parametrize("value", [*ABSURD, 0, -1, 2**31, 1.0, "1", None], ids=case_name)
def test_numbers_of_positions_are_checked_before_the_engine(decoder: Decoder, value):
    is_quiet(lambda: decoder.logits([1, 2, 3], last=value), "last")
    is_quiet(lambda: decoder.step_logits([1, 2, 3], prefill=value), "prefill")
    if not (isinstance(value, int) and value == 0):  # the first sequence
        is_quiet(lambda: decoder.selection(value), "sequence")
    if value is not None:  # the decoder's own
        is_quiet(lambda: decoder.session(max_seq_len=value), "max_seq_len")


def test_numbers_of_numpy_are_numbers(decoder: Decoder):
    assert decoder.logits([1, 2, 3], last=np.int64(2)).shape[0] == 2
    assert decoder.step_logits([1, 2, 3], prefill=np.uint8(2)).shape[0] == 2
    decoder.generate([1, 2], max_new_tokens=2)
    assert decoder.selection(np.int32(0)) == {}, "a dense decoder chooses nothing"


@pytest.mark.parametrize("value", [*ABSURD, "tidal", None, 1], ids=case_name)
def test_the_attention_of_measured_steps_is_one_of_two_words(decoder: Decoder, value):
    is_quiet(lambda: decoder.measure_steps(8, attention=value), "attention")


@pytest.mark.parametrize("value", [3, "x", object(), np.array([1, 2]), True], ids=case_name)
def test_what_is_no_function_is_refused_before_any_work(folder: Path, decoder: Decoder, value):
    is_quiet(lambda: Decoder(folder, **OPTIONS, progress=value), "progress")
    free = decoder.num_free_pages
    is_quiet(lambda: decoder.replay([[1, 2]], max_new_tokens=1, on_prefill=value), "on_prefill")
    assert decoder.num_free_pages == free
    with decoder.replay([[1, 2]], max_new_tokens=1) as replay:
        is_quiet(lambda: replay.read(value), "on_prefill")


@pytest.mark.parametrize("value", [object, len, lambda: None, lambda a, b, c: None], ids=case_name)
def test_what_takes_other_arguments_is_refused_before_any_work(folder: Path, decoder, value):
    is_quiet(lambda: Decoder(folder, **OPTIONS, progress=value), "progress")
    is_quiet(lambda: decoder.generate([1, 2], on_prefill=value), "on_prefill")
    is_quiet(lambda: decoder.replay([[1, 2]], max_new_tokens=1, on_prefill=value), "on_prefill")
    if not (value is object or (hasattr(value, "__code__") and not value.__code__.co_argcount)):
        is_quiet(lambda: decoder.generate([1, 2], should_stop=value), "should_stop")


class Endless:
    """Says that it has two items, and gives more and more."""

    def __len__(self) -> int:
        return 2

    def __iter__(self):
        return itertools.count(1)


def test_lists_without_end_end(decoder: Decoder):
    assert decoder.generate(Endless(), max_new_tokens=1).prompt_tokens == 2
    assert decoder.logits(Endless(), last=2).shape[0] == 2
    for ids in (range(10**12), [range(10**12)]):
        is_quiet(lambda ids=ids: decoder.generate(ids, max_new_tokens=1), "items|prompt")
        is_quiet(lambda ids=ids: decoder.decode(ids), "token_ids")


@pytest.mark.parametrize("value", [np.bool_(True), np.array(True)], ids=case_name)
def test_a_truth_value_of_numpy_is_no_number(decoder: Decoder, value):
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "top_k", "seed",
                 "frequency_penalty", "presence_penalty", "min_new_tokens",
                 "no_repeat_ngram_size"):  # fmt: skip
        is_quiet(lambda name=name: decoder.generate([1, 2], **{name: value}), name)


@pytest.mark.parametrize("name", ["steps", "warmup"])
def test_measurements_end(decoder: Decoder, name: str):
    is_quiet(lambda: decoder.measure_steps(8, **{name: 2**31 - 1}), name)


def test_a_callbacks_own_error_comes_out(folder: Path, decoder: Decoder):
    class Own(Exception):
        pass

    def fail(*_: Any) -> Any:
        raise Own

    for call in (
        lambda: Decoder(folder, **OPTIONS, progress=fail),
        lambda: decoder.generate([1, 2], on_prefill=fail),
        lambda: decoder.generate([1, 2], should_stop=fail),
        lambda: list(decoder.stream([1, 2], on_prefill=fail)),
        lambda: decoder.replay([[1, 2]], max_new_tokens=1, on_prefill=fail),
        lambda: decoder.session().append([1, 2], should_stop=fail),
    ):
        free = decoder.num_free_pages
        with pytest.raises(Own):
            call()
        assert decoder.num_free_pages == free


@pytest.mark.parametrize(
    "value",
    [None, 3, np.int64(3), "ab", [1, 2], [[1], 2], [[1], "b"], [[1], None], [[1], [1.5]],
     [[1], [-1]], [[1], [2**31]], {"a": [1]}, [[1], object()], np.array(3), print],
    ids=case_name,
)  # fmt: skip
def test_continuations_are_lists_of_token_ids(decoder: Decoder, value):
    with decoder.replay([[1, 2], [3]], max_new_tokens=2) as replay:
        is_quiet(lambda: replay.step_logits(value), "continuation")
        assert [rows.shape[0] for rows in replay.step_logits([[1], []])] == [2, 1]


def test_stop_token_ids_without_an_end_are_too_many(decoder: Decoder):
    is_quiet(lambda: decoder.generate([1], stop_token_ids=itertools.count()), "more than 1024 ids")
    is_quiet(lambda: decoder.generate([1], stop_token_ids=range(10**12)), "1000000000000 ids")
    assert decoder.generate([1], max_new_tokens=1, stop_token_ids=iter([5]))


def test_an_unknown_keyword_is_pythons_to_refuse(folder: Path, decoder: Decoder):
    for call in (
        lambda: Decoder(folder, **OPTIONS, no_such=1),
        lambda: DecodeConfig(no_such=1),
        lambda: plan_memory(folder, no_such=1),
        lambda: decoder.generate([1], no_such=1),
        lambda: decoder.stream([1], no_such=1),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
            call()
