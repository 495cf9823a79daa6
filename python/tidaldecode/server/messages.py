"""POST /v1/messages: Anthropic's form of a chat.

A body becomes a ChatBody (messages_body.py), is answered as any chat, and the answer is written in
the other form.
"""

from __future__ import annotations

from typing import Any

import orjson

from tidaldecode.results import GenerationResult
from tidaldecode.server.answering import Caller
from tidaldecode.server.chat import ChatCompletion
from tidaldecode.server.error_forms import MESSAGES_FORM
from tidaldecode.server.errors import ApiError
from tidaldecode.server.event_stream import EventWriter
from tidaldecode.server.messages_body import MessagesBody
from tidaldecode.server.service import Service
from tidaldecode.server.typed_events import (
    CALL,
    REASONING,
    TEXT,
    Block,
    TypedEvents,
    blocks_of,
    named_event,
)


class MessageAnswer(ChatCompletion):
    """One request of the route."""

    def __init__(self, service: Service, body: MessagesBody, caller: Caller) -> None:
        """Checks it.

        Raises: ApiError.
        """
        super().__init__(service, body.to_chat(service.model.texts.chat_template), caller)
        self.id = f"msg_{body.request_id or caller.number}"

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.name}

    def whole(self, results: list[GenerationResult]) -> dict[str, Any]:
        parts = self.form.read(results[0].text or "")
        content = [_content(block) for block in blocks_of(parts)]
        return {"content": content} | stop_fields(results[0], bool(parts.calls))

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


def stop_fields(result: GenerationResult, has_calls: bool) -> dict[str, Any]:
    """Why the answer has ended."""
    sequence = result.stop_reason if isinstance(result.stop_reason, str) else None
    reason = "max_tokens"
    if result.finish_reason == "stop":
        reason = "tool_use" if has_calls else "end_turn"
    return {"stop_reason": "stop_sequence" if sequence else reason, "stop_sequence": sequence}


def _content(block: Block) -> dict[str, Any]:
    """A block as messages have it."""
    if block.kind == REASONING:
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if block.kind == TEXT:
        return {"type": "text", "text": block.text}
    # As the model has written it, which orjson need not be able to read: 1e999, "\\ud800".
    data = orjson.Fragment(block.text or "{}")
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": data}


# The type of a block's delta, and what it calls its text.
_DELTAS = {
    REASONING: ("thinking_delta", "thinking"),
    TEXT: ("text_delta", "text"),
    CALL: ("input_json_delta", "partial_json"),
}


class _Events(TypedEvents):
    def opening(self) -> bytes:
        usage = {"input_tokens": len(self.of.prompt_of(0)), "output_tokens": 0}
        message = self.of.head("") | {"content": [], "stop_reason": None, "stop_sequence": None}
        return named_event(
            {"type": "message_start", "message": message | {"usage": usage}}
        ) + named_event({"type": "ping"})

    def begin(self, block: Block) -> bytes:
        fields = {"index": block.index, "content_block": _content(block)}
        return named_event({"type": "content_block_start"} | fields)

    def piece(self, block: Block, text: str) -> bytes:
        kind, name = _DELTAS[block.kind]
        return self._delta(block, {"type": kind, name: text})

    def finish(self, block: Block) -> bytes:
        events = b""
        if block.kind == REASONING:  # which nobody has signed
            events = self._delta(block, {"type": "signature_delta", "signature": ""})
        return events + named_event({"type": "content_block_stop", "index": block.index})

    def _delta(self, block: Block, delta: dict[str, Any]) -> bytes:
        return named_event({"type": "content_block_delta", "index": block.index, "delta": delta})

    def closing(self, result: GenerationResult, usage: dict[str, Any]) -> bytes:
        delta = stop_fields(result, self.has_calls)
        return named_event({"type": "message_delta", "delta": delta, "usage": usage}) + named_event(
            {"type": "message_stop"}
        )

    def fail(self, error: ApiError) -> bytes:
        return named_event(MESSAGES_FORM.fields(error))
