"""Values that callers pass by mistake or on purpose, as expressions of Python.

A case holds expressions and not values, so that its reproducer is a line to paste, and so that a
corpus of cases outlives changes of this file. NAMES is what expressions may use.
"""

from __future__ import annotations

import decimal
import fractions
import itertools
import pathlib
from typing import Any

import numpy as np

import tidaldecode


class CallersError(Exception):
    """Raised by a caller's own objects and callbacks; it may come out of a call as it is."""


def _fail(*_: Any, **__: Any) -> Any:
    raise CallersError("the caller's own")


def raising(*names: str) -> Any:
    """An object whose methods of these names raise CallersError."""
    return type("Raising", (), {name: _fail for name in names})()


def giving(**results: Any) -> Any:
    """An object whose dunder methods return what is given: giving(index=5) has __index__."""
    methods = {
        f"__{name}__": (lambda result: lambda self, *_: result)(value)
        for name, value in results.items()
    }
    return type("Giving", (), methods)()


def nested(depth: int, leaf: Any = 1) -> Any:
    """A list in a list in a list."""
    for _ in range(depth):
        leaf = [leaf]
    return leaf


def cyclic() -> list[Any]:
    """A list that holds itself."""
    own: list[Any] = [1]
    own.append(own)
    return own


class Text(str):
    """A string whose comparisons raise."""

    __eq__ = __len__ = _fail
    __hash__ = str.__hash__


class Number(int):
    """An integer whose comparisons raise."""

    __lt__ = __le__ = __gt__ = __ge__ = _fail


NAMES: dict[str, Any] = {
    "tidaldecode": tidaldecode,
    "np": np,
    "itertools": itertools,
    "decimal": decimal,
    "fractions": fractions,
    "pathlib": pathlib,
    "raising": raising,
    "giving": giving,
    "nested": nested,
    "cyclic": cyclic,
    "Text": Text,
    "Number": Number,
    "fail": _fail,
    "nan": float("nan"),
    "inf": float("inf"),
}

NUMBERS = (
    "0", "-1", "1", "2", "3", "7", "2**31 - 1", "2**31", "-2**31", "-2**31 - 1", "2**32", "2**53",
    "2**63 - 1", "2**63", "-2**63", "-2**63 - 1", "2**64 - 1", "2**64", "10**400", "-10**400",
    "10**5000", "0.0", "-0.0", "0.5", "1.0", "1.5", "-1.5", "1e-320", "1e308", "-1e308", "nan",
    "inf", "-inf", "1e-9", "True", "False", "2j", "decimal.Decimal('NaN')", "decimal.Decimal(1)",
    "decimal.Decimal('sNaN')", "decimal.Decimal('1e400')", "fractions.Fraction(1, 3)", "Number(3)",
    "np.float32(0.5)", "np.float16('inf')", "np.int64(3)", "np.uint8(255)", "np.bool_(True)",
    "np.float64('nan')", "np.longdouble(1)", "np.datetime64('2020')", "np.complex64(1)",
)  # fmt: skip

TEXTS = (
    "''", "'a'", "'auto'", "'1'", "'\\x00'", "'\\ud800'", "'a\\udfffb'", "'\\U0010ffff'",
    "'é' * 50", "'a' * 100_000", "'\\n'", "'\\x1b[31m'", "b''", "b'abc'", "bytearray(b'ab')",
    "memoryview(b'ab')", "Text('greedy')", "Text('cpu')", "np.str_('auto')", "pathlib.Path('/')",
    "'/dev/null'", "'/no/such/folder'", "'a/b'", "'cuda'", "'cuda:999'", "'cpu'", "'cpu\\n'",
)  # fmt: skip

CONTAINERS = (
    "[]", "()", "{}", "set()", "frozenset({1})", "[None]", "[[]]", "[[], [1]]", "[1, 'a']",
    "[True]", "[1.0]", "[-1]", "[2**31]", "[2**64]", "[1, [2]]", "['a', 1]", "{'a': 1}", "{1: 'a'}",
    "range(3)", "range(10**12)", "iter([1, 2])", "(i for i in [1])", "itertools.count()",
    "itertools.repeat('a')", "nested(10)", "nested(100_000)", "cyclic()", "[1] * 100_000",
    "['a'] * 300", "[['\\ud800']]", "[float('nan')]", "np.array([1, 2])", "np.array(['a'])",
    "np.array([[1, 2], [3, 4]])", "np.array([1.5])", "np.array(3)", "np.array([])",
    "np.array([None])", "np.zeros((2, 0))", "np.array([2**63], np.uint64)", "np.ma.masked",
    "np.ma.array([1, 2], mask=[1, 0])", "np.recarray((1,), dtype=[('x', int)])",
)  # fmt: skip

OBJECTS = (
    "None", "...", "NotImplemented", "object()", "object", "type", "len", "print", "fail",
    "lambda *a: True", "lambda *a: False", "lambda: fail()", "lambda a, b, c, d, e: None",
    "lambda *a: np.array([1, 2])", "lambda *a: raising('__bool__')", "slice(None)",
    "Exception('x')", "raising('__index__')", "raising('__float__')", "raising('__iter__')",
    "raising('__len__')", "raising('__len__', '__iter__')", "raising('__repr__')",
    "raising('__str__', '__repr__')", "raising('__eq__')", "raising('__bool__')",
    "raising('__hash__')", "raising('__getattr__')", "raising('__getitem__', '__len__')",
    "raising('__fspath__')", "raising('__call__')", "raising('__getattribute__')",
    "giving(index=3)", "giving(index='x')", "giving(index=2**70)", "giving(float=nan)",
    "giving(float='x')", "giving(len=-1, iter=iter([1]))",
    "giving(len=2, iter=itertools.count())", "giving(len=2**70, iter=iter([1]))",
    "giving(iter=3, len=1)",
    "giving(repr=3)", "giving(repr='\\x1b' * 9999)", "giving(fspath=3)", "giving(fspath='\\x00')",
    "giving(eq=True)", "giving(eq=np.array([1, 2]))", "giving(bool=3)",
)  # fmt: skip

NASTY = (*NUMBERS, *TEXTS, *CONTAINERS, *OBJECTS)


def evaluate(expression: str, more: dict[str, Any] | None = None) -> Any:
    """The value of an expression over NAMES and `more`."""
    return eval(expression, {**NAMES, **(more or {})})
