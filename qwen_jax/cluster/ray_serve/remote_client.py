"""A link to an engine on any node of a Ray cluster, of one process or of several."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qwen_jax.cluster.ray_serve.host import SILENCE, Host
from qwen_jax.serving.ipc.engine_client import Answer, EngineLink
from qwen_jax.serving.ipc.messages import Piece, frame
from qwen_jax.sockets import steady

logger = logging.getLogger(__name__)
PATIENCE_SECONDS = 60  # for devices, before it is said
END_SECONDS = 10  # for a process to end by itself


class RemoteLink(EngineLink):
    """
    Args:
      model, options, max_requests, process: see `EngineLink`.
      environment: of the engine's processes, beside what Ray gives them.
      resources: Ray's, of each process. hosts: how many processes.

    The engine's clock is another machine's: times that are sent and received are translated by what it said when it
    was ready, to within the time that this took to arrive.
    """

    def __init__(self, model: str, options: Mapping[str, Any], max_requests: int, process: Mapping[str, Any],
                 environment: Mapping[str, str], resources: Mapping[str, float], hosts: int = 1) -> None:
        super().__init__(model, options, max_requests, process)
        self._environment, self._resources, self._count = dict(environment), dict(resources), hosts
        self._hosts: list[Any] = []
        self._group: Any = None
        self._running: list[ray.ObjectRef] = []  # each the process's exit code
        self._writer: asyncio.StreamWriter | None = None
        self._ahead = 0.0  # seconds by which the engine's clock is ahead of this one's

    async def start(self) -> None:
        self._reading = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self._place()
            await self._connect()
        except (RayError, OSError) as error:
            self._fail(f"its process could not be started: {error}")
            return
        watching = [asyncio.create_task(self._watch(one)) for one in self._running]
        try:
            await self._read()
        finally:
            for task in watching:
                task.cancel()

    async def _place(self) -> None:
        """Waits for as many nodes and devices as it takes, which may have to be started first."""
        self._group = placement_group([self._resources] * self._count, strategy="PACK")
        ready = asyncio.wrap_future(self._group.ready().future())
        while not (await asyncio.wait((ready,), timeout=PATIENCE_SECONDS))[0]:
            logger.warning("an engine waits for %d x %s: ray status says what there is", self._count, self._resources)
        ready.result()
        for index in range(self._count):
            where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            self._hosts.append(Host.options(scheduling_strategy=where, **_as_options(self._resources)).remote())

    async def _connect(self) -> None:
        model, options, process = self._first
        leader, *others = self._hosts
        if others:
            address, port = await leader.free_port.remote()
            joins = [{**process, "join": [f"{address}:{port}", self._count, index]} for index in range(self._count)]
            self._running += [host.follow.remote([model, options, join], self._environment)
                              for host, join in zip(others, joins[1:], strict=True)]
            process = joins[0]
        address, port, token = await leader.listen.remote()
        self._running.append(leader.lead.remote(self._environment))
        self._reader, self._writer = await asyncio.open_connection(address, port, limit=1 << 24)
        steady(self._writer.get_extra_info("socket"), *SILENCE)
        self._writer.write(token + frame(model, options, process))

    async def _watch(self, running: ray.ObjectRef) -> None:
        """Without one of its processes, or Ray's process above it, there is no engine."""
        try:
            code = await running
            why = f"its process has ended with code {code}"
        except RayError as error:
            why = f"its process was lost: {type(error).__name__}"
        await asyncio.sleep(0.2)  # what it said last arrives first
        if not self.failure and not self.refused:
            self.failure = why
        self._writer.transport.abort()

    def send(self, options: Mapping[str, Any], answer: Answer) -> Answer:
        return super().send({**options, "arrived": options["arrived"] + self._ahead}, answer)

    def _take(self, message: list[Any]) -> None:
        if message[0] == "ready":
            self._ahead = message[1]["clock"] - time.monotonic()
        super()._take(message)

    def _deliver(self, piece: Piece) -> None:
        piece.times = tuple(one if one is None else one - self._ahead for one in piece.times)
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
                                              END_SECONDS)
            except (RayError, TimeoutError):
                pass
        for host in self._hosts:
            ray.kill(host)
        if self._group:
            remove_placement_group(self._group)
        return code


def _as_options(resources: Mapping[str, float]) -> dict[str, Any]:
    named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    found: dict[str, Any] = {"num_cpus": 0}
    for name, amount in resources.items():
        if name in named:
            found[named[name]] = amount
        else:
            found.setdefault("resources", {})[name] = amount
    return found
