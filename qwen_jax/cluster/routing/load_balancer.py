"""Several engines that look like one: requests are routed, moved while they wait, and asked again elsewhere when an
engine dies.

It stands where a server has its one `EngineLink`. Requests go by `routing.choose`. What an engine has not begun can
still move: by `rebalance_load` ten times a second, and to the others when it dies; a client notices nothing, and no
answer is given twice, because an engine says itself which requests it has not begun. An answer of which pieces were
sent is lost with its engine, and so is a request at whose second engine the same happens: it may be what they die of.
Engines that died are started again, and one that hangs is ended first.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwen_jax.cluster.routing.merged_metrics import merged_metrics, merged_stats
from qwen_jax.cluster.routing.policies import choose, worth_moving
from qwen_jax.cluster.routing.rebalance import rebalance_load
from qwen_jax.cluster.routing.replica import Asked, Member, text_blocks
from qwen_jax.errors import UserError
from qwen_jax.serving.ipc.engine_client import Answer, EngineLink
from qwen_jax.serving.ipc.errors import ApiError

logger = logging.getLogger(__name__)
REBALANCE_SECONDS = 0.1
MOST_DEATHS = 2  # that a request may see
RESTART_SECONDS, LONGEST_RESTART_SECONDS = 1.0, 30.0  # before an engine is started again; doubled each time
EVERYWHERE = frozenset(("load_adapter", "unload_adapter", "update_weights", "rollback"))


class Balancer:
    """
    Args:
      makers: of every engine, each making a link to a new one that is not yet started.
      max_requests: open at once, of all of them.
      stall_seconds: without a step, with work, after which an engine is ended.
    """

    def __init__(self, makers: Sequence[Callable[[], EngineLink]], max_requests: int, stall_seconds: float = 60.0,
                 seed: int | None = None) -> None:
        self._max_requests, self._stall_seconds = max_requests, stall_seconds
        self._random = random.Random(seed)
        self._names = itertools.count()
        self.members = [self._member(make) for make in makers]
        self._rebalancing: asyncio.Task | None = None
        self.ended = asyncio.Event()
        self.refused: str | None = None
        self.moved = 0  # requests, while they waited
        self._adapters: dict[str, str] = {}
        # What made the current weights, and those before; () for those that every engine begins with.
        self._updates: tuple[tuple, tuple] = (), ()

    async def start(self) -> None:
        for member in self.members:
            await self._start(member)
            member.keeper = asyncio.create_task(self._keep_alive(member))
        self._rebalancing = asyncio.create_task(self._rebalance())

    async def stop(self) -> int:
        for task in (self._rebalancing, *(member.keeper for member in self.members)):
            if task:
                task.cancel()
        codes = await asyncio.gather(*(member.link.stop() for member in self.members))
        return max(codes)

    # --- as an EngineLink

    @property
    def facts(self) -> dict[str, Any] | None:
        return next((member.link.facts for member in self.members if member.alive), None)

    @property
    def failure(self) -> str | None:
        """Only when no engine is left, and none is being started."""
        if all(member.link.failure for member in self.members):
            return self.members[0].link.failure
        return None

    @property
    def gauges(self) -> dict[str, int]:
        """Sums over the engines."""
        found: dict[str, int] = {}
        for member in self.members:
            if member.alive:
                for name, value in member.link.gauges.items():
                    found[name] = found.get(name, 0) + value
        return found

    @property
    def requests(self) -> int:
        return sum(len(member.sent) for member in self.members)

    def silent_seconds(self) -> float:
        """Of the engine that has been silent longest."""
        return max((member.link.silent_seconds() for member in self.members if member.alive), default=0.0)

    def check_alive(self) -> None:
        if not any(member.alive for member in self.members):
            self.members[0].link.check_alive()

    def generate(self, options: Mapping[str, Any], answers: int) -> Answer:
        self.check_alive()
        if self.requests >= self._max_requests:
            raise ApiError(429, f"{self.requests} requests are queued or running: try again later", retry_after=1)
        answer = Answer(answers)
        asked = Asked(options, text_blocks(options["prompt"], options["adapter"]))
        self._send(self._choose(asked), answer, asked)
        return answer

    def close(self, answer: Answer) -> None:
        for member in self.members:
            if member.sent.pop(answer, None):
                member.link.close(answer)
                return

    async def call(self, name: str, *arguments: Any, patient: bool = False) -> Any:
        """Of one engine, or of all where all have to do it: one after another, and what some have done is undone when
        another refuses."""
        alive = [member for member in self.members if member.alive]
        self.check_alive()
        if name in ("metrics", "stats"):
            each = await asyncio.gather(*(member.link.call(name) for member in alive))
            merge = merged_metrics if name == "metrics" else merged_stats
            return merge(dict(zip((member.name for member in alive), each, strict=True)))
        if name not in EVERYWHERE:
            return await alive[0].link.call(name, *arguments, patient=patient)
        if any(member.on_trial for member in alive) and name in ("update_weights", "rollback"):
            raise ApiError(409, "other weights are on trial: end that first, with DELETE /admin/canary")
        return await self.tell_all(alive, name, *arguments)

    async def tell_all(self, members: Sequence[Member], name: str, *arguments: Any) -> Any:
        """Of each of these, and of those that come later; what one of them said. What has been done is undone when one
        of them refuses."""
        if name == "rollback" and self._updates == ((), ()):
            raise UserError("there is no other version of the weights to go back to")
        done: list[tuple[Member, bool]] = []
        value = None
        try:
            for member in members:
                had_previous = member.has_previous
                value = await self._tell(member, name, arguments)
                done.append((member, had_previous))
        except (UserError, ApiError):
            for member, had_previous in done:
                if name == "load_adapter":
                    await member.link.call("unload_adapter", arguments[0])
                elif name in ("update_weights", "rollback"):
                    await member.link.call("rollback")
                    member.has_previous = had_previous and name == "rollback"
            raise
        match name:
            case "load_adapter":
                self._adapters[arguments[0]] = arguments[1]
            case "unload_adapter":
                self._adapters.pop(arguments[0], None)
            case "update_weights":
                self._updates = arguments, self._updates[0]
            case "rollback":
                self._updates = self._updates[::-1]
        return value

    async def _tell(self, member: Member, name: str, arguments: Sequence[Any]) -> Any:
        if name == "rollback" and not member.has_previous:  # it came later, or tried others meanwhile
            name, arguments = "update_weights", self._updates[1] or (member.link.model, "finish_old", None)
        value = await member.link.call(name, *arguments, patient=name == "update_weights")
        member.has_previous = member.has_previous or name == "update_weights"
        return value

    # --- routing

    def _choose(self, asked: Asked) -> Member:
        """Of those that have the weights that are wanted, if one of them is alive. ApiError when none is at all."""
        on_trial = bool(asked.options.get("on_trial"))
        fitting = [member for member in self.members if member.alive and member.on_trial == on_trial]
        fitting = fitting or [member for member in self.members if member.alive]
        if not fitting:
            raise ApiError(503, "no engine is ready", retry_after=5)
        name = choose([member.view() for member in fitting], asked.blocks, self._random)
        return next(member for member in fitting if member.name == name)

    def _send(self, member: Member, answer: Answer, asked: Asked) -> None:
        member.link.send(asked.options, answer)
        member.sent[answer] = asked
        member.prefix.add(asked.blocks)

    async def _rebalance(self) -> None:
        moving: dict[Member, asyncio.Task] = {}  # an engine that does not answer holds up no other
        while True:
            await asyncio.sleep(REBALANCE_SECONDS)
            moving = {member: task for member, task in moving.items() if not task.done()}
            for member in self.members:
                if member.alive and member.link.silent_seconds() > self._stall_seconds:
                    logger.error("%s makes no step: it is ended", member.name)
                    member.link.kill()
            alive = [member for member in self.members
                     if member.alive and not member.on_trial and member not in moving]
            waiting = [min(member.link.gauges.get("waiting", 0), len(member.sent)) for member in alive]
            for source, target, count in rebalance_load(waiting):
                if alive[source] not in moving:
                    moving[alive[source]] = asyncio.create_task(self._move(alive[source], alive[target], count))

    async def _move(self, source: Member, target: Member | None, count: int) -> None:
        """Of what ``source`` has not begun, as much to ``target`` as waits less there; to any other for None."""
        try:
            answers = await source.link.withdraw(count)
        except ApiError:  # it has died meanwhile, and its requests are elsewhere
            return
        for answer in answers:
            if answer not in source.sent:  # its client has left
                continue
            asked = source.sent.pop(answer)
            better = target and (not source.alive or worth_moving(source.view(), target.view(), asked.blocks))
            to = target if better else source
            try:
                to = to if to.alive and not to.on_trial else self._choose(asked)
            except ApiError as error:
                answer.fail(error)
                continue
            self._send(to, answer, asked)
            self.moved += to is not source

    # --- engines that die

    def _member(self, make: Callable[[], EngineLink], ready: bool = True) -> Member:
        return Member(f"engine-{next(self._names)}", make, make(), ready)

    async def _start(self, member: Member) -> None:
        member.link.lost = lambda answer: self._lost(member, answer)
        await member.link.start()

    def _lost(self, member: Member, answer: Answer) -> bool:
        """Asks another engine, if nobody has seen anything of the answer."""
        asked = member.sent.pop(answer, None)
        if asked is None or answer.begun or not any(other.alive for other in self.members if other is not member):
            return False
        asked = replace(asked, deaths=asked.deaths + 1)
        if asked.deaths >= MOST_DEATHS:
            return False
        self._send(self._choose(asked), answer, asked)
        return True

    async def _keep_alive(self, member: Member) -> None:
        """Starts an engine anew whenever it has ended; the first ones are given up if they never get ready, and any
        that says why it cannot be."""
        wait = RESTART_SECONDS
        while True:
            await member.link.ended.wait()
            self.refused = self.refused or member.link.refused
            if member.link.refused or (member.link.facts is None and member.ready):
                if self.failure:
                    self.ended.set()
                return
            logger.error("%s has ended: %s", member.name, member.link.failure)
            await member.link.stop()
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_RESTART_SECONDS) if member.link.facts is None else RESTART_SECONDS
            new = self._member(member.make, ready=False)
            new.keeper, new.retiring = member.keeper, member.retiring
            self.members[self.members.index(member)] = member = new
            await self._start(member)
            await self._catch_up(member)

    async def _catch_up(self, member: Member) -> None:
        """What the others were told since they started."""
        while member.link.facts is None and not member.link.ended.is_set():
            await asyncio.sleep(0.05)
        try:
            if self._updates[0]:
                await member.link.call("update_weights", *self._updates[0], patient=True)
            for name, folder in self._adapters.items():
                await member.link.call("load_adapter", name, folder)
            member.ready = not member.retiring
        except (UserError, ApiError) as error:
            if not member.link.failure:
                logger.error("%s cannot be made like the others: %s", member.name, error)
            member.link.kill()

    # --- more engines, or fewer

    async def add(self, make: Callable[[], EngineLink]) -> Member:
        """Starts one more engine; it gets requests once it has what the others have."""
        member = self._member(make, ready=False)
        self.members.append(member)
        await self._start(member)

        async def keep() -> None:
            await self._catch_up(member)
            await self._keep_alive(member)

        member.keeper = asyncio.create_task(keep())
        return member

    async def retire(self, member: Member, seconds: float) -> None:
        """Ends an engine. What it has not begun goes to others at once, and what it has begun has ``seconds`` to end;
        the rest gets 503."""
        if not any(other.alive for other in self.members if other is not member) and member.alive:
            raise UserError("the last engine cannot be ended while others are not there yet")
        member.ready, member.retiring = False, True
        await self.drain(member, seconds)
        for answer in list(member.sent):
            answer.fail(ApiError(503, "the engine was ended before this answer had"))
        await self.forget(member)

    async def forget(self, member: Member) -> None:
        """An engine that has no requests, or none that anybody waits for."""
        member.keeper.cancel()
        self.members.remove(member)
        await member.link.stop()

    async def drain(self, member: Member, seconds: float) -> None:
        """Until an engine that gets no new requests has none, or for so long."""
        end = asyncio.get_running_loop().time() + seconds
        while member.sent and not member.link.failure and asyncio.get_running_loop().time() < end:
            if member.link.facts is not None and member.link.gauges.get("waiting"):
                await self._move(member, None, len(member.sent))
            await asyncio.sleep(0.05)
