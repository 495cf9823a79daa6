"""The routes that say how the server is, and what it serves."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tidaldecode import _core
from tidaldecode.server.errors import ApiError
from tidaldecode.server.metrics import CONTENT_TYPE
from tidaldecode.server.openapi import plain
from tidaldecode.server.routing import service_of
from tidaldecode.server.service import Service

router = APIRouter()


def _json(fields: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(fields), status, media_type="application/json")


@router.get("/live", **plain())
async def live() -> Response:
    """Whether the process lives."""
    return _json({"status": "live"})


@router.get("/health", **plain(unready=True))
async def health(request: Request) -> Response:
    """Whether requests are taken: 503 while loading, while draining, and once dead."""
    return health_of(service_of(request))


def health_of(service: Service) -> Response:
    """The answer of /health."""
    if service.state == "ready":
        return _json({"status": "ready"})
    refusal = service.refusal()
    done, total = service.progress
    fields = {"status": service.state, "error": refusal.fields()}
    if service.state == "loading":
        fields["progress"] = {"bytes_done": done, "bytes_total": total}
    response = _json(fields, 503)
    response.headers.update(refusal.headers)
    return response


@router.get("/version", **plain())
async def version() -> Response:
    """The version of this package."""
    return _json({"version": _core.version()})


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", **plain(media="text/plain"))
async def metrics(request: Request) -> Response:
    """Counters in Prometheus' form."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE)


@router.get("/server_info", **plain(unready=True))
async def server_info(request: Request) -> Response:
    """What routers ask for: the model, its limits, how it is decoded."""
    service = service_of(request)
    decoder = service.model.decoder
    fields = {
        "model_id": service.names[0],
        "served_model_name": service.names[0],
        "max_model_len": service.model.most_tokens,
        "device": decoder.config.device,
        "plan": decoder.plan,
        "plan_source": decoder.plan_source,
        "stats": decoder.stats(),
    }
    return _json(fields)


@router.get("/v1/models", **plain(unready=True))
async def models(request: Request) -> Response:
    """What may be asked for as "model"."""
    service = service_of(request)
    _ = service.model
    return _json({"object": "list", "data": [_card(service, name) for name in service.names]})


@router.get("/v1/models/{name:path}", **plain(unready=True, missing=True))
async def model(request: Request, name: str) -> Response:
    """One of them."""
    service = service_of(request)
    _ = service.model
    if name not in service.names:
        raise ApiError(404, "model_not_found", f"there is no model {name[:100]!r}", "model")
    return _json(_card(service, name))


def _card(service: Any, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.model.loaded_at,
        "owned_by": "tidaldecode",
        "root": service.names[0],
        "parent": None,
        "max_model_len": service.model.most_tokens,
    }
