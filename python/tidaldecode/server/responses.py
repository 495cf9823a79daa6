"""POST /v1/responses: OpenAI's newer form of a chat, as far as it goes without a memory.

A body becomes a ChatBody (responses_body.py), is answered as any chat, and the answer is written in
the other form.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import orjson
from pydantic_core import to_json

from tidaldecode.results import GenerationResult
from tidaldecode.server.answering import Caller
from tidaldecode.server.chat import ChatCompletion
from tidaldecode.server.errors import ApiError
from tidaldecode.server.event_stream import EventWriter
from tidaldecode.server.responses_body import ResponsesBody
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


class ResponseAnswer(ChatCompletion):
    """One request of the route."""

    kind = "response"

    def __init__(self, service: Service, body: ResponsesBody, caller: Caller) -> None:
        """Checks it.

        Raises: ApiError.
        """
        super().__init__(service, body.to_chat(), caller)
        number = body.request_id or caller.number
        self.id = f"resp_{number}"
        self.number = number
        self._asked_for = body

    def head(self, kind: str) -> dict[str, Any]:
        body = self._asked_for
        return {
            "id": self.id,
            "object": kind,
            "created_at": self.created,
            "model": self.name,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "temperature": body.temperature,
            "top_p": body.top_p,
            "text": {"format": _echoed((body.text and body.text.format) or {"type": "text"})},
            "tools": _echoed(body.tools or []),
            "tool_choice": _echoed(body.tool_choice or "auto"),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
        }

    def whole(self, results: list[GenerationResult]) -> dict[str, Any]:
        blocks = blocks_of(self.form.read(results[0].text or ""))
        return self.ended(results[0], blocks or [Block(TEXT, 0)])

    def ended(self, result: GenerationResult, blocks: Sequence[Block]) -> dict[str, Any]:
        """What a response says once it has ended, but for its usage."""
        is_cut = result.finish_reason != "stop"
        status = "incomplete" if is_cut else "completed"
        return {
            "status": status,
            "completed_at": None if is_cut else int(time.time()),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [
                # Only the last of them can have been cut.
                self.item(block, status if block is blocks[-1] else "completed")
                for block in blocks
            ],
        }

    def begun(self) -> dict[str, Any]:
        """The response before there is anything of it."""
        fields = {"status": "in_progress", "error": None, "incomplete_details": None}
        return self.head(self.kind) | fields | {"output": [], "usage": None}

    def item_id(self, block: Block) -> str:
        """The id of a block among the output."""
        suffix = f"_{block.index}" if block.index else ""
        return f"{_PREFIXES[block.kind]}_{self.number}{suffix}"

    def item(self, block: Block, status: str) -> dict[str, Any]:
        """A block as an item of the output; one in progress has no content yet."""
        fields: dict[str, Any] = {"id": self.item_id(block), "status": status}
        has_begun = status != "in_progress"
        if block.kind == CALL:
            fields |= {"type": "function_call", "call_id": block.call_id, "name": block.name}
            return fields | {"arguments": block.text}
        if block.kind == REASONING:
            fields |= {"type": "reasoning", "summary": []}
            return fields | {"content": [_part(block, block.text)] if has_begun else []}
        fields |= {"type": "message", "role": "assistant"}
        return fields | {"content": [_part(block, block.text)] if has_begun else []}

    def account(self, results: list[GenerationResult]) -> dict[str, Any]:
        usage = super().account(results)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
            "tidaldecode": usage["tidaldecode"],
        }

    def events(self) -> EventWriter:
        return _Events(self)


def _echoed(value: Any) -> orjson.Fragment:
    """What the client has sent: its integers may be larger than orjson writes."""
    return orjson.Fragment(to_json(value, inf_nan_mode="null"))


_PREFIXES = {REASONING: "rs", TEXT: "msg", CALL: "fc"}
# What the events of a block's text are called.
_TEXT_EVENTS = {
    REASONING: "reasoning_text",
    TEXT: "output_text",
    CALL: "function_call_arguments",
}


def _part(block: Block, text: str) -> dict[str, Any]:
    """The one part of a message or of reasoning."""
    if block.kind == REASONING:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class _Events(TypedEvents):
    def __init__(self, answer: ResponseAnswer) -> None:
        super().__init__(answer)
        self._answer = answer
        self._number = 0  # of the next event

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return named_event({"type": f"response.{kind}", "sequence_number": number} | fields)

    def _place(self, block: Block) -> dict[str, Any]:
        """Where the text of a block stands."""
        place = {"item_id": self._answer.item_id(block), "output_index": block.index}
        return place if block.kind == CALL else place | {"content_index": 0}

    def opening(self) -> bytes:
        response = self._answer.begun()
        return self._event("created", response=response) + self._event(
            "in_progress", response=response
        )

    def begin(self, block: Block) -> bytes:
        item = self._answer.item(block, "in_progress")
        events = self._event("output_item.added", output_index=block.index, item=item)
        if block.kind != CALL:
            place = self._place(block)
            events += self._event("content_part.added", part=_part(block, ""), **place)
        return events

    def piece(self, block: Block, text: str) -> bytes:
        more: dict[str, Any] = {"logprobs": []} if block.kind == TEXT else {}
        return self._event(
            _TEXT_EVENTS[block.kind] + ".delta", delta=text, **self._place(block), **more
        )

    def finish(self, block: Block) -> bytes:
        place, kind = self._place(block), _TEXT_EVENTS[block.kind] + ".done"
        if block.kind == CALL:
            events = self._event(kind, arguments=block.text, name=block.name, **place)
        else:
            more: dict[str, Any] = {"logprobs": []} if block.kind == TEXT else {}
            events = self._event(kind, text=block.text, **place, **more)
            part = _part(block, block.text)
            events += self._event("content_part.done", part=part, **place)
        is_cut = self.result is not None and self.result.finish_reason != "stop"
        item = self._answer.item(block, "incomplete" if is_cut else "completed")
        return events + self._event("output_item.done", output_index=block.index, item=item)

    def closing(self, result: GenerationResult, usage: dict[str, Any]) -> bytes:
        answer = self._answer
        events = b"" if self.blocks else self.add_empty()
        ended = answer.ended(result, self.blocks)
        response = answer.head(answer.kind) | ended | {"usage": usage}
        return events + self._event(response["status"], response=response)

    def fail(self, error: ApiError) -> bytes:
        said = {"code": "server_error", "message": error.message}
        events = b"" if self.has_begun else self.opening()
        response = self._answer.begun() | {"status": "failed", "error": said}
        return events + self._event("failed", response=response)
