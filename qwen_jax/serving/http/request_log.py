"""ASGI middleware that makes a record of each answered HTTP request, for metrics, logs and traces."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_jax.serving.http.limits import send_error
from qwen_jax.serving.ipc.errors import ApiError

logger = logging.getLogger("qwen_jax.access")
_ID = re.compile(rb"[\w.:-]{1,128}")


@dataclass
class Exchange:
    """Record of an HTTP request and its answer.

    Attributes:
      id: the client's ``X-Request-Id``, or an id made here.
      route: path of the route, with its parameters' names; "other" when no route has the path.
      status: HTTP status; 0 when the client left before there was an answer.
      at: time of arrival by ``time.time``.
      seconds: time from arrival until the last byte was sent.
      traceparent: the header ``traceparent``, which names the trace that the request is part of; None without it.
      details: facts that the route has added: model, token counts, times; with ``--log-prompts`` the prompt.
    """

    id: str
    method: str
    route: str
    status: int
    at: float
    seconds: float
    traceparent: str | None
    details: dict[str, Any] = field(default_factory=dict)


Observer = Callable[[Exchange], None]


class Observed:
    """ASGI middleware that gives every request an id and, when it has ended, calls the observers with its record.

    A request in which an exception was not handled is answered with status 500 and its id.
    """

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
        except Exception:
            name = request_id.decode()
            logger.exception("request %s failed", name)
            if status:  # the answer has begun: its connection is closed
                raise
            await send_error(send_with_id, ApiError(500, f"an internal error: the server's log has it under {name}"),
                             scope["path"])
        finally:
            route = scope.get("route")
            traceparent = headers.get(b"traceparent", b"").decode("latin-1") or None
            exchange = Exchange(id=request_id.decode(), method=scope["method"], route=getattr(route, "path", "other"),
                                status=status, at=at, seconds=time.monotonic() - began, traceparent=traceparent,
                                details=details)
            for observe in self._observers:
                observe(exchange)


def log_access(exchange: Exchange) -> None:
    """Write a log line about an HTTP request that has ended; JSON log lines have its details as fields.

    ``GET`` requests with status 200 or 503, such as probes, are logged at level DEBUG.
    """
    level = logging.DEBUG if exchange.method == "GET" and exchange.status in (200, 503) else logging.INFO
    if not logger.isEnabledFor(level):
        return
    parts = {"request_id": exchange.id, "method": exchange.method, "route": exchange.route, "status": exchange.status,
             "seconds": round(exchange.seconds, 6), **exchange.details}
    logger.log(level, f"{exchange.method} {exchange.route} {exchange.status} in {exchange.seconds:.3f} s", extra=parts)
