"""The bodies of /v1/messages, in Anthropic's form, and the chats that they become."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tidaldecode.errors import show
from tidaldecode.server.bodies import PASSED_ON, AskingBody, Body, ChatBody, Int
from tidaldecode.server.errors import invalid, unsupported

# Blocks of earlier answers that the model does not see again, as with Anthropic's own models.
_UNSEEN_BLOCKS = ("thinking", "redacted_thinking")
_NO_TEXT = {"type": "text", "text": ""}
# A tool_choice in OpenAI's words.
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Turn(Body):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class Tool(Body):
    """A tool that the client runs."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None

    def as_function(self, index: int) -> dict[str, Any]:
        """The tool as a chat has it.

        Raises: ApiError for one that Anthropic's servers would run.
        """
        if self.type not in (None, "custom"):
            what = f"got a tool of type {show(self.type)}, expected tools that the client runs"
            raise unsupported(f"tools[{index}]", what)
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema or {}}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class ToolChoice(Body):
    """Whether tools are called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model is to think, as far as its chat template has a switch for it."""

    type: Literal["enabled", "disabled", "adaptive"]

    def variables(self, chat_template: str | None) -> dict[str, Any]:
        """What the template is told.

        Raises: ApiError for a model that cannot be told to think.
        """
        is_wanted = self.type == "enabled"
        if "enable_thinking" in (chat_template or ""):
            return {"enable_thinking": is_wanted}
        if is_wanted:
            raise unsupported("thinking", "this model's chat template has no switch for it")
        return {}


class OutputConfig(Body):
    """What the answer is to be."""

    format: dict[str, Any] | None = None


class CountBody(AskingBody):
    """POST /v1/messages/count_tokens: what is counted."""

    refused: ClassVar[dict[str, str]] = {
        "mcp_servers": "tools run at the client",
        "container": "this server keeps nothing between requests",
    }

    messages: Annotated[list[Turn], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat_fields(self, chat_template: str | None) -> dict[str, Any]:
        """Fields of a ChatBody with the same conversation, for a model with this template.

        Raises: ApiError for a block that a model of texts cannot be shown.
        """
        turns: list[dict[str, Any]] = []
        for index, turn in enumerate(self.messages):
            turns += _chat_turns(turn, f"messages[{index}].content")
        if self.system:
            turns.insert(0, {"role": "system", "content": _text_of(self.system, "system")})
        fields: dict[str, Any] = {"messages": turns}
        fields |= self.model_dump(include=PASSED_ON, exclude_none=True)
        fields |= self._tool_fields() | self._format_fields()
        if self.thinking is not None and self.thinking.type != "adaptive":
            variables = self.thinking.variables(chat_template)
            fields["chat_template_kwargs"] = variables | (self.chat_template_kwargs or {})
        if self.messages[-1].role == "assistant":  # the answer goes on with it
            if "tool_calls" in turns[-1]:
                where = f"messages[{len(self.messages) - 1}].content"
                raise invalid(where, "got calls of tools, expected their results behind them")
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        return fields

    def _tool_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.tools:
            fields["tools"] = [tool.as_function(index) for index, tool in enumerate(self.tools)]
        choice = self.tool_choice
        if choice is not None:
            named = {"type": "function", "function": {"name": choice.name}}
            fields["tool_choice"] = _CHOICES.get(choice.type, named)
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        return fields

    def _format_fields(self) -> dict[str, Any]:
        given = self.output_format or (self.output_config and self.output_config.format)
        if not given:
            return {}
        if given.get("type") != "json_schema":
            kind = show(given.get("type"))
            raise unsupported("output_config.format", f"got type {kind}, expected json_schema")
        schema = {"schema": given.get("schema")}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: Annotated[Int, Field(ge=1)]
    stop_sequences: list[str] | None = None

    def to_chat(self, chat_template: str | None) -> ChatBody:
        """The chat that it asks for of a model with this template.

        Raises: ApiError.
        """
        fields = self.chat_fields(chat_template) | {"max_tokens": self.max_tokens}
        if self.stop_sequences:
            fields["stop"] = self.stop_sequences
        return ChatBody.model_validate(fields)


def _text_of(content: str | list[dict[str, Any]], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, block in enumerate(content):
        kind, text = block.get("type"), block.get("text")
        if kind in _UNSEEN_BLOCKS:
            continue
        if kind != "text" or not isinstance(text, str):
            what = f"a block of type {show(kind)}" if kind != "text" else "a block without its text"
            raise unsupported(f"{where}[{index}]", f"got {what}, expected text blocks only")
        texts.append(text)
    return "".join(texts)


def _chat_turns(turn: Turn, where: str) -> list[dict[str, Any]]:
    """The messages of a chat that a message becomes: results of tools are messages there."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    turns: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    for index, block in enumerate(turn.content):
        place = f"{where}[{index}]"
        texts.append(_NO_TEXT)
        if block.get("type") == "tool_use":
            calls.append(_call_of(block, place))
        elif block.get("type") == "tool_result":
            turns.append(_result_of(block, place))
        else:
            texts[-1] = block
    text = _text_of(texts, where)
    if calls:
        turns.append({"role": turn.role, "content": text or None, "tool_calls": calls})
    elif text or not turns:
        turns.append({"role": turn.role, "content": text})
    return turns


def _call_of(block: dict[str, Any], where: str) -> dict[str, Any]:
    call_id, name, arguments = block.get("id"), block.get("name"), block.get("input")
    if not (isinstance(call_id, str) and isinstance(name, str) and isinstance(arguments, dict)):
        raise invalid(where, f"got {show(block)}, expected a tool_use with id, name and input")
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": call_id, "type": "function", "function": function}


def _result_of(block: dict[str, Any], where: str) -> dict[str, Any]:
    call_id, content = block.get("tool_use_id"), block.get("content")
    if not isinstance(call_id, str):
        raise invalid(where, f"got {show(block)}, expected a tool_result with its tool_use_id")
    if not isinstance(content, (str, list, type(None))):
        raise invalid(f"{where}.content", f"got {show(content)}, expected a text or text blocks")
    text = _text_of(content or "", f"{where}.content")
    return {"role": "tool", "tool_call_id": call_id, "content": text}
