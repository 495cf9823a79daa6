"""Tools that a model must call: the guide that makes it write a call, in its own format.

The arguments keep to the tool's JSON schema. What is written so, tool_calls.py reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tidaldecode.errors import InvalidArgument, show
from tidaldecode.text.chat import plain_data
from tidaldecode.text.guide import JSON_OPTIONS, Guide
from tidaldecode.text.harmony import CHANNEL, CONSTRAIN, FUNCTIONS, MESSAGE
from tidaldecode.text.tool_calls import check_tool_format

_MAX_TOOLS = 128
_WORDS = ("none", "auto", "required")
# What stands before, between and behind calls.
_AROUND = {
    "hermes": ("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
    "llama3": ("", "; ", ""),
    "mistral": ("[", ", ", "]"),
    "json": ("", "\n", ""),
    "harmony": ("", "", ""),  # a call ends the answer
}
_MARKERS = ("[TOOL_CALLS]", "[ARGS]", CHANNEL, CONSTRAIN, MESSAGE)


def tool_names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of tools, in the form of OpenAI's chats or of its responses.

    Raises: InvalidArgument naming the tool that is none.
    """
    return [name for name, _ in _read_tools(tools)]


def chosen_tool(tool_choice: Any, names: Collection[str]) -> str | None:
    """What a tool_choice says: "none", "auto", "required", or "=" and the name of a tool.

    Raises: InvalidArgument for anything else, or for a tool that is not there.
    """
    if tool_choice is None:
        return "auto" if names else "none"
    if isinstance(tool_choice, str) and tool_choice in _WORDS:
        if tool_choice == "required" and not names:
            raise InvalidArgument("tool_choice: got 'required' without tools, expected some")
        return tool_choice
    if isinstance(tool_choice, Mapping):
        function = tool_choice.get("function", tool_choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name in names:
            return f"={name}"
        if isinstance(name, str):
            known = ", ".join(sorted(names)) or "none"
            raise InvalidArgument(f"tool_choice: got {show(name)}, expected one of tools: {known}")
    raise InvalidArgument(
        f"tool_choice: got {show(tool_choice)}, expected 'none', 'auto', 'required' or "
        '{"type": "function", "function": {"name": "..."}}'
    )


def marker_ids(
    special_tokens: Collection[str], encode: Callable[[str], list[int]]
) -> dict[str, int]:
    """The ids of markers that are special tokens.

    Args:
        special_tokens: Tokenizer.special_tokens.
        encode: gives the ids of a text, without any around it.
    """
    return {marker: encode(marker)[0] for marker in _MARKERS if marker in special_tokens}


def tool_guide(
    tool_format: str,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: Any,
    *,
    parallel: bool = True,
    markers: Mapping[str, int] | None = None,
) -> Guide | None:
    """The guide of a choice that demands a call; None if the model may write what it likes.

    Args:
        tool_format: one of TOOL_FORMATS.
        tools: in the form of OpenAI's chats or of its responses.
        tool_choice: as there.
        parallel: "required" allows several calls.
        markers: of marker_ids(), for a model that has special tokens for them.

    Raises: InvalidArgument naming what is wrong.
    """
    tool_format = check_tool_format(tool_format)
    known = _read_tools(tools)
    choice = chosen_tool(tool_choice, [name for name, _ in known])
    if choice in ("none", "auto"):
        return None
    if choice != "required":
        known = [(name, schema) for name, schema in known if f"={name}" == choice]
    is_single = choice != "required" or not parallel or tool_format == "harmony"
    return Guide.grammar(_Writer(tool_format, markers or {}).grammar(known, is_single))


class _Writer:
    """Writes the Lark grammar of calls in a format."""

    def __init__(self, tool_format: str, markers: Mapping[str, int]) -> None:
        self._format = tool_format
        self._markers = markers
        # Newer models of Mistral write name[ARGS]{...}.
        self._is_split = tool_format == "mistral" and "[ARGS]" in markers

    def grammar(self, tools: Sequence[tuple[str, dict[str, Any]]], is_single: bool) -> str:
        """The grammar of one call of these tools, or of one at least."""
        begin, between, end = (_text(part) for part in _AROUND[self._format])
        marker = self._marker("[TOOL_CALLS]") if self._format == "mistral" else ""
        if self._is_split:
            start = f"{marker} call" if is_single else f"({marker} call)+"
        else:
            more = "" if is_single else f"({between} call)*"
            start = f"{marker} {begin} call {more} {end}"
        choices = " | ".join(f"call_{index}" for index in range(len(tools)))
        rules = [f"start: {start}", f"call: {choices}"]
        for index, (name, schema) in enumerate(tools):
            rules.append(f"call_{index}: {self._call(name, index)}")
            rules.append(f"arguments_{index}: %json {json.dumps(schema)}")
        return "\n".join(rules) + "\n"

    def _call(self, name: str, index: int) -> str:
        if self._is_split:
            return f"{_text(name)} {self._marker('[ARGS]')} arguments_{index}"
        if self._format == "harmony":
            said_to = _text(f"commentary to={FUNCTIONS}{name} ")
            return (
                f"{self._marker(CHANNEL)} {said_to} {self._marker(CONSTRAIN)} {_text('json')} "
                f"{self._marker(MESSAGE)} arguments_{index}"
            )
        key = "parameters" if self._format == "llama3" else "arguments"
        quoted = json.dumps(name, ensure_ascii=False)
        head = _text(f'{{"name": {quoted}, "{key}": ')
        return f"{head} arguments_{index} {_text('}')}"

    def _marker(self, marker: str) -> str:
        token_id = self._markers.get(marker)
        return _text(marker) if token_id is None else f"<[{token_id}]>"


def _text(text: str) -> str:
    """A text as Lark writes it; nothing for an empty one."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def _read_tools(tools: Any) -> list[tuple[str, dict[str, Any]]]:
    """The name and the arguments' schema of each tool."""
    if not isinstance(tools, (list, tuple)) or len(tools) > _MAX_TOOLS:
        raise InvalidArgument(f"tools: got {show(tools)}, expected a list of at most {_MAX_TOOLS}")
    read: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            function = {}
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise InvalidArgument(
                f'{where}: got {show(tool)}, expected {{"type": "function", "function": '
                '{"name": "...", "parameters": {...}}}'
            )
        if name in read:
            raise InvalidArgument(f"{where}: got the name {show(name)} twice, expected it once")
        schema = plain_data(function.get("parameters") or {}, f"{where}.parameters")
        if not isinstance(schema, dict):
            raise InvalidArgument(
                f"{where}.parameters: got {show(schema)}, expected a JSON schema of an object"
            )
        fixed = {"type": "object", "x-guidance": JSON_OPTIONS}
        read[name] = schema | fixed
    return list(read.items())
