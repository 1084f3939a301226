"""A store of cached answers in Redis, shared by several processes.

Redis may be slow, away, or hold nonsense: that costs a lookup a few milliseconds at most, and never an answer. Who can
write to it can make no answer: a value counts only with an HMAC under a secret that the servers share.

Requests do not touch connections. A lookup is put in a list and waits at most `LOOKUP_SECONDS`; one task sends all
lookups that have gathered as one pipeline, so a cancelled request cannot leave half a reply behind for the next lookup.
Connections are made and tried in the background, and lookups go only to a connection that works.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import os
import time
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import Any

from qwen_jax.errors import UserError

logger = logging.getLogger(__name__)
FORMAT = b"QJR2"  # a value is FORMAT, the key, the HMAC of all the rest, the answer; other formats do not verify
SECRET = "QWEN_JAX_CACHE_SECRET"  # environment variable with the key of the HMAC
MIN_SECRET_BYTES = 16
MAC_BYTES = 32
MAX_VALUE_BYTES = 1 << 18  # about what a network moves within LOOKUP_SECONDS; larger answers stay in their process
MAX_WAITING_BYTES = 16 << 20  # of values that wait to be written; further values are not written
BATCH = 32  # lookups, or writes, in one pipeline
LOOKUP_SECONDS = 0.005
CONNECT_SECONDS = 1.0
WRITE_SECONDS = 0.5  # for a batch, in the background
MAX_FAILURES = 5  # in a row, after which Redis is skipped for RETRY_SECONDS; then one connection is tried, and so on
RETRY_SECONDS = 1.0
LOOP_TURNS = 4  # turns of the event loop from bytes in the socket to a reply


def pack(secret: bytes, key: bytes, value: bytes) -> bytes:
    """Return the bytes to store in Redis for an answer: a mark of the format, the key, the HMAC and the answer."""
    return b"".join((FORMAT, key, _mac(secret, key, value), value))


def unpack(secret: bytes, key: bytes, packed: Any) -> bytes | None:
    """Return the answer in bytes read from Redis; None if `pack` did not make them, with this secret and this key."""
    start = len(FORMAT) + len(key)
    if not isinstance(packed, bytes) or packed[:start] != FORMAT + key:
        return None
    value = packed[start + MAC_BYTES:]
    return value if hmac.compare_digest(packed[start:start + MAC_BYTES], _mac(secret, key, value)) else None


def _mac(secret: bytes, key: bytes, value: bytes) -> bytes:
    return hmac.digest(secret, FORMAT + key + value, "sha256")


def _read_secret() -> bytes:
    """Return the key of the HMAC from the environment. UserError if it is missing or too short."""
    secret = os.environ.get(SECRET, "").encode()
    if len(secret) < MIN_SECRET_BYTES:
        raise UserError(f"{SECRET} must be {MIN_SECRET_BYTES} or more random bytes where answers are kept in Redis, "
                        f"the same for all servers that share them, not {len(secret)}: openssl rand -hex 32")
    return secret


def _name(key: bytes) -> bytes:
    return b"qwen-jax:response:" + key.hex().encode()


class RedisStore:
    """A store of cached answers in Redis, used by one event loop.

    Args:
      url: address that begins with redis://, rediss:// or unix://, as redis-py takes it.

    Attributes:
      errors: number of lookups without an answer in time.
      garbage: number of values that did not verify.
      unwritten: number of values that were not stored.

    Raises:
      UserError: redis-py is not installed, the address is invalid, or the environment has no secret.
    """

    def __init__(self, url: str) -> None:
        self._secret = _read_secret()
        # Two clients of one connection each: a large write does not make lookups wait.
        self._reader, self._writer = _client(url), _client(url)
        self._connected, self._failures, self._retry_at = False, 0, -math.inf
        self._lookups: list[tuple[bytes, asyncio.Future]] = []
        self._waiting: list[tuple[bytes, bytes, int]] = []  # (name, packed, milliseconds)
        self._waiting_bytes = 0
        self._probing: asyncio.Task | None = None
        self._reading: asyncio.Task | None = None
        self._writing: asyncio.Task | None = None
        self.errors = self.garbage = self.unwritten = 0

    @property
    def breaker(self) -> str:
        """State of the circuit breaker: "closed" while Redis is used, "open" while it is skipped, "half-open" while a
        connection is tried."""
        return "closed" if self._connected else "half-open" if _running(self._probing) else "open"

    async def start(self) -> None:
        """Wait until the first connection to Redis works or has failed."""
        if not self._usable() and self._probing:
            await asyncio.wait([self._probing])

    async def close(self) -> None:
        """Finish waiting writes, for at most WRITE_SECONDS, and close the connections to Redis."""
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
        """Return the answer under a key and the seconds until it expires; None if Redis has none or does not reply."""
        if not self._usable():
            return None
        future = asyncio.get_running_loop().create_future()
        self._lookups.append((key, future))
        if not _running(self._reading):
            self._reading = asyncio.create_task(self._read())
        try:
            return await _within(LOOKUP_SECONDS, future)
        except TimeoutError:
            self.errors += 1
            return None

    def put(self, key: bytes, value: bytes, seconds: float) -> None:
        """Store an answer under a key for ``seconds``. Returns at once; Redis is written to in the background."""
        size = len(value) + len(FORMAT) + len(key) + MAC_BYTES
        if not self._connected or size > MAX_VALUE_BYTES or self._waiting_bytes + size > MAX_WAITING_BYTES:
            self.unwritten += 1
            return
        self._waiting.append((_name(key), pack(self._secret, key, value), math.ceil(seconds * 1000)))
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
            await _within(LOOKUP_SECONDS, self._reader.ping())  # connecting may take its time, lookups may not
        except Exception as error:
            self._fail(error)
            return
        if self._failures >= MAX_FAILURES:
            logger.warning("the response cache uses Redis again")
        self._connected = True

    async def _read(self) -> None:
        while self._lookups:
            batch, self._lookups = self._lookups[:BATCH], self._lookups[BATCH:]
            batch = [(key, future) for key, future in batch if not future.done()]
            values = await self._fetch([key for key, _ in batch])
            for (_, future), value in zip(batch, values or [None] * len(batch)):
                if not future.done():
                    self.errors += values is None
                    future.set_result(value)

    async def _fetch(self, keys: Sequence[bytes]) -> list[tuple[bytes, float] | None] | None:
        """Read several keys from Redis: return the list of what `get` returns for each, or None if Redis failed."""
        if not keys or not self._connected:
            return None
        pipeline = self._reader.pipeline(transaction=False)
        for key in keys:
            pipeline.getrange(_name(key), 0, MAX_VALUE_BYTES)  # as a get, with a limit to the size of the reply
            pipeline.pttl(_name(key))
        try:
            replies = await _within(LOOKUP_SECONDS, pipeline.execute(raise_on_error=False))
        except Exception as error:
            self._fail(error)
            self._usable()  # at once, in the background, unless there were too many failures
            return None
        self._failures = 0
        return [self._verified(*lookup) for lookup in zip(keys, replies[::2], replies[1::2])]

    def _verified(self, key: bytes, packed: Any, milliseconds: Any) -> tuple[bytes, float] | None:
        if packed == b"" and milliseconds == -2:  # there is no such key
            return None
        value = unpack(self._secret, key, packed)
        if value is None or not isinstance(milliseconds, int):
            self.garbage += 1
            return None
        return (value, milliseconds / 1000) if milliseconds > 0 else None

    def _fail(self, error: Exception) -> None:
        was_connected, self._connected = self._connected, False
        self._failures += 1
        if self._failures < MAX_FAILURES:
            return
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if was_connected or self._failures == MAX_FAILURES:
            logger.warning("the response cache goes on without Redis: %r", error)

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
            self.unwritten += await self._store(batch)
            self._waiting_bytes -= sum(len(packed) for _, packed, _ in batch)

    async def _store(self, batch: Sequence[tuple[bytes, bytes, int]]) -> int:
        """Write a batch of (name, packed answer, milliseconds to live) to Redis; return how many were not stored.

        Failures here leave the circuit breaker as it is.
        """
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
        raise UserError("a response cache in Redis needs redis-py: pip install 'qwen-jax[redis]'") from error
    try:  # This file has its own timeouts. RESP2 connects without a handshake.
        return Redis.from_url(url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=None,
                              socket_connect_timeout=CONNECT_SECONDS)
    except ValueError as error:
        raise UserError(f"--redis-url must be an address such as redis://localhost: {error}") from error


async def _within(seconds: float, awaitable: Awaitable[Any]) -> Any:
    """Await a reply of Redis for at most ``seconds``; raise TimeoutError when it takes longer.

    A process that was busy, or kept from running, finds the reply and the end of the time together: then the reply
    counts, for which the event loop gets a few more turns.
    """
    future = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait([future], timeout=seconds)
        for _ in range(LOOP_TURNS):
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
