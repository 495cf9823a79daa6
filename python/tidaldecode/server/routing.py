"""What every route needs: the service, the caller, and the body as one of bodies.py."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from tidaldecode.server.answering import Caller
from tidaldecode.server.bodies import read_body
from tidaldecode.server.errors import ApiError, api_error
from tidaldecode.server.guard import read_all
from tidaldecode.server.service import Service

B = TypeVar("B", bound=BaseModel)


def service_of(request: Request) -> Service:
    """The service behind the application."""
    service: Service = request.app.state.service
    return service


def caller_of(request: Request) -> Caller:
    """Who sent it."""
    return Caller(number=request.state.request_number, salt=request.state.salt)


async def body_of(request: Request, kind: type[B]) -> B:
    """The body of a request.

    Raises: ApiError for what is none, or is for a model that is not here, or while nobody is let
        in.
    """
    service = service_of(request)
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if media.lower() != "application/json":
        raise ApiError(
            415, "unsupported_media_type", f"content-type: got {media}, expected application/json"
        )
    try:
        data = await read_all(request.receive, service.settings)
    except ConnectionError as gone:
        raise ApiError(400, "invalid_json", str(gone)) from None
    _ = service.model  # nobody is let in before it is there
    try:
        body = read_body(kind, data)
    except RecursionError as error:
        raise api_error(error) from error
    name = getattr(body, "model", None)
    if name is not None and name not in service.names:
        raise ApiError(
            404, "model_not_found",
            f"model: got {name[:100]!r}, expected {' or '.join(map(repr, service.names))}", "model",
        )  # fmt: skip
    return body
