"""POST /v1/completions: prompts gone on with, whole or as they are written.

A prompt is a text or token ids, or there are several of them; with echo the answer begins with the
prompt, and with logprobs beside it the prompt's tokens are scored: what evaluations use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tidaldecode.requests import Request
from tidaldecode.results import GenerationResult, TokenLogprobs
from tidaldecode.server.answer import Delta
from tidaldecode.server.answering import AnswerEvents, Answering, Caller
from tidaldecode.server.asking import asked_for_completion, check_prompts
from tidaldecode.server.bodies import CompletionBody
from tidaldecode.server.errors import invalid
from tidaldecode.server.logprobs import CompletionLogprobs, joined, prompt_logprobs
from tidaldecode.server.service import Service


class Completion(Answering):
    """One request of the route."""

    kind = piece_kind = "text_completion"
    prefix = "cmpl"
    body: CompletionBody

    def __init__(self, service: Service, body: CompletionBody, caller: Caller) -> None:
        """Checks it.

        Raises: ApiError.
        """
        self._prompts = check_prompts(body, service.settings)
        asked = asked_for_completion(body, service.settings, caller.salt)
        super().__init__(service, body, asked, caller)
        self._echoed: list[str] = []

    @property
    def num_choices(self) -> int:
        return len(self._prompts) * self.asked.n

    def submit(self) -> list[Request]:
        texts = [each for each in self._prompts if isinstance(each, str)]
        encoded: list[list[int]] = []
        if texts:
            adds = self.body.add_special_tokens is not False
            tokenizer = self.model.texts.tokenizer
            encoded = tokenizer.encode_texts(texts, add_special_tokens=adds)
        left = iter(encoded)
        self.prompt_ids = [next(left) if isinstance(each, str) else each for each in self._prompts]
        if not all(self.prompt_ids):
            raise invalid("prompt", "has no tokens, expected at least one")
        if self.body.echo:
            self._echoed = [self._text_of(each) for each in self._prompts]
        return self.asked.submit(self.service, self.prompt_ids)

    def _text_of(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        skips = self.body.skip_special_tokens is not False
        return self.model.texts.tokenizer.decode(prompt, skip_special_tokens=skips)

    def echoed(self, index: int) -> str:
        """What a choice begins with."""
        return self._echoed[index // self.asked.n] if self.body.echo else ""

    def events(self) -> AnswerEvents:
        return _Events(self)

    def whole(self, results: list[GenerationResult]) -> dict[str, Any]:
        return {"choices": [self._choice(index, result) for index, result in enumerate(results)]}

    def _choice(self, index: int, result: GenerationResult) -> dict[str, Any]:
        wants_answer = self.asked.max_tokens != 0
        choice: dict[str, Any] = {
            "index": index,
            "text": self.echoed(index) + ((result.text or "") if wants_answer else ""),
            "logprobs": None,
            "finish_reason": result.finish_reason if wants_answer else "length",
            "stop_reason": result.stop_reason if wants_answer else None,
        }
        if self.wants_logprobs:
            fields, parts = self.logprobs_fields(), []
            if self.body.echo:
                parts.append(self.scored_prompt(fields, index, result.prompt_logprobs or ()))
            parts.append(fields.of((result.logprobs or ()) if wants_answer else ()))
            choice["logprobs"] = joined(parts)
        if self.body.prompt_logprobs is not None and result.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs, self.names)
        if self.body.return_token_ids:
            choice["prompt_token_ids"] = self.prompt_of(index)
            choice["token_ids"] = list(result.token_ids) if wants_answer else []
        return choice

    def logprobs_fields(self) -> CompletionLogprobs:
        """The fields of a choice that has not begun."""
        return CompletionLogprobs(self.names, skips=self.body.skip_special_tokens is not False)

    def scored_prompt(
        self, fields: CompletionLogprobs, index: int, logprobs: Sequence[TokenLogprobs]
    ) -> dict[str, Any]:
        """The log-probabilities of an echoed prompt."""
        return fields.prompt(self.echoed(index), self.prompt_of(index)[0], logprobs)


class _Events(AnswerEvents):
    def __init__(self, completion: Completion) -> None:
        super().__init__(completion, b',"text":', b',"logprobs":null,"finish_reason":null')
        self._completion = completion
        count = completion.num_choices
        self._fields = [completion.logprobs_fields() for _ in range(count)]

    def choice(self, index: int, text: str | None) -> dict[str, Any]:
        return {"index": index, "text": text or ""}

    def logprobs(self, index: int, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return self._fields[index].of(logprobs)

    def begin(self, delta: Delta) -> list[bytes]:
        """The prompt, where it is echoed or its tokens are wanted."""
        completion, index = self._completion, delta.index
        more: dict[str, Any] = {}
        if completion.body.return_token_ids:
            more = {"prompt_token_ids": completion.prompt_of(index), "token_ids": []}
        if completion.body.echo and completion.wants_logprobs:
            scored = delta.scored or ()
            more["logprobs"] = completion.scored_prompt(self._fields[index], index, scored)
        events = []
        if completion.body.echo or more:
            events.append(self.chunk(index, completion.echoed(index), **more))
        if completion.asked.max_tokens == 0:  # the one token was not asked for
            delta.text, delta.token_ids, delta.logprobs = "", [], None
        return events
