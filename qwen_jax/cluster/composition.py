"""What is added to a server here: trials of adapters, and the response cache that its command line asks for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qwen_jax.cluster.canary.client import TrialLink
from qwen_jax.cluster.canary.routes import trial_routes
from qwen_jax.cluster.fraud_routes import fraud_routes
from qwen_jax.cluster.response_cache.cache import ResponseCache
from qwen_jax.cluster.response_cache.middleware import Cached
from qwen_jax.cluster.response_cache.redis_store import RedisStore
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.server import Extend, Extension


def extension(link: TrialLink, megabytes: float, seconds: float, redis_url: str | None, identity: Any,
              fraud: bool = False) -> Extend:
    """
    Args:
      link: the server's.
      megabytes, seconds: how much the cache keeps in the process, and how long; no cache for 0 without Redis.
      redis_url: of the cache's second level; None for none.
      identity: what beside the weights decides answers, such as their element type.
      fraud: with the routes that screen card payments.
    """
    redis = RedisStore(redis_url) if redis_url else None
    cache = ResponseCache(int(megabytes * 1e6), seconds, redis) if megabytes or redis else None

    def extend(service: Service) -> Extension:
        service.varies = lambda: None if link.running else link.everybody_has or ""
        trials, routes = (trial_routes(service, link),), (fraud_routes(service),) if fraud else ()
        if cache is None:
            return Extension(admin=trials, public=routes)
        return Extension(partial(_cached, service, cache, identity), (CacheMetrics(cache),), trials, routes)

    return extend


def _cached(service: Service, cache: ResponseCache, identity: Any, app: Any) -> Cached:
    return Cached(app, service, cache, identity)


class CacheMetrics(Collector):
    def __init__(self, cache: ResponseCache) -> None:
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        stats = self._cache.stats()
        lookups = CounterMetricFamily("qwen_jax_response_cache_requests", "By what became of them.", labels=["result"])
        for result, count in (("local", stats.hits_local), ("redis", stats.hits_redis), ("shared", stats.shared),
                              ("miss", stats.misses)):
            lookups.add_metric([result], count)
        yield lookups
        yield CounterMetricFamily("qwen_jax_response_cache_errors", "Lookups to which Redis gave no answer in time.",
                                  value=stats.errors)
        yield CounterMetricFamily("qwen_jax_response_cache_garbage", "What Redis held and did not verify.",
                                  value=stats.garbage)
        yield GaugeMetricFamily("qwen_jax_response_cache_bytes", "Held in the process.", value=stats.bytes)
