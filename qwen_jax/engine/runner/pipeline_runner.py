"""Runner of a model in stages on devices of their own, driven by the host, with several micro-batches at a time.

The rows of a step are split into micro-batches. Programs are dispatched in an order in which every stage always has
the next micro-batch queued while it works on another; devices wait for nothing but each other's results, which are
copied from device to device. With s stages and m micro-batches, of which a decode step has one for every token it
generates, a stage is idle for at most (s - 1) / (m + s - 1) of the time, where all take equally long.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.engine.compiled.state import LayerOutput, StepBatch, StepOutput
from qwen_jax.engine.compiled.steps import run_stage
from qwen_jax.engine.runner.model_runner import Key, Runner
from qwen_jax.engine.runner.padded_batch import allow_all_mask, dry_run_batch
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.parallel.placement import put


class StartedStep(NamedTuple):
    """A step that has been started: for each micro-batch the outputs of its tokens, on the last stage's devices."""

    bucket: Bucket
    outputs: list[list[StepOutput]]


class PipelineRunner(Runner):
    """Runs the steps of a replica whose layers are divided into several stages, each on devices of its own."""

    def start(self, bucket: Bucket, batch: StepBatch, version: int) -> StartedStep:
        """Start a step without waiting for it: dispatch the programs of all stages, micro-batches and tokens."""
        self._check_strict()
        size = micro_batch_rows(bucket, len(self.stages))
        count = max(1, -(-int(np.sum(batch.length > 0)) // size))  # live rows come first; one runs in a dry run
        unconstrained = batch.allowed is allow_all_mask(bucket.rows, self._vocab_size)
        mask = allow_all_mask(size, self._vocab_size) if unconstrained else None
        micro_batches = [self._on_stages(jax.tree.map(lambda x, i=i: x[i * size:(i + 1) * size], batch), mask)
                         for i in range(count)]
        tokens_per_row = int(max(1, batch.counts.max())) if _is_one_by_one(bucket) else 1
        started = StartedStep(bucket, [[] for _ in micro_batches])
        for token_index in range(tokens_per_row):
            for micro_batch, outputs in zip(micro_batches, started.outputs, strict=True):
                last_tokens = outputs[-1].sampled.tokens if outputs else None
                outputs.append(self._run_stages(bucket, micro_batch, version, token_index, last_tokens))
        return started

    def finish(self, started: StartedStep) -> StepOutput:
        """Wait for a started step and return its output on the host, joined from all micro-batches and tokens."""
        by_micro_batch = [_join_tokens(outputs) for outputs in jax.device_get(started.outputs)]
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *by_micro_batch)
        return jax.tree.map(lambda x: _padded(x, started.bucket.rows), joined)

    def done(self, started: StartedStep) -> bool:
        """Return whether a started step has ended, so that `finish` would not wait."""
        return super().done(started.outputs)

    def _on_stages(self, batch: StepBatch, mask: np.ndarray | None) -> list[StepBatch]:
        """Return a copy of a micro-batch on the devices of each stage.

        mask: token mask to refer to instead of a copy of the batch's, or None.
        """
        if mask is not None:
            batch = batch._replace(allowed=None)
        copies = [jax.tree.map(lambda x, to=stage.shard.replicated: put(x, to), batch) for stage in self.stages]
        return [copy._replace(allowed=mask) for copy in copies] if mask is not None else copies

    def _run_stages(self, bucket: Bucket, micro_batch: list[StepBatch], version: int, token_index: int,
                    last_tokens: Any) -> StepOutput:
        """Run all stages on a micro-batch for one token of each row, and return the last stage's output.

        token_index: which of the tokens that the step generates for a row. last_tokens: tokens that the micro-batch
        sampled just before; None for the first.
        """
        output = None
        for index, (stage, batch) in enumerate(zip(self.stages, micro_batch, strict=True)):
            to = stage.shard.replicated
            if index == 0 and last_tokens is not None:
                batch = batch._replace(tokens=put(last_tokens, to))
            if index:
                output = jax.tree.map(lambda x, to=to: put(x, to), output)
            output = self.run((bucket, index), batch, version, output, np.int32(token_index))
        return output

    def _lower(self, key: Key) -> jax.stages.Lowered:
        bucket, index = key
        stage, rows = self.stages[index], micro_batch_rows(bucket, len(self.stages))

        def run(models, state, batch, entering, token_index):
            return run_stage(models, bucket, state, batch, entering, token_index=token_index,
                             first_layer=stage.shard.start)

        def shape(sizes, dtype):
            return jax.ShapeDtypeStruct((rows, *sizes), dtype, sharding=stage.shard.replicated)

        dry_run = dry_run_batch(bucket, self.sizes.slots, self._vocab_size)
        batch = jax.tree.map(lambda x: put(x[:rows], stage.shard.replicated), dry_run)
        entering = None if index == 0 else LayerOutput(
            hidden=shape((bucket.tokens, self.weights.config.hidden_size), stage.dtype),
            page_counts=shape((2,), jnp.int32), trips=shape((), jnp.int32))
        return stage.lower(run, batch, entering, np.int32(0))


def micro_batch_rows(bucket: Bucket, stages: int) -> int:
    """Return the number of rows of a micro-batch of this bucket.

    There are as many micro-batches as stages, so that every stage has work, or more where the bucket asks for it.
    """
    for count in range(min(stages, bucket.micro_rows), 0, -1):
        if bucket.micro_rows % count == 0:
            return bucket.micro_rows // count
    raise AssertionError("one micro-batch always divides")


def _is_one_by_one(bucket: Bucket) -> bool:
    """Return whether a bucket's step generates the tokens of a row one by one, each by a run of all stages."""
    return bucket.phase == "decode" and bucket.tokens == 1


def _join_tokens(outputs: list[StepOutput]) -> StepOutput:
    """Join the outputs of one micro-batch, each with one token of every row, to one output with all tokens."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    sampled = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *(output.sampled for output in outputs))
    trips = first.trips
    for output in outputs[1:]:
        trips = np.where(trips == 0, output.trips, trips)
    return first._replace(sampled=sampled, page_counts=sum(output.page_counts for output in outputs), trips=trips)


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
    """Append zeros to ``x`` up to ``rows`` rows, in place of the micro-batches that were not run."""
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])
