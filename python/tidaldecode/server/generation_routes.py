"""The routes that generate."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tidaldecode.server.answering import Answering
from tidaldecode.server.bodies import ChatBody, CompletionBody
from tidaldecode.server.chat import ChatCompletion
from tidaldecode.server.completions import Completion
from tidaldecode.server.openapi import described
from tidaldecode.server.responses import ResponseAnswer
from tidaldecode.server.responses_body import ResponsesBody
from tidaldecode.server.routing import body_of, caller_of, service_of

router = APIRouter()


@router.post("/v1/chat/completions", **described(ChatBody, streams=True))
async def chat_completions(request: Request) -> Any:
    """An answer to a conversation."""
    body = await body_of(request, ChatBody)
    return await answer(request, ChatCompletion(service_of(request), body, caller_of(request)))


@router.post("/v1/completions", **described(CompletionBody, streams=True))
async def completions(request: Request) -> Any:
    """Prompts, gone on with."""
    body = await body_of(request, CompletionBody)
    return await answer(request, Completion(service_of(request), body, caller_of(request)))


@router.post("/v1/responses", **described(ResponsesBody, streams=True))
async def responses(request: Request) -> Any:
    """An answer to a conversation, in OpenAI's newer form."""
    body = await body_of(request, ResponsesBody)
    return await answer(request, ResponseAnswer(service_of(request), body, caller_of(request)))


async def answer(request: Request, answering: Answering) -> Any:
    """The response of a route that generates.

    Raises: ApiError.
    """
    given = await answering.respond(request.receive)
    return Response(given, media_type="application/json") if isinstance(given, bytes) else given
