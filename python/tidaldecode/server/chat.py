"""POST /v1/chat/completions: an answer to a conversation, whole or as it is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tidaldecode.requests import Request
from tidaldecode.results import GenerationResult, TokenLogprobs
from tidaldecode.server.answer import Delta
from tidaldecode.server.answering import AnswerEvents, Answering, Caller
from tidaldecode.server.asking import asked_for_chat, chat_options
from tidaldecode.server.bodies import ChatBody
from tidaldecode.server.event_stream import EventWriter
from tidaldecode.server.logprobs import chat_logprobs, prompt_logprobs
from tidaldecode.server.service import Service


class ChatCompletion(Answering):
    """One request of the route."""

    kind = "chat.completion"
    piece_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, service: Service, body: ChatBody, caller: Caller) -> None:
        """Checks it.

        Raises: ApiError.
        """
        asked = asked_for_chat(body, service.settings, caller.salt)
        super().__init__(service, body, asked, caller)
        self._messages = [each.model_dump(exclude_none=True) for each in body.messages]
        self._options = chat_options(body)
        content = body.messages[-1].content if body.echo else None
        # The beginning of the last message, where the answer is to repeat it.
        self.echoed = content if isinstance(content, str) else ""

    def submit(self) -> list[Request]:
        ids = self.model.texts.tokenizer.render_chat(self._messages, **self._options)
        self.prompt_ids = [ids]
        return self.asked.submit(self.service, self.prompt_ids)

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
        text = self.echoed + (result.text or "")
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": result.finish_reason,
            "stop_reason": result.stop_reason,
        }
        if result.logprobs is not None:
            choice["logprobs"] = chat_logprobs(result.logprobs, self.names)
        if self.body.return_token_ids:
            choice["token_ids"] = list(result.token_ids)
        return choice


class _Events(AnswerEvents):
    def __init__(self, chat: ChatCompletion) -> None:
        opening, tail = b',"delta":{"content":', b'},"logprobs":null,"finish_reason":null'
        super().__init__(chat, opening, tail)
        self._chat = chat

    def choice(self, index: int, text: str | None) -> dict[str, Any]:
        return {"index": index, "delta": {} if text is None else {"content": text}}

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
