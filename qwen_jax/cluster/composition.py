"""Extension of a server by trials of new versions, the response cache and the routes that screen payments."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qwen_jax.cluster.canary.client import CanaryClient
from qwen_jax.cluster.canary.routes import canary_routes
from qwen_jax.cluster.fraud_routes import BATCH_PATH, SCREEN_PATH, fraud_routes, user_of
from qwen_jax.cluster.response_cache.cache import ResponseCache
from qwen_jax.cluster.response_cache.middleware import OPENAI_ROUTES, CachedRoute, CacheMiddleware
from qwen_jax.cluster.response_cache.redis_store import RedisStore
from qwen_jax.contents import package_digest
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.server import Extend, Extension

# Nothing is drawn where payments are judged, and all payments of an account get the same version.
FRAUD_ROUTES = {SCREEN_PATH: CachedRoute("fraud", deterministic=True, user_of=user_of),
                BATCH_PATH: CachedRoute("fraud batch", deterministic=True)}


def extension(link: CanaryClient, megabytes: float, seconds: float, redis_url: str | None, deciding: Any,
              fraud: bool = False) -> Extend:
    """Return a function that extends a server by trials of new versions, the response cache and payment screening.

    Args:
      link: connection to the server's engines.
      megabytes: memory of the response cache in this process; with 0 and without Redis there is no cache.
      seconds: time for which an answer is cached.
      redis_url: address of the cache's second level, or None.
      deciding: options of the server that may decide what a response says.
      fraud: true to add the routes that screen card payments.
    """
    redis = RedisStore(redis_url) if redis_url else None
    cache = ResponseCache(int(megabytes * 1e6), seconds, redis) if megabytes or redis else None

    def extend(service: Service) -> Extension:
        service.varies = lambda: None if link.running else link.promoted_adapter or ""
        admin, public = (canary_routes(service, link),), (fraud_routes(service, link),) if fraud else ()
        if cache is None:
            return Extension(admin=admin, public=public)
        middleware = partial(CacheMiddleware, service=service, cache=cache, http=[package_digest(), deciding],
                             routes=OPENAI_ROUTES | (FRAUD_ROUTES if fraud else {}), adapter_for=link.adapter_for)
        return Extension(inner=middleware, collectors=(CacheMetrics(cache),), admin=admin, public=public)

    return extend


class CacheMetrics(Collector):
    """Prometheus metrics of a response cache."""

    def __init__(self, cache: ResponseCache) -> None:
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        stats = self._cache.stats()
        lookups = CounterMetricFamily("qwen_jax_response_cache_requests", "Lookups, by where the answer was found.",
                                      labels=["result"])
        for result, count in (("local", stats.hits_local), ("redis", stats.hits_redis), ("shared", stats.shared),
                              ("miss", stats.misses)):
            lookups.add_metric([result], count)
        yield lookups
        yield CounterMetricFamily("qwen_jax_response_cache_errors", "Lookups to which Redis gave no answer in time.",
                                  value=stats.errors)
        yield CounterMetricFamily("qwen_jax_response_cache_garbage", "Values in Redis that did not verify.",
                                  value=stats.garbage)
        yield GaugeMetricFamily("qwen_jax_response_cache_bytes", "Memory of the answers in the process.",
                                value=stats.bytes)
