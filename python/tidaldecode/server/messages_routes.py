"""Anthropic's routes."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tidaldecode.server.asking import chat_messages, chat_options, prompt_of_chat
from tidaldecode.server.bodies import ChatBody
from tidaldecode.server.generation_routes import answer
from tidaldecode.server.messages import MessageAnswer
from tidaldecode.server.messages_body import CountBody, MessagesBody
from tidaldecode.server.openapi import MessagesErrorBody, described
from tidaldecode.server.routing import body_of, caller_of, service_of

router = APIRouter(prefix="/v1/messages")


@router.post("", **described(MessagesBody, streams=True, error=MessagesErrorBody))
async def messages(request: Request) -> Any:
    """An answer to a conversation."""
    body = await body_of(request, MessagesBody)
    return await answer(request, MessageAnswer(service_of(request), body, caller_of(request)))


@router.post("/count_tokens", **described(CountBody, error=MessagesErrorBody))
async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation is."""
    body = await body_of(request, CountBody)
    service = service_of(request)
    texts = service.model.texts
    chat = ChatBody.model_validate(body.chat_fields(texts.chat_template))
    conversation = chat_messages(chat.messages)
    options = chat_options(chat)
    ids = await service.in_text_worker(
        lambda: prompt_of_chat(texts.tokenizer, conversation, options)
    )
    return Response(orjson.dumps({"input_tokens": len(ids)}), media_type="application/json")
