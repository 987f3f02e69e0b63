"""The ASGI application of a server: its routes behind its guard."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lcm_compile.serving.a1111 import a1111_routes
from lcm_compile.serving.answers import add_error_answers
from lcm_compile.serving.guard import Guard
from lcm_compile.serving.health import health_routes
from lcm_compile.serving.live import live_routes
from lcm_compile.serving.openai import openai_routes
from lcm_compile.serving.page import page_routes
from lcm_compile.serving.service import Service
from lcm_compile.version import __version__


def make_app(service: Service) -> ASGIApp:
    """Returns the application. It starts the service's workers when it starts, and ends them when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()

    app = FastAPI(
        title="lcm-compile",
        version=__version__,
        description="Draws pictures in few steps on compiled engines.",
        lifespan=lifespan,
        docs_url=None,  # `page` has one that loads nothing from elsewhere
        redoc_url=None,
    )
    app.include_router(page_routes())
    for routes in (openai_routes, a1111_routes, health_routes, live_routes):
        app.include_router(routes(service))
    add_error_answers(app, service.metrics, service.catalog)
    return Counting(Guard(app, service.settings), service)


class Counting:
    """ASGI middleware that counts answers by route and status."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._counter = service.metrics.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands a request on, and counts its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(
                    route, "path", "other"
                )  # not the client's own, of which there are endless ones
                self._counter.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)
