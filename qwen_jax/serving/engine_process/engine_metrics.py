"""Prometheus metrics of an engine; metrics that vLLM has too have its names, after the prefix ``qwen_jax_``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from qwen_kernels.page import PAGE

from qwen_jax.engine.api.stats import EngineStats
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.frontend.request import Request
from qwen_jax.errors import UserError
from qwen_jax.parallel.hardware import hardware_of
from qwen_jax.serving.http.http_metrics import PREFIX, SECONDS

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class _StatsMetric(NamedTuple):
    """A Prometheus metric that is computed from the engine's statistics whenever Prometheus reads the metrics.

    Attributes:
      kind: class of the metric: gauge or counter.
      name: name of the metric without the prefix ``qwen_jax_``.
      help: description of what it counts or measures.
      value: function that returns the number, or a dict of numbers by the value of ``label``.
    """

    kind: type[Metric]
    name: str
    help: str
    value: Callable[[EngineStats], Any]
    label: str | None = None


_GAUGE, _COUNTER = GaugeMetricFamily, CounterMetricFamily
_STATS_METRICS = (
    _StatsMetric(_GAUGE, "num_requests_running", "Requests that hold pages.", lambda s: s.running),
    _StatsMetric(_GAUGE, "num_requests_waiting", "Requests in the queue.", lambda s: s.waiting),
    _StatsMetric(_GAUGE, "kv_cache_usage_perc", "Share of the pages that requests hold, 1 for all.",
                 lambda s: s.pages_used / s.pages_total),
    _StatsMetric(_GAUGE, "kv_cache_pages_total", "Pages of the KV cache.", lambda s: s.pages_total),
    _StatsMetric(_GAUGE, "kv_cache_unused_slots_ratio",
                 "Share of the token slots of held pages that hold no token: fragmentation.",
                 lambda s: s.unused_slots / (PAGE * s.pages_used) if s.pages_used else 0.0),
    _StatsMetric(_COUNTER, "prefix_cache_queries",
                 "Tokens of admitted prompts that could have been found in the prefix cache.",
                 lambda s: PAGE * s.prefix_queries),
    _StatsMetric(_COUNTER, "prefix_cache_hits", "Tokens of admitted prompts that were found in the prefix cache.",
                 lambda s: PAGE * s.prefix_hits),
    _StatsMetric(_COUNTER, "num_preemptions", "Requests that gave their pages back and began again.",
                 lambda s: s.preemptions),
    _StatsMetric(_COUNTER, "prompt_tokens", "Tokens of prompts, found in the prefix cache or computed.",
                 lambda s: s.prompt_tokens),
    _StatsMetric(_COUNTER, "generation_tokens", "Tokens of answers.", lambda s: s.generated_tokens),
    _StatsMetric(_COUNTER, "request_success", "Answers that have ended.", lambda s: s.finished, "finished_reason"),
    _StatsMetric(_COUNTER, "requests_by_schedule", "Answers that have ended, by schedule.", lambda s: s.schedules,
                 "schedule"),
    _StatsMetric(_COUNTER, "spec_decode_num_draft_tokens", "Drafted tokens of speculation.",
                 lambda s: s.drafted_tokens),
    _StatsMetric(_COUNTER, "spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.",
                 lambda s: s.accepted_tokens),
    _StatsMetric(_GAUGE, "attention_density", "Pages that sparse attention has read, as a share of all.",
                 lambda s: s.sparse_density),
    _StatsMetric(_COUNTER, "fp8_fallbacks", "Rows that left the range of 8 bits, by layer.", lambda s: s.guard_trips,
                 "layer"),
    _StatsMetric(_GAUGE, "compiles_after_warmup", "XLA compilations since the warm-up: there should be none.",
                 lambda s: s.compiles_after_warmup),
    _StatsMetric(_GAUGE, "programs_to_come", "Programs that are still being compiled or loaded in the background.",
                 lambda s: s.programs_to_come),
    _StatsMetric(_GAUGE, "weight_version", "Version of the weights that new requests run with.",
                 lambda s: s.weight_version),
    _StatsMetric(_COUNTER, "steps", "Steps, by bucket.", lambda s: {b.bucket: b.steps for b in s.buckets}, "bucket"),
    _StatsMetric(_COUNTER, "step_seconds", "Time in steps, by bucket.",
                 lambda s: {b.bucket: b.seconds for b in s.buckets}, "bucket"),
    _StatsMetric(_COUNTER, "step_rows", "Rows of steps, by bucket.", lambda s: {b.bucket: b.rows for b in s.buckets},
                 "bucket"),
    _StatsMetric(_COUNTER, "device_busy_seconds", "Time in which the device had a step.", lambda s: s.device_seconds),
    _StatsMetric(_COUNTER, "device_idle_seconds", "Time in which the device waited for the host while there was work.",
                 lambda s: s.host_seconds),
    _StatsMetric(_COUNTER, "model_flops", "Operations that the answers needed; its rate over peak_flops is the MFU.",
                 lambda s: s.model_flops),
    _StatsMetric(_COUNTER, "model_bytes_read",
                 "Bytes of weights, keys and values that steps had to read; its limit is peak_bandwidth_bytes.",
                 lambda s: s.bytes_read),
)


class EngineMetrics:
    """Prometheus metrics of one engine: histograms of its requests, its statistics, and its devices' memory and load.

    Only the engine's thread may use it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)

        def histogram(name: str, help: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(PREFIX + name, help, buckets=buckets, registry=self._registry)

        self._first_token = histogram("time_to_first_token_seconds", "Time from arrival to the first token.")
        self._between = histogram("inter_token_latency_seconds", "Time between steps that gave a request tokens.")
        self._latency = histogram("e2e_request_latency_seconds", "Time from arrival to the end of an answer.")
        self._queued = histogram("request_queue_time_seconds", "Time from arrival to the first step.")
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._answer = histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)

    def had_tokens(self, seconds: float) -> None:
        """Add the seconds between two steps that gave the same request tokens to the inter-token latency histogram."""
        self._between.observe(seconds)

    def ended(self, request: Request) -> None:
        """Add the latency, queue time and token counts of a request that has ended to the histograms."""
        times, output = request.output.times, request.output
        self._latency.observe(times.ended - times.arrived)
        self._prompt.observe(len(output.prompt_token_ids))
        self._answer.observe(len(output.token_ids))
        if times.started is not None:
            self._queued.observe(times.started - times.arrived)
        if times.first_token is not None:
            self._first_token.observe(times.first_token - times.arrived)

    def text(self) -> bytes:
        """Return all metrics of the engine in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the current statistics and device figures as metrics. Prometheus' registry calls this at every read."""
        stats = self._engine.stats()
        for metric in _STATS_METRICS:
            value = metric.value(stats)
            if metric.label is None:
                yield metric.kind(PREFIX + metric.name, metric.help, value=value)
                continue
            family = metric.kind(PREFIX + metric.name, metric.help, labels=[metric.label])
            for label, number in value.items():
                family.add_metric([str(label)], number)
            yield family
        yield from _device_metrics(self._engine.plan.devices, str(self._engine.deployment.sharding.dtype),
                                   self._engine.precision.eight_bit)


