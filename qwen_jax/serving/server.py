"""``qwen-jax serve``: an HTTP process, the engine's process, and how both begin and end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI
from prometheus_client.registry import Collector

from qwen_jax.errors import UserError
from qwen_jax.serving.http.admin_routes import create_admin_app
from qwen_jax.serving.http.app import create_app
from qwen_jax.serving.http.app_factory import Inner
from qwen_jax.serving.http.limits import MOST_HEADER_BYTES
from qwen_jax.serving.http.request_log import Observer, log_access
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.http.tracing import tracer
from qwen_jax.serving.ipc.engine_client import EngineLink, Link

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extension:
    """What is added to a server from outside: see `create_app`; admin: routes of the admin port."""

    inner: Inner | None = None
    collectors: Sequence[Collector] = ()
    admin: Sequence[APIRouter] = ()
    public: Sequence[APIRouter] = ()


Extend = Callable[[Service], Extension]


@dataclass(frozen=True)
class ServerOptions:
    """
    Attributes:
      name: by which clients ask for the model.
      admin_port: for other weights, with ``admin_keys``, on ``admin_host``; None for no such port.
      max_requests: open at once; more are answered with 429. stall_seconds: without a step until `/health` fails.
      drain_seconds: that running requests have to end after SIGTERM.
      log_format: "text" or "json"; log_prompts: with the prompts. otlp_endpoint: where traces go.
      share_weights: converted checkpoints are decoded once for all servers of a machine.
      command: of the engine's process, to which a socket's number is added; by default ours.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    max_requests: int = 1024
    stall_seconds: float = 60.0
    drain_seconds: float = 300.0
    body_bytes: int = 4 << 20
    keys: Sequence[bytes] = ()
    admin_port: int | None = None
    admin_host: str = "127.0.0.1"
    admin_keys: Sequence[bytes] = ()
    log_format: str = "text"
    log_prompts: bool = False
    otlp_endpoint: str | None = None
    share_weights: bool = False
    command: Sequence[str] | None = None


class _Server(uvicorn.Server):
    """Whose first signal drains; the second ends it at once."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service, self._drain_seconds, self._draining = service, drain_seconds, None

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._draining or sig == signal.SIGINT:
            super().handle_exit(sig, frame)
            return
        self._service.draining = True
        self._draining = asyncio.run_coroutine_threadsafe(self._drain(), self._loop)

    async def serve(self, sockets=None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def _drain(self) -> None:
        logger.info("draining: %d requests are open", self._service.link.requests)
        end = self._loop.time() + self._drain_seconds
        while self._service.link.requests and not self._service.link.failure and self._loop.time() < end:
            await asyncio.sleep(0.05)
        self.should_exit = True


def _config(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(app, host, port, log_level="warning", access_log=False, timeout_graceful_shutdown=5,
                          lifespan="off", h11_max_incomplete_event_size=2 * MOST_HEADER_BYTES)


@dataclass(frozen=True)
class Parts:
    """Of a server: the public routes, what they share, and what the admin port needs beside."""

    app: FastAPI
    service: Service
    observers: Sequence[Observer]
    extension: Extension


def assemble(link: Link, model: str, options: ServerOptions, extend: Extend | None = None) -> Parts:
    """What `serve` serves, for other servers too."""
    if options.admin_port is not None and not options.admin_keys:
        raise UserError("an admin port needs keys: --admin-keys FILE, or QWEN_JAX_ADMIN_KEYS")
    observers = [log_access, *([tracer(options.otlp_endpoint)] if options.otlp_endpoint else [])]
    service = Service(link, model, options.name or model, options.stall_seconds, options.log_prompts)
    more = extend(service) if extend else Extension()
    app = create_app(service, observers, options.keys, options.body_bytes, more.inner, more.collectors, more.public)
    return Parts(app, service, observers, more)


@asynccontextmanager
async def admin_port(parts: Parts, options: ServerOptions) -> AsyncIterator[None]:
    """The port for other weights, if there is to be one."""
    if options.admin_port is None:
        yield
        return
    app = create_admin_app(parts.service, parts.observers, options.admin_keys)
    for router in parts.extension.admin:
        app.include_router(router)
    server = uvicorn.Server(_config(app, options.admin_host, options.admin_port))
    server.capture_signals = nullcontext  # the public server's are enough
    serving = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def engine_link(model: str, engine: Mapping[str, Any], options: ServerOptions,
                environment: Mapping[str, str] = MappingProxyType({})) -> EngineLink:
    """An engine in a process of its own, not yet started. ``engine``: of `Engine.from_pretrained`, as MessagePack can
    say it."""
    process = {"log_format": options.log_format, "share_weights": options.share_weights}
    extra = {} if options.command is None else {"command": options.command}
    return EngineLink(model, engine, options.max_requests, process, environment, **extra)


async def serve(link: Link, model: str, options: ServerOptions, extend: Extend | None = None) -> int:
    """Until a signal, or until the engine has stopped; an exit code. UserError when the engine refuses its options.

    extend: makes of the service what is to be added to it.
    """
    parts = assemble(link, model, options, extend)
    server = _Server(_config(parts.app, options.host, options.port), parts.service, options.drain_seconds)
    await link.start()
    serving = asyncio.create_task(server.serve())
    ended = asyncio.create_task(link.ended.wait())
    async with admin_port(parts, options):
        await asyncio.wait((serving, ended), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await asyncio.sleep(0.5)  # those who wait are told why
            server.should_exit = True
            await serving
    ended.cancel()
    failed = link.failure is not None
    code = await link.stop()
    if link.refused:
        raise UserError(link.refused)
    if failed:
        logger.error("the engine has stopped: %s", link.failure)
        return code or 1
    return 0
