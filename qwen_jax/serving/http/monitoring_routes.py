"""Routes that show the server's state: health, readiness, statistics and metrics; and a web page to chat on."""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from msgspec.structs import asdict
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from qwen_jax.serving.http.http_metrics import HttpMetrics
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.ipc.errors import ApiError

SCRAPE_SECONDS = 1.0  # a scrape waits this long for the engine, which may be in a long step


def monitoring_routes(service: Service, metrics: HttpMetrics) -> APIRouter:
    """Return a router with the routes for health, readiness, statistics, metrics and the chat page."""
    routes = APIRouter()
    page = files("qwen_jax.serving.http").joinpath("page.html").read_text()
    engine_metrics = b""

    @routes.get("/health")
    async def health() -> Any:
        """Liveness probe: 200, or 503 when the engine has stopped or hangs."""
        service.check_health()
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> Any:
        """Readiness probe: 200, or 503 when the engine has stopped, hangs or loads, or the server is shutting down.

        Also tells how many programs the engine still lacks: until they are there it answers, in smaller steps.
        """
        service.check_ready()
        return {"status": "ready", "programs_to_come": service.link.gauges.programs_to_come}

    @routes.get("/stats")
    async def stats() -> Any:
        """Return the number of open requests, the engine's statistics, and its state after the last step, as JSON."""
        return {"requests": service.link.requests, "last_step": asdict(service.link.gauges),
                "engine": await service.link.call("stats")}

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        """Return metrics in Prometheus' text format; an engine that does not answer in time is shown as it last was."""
        nonlocal engine_metrics
        try:
            async with asyncio.timeout(SCRAPE_SECONDS):
                engine_metrics = await service.link.call("metrics")
        except (TimeoutError, ApiError):
            pass
        text = metrics.text(service.link.requests, service.healthy and service.link.facts is not None)
        return Response(text + engine_metrics, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @routes.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page)

    return routes
