"""POST /v1/responses: OpenAI's newer form of a chat, as far as it goes without a memory.

A body becomes a ChatBody, is answered as any chat, and the answer is written in the other form.
Nothing is kept: what would need an earlier response is refused by name.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tidaldecode.errors import show
from tidaldecode.results import GenerationResult
from tidaldecode.server.answering import Caller
from tidaldecode.server.bodies import PASSED_ON, AskingBody, Body, ChatBody, Int
from tidaldecode.server.chat import ChatCompletion
from tidaldecode.server.errors import ApiError, invalid, unsupported
from tidaldecode.server.event_stream import EventWriter
from tidaldecode.server.service import Service
from tidaldecode.server.typed_events import TypedEvents, named_event

_TEXT_PARTS = ("input_text", "output_text", "text")
_KEEPS_NOTHING = "this server keeps nothing between requests"
_NO_TOOLS = "this route has no tools yet"
_NO_LOGPROBS = "this route gives no log-probabilities; /v1/chat/completions does"


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
        "tools": _NO_TOOLS,
        "tool_choice": _NO_TOOLS,
        "include": _NO_LOGPROBS,
        "top_logprobs": _NO_LOGPROBS,
    }

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def to_chat(self) -> ChatBody:
        """The chat that it asks for.

        Raises: ApiError for what is not of text.
        """
        if self.text is not None and (self.text.format or {}).get("type", "text") != "text":
            raise unsupported("text", "this route gives plain texts only; leave the format out")
        turns = _turns(self.input)
        if self.instructions:
            turns.insert(0, {"role": "system", "content": self.instructions})
        if not turns:
            raise invalid("input", "got no message, expected at least one")
        fields: dict[str, Any] = {"messages": turns, "max_tokens": self.max_output_tokens}
        fields |= self.model_dump(include=PASSED_ON, exclude_none=True)
        return ChatBody.model_validate(fields)


def _turns(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of an input."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    turns = []
    for index, item in enumerate(given):
        where = f"input[{index}]"
        kind, role = item.get("type", "message"), item.get("role")
        if kind != "message":
            raise unsupported(where, f"got an item of type {show(kind)}, expected messages only")
        if role not in ("user", "assistant", "system", "developer"):
            expected = "user, assistant, system or developer"
            raise invalid(f"{where}.role", f"got {show(role)}, expected {expected}")
        text = _text_of(item.get("content"), f"{where}.content")
        turns.append({"role": "system" if role == "developer" else role, "content": text})
    return turns


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
        self.message_id = f"msg_{number}"
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
            "text": {"format": {"type": "text"}},
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
        }

    def whole(self, results: list[GenerationResult]) -> dict[str, Any]:
        """The response that has ended, but for its usage."""
        result = results[0]
        is_cut = result.finish_reason != "stop"
        return {
            "status": "incomplete" if is_cut else "completed",
            "completed_at": None if is_cut else int(time.time()),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [self.item(result)],
        }

    def begun(self) -> dict[str, Any]:
        """The response before there is anything of it."""
        fields = {"status": "in_progress", "error": None, "incomplete_details": None}
        return self.head(self.kind) | fields | {"output": [], "usage": None}

    def item(self, result: GenerationResult) -> dict[str, Any]:
        """The message that is the answer."""
        return {
            "type": "message",
            "id": self.message_id,
            "status": "completed" if result.finish_reason == "stop" else "incomplete",
            "role": "assistant",
            "content": [text_part(result.text or "")],
        }

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


def text_part(text: str) -> dict[str, Any]:
    """The part of a message that is its text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class _Events(TypedEvents):
    def __init__(self, answer: ResponseAnswer) -> None:
        super().__init__(answer)
        self._answer = answer
        self._number = 0  # of the next event
        self._part = {"item_id": answer.message_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return named_event({"type": f"response.{kind}", "sequence_number": number} | fields)

    def opening(self) -> bytes:
        response = self._answer.begun()
        item = {"type": "message", "id": self._answer.message_id, "status": "in_progress"}
        item |= {"role": "assistant", "content": []}
        return (
            self._event("created", response=response)
            + self._event("in_progress", response=response)
            + self._event("output_item.added", output_index=0, item=item)
            + self._event("content_part.added", part=text_part(""), **self._part)
        )

    def piece(self, text: str) -> bytes:
        return self._event("output_text.delta", delta=text, logprobs=[], **self._part)

    def closing(self, result: GenerationResult, usage: dict[str, Any]) -> bytes:
        answer, text = self._answer, result.text or ""
        response = answer.head(answer.kind) | answer.whole([result]) | {"usage": usage}
        return (
            self._event("output_text.done", text=text, logprobs=[], **self._part)
            + self._event("content_part.done", part=text_part(text), **self._part)
            + self._event("output_item.done", output_index=0, item=answer.item(result))
            + self._event(response["status"], response=response)
        )

    def fail(self, error: ApiError) -> bytes:
        said = {"code": "server_error", "message": error.message}
        response = self._answer.begun() | {"status": "failed", "error": said}
        return self._event("failed", response=response)
