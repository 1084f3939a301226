"""Tests of the response cache: keys, kept answers, shared computations, and Redis that is slow, away or garbled."""
import asyncio
import os
import random
import sys
import time
from collections import OrderedDict
from contextlib import asynccontextmanager, contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis_server import INSTALLED, RedisServer

from qwen_jax.cluster.response_cache import redis_store
from qwen_jax.cluster.response_cache.cache import (
    ENTRY_BYTES,
    LocalCache,
    ResponseCache,
    UncacheableAnswer,
    cache_key,
    cacheable,
)
from qwen_jax.cluster.response_cache.redis_store import RedisStore, pack, unpack
from qwen_jax.errors import UserError

REQUEST = dict(kind="completion", http=["sources", {"flag": False}], model="m", engine="weights 1", adapter="legal",
               options={"temperature": 0, "max_tokens": 8, "logit_bias": {"3": 1.0, "7": 2.0}}, tenant="a")
KEYS = [cache_key(**{**REQUEST, "options": [number]}) for number in range(200)]


def answer(key: bytes) -> bytes:
    return b"the answer to " + key * 4


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Computed:
    """Computations that return or raise their results one after the other, once ``go`` is set."""

    def __init__(self, *results, wait: bool = True) -> None:
        self.results, self.started, self.ended = list(results), 0, 0
        self.go = asyncio.Event()
        if not wait:
            self.go.set()

    async def __call__(self) -> bytes:
        result = self.results[self.started]
        self.started += 1
        try:
            await self.go.wait()
        finally:
            self.ended += 1
        if isinstance(result, BaseException):
            raise result
        return result


def run(work, *arguments):
    return asyncio.run(asyncio.wait_for(work(*arguments), 30))


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until(holds, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


# What is a hit.

@pytest.mark.parametrize("field, value", [
    ("kind", "chat"), ("model", "n"), ("engine", "weights 2"), ("adapter", ""), ("adapter", "other"),
    ("http", ["other sources", {"flag": False}]), ("http", ["sources", {"flag": True}]), ("options", {}),
    ("tenant", "b"), ("tenant", ""), *(("options", {**REQUEST["options"], "prompt": prompt}) for prompt in (
        [1, 2], [1, 2, 4], [12, 3], "1,2,3", [[1, 2, 3]])),
    ("options", {**REQUEST["options"], "max_tokens": 9}), ("options", {**REQUEST["options"], "seed": 1}),
    ("options", {**REQUEST["options"], "logit_bias": {"3": 2.0, "7": 1.0}}),
])
def test_every_part_of_a_request_changes_its_key(field, value):
    assert cache_key(**{**REQUEST, field: value}) != cache_key(**REQUEST)


def test_a_key_does_not_depend_on_the_order_of_fields_or_on_the_process():
    turned = {name: dict(reversed(value.items())) if isinstance(value, dict) else value
              for name, value in reversed(REQUEST.items())}
    turned["options"]["logit_bias"] = dict(reversed(REQUEST["options"]["logit_bias"].items()))
    assert cache_key(**turned) == cache_key(**REQUEST)
    assert cache_key(**REQUEST).hex() == "c217c8bc60f2d5296b82aca2cbfdff63d7554ebceab2467bab359ed4c2e4f61f"


values = st.recursive(st.none() | st.booleans() | st.integers(-2**63, 2**64 - 1) | st.floats(allow_nan=False)
                      | st.text(max_size=4) | st.binary(max_size=4),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner,
                                                                                  max_size=3), max_leaves=6)
requests = st.fixed_dictionaries({name: values for name in REQUEST})


