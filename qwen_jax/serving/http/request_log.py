"""What is known of a request once it has been answered, for whoever counts, logs or traces. Plain ASGI."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("qwen_jax.access")
_ID = re.compile(rb"[\w.:-]{1,128}")


@dataclass
class Exchange:
    """A request and its answer.

    Attributes:
      route: its path as the routes have it; "other" for what is none.
      status: 0 when the client left before there was one.
      began: by ``time.monotonic``; at: by ``time.time``. seconds: until the last byte.
      details: what the route said of it: model, tokens, times; with ``--log-prompts`` the prompt.
    """

    id: str
    method: str
    route: str
    status: int
    began: float
    at: float
    seconds: float
    traceparent: str | None
    details: dict[str, Any] = field(default_factory=dict)


Observer = Callable[[Exchange], None]


class Observed:
    """Middleware, the outermost. Gives a request an id (the client's ``X-Request-Id``, if it has one) and tells
    observers of it at its end."""

    def __init__(self, app: Any, observers: Sequence[Observer]) -> None:
        self._app, self._observers = app, observers

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}".encode()
        began, at, status = time.monotonic(), time.time(), 0
        details = scope["details"] = {}

        async def send_with_id(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            route = scope.get("route")
            traceparent = headers.get(b"traceparent", b"").decode("latin-1") or None
            exchange = Exchange(request_id.decode(), scope["method"], getattr(route, "path", "other"), status, began,
                                at, time.monotonic() - began, traceparent, details)
            for observe in self._observers:
                observe(exchange)


def log_access(exchange: Exchange) -> None:
    """One line for each request; as JSON, its parts are fields. Those who look every second are not told of."""
    level = logging.DEBUG if exchange.method == "GET" and exchange.status in (200, 503) else logging.INFO
    if not logger.isEnabledFor(level):
        return
    parts = {"request_id": exchange.id, "method": exchange.method, "route": exchange.route, "status": exchange.status,
             "seconds": round(exchange.seconds, 6), **exchange.details}
    logger.log(level, "%s %s %d in %.3f s", exchange.method, exchange.route, exchange.status, exchange.seconds,
               extra=parts)
