"""The routes from texts to token ids and back."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tidaldecode.server.asking import chat_messages, chat_options, prompt_of_chat
from tidaldecode.server.bodies import DetokenizeBody, TokenizeBody
from tidaldecode.server.errors import ApiError, invalid
from tidaldecode.server.logprobs import TokenNames
from tidaldecode.server.openapi import described, plain
from tidaldecode.server.routing import body_of, service_of

router = APIRouter()

# Tokens that clients look for in /tokenizer_info; null where the folder names none.
_NO_NAMES = {"bos_token": None, "eos_token": None, "pad_token": None}


@router.get("/tokenizer_info", **plain(unready=True, missing=True))
async def tokenizer_info(request: Request) -> Response:
    """The named special tokens and the chat template."""
    texts = service_of(request).model.texts
    names = texts.named_tokens
    if names is None:
        raise ApiError(404, "tokenizer_not_found", "the model's folder has no tokenizer of use")
    fields = _NO_NAMES | names | {"chat_template": texts.chat_template}
    return Response(orjson.dumps(fields), media_type="application/json")


@router.post("/tokenize", **described(TokenizeBody))
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, or of a conversation through the chat template."""
    body = await body_of(request, TokenizeBody)
    service = service_of(request)
    texts = service.model.texts
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "expected one of prompt and messages")
    options = chat_options(body) if body.messages is not None else {}

    def encode() -> tuple[list[int], list[str] | None]:
        if body.messages is not None:
            ids = prompt_of_chat(texts.tokenizer, chat_messages(body.messages), options)
        else:
            adds = body.add_special_tokens is not False
            ids = texts.tokenizer.encode(body.prompt or "", add_special_tokens=adds)
        names = TokenNames(texts.tokenizer)
        return ids, [names.text_of(i) for i in ids] if body.return_token_strs else None

    ids, strings = await service.in_text_worker(encode)
    fields: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": service.model.most_tokens,
        "tokens": ids,
        "token_strs": strings,
    }
    return Response(orjson.dumps(fields), media_type="application/json")


@router.post("/detokenize", **described(DetokenizeBody))
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    body = await body_of(request, DetokenizeBody)
    service = service_of(request)
    texts = service.model.texts
    skips = body.skip_special_tokens is True

    def decode() -> str:
        return texts.tokenizer.decode(body.tokens, skip_special_tokens=skips)

    text = await service.in_text_worker(decode)
    return Response(orjson.dumps({"prompt": text}), media_type="application/json")
