"""Replicas of the model under a parallel plan, each with programs, pages and a scheduler of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import jax
import numpy as np

from qwen_jax.engine.compiled.state import StepOutput
from qwen_jax.engine.config import memory
from qwen_jax.engine.config.resolve import ResolvedConfig
from qwen_jax.engine.multihost.channel import Leader
from qwen_jax.engine.multihost.leader import LeaderRunner
from qwen_jax.engine.runner.model_runner import Runner
from qwen_jax.engine.runner.stage import ShardedWeights, Sizes
from qwen_jax.engine.scheduling.page_pool import PagePool
from qwen_jax.engine.scheduling.schedule_policy import SPARSE
from qwen_jax.engine.scheduling.scheduler import Scheduler
from qwen_jax.engine.scheduling.sequence import StepPlan
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.model_shard import shards_of
from qwen_jax.engine.weights.weight_sharding import WeightSharding
from qwen_jax.engine.weights.weight_store import VersionedWeights
from qwen_jax.errors import UserError
from qwen_jax.parallel.plan import ParallelPlan, make_plan
from qwen_jax.quantization import default_precision


@dataclass(frozen=True)
class RunningStep:
    """A step that a replica's devices are working on.

    Attributes:
      handle: what `Runner.start` returned.
      planned_at, started_at: when its planning began and when its program was started, in ``time.perf_counter``.
    """

    plan: StepPlan
    handle: Any
    planned_at: float
    started_at: float


@dataclass(frozen=True)
class FinishedStep:
    """A step whose program has ended.

    Attributes:
      output: what the program returned, on the host.
      tokens: new tokens of each row of the plan; None for a row whose numbers were unusable.
      ready_at: when the output was there, in ``time.perf_counter``.
    """

    plan: StepPlan
    running: RunningStep
    output: StepOutput
    tokens: list[list[int] | None]
    ready_at: float


@dataclass(eq=False)
class Replica:
    """A copy of the model with its scheduler and its runner.

    Attributes:
      running: the step that its devices are working on, if any.
      undelivered: the last step that ended, until its results have reached the requests.
      step_seconds: device time of the last decode step for one token per row; None before the first.
    """

    scheduler: Scheduler
    runner: Runner
    running: RunningStep | None = None
    undelivered: FinishedStep | None = None
    step_seconds: float | None = None


@dataclass
class Deployment:
    """The replicas of a model under one parallel plan.

    Attributes:
      sharding: how the plan distributes the weights. draft_sharding: the same for the draft model, if there is one.
      replicas: empty until `build`. pages: KV pages of each, and 16-bit pages beside 8-bit ones.
    """

    plan: ParallelPlan
    config: ResolvedConfig
    sharding: WeightSharding = field(init=False)
    draft_sharding: WeightSharding | None = field(init=False, default=None)
    replicas: list[Replica] = field(init=False, default_factory=list)
    pages: tuple[int, int] = field(init=False, default=(0, 0))

    def __post_init__(self) -> None:
        config, plan = self.config, self.plan
        self.sharding = WeightSharding(config.model, config.dtype, shards_of(plan), config.precision, config.ranges)
        if config.draft:
            if len(plan.stages) > 1:
                raise UserError("a draft model needs its target on the same devices: use pp_size=1, or speculation="
                                "'ngram'")
            draft_plan = make_plan(config.draft, plan.data, 1, plan.tensor)
            self.draft_sharding = WeightSharding(config.draft, config.dtype, shards_of(draft_plan),
                                                 default_precision(config.draft, False, None))

    @classmethod
    def for_shapes(cls, config: ResolvedConfig, plan: ParallelPlan, pages: tuple[int, int], adapters: tuple[int, int]
                   ) -> Deployment:
        """Make a deployment that has shapes in place of weights, to compile the programs of another like it.

        pages: as in the attributes. adapters: number of LoRA adapters and their largest rank.
        """
        deployment = cls(plan, config)
        weights = VersionedWeights(config.model, deployment.sharding)
        draft = config.draft and VersionedWeights(config.draft, deployment.draft_sharding)
        table = AdapterTable(config.model, deployment.sharding.shards, *adapters, config.dtype)
        deployment.build(weights, draft, table, pages=pages)
        return deployment

    def build(self, weights: VersionedWeights, draft: VersionedWeights | None, adapters: AdapterTable, *,
              free_bytes: int = 0, pages: tuple[int, int] | None = None, arrivals: Iterator[int] | None = None,
              leader: Leader | None = None) -> None:
        """Make the replicas, each with a scheduler and a runner, without compiling or allocating anything yet.

        Args:
          free_bytes: memory of each device that the weights leave free, from which the number of pages follows.
          pages: that number, if it is known already.
          arrivals: ascending numbers, shared by the schedulers of all replicas.
          leader: connection to the other processes, where there are some and this is the first.
        """
        config, stages = self.config, len(self.plan.stages)
        self.pages = pages, wide_pages = pages or self._pages(free_bytes)
        sizes = Sizes(pages, config.limits.max_batch_size, config.sparsity, wide_pages, config.layers_per_program)
        dense_tail = max((layer.dense_tail for layer in config.sparsity if layer), default=0)
        kind = partial(LeaderRunner, leader) if leader else Runner
        for index in range(self.plan.data):
            runner = kind(table=config.table, sizes=sizes, weights=ShardedWeights(weights, self.sharding),
                          shards=range(index * stages, (index + 1) * stages), adapters=adapters,
                          draft=draft and ShardedWeights(draft, self.draft_sharding), cache_dir=config.cache_dir,
                          strict=config.strict_compiles)
            scheduler = Scheduler(config.table, config.limits, PagePool(pages), policy=config.policy,
                                  prefix_cache=config.prefix_cache, invariant=config.batch_invariant,
                                  dense_tail=dense_tail, wide_pool=PagePool(wide_pages) if wide_pages else None,
                                  arrivals=arrivals, available=runner.programs.available)
            self.replicas.append(Replica(scheduler, runner))

    @property
    def programs_to_come(self) -> int:
        """Number of the replicas' programs that are still being compiled or loaded."""
        return sum(len(runner.programs.missing) for runner in self.runners)

    def limit_vocab(self, limit: int) -> None:
        """Let the replicas sample no token ids from ``limit`` on: they do not exist."""
        for runner in self.runners:
            for stage in runner.stages:
                stage.vocab_limit = np.int32(limit)

    def _pages(self, free_bytes: int) -> tuple[int, int]:
        """Return the number of KV pages that a replica gets, and the number of 16-bit pages beside 8-bit ones."""
        config = self.config
        largest = max(self.sharding.shards, key=lambda part: part.end - part.start)
        draft = self.draft_sharding.shards[0].device_config if self.draft_sharding else None
        pages = memory.num_pages(largest.device_config, draft, config.limits, config.dtype, config.kv_cache_bytes,
                                 sparse=any(bucket.schedule == SPARSE for bucket in config.table),
                                 precision=largest.precision(config.precision), free_bytes=free_bytes)
        return pages, memory.wide_pages(config.limits, config.precision)

    @property
    def runners(self) -> list[Runner]:
        return [replica.runner for replica in self.replicas]

    @property
    def bytes_per_device(self) -> int:
        """Bytes of the weights on the device that has the most of them."""
        by_device: dict[jax.Device, int] = {}
        for sharding in (self.sharding, self.draft_sharding):
            for part, leaves in zip(sharding.shards, sharding.shapes, strict=True) if sharding else ():
                own = sum(prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
                for device in part.devices:
                    by_device[device] = by_device.get(device, 0) + own
        return max(by_device.values())
