"""The gateway of a cluster: a Ray Serve deployment with the server's routes, in front of engines on all nodes.

There is one gateway, because it alone knows what each engine has queued. It owns the engines, which end when it does.
Its configuration is Serve's ``user_config``. A change of it takes effect without a restart: new engines replace the old
ones one after another while requests flow.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from functools import partial
from typing import Any

import msgspec
from ray import serve

from qwen_jax.cluster.canary.client import CanaryClient
from qwen_jax.cluster.composition import extension
from qwen_jax.cluster.ray_serve.autoscaling import Autoscaler
from qwen_jax.cluster.ray_serve.config import Autoscaling, ClusterConfig, parse_config
from qwen_jax.cluster.ray_serve.remote_client import RemoteEngineClient
from qwen_jax.cluster.routing.load_balancer import LoadBalancer
from qwen_jax.cluster.routing.replica_set import replace_all, resize
from qwen_jax.errors import UserError
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.logs import set_up_logging
from qwen_jax.serving.server import assemble, process_options, serving_admin

logger = logging.getLogger(__name__)
SCALING_SECONDS = 1.0  # between two looks at the number of engines
MAX_OPEN = 1_000_000  # above the server's own limit, which answers with 429


def _front():
    """Return the ASGI application of the deployment, which calls the gateway's routes once they are there."""
    async def front(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await serve.get_replica_context().servable_object.routes(scope, receive, send)

    return front


@serve.deployment(name="Gateway", num_replicas=1, max_ongoing_requests=MAX_OPEN, health_check_period_s=5,
                  health_check_timeout_s=30, graceful_shutdown_timeout_s=330, ray_actor_options={"num_cpus": 0})
@serve.ingress(_front)
class Gateway:
    """The Ray Serve deployment that starts the engines and serves the HTTP routes in front of them.

    Ray Serve calls `reconfigure` with the first configuration and with every later one.
    """

    async def __init__(self) -> None:
        self._config: ClusterConfig | None = None
        self._scaling: asyncio.Task | None = None
        self._changing = asyncio.Lock()
        self._change: asyncio.Task | None = None
        self._problem: str | None = None
        self._admin = contextlib.AsyncExitStack()

    async def reconfigure(self, wanted: dict[str, Any]) -> None:
        """Start the engines of the first configuration and return once one is ready; change to later configurations.

        A change runs in the background while requests flow, and ``GET /cluster`` shows its state: Serve would end a
        gateway for which this method fails.
        """
        config = parse_config(wanted, "the configuration")
        if self._config is None:
            await self._begin(config)
            self._config = config
        else:
            self._change, before = asyncio.create_task(self._change_to(config)), self._change
            if before:
                before.cancel()

    async def _begin(self, config: ClusterConfig) -> None:
        """Start the engines and the HTTP routes of the first configuration; UserError when no engine can be made."""
        options = config.server
        set_up_logging(options.log_format)
        make_links = [self._link_maker(config)] * config.allowed(0)
        self._balancer = LoadBalancer(make_links, options.max_requests, options.stall_seconds)
        client = CanaryClient(self._balancer)
        extend = extension(client, deciding=options.deciding(), fraud=config.fraud,
                           **msgspec.structs.asdict(config.cache))
        applications = assemble(client, config.model, options, extend)
        self._service, self.routes = applications.service, applications.public
        self.routes.get("/cluster")(self._state)
        await self._balancer.start()
        await self._admin.enter_async_context(serving_admin(applications.admin, options))
        while not self._balancer.facts:
            if self._balancer.ended.is_set():
                why = self._balancer.refused or self._balancer.failure
                await self._balancer.stop()
                raise UserError(why)
            await asyncio.sleep(0.05)
        self._scaling = asyncio.create_task(self._scale())

    async def _change_to(self, config: ClusterConfig) -> None:
        """Replace or add engines until they are those of ``config``. A failure is logged and kept for `_state`."""
        async with self._changing:
            self._problem, before = None, self._config
            try:
                if fixed := before.needs_restart(config):
                    raise UserError(f"{', '.join(fixed)} cannot change while the gateway runs: qwen-jax cluster down, "
                                    "then up")
                if config.model != before.model and config.server.name is None:
                    raise UserError("another model needs a name for clients that stays: server.name")
                make_link, drain_seconds = self._link_maker(config), config.server.drain_seconds
                if not before.same_engines(config):
                    count = len(self._balancer.replicas)
                    fewer = min(config.allowed(count), count)  # first: successors need their devices
                    await resize(self._balancer, fewer, self._link_maker(before), drain_seconds)
                    await replace_all(self._balancer, make_link, config.surge, drain_seconds)
                self._config = config
                await resize(self._balancer, config.allowed(len(self._balancer.replicas)), make_link, drain_seconds)
            except (UserError, ApiError) as error:
                self._problem = str(error)
                logger.error("the configuration stays as it was: %s", error)

    async def _state(self) -> dict[str, Any]:
        """Return the state of each engine, and whether the last change of the configuration still runs or failed."""
        engines = [{"name": replica.name, "ready": replica.alive, "on_trial": replica.on_trial,
                    "retiring": replica.retiring, "requests": len(replica.pending)}
                   for replica in self._balancer.replicas]
        return {"engines": engines, "changing": bool(self._change and not self._change.done()),
                "problem": self._problem}

    def _link_maker(self, config: ClusterConfig) -> partial[RemoteEngineClient]:
        """Return a function that makes a connection to a new engine of a configuration."""
        return partial(RemoteEngineClient, config.model, config.engine.keywords(progress=False),
                       config.server.max_requests, process=process_options(config.server),
                       environment=config.environment, resources=config.resources, hosts=config.hosts)

    async def _scale(self) -> None:
        """Start or end engines, once a second, so that their number stays the configured or the autoscaler's."""
        scaler = None
        while True:
            await asyncio.sleep(SCALING_SECONDS)
            if self._changing.locked():
                continue
            wanted = self._config.replicas
            if isinstance(wanted, Autoscaling):
                if scaler is None or scaler.options != wanted:
                    scaler = Autoscaler(wanted)
                staying = sum(not replica.retiring for replica in self._balancer.replicas)
                wanted = scaler.wanted(time.monotonic(), self._balancer.requests, staying)
            async with self._changing:
                try:
                    await resize(self._balancer, wanted, self._link_maker(self._config),
                                 self._config.server.drain_seconds)
                except (UserError, ApiError) as error:
                    logger.error("the number of engines stays: %s", error)

    def check_health(self) -> None:
        """Raise when the engines have stopped or hang: Ray Serve then starts another gateway."""
        if self._config is not None:
            self._service.check_health()

    async def __del__(self) -> None:
        if self._scaling:
            self._scaling.cancel()
        await self._admin.aclose()
        if self._config is not None:
            await self._balancer.stop()


application = Gateway.bind()
