"""A planned step as the arrays its executable takes. Host side, numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
from qwen_kernels.attention import PAGE

from qwen_jax.engine.compiled.sampler import SamplingRows, neutral_rows, pack_rows
from qwen_jax.engine.compiled.steps import StepBatch
from qwen_jax.engine.frontend.request import Request
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.sequence import Sequence
from qwen_jax.engine.scheduling.step_plan import PlannedRow, StepPlan
from qwen_jax.engine.weights.lora_table import NO_ADAPTER


@cache
def everything(rows: int, vocab_size: int) -> np.ndarray:
    """Masks that allow every token. Always the same array, because most steps send nothing else: runners keep it on
    their devices."""
    return np.full((rows, -(-vocab_size // 32)), -1, np.int32)


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
        allowed=everything(bucket.rows, vocab_size),
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
    rows = [(planned, planned.seq, requests[planned.seq.request_id]) for planned in plan.rows]
    options = [(request.params, len(seq.output), request.banned_now) for _, seq, request in rows]
    batch = padding_batch(bucket, slots, vocab_size, pack_rows(options, bucket.rows))
    fields = np.array([(planned.start, planned.start + planned.count, seq.slot, planned.samples, planned.count,
                        len(seq.prompt), request.adapter) for planned, seq, request in rows], np.int32).T
    named = batch.start, batch.length, batch.slots, batch.samples, batch.counts, batch.prompt_length, batch.adapters
    for array, values in zip(named, fields, strict=True):
        array[: len(rows)] = values
    for row, (_, seq, _) in enumerate(rows):
        batch.page_table[row, : len(seq.pages)] = seq.pages
    if bucket.phase == "prefill":
        _fill_prefill(batch, rows)
    else:
        batch.tokens[: len(rows), 0] = [seq.last_token for _, seq, _ in rows]
        for row, (planned, _, _) in enumerate(rows):
            if planned.drafts:
                batch.tokens[row, 1 : len(planned.drafts) + 1] = planned.drafts
    masks = [(row, request.allowed) for row, (planned, _, request) in enumerate(rows)
             if planned.samples and request.allowed is not None]
    if masks:
        batch = batch._replace(allowed=np.array(batch.allowed))
        for row, mask in masks:
            batch.allowed[row] = mask
    return batch


def _fill_prefill(batch: StepBatch, rows: list[tuple[PlannedRow, Sequence, Request]]) -> None:
    for row, (planned, seq, request) in enumerate(rows):
        tokens, end = seq.tokens, planned.start + planned.count
        batch.tokens[row, : planned.count] = tokens[planned.start : end]
        batch.first[row] = planned.start == seq.num_reused
        if batch.first[row]:
            batch.reused[row, : planned.start] = tokens[: planned.start]
        if request.score_from is not None:
            batch.targets[row, : planned.count] = [request.target_at(p) for p in range(planned.start, end)]
