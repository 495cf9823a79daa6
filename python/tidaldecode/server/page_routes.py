"""The page at `/` (web/): static files of this package, a client of the API like any other."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tidaldecode.server.errors import ApiError

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent / "web"
_MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# Nothing comes from anywhere else, and an answer that holds markup can load and send nothing.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def is_page(path: str) -> bool:
    """Whether a path is the page's or one of its files'."""
    return path == "/" or path.startswith("/web/")


@lru_cache(1)
def _files() -> dict[str, bytes]:
    """All files by their names below web/."""
    found = (each for each in _FOLDER.rglob("*") if each.suffix in _MEDIA)
    return {each.relative_to(_FOLDER).as_posix(): each.read_bytes() for each in found}


@router.api_route("/", methods=["GET", "HEAD"])
async def page() -> Response:
    """The page."""
    return _response("index.html")


@router.api_route("/web/{name:path}", methods=["GET", "HEAD"])
async def file(request: Request, name: str) -> Response:
    """One of its files."""
    if name not in _files():
        raise ApiError(404, "route_not_found", f"there is no {request.url.path}")
    return _response(name)


def _response(name: str) -> Response:
    media = _MEDIA[Path(name).suffix]
    return Response(_files()[name], headers=_HEADERS, media_type=media)
