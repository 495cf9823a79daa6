"""From a request's body to what Decoder.submit() is given, and the submitting itself.

asked() is quick and runs in the event loop; what it returns tokenises and submits in a text worker.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tidaldecode.config import plan_part
from tidaldecode.errors import ConfigError, InvalidArgument
from tidaldecode.server.answer_formats import guide_of
from tidaldecode.server.bodies import MAX_PROMPTS, ChatBody, CompletionBody, Message, SamplingBody
from tidaldecode.server.errors import ApiError, invalid, unsupported
from tidaldecode.server.tool_use import for_template

if TYPE_CHECKING:
    from tidaldecode.requests import Request
    from tidaldecode.server.service import Model, Service
    from tidaldecode.server.settings import ServeConfig
    from tidaldecode.text.guide import Guide
    from tidaldecode.text.tokenizer import Tokenizer

COMPLETION_TOKENS = 16  # of a completion that does not say, as OpenAI has it

# Tokens of a stream that may wait for a client that does not read, in the engine; as many more wait
# here. Then the engine goes on with others.
MOST_UNREAD = 256

# Fields that submit() calls by the same names.
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
    "include_stop_str_in_output", "skip_special_tokens", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "no_repeat_ngram_size", "logit_bias", "bad_words", "allowed_token_ids",
    "priority", "prompt_logprobs",
)  # fmt: skip
# What a template may not be given in chat_template_kwargs: it has fields of its own or none.
_NO_VARIABLES = (
    "chat_template", "messages", "tools", "documents", "add_generation_prompt",
    "continue_final_message",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that has been checked, as far as that goes without its tokens."""

    options: dict[str, Any]  # of submit(), but for the prompt and max_new_tokens
    n: int
    max_tokens: int | None  # None: to the end of the context
    max_tokens_field: str | None  # that has said so; None: no field, and it shrinks to the room
    logprobs: int | None  # of new tokens
    prompt_logprobs: int | None
    prompt_field: str  # what the prompts are made of
    guide_field: str = "response_format"  # that has asked for the guide, if there is one

    def guided(self, guide: Guide, field: str) -> Asked:
        """The same, with an answer that keeps to a guide, which a field has asked for."""
        return replace(self, options=self.options | {"guide": guide}, guide_field=field)

    def submit(self, service: Service, prompts: list[list[int]]) -> list[Request]:
        """Submits prompts of token ids; gives n requests for each, one prompt after the other.

        Raises: as Decoder.submit(), ApiError if too many tokens wait; then none is left running.
        """
        model = service.model
        service.check_tokens(sum(map(len, prompts)))
        requests: list[Request] = []
        try:
            for ids in prompts:
                requests += self._submit_one(model, ids)
        except BaseException as error:
            for request in requests:
                request.cancel()
            name, _, rest = str(error).partition(": ")
            if isinstance(error, InvalidArgument) and name == "guide":
                raise invalid(self.guide_field, rest) from None
            raise
        return requests

    def _submit_one(self, model: Model, ids: list[int]) -> tuple[Request, ...]:
        options = dict(self.options)
        count = self._num_new(len(ids), model.most_tokens)
        if (budget := options.pop("token_budget", None)) is not None:
            asked = model.decoder._settings
            options["plan"] = plan_part(asked, token_budget=budget, min_token_budget=None)
        return model.decoder.submit(ids, n=self.n, max_new_tokens=count, **options).choices

    def _num_new(self, num_prompt: int, most: int) -> int:
        """Most new tokens behind a prompt, in a context of so many."""
        room = most - num_prompt
        # In the words by which clients of OpenAI's and Anthropic's servers know it.
        why = f"this model's maximum context length is {most} tokens, with the answer"
        if room < 1:
            raise _no_room(
                self.prompt_field,
                f"prompt is too long: {num_prompt} tokens > {most - 1} maximum; {why}",
            )
        # A request that wants no new token still needs one: its prompt is scored on the way.
        count = room if self.max_tokens is None else max(1, self.max_tokens)
        if self.max_tokens_field is not None and count > room:
            raise _no_room(
                self.max_tokens_field,
                f"got {count}, expected at most {room}: input length and `max_tokens` exceed "
                f"context limit: {num_prompt} + {count} > {most}; {why}",
            )
        return min(count, room)


def _no_room(param: str, message: str) -> ApiError:
    return ApiError(400, "context_length_exceeded", f"{param}: {message}", param)


def asked_for_chat(body: ChatBody, settings: ServeConfig, salt: str) -> Asked:
    """What a chat asks for.

    Raises: ApiError naming the field.
    """
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        if body.max_tokens != body.max_completion_tokens:
            raise invalid("max_completion_tokens", "differs from max_tokens; give one of the two")
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
    if body.echo:
        _check_echo(body)
    if body.return_selection and not body.stream:
        raise invalid("return_selection", "needs stream to be true")
    names = ("max_completion_tokens", "max_tokens")
    said = next((name for name in names if getattr(body, name) is not None), None)
    most = settings.default_max_tokens if said is None else getattr(body, said)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    asked = _asked(body, settings, salt, (most, logprobs))
    return replace(asked, max_tokens_field=said)


def asked_for_completion(body: CompletionBody, settings: ServeConfig, salt: str) -> Asked:
    """What a completion asks for.

    Raises: ApiError naming the field.
    """
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "unsupported_parameter", "best_of: expected n, or nothing", "best_of")
    if body.max_tokens == 0 and body.stream and not body.echo:
        raise invalid("max_tokens", "got 0 in a stream without echo, expected at least 1")
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    asked = _asked(body, settings, salt, (most, body.logprobs))
    if body.max_tokens is not None:
        asked = replace(asked, max_tokens_field="max_tokens")
    if body.echo and body.logprobs is not None:
        scored = max(body.logprobs, body.prompt_logprobs or 0)
        return replace(
            asked, prompt_logprobs=scored, options=asked.options | {"prompt_logprobs": scored}
        )
    return asked


