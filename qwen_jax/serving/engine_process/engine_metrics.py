"""What Prometheus is told, under the names of the field: of the engine in its process, of HTTP in the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from qwen_kernels.attention import PAGE

from qwen_jax.engine.api.stats import EngineStats
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.frontend.request import Request
from qwen_jax.errors import UserError
from qwen_jax.parallel.hardware import hardware_of
from qwen_jax.serving.http.http_metrics import PREFIX, SECONDS

disable_created_metrics()  # a gauge beside each counter, which nobody reads
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class _Figure(NamedTuple):
    """A metric that is read off the engine's counters. ``value`` gives a number, or numbers by the label's value."""

    kind: type[Metric]
    name: str
    text: str
    value: Callable[[EngineStats], Any]
    label: str | None = None


_GAUGE, _COUNTER = GaugeMetricFamily, CounterMetricFamily
_FIGURES = (
    _Figure(_GAUGE, "num_requests_running", "Requests that hold pages.", lambda s: s.running),
    _Figure(_GAUGE, "num_requests_waiting", "Requests in the queue.", lambda s: s.waiting),
    _Figure(_GAUGE, "kv_cache_usage_perc", "Pages held by requests, 1 for all.",
            lambda s: s.pages_used / s.pages_total),
    _Figure(_GAUGE, "kv_cache_pages_total", "Pages of the KV cache.", lambda s: s.pages_total),
    _Figure(_GAUGE, "kv_cache_unused_slots_ratio", "Token slots of held pages that hold no token: fragmentation.",
            lambda s: s.unused_slots / (PAGE * s.pages_used) if s.pages_used else 0.0),
    _Figure(_COUNTER, "prefix_cache_queries", "Tokens of admitted prompts that could have been found in the cache.",
            lambda s: PAGE * s.prefix_queries),
    _Figure(_COUNTER, "prefix_cache_hits", "Tokens that were found in it.", lambda s: PAGE * s.prefix_hits),
    _Figure(_COUNTER, "num_preemptions", "Requests that gave their pages back and began again.",
            lambda s: s.preemptions),
    _Figure(_COUNTER, "prompt_tokens", "Tokens of prompts, found or computed.", lambda s: s.prompt_tokens),
    _Figure(_COUNTER, "generation_tokens", "Tokens of answers.", lambda s: s.generated_tokens),
    _Figure(_COUNTER, "request_success", "Answers that have ended.", lambda s: s.finished, "finished_reason"),
    _Figure(_COUNTER, "requests_by_schedule", "Answers that have ended, by schedule.", lambda s: s.schedules,
            "schedule"),
    _Figure(_COUNTER, "spec_decode_num_draft_tokens", "Guessed tokens.", lambda s: s.drafted_tokens),
    _Figure(_COUNTER, "spec_decode_num_accepted_tokens", "Guessed tokens that were right.",
            lambda s: s.accepted_tokens),
    _Figure(_GAUGE, "attention_density", "Pages that sparse attention has read, as a share of all.",
            lambda s: s.sparse_density),
    _Figure(_COUNTER, "fp8_fallbacks", "Rows that left the range of 8 bits, by layer.", lambda s: s.guard_trips,
            "layer"),
    _Figure(_GAUGE, "compiles_after_warmup", "XLA compilations since the warm-up: there should be none.",
            lambda s: s.compiles_after_warmup),
    _Figure(_GAUGE, "weight_version", "Of new requests.", lambda s: s.weight_version),
    _Figure(_COUNTER, "steps", "Steps, by bucket.", lambda s: {b.bucket: b.steps for b in s.buckets}, "bucket"),
    _Figure(_COUNTER, "step_seconds", "Time in steps, by bucket.", lambda s: {b.bucket: b.seconds for b in s.buckets},
            "bucket"),
    _Figure(_COUNTER, "step_rows", "Rows of steps, by bucket.", lambda s: {b.bucket: b.rows for b in s.buckets},
            "bucket"),
    _Figure(_COUNTER, "device_busy_seconds", "Time in which the device had a step.", lambda s: s.device_seconds),
    _Figure(_COUNTER, "device_idle_seconds", "Time in which it waited for the host, with work there.",
            lambda s: s.host_seconds),
    _Figure(_COUNTER, "model_flops", "Operations that the answers needed; over peak_flops: MFU.",
            lambda s: s.model_flops),
    _Figure(_COUNTER, "model_bytes_read", "Weights, keys and values that steps had to read; over peak_bandwidth: its "
            "share.", lambda s: s.bytes_read),
)


class EngineMetrics:
    """Histograms of requests, and at every scrape the engine's counters and its devices. The engine's thread only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=self._registry)

        self._first_token = histogram("time_to_first_token_seconds", "From arrival.")
        self._between = histogram("inter_token_latency_seconds", "Between steps that gave a request tokens.")
        self._latency = histogram("e2e_request_latency_seconds", "From arrival to the end of an answer.")
        self._queued = histogram("request_queue_time_seconds", "From arrival to the first step.")
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._answer = histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)

    def had_tokens(self, seconds: float) -> None:
        """A request that had tokens before has got more, after so many seconds."""
        self._between.observe(seconds)

    def ended(self, request: Request) -> None:
        times, output = request.output.times, request.output
        self._latency.observe(times.ended - times.arrived)
        self._prompt.observe(len(output.prompt_token_ids))
        self._answer.observe(len(output.token_ids))
        if times.started is not None:
            self._queued.observe(times.started - times.arrived)
        if times.first_token is not None:
            self._first_token.observe(times.first_token - times.arrived)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for figure in _FIGURES:
            value = figure.value(stats)
            if figure.label is None:
                yield figure.kind(PREFIX + figure.name, figure.text, value=value)
                continue
            family = figure.kind(PREFIX + figure.name, figure.text, labels=[figure.label])
            for label, number in value.items():
                family.add_metric([str(label)], number)
            yield family
        yield from _of_devices(self._engine.plan.devices, str(self._engine.deployment.sharding.dtype),
                               self._engine.precision.eight_bit)

    def describe(self) -> list[Metric]:
        return []  # what there is depends on the engine: registering must not look


def _of_devices(count: int, dtype: str, eight_bit: bool) -> Iterator[Metric]:
    """Peaks of all devices together, and of each its memory and utilisation, as far as they can be known."""
    devices = jax.local_devices()[:count]
    try:
        hardware = hardware_of(devices[0].device_kind)
    except UserError:
        pass
    else:
        yield _GAUGE(PREFIX + "peak_flops", "Of all devices, per second.",
                     value=count * hardware.peak(dtype, eight_bit))
        yield _GAUGE(PREFIX + "peak_bandwidth_bytes", "Of all devices' memory, per second.",
                     value=count * hardware.bandwidth)
    families = {name: _GAUGE(f"{PREFIX}device_{name}", text, labels=["device"]) for name, text in (
        ("memory_used_bytes", "Of the process."), ("memory_limit_bytes", "That the process may use."),
        ("largest_free_block_bytes", "Of the allocator: much smaller than what is free where memory is fragmented."),
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
    """Of a GPU in the last second; None where NVML is not there."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.local_hardware_id)
        return pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except Exception:  # no library, no driver, no permission: a metric less
        return None