def spelled(value) -> str:
    """Return a text that tells apart values that `==` does not, 1, 1.0 and true, with fields in order."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name!r}:{spelled(value[name])}" for name in sorted(value)) + "}"
    return "[" + ",".join(map(spelled, value)) + "]" if isinstance(value, list) else repr(value)


@settings(max_examples=100, deadline=None)
@given(requests, requests, st.sampled_from(sorted(REQUEST)))
def test_keys_are_equal_where_requests_are(one, other, same_but):
    for second in (other, {**one, same_but: other[same_but]}):
        assert (cache_key(**one) == cache_key(**second)) == (spelled(one) == spelled(second))


@pytest.mark.parametrize("prompt", ["\ud800", [2**64], [-2**63 - 1]])
def test_what_cannot_be_a_key_is_refused(prompt):
    with pytest.raises(UserError, match="must be encodable"):
        cache_key(**{**REQUEST, "options": {"prompt": prompt}})


def test_only_what_is_not_drawn_is_cacheable():
    assert cacheable("chat", {"temperature": 0}) and cacheable("completion", {"temperature": 0.0})
    assert all(cacheable(kind, {}) for kind in ("classify", "score", "embeddings"))
    for options in ({}, {"temperature": None}, {"temperature": 1e-9}, {"temperature": 1, "seed": 3}):
        assert not cacheable("completion", options)


# What is kept.

OPERATIONS = st.lists(st.tuples(st.just("get"), st.integers(0, 5), st.just(0)) |
                      st.tuples(st.just("put"), st.integers(0, 5), st.integers(0, 3 * ENTRY_BYTES)) |
                      st.tuples(st.just("wait"), st.integers(0, 6), st.just(0)), max_size=60)


@settings(max_examples=300, deadline=None)
@given(OPERATIONS, st.integers(0, 6 * ENTRY_BYTES))
def test_the_local_cache_does_what_a_plain_model_does(operations, room):
    clock, ttl = Clock(), 10.0
    cache = LocalCache(room, ttl, clock)
    model: OrderedDict[int, tuple[bytes, float]] = OrderedDict()
    for count, (name, key, size) in enumerate(operations):
        if name == "wait":
            clock.now += key
            for old in [key for key, (_, since) in model.items() if clock.now - since >= ttl]:
                del model[old]
        elif name == "put":
            value = count.to_bytes(2, "big") * (size // 2)
            cache.put(bytes([key]), value)
            model.pop(key, None)
            if len(value) + ENTRY_BYTES <= room:
                model[key] = value, clock.now
            while sum(len(value) + ENTRY_BYTES for value, _ in model.values()) > room:
                model.popitem(last=False)
        else:
            found = model.get(key)
            if found:
                model.move_to_end(key)
            assert cache.get(bytes([key])) == (found and found[0])
        assert len(cache) == len(model)
        assert cache.bytes == sum(len(value) + ENTRY_BYTES for value, _ in model.values()) <= room


def test_the_least_recently_used_goes_first_and_time_ends_all():
    async def work():
        clock = Clock()
        cache = ResponseCache(max_bytes=2 * (ENTRY_BYTES + 10), ttl_seconds=60, clock=clock)
        cache.put(b"a", bytes(10))
        cache.put(b"b", bytes(10))
        assert await cache.get(b"a") is not None
        cache.put(b"c", bytes(10))
        assert await cache.get(b"b") is None
        clock.now += 59.9
        assert await cache.get(b"a") is not None and await cache.get(b"c") is not None
        clock.now += 0.2
        assert await cache.get(b"a") is None and await cache.get(b"c") is None
        stats = cache.stats()
        assert (stats.hits_local, stats.misses, stats.entries, stats.bytes, stats.breaker) == (3, 3, 0, 0, "off")

    run(work)


@pytest.mark.parametrize("options", [{"max_bytes": -1}, {"ttl_seconds": 0}, {"ttl_seconds": float("nan")},
                                     {"ttl_seconds": float("inf")}])
def test_impossible_limits_are_refused(options):
    with pytest.raises(UserError, match="of the response cache must be"):
        ResponseCache(**options)


# Computed once.

def test_many_who_ask_at_once_are_answered_by_one_computation():
    async def work():
        cache, compute, other = ResponseCache(), Computed(b"one"), Computed(b"two", wait=False)
        asked = [asyncio.create_task(cache.get_or_compute(b"k", compute)) for _ in range(50)]
        await turns()
        assert await cache.get_or_compute(b"other", other) == b"two"
        compute.go.set()
        assert await asyncio.gather(*asked) == [b"one"] * 50
        assert await cache.get_or_compute(b"k", compute) == b"one" and compute.started == 1
        stats = cache.stats()
        assert (stats.misses, stats.shared, stats.hits_local, stats.entries) == (2, 49, 1, 2)

    run(work)


def test_a_caller_who_leaves_takes_nobody_along():
    async def work():
        cache, compute = ResponseCache(), Computed(b"one")
        asked = [asyncio.create_task(cache.get_or_compute(b"k", compute)) for _ in range(5)]
        await turns()
        asked[0].cancel()
        asked[3].cancel()
        await turns()
        compute.go.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(one, asyncio.CancelledError) for one in found] == [True, False, False, True, False]
        assert found[1] == found[2] == found[4] == b"one" and compute.started == 1

    run(work)


def test_a_computation_ends_when_the_last_caller_leaves_and_the_next_one_starts_anew():
    async def work():
        cache, compute = ResponseCache(), Computed(b"one", b"two")
        asked = [asyncio.create_task(cache.get_or_compute(b"k", compute)) for _ in range(3)]
        await turns()
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        late = asyncio.create_task(cache.get_or_compute(b"k", compute))
        await turns()
        assert (compute.started, compute.ended) == (2, 1)
        compute.go.set()
        assert await late == b"two" and not cache._running and not cache._tasks

    run(work)


def test_nobody_joins_a_computation_that_is_being_cancelled():
    async def work():
        cache, started, tidy = ResponseCache(), [], asyncio.Event()

        async def compute():
            started.append(len(started))
            try:
                await asyncio.sleep(0 if len(started) > 1 else 60)
            finally:
                if len(started) == 1:
                    await tidy.wait()
            return b"anew"

        gone = asyncio.create_task(cache.get_or_compute(b"k", compute))
        await turns()
        gone.cancel()
        await turns()
        assert await cache.get_or_compute(b"k", compute) == b"anew"
        tidy.set()
        await turns()
        assert not cache._tasks and not cache._running

    run(work)


@pytest.mark.parametrize("failure", [RuntimeError("out of luck"), asyncio.CancelledError(),
                                     UncacheableAnswer(b"cut short")])
def test_what_goes_wrong_for_one_is_computed_anew_by_another(failure):
    async def work():
        cache, compute = ResponseCache(), Computed(failure, b"good")
        asked = [asyncio.create_task(cache.get_or_compute(b"k", compute)) for _ in range(6)]
        await turns()
        compute.go.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert type(found[0]) is type(failure) and found[1:] == [b"good"] * 5
        assert compute.started == 2 and await cache.get(b"k") == b"good"
        assert (cache.stats().misses, cache.stats().shared) == (2, 4)

    run(work)


def test_nobody_waits_for_more_than_three_computations():
    async def work():
        cache, compute = ResponseCache(), Computed(*(RuntimeError(str(number)) for number in range(6)))
        asked = [asyncio.create_task(cache.get_or_compute(b"k", compute)) for _ in range(6)]
        await turns()
        for started in (1, 2, 6):
            assert compute.started == started
            compute.go.set()
            compute.go = asyncio.Event()
            await turns(10)
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert sorted(map(str, found)) == list("012345") and await cache.get(b"k") is None

    run(work)


def test_a_users_mistake_is_everybodys():
    async def work():
        cache, compute = ResponseCache(), Computed(UserError("no such label"), b"later")
        asked = [asyncio.create_task(cache.get_or_compute(b"k", compute)) for _ in range(4)]
        await turns()
        compute.go.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(one, UserError) for one in found) and compute.started == 1
        assert await cache.get_or_compute(b"k", compute) == b"later"  # it is not kept

    run(work)


def test_closing_ends_what_is_computed():
    async def work():
        cache, compute = ResponseCache(), Computed(b"one")
        asked = asyncio.create_task(cache.get_or_compute(b"k", compute))
        await turns()
        await cache.close()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert compute.ended == 1

    run(work)


# In Redis.

def test_only_what_was_packed_under_a_key_is_unpacked():
    key, other = KEYS[:2]
    secret, foreign = b"secret", pack(b"another", key, b"value")
    packed = pack(secret, key, b"value")
    assert unpack(secret, key, packed) == b"value" and unpack(secret, key, pack(secret, key, b"")) == b""
    assert unpack(secret, other, packed) is None and unpack(secret, key, foreign) is None
    assert all(unpack(secret, key, packed[:length]) is None for length in range(len(packed)))
    for place in range(len(packed)):
        flipped = bytearray(packed)
        flipped[place] ^= 1
        assert unpack(secret, key, bytes(flipped)) is None
    for wrong in (packed + b"x", None, packed.hex()):
        assert unpack(secret, key, wrong) is None


@pytest.mark.parametrize("secret", [None, "", "too short"])
def test_answers_are_kept_in_redis_only_under_a_secret(monkeypatch, secret):
    monkeypatch.delenv(redis_store.SECRET)
    if secret is not None:
        monkeypatch.setenv(redis_store.SECRET, secret)
    with pytest.raises(UserError, match="openssl"):
        RedisStore("redis://127.0.0.1")


@pytest.mark.parametrize("url, said", [("http://x", "scheme"), ("redis://x:y", "y"), ("", "scheme")])
def test_an_address_that_is_none_is_refused(url, said):
    with pytest.raises(UserError, match=said):
        RedisStore(url)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(UserError, match="pip install 'qwen-jax\\[redis\\]'"):
        RedisStore("redis://127.0.0.1")


@pytest.fixture(scope="module")
def module_server():
    if not INSTALLED:
        said = "redis-server is not installed: apt-get install redis-server"
        pytest.fail(said) if os.environ.get("QWEN_JAX_CI") else pytest.skip(said)
    found = RedisServer()
    yield found
    found.close()


@pytest.fixture
def server(module_server):
    module_server.client.flushall()
    yield module_server
    if module_server.process.poll() is not None:
        module_server.start()
    module_server.resume()


@contextmanager
def patience(lookup: float = 0.2, retry: float = 0.2, failures: int = 5):
    """Set the times, in seconds, and the number of failures after which Redis is skipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis_store, "LOOKUP_SECONDS", lookup)
        patch.setattr(redis_store, "RETRY_SECONDS", retry)
        patch.setattr(redis_store, "MAX_FAILURES", failures)
        yield


