"""What /openapi.json says: the bodies of bodies.py, which routes read themselves, and errors."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tidaldecode.server.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tidaldecode.server.error_forms import OVERLOADED
from tidaldecode.server.messages_body import CountBody, MessagesBody
from tidaldecode.server.responses_body import ResponsesBody

_REFERENCE = "#/components/schemas/{model}"
# All that described() is given.
_BODIES = (
    ChatBody, CompletionBody, ResponsesBody, MessagesBody, CountBody, TokenizeBody, DetokenizeBody,
)  # fmt: skip


class ErrorFields(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorFields


class MessagesErrorFields(BaseModel):
    """What went wrong, in Anthropic's words."""

    type: str
    message: str


class MessagesErrorBody(BaseModel):
    """The body of every error of Anthropic's routes."""

    type: Literal["error"]
    error: MessagesErrorFields


_WORDS = {
    400: "a field is wrong, or the body is no JSON",
    401: "no key, or another one",
    404: "no such model, or nothing of the kind in its folder",
    408: "the answer, or the body, took too long",
    413: "the body is too large",
    415: "the body is no application/json",
    500: "the server has made a mistake, or the model's numbers have ended the answer",
    503: "loading, draining, dead, or too many wait",
    OVERLOADED: "too many wait",
}


def described(
    body: type[BaseModel], *, streams: bool = False, error: type[BaseModel] = ErrorBody
) -> dict[str, Any]:
    """Options of a route that reads its body itself.

    Args:
        body: what it reads.
        streams: whether the answer may be server-sent events.
        error: the body of its errors.
    """
    schema = {"$ref": _REFERENCE.format(model=body.__name__)}
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {}  # events; a schema would be of each
    statuses: tuple[int, ...] = (400, 401, 404, 408, 413, 415, 500, 503)
    statuses += (OVERLOADED,) if error is MessagesErrorBody else ()
    answer = {200: {"description": "the answer", "content": content}}
    return {
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        },
        "responses": answer | _errors(statuses, error),
        "response_model": None,
    }


def plain(
    *, unready: bool = False, missing: bool = False, media: str = "application/json"
) -> dict[str, Any]:
    """Options of a route without a body.

    Args:
        unready: whether it may answer 503.
        missing: whether it may answer 404.
        media: the type of the answer.
    """
    statuses = (401, *((404,) if missing else ()), *((503,) if unready else ()))
    content = {media: {"schema": {"type": "object" if media == "application/json" else "string"}}}
    answer = {200: {"description": "the answer", "content": content}}
    return {"responses": answer | _errors(statuses), "response_model": None}


def _errors(statuses: tuple[int, ...], error: type[BaseModel] = ErrorBody) -> dict[int, Any]:
    schema = {"$ref": _REFERENCE.format(model=error.__name__)}
    content = {"application/json": {"schema": schema}}
    return {status: {"description": _WORDS[status], "content": content} for status in statuses}


def complete_schema(app: FastAPI) -> None:
    """Lets the application's schema have all bodies."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            kinds: Any = [(body, "validation") for body in (*_BODIES, ErrorBody, MessagesErrorBody)]
            _, definitions = models_json_schema(kinds, ref_template=_REFERENCE)
            schemas = made.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions["$defs"])
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]
