"""Routes for whoever watches: is it well, what does it do. And the page."""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from qwen_jax.serving.http.http_metrics import HttpMetrics
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.ipc.errors import ApiError

SCRAPE_SECONDS = 1.0  # that a scrape waits for the engine, which may be in a long step: then it gets the last figures


def monitoring_routes(service: Service, metrics: HttpMetrics) -> APIRouter:
    routes = APIRouter()
    page = files("qwen_jax.serving").joinpath("page.html").read_text()
    of_engine = b""

    @routes.get("/health")
    async def health() -> Any:
        service.check_health()
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> Any:
        service.check_ready()
        return {"status": "ready"}

    @routes.get("/stats")
    async def stats() -> Any:
        """The engine's counters, and of its last step."""
        return {"requests": service.link.requests, "last_step": service.link.gauges,
                "engine": await service.link.call("stats")}

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        """In Prometheus' format; of the engine the last figures when it does not answer at once."""
        nonlocal of_engine
        try:
            async with asyncio.timeout(SCRAPE_SECONDS):
                of_engine = await service.link.call("metrics")
        except (TimeoutError, ApiError):
            pass
        text = metrics.text(service.link.requests, service.healthy and service.link.facts is not None)
        return Response(text + of_engine, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @routes.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page)

    return routes
