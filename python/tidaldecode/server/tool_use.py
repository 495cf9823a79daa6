"""The tools of a chat: what its answer may call, must call, or has called before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidaldecode.errors import InvalidArgument, show
from tidaldecode.server.bodies import ChatBody
from tidaldecode.server.errors import invalid, unsupported
from tidaldecode.text.guide import Guide
from tidaldecode.text.tool_choice import chosen_tool, marker_ids, tool_guide, tool_names

if TYPE_CHECKING:
    from tidaldecode.server.settings import ServeConfig
    from tidaldecode.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """The tools that an answer may call."""

    tools: Sequence[Mapping[str, Any]]
    names: tuple[str, ...]
    tool_format: str
    choice: Any  # the tool_choice of a chat
    is_parallel: bool  # several calls may be made at once

    @property
    def must_call(self) -> bool:
        """Whether the answer is a call."""
        return bool(self.choice != "auto")

    def guide(self, tokenizer: Tokenizer) -> Guide | None:
        """What the answer keeps to, if it must be a call. May ask the tokenizer's process.

        Raises: ApiError for a tool whose parameters are no schema.
        """
        if not self.must_call:
            return None

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        markers = marker_ids(tokenizer.special_tokens, encode)
        try:
            return tool_guide(
                self.tool_format, self.tools, self.choice,
                parallel=self.is_parallel, markers=markers,
            )  # fmt: skip
        except InvalidArgument as error:
            raise _named(error) from None


def tool_use_of(body: ChatBody, tool_format: str | None, settings: ServeConfig) -> ToolUse | None:
    """The tools of a chat; None if its answer may call none.

    Args:
        body: the chat.
        tool_format: that the model writes calls in, if it does.
        settings: of the server.

    Raises: ApiError naming the field.
    """
    tools = body.tools or []
    if len(tools) > settings.max_tools:
        raise invalid("tools", f"got {len(tools)}, expected at most {settings.max_tools}")
    try:
        names = tool_names(tools)
        choice = chosen_tool(body.tool_choice, names)
    except InvalidArgument as error:
        raise _named(error) from None
    if choice == "none" or not tools:
        return None
    if tool_format is None:
        raise unsupported(
            "tools",
            "this model's chat template has no form of calls that the server reads; leave them "
            "out, or start the server with --tool-call-parser",
        )
    return ToolUse(
        tools=tools, names=tuple(names), tool_format=tool_format,
        choice="auto" if choice == "auto" else body.tool_choice,
        is_parallel=body.parallel_tool_calls is not False,
    )  # fmt: skip


def for_template(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates want it: the arguments of its calls as data, not as their text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_with_data(call) for call in calls]}


def _with_data(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if function is None or not isinstance(arguments, str):
        return call
    try:
        data = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": data}} if isinstance(data, dict) else call


def _named(error: InvalidArgument) -> Exception:
    """The error with the name of the field in front, which text/ puts there."""
    name, colon, rest = str(error).partition(": ")
    return invalid(name, rest) if colon else invalid("tools", show(str(error)))
