"""A planned step as the arrays its executable takes. Host side, numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import jax
import numpy as np
from qwen_kernels.attention import PAGE

from qwen_jax.engine.adapters import NO_ADAPTER
from qwen_jax.engine.plan import StepPlan
from qwen_jax.engine.request import Request
from qwen_jax.engine.sampler import SamplingRows, neutral_rows, pack_rows
from qwen_jax.engine.schedule import Bucket
from qwen_jax.engine.steps import StepBatch


@cache
def _everything(rows: int, vocab_size: int) -> jax.Array:
    """Masks that allow every token. On the device, because most steps send nothing else."""
    return jax.device_put(np.full((rows, -(-vocab_size // 32)), -1, np.int32))


def padding_batch(bucket: Bucket, slots: int, vocab_size: int, sampling: SamplingRows) -> StepBatch:
    """A batch whose rows are all padding, with the given sampling options."""
    row, grid = (bucket.rows,), (bucket.rows, bucket.tokens)
    return StepBatch(
        tokens=np.zeros(grid, np.int32),
        start=np.zeros(row, np.int32),
        length=np.zeros(row, np.int32),
        page_table=np.zeros((bucket.rows, bucket.pages), np.int32),
        slots=np.full(row, slots, np.int32),
        samples=np.zeros(row, bool),
        counts=np.zeros(row, np.int32),
        prompt_length=np.zeros(row, np.int32),
        first=np.zeros(row, bool),
        reused=np.zeros((bucket.rows, bucket.pages * PAGE if bucket.phase == "prefill" else 0), np.int32),
        targets=np.full(grid, -1, np.int32),
        adapters=np.full(row, NO_ADAPTER, np.int32),
        allowed=_everything(bucket.rows, vocab_size),
        sampling=sampling,
    )


def dry_run_batch(bucket: Bucket, slots: int, vocab_size: int, rows: int = 1) -> StepBatch:
    """Full rows that compute on the null page, so that a warm-up step does what a real one does; or no row at all."""
    batch = padding_batch(bucket, slots, vocab_size, neutral_rows(bucket.rows))
    batch.length[:rows] = bucket.tokens
    batch.counts[:rows] = bucket.tokens
    return batch


def build_batch(plan: StepPlan, requests: Mapping[int | str, Request], slots: int, vocab_size: int) -> StepBatch:
    """The arrays of ``plan``; ``requests`` by id."""
    bucket = plan.bucket
    options = [(requests[r.seq.request_id].params, len(r.seq.output), requests[r.seq.request_id].banned_now)
               for r in plan.rows]
    batch = padding_batch(bucket, slots, vocab_size, pack_rows(options, bucket.rows))
    masks = {row: requests[r.seq.request_id].allowed for row, r in enumerate(plan.rows) if r.samples}
    if any(mask is not None for mask in masks.values()):
        batch = batch._replace(allowed=np.array(batch.allowed))
        for row, mask in masks.items():
            if mask is not None:
                batch.allowed[row] = mask
    for row, planned in enumerate(plan.rows):
        seq, end = planned.seq, planned.start + planned.count
        request = requests[seq.request_id]
        if bucket.phase == "decode":
            batch.tokens[row, 0] = seq.last_token
            batch.tokens[row, 1 : len(planned.drafts) + 1] = planned.drafts
            batch.counts[row] = planned.count
        else:
            tokens = seq.tokens
            batch.tokens[row, : planned.count] = tokens[planned.start : end]
            batch.first[row] = planned.start == seq.num_reused
            if batch.first[row]:
                batch.reused[row, : planned.start] = tokens[: planned.start]
            if request.score_from is not None:
                batch.targets[row, : planned.count] = [request.target_at(p) for p in range(planned.start, end)]
        batch.start[row], batch.length[row] = planned.start, end
        batch.page_table[row, : len(seq.pages)] = seq.pages
        batch.slots[row], batch.samples[row] = seq.slot, planned.samples
        batch.prompt_length[row] = len(seq.prompt)
        batch.adapters[row] = request.adapter
    return batch
