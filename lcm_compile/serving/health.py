"""Whether a server is up, whether it would draw, and its metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from lcm_compile.serving.answers import json_answer
from lcm_compile.serving.service import Service


def health_routes(service: Service) -> APIRouter:
    """Returns the routes for probes and for Prometheus."""
    router = APIRouter(tags=["Operation"])

    @router.get("/health")
    async def health() -> Response:
        """Answers 200 as long as the server runs."""
        return json_answer({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        """Answers 200 if a picture would be drawn now: 503 while models load, and while the server stops."""
        word = "ready" if service.is_ready else "stopping" if service.stopping else "loading"
        return json_answer({"status": word}, 200 if service.is_ready else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Tells counts and times in Prometheus' format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
