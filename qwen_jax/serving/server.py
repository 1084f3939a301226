"""``qwen-jax serve``: an HTTP process, the engine's process, and how both begin and end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn

from qwen_jax.errors import UserError
from qwen_jax.serving.app import Service, create_app
from qwen_jax.serving.limits import MOST_HEADER_BYTES
from qwen_jax.serving.link import EngineLink

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """
    Attributes:
      name: by which clients ask for the model.
      max_requests: open at once; more are answered with 429. stall_seconds: without a step until `/health` fails.
      drain_seconds: that running requests have to end after SIGTERM.
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


async def serve(model: str, engine: Mapping[str, Any], options: ServerOptions) -> int:
    """Until a signal, or until the engine has stopped; an exit code. ``engine``: of `Engine.from_pretrained`, as
    MessagePack can say it. UserError when the engine refuses its options."""
    extra = {} if options.command is None else {"command": options.command}
    link = EngineLink(model, engine, options.max_requests, **extra)
    service = Service(link, options.name or model, options.stall_seconds)
    config = uvicorn.Config(create_app(service, options.keys, options.body_bytes), options.host, options.port,
                            log_level="warning", access_log=False, timeout_graceful_shutdown=5, lifespan="off",
                            h11_max_incomplete_event_size=2 * MOST_HEADER_BYTES)
    server = _Server(config, service, options.drain_seconds)
    await link.start()
    serving = asyncio.create_task(server.serve())
    ended = asyncio.create_task(link.ended.wait())
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
