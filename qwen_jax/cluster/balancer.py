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
import hashlib
import itertools
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qwen_jax.cluster.figures import merged_metrics, merged_stats
from qwen_jax.cluster.rebalance import rebalance_load
from qwen_jax.cluster.routing import PrefixIndex, ReplicaView, choose, worth_moving
from qwen_jax.errors import UserError
from qwen_jax.serving.errors import ApiError
from qwen_jax.serving.link import Answer, EngineLink

logger = logging.getLogger(__name__)
REBALANCE_SECONDS = 0.1
MOST_DEATHS = 2  # that a request may see
BLOCK_BYTES, BYTES_PER_TOKEN = 256, 4  # of text: prompts are tokenised in the engines
REMEMBERED_BLOCKS = 50_000  # of each engine
RESTART_SECONDS = 1.0
EVERYWHERE = frozenset(("load_adapter", "unload_adapter", "update_weights", "rollback"))


@dataclass(frozen=True)
class _Asked:
    """What was asked, the prompt's blocks, and how many engines have died of it, or with it."""

    options: Mapping[str, Any]
    blocks: tuple[bytes, ...]
    deaths: int = 0


@dataclass(eq=False)
class Member:
    """One engine.

    Attributes:
      ready: it has what the others have: adapters, and weights that came later.
      sent: its open requests, by answer.
    """

    name: str
    link: EngineLink
    ready: bool = True
    prefix: PrefixIndex = field(default_factory=lambda: PrefixIndex(REMEMBERED_BLOCKS))
    sent: dict[Answer, _Asked] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        return self.ready and self.link.failure is None and self.link.facts is not None

    def view(self) -> ReplicaView:
        gauges = self.link.gauges
        waiting = [asked.blocks for answer, asked in self.sent.items() if not answer.begun]
        queued = min(len(waiting), max(len(self.sent) - gauges.get("running", 0), 0))
        tokens = sum(map(len, waiting)) * BLOCK_BYTES // BYTES_PER_TOKEN
        usage = gauges["pages_used"] / gauges["pages_total"] if gauges.get("pages_total") else 0.0
        return ReplicaView(self.name, tokens, queued, len(self.sent) - queued, usage, self.alive, self.prefix)


class Balancer:
    """
    Args:
      makers: of every engine, each making a link to a new one that is not yet started.
      max_requests: open at once, of all of them.
      stall_seconds: without a step, with work, after which an engine is ended.
    """

    def __init__(self, makers: Sequence[Callable[[], EngineLink]], max_requests: int, stall_seconds: float = 60.0,
                 seed: int | None = None) -> None:
        self._makers, self._max_requests, self._stall_seconds = makers, max_requests, stall_seconds
        self._random = random.Random(seed)
        self._names = itertools.count()
        self.members = [Member(f"engine-{next(self._names)}", make()) for make in makers]
        self._tasks: list[asyncio.Task] = []
        self.ended = asyncio.Event()
        self.refused: str | None = None
        self.moved = 0  # requests, while they waited
        self._adapters: dict[str, str] = {}
        self._updates: tuple[tuple, tuple] = (), ()  # what made the current weights, and those before; () for the first

    async def start(self) -> None:
        for place, member in enumerate(self.members):
            await self._start(member)
            self._tasks.append(asyncio.create_task(self._keep_alive(place)))
        self._tasks.append(asyncio.create_task(self._rebalance()))

    async def stop(self) -> int:
        for task in self._tasks:
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
        blocks = text_blocks(options["prompt"], options["adapter"])
        self._send(self._choose(blocks), answer, _Asked(options, blocks))
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
        done: list[Member] = []
        try:
            for member in alive:
                value = await member.link.call(name, *arguments, patient=patient)
                done.append(member)
        except (UserError, ApiError):
            undo = {"load_adapter": ("unload_adapter", arguments[:1]), "update_weights": ("rollback", ())}.get(name)
            for member in done if undo else ():
                await member.link.call(undo[0], *undo[1])
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

    # --- routing

    def _choose(self, blocks: tuple[bytes, ...]) -> Member:
        name = choose([member.view() for member in self.members], blocks, self._random)
        return next(member for member in self.members if member.name == name)

    def _send(self, member: Member, answer: Answer, asked: _Asked) -> None:
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
                    member.link.process.kill()
            alive = [member for member in self.members if member.alive and member not in moving]
            waiting = [min(member.link.gauges.get("waiting", 0), len(member.sent)) for member in alive]
            for source, target, count in rebalance_load(waiting):
                if alive[source] not in moving:
                    moving[alive[source]] = asyncio.create_task(self._move(alive[source], alive[target], count))

    async def _move(self, source: Member, target: Member, count: int) -> None:
        try:
            answers = await source.link.withdraw(count)
        except ApiError:  # it has died meanwhile, and its requests are elsewhere
            return
        for answer in answers:
            if answer not in source.sent:  # its client has left
                continue
            asked = source.sent[answer]
            better = not source.alive or worth_moving(source.view(), target.view(), asked.blocks)
            to = target if better else source
            del source.sent[answer]
            self._send(to if to.alive else self._choose(asked.blocks), answer, asked)
            self.moved += to is target

    # --- engines that die

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
        self._send(self._choose(asked.blocks), answer, asked)
        return True

    async def _keep_alive(self, place: int) -> None:
        """Starts an engine anew whenever it has ended; those that never get ready are given up."""
        while True:
            member = self.members[place]
            await member.link.ended.wait()
            if member.link.facts is None:
                self.refused = self.refused or member.link.refused
                if self.failure or self.refused:
                    self.ended.set()
                return
            logger.error("%s has ended: %s", member.name, member.link.failure)
            await member.link.stop()
            await asyncio.sleep(RESTART_SECONDS)
            self.members[place] = new = Member(f"engine-{next(self._names)}", self._makers[place](), ready=False)
            await self._start(new)
            try:
                await self._catch_up(new)
            except (UserError, ApiError) as error:
                logger.error("%s cannot be made like the others: %s", new.name, error)
                new.link.process.kill()

    async def _catch_up(self, member: Member) -> None:
        """What the others were told since they started."""
        while member.link.facts is None and not member.link.ended.is_set():
            await asyncio.sleep(0.05)
        if self._updates[0]:
            await member.link.call("update_weights", *self._updates[0], patient=True)
        for name, folder in self._adapters.items():
            await member.link.call("load_adapter", name, folder)
        member.ready = True


def text_blocks(prompt: Any, adapter: str | None) -> tuple[bytes, ...]:
    """Keys of a prompt's full blocks, as `routing.block_hashes` makes them of tokens: here of text, or of what stands
    for it. The adapter decides what may be shared, too."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, sort_keys=True)
    content, before, keys = text.encode("utf-8", "replace"), repr(adapter).encode(), []
    for start in range(0, len(content) - BLOCK_BYTES + 1, BLOCK_BYTES):
        before = hashlib.blake2b(before + content[start:start + BLOCK_BYTES], digest_size=16).digest()
        keys.append(before)
    return tuple(keys)
