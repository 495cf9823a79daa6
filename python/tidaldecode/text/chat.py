"""A conversation with its options, checked and made plain for a chat template.

What may be passed is what transformers' apply_chat_template takes. Everything a template sees is
plain JSON: it never meets an object of the caller's.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
from collections.abc import Mapping
from itertools import islice
from typing import Any, TypedDict

from tidaldecode.errors import InvalidArgument, show
from tidaldecode.text.tool_schema import function_schema

_EXPECTED = 'a list of {"role": "user", "content": "..."}'
# Fields that can stand for a content that is null.
_CONTENT_STANDS_IN = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
)
# What a template sees is flat: messages, parts, calls, schemas.
_MAX_DEPTH = 100


class ChatOptions(TypedDict, total=False):
    """The options of a chat besides its messages; any other name is a variable of the template."""

    tools: list[Any] | None  # functions with type hints and docstring, or JSON schemas
    documents: list[dict[str, Any]] | None  # {"title": ..., "text": ...} each
    chat_template: str | None  # a template, or the name of one of the folder's; None: its default
    add_generation_prompt: bool | None  # begin the answer; None: unless a message is continued
    continue_final_message: bool | str  # go on with the last message (or that field of it)


class Chat:
    """What a chat template is to render."""

    def __init__(self, messages: Any, options: Mapping[str, Any]) -> None:
        """Checks one conversation or several.

        Args:
            messages: messages, or a list of conversations.
            options: ChatOptions and variables of the template.

        Raises: InvalidArgument naming what is wrong.
        """
        left = dict(options)
        conversations, self.is_batch = _read_conversations(messages)
        self.template = _check("chat_template", left.pop("chat_template", None), str, None)
        continued = _check(
            "continue_final_message", left.pop("continue_final_message", False), bool, str
        )
        prompted = _check(
            "add_generation_prompt", left.pop("add_generation_prompt", None), bool, None
        )
        if prompted and continued:
            raise InvalidArgument(
                "add_generation_prompt: got True with continue_final_message, expected one of the "
                "two: a message is continued or the next one begun"
            )
        self.arguments: dict[str, Any] = {
            "conversations": conversations,
            "template": self.template,
            "tools": _read_tools(left.pop("tools", None)),
            "documents": _read_documents(left.pop("documents", None)),
            "add_generation_prompt": not continued if prompted is None else prompted,
            "continue_final_message": continued,
        }
        self.arguments["variables"] = {k: plain_data(v, k) for k, v in left.items()}


def plain_data(value: Any, where: str) -> Any:
    """A value as strings, numbers, lists and dicts.

    Dataclasses, enums, numpy's scalars and arrays and pydantic's models are taken apart.

    Raises: InvalidArgument for anything else, or for what is nested without end.
    """
    return _plain(value, where, 0)


def _plain(value: Any, where: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise InvalidArgument(f"{where}: is nested too deep, expected at most {_MAX_DEPTH} levels")
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_text(str.__str__(value), where)
    if isinstance(value, int):
        if value.bit_length() > 4096:
            raise InvalidArgument(f"{where}: got {show(value)}, expected one of at most 4096")
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        # Some have no end, whatever their length says.
        entries = islice(value.items(), len(value))
        return {_key(k, where): _plain(v, where, depth + 1) for k, v in entries}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name), where, depth + 1) for name in names}
    for method in ("model_dump", "tolist"):
        if not isinstance(value, type) and callable(getattr(value, method, None)):
            return _plain(getattr(value, method)(), where, depth + 1)
    raise InvalidArgument(
        f"{where}: got a {type(value).__name__}, expected text, numbers, lists and dicts"
    )


def _key(key: Any, where: str) -> str:
    if isinstance(key, enum.Enum):
        key = key.value
    if isinstance(key, str):
        return check_text(str.__str__(key), where)
    if isinstance(key, (int, float)) and not (isinstance(key, float) and math.isnan(key)):
        return str(key)
    raise InvalidArgument(f"{where}: got the key {show(key)}, expected a string")


def check_text(text: Any, where: str = "prompt") -> str:
    """`text`, if it is one.

    Raises: InvalidArgument for another type or for what is not valid Unicode.
    """
    if not isinstance(text, str):
        raise InvalidArgument(f"{where}: got {show(text)}, expected a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as cause:
        raise InvalidArgument(
            f"{where}: got the lone surrogate {show(text[cause.start])} at {cause.start}, "
            "expected text that can be written as UTF-8"
        ) from None
    return text


def _check(name: str, value: Any, kind: type, other: type | None) -> Any:
    """`value` if it is of the kind, or of the other one (None: may be None)."""
    if isinstance(value, kind) or (other is not None and isinstance(value, other)):
        return check_text(value, name) if isinstance(value, str) else value
    if value is None and other is None:
        return value
    words = {bool: "True or False", str: "a string"}
    more = f" or {words[other]}" if other is not None else ""
    raise InvalidArgument(f"{name}: got {show(value)}, expected {words[kind]}{more}")


def _read_conversations(messages: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """Returns: plain conversations, and whether there was a list of them."""
    messages = _unwrapped(messages)
    if not isinstance(messages, (list, tuple)):
        raise InvalidArgument(f"messages: got {show(messages)}, expected {_EXPECTED}")
    if not messages:
        raise InvalidArgument(f"messages: got an empty list, expected {_EXPECTED}")
    if not isinstance(_unwrapped(messages[0]), (list, tuple)):
        return [_read_conversation(messages, "messages")], False
    conversations = [_unwrapped(conversation) for conversation in messages]
    return [
        _read_conversation(conversation, f"messages[{index}]")
        for index, conversation in enumerate(conversations)
    ], True


def _unwrapped(value: Any) -> Any:
    """The messages of an object that holds a conversation."""
    return value if isinstance(value, Mapping) else getattr(value, "messages", value)


def _read_conversation(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidArgument(f"{where}: got {show(messages)}, expected {_EXPECTED}")
    return [_read_message(value, f"{where}[{i}]") for i, value in enumerate(messages)]


def _read_message(value: Any, where: str) -> dict[str, Any]:
    is_object = dataclasses.is_dataclass(value) or callable(getattr(value, "model_dump", None))
    message = plain_data(value, where) if isinstance(value, Mapping) or is_object else None
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InvalidArgument(f"{where}: got {show(value)}, expected {_EXPECTED}")
    content = message.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(part, f"{where}.content[{index}]")
    elif content is None:
        if not any(message.get(name) for name in _CONTENT_STANDS_IN):
            raise InvalidArgument(
                f"{where}: got no content, expected {_EXPECTED}; it may be null beside tool_calls"
            )
    elif not isinstance(content, (str, dict)):
        raise InvalidArgument(f"{where}: content: got {show(content)}, expected {_EXPECTED}")
    # As in transformers: templates handle a missing field, and many do not handle a null one.
    return {name: field for name, field in message.items() if field is not None}


def _check_part(part: Any, where: str) -> None:
    if isinstance(part, str):
        return
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise InvalidArgument(f"{where}: got a part of type {show(kind)}, expected text parts only")
    raise InvalidArgument(f'{where}: got {show(part)}, expected {{"type": "text", "text": "..."}}')


def _read_tools(tools: Any) -> list[Any] | None:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise InvalidArgument(f"tools: got {show(tools)}, expected a list of functions or schemas")
    schemas = []
    for index, tool in enumerate(tools):
        if inspect.isfunction(tool) or inspect.ismethod(tool):
            schemas.append(plain_data(function_schema(tool), f"tools[{index}]"))
        elif isinstance(tool, Mapping) or callable(getattr(tool, "model_dump", None)):
            schemas.append(plain_data(tool, f"tools[{index}]"))
        else:
            raise InvalidArgument(
                f"tools[{index}]: got {show(tool)}, expected a function or a JSON schema"
            )
    return schemas


def _read_documents(documents: Any) -> list[Any] | None:
    if documents is None:
        return None
    expected = 'a list of {"title": "...", "text": "..."}'
    if not isinstance(documents, (list, tuple)):
        raise InvalidArgument(f"documents: got {show(documents)}, expected {expected}")
    for index, document in enumerate(documents):
        if not isinstance(document, Mapping):
            raise InvalidArgument(f"documents[{index}]: got {show(document)}, expected {expected}")
    read: list[Any] = plain_data(documents, "documents")
    return read