@asynccontextmanager
async def cache_of(url: str, ready: bool = True, max_bytes: int = 0, **options):
    """A process's cache; by default one that keeps nothing in memory, so that every lookup goes to Redis."""
    with patience(**options):
        cache = ResponseCache(max_bytes=max_bytes, redis=RedisStore(url))
        await cache.start()
        assert cache.stats().breaker == ("closed" if ready else "open")
        try:
            yield cache
        finally:
            await cache.close()


async def ask_all(cache: ResponseCache, keys=KEYS) -> float:
    """Ask for every key once, eight at a time, and check the answers. Return the longest time of a lookup, s."""
    longest = 0.0

    async def ask(share):
        nonlocal longest
        for key in share:
            async def compute(key=key):
                return answer(key)

            began = time.perf_counter()
            assert await cache.get_or_compute(key, compute) == answer(key)
            longest = max(longest, time.perf_counter() - began)

    await asyncio.gather(*(ask(keys[start::8]) for start in range(8)))
    return longest


async def write_all(cache: ResponseCache, keys=KEYS) -> None:
    await ask_all(cache, keys)
    await until(lambda: not cache._redis._waiting_bytes)


def test_two_processes_share_answers(server):
    async def work():
        async with cache_of(server.url) as one, cache_of(server.url, max_bytes=1 << 20) as two:
            await write_all(one)
            await ask_all(two)
            await ask_all(two)
            stats = two.stats()
            assert (stats.hits_redis, stats.hits_local, stats.misses) == (len(KEYS), len(KEYS), 0)
            assert one.stats().misses == len(KEYS) and one.stats().unwritten == stats.errors == stats.garbage == 0
            assert 3590 < server.client.ttl(redis_store._name(KEYS[0])) <= 3600

    run(work)


