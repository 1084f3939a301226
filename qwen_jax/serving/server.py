"""The server behind ``qwen-jax serve``: its HTTP applications, the link to an engine, and how both begin and end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import uvicorn
from fastapi import FastAPI

from qwen_jax.errors import UserError
from qwen_jax.serving.http.admin_routes import create_admin_app
from qwen_jax.serving.http.app import Extension, create_app
from qwen_jax.serving.http.connection import Connection
from qwen_jax.serving.http.limits import Keys, read_keys
from qwen_jax.serving.http.request_log import log_access
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.http.tracing import tracer
from qwen_jax.serving.ipc.engine_client import EngineBackend, EngineClient
from qwen_jax.serving.options import EngineOptions, ServerOptions
from qwen_jax.sockets import allow_many_connections

logger = logging.getLogger(__name__)

Extend = Callable[[Service], Extension]


@dataclass(frozen=True)
class Applications:
    """The ASGI applications of a server: one for its public port and one for its admin port.

    Attributes:
      service: state that the routes of both share.
      public: application of the public port.
      admin: application of the admin port; None without such a port.
    """

    service: Service
    public: FastAPI
    admin: FastAPI | None


class _DrainingServer(uvicorn.Server):
    """A uvicorn server that finishes open requests before it ends on SIGTERM, but not on SIGINT or a second signal."""

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
                          lifespan="off", http=Connection, ws="none")


def assemble(link: EngineBackend, model: str, options: ServerOptions, extend: Extend | None = None) -> Applications:
    """Make the ASGI applications of a server's public and admin ports.

    Args:
      model: a folder, a hub id or ``bundled``, as `qwen-jax serve` takes it.
      extend: returns the middleware, metrics and routes of other packages, given the state that routes share.
    Raises:
      UserError: a file of keys that cannot be read, an admin port without keys, or traces without their packages.
    """
    keys = Keys(read_keys(options.api_keys, "QWEN_JAX_API_KEYS"),
                read_keys(options.admin_keys, "QWEN_JAX_ADMIN_KEYS"))
    if options.admin_port is not None and not keys.admins:
        raise UserError("an admin port needs keys: --admin-keys FILE, or QWEN_JAX_ADMIN_KEYS")
    observers = [log_access, *([tracer(options.otlp_endpoint)] if options.otlp_endpoint else [])]
    service = Service(link, model, options)
    extension = extend(service) if extend else Extension()
    public = create_app(service, observers, keys, options.max_body_bytes, extension)
    if options.admin_port is None:
        return Applications(service, public, None)
    return Applications(service, public, create_admin_app(service, observers, keys.admins, extension.admin))


@asynccontextmanager
async def serving_admin(admin: FastAPI | None, options: ServerOptions) -> AsyncIterator[None]:
    """Serve the admin port's application, if there is one, until the ``async with`` block ends."""
    if admin is None:
        yield
        return
    server = uvicorn.Server(_config(admin, options.admin_host, options.admin_port))
    server.capture_signals = nullcontext  # the public server handles them
    serving = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def process_options(options: ServerOptions) -> dict[str, Any]:
    """Return the server's options that the engine's process needs, as keywords of `Launch`."""
    return {"log_format": options.log_format, "share_weights": options.share_weights}


def engine_link(model: str, engine: EngineOptions, options: ServerOptions, progress: bool = False,
                environment: Mapping[str, str] = MappingProxyType({})) -> EngineClient:
    """Return a client of an engine in a process of its own, which is not started yet.

    Args:
      progress: whether the engine shows progress bars on stderr.
      environment: environment variables of the engine's process, beside those of this one.
    """
    return EngineClient(model, engine.keywords(progress), options.max_requests, process=process_options(options),
                      environment=environment)


async def serve(link: EngineBackend, model: str, options: ServerOptions, extend: Extend | None = None) -> int:
    """Start an engine and serve it over HTTP until a signal arrives or the engine stops; return the exit code.

    Arguments and errors are those of `assemble`. UserError also when the engine refuses its options.
    """
    applications = assemble(link, model, options, extend)
    server = _DrainingServer(_config(applications.public, options.host, options.port), applications.service,
                             options.drain_seconds)
    allow_many_connections()
    await link.start()
    serving = asyncio.create_task(server.serve())
    ended = asyncio.create_task(link.ended.wait())
    async with serving_admin(applications.admin, options):
        await asyncio.wait((serving, ended), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await asyncio.sleep(0.5)  # for the answers that tell waiting clients the reason
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
