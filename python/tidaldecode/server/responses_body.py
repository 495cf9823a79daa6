"""The body of /v1/responses, OpenAI's newer form of a chat, and the chat that it becomes.

Nothing is kept between requests: what would need an earlier response is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tidaldecode.errors import show
from tidaldecode.server.bodies import PASSED_ON, AskingBody, Body, ChatBody, Int
from tidaldecode.server.errors import invalid, unsupported

_TEXT_PARTS = ("input_text", "output_text", "text")
_UNSEEN_ITEMS = ("reasoning",)  # of earlier answers
_KEEPS_NOTHING = "this server keeps nothing between requests"
_NO_LOGPROBS = "this route gives no log-probabilities; /v1/chat/completions does"


_PASSED_ON = {*PASSED_ON, "tool_choice", "parallel_tool_calls"}


class Reasoning(Body):
    """How much the model is to think, as far as its chat template can tell it."""

    effort: str | None = None


class TextOptions(Body):
    """How the text of an answer is to be."""

    format: dict[str, Any] | None = None


class ResponsesBody(AskingBody):
    """POST /v1/responses."""

    refused: ClassVar[dict[str, str]] = {
        "store": _KEEPS_NOTHING,
        "previous_response_id": _KEEPS_NOTHING,
        "conversation": _KEEPS_NOTHING,
        "background": _KEEPS_NOTHING,
        "prompt": _KEEPS_NOTHING,
        "include": _NO_LOGPROBS,
        "top_logprobs": _NO_LOGPROBS,
    }

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def to_chat(self) -> ChatBody:
        """The chat that it asks for.

        Raises: ApiError for what is not of text.
        """
        turns = _turns(self.input)
        if self.instructions:
            turns.insert(0, {"role": "system", "content": self.instructions})
        if not turns:
            raise invalid("input", "got no message, expected at least one")
        fields: dict[str, Any] = {"messages": turns, "max_tokens": self.max_output_tokens}
        fields |= self.model_dump(include=_PASSED_ON, exclude_none=True)
        if self.tools:
            fields["tools"] = [_function(tool, index) for index, tool in enumerate(self.tools)]
        if self.reasoning is not None and self.reasoning.effort is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = _format(self.text.format)
        return ChatBody.model_validate(fields)


def _turns(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of an input."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    turns: list[dict[str, Any]] = []
    for index, item in enumerate(given):
        where = f"input[{index}]"
        kind, role = item.get("type", "message"), item.get("role")
        if kind in _UNSEEN_ITEMS:
            continue
        if kind == "function_call":
            _add_call(turns, item, where)
            continue
        if kind == "function_call_output":
            turns.append(_result_of(item, where))
            continue
        if kind != "message":
            raise unsupported(
                where, f"got an item of type {show(kind)}, expected messages or calls"
            )
        if role not in ("user", "assistant", "system", "developer"):
            expected = "user, assistant, system or developer"
            raise invalid(f"{where}.role", f"got {show(role)}, expected {expected}")
        text = _text_of(item.get("content"), f"{where}.content")
        turns.append({"role": "system" if role == "developer" else role, "content": text})
    return turns


def _function(tool: dict[str, Any], index: int) -> dict[str, Any]:
    """A tool as a chat has it."""
    if tool.get("type") != "function":
        what = f"got a tool of type {show(tool.get('type'))}, expected functions only"
        raise unsupported(f"tools[{index}]", what)
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _format(asked: dict[str, Any]) -> dict[str, Any]:
    """A format as a chat has it: there a schema stands one level deeper."""
    if asked.get("type") != "json_schema":
        return asked
    return {"type": "json_schema", "json_schema": {"schema": asked.get("schema")}}


def _add_call(turns: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """Adds a call to the message that made it: calls in a row are of one."""
    names = ("call_id", "name", "arguments")
    call_id, name, arguments = (item.get(each) for each in names)
    if not all(isinstance(each, str) for each in (call_id, name, arguments)):
        raise invalid(where, f"got {show(item)}, expected a call with {', '.join(names)}")
    function = {"name": name, "arguments": arguments}
    call = {"id": call_id, "type": "function", "function": function}
    if turns and turns[-1]["role"] == "assistant":
        turns[-1].setdefault("tool_calls", []).append(call)
    else:
        turns.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _result_of(item: dict[str, Any], where: str) -> dict[str, Any]:
    call_id, output = item.get("call_id"), item.get("output")
    if not isinstance(call_id, str):
        raise invalid(where, f"got {show(item)}, expected an output with its call_id")
    text = _text_of(output, f"{where}.output")
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, f"got {show(content)}, expected a text or a list of parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            what = f"got {show(part)}, expected a part of type input_text or output_text"
            raise unsupported(f"{where}[{index}]", what)
        texts.append(text)
    return "".join(texts)
