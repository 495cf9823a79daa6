"""response_format and structured_outputs: the guide that an answer is to keep to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tidaldecode.errors import InvalidArgument, show
from tidaldecode.server.bodies import SamplingBody
from tidaldecode.server.errors import invalid
from tidaldecode.text.guide import Guide

RESPONSE_FORMATS = ("text", "json_object", "json_schema", "regex", "grammar")
_STRUCTURES = ("json", "json_object", "regex", "choice", "grammar")


def guide_of(body: SamplingBody) -> Guide | None:
    """The guide that a body asks for; None for free text.

    Raises: ApiError naming the field.
    """
    if body.response_format is not None and body.structured_outputs is not None:
        raise invalid("structured_outputs", "got it with response_format, expected one of the two")
    if body.response_format is not None:
        return _of_format(body.response_format)
    if body.structured_outputs is not None:
        return _of_structure(body.structured_outputs)
    return None


def _of_format(asked: Mapping[str, Any]) -> Guide | None:
    """From OpenAI's form, with regex and grammar beside its types."""
    where, kind = "response_format", asked.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        # llama.cpp's clients give a schema here.
        schema = asked.get("schema")
        return Guide.json_object() if schema is None else _schema(schema, f"{where}.schema")
    if kind == "json_schema":
        inner = asked.get("json_schema")
        if not isinstance(inner, Mapping):
            raise invalid(f"{where}.json_schema", f'got {show(inner)}, expected {{"schema": ...}}')
        schema = inner.get("schema")
        is_free = schema is None
        return Guide.json_object() if is_free else _schema(schema, f"{where}.json_schema.schema")
    if kind == "regex" or kind == "grammar":
        make = Guide.regex if kind == "regex" else Guide.grammar
        return _made(f"{where}.{kind}", lambda: make(_text(asked.get(kind), f"{where}.{kind}")))
    expected = ", ".join(repr(each) for each in RESPONSE_FORMATS)
    raise invalid(f"{where}.type", f"got {show(kind)}, expected one of {expected}")


def _of_structure(asked: Mapping[str, Any]) -> Guide:
    """From vLLM's form: one of several fields."""
    where = "structured_outputs"
    given = [name for name in _STRUCTURES if asked.get(name) is not None]
    if len(given) != 1:
        expected = ", ".join(_STRUCTURES)
        raise invalid(where, f"got {', '.join(given) or 'none'}, expected one of {expected}")
    name, value = given[0], asked[given[0]]
    where = f"{where}.{name}"
    if name == "json":
        return _schema(value, where)
    if name == "json_object":
        if value is not True:
            raise invalid(where, f"got {show(value)}, expected true")
        return Guide.json_object()
    if name == "choice":
        return _choice(value, where)
    make = Guide.regex if name == "regex" else Guide.grammar
    return _made(where, lambda: make(_text(value, where)))


def _schema(value: Any, where: str) -> Guide:
    return _made(where, lambda: Guide.json_schema(value))


def _choice(value: Any, where: str) -> Guide:
    is_list = isinstance(value, list) and bool(value)
    if not is_list or not all(isinstance(each, str) and each for each in value):
        raise invalid(where, f"got {show(value)}, expected a list of texts that are not empty")
    choices = " | ".join(json.dumps(each, ensure_ascii=False) for each in value)
    return _made(where, lambda: Guide.grammar(f"start: {choices}\n"))


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise invalid(where, f"got {show(value)}, expected a text that is not empty")
    return value


def _made(where: str, make: Callable[[], Guide]) -> Guide:
    """What is made, with errors that name the field."""
    try:
        return make()
    except InvalidArgument as error:
        raise invalid(where, str(error).rpartition("guide: ")[2]) from None
