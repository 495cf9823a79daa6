"""Tools for a chat template: JSON schemas as they are, functions as transformers describes them.

A function needs type hints and a docstring of Google's form with an Args section; what comes out is
what transformers.utils.get_json_schema makes of it.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union

from tidaldecode.errors import InvalidArgument, show

_BASIC = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_SCALARS = (int, float, str, bool, type(None))
_DESCRIPTION = re.compile(r"^(.*?)[\n\s]*(Args:|Returns:|Raises:|\Z)", re.DOTALL)
_ARGS = re.compile(r"\n\s*Args:\n(.*?)[\n\s]*(Returns:|Raises:|\Z)", re.DOTALL)
_RETURNS = re.compile(r"\n\s*Returns:\n\s*(.*?)[\n\s]*(Raises:|\Z)", re.DOTALL)
_ONE_ARG = re.compile(
    r"(?:^|\n)([ \t]*)(\w+)(?:[ \t]*\([^()\n]*\))?:\s*(.*?)\s*"
    r"(?=\n(?!\1[ \t])[ \t]*\w+(?:[ \t]*\([^()\n]*\))?:|\Z)",
    re.DOTALL,
)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function, as chat templates expect tools.

    Raises: InvalidArgument for a function without docstring, descriptions or type hints.
    """
    where = f"tools: {getattr(function, '__name__', 'operation')}()"
    docstring = inspect.getdoc(function)
    if not docstring:
        raise InvalidArgument(f"{where}: has no docstring, expected one with an Args section")
    description, texts, returned = _read_docstring(docstring)
    schema = _parameters(function, where)
    result = schema["properties"].pop("return", None)
    for name, entry in schema["properties"].items():
        if name not in texts:
            raise InvalidArgument(f"{where}: its docstring does not describe {name!r}")
        text = texts[name]
        if match := _CHOICES.search(text):
            entry["enum"] = _read_choices(match, where)
            text = text[: match.start()].strip()
        entry["description"] = text
    output = {
        "name": getattr(function, "__name__", "operation"),
        "description": description,
        "parameters": schema,
    }
    if result is not None:
        if returned is not None:
            result["description"] = returned
        output["return"] = result
    return {"type": "function", "function": output}


def _read_docstring(docstring: str) -> tuple[str | None, dict[str, str], str | None]:
    """Returns: the description, the arguments' descriptions, what it returns."""
    described = _DESCRIPTION.search(docstring)
    arguments = _ARGS.search(docstring)
    returned = _RETURNS.search(docstring)
    texts: dict[str, str] = {}
    if arguments is not None:
        block = "\n".join(line for line in arguments.group(1).split("\n") if line.strip())
        for _, name, text in _ONE_ARG.findall(block):
            texts[name] = re.sub(r"\s*\n+\s*", " ", text.strip())
    return (
        described.group(1).strip() if described else None,
        texts,
        returned.group(1).strip() if returned else None,
    )


def _read_choices(match: re.Match[str], where: str) -> list[Any]:
    try:
        return [c.strip() if isinstance(c, str) else c for c in json.loads(match.group(1))]
    except (ValueError, TypeError):
        raise InvalidArgument(
            f"{where}: got {show(match.group(0))}, expected (choices: a JSON list)"
        ) from None


def _parameters(function: Callable[..., Any], where: str) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
    except Exception as cause:  # a hint that is a string is evaluated
        raise InvalidArgument(f"{where}: its type hints cannot be read: {cause}") from cause
    empty = inspect.Parameter.empty
    first = next(iter(parameters), None)
    own = first if first in ("self", "cls") and parameters[first].annotation is empty else None
    required = []
    for name, parameter in parameters.items():
        if name == own:
            continue
        if parameter.annotation is empty:
            raise InvalidArgument(f"{where}: argument {name!r} has no type hint")
        if parameter.default is empty:
            required.append(name)
    properties = {}
    for name, hint in hints.items():
        if name == own:
            continue
        try:
            properties[name] = _hint_schema(hint)
        except TypeError:
            if name != "return":  # the model never writes it
                raise InvalidArgument(
                    f"{where}: {name}: got the type {show(hint)}, expected int, float, str, bool, "
                    "an Enum, Literal, or list, tuple, dict or unions of those"
                ) from None
    schema = {"type": "object", "properties": properties}
    return schema | {"required": required} if required else schema


def _hint_schema(hint: Any) -> dict[str, Any]:
    """Raises: TypeError for a type that JSON has nothing for."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is None and isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum_schema([member.value for member in hint])
    if origin is None:
        return dict(_BASIC[hint]) if hint in _BASIC else _refuse(hint)
    if origin in (Union, types.UnionType):
        return _union_schema(args)
    if origin is Literal:
        return _enum_schema(list(args))
    if origin is list:
        return {"type": "array", "items": _hint_schema(args[0])}
    if origin is tuple:
        if len(args) < 2 or ... in args:
            _refuse(hint)
        return {"type": "array", "prefixItems": [_hint_schema(part) for part in args]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _hint_schema(args[1])}
    return _refuse(hint)


def _refuse(hint: Any) -> dict[str, Any]:
    raise TypeError(hint)


def _enum_schema(values: list[Any]) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise TypeError(values)
    kinds = list(dict.fromkeys(_BASIC[type(value)]["type"] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union_schema(args: tuple[Any, ...]) -> dict[str, Any]:
    parts = [_hint_schema(part) for part in args if part is not type(None)]
    if len(parts) == 1:
        schema = parts[0]
    elif all(part.keys() == {"type"} and isinstance(part["type"], str) for part in parts):
        kinds = sorted({part["type"] for part in parts})
        schema = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        schema = {"anyOf": parts}
    return schema | {"nullable": True} if type(None) in args else schema
