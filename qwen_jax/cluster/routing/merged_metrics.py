"""Metrics and statistics of several engines, merged so that they read like those of one engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from qwen_jax.engine.api.stats import merge_stats


def merged_metrics(texts: Mapping[str, bytes]) -> bytes:
    """Merge the metrics of several engines, each in Prometheus' text format, into one text.

    texts: by the name of the engine, which the label ``engine`` of its samples then says.
    """
    families: dict[str, Metric] = {}
    for engine, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [sample._replace(labels={"engine": engine, **sample.labels})
                               for sample in family.samples]
    registry = CollectorRegistry()
    registry.register(_Collected(families.values()))
    return generate_latest(registry)


class _Collected(Collector):
    """A Prometheus collector of metric families that are complete already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged_stats(stats: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Merge the statistics of several engines, given by engine name, field by field.

    Each engine's own statistics stand under ``engines``.
    """
    return {**merge_stats(list(stats.values())), "engines": dict(stats)}
