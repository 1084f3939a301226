"""A parallel plan on the devices: replicas of the model, each with programs, pages and a scheduler of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.config import ModelConfig
from qwen_jax.engine.compiled.state import StepOutput
from qwen_jax.engine.config import engine_config
from qwen_jax.engine.multihost.channel import Leader
from qwen_jax.engine.multihost.leader import LeaderRunner
from qwen_jax.engine.runner.model_runner import Runner
from qwen_jax.engine.runner.pipeline_runner import Pipeline
from qwen_jax.engine.runner.stage import ShardedWeights, Sizes
from qwen_jax.engine.scheduling.buckets import Bucket, Limits
from qwen_jax.engine.scheduling.page_pool import PagePool
from qwen_jax.engine.scheduling.schedule_policy import SPARSE, SchedulePolicy
from qwen_jax.engine.scheduling.scheduler import Scheduler
from qwen_jax.engine.scheduling.step_plan import StepPlan
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.model_shard import shards_of
from qwen_jax.engine.weights.weight_sharding import WeightSharding
from qwen_jax.engine.weights.weight_store import VersionedWeights
from qwen_jax.errors import UserError
from qwen_jax.parallel.plan import ParallelPlan, make_plan
from qwen_jax.quantization import Precision, Ranges, default_precision


class Blueprint(NamedTuple):
    """What all plans of one engine have in common.

    Attributes:
      table, limits, policy: of every replica. kv_cache_bytes: of every device; None for a share of what is free.
      draft: the configuration of the model that guesses tokens, if there is one.
    """

    config: ModelConfig
    dtype: Any
    precision: Precision
    ranges: tuple[Ranges, ...] | None
    table: tuple[Bucket, ...]
    limits: Limits
    policy: SchedulePolicy
    sparsity: tuple[Sparsity | None, ...]
    vocab_limit: int
    kv_cache_bytes: int | None = None
    prefix_cache: bool = True
    invariant: bool = False
    draft: ModelConfig | None = None
    cache_dir: Path | None = None
    strict: bool = False


@dataclass(eq=False)
class Replica:
    """One model at work.

    Attributes:
      under_way: the step that its devices are working on: the plan, what `Runner.start` gave, and the times of its
        planning and of its start. undelivered: the last one that ended, whose texts are still to be made.
      step_seconds: of the last decode step, per token of a row; None before there was one.
    """

    scheduler: Scheduler
    runner: Runner
    under_way: tuple[StepPlan, Any, float, float] | None = None
    undelivered: tuple[StepPlan, StepOutput, list[list[int] | None]] | None = None
    step_seconds: float | None = None


@dataclass
class Deployment:
    """One plan.

    Attributes:
      spread: how the weights have to lie; draft_sharding: those of the draft model.
      replicas: empty until `build`.
    """

    plan: ParallelPlan
    blueprint: Blueprint
    sharding: WeightSharding = field(init=False)
    draft_sharding: WeightSharding | None = field(init=False, default=None)
    replicas: list[Replica] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        one, plan = self.blueprint, self.plan
        self.sharding = WeightSharding(one.config, one.dtype, shards_of(plan), one.precision, one.ranges)
        if one.draft:
            if len(plan.stages) > 1:
                raise UserError("a draft model needs its target on the same devices: use pp_size=1, or speculation="
                                "'ngram'")
            beside = make_plan(one.draft, plan.data, 1, plan.tensor)
            self.draft_sharding = WeightSharding(one.draft, one.dtype, shards_of(beside),
                                       default_precision(one.draft, False, None))

    def build(self, weights: VersionedWeights, draft: VersionedWeights | None, adapters: AdapterTable, free_bytes: int,
              arrivals: Iterator[int], leader: Leader | None = None) -> None:
        """Replicas; nothing is compiled yet, and nothing allocated. ``free_bytes``: of each device, beside the weights.
        ``leader``: of the other processes, where there are some and this is the first."""
        one, stages = self.blueprint, len(self.plan.stages)
        sparse = any(bucket.schedule == SPARSE for bucket in one.table)
        largest = max(self.sharding.parts, key=lambda part: part.end - part.start)
        beside = self.draft_sharding.parts[0].local if self.draft_sharding else None
        num_pages = engine_config.num_pages(largest.local, beside, one.limits, one.dtype, one.kv_cache_bytes, sparse,
                                       largest.precision(one.precision), free_bytes)
        wide_pages = engine_config.wide_pages(one.limits, one.precision)
        sizes = Sizes(num_pages, one.limits.max_batch_size, one.vocab_limit, one.sparsity, wide_pages)
        dense_tail = max((layer.dense_tail for layer in one.sparsity if layer), default=0)
        kind = partial(LeaderRunner, leader) if leader else Runner if stages == 1 else Pipeline
        for index in range(self.plan.data):
            runner = kind(one.table, sizes, ShardedWeights(weights, self.sharding),
                          range(index * stages, (index + 1) * stages), adapters,
                          draft and ShardedWeights(draft, self.draft_sharding), one.cache_dir, one.strict)
            scheduler = Scheduler(one.table, one.limits, PagePool(num_pages), one.policy, one.prefix_cache,
                                  one.invariant, dense_tail, PagePool(wide_pages) if wide_pages else None, arrivals)
            self.replicas.append(Replica(scheduler, runner))

    @property
    def runners(self) -> list[Runner]:
        return [replica.runner for replica in self.replicas]

    @property
    def bytes_per_device(self) -> int:
        """Of the weights, on the device that has the most."""
        found: dict[jax.Device, int] = {}
        for sharding in (self.sharding, self.draft_sharding):
            for part, leaves in zip(sharding.parts, sharding.shapes, strict=True) if sharding else ():
                own = sum(prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
                for device in part.devices:
                    found[device] = found.get(device, 0) + own
        return max(found.values())
