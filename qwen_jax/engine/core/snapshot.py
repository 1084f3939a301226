"""Snapshot of an engine's counters."""

from __future__ import annotations

from collections.abc import Iterable

from qwen_jax.engine.api.stats import BucketStats, EngineStats
from qwen_jax.engine.config.memory import kv_bytes_per_token, weight_bytes_per_step
from qwen_jax.engine.config.resolve import ResolvedConfig
from qwen_jax.engine.core.engine_core import EngineCore
from qwen_jax.engine.core.replica import Deployment


def engine_stats(core: EngineCore, deployment: Deployment, prepared: Iterable[Deployment], config: ResolvedConfig
                 ) -> EngineStats:
    """Collect an engine's counters. deployment: replicas of its current plan. prepared: those of all its plans."""
    counters, runners = core.counters, deployment.runners
    current = [replica.scheduler for replica in deployment.replicas]
    schedulers = [replica.scheduler for each in prepared for replica in each.replicas]  # a plan keeps its counts
    speculation, sharding = core.speculation, deployment.sharding
    return EngineStats(
        compiles_after_warmup=runners[0].compiles_after_warmup,
        warmup_seconds=sum(runner.warmup_seconds for runner in runners),
        executables=sum(len(runner.executables.programs) for runner in runners),
        programs_to_come=deployment.programs_to_come,
        pages_used=sum(scheduler.pool.capacity - scheduler.pool.num_free for scheduler in schedulers),
        pages_total=sum(scheduler.pool.capacity for scheduler in current),
        running=sum(len(scheduler.running) for scheduler in schedulers),
        waiting=sum(len(scheduler.waiting) for scheduler in schedulers),
        prompt_tokens=counters.prompt_tokens, generated_tokens=counters.generated_tokens,
        finished=dict(counters.finished), schedules=dict(counters.schedules),
        preemptions=sum(scheduler.preemptions for scheduler in schedulers),
        prefix_queries=sum(scheduler.prefix_queries for scheduler in schedulers),
        prefix_hits=sum(scheduler.prefix_hits for scheduler in schedulers),
        weight_version=core.weights.current,
        drafted_tokens=speculation.drafted if speculation else 0,
        accepted_tokens=speculation.accepted if speculation else 0,
        sparse_pages_read=counters.attended_pages, sparse_pages_visible=counters.visible_pages,
        guard_trips=dict(sorted(counters.trips.items())),
        unused_slots=sum(scheduler.unfilled_tokens for scheduler in schedulers),
        model_flops=counters.model_flops(config.model),
        bytes_read=counters.bytes_read(weight_bytes_per_step(config.model, sharding.specs, config.precision),
                                       kv_bytes_per_token(config.model, sharding.dtype, config.precision)),
        device_seconds=counters.device_seconds, host_seconds=counters.host_seconds,
        buckets=_bucket_stats(core, deployment),
        tuned=str(config.tuned.path or "as given") if config.tuned else None,
        adaptation=core.adaptation.report() if core.adaptation else {},
        adapters=tuple(core.adapters.names))


def _bucket_stats(core: EngineCore, deployment: Deployment) -> tuple[BucketStats, ...]:
    runner = deployment.runners[0]
    rows = []
    for bucket, usage in core.counters.usage.items() if runner.ready else ():
        programs = runner.programs.of(bucket)
        rows.append(BucketStats(
            str(bucket), usage.steps, usage.rows, usage.tokens, usage.seconds,
            prepare_seconds=runner.programs.seconds.get(bucket, 0.0),
            from_disk=all(program.from_disk for program in programs),
            temp_bytes=max((program.temp_bytes for program in programs), default=0)))
    return tuple(rows)