def _device_metrics(count: int, dtype: str, eight_bit: bool) -> Iterator[Metric]:
    """Yield metrics of the first ``count`` devices: their summed peak rates, each one's memory and utilisation.

    Figures that are not known of a device are left out.
    """
    devices = jax.local_devices()[:count]
    try:
        hardware = hardware_of(devices[0].device_kind)
    except UserError:
        pass
    else:
        yield _GAUGE(PREFIX + "peak_flops", "Operations per second of all devices, by data sheet.",
                     value=count * hardware.peak(dtype, eight_bit))
        yield _GAUGE(PREFIX + "peak_bandwidth_bytes", "Bytes per second of all devices' memory, by data sheet.",
                     value=count * hardware.bandwidth)
    families = {name: _GAUGE(f"{PREFIX}device_{name}", help, labels=["device"]) for name, help in (
        ("memory_used_bytes", "Memory that the process uses."),
        ("memory_limit_bytes", "Memory that the process may use."),
        ("largest_free_block_bytes", "Largest free block: much less than the free memory where that is fragmented."),
        ("utilization_ratio", "Share of time in which a kernel ran, by NVML."))}
    names = {"bytes_in_use": "memory_used_bytes", "bytes_limit": "memory_limit_bytes",
             "largest_free_block_bytes": "largest_free_block_bytes"}
    for device in devices:
        for key, value in (device.memory_stats() or {}).items():
            if key in names:
                families[names[key]].add_metric([str(device.id)], value)
        busy = _utilization(device) if device.platform == "gpu" else None
        if busy is not None:
            families["utilization_ratio"].add_metric([str(device.id)], busy)
    yield from (family for family in families.values() if family.samples)


def _utilization(device: jax.Device) -> float | None:
    """Return the share of the last second in which a GPU ran a kernel; None where NVML does not tell."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.local_hardware_id)
        return pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except Exception:  # no library, no driver or no permission: the metric is left out
        return None
