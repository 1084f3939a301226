"""A load balancer that makes several engines look like a single one.

It has the interface of an `EngineClient`, so a server uses it in the place of its link. Requests are routed by
`policies.choose`. A request that an engine has not begun can still move: `rebalance_load` moves requests ten times a
second, and those of an engine that dies go to the others. Clients notice neither, and no answer is computed twice,
because an engine itself reports which requests it has not begun. An answer of which pieces were sent is lost with its
engine. A request that has seen two engines die gets an error: it may be the cause. Engines that died are started again;
an engine that hangs is ended first.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from qwen_jax.cluster.routing.merged_metrics import merged_metrics, merged_stats
from qwen_jax.cluster.routing.policies import choose, worth_moving
from qwen_jax.cluster.routing.rebalance import rebalance_load
from qwen_jax.cluster.routing.replica import PendingRequest, Replica, text_blocks
from qwen_jax.errors import UserError
from qwen_jax.serving.ipc.engine_client import Answer, EngineClient
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.messages import Gauges, Ready, RequestOptions
from qwen_jax.serving.ipc.open_answers import OpenAnswers

logger = logging.getLogger(__name__)
REBALANCE_SECONDS = 0.1
POLL_SECONDS = 0.05
MAX_DEATHS = 2  # engine deaths after which a request is not sent again
RESTART_SECONDS, MAX_RESTART_SECONDS = 1.0, 30.0  # pause before an engine is started again; doubled each time
CALLS_ON_ALL = frozenset(("load_adapter", "unload_adapter", "update_weights", "rollback"))


class LoadBalancer:
    """Several engines (replicas), among which requests are distributed, behind the interface of one `EngineClient`.

    Args:
      make_links: for each replica, a function that makes a connection to a new engine, not yet started.
      max_requests: open answers of all replicas, above which more are refused with 429.
      stall_seconds: time without a step, with work, after which an engine is ended.

    Attributes:
      replicas: all replicas, whether alive, starting or retiring.
      ended: set when no engine is left and none is being started.
      refused: the first reason that an engine gave for not starting, or None.
      moved_requests: number of requests that moved to another replica while they waited.
    """

    def __init__(self, make_links: Sequence[Callable[[], EngineClient]], max_requests: int, stall_seconds: float = 60.0,
                 seed: int | None = None) -> None:
        self.open_answers, self._stall_seconds = OpenAnswers(max_requests), stall_seconds
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self.replicas = [self._new_replica(make_link) for make_link in make_links]
        self._rebalancing: asyncio.Task | None = None
        self.ended = asyncio.Event()
        self.refused: str | None = None
        self.moved_requests = 0
        self._adapters: dict[str, str] = {}
        # Arguments of the updates that made the current and the previous weights; () for the weights at the start.
        self._current_update: tuple = ()
        self._previous_update: tuple = ()

    async def start(self) -> None:
        for replica in self.replicas:
            await self._start(replica)
            replica.supervisor = asyncio.create_task(self._supervise(replica))
        self._rebalancing = asyncio.create_task(self._rebalance())

    async def stop(self) -> int:
        """End all engines; return the largest exit code."""
        for task in (self._rebalancing, *(replica.supervisor for replica in self.replicas)):
            if task:
                task.cancel()
        return max(await asyncio.gather(*(replica.link.stop() for replica in self.replicas)))

    # --- the interface of an EngineClient

    @property
    def facts(self) -> Ready | None:
        """Facts that the first live engine sent when it was ready, or None if no engine is alive."""
        return next((replica.link.facts for replica in self.replicas if replica.alive), None)

    @property
    def failure(self) -> str | None:
        """Reason why the first engine ended, if no engine is left and none is being started; else None."""
        if all(replica.link.failure for replica in self.replicas):
            return self.replicas[0].link.failure
        return None

    @property
    def gauges(self) -> Gauges:
        """Gauges of load (requests that run or wait, pages of the KV cache), summed over the live engines."""
        return Gauges.total(replica.link.gauges for replica in self.replicas if replica.alive)

    @property
    def requests(self) -> int:
        """Number of requests at all replicas that have not been answered completely."""
        return sum(len(replica.pending) for replica in self.replicas)

    def silent_seconds(self) -> float:
        """Return the longest time for which an engine has had work and sent nothing."""
        return max((replica.link.silent_seconds() for replica in self.replicas if replica.alive), default=0.0)

    def computes(self, adapter: str | None) -> str | None:
        """Return what `EngineClient.computes` returns if it is the same for all live engines, else None."""
        found = {replica.link.computes(adapter) for replica in self.replicas if replica.alive}
        return found.pop() if len(found) == 1 else None

    def check_alive(self) -> None:
        if not any(replica.alive for replica in self.replicas):
            self.replicas[0].link.check_alive()

    def generate(self, options: RequestOptions, answers: int) -> Answer:
        self.check_alive()
        answer = Answer(answers)
        self.open_answers.add(answer, answers)
        try:
            request = PendingRequest(options, text_blocks(options.prompt, options.adapter, options.cache_salt))
            self._send(self._choose(request), answer, request)
        except BaseException:
            self.open_answers.remove(answer)
            raise
        return answer

    def close(self, answer: Answer) -> None:
        self.open_answers.remove(answer)
        for replica in self.replicas:
            if replica.pending.pop(answer, None):
                replica.link.close(answer)
                return

    async def call(self, name: str, *arguments: Any, patient: bool = False) -> Any:
        """Run an engine's call by its name, such as ``tokenize``, on one engine and return the result.

        Calls that change adapters or weights, or ask for metrics or stats, run on all engines.
        """
        alive = [replica for replica in self.replicas if replica.alive]
        self.check_alive()
        if name in ("metrics", "stats"):
            results = await asyncio.gather(*(replica.link.call(name) for replica in alive))
            by_name = dict(zip((replica.name for replica in alive), results, strict=True))
            # In a thread, because parsing metrics takes milliseconds for each engine and streams should go on.
            return merged_stats(by_name) if name == "stats" else await asyncio.to_thread(merged_metrics, by_name)
        if name not in CALLS_ON_ALL:
            return await alive[0].link.call(name, *arguments, patient=patient)
        if any(replica.on_trial for replica in alive) and name in ("update_weights", "rollback"):
            raise ApiError(409, "other weights are on trial: end that first, with DELETE /admin/canary")
        return await self.call_all(alive, name, *arguments)

    async def call_all(self, replicas: Sequence[Replica], name: str, *arguments: Any) -> Any:
        """Change adapters or weights of the given replicas, one after another, and of all that are started later.

        When a replica refuses, the change is undone on those that have made it. Returns the last replica's result.
        """
        if name == "rollback" and not self._current_update and not self._previous_update:
            raise UserError("there is no other version of the weights to go back to")
        done: list[tuple[Replica, bool]] = []
        result = None
        try:
            for replica in replicas:
                had_previous = replica.has_previous
                result = await self._call_replica(replica, name, arguments)
                done.append((replica, had_previous))
        except (UserError, ApiError):
            for replica, had_previous in done:
                if name == "load_adapter":
                    await replica.link.call("unload_adapter", arguments[0])
                elif name in ("update_weights", "rollback"):
                    await replica.link.call("rollback")
                    replica.has_previous = had_previous and name == "rollback"
            raise
        match name:
            case "load_adapter":
                self._adapters[arguments[0]] = arguments[1]
            case "unload_adapter":
                self._adapters.pop(arguments[0], None)
            case "update_weights":
                self._current_update, self._previous_update = arguments, self._current_update
            case "rollback":
                self._current_update, self._previous_update = self._previous_update, self._current_update
        return result

    async def _call_replica(self, replica: Replica, name: str, arguments: Sequence[Any]) -> Any:
        """Run a call that changes adapters or weights on one engine, and return its result.

        A rollback to weights that this engine has never had becomes an update.
        """
        if name == "rollback" and not replica.has_previous:  # it was started later, or has tried others meanwhile
            name, arguments = "update_weights", self._previous_update or (replica.link.model, "finish_old", None)
        result = await replica.link.call(name, *arguments, patient=name == "update_weights")
        replica.has_previous = replica.has_previous or name == "update_weights"
        return result

    # --- routing

    def _choose(self, request: PendingRequest) -> Replica:
        """Choose the replica that is to answer a request: one with the weights that it asks for, else any.

        Raises:
          ApiError: no replica is alive.
        """
        on_trial = request.options.on_trial
        alive = [replica for replica in self.replicas if replica.alive]
        candidates = [replica for replica in alive if replica.on_trial == on_trial] or alive
        if not candidates:
            raise ApiError(503, "no engine is ready", retry_after=5)
        name = choose([replica.view() for replica in candidates], request.blocks, self._random)
        return next(replica for replica in candidates if replica.name == name)

    def _send(self, replica: Replica, answer: Answer, request: PendingRequest) -> None:
        replica.link.send(request.options, answer)
        replica.pending[answer] = request
        replica.prefix_index.add(request.blocks)

    async def _rebalance(self) -> None:
        """Run for ever: ten times a second, move waiting requests between replicas and end engines that hang."""
        moving: dict[Replica, asyncio.Task] = {}  # tasks, so that an engine that does not answer delays no other
        while True:
            await asyncio.sleep(REBALANCE_SECONDS)
            moving = {replica: task for replica, task in moving.items() if not task.done()}
            for replica in self.replicas:
                if replica.alive and replica.link.silent_seconds() > self._stall_seconds:
                    logger.error("%s makes no step: it is ended", replica.name)
                    replica.link.kill()
            alive = [replica for replica in self.replicas
                     if replica.alive and not replica.on_trial and replica not in moving]
            waiting = [min(replica.link.gauges.waiting, len(replica.pending)) for replica in alive]
            for source, target, count in rebalance_load(waiting):
                if alive[source] not in moving:
                    moving[alive[source]] = asyncio.create_task(self._move(alive[source], alive[target], count))

    async def _move(self, source: Replica, target: Replica | None, count: int) -> None:
        """Move up to ``count`` requests that ``source`` has not begun to other replicas.

        A request goes to ``target`` if it waits less there, else back to ``source``. If that replica no longer takes
        requests, it goes to the replica that `_choose` names.
        """
        try:
            answers = await source.link.withdraw(count)
        except ApiError:  # the engine has died meanwhile, and its requests are elsewhere
            return
        for answer in answers:
            if answer not in source.pending:  # its client has left
                continue
            request = source.pending.pop(answer)
            better = target and (not source.alive or worth_moving(source.view(), target.view(), request.blocks))
            destination = target if better else source
            try:
                if not destination.alive or destination.on_trial:
                    destination = self._choose(request)
            except ApiError as error:
                answer.fail(error)
                continue
            self._send(destination, answer, request)
            self.moved_requests += destination is not source

    # --- engines that die

    def _new_replica(self, make_link: Callable[[], EngineClient], ready: bool = True) -> Replica:
        return Replica(f"engine-{next(self._numbers)}", make_link, make_link(), ready)

    async def _start(self, replica: Replica) -> None:
        replica.link.lost = lambda answer: self._send_elsewhere(replica, answer)
        await replica.link.start()

    def _send_elsewhere(self, replica: Replica, answer: Answer) -> bool:
        """Send a dead engine's request to another replica, if nothing of its answer has arrived; return success."""
        request = replica.pending.pop(answer, None)
        if request is None or answer.begun or not any(other.alive for other in self.replicas if other is not replica):
            return False
        request = replace(request, deaths=request.deaths + 1)
        if request.deaths >= MAX_DEATHS:
            return False
        self._send(self._choose(request), answer, request)
        return True

    async def _supervise(self, replica: Replica) -> None:
        """Start a new engine whenever the replica's engine has ended.

        Returns, and gives the replica up, when an engine refuses its options or a first engine never gets ready.
        """
        pause = RESTART_SECONDS
        while True:
            await replica.link.ended.wait()
            self.refused = self.refused or replica.link.refused
            if replica.link.refused or (replica.link.facts is None and replica.ready):
                if self.failure:
                    self.ended.set()
                return
            logger.error("%s has ended: %s", replica.name, replica.link.failure)
            await replica.link.stop()
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_RESTART_SECONDS) if replica.link.facts is None else RESTART_SECONDS
            successor = self._new_replica(replica.make_link, ready=False)
            successor.supervisor, successor.retiring = replica.supervisor, replica.retiring
            self.replicas[self.replicas.index(replica)] = replica = successor
            await self._start(replica)
            await self._catch_up(replica)

    async def _catch_up(self, replica: Replica) -> None:
        """Wait until a new engine is ready and load the other engines' adapters and weights; end it if that fails."""
        while replica.link.facts is None and not replica.link.ended.is_set():
            await asyncio.sleep(POLL_SECONDS)
        try:
            if self._current_update:
                await replica.link.call("update_weights", *self._current_update, patient=True)
            for name, folder in self._adapters.items():
                await replica.link.call("load_adapter", name, folder)
            replica.ready = not replica.retiring
        except (UserError, ApiError) as error:
            if not replica.link.failure:
                logger.error("%s cannot be made like the others: %s", replica.name, error)
            replica.link.kill()

    # --- more engines, or fewer

    async def add(self, make_link: Callable[[], EngineClient]) -> Replica:
        """Start another engine. It gets requests once it has the adapters and weights of the others."""
        replica = self._new_replica(make_link, ready=False)
        self.replicas.append(replica)
        await self._start(replica)

        async def supervise() -> None:
            await self._catch_up(replica)
            await self._supervise(replica)

        replica.supervisor = asyncio.create_task(supervise())
        return replica

    async def retire(self, replica: Replica, seconds: float) -> None:
        """End an engine. Requests that it has not begun go to others at once, those that it has begun have ``seconds``
        to end, and the rest gets 503.

        Raises:
          UserError: it is the only engine that is alive.
        """
        if not any(other.alive for other in self.replicas if other is not replica) and replica.alive:
            raise UserError("the last engine that is ready cannot be ended: wait until another engine is ready")
        replica.ready, replica.retiring = False, True
        await self.drain(replica, seconds)
        for answer in list(replica.pending):
            answer.fail(ApiError(503, "the engine was ended before this answer was complete: try again"))
        await self.remove(replica)

    async def remove(self, replica: Replica) -> None:
        """End an engine at once. Its requests, if it still has any, are not answered."""
        replica.supervisor.cancel()
        self.replicas.remove(replica)
        await replica.link.stop()

    async def drain(self, replica: Replica, seconds: float) -> None:
        """Wait until a replica that gets no new requests has none left, for at most ``seconds``."""
        end = asyncio.get_running_loop().time() + seconds
        while replica.pending and not replica.link.failure and asyncio.get_running_loop().time() < end:
            if replica.link.facts is not None and replica.link.gauges.waiting:
                await self._move(replica, None, len(replica.pending))
            await asyncio.sleep(POLL_SECONDS)
