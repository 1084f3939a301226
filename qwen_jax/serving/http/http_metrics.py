"""Prometheus metrics of the HTTP process: its requests by route and status, and whether the engine is well."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.registry import Collector

from qwen_jax.serving.http.request_log import Exchange

disable_created_metrics()  # a gauge beside each counter, which dashboards do not use
PREFIX = "qwen_jax_"

# Histogram buckets, from the latencies of a stub to those of a long prompt on a CPU.
SECONDS = (.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .5, .75, 1, 2.5, 5, 10, 25, 60, 150)


class HttpMetrics:
    """Prometheus metrics of HTTP requests (count, duration, number open) and of whether the engine is well.

    Args:
      collectors: metrics of other packages, to show in the same text.
    """

    def __init__(self, collectors: Sequence[Collector] = ()) -> None:
        self._registry = CollectorRegistry()
        for collector in collectors:
            self._registry.register(collector)
        self._requests = Counter(PREFIX + "http_requests", "Answered requests, by route and status.",
                                 ["route", "status"], registry=self._registry)
        self._seconds = Histogram(PREFIX + "http_request_duration_seconds", "Time until the last byte was sent.",
                                  ["route"], buckets=SECONDS, registry=self._registry)
        self._open = Gauge(PREFIX + "http_requests_open", "Open requests, counted before they are tokenised.",
                           registry=self._registry)
        self._up = Gauge(PREFIX + "engine_up", "1 while the engine makes steps or has no work.",
                         registry=self._registry)

    def answered(self, exchange: Exchange) -> None:
        """Count an answered HTTP request by route and status, and its duration."""
        self._requests.labels(exchange.route, str(exchange.status)).inc()
        self._seconds.labels(exchange.route).observe(exchange.seconds)

    def text(self, requests: int, up: bool) -> bytes:
        """Return all metrics of the HTTP process in Prometheus' text format.

        Args:
          requests: number of requests that have not been answered completely.
          up: whether the engine is well.
        """
        self._open.set(requests)
        self._up.set(up)
        return generate_latest(self._registry)
