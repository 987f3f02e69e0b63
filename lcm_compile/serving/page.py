"""The page at `/`, which draws while one types, and the page of the API at `/docs`.

All that they load comes from this server: files of the folder `page`, and Swagger UI from the package
`fastapi-offline`. They are read once, when the server starts, so no path from a client is ever opened.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from lcm_compile.serving.answers import json_answer
from lcm_compile.serving.guard import error_body

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css")
# Nothing but what this server has. Pictures that the page makes are blob:, those in Swagger's style data:.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",  # asked for again each time, and answered with 304 if it is the same
}


@dataclass(frozen=True)
class PageFile:
    """A file that is served as it is. The entity tag is a digest of its bytes."""

    data: bytes
    media_type: str
    tag: str


def page_files() -> dict[str, PageFile]:
    """Returns the files of the page, and Swagger UI's, by their names."""
    own = [path for path in files("lcm_compile.serving").joinpath("page").iterdir() if path.is_file()]
    swagger = [files("fastapi_offline").joinpath("static", name) for name in SWAGGER]
    found = {}
    for path in (*own, *swagger):
        if media_type := TYPES.get(path.name.rpartition(".")[2]):
            data = path.read_bytes()
            found[path.name] = PageFile(data, media_type, f'"{hashlib.sha256(data).hexdigest()[:32]}"')
    return found


def page_routes() -> APIRouter:
    """Returns the routes of the pages. They need no key: they hold no secret, and ask for one themselves."""
    router = APIRouter(include_in_schema=False)
    known = page_files()

    def answer(request: HttpRequest, name: str) -> Response:
        file = known.get(name)
        if file is None:
            return json_answer(error_body("there is no such file", 404), 404)
        headers = {**HEADERS, "ETag": file.tag}
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=headers)
        return Response(file.data, headers=headers, media_type=file.media_type)

    @router.get("/")
    async def index(request: HttpRequest) -> Response:
        return answer(request, "index.html")

    @router.get("/docs")
    async def docs(request: HttpRequest) -> Response:
        return answer(request, "docs.html")

    @router.get("/favicon.ico")
    async def icon(request: HttpRequest) -> Response:
        return answer(request, "icon.svg")

    @router.get("/page/{name}")
    async def file(request: HttpRequest, name: str) -> Response:
        return answer(request, name)

    return router
