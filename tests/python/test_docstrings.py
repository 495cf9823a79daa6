"""Docstrings of everything public say what signatures leave open.

That they name the errors that calls raise is for `make fuzz-short` to see (fuzz/api_docs.py).
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

import api_docs  # noqa: E402
import judge  # noqa: E402
import tidaldecode  # noqa: E402
from api_surface import Call, calls  # noqa: E402
from tidaldecode import CapacityError, ConfigError, InvalidArgument  # noqa: E402

SHAPE = re.compile(r"\[\w[\w +*()-]*(, \w[\w +*()-]*)*\] (float|int)32")
CALLS = [
    call for call in calls() if call.function is not None and not call.attribute.startswith("__")
]


def call_named(name: str) -> Call:
    return next(call for call in CALLS if call.name == name)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_every_parameter_is_explained(call: Call):
    names = list(inspect.signature(call.function).parameters)[bool(call.receiver) :]
    unexplained = [name for name in names if not api_docs.explains(call.name, name)]
    assert not unexplained, f"{call.name}: not under Args: {unexplained}"


def test_arrays_have_a_shape_and_a_dtype():
    given = [call.name for call in CALLS if "ndarray" in str(inspect.signature(call.function))]
    assert {"Decoder.logits", "Decoder.selection", "Replay.step_logits"} <= set(given)
    for name in given:
        assert SHAPE.search(api_docs.docstring(name)), f"{name}: no [shape] and dtype"


def test_the_page_of_the_api_has_every_name():
    page = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
    shown = re.findall(r"^::: tidaldecode\.(\w+)$", page, re.MULTILINE)
    assert sorted(shown) == sorted(set(tidaldecode.__all__) - {"__version__"})


def test_docstrings_are_followed_to_where_they_refer():
    assert not api_docs.explains("Decoder.generate", "no_such_option")
    assert api_docs.explains("Decoder", "token_budget")  # DecodeConfig's, which are PlanConfig's
    assert api_docs.explains("Session.stream", "prompt")
    assert "CapacityError" in api_docs.errors_of("Session.chat_stream")
    assert "OutOfMemoryError" not in api_docs.errors_of("Session.chat_stream")
    assert api_docs.errors_of("Guide.json_object") == frozenset()


@pytest.mark.parametrize(
    "name, error, is_named",
    [
        ("Decoder.logits", CapacityError("too long"), True),
        ("Decoder.logits", ConfigError("no tokenizer"), False),
        ("Session.truncate", InvalidArgument("length"), True),
        ("Session.close", InvalidArgument("a turn is running"), False),
        ("Session.close", InvalidArgument("session: it is closed"), True),
    ],
)
def test_an_error_that_is_not_named_is_a_fault(name: str, error: Exception, is_named: bool):
    with (
        pytest.raises(type(error) if is_named else judge.Nonsense, match=str(error)),
        api_docs.check_documented(call_named(name)),
    ):
        raise error
