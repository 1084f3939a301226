"""The ingress deployment of Ray Serve: the server's routes in front of engines on all nodes.

There is one gateway, because it alone knows what each engine has queued. It owns the engines: when it ends, so do they.
Its configuration is Serve's ``user_config``, so what can change without a restart does: other engines replace the old
ones one after another while requests flow.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from functools import partial
from typing import Any

from ray import serve

from qwen_jax.cluster.canary.client import TrialLink
from qwen_jax.cluster.composition import extension
from qwen_jax.cluster.ray_serve.autoscaling import Autoscaler
from qwen_jax.cluster.ray_serve.config import Autoscaling, ClusterConfig, parse_config
from qwen_jax.cluster.ray_serve.remote_client import RemoteLink
from qwen_jax.cluster.routing.load_balancer import Balancer
from qwen_jax.cluster.routing.replica_set import replace_all, resize
from qwen_jax.errors import UserError
from qwen_jax.serving.http.limits import read_keys
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.logs import set_up_logging
from qwen_jax.serving.server import ServerOptions, admin_port, assemble

logger = logging.getLogger(__name__)
TEND_SECONDS = 1.0
MOST_OPEN = 1_000_000  # the server's own limit is the one that answers with 429


def _front():
    """The application that a replica calls: the gateway's, which is there once it has its configuration."""
    async def front(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await serve.get_replica_context().servable_object.routes(scope, receive, send)

    return front


@serve.deployment(name="Gateway", num_replicas=1, max_ongoing_requests=MOST_OPEN, health_check_period_s=5,
                  health_check_timeout_s=30, graceful_shutdown_timeout_s=330, ray_actor_options={"num_cpus": 0})
@serve.ingress(_front)
class Gateway:
    async def __init__(self) -> None:
        self._config: ClusterConfig | None = None
        self._tending: asyncio.Task | None = None
        self._changing = asyncio.Lock()
        self._change: asyncio.Task | None = None
        self._problem: str | None = None
        self._open = contextlib.AsyncExitStack()

    async def reconfigure(self, wanted: dict[str, Any]) -> None:
        """Begins, and returns once an engine is ready. Later on what can change does so in the background, while
        requests flow: ``GET /cluster`` says how it goes. Serve would end a gateway for which this fails."""
        config = parse_config(wanted, "the configuration")
        if self._config is None:
            await self._begin(config)
            self._config = config
        else:
            self._change, before = asyncio.create_task(self._become(config)), self._change
            if before:
                before.cancel()

    async def _begin(self, config: ClusterConfig) -> None:
        served = config.server
        set_up_logging(served.log_format)
        options = ServerOptions(
            served.host, served.port, served.name, served.max_requests, served.stall_seconds, served.drain_seconds,
            served.max_body_bytes, read_keys(served.api_keys, "QWEN_JAX_API_KEYS"), served.admin_port,
            served.admin_host, read_keys(served.admin_keys, "QWEN_JAX_ADMIN_KEYS"), served.log_format,
            otlp_endpoint=served.otlp_endpoint)
        self._balancer = Balancer([self._make(config)] * config.allowed(0), served.max_requests, served.stall_seconds)
        link = TrialLink(self._balancer)
        computed = config.engine.model_dump(include={"dtype", "fp8_enabled", "max_seq_len", "tp_size"})
        cache = config.cache
        parts = assemble(link, config.model, options, extension(link, cache.megabytes, cache.seconds, cache.redis_url,
                                                                computed, config.fraud))
        self._service, self.routes = parts.service, parts.app
        parts.app.get("/cluster")(self._state)
        await self._balancer.start()
        await self._open.enter_async_context(admin_port(parts, options))
        while not self._balancer.facts:
            if self._balancer.ended.is_set():
                why = self._balancer.refused or self._balancer.failure
                await self._balancer.stop()
                raise UserError(why)
            await asyncio.sleep(0.05)
        self._tending = asyncio.create_task(self._tend())

    async def _become(self, config: ClusterConfig) -> None:
        """What ``config`` says, or what was before, and why."""
        async with self._changing:
            self._problem, before = None, self._config
            try:
                if fixed := before.needs_restart(config):
                    raise UserError(f"{', '.join(fixed)} cannot change while the gateway runs: qwen-jax cluster down, "
                                    "then up")
                if config.model != before.model and config.server.name is None:
                    raise UserError("another model needs a name for clients that stays: server.name")
                make, drain_seconds = self._make(config), config.server.drain_seconds
                if not before.same_engines(config):
                    there = len(self._balancer.members)
                    fewer = min(config.allowed(there), there)  # first: successors need their devices
                    await resize(self._balancer, fewer, self._make(before), drain_seconds)
                    await replace_all(self._balancer, make, config.surge, drain_seconds)
                self._config = config
                await resize(self._balancer, config.allowed(len(self._balancer.members)), make, drain_seconds)
            except (UserError, ApiError) as error:
                self._problem = str(error)
                logger.error("the configuration stays as it was: %s", error)

    async def _state(self) -> dict[str, Any]:
        engines = [{"name": member.name, "ready": member.alive, "on_trial": member.on_trial,
                    "retiring": member.retiring, "requests": len(member.sent)} for member in self._balancer.members]
        return {"engines": engines, "changing": bool(self._change and not self._change.done()),
                "problem": self._problem}

    def _make(self, config: ClusterConfig) -> Any:
        engine = {**config.engine.model_dump(), "progress": False}
        process = {"log_format": config.server.log_format}
        return partial(RemoteLink, config.model, engine, config.server.max_requests, process, config.environment,
                       config.resources, config.hosts)

    async def _tend(self) -> None:
        """As many engines as there should be, also after some could not be started again."""
        scaler = None
        while True:
            await asyncio.sleep(TEND_SECONDS)
            if self._changing.locked():
                continue
            wanted = self._config.replicas
            if isinstance(wanted, Autoscaling):
                if scaler is None or scaler.options != wanted:
                    scaler = Autoscaler(wanted)
                there = sum(not member.retiring for member in self._balancer.members)
                wanted = scaler.wanted(time.monotonic(), self._balancer.requests, there)
            async with self._changing:
                try:
                    await resize(self._balancer, wanted, self._make(self._config), self._config.server.drain_seconds)
                except (UserError, ApiError) as error:
                    logger.error("the number of engines stays: %s", error)

    def check_health(self) -> None:
        """Serve starts another gateway when this raises."""
        if self._config is not None:
            self._service.check_health()

    async def __del__(self) -> None:
        if self._tending:
            self._tending.cancel()
        await self._open.aclose()
        if self._config is not None:
            await self._balancer.stop()


application = Gateway.bind()
