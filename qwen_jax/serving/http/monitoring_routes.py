"""Routes that show the server's state: health, readiness, statistics and metrics; and a web page to chat on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any, Generic, TypeVar

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from msgspec.structs import asdict
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from qwen_jax.serving.http.http_metrics import HttpMetrics
from qwen_jax.serving.http.openai_objects import VERSION
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.ipc.errors import ApiError

PAGE = files("qwen_jax.serving.http").joinpath("page.html").read_text()
SCRAPE_SECONDS = 1.0  # a scrape waits this long for the engine, which may be in a long step
SNAPSHOT_SECONDS = 1.0  # between two looks at the metrics, however many ask for them
T = TypeVar("T")


class Snapshot(Generic[T]):
    """A value for which many may ask and which is not made for each of them: those who wait meanwhile get the same one.

    Args:
      make: makes the value.
      seconds: time for which a value is given to later callers too.
    """

    def __init__(self, make: Callable[[], Awaitable[T]], seconds: float = 0.0) -> None:
        self._make, self._seconds = make, seconds
        self._began, self._making = 0.0, None

    async def get(self) -> T:
        """Return the value, made anew if the last one is too old. Raises what making it raised."""
        now = time.monotonic()
        if self._making is None or self._making.done() and now >= self._began + self._seconds:
            self._began, self._making = now, asyncio.ensure_future(self._make())
        return await asyncio.shield(self._making)


def monitoring_routes(service: Service, metrics: HttpMetrics) -> APIRouter:
    """Return a router with the routes for health, readiness, version, statistics, metrics and the chat page."""
    routes = APIRouter()
    engine_metrics = b""

    async def metrics_text() -> bytes:
        """Return all metrics as text; those of an engine that does not answer in time as they last were."""
        nonlocal engine_metrics
        try:
            async with asyncio.timeout(SCRAPE_SECONDS):
                engine_metrics = await service.link.call("metrics")
        except (TimeoutError, ApiError):
            pass
        up = service.healthy and service.link.facts is not None
        return metrics.text(service.link.requests, up) + engine_metrics

    metrics_now = Snapshot(metrics_text, SNAPSHOT_SECONDS)
    stats_now = Snapshot(lambda: service.link.call("stats"))

    @routes.post("/ping")
    @routes.get("/ping")  # the name that hosts of models use
    @routes.get("/health")
    async def health() -> Any:
        """Liveness probe: 200, or 503 when the engine has stopped or hangs."""
        service.check_health()
        return {"status": "ok"}

    @routes.get("/version")
    async def version() -> Any:
        """Return the version of this package."""
        return {"version": VERSION}

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
                "engine": await stats_now.get()}

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        """Return metrics in Prometheus' text format, as of the last second."""
        return Response(await metrics_now.get(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @routes.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(PAGE)

    return routes
