"""Time lookups in the response cache, also while Redis is down, slow, or full of garbage.

    python scripts/bench/response_cache.py [--seconds 10] [--callers 4]

The first part does one lookup at a time. The second part has several callers, each with a pause of 1 ms between
lookups; all answers lie in Redis and none in this process. Redis fails after a quarter of the time and recovers after
three quarters. Times are those of all lookups after the failure began; the computation after a miss takes no time
here. redis-server, which has to be installed, runs on this machine and shares its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "cluster"))

import redis  # noqa: E402
from redis_server import RedisServer  # noqa: E402

from qwen_jax.cluster.response_cache.cache import CacheStats, ResponseCache, cache_key  # noqa: E402
from qwen_jax.cluster.response_cache.redis_store import RedisStore  # noqa: E402

KEYS = [cache_key(kind="completion", http=[], model="m", engine="w", adapter="", options=[number], tenant="")
        for number in range(1000)]
BAR_MS = 10


def answer(key: bytes) -> bytes:
    """Return the made-up answer that the cache should give for a key: the key repeated to 2 KiB."""
    return key * 64


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """Return the 50th and the 99th percentile of `seconds`, in ms."""
    cuts = statistics.quantiles(seconds, n=100)
    return cuts[49] * 1e3, cuts[98] * 1e3


async def cache_of(server: RedisServer, max_bytes: int) -> ResponseCache:
    """Start a response cache that keeps answers in the Redis server and up to `max_bytes` of them in this process."""
    cache = ResponseCache(max_bytes=max_bytes, redis=RedisStore(server.url))
    await cache.start()
    return cache


async def fill(server: RedisServer) -> None:
    """Empty Redis, then write the answers of all `KEYS` to it, slowly enough that no write is dropped."""
    server.client.flushall()
    cache = await cache_of(server, 0)
    for key in KEYS:
        cache.put(key, answer(key))
        await asyncio.sleep(0)
    await cache.close()
    assert server.client.dbsize() == len(KEYS), cache.stats()


async def single(server: RedisServer, count: int = 5000) -> None:
    """Time `count` lookups one after another: hits in this process, hits in Redis, and misses."""
    await fill(server)
    local, remote = await cache_of(server, 1 << 30), await cache_of(server, 0)
    for key in KEYS:
        local.put(key, answer(key))
    missing = [bytes(reversed(key)) for key in KEYS]
    print(f"{'one after the other':24}{'p50 ms':>10}{'p99 ms':>10}")
    for name, cache, keys in (("hit, in this process", local, KEYS), ("hit, in Redis", remote, KEYS),
                              ("miss, in both", remote, missing)):
        times = []
        for number in range(count):
            key = keys[number % len(keys)]
            began = time.perf_counter()
            value = await cache.get(key)
            times.append(time.perf_counter() - began)
            await asyncio.sleep(0)
            assert value == (None if keys is missing else answer(key)) or cache is remote
        print("{:24}{:10.4f}{:10.4f}".format(name, *percentiles(times)))
    print(f"in Redis: {remote.stats()}")
    await local.close()
    await remote.close()


class Stutter:
    """A thread that pauses Redis for 20 ms of every 25 ms."""

    def __init__(self, server: RedisServer) -> None:
        self._server, self._ended = server, threading.Event()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            self._server.pause()
            time.sleep(0.02)
            self._server.resume()
            time.sleep(0.005)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def spoil(port: int) -> None:
    """Damage all answers in the Redis at `port`: replace them by shortened values, other keys' values, and noise."""
    client = redis.Redis(port=port)
    names = client.keys()
    values = client.mget(names)
    pipeline = client.pipeline(transaction=False)
    for number, name in enumerate(names):
        pipeline.set(name, (values[number][:-1], values[number - 1], random.randbytes(2000))[number % 3], px=60_000)
    pipeline.execute()


def spoil_elsewhere(server: RedisServer) -> None:
    """Damage the server's answers with `spoil` in another process, so that its work does not delay the lookups."""
    process = multiprocessing.get_context("spawn").Process(target=spoil, args=(server.port,))
    process.start()
    process.join()
    assert process.exitcode == 0


async def load(server: RedisServer, seconds: float, callers: int, fail: Callable[[], None],
               recover: Callable[[], None]) -> tuple[list[float], int, int, CacheStats]:
    """Look up random keys for `seconds`; call `fail` at a quarter of this time and `recover` at three quarters.

    Returns seconds per lookup since the failure, the numbers of wrong answers and exceptions, and the cache's counters.
    """
    await fill(server)
    cache = await cache_of(server, 0)
    times: list[float] = []
    wrong = failed = 0
    began = time.perf_counter()

    async def caller() -> None:
        nonlocal wrong, failed
        while (start := time.perf_counter()) < began + seconds:
            key = random.choice(KEYS)

            async def compute(key: bytes = key) -> bytes:
                return answer(key)

            try:
                wrong += await cache.get_or_compute(key, compute) != answer(key)
            except Exception:
                failed += 1
            if start > began + seconds / 4:
                times.append(time.perf_counter() - start)
            await asyncio.sleep(0.001)

    async def events() -> None:
        await asyncio.sleep(seconds / 4)
        await asyncio.to_thread(fail)
        await asyncio.sleep(seconds / 2)
        await asyncio.to_thread(recover)

    await asyncio.gather(events(), *(caller() for _ in range(callers)))
    stats = cache.stats()
    await cache.close()
    return times, wrong, failed, stats


def nothing() -> None:
    pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help="for each state of Redis, with several callers")
    parser.add_argument("--callers", type=int, default=4)
    args = parser.parse_args()
    logging.disable()
    server = RedisServer()
    met = True
    try:
        asyncio.run(single(server))
        print(f"\n{f'{args.callers} callers':24}{'lookups':>9}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}"
              f"{'added p99':>11}{'wrong':>7}{'failed':>8}{'hits':>8}{'unanswered':>12}{'garbage':>9}")
        stutter = Stutter(server)
        normal = 0.0
        for name, fail, recover in (("normal", nothing, nothing), ("killed", server.kill, server.start),
                                    ("paused", server.pause, server.resume),
                                    ("20 ms of 25 paused", stutter.start, stutter.end),
                                    ("garbage", lambda: spoil_elsewhere(server), nothing),
                                    ("normal, again", nothing, nothing)):
            times, wrong, failed, stats = asyncio.run(load(server, args.seconds, args.callers, fail, recover))
            p50, p99 = percentiles(times)
            normal = normal or p99
            met &= not wrong and not failed and p99 - normal <= BAR_MS
            print(f"{name:24}{len(times):9,}{p50:9.3f}{p99:9.3f}{max(times) * 1e3:9.3f}{p99 - normal:+11.3f}{wrong:7}"
                  f"{failed:8}{stats.hits_redis:8,}{stats.errors:12,}{stats.garbage:9,}")
    finally:
        server.resume()
        server.close()
    print(f"no wrong answer, no failure, at most {BAR_MS} ms added at p99: {'met' if met else 'NOT MET'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
