"""Every error that a client may see: one type, and one form on the wire for all routes.

The form is OpenAI's, {"error": {"message", "type", "param", "code"}}. Messages never hold a path of
this machine, an address or a traceback.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import orjson

from tidaldecode.errors import (
    BackendError,
    CapacityError,
    ConfigError,
    InvalidArgument,
    OutOfMemoryError,
    UnsupportedError,
)

_logger = logging.getLogger("tidaldecode")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    501: "not_implemented_error",
    503: "unavailable_error",
}
# How the engine calls what clients call otherwise.
_PARAMS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "plan": "token_budget",
}
_PARAM = re.compile(r"((?:[a-z_]+(?:\[\d+\])?\.?)+): ")
_MAX_MESSAGE = 2000


class ApiError(Exception):
    """What a request is refused or ended with."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Takes an HTTP status of TYPES, a word for programs, and words for people."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message[:_MAX_MESSAGE]
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        overloaded = ("queue_full", "queue_timeout", "out_of_memory")
        return "overloaded_error" if self.code in overloaded else TYPES[self.status]

    def body(self) -> bytes:
        """The error as JSON."""
        return orjson.dumps({"error": self.fields()})

    def fields(self) -> dict[str, Any]:
        """Its four fields."""
        return {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }


def invalid(param: str | None, message: str) -> ApiError:
    """A field that is wrong; the message goes on from the field's name."""
    return ApiError(400, "invalid_value", f"{param}: {message}" if param else message, param)


def unsupported(param: str, message: str) -> ApiError:
    """A field that means something that this server does not do."""
    return ApiError(400, "unsupported_parameter", f"{param}: {message}", param)


def unavailable(code: str, message: str, retry_after_s: int = 1) -> ApiError:
    """A server that cannot take the request now."""
    return ApiError(503, code, message, headers={"retry-after": str(retry_after_s)})


def api_error(error: BaseException, hidden: Mapping[str, str] | None = None) -> ApiError:
    """What a client is told of an error.

    Args:
        error: of any type; one that nobody expects is logged with its traceback.
        hidden: texts that are not for clients, with what stands for each.
    """
    if isinstance(error, ApiError):
        return error
    message = str(error)
    for text, word in (hidden or {}).items():
        message = message.replace(text, word)
    match = _PARAM.match(message)
    param = None
    if match is not None:
        name = match.group(1)
        param = _PARAMS.get(name, name)
        message = param + message[len(name) :]
    if isinstance(error, CapacityError):
        return ApiError(400, "context_length_exceeded", message, param="max_tokens")
    if isinstance(error, InvalidArgument):
        return ApiError(400, "invalid_value", message, param)
    if isinstance(error, (ConfigError, UnsupportedError)):
        return ApiError(400, "unsupported_parameter", message, param)
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, "out_of_memory", message, headers={"retry-after": "5"})
    if isinstance(error, BackendError):
        return ApiError(503, "engine_dead", "the engine has failed: " + message)
    _logger.error("server: %s", type(error).__name__, exc_info=error)
    return ApiError(500, "internal_error", "the server has made a mistake; its log says more")


# Tells clients that the same request would end in the same way.
_NO_RETRY = {"x-should-retry": "false"}


def broken_off(message: str) -> ApiError:
    """An answer that the engine could not go on with: its settings left no token to draw, or the
    model's numbers none."""
    _, is_guided, reason = message.partition("guide: ")
    if is_guided:
        engine_name = "min_new_tokens"  # the one setting that a guide complains of
        reason = reason.replace(engine_name, _PARAMS[engine_name])
        return ApiError(400, "invalid_value", f"the format that was asked for: {reason}")
    return ApiError(500, "numeric_error", message, headers=_NO_RETRY)


def took_too_long(seconds: float) -> ApiError:
    """An answer that has not come to its end in time."""
    message = f"the answer took over {seconds:.0f} s"
    return ApiError(408, "request_timeout", message, headers=_NO_RETRY)
