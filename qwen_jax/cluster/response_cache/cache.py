"""Answers that were given before: kept by exact key, computed once when several ask at the same time.

Nothing here looks at what an answer says, and nothing is ever "similar": a key is a hash of everything that an answer
depends on, the weights' version among it, so a new version simply has other keys and what it left behind ages out.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

from qwen_jax.cluster.response_cache.redis_store import RedisStore
from qwen_jax.errors import UserError

PREFILL_ONLY = frozenset(("classify", "score", "embeddings"))
KEY_BYTES = 32
ENTRY_BYTES = 300  # of Python's objects for one entry, beside its value
Compute = Callable[[], Awaitable[bytes]]
_encode = msgspec.msgpack.Encoder(order="deterministic").encode


def cacheable(kind: str, options: Mapping[str, Any]) -> bool:
    """Whether the same request has the same answer: temperature 0, or nothing drawn at all (`PREFILL_ONLY`).

    A seed is not enough. A seeded draw repeats where logits repeat bit by bit, which is promised in float32 and in
    batch-invariant mode only; a greedy answer is *the* answer up to ties within rounding.

    Args:
      options: resolved ones. An unset temperature is the checkpoint's, so it does not count as 0.
    """
    return kind in PREFILL_ONLY or options.get("temperature") == 0


def key_of(*, kind: str, model: str, weight_version: Any, adapter: Any, prompt: Any, options: Any,
           tenant: str) -> bytes:
    """32 bytes that differ whenever one of the arguments does.

    Arguments are JSON values, encoded as MessagePack: every string and list carries its length, 1, 1.0, "1" and true
    differ, and the order of an object's fields does not matter.

    Args:
      kind: of request: "completion", "chat", "classify", "score" or "embeddings".
      weight_version: what names the weights, and how they are computed with (precision, selector), in every process
        that shares the cache. An engine's own counter starts at 0 in each, so with Redis it is not enough.
      adapter: None, or its name together with what changes when other weights are loaded under that name.
      prompt: text, token ids, or messages and tools, exactly as they go to the engine.
      options: everything else that changes the answer or its form; not priority, deadline, or who asks.
      tenant: whose answers these are; no other tenant is given them.

    Raises:
      UserError: a value that could not be sent to an engine either.
    """
    try:
        content = _encode((kind, model, weight_version, adapter, prompt, options, tenant))
    except (OverflowError, UnicodeEncodeError, RecursionError) as error:
        raise UserError(f"a value of the request cannot be used: {error}") from error
    return blake2b(content, digest_size=KEY_BYTES).digest()


class Unshared(bytes):
    """What ``compute`` returns for its own caller alone, neither kept nor shared: an answer that was cut short by a
    deadline, ended in an error, or came from other weights than its key says."""


@dataclass(frozen=True)
class CacheStats:
    """Counters since the start, and what is held now.

    Attributes:
      hits_local, hits_redis: answers found. misses: computed. shared: taken from a computation that was under way.
      errors: lookups to which Redis gave no answer in time. garbage: what it held under our keys and did not verify.
      unwritten: answers that did not reach Redis.
      breaker: "off" without Redis; "closed" while it is used, "open" while it is skipped, "half-open" while one
        connection is tried in the background.
      entries, bytes: held in this process.
    """

    hits_local: int
    hits_redis: int
    misses: int
    shared: int
    errors: int
    garbage: int
    unwritten: int
    breaker: str
    entries: int
    bytes: int


class LocalCache:
    """The most recently used values, as many as fit in ``max_bytes``; each for at most ``ttl_seconds``."""

    def __init__(self, max_bytes: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes, self._ttl_seconds, self._clock = max_bytes, ttl_seconds, clock
        self._entries: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()  # oldest use first; (value, end)
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, end = entry
        if self._clock() >= end:
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return value

    def put(self, key: bytes, value: bytes, seconds: float = math.inf) -> None:
        """seconds: for which it may still be kept, where it is older than this call."""
        if key in self._entries:
            self._remove(key)
        size = len(value) + ENTRY_BYTES
        if size > self._max_bytes:
            return
        self._entries[key] = value, self._clock() + min(self._ttl_seconds, seconds)
        self.bytes += size
        while self.bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))

    def _remove(self, key: bytes) -> None:
        self.bytes -= len(self._entries.pop(key)[0]) + ENTRY_BYTES


class _Flight:
    """One computation and how many wait for it."""

    def __init__(self, task: asyncio.Task[bytes]) -> None:
        self.task, self.waiting = task, 0

    @property
    def settled(self) -> bool:
        """Whether everybody who waited is answered by it."""
        if self.task.cancelled():
            return False
        if error := self.task.exception():
            return isinstance(error, UserError)
        return not isinstance(self.task.result(), Unshared)


class ResponseCache:
    """Used by one event loop.

    Args:
      max_bytes: kept in this process.
      ttl_seconds: after which an answer is forgotten, here and in Redis.
      redis: behind this process's own cache, shared by all that use the same server.

    Raises:
      UserError: a size or a time that cannot be.
    """

    def __init__(self, max_bytes: int = 256 << 20, ttl_seconds: float = 3600.0, redis: RedisStore | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        if max_bytes < 0 or not 0.001 <= ttl_seconds < 2**31:
            raise UserError("the response cache needs max_bytes of at least 0 and ttl_seconds of at least 0.001 and "
                            f"less than 2**31, not {max_bytes} and {ttl_seconds}")
        self._local, self._redis, self._ttl_seconds = LocalCache(max_bytes, ttl_seconds, clock), redis, ttl_seconds
        self._flights: dict[bytes, _Flight] = {}
        self._tasks: set[asyncio.Task] = set()
        self._hits_local = self._hits_redis = self._misses = self._shared = 0

    async def start(self) -> None:
        """Waits until Redis is there, or has shown that it is not; without this the first lookups miss."""
        if self._redis:
            await self._redis.start()

    async def close(self) -> None:
        """Cancels what is being computed, and writes to Redis what is waiting to be."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._redis:
            await self._redis.close()

    async def get(self, key: bytes) -> bytes | None:
        """For answers that cannot be shared while they are computed, such as streams; then ``put``."""
        if (value := self._in_memory(key)) is None and (value := await self._in_redis(key)) is None:
            self._misses += 1
        return value

    def at_hand(self, key: bytes) -> bytes | None:
        """An answer that this process has. None says nothing of Redis, and counts as nothing yet."""
        return self._in_memory(key)

    def put(self, key: bytes, value: bytes) -> None:
        """Returns at once; Redis is written to in the background."""
        self._local.put(key, value)
        if self._redis:
            self._redis.put(key, value, self._ttl_seconds)

    async def get_or_compute(self, key: bytes, compute: Compute) -> bytes:
        """The answer under this key; ``compute`` is awaited where there is none, once for all who ask meanwhile.

        Whoever is cancelled leaves alone: a computation ends when nobody waits for it any more. Its `UserError` is
        everybody's, because the same request is wrong for everybody. Any other exception, a cancellation from within
        and an `Unshared` answer are those of its first caller only; one of the others computes anew for the rest. Who
        has waited for two such computations goes on alone, so that none waits for more than three.
        """
        for _ in range(2):
            if (value := self._in_memory(key)) is not None:
                return value
            flight = self._flights.get(key)
            first = flight is None
            if first:
                flight = self._take_off(key, compute)
            await self._wait(key, flight)
            if first:
                return flight.task.result()
            if flight.settled:
                self._shared += 1
                return flight.task.result()
        return await self._compute(key, compute)

    def stats(self) -> CacheStats:
        redis = self._redis
        return CacheStats(self._hits_local, self._hits_redis, self._misses, self._shared,
                          redis.errors if redis else 0, redis.garbage if redis else 0, redis.unwritten if redis else 0,
                          redis.breaker if redis else "off", len(self._local), self._local.bytes)

    def _in_memory(self, key: bytes) -> bytes | None:
        value = self._local.get(key)
        self._hits_local += value is not None
        return value

    async def _in_redis(self, key: bytes) -> bytes | None:
        found = await self._redis.get(key) if self._redis else None
        if found is None:
            return None
        value, seconds = found
        self._local.put(key, value, seconds)
        self._hits_redis += 1
        return value

    async def _find(self, key: bytes, compute: Compute) -> bytes:
        found = await self._in_redis(key)
        return await self._compute(key, compute) if found is None else found

    async def _compute(self, key: bytes, compute: Compute) -> bytes:
        self._misses += 1
        value = await compute()
        if not isinstance(value, Unshared):
            self.put(key, value)
        return value

    def _take_off(self, key: bytes, compute: Compute) -> _Flight:
        """In a task of its own, which the first caller's cancellation does not reach."""
        task = asyncio.create_task(self._find(key, compute))
        flight = self._flights[key] = _Flight(task)
        self._tasks.add(task)

        def landed(_) -> None:
            self._tasks.discard(task)
            self._forget(key, flight)
            if not task.cancelled():
                task.exception()  # taken note of, also where nobody waits

        task.add_done_callback(landed)
        return flight

    async def _wait(self, key: bytes, flight: _Flight) -> None:
        flight.waiting += 1
        try:
            await asyncio.wait([flight.task])
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._forget(key, flight)  # nobody may join what is being cancelled
                flight.task.cancel()

    def _forget(self, key: bytes, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
