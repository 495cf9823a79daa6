"""POST /v1/messages: Anthropic's form of a chat.

A body becomes a ChatBody, is answered as any chat, and the answer is written in the other form.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tidaldecode.errors import show
from tidaldecode.results import GenerationResult
from tidaldecode.server.answering import Caller
from tidaldecode.server.bodies import PASSED_ON, AskingBody, Body, ChatBody, Int
from tidaldecode.server.chat import ChatCompletion
from tidaldecode.server.error_forms import MESSAGES_FORM
from tidaldecode.server.errors import ApiError, unsupported
from tidaldecode.server.event_stream import EventWriter
from tidaldecode.server.service import Service
from tidaldecode.server.typed_events import TypedEvents, named_event

# Blocks of earlier answers that the model does not see again, as with Anthropic's own models.
_UNSEEN_BLOCKS = ("thinking", "redacted_thinking")
_NO_TOOLS = "this route has no tools yet"


class Turn(Body):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class CountBody(AskingBody):
    """POST /v1/messages/count_tokens: what is counted."""

    refused: ClassVar[dict[str, str]] = {
        "tools": _NO_TOOLS,
        "tool_choice": _NO_TOOLS,
        "mcp_servers": _NO_TOOLS,
        "thinking": "the model's thinking cannot be asked for",
        "output_config": "this route gives plain texts only",
        "output_format": "this route gives plain texts only",
        "container": "this server keeps nothing between requests",
    }

    messages: Annotated[list[Turn], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat_fields(self) -> dict[str, Any]:
        """Fields of a ChatBody with the same conversation.

        Raises: ApiError for a block that is not of text.
        """
        turns = [
            {"role": turn.role, "content": _text_of(turn.content, f"messages[{index}].content")}
            for index, turn in enumerate(self.messages)
        ]
        if self.system:
            turns.insert(0, {"role": "system", "content": _text_of(self.system, "system")})
        fields: dict[str, Any] = {"messages": turns}
        fields |= self.model_dump(include=PASSED_ON, exclude_none=True)
        if self.messages[-1].role == "assistant":  # the answer goes on with it
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        return fields


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: Annotated[Int, Field(ge=1)]
    stop_sequences: list[str] | None = None

    def to_chat(self) -> ChatBody:
        """The chat that it asks for.

        Raises: ApiError.
        """
        fields = self.chat_fields() | {"max_tokens": self.max_tokens}
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


class MessageAnswer(ChatCompletion):
    """One request of the route."""

    def __init__(self, service: Service, body: MessagesBody, caller: Caller) -> None:
        """Checks it.

        Raises: ApiError.
        """
        super().__init__(service, body.to_chat(), caller)
        self.id = f"msg_{body.request_id or caller.number}"

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.name}

    def whole(self, results: list[GenerationResult]) -> dict[str, Any]:
        text = results[0].text or ""
        content = [{"type": "text", "text": text}] if text else []
        return {"content": content} | stop_fields(results[0])

    def account(self, results: list[GenerationResult]) -> dict[str, Any]:
        usage = super().account(results)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
            "tidaldecode": usage["tidaldecode"],
        }

    def events(self) -> EventWriter:
        return _Events(self)


def stop_fields(result: GenerationResult) -> dict[str, Any]:
    """Why the answer has ended."""
    sequence = result.stop_reason if isinstance(result.stop_reason, str) else None
    reason = "end_turn" if result.finish_reason == "stop" else "max_tokens"
    return {"stop_reason": "stop_sequence" if sequence else reason, "stop_sequence": sequence}


class _Events(TypedEvents):
    def opening(self) -> bytes:
        usage = {"input_tokens": len(self.of.prompt_of(0)), "output_tokens": 0}
        message = self.of.head("") | {"content": [], "stop_reason": None, "stop_sequence": None}
        block = {"type": "text", "text": ""}
        start = {"type": "content_block_start", "index": 0, "content_block": block}
        return (
            named_event({"type": "message_start", "message": message | {"usage": usage}})
            + named_event(start)
            + named_event({"type": "ping"})
        )

    def piece(self, text: str) -> bytes:
        delta = {"type": "text_delta", "text": text}
        return named_event({"type": "content_block_delta", "index": 0, "delta": delta})

    def closing(self, result: GenerationResult, usage: dict[str, Any]) -> bytes:
        return (
            named_event({"type": "content_block_stop", "index": 0})
            + named_event({"type": "message_delta", "delta": stop_fields(result), "usage": usage})
            + named_event({"type": "message_stop"})
        )

    def fail(self, error: ApiError) -> bytes:
        return named_event(MESSAGES_FORM.fields(error))