def check_prompts(body: CompletionBody, settings: ServeConfig) -> list[str | list[int]]:
    """The prompts of a completion, one by one.

    Raises: ApiError for none, or for too many.
    """
    prompt = body.prompt
    is_one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
    prompts: list[Any] = [prompt] if is_one else list(prompt)
    _check_most("n", body.n or 1, settings.max_n)
    most = min(MAX_PROMPTS, settings.max_queued_requests)
    if not 1 <= len(prompts) * (body.n or 1) <= most:
        raise invalid(
            "prompt", f"got {len(prompts)} prompts, expected 1 to {most // (body.n or 1)}"
        )
    for index, each in enumerate(prompts):
        if not each:
            where = "prompt" if is_one else f"prompt[{index}]"
            raise invalid(where, "is empty, expected at least one token")
    return prompts


def chat_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a chat template takes them."""
    return [for_template(each.model_dump(exclude_none=True)) for each in messages]


def prompt_of_chat(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], options: Mapping[str, Any]
) -> list[int]:
    """Token ids of a conversation; runs in a text worker.

    Args:
        messages: of chat_messages().
        options: of chat_options().

    Raises: ApiError naming the field that the chat template does not take.
    """
    if not tokenizer.has_chat_template:
        raise unsupported("messages", "this model has no chat template; use completions")
    try:
        ids: list[int] = tokenizer.render_chat(messages, **options)
    except (InvalidArgument, ConfigError) as error:
        _, is_its, reason = str(error).partition("chat template: ")
        if not is_its:
            raise
        match = re.match(r"(\w+): ", reason)
        if isinstance(error, ConfigError) or match is None:
            raise invalid("messages", f"the chat template does not take them: {reason}") from None
        name = match[1]
        if name in ("continue_final_message", "reasoning_effort"):
            raise invalid(name, reason[match.end() :]) from None
        raise invalid("chat_template_kwargs", reason) from None
    return ids


def chat_options(body: Any) -> dict[str, Any]:
    """The options of a chat template.

    Args:
        body: a ChatBody or a TokenizeBody with messages.

    Raises: ApiError naming the field.
    """
    variables = body.chat_template_kwargs or {}
    for name in _NO_VARIABLES:
        if name in variables:
            raise invalid("chat_template_kwargs", f"got {name!r}, which is no variable")
    options = dict(variables)
    if body.add_generation_prompt is not None:
        options["add_generation_prompt"] = body.add_generation_prompt
    if body.continue_final_message:
        options["continue_final_message"] = True
    for name in ("documents", "tools"):
        if value := getattr(body, name, None):
            options[name] = value
    if getattr(body, "reasoning_effort", None) is not None:
        options.setdefault("reasoning_effort", body.reasoning_effort)
    return options


def _check_echo(body: ChatBody) -> None:
    """An echoed chat answers with the message that it goes on with."""
    if not body.continue_final_message:
        raise invalid("echo", "needs continue_final_message: the last message is what is echoed")


def _asked(
    body: SamplingBody, settings: ServeConfig, salt: str, wanted: tuple[int | None, int | None]
) -> Asked:
    most, logprobs = wanted
    n = body.n or 1
    stops = 1 if isinstance(body.stop, str) else len(body.stop or ())
    _check_most("n", n, settings.max_n)
    _check_most("stop", stops, settings.max_stop)
    name = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
    _check_most(name, logprobs or 0, settings.max_logprobs)
    _check_most("prompt_logprobs", body.prompt_logprobs or 0, settings.max_logprobs)
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("prompt_logprobs", "got it with stream, expected one of the two")
    options = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if options.get("stop") == "":
        options["stop"] = []
    if isinstance(options.get("stop"), list) and not options["stop"]:
        del options["stop"]
    if body.min_tokens is not None:
        if most is not None and body.min_tokens > max(1, most):
            raise invalid("min_tokens", f"got {body.min_tokens}, expected at most {most}")
        options["min_new_tokens"] = body.min_tokens
    if logprobs is not None:
        options["logprobs"] = logprobs
    if body.seed is not None:
        options["seed"] = body.seed % 2**64  # clients send negative ones too
    options |= _attention_of(body)
    if body.stream:
        options["max_unread"] = MOST_UNREAD
    guide = guide_of(body)
    if guide is not None:
        options["guide"] = guide
    options["cache_salt"] = f"{salt}/{body.cache_salt}" if body.cache_salt else salt
    return Asked(
        options=options, n=n, max_tokens=most, max_tokens_field=None, logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        prompt_field="messages" if isinstance(body, ChatBody) else "prompt",
        guide_field="structured_outputs" if body.structured_outputs else "response_format",
    )  # fmt: skip


def _check_most(name: str, count: int, most: int) -> None:
    if count > most:
        raise invalid(name, f"got {count}, expected at most {most}")


def _attention_of(body: SamplingBody) -> dict[str, Any]:
    """How the answer is to be decoded."""
    if body.attention == "verified" and body.verify is False:
        raise invalid("verify", 'got false with attention "verified", expected one of the two')
    options: dict[str, Any] = {}
    if body.attention is not None:
        options["attention"] = "tidal" if body.attention == "verified" else body.attention
    verify = True if body.attention == "verified" else body.verify
    if verify is not None:
        options["verify"] = verify
    if body.token_budget is not None:
        if body.attention == "full":
            raise invalid("token_budget", 'means nothing with attention "full"; leave one out')
        options["token_budget"] = body.token_budget
    return options
