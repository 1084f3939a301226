"""Input arrays of a step's program, from its plan and its requests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qwen_jax.engine.compiled.state import StepBatch
from qwen_jax.engine.frontend.request import Request
from qwen_jax.engine.runner.padded_batch import pack_rows, padding_batch
from qwen_jax.engine.scheduling.sequence import PlannedRow, Sequence, StepPlan


def build_batch(plan: StepPlan, requests: Mapping[int | str, Request], slots: int, vocab_size: int) -> StepBatch:
    """Return the input arrays of a planned step, padded to the shapes of its bucket.

    requests: the open ones by id. slots: sequences that can run at once.
    """
    bucket = plan.bucket
    rows = [(planned, planned.seq, requests[planned.seq.request_id]) for planned in plan.rows]
    options = [(request.params, len(seq.output), request.banned_now) for _, seq, request in rows]
    batch = padding_batch(bucket, slots, vocab_size, pack_rows(options, bucket.rows))
    fields = np.array([(planned.start, planned.start + planned.count, seq.slot, planned.samples, planned.count,
                        len(seq.prompt), request.adapter_slot) for planned, seq, request in rows], np.int32).T
    arrays = (batch.start, batch.length, batch.slots, batch.samples, batch.counts, batch.prompt_length,
              batch.adapter_slots)
    for array, values in zip(arrays, fields, strict=True):
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
    """Fill in the tokens of prefill rows, those reused from the prefix cache, and those to be scored."""
    for row, (planned, seq, request) in enumerate(rows):
        tokens, end = seq.tokens, planned.start + planned.count
        batch.tokens[row, : planned.count] = tokens[planned.start : end]
        batch.first[row] = planned.start == seq.num_reused
        if batch.first[row]:
            batch.reused[row, : planned.start] = tokens[: planned.start]
        if request.score_from is not None:
            batch.targets[row, : planned.count] = [request.target_at(p) for p in range(planned.start, end)]
