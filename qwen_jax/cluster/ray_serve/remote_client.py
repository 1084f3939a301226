"""A connection to an engine of one or several processes on nodes of a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
from msgspec.structs import replace
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qwen_jax.cluster.ray_serve.host import KEEPALIVE, Host
from qwen_jax.serving.ipc.engine_client import Answer, EngineClient
from qwen_jax.serving.ipc.messages import FromEngine, Piece, Ready, RequestOptions, frame
from qwen_jax.sockets import set_keepalive

logger = logging.getLogger(__name__)
DEVICE_WARNING_SECONDS = 60  # time without devices after which a warning is logged
EXIT_SECONDS = 10  # for a process to end by itself


class RemoteEngineClient(EngineClient):
    """A connection to an engine whose processes run under Ray actors, perhaps on other machines.

    The clock of the engine's machine differs from this one's. Times that are sent and received are translated by the
    time that the engine sent when it was ready, which is exact up to the time that this message took.

    Args:
      model: as for `EngineClient`.
      options: as for `EngineClient`.
      max_requests: as for `EngineClient`.
      process: as for `EngineClient`.
      environment: variables of the engine's processes, beside those that Ray sets.
      resources: Ray resources of each process.
      hosts: number of processes.
    """

    def __init__(self, model: str, options: Mapping[str, Any], max_requests: int, process: Mapping[str, Any],
                 environment: Mapping[str, str], resources: Mapping[str, float], hosts: int = 1) -> None:
        super().__init__(model, options, max_requests, process)
        self._environment, self._resources, self._processes = dict(environment), dict(resources), hosts
        self._hosts: list[Any] = []
        self._group: Any = None
        self._running: list[ray.ObjectRef] = []  # exit code of each process
        self._writer: asyncio.StreamWriter | None = None
        self._ahead = 0.0  # seconds by which the engine's clock is ahead of the clock here

    async def start(self) -> None:
        self._reading = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self._place()
            await self._connect()
        except (RayError, OSError) as error:
            self._fail(f"its process could not be started: {error}")
            return
        watching = [asyncio.create_task(self._watch(running)) for running in self._running]
        try:
            await self._read()
        finally:
            for task in watching:
                task.cancel()

    async def _place(self) -> None:
        """Wait until Ray has devices for the engine, and create an actor for each of its processes."""
        self._group = placement_group([self._resources] * self._processes, strategy="PACK")
        ready = asyncio.wrap_future(self._group.ready().future())
        while not (await asyncio.wait((ready,), timeout=DEVICE_WARNING_SECONDS))[0]:
            logger.warning("an engine waits for %d x %s: ray status shows what is free", self._processes,
                           self._resources)
        ready.result()
        for index in range(self._processes):
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            self._hosts.append(Host.options(scheduling_strategy=strategy, **_actor_options(self._resources)).remote())

    async def _connect(self) -> None:
        """Start the engine's processes and connect to the first of them."""
        launch = self._launch
        leader, *others = self._hosts
        if others:
            address, port = await leader.free_port.remote()
            launch, *launches = [replace(launch, join=(f"{address}:{port}", self._processes, index))
                                 for index in range(self._processes)]
            self._running += [host.follow.remote(following, self._environment)
                              for host, following in zip(others, launches, strict=True)]
        address, port, token = await leader.listen.remote()
        self._running.append(leader.lead.remote(self._environment))
        self._reader, self._writer = await asyncio.open_connection(address, port, limit=1 << 24)
        set_keepalive(self._writer.get_extra_info("socket"), *KEEPALIVE)
        self._writer.write(token + frame(launch))

    async def _watch(self, running: ray.ObjectRef) -> None:
        """Wait until a process of the engine, or its actor, ends; then end the connection, as the engine is lost."""
        try:
            code = await running
            reason = f"its process has ended with code {code}"
        except RayError as error:
            reason = f"its process was lost: {type(error).__name__}"
        await asyncio.sleep(0.2)  # for its last messages to arrive
        if not self.failure and not self.refused:
            self.failure = reason
        self._writer.transport.abort()

    def send(self, options: RequestOptions, answer: Answer) -> Answer:
        return super().send(replace(options, arrived=options.arrived + self._ahead), answer)

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Ready):
            self._ahead = message.clock - time.monotonic()
        super()._take(message)

    def _deliver(self, piece: Piece) -> None:
        piece.times = tuple(moment if moment is None else moment - self._ahead for moment in piece.times)
        super()._deliver(piece)

    def kill(self) -> None:
        for host in self._hosts:
            host.end.remote()
        if self._writer:
            self._writer.transport.abort()

    async def stop(self) -> int:
        self._reading.cancel()
        code = 1
        if self._writer:
            self._writer.close()
            try:
                code = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._running[-1].future())),
                                              EXIT_SECONDS)
            except (RayError, TimeoutError):
                pass
        for host in self._hosts:
            ray.kill(host)
        if self._group:
            remove_placement_group(self._group)
        return code


def _actor_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Return Ray resources, such as {"CPU": 4, "GPU": 8}, as keywords of an actor's ``options``."""
    keywords = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    options: dict[str, Any] = {"num_cpus": 0}
    for name, amount in resources.items():
        if name in keywords:
            options[keywords[name]] = amount
        else:
            options.setdefault("resources", {})[name] = amount
    return options
