"""Whole steps, each compiled as one program: a prefill or decode step from tokens to sampled tokens. Pure JAX.

Models of few layers run them; the steps of others are composed of `pieces`.

A decode step generates several tokens one after another, or checks drafts: it samples after every draft as if the
drafts before it were the answer, and its tokens count as far as they agree with the drafts. Each token is drawn with
the random number of its place in the answer, so an answer does not depend on drafts, only its speed does.

Axes are those of `state`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_jax.engine.compiled.forward import combine_devices, forward
from qwen_jax.engine.compiled.head import count_prefill, last_hidden, pooled, sample_rows, score_prompt
from qwen_jax.engine.compiled.numeric_guard import in_16_bits
from qwen_jax.engine.compiled.sampler import Sampled, count_output
from qwen_jax.engine.compiled.speculative_steps import check_drafts, draft_forward
from qwen_jax.engine.compiled.state import EngineState, LayerOutput, Models, StepBatch, StepOutput, decode_batch
from qwen_jax.engine.scheduling.buckets import EIGHT_BIT, Bucket
from qwen_jax.engine.scheduling.schedule_policy import SPARSE


def run_bucket(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch
               ) -> tuple[EngineState, StepOutput]:
    """Run one prefill or decode step, with the batch shape and the schedule of ``bucket``.

    Beside 8-bit buckets, the others are for rows that 8 bits cannot compute: with 16-bit pages of their own, without
    rounding the inputs of products with 8-bit weights, and without a draft model.
    """
    return _with_own_pages(bucket, models, state, partial(_run, bucket, batch))


def _with_own_pages(bucket: Bucket, models: Models, state: EngineState, run: Callable) -> tuple[EngineState, Any]:
    """Call ``run(models, state)`` with what the bucket uses: 8-bit or 16-bit pages, full or sparse attention."""
    if bucket.schedule != SPARSE:
        models = models._replace(sparsity=None)
    if not state.wide_k_pages or bucket.precision == EIGHT_BIT:
        return run(models, state)
    models = models._replace(target=in_16_bits(models.target), draft=None, page_formats=())
    after, output = run(models, state._replace(k_pages=state.wide_k_pages, v_pages=state.wide_v_pages))
    return after._replace(k_pages=state.k_pages, v_pages=state.v_pages, wide_k_pages=after.k_pages,
                          wide_v_pages=after.v_pages), output


def _run(bucket: Bucket, batch: StepBatch, models: Models, state: EngineState) -> tuple[EngineState, StepOutput]:
    if bucket.phase == "prefill":
        state, output = _micro_batches(models, bucket, state, batch)
    elif bucket.tokens > 1:
        state, output = check_drafts(models, state, batch)
    else:
        state, output = _generate(models, bucket, state, batch)
    return state, combine_devices(models, batch, output)


# --- prefill


def _micro_batches(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch
                   ) -> tuple[EngineState, StepOutput]:
    """Prefill the rows in groups of ``bucket.micro_rows`` one after another, to bound the memory of activations.

    Groups of padding rows are not run at all: a prefill step without rows costs nothing.
    """
    size = bucket.micro_rows
    (graph, params), draft = nnx.split(models.target), models.draft and nnx.split(models.draft)

    def run_group(state, index):
        # Tied to the index, weights are not loop-invariant: XLA:CPU would widen all of them to float32 before the loop.
        tied_params, tied_draft, index = jax.lax.optimization_barrier((params, draft and draft[1], index))
        tied = models._replace(target=nnx.merge(graph, tied_params), draft=draft and nnx.merge(draft[0], tied_draft))
        group = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size), batch)
        return _prefill(tied, state, group)

    def body(index, carry):
        state, outputs = carry
        state, output = run_group(state, index)
        outputs = jax.tree.map(lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, index * size, 0),
                               outputs, output)
        return state, outputs

    shapes = jax.eval_shape(run_group, state, 0)[1]
    outputs = jax.tree.map(lambda x: jnp.zeros((bucket.rows, *x.shape[1:]), x.dtype), shapes)
    groups = (jnp.sum(batch.length > 0) + size - 1) // size
    return jax.lax.fori_loop(0, groups, body, (state, outputs))


def _prefill(models: Models, state: EngineState, batch: StepBatch) -> tuple[EngineState, StepOutput]:
    """Prefill all rows of ``batch`` at once, in the draft model too if there is one."""
    if models.draft is not None:
        state, _ = draft_forward(models, state, batch)
    state, layers = forward(models, state, batch)
    return _finish_prefill(models, state, batch, layers)


def _finish_prefill(models: Models, state: EngineState, batch: StepBatch, layers: LayerOutput
                    ) -> tuple[EngineState, StepOutput]:
    """Complete a prefill: compute log-probabilities of the prompt, sample the next token, pool the hidden states."""
    counts = count_prefill(state.token_counts, batch)
    scores = score_prompt(models.target, layers.hidden, batch.targets, models.vocab_limit)
    last = last_hidden(layers.hidden, batch)
    sampled = sample_rows(models.target, last, batch.sampling, batch.slots, allowed=batch.allowed, counts=counts,
                          vocab_limit=models.vocab_limit)
    counts = count_output(counts, batch.slots, sampled.tokens, batch.samples)
    return state._replace(token_counts=counts), StepOutput(
        sampled=jax.tree.map(lambda x: x[:, None], sampled), counts=batch.samples.astype(jnp.int32), prompt=scores,
        page_counts=layers.page_counts, trips=layers.trips, pooled=pooled(layers.hidden, last, batch))


# --- decode


def _generate(models: Models, bucket: Bucket, state: EngineState, batch: StepBatch) -> tuple[EngineState, StepOutput]:
    """Generate tokens one after another, as many for each row as ``batch.counts`` says."""
    graph, params = nnx.split(models.target)

    def generate_token(state, tokens, index):
        tied_params, index = jax.lax.optimization_barrier((params, index))  # as in `_micro_batches`
        token_batch = decode_batch(batch, tokens, index, padding_slot=len(state.token_counts) - 1)
        tied = models._replace(target=nnx.merge(graph, tied_params))
        state, layers = forward(tied, state, token_batch)
        state, sampled = _sample_token(tied, state, token_batch, layers.hidden)
        return state, sampled, layers.page_counts, layers.trips

    def body(index, carry):
        state, tokens, outputs, page_counts, trips = carry
        state, sampled, new_counts, new_trips = generate_token(state, tokens, index)
        outputs = jax.tree.map(lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new[:, None], index, 1),
                               outputs, sampled)
        return state, sampled.tokens, outputs, page_counts + new_counts, jnp.where(trips == 0, new_trips, trips)

    _, shapes, page_counts, trips = jax.eval_shape(generate_token, state, batch.tokens[:, 0], jnp.int32(0))
    outputs = jax.tree.map(lambda x: jnp.zeros((len(x), bucket.steps, *x.shape[1:]), x.dtype), shapes)
    carry = state, batch.tokens[:, 0], outputs, *(jnp.zeros(x.shape, x.dtype) for x in (page_counts, trips))
    if bucket.steps == 1:
        state, _, outputs, page_counts, trips = body(0, carry)
    else:
        state, _, outputs, page_counts, trips = jax.lax.fori_loop(0, jnp.max(batch.counts), body, carry)
    return state, StepOutput(outputs, batch.counts, None, page_counts=page_counts, trips=trips)


def _sample_token(models: Models, state: EngineState, batch: StepBatch, hidden: jax.Array
                  ) -> tuple[EngineState, Sampled]:
    """Sample the next token of every row from its final hidden state (``[R, 1, D]``), and count it for penalties."""
    sampled = sample_rows(models.target, hidden[:, 0], batch.sampling, batch.slots, allowed=batch.allowed,
                          counts=state.token_counts, vocab_limit=models.vocab_limit)
    counts = count_output(state.token_counts, batch.slots, sampled.tokens, batch.samples)
    return state._replace(token_counts=counts), sampled
