"""A model in stages on devices of their own, driven by the host, with several micro-batches under way at once.

The rows of a step are split into micro-batches. Programs are dispatched in an order in which every stage always has
the next micro-batch queued while it works on one; devices wait for nothing but each other's results, which are copied
from device to device. With s stages and m micro-batches, of which a decode step has one for every token it generates,
a stage is idle for at most (s - 1) / (m + s - 1) of the time, where all take equally long.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.engine.compiled.state import Passed, StepBatch, StepOutput
from qwen_jax.engine.compiled.steps import run_stage
from qwen_jax.engine.runner.model_runner import Key, Runner
from qwen_jax.engine.runner.padded_batch import dry_run_batch, everything
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.weights.model_shard import put_global


class Started(NamedTuple):
    """A step under way: of each micro-batch, the outputs of all its tokens, on the last stage's devices."""

    bucket: Bucket
    outputs: list[list[StepOutput]]


class Pipeline(Runner):
    """A `Runner` for a replica of several stages."""

    def start(self, bucket: Bucket, batch: StepBatch, version: int) -> Started:
        self._check_strict()
        size = micro_batch(bucket, len(self.stages))
        count = max(1, -(-int(np.sum(batch.length > 0)) // size))  # live rows come first; one runs in a dry run
        free = batch.allowed is everything(bucket.rows, self._vocab_size)
        allowed = everything(size, self._vocab_size) if free else None
        groups = [self._sent(jax.tree.map(lambda x, at=at: x[at * size:(at + 1) * size], batch), allowed)
                  for at in range(count)]
        turns = int(max(1, batch.counts.max())) if _one_by_one(bucket) else 1
        started = Started(bucket, [[] for _ in groups])
        for turn in range(turns):
            for group, outputs in zip(groups, started.outputs, strict=True):
                tokens = outputs[-1].sampled.tokens if outputs else None
                outputs.append(self._through(bucket, group, version, turn, tokens))
        return started

    def _sent(self, batch: StepBatch, allowed: np.ndarray | None) -> list[StepBatch]:
        """A micro-batch on every stage's devices; but for ``allowed``, if given, which they have already."""
        rest = batch._replace(allowed=None) if allowed is not None else batch
        sent = [jax.tree.map(lambda x, to=stage.part.replicated: put_global(x, to), rest) for stage in self.stages]
        return [one._replace(allowed=allowed) for one in sent] if allowed is not None else sent

    def _through(self, bucket: Bucket, group: list[StepBatch], version: int, turn: int, tokens: Any) -> StepOutput:
        """One micro-batch through all stages; ``tokens`` are those that its last turn sampled."""
        passed = None
        for index, (stage, batch) in enumerate(zip(self.stages, group, strict=True)):
            to = stage.part.replicated
            if index == 0 and tokens is not None:
                batch = batch._replace(tokens=put_global(tokens, to))
            if index:
                passed = jax.tree.map(lambda x, to=to: put_global(x, to), passed)
            passed = self.run(Key(bucket, index), batch, version, passed, np.int32(turn))
        return passed

    def done(self, started: Started) -> bool:
        return super().done(started.outputs)

    def finish(self, started: Started) -> StepOutput:
        outputs = jax.device_get(started.outputs)
        rows = [_after_another(of_group) for of_group in outputs]
        whole = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
        return jax.tree.map(lambda x: _filled(x, started.bucket.rows), whole)

    def _lower(self, key: Key) -> jax.stages.Lowered:
        bucket, stage = key.bucket, self.stages[key.stage]
        rows = micro_batch(bucket, len(self.stages))
        start = stage.part.start

        def step(leaves, draft, state, batch, vocab_limit, adapters, passed, turn):
            models = stage.models(leaves, draft)
            return run_stage(models, bucket, state, batch, passed, turn, start, vocab_limit, adapters)

        dry = dry_run_batch(bucket, self.sizes.slots, self._vocab_size)
        batch = jax.tree.map(lambda x: put_global(x[:rows], stage.part.replicated), dry)
        passed = None
        if key.stage:
            def shape(sizes, dtype):
                return jax.ShapeDtypeStruct((rows, *sizes), dtype, sharding=stage.part.replicated)

            passed = Passed(shape((bucket.tokens, self.weights.config.hidden_size), stage.dtype),
                            shape((2,), jnp.int32), shape((), jnp.int32))
        return stage.lower(step, stage.shapes_of_arguments(batch, passed, np.int32(0)))


def micro_batch(bucket: Bucket, stages: int) -> int:
    """Rows of a micro-batch: as many micro-batches as there are stages, or more where the bucket asks for it, so that
    every stage has one to work on."""
    for count in range(min(stages, bucket.micro_rows), 0, -1):
        if bucket.micro_rows % count == 0:
            return bucket.micro_rows // count
    raise AssertionError("one micro-batch always divides")


def _one_by_one(bucket: Bucket) -> bool:
    """Whether a step generates tokens one after another."""
    return bucket.phase == "decode" and bucket.tokens == 1


def _after_another(outputs: list[StepOutput]) -> StepOutput:
    """The output of a micro-batch from those of its tokens."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    sampled = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *(one.sampled for one in outputs))
    trips = first.trips
    for one in outputs[1:]:
        trips = np.where(trips == 0, one.trips, trips)
    return first._replace(sampled=sampled, pages=sum(one.pages for one in outputs), trips=trips)


def _filled(x: np.ndarray, rows: int) -> np.ndarray:
    """``x`` with zeros for the rows of micro-batches that were not run."""
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])
