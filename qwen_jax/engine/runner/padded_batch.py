"""Batches of a step as numpy arrays: rows of padding, which a planned step is filled into, and sampling options."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from qwen_kernels.page import PAGE

from qwen_jax.engine.api.sampling_params import SamplingParams
from qwen_jax.engine.compiled.lora_rows import NO_ADAPTER
from qwen_jax.engine.compiled.sampler import MAX_BIAS, SamplingRows
from qwen_jax.engine.compiled.state import StepBatch
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.errors import UserError


@cache
def allow_all_mask(rows: int, vocab_size: int) -> np.ndarray:
    """Return masks i32[rows, ceil(vocab_size / 32)], one bit for each token id, that allow every token to be sampled.

    The same array is returned every time, so that runners recognise it: most steps have no other masks, and it can stay
    on the devices.
    """
    return np.full((rows, -(-vocab_size // 32)), -1, np.int32)


def padding_batch(bucket: Bucket, slots: int, vocab_size: int, sampling: SamplingRows) -> StepBatch:
    """Return a batch whose rows are all padding, with the given sampling options.

    slots: number of sequences that have a slot, a row of the token counts; padding rows use the row after these.
    """
    per_row, per_token = (bucket.rows,), (bucket.rows, bucket.tokens)
    return StepBatch(
        tokens=np.zeros(per_token, np.int32),
        start=np.zeros(per_row, np.int32),
        length=np.zeros(per_row, np.int32),
        page_table=np.zeros((bucket.rows, bucket.pages), np.int32),
        slots=np.full(per_row, slots, np.int32),
        samples=np.zeros(per_row, bool),
        counts=np.zeros(per_row, np.int32),
        prompt_length=np.zeros(per_row, np.int32),
        first=np.zeros(per_row, bool),
        reused=np.zeros((bucket.rows, bucket.pages * PAGE if bucket.phase == "prefill" else 0), np.int32),
        targets=np.full(per_token, -1, np.int32),
        adapter_slots=np.full(per_row, NO_ADAPTER, np.int32),
        allowed=allow_all_mask(bucket.rows, vocab_size),
        sampling=sampling,
    )


def dry_run_batch(bucket: Bucket, slots: int, vocab_size: int, rows: int = 1) -> StepBatch:
    """Return a batch for a warm-up step: ``rows`` rows full of tokens, which use the null page, and else padding."""
    batch = padding_batch(bucket, slots, vocab_size, pack_rows((), bucket.rows))
    batch.length[:rows] = bucket.tokens
    batch.counts[:rows] = bucket.tokens
    return batch


def pack_rows(requests: Sequence[tuple[SamplingParams, int, Sequence[int]]], num_rows: int) -> SamplingRows:
    """Return the sampling options of a step's rows as numpy arrays. Takes tens of microseconds.

    Rows beyond ``len(requests)`` are greedy, with every option off.

    Args:
      requests: (resolved params with a seed, index of the token being generated, ids banned at this step) of each row.
        The caller bans end-of-sequence and stop ids below ``min_tokens``.
      num_rows: number of rows of the result.

    Raises:
      UserError: more banned ids than fit beside the row's ``logit_bias``.
    """
    count = len(requests)
    floats = np.zeros((num_rows, 6), np.float32) + np.float32([0, 1, 0, 1, 0, 0])
    integers = np.zeros((num_rows, 3), np.int64) + [0, 0, -1]
    step = np.zeros(num_rows, np.int32)
    if count:
        floats[:count] = [params.scalars[0] for params, _, _ in requests]
        integers[:count] = [params.scalars[1] for params, _, _ in requests]
        step[:count] = [step for _, step, _ in requests]
    bias_ids = np.full((num_rows, MAX_BIAS), -1, np.int32)
    bias_values = np.zeros((num_rows, MAX_BIAS), np.float32)
    for row, (params, _, banned) in enumerate(requests):
        if params.logit_bias or len(banned):
            ids, values = params.bias
            start, end = len(ids), len(ids) + len(banned)
            if end > MAX_BIAS:
                raise UserError(f"logit_bias and the ids banned below min_tokens are {end}; at most {MAX_BIAS} fit")
            bias_ids[row, :start], bias_ids[row, start:end] = ids, banned
            bias_values[row, :start], bias_values[row, start:end] = values, -np.inf
    temperature, top_p, min_p, repetition, presence, frequency = np.ascontiguousarray(floats.T)
    return SamplingRows(
        temperature=temperature, top_k=integers[:, 0].astype(np.int32), top_p=top_p, min_p=min_p,
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency,
        seed=integers[:, 1].astype(np.uint32), step=step, logprobs=integers[:, 2].astype(np.int32),
        bias_ids=bias_ids, bias_values=bias_values,
    )  # fmt: skip
