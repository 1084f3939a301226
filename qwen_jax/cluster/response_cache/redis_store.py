"""Answers in Redis, for several processes. It may be slow, away, or hold nonsense: that costs a lookup its few
milliseconds at most, and never an answer.

Requests do not touch connections. A lookup is put in a list and waited for until its budget is spent; one task sends
all that have gathered as one pipeline, so a request that is cancelled cannot leave half a reply behind for the next
one. Connections are made and tried in the background, and lookups go only to one that works.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any

from qwen_jax.errors import UserError

logger = logging.getLogger(__name__)
FORMAT = b"QJR1"  # of a value: FORMAT, the key, a checksum of all the rest, the answer. Other formats do not verify.
CHECKSUM_BYTES = 16
MOST_BYTES = 1 << 18  # of a value: what a network moves within a lookup's budget. Larger answers stay in their process
MOST_WAITING_BYTES = 16 << 20  # to be written; what comes on top of that is not
BATCH = 32  # lookups, or writes, in one pipeline
CONNECT_SECONDS = 1.0
WRITE_SECONDS = 0.5  # for a batch, in the background
TURNS = 4  # of the event loop, from bytes in the socket to a reply


def pack(key: bytes, value: bytes) -> bytes:
    return b"".join((FORMAT, key, _checksum(key, value), value))


def unpack(key: bytes, packed: Any) -> bytes | None:
    """The value; None for anything that was not packed under this key."""
    start = len(FORMAT) + len(key)
    if not isinstance(packed, bytes) or packed[:start] != FORMAT + key:
        return None
    value = packed[start + CHECKSUM_BYTES:]
    return value if packed[start:start + CHECKSUM_BYTES] == _checksum(key, value) else None


def _checksum(key: bytes, value: bytes) -> bytes:
    checksum = blake2b(FORMAT, digest_size=CHECKSUM_BYTES)
    checksum.update(key)
    checksum.update(value)
    return checksum.digest()


def _name(key: bytes) -> bytes:
    return b"qwen-jax:response:" + key.hex().encode()


class RedisStore:
    """Used by one event loop.

    Args:
      url: redis://, rediss:// or unix://, as redis-py takes it.
      budget_seconds: what a lookup waits at most.
      failures: in a row, after which Redis is skipped.
      retry_seconds: for how long; then one connection is tried in the background, and so on.

    Attributes:
      errors: lookups without an answer. garbage: values that did not verify. unwritten: values that were not stored.

    Raises:
      UserError: redis-py is not installed, or the address is none.
    """

    def __init__(self, url: str, budget_seconds: float = 0.005, failures: int = 5, retry_seconds: float = 1.0) -> None:
        self._budget, self._most_failures, self._retry_seconds = budget_seconds, failures, retry_seconds
        # Two clients of one connection each: a large write does not make lookups wait.
        self._reader, self._writer = _client(url), _client(url)
        self._connected, self._failures, self._retry_at = False, 0, -math.inf
        self._asked: list[tuple[bytes, asyncio.Future]] = []
        self._waiting: list[tuple[bytes, bytes, int]] = []  # (name, packed, milliseconds)
        self._waiting_bytes = 0
        self._probing: asyncio.Task | None = None
        self._reading: asyncio.Task | None = None
        self._writing: asyncio.Task | None = None
        self.errors = self.garbage = self.unwritten = 0

    @property
    def breaker(self) -> str:
        """"closed", "open" or "half-open"."""
        return "closed" if self._connected else "half-open" if _running(self._probing) else "open"

    async def start(self) -> None:
        """Waits for the first connection, or until it has failed."""
        if not self._usable() and self._probing:
            await asyncio.wait([self._probing])

    async def close(self) -> None:
        if _running(self._writing):
            await asyncio.wait([self._writing], timeout=WRITE_SECONDS)
        tasks = [task for task in (self._probing, self._reading, self._writing) if _running(task)]
        self._connected, self._retry_at = False, math.inf
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in (self._reader, self._writer):
            with suppress(Exception):
                await client.aclose()

    async def get(self, key: bytes) -> tuple[bytes, float] | None:
        """The value and the seconds that it may still be kept for. None where there is none, or Redis does not say."""
        if not self._usable():
            return None
        future = asyncio.get_running_loop().create_future()
        self._asked.append((key, future))
        if not _running(self._reading):
            self._reading = asyncio.create_task(self._read())
        try:
            return await _within(self._budget, future)
        except TimeoutError:
            self.errors += 1
            return None

    def put(self, key: bytes, value: bytes, seconds: float) -> None:
        """Returns at once."""
        size = len(value) + len(FORMAT) + len(key) + CHECKSUM_BYTES
        if not self._connected or size > MOST_BYTES or self._waiting_bytes + size > MOST_WAITING_BYTES:
            self.unwritten += 1
            return
        self._waiting.append((_name(key), pack(key, value), math.ceil(seconds * 1000)))
        self._waiting_bytes += size
        if not _running(self._writing):
            self._writing = asyncio.create_task(self._write())

    def _usable(self) -> bool:
        if not self._connected and not _running(self._probing) and time.monotonic() >= self._retry_at:
            self._probing = asyncio.create_task(self._probe())
        return self._connected

    async def _probe(self) -> None:
        try:
            await _within(CONNECT_SECONDS, self._reader.ping())
            await _within(self._budget, self._reader.ping())  # connecting may take its time, lookups may not
        except Exception as error:
            self._fail(error)
            return
        if self._failures >= self._most_failures:
            logger.warning("the response cache uses Redis again")
        self._connected = True

    async def _read(self) -> None:
        while self._asked:
            asked, self._asked = self._asked[:BATCH], self._asked[BATCH:]
            asked = [(key, future) for key, future in asked if not future.done()]
            found = await self._fetch([key for key, _ in asked])
            for (_, future), value in zip(asked, found or [None] * len(asked)):
                if not future.done():
                    self.errors += found is None
                    future.set_result(value)

    async def _fetch(self, keys: Sequence[bytes]) -> list[tuple[bytes, float] | None] | None:
        """None when Redis failed."""
        if not keys or not self._connected:
            return None
        pipeline = self._reader.pipeline(transaction=False)
        for key in keys:
            pipeline.getrange(_name(key), 0, MOST_BYTES)  # a get that cannot bring more than this
            pipeline.pttl(_name(key))
        try:
            replies = await _within(self._budget, pipeline.execute(raise_on_error=False))
        except Exception as error:
            self._fail(error)
            self._usable()  # at once, in the background, unless there were too many failures
            return None
        self._failures = 0
        return [self._verified(*three) for three in zip(keys, replies[::2], replies[1::2])]

    def _verified(self, key: bytes, packed: Any, milliseconds: Any) -> tuple[bytes, float] | None:
        if packed == b"" and milliseconds == -2:  # there is no such key
            return None
        value = unpack(key, packed)
        if value is None or not isinstance(milliseconds, int):
            self.garbage += 1
            return None
        return (value, milliseconds / 1000) if milliseconds > 0 else None

    def _fail(self, error: Exception) -> None:
        was_connected, self._connected = self._connected, False
        self._failures += 1
        if self._failures < self._most_failures:
            return
        self._retry_at = time.monotonic() + self._retry_seconds
        if was_connected or self._failures == self._most_failures:
            logger.warning("the response cache goes on without Redis: %r", error)

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
            self.unwritten += await self._store(batch)
            self._waiting_bytes -= sum(len(packed) for _, packed, _ in batch)

    async def _store(self, batch: Sequence[tuple[bytes, bytes, int]]) -> int:
        """How many were not stored. Says nothing about lookups, which decide alone whether Redis is used."""
        if not self._connected:
            return len(batch)
        pipeline = self._writer.pipeline(transaction=False)
        for name, packed, milliseconds in batch:
            pipeline.set(name, packed, px=milliseconds)
        try:
            replies = await _within(WRITE_SECONDS, pipeline.execute(raise_on_error=False))
        except Exception:
            return len(batch)
        return sum(reply is not True for reply in replies)


def _client(url: str) -> Any:
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        raise UserError("a response cache in Redis needs redis-py: pip install redis") from error
    try:  # Timeouts are this file's. RESP2 connects without further questions.
        return Redis.from_url(url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=None,
                              socket_connect_timeout=CONNECT_SECONDS)
    except ValueError as error:
        raise UserError(f"the address of Redis cannot be used: {error}") from error


async def _within(seconds: float, awaitable: Awaitable[Any]) -> Any:
    """TimeoutError when it takes longer, by Redis's fault: a process that was busy, or kept from running, finds the
    reply and the end of the time together, and then the reply counts."""
    future = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait([future], timeout=seconds)
        for _ in range(TURNS):
            if not future.done():
                await asyncio.sleep(0)
        if not future.done():
            raise TimeoutError(f"no reply in {seconds * 1000:g} ms")
        return future.result()
    finally:
        if future.cancel():
            await asyncio.wait([future])


def _running(task: asyncio.Task | None) -> bool:
    return task is not None and not task.done()
