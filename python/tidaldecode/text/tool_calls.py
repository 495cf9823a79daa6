"""Calls of tools in what a model has written: found, and given out while they are being written.

call_syntax.py knows how each family writes them. A call's name is given out once, its arguments as
pieces of the very JSON text that the model writes; what is no call stays content, and so does what
begins as one and turns out to be none before its arguments begin.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from tidaldecode.errors import InvalidArgument, show
from tidaldecode.text.call_syntax import SYNTAXES, CallReader, Event
from tidaldecode.text.harmony import CHANNEL, HarmonyReader, writes_harmony

TOOL_FORMATS = (*SYNTAXES, "harmony")  # which harmony.py reads
# What other engines call the same.
_OTHER_NAMES = {
    "llama3_json": "llama3",
    "llama4_json": "llama3",
    "gpt_oss": "harmony",
    "openai": "harmony",
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3": "hermes",
}


_Call = TypeVar("_Call")


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A whole call."""

    name: str
    arguments: str  # the JSON text of an object


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """What is new of a call."""

    index: int  # of the call in the answer, from 0 on
    name: str | None = None  # with the first of a call only
    arguments: str = ""  # goes on from the one before


class InOrder(Generic[_Call]):
    """Content and calls in the order in which they were written."""

    parts: Sequence[str | _Call]

    @property
    def content(self) -> str:
        """All that is of no call."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> tuple[_Call, ...]:
        """All that is no content."""
        return tuple(part for part in self.parts if not isinstance(part, str))


@dataclass(frozen=True, kw_only=True)
class ToolPiece(InOrder[ToolCallDelta]):
    """What is new of an answer; of a call one part."""

    parts: tuple[str | ToolCallDelta, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ToolText(InOrder[ToolCall]):
    """A whole answer."""

    parts: tuple[str | ToolCall, ...] = ()


def check_tool_format(name: str) -> str:
    """The format of this name, or of another engine's name for it.

    Raises: InvalidArgument.
    """
    known = _OTHER_NAMES.get(name, name) if isinstance(name, str) else name
    if not isinstance(known, str) or known not in TOOL_FORMATS:
        expected = ", ".join(repr(one) for one in TOOL_FORMATS)
        raise InvalidArgument(f"tool format: got {show(name)}, expected one of {expected}")
    return known


def find_tool_format(chat_template: str | None, special_tokens: Collection[str]) -> str | None:
    """The format in which a model writes calls, by its folder; None if it is taught none we know.

    Args:
        chat_template: the template that a conversation with tools goes through.
        special_tokens: of the tokenizer, as they are written.
    """
    if chat_template is None:
        return None
    if writes_harmony(chat_template):
        return "harmony"
    if "[TOOL_CALLS]" in chat_template or "[TOOL_CALLS]" in special_tokens:
        return "mistral"
    if "<tool_call>" in chat_template:
        # Some families write tags inside of tags, and no JSON.
        return None if "<function=" in chat_template or "<arg_key>" in chat_template else "hermes"
    if "<|python_tag|>" in chat_template or "<|python_tag|>" in special_tokens:
        return "llama3"
    return "json" if "tools" in chat_template else None


def has_special_marker(tool_format: str, special_tokens: Collection[str]) -> bool:
    """Whether calls begin with a special token, which text must then show to be found in it."""
    known = check_tool_format(tool_format)
    return (CHANNEL if known == "harmony" else SYNTAXES[known].marker) in special_tokens


def new_call_id(tool_format: str) -> str:
    """A fresh id of a call; the templates of Mistral's models want nine letters and digits."""
    if check_tool_format(tool_format) != "mistral":
        return f"call_{secrets.token_hex(12)}"
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class ToolCallParser:
    """Takes an answer piece by piece; gives out content and calls as soon as they are certain.

    However the answer is cut into pieces, the same comes out. White space right before a call, and
    where there is nothing but calls around it, is nobody's and left out.
    """

    def __init__(self, tool_format: str, names: Iterable[str] | None = None) -> None:
        """Begins an answer.

        Args:
            tool_format: one of TOOL_FORMATS.
            names: of the tools; a call of any other is content. None: any name is a tool.
        """
        self._reader = _reader_of(tool_format, names)

    @property
    def num_calls(self) -> int:
        """Calls that have begun so far, of which the last may be unfinished."""
        return self._reader.num_calls

    def push(self, text: str) -> ToolPiece:
        """Adds text; returns what is certain now."""
        self._reader.push(text)
        return self._taken()

    def finish(self) -> ToolPiece:
        """Ends the answer; returns what was held back."""
        self._reader.finish()
        return self._taken()

    def _taken(self) -> ToolPiece:
        return piece_of(self._reader.take_events())


def piece_of(events: Iterable[Event]) -> ToolPiece:
    """What events say is new."""
    parts: list[str | ToolCallDelta] = []
    for event in events:
        last = parts[-1] if parts else None
        if event.kind in ("content", "reasoning"):
            parts.append(event.text)
        elif event.kind == "name":
            parts.append(ToolCallDelta(index=event.index, name=event.text))
        elif event.kind == "arguments" and isinstance(last, ToolCallDelta):
            parts[-1] = replace(last, arguments=last.arguments + event.text)
        elif event.kind == "arguments":
            parts.append(ToolCallDelta(index=event.index, arguments=event.text))
    return ToolPiece(parts=tuple(part for part in parts if part))


def parse_tool_calls(text: str, tool_format: str, names: Iterable[str] | None = None) -> ToolText:
    """The content and the calls of a whole answer.

    As ToolCallParser finds them, but for a call that breaks off within its arguments or behind
    them: here it is content as a whole.
    """
    reader = _reader_of(tool_format, names)
    reader.push(text)
    reader.finish()
    return text_of(reader.take_events())


def text_of(events: Iterable[Event]) -> ToolText:
    """A whole answer, by its events."""
    parts: list[str | ToolCall] = []
    for event in events:
        last = parts[-1] if parts else None
        if event.kind in ("content", "reasoning"):
            parts.append(event.text)
        elif event.kind == "name":
            parts.append(ToolCall(name=event.text, arguments=""))
        elif event.kind == "arguments":
            assert isinstance(last, ToolCall)  # nothing comes between
            parts[-1] = replace(last, arguments=last.arguments + event.text)
        else:
            parts[-1] = event.text
    return ToolText(parts=tuple(part for part in parts if part))


def _reader_of(tool_format: str, names: Iterable[str] | None) -> CallReader | HarmonyReader:
    known = check_tool_format(tool_format)
    tools = None if names is None else frozenset(names)
    return HarmonyReader(tools) if known == "harmony" else CallReader(SYNTAXES[known], tools)