def test_an_answer_does_not_grow_younger_on_its_way_through_redis(server):
    async def work():
        clock = Clock()
        async with cache_of(server.url) as one:
            await write_all(one, KEYS[:1])
            server.client.pexpire(redis_store._name(KEYS[0]), 30_000)
            two = ResponseCache(redis=RedisStore(server.url), clock=clock)
            await two.start()
            assert await two.get(KEYS[0]) == answer(KEYS[0])
            clock.now += 29
            assert await two.get(KEYS[0]) is not None and two.stats().hits_local == 1
            clock.now += 1.1
            two._local.get(KEYS[0])
            assert two.stats().entries == 0
            await two.close()

    run(work)


def test_what_is_too_large_stays_in_its_process(server):
    async def work():
        large = bytes(redis_store.MAX_VALUE_BYTES)
        async with cache_of(server.url, max_bytes=1 << 20) as cache:
            cache.put(KEYS[0], large)
            assert await cache.get(KEYS[0]) == large
            assert cache.stats().unwritten == 1 and server.client.dbsize() == 0

    run(work)


def test_writes_that_wait_are_bounded(server, monkeypatch):
    monkeypatch.setattr(redis_store, "MAX_WAITING_BYTES", 1000)

    async def work():
        async with cache_of(server.url) as cache:
            for key in KEYS:
                cache.put(key, bytes(100))
            assert cache._redis._waiting_bytes <= 1000 and cache.stats().unwritten > len(KEYS) - 10
            await until(lambda: not cache._redis._waiting_bytes)
            assert server.client.dbsize() == len(KEYS) - cache.stats().unwritten > 0

    run(work)


