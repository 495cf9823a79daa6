"""POST /v1/chat/completions: an answer to a conversation, whole or as it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from tidaldecode.requests import Request
from tidaldecode.results import GenerationResult, TokenLogprobs
from tidaldecode.server.answer import Delta
from tidaldecode.server.answer_parts import (
    AnswerForm,
    PartReader,
    count_reasoning,
    shows_special_tokens,
)
from tidaldecode.server.answering import AnswerEvents, Answering, Caller
from tidaldecode.server.asking import (
    Asked,
    asked_for_chat,
    chat_messages,
    chat_options,
    prompt_of_chat,
)
from tidaldecode.server.bodies import ChatBody
from tidaldecode.server.errors import invalid
from tidaldecode.server.event_stream import EventWriter
from tidaldecode.server.logprobs import chat_logprobs, prompt_logprobs
from tidaldecode.server.selection import bins_of
from tidaldecode.server.service import Service
from tidaldecode.server.tool_use import tool_use_of
from tidaldecode.text.reasoning import opens_reasoning
from tidaldecode.text.tokenizer import Tokenizer
from tidaldecode.text.tool_calls import ToolCallDelta

_PROMPT_END = 32  # tokens that a tag fits in


class ChatCompletion(Answering):
    """One request of the route."""

    kind = "chat.completion"
    piece_kind = "chat.completion.chunk"
    prefix = "chatcmpl"
    body: ChatBody

    def __init__(self, service: Service, body: ChatBody, caller: Caller) -> None:
        """Checks it.

        Raises: ApiError.
        """
        asked = asked_for_chat(body, service.settings, caller.salt)
        super().__init__(service, body, asked, caller)
        self._messages = chat_messages(body.messages)
        self._options = chat_options(body)
        self._tells_selection = bool(body.return_selection)
        self._tools = tool_use_of(body, self.model.form.tool_format, service.settings)
        if self._tools is None:
            self._options.pop("tools", None)
        elif "guide" in asked.options:
            raise invalid(
                asked.guide_field,
                'cannot be kept beside tools; leave one out, or tool_choice "none"',
            )
        # The beginning of the last message, where the answer is to repeat it.
        self.echoed = _text_of(body.messages[-1].content) if body.echo else ""

    @property
    def likeness(self) -> int:
        # What comes first, and what tells conversations apart that share it.
        return hash(tuple(str(each.get("content")) for each in self._messages[:2]))

    def submit(self) -> list[Request]:
        tokenizer = self.model.texts.tokenizer
        ids = prompt_of_chat(tokenizer, self._messages, self._options)
        self.prompt_ids = [ids]
        if self._tells_selection:
            contents = [each.get("content") for each in self._messages]
            self.bins = bins_of(tokenizer.token_bytes(ids), contents)
        self.form = self._form_after(ids, tokenizer)
        return self._asked_in(self.form, tokenizer).submit(self.service, self.prompt_ids)

    def _form_after(self, prompt_ids: list[int], tokenizer: Tokenizer) -> AnswerForm:
        """The form of the answer to a prompt."""
        form, tools = self.model.form, self._tools
        if form.tags is not None:
            end = tokenizer.decode(prompt_ids[-_PROMPT_END:], skip_special_tokens=False)
            form = replace(form, begins_inside=opens_reasoning(end, form.tags))
        form = form.without(tags=self.body.separate_reasoning is False, calls=tools is None)
        if tools is not None:
            most = None if tools.is_parallel else 1
            form = replace(form, tool_names=tools.names, most_calls=most)
        return form

    def _asked_in(self, form: AnswerForm, tokenizer: Tokenizer) -> Asked:
        """What is asked of the engine for an answer of a form."""
        asked = self.asked
        guide, field = asked.options.get("guide"), asked.guide_field
        if self._tools is not None:
            guide, field = self._tools.guide(tokenizer), "tools"
        if guide is not None:
            tags = self.model.form.tags
            if tags is not None:
                if self._tools is not None:
                    tags = replace(tags, answer="")  # a call has a head of its own
                guide = guide.after_reasoning(tags, begins_inside=form.begins_inside)
            asked = asked.guided(guide, field)
        if shows_special_tokens(form, tokenizer.special_tokens):
            asked = replace(asked, options=asked.options | {"skip_special_tokens": False})
        return asked

    def account(self, results: list[GenerationResult]) -> dict[str, Any]:
        usage = super().account(results)
        tokenizer = self.model.decoder._frontend.tokenizer
        count = sum(count_reasoning(each.token_ids, self.form, tokenizer) for each in results)
        usage["completion_tokens_details"]["reasoning_tokens"] = count
        return usage

    def events(self) -> EventWriter:
        return _Events(self)

    def whole(self, results: list[GenerationResult]) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "choices": [self._choice(index, result) for index, result in enumerate(results)]
        }
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = self.prompt_ids[0]
        scored = results[0].prompt_logprobs
        if scored is not None:
            answer["prompt_logprobs"] = prompt_logprobs(scored, self.names)
        return answer

    def _choice(self, index: int, result: GenerationResult) -> dict[str, Any]:
        parts = self.form.read(result.text or "")
        content = self.echoed + parts.content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.form.tags is not None and self.body.include_reasoning is not False:
            message |= reasoning_fields(parts.reasoning or None)
        if parts.calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {"id": each.id, "type": "function", "function": asdict(each.call)}
                for each in parts.calls
            ]
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": finish_reason(result, bool(parts.calls)),
            "stop_reason": result.stop_reason,
        }
        if result.logprobs is not None:
            choice["logprobs"] = chat_logprobs(result.logprobs, self.names)
        if self.body.return_token_ids:
            choice["token_ids"] = list(result.token_ids)
        return choice


def _text_of(content: str | list[dict[str, Any]] | None) -> str:
    """The text of a message, its parts put together as for a template that takes no parts."""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content or ())


def finish_reason(result: GenerationResult, has_calls: bool) -> str:
    """Why an answer has ended; one that calls tools waits for them."""
    return "tool_calls" if has_calls and result.finish_reason == "stop" else result.finish_reason


def reasoning_fields(text: str | None) -> dict[str, Any]:
    """The reasoning of a message, under both names that clients know."""
    return {"reasoning_content": text, "reasoning": text}


class _Events(AnswerEvents):
    def __init__(self, chat: ChatCompletion) -> None:
        opening, tail = b',"delta":{"content":', b'},"logprobs":null,"finish_reason":null'
        super().__init__(chat, opening, tail)
        self._chat = chat
        self._shows_reasoning = chat.body.include_reasoning is not False
        self._readers = [PartReader(chat.form) for _ in range(chat.num_choices)]

    def choice(self, index: int, text: str | None) -> dict[str, Any]:
        return {"index": index, "delta": {} if text is None else {"content": text}}

    def shown(self, index: int, text: str, *, is_last: bool) -> dict[str, Any] | None:
        reader = self._readers[index]
        new = reader.read(text, is_last=is_last)
        delta: dict[str, Any] = {}
        if new.reasoning and self._shows_reasoning:
            delta |= reasoning_fields(new.reasoning)
        if new.content:
            delta["content"] = new.content
        if new.calls:
            delta["tool_calls"] = [_call_delta(call, reader.call_ids) for call in new.calls]
        return {"index": index, "delta": delta} if delta else None

    def finish_reason(self, index: int, result: GenerationResult) -> str:
        return finish_reason(result, bool(self._readers[index].call_ids))

    def logprobs(self, index: int, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return chat_logprobs(logprobs, self._chat.names)

    def begin(self, delta: Delta) -> list[bytes]:
        delta_fields = {"role": "assistant", "content": ""}
        choice = {"index": delta.index, "delta": delta_fields}
        choice |= {"logprobs": None, "finish_reason": None}
        fields: dict[str, Any] = {"choices": [choice]} | self.usage_so_far(delta.index)
        if self._chat.body.return_token_ids:
            fields["prompt_token_ids"] = self._chat.prompt_ids[0]
        events = [self.event(fields)]
        if self._chat.echoed:
            events.append(self.chunk(delta.index, self._chat.echoed))
        return events


def _call_delta(new: ToolCallDelta, ids: Sequence[str]) -> dict[str, Any]:
    """What is new of a call; its name and id come with its first piece only."""
    function: dict[str, Any] = {"arguments": new.arguments}
    if new.name is None:
        return {"index": new.index, "function": function}
    begun = {"index": new.index, "id": ids[new.index], "type": "function"}
    return begun | {"function": {"name": new.name} | function}
