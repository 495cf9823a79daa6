"""How the errors of errors.py look to the clients of each route: one table, one place.

Most routes have OpenAI's form. /v1/messages has Anthropic's; and routes that call a field otherwise
than chats do say its name there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from tidaldecode.server.errors import ApiError

OVERLOADED = 529  # Anthropic's status for a server with too much to do


@dataclass(frozen=True, kw_only=True)
class ErrorForm:
    """OpenAI's form, {"error": {"message", "type", "param", "code"}}."""

    # The route's own names of fields, by what chats call them.
    names: Mapping[str, str] = field(default_factory=dict)

    def status(self, error: ApiError) -> int:
        """The status of the response."""
        return error.status

    def fields(self, error: ApiError) -> dict[str, Any]:
        """The fields of the body, or of an event in a stream."""
        return {"error": self.renamed(error).fields()}

    def body(self, error: ApiError) -> bytes:
        """The whole response."""
        return orjson.dumps(self.fields(error))

    def renamed(self, error: ApiError) -> ApiError:
        """The error with the route's own name of the field."""
        name = self.names.get(error.param or "")
        if name is None:
            return error
        message = error.message
        if message.startswith(f"{error.param}: "):
            message = name + message[len(error.param or "") :]
        return ApiError(error.status, error.code, message, name, error.headers)


class MessagesErrorForm(ErrorForm):
    """Anthropic's form, {"type": "error", "error": {"type", "message"}}."""

    _TYPES = {413: "request_too_large", 408: "timeout_error", 429: "rate_limit_error"}
    _TYPES |= {401: "authentication_error", 404: "not_found_error", OVERLOADED: "overloaded_error"}

    def status(self, error: ApiError) -> int:
        return OVERLOADED if error.type == "overloaded_error" else error.status

    def fields(self, error: ApiError) -> dict[str, Any]:
        status = self.status(error)
        kind = self._TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        message = self.renamed(error).message
        return {"type": "error", "error": {"type": kind, "message": message}}


OPENAI_FORM = ErrorForm()
MESSAGES_FORM = MessagesErrorForm(
    names={
        "stop": "stop_sequences",
        "response_format": "output_config.format",
        "response_format.json_schema.schema": "output_config.format.schema",
    }
)
RESPONSES_FORM = ErrorForm(
    names={
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "reasoning_effort": "reasoning.effort",
        "response_format": "text.format",
        "response_format.type": "text.format.type",
        "response_format.json_schema.schema": "text.format.schema",
    }
)


def form_of(path: str) -> ErrorForm:
    """The form of a route's errors."""
    for route, form in (("/v1/messages", MESSAGES_FORM), ("/v1/responses", RESPONSES_FORM)):
        if path == route or path.startswith(route + "/"):
            return form
    return OPENAI_FORM
