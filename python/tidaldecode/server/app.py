"""The application: routes, and one form for all errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from tidaldecode import _core
from tidaldecode.errors import TidalError
from tidaldecode.server import (
    generation_routes,
    messages_routes,
    page_routes,
    state_routes,
    token_routes,
)
from tidaldecode.server.error_forms import form_of
from tidaldecode.server.errors import ApiError
from tidaldecode.server.guard import Guard
from tidaldecode.server.openapi import complete_schema
from tidaldecode.server.service import Service


def make_app(service: Service) -> Guard:
    """The whole application for a service, which begins to load when the application starts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    app = FastAPI(
        title="tidaldecode", version=_core.version(), lifespan=lifespan, docs_url=None,
        redoc_url=None, openapi_url="/openapi.json",
    )  # fmt: skip
    app.state.service = service
    for routes in (state_routes, generation_routes, messages_routes, token_routes):
        app.include_router(routes.router)
    if service.settings.web:
        app.include_router(page_routes.router)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    # What no route has foreseen: the engine's own refusals, and mistakes of the server.
    app.add_exception_handler(TidalError, _answer_other_error)
    app.add_exception_handler(Exception, _answer_other_error)
    origins = service.settings.cors_origins
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST", "HEAD"],
            allow_headers=["*"],
        )  # fmt: skip
    complete_schema(app)
    guard = Guard(app, service.settings)
    service.drop_slow_clients = guard.drop_slow
    return guard


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    form = form_of(request.url.path)
    return Response(
        form.body(error), form.status(error), headers=error.headers, media_type="application/json"
    )


async def _answer_other_error(request: Request, error: Exception) -> Response:
    return await _answer_error(request, request.app.state.service.to_api_error(error))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself."""
    assert isinstance(error, HTTPException)
    words: dict[int, tuple[str, str]] = {
        404: ("route_not_found", f"there is no {request.url.path}"),
        405: ("method_not_allowed", f"{request.url.path} does not take {request.method}"),
    }
    code, message = words.get(error.status_code, ("invalid_value", str(error.detail)))
    status = error.status_code if error.status_code in words else 400
    headers: Any = error.headers
    return await _answer_error(request, ApiError(status, code, message, headers=headers))