def test_a_cancelled_lookup_leaves_nothing_behind_for_the_next(server):
    async def work():
        async with cache_of(server.url) as cache:
            await write_all(cache)
            for _ in range(20):
                tasks = {key: asyncio.create_task(cache.get(key)) for key in random.sample(KEYS, 20)}
                await turns(random.randrange(12))
                gone = random.sample(list(tasks), 10)
                for key in gone:
                    tasks.pop(key).cancel()
                for key, task in tasks.items():
                    assert await task == answer(key)
            assert cache.stats().errors == 0

    run(work)


def test_a_busy_process_does_not_take_itself_for_a_slow_redis(server):
    async def work():
        async with cache_of(server.url, lookup=0.02) as cache:
            await write_all(cache, KEYS[:10])
            for _ in range(5):
                tasks = [asyncio.create_task(cache.get(key)) for key in KEYS[:10]]
                await turns(6)  # they are on their way
                time.sleep(0.1)
                assert await asyncio.gather(*tasks) == [answer(key) for key in KEYS[:10]]
            assert cache.stats().errors == 0

    run(work)


def spoil(server, how: str) -> None:
    names = [redis_store._name(key) for key in KEYS]
    packed = [server.client.get(name) for name in names]
    assert all(packed)
    for number, name in enumerate(names):
        if how == "list":
            server.client.delete(name)
            server.client.rpush(name, "x")
            continue
        ours = packed[number]
        value = {"random": random.randbytes(200), "truncated": ours[:number % len(ours) or 1],
                 "swapped": packed[number - 1], "old format": b"QJR0" + ours[4:], "plain": answer(KEYS[number]),
                 "huge": bytes(1 << 20), "empty": b"", "flipped": ours[:-1] + bytes([ours[-1] ^ 1])}[how]
        server.client.set(name, value, px=60_000)


@pytest.mark.parametrize("how", ["random", "truncated", "swapped", "old format", "plain", "huge", "empty", "flipped",
                                 "list"])
def test_garbage_under_our_keys_is_a_miss_and_is_written_over(server, how):
    async def work():
        async with cache_of(server.url) as cache:
            await write_all(cache)
            spoil(server, how)
            await write_all(cache)
            stats = cache.stats()
            assert (stats.garbage, stats.misses, stats.breaker) == (len(KEYS), 2 * len(KEYS), "closed")
            await ask_all(cache)
            assert cache.stats().hits_redis == len(KEYS) and cache.stats().errors == 0

    run(work)


def test_a_value_without_an_end_is_not_ours(server):
    async def work():
        async with cache_of(server.url) as cache:
            await write_all(cache, KEYS[:1])
            server.client.persist(redis_store._name(KEYS[0]))
            assert await cache.get(KEYS[0]) is None

    run(work)


@pytest.mark.parametrize("stop, restart", [("kill", "start"), ("pause", "resume")])
def test_redis_may_go_and_come_back(server, stop, restart):
    async def work():
        async with cache_of(server.url, lookup=0.05) as cache:
            await write_all(cache)
            asked = asyncio.create_task(ask_all(cache))
            await asyncio.sleep(0.005)
            getattr(server, stop)()
            longest = await asked
            for _ in range(3):
                longest = max(longest, await ask_all(cache))
            assert longest < 0.5  # a budget, with much room for a busy machine
            assert cache.stats().breaker in ("open", "half-open")

            errors = cache.stats().errors
            began = time.perf_counter()
            for _ in range(20):
                await ask_all(cache)
            assert cache.stats().errors == errors, "a request has paid for a connection that is tried"
            assert time.perf_counter() - began < 10

            getattr(server, restart)()

            async def used():
                while cache.stats().breaker != "closed":
                    await cache.get(KEYS[0])
                    await asyncio.sleep(0.01)

            await asyncio.wait_for(used(), 10)
            await write_all(cache)
            hits = cache.stats().hits_redis
            await ask_all(cache)
            assert cache.stats().hits_redis - hits == len(KEYS)

    run(work)


