"""A cache of answers by exact key, in which requests that arrive together are computed once.

Nothing here looks at what an answer says, and no two requests are "similar": a key is a hash of everything that an
answer depends on, of contents and not of names. Other weights have other keys, and old entries expire.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec
from cachetools import TLRUCache

from qwen_jax.cluster.response_cache.redis_store import RedisStore
from qwen_jax.errors import UserError

PREFILL_ONLY = frozenset(("classify", "score", "embeddings"))
KEY_BYTES = 32
ENTRY_BYTES = 300  # memory of an entry beside its value: Python objects
Compute = Callable[[], Awaitable[bytes]]
_encode = msgspec.msgpack.Encoder(order="deterministic").encode


def cacheable(kind: str, options: Mapping[str, Any]) -> bool:
    """Return true if the same request always has the same answer: temperature 0, or nothing drawn (`PREFILL_ONLY`).

    A seed is not enough. A seeded draw repeats where logits repeat bit by bit, which is promised in float32 and in
    batch-invariant mode only; a greedy answer is *the* answer up to ties within rounding.

    Args:
      kind: kind of request, as for `cache_key`.
      options: the options of the request itself. An unset temperature is the checkpoint's, so it does not count as 0.
    """
    return kind in PREFILL_ONLY or options.get("temperature") == 0


def cache_key(*, kind: str, http: Any, model: str, engine: str, adapter: str, options: Any, tenant: str) -> bytes:
    """Return a key of 32 bytes that differs whenever one of the arguments does.

    Arguments are JSON values, encoded as MessagePack: every string and list carries its length, 1, 1.0, "1" and true
    differ, and the order of an object's fields does not matter.

    Args:
      kind: kind of request: "completion", "chat", "classify", "score" or "embeddings".
      http: what makes a body of the engine's answer: a digest of this package's sources, and the server's options but
        for those in `serving.options.WITHOUT_INFLUENCE`.
      model: name of the model or adapter that the request asks for, which the body repeats.
      engine: digest of what computes the answer, as the engine's process reports it of what it has loaded: the contents
        of the checkpoint and of the adapter (matrices, rank, scale), tokenizer, chat template, generation defaults,
        and all that is in `engine.core.computation`: this package's sources, versions of jax and jaxlib, devices,
        instruction set, XLA flags, parallel plan, and the engine's options, such as element types, 8-bit parts, sparse
        attention, limits and batch invariance. A version's number starts at 0 in each process and is not enough.
      adapter: name of the adapter that answers, also for a request that names the model itself; "" for none.
      options: all other fields of the request's body, with the prompt; not priority, deadline or user.
      tenant: owner of the answer; other tenants do not get it.

    Raises:
      UserError: a value that cannot be encoded, and so could not be sent to an engine either.
    """
    try:
        content = _encode((kind, http, model, engine, adapter, options, tenant))
    except (OverflowError, UnicodeEncodeError, RecursionError) as error:
        raise UserError(f"values of the request must be encodable as MessagePack: {error}") from error
    return blake2b(content, digest_size=KEY_BYTES).digest()


class UncacheableAnswer(bytes):
    """An answer that ``compute`` returns for its own caller alone, to be neither kept nor shared: it was cut short by a
    deadline, ended in an error, or came from other weights than its key says."""


@dataclass(frozen=True)
class CacheStats:
    """Counters of a response cache since its start, and the size of its present contents.

    Attributes:
      hits_local: answers found in this process.
      hits_redis: answers found in Redis.
      misses: answers computed.
      shared: answers taken from a computation that another caller had started.
      errors: lookups to which Redis gave no answer in time.
      garbage: values in Redis under our keys that did not verify.
      unwritten: answers that were not written to Redis.
      breaker: "off" without Redis; "closed" while it is used, "open" while it is skipped, "half-open" while a
        connection is tried in the background.
      entries: number of answers in this process.
      bytes: memory of the answers in this process.
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
    """A cache of the most recently used answers that fit in ``max_bytes``, each for at most ``ttl_seconds``."""

    def __init__(self, max_bytes: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_seconds = ttl_seconds
        # Entries are (answer, seconds for which it is kept).
        self._entries = TLRUCache(max_bytes, ttu=lambda key, entry, now: now + entry[1], timer=clock,
                                  getsizeof=lambda entry: len(entry[0]) + ENTRY_BYTES)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        return self._entries.currsize

    def get(self, key: bytes) -> bytes | None:
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def put(self, key: bytes, value: bytes, seconds: float = math.inf) -> None:
        """Store an answer for ``ttl_seconds``, or for ``seconds`` if those are fewer: the rest of an older answer's."""
        self._entries.pop(key, None)
        with suppress(ValueError):  # larger than the cache
            self._entries[key] = value, min(self._ttl_seconds, seconds)


class _Computation:
    """A running computation of an answer, and the number of callers that wait for it."""

    def __init__(self, task: asyncio.Task[bytes]) -> None:
        self.task, self.waiting = task, 0

    @property
    def shareable(self) -> bool:
        """True if its result, an answer or a `UserError`, is meant for all callers and not only for the first."""
        if self.task.cancelled():
            return False
        if error := self.task.exception():
            return isinstance(error, UserError)
        return not isinstance(self.task.result(), UncacheableAnswer)


class ResponseCache:
    """A cache of answers in this process and, behind it, in Redis. It is used by one event loop.

    Args:
      max_bytes: memory for the answers kept in this process.
      ttl_seconds: age at which an answer is dropped, here and in Redis.
      redis: second level, shared by all processes that use the same Redis server.

    Raises:
      UserError: max_bytes or ttl_seconds is out of range.
    """

    def __init__(self, max_bytes: int = 256 << 20, ttl_seconds: float = 3600.0, redis: RedisStore | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        if max_bytes < 0:
            raise UserError(f"max_bytes of the response cache must be 0 or more, not {max_bytes}")
        if not 0.001 <= ttl_seconds < 2**31:
            raise UserError("ttl_seconds of the response cache must be at least 0.001 and less than 2**31, not "
                            f"{ttl_seconds}")
        self._local, self._redis, self._ttl_seconds = LocalCache(max_bytes, ttl_seconds, clock), redis, ttl_seconds
        self._running: dict[bytes, _Computation] = {}
        self._tasks: set[asyncio.Task] = set()
        self._hits_local = self._hits_redis = self._misses = self._shared = 0

    async def start(self) -> None:
        """Wait until Redis is connected, or has failed to. Without this call the first lookups miss."""
        if self._redis:
            await self._redis.start()

    async def close(self) -> None:
        """Cancel running computations and finish waiting writes to Redis."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._redis:
            await self._redis.close()

    async def get(self, key: bytes) -> bytes | None:
        """Return the cached answer under a key, from this process or Redis, or None.

        Meant for answers that callers cannot share while they are computed: the caller computes one and calls `put`.
        """
        if (value := self.get_local(key)) is None and (value := await self._get_from_redis(key)) is None:
            self._misses += 1
        return value

    def get_local(self, key: bytes) -> bytes | None:
        """Return the cached answer under a key from this process alone, or None, which is not counted as a miss."""
        value = self._local.get(key)
        self._hits_local += value is not None
        return value

    def put(self, key: bytes, value: bytes) -> None:
        """Store an answer under a key, in this process and, in the background, in Redis. Returns at once."""
        self._local.put(key, value)
        if self._redis:
            self._redis.put(key, value, self._ttl_seconds)

    async def get_or_compute(self, key: bytes, compute: Compute) -> bytes:
        """Return the answer under a key. If there is none, await ``compute``, once for all callers that wait meanwhile.

        A caller that is cancelled leaves the others waiting; the computation ends when no caller waits for it. Its
        `UserError` goes to all callers, because the same request is wrong for all of them. Any other exception, a
        cancellation from within and an `UncacheableAnswer` go to the first caller only, and another caller computes
        again for the rest. A caller that has waited for two such computations computes alone, so that none waits for
        more than three.
        """
        for _ in range(2):
            if (value := self.get_local(key)) is not None:
                return value
            computation = self._running.get(key)
            first = computation is None
            if first:
                computation = self._start(key, compute)
            await self._wait(key, computation)
            if first:
                return computation.task.result()
            if computation.shareable:
                self._shared += 1
                return computation.task.result()
        return await self._compute(key, compute)

    def stats(self) -> CacheStats:
        redis = self._redis
        return CacheStats(
            hits_local=self._hits_local, hits_redis=self._hits_redis, misses=self._misses, shared=self._shared,
            errors=redis.errors if redis else 0, garbage=redis.garbage if redis else 0,
            unwritten=redis.unwritten if redis else 0, breaker=redis.breaker if redis else "off",
            entries=len(self._local), bytes=self._local.bytes)

    async def _get_from_redis(self, key: bytes) -> bytes | None:
        found = await self._redis.get(key) if self._redis else None
        if found is None:
            return None
        value, seconds = found
        self._local.put(key, value, seconds)
        self._hits_redis += 1
        return value

    async def _find_or_compute(self, key: bytes, compute: Compute) -> bytes:
        value = await self._get_from_redis(key)
        return await self._compute(key, compute) if value is None else value

    async def _compute(self, key: bytes, compute: Compute) -> bytes:
        self._misses += 1
        value = await compute()
        if not isinstance(value, UncacheableAnswer):
            self.put(key, value)
        return value

    def _start(self, key: bytes, compute: Compute) -> _Computation:
        """Start to look up or compute an answer in a task, which goes on when its first caller is cancelled."""
        task = asyncio.create_task(self._find_or_compute(key, compute))
        computation = self._running[key] = _Computation(task)
        self._tasks.add(task)

        def ended(_) -> None:
            self._tasks.discard(task)
            self._forget(key, computation)
            if not task.cancelled():
                task.exception()  # marks it as retrieved, even if no caller waits

        task.add_done_callback(ended)
        return computation

    async def _wait(self, key: bytes, computation: _Computation) -> None:
        computation.waiting += 1
        try:
            await asyncio.wait([computation.task])
        finally:
            computation.waiting -= 1
            if not computation.waiting and not computation.task.done():
                self._forget(key, computation)  # no caller may join what is being cancelled
                computation.task.cancel()

    def _forget(self, key: bytes, computation: _Computation) -> None:
        if self._running.get(key) is computation:
            del self._running[key]
