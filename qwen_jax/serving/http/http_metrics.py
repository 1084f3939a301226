"""Prometheus metrics of the HTTP process."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

from qwen_jax.serving.http.request_log import Exchange

PREFIX = "qwen_jax_"

# From a stub's latencies to those of a long prompt on a CPU.
SECONDS = (.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .5, .75, 1, 2.5, 5, 10, 25, 60, 150)



class HttpMetrics:
    """Requests by route and status, counted by `Observed`."""

    def __init__(self, collectors: Sequence[Collector] = ()) -> None:
        self._registry = CollectorRegistry()
        for collector in collectors:
            self._registry.register(collector)
        self._requests = Counter(PREFIX + "http_requests", "Answered, by route and status.", ["route", "status"],
                                 registry=self._registry)
        self._seconds = Histogram(PREFIX + "http_request_duration_seconds", "Until the last byte was sent.", ["route"],
                                  buckets=SECONDS, registry=self._registry)
        self._open = Gauge(PREFIX + "http_requests_open", "That the engine has, counted before they are tokenised.",
                           registry=self._registry)
        self._up = Gauge(PREFIX + "engine_up", "1 while the engine makes steps or has no work.",
                         registry=self._registry)

    def answered(self, exchange: Exchange) -> None:
        self._requests.labels(exchange.route, str(exchange.status)).inc()
        self._seconds.labels(exchange.route).observe(exchange.seconds)

    def text(self, requests: int, up: bool) -> bytes:
        self._open.set(requests)
        self._up.set(up)
        return generate_latest(self._registry)
