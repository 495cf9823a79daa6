"""What docstrings of the public API promise: read here, held against what calls do by target_api.py
and against signatures by tests/python/test_docstrings.py.

A docstring may leave a part to another one that it names: in its first line (`generate(), as pieces
of text`), among its errors (`Raises: as generate()`), or as `the fields of DecodeConfig`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator

import tidaldecode
from api_surface import Call, public_classes
from judge import Nonsense
from tidaldecode import TidalError

_CALL = re.compile(r"\b(?:(\w+)\.)?(\w+)\(\)")  # `generate()`, `Decoder.generate()`
_CLASS = re.compile(r"\bas (\w+) does\b")
_FIELDS = re.compile(r"(?:the fields|those) of a? ?(\w+)")
_RAISES = re.compile(r"^Raises:.*(?:\n.+)*", re.MULTILINE)


def docstring(name: str) -> str:
    """The docstring of a name of the API, "Decoder" or "Decoder.generate"; "" if it has none."""
    owner, _, attribute = name.partition(".")
    value = {kind.__name__: kind for kind in public_classes()}.get(owner)
    value = getattr(tidaldecode, owner, None) if value is None else value
    return inspect.getdoc(getattr(value, attribute, None) if attribute else value) or ""


@functools.cache
def errors_of(name: str) -> frozenset[str]:
    """The names that the docstring of a call has for its errors, those it refers to included."""
    text = docstring(name)
    raises = "\n".join(_RAISES.findall(text))
    found = frozenset(re.findall(r"\b\w*(?:Error|Argument)\b", raises))
    return found.union(*map(errors_of, _referred(name, f"{_first_line(text)}\n{raises}")))


@functools.cache
def explains(name: str, parameter: str) -> bool:
    """Whether the docstring of a call says what a parameter is, or refers to one that does."""
    text = docstring(name)
    is_listed = re.search(rf"^ *(?:\w+, )*{parameter}(?:, \w+)*: ", text, re.MULTILINE)
    if is_listed or f"`{parameter}`" in _first_line(text):
        return True
    fields = [kind for kind in _FIELDS.findall(text) if docstring(kind)]
    return any(explains(each, parameter) for each in [*_referred(name, _first_line(text)), *fields])


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _referred(name: str, text: str) -> list[str]:
    """Names of the API that a part of the docstring of `name` refers to."""
    found = [kind for kind in _CLASS.findall(text) if docstring(kind)]
    for owner, attribute in _CALL.findall(text):
        places = (owner,) if owner else (name.partition(".")[0], "Decoder")
        found += [f"{p}.{attribute}" for p in places if docstring(f"{p}.{attribute}")][:1]
    return [each for each in found if each != name]


@contextlib.contextmanager
def check_documented(call: Call) -> Iterator[None]:
    """Fails for an error of the package that a call's docstring does not name.

    What is closed refuses everything, as close() says.
    """
    try:
        yield
    except TidalError as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        is_plain = not call.attribute.startswith("__") and "closed" not in str(error)
        if is_plain and not kinds & errors_of(call.name):
            what = f"{call.name} raised {type(error).__name__}, which its docstring does not name"
            raise Nonsense(f"{what}: {error}") from error
        raise
