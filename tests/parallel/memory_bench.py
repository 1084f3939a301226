"""The planner's bytes on one device, beside what XLA's memory analysis says of the engine's own programs."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax import Engine
from qwen_jax.config import PRESETS
from qwen_jax.engine.scheduling.buckets import Bucket, Limits
from qwen_jax.model import empty
from qwen_jax.parallel.hardware import HARDWARE
from qwen_jax.parallel.planner import memory_of
from qwen_jax.parallel.roofline import CostModel
from qwen_jax.quantization import default_precision

SEQ_LEN = 4096


class Case(NamedTuple):
    """Real widths of a few ``layers``, since all are alike. A stage has a layer more or less."""

    size: str
    layers: int
    tensor: int
    stages: int
    rows: int
    prefill: tuple[int, int]


class Compared(NamedTuple):
    bucket: str
    stage: int
    predicted: int
    compiled: int

    @property
    def ratio(self) -> float:
        return self.predicted / self.compiled


def compare(case: Case, dtype: str = "float32") -> Iterator[Compared]:
    """Compare every program of an engine with one shape of prefill and one of decode steps. Nothing runs."""
    config = replace(PRESETS[f"qwen2.5-{case.size}"], num_layers=case.layers)
    limits = Limits(case.rows, SEQ_LEN, (case.prefill,), (), (case.rows,), 4)
    engine = Engine(empty(config, jnp.dtype(dtype)), dtype=dtype, tp_size=case.tensor, pp_size=case.stages,
                    limits=limits, sparsity=[None] * case.layers, kv_cache_bytes=1 << 40, warmup=False, cache_dir=None)
    work = CostModel(config, engine.plan, HARDWARE["cpu"], default_precision(config, False, None), dtype)
    for bucket in engine.runner.table:
        if bucket.schedule != "full_attention":
            continue
        for stage in range(case.stages):
            rows = bucket.rows
            if case.stages > 1:  # one micro-batch
                rows = -(-rows // case.stages)
            predicted = sum(memory_of(work, stage, case.rows, SEQ_LEN, (rows, bucket.tokens)).values())
            yield Compared(str(bucket), stage, predicted, compiled_bytes(engine, bucket, stage))


def compiled_bytes(engine: Engine, bucket: Bucket, stage: int) -> int:
    """Return the bytes on a device of a stage: its weights and state, and what the largest program takes beside them.
    """
    on, largest = engine.runner.stages[stage], 0
    for key in engine.runner.steps.keys(bucket):
        if key[1] == stage:
            found = engine.runner.steps.lower(key).compile().memory_analysis()
            largest = max(largest, found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes)
    return largest + sum(prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                         for leaf in jax.tree.leaves((on.shapes, on.shapes_of_weights)))