def test_failures_that_are_not_in_a_row_do_not_add_up(server):
    async def work():
        async with cache_of(server.url, lookup=0.05, failures=3, retry=60) as cache:
            await write_all(cache, KEYS[:1])
            for round in range(5):
                server.pause()
                assert await cache.get(KEYS[0]) is None
                await until(lambda: cache.stats().breaker != "closed")
                server.resume()
                await until(lambda: cache.stats().breaker == "closed")
                assert await cache.get(KEYS[0]) == answer(KEYS[0])
                assert cache.stats().errors == round + 1

    run(work)


def test_redis_that_is_away_from_the_start_costs_nothing(server):
    async def work():
        server.kill()
        async with cache_of(server.url, ready=False) as cache:
            await ask_all(cache)
            assert cache.stats().errors == 0 and cache.stats().unwritten == len(KEYS)
            server.start()
            await until(lambda: cache._redis._usable())

    run(work)


def test_one_connection_is_tried_at_a_time_and_after_failures_not_at_once(server, monkeypatch):
    async def work():
        tried = 0
        server.pause()
        monkeypatch.setattr(redis_store, "CONNECT_SECONDS", 0.05)
        store = RedisStore(server.url)
        ping = store._reader.ping

        async def counted():
            nonlocal tried
            tried += 1
            await ping()

        monkeypatch.setattr(store._reader, "ping", counted)
        with patience(lookup=0.005, retry=0.3, failures=3):
            began = time.monotonic()
            while (seconds := time.monotonic() - began) < 1.0:
                assert await store.get(KEYS[0]) is None
                await asyncio.sleep(0.001)
            assert 3 <= tried <= 3 + seconds / 0.3 and store.errors == 0
            await store.close()

    run(work)


# Servers that are no Redis.

@asynccontextmanager
async def impostor(reply: bytes | None, wait: float = 0.0):
    """A server that connects and pings like Redis, so that it is used, and then sends ``reply`` or hangs up."""
    async def talk(reader, writer):
        try:
            while asked := await reader.read(1 << 16):
                greeting = b"+OK\r\n" * asked.count(b"SETINFO") + b"+PONG\r\n" * asked.count(b"PING")
                if not greeting:
                    await asyncio.sleep(wait)
                    if reply is None:
                        break
                writer.write(greeting or reply * max(1, asked.count(b"GETRANGE")))
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


NO_SUCH_KEY = b"$0\r\n\r\n:-2\r\n"
NONSENSE = {
    "too much": NO_SUCH_KEY + b":1\r\n", "too little": NO_SUCH_KEY[:6],
    "hangs up": None, "silence": b"", "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n", "bytes": b"\xff\x00" * 50,
    "half": b"$5\r\nab", "negative length": b"$-7\r\nx\r\n", "no length": b"$x\r\n", "integers": b":1\r\n" * 2,
    "errors": b"-ERR no\r\n" * 2, "loading": b"-LOADING\r\n" * 2, "lists": b"*1\r\n$1\r\na\r\n" * 2,
    "empty": b"+\r\n" * 2, "nothing": b"$-1\r\n" * 2, "long list": b"*100000000\r\n",
    "long string": b"$100000000000\r\n", "deep": b"*1\r\n" * 5000,
}


@pytest.mark.parametrize("reply", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_never_an_answer(reply, monkeypatch):
    monkeypatch.setattr(redis_store, "WRITE_SECONDS", 0.05)

    async def work():
        async with impostor(reply) as url, cache_of(url, lookup=0.05) as cache:
            assert await ask_all(cache, KEYS[:40]) < 1.0
            stats = cache.stats()
            assert (stats.misses, stats.hits_redis) == (40, 0) and stats.errors + stats.garbage > 0

    run(work)


def test_a_slow_redis_is_skipped():
    async def work():
        async with impostor(NO_SUCH_KEY, wait=0.3) as url, cache_of(url, lookup=0.05) as cache:
            for _ in range(5):
                assert await ask_all(cache, KEYS[:40]) < 0.5
            stats = cache.stats()
            assert stats.hits_redis == 0 and 0 < stats.errors < 80 and stats.breaker != "closed"

    run(work)


def test_a_lookup_that_waits_for_others_waits_no_longer():
    async def work():
        async with impostor(NO_SUCH_KEY, wait=0.3) as url, cache_of(url, lookup=0.4) as cache:
            await asyncio.gather(*map(cache.get, KEYS[:2 * redis_store.BATCH]))
            assert cache.stats().errors == redis_store.BATCH  # the second half, whose turn came after 0.3 s

    run(work)
