"""The bodies of requests: OpenAI's fields, vLLM's beside them, and ours. Unknown ones are ignored.

A field of the wrong type is an error that names it; null is as if it were not there. What a field
means is checked where it is used: asking.py.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from tidaldecode.errors import show
from tidaldecode.server.errors import ApiError, invalid, unsupported

MAX_TOKEN_ID = 2**31 - 1
MAX_PROMPTS = 4096

B = TypeVar("B", bound=BaseModel)


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 16.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole_list(values: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Integers as they are first: a call for each would hold up all streams."""
    try:
        return validate(values)
    except ValidationError:
        return validate([_whole(each) for each in values] if isinstance(values, list) else values)


Int = Annotated[int, BeforeValidator(_whole)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], WrapValidator(_whole_list)]


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class AskingBody(Body):
    """The fields that all routes share which generate."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    # Fields of one route that ask for what it does not do, with why.
    refused: ClassVar[dict[str, str]] = {}

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Int | None = None
    stop_token_ids: TokenIds | None = None
    min_tokens: Annotated[Int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[Int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    request_id: Annotated[str, Field(max_length=128)] | None = None
    # Ours.
    attention: Literal["tidal", "full", "verified"] | None = None
    token_budget: Annotated[Int, Field(ge=1)] | Literal["auto"] | None = None
    verify: bool | None = None


# Fields of other forms of a chat that become those of a ChatBody as they are.
PASSED_ON = {*AskingBody.model_fields, "chat_template_kwargs"}


class SamplingBody(AskingBody):
    """The fields that chats and completions share."""

    n: Annotated[Int, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    no_repeat_ngram_size: Annotated[Int, Field(ge=0)] | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: TokenIds | None = None
    prompt_logprobs: Annotated[Int, Field(ge=0)] | None = None
    echo: bool | None = None
    user: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    return_progress: bool | None = None


class Message(Body):
    """A message of a chat. Its other fields are the template's to use."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    return_selection: bool | None = None  # ours


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    refused: ClassVar[dict[str, str]] = {
        "tools": "completions have no tools; use a chat",
        "tool_choice": "completions have no tools; use a chat",
    }

    prompt: Annotated[
        str | TokenIds | list[str] | list[TokenIds], Field(union_mode="left_to_right")
    ]
    max_tokens: Annotated[Int, Field(ge=0)] | None = None
    logprobs: Annotated[Int, Field(ge=0)] | None = None
    best_of: Int | None = None
    add_special_tokens: bool | None = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool | None = None


# Fields that ask for what this server does not do. To ignore them would give a wrong answer.
REFUSED = {
    "chat_template": "templates come from the model's folder only",
    "logits_processors": "code of a request is never run",
    "prompt_embeds": "prompts are texts or token ids",
    "suffix": "the model does not fill in between texts",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "answers are texts",
}
# Values of those fields that ask for nothing.
_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "store": (False,),
    "background": (False,),
    # Reasoning is never encrypted, and what comes back of it is not looked at.
    "include": ([], ["reasoning.encrypted_content"]),
    "top_logprobs": (0,),
    "mcp_servers": ([],),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
}


# What stands for several types, in words.
_EXPECTED = {
    "prompt": "a text, a list of token ids, or a list of those",
    "stop": "a text or a list of texts",
    "content": "a text or a list of parts",
    "tool_choice": '"none", "auto", "required", or the name of a function',
    "system": "a text or a list of text blocks",
    "input": "a text or a list of messages",
    "token_budget": 'an integer of at least 1, or "auto"',
}


def read_body(kind: type[B], data: bytes) -> B:
    """A body out of its JSON.

    Raises: ApiError for what is no JSON object of this kind, or asks for what is refused.
    """
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise _to_api_error(error) from None
    fields = body.model_extra or {}
    refused = REFUSED | getattr(kind, "refused", {})
    for name in refused.keys() & fields.keys():
        value = fields[name]
        if value is not None and value not in _ASKS_NOTHING.get(name, ()):
            raise unsupported(name, f"{refused[name]}; leave it out")
    return body


def _to_api_error(error: ValidationError) -> ApiError:
    """What is wrong with the first field that has something wrong."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        detail = first["msg"].removeprefix("Invalid JSON: ")
        return ApiError(400, "invalid_json", f"the body is no JSON: {detail}")
    if not first["loc"]:
        return ApiError(400, "invalid_value", "the body is no JSON object")
    path, name = "", ""
    for part in first["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        path += f".{part}" if path else part
        if (name := part) in _EXPECTED:
            break
    if first["type"] == "missing":
        return invalid(path, "is missing")
    if name in _EXPECTED:
        return invalid(path, f"expected {_EXPECTED[name]}")
    expected = first["msg"].replace("Input should be", "expected").replace("valid ", "")
    expected = re.sub(r"\ba (?=[aeio])", "an ", expected)
    return invalid(path, f"got {show(first['input'])}, {expected}")
